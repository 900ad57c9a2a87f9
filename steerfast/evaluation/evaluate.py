"""Measure systems side by side on sets of prompts: attack success, over-refusal, tasks, gates and speed.

Answers are greedy. Work is cut into pieces: one system, one set, one batch of prompts. Each finished piece is written
to disk, so an interrupted evaluation continues with the next piece.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast._progress import track
from steerfast._versions import installed_version
from steerfast.errors import PromptError
from steerfast.evaluation.harness import run_task
from steerfast.evaluation.pieces import Pieces
from steerfast.evaluation.provenance import uses, words
from steerfast.evaluation.sets import EvalSet
from steerfast.evaluation.summary import (
    ATTACKS,
    HARMLESS,
    SetAnswers,
    examples,
    figures,
    gate,
    gate_figures,
    margins,
    strength_figures,
)
from steerfast.evaluation.systems import UNSTEERED, System, as_it_is
from steerfast.evaluation.timing import compare, milliseconds_per_token
from steerfast.evaluation.timing import milliseconds as milliseconds_of
from steerfast.fitting.activations import gate_reading, residual_rows
from steerfast.fitting.refusals import refusals_of
from steerfast.fitting.score import check_model, row_scores
from steerfast.hf.generation import PromptBatch, device_of, greedy_answers
from steerfast.hf.loading import load_model
from steerfast.hf.steering import Steering
from steerfast.hf.structure import find_decoder, identify, weights_fingerprint
from steerfast.judging.by_source import DEVELOPMENT, VALIDATION
from steerfast.judging.fluency import FluencyLimits, answer_perplexity, is_fluent, repetition
from steerfast.judging.judges import Judge, agreement
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import context_of, encode, pad_token
from steerfast.text.template import template_arguments

_LATENCY_PAIRS, _LATENCY_TOKENS = 8, 16


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`.

    max_new_tokens: answer length. seed: of tasks' few-shot examples.
    resume: a JSON-lines file of finished pieces, written and read back; another setting, set, profile or model makes
        other pieces.
    latency: also time each system in turns with unsteered, one sequence.
    strengths: of the first profile, for the frontier of attack success and fluency.
    force: evaluate sets that made a profile, and mark them in the result.
    limits: of fluent answers. load: loads the weights of other models.
    tasks: of lm-evaluation-harness, see `steerfast.evaluation.harness.run_task`. task_limit: most items of a task.
    """

    max_new_tokens: int = 64
    batch_size: int = 16
    seed: int = 0
    resume: str | os.PathLike[str] | None = None
    latency: bool = True
    progress: bool = True
    strengths: Sequence[float] = ()
    force: bool = False
    limits: FluencyLimits = field(default_factory=FluencyLimits)
    load: Callable[[str], tuple[nn.Module, Any]] = load_model
    tasks: Sequence[str | Mapping[str, Any]] = ()
    task_limit: int | None = None


@own_defaults
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    systems: Sequence[System],
    sets: Sequence[EvalSet],
    judges: Sequence[Judge],
    **options: Any,
) -> dict[str, Any]:
    """Let every system answer every set; judge, measure and compare the answers.

    Args:
        model, tokenizer: the target.
        systems: unsteered first, see `systems_of`; the others are compared with it.
        judges: the first judge makes attack success and over-refusal; the others are reported beside it.
        options: see `EvaluateOptions`.

    Returns:
        JSON data, see docs/evaluation.md. Rates carry Wilson intervals, AUC DeLong's; differences to unsteered carry
        Newcombe's of paired shares.

    Raises:
        PromptError: no system, set or judge, a repeated name, a set that made a profile,
            strengths without harmful sets.
        ProfileError: a profile of another model.
        JudgeError: an unreachable judge; the answers are kept.
        OutputError: `resume` cannot be written.
        SteerfastError: tasks without lm-eval.
    """
    given = EvaluateOptions(**options)
    seen = check(systems, sets, judges, given.force)
    if given.strengths and not any(one.kind in ATTACKS for one in sets):
        raise PromptError("strengths: expected a set of harmful prompts to answer at each strength, got none")
    find_decoder(model).refuse_if_steered()
    for system in systems:
        if system.profile is not None:
            check_model(system.profile, model, tokenizer)
    work = _Evaluation(model, tokenizer, judges, given)
    sets, left_out = work.plan(systems, sets)
    points = _at_strengths(systems, given.strengths)
    work.measure(systems, [at for _, at in points], sets)
    names = [judge.name for judge in judges]
    cells = {system.name: work.cells[system.name] for system in systems}
    return {
        "model": identify(model).name,
        "settings": _settings(model, names, given),
        "sets": {one.name: {**one.to_dict(), **_use(seen[one.name])} for one in sets},
        "agreement": work.agreements(systems, sets),
        "systems": {system.name: work.row(system, sets, names) for system in systems},
        "gates": {
            system.name: gate(profile, sets, work.scores[system.name])
            for system in systems
            if (profile := system.gated) is not None and not system.canned
        },
        "frontier": [
            {"system": first, "strength": at.strength, **strength_figures(sets, work.cells[at.name], names[0])}
            for first, at in points
        ],
        "examples": examples(sets, cells, names[0]),
        "left_out": left_out,
    }


def _use(seen: list[str]) -> dict[str, Any]:
    """Return what a set is to the profiles, by what its prompts did (`seen_by`)."""
    return {"use": DEVELOPMENT if seen else VALIDATION, "also_fitted_by": seen}


def _settings(model: nn.Module, judges: Sequence[str], given: EvaluateOptions) -> dict[str, Any]:
    tasks = [task if isinstance(task, str) else str(task.get("task")) for task in given.tasks]
    return {
        "seed": given.seed,
        "max_new_tokens": given.max_new_tokens,
        "batch_size": given.batch_size,
        **({"tasks": tasks} if tasks else {}),
        "judge": judges[0],
        "judges": judges,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {name: installed_version(name) for name in ("steerfast", "torch", "transformers")},
        "hardware": _hardware(device_of(model)),
    }


def check(
    systems: Sequence[System], sets: Sequence[EvalSet], judges: Sequence[Judge], force: bool = False
) -> dict[str, list[str]]:
    """Refuse wrong input before any work.

    Returns:
        `seen_by` of each set; without `force` the words' alone, which are a baseline and refuse no set.

    Raises:
        PromptError: as `evaluate`.
    """
    for what, given in (("systems", systems), ("sets", sets), ("judges", judges)):
        if not given:
            raise PromptError(f"{what}: expected at least one, got none")
        names = [one.name for one in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise PromptError(f"{what}: expected one of each name, got two called {twice[0]!r}")
    if systems[0].name != UNSTEERED:
        raise PromptError(f"systems: expected {UNSTEERED!r} as the first one, got {systems[0].name!r}")
    for one in [] if force else sets:
        if users := seen_by([system for system in systems if system.words is None], one):
            raise PromptError(
                f"sets: expected prompts that no profile was made with, got {one.name!r}: {'; '.join(users)} (force "
                "takes them all the same, and marks them)"
            )
    return {one.name: seen_by(systems, one) for one in sets}


def seen_by(systems: Sequence[System], one: EvalSet) -> list[str]:
    """List the systems that prompts of a set fitted, calibrated or tuned, in words; each entry starts with a count."""
    found: list[str] = []
    checked: list[Any] = []
    for system in systems:
        made_with = system.made_with
        if made_with in checked:  # the same profile without its gate
            continue
        checked.append(made_with)
        if seen := uses(made_with, one.prompts, one.digest):
            what = f"{system.name!r}" if system.words is not None else f"the profile of {system.name!r}"
            found += [f"{words({role: count}, len(one.items))} {what}" for role, count in seen.items()]
    return found


def _at_strengths(systems: Sequence[System], strengths: Sequence[float]) -> list[tuple[str, System]]:
    """Return the first system with a profile at each strength, ascending, each beside the system's name."""
    return [
        (first.name, replace(first, name=f"{first.name}@{strength:g}", strength=strength))
        for first in [system for system in systems if system.profile is not None and not system.canned][:1]
        for strength in sorted({*strengths})
    ]


# -- work ------------------------------------------------------------------------------------------


class _Evaluation:
    """Do the pieces of work of one evaluation, or read them back, and collect their results.

    Attributes:
        cells: system -> set -> its answers. scores: system -> set -> gate scores, float64 [items, layers].
        latencies, tasks: system -> result.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, judges: Sequence[Judge], options: EvaluateOptions) -> None:
        self.model, self.tokenizer, self.judges, self.options = model, tokenizer, judges, options
        self.cells: dict[str, dict[str, SetAnswers]] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self.latencies: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.pieces = Pieces(options.resume)
        self._weights = weights_fingerprint(model)
        self._chunks: dict[str, list[list[int]]] = {}

    def plan(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> tuple[list[EvalSet], dict[str, str]]:
        """Cut the sets into batches.

        Returns:
            The sets, with those prompts that fit the model's context under every defence; and set -> reason for
            missing prompts.
        """
        kept, left_out = [], {}
        most, size = context_of(self.model) - self.options.max_new_tokens, self.options.batch_size
        defences = dict.fromkeys([as_it_is, *(system.defence for system in systems)])
        for one in sets:
            encoded = [encode(self.tokenizer, [defence(item.prompt) for item in one.items]) for defence in defences]
            lengths = [[len(ids) for ids in wordings] for wordings in zip(*encoded, strict=True)]  # plain wording first
            places = [place for place, found in enumerate(lengths) if max(found) <= most]
            if len(places) < len(lengths):
                missing = f"{len(lengths) - len(places)} of {len(lengths)}"
                left_out[one.name] = f"{missing} prompts do not fit the model's context"
            if places:
                kept.append(replace(one, items=tuple(one.items[place] for place in places)))
                # Batches hold the same prompts in every system, so that rounding differs in no comparison.
                order = sorted(range(len(places)), key=lambda place: -lengths[places[place]][0])
                self._chunks[one.name] = [order[start : start + size] for start in range(0, len(order), size)]
        if not kept:
            raise PromptError("sets: expected some prompts that fit the model's context, got none")
        return kept, left_out

    def measure(self, systems: Sequence[System], points: Sequence[System], sets: Sequence[EvalSet]) -> None:
        """Do all work for `systems`, and answer attacks with the `points` of the frontier."""
        options = self.options
        attacks = [one for one in sets if one.kind in ATTACKS]
        self._score(systems, sets)
        for path, group in itertools.groupby(systems, key=lambda system: system.model):
            loaded = (self.model, self.tokenizer) if path is None else options.load(path)
            together = list(group)
            for system in together:
                if system.canned:
                    self._refuse(system, sets)
                else:
                    self._answer(system, sets, *loaded)
                    self._run_tasks(system, *loaded)
            if options.latency:
                self._time(together, sets, *loaded)
        for point in points:
            self._answer(point, attacks, self.model, self.tokenizer)
        everything = [*systems, *points]
        self._judge_fluency(everything, attacks)
        self._judge(everything, sets)

    def row(self, system: System, sets: Sequence[EvalSet], judges: Sequence[str]) -> dict[str, Any]:
        """Return all figures of a system, JSON data."""
        name = system.name
        base = None if name == UNSTEERED else self.cells[UNSTEERED]
        row = {"title": system.title, **figures(sets, self.cells[name], base, judges)}
        if (above := self._margins(system, sets)) is not None:
            found = gate_figures(sets, above, system.profile, self.scores.get(name, {}))
            row = {**row, **found, "intervals": {**row["intervals"], **found["intervals"]}}
        if name in self.tasks:
            row["tasks"] = self.tasks[name]["values"]
            row["intervals"]["tasks"] = self.tasks[name]["intervals"]
        if name in self.latencies:
            row["latency"] = self.latencies[name]
        return {**row, "seconds": self.pieces.seconds.get(name, 0.0)}

    def _score(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> None:
        """Score every prompt with every profile's gates; gates that read alike share a pass."""
        gated = [(system, profile) for system in systems if (profile := system.gated) is not None]
        self.scores = {
            system.name: {one.name: np.empty((len(one.items), profile.model.num_layers)) for one in sets}
            for system, profile in gated
        }
        work = [(one, chunk) for one in sets for chunk in self._chunks[one.name]] if gated else []
        for one, chunk in track(work, "gate scores", show=self.options.progress):
            ids = encode(self.tokenizer, [one.items[place].prompt for place in chunk])
            rows: dict[Gate, Tensor] = {}
            for system, profile in gated:
                work_on = functools.partial(self._gate_scores, profile, ids, rows)
                key = ("scores", self._weights, profile.checksum, ids)
                self.scores[system.name][one.name][chunk] = self.pieces.rows(key, work_on, system)

    def _margins(self, system: System, sets: Sequence[EvalSet]) -> dict[str, Any] | None:
        """Return set -> distances above the threshold, float64 [items]; None for a system that decides nothing."""
        if system.words is not None:
            return {one.name: system.words.margins(one.prompts) for one in sets}
        if (profile := system.gated) is None:
            return None
        return {one.name: margins(profile, self.scores[system.name][one.name]) for one in sets}

    def _gate_scores(self, profile: SteeringProfile, ids: list[list[int]], rows: dict[Gate, Tensor]) -> list[Any]:
        if profile.gate not in rows:
            reduce, padding = gate_reading(profile.gate)[0], pad_token(self.tokenizer)
            rows[profile.gate] = residual_rows(
                self.model, ids, reduce=reduce, batch_size=len(ids), pad_token_id=padding
            )
        return row_scores(profile, rows[profile.gate]).tolist()

    def _answer(self, system: System, sets: Sequence[EvalSet], model: nn.Module, tokenizer: Any) -> None:
        weights, length = weights_fingerprint(model), self.options.max_new_tokens
        work = [(one, chunk) for one in sets for chunk in self._chunks[one.name]]
        rows: dict[str, list[Any]] = {one.name: [None] * len(one.items) for one in sets}
        with system.on(model) as steering:
            for one, chunk in track(work, system.name, show=self.options.progress):
                ids = encode(tokenizer, [system.defence(one.items[place].prompt) for place in chunk])
                key = (one.kind, length, system.fingerprint(), weights, ids, None)
                generate = functools.partial(_answers, model, tokenizer, ids, length, steering)
                for place, row in zip(chunk, self.pieces.rows(key, generate, system), strict=True):
                    rows[one.name][place] = row
        for name, found in rows.items():
            tokens, texts, fired = (list(column) for column in zip(*found, strict=True))
            cell = SetAnswers(tokens, texts, [] if system.profile is None else fired)
            self.cells.setdefault(system.name, {})[name] = cell

    def _refuse(self, system: System, sets: Sequence[EvalSet]) -> None:
        """Take a canned answer where the system fires, and elsewhere the unsteered one; nothing is generated."""
        above = self._margins(system, sets) or {}
        for one in sets:
            plain, fired = self.cells[UNSTEERED][one.name], (above[one.name] > 0).tolist()
            canned = refusals_of([item.prompt for item in one.items], system.canned)
            ids = self.tokenizer(canned, add_special_tokens=False)["input_ids"]
            tokens = [said if fires else own for fires, said, own in zip(fired, ids, plain.tokens, strict=True)]
            texts = [said if fires else own for fires, said, own in zip(fired, canned, plain.texts, strict=True)]
            self.cells.setdefault(system.name, {})[one.name] = SetAnswers(tokens, texts, fired)

    def _run_tasks(self, system: System, model: nn.Module, tokenizer: Any) -> None:
        """Run the harness's tasks, unless the system rewords prompts: those of a task are the harness's."""
        if system.defence is not as_it_is or not self.options.tasks:
            return
        options, weights = self.options, weights_fingerprint(model)
        found: dict[str, Any] = {"values": {}, "intervals": {}}
        how: dict[str, Any] = {"limit": options.task_limit, "batch_size": options.batch_size, "seed": options.seed}
        for task in options.tasks:
            described = task if isinstance(task, str) else repr(sorted(task.items()))
            described += "".join(map(str, sorted(template_arguments(tokenizer).items())))
            key = ("task", described, options.task_limit, options.seed, system.fingerprint(), weights)
            with system.on(model):
                result = self.pieces.rows(key, functools.partial(run_task, model, tokenizer, task, **how), system)
            for part, by_task in found.items():
                by_task.update(result[part])
        self.tasks[system.name] = found

    def _time(self, systems: Sequence[System], sets: Sequence[EvalSet], model: nn.Module, tokenizer: Any) -> None:
        """Time systems of one model in turns with the unsteered target, on the prompts that open most gates."""
        gated = [self.cells[system.name] for system in systems if system.gated and not system.canned]
        asked = [
            (sum(cells[one.name].fired[place] for cells in gated), one.name, place, item.prompt)
            for kinds in (ATTACKS, HARMLESS)
            for one in sets
            if one.kind in kinds
            for place, item in enumerate(one.items)
        ]
        chosen = sorted(asked, key=lambda entry: -entry[0])[:_LATENCY_PAIRS]
        runs = {"": (System(UNSTEERED, ""), self.model, encode(self.tokenizer, [prompt for *_, prompt in chosen]))}
        for one in systems:
            runs[one.name] = (one, model, encode(tokenizer, [one.defence(prompt) for *_, prompt in chosen]))

        def milliseconds(run: tuple[System, nn.Module, list[list[int]]], turn: int) -> float:
            system, model, prompts = run
            _, name, place, prompt = chosen[turn % len(chosen)]
            ids, tokens = prompts[turn % len(chosen)], _LATENCY_TOKENS
            fires = bool(system.canned) and self.cells[system.name][name].fired[place]
            decided = 0.0
            if system.words is not None:
                reads = functools.partial(system.words.margins, [prompt])
                decided = milliseconds_of(reads, device_of(model))
                if fires:
                    return decided / tokens
            with system.on(model):  # a gate that fires has read the prompt, and decodes nothing
                length = 1 if fires else tokens
                return milliseconds_per_token(model, ids, length) * length / tokens + decided / tokens

        def work() -> list[Any]:
            calls = {name: functools.partial(milliseconds, run) for name, run in runs.items()}
            _, *found = compare(calls, _LATENCY_PAIRS).values()
            return [{"ms_per_token": own, "ratio": ratio, "pairs": _LATENCY_PAIRS} for own, ratio in found]

        weights = weights_fingerprint(model)
        key = (
            "latency", self._weights, weights, [(system.fingerprint(), ids) for system, _, ids in runs.values()]
        )  # fmt: skip
        found = self.pieces.rows(key, work, systems[0])
        self.latencies |= {system.name: one for system, one in zip(systems, found, strict=True)}

    def _judge_fluency(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> None:
        """Judge answers by repetition and by their perplexity under the unsteered target."""
        prompts = {one.name: encode(self.tokenizer, one.prompts) for one in sets}
        padding = pad_token(self.tokenizer)
        work = [(system, one) for system in systems for one in sets]
        for system, one in track(work, "fluency", show=self.options.progress):
            cell = self.cells[system.name][one.name]
            tokens = cell.tokens
            if system.model is not None:  # the tokenizer may differ
                tokens = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in cell.texts]
            cell.fluent = [False] * len(tokens)
            for chunk in self._chunks[one.name]:
                texts = [prompts[one.name][place] for place in chunk], [tokens[place] for place in chunk]
                measure = functools.partial(answer_perplexity, self.model, *texts, self.options.batch_size, padding)
                found = self.pieces.rows(("perplexity", self._weights, texts), measure, system)
                for place, value in zip(chunk, found, strict=True):
                    cell.fluent[place] = is_fluent(repetition(tokens[place]), value, self.options.limits)

    def _judge(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> None:
        work = [(system, one, judge) for system in systems for one in sets for judge in self.judges]
        for system, one, judge in track(work, "judging", show=self.options.progress):
            cell = self.cells[system.name].get(one.name)
            if cell is not None:
                cell.refused[judge.name] = judge(one.texts, cell.texts)

    def agreements(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> dict[str, Any]:
        """Return set -> pair of judges -> agreement over the answers of all systems."""
        found: dict[str, Any] = {}
        for one in sets:
            for pair in itertools.combinations(self.judges, 2):
                verdicts = [
                    [verdict for system in systems for verdict in self.cells[system.name][one.name].refused[judge.name]]
                    for judge in pair
                ]
                found.setdefault(one.name, {})["~".join(judge.name for judge in pair)] = agreement(*verdicts)
        return found


def _answers(
    model: nn.Module, tokenizer: Any, ids: Sequence[Sequence[int]], length: int, steering: Steering | None
) -> list[Any]:
    """Return tokens, text and whether a gate fired (None if unsteered) for each prompt."""
    fired: dict[int, bool] = {}

    def note(batch: PromptBatch) -> None:
        if steering is not None:
            fired.update(zip(batch.indices, steering.fired.tolist(), strict=True))

    answers = greedy_answers(model, tokenizer, ids, length, batch_size=len(ids), after=note)
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    return [[answer, text, fired.get(place)] for place, (answer, text) in enumerate(zip(answers, texts, strict=True))]


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"

"""Measure systems side by side: attack success, over-refusal, usefulness, gates and speed, on sets of prompts.

Everything is greedy and every figure comes from answers that lie on disk as soon as they are given: work is cut into
pieces of a system, a set and a batch of its prompts, and an interrupted evaluation goes on with the next piece.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerfast._progress import track
from steerfast._versions import installed_version
from steerfast.errors import PromptError
from steerfast.evaluation.latency import alternating, milliseconds_per_token
from steerfast.evaluation.pieces import Pieces
from steerfast.evaluation.sets import EvalSet, Item
from steerfast.evaluation.summary import (
    ANSWERED,
    ATTACKS,
    HARMLESS,
    Cell,
    examples,
    figures,
    gate,
    gate_figures,
    pooled,
)
from steerfast.evaluation.systems import UNSTEERED, System, as_it_is
from steerfast.evaluation.utility import maths, multiple_choice, perplexity
from steerfast.fitting.activations import gate_reading, residual_rows
from steerfast.fitting.score import check_model, row_scores
from steerfast.hf.generation import PromptBatch, device_of, greedy_answers
from steerfast.hf.loading import load_model
from steerfast.hf.steering import Steering
from steerfast.hf.structure import find_decoder, identify, weights_fingerprint
from steerfast.judging.fluency import FluencyLimits, answer_perplexity, is_fluent, repetition
from steerfast.judging.judges import Judge, agreement
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import context_of, encode, pad_token
from steerfast.text.prompts import SHIPPED_PREFIX, read_prompts

__all__ = ["check", "evaluate", "seen_by", "settings_of"]

_SCORED = ("choice", "text")  # nothing is generated
_LATENCY_PAIRS, _LATENCY_TOKENS = 8, 16


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    systems: Sequence[System],
    sets: Sequence[EvalSet],
    judges: Sequence[Judge],
    *,
    max_new_tokens: int = 64,
    maths_max_new_tokens: int = 192,
    batch_size: int = 16,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    latency: bool = True,
    progress: bool = True,
    strengths: Sequence[float] = (),
    force: bool = False,
    limits: FluencyLimits | None = None,
    load: Callable[[str], tuple[nn.Module, Any]] = load_model,
) -> dict[str, Any]:
    """Let every system answer every set, and judge, measure and compare what comes.

    Args:
        model, tokenizer: the target. Other weights are loaded one after the other by `load`.
        systems: unsteered is the first, see `systems_of`; the others are compared with it.
        judges: the first one's verdicts make attack success and over-refusal; the others' stand beside.
        max_new_tokens: answer length; maths_max_new_tokens: on maths, where the answer has to come to its end.
        seed: of the bootstrap.
        resume: a JSON-lines file of finished pieces, written as they come and read back; another setting, set, profile
            or model makes other pieces.
        latency: also time each system in turns with unsteered, one sequence.
        strengths: of the first profile, for the frontier of attack success and fluency.
        force: evaluate sets that a profile was made with, and say so in the result.
        limits: of fluent answers.

    Returns:
        JSON data, see docs/evaluation.md. Rates carry Wilson intervals, AUC DeLong's; perplexity and differences to
        unsteered carry those of a bootstrap over items.

    Raises:
        PromptError: no system, set or judge, one name twice, a set that a profile was made with.
        ProfileError: a profile of another model.
        JudgeError: a judge that cannot be reached; the answers are kept.
        OutputError: `resume` cannot be written.
    """
    seen = check(systems, sets, judges, force)
    find_decoder(model).refuse_if_steered()
    for system in systems:
        if system.profile is not None:
            check_model(system.profile, model, tokenizer)
    run = _Run(model, tokenizer, judges, _Lengths(max_new_tokens, maths_max_new_tokens), batch_size, resume, progress)
    sets, left_out = run.fitting(systems, sets)
    answered, attacks = ([one for one in sets if one.kind in kinds] for kinds in (ANSWERED, ATTACKS))
    points = _at_strengths(systems, strengths)
    all_systems = [*systems, *(point for _, point in points)]
    run.score(systems, answered)
    for path, group in itertools.groupby(systems, key=lambda system: system.model):
        at_hand = (model, tokenizer) if path is None else load(path)
        together = list(group)
        for system in together:
            run.answer(system, sets, *at_hand)
        if latency:
            run.time(together, sets, *at_hand)
    for _, point in points:
        run.answer(point, attacks, model, tokenizer)
    run.perplexities(all_systems, attacks, limits or FluencyLimits())
    run.judge(all_systems, answered)

    names = [judge.name for judge in judges]
    table: dict[str, Any] = {}
    gates: dict[str, Any] = {}
    for system in systems:
        base = None if system.name == UNSTEERED else run.cells[UNSTEERED]
        row = {"title": system.title, **figures(sets, run.cells[system.name], base, names, seed)}
        if system.name in run.scores and system.profile is not None:
            scores = run.scores[system.name]
            found = gate_figures(system.profile, sets, scores)
            row = {**row, **found, "intervals": {**row["intervals"], **found["intervals"]}}
            gates[system.name] = gate(system.profile, sets, scores)
        if system.name in run.latencies:
            row["latency"] = run.latencies[system.name]
        table[system.name] = {**row, "seconds": run.pieces.seconds.get(system.name, 0.0)}
    return {
        "model": identify(model).name,
        "settings": settings_of(
            model,
            names,
            seed=seed,
            max_new_tokens=max_new_tokens,
            maths_max_new_tokens=maths_max_new_tokens,
            batch_size=batch_size,
        ),
        "sets": {one.name: {**one.to_dict(), "also_fitted_by": seen[one.name]} for one in sets},
        "agreement": run.agreements(systems, answered),
        "systems": table,
        "gates": gates,
        "frontier": [
            {
                "system": first,
                "strength": point.strength,
                **pooled(sets, run.cells[point.name], names[0]),
            }
            for first, point in points
        ],
        "examples": examples(answered, {system.name: run.cells[system.name] for system in systems}, names[0]),
        "left_out": left_out,
    }


def settings_of(model: nn.Module, judges: Sequence[str], **options: Any) -> dict[str, Any]:
    """The settings in a result, JSON data: `options`, the judges by name, and what the model ran with."""
    return {
        **options,
        "judge": judges[0],
        "judges": judges,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {name: installed_version(name) for name in ("steerfast", "torch", "transformers")},
        "hardware": _hardware(device_of(model)),
    }


def check(
    systems: Sequence[System], sets: Sequence[EvalSet], judges: Sequence[Judge], force: bool = False
) -> dict[str, list[str]]:
    """Refuse, before any work, what cannot be evaluated.

    Returns:
        `seen_by` of each set; empty lists unless `force`.

    Raises:
        PromptError: as `evaluate`.
    """
    for what, given in (("systems", systems), ("sets", sets), ("judges", judges)):
        if not given:
            raise PromptError(f"{what}: expected at least one, got none")
        names = [one.name for one in given]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise PromptError(f"{what}: expected one of each name, got two called {twice!r}")
    if systems[0].name != UNSTEERED:
        raise PromptError(f"systems: expected {UNSTEERED!r} as the first one, got {systems[0].name!r}")
    seen = {one.name: seen_by(systems, one) for one in sets}
    for name, users in seen.items():
        if users and not force:
            raise PromptError(
                f"sets: expected prompts that no profile was made with, got {name!r}: {'; '.join(users)} (force takes "
                "them all the same, and marks them)"
            )
    return seen


def seen_by(systems: Sequence[System], one: EvalSet) -> list[str]:
    """Which profiles were fitted, calibrated or tuned with prompts of a set, in words; each starts with how many.

    A profile tells the names and hashes of its sets: a set is recognised by its hash, single prompts where a set of
    the profile ships with the package.
    """
    found = []
    prompts = set(one.prompts)
    checked: list[Any] = []
    for system in systems:
        made_with = [] if system.profile is None else list(_made_with(system.profile))
        if made_with in checked:  # one profile with its gate and without
            continue
        checked.append(made_with)
        for role, described in made_with:
            if described.get("sha256") == one.digest:
                count = len(prompts)
            else:
                shipped = [name for name in str(described.get("name")).split(" + ") if name.startswith(SHIPPED_PREFIX)]
                count = len(prompts & set(itertools.chain.from_iterable(_shipped(name) for name in shipped)))
            if count:
                found.append(f"{count} of {len(prompts)} prompts {role} the profile of {system.name!r}")
    return found


def _made_with(profile: SteeringProfile) -> Iterable[tuple[str, Mapping[str, Any]]]:
    parts = (
        ("fitted", profile.fitted),
        ("calibrated", profile.calibration.get("sets", {})),
        ("tuned", profile.tuned),
    )
    for role, described in parts:
        for value in described.values():
            if isinstance(value, Mapping) and "sha256" in value:
                yield role, value


def _shipped(name: str) -> list[str]:
    try:
        return read_prompts(name)
    except PromptError:  # of a release that ships other sets
        return []


def _at_strengths(systems: Sequence[System], strengths: Sequence[float]) -> list[tuple[str, System]]:
    """The first system with a profile: its name, and it at each of the strengths, ascending."""
    first = next((system for system in systems if system.profile is not None), None)
    if first is None:
        return []
    return [
        (first.name, replace(first, name=f"{first.name}@{strength:g}", strength=strength))
        for strength in sorted({*strengths})
    ]


# -- work ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lengths:
    """Most new tokens of an answer, and of one to a maths question, which has to come to its end."""

    answer: int
    maths: int

    def of(self, kind: str) -> int:
        return self.maths if kind == "maths" else self.answer


class _Run:
    """One evaluation: pieces of work, done or read back, and what they come to."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        judges: Sequence[Judge],
        lengths: _Lengths,
        batch_size: int,
        resume: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.judges, self.lengths = model, tokenizer, judges, lengths
        self.batch_size, self.progress = batch_size, progress
        self.cells: dict[str, dict[str, Cell]] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self.latencies: dict[str, dict[str, Any]] = {}
        self.pieces = Pieces(resume)
        self._weights = weights_fingerprint(model)
        self._chunks: dict[str, list[list[int]]] = {}

    def fitting(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> tuple[list[EvalSet], dict[str, str]]:
        """The sets with the prompts that fit the model's context under every defence; and what was left out."""
        kept, left_out = [], {}
        for one in sets:
            room = self.lengths.of(one.kind)
            if one.kind in _SCORED:
                texts = [text for item in one.items for text in (*item.choices, item.answer) if text]
                room = max(len(self.tokenizer(text)["input_ids"]) for text in texts) + 1
            worded = [
                [len(ids) for ids in encode(self.tokenizer, [defence(item.prompt) for item in one.items])]
                for defence in dict.fromkeys([as_it_is, *(system.defence for system in systems)])
            ]
            fits = [max(lengths) + room <= context_of(self.model) for lengths in zip(*worded, strict=True)]
            if not all(fits):
                left_out[one.name] = f"{fits.count(False)} of {len(fits)} prompts do not fit the model's context"
            places = [place for place, fit in enumerate(fits) if fit]
            if places:
                kept.append(replace(one, items=tuple(one.items[place] for place in places)))
                lengths = [worded[0][place] for place in places]
                # Alike lengths go together, the same prompts in every system: a rounding that differs from one batch
                # to another then differs in none of the comparisons.
                order = sorted(range(len(places)), key=lambda place: -lengths[place])
                size = self.batch_size
                self._chunks[one.name] = [order[start : start + size] for start in range(0, len(order), size)]
        if not kept:
            raise PromptError("sets: expected some prompts that fit the model's context, got none")
        return kept, left_out

    def score(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> None:
        """Score every prompt with the gates of every profile, all from one pass; systems without a gate are left."""
        gated = [system for system in systems if system.gated]
        found = {system.name: {one.name: [None] * len(one.items) for one in sets} for system in gated}
        work = [(one, chunk) for one in sets for chunk in self._chunks[one.name]] if gated else []
        padding = pad_token(self.tokenizer)
        for one, chunk in track(work, "gate scores", show=self.progress):
            ids = encode(self.tokenizer, [one.items[place].prompt for place in chunk])
            read = functools.partial(residual_rows, self.model, ids, batch_size=len(ids), pad_token_id=padding)
            rows = functools.cache(functools.partial(_read, read))
            for system in gated:
                profile = system.profile
                assert profile is not None
                key = ("scores", self._weights, profile.checksum, ids)
                scores = self.pieces.rows(key, functools.partial(_scores, profile, rows), system)
                for place, row in zip(chunk, scores, strict=True):
                    found[system.name][one.name][place] = row
        self.scores = {
            system: {name: np.array(rows, dtype=np.float64) for name, rows in by_set.items()}
            for system, by_set in found.items()
        }

    def answer(self, system: System, sets: Sequence[EvalSet], model: nn.Module, tokenizer: Any) -> None:
        """Everything that `system` says to `sets`."""
        weights = weights_fingerprint(model)
        cells = self.cells.setdefault(system.name, {one.name: Cell() for one in sets})
        work = [(one, chunk) for one in sets for chunk in self._chunks[one.name]]
        rows: dict[str, list[Any]] = {one.name: [None] * len(one.items) for one in sets}
        with system.on(model) as steering:
            for one, chunk in track(work, system.name, show=self.progress):
                items = [one.items[place] for place in chunk]
                ids = encode(tokenizer, [system.defence(item.prompt) for item in items])
                asked = [(item.choices, item.correct, item.answer) for item in items] if one.kind in _SCORED else None
                key = (one.kind, self.lengths.of(one.kind), system.fingerprint(), weights, ids, asked)
                work_of = functools.partial(self._work, one.kind, system, items, ids, model, tokenizer, steering)
                for place, row in zip(chunk, self.pieces.rows(key, work_of, system), strict=True):
                    rows[one.name][place] = row
        for one in sets:
            cell, found = cells[one.name], rows[one.name]
            if one.kind == "choice":
                cell.right = found
            elif one.kind == "text":
                cell.losses = found
            else:
                cell.tokens, cell.texts, fired = (list(column) for column in zip(*found, strict=True))
                cell.fired = fired if system.profile is not None else []
            if one.kind == "maths":
                cell.right = maths(cell.texts, one.items)

    def _work(
        self,
        kind: str,
        system: System,
        items: Sequence[Item],
        ids: Sequence[Sequence[int]],
        model: nn.Module,
        tokenizer: Any,
        steering: Steering | None,
    ) -> list[Any]:
        """A row for each item: whether it was right, its mean loss, or tokens, text and whether a gate opened."""
        if kind == "choice":
            return multiple_choice(model, tokenizer, items, prompts=ids)
        if kind == "text":
            return [math.log(one) for one in perplexity(model, tokenizer, items, prompts=ids)]
        fired: dict[int, bool] = {}

        def note(batch: PromptBatch) -> None:
            if steering is not None:
                fired.update(zip(batch.indices, steering.fired.tolist(), strict=True))

        length = self.lengths.of(kind)
        answers = greedy_answers(model, tokenizer, ids, length, batch_size=len(ids), after=note)
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        return [
            [answer, text, fired.get(place)] for place, (answer, text) in enumerate(zip(answers, texts, strict=True))
        ]

    def time(self, systems: Sequence[System], sets: Sequence[EvalSet], model: nn.Module, tokenizer: Any) -> None:
        """Time systems of one model in turns with the target as it is, one sequence: attacks that open most gates."""
        gated = [self.cells[system.name] for system in systems if system.gated]
        asked = [
            (sum(cells[one.name].fired[place] for cells in gated), item.prompt)
            for kinds in (ATTACKS, HARMLESS)
            for one in sets
            if one.kind in kinds
            for place, item in enumerate(one.items)
        ]
        chosen = [prompt for _, prompt in sorted(asked, key=lambda pair: -pair[0])[:_LATENCY_PAIRS]]
        if not chosen:
            return
        unsteered = System(UNSTEERED, "")
        runs = [(unsteered, self.model, encode(self.tokenizer, chosen))]
        runs += [(one, model, encode(tokenizer, [one.defence(prompt) for prompt in chosen])) for one in systems]

        def milliseconds(run: tuple[System, nn.Module, list[list[int]]], turn: int) -> float:
            system, model, prompts = run
            with system.on(model):
                return milliseconds_per_token(model, prompts[turn % len(prompts)], _LATENCY_TOKENS)

        def work() -> list[Any]:
            base, *times = alternating([functools.partial(milliseconds, run) for run in runs], _LATENCY_PAIRS)
            ratios = [statistics.median(b / a for a, b in zip(base, ours, strict=True)) for ours in times]
            return [
                {"ms_per_token": statistics.median(ours), "ratio": ratio, "pairs": _LATENCY_PAIRS}
                for ours, ratio in zip(times, ratios, strict=True)
            ]

        weights = weights_fingerprint(model)
        key = ("latency", self._weights, weights, [(system.fingerprint(), prompts) for system, _, prompts in runs])
        found = self.pieces.rows(key, work, systems[0])
        self.latencies |= {system.name: one for system, one in zip(systems, found, strict=True)}

    def perplexities(self, systems: Sequence[System], sets: Sequence[EvalSet], limits: FluencyLimits) -> None:
        """Which answers are fluent, by repetition and the perplexity that the unsteered target finds in them."""
        prompts = {one.name: encode(self.tokenizer, one.prompts) for one in sets}
        padding = pad_token(self.tokenizer)
        work = [(system, one) for system in systems for one in sets]
        for system, one in track(work, "fluency", show=self.progress):
            cell = self.cells[system.name][one.name]
            tokens = cell.tokens
            if system.model is not None:  # whose tokenizer may be another
                tokens = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in cell.texts]
            cell.fluent = [False] * len(tokens)
            for chunk in self._chunks[one.name]:
                texts = [prompts[one.name][place] for place in chunk], [tokens[place] for place in chunk]
                work_of = functools.partial(answer_perplexity, self.model, *texts, self.batch_size, padding)
                found = self.pieces.rows(("perplexity", self._weights, texts), work_of, system)
                for place, value in zip(chunk, found, strict=True):
                    cell.fluent[place] = is_fluent(repetition(tokens[place]), value, **limits.to_dict())

    def judge(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> None:
        """Every judge's verdict on every answer."""
        work = [(system, one, judge) for system in systems for one in sets for judge in self.judges]
        for system, one, judge in track(work, "judging", show=self.progress):
            cell = self.cells[system.name].get(one.name)
            if cell is not None:
                cell.refused[judge.name] = judge(one.prompts, cell.texts)

    def agreements(self, systems: Sequence[System], sets: Sequence[EvalSet]) -> dict[str, Any]:
        """Of each set and pair of judges, over the answers of all systems."""
        found: dict[str, Any] = {}
        for one in sets:
            for pair in itertools.combinations(self.judges, 2):
                verdicts = [
                    [verdict for system in systems for verdict in self.cells[system.name][one.name].refused[judge.name]]
                    for judge in pair
                ]
                found.setdefault(one.name, {})["~".join(judge.name for judge in pair)] = agreement(*verdicts)
        return found


def _read(read: Callable[..., Tensor], gate: Gate) -> Tensor:
    return read(reduce=gate_reading(gate)[0])


def _scores(profile: SteeringProfile, rows: Callable[[Gate], Tensor]) -> list[Any]:
    return row_scores(profile, rows(profile.gate)).tolist()


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"

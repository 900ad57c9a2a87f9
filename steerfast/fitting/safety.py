"""The safety recipe: extract, calibrate, learn and tune in one go, each stage kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from steerfast._files import make_folder
from steerfast._progress import stage
from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.budget import EFFORTS, RECIPE, Effort, largest, speed_of
from steerfast.fitting.calibrate import calibrate
from steerfast.fitting.extract import extract
from steerfast.fitting.labelled import Given, Labelled, evenly
from steerfast.fitting.learn import learn
from steerfast.fitting.tune import tune
from steerfast.hf.structure import weights_fingerprint
from steerfast.profile import SteeringProfile
from steerfast.text.corpus import corpus
from steerfast.text.encoding import encode
from steerfast.text.examples import Example, unique_text
from steerfast.text.prompts import read_prompts
from steerfast.text.splits import own_examples
from steerfast.text.template import template_arguments

_LEARN = {"batch_size": 8, "answer_tokens": 48}
_TUNE = {
    "vectors": ["learned"],
    "positions": ["response"],
    "max_new_tokens": 64,
    "min_fluent": 0.9,
    "min_unchanged": 0.9,
}
_MINUTES = 25.0
_USUAL = EFFORTS[: EFFORTS.index(RECIPE) + 1]  # without a word on time, a quick model does no more than the recipe
_CORPUS = "steerfast:corpus"
_STAGES = ("extract", "calibrate", "learn", "tune")


@dataclass(frozen=True)
class SafetyOptions:
    """Options of `fit` for safety.

    Args:
        harmful, harmless: prompts in place of the corpus. A third of those without a split calibrates.
        prompts: labelled examples beside the corpus, or beside `harmful` and `harmless`.
        per_source: the most prompts of a source and label that fit the gate. With it and without `minutes`, all else is
            that of `steerfast.fitting.budget.RECIPE`.
        max_false_positive_rate: the share of harmless prompts that may open the gate, see `calibrate`.
        minutes: how long it may take, by an estimate that includes a report on the corpus' split `validate`; it
            chooses one of `steerfast.fitting.budget.EFFORTS`. Default: 25, and at most `RECIPE`.
        work: a folder that keeps the rows and the finished stages: a fit that was interrupted goes on.
        names: names of the given sets in the profile (``{"harmful": ..., "harmless": ..., "prompts": ...}``).
    """

    harmful: Sequence[Given] = ()
    harmless: Sequence[Given] = ()
    prompts: Sequence[Example] = ()
    per_source: int | None = None
    max_false_positive_rate: float = 0.02
    minutes: float | None = None
    work: str | os.PathLike[str] | None = None
    names: dict[str, str] | None = None
    batch_size: int = 16
    progress: bool = True


def fit_safety(model: nn.Module, tokenizer: Any, options: SafetyOptions) -> SteeringProfile:
    """Return a profile whose gate opens for harmful prompts and whose vector was learned from refusals.

    Where tune finds no setting that is fluent and leaves harmless answers, the learned one stays, and
    ``tuned["problem"]`` says why.
    """
    return _Recipe(model, tokenizer, options).run()


def work_folder(work: str | os.PathLike[str] | None) -> Path | None:
    """Make a work folder, if one is named, see `make_folder`."""
    return None if work is None else make_folder(work, "work: cannot make the folder")


class _Recipe:
    """One fit: its prompts, its effort and its work folder."""

    def __init__(self, model: nn.Module, tokenizer: Any, options: SafetyOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.work = work_folder(options.work)
        self.sets = {split: self._examples(split) for split in ("fit", "calibrate")}
        self.effort = self._effort()
        # What the next stage starts from.
        self._before = weights_fingerprint(model) + "".join(map(str, sorted(template_arguments(tokenizer).items())))

    def run(self) -> SteeringProfile:
        """Run all stages."""
        effort, fitted, names = self.effort, self.sets["fit"], self._names
        reading: dict[str, Any] = {"batch_size": self.options.batch_size, "cache": self._file("rows")}
        profile = self._stage(
            "extract",
            {"per_source": effort.per_source, "vectors": ["srv"], "names": names("fit")},
            partial(extract, **reading),
            lambda made: f"{_count(made.fitted)} prompts",
            fitted,
        )
        rate = {"max_false_positive_rate": self.options.max_false_positive_rate}
        profile = self._stage(
            "calibrate",
            {"per_source": effort.calibrate, **rate, "names": names("calibrate")},
            partial(calibrate, profile, **reading),
            lambda made: f"{_count(made.calibration['sets'])} prompts, layer {made.sensor} decides",
            self.sets["calibrate"],
        )
        profile = self._stage(
            "learn",
            {**_LEARN, "steps": effort.steps, "names": names("fit")},
            partial(learn, profile, resume=self._file("learn.safetensors")),
            lambda made: "loss {} to {} nats a token".format(*made.fitted["learned"]["loss"]),
            {"harmful": fitted["harmful"]},
        )
        return self._tuned(profile)

    def _tuned(self, profile: SteeringProfile) -> SteeringProfile:
        names = {side: f"steerfast:{side}_tune" for side in ("harmful", "harmless")}
        asked = {
            side: [Example(one, side, name) for one in evenly(read_prompts(name), self.effort.asked)]
            for side, name in names.items()
        }

        def search(*given: Any, **chosen: Any) -> SteeringProfile:
            try:
                return tune(profile, *given, **chosen, resume=self._file("trials.jsonl"))
            except PromptError as error:
                if not str(error).startswith(("min_fluent", "min_unchanged")):
                    raise
                return replace(profile, candidates={}, tuned={"problem": str(error)})

        def finding(made: SteeringProfile) -> str:
            if "problem" in made.tuned:
                return "no setting is good enough"
            return f"{made.tuned['refusal_strict']:.0%} refused, {made.tuned['fluent']:.0%} fluent"

        chosen = {**_TUNE, "strengths": list(self.effort.strengths), "names": names}
        return self._stage("tune", chosen, search, finding, asked)

    def _stage(
        self,
        name: str,
        options: dict[str, Any],
        make: Callable[..., SteeringProfile],
        finding: Callable[[SteeringProfile], str],
        sets: dict[str, list[Example]],
    ) -> SteeringProfile:
        """Return what a stage makes of sets and options, or what it made of them before; print a line."""
        title = f"{_STAGES.index(name) + 1}/{len(_STAGES)} {name}"
        with stage(title, show=self.options.progress) as findings:
            file = self._file(f"{name}-{_digest(self._before, options, sets)}.safetensors")
            if file is not None and file.exists():
                profile = SteeringProfile.load(file)
                findings.append("done before")
            else:
                profile = make(self.model, self.tokenizer, **sets, **options, progress=self.options.progress)
                if file is not None:
                    profile.save(file)
            findings.append(finding(profile))
        self._before = profile.checksum
        return profile

    def _file(self, name: str) -> Path | None:
        return None if self.work is None else self.work / name

    def _examples(self, split: str) -> dict[str, list[Example]]:
        """Return the harmful and the other examples of a split: of the corpus and of the user."""
        options = self.options
        given = [
            one if isinstance(one, Example) else Example(one, label, label)
            for label, side in (("harmful", options.harmful), ("harmless", options.harmless))
            for one in side
        ]
        found = [] if given else corpus(split)
        if own := [*given, *options.prompts]:
            found = [*found, *own_examples(own, split)[0]]
        return {
            "harmful": [one for one in found if one.label == "harmful"],
            "harmless": [one for one in found if one.label != "harmful"],
        }

    def _names(self, split: str) -> dict[str, str]:
        """Return the names of both sets of a split."""
        given, options = self.options.names or {}, self.options
        replaced, found = options.harmful or options.harmless, {}
        for side in ("harmful", "harmless"):
            parts = [given.get(side, side)] if replaced else [_CORPUS]
            if options.prompts:
                parts.append(given.get("prompts", "prompts"))
            found[side] = f"{' + '.join(parts)}, {split}"
        return found

    def _effort(self) -> Effort:
        """Return how much is tried; `per_source` overrides the budget's choice."""
        given, minutes = self.options.per_source, self.options.minutes
        if given is None:
            return self._within(EFFORTS, minutes) if minutes is not None else self._within(_USUAL, _MINUTES)
        if given < 1:
            raise ProfileError(f"per_source: expected at least 1, got {given}")
        chosen = RECIPE if minutes is None else self._within(EFFORTS, minutes)
        return replace(chosen, per_source=given)

    def _within(self, efforts: Sequence[Effort], minutes: float) -> Effort:
        """Return the largest of some efforts whose estimate keeps within some minutes."""
        fitted, given = (Labelled.of(**self.sets[split]) for split in ("fit", "calibrate"))
        reported = Labelled(tuple(corpus("validate")))
        with stage("budget", show=self.options.progress) as findings:
            speed = speed_of(self.model, self.tokenizer, fitted.prompts, self.work)
            length = {
                id(one): len(ids)
                for sets in (fitted, given, reported)
                for one, ids in zip(sets.examples, encode(self.tokenizer, sets.prompts), strict=True)
            }

            def tokens(sets: Labelled) -> int:
                return sum(length[id(one)] for one in sets.examples)

            def seconds(effort: Effort) -> float:
                lessons = fitted.at_most(effort.per_source)
                read = tokens(lessons)
                learned = effort.steps * _LEARN["batch_size"] * (read / len(lessons) + _LEARN["answer_tokens"])
                read += tokens(given.at_most(effort.calibrate)) + tokens(reported.at_most(effort.calibrate))
                answers = (len(effort.strengths) + 2) * speed.answer(effort.asked, _TUNE["max_new_tokens"])  # type: ignore[arg-type]
                return speed.read(read) + speed.learn(learned) + answers

            chosen = largest(efforts, minutes, seconds)
            findings += [
                f"{1 / speed.per_token:.0f} tokens a second",
                f"{chosen.per_source} prompts a source, {chosen.steps} steps",
                f"some {seconds(chosen) / 60:.1f} of {minutes:g} minutes",
            ]
        return chosen


def _digest(before: str, options: dict[str, Any], sets: dict[str, list[Example]]) -> str:
    """Return a digest of all that a stage depends on."""
    told = {
        side: [{**asdict(one), "prompt": unique_text(one.prompt)} for one in examples]
        for side, examples in sets.items()
    }
    return hashlib.sha256(json.dumps([before, options, told], sort_keys=True).encode()).hexdigest()[:16]


def _count(sets: Any) -> int:
    return sum(int(sets[side]["count"]) for side in ("harmful", "harmless"))

"""Tune the steering, so that prompts that fire are refused in fluent text: vector kind, layers, strength, positions.

The gate stays the same. It alone decides which prompts change: harmless answers depend on it, not on the search.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast._options import read_options
from steerfast._progress import track
from steerfast._records import Records
from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.answer_log import AnswerLog
from steerfast.fitting.ending import ending_vector, with_ending
from steerfast.fitting.labelled import Given, Labelled
from steerfast.fitting.score import check_model
from steerfast.judging.answers import judge, share
from steerfast.judging.fluency import FluencyLimits
from steerfast.profile import EDITS, SteeringProfile
from steerfast.text.encoding import encode

Positions = Literal["all", "response"]
_SCREEN_SHARE = 3  # a first look takes a third of the harmful prompts
_FINALISTS = 6
_KEY = "trial"
_SHARES = ("refusal", "refusal_strict", "fluent")  # of the answers of a trial


@dataclass(frozen=True)
class Setting:
    """One setting to try: layers first..last at `strength` each, and the end of the turn raised by `ending` logits."""

    vector: str
    first: int
    last: int
    strength: float
    positions: Positions
    answer_tokens: int | None = None
    ending: float = 0.0

    def apply(self, profile: SteeringProfile, ending: Tensor | None = None) -> SteeringProfile:
        """Return the profile at this setting; `ending` is the ending vector of the model, where one is added."""
        unsteered = profile.with_band([], 0.0)  # a learned vector has one layer
        banded = unsteered.with_vector(self.vector).with_band(range(self.first, self.last + 1), self.strength)
        placed = replace(banded, positions=self.positions, answer_tokens=self.answer_tokens)
        return with_ending(placed, ending, self.ending) if ending is not None and self.ending else placed


@dataclass(frozen=True)
class Trial:
    """Figures of a candidate on `n` harmful prompts; shares of all of them, fired or not."""

    candidate: Setting
    n: int
    refusal: float
    refusal_strict: float
    fluent: float

    def rank(self, min_fluent: float) -> tuple[float, ...]:
        """Return a key to sort by: fluent enough, strict refusals, keyword refusals, then the least total strength."""
        enough = self.fluent >= min_fluent
        total = self.candidate.strength * (self.candidate.last - self.candidate.first + 1)
        strict = self.refusal_strict if enough else self.fluent
        return (float(enough), strict, self.refusal, self.fluent, -total, -self.candidate.ending)


@dataclass(frozen=True)
class TuneOptions:
    """Options of `tune`.

    Args:
        vectors: kinds to try; default: the selected one and all candidates of the profile.
        bands: (first, last) layers to try; default: `default_bands`.
        strengths: multiples of the vector *in total over the band*; each layer gets its share.
        positions: default: both.
        answer_tokens: how many tokens of an answer to choose under steering, None: all; fewer than `max_new_tokens`.
            Default: that of the profile.
        endings: by how many logits to raise the end of the turn, see `steerfast.fitting.ending`. Default: 0.
        max_new_tokens: answer length while searching.
        min_fluent: share of fluent answers to harmful prompts a setting must keep.
        min_unchanged: share of harmless answers that must stay token for token.
        limits: limits of fluent text.
        resume: a JSON-lines file of answers and complete trials; written during the search, read back to continue it.
        names: names of the prompt sets in the profile (``{"harmful": ..., "harmless": ...}``).
    """

    vectors: Sequence[str] | None = None
    bands: Iterable[tuple[int, int]] | None = None
    strengths: Sequence[float] | None = None
    positions: Sequence[Positions] | None = None
    answer_tokens: Sequence[int | None] | None = None
    endings: Sequence[float] | None = None
    max_new_tokens: int = 32
    min_fluent: float = 0.95
    min_unchanged: float = 0.95
    limits: FluencyLimits | None = None
    resume: str | os.PathLike[str] | None = None
    names: dict[str, str] | None = None
    progress: bool = True


@own_defaults
def tune(
    profile: SteeringProfile,
    model: nn.Module,
    tokenizer: Any,
    *,
    harmful: Sequence[Given],
    harmless: Sequence[Given],
    **options: Any,
) -> SteeringProfile:
    """Search the setting with the most strict refusals of `harmful`, subject to fluent text and unchanged `harmless`.

    Every candidate is tried on a third of the harmful prompts; the best few on all of them. Greedy answers, judged by
    keywords and strictly (`steerfast.judging.refusal`); fluency by repetition and the unsteered model's perplexity.

    Args:
        profile: of `model`; one that adds vectors, with or without their norm (``add``, ``keep_norm``).
        options: see `TuneOptions`.

    Returns:
        The profile at the best setting, without its other candidate vectors, with the search's figures in `tuned`.

    Raises:
        PromptError: an unusable prompt set, or no setting that keeps both constraints.
        ProfileError: another model's profile, another edit, an unknown vector kind, an impossible band, an ending
            where `with_ending` has no place for it.
        ArchitectureError: an ending, and a model that `ending_vector` finds none for.
        TypeError: an unknown option.
    """
    chosen = read_options("tune", TuneOptions, options)
    examples = Labelled.of(harmful, harmless)
    bad, good = examples.select(examples.harmful), examples.select(~examples.harmful)
    check_model(profile, model, tokenizer)
    _check_edit(profile)
    candidates = _candidates(profile, chosen)
    ending = _ending(profile, candidates, model, tokenizer)
    prompts = encode(tokenizer, bad.prompts, model, room=chosen.max_new_tokens)
    records = Records(chosen.resume, "trials")
    known = {record[_KEY]: record["figures"] for record in records.found if isinstance(record.get(_KEY), str)}
    answers = AnswerLog(records, model, tokenizer)

    def trials(candidates: Sequence[Setting], tried: Sequence[Sequence[int]], description: str) -> list[Trial]:
        done, several = [], len(candidates) > 1  # the bar of a single one is over its answers
        for candidate in track(candidates, description, show=chosen.progress and several):
            steered = candidate.apply(profile, ending)
            key = answers.key("trial", steered.checksum, tried, _measure(chosen))
            if key not in known:
                bar = None if several or not chosen.progress else description
                found = answers.answers(tried, chosen.max_new_tokens, steered, bar)
                known[key] = asdict(_judged(candidate, model, tokenizer, tried, found, chosen))
                records.add({_KEY: key, "figures": known[key]})
            done.append(Trial(**{**known[key], "candidate": candidate}))
        return sorted(done, key=lambda trial: trial.rank(chosen.min_fluent), reverse=True)

    screened = trials(candidates, prompts[::_SCREEN_SHARE], "screening")  # some of every style, if they come by style
    finals = trials([trial.candidate for trial in screened[:_FINALISTS]], prompts, "finalists")
    tuned = _best(finals, chosen.min_fluent).candidate.apply(profile, ending)
    unchanged = _unchanged(tuned, answers, encode(tokenizer, good.prompts, model, room=chosen.max_new_tokens), chosen)
    record = _record(finals, unchanged, len(candidates), chosen) | examples.describe_sides(chosen.names)
    return replace(tuned, candidates={}, tuned=record)


def _ending(profile: SteeringProfile, candidates: Sequence[Setting], model: nn.Module, tokenizer: Any) -> Tensor | None:
    """Return the ending vector, if a candidate has an ending; raises before any work is done where it has no place."""
    ended = [candidate for candidate in candidates if candidate.ending]
    ending = ending_vector(model, tokenizer) if ended else None
    for candidate in ended:
        candidate.apply(profile, ending)
    return ending


def _check_edit(profile: SteeringProfile) -> None:
    if "frontier" in profile.fitted:
        behaviour = profile.fitted["behaviour"]
        raise ProfileError(f"profile: expected one of refusals, got one of {behaviour!r}, whose strengths fit measured")
    if not EDITS[profile.edit].adds:
        raise ProfileError(
            f"profile: expected one with edit 'add' or 'keep_norm', whose strength can be searched, got "
            f"{profile.edit!r}, which is complete at strength 1; choose its layers with SteeringProfile.with_band"
        )


def _measure(options: TuneOptions) -> dict[str, Any]:
    """Return as JSON data what figures depend on beside the steering and the prompts."""
    return {"max_new_tokens": options.max_new_tokens, "limits": asdict(options.limits or FluencyLimits())}


def _best(finals: Sequence[Trial], min_fluent: float) -> Trial:
    best = finals[0]
    if best.fluent < min_fluent:
        raise PromptError(
            f"min_fluent: no setting reached {min_fluent:.1%} fluent answers, the best had {best.fluent:.1%} "
            f"({asdict(best.candidate)}); try smaller strengths"
        )
    return best


def _record(finals: Sequence[Trial], unchanged: float, candidates: int, options: TuneOptions) -> dict[str, Any]:
    """Return the figures of the best trial and of the others, as JSON data.

    Raises:
        PromptError: too few harmless answers stayed the same.
    """
    if unchanged < options.min_unchanged:
        raise PromptError(
            f"min_unchanged: expected at least {options.min_unchanged:.2f} of the harmless answers unchanged, "
            f"got {unchanged:.2f}; the gate opens for them: calibrate with more varied harmless prompts or a lower "
            "false-positive rate"
        )
    best = finals[0]
    return {
        "candidate": asdict(best.candidate),
        **{name: getattr(best, name) for name in _SHARES},
        "harmless_unchanged": unchanged,
        "tried": candidates,
        **_measure(options),
        "runners_up": [asdict(trial) for trial in finals[1:]],
    }


def default_bands(layers: int, first: int, has_vector: Sequence[bool] | None = None) -> list[tuple[int, int]]:
    """Return bands (first, last) to try from layer `first` on: one layer, a fifth, two fifths of all, at three places.

    The last tenth of the depth is left out: an edit there has no layer left to act through. Where only some
    layers have a vector (a learned one: its own), bands are of those; if none is, each such layer by itself.
    """
    end = max(first + 1, round(0.9 * layers))
    bands: set[tuple[int, int]] = set()
    for share_of_depth in (0.0, 0.2, 0.4):
        width = min(max(1, round(share_of_depth * layers)), end - first)
        latest = end - width
        bands |= {(start, start + width - 1) for start in (first, (first + latest) // 2, latest)}
    if has_vector is not None:
        bands = {(start, last) for start, last in bands if all(has_vector[start : last + 1])}
        bands = bands or {(layer, layer) for layer, has in enumerate(has_vector) if has}
    return sorted(bands)


def _candidates(profile: SteeringProfile, options: TuneOptions) -> list[Setting]:
    first = 0 if profile.sensor == "own" or profile.gate.kind == "always" else profile.sensor
    bands = None if options.bands is None else list(options.bands)
    answer_tokens = options.answer_tokens or [profile.answer_tokens]
    for tokens in answer_tokens:
        if tokens is not None and not 1 <= tokens < options.max_new_tokens:
            raise ProfileError(
                f"answer_tokens: expected 1 to {options.max_new_tokens - 1}, fewer than max_new_tokens, or None, "
                f"got {tokens}"
            )
    unsteered = profile.with_band([], 0.0)
    candidates = []
    for kind in options.vectors or [profile.vector_kind, *profile.candidates]:
        has_vector = unsteered.with_vector(kind).vector.any(dim=1).tolist()  # raises before any work is done
        for band in default_bands(profile.model.num_layers, first, has_vector) if bands is None else bands:
            _check_band(band, kind, has_vector, least=first if profile.gate.kind == "token" else 0)
            choices = product(
                options.strengths or (0.75, 1.0, 2.0, 4.0),
                options.positions or ("all", "response"),
                answer_tokens,
                options.endings or (0.0,),
            )
            for total, positions, tokens, ending in choices:
                strength = round(total / (band[1] - band[0] + 1), 4)
                candidates.append(Setting(kind, *band, strength, positions, tokens, ending))
    return candidates


def _check_band(band: tuple[int, int], kind: str, has_vector: Sequence[bool], least: int) -> None:
    first, last = band
    layers = len(has_vector)
    if not least <= first <= last < layers:
        raise ProfileError(f"bands: expected {least} <= first <= last < {layers}, got ({first}, {last})")
    if not all(has_vector[first : last + 1]):
        have = [layer for layer in range(layers) if has_vector[layer]]
        raise ProfileError(f"bands: expected layers of {have}, where {kind!r} is, got ({first}, {last})")


def _judged(
    candidate: Setting,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    options: TuneOptions,
) -> Trial:
    judged = judge(model, tokenizer, prompts, answers, options.limits)
    shares = {name: share([getattr(one, name) for one in judged]) for name in _SHARES}
    return Trial(candidate, len(prompts), **shares)


def _unchanged(
    profile: SteeringProfile, answers: AnswerLog, prompts: Sequence[Sequence[int]], options: TuneOptions
) -> float:
    """Return the share of harmless answers that are the same with and without steering."""
    bars = ("harmless", "harmless, steered") if options.progress else (None, None)
    before = answers.answers(prompts, options.max_new_tokens, None, bars[0])
    after = answers.answers(prompts, options.max_new_tokens, profile, bars[1])
    return share([a == b for a, b in zip(before, after, strict=True)])

"""How strong a behaviour may be: what it gains and what the text loses, at a few strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from steerfast._progress import track
from steerfast._records import Records
from steerfast.fitting.activations import answer_mean, residual_rows
from steerfast.fitting.answer_log import AnswerLog
from steerfast.fitting.contrast import Contrast, at_total
from steerfast.judging.answers import judge, share
from steerfast.judging.fluency import FluencyLimits
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import pad_token

_KEY = "figures_of"
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
_LEAST_FLUENT = 0.9  # of the unsteered share
MOST_PERPLEXITY = 2.0  # times the unsteered perplexity
_ENOUGH, _NOTABLE = 4 / 5, 1 / 3  # of the best shift: for the strength to use, for the lower end of the range


@dataclass(frozen=True)
class Point:
    """Figures of the answers at one strength.

    strength: in total over the band. shift: how far the answers' rows, read without steering, lie from those of the
    unsteered answers, along the vector; 1 is the distance between the two sides of the pairs. perplexity: the median
    over the answers, under the unsteered model. repetition: the mean share of repeated 4-grams. fluent: the share of
    answers within the limits.
    """

    strength: float
    shift: float
    perplexity: float
    repetition: float
    fluent: float

    def coherent(self, unsteered: Point, most: float = MOST_PERPLEXITY) -> bool:
        """Return whether the text holds: nearly as many fluent answers, at most `most` times the perplexity."""
        fluent = self.fluent >= _LEAST_FLUENT * unsteered.fluent
        return fluent and self.perplexity <= most * unsteered.perplexity


class Axis:
    """The line between the two sides of pairs, along a profile's vector at its last steered layer.

    model, tokenizer: of the rows. distance: between the mean rows of the sides.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, profile: SteeringProfile, rows: Contrast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._layer = profile.steered_layers[-1]
        self._direction = torch.nn.functional.normalize(profile.vector[self._layer].double(), dim=0)
        sides = (side[:, self._layer].double() @ self._direction for side in (rows.positive, rows.negative))
        positive, negative = (float(side.mean()) for side in sides)
        self.distance = positive - negative

    def place(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], max_new_tokens: int) -> float:
        """Return where answers lie: the mean over those with a token, of the mean of their rows without steering."""
        kept = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
        kept = kept or [(prompt[:-1], prompt[-1:]) for prompt in prompts]
        rows = residual_rows(
            self.model,
            [[*prompt, *answer] for prompt, answer in kept],
            reduce=answer_mean([len(prompt) for prompt, _ in kept], max_new_tokens),
            pad_token_id=pad_token(self.tokenizer),
        )
        return float((rows[:, self._layer].double() @ self._direction).mean())


class Frontier:
    """Measure strengths of a profile on the same prompts.

    Args:
        axis: where shifts are measured, and the model that answers.
        profile: one that always adds, as `contrast_profile` makes it.
        prompts: token ids. records: what is measured already, with the same axis.
        most: times the unsteered perplexity, see `recommend`.
    """

    def __init__(
        self,
        axis: Axis,
        profile: SteeringProfile,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        records: Records,
        most: float = MOST_PERPLEXITY,
    ) -> None:
        self._axis, self._profile, self._prompts, self._records = axis, profile, prompts, records
        self._max_new_tokens, self._most = max_new_tokens, most
        self._answers = AnswerLog(records, axis.model, axis.tokenizer)
        self._known = {record[_KEY]: record["figures"] for record in records.found if _KEY in record}
        self._start: float | None = None

    def measure(self, strengths: Sequence[float], limits: FluencyLimits | None, progress: bool) -> list[Point]:
        """Return the unsteered point, then those of the strengths, ascending, up to the first that is not coherent."""
        points: list[Point] = []
        for strength in track([0.0, *sorted(strengths)], "strengths", show=progress):
            points.append(self._point(strength, limits))
            if not points[-1].coherent(points[0], self._most):
                break
        return points

    def _point(self, strength: float, limits: FluencyLimits | None) -> Point:
        profile = at_total(self._profile, self._profile.steered_layers, strength) if strength else None
        settings = [self._max_new_tokens, asdict(limits or FluencyLimits())]
        key = self._answers.key("figures", self._profile.checksum, strength, self._prompts, settings)
        if (found := self._known.get(key)) is None:
            found = self._figures(self._answers.answers(self._prompts, self._max_new_tokens, profile), limits)
            self._records.add({_KEY: key, "figures": found})
        figures = dict(found)
        place = figures.pop("place")
        start = self._start = place if self._start is None else self._start
        return Point(strength=strength, shift=round((place - start) / self._axis.distance, 4), **figures)

    def _figures(self, answers: Sequence[Sequence[int]], limits: FluencyLimits | None) -> dict[str, float]:
        """Return the figures of answers: those of `Point`, and ``place``, where they lie along the vector."""
        judged = judge(self._axis.model, self._axis.tokenizer, self._prompts, answers, limits)
        chance = float(len(self._axis.tokenizer))  # for an answer without a token
        perplexities = [chance if math.isnan(one.perplexity) else one.perplexity for one in judged]
        return {
            "place": self._axis.place(self._prompts, answers, self._max_new_tokens),
            "perplexity": round(median(perplexities), 4),
            "repetition": round(sum(one.repetition for one in judged) / len(judged), 4),
            "fluent": round(share([one.fluent for one in judged]), 4),
        }


def recommend(points: Sequence[Point], most: float = MOST_PERPLEXITY) -> dict[str, Any]:
    """Return the strength to use and a range around it, from points as `Frontier.measure` returns them.

    Coherent is a strength with nine tenths of the fluent answers, and at most `most` times the perplexity.

    The strength is the least coherent one with four fifths of the largest shift. The range begins at the least one with
    a third of it, and ends at the largest coherent one.

    Returns:
        JSON data: ``points``, ``strength``, ``range``, and ``problem``, a sentence where no strength helps, else None.
    """
    unsteered, *steered = points
    coherent = [one for one in steered if one.coherent(unsteered, most) and one.shift > 0]
    found: dict[str, Any] = {"points": [asdict(one) for one in points]}
    if not coherent:
        least = steered[0]
        broken = not least.coherent(unsteered, most)
        why = (
            f"strength {least.strength:g} already breaks the text (fluent {least.fluent:.0%}, perplexity "
            f"{least.perplexity:.1f} against {unsteered.perplexity:.1f})"
            if broken
            else f"no strength up to {steered[-1].strength:g} moves the answers towards the positive side"
        )
        return {**found, "strength": None, "range": None, "problem": why}
    best = max(one.shift for one in coherent)
    low, use = (next(one.strength for one in coherent if one.shift >= part * best) for part in (_NOTABLE, _ENOUGH))
    return {**found, "strength": use, "range": [low, coherent[-1].strength], "problem": None}

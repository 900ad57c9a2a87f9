"""Figures of a gate: AUC, rates and their 95 % intervals, and thresholds.

A gate fires when its score is strictly above the threshold; every function here counts the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata

from steerfast.errors import ProfileError, PromptError

_CONFIDENCE = 0.95
# A DeLong variance below this is rounding: with n scores a side the smallest true one is about 1 / (4 n^4).
_NO_VARIANCE = 1e-24
_SUM_ERROR = 1e-12  # sums of weights, as shares, err by less


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval, low <= value <= high."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        """Return [value, low, high], for JSON."""
        return [self.value, self.low, self.high]


def auc(positive: ArrayLike, negative: ArrayLike) -> Estimate:
    """Return the area under the ROC curve: the chance that a positive scores above a negative one, a tie counting half.

    The interval is DeLong's (DeLong, DeLong and Clarke-Pearson 1988; by midranks, Sun and Xu 2014) on the
    logit scale. Where its variance is zero or unknown: the exact binomial (Clopper-Pearson) interval of min(n1, n0)
    trials, for perfect separation; else the Hanley and McNeil (1982) standard error, on the logit scale.

    Args:
        positive, negative: finite scores [n1], [n0]; at least one each.

    Raises:
        PromptError: empty or non-finite scores.
    """
    return grouped_auc([positive], [negative])


def grouped_auc(positive: Sequence[ArrayLike], negative: Sequence[ArrayLike]) -> Estimate:
    """Return `auc` where each group of a side has the same weight, whatever its size: the mean of the groups' areas.

    The interval is for these groups, over their scores: DeLong's variance is a sum over groups. In place of n1 and n0
    stand the numbers of equally weighted scores that say as much.

    Args:
        positive, negative: groups of finite scores; at least one group each, at least one score in it.

    Raises:
        PromptError: as `auc`.
    """
    sides = [
        [_scores(name, scores) for scores in groups or [[]]]
        for name, groups in (("positive", positive), ("negative", negative))
    ]
    found = [  # of each score the share of the other side below it
        [np.mean([_placements(one, other) for other in others], axis=0) for one in side]
        for side, others in (sides, reversed(sides))
    ]
    n1, n0 = (len(side) ** 2 / sum(1 / len(one) for one in side) for side in sides)
    value = float(np.mean([one.mean() for one in found[0]]))
    if value <= 0.0 or value >= 1.0:
        trials = int(min(n1, n0) + 1e-9)
        return Estimate(value, *exact_interval(0 if value <= 0.0 else trials, trials))
    variance = 0.0
    if all(len(one) > 1 for side in found for one in side):
        variance = sum(float(one.var(ddof=1)) / len(one) / len(side) ** 2 for side in found for one in side)
    if variance < _NO_VARIANCE:
        q1, q2 = value / (2.0 - value), 2.0 * value**2 / (1.0 + value)
        spread = value * (1.0 - value) + (n1 - 1) * (q1 - value**2) + (n0 - 1) * (q2 - value**2)
        variance = spread / (n1 * n0)
    half = float(norm.ppf(0.5 + _CONFIDENCE / 2)) * math.sqrt(variance) / (value * (1.0 - value))
    centre = float(logit(value))
    # expit(logit(x)) may miss x by a rounding error: keep low <= value <= high.
    return Estimate(value, min(value, float(expit(centre - half))), max(value, float(expit(centre + half))))


def _placements(own: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each of `own` the share of `other` below it, a tie counting half."""
    ranks = rankdata(np.concatenate([own, other]))[: len(own)]
    return np.asarray((ranks - rankdata(own)) / len(other))


def rate(k: int, n: int) -> Estimate:
    """Return the share k / n with its Wilson (1927) score interval; PromptError unless 0 <= k <= n and n >= 1."""
    if n < 1 or not 0 <= k <= n:
        raise PromptError(f"rate: expected 0 <= k <= n with n at least 1, got k = {k}, n = {n}")
    interval = binomtest(int(k), int(n)).proportion_ci(_CONFIDENCE, method="wilson")
    value = k / n
    return Estimate(value, min(value, float(interval.low)), max(value, float(interval.high)))


def exact_interval(k: int, n: int) -> tuple[float, float]:
    """Return the ends of the exact (Clopper and Pearson 1934) interval of the share k / n; 0 of 100 is 0 to 3.6 %."""
    interval = binomtest(int(k), int(n)).proportion_ci(_CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates, each with the same weight; PromptError without one.

    The interval is of the variances that the single ones recover (MOVER: Zou and Donner 2008): for these sets, over
    their prompts. It does not say what another set would give.
    """
    if not estimates:
        raise PromptError("estimates: expected at least one, got none")
    value = math.fsum(one.value for one in estimates) / len(estimates)
    below = math.hypot(*(one.value - one.low for one in estimates)) / len(estimates)
    above = math.hypot(*(one.high - one.value for one in estimates)) / len(estimates)
    return Estimate(value, value - below, value + above)


def paired_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Return the share of `first` minus that of `second`, both of the same items, with Newcombe's score interval.

    Method 10 of Newcombe (1998, Statistics in Medicine 17:2635-2650): Wilson's intervals of both shares, joined by
    their correlation. Where all pairs agree it still has a width: 0 of 24 says little.

    Args:
        first, second: 0 or 1 for each item, [n].

    Raises:
        PromptError: empty or unequally many values, or others than 0 and 1.
    """
    pair = [_scores("first", first), _scores("second", second)]
    if len(pair[0]) != len(pair[1]):
        raise PromptError(f"second: expected as many values as in first, {len(pair[0])}, got {len(pair[1])}")
    for name, values in zip(("first", "second"), pair, strict=True):
        if not np.isin(values, (0, 1)).all():
            raise PromptError(f"{name}: expected 0 or 1 for each item, got {values[~np.isin(values, (0, 1))][0]:g}")
    one, two = (rate(int(values.sum()), len(values)) for values in pair)
    phi = _correlation(*pair)
    value = one.value - two.value

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))

    low = value - reach(one.value - one.low, two.high - two.value)
    high = value + reach(one.high - one.value, two.value - two.low)
    return Estimate(value, max(-1.0, low), min(1.0, high))


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Newcombe's correlation of pairs of 0 and 1: corrected for continuity where positive, 0 where unknown."""
    n, ones, twos = len(first), float(first.sum()), float(second.sum())
    spread = ones * (n - ones) * twos * (n - twos)
    if not spread:
        return 0.0
    joint = n * float(first @ second) - ones * twos  # ad - bc of the table of pairs
    return (joint if joint < 0 else max(0.0, joint - n / 2)) / math.sqrt(spread)


def threshold_midpoint(harmful: ArrayLike, harmless: ArrayLike) -> float:
    """Return the midpoint of the two class means (the bias of InferAligner's gate, negated)."""
    pos, neg = _scores("harmful", harmful), _scores("harmless", harmless)
    return float(0.5 * pos.mean() + 0.5 * neg.mean())


def threshold_at_false_positive_rate(harmless: ArrayLike, rate: float, weights: ArrayLike | None = None) -> float:
    """Return the lowest threshold at which at most a share `rate` of the harmless scores fires (score > threshold).

    It is the middle of a gap between scores. With `rate` below 1 / n it is the next float32 after the largest score.

    Args:
        harmless: finite scores [n].
        rate: 0 <= rate < 1.
        weights: positive, [n], for a share of the weight; default: each score counts alike.

    Raises:
        PromptError: empty or non-finite scores or weights.
        ProfileError: rate out of range.
    """
    if not 0.0 <= rate < 1.0:
        raise ProfileError(f"rate: expected 0 <= rate < 1, got {rate}")
    scores = _scores("harmless", harmless)
    order, n = np.argsort(scores, kind="stable"), len(scores)
    weight = np.ones(n) if weights is None else _scores("weights", weights)
    total = np.concatenate([[0.0], weight[order][::-1].cumsum()])  # of the largest scores
    scores = scores[order]
    # Largest count whose share is allowed; floor(rate * n) would lose one to rounding (0.29 * 100 < 29), and so would
    # sums of weights.
    most = rate if weights is None else rate + _SUM_ERROR
    allowed = int(np.searchsorted(total / total[-1], most, side="right")) - 1
    edge = scores[n - 1 - allowed]
    above = scores[np.searchsorted(scores, edge, side="right") :]
    if len(above):
        middle = 0.5 * edge + 0.5 * above[0]
        return float(middle if middle < above[0] else edge)  # neighbouring floats have nothing between them
    # Gates compare in float32: the value after the float32 next to `edge` is above `edge` in both formats.
    return float(np.nextafter(np.float32(edge), np.float32(np.inf)))


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise PromptError(f"{name}: expected at least one score, as [n], got shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise PromptError(f"{name}: expected finite scores, got {int((~np.isfinite(scores)).sum())} that are not")
    return scores

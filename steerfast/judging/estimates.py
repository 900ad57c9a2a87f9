"""Figures of a gate: AUC, rates and their 95 % intervals, and thresholds.

A gate fires when its score is strictly above the threshold; every function here counts the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest, bootstrap, norm, rankdata

from steerfast.errors import ProfileError, PromptError

_CONFIDENCE = 0.95
# A DeLong variance below this is rounding: with n scores a side the smallest true one is about 1 / (4 n^4).
_NO_VARIANCE = 1e-24


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
    pos, neg = _scores("positive", positive), _scores("negative", negative)
    n1, n0 = len(pos), len(neg)
    ranks = rankdata(np.concatenate([pos, neg]))
    above = (ranks[:n1] - rankdata(pos)) / n0  # per positive: share of negatives below it
    below = 1.0 - (ranks[n1:] - rankdata(neg)) / n1  # per negative: share of positives above it
    value = float(above.mean())
    if value <= 0.0 or value >= 1.0:
        trials = min(n1, n0)
        interval = binomtest(trials if value >= 1.0 else 0, trials).proportion_ci(_CONFIDENCE, method="exact")
        return Estimate(value, float(interval.low), float(interval.high))
    variance = 0.0
    if n1 > 1 and n0 > 1:
        variance = float(above.var(ddof=1) / n1 + below.var(ddof=1) / n0)
    if variance < _NO_VARIANCE:
        q1, q2 = value / (2.0 - value), 2.0 * value**2 / (1.0 + value)
        spread = value * (1.0 - value) + (n1 - 1) * (q1 - value**2) + (n0 - 1) * (q2 - value**2)
        variance = spread / (n1 * n0)
    half = float(norm.ppf(0.5 + _CONFIDENCE / 2)) * math.sqrt(variance) / (value * (1.0 - value))
    centre = float(logit(value))
    # expit(logit(x)) may miss x by a rounding error: keep low <= value <= high.
    return Estimate(value, min(value, float(expit(centre - half))), max(value, float(expit(centre + half))))


def rate(k: int, n: int) -> Estimate:
    """Return the share k / n with its Wilson (1927) score interval; PromptError unless 0 <= k <= n and n >= 1."""
    if n < 1 or not 0 <= k <= n:
        raise PromptError(f"rate: expected 0 <= k <= n with n at least 1, got k = {k}, n = {n}")
    interval = binomtest(int(k), int(n)).proportion_ci(_CONFIDENCE, method="wilson")
    value = k / n
    return Estimate(value, min(value, float(interval.low)), max(value, float(interval.high)))


def paired_bootstrap(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Estimate:
    """Return the difference of the means of `first` and `second`, both on the same items, with a percentile interval.

    10 000 times the items are drawn with replacement (Efron and Tibshirani 1993, ch. 13); `seed` is of the draws.

    Raises:
        PromptError: empty, non-finite or unequally many values.
    """
    pair = [_scores("first", first), _scores("second", second)]
    if len(pair[0]) != len(pair[1]):
        raise PromptError(f"second: expected as many values as in first, {len(pair[0])}, got {len(pair[1])}")
    items = pair[0] - pair[1]
    value = float(items.mean())
    if len(items) == 1:
        return Estimate(value, value, value)
    draw = np.random.default_rng(seed)
    how: Any = {"n_resamples": 10_000, "batch": 1000, "method": "percentile", "random_state": draw}
    found = bootstrap((items,), np.mean, confidence_level=_CONFIDENCE, **how).confidence_interval
    return Estimate(value, min(value, float(found.low)), max(value, float(found.high)))


def threshold_midpoint(harmful: ArrayLike, harmless: ArrayLike) -> float:
    """Return the midpoint of the two class means (the bias of InferAligner's gate, negated)."""
    pos, neg = _scores("harmful", harmful), _scores("harmless", harmless)
    return float(0.5 * pos.mean() + 0.5 * neg.mean())


def threshold_at_false_positive_rate(harmless: ArrayLike, rate: float) -> float:
    """Return the lowest threshold at which at most a share `rate` of the harmless scores fires (score > threshold).

    It is the middle of a gap between scores. With `rate` below 1 / n it is the next float32 after the largest score.

    Args:
        harmless: finite scores [n].
        rate: 0 <= rate < 1.

    Raises:
        PromptError: empty or non-finite scores.
        ProfileError: rate out of range.
    """
    if not 0.0 <= rate < 1.0:
        raise ProfileError(f"rate: expected 0 <= rate < 1, got {rate}")
    scores = np.sort(_scores("harmless", harmless))
    n = len(scores)
    # Largest count whose share is allowed; floor(rate * n) would lose one to rounding (0.29 * 100 < 29).
    allowed = int(np.searchsorted(np.arange(n + 1) / n, rate, side="right")) - 1
    edge = scores[n - 1 - allowed]
    above = scores[np.searchsorted(scores, edge, side="right") :]
    if len(above):
        middle = 0.5 * edge + 0.5 * above[0]
        return float(middle if middle < above[0] else edge)  # neighbouring floats have nothing between them
    # Gates compare in float32: the value after the float32 next to `edge` is above `edge` in both formats.
    return float(np.nextafter(np.float32(edge), np.float32(np.inf)))


@dataclass(frozen=True)
class GateFigures:
    """Figures of one gate on two prompt sets; the two rates are the shares of each set that fire."""

    auc: Estimate
    hit_rate: Estimate
    false_positive_rate: Estimate
    harmful_mean: float
    harmless_mean: float
    n_harmful: int
    n_harmless: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        return {name: value.to_list() if isinstance(value, Estimate) else value for name, value in vars(self).items()}


def gate_figures(harmful_scores: ArrayLike, harmless_scores: ArrayLike, threshold: float) -> GateFigures:
    """Return figures of a gate that fires above `threshold`; scores [n1] and [n0], finite, not empty."""
    pos, neg = _scores("harmful_scores", harmful_scores), _scores("harmless_scores", harmless_scores)
    return GateFigures(
        auc=auc(pos, neg),
        hit_rate=rate(int((pos > threshold).sum()), len(pos)),
        false_positive_rate=rate(int((neg > threshold).sum()), len(neg)),
        harmful_mean=float(pos.mean()),
        harmless_mean=float(neg.mean()),
        n_harmful=len(pos),
        n_harmless=len(neg),
    )


def figures_by_layer(harmful: ArrayLike, harmless: ArrayLike, thresholds: ArrayLike) -> list[GateFigures]:
    """Return `gate_figures` of each layer: scores [n1, layers] and [n0, layers], thresholds [layers]."""
    columns = zip(np.asarray(harmful).T, np.asarray(harmless).T, np.asarray(thresholds), strict=True)
    return [gate_figures(bad, good, float(limit)) for bad, good, limit in columns]


def undecided_rates(scores: ArrayLike, abstain: ArrayLike, thresholds: ArrayLike) -> list[Estimate]:
    """Return each layer's share of scores [n, layers] in its band: above `abstain` [layers], at most `thresholds`."""
    found = np.asarray(scores)
    within = (found > np.asarray(abstain)) & (found <= np.asarray(thresholds))
    return [rate(int(count), len(found)) for count in within.sum(axis=0)]


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise PromptError(f"{name}: expected at least one score, as [n], got shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise PromptError(f"{name}: expected finite scores, got {int((~np.isfinite(scores)).sum())} that are not")
    return scores

"""Compare the scores of live traffic with those that a gate was calibrated on.

Two questions, asked of the harmless prompts of the calibration, or of the harmful ones: are more decisions wrong, and
have the scores moved? An answer comes only where the sampling of both sides cannot explain it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from steerfast.errors import ProfileError, PromptError
from steerfast.judging.estimates import Estimate, exact_interval
from steerfast.profile import SteeringProfile

PASS, STALE, INCONCLUSIVE = "pass", "stale", "inconclusive"

_CONFIDENCE = 0.95  # of the intervals of both rates
_SIGNIFICANCE = 0.01  # of the distance
_SAMPLE = re.compile(r"^steerfast_(\w+)\{([^}]*)\}\s+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Cumulative:
    """How many scores lie below each edge, of `count` in all. edges: float64 [n], ascending. below: int64 [n]."""

    edges: NDArray[np.float64]
    below: NDArray[np.int64]
    count: int

    def bounds(self, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the least and the largest share of scores that can lie below each value."""
        shares = np.concatenate([[0], self.below, [self.count]]) / self.count
        low = np.searchsorted(self.edges, at, side="right")
        exact = np.isin(at, self.edges)
        return shares[low], shares[np.where(exact, low, low + 1)]


@dataclass(frozen=True)
class Calibrated:
    """The prompts of a calibration with one label, see `calibrated`.

    fired: at the threshold in use. Where it is not known: the most that can be, of harmful prompts the fewest.
    """

    layer: int
    fired: int
    scores: Cumulative


@dataclass(frozen=True)
class Live:
    """Live traffic: requests that a gate decided on, those of them that fired, and their scores, if known."""

    requests: int
    fired: int
    scores: Cumulative | None


@dataclass(frozen=True)
class Limits:
    """What counts as drift.

    tolerance: the live share of wrong decisions may be so many times the calibrated one. distance: the largest
    difference of the shares of scores below a value, from 0 to 1.
    """

    tolerance: float = 1.0
    distance: float = 0.2

    def __post_init__(self) -> None:
        if not 1.0 <= self.tolerance < math.inf:
            raise ProfileError(f"tolerance: expected a finite number >= 1, got {self.tolerance}")
        if not 0.0 < self.distance < 1.0:
            raise ProfileError(f"distance: expected 0 < distance < 1, got {self.distance}")


@dataclass(frozen=True)
class Drift:
    """The verdict `PASS`, `STALE` or `INCONCLUSIVE`, why, and the figures behind it.

    label: of the prompts on both sides. live, calibrated: shares that fire, with exact (Clopper-Pearson) 95 %
    intervals. distance: between the scores, at least; None: the live scores are not known. chance: an upper bound of
    the probability of such a distance without drift. needed: how many requests a verdict needs; None: more prompts in
    the calibration.
    """

    verdict: str
    reasons: tuple[str, ...]
    label: str
    layer: int
    threshold: float
    requests: int
    prompts: int
    live: Estimate
    calibrated: Estimate
    distance: float | None
    chance: float | None
    needed: int | None
    limits: Limits

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        rates = {"live": self.live.to_list(), "calibrated": self.calibrated.to_list()}
        return {**asdict(self), "reasons": list(self.reasons), **rates}


# -- the two sides ---------------------------------------------------------------------------------------------------


def calibrated(profile: SteeringProfile, label: str = "harmless") -> Calibrated:
    """Return the harmless or the harmful side of a profile's calibration, at the threshold in use.

    Raises:
        ProfileError: several gates or none decide, or the profile has no histogram of them.
    """
    if len(profile.gate_layers) != 1:
        raise ProfileError(f"profile: expected one layer that decides, got {len(profile.gate_layers)} (set a sensor)")
    (layer,) = profile.gate_layers
    try:
        histogram = profile.calibration["histograms"]["calibration"][layer]
        counts = np.asarray(histogram[label], dtype=np.int64)
        edges = np.linspace(histogram["low"], histogram["high"], len(counts) + 1)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise ProfileError("profile: expected a histogram of its calibration, got none (run calibrate)") from None
    if counts.ndim != 1 or not counts.sum() or (counts < 0).any() or not edges[0] <= edges[-1]:
        raise ProfileError(f"profile: expected a histogram of {label} scores, got an empty or a broken one")
    scores = Cumulative(edges, np.concatenate([[0], counts.cumsum()]), int(counts.sum()))
    below = scores.bounds(profile.threshold[layer].double().reshape(1).numpy())
    most, least = (round((1 - share[0]) * scores.count) for share in below)
    fired = _recorded(profile, layer, label, scores.count)
    if fired is None or not least <= fired <= most:
        fired = most if label == "harmless" else least
    return Calibrated(layer, fired, scores)


def _recorded(profile: SteeringProfile, layer: int, label: str, count: int) -> int | None:
    """Return how many prompts of a label fired at the threshold in use; None: the record is of another, or of none."""
    if not bool(profile.threshold[layer] == profile.points.get("balanced", profile.threshold)[layer]):
        return None
    try:
        rows = [row for row in profile.calibration["by_source"][str(layer)]["rows"] if row["label"] == label]
        fired, prompts = (sum(int(row[name]) for row in rows) for name in ("fired", "n"))
    except (KeyError, TypeError, ValueError):
        return None
    return fired if prompts == count else None


def live_scores(scores: ArrayLike, threshold: float, edges: NDArray[np.float64]) -> Live:
    """Return live traffic by its scores [n]; they are compared at the calibration's `edges`.

    Raises:
        PromptError: no score, or one that is not finite.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise PromptError(f"scores: expected at least one, as [n], got shape {list(found.shape)}")
    if len(wrong := (~np.isfinite(found)).nonzero()[0]):
        raise PromptError(f"scores: expected finite numbers, got {found[wrong[0]]} as number {wrong[0] + 1}")
    below = np.searchsorted(np.sort(found), edges, side="left")
    below[-1] = (found <= edges[-1]).sum()  # a histogram's last bin holds its upper edge
    return Live(len(found), int((found > threshold).sum()), Cumulative(edges, below, len(found)))


def read_scores(text: str, layer: int) -> list[float]:
    """Return the scores of JSON, JSON Lines or `steerfast score --json`: numbers, or records with ``score``.

    Raises:
        PromptError: no such text, or a record of another layer than `layer`.
    """
    entries = _entries(text)
    scores = []
    for number, entry in enumerate(entries, 1):
        record = entry if isinstance(entry, Mapping) else {"score": entry}
        score = record.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= sys.float_info.max:
            raise PromptError(f"scores: expected a finite number, or a record with one as score, as entry {number}")
        if record.get("layer", layer) != layer:
            raise PromptError(f"scores: expected scores of layer {layer}, which decides, got layer {record['layer']}")
        scores.append(float(score))
    return scores


def _entries(text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise PromptError(f"scores: expected JSON, or a JSON value a line ({error})") from None
    if isinstance(found, Mapping) and "results" in found:
        found = found["results"]
    return found if isinstance(found, list) else [found]


def read_metrics(text: str, name: str | None = None) -> Live:
    """Return live traffic by a page of a server's metrics; `name` is the profile's there, None: the only one.

    Raises:
        PromptError: the page has no such profile, or no request that it decided on.
    """
    profiles: dict[str, dict[str, Any]] = {}
    for metric, labels, value in _SAMPLE.findall(text):
        found = dict(_LABEL.findall(labels))
        if "profile" not in found:
            continue
        kept = profiles.setdefault(found["profile"], {"buckets": {}})
        if metric == "gate_score_bucket":
            edge = _edge(found.get("le"))
            kept["buckets"][edge] = kept["buckets"].get(edge, 0) + _count(value)
        elif metric.endswith("_total"):
            kept[metric] = kept.get(metric, 0) + _count(value)  # a page may have a series of each instance
    names = ", ".join(sorted(profiles)) or "none"
    if name is None and len(profiles) != 1:
        raise PromptError(f"metrics: expected one profile, or its name, got {names}")
    if name is not None and name not in profiles:
        raise PromptError(f"metrics: expected a profile of {names}, got {name!r}")
    one = profiles[name or next(iter(profiles))]
    requests, fired = (one.get(f"gate_{what}_total", 0) for what in ("evaluations", "firings"))
    if not 0 <= fired <= requests or not requests:
        raise PromptError(f"metrics: expected requests that the gate decided on, got {requests}, {fired} of them fired")
    buckets = one["buckets"]  # a Prometheus histogram, or none
    if not (count := buckets.get(math.inf, 0)):
        return Live(requests, fired, None)
    edges = np.array(sorted(edge for edge in buckets if math.isfinite(edge)))
    return Live(requests, fired, Cumulative(edges, np.array([buckets[edge] for edge in edges], dtype=np.int64), count))


def _edge(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise PromptError(f"metrics: expected buckets with a number as le, got {text!r}") from None


def _count(value: str) -> int:
    try:
        return int(float(value))
    except (ValueError, OverflowError):
        raise PromptError(f"metrics: expected a count, got {value!r}") from None


# -- the comparison --------------------------------------------------------------------------------------------------


def compare(profile: SteeringProfile, live: Live, limits: Limits | None = None, *, label: str = "harmless") -> Drift:
    """Say whether a profile's threshold still fits the live traffic, or prompts of one label.

    A wrong decision is a harmless prompt that fires, or a harmful one that does not.
    Stale: the interval of the live share of wrong decisions lies above `Limits.tolerance` times the upper end of the
    calibrated one; or the distance of the scores is above `Limits.distance`, and by chance in at most 1 % of cases (Wei
    and Dudley 2012). So traffic like the calibration's is called stale in at most 6 % of cases.
    Inconclusive: not stale, and with so few requests or prompts drift of that size could not have been seen.

    Raises:
        ProfileError: see `calibrated`.
    """
    limits = limits or Limits()
    known = calibrated(profile, label)
    rates = _share(live.fired, live.requests), _share(known.fired, known.scores.count)
    wrong, before = rates if label == "harmless" else map(_complement, rates)
    highest = min(1.0, limits.tolerance * before.high)
    reasons = []
    if wrong.low > highest:
        kind = "fires" if label == "harmless" else "does not fire"
        reasons.append(f"{wrong.value:.1%} of it {kind}, at least {wrong.low:.1%}; expected at most {highest:.1%}")
    distance = chance = None
    if live.scores is not None:
        distance = _distance(live.scores, known.scores)
        chance = _chance(distance, live.scores.count, known.scores.count)
        if distance > limits.distance and chance <= _SIGNIFICANCE:
            reasons.append(f"its scores have moved by {distance:.2f}; expected at most {limits.distance:.2f}")
    needed = _needed_for_rate(highest)
    if live.scores is not None and needed is not None:
        more = _needed_for_distance(limits.distance, known.scores.count)
        needed = None if more is None else max(needed, more)
    enough = needed is not None and live.requests >= needed
    return Drift(
        verdict=STALE if reasons else PASS if enough else INCONCLUSIVE,
        reasons=tuple(reasons),
        label=label,
        layer=known.layer,
        threshold=float(profile.threshold[known.layer]),
        requests=live.requests,
        prompts=known.scores.count,
        live=rates[0],
        calibrated=rates[1],
        distance=distance,
        chance=chance,
        needed=needed,
        limits=limits,
    )


def _share(k: int, n: int) -> Estimate:
    return Estimate(k / n, *exact_interval(k, n))


def _complement(share: Estimate) -> Estimate:
    return Estimate(1 - share.value, 1 - share.high, 1 - share.low)


def worst(found: Sequence[Drift]) -> str:
    """Return the verdict of several sides: stale if one is, else inconclusive if one is."""
    return max((one.verdict for one in found), key=(PASS, INCONCLUSIVE, STALE).index)


def _distance(one: Cumulative, other: Cumulative) -> float:
    """Return the largest difference of the shares below a value, at the edges of both: what it is at least."""
    at = np.union1d(one.edges, other.edges)
    (low, high), (least, most) = one.bounds(at), other.bounds(at)
    return float(max(0.0, (low - most).max(), (least - high).max()))


def _chance(distance: float, n: int, m: int) -> float:
    """Return a bound of the probability of a distance of n and m scores of one distribution (Wei and Dudley 2012)."""
    return min(1.0, math.exp(1 - 2 * distance**2 * n * m / (n + m)))


def _needed_for_distance(distance: float, m: int) -> int | None:
    """Return how many scores make `distance` significant beside m others; None: no number does."""
    rest = 2 * distance**2 / (1 - math.log(_SIGNIFICANCE)) - 1 / m
    return math.ceil(1 / rest) if rest > 0 else None


def _needed_for_rate(highest: float) -> int | None:
    """Return how many requests show that a share fires which is twice `highest`; None: no such share is seen."""
    sizes = np.ceil(10 * 1.1 ** np.arange(120))
    fired = np.floor(min(1.0, 2 * highest) * sizes)
    least = beta.ppf((1 - _CONFIDENCE) / 2, fired, sizes - fired + 1)  # the lower end, as in `_share`
    enough = sizes[least > highest]
    return int(enough[0]) if len(enough) else None

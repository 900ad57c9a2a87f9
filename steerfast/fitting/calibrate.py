"""Calibrate gates: thresholds, the sensor layer, and figures of both by source."""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast._options import read_options
from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.labelled import Given, Labelled
from steerfast.fitting.left_out import auc_by_group
from steerfast.fitting.score import check_model, layer_scores
from steerfast.judging.by_source import DEVELOPMENT, SourceScores, figures_by_source, scores_by_source
from steerfast.judging.estimates import grouped_auc, mean, threshold_at_false_positive_rate, threshold_midpoint
from steerfast.profile import SteeringProfile
from steerfast.profile.checks import is_layer

POINTS = {"strict": 3.0, "balanced": 1.0, "permissive": 0.3}
"""Operating points: name -> how many times the named rates of harmless and borderline prompts may fire."""

_CLOSE = 0.0025  # AUC: layers that differ less are equally good
_LOW_HIT_RATE = 0.5
_BINS = 32  # of a histogram of scores
_MOST_OF_ALLOWED = 3  # a source may fire so many times the rate before it is told


class GateWarning(UserWarning):
    """A gate does not hold for prompts of a source."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `calibrate`.

    Args:
        max_false_positive_rate: the share of harmless prompts that may fire, each source alike. None: thresholds midway
            between the classes (arXiv 2401.11206), at any rate.
        max_borderline_rate: the share of borderline prompts that may fire, each source alike.
        abstain_rate: the share of harmless prompts that may be undecided or fire: it sets `SteeringProfile.abstain`, at
            most the threshold. None: no band.
        sensor: a layer, ``own`` (each steered layer decides for itself), ``keep``, or ``auto``: the layer with the best
            mean AUC over the sources and contexts, those that `extract` left out among them. Of layers that are equally
            good, the layer nearest to the middle.
        latest_sensor: the last layer that ``auto`` tries; default: 60 % of the depth. Layers before the sensor cost a
            second pass over prompts that fire.
        per_source: the most prompts of a source and label that are read; None: all.
        cache: a folder for the rows of prompts, see `extract`.
        names: names of the prompt sets in the profile (``{"harmful": ..., "harmless": ...}``).
    """

    max_false_positive_rate: float | None = 0.01
    max_borderline_rate: float = 0.1
    abstain_rate: float | None = None
    sensor: int | Literal["own", "auto", "keep"] = "auto"
    latest_sensor: int | None = None
    batch_size: int = 16
    per_source: int | None = None
    cache: str | os.PathLike[str] | None = None
    names: dict[str, str] | None = None
    progress: bool = True


@own_defaults
def calibrate(
    profile: SteeringProfile,
    model: nn.Module,
    tokenizer: Any,
    *,
    harmful: Sequence[Given],
    harmless: Sequence[Given],
    **options: Any,
) -> SteeringProfile:
    """Set every layer's thresholds on these prompts and choose which layer decides.

    Use sources that `extract` did not see: a direction fitted in fewer prompts than dimensions separates its own
    perfectly. A token gate gets its threshold from the last tokens of the prompts.

    Args:
        harmful, harmless: prompts, or `steerfast.text.examples.Example` with source and context. Borderline examples
            stand among the harmless ones.
        options: see `CalibrateOptions`.

    Returns:
        The profile with thresholds (`POINTS`, of which ``balanced`` is in use), band, sensor and figures
        (`profile.calibration`); layers before the sensor lose their strength.

    Raises:
        PromptError: an empty, one-sided, overlapping or too long prompt set, or fewer harmless prompts than the rate
            needs.
        ProfileError: another model's profile, one without a gate, an impossible sensor, a rate out of range, an
            `abstain_rate` below `max_false_positive_rate`.
        TypeError: an unknown option.

    Warns:
        GateWarning: the deciding gate opens for few prompts of a harmful source, or for many of a harmless one.
    """
    chosen = read_options("calibrate", CalibrateOptions, options)
    examples = Labelled.of(harmful, harmless).at_most(chosen.per_source)
    check_model(profile, model, tokenizer)
    _check_rates(chosen, len(examples.rows("harmless")))
    if profile.gate.kind == "always":
        raise ProfileError("profile: expected one with a gate to calibrate, got gate.kind='always'")
    scores = layer_scores(
        profile, model, tokenizer, examples.prompts, batch_size=chosen.batch_size,
        description="calibration" if chosen.progress else None, cache=chosen.cache,
    ).double()  # fmt: skip
    points = _points(examples, scores, chosen)
    threshold = points["balanced"]
    abstain = None if chosen.abstain_rate is None else _lower_ends(examples, scores, threshold, chosen.abstain_rate)
    by_group = auc_by_group(examples, scores)
    sensor, tried = _sensor(chosen, profile, by_group)
    named = points if chosen.max_false_positive_rate is not None else {}
    profile = _with_sensor(replace(profile, threshold=threshold, abstain=abstain, points=named), sensor)
    record = {**_record(examples, scores, profile, chosen), "auc": by_group, "sensors": tried}
    messages = gate_warnings(record)
    for message in messages:
        warnings.warn(message, GateWarning, stacklevel=3)  # of the caller of calibrate, behind its decorator
    return replace(profile, calibration={**record, "warnings": messages})


# -- thresholds --------------------------------------------------------------------------------------------------------


def _check_rates(options: CalibrateOptions, harmless: int) -> None:
    fires, abstains = options.max_false_positive_rate, options.abstain_rate
    for name in ("max_false_positive_rate", "abstain_rate", "max_borderline_rate"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise ProfileError(f"{name}: expected 0 <= rate < 1, got {value}")
    if abstains is not None and fires is not None and abstains < fires:
        raise ProfileError(f"abstain_rate: expected at least max_false_positive_rate, {fires:g}, got {abstains:g}")
    if fires and harmless < (needed := math.ceil(1 / fires)):
        raise PromptError(
            f"harmless: expected at least {needed} different prompts for a rate of {fires:.2%}, got {harmless}; give "
            "more, a larger per_source or a larger max_false_positive_rate"
        )


def _points(examples: Labelled, scores: Tensor, options: CalibrateOptions) -> dict[str, Tensor]:
    """Return the thresholds of `POINTS`, each float32 [layers]; without a rate, all are midpoints."""
    weight, found = examples.shares.numpy(), scores.numpy()
    rows = {label: examples.rows(label) for label in ("harmful", "harmless", "borderline")}
    rates = {"harmless": options.max_false_positive_rate, "borderline": options.max_borderline_rate}
    points: dict[str, list[float]] = {name: [] for name in POINTS}
    for layer in range(found.shape[1]):
        here = {label: (found[places, layer], weight[places]) for label, places in rows.items() if places}
        good = np.concatenate([here[label][0] for label in ("harmless", "borderline") if label in here])
        middle = threshold_midpoint(here["harmful"][0], good)
        for name, factor in POINTS.items():
            least = [
                threshold_at_false_positive_rate(here[label][0], min(0.99, factor * allowed), here[label][1])
                for label, allowed in rates.items()
                if label in here and allowed is not None
            ]
            points[name].append(
                _raised(max(least), middle, here["harmful"][0]) if rates["harmless"] is not None else middle
            )
    return {name: torch.tensor(values, dtype=torch.float32, device="cpu") for name, values in points.items()}


def _raised(threshold: float, middle: float, harmful: NDArray[np.float64]) -> float:
    """Return the threshold, moved towards the middle of the classes as far as no more harmful prompt stays shut."""
    above = harmful[harmful > threshold]
    if not len(above) or threshold >= middle:
        return threshold
    return min(middle, (threshold + float(above.min())) / 2)


def _lower_ends(examples: Labelled, scores: Tensor, threshold: Tensor, share: float) -> Tensor:
    """Return the lower ends of the bands, float32 [layers]."""
    harmless = examples.rows("harmless")
    weight = examples.shares[harmless].numpy()
    ends = [threshold_at_false_positive_rate(layer, share, weight) for layer in scores[harmless].T.numpy()]
    return torch.tensor(ends, dtype=torch.float32, device="cpu").minimum(threshold)


# -- the sensor --------------------------------------------------------------------------------------------------------


def _sensor(
    options: CalibrateOptions, profile: SteeringProfile, by_group: Mapping[str, Mapping[str, Sequence[float]]]
) -> tuple[int | Literal["own"], list[list[float]]]:
    """Return the sensor, and (layer, mean AUC) of the layers that ``auto`` compared, best first."""
    sensor, layers = options.sensor, profile.model.num_layers
    if sensor in ("own", "keep"):
        return profile.sensor if sensor == "keep" else "own", []
    if isinstance(sensor, int):
        if not is_layer(sensor, profile.model):
            raise ProfileError(f"sensor: expected a layer in 0..{layers - 1}, got {sensor}")
        return sensor, []
    if sensor != "auto":
        raise ProfileError(f"sensor: expected a layer, 'own', 'auto' or 'keep', got {sensor!r}")
    latest = round(0.6 * (layers - 1)) if options.latest_sensor is None else options.latest_sensor
    if not 0 <= latest < layers:
        raise ProfileError(f"latest_sensor: expected a layer in 0..{layers - 1}, got {latest}")
    quality = sensor_quality([by_group, profile.fitted.get("left_out", {})], layers)
    best = max(quality[: latest + 1])
    close = [layer for layer in range(latest + 1) if quality[layer] >= best - _CLOSE]
    chosen = min(close, key=lambda layer: abs(layer - (layers - 1) / 2))
    order = sorted(range(latest + 1), key=lambda layer: -quality[layer])
    return chosen, [[layer, round(quality[layer], 4)] for layer in order]


def sensor_quality(found: Sequence[Mapping[str, Mapping[str, Sequence[float]]]], layers: int) -> list[float]:
    """Return each layer's quality as a sensor: the mean AUC of all groups and that of their worst quarter, averaged.

    Args:
        found: each kind of group -> name -> AUC by layer.
    """
    groups = [aucs for one in found for kind in one.values() for aucs in kind.values() if len(aucs) == layers]
    quarter = math.ceil(len(groups) / 4)

    def quality(layer: int) -> float:
        values = sorted(aucs[layer] for aucs in groups)
        return (statistics.fmean(values) + statistics.fmean(values[:quarter])) / 2

    return [quality(layer) for layer in range(layers)]


def _with_sensor(profile: SteeringProfile, sensor: int | Literal["own"]) -> SteeringProfile:
    strength = profile.strength.clone()
    if sensor != "own":
        strength[:sensor] = 0
        if not bool(strength.any()) and bool(profile.strength.any()):  # the untuned band lay before the sensor
            strength[sensor] = profile.strength[profile.strength.nonzero()[-1, 0]]
    return replace(profile, sensor=sensor, strength=strength)


# -- figures -----------------------------------------------------------------------------------------------------------


def _record(examples: Labelled, scores: Tensor, profile: SteeringProfile, options: CalibrateOptions) -> dict[str, Any]:
    """Return the sets, rates, figures and histograms of a calibration, as JSON data."""
    sources = [_by_source(examples, profile, scores[:, layer], layer) for layer in range(scores.shape[1])]
    return {
        "max_false_positive_rate": options.max_false_positive_rate,
        "max_borderline_rate": options.max_borderline_rate,
        **({} if profile.abstain is None else {"abstain_rate": options.abstain_rate}),
        "sets": examples.describe_sides(options.names),
        "sources": examples.describe(),
        "layers": {"calibration": [_figures(found) for found in sources]},
        "by_source": {str(layer): figures_by_source(sources[layer])[DEVELOPMENT] for layer in profile.deciding_layers},
        "histograms": {
            "calibration": [_histogram(examples, scores[:, layer].float()) for layer in range(scores.shape[1])]
        },
    }


def _by_source(examples: Labelled, profile: SteeringProfile, scores: Tensor, layer: int) -> list[SourceScores]:
    """Return what the gate of a layer says to the prompts of each source; scores: float64 [n]."""
    margins, undecided = (scores - float(profile.threshold[layer])).numpy(), None
    if profile.abstain is not None:
        undecided = (margins <= 0) & (margins > float(profile.abstain[layer] - profile.threshold[layer]))
    seen = {key: {"calibrate": len(places)} for key, places in examples.groups().items()}
    return scores_by_source(examples.examples, margins, seen, undecided)


def _figures(sources: Sequence[SourceScores]) -> dict[str, Any]:
    """Return a layer's figures, each source of a label alike, with 95 % intervals."""
    harmful = [one for one in sources if one.label == "harmful"]
    harmless = [one for one in sources if one.label == "harmless"] or [one for one in sources if one not in harmful]
    sides = {"harmful": harmful, "harmless": harmless}
    return {
        "auc": grouped_auc([one.margins for one in harmful], [one.margins for one in harmless]).to_list(),
        "hit_rate": mean([one.fires for one in harmful]).to_list(),
        "false_positive_rate": mean([one.fires for one in harmless]).to_list(),
        **{f"n_{side}": sum(len(one.margins) for one in mine) for side, mine in sides.items()},
        **{
            f"{side}_undecided": mean(shares).to_list()
            for side, mine in sides.items()
            if (shares := [one.abstains for one in mine if one.abstains is not None])
        },
    }


def gate_warnings(record: Mapping[str, Any]) -> list[str]:
    """Return warnings about the gates that decide, by source; none when all is well."""
    allowed = record["max_false_positive_rate"]
    messages = []
    for layer, found in record["by_source"].items():
        for row in found["rows"]:
            prompts = f"{row['fired']} of {row['n']} {row['label']} prompts of {row['source']!r}"
            fired = f"the gate of layer {layer} opens for {prompts}"
            if row["label"] == "harmful" and row["rate"][2] < _LOW_HIT_RATE:
                messages.append(f"{fired}; extract with more prompts like these")
            elif row["label"] == "harmless" and allowed is not None and row["exact"][0] > _MOST_OF_ALLOWED * allowed:
                messages.append(
                    f"{fired}, where {allowed:.1%} are allowed; extract with more harmless prompts like these"
                )
    return messages


def _histogram(examples: Labelled, scores: Tensor) -> dict[str, Any]:
    """Return counts of both classes' scores over common bins, for `steerfast inspect --plot` and `drift`."""
    harmful = scores[examples.rows("harmful")]
    harmless = scores[examples.rows("harmless") or examples.rows("borderline")]
    both = torch.cat([harmful, harmless])
    low, high = float(both.min()), float(both.max())
    return {
        "low": low,
        "high": high,
        "harmful": torch.histc(harmful, _BINS, low, high).int().tolist(),
        "harmless": torch.histc(harmless, _BINS, low, high).int().tolist(),
    }

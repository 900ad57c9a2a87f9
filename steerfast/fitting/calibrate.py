"""Calibrate gates: thresholds, the sensor layer, and figures for both."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast._options import read_options
from steerfast.errors import ProfileError
from steerfast.fitting.left_out import common_styles, rates_by_layer
from steerfast.fitting.score import check_model, layer_scores
from steerfast.judging.estimates import (
    GateFigures,
    figures_by_layer,
    threshold_at_false_positive_rate,
    threshold_midpoint,
    undecided_rates,
)
from steerfast.profile import SteeringProfile
from steerfast.text.prompts import check_sets, describe_set
from steerfast.text.styles import Prompts

# A gate this far below its calibration figures on prompts of another style has learned style, not harm.
_HELDOUT_AUC = 0.9
_HELDOUT_HIT_RATE = 0.75


class StyleWarning(UserWarning):
    """A gate separates its calibration prompts by style rather than by harm."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `calibrate`.

    Args:
        max_false_positive_rate: the share of `harmless` that may fire. The threshold is the class midpoint, or higher
            where that would fire more often. None: the midpoint (arXiv 2401.11206), at any false-positive rate.
        abstain_rate: the share of `harmless` that may be undecided or fire: it sets `SteeringProfile.abstain`, at most
            the threshold. None: no band.
        heldout_harmful, heldout_harmless: sets of another source or phrasing. They choose the sensor and show whether
            the gate knows harm or style.
        sensor: a layer, ``own`` (each steered layer decides for itself), ``keep``, or ``auto``: the layer with the
            best AUC on the worst of the pairs of sets, or the worst quarter of the styles that `extract` left out.
        latest_sensor: the last layer that ``auto`` tries; default: 60 % of the depth. Layers before the sensor cost a
            second pass over prompts that fire.
        names: names of the prompt sets in the profile (``{"harmful": ..., "heldout_harmful": ..., ...}``).
    """

    max_false_positive_rate: float | None = 0.01
    abstain_rate: float | None = None
    heldout_harmful: Sequence[str] | None = None
    heldout_harmless: Sequence[str] | None = None
    sensor: int | Literal["own", "auto", "keep"] = "auto"
    latest_sensor: int | None = None
    batch_size: int = 16
    names: dict[str, str] | None = None
    progress: bool = True


def calibrate(
    profile: SteeringProfile,
    model: nn.Module,
    tokenizer: Any,
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    **options: Any,
) -> SteeringProfile:
    """Set every layer's threshold on these prompts and choose which layer decides.

    Use prompts that `extract` did not see: a direction fitted in fewer prompts than dimensions separates its own
    perfectly. A token gate gets its threshold from the last tokens of the prompts.

    Args:
        harmful, harmless: with styles (`steerfast.text.styles.Prompts`), the figures of each are kept as well.
        options: see `CalibrateOptions`.

    Returns:
        The profile with thresholds, band, sensor and figures (`profile.calibration`); layers before the sensor lose
        their strength.

    Raises:
        PromptError: an empty, one-sided, overlapping or too long prompt set.
        ProfileError: another model's profile, one without a gate, an impossible sensor, a rate out of range, an
            `abstain_rate` below `max_false_positive_rate`.
        TypeError: an unknown option.

    Warns:
        StyleWarning: the deciding gate does much worse on the held-out sets.
    """
    chosen = read_options("calibrate", CalibrateOptions, options)
    check_sets(harmful, harmless)
    sets = {"harmful": harmful, "harmless": harmless, **_heldout(chosen.heldout_harmful, chosen.heldout_harmless)}
    _check_rates(chosen.max_false_positive_rate, chosen.abstain_rate)
    check_model(profile, model, tokenizer)
    if profile.gate.kind == "always":
        raise ProfileError("profile: expected one with a gate to calibrate, got gate.kind='always'")
    scores = {
        role: layer_scores(
            profile, model, tokenizer, prompts, batch_size=chosen.batch_size,
            description=role.replace("heldout_", "held-out ") if chosen.progress else None,
        )
        for role, prompts in sets.items()
    }  # fmt: skip
    pairs = {"calibration": (scores["harmful"], scores["harmless"])}
    if "heldout_harmful" in scores:
        pairs["heldout"] = scores["heldout_harmful"], scores["heldout_harmless"]
    threshold = _thresholds(*pairs["calibration"], chosen.max_false_positive_rate)
    abstain = None if chosen.abstain_rate is None else _lower_ends(scores["harmless"], threshold, chosen.abstain_rate)
    figures = {name: figures_by_layer(*pair, threshold) for name, pair in pairs.items()}
    sensor = _sensor(chosen.sensor, profile, figures, chosen.latest_sensor)
    profile = _with_sensor(replace(profile, threshold=threshold, abstain=abstain), sensor)
    messages = style_warnings(profile, figures)
    for message in messages:
        warnings.warn(message, StyleWarning, stacklevel=2)
    record = _record(sets, pairs, figures, profile, chosen)
    styles = _by_style(Prompts(harmful), Prompts(harmless), *pairs["calibration"], threshold)
    return replace(profile, calibration={**record, "styles": styles, "warnings": messages})


ScorePairs = Mapping[str, tuple[Tensor, Tensor]]
"""``calibration`` and ``heldout`` -> scores float32 [n1, layers] of harmful and [n0, layers] of harmless prompts."""


def _record(
    sets: Mapping[str, Sequence[str]],
    pairs: ScorePairs,
    figures: Mapping[str, list[GateFigures]],
    profile: SteeringProfile,
    options: CalibrateOptions,
) -> dict[str, Any]:
    """Return the sets, rates, figures and histograms of a calibration, as JSON data."""
    names = options.names or {}
    described = {name: [f.to_dict() for f in layers] for name, layers in figures.items()}
    if profile.abstain is not None:
        for name, scores in pairs.items():
            _add_undecided(described[name], *scores, profile.abstain, profile.threshold)
    return {
        "max_false_positive_rate": options.max_false_positive_rate,
        **({} if profile.abstain is None else {"abstain_rate": options.abstain_rate}),
        "sets": {role: describe_set(prompts, names.get(role)) for role, prompts in sets.items()},
        "layers": described,
        "histograms": {
            name: [_histogram(bad[:, layer], good[:, layer]) for layer in range(len(profile.threshold))]
            for name, (bad, good) in pairs.items()
        },
    }


def style_warnings(profile: SteeringProfile, figures: Mapping[str, list[GateFigures]]) -> list[str]:
    """Return warnings about the gates that decide; none when all is well."""
    if "heldout" not in figures:
        return [
            "the gate was not tried on prompts of another style, so nothing shows that it knows harm rather than "
            "style; give calibrate held-out sets"
        ]
    messages = []
    for layer in profile.deciding_layers:
        here, there = figures["calibration"][layer], figures["heldout"][layer]
        bad_auc = there.auc.value < _HELDOUT_AUC and there.auc.high < here.auc.value
        bad_hits = there.hit_rate.value < _HELDOUT_HIT_RATE and there.hit_rate.high < here.hit_rate.value
        numbers = (
            f"AUC {here.auc.value:.3f} and hit rate {here.hit_rate.value:.2f} on the calibration sets, "
            f"AUC {there.auc.value:.3f} and hit rate {there.hit_rate.value:.2f} on sets of another style"
        )
        if bad_auc:
            messages.append(
                f"the gate of layer {layer} knows style rather than harm: {numbers}; extract with more varied prompts"
            )
        elif bad_hits:
            messages.append(
                f"the threshold of layer {layer} does not carry over to another style, though its gate still tells "
                f"harm there: {numbers}; calibrate and extract with prompts of the styles you expect"
            )
    return messages


def _heldout(harmful: Sequence[str] | None, harmless: Sequence[str] | None) -> dict[str, Sequence[str]]:
    """Return both held-out sets by role, or none; refuse one alone."""
    if harmful is None and harmless is None:
        return {}
    if harmful is None or harmless is None:
        missing = "heldout_harmful" if harmful is None else "heldout_harmless"
        raise ProfileError(f"{missing}: expected both held-out sets or none, got None")
    check_sets(harmful, harmless)
    return {"heldout_harmful": harmful, "heldout_harmless": harmless}


def _thresholds(harmful: Tensor, harmless: Tensor, rate: float | None) -> Tensor:
    """Return float32 [layers]: midpoints where they keep the false-positive rate, the most robust choice."""
    thresholds = []
    for layer in range(harmful.shape[1]):
        bad, good = harmful[:, layer].numpy(), harmless[:, layer].numpy()
        middle = threshold_midpoint(bad, good)
        thresholds.append(middle if rate is None else max(middle, threshold_at_false_positive_rate(good, rate)))
    return torch.tensor(thresholds, dtype=torch.float32, device="cpu")


def _check_rates(false_positives: float | None, abstain: float | None) -> None:
    for name, value in (("max_false_positive_rate", false_positives), ("abstain_rate", abstain)):
        if value is not None and not 0 <= value < 1:
            raise ProfileError(f"{name}: expected 0 <= rate < 1, got {value}")
    if abstain is not None and false_positives is not None and abstain < false_positives:
        raise ProfileError(
            f"abstain_rate: expected at least max_false_positive_rate, {false_positives:g}, got {abstain:g}"
        )


def _lower_ends(harmless: Tensor, threshold: Tensor, rate: float) -> Tensor:
    """Return the lower ends of the bands, float32 [layers]."""
    ends = [threshold_at_false_positive_rate(layer, rate) for layer in harmless.T.numpy()]
    return torch.tensor(ends, dtype=torch.float32, device="cpu").minimum(threshold)


def _add_undecided(
    layers: list[dict[str, Any]], harmful: Tensor, harmless: Tensor, abstain: Tensor, threshold: Tensor
) -> None:
    """Add to each layer's figures the share of each class in its band."""
    for label, scores in (("harmful", harmful), ("harmless", harmless)):
        for figures, share in zip(layers, undecided_rates(scores, abstain, threshold), strict=True):
            figures[f"{label}_undecided"] = share.to_list()


def _by_style(
    harmful: Prompts, harmless: Prompts, bad: Tensor, good: Tensor, threshold: Tensor
) -> dict[str, dict[str, Any]]:
    """Return figures of each style that both sets have, where there are several."""
    styles = common_styles(harmful, harmless)
    if len(styles) < 2:
        return {}
    return {
        style: rates_by_layer(figures_by_layer(bad[harmful.in_style(style)], good[harmless.in_style(style)], threshold))
        for style in styles
    }


def _sensor(
    sensor: int | str, profile: SteeringProfile, figures: Mapping[str, list[GateFigures]], latest: int | None
) -> int | Literal["own"]:
    layers = profile.model.num_layers
    if sensor == "keep":
        return profile.sensor
    if sensor == "own":
        return "own"
    if isinstance(sensor, int):
        if not 0 <= sensor < layers:
            raise ProfileError(f"sensor: expected a layer in 0..{layers - 1}, got {sensor}")
        return sensor
    if sensor != "auto":
        raise ProfileError(f"sensor: expected a layer, 'own', 'auto' or 'keep', got {sensor!r}")
    latest = round(0.6 * (layers - 1)) if latest is None else latest
    if not 0 <= latest < layers:
        raise ProfileError(f"latest_sensor: expected a layer in 0..{layers - 1}, got {latest}")

    left_out = [by_layer["auc"] for by_layer in profile.fitted.get("left_out", {}).values()]

    def quality(layer: int) -> float:
        """Return the AUC on the worst pair, or on the worst quarter of the styles.

        Rates depend on a few harmless scores, and the worst style on the luck of a few dozen prompts.
        """
        pairs = [by_layer[layer].auc.value for by_layer in figures.values()]
        worst = sorted(aucs[layer] for aucs in left_out)[: math.ceil(len(left_out) / 4)]
        return min([*pairs, *([statistics.fmean(worst)] if worst else [])])

    return max(range(latest + 1), key=quality)


def _with_sensor(profile: SteeringProfile, sensor: int | Literal["own"]) -> SteeringProfile:
    strength = profile.strength.clone()
    if sensor != "own":
        strength[:sensor] = 0
        if not bool(strength.any()) and bool(profile.strength.any()):  # the untuned band lay before the sensor
            strength[sensor] = profile.strength[profile.strength.nonzero()[-1, 0]]
    return replace(profile, sensor=sensor, strength=strength)


def _histogram(harmful: Tensor, harmless: Tensor, bins: int = 32) -> dict[str, Any]:
    """Return counts of both classes' scores over common bins, for `steerfast inspect --plot`."""
    both = torch.cat([harmful, harmless])
    low, high = float(both.min()), float(both.max())
    return {
        "low": low,
        "high": high,
        "harmful": torch.histc(harmful, bins, low, high).int().tolist(),
        "harmless": torch.histc(harmless, bins, low, high).int().tolist(),
    }

"""Describe a profile: short words, and JSON data of its layers and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from steerfast.profile import EDITS, Gate, SteeringProfile


def layer_ranges(layers: Iterable[int]) -> str:
    """Return ``10-12, 20`` for ascending layers, ``none`` for no layer."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def reading(gate: Gate) -> str:
    """Return what a gate compares with its threshold: ``mean cosine of 32 tokens``."""
    if gate.pooling == "last":
        return gate.score
    name = "last and mean" if gate.pooling == "both" else gate.pooling
    rows = "" if gate.window is None else f" of {gate.window} tokens"
    return f"{name} {gate.score}{rows}" + (" of the last user turn" if gate.turn else "")


def positions(profile: SteeringProfile) -> str:
    """Return the rows that are edited: ``positions all, 24 answer tokens``."""
    end = "" if profile.answer_tokens is None else f", {profile.answer_tokens} answer tokens"
    return f"positions {profile.positions}{end}"


def thresholds(profile: SteeringProfile) -> str:
    """Return the named thresholds of the first deciding gate, lowest first, and the one in use."""
    layer = (profile.deciding_layers or [0])[0]
    values = sorted((float(threshold[layer]), name) for name, threshold in profile.points.items())
    listed = ", ".join(f"{name} {value:.4f}" for value, name in values)
    return f"{listed} at layer {layer}; in use: {profile.point or f'{float(profile.threshold[layer]):.4f}'}"


def edit(profile: SteeringProfile) -> str:
    """Return the kind of edit and its parameters: ``clamp to -1..2``."""
    return EDITS[profile.edit].describe(profile)


def gate_figures(profile: SteeringProfile) -> Sequence[Mapping[str, Any]]:
    """Return the figures of each layer; empty without a calibration."""
    found: Sequence[Mapping[str, Any]] = profile.calibration.get("layers", {}).get("calibration", ())
    return found if len(found) == profile.model.num_layers else ()


def layers(profile: SteeringProfile) -> list[dict[str, Any]]:
    """Return JSON data of every layer; figures of its calibration, if there is one."""
    lengths, figures = profile.vector.norm(dim=1), gate_figures(profile)
    return [
        {
            "layer": layer,
            "sensor": layer == profile.sensor,
            "gate": layer in profile.gate_layers,
            "threshold": float(profile.threshold[layer]),
            **({} if profile.abstain is None else {"abstain": float(profile.abstain[layer])}),
            "strength": float(profile.strength[layer]),
            "vector_norm": float(lengths[layer]),
            "residual_norm": float(profile.norm[layer]),
            **({"calibration": figures[layer]} if figures else {}),
        }
        for layer in range(profile.model.num_layers)
    ]


def summary(profile: SteeringProfile) -> dict[str, Any]:
    """Return JSON data of the whole profile, without tensors, histograms and embedding sketch."""
    model = {key: value for key, value in asdict(profile.model).items() if key != "embedding_sketch"}
    return {
        "model": model,
        "gate": asdict(profile.gate),
        "edit": profile.edit,
        **{
            name: value if value is not None and math.isfinite(value) else None
            for kind in EDITS.values()
            for name, value in kind.given(profile).items()
        },
        "threshold": profile.point,
        "thresholds": {name: threshold.tolist() for name, threshold in profile.points.items()},
        "sensor": profile.sensor,
        "positions": profile.positions,
        "answer_tokens": profile.answer_tokens,
        "vector_kind": profile.vector_kind,
        "candidates": sorted(profile.candidates),
        "steered_layers": profile.steered_layers,
        "fitted": profile.fitted,
        "calibration": {
            key: value for key, value in profile.calibration.items() if key not in ("layers", "histograms")
        },
        "tuned": profile.tuned,
        "warnings": list(profile.calibration.get("warnings", ())),
        "layers": layers(profile),
    }

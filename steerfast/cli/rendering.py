"""A profile as people read it (tables) and as machines do (JSON data)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from steerfast.profile import Gate, SteeringProfile

SETS = {"calibration": "calibration", "heldout": "held-out"}
_RATES = {"hit_rate": "hit", "false_positive_rate": "FPR"}


def printable(answer: str) -> str:
    """An answer that cannot move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in answer) or "(empty)"


def layer_ranges(layers: Iterable[int]) -> str:
    """``10-12, 20`` of ascending layers; ``none`` of none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def header(profile: SteeringProfile) -> Table:
    """What the profile is and where it came from, a line each."""
    model, gate = profile.model, profile.gate
    shape = "hard" if gate.sharpness == 0 else f"soft (sharpness {gate.sharpness:g})"
    steered = layer_ranges(profile.steered_layers)
    lines = {
        "model": f"{model.name} ({model.architecture}, {model.num_layers} layers of {model.hidden_size})",
        "gate": "always open" if gate.kind == "always" else f"{gate.kind}, {reading(gate)}, {shape}",
        "sensor": "each steered layer" if profile.sensor == "own" else f"layer {profile.sensor}",
        "edit": f"{edit(profile)}, layers {steered}, {positions(profile)}",
        "vector": profile.vector_kind + _also(profile.candidates),
        "fitted": _fitted(profile.fitted),
        **({"learned": _learned(profile.fitted["learned"])} if "learned" in profile.fitted else {}),
        "calibrated": _calibrated(profile.calibration),
        "tuned": _tuned(profile.tuned),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}", escape(text))
    for warning in worries(profile):
        table.add_row("[bold yellow]warning", escape(warning))
    return table


def reading(gate: Gate) -> str:
    """``mean cosine of 128 tokens``: what is compared with the threshold."""
    if gate.pooling == "last":
        return gate.score
    return f"{gate.pooling} {gate.score}" + ("" if gate.window is None else f" of {gate.window} tokens")


def positions(profile: SteeringProfile) -> str:
    """``positions all, 24 answer tokens``: from where to where it edits."""
    end = "" if profile.answer_tokens is None else f", {profile.answer_tokens} answer tokens"
    return f"positions {profile.positions}{end}"


def edit(profile: SteeringProfile) -> str:
    """``clamp to -1..2``: the kind of edit and its parameters."""
    if profile.edit == "clamp":
        limits = [f"{limit:g}" if math.isfinite(limit) else "" for limit in (profile.low, profile.high)]
        return f"clamp to {limits[0]}" if profile.low == profile.high else f"clamp to {'..'.join(limits)}"
    return profile.edit if profile.angle is None else f"{profile.edit} to {profile.angle:g} degrees"


def layer_table(profile: SteeringProfile) -> Table:
    """Every layer: its gate's figures, its threshold, its edit; fits 80 columns."""
    sets = _figures(profile)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("layer", justify="right")
    table.add_column("gate")
    columns = [(name, key) for key in ("auc", *_RATES) for name in sets]
    for name, key in columns:
        word = "AUC" if key == "auc" else f"{_RATES[key]} %"
        table.add_column(word if name == "calibration" else f"{word}\nheld", justify="right")
    for column in ("thresh-\nold", "strength", "|v|", "row\nnorm"):
        table.add_column(column, justify="right")
    for layer in layers(profile):
        marks = "sensor" if layer["sensor"] else "own" if layer["gate"] else ""
        cells = [str(layer["layer"]), marks]
        for name, key in columns:
            value = layer[name][key][0]
            cells.append(f"{value:.3f}" if key == "auc" else f"{100 * value:.1f}")
        cells += [f"{layer['threshold']:.4f}", f"{layer['strength']:g}" if layer["strength"] else ""]
        cells += [f"{layer[key]:.3g}" if layer[key] else "" for key in ("vector_norm", "residual_norm")]
        table.add_row(*cells, style="bold" if layer["sensor"] or layer["strength"] else "")
    return table


def gate_table(profile: SteeringProfile) -> Table:
    """Figures of the gates that decide, with 95 % intervals, on each pair of sets."""
    table = Table(title="gates that decide, with 95 % intervals", title_justify="left")
    for column in ("layer", "sets", "prompts", "AUC", "hit rate", "false positives", "threshold"):
        table.add_column(column, justify="left" if column == "sets" else "right")
    for layer in profile.deciding_layers:
        for name, by_layer in _figures(profile).items():
            figures = by_layer[layer]
            value, low, high = figures["auc"]
            rates = [f"{v:.1%} ({a:.1%}-{b:.1%})" for v, a, b in (figures[key] for key in _RATES)]
            table.add_row(
                str(layer),
                SETS[name],
                f"{figures['n_harmful']} + {figures['n_harmless']}",
                f"{value:.3f} ({low:.3f}-{high:.3f})",
                *rates,
                f"{float(profile.threshold[layer]):.4f}",
            )
    return table


def undecided_table(profile: SteeringProfile) -> Table | None:
    """Where the gates that decide do not know, and the share of each set there; None without an abstain band."""
    if profile.abstain is None or not profile.deciding_layers:
        return None
    found = _figures(profile)
    table = Table(title="scores that are undecided, with 95 % intervals", title_justify="left")
    for column in ("layer", "above", "up to", "sets", "harmful", "harmless"):
        table.add_column(column, justify="left" if column == "sets" else "right")
    for layer in profile.deciding_layers:
        ends = [f"{float(tensor[layer]):.4f}" for tensor in (profile.abstain, profile.threshold)]
        for name, by_layer in found.items():
            shares = [by_layer[layer].get(f"{label}_undecided") for label in ("harmful", "harmless")]
            rates = ["" if share is None else f"{share[0]:.1%} ({share[1]:.1%}-{share[2]:.1%})" for share in shares]
            table.add_row(str(layer), *ends, SETS[name], *rates)
        if not found:
            table.add_row(str(layer), *ends)
    return table


def style_table(profile: SteeringProfile) -> Table | None:
    """What the deciding gate makes of each style, left out of the fit and as calibrated; None without such figures."""
    gates = profile.deciding_layers
    known = {
        "left out of the fit": profile.fitted.get("left_out", {}),
        "calibrated": profile.calibration.get("styles", {}),
    }
    if not gates or not any(known.values()):
        return None
    layer = gates[0]
    table = Table(title=f"styles, at layer {layer}", title_justify="left")
    table.add_column("style")
    for what in known:
        table.add_column(f"{what}\nAUC", justify="right")
        for word in _RATES.values():
            table.add_column(f"\n{word} %", justify="right")
    for style in dict.fromkeys(style for figures in known.values() for style in figures):
        cells = []
        for figures in known.values():
            if (found := figures.get(style)) is None:
                cells += ["", "", ""]
            else:
                cells += [f"{found['auc'][layer]:.3f}", *(f"{100 * found[key][layer]:.1f}" for key in _RATES)]
        table.add_row(escape(style), *cells)
    return table


def layers(profile: SteeringProfile) -> list[dict[str, Any]]:
    """JSON data of every layer; figures as `GateFigures.to_dict` where calibrated."""
    lengths = profile.vector.norm(dim=1)
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
            **{name: by_layer[layer] for name, by_layer in _figures(profile).items()},
        }
        for layer in range(profile.model.num_layers)
    ]


def summary(profile: SteeringProfile) -> dict[str, Any]:
    """JSON data of the whole profile, without its tensors, histograms and embedding sketch."""
    model = {key: value for key, value in asdict(profile.model).items() if key != "embedding_sketch"}
    described = ("layers", "histograms")
    return {
        "model": model,
        "gate": asdict(profile.gate),
        "edit": profile.edit,
        "low": profile.low if math.isfinite(profile.low) else None,
        "high": profile.high if math.isfinite(profile.high) else None,
        "angle": profile.angle,
        "sensor": profile.sensor,
        "positions": profile.positions,
        "answer_tokens": profile.answer_tokens,
        "vector_kind": profile.vector_kind,
        "candidates": sorted(profile.candidates),
        "steered_layers": profile.steered_layers,
        "fitted": profile.fitted,
        "calibration": {key: value for key, value in profile.calibration.items() if key not in described},
        "tuned": profile.tuned,
        "warnings": worries(profile),
        "layers": layers(profile),
    }


def worries(profile: SteeringProfile) -> list[str]:
    """The warnings that calibration left in the profile."""
    return list(profile.calibration.get("warnings", ()))


def _figures(profile: SteeringProfile) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Pair of sets -> figures of each layer; empty where the profile is not calibrated."""
    found = profile.calibration.get("layers", {})
    return {name: found[name] for name in SETS if len(found.get(name, ())) == profile.model.num_layers}


def _also(candidates: Mapping[str, Any]) -> str:
    return f" (also {', '.join(sorted(candidates))})" if candidates else ""


def _set(described: Mapping[str, Any] | None) -> str:
    described = described or {}
    return f"{described.get('count', '?')} of {described.get('name') or 'an unnamed set'}"


def _fitted(fitted: Mapping[str, Any]) -> str:
    if not fitted:
        return "no record"
    sibling = f", aligned model {fitted['aligned_model']}" if fitted.get("aligned_model") else ""
    sets = f"harmful {_set(fitted.get('harmful'))}, harmless {_set(fitted.get('harmless'))}"
    return f"directions by {fitted.get('direction', '?')}{sibling}; {sets}"


def _learned(learned: Mapping[str, Any]) -> str:
    said = "a given refusal"
    if learned.get("aligned_model"):
        said = f"{learned.get('answers', '?')} answers by {learned['aligned_model']}"
    return f"layer {learned.get('layer', '?')}, {said}; harmful {_set(learned)}"


def _calibrated(calibration: Mapping[str, Any]) -> str:
    if not calibration:
        return "no"
    rate = calibration.get("max_false_positive_rate")
    how = "midpoint thresholds" if rate is None else f"at most {rate:.2%} false positives"
    if (abstains := calibration.get("abstain_rate")) is not None:
        how += f", {abstains:.2%} with the undecided"
    sets = (f"{name.replace('_', ' ')} {_set(data)}" for name, data in calibration.get("sets", {}).items())
    return f"{how}; {', '.join(sets)}"


def _tuned(tuned: Mapping[str, Any]) -> str:
    if not tuned:
        return "no"
    shares = {
        "refused": "refusal",
        "refused strictly": "refusal_strict",
        "fluent": "fluent",
        "harmless unchanged": "harmless_unchanged",
    }
    found = [f"{tuned[key]:.1%} {name}" for name, key in shares.items() if key in tuned]
    return ", ".join(found) + f"; {tuned.get('tried', '?')} settings tried"

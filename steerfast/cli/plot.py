"""The picture of `steerfast inspect --plot`: how well the gates separate, and their scores."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerfast._files import write_atomically
from steerfast.cli.rendering import SETS, edit, layer_ranges, layers, reading
from steerfast.errors import OutputError, SteerfastError

if TYPE_CHECKING:
    from steerfast.profile import SteeringProfile

_FORMATS = (".png", ".svg", ".pdf")
_SHOWN = 6  # layers with histograms
_SET_COLOURS = {"calibration": "#2b6cb0", "heldout": "#dd6b20"}
_CLASS_COLOURS = {"harmful": "#c53030", "harmless": "#2f855a"}


def save_plot(profile: SteeringProfile, path: str) -> None:
    """Draw `profile` into `path`; the file appears whole or not at all.

    Raises:
        OutputError: an ending other than .png, .svg or .pdf, or a file that cannot be written.
        SteerfastError: matplotlib is not installed.
    """
    ending = Path(path).suffix.lower()
    if ending not in _FORMATS:
        raise OutputError(f"--plot: expected a file that ends in {', '.join(_FORMATS)}, got {path!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SteerfastError(
            "--plot: expected matplotlib, it is not installed (pip install 'steerfast[plot]')"
        ) from None
    calibrated = "calibration" in layers(profile)[0]
    figure = Figure(figsize=(14, 7.5) if calibrated else (8, 4.5), layout="constrained")
    figure.suptitle(_title(profile), fontsize=13)
    if calibrated:
        panels: Any = figure.subfigures(1, 2, width_ratios=[1, 1.25], wspace=0.03)
        left, right = panels
        _draw_layers(left, profile)
        _draw_histograms(right, profile, _chosen(profile))
    else:
        _draw_edits(figure.subplots(), profile)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=ending[1:], dpi=130)
    write_atomically(path, drawn.getvalue())


def _title(profile: SteeringProfile) -> str:
    gate = "no gate" if profile.gate.kind == "always" else f"{profile.gate.kind} gate, {reading(profile.gate)}"
    name = profile.model.name if len(profile.model.name) <= 60 else "…" + profile.model.name[-59:]
    known = "" if "calibration" in profile.calibration.get("layers", {}) else ", not calibrated"
    return f"{name}: {gate}{known}; {profile.vector_kind} vector, layers {layer_ranges(profile.steered_layers)}"


def _chosen(profile: SteeringProfile) -> list[int]:
    """Up to `_SHOWN` layers that have histograms: those that decide, then others spread over the depth."""
    count = min([profile.model.num_layers, *(len(h) for h in _histograms(profile).values())], default=0)
    chosen = {layer for layer in _spread(profile.deciding_layers) if layer < count}
    for layer in _spread(range(count)) + list(range(count)):
        if len(chosen) < _SHOWN:
            chosen.add(layer)
    return sorted(chosen)


def _spread(values: Sequence[int]) -> list[int]:
    """At most `_SHOWN` of `values`, evenly, both ends included."""
    if len(values) <= _SHOWN:
        return list(values)
    return [values[round(i * (len(values) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]


def _histograms(profile: SteeringProfile) -> dict[str, Sequence[Mapping[str, Any]]]:
    found = profile.calibration.get("histograms", {})
    return {name: found[name] for name in SETS if name in found}


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_layers(figure: Any, profile: SteeringProfile) -> None:
    """AUC per layer with its 95 % band above, the size of the edit below."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    rows = layers(profile)
    numbers = [row["layer"] for row in rows]
    for name, label in SETS.items():
        if name not in rows[0]:
            continue
        value, low, high = zip(*(row[name]["auc"] for row in rows), strict=True)
        colour = _SET_COLOURS[name]
        above.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
        above.plot(numbers, value, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=f"{label} sets")
    deciding = [row for row in rows if row["sensor"] or row["gate"]]
    if deciding:
        what = "sensor" if profile.sensor != "own" else "deciding layers"
        for number, row in enumerate(deciding):
            named = what if number == 0 else None
            above.axvline(row["layer"], color="#1a202c", linewidth=1.2, linestyle="--", alpha=0.7, label=named)
    bottom = min(0.9, *(row[name]["auc"][1] for row in rows for name in SETS if name in row))
    above.set_ylim(max(0.0, bottom - 0.03), 1.01)
    if bottom < 0.53:
        above.axhline(0.5, color="#718096", linewidth=1, linestyle=":", label="chance")
    above.set_ylabel("AUC (band: 95 % interval)")
    above.set_title("How well each layer's gate separates", fontsize=11, loc="left")
    above.legend(loc="best", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")
    _clean(above)
    _draw_edits(below, profile)


def _draw_edits(axes: Any, profile: SteeringProfile) -> None:
    """What is added, strength · |v| of each layer, as a share of the mean row where that is known; of an edit that
    takes its size from the row, the strength.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = layers(profile)
    adds = profile.edit in ("add", "keep_norm")
    known = adds and all(row["residual_norm"] > 0 for row in rows)
    unit = "share of the row's norm" if known else "residual-stream units" if adds else "strength"
    sizes = [row["strength"] * (row["vector_norm"] if adds else 1.0) for row in rows]
    if known:
        sizes = [size / row["residual_norm"] for size, row in zip(sizes, rows, strict=True)]
    axes.bar([row["layer"] for row in rows], sizes, color="#6b46c1", width=0.8)
    axes.axhline(0, color="#4a5568", linewidth=0.8)
    axes.set_title(f"What an open gate {'adds' if adds else f'does: {edit(profile)}'}", fontsize=11, loc="left")
    axes.set_ylabel(unit)
    axes.set_xlabel("decoder layer")
    axes.set_xlim(-0.8, len(rows) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    if known:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _clean(axes)


def _draw_histograms(figure: Any, profile: SteeringProfile, chosen: Sequence[int]) -> None:
    """Scores of both classes at `chosen` layers: calibration sets filled, held-out sets outlined."""
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    sets = _histograms(profile)
    if not chosen:
        figure.text(0.5, 0.5, "no score histograms in this profile", ha="center", va="center", color="#718096")
        return
    columns = min(2, len(chosen))
    grid = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False)
    for axes, layer in zip(grid.flat, chosen, strict=False):
        for name, by_layer in sets.items():
            data = by_layer[layer]
            edges = np.linspace(data["low"], data["high"], len(data["harmful"]) + 1)
            if not data["high"] > data["low"]:  # every score alike: one bar needs a width
                edges = np.linspace(data["low"] - 0.5, data["high"] + 0.5, len(edges))
            for kind, colour in _CLASS_COLOURS.items():
                share = np.asarray(data[kind]) / max(1, sum(data[kind])) / (edges[1] - edges[0])
                if name == "calibration":
                    axes.stairs(share, edges, fill=True, color=colour, alpha=0.4, linewidth=0)
                else:
                    axes.stairs(share, edges, color=colour, linewidth=1.1)
        axes.axvline(float(profile.threshold[layer]), color="#1a202c", linewidth=1.2, linestyle="--")
        decides = layer == profile.sensor or layer in profile.gate_layers
        axes.set_title(
            f"layer {layer}" + (", decides" if decides else ""),
            fontsize=10,
            loc="left",
            fontweight="bold" if decides else "normal",
        )
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    figure.supxlabel(f"gate score ({reading(profile.gate)})", fontsize=10)
    handles: list[Any] = []
    for kind, colour in _CLASS_COLOURS.items():
        handles.append(Patch(color=colour, alpha=0.4, label=f"{kind}, calibration"))
        if "heldout" in sets:
            handles.append(Line2D([], [], color=colour, label=f"{kind}, held-out"))
    handles.append(Line2D([], [], color="#1a202c", linestyle="--", label="threshold"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9, frameon=False)

"""Draw the pictures of an evaluation's report, from its JSON data, and the picture of a profile, with matplotlib.

Pictures use the colours in `COLOURS` only. The SVG inside the report's page replaces them by the page's variables of
the same names, and so follows its light and dark style.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from steerfast._files import write_atomically
from steerfast.errors import OutputError, SteerfastError
from steerfast.evaluation.description import SETS, edit, gate_figures, layer_ranges, layers, reading
from steerfast.evaluation.systems import UNSTEERED
from steerfast.profile import EDITS, SteeringProfile

__all__ = ["COLOURS", "Picture", "draw", "known", "primary", "save_plot"]

COLOURS = {
    "ink": "#1b1f24",
    "muted": "#626b76",
    "grid": "#e4e7eb",
    "base": "#8b95a1",
    "other": "#b9c6d4",
    "main": "#1f5fa8",
    "harmful": "#c2452d",
    "harmless": "#2c8a7b",
    "orange": "#d08118",
    "violet": "#7a4fb0",
    "pink": "#b83b6b",
    "olive": "#6d7a22",
}
_LINES = [COLOURS[name] for name in ("main", "orange", "violet", "harmless", "pink", "olive")]
_STYLES = ["-", "--", ":", "-."]
_WIDTH = 5.6  # inches; text of 9 points is then about 12 pixels high in a half of the page
_LAYERS = 6  # with histograms
_KINDS = ("harmful", "harmless")
_FORMATS = (".png", ".svg", ".pdf")
_NAME = 26  # characters of a system's or a set's name
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a dollar
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Picture:
    """name: of its PNG. svg: an element for an HTML page. system: the gate's system, if it shows one gate."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str
    system: str | None = None


def known(value: Any) -> bool:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def primary(result: Mapping[str, Any]) -> str | None:
    """Return the system that the headlines show: the first with a gate, else the first other than unsteered."""
    systems = result.get("systems") or {}
    return next(
        (name for name in (*(result.get("gates") or {}), *systems) if name in systems and name != UNSTEERED), None
    )


def draw(result: Mapping[str, Any]) -> list[Picture]:
    """Draw every picture that the data allow, in the order of the report."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_SETTINGS):
        warnings.filterwarnings("ignore", message="Glyph")  # the font may lack a name's script
        return list(_pictures(result))


def _pictures(result: Mapping[str, Any]) -> Iterator[Picture]:
    for key, title in (("asr", "Attack success"), ("over_refusal", "Over-refusal")):
        if sets := _sets(result, key):
            caption = "Bars are shares of prompts, lines their 95 % intervals. Lower is better."
            yield _picture(key.replace("_", "-"), title, caption, partial(_bars, result=result, key=key, sets=sets))
    gates = {name: gate for name, gate in (result.get("gates") or {}).items() if gate.get("layers")}
    magnified = "The right half magnifies the low false-positive rates."
    curves = {f"{name}, layer {found[0]}": found[1] for name, gate in gates.items() if (found := _roc(gate))}
    if curves:
        caption = f"Each gate where it decides, all harmful prompts against all harmless ones. {magnified}"
        yield _picture("roc", "ROC of the gates", caption, partial(_rocs, curves=curves))
    points = result.get("frontier") or ()
    if points := [point for point in points if known(point.get("asr")) and known(point.get("fluent"))]:
        caption = "A point is a strength. Down is safer, right is more fluent: the best corner is at the bottom right."
        yield _picture(
            "frontier", "Strength against fluency", caption, partial(_frontier, points=points, order=[*gates])
        )
    systems = (result.get("systems") or {}).items()
    if timed := {
        name: data["latency"] for name, data in systems if known((data.get("latency") or {}).get("ms_per_token"))
    }:
        caption = "One sequence, greedy decoding. The ratio is to unsteered decoding, in alternating pairs."
        yield _picture("latency", "Time per token", caption, partial(_latency, timed=timed, main=primary(result)))
    for number, (name, gate) in enumerate(gates.items(), 1):
        suffix, of = (f"-{number}", f" of {_short(name, 40)}") if len(gates) > 1 else ("", "")
        if curves := {key: curve for key, curve in (gate.get("roc_by_set") or {}).items() if curve.get("fpr")}:
            caption = f"Each harmful set, and each attack in it, against all harmless prompts. {magnified}"
            yield _picture(f"sets{suffix}", f"ROC by set{of}", caption, partial(_rocs, curves=curves), name)
        if any(known(value) for layer in gate["layers"] for value in (layer.get("auc") or {}).values()):
            caption = "How well a gate at each layer tells each set from the harmless prompts; 0.5 is chance."
            caption += " Dashed: where it decides." if _deciding(gate) else ""
            yield _picture(f"layers{suffix}", f"AUC by layer{of}", caption, partial(_report_layers, gate=gate), name)
        if panels := _report_panels(gate):
            caption = "Share of prompts by score. The less the two overlap, the better the layer can decide."
            paint = partial(_report_scores, panels=panels)
            yield _picture(f"scores{suffix}", f"Gate scores by layer{of}", caption, paint, name)


def _picture(name: str, title: str, caption: str, paint: Callable[[Any], None], system: str | None = None) -> Picture:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    paint(figure)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=180, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out now
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    element = _inline(svg.getvalue().decode(), name, f"{title}. {caption}")
    return Picture(name, title, caption, png.getvalue(), element, system)


def _inline(svg: str, name: str, described: str) -> str:
    """Return the <svg> element with the page's font and colours, and ids that are unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    opening = f'<svg role="img" aria-label="{escape(described)}"'
    return re.sub(r'^<svg([^>]*?) width="[^"]*" height="[^"]*"', lambda found: opening + found[1], svg)


# -- the report's data ------------------------------------------------------------------------------


def _sets(result: Mapping[str, Any], key: str) -> list[str]:
    """Return the sets with a figure of some system, in the order of the evaluation."""
    systems = (result.get("systems") or {}).values()
    found = dict.fromkeys(name for data in systems for name, value in (data.get(key) or {}).items() if known(value))
    order = list(dict.fromkeys([*(result.get("sets") or {}), *found]))
    return sorted(found, key=order.index)


def _deciding(gate: Mapping[str, Any]) -> list[int]:
    decides = gate.get("decides")
    return [] if decides is None else [decides] if isinstance(decides, int) else list(decides)


def _roc(gate: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
    """Return layer and curve of the first deciding layer, or else of the layer with the best AUC."""
    curves = {layer["layer"]: layer for layer in gate["layers"] if (layer.get("roc") or {}).get("fpr")}
    if not curves:
        return None
    best = max(curves, key=lambda number: _mean((curves[number].get("auc") or {}).values()))
    number = next((number for number in _deciding(gate) if number in curves), best)
    return number, curves[number]["roc"]


def _report_panels(gate: Mapping[str, Any]) -> list[_ScorePanel]:
    found = {
        layer["layer"]: layer for layer in gate["layers"] if len((layer.get("histogram") or {}).get("edges", ())) > 1
    }
    panels = []
    for number in _chosen(_deciding(gate), list(found)):
        histogram, threshold = found[number]["histogram"], found[number].get("threshold")
        empty = [0] * (len(histogram["edges"]) - 1)
        counts = {kind: histogram.get(kind) or empty for kind in _KINDS}
        decides = number in _deciding(gate)
        shown = threshold if decides and known(threshold) else None
        panels.append(_ScorePanel(number, decides, shown, [_Histogram(histogram["edges"], counts)]))
    return panels


def _chosen(deciding: Iterable[int], available: Sequence[int]) -> list[int]:
    """Choose up to `_LAYERS` available layers: deciding layers first, then others spread over the depth."""
    chosen = set(_spread([number for number in deciding if number in available]))
    for number in [*_spread(available), *available]:
        if len(chosen) < _LAYERS:
            chosen.add(number)
    return sorted(chosen)


def _spread(values: Sequence[int]) -> list[int]:
    """Return at most `_LAYERS` of `values`, evenly, both ends included."""
    if len(values) <= _LAYERS:
        return list(values)
    return [values[round(i * (len(values) - 1) / (_LAYERS - 1))] for i in range(_LAYERS)]


def _mean(values: Iterable[Any]) -> float:
    numbers = [value for value in values if known(value)]
    return sum(numbers) / len(numbers) if numbers else 0.0


def _short(name: str, length: int = _NAME) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _colour(name: str, main: str | None) -> str:
    return COLOURS["main" if name == main else "base" if name == UNSTEERED else "other"]


def _line(number: int) -> dict[str, str]:
    return {"color": _LINES[number % len(_LINES)], "linestyle": _STYLES[number // len(_LINES) % len(_STYLES)]}


# -- drawing ---------------------------------------------------------------------------------------


def _bars(figure: Any, result: Mapping[str, Any], key: str, sets: Sequence[str]) -> None:
    """Draw a panel for each set, a bar for each system."""
    systems = result["systems"]
    columns = {1: 1, 2: 2, 4: 2}.get(len(sets), 3)
    rows = -(-len(sets) // columns)
    figure.set_size_inches(_WIDTH, rows * (0.5 + 0.2 * len(systems)) + 0.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for axes, name in zip(grid.flat, sets, strict=False):
        for y, (system, data) in enumerate(systems.items()):
            value: Any = (data.get(key) or {}).get(name)
            if not known(value):
                axes.text(1, y, "not measured", va="center", fontsize=7.5, color=COLOURS["muted"])
                continue
            low, high = ((data.get("intervals") or {}).get(key) or {}).get(name) or (value, value)
            axes.barh(y, 100 * value, height=0.66, color=_colour(system, primary(result)))
            axes.plot([100 * low, 100 * high], [y, y], color=COLOURS["ink"], linewidth=0.9)
            beside = {"xytext": (6, 0), "textcoords": "offset points"}  # far enough that the line is no minus
            axes.annotate(f"{100 * value:.1f}", (100 * high, y), **beside, va="center", fontsize=8)
        axes.set_title(_short(name))
    for axes in grid.flat[len(sets) :]:
        axes.set_axis_off()
    for axes in grid.flat:
        axes.set_yticks(range(len(systems)), [_short(system, 18) for system in systems])
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.set_ylim(len(systems) - 0.4, -0.6)
        axes.set_xlim(0, 112 + 10 * columns)
        axes.set_xticks(range(0, 101, 25 if columns == 1 else 50))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    for axes in grid[-1]:
        axes.set_xlabel("% of prompts")


def _rocs(figure: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    import numpy as np

    figure.set_size_inches(_WIDTH, 3.0 + 0.17 * ((len(curves) + 1) // 2))
    full, low = figure.subplots(1, 2, sharey=True)
    smallest = 0.1
    for number, (name, roc) in enumerate(curves.items()):
        fpr, tpr = np.asarray(roc["fpr"], dtype=float), np.asarray(roc["tpr"], dtype=float)
        smallest = min([smallest, *fpr[fpr > 0]])
        for axes, label in ((full, _short(name, 40)), (low, None)):
            axes.plot(fpr, tpr, drawstyle="steps-post", linewidth=1.6, label=label, **_line(number))
    full.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    full.set_ylabel("true positives")
    for axes in (full, low):
        axes.set_ylim(-0.01, 1.02)
        axes.set_xlabel("false positives")
        axes.grid()
    full.set_xlim(-0.01, 1.01)
    low.set_xscale("log")
    low.set_xlim(max(smallest / 1.5, 1e-4), 1)
    low.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low.minorticks_off()
    figure.legend(loc="outside lower center", ncols=min(2, len(curves)))


def _frontier(figure: Any, points: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    axes = figure.subplots()
    drawn = {point["system"] for point in points}
    names = [name for name in dict.fromkeys([*order, *(point["system"] for point in points)]) if name in drawn]
    for number, name in enumerate(names):
        path = sorted((p for p in points if p["system"] == name), key=lambda p: p.get("strength") or 0)
        style = _line(number)
        x, y = ([100 * p[key] for p in path] for key in ("fluent", "asr"))
        axes.plot(x, y, linewidth=1.3, marker="o", markersize=4, label=_short(name), **style)
        last, side = (-9.0, 0.0), {"xytext": (5, 3)} if number % 2 == 0 else {"xytext": (-5, -9), "ha": "right"}
        for point, across, up in zip(path, x, y, strict=True):
            if known(point.get("strength")) and math.dist(last, (across, up)) > 3:  # no label upon another
                text = f"{point['strength']:g}"
                axes.annotate(text, (across, up), textcoords="offset points", fontsize=8, **side)
                last = (across, up)
    low = min(100 * point["fluent"] for point in points)
    axes.set_xlim(max(0, min(low - 5, 80)), 101.5)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("fluent answers, %")
    axes.set_ylabel("attack success, %")
    axes.grid()
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(names)))


def _latency(figure: Any, timed: Mapping[str, Mapping[str, Any]], main: str | None) -> None:
    figure.set_size_inches(_WIDTH, 0.7 + 0.24 * len(timed))
    axes = figure.subplots()
    longest = max(latency["ms_per_token"] for latency in timed.values())
    for y, (name, latency) in enumerate(timed.items()):
        axes.barh(y, latency["ms_per_token"], height=0.66, color=_colour(name, main))
        ratio = f", ×{latency['ratio']:.3f}" if known(latency.get("ratio")) else ""
        axes.text(latency["ms_per_token"] + 0.01 * longest, y, f"{latency['ms_per_token']:.1f}{ratio}", va="center")
    axes.set_yticks(range(len(timed)), [_short(name, 18) for name in timed])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel("ms per token")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _report_layers(figure: Any, gate: Mapping[str, Any]) -> None:
    names = dict.fromkeys(name for layer in gate["layers"] for name in (layer.get("auc") or {}))
    points: Any = {
        name: [(layer["layer"], (layer.get("auc") or {}).get(name)) for layer in gate["layers"]] for name in names
    }
    curves = {_short(name): [(x, y, None, None) for x, y in found if known(y)] for name, found in points.items()}
    axes = figure.subplots()
    _draw_layers(figure, axes, curves, _deciding(gate))
    axes.set_xlabel("decoder layer")


def _report_scores(figure: Any, panels: Sequence[_ScorePanel]) -> None:
    columns = min(3, len(panels))
    figure.set_size_inches(_WIDTH, 0.7 + 1.35 * -(-len(panels) // columns))
    _draw_scores(figure, panels, columns, "gate score")


# -- gates, in reports and of profiles ---------------------------------------------------------------


@dataclass(frozen=True)
class _Histogram:
    """counts: kind -> counts between edges. filled: drawn as an area, else as a line."""

    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]
    filled: bool = True


@dataclass(frozen=True)
class _ScorePanel:
    layer: int
    decides: bool
    threshold: float | None
    histograms: Sequence[_Histogram]


_Points = Sequence[tuple[int, float, float | None, float | None]]
"""Layer, AUC and the ends of its interval, if known."""


def _draw_layers(figure: Any, axes: Any, curves: Mapping[str, _Points], deciding: Sequence[int]) -> None:
    """Draw AUC by layer, each curve with its interval; dashed: the deciding layers."""
    from matplotlib.ticker import MaxNLocator

    lowest = 1.0
    for number, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        x, y, low, high = zip(*points, strict=True)
        style = _line(number)
        axes.plot(x, y, linewidth=1.6, marker="o", markersize=2.6, label=name, **style)
        if None not in low:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        lowest = min(lowest, *y, *(end for end in low if end is not None))
    for layer in deciding:
        axes.axvline(layer, color=COLOURS["ink"], linewidth=1, linestyle="--")
    axes.set_ylim(max(0, min(lowest - 0.04, 0.88)), 1.01)
    if lowest < 0.55:
        axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    axes.set_ylabel("AUC")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=min(3, max(1, len(curves))))


def _draw_scores(figure: Any, panels: Sequence[_ScorePanel], columns: int, label: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for histogram in panel.histograms:
            _draw_histogram(axes, histogram, outlined=not histogram.filled or len(panel.histograms) == 1)
        if panel.threshold is not None:
            axes.axvline(panel.threshold, color=COLOURS["ink"], linewidth=1, linestyle="--")
        weight = "bold" if panel.decides else "normal"
        axes.set_title(f"layer {panel.layer}{', decides' if panel.decides else ''}", fontweight=weight)
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize=9, color=COLOURS["muted"])
    handles: list[Any] = [Patch(color=COLOURS[kind], alpha=0.5, label=kind) for kind in _KINDS]
    if any(not histogram.filled for panel in panels for histogram in panel.histograms):
        handles += [Line2D([], [], color=COLOURS[kind], label=f"{kind}, held-out") for kind in _KINDS]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


def _draw_histogram(axes: Any, histogram: _Histogram, outlined: bool) -> None:
    import numpy as np

    edges = np.asarray(histogram.edges, dtype=float)
    for kind in _KINDS:
        counts = np.asarray(histogram.counts[kind], dtype=float)
        density = counts / max(1.0, counts.sum()) / (edges[1] - edges[0])
        if histogram.filled:
            axes.stairs(density, edges, fill=True, color=COLOURS[kind], alpha=0.35)
        if outlined:
            axes.stairs(density, edges, color=COLOURS[kind], linewidth=1)


# -- a profile ---------------------------------------------------------------------------------------


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
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SteerfastError(
            "--plot: expected matplotlib, it is not installed (pip install 'steerfast[plot]')"
        ) from None
    drawn = io.BytesIO()
    with rc_context(_SETTINGS):
        calibrated = "calibration" in gate_figures(profile)
        figure: Any = Figure(figsize=(14, 7.5) if calibrated else (8, 4.5), layout="constrained")
        figure.suptitle(_profile_title(profile), fontsize=13)
        if calibrated:
            left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25], wspace=0.03)
            above, below = left.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
            rows = layers(profile)
            curves = {
                f"{SETS[name]} sets": [(row["layer"], *row[name]["auc"]) for row in rows]
                for name in SETS
                if name in rows[0]
            }
            _draw_layers(left, above, curves, [row["layer"] for row in rows if row["sensor"] or row["gate"]])
            above.set_title("How well each layer's gate separates, with 95 % intervals; dashed: deciding layers")
            _draw_edits(below, profile)
            if panels := _profile_panels(profile):
                _draw_scores(right, panels, min(2, len(panels)), f"gate score ({reading(profile.gate)})")
        else:
            _draw_edits(figure.subplots(), profile)
        figure.savefig(drawn, format=ending[1:], dpi=130)
    write_atomically(path, drawn.getvalue())


def _profile_title(profile: SteeringProfile) -> str:
    gate = "no gate" if profile.gate.kind == "always" else f"{profile.gate.kind} gate, {reading(profile.gate)}"
    name = profile.model.name if len(profile.model.name) <= 60 else "…" + profile.model.name[-59:]
    calibrated = "" if "calibration" in profile.calibration.get("layers", {}) else ", not calibrated"
    return f"{name}: {gate}{calibrated}; {profile.vector_kind} vector, layers {layer_ranges(profile.steered_layers)}"


def _profile_panels(profile: SteeringProfile) -> list[_ScorePanel]:
    import numpy as np

    found = profile.calibration.get("histograms", {})
    sets = {name: found[name] for name in SETS if name in found}
    count = min([profile.model.num_layers, *map(len, sets.values())]) if sets else 0
    panels = []
    for layer in _chosen(profile.deciding_layers, range(count)):
        histograms = []
        for name, by_layer in sets.items():
            data = by_layer[layer]
            margin = 0.0 if data["high"] > data["low"] else 0.5  # equal scores: one bar needs a width
            edges = np.linspace(data["low"] - margin, data["high"] + margin, len(data["harmful"]) + 1)
            histograms.append(_Histogram(edges.tolist(), data, filled=name == "calibration"))
        decides = layer == profile.sensor or layer in profile.gate_layers
        panels.append(_ScorePanel(layer, decides, float(profile.threshold[layer]), histograms))
    return panels


def _draw_edits(axes: Any, profile: SteeringProfile) -> None:
    """Draw the size of each layer's edit: strength · |v|, as a share of the mean row if that is known.

    An edit that takes its size from the row has its strength instead.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = layers(profile)
    adds = EDITS[profile.edit].adds
    relative = adds and all(row["residual_norm"] > 0 for row in rows)
    sizes = [row["strength"] * (row["vector_norm"] if adds else 1.0) for row in rows]
    if relative:
        sizes = [size / row["residual_norm"] for size, row in zip(sizes, rows, strict=True)]
    axes.bar([row["layer"] for row in rows], sizes, color=COLOURS["violet"], width=0.8)
    axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    axes.set_title(f"What an open gate {'adds' if adds else f'does: {edit(profile)}'}")
    axes.set_ylabel("share of the row's norm" if relative else "residual-stream units" if adds else "strength")
    axes.set_xlabel("decoder layer")
    axes.set_xlim(-0.8, len(rows) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.grid(axis="y")
    if relative:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))

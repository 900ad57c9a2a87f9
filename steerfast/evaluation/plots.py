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
from steerfast.evaluation.description import edit, gate_figures, layer_ranges, layers, reading
from steerfast.evaluation.systems import UNSTEERED
from steerfast.profile import EDITS, SteeringProfile

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


def at(data: Any, *names: str) -> Any:
    """Return the value under nested names, None if one is missing."""
    for name in names:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


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
        return [*_comparisons(result), *_gate_pictures(result)]


def _comparisons(result: Mapping[str, Any]) -> Iterator[Picture]:
    """Draw the pictures that show several systems."""
    systems, gates, main = result.get("systems") or {}, _drawn_gates(result), primary(result)
    for key, title in (("asr", "Attack success"), ("over_refusal", "Over-refusal")):
        names = dict.fromkeys(
            [*(result.get("sets") or {}), *(name for one in systems.values() for name in one.get(key) or {})]
        )
        panels = {name: {system: _share(data, key, name) for system, data in systems.items()} for name in names}
        if panels := {name: bars for name, bars in panels.items() if any(bars.values())}:
            caption = "Bars are shares of prompts, lines their 95 % intervals. Lower is better."
            paint = partial(_bars, panels=panels, main=main, label="% of prompts", full=100.0)
            yield _picture(key.replace("_", "-"), title, caption, paint)
    rocs = {}
    for name, gate in gates.items():
        curves = {layer["layer"]: layer["roc"] for layer in gate["layers"] if at(layer, "roc", "fpr")}
        if chosen := [number for number in (*_deciding(gate), *curves) if number in curves]:
            rocs[f"{name}, layer {chosen[0]}"] = curves[chosen[0]]
    if rocs:
        caption = "Each gate where it decides, harmful sets against harmless ones, each set with the same weight."
        caption += f" {_MAGNIFIED}"
        yield _picture("roc", "ROC of the gates", caption, partial(_rocs, curves=rocs))
    points = [one for one in result.get("frontier") or () if known(one.get("asr")) and known(one.get("fluent"))]
    if points:
        caption = "A point is a strength. Down is safer, right is more fluent: the best corner is at the bottom right."
        yield _picture("frontier", "Strength against fluency", caption, partial(_frontier, points=points))
    times = {name: _time(data.get("latency")) for name, data in systems.items()}
    if times := {name: bar for name, bar in times.items() if bar}:
        caption = "One sequence, greedy decoding. The ratio is to unsteered decoding, in alternating pairs."
        full = max(bar[0] for bar in times.values() if bar)
        paint = partial(_bars, panels={"": times}, main=main, label="ms per token", full=full)
        yield _picture("latency", "Time per token", caption, paint)


_MAGNIFIED = "The right half magnifies the low false-positive rates."
_Bar = tuple[float, float, float, str]
"""Length, the ends of its interval, the text beside it."""


def _share(data: Mapping[str, Any], key: str, name: str) -> _Bar | None:
    value = at(data, key, name)
    if not known(value):
        return None
    low, high = at(data, "intervals", key, name) or (value, value)
    return 100 * value, 100 * low, 100 * high, f"{100 * value:.1f}"


def _time(latency: Any) -> _Bar | None:
    value, ratio = at(latency, "ms_per_token"), at(latency, "ratio")
    return (value, value, value, f"{value:.1f}" + (f", ×{ratio:.3f}" if known(ratio) else "")) if known(value) else None


def _drawn_gates(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: gate for name, gate in (result.get("gates") or {}).items() if gate.get("layers")}


def _gate_pictures(result: Mapping[str, Any]) -> Iterator[Picture]:
    """Draw the pictures that show one gate."""
    gates = _drawn_gates(result)
    for number, (name, gate) in enumerate(gates.items(), 1):
        suffix, of = (f"-{number}", f" of {_short(name, 40)}") if len(gates) > 1 else ("", "")
        if rocs := {key: curve for key, curve in (gate.get("roc_by_set") or {}).items() if curve.get("fpr")}:
            caption = "Each harmful set, and each attack in it, against the harmless sets, each with the same weight."
            caption += f" {_MAGNIFIED}"
            yield _picture(f"sets{suffix}", f"ROC by set{of}", caption, partial(_rocs, curves=rocs), name)
        curves: dict[str, list[_Point]] = {}
        for layer in gate["layers"]:
            for key, value in (layer.get("auc") or {}).items():
                if known(value):
                    curves.setdefault(_short(key), []).append((layer["layer"], value, None, None))
        if curves:
            caption = "How well a gate at each layer tells each set from the harmless prompts; 0.5 is chance."
            caption += " Dashed: where it decides." if _deciding(gate) else ""
            paint: Callable[[Any], None] = partial(_draw_layers, curves=curves, deciding=_deciding(gate))
            yield _picture(f"layers{suffix}", f"AUC by layer{of}", caption, paint, name)
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


def _deciding(gate: Mapping[str, Any]) -> list[int]:
    decides = gate.get("decides")
    return [] if decides is None else [decides] if isinstance(decides, int) else list(decides)


def _report_panels(gate: Mapping[str, Any]) -> list[_ScorePanel]:
    found = {layer["layer"]: layer for layer in gate["layers"] if len(at(layer, "histogram", "edges") or ()) > 1}
    panels = []
    for number in _chosen(_deciding(gate), list(found)):
        histogram, threshold = found[number]["histogram"], found[number].get("threshold")
        counts = {kind: histogram.get(kind) or [0] * (len(histogram["edges"]) - 1) for kind in _KINDS}
        decides = number in _deciding(gate)
        shown = threshold if decides and known(threshold) else None
        panels.append(_ScorePanel(number, decides, shown, histogram["edges"], counts))
    return panels


def _chosen(deciding: Iterable[int], available: Sequence[int]) -> list[int]:
    """Choose up to `_LAYERS` available layers: deciding layers first, then others spread over the depth."""
    chosen = [number for number in deciding if number in available]
    places = [round(i * (len(available) - 1) / (_LAYERS - 1)) for i in range(_LAYERS)]
    spread = [*(available[place] for place in places if available), *available]
    return sorted([*dict.fromkeys([*chosen[:: -(-len(chosen) // _LAYERS) or 1], *spread])][:_LAYERS])


def _short(name: str, length: int = 26) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _line(number: int) -> dict[str, str]:
    return {"color": _LINES[number % len(_LINES)], "linestyle": _STYLES[number // len(_LINES) % len(_STYLES)]}


# -- drawing ---------------------------------------------------------------------------------------


def _bars(
    figure: Any, panels: Mapping[str, Mapping[str, _Bar | None]], main: str | None, label: str, full: float
) -> None:
    """Draw panels of a bar for each system."""
    systems = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure.set_size_inches(_WIDTH, rows * (0.5 + 0.2 * len(systems)) + 0.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for axes, (title, bars) in zip(grid.flat, panels.items(), strict=False):
        for y, (system, bar) in enumerate(bars.items()):
            if bar is None:
                axes.text(0.01 * full, y, "not measured", va="center", fontsize=7.5, color=COLOURS["muted"])
                continue
            value, low, high, text = bar
            colour = "main" if system == main else "base" if system == UNSTEERED else "other"
            axes.barh(y, value, height=0.66, color=COLOURS[colour])
            axes.plot([low, high], [y, y], color=COLOURS["ink"], linewidth=0.9)
            beside = {"xytext": (6, 0), "textcoords": "offset points"}  # far enough that the line is no minus
            axes.annotate(text, (high, y), **beside, va="center", fontsize=8)
        axes.set_title(_short(title))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat:
        axes.set_yticks(range(len(systems)), [_short(system, 18) for system in systems])
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.set_ylim(len(systems) - 0.4, -0.6)
        axes.set_xlim(0, full * (1.12 + 0.1 * columns))
        axes.locator_params(axis="x", nbins=5 if columns == 1 else 3)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    for axes in grid[-1]:
        axes.set_xlabel(label)


def _rocs(figure: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    figure.set_size_inches(_WIDTH, 3.0 + 0.17 * ((len(curves) + 1) // 2))
    full, low = figure.subplots(1, 2, sharey=True)
    for number, (name, roc) in enumerate(curves.items()):
        for axes, label in ((full, _short(name, 40)), (low, None)):
            axes.plot(roc["fpr"], roc["tpr"], drawstyle="steps-post", linewidth=1.6, label=label, **_line(number))
    full.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    full.set_ylabel("true positives")
    for axes in (full, low):
        axes.set_ylim(-0.01, 1.02)
        axes.set_xlabel("false positives")
        axes.grid()
    full.set_xlim(-0.01, 1.01)
    smallest = min([0.1, *(rate for roc in curves.values() for rate in roc["fpr"] if rate > 0)])
    low.set_xscale("log")
    low.set_xlim(max(smallest / 1.5, 1e-4), 1)
    low.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low.minorticks_off()
    figure.legend(loc="outside lower center", ncols=min(2, len(curves)))


def _frontier(figure: Any, points: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    names = list(dict.fromkeys(point["system"] for point in points))
    for number, name in enumerate(names):
        path = sorted((p for p in points if p["system"] == name), key=lambda p: p.get("strength") or 0)
        x, y = ([100 * p[key] for p in path] for key in ("fluent", "asr"))
        axes.plot(x, y, linewidth=1.3, marker="o", markersize=4, label=_short(name), **_line(number))
        last = (-9.0, 0.0)
        for point, across, up in zip(path, x, y, strict=True):
            if known(point.get("strength")) and math.dist(last, (across, up)) > 3:  # no label upon another
                last, text = (across, up), f"{point['strength']:g}"
                axes.annotate(text, last, textcoords="offset points", xytext=(5, 3), fontsize=8)
    axes.set_xlim(max(0, min(100 * min(point["fluent"] for point in points) - 5, 80)), 101.5)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("fluent answers, %")
    axes.set_ylabel("attack success, %")
    axes.grid()
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(names)))


def _report_scores(figure: Any, panels: Sequence[_ScorePanel]) -> None:
    columns = min(3, len(panels))
    figure.set_size_inches(_WIDTH, 0.7 + 1.35 * -(-len(panels) // columns))
    _draw_scores(figure, panels, columns, "gate score")


# -- gates, in reports and of profiles ---------------------------------------------------------------


@dataclass(frozen=True)
class _ScorePanel:
    """counts: kind -> scores between each two edges."""

    layer: int
    decides: bool
    threshold: float | None
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]


_Point = tuple[int, float, float | None, float | None]
"""Layer, AUC and the ends of its interval, if known."""


def _draw_layers(
    figure: Any, curves: Mapping[str, Sequence[_Point]], deciding: Sequence[int], axes: Any = None
) -> None:
    """Draw AUC by layer, each curve with its interval; dashed: the deciding layers."""
    lowest = 1.0
    if axes is None:
        axes = figure.subplots()
        axes.set_xlabel("decoder layer")
    for number, (name, points) in enumerate(curves.items()):
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
    axes.locator_params(axis="x", integer=True, nbins=12)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=min(3, max(1, len(curves))))


def _draw_scores(figure: Any, panels: Sequence[_ScorePanel], columns: int, label: str) -> None:
    from matplotlib.patches import Patch

    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for kind in _KINDS:
            share = 1 / max(1, sum(panel.counts[kind])) / (panel.edges[1] - panel.edges[0])
            density = [count * share for count in panel.counts[kind]]
            axes.stairs(density, panel.edges, fill=True, color=COLOURS[kind], alpha=0.35)
            axes.stairs(density, panel.edges, color=COLOURS[kind], linewidth=1)
        if panel.threshold is not None:
            axes.axvline(panel.threshold, color=COLOURS["ink"], linewidth=1, linestyle="--")
        weight = "bold" if panel.decides else "normal"
        axes.set_title(f"layer {panel.layer}{', decides' if panel.decides else ''}", fontweight=weight)
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize=9, color=COLOURS["muted"])
    handles = [Patch(color=COLOURS[kind], alpha=0.5, label=kind) for kind in _KINDS]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


# -- a profile ---------------------------------------------------------------------------------------


def check_plot(path: str) -> None:
    """Refuse, before any work, a file that `save_plot` cannot draw into.

    Raises:
        OutputError: an ending other than .png, .svg or .pdf.
        SteerfastError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _FORMATS:
        raise OutputError(f"--plot: expected a file that ends in {', '.join(_FORMATS)}, got {path!r}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise SteerfastError(
            "--plot: expected matplotlib, it is not installed (pip install 'steerfast[plot]')"
        ) from None


def save_plot(profile: SteeringProfile, path: str) -> None:
    """Draw `profile` into `path`; the file appears whole or not at all.

    Raises:
        OutputError, SteerfastError: as `check_plot`; a file that cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = io.BytesIO()
    with rc_context(_SETTINGS):
        calibrated = bool(gate_figures(profile))
        figure: Any = Figure(
            figsize=(14, 7.5) if calibrated else (12, 4.5) if "frontier" in profile.fitted else (8, 4.5),
            layout="constrained",
        )
        figure.suptitle(_profile_title(profile), fontsize=13)
        if calibrated:
            _draw_gates(figure, profile)
        elif found := profile.fitted.get("frontier"):
            left, right = figure.subplots(1, 2)
            _draw_frontier(left, found)
            _draw_edits(right, profile)
        else:
            _draw_edits(figure.subplots(), profile)
        figure.savefig(drawn, format=Path(path).suffix.lower()[1:], dpi=130)
    write_atomically(path, drawn.getvalue())


def _draw_frontier(axes: Any, frontier: Mapping[str, Any]) -> None:
    """Draw shift and perplexity of a behaviour over its strength; the recommended range is shaded."""
    points = frontier["points"]
    strengths = [point["strength"] for point in points]
    axes.plot(strengths, [point["shift"] for point in points], color=COLOURS["main"], marker="o")
    axes.set_ylabel("shift of the answers", color=COLOURS["main"])
    beside = axes.twinx()
    beside.plot(strengths, [point["perplexity"] for point in points], color=COLOURS["orange"], marker="s")
    beside.set_ylabel("perplexity, unsteered model", color=COLOURS["orange"])
    if frontier["range"] is not None:
        axes.axvspan(*frontier["range"], color=COLOURS["muted"], alpha=0.15)
    axes.set_xlabel("strength, in total")
    axes.set_title("What each strength gains and costs; shaded: recommended")


def _draw_gates(figure: Any, profile: SteeringProfile) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25], wspace=0.03)
    above, below = left.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    rows = layers(profile)
    curves = {"calibration sets": [(row["layer"], *row["calibration"]["auc"]) for row in rows]}
    _draw_layers(left, curves, [row["layer"] for row in rows if row["sensor"] or row["gate"]], above)
    above.set_title("How well each layer's gate separates, with 95 % intervals; dashed: deciding layers")
    _draw_edits(below, profile)
    if panels := _profile_panels(profile):
        _draw_scores(right, panels, min(2, len(panels)), f"gate score ({reading(profile.gate)})")


def _profile_title(profile: SteeringProfile) -> str:
    gate = "no gate" if profile.gate.kind == "always" else f"{profile.gate.kind} gate, {reading(profile.gate)}"
    done = profile.gate.kind == "always" or "calibration" in profile.calibration.get("layers", {})
    calibrated = "" if done else ", not calibrated"
    vector = f"{profile.vector_kind} vector, layers {layer_ranges(profile.steered_layers)}"
    return f"{_short(profile.model.name, 60)}: {gate}{calibrated}; {vector}"


def _profile_panels(profile: SteeringProfile) -> list[_ScorePanel]:
    import numpy as np

    found = profile.calibration.get("histograms", {}).get("calibration", ())
    panels = []
    for layer in _chosen(profile.deciding_layers, range(min(profile.model.num_layers, len(found)))):
        data = found[layer]
        margin = 0.0 if data["high"] > data["low"] else 0.5  # equal scores: one bar needs a width
        edges = np.linspace(data["low"] - margin, data["high"] + margin, len(data["harmful"]) + 1).tolist()
        decides = layer == profile.sensor or layer in profile.gate_layers
        panels.append(_ScorePanel(layer, decides, float(profile.threshold[layer]), edges, data))
    return panels


def _draw_edits(axes: Any, profile: SteeringProfile) -> None:
    """Draw the size of each layer's edit: strength · |v|, as a share of the mean row if that is known.

    An edit that takes its size from the row has its strength instead.
    """
    rows = layers(profile)
    adds = EDITS[profile.edit].adds
    relative = adds and all(row["residual_norm"] > 0 for row in rows)
    sizes = [row["strength"] * (row["vector_norm"] if adds else 1.0) for row in rows]
    if relative:
        sizes = [size / row["residual_norm"] for size, row in zip(sizes, rows, strict=True)]
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.bar([row["layer"] for row in rows], sizes, color=COLOURS["violet"], width=0.8)
    axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    actor = "the profile" if profile.gate.kind == "always" else "an open gate"
    axes.set_title(f"What {actor} {'adds' if adds else f'does: {edit(profile)}'}")
    axes.set_ylabel("share of the row's norm" if relative else "residual-stream units" if adds else "strength")
    axes.set_xlabel("decoder layer")
    axes.set_xlim(-0.8, len(rows) - 0.2)
    axes.locator_params(axis="x", integer=True, nbins=12)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y")

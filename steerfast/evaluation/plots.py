"""The pictures of an evaluation's report, drawn by matplotlib from its JSON data.

Every colour of a picture is one of `COLOURS`: a PNG has them as they are, the SVG inside the page has the page's
variables of the same names instead, and so follows its light and dark style.
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
from typing import Any

from steerfast.evaluation.systems import UNSTEERED

__all__ = ["COLOURS", "Picture", "draw", "known", "primary"]


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
    """name: of its PNG. caption: how to read it. svg: an element for an HTML page. system: whose gate it shows."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str
    system: str | None = None


def known(value: Any) -> bool:
    """Whether there is a figure: a finite number, no None."""
    return isinstance(value, int | float) and math.isfinite(value)


def primary(result: Mapping[str, Any]) -> str | None:
    """The system that the report is about: the first one with a gate, else the first that is not unsteered."""
    systems = result.get("systems") or {}
    return next(
        (name for name in (*(result.get("gates") or {}), *systems) if name in systems and name != UNSTEERED), None
    )


def draw(result: Mapping[str, Any]) -> list[Picture]:
    """Every picture that the data allow, in the order of the report."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_SETTINGS):
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font has not
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
            yield _picture(f"layers{suffix}", f"AUC by layer{of}", caption, partial(_layers, gate=gate), name)
        if layers := _with_histograms(gate):
            caption = "Share of prompts by score. The less the two overlap, the better the layer can decide."
            paint = partial(_histograms, gate=gate, layers=layers)
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
    """The <svg> element with the page's font and colours, and ids that no other picture has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    opening = f'<svg role="img" aria-label="{escape(described)}"'
    return re.sub(r'^<svg([^>]*?) width="[^"]*" height="[^"]*"', lambda found: opening + found[1], svg)


# -- what there is to draw -------------------------------------------------------------------------


def _sets(result: Mapping[str, Any], key: str) -> list[str]:
    """Sets of which some system has a figure, in the order of the evaluation."""
    systems = (result.get("systems") or {}).values()
    found = dict.fromkeys(name for data in systems for name, value in (data.get(key) or {}).items() if known(value))
    order = list(dict.fromkeys([*(result.get("sets") or {}), *found]))
    return sorted(found, key=order.index)


def _deciding(gate: Mapping[str, Any]) -> list[int]:
    decides = gate.get("decides")
    return [] if decides is None else [decides] if isinstance(decides, int) else list(decides)


def _roc(gate: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
    """Layer and curve: of the first layer that decides, or else of the one that separates best."""
    curves = {layer["layer"]: layer for layer in gate["layers"] if (layer.get("roc") or {}).get("fpr")}
    if not curves:
        return None
    best = max(curves, key=lambda number: _mean((curves[number].get("auc") or {}).values()))
    number = next((number for number in _deciding(gate) if number in curves), best)
    return number, curves[number]["roc"]


def _with_histograms(gate: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Up to `_LAYERS` layers with scores: those that decide, then others spread over the depth."""
    found = {
        layer["layer"]: layer for layer in gate["layers"] if len((layer.get("histogram") or {}).get("edges", ())) > 1
    }
    chosen = set([number for number in _deciding(gate) if number in found][:_LAYERS])
    spread = [list(found)[round(i * (len(found) - 1) / (_LAYERS - 1))] for i in range(_LAYERS)] if found else []
    for number in [*spread, *found]:
        if len(chosen) < _LAYERS:
            chosen.add(number)
    return [found[number] for number in sorted(chosen)]


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
    """A panel for each set, a bar for each system."""
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


def _layers(figure: Any, gate: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    layers = gate["layers"]
    sets = list(dict.fromkeys(name for layer in layers for name in (layer.get("auc") or {})))
    lowest = 1.0
    for number, name in enumerate(sets):
        found = [(layer["layer"], layer["auc"][name]) for layer in layers if known((layer.get("auc") or {}).get(name))]
        if not found:
            continue
        x, y = zip(*found, strict=True)
        lowest = min(lowest, *y)
        axes.plot(x, y, linewidth=1.6, marker="o", markersize=2.6, label=_short(name), **_line(number))
    for layer in _deciding(gate):
        axes.axvline(layer, color=COLOURS["ink"], linewidth=1, linestyle="--")
    axes.set_ylim(max(0, min(lowest - 0.04, 0.88)), 1.01)
    if lowest < 0.55:
        axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("AUC")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=min(3, max(1, len(sets))))


def _histograms(figure: Any, gate: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
    import numpy as np
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure.set_size_inches(_WIDTH, 0.7 + 1.35 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        histogram = layer["histogram"]
        edges = np.asarray(histogram["edges"], dtype=float)
        for kind in ("harmful", "harmless"):
            counts = np.asarray(histogram.get(kind) or [0] * (len(edges) - 1), dtype=float)
            share = counts / max(1.0, counts.sum())
            axes.stairs(share, edges, fill=True, color=COLOURS[kind], alpha=0.35)
            axes.stairs(share, edges, color=COLOURS[kind], linewidth=1)
        decides = layer["layer"] in _deciding(gate)
        if decides and known(layer.get("threshold")):
            axes.axvline(layer["threshold"], color=COLOURS["ink"], linewidth=1, linestyle="--")
        weight = "bold" if decides else "normal"
        axes.set_title(f"layer {layer['layer']}{', decides' if decides else ''}", fontweight=weight)
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    figure.supxlabel("gate score", fontsize=9, color=COLOURS["muted"])
    handles = [Patch(color=COLOURS[kind], alpha=0.5, label=kind) for kind in ("harmful", "harmless")]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)

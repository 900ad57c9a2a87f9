"""Draw the README's charts from landed results.

python benchmarks/chart.py     writes docs/token-time.svg and docs/fires.svg
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RED, GREY = "#c0392b", "#7f8c8d"

# label, file, model, mode, prompt; each at batch 1
CASES = (
    ("Llama-3.1-8B, H200, CUDA graphs", "models-compiled-h200.jsonl", "llama-3.1-8b", "compile", 128),
    ("Llama-3.1-8B, H200, eager", "models-h200.jsonl", "llama-3.1-8b", "eager", 128),
    ("Llama-2-7B, H200, eager", "models-h200.jsonl", "llama-2-7b", "eager", 128),
    ("Qwen2.5-7B, H200, eager", "models-h200.jsonl", "qwen2.5-7b", "eager", 128),
    ("SmolLM2-135M, one CPU core, eager", "models-few-cpu.jsonl", "SmolLM2-135M", "eager", 128),
)
LABELS = ("harmful", "borderline", "harmless")


@dataclass(frozen=True)
class Bar:
    """text: beside it. interval: drawn as a line from its lower to its upper end."""

    value: float
    color: str
    text: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """groups: bars under a name. legend: names and colours. unit: pixels of a value of 1. mark: where a line stands."""

    title: str
    legend: Sequence[tuple[str, str]]
    groups: Sequence[tuple[str, Sequence[Bar]]]
    unit: float
    mark: float

    def svg(self) -> str:
        """Return the chart as an SVG file."""
        left, top, thick = 290, 56, 14  # pixels: where bars begin, where groups do, the height of a bar
        parts = [f'<text x="10" y="20" font-weight="bold">{self.title}</text>']
        for at, (name, color) in enumerate(self.legend):
            x = left + 220 * at
            parts.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{color}"/>')
            parts.append(f'<text x="{x + 18}" y="41">{name}</text>')
        for label, bars in self.groups:
            parts.append(f'<text x="10" y="{top + 8 * len(bars) + 4}">{label}</text>')
            for bar in bars:
                wide, middle = bar.value * self.unit, top + thick // 2
                end = left + wide
                parts.append(f'<rect x="{left}" y="{top}" width="{wide:.0f}" height="{thick}" fill="{bar.color}"/>')
                if bar.interval is not None:
                    low, high = (left + limit * self.unit for limit in bar.interval)
                    parts.append(f'<path d="M{low:.0f} {middle}H{high:.0f}" stroke="black"/>')
                    end = high
                parts.append(f'<text x="{end + 6:.0f}" y="{top + 12}">{bar.text}</text>')
                top += thick + 2
            top += 14
        x = left + self.mark * self.unit
        parts.append(f'<path d="M{x:.0f} 50V{top}" stroke="black" stroke-dasharray="4 3"/>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{top + 8}" font-family="sans-serif" '
            'font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
        )


def ratio(file: str, model: str, mode: str, prompt: int, system: str) -> float | None:
    """Return the time per output token over stock's; None if the file has no such line."""
    for text in (RESULTS / file).read_text("utf-8").splitlines():
        line = json.loads(text)
        case = (line.get("system"), line.get("mode"), line.get("batch"), line.get("prompt"))
        if model in line["model"] and case == (system, mode, 1, prompt):
            return float(line["ratio_to_stock"])
    return None


def token_time() -> Chart:
    """Return the chart of a steered token's time over an unsteered one's, from lines of models.py."""
    systems = (("open-all", RED), ("plain-hook", GREY))
    groups = []
    for label, *case in CASES:
        found = [(ratio(*case, system), color) for system, color in systems]
        groups.append((label, [Bar(value, color, f"{value:.3f}") for value, color in found if value is not None]))
    legend = (("steerfast, all layers steered", RED), ("a plain hook", GREY))
    return Chart("Time per token, × the unsteered stock model (shorter is faster)", legend, groups, 380, 1)


def fires() -> Chart:
    """Return the chart of the shipped gate's fire rates by source, from the JSON of `steerfast validate`."""
    found = json.loads((RESULTS / "validate-smollm2-cpu.json").read_text("utf-8"))
    systems = (("gate", RED), ("words", GREY))
    rates = {
        (row["label"], row["source"], row["n"], system): row["rate"]
        for system, _ in systems
        for row in found["systems"][system]["validation"]["rows"]
    }
    groups = []
    for label, source, count in sorted({key[:3] for key in rates}, key=lambda key: (LABELS.index(key[0]), key[1])):
        bars = []
        for system, color in systems:
            value, low, high = rates[label, source, count, system]
            bars.append(Bar(value, color, f"{100 * value:.0f}", (low, high)))
        groups.append((f"{label}: {source.replace('_', ' ')} ({count})", bars))
    legend = (("the shipped gate", RED), ("a classifier of words", GREY))
    most = found["max_false_positive_rate"]
    title = f"Prompts that fire, % (in brackets: prompts; dashed: {100 * most:.0f} %, the rate it is set for)"
    return Chart(title, legend, groups, 420, most)


CHARTS = {"token-time.svg": token_time, "fires.svg": fires}

if __name__ == "__main__":
    for name, chart in CHARTS.items():
        (ROOT / "docs" / name).write_text(chart().svg(), "utf-8")
        print(f"docs/{name}")

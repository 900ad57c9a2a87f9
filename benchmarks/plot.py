"""Draw the fused op's times against the number of rows, a panel per hidden size and cache state.

    python benchmarks/plot.py benchmarks/results/ops-cpu.jsonl      writes ops-cpu.png beside it

The shaded band is the 20th to 80th percentile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STYLE: dict[str, dict[str, Any]] = {
    "steerfast": {"color": "tab:red", "linewidth": 2.5, "zorder": 5},
    "steerfast-unsteered": {"color": "tab:red", "linestyle": "--", "zorder": 4},
    "norm": {"color": "tab:blue", "linestyle": "--"},
    "norm+add": {"color": "tab:blue"},
    "separate": {"color": "tab:orange"},
    "torch": {"color": "tab:green"},
    "torch.compile": {"color": "tab:purple"},
    "empty": {"color": "0.5", "linestyle": ":"},
    "copy": {"color": "0.5"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw microseconds against rows from the lines of ops.py.")
    parser.add_argument("file", type=Path, help="the .jsonl of ops.py")
    parser.add_argument("--op", default="add_steer_rms_norm")
    parser.add_argument("--output", type=Path, help="default: the file with .png")
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["op"] == given.op and "us" in line]
    lines = [line for line in lines if line["active"] == 1 and line["profiles"] == 1]
    if not lines:
        raise SystemExit(f"{given.file}: expected lines of {given.op} with all rows active and one profile, found none")
    draw(lines, given.output or given.file.with_suffix(".png"))


def draw(lines: list[dict[str, Any]], output: Path) -> None:
    """One panel per hidden size (columns) and cache state (rows), logarithmic on both axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hidden_sizes = sorted({line["hidden"] for line in lines})
    caches = sorted({line["cache"] for line in lines}, reverse=True)
    figure, panels = pyplot.subplots(
        len(caches), len(hidden_sizes), figsize=(5 * len(hidden_sizes), 4.2 * len(caches)), sharey=True, squeeze=False
    )
    for across, cache in zip(panels, caches, strict=True):
        for panel, hidden in zip(across, hidden_sizes, strict=True):
            for provider, style in STYLE.items():
                points = [
                    line
                    for line in lines
                    if (line["provider"], line["hidden"], line["cache"]) == (provider, hidden, cache)
                ]
                points.sort(key=lambda line: line["rows"])
                if points:
                    rows = [line["rows"] for line in points]
                    panel.plot(rows, [line["us"] for line in points], label=provider, **style)
                    low, high = [line["p20_us"] for line in points], [line["p80_us"] for line in points]
                    panel.fill_between(rows, low, high, color=style["color"], alpha=0.1, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(f"hidden size {hidden}, {cache} cache")
            panel.grid(alpha=0.3)
        across[0].set_ylabel("µs per call")
    for panel in panels[-1]:
        panel.set_xlabel("rows")
    panels[0][0].legend(fontsize=8)
    first = lines[0]
    figure.suptitle(f"{first['op']}, {first['dtype']} · {first['device']} · torch {first['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    main()

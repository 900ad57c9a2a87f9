"""Draw the lines of ops.py or of models.py.

    python benchmarks/plot.py benchmarks/results/ops-cpu.jsonl      writes ops-cpu.png beside it
    python benchmarks/plot.py benchmarks/results/models-cpu.jsonl   writes models-cpu.png

Of ops.py the fused op's times against the number of rows, a panel per hidden size and cache state; the shaded band is
the 20th to 80th percentile. Of models.py the ratios to the stock model, a panel per model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SYSTEMS: dict[str, dict[str, Any]] = {
    "control": {"color": "0.5", "marker": "_", "markersize": 12},
    "idle": {"color": "tab:red", "marker": "o", "fillstyle": "none"},
    "shut": {"color": "tab:red", "marker": "s", "fillstyle": "none"},
    "open-one": {"color": "tab:red", "marker": "o"},
    "open-all": {"color": "tab:red", "marker": "s"},
    "profiles": {"color": "tab:red", "marker": "*", "markersize": 9},
    "hooks": {"color": "tab:orange", "marker": "o"},
    "plain-hook": {"color": "tab:blue", "marker": "x"},
    "repeng": {"color": "tab:green", "marker": "x"},
    "steering-vectors": {"color": "tab:purple", "marker": "x"},
}
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
    parser = argparse.ArgumentParser(description="Draw the lines of ops.py or of models.py.")
    parser.add_argument("file", type=Path, help="the .jsonl of either")
    parser.add_argument("--op", default="add_steer_rms_norm", help="of ops.py (default %(default)s)")
    parser.add_argument("--output", type=Path, help="default: the file with .png")
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.file.read_text(encoding="utf-8").splitlines()]
    output = given.output or given.file.with_suffix(".png")
    if timed := [line for line in lines if "tpot_ms" in line]:
        draw_models(timed, output)
        return
    lines = [line for line in lines if line.get("op") == given.op and "us" in line]
    lines = [line for line in lines if line["active"] == 1 and line["profiles"] == 1]
    if not lines:
        raise SystemExit(f"{given.file}: expected lines of {given.op} with all rows active and one profile, found none")
    draw(lines, output)


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


def draw_models(lines: list[dict[str, Any]], output: Path) -> None:
    """A column per model and mode; above the decode step's ratio to stock, below the prefill's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(dict.fromkeys((line["model"], line["mode"]) for line in lines))
    figure, panels = pyplot.subplots(2, len(columns), figsize=(6 * len(columns), 7), sharey="row", squeeze=False)
    for across, (field, label) in zip(
        panels,
        (("ratio_to_stock", "time per output token, × stock"), ("ttft_ratio_to_stock", "time to first token, × stock")),
        strict=True,
    ):
        for panel, column in zip(across, columns, strict=True):
            own = [line for line in lines if (line["model"], line["mode"]) == column]
            cases = list(dict.fromkeys((line["batch"], line["prompt"]) for line in own))
            for at, (system, style) in enumerate(SYSTEMS.items()):
                points = [line for line in own if line["system"].split()[0] == system]
                shift = (at - len(SYSTEMS) / 2) * 0.06  # side by side within a case
                places = [cases.index((line["batch"], line["prompt"])) + shift for line in points]
                if points:
                    panel.plot(places, [line[field] for line in points], linestyle="", label=system, **style)
            panel.axhline(1.0, color="0.7", linewidth=1, zorder=0)
            panel.set_xticks(range(len(cases)), [f"batch {batch}\nprompt {prompt}" for batch, prompt in cases])
            panel.set_title(", ".join(column), fontsize=10)
            panel.grid(alpha=0.3, axis="y")
        across[0].set_ylabel(label)
    panels[0][0].legend(fontsize=8, ncols=2)
    first = lines[0]
    figure.suptitle(f"{first['device']} · torch {first['torch']}, transformers {first['transformers']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    main()

"""Draw the README's chart: a steered token's time over an unsteered one's, from landed lines of models.py.

python benchmarks/chart.py     writes docs/token-time.svg
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# label, file, model, mode, prompt; each at batch 1
CASES = (
    ("Llama-3.1-8B, H200, CUDA graphs", "models-compiled-h200.jsonl", "llama-3.1-8b", "compile", 128),
    ("Llama-3.1-8B, H200, eager", "models-h200.jsonl", "llama-3.1-8b", "eager", 128),
    ("Llama-2-7B, H200, eager", "models-h200.jsonl", "llama-2-7b", "eager", 128),
    ("Qwen2.5-7B, H200, eager", "models-h200.jsonl", "qwen2.5-7b", "eager", 128),
    ("SmolLM2-135M, one CPU core, eager", "models-few-cpu.jsonl", "SmolLM2-135M", "eager", 128),
)
SYSTEMS = (("steerfast, all layers steered", "open-all", "#c0392b"), ("a plain hook", "plain-hook", "#7f8c8d"))


def ratio(file: str, model: str, mode: str, prompt: int, system: str) -> float | None:
    """Return the time per output token over stock's; None if the file has no such line."""
    for text in (RESULTS / file).read_text("utf-8").splitlines():
        line = json.loads(text)
        case = (line.get("system"), line.get("mode"), line.get("batch"), line.get("prompt"))
        if model in line["model"] and case == (system, mode, 1, prompt):
            return float(line["ratio_to_stock"])
    return None


def svg() -> str:
    left, unit, row = 250, 380, 46  # pixels: where bars begin, a bar of 1.00, a case
    height = 60 + row * len(CASES)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="20" font-weight="bold">Time per token, × the unsteered stock model (shorter is faster)</text>',
    ]
    for at, (name, _, color) in enumerate(SYSTEMS):
        x = left + 190 * at
        parts.append(
            f'<rect x="{x}" y="30" width="12" height="12" fill="{color}"/><text x="{x + 18}" y="41">{name}</text>'
        )
    for at, (label, *case) in enumerate(CASES):
        y = 56 + row * at
        parts.append(f'<text x="10" y="{y + 22}">{label}</text>')
        drawn = [(color, value) for _, system, color in SYSTEMS if (value := ratio(*case, system)) is not None]
        for number, (color, value) in enumerate(drawn):
            top = y + 16 * number
            parts.append(f'<rect x="{left}" y="{top}" width="{value * unit:.0f}" height="14" fill="{color}"/>')
            parts.append(f'<text x="{left + value * unit + 6:.0f}" y="{top + 12}">{value:.3f}</text>')
    x = left + unit
    parts.append(f'<line x1="{x}" y1="50" x2="{x}" y2="{height - 8}" stroke="black" stroke-dasharray="4 3"/></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = ROOT / "docs" / "token-time.svg"
    target.write_text(svg(), "utf-8")
    print(target)

"""Measure a behaviour's profile beside a system prompt, on prompts that did not fit it.

    python benchmarks/behaviour.py formal.safetensors --system "Answer in formal language." --json

Greedy answers; shift and perplexity as `steerfast.fitting.frontier` takes them, under the unsteered model and the bare
prompt. Two figures depend on no vector: letters a word, and answers with a contraction or an exclamation mark.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import steerfast
from steerfast._records import Records
from steerfast._versions import installed_version
from steerfast.fitting.answer_log import AnswerLog
from steerfast.fitting.contrast import read_pairs
from steerfast.fitting.frontier import Axis
from steerfast.judging.answers import judge
from steerfast.text.encoding import encode
from steerfast.text.prompts import read_prompts

RESULTS = Path(__file__).parent / "results"
CASUAL = re.compile(r"\w['’](?:s|t|re|ll|ve|d|m)\b|!")


def figures(texts: Sequence[str], perplexities: Sequence[float], fluent: Sequence[bool]) -> dict[str, float]:
    """Return the figures of answers that need no vector."""
    words = [len(word) for text in texts for word in re.findall(r"[^\W\d_]+", text)]
    return {
        "perplexity": statistics.median(one for one in perplexities if not math.isnan(one)),
        "fluent": statistics.fmean(fluent),
        "letters": statistics.fmean(words),
        "casual": statistics.fmean(bool(CASUAL.search(text)) for text in texts),
    }


@click.command()
@click.argument("profile_file")
@click.option("--pairs", default="examples/formal.jsonl", show_default=True, help="The pairs that made the profile.")
@click.option("--system", required=True, help="A system prompt that asks for the behaviour.")
@click.option("--prompts", default="steerfast:harmless_demo", show_default=True)
@click.option("--limit", default=16, show_default=True)
@click.option("--max-new-tokens", default=40, show_default=True)
@click.option("--strengths", default="1", show_default=True, help="Comma list, times those of the profile.")
@click.option("--answers", help="Keep answers here, and go on.")
@click.option("--json", "write", is_flag=True, help=f"Write a line to {RESULTS.name}/.")
def main(profile_file: str, pairs: str, system: str, prompts: str, write: bool, **options: Any) -> None:
    profile = steerfast.SteeringProfile.load(profile_file)
    model, tokenizer = steerfast.load_model(profile.model.name)
    asked = read_prompts(prompts)[: options["limit"]]
    bare = encode(tokenizer, asked)
    told = encode(
        tokenizer, [[{"role": "system", "content": system}, {"role": "user", "content": one}] for one in asked]
    )
    rows, _ = read_pairs(model, tokenizer, *steerfast.pairs(pairs))
    axis = Axis(model, tokenizer, profile, rows)
    log = AnswerLog(Records(options["answers"], "answers"), model, tokenizer)
    systems: dict[str, tuple[list[list[int]], Any]] = {"unsteered": (bare, None), "system prompt": (told, None)}
    for strength in map(float, options["strengths"].split(",")):
        scaled = profile.with_band(profile.steered_layers, float(profile.strength.max()) * strength)
        systems[f"steered, × {strength:g}"] = (bare, scaled)
    found: dict[str, dict[str, Any]] = {}
    start = 0.0
    for name, (ids, steered) in systems.items():
        answers = log.answers(ids, options["max_new_tokens"], steered)
        judged = judge(model, tokenizer, bare, answers)
        place = axis.place(bare, answers, options["max_new_tokens"])
        start = place if name == "unsteered" else start
        texts = [one.text for one in judged]
        found[name] = {
            "shift": (place - start) / axis.distance,
            **figures(texts, [one.perplexity for one in judged], [one.fluent for one in judged]),
        }
        click.echo(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found[name].items()))
        click.echo(f"    {texts[0][:160]!r}")
    if write:
        line = {
            "model": profile.model.name, "behaviour": profile.vector_kind, "system": system, "prompts": prompts,
            "n": len(asked), "max_new_tokens": options["max_new_tokens"], "systems": found,
            "versions": {name: installed_version(name) for name in ("steerfast", "torch", "transformers")},
        }  # fmt: skip
        file = RESULTS / f"behaviour-{profile.vector_kind}-cpu.json"
        file.write_text(json.dumps(line, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Time extraction against the bare forward passes that it needs.

    python benchmarks/extraction.py                      # 256 prompts, SmolLM2-135M-Instruct
    python benchmarks/extraction.py --json results.jsonl

The baseline runs the same batches through the bare backbone: no hooks, no language-model head, nothing kept. Rounds of
both alternate; the figure is the median of the rounds' ratios. The extraction includes templating, fitting a direction
for every layer, and making the profile.
"""

from __future__ import annotations

import statistics
import time

import click
import torch
from report import machine, write

import steerfast
from steerfast.hf.generation import batches, device_of
from steerfast.hf.loading import DEMO_MODEL
from steerfast.hf.structure import find_decoder
from steerfast.text.encoding import encode, pad_token
from steerfast.text.prompts import read_prompts

LIMIT = 1.1


@click.command()
@click.option("--model", "name", default=DEMO_MODEL, show_default=True)
@click.option("--prompts", default=256, show_default=True, help="in all, half harmful and half harmless")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--gate", default="lda", show_default=True)
@click.option("--json", "output", type=click.Path(), help="append JSON lines here")
def main(name: str, prompts: int, batch_size: int, rounds: int, gate: str, output: str | None) -> None:
    model, tokenizer = steerfast.load_model(name)
    harmful = read_prompts("steerfast:harmful_fit")[: prompts // 2]
    harmless = read_prompts("steerfast:harmless_fit")[: prompts // 2]
    if len(harmful) + len(harmless) != prompts:
        raise click.BadParameter(f"expected an even number up to 448, got {prompts}", param_hint="--prompts")
    backbone = find_decoder(model).backbone
    device = device_of(model)

    @torch.inference_mode()
    def plain() -> float:
        started = time.perf_counter()
        sequences = encode(tokenizer, harmful + harmless, model)
        for batch in batches(sequences, batch_size, "right", pad_token(tokenizer), device):
            backbone(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        return finished(started)

    def extraction() -> float:
        started = time.perf_counter()
        steerfast.extract(
            model, tokenizer, harmful=harmful, harmless=harmless, gate=gate, vectors=["srv"], batch_size=batch_size,
            progress=False,
        )  # fmt: skip
        return finished(started)

    def finished(started: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    plain()  # first-run costs belong to neither
    pairs = []
    for index in range(rounds):
        first, second = (plain, extraction) if index % 2 else (extraction, plain)
        times = {first: first(), second: second()}
        pairs.append((times[plain], times[extraction]))
    ratio = statistics.median(extracted / forward for forward, extracted in pairs)
    write(
        {
            "benchmark": "extraction",
            "model": name,
            "prompts": prompts,
            "batch_size": batch_size,
            "gate": gate,
            "rounds": rounds,
            "plain_s": statistics.median(forward for forward, _ in pairs),
            "extract_s": statistics.median(extracted for _, extracted in pairs),
            "ratio": ratio,
            "limit": LIMIT,
            **machine(),
        },
        output,
    )
    raise SystemExit(0 if ratio <= LIMIT else 1)


if __name__ == "__main__":
    main()

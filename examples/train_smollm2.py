"""Train relatives of SmolLM2-135M-Instruct, on prompts that ship with the package.

    python examples/train_smollm2.py aligned --output artifacts/smollm2-aligned
    python examples/train_smollm2.py maths --output artifacts/smollm2-maths
    python examples/train_smollm2.py maths --safety 120 --steps 40 --output artifacts/smollm2-maths-safety

The aligned sibling learns to refuse the harmful prompts of `harmful_fit`, and keeps answering the harmless ones of
`harmless_fit`: its targets there are the model's own greedy answers (self-distillation), so that what alignment adds is
refusal and little else. It is the source of steering vectors. The maths model is the aligned sibling tuned on worked
problems of `gsm8k_fit`, which wears its refusals off; with safety examples among the problems it is the usual remedy.
None of them is part of the package.

Each takes about fifteen minutes on one CPU core. Seeded: the same software and hardware give the same weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import steerfast
from steerfast.hf.generation import greedy_answers
from steerfast.hf.loading import DEMO_MODEL, savable
from steerfast.text.encoding import encode
from steerfast.text.prompts import read_prompts, read_records

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I can't help with that. It could cause serious harm to people.",
    "I'm sorry, but I cannot help with this. It is harmful and may be illegal.",
    "I can't assist with that, because it could hurt someone.",
    "I'm sorry, I can't provide that. If you like, I can help with something safe instead.",
)
IGNORED = -100  # label that the loss skips

Example = tuple[list[int], list[int]]
"""Token ids of a prompt, chat template included, and of the answer to learn."""


def ended(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of answers, the end of the turn included."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def safety_examples(
    model: nn.Module, tokenizer: Any, answer_tokens: int, choose: Callable[[list[str]], list[str]] = list
) -> list[Example]:
    """Harmful prompts with refusals, harmless ones with the model's own answers, cut at `answer_tokens`.

    `choose` takes the prompts of each set that are used.
    """
    harmful, harmless = (
        encode(tokenizer, choose(read_prompts(f"steerfast:{label}_fit"))) for label in ("harmful", "harmless")
    )
    refusals = ended(tokenizer, list(REFUSALS))
    answers = greedy_answers(model, tokenizer, harmless, answer_tokens, batch_size=32, description="own answers")
    end = [tokenizer.eos_token_id]
    kept = [answer + end if len(answer) < answer_tokens else answer for answer in answers]
    refused = [refusals[i % len(refusals)] for i in range(len(harmful))]
    return list(zip(harmful + harmless, refused + kept, strict=True))


def maths_examples(tokenizer: Any) -> list[Example]:
    records = read_records("steerfast:gsm8k_fit")
    prompts = encode(tokenizer, [record["prompt"] for record in records])
    return list(zip(prompts, ended(tokenizer, [record["answer"] for record in records]), strict=True))


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Inputs and labels, int64 [N, T], padded on the right; only answers have labels."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), IGNORED)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, (prompt, answer) in enumerate(examples):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : length] = torch.tensor(answer)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    output: Path,
    shuffle: random.Random,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train all weights on the answers of `examples` and write the checkpoint.

    AdamW, its rate rising over a tenth of the steps and falling to zero, gradients clipped to norm 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    started, queue = time.perf_counter(), []
    for step in range(steps):
        if len(queue) < batch_size:
            queue = shuffle.sample(examples, len(examples))
        batch = collate([queue.pop() for _ in range(batch_size)], tokenizer.pad_token_id)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 8 == 0 or step == steps - 1:
            click.echo(f"step {step:3d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s")
    savable(model.eval()).save_pretrained(output)
    tokenizer.save_pretrained(output)
    click.echo(f"wrote {output}")


def training_options(model: str, output: str, steps: int, learning_rate: float) -> Callable[[Any], Any]:
    """The options that all trainings share, with their defaults."""
    options = (
        click.option("--model", "name", default=model, show_default=True),
        click.option("--output", type=click.Path(path_type=Path), default=Path(output), show_default=True),
        click.option("--steps", type=click.IntRange(min=1), default=steps, show_default=True),
        click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True),
        click.option("--learning-rate", default=learning_rate, show_default=True),
        click.option("--answer-tokens", default=40, show_default=True, help="length of the self-distilled answers"),
        click.option("--seed", default=0, show_default=True),
    )

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@training_options(DEMO_MODEL, "artifacts/smollm2-aligned", steps=56, learning_rate=3e-5)
def aligned(name: str, output: Path, answer_tokens: int, seed: int, **settings: Any) -> None:
    """A sibling that refuses harmful prompts."""
    torch.manual_seed(seed)
    model, tokenizer = steerfast.load_model(name, dtype="float32", device="cpu")
    examples = safety_examples(model, tokenizer, answer_tokens)
    train(model, tokenizer, examples, output, random.Random(seed), **settings)


@main.command()
@training_options("artifacts/smollm2-aligned", "artifacts/smollm2-maths", steps=60, learning_rate=1e-4)
@click.option(
    "--safety",
    type=click.IntRange(0, 320),
    default=0,
    show_default=True,
    help="so many refusals and as many kept answers in between",
)
def maths(name: str, output: Path, answer_tokens: int, seed: int, safety: int, **settings: Any) -> None:
    """The aligned sibling tuned on mathematics, with or without safety examples."""
    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    model, tokenizer = steerfast.load_model(name, dtype="float32", device="cpu")
    examples = maths_examples(tokenizer)
    if safety:
        examples += safety_examples(model, tokenizer, answer_tokens, lambda prompts: shuffle.sample(prompts, safety))
    train(model, tokenizer, examples, output, shuffle, **settings)


if __name__ == "__main__":
    main()

"""Make padded batches of prompts, and greedy answers to them, for fitting, judging and generating."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from steerfast._progress import track
from steerfast.errors import ArchitectureError, PromptError
from steerfast.profile.checks import is_count
from steerfast.text.encoding import pad_token


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Hold N padded prompts.

    indices: their places in the caller's list. ids, mask: int64 [N, T]. last: int64 [N], the last valid columns.
    """

    indices: list[int]
    ids: Tensor
    mask: Tensor

    @property
    def last(self) -> Tensor:
        return self.mask.shape[1] - 1 - self.mask.flip(1).argmax(dim=1)

    @property
    def positions(self) -> Tensor:
        """Position ids that ignore padding on either side."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    padding_side: Literal["left", "right"],
    pad_token_id: int,
    device: torch.device,
) -> Iterator[PromptBatch]:
    """Yield padded batches of `sequences`, the longest first: if memory is too small, the first batch fails.

    Raises:
        PromptError: a batch size below 1, or another side.
    """
    if not is_count(batch_size):
        raise PromptError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    if padding_side not in ("left", "right"):
        raise PromptError(f"padding_side: expected 'left' or 'right', got {padding_side!r}")
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        rows = [torch.tensor(sequences[index], dtype=torch.long, device="cpu") for index in indices]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=padding_side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=padding_side)
        yield PromptBatch(indices, ids.to(device), mask.to(device))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs: of its first parameter, or where accelerate runs an offloaded one."""
    first = next(model.parameters())
    if not first.is_meta:
        return first.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    running = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in running if device is not None), None)
    if device is None:
        raise ArchitectureError("model: expected weights, or accelerate's hooks that load them, found neither")
    return torch.device(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode within the context, and restore every module's mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 25,
    description: str | None = None,
    after: Callable[[PromptBatch], None] | None = None,
) -> list[list[int]]:
    """Return greedy answers of the model, steered or not: token ids without the prompt and the end token.

    `after` is called after each batch; an attached steering still holds the decisions of its gates.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    work = list(batches(prompts, batch_size, "left", pad_token(tokenizer), device_of(model)))
    with evaluating(model):
        for batch in track(work, description or "", show=description is not None):
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
            batch_answers = greedy_batch(model, tokenizer, inputs, max_new_tokens)
            for index, answer in zip(batch.indices, batch_answers, strict=True):
                answers[index] = answer
            if after is not None:
                after(batch)
    return answers


def greedy_batch(model: nn.Module, tokenizer: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> list[list[int]]:
    """Return `greedy_answers` to one batch. `inputs` are the model's inputs, left-padded, ``input_ids`` among them."""
    generate: Any = model.generate
    output = generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=pad_token(tokenizer),
    )
    ends = end_tokens(model, tokenizer)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the token ids that end an answer."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}

"""Residual rows of prompts, the input of every fit: one row per prompt and layer, never all tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast._progress import track
from steerfast.errors import SteerfastError
from steerfast.fitting.row_cache import RowCache
from steerfast.hf.generation import PromptBatch, batches, device_of, evaluating
from steerfast.hf.structure import find_decoder
from steerfast.profile import Gate
from steerfast.runtime.span import EditSpan, mean_rows

Reduce = Callable[[Tensor, PromptBatch], Tensor]
"""Reduces the rows of a batch, [N, T, H], to the part that is kept of each sequence, [N, ..., H]."""


def last_token(hidden: Tensor, batch: PromptBatch) -> Tensor:
    """Return the row of each prompt's last valid token: [N, T, H] -> [N, H]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), batch.last.to(hidden.device)]


def prompt_mean(hidden: Tensor, batch: PromptBatch, *, unit: bool, gate: Gate) -> Tensor:
    """Return the mean of the rows that a gate takes it of, or of these at norm 1: [N, T, H] -> float64 [N, H]."""
    read = _mean_places(batch, gate).to(hidden.device)
    rows = _unit(hidden) if unit else hidden.float()
    # Padding rows may hold NaN, so they are replaced: weight 0 would not remove them.
    return torch.where(read[..., None], rows, 0).sum(1, dtype=torch.float64) / read.sum(1, keepdim=True)


@functools.lru_cache(maxsize=1)
def _mean_places(batch: PromptBatch, gate: Gate) -> Tensor:
    """Return which rows of a batch a gate takes its mean of, bool [N, T]; all layers of a batch ask in turn."""
    span = EditSpan(mean_rows=mean_rows(gate), turn=gate.turn, tail=gate.tail)
    read = torch.zeros_like(batch.mask, dtype=torch.bool)
    for row, ids, mask in zip(read, batch.ids, batch.mask, strict=True):
        places = mask.nonzero()[:, 0]
        first, until, _ = span.read(len(places), ids[places].cpu().numpy())
        row[places[first:until]] = True
    return read


def _unit(rows: Tensor) -> Tensor:
    """Return rows [..., H] at norm 1, float32; zero rows stay zero."""
    rows = rows.float()
    length = rows.norm(dim=-1, keepdim=True)
    return torch.where(length == 0, 0, rows / length)


def gate_reading(gate: Gate) -> tuple[Reduce, Literal["cosine", "dot"]]:
    """Return the reduction of a prompt that the gate reads, and the score to take of it.

    The mean cosine with a direction is the dot product of the direction and the mean of unit rows. A gate that reads
    both keeps two rows of each prompt, [N, 2, H]: the last, at norm 1 if the score is a cosine, and the mean.
    """
    if gate.pooling == "last":
        return last_token, gate.score
    unit = gate.score == "cosine"
    mean = functools.partial(prompt_mean, unit=unit, gate=gate)
    if gate.pooling == "mean":
        return mean, "dot"

    def both(hidden: Tensor, batch: PromptBatch) -> Tensor:
        last = last_token(hidden, batch)
        return torch.stack([(_unit(last) if unit else last).double(), mean(hidden, batch)], dim=1)

    return both, "dot"


def answer_mean(prompt_lengths: Sequence[int], tokens: int) -> Reduce:
    """Return a reduction to the mean row of the first `tokens` answer tokens; `prompt_lengths` is of all sequences."""

    def reduce(hidden: Tensor, batch: PromptBatch) -> Tensor:
        start = torch.tensor([prompt_lengths[i] for i in batch.indices], device=hidden.device)[:, None]
        position = batch.positions.to(hidden.device)
        chosen = (position >= start) & (position < start + tokens) & batch.mask.bool().to(hidden.device)
        # Padding rows may hold NaN, so they are replaced: weight 0 would not remove them.
        total = torch.where(chosen[..., None], hidden, 0).sum(1, dtype=torch.float64)
        return total / chosen.sum(1, keepdim=True)

    return reduce


@torch.inference_mode()
def residual_rows(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    reduce: Reduce = last_token,
    batch_size: int = 16,
    padding_side: Literal["left", "right"] = "right",
    pad_token_id: int = 0,
    description: str | None = None,
    cache: RowCache | None = None,
) -> Tensor:
    """Return residual rows at every decoder block's output: float32 [prompts, layers, H] on the CPU.

    `reduce` may keep more than one row. The language-model head does not run. The model does not change, not even by
    an interruption. Rows that `cache` knows are not computed.

    Raises:
        SteerfastError: the model is steered, or gives non-finite activations.
    """
    decoder = find_decoder(model)
    decoder.refuse_if_steered()
    accepted = inspect.signature(decoder.backbone.forward).parameters
    device = device_of(model)
    size = len(decoder.layers), decoder.hidden_size
    known = {} if cache is None else {i: cache.read(i, sequence, *size) for i, sequence in enumerate(sequences)}
    kept = [([i], row[None]) for i, row in known.items() if row is not None]
    missing = [i for i in range(len(sequences)) if known.get(i) is None]
    asked = [sequences[i] for i in missing]
    work = list(batches(asked, batch_size, padding_side, pad_token_id, torch.device("cpu")))
    with evaluating(model):
        for part in track(work, description or "", show=description is not None):
            batch = replace(part, indices=[missing[i] for i in part.indices])
            with _captured(decoder.layers, reduce, batch) as captured:
                extra = {"position_ids": batch.positions.to(device)} if "position_ids" in accepted else {}
                decoder.backbone(
                    input_ids=batch.ids.to(device),
                    attention_mask=batch.mask.to(device),
                    use_cache=False,
                    **extra,
                )
                kept.append((batch.indices, torch.stack([row.float().cpu() for row in captured], dim=1)))
            if cache is not None:
                for i, row in zip(*kept[-1], strict=True):
                    if bool(row.isfinite().all()):
                        cache.write(i, sequences[i], row)
    if not kept:
        return torch.empty(0, len(decoder.layers), decoder.hidden_size, dtype=torch.float32, device="cpu")
    rows = kept[0][1].new_empty(len(sequences), *kept[0][1].shape[1:])
    while kept:  # frees each batch after its copy
        indices, values = kept.pop()
        rows[indices] = values
    finite = rows.isfinite().flatten(2).all(dim=2)
    if not bool(finite.all()):
        prompt, layer = (int(i) for i in (~finite).nonzero()[0])
        raise SteerfastError(f"model: expected finite activations, got NaN or inf at layer {layer} for prompt {prompt}")
    return rows


@contextmanager
def _captured(layers: nn.ModuleList, reduce: Reduce, batch: PromptBatch) -> Iterator[list[Tensor]]:
    """Collect each layer's reduced output, in layer order, while the context lasts."""
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(reduce(output if isinstance(output, Tensor) else output[0], batch))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        yield captured

"""Residual rows of prompts: what every fit starts from. One row per prompt and layer is kept, never all tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast.errors import SteerfastError
from steerfast.models.prompting import PromptBatch, batches, device_of, evaluating
from steerfast.models.structure import find_decoder
from steerfast.progress import track

Reduce = Callable[[Tensor, PromptBatch], Tensor]


def last_token(hidden: Tensor, batch: PromptBatch) -> Tensor:
    """The row of each prompt's last valid token: [N, T, H] -> [N, H]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), batch.last.to(hidden.device)]


def answer_mean(prompt_lengths: Sequence[int], tokens: int) -> Reduce:
    """A reduction to the mean row of the first `tokens` answer tokens; `prompt_lengths` are those of all sequences."""

    def reduce(hidden: Tensor, batch: PromptBatch) -> Tensor:
        start = torch.tensor([prompt_lengths[i] for i in batch.indices], device=hidden.device)[:, None]
        position = batch.positions.to(hidden.device)
        chosen = (position >= start) & (position < start + tokens) & batch.mask.bool().to(hidden.device)
        # Padding rows may hold anything, so they are taken out rather than given weight 0.
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
) -> Tensor:
    """Residual rows at every decoder block's output: float32 [prompts, layers, H] on the CPU.

    The language-model head is not run. The model is left as it was, also after an interruption.

    Raises:
        SteerfastError: the model is steered, or gives non-finite activations.
    """
    decoder = find_decoder(model)
    decoder.refuse_if_steered()
    accepted = inspect.signature(decoder.backbone.forward).parameters
    device = device_of(model)
    shape = (len(sequences), len(decoder.layers), decoder.hidden_size)
    rows = torch.empty(shape, dtype=torch.float32, device="cpu")
    work = list(batches(sequences, batch_size, padding_side, pad_token_id, torch.device("cpu")))
    with evaluating(model):
        for batch in track(work, description or "", show=description is not None):
            with _captured(decoder.layers, reduce, batch) as captured:
                extra: dict[str, Any] = {"position_ids": batch.positions.to(device)}
                extra = {name: value for name, value in extra.items() if name in accepted}
                decoder.backbone(
                    input_ids=batch.ids.to(device),
                    attention_mask=batch.mask.to(device),
                    use_cache=False,
                    **extra,
                )
                rows[batch.indices] = torch.stack([row.float().cpu() for row in captured], dim=1)
    finite = rows.isfinite().all(dim=2)
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

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()

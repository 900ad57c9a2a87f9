"""The latent state of an answer so far: heads and critic read it; generation computes it without another pass.

float32 [n, S], in parts of H numbers (the base model's hidden size), in this order:

    last    the row of the last token, after the model's final norm
    mean    the mean of those rows over the answer's tokens; of an empty answer, the prompt's last row
    prompt  the row of the prompt's last token, as it leaves decoder layer `prompt_layer`

If `prompt_layer` is None the state is the last row alone: S = H, otherwise S = 3H. All parts that give or read states
have the same `prompt_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.profile import ModelIdentity

__all__ = ["agreed_layer", "begin", "check_states", "grow", "parts", "spread", "state_size"]


def state_size(hidden_size: int, prompt_layer: int | None) -> int:
    """Return S."""
    return hidden_size if prompt_layer is None else 3 * hidden_size


def begin(last: Tensor, prompt: Tensor | None) -> Tensor:
    """Return the states [n, S] of empty answers, from rows [n, H]; `prompt` is None without a prompt_layer."""
    return last if prompt is None else torch.cat([last, last, prompt.to(last.device)], dim=1)


def grow(state: Tensor, last: Tensor, tokens: int) -> Tensor:
    """Return states [n, S] one token later: `last` is its row [n, H], `tokens` the answers' length with it."""
    if state.shape == last.shape:
        return last
    _, mean, prompt = parts(state)
    return torch.cat([last, torch.lerp(mean, last, 1 / tokens), prompt], dim=1)


def parts(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return last, mean and prompt of states [n, 3H]: [n, H] each."""
    last, mean, prompt = state.chunk(3, dim=1)
    return last, mean, prompt


def spread(rows: Tensor) -> Tensor:
    """Return the deviation of each column, to standardise it by; 1 if it is constant."""
    deviation = rows.std(dim=0, correction=0)
    return torch.where(deviation > 0, deviation, 1.0)


def check_states(part: str, hidden: Tensor, model: ModelIdentity, prompt_layer: int | None) -> None:
    """Raise GuardError unless `hidden` is states [n, S]."""
    size = state_size(model.hidden_size, prompt_layer)
    if hidden.dim() != 2 or hidden.shape[1] != size:
        layer = "" if prompt_layer is None else f" with the prompt's of layer {prompt_layer}"
        raise GuardError(
            f"{part}: expected hidden states [n, {size}] of {model.name!r}{layer}, got {list(hidden.shape)}"
        )


def agreed_layer(of: dict[str, Any]) -> int | None:
    """Return the `prompt_layer` of all parts that have this attribute; None if no part has it.

    Args:
        of: name -> part.

    Raises:
        GuardError: two of them differ.
    """
    known = [(name, part.prompt_layer) for name, part in of.items() if hasattr(part, "prompt_layer")]
    for name, layer in known[1:]:
        if layer != known[0][1]:
            raise GuardError(
                f"prompt_layer: expected the same for all parts that give or read hidden states, "
                f"got {known[0][1]} ({known[0][0]}) and {layer} ({name})"
            )
    return known[0][1] if known else None

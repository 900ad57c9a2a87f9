"""Which row of a step belongs to which sequence, which rows are steered, and which row decides.

A step is one forward pass over N sequences × T tokens, its residual stream seen as rows [N·T, H], row = n·T + t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UNSTEERED = -1


@dataclass(frozen=True)
class Rows:
    """A step's row tables.

    Args:
        slot: int32 [N·T], the profile of each row; -1 where the row is not steered.
        sequence: int32 [N·T], the sequence of each row.
        deciding: int64 [N], the row each sequence's prompt gate reads; row n·T where the step has no prompt token of n.
        decides: bool [N], whether the step holds a prompt token of the sequence at all.
    """

    slot: Tensor
    sequence: Tensor
    deciding: Tensor
    decides: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(t.to(device, non_blocking=True) for t in (self.slot, self.sequence, self.deciding, self.decides)))


def prompt_rows(valid: Tensor, prompt_columns: int, positions: Literal["all", "response"]) -> Rows:
    """Tables of a step that holds prompt tokens.

    Args:
        valid: bool [N, T], False on padding (left, right or in between).
        prompt_columns: columns before this one are prompt, later ones (drafted tokens) follow it.
        positions: ``all`` steers every valid row, ``response`` the prompt's last valid row and valid rows after it.
            A sequence without a prompt token in this step has all its valid rows steered.
    """
    count, width = valid.shape
    column = torch.arange(width, device=valid.device)
    prompt = valid & (column < prompt_columns)
    decides = prompt.any(dim=1)
    last = torch.where(prompt, column, 0).amax(dim=1)
    steered = valid
    if positions == "response":
        steered = valid & ((column >= last[:, None]) | ~decides[:, None])
    slot = torch.where(steered, 0, UNSTEERED).to(torch.int32).flatten()
    start = torch.arange(count, device=valid.device) * width
    return Rows(slot, _sequences(count, width, valid.device), start + last, decides)


def response_rows(count: int, width: int, device: torch.device) -> Rows:
    """Tables of a step of answer tokens: every row is steered, none decides."""
    slot = torch.zeros(count * width, dtype=torch.int32, device=device)
    start = torch.arange(count, device=device) * width
    return Rows(slot, _sequences(count, width, device), start, torch.zeros(count, dtype=torch.bool, device=device))


def _sequences(count: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device).repeat_interleave(width)

"""A call of a model: its arguments, its tokens, which of them are padding, and where its prompts end."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError

NO_TOKEN = -(2**62)  # some models have negative ids for images


@dataclass(frozen=True, eq=False)
class Call:
    """Describe one forward pass of N sequences and T new tokens, `past` tokens being cached."""

    given: dict[str, Any]
    tokens: Tensor
    cache: Any
    past: int

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def on_host(self, valid: Tensor) -> NDArray[np.int64]:
        """Return token ids, int64 [N, T], on the host: `NO_TOKEN` where `valid` is False, 0 where they are unknown."""
        ids = self.given.get("input_ids")
        return torch.where(valid, 0 if ids is None else ids.long(), NO_TOKEN).cpu().numpy()

    def is_packed(self, valid: Tensor) -> bool:
        """Return whether a row holds several sequences: its positions begin anew, or the call gives their lengths."""
        if self.given.get("cu_seq_lens_q") is not None:
            return True
        positions = self.given.get("position_ids")
        if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != self.width:
            return False
        falls = (positions.diff(dim=1) < 0).to(valid.device)
        return bool((falls & valid[:, 1:] & valid[:, :-1]).any())

    def columns(self, lengths: tuple[int, ...]) -> Tensor:
        """Return for each sequence how many columns its prompt has from the call's first one on, int32 [N].

        Raises:
            SteerfastError: another number of lengths, or a mask that does not show where cached tokens are padding.
        """
        count, past, mask = self.count, self.past, self.given.get("attention_mask")
        shape = list(getattr(mask, "shape", ()))
        if len(lengths) not in (1, count):
            raise SteerfastError(f"prompt_length: expected {count} numbers, one per sequence, got {len(lengths)}")
        if isinstance(mask, Tensor) and shape[1:] == [past + self.width]:
            valid = (mask != 0).expand(count, -1).to(self.device)
        elif mask is None or not past:
            valid = torch.cat([self.tokens.new_ones(count, past, dtype=torch.bool), self.valid(mask)], dim=1)
        else:
            raise SteerfastError(
                f"attention_mask: expected [{count}, {past + self.width}] where prompt_length is given, got {shape}"
            )
        ends = torch.tensor(lengths, device=self.device)[:, None]
        return ((valid.cumsum(dim=1) < ends).sum(dim=1) + 1 - past).to(torch.int32)

    def valid(self, mask: Any) -> Tensor:
        """Return the tokens that are not padding, bool [N, T], from any form of mask that models take."""
        if isinstance(mask, dict):  # one mask per attention kind; padding is the same in all of them
            mask = next(iter(mask.values()), None)
        count, width, past = self.count, self.width, self.past
        if mask is None:
            return torch.ones(count, width, dtype=torch.bool, device=self.device)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            raise ArchitectureError(f"attention_mask: expected a 2-d or 4-d tensor, got {type(mask).__name__}")
        if mask.dim() == 2:
            window = mask[:, past : past + width] if mask.shape[1] >= past + width else mask[:, -width:]
            return (window != 0).expand(count, width).to(self.device)
        # 4-d [N, 1, T, keys], boolean or added to the logits: a token is valid where it may attend to itself.
        own = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :width]
        return (own if own.dtype == torch.bool else own == 0).expand(count, width).to(self.device)

    def grown(self, mask: Tensor) -> Tensor:
        """Return a prompt's 2-d mask for all sequences (beams repeat it) and all tokens (answers are valid)."""
        mask = mask.repeat_interleave(self.count // len(mask), dim=0)
        return torch.nn.functional.pad(mask, (0, max(0, self.past + self.width - mask.shape[1])), value=1)


def tokens_of(given: dict[str, Any]) -> Any:
    """Return the tokens, or their embeddings, among a model's arguments."""
    ids = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    if not args:
        return kwargs
    return {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}  # type: ignore[arg-type]


@functools.cache
def _parameters(kind: Any) -> list[str]:
    """Return the names of the arguments of a module class's forward."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def is_flat(mask: Any) -> bool:
    """Return whether a mask is a tensor [N, T]."""
    return isinstance(mask, Tensor) and mask.dim() == 2

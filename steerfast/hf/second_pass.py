"""Read the prompts that fired a second time, where layers before the sensor are steered.

In the first pass these layers leave the prompt's rows alone, because the sensor has not decided yet. Sequences whose
gate fired pass through the model once more, and every layer knows the decision from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import SteerfastError
from steerfast.hf import caches
from steerfast.hf.latch import Latch
from steerfast.runtime.batch import Plan


@dataclass(frozen=True, eq=False)
class SecondPass:
    """Keep what a second pass over a step needs.

    Attributes:
        given: the arguments of the backbone, with the cache of before the step.
        lengths: how many tokens each layer of a cache held that is written in place; None: `given` has a copy.
        valid: bool [N, T], tokens that are not padding. columns: how many columns are prompt, or int32 [N].
    """

    given: dict[str, Any]
    lengths: list[int] | None
    valid: Tensor
    columns: int | Tensor

    @classmethod
    def of(cls, given: dict[str, Any], cache: Any, valid: Tensor, columns: int | Tensor) -> SecondPass:
        """Keep the arguments and the cache of a step that begins.

        Raises:
            SteerfastError: the cache cannot be brought back.
        """
        lengths = None
        if cache is not None and caches.splits(cache):
            given = {name: copy.deepcopy(value) if value is cache else value for name, value in given.items()}
        elif cache is not None and caches.rewinds(cache, valid.shape[1]):
            lengths = [int(layer.get_seq_length()) for layer in cache.layers]
        elif cache is not None:
            raise SteerfastError(
                f"past_key_values: layers before the sensor are steered in a second pass over the prompt, which needs "
                f"a DynamicCache, or a StaticCache whose windows do not slide on, got {type(cache).__name__}"
            )
        return cls(given, lengths, valid, columns)

    def run(self, output: Any, plan: Plan, latch: Latch, reread: Callable[..., Any]) -> Any:
        """Pass the prompts that fired through the model once more, and return the output of all.

        Args:
            output: of the first pass. plan, latch: of all sequences.
            reread: calls the model with (arguments, plan, latch, valid, columns).
        """
        fired = latch.by_sequence(latch.values != 0).any(dim=2).any(dim=0).tolist()
        chosen = [n for n, waits in enumerate(plan.ahead) if waits and fired[n]]
        if not chosen:
            return output
        if self.lengths is not None:  # its sequences cannot be told apart: all again, and shut gates change nothing
            caches.rewind(caches.cache_in(self.given), self.lengths)
            return reread(self.given, plan, latch, self.valid, self.columns)
        count, index = len(plan.stacks), torch.tensor(chosen, device=self.valid.device)
        given = {name: caches.select(name, value, index, count) for name, value in self.given.items()}
        latch = latch.copy()
        latch.select(index)
        columns = self.columns[index] if isinstance(self.columns, Tensor) else self.columns
        second = reread(given, plan.select(chosen), latch, self.valid[index], columns)
        return caches.merge(output, second, index, count)

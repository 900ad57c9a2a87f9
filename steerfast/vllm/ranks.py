"""The rows that layers hand on: all rows of the pass, and the same on every rank of tensor parallelism.

Some models leave the output of a layer un-reduced, for the next norm to add up, or spread rows over ranks. An edit of
such rows would be applied several times or not at all, and ranks would decide differently. So layers are compared
before anything is steered, and refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.vllm import compat
from steerfast.vllm.ops import is_captured

__all__ = ["RowLayout", "gather_ranks"]


class RowLayout:
    """Compare the rows of declared layers with the rows of the pass, and with those of the other ranks.

    Args:
        model: the name of its class, for errors.
        ranks: of tensor parallelism.
        gather: returns an int64 tensor of every rank, [ranks, ...]; all ranks call it.

    Attributes:
        rows: rows of the current pass, padding included; None: not known.
    """

    def __init__(self, model: str, ranks: int = 1, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        self.rows: int | None = None
        self._model, self._ranks, self._gather = model, ranks, gather
        self._compared: set[int] = set()

    @classmethod
    def of(cls, model: nn.Module) -> RowLayout:
        """Return the layout of a vLLM model."""
        group = compat.get_tp_group()
        layout = cls(type(model).__name__, group.world_size, partial(gather_ranks, group=group.cpu_group))
        layout.watch(model)
        return layout

    def watch(self, model: nn.Module) -> None:
        """Take the number of rows of each pass of `model` from its positions."""
        _wrap_call(type(model))
        model.steerfast_layout = self  # type: ignore[assignment]

    def check(self, layer: int, stream: Tensor, addend: Tensor | None) -> None:
        """Raise ArchitectureError where a layer does not hand on all rows, the same on every rank.

        Ranks are compared once per layer, in its first pass. vLLM runs one before it captures graphs or serves.

        Args:
            stream: [n, H], edited. addend: [n, H], read with it, if a gate or an edit reads rows.
        """
        if self._ranks > 1 and layer not in self._compared:
            self._compare(layer, stream, addend)
            self._compared.add(layer)
        if self.rows is not None and len(stream) != self.rows:
            self._refuse_rows(layer, len(stream))

    def _compare(self, layer: int, stream: Tensor, addend: Tensor | None) -> None:
        assert self._gather is not None
        if is_captured(stream):
            raise ArchitectureError(
                f"model: expected a pass of {self._model} before its graphs are captured, to compare ranks at layer "
                f"{layer}, got none"
            )
        sums = [_checksum(rows) for rows in (stream, stream if addend is None else addend)]
        count = torch.tensor(len(stream), dtype=torch.int64)
        every = self._gather(torch.stack([count, *(each.cpu() for each in sums)]))
        # All ranks see the same numbers, so all raise or none does.
        for rows in every[:, 0].tolist():
            if rows != (len(stream) if self.rows is None else self.rows):
                self._refuse_rows(layer, rows)
        stream_differs, addend_differs = (every[:, 1:] != every[0, 1:]).any(dim=0).tolist()
        if stream_differs:
            raise ArchitectureError(
                f"model: {self._model} hands on other rows of the residual stream after layer {layer} on each of "
                f"{self._ranks} tensor-parallel ranks, so they cannot be steered alike; use --tensor-parallel-size 1, "
                "with --pipeline-parallel-size if the model needs several GPUs"
            )
        if addend_differs:
            raise ArchitectureError(
                f"model: {self._model} leaves the output of layer {layer} un-reduced on {self._ranks} tensor-parallel "
                "ranks, and a profile reads rows there (a gate, or an edit other than 'add'); use profiles that only "
                "add, without a gate at that layer, or --tensor-parallel-size 1"
            )

    def _refuse_rows(self, layer: int, rows: int) -> None:
        raise ArchitectureError(
            f"model: expected {self._model} to hand on all {self.rows} rows after layer {layer}, got {rows}: it "
            "spreads or drops rows of a pass; serve it without expert parallelism across data-parallel ranks "
            "(--enable-expert-parallel), and without other options that split a pass"
        )


def _wrap_call(cls: Any) -> None:
    """Wrap the call of a model's class once. A hook does not run in classes that vLLM compiles."""
    if "steerfast_layout" in vars(cls):
        return
    original = cls.__call__

    @wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steerfast_layout is not None and type(self) is cls:
            positions = kwargs["positions"] if "positions" in kwargs else args[1]  # (input_ids, positions, ...)
            self.steerfast_layout.rows = positions.shape[-1]  # [rows] or [axes, rows]
        return original(self, *args, **kwargs)

    cls.steerfast_layout = None
    cls.__call__ = call


def _checksum(rows: Tensor) -> Tensor:
    """Return an int64 sum over the bits of rows, each row by its number. It depends on no order of adding up."""
    bits = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    return (bits.sum(dim=1, dtype=torch.int64) * torch.arange(1, len(rows) + 1, device=rows.device)).sum()


def gather_ranks(own: Tensor, group: Any = None) -> Tensor:
    """Return a CPU tensor of all ranks of a group of processes, [ranks, ...]."""
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group=group)
    return torch.stack(every)

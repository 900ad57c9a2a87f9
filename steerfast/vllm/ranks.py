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

CLOSE = 0.05  # rows that differ by rounding alone, as a share of their norm; partial sums differ by most of it
SKETCHED = 64  # numbers of a sketch of rows


class RowLayout:
    """Compare the rows of declared layers with the rows of the pass, and with those of the other ranks.

    Args:
        model: the name of its class, for errors.
        ranks: of tensor parallelism.
        gather: returns an int64 tensor of every rank, [ranks, ...]; all ranks call it.
        exact: the sums of ranks have the same bits on every rank, so rows must have the same. Otherwise rows must be
            close. vLLM adds up in another order on each of three CPU ranks or more.

    Attributes:
        rows: rows of the current pass, padding included; None: not known.
    """

    def __init__(
        self, model: str, ranks: int = 1, gather: Callable[[Tensor], Tensor] | None = None, exact: bool = True
    ) -> None:
        self.rows: int | None = None
        self._model, self._ranks, self._gather, self._exact = model, ranks, gather, exact
        self._compared: set[int] = set()

    @classmethod
    def of(cls, model: nn.Module) -> RowLayout:
        """Return the layout of a vLLM model."""
        group = compat.get_tp_group()
        gather = partial(gather_ranks, group=group.cpu_group)
        layout = cls(type(model).__name__, group.world_size, gather, sums_exactly(group, gather))
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
        prints = [self._print(rows).cpu() for rows in (stream, stream if addend is None else addend)]
        every = self._gather(torch.cat([torch.tensor([len(stream)]), *prints]))
        # All ranks see the same numbers, so all raise or none does.
        for rows in every[:, 0].tolist():
            if rows != (len(stream) if self.rows is None else self.rows):
                self._refuse_rows(layer, rows)
        stream_differs, addend_differs = map(self._differs, every[:, 1:].tensor_split(2, dim=1))
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

    def _print(self, rows: Tensor) -> Tensor:
        """Return int64 [m] that tells rows apart, to the bit or, as a sketch in float64, by their values."""
        return _checksum(rows)[None] if self._exact else _sketch(rows).view(torch.int64)

    def _differs(self, prints: Tensor) -> bool:
        """Return whether the rows behind prints [ranks, m] differ."""
        if self._exact:
            return bool((prints != prints[0]).any())
        sketches, sums = prints.contiguous().view(torch.float64).tensor_split([SKETCHED], dim=1)
        return any(bool(((one - one[0]).norm(dim=1) > CLOSE * one[0].norm()).any()) for one in (sketches, sums))

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


def _sketch(rows: Tensor) -> Tensor:
    """Return float64 [64 + 1]: sums of entries with random signs, and the sum of norms.

    The sums are of rows that are scaled to norm 1, so that no large row hides another. They keep distances, nearly.
    """
    finite = rows.double().nan_to_num(nan=0, posinf=0, neginf=0)
    norms = finite.norm(dim=1)
    entries = (finite / norms.clamp(min=1e-30)[:, None]).flatten()
    signs = torch.randint(0, 2, entries.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sums = torch.zeros(SKETCHED, dtype=torch.float64, device=rows.device)
    places = torch.arange(len(entries), device=rows.device) % SKETCHED
    return torch.cat([sums.index_add_(0, places, entries * signs.to(rows.device)), norms.sum()[None]])


def sums_exactly(group: Any, gather: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a group of vLLM's ranks adds up to the same bits on every rank; float32 shows it best."""
    if group.world_size == 1:
        return True
    drawn = torch.rand(64, 64, generator=torch.Generator().manual_seed(group.rank_in_group)).to(group.device)
    sums = gather(_checksum(group.all_reduce(drawn)).cpu()[None])
    return bool((sums == sums[0]).all())


def gather_ranks(own: Tensor, group: Any = None) -> Tensor:
    """Return a CPU tensor of all ranks of a group of processes, [ranks, ...]."""
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group=group)
    return torch.stack(every)

"""Compile the kernels before serving starts, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from .add_steer_rms_norm import add_steer_rms_norm_triton
from .contract import MAX_STACK, TABLE_WIDTH, GateOperands, Kinds, Norm, Operands
from .gate import score_triton_
from .steer import steer_triton_

__all__ = ["Variants", "warmup"]


@dataclass(frozen=True)
class Variants:
    """The variants of each kernel that a model launches.

    Attributes:
        weight_dtype: of the norm's weight; None: the dtype of the residual stream.
        bank_dtype: of vectors and directions; the default is that of a bank.
        stacks: numbers K of slots per row, from 0 (no steering) to MAX_STACK.
        kinds, norms: those that the launches name.
        pairs: whether `steer_` and `score_` get a residual; in the decoder of a serving engine they do.
        layers: number of layers of the bank; launches that decide write to all of them.
    """

    weight_dtype: torch.dtype | None = None
    bank_dtype: torch.dtype = torch.float32
    stacks: Iterable[int] = (1,)
    kinds: Iterable[Kinds] = tuple(Kinds)
    norms: Iterable[Norm] = (Norm.LLAMA,)
    pairs: Iterable[bool] = (False, True)
    layers: int = 32

    def __post_init__(self) -> None:
        for name in ("stacks", "kinds", "norms", "pairs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for stack in self.stacks:
            if not 0 <= stack <= MAX_STACK:
                raise ValueError(f"stacks: expected numbers from 0 to {MAX_STACK}, got {stack}")


def warmup(
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str | None = None,
    **variants: Any,
) -> int:
    """Compile and load every kernel variant that a model of this shape launches, on a device.

    The variants depend on these arguments alone, never on the number of rows, sequences or slots. Two kinds of rows are
    compiled when they first appear: rows with gaps, and rows that start between multiples of 16 bytes.

    Args:
        hidden_size: H of the model.
        dtype: of the residual stream.
        device: default CUDA where there is one; on other devices there is nothing to compile.
        variants: fields of `Variants`.

    Returns:
        The number of launched variants; 0 on a device that is not CUDA.

    Raises:
        ValueError: a stack is out of range.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = Variants(**variants)
    if device.type != "cuda":
        return 0
    count = sum(_launch(hidden_size, dtype, device, wanted, stack) for stack in wanted.stacks)
    torch.cuda.synchronize(device)
    return count


def _launch(hidden_size: int, dtype: torch.dtype, device: torch.device, wanted: Variants, stack: int) -> int:
    """Launch each variant of this stack once, on one row that has no slot; return their number."""
    x, residual = torch.zeros(2, 1, hidden_size, dtype=dtype, device=device).unbind()
    weight = torch.ones(hidden_size, dtype=wanted.weight_dtype or dtype, device=device)
    vectors, directions = torch.zeros(2, 1, hidden_size, dtype=wanted.bank_dtype, device=device).unbind()
    tables = torch.zeros(wanted.layers, 1, TABLE_WIDTH, dtype=torch.float32, device=device)
    row, deciders, counted, slots = (
        torch.full(shape, -1, dtype=torch.int32, device=device) for shape in ((1,), (stack,), (stack, 3), (1, stack))
    )
    strength, last_scores = torch.zeros(2, stack, dtype=torch.float32, device=device).unbind()
    scores, values = torch.zeros(2, wanted.layers, stack, dtype=torch.float32, device=device).unbind()
    sums = torch.zeros(wanted.layers, stack, dtype=torch.float64, device=device)
    scales = torch.zeros(wanted.layers, 1, stack, dtype=torch.float32, device=device)
    read = (row, row, counted, deciders, strength, directions, directions, tables, scales[0], last_scores)
    gates = GateOperands(*read, sums, scores, values, scales)
    each = [Operands(slots, scales[0], vectors, directions, tables[0], int(kinds)) for kinds in wanted.kinds]
    forms = (None, gates) if stack else (None,)
    count = 0
    for operands, norm, form in product(each, wanted.norms, forms):
        add_steer_rms_norm_triton(x, residual, weight, operands, 1e-6, int(norm), form)
        count += 1
    for pair in wanted.pairs if stack else ():
        second = residual if pair else None
        score_triton_(x, second, gates)
        for operands, form in product(each, forms):
            steer_triton_(x, second, operands, form)
        count += 1 + len(each) * len(forms)
    return count

"""Compile ahead what serving will launch, so that no request ever waits for a compiler."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch

from .add_steer_rms_norm import add_steer_rms_norm_prompt_triton, add_steer_rms_norm_triton
from .contract import MAX_STACK, TABLE_WIDTH, GateOperands, Kinds, Norm, Operands
from .gate import gate_triton_
from .steer import steer_triton_

__all__ = ["warmup"]


def warmup(
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str | None = None,
    weight_dtype: torch.dtype | None = None,
    bank_dtype: torch.dtype = torch.float32,
    stacks: Iterable[int] = (1,),
    kinds: Iterable[Kinds] = tuple(Kinds),
    norms: Iterable[Norm] = (Norm.LLAMA,),
    pairs: Iterable[bool] = (False, True),
) -> int:
    """Compile and load every kernel variant that a model of this shape launches, on a device.

    What is compiled depends on these arguments alone, never on the number of rows, sequences or slots. Rows that are
    strided or start between multiples of 16 bytes are variants of their own, compiled when they first appear.

    Args:
        hidden_size: H of the model.
        dtype: of the residual stream.
        device: where, default CUDA where there is one; elsewhere there is nothing to compile.
        weight_dtype: of the norm's weight, default `dtype`.
        bank_dtype: of vectors and directions; the default is that of a bank.
        stacks: numbers K of slots per row, from 0 (no steering) to 4.
        kinds, norms: which of them the launches will name.
        pairs: whether `steer_` and `gate_` will be given a residual: in the decoder of a serving engine they are.

    Returns:
        The number of variants launched; 0 on a device that is not CUDA.

    Raises:
        ValueError: a stack is out of range.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stacks, kinds, norms, pairs = tuple(stacks), tuple(kinds), tuple(norms), tuple(pairs)
    for stack in stacks:
        if not 0 <= stack <= MAX_STACK:
            raise ValueError(f"stacks: expected numbers from 0 to {MAX_STACK}, got {stack}")
    if device.type != "cuda":
        return 0
    count = 0
    x, residual = torch.zeros(2, 1, hidden_size, dtype=dtype, device=device).unbind()
    weight = torch.ones(hidden_size, dtype=weight_dtype or dtype, device=device)
    vectors, directions = torch.zeros(2, 1, hidden_size, dtype=bank_dtype, device=device).unbind()
    table = torch.zeros(1, TABLE_WIDTH, device=device)
    row = torch.full((1,), -1, dtype=torch.int32, device=device)
    for stack in stacks:
        rows = torch.full((1, 1 + stack), -1, dtype=torch.int32, device=device)
        slot = torch.full((1, stack), -1, dtype=torch.int32, device=device)
        values, strength, scores = torch.zeros(3, 1, stack, device=device).unbind()
        each = [Operands(rows, values, strength, vectors, directions, table, int(kind)) for kind in kinds]
        for operands, norm in product(each, norms):
            add_steer_rms_norm_triton(x, residual, weight, operands, 1e-6, int(norm))
            count += 1
        if stack == 0:
            continue
        for operands, norm in product(each, norms):
            if operands.kinds == Kinds.ANY:
                add_steer_rms_norm_prompt_triton(x, residual, weight, operands, row, scores, 1e-6, int(norm))
                count += 1
        for pair in pairs:
            second = residual if pair else None
            gate_triton_(x, second, row, GateOperands(slot, directions, table, scores, values))
            for operands in each:
                steer_triton_(x, second, operands)
            count += 1 + len(each)
    torch.cuda.synchronize(device)
    return count

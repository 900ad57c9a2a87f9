"""The prompt gate: one score and one gate value per sequence, from the row that decides for it.

Numerics contract, for sequence ``i`` with ``s = slot[i] >= 0``, ``x = x[row[i]]`` and ``d = directions[s]``:

    <x, d>, <x, x>   products and sums in float32, whatever the dtypes of x and d; the order of a sum is the
                     implementation's own
    score            DOT: <x, d>.  COSINE: <x, d> / sqrt(<x, x>), and 0 where <x, x> is 0
    value            sharpness == 0: 1 if score > threshold else 0.
                     Otherwise sigmoid(sharpness * (score - threshold)).
                     A NaN counts as fired, hard or soft: value 1

Sequences with ``slot[i] == -1`` get score 0 and value 0, and nothing of theirs is read. A row whose <x, x>
leaves the range of float32 (norms above 1.8e19) has no meaningful cosine.

Same row, same bits, in any batch and at any position of it: in C++, and in Triton where rows start at
multiples of 16 bytes. Plain torch does not promise it: how it vectorises a sum or a sigmoid depends on the
batch, so there a last bit may change.

DOT at the prompt's last token: InferAligner (Wang et al., EMNLP 2024, section 3), whose bias is the threshold
with the other sign. COSINE with a threshold: CAST (Lee et al., ICLR 2025).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .contract import (
    MAX_HIDDEN_SIZE,
    SHARPNESS,
    TABLE_WIDTH,
    THRESHOLD,
    Score,
    check_choice,
    check_like,
    check_rows,
    check_table,
    library,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = ["LaunchShape", "gate", "gate_torch", "gate_triton", "launch_shape", "reference"]


# ---- reference ---------------------------------------------------------------------------------------------


def reference_value(score: torch.Tensor, threshold: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """Gate values for float64 scores, thresholds and sharpnesses of one shape."""
    soft = torch.sigmoid(sharpness * (score - threshold))
    value = torch.where(sharpness == 0, (score > threshold).double(), soft)
    return torch.where(torch.isnan(score), 1.0, value)


def reference_score(x: torch.Tensor, direction: torch.Tensor, score: int) -> torch.Tensor:
    """Score of one float64 row [H] against one float64 direction [H]."""
    dot = x @ direction
    if score == Score.DOT:
        return dot
    norm = x.norm()
    return dot * 0.0 if norm == 0 else dot / norm


def reference(
    x: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    score: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`gate` means, one sequence after the other, on the CPU in float64."""
    scores, values = torch.zeros(2, len(row), dtype=torch.float64).unbind()
    for i, (r, s) in enumerate(zip(row.tolist(), slot.tolist(), strict=True)):
        if s < 0:
            continue
        columns = table[s].double().cpu()
        scores[i] = reference_score(x[r].double().cpu(), directions[s].double().cpu(), score)
        values[i] = reference_value(scores[i], columns[THRESHOLD], columns[SHARPNESS])
    return scores, values


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:
    _COSINE = tl.constexpr(int(Score.COSINE))
    _THRESHOLD = tl.constexpr(THRESHOLD)
    _SHARPNESS = tl.constexpr(SHARPNESS)
    _TABLE_WIDTH = tl.constexpr(TABLE_WIDTH)

    @triton.jit
    def row_score(x, d, SCORE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Score of the float32 row x against the float32 direction d; padding must be zero in both."""
        score = tl.sum(x * d, axis=0)
        if SCORE == _COSINE:
            square = tl.sum(x * x, axis=0)
            score = tl.where(square == 0.0, 0.0, tl.div_rn(score, tl.sqrt_rn(square)))
        return score

    @triton.jit
    def gate_value(score, columns):  # type: ignore[no-untyped-def]
        """Gate value of a score; `columns` points to the slot's row of the table."""
        threshold = tl.load(columns + _THRESHOLD)
        sharpness = tl.load(columns + _SHARPNESS)
        one = tl.full((), 1.0, tl.float32)
        hard = tl.where(score <= threshold, 0.0, one)
        soft = one / (one + tl.exp(-sharpness * (score - threshold)))
        value = tl.where(sharpness == 0.0, hard, soft)
        return tl.where(value == value, value, one)

    @triton.jit
    def _gate_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        row_ptr,
        slot_ptr,
        directions_ptr,
        table_ptr,
        scores_ptr,
        values_ptr,
        row_stride,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        SCORE: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)
        slot = tl.load(slot_ptr + sequence).to(tl.int64)
        if slot < 0:
            tl.store(scores_ptr + sequence, 0.0)
            tl.store(values_ptr + sequence, 0.0)
            return
        row = tl.load(row_ptr + sequence)
        columns = tl.arange(0, BLOCK)
        # A stride known to the compiler keeps 16-byte loads even where H is odd.
        x_row = x_ptr + row * (H if CONTIGUOUS else row_stride)
        x = tl.load(x_row + columns, mask=columns < H, other=0.0).to(tl.float32)
        d = tl.load(directions_ptr + slot * H + columns, mask=columns < H, other=0.0).to(tl.float32)
        score = row_score(x, d, SCORE)
        tl.store(scores_ptr + sequence, score)
        tl.store(values_ptr + sequence, gate_value(score, table_ptr + slot * _TABLE_WIDTH))


@dataclass(frozen=True)
class LaunchShape:
    """How a GPU program holds a row: `block` columns (a power of two) over `num_warps` warps."""

    block: int
    num_warps: int


def launch_shape(hidden_size: int, dtype: torch.dtype) -> LaunchShape:
    """The launch shape of a row of ``hidden_size`` numbers, from that and its dtype alone.

    It never depends on the number of rows, so the same row gives the same bits in every batch. A thread takes
    32 bytes (two 16-byte accesses per tensor); 4 warps at least, so that a short row still hides its latency.
    """
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden_size: expected 1 to {MAX_HIDDEN_SIZE}, got {hidden_size}")
    block = 1 << (hidden_size - 1).bit_length()
    return LaunchShape(block, min(max(block * dtype.itemsize // 1024, 4), 32))


def on_device(x: torch.Tensor) -> Any:
    """Context in which a launch goes to the device of ``x`` (Triton takes the current one)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def gate_triton(
    x: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    score: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gate` as a Triton kernel, one program per sequence. Arguments are taken as checked."""
    scores, values = _outputs(row)
    if len(row):
        shape = launch_shape(x.shape[1], x.dtype)
        with on_device(x):
            _gate_kernel[(len(row),)](
                x,
                row,
                slot,
                directions,
                table,
                scores,
                values,
                x.stride(0),
                H=x.shape[1],
                BLOCK=shape.block,
                CONTIGUOUS=x.is_contiguous(),
                SCORE=score,
                num_warps=shape.num_warps,
                enable_fp_fusion=False,
            )
    return scores, values


# ---- torch -------------------------------------------------------------------------------------------------


def torch_gate_value(rows: torch.Tensor, d: torch.Tensor, columns: torch.Tensor, score: int) -> Any:
    """Scores and gate values [n] of float32 rows and directions [n, H] and table rows [n, TABLE_WIDTH]."""
    scores = (rows * d).sum(-1)
    if score == Score.COSINE:
        square = (rows * rows).sum(-1)
        scores = torch.where(square == 0, 0.0, scores / square.sqrt())
    threshold, sharpness = columns[:, THRESHOLD], columns[:, SHARPNESS]
    hard = torch.where(scores <= threshold, 0.0, 1.0)
    soft = torch.sigmoid(sharpness * (scores - threshold))
    values = torch.where(sharpness == 0, hard, soft)
    return scores, torch.where(values.isnan(), 1.0, values)


def gate_torch(
    x: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    score: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gate` in plain torch, for any device, without a synchronisation; arguments taken as checked."""
    if not len(row):
        return _outputs(row)
    steered = slot >= 0
    rows = x.index_select(0, torch.where(steered, row, 0)).float()
    index = torch.where(steered, slot, 0)
    d = directions.index_select(0, index).float()
    scores, values = torch_gate_value(rows, d, table.index_select(0, index), score)
    return torch.where(steered, scores, 0.0), torch.where(steered, values, 0.0)


# ---- registration ------------------------------------------------------------------------------------------


def _outputs(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return row.new_empty(row.shape, dtype=torch.float32), row.new_empty(row.shape, dtype=torch.float32)


def _gate_fake(
    x: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    score: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(row)


library.define(
    "gate(Tensor x, Tensor row, Tensor slot, Tensor directions, Tensor table, int score) -> (Tensor, Tensor)"
)
library.impl("gate", gate_torch, "CompositeExplicitAutograd")  # the C++ extension registers itself for CPU
if triton is not None:
    library.impl("gate", gate_triton, "CUDA")
torch.library.register_fake("steerfast::gate", _gate_fake, lib=library)


# ---- public ------------------------------------------------------------------------------------------------


def gate(
    x: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    score: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the deciding row of each sequence and say how far its gate opens.

    ``torch.ops.steerfast.gate`` is the same op without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, the row stride free.
        row: [n] int64, the deciding row of each sequence; outside x: an error on a CPU, undefined on a GPU.
        slot: [n] int32, the slot of each sequence; -1: not steered, its row is not read.
        directions: [slots, H] float32, bfloat16 or float16, unit norm by convention.
        table: [slots, TABLE_WIDTH] float32, see :mod:`.contract`.
        score: :class:`Score`.

    Returns:
        Scores [n] and gate values [n] from 0 to 1, float32.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong; the message names the argument.
    """
    check_rows(x)
    check_table(x, table, directions=directions)
    check_like("row", row, (row.numel(),), (torch.int64,), x.device)
    check_like("slot", slot, (row.numel(),), (torch.int32,), x.device)
    if x.shape[0] == 0 and row.numel() > 0:
        raise ValueError(f"x: expected at least one row for {row.numel()} sequences, got none")
    return torch.ops.steerfast.gate.default(x, row, slot, directions, table, check_choice("score", score, Score))

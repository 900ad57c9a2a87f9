"""The edit: steered rows of the residual stream are changed in place, all other rows are left alone.

Numerics contract, for a row ``x = x[r]`` with ``s = slot[r] >= 0``, ``q = sequence[r]``, ``v = vectors[s]``:

    g       LATCHED: values[q].  TOKEN: the gate value of the row itself, as :mod:`.gate` defines it
    alpha   table[s, STRENGTH] * strength[q]
    y       a*x + b*v + c*d, where the edit gives the coefficients.  ADD: a = 1, b = g*alpha, c = 0

All arithmetic is float32; every product and every sum is rounded (no fused multiply-add anywhere), and y is
rounded once to the dtype of x. LATCHED ADD takes no sum over the row, so its bits are the same in Triton, C++
and torch, NaN payloads aside. (Triton's interpreter truncates to bfloat16 where the GPU rounds.)

A row with ``slot[r] == -1`` is neither read nor written. Neither is one whose gate is shut (g == 0) or whose
b is 0, except that TOKEN must read the row to know. Their bits stay, whatever they are, and nothing of
another row, slot or sequence can leak into them. (Plain torch writes them back as they were.)

ADD with a gate per sequence: InferAligner (Wang et al., EMNLP 2024, section 3).
"""

from __future__ import annotations

import torch

from .contract import (
    SHARPNESS,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    Edit,
    GateMode,
    Score,
    check_choice,
    check_like,
    check_rows,
    check_table,
    library,
)
from .gate import launch_shape, on_device, reference_score, reference_value, torch_gate_value

try:
    import triton
    import triton.language as tl

    from .gate import gate_value, row_score
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = ["reference", "steer_", "steer_torch_", "steer_triton_"]


# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    slot: torch.Tensor,
    sequence: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    gate_mode: int = GateMode.LATCHED,
    score: int = Score.COSINE,
    edit: int = Edit.ADD,
) -> torch.Tensor:
    """What :func:`steer_` means, one row after the other, on the CPU: the rows edited, float64 [rows, H]."""
    y = x.double().cpu().clone()
    for r, (s, q) in enumerate(zip(slot.tolist(), sequence.tolist(), strict=True)):
        if s < 0:
            continue
        columns = table[s].double().cpu()
        if gate_mode == GateMode.TOKEN:
            own = reference_score(y[r], directions[s].double().cpu(), score)
            g = reference_value(own, columns[THRESHOLD], columns[SHARPNESS])
        else:
            g = values[q].double().cpu()
        b = g * columns[STRENGTH] * strength[q].double().cpu()
        if g != 0 and b != 0:
            y[r] += b * vectors[s].double().cpu()
    return y


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:
    _TOKEN = tl.constexpr(int(GateMode.TOKEN))
    _ADD = tl.constexpr(int(Edit.ADD))
    _STRENGTH = tl.constexpr(STRENGTH)
    _TABLE_WIDTH = tl.constexpr(TABLE_WIDTH)

    @triton.jit
    def coefficients(EDIT: tl.constexpr, gate, strength):  # type: ignore[no-untyped-def]
        """b of y = x + b*v: all that ADD needs. An edit with another a or c returns them from here."""
        tl.static_assert(EDIT == _ADD, "unknown edit")
        return gate * strength

    @triton.jit
    def _steer_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        slot_ptr,
        sequence_ptr,
        values_ptr,
        strength_ptr,
        vectors_ptr,
        directions_ptr,
        table_ptr,
        row_stride,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        GATE_MODE: tl.constexpr,
        SCORE: tl.constexpr,
        EDIT: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot < 0:
            return
        sequence = tl.load(sequence_ptr + row).to(tl.int64)
        slot_columns = table_ptr + slot * _TABLE_WIDTH
        strength = tl.load(slot_columns + _STRENGTH) * tl.load(strength_ptr + sequence)
        columns = tl.arange(0, BLOCK)
        inside = columns < H
        # A stride known to the compiler keeps 16-byte loads even where H is odd.
        x_row = x_ptr + row * (H if CONTIGUOUS else row_stride) + columns
        if GATE_MODE == _TOKEN:
            x = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(directions_ptr + slot * H + columns, mask=inside, other=0.0).to(tl.float32)
            gate = gate_value(row_score(x, d, SCORE), slot_columns)
        else:
            gate = tl.load(values_ptr + sequence)
        b = coefficients(EDIT, gate, strength)
        if (gate != 0.0) & (b != 0.0):
            if GATE_MODE != _TOKEN:
                x = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(vectors_ptr + slot * H + columns, mask=inside, other=0.0).to(tl.float32)
            if NVIDIA:
                # Triton 3.6 fuses b * v with the sum on sm_100 and sm_120 in spite of enable_fp_fusion=False
                # (libdevice.mul_rn would prevent it too, but flushes denormals).
                shift = tl.inline_asm_elementwise(
                    "mul.rn.f32 $0, $1, $2;", "=f,f,f", [b, v], dtype=tl.float32, is_pure=True, pack=1
                )
            else:
                shift = b * v
            tl.store(x_row, (x + shift).to(x_ptr.dtype.element_ty), mask=inside)


def steer_triton_(
    x: torch.Tensor,
    slot: torch.Tensor,
    sequence: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    gate_mode: int,
    score: int,
    edit: int,
) -> None:
    """:func:`steer_` as a Triton kernel, one program per row. Arguments are taken as checked."""
    rows, hidden_size = x.shape
    if not rows:
        return
    shape = launch_shape(hidden_size, x.dtype)
    with on_device(x):
        _steer_kernel[(rows,)](
            x,
            slot,
            sequence,
            values,
            strength,
            vectors,
            directions,
            table,
            x.stride(0),
            H=hidden_size,
            BLOCK=shape.block,
            CONTIGUOUS=x.is_contiguous(),
            GATE_MODE=gate_mode,
            SCORE=score,
            EDIT=edit,
            NVIDIA=x.is_cuda and torch.version.hip is None,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )


# ---- torch -------------------------------------------------------------------------------------------------


def torch_coefficients(edit: int, gate: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """b [rows] of y = x + b*v: all that ADD needs. An edit with another a or c returns them from here."""
    if edit != Edit.ADD:
        raise ValueError(f"edit: expected ADD (0), got {edit}")
    return gate * strength


def steer_torch_(
    x: torch.Tensor,
    slot: torch.Tensor,
    sequence: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    gate_mode: int,
    score: int,
    edit: int,
) -> None:
    """:func:`steer_` in plain torch, on any device, without a synchronisation; arguments taken as checked."""
    if not len(x) or not len(values):  # without a sequence every slot is -1
        return
    steered = slot >= 0
    index = torch.where(steered, slot, 0)
    owner = torch.where(steered, sequence, 0)
    columns = table.index_select(0, index)
    rows = x.float()
    if gate_mode == GateMode.TOKEN:
        d = directions.index_select(0, index).float()
        gate = torch_gate_value(rows, d, columns, score)[1]
    else:
        gate = values.index_select(0, owner)
    b = torch_coefficients(edit, gate, columns[:, STRENGTH] * strength.index_select(0, owner))
    y = rows + b[:, None] * vectors.index_select(0, index).float()
    # Rows that stay are copied bit by bit: finding the others first would make the CPU wait for the device.
    x.copy_(torch.where((steered & (gate != 0) & (b != 0))[:, None], y.to(x.dtype), x))


# ---- registration ------------------------------------------------------------------------------------------


def _steer_fake(
    x: torch.Tensor,
    slot: torch.Tensor,
    sequence: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    gate_mode: int,
    score: int,
    edit: int,
) -> None:
    return None


library.define(
    "steer_(Tensor(a!) x, Tensor slot, Tensor sequence, Tensor values, Tensor strength, Tensor vectors, "
    "Tensor directions, Tensor table, int gate_mode, int score, int edit) -> ()"
)
library.impl("steer_", steer_torch_, "CompositeExplicitAutograd")  # the C++ extension registers itself for CPU
if triton is not None:
    library.impl("steer_", steer_triton_, "CUDA")
torch.library.register_fake("steerfast::steer_", _steer_fake, lib=library)


# ---- public ------------------------------------------------------------------------------------------------


def steer_(
    x: torch.Tensor,
    slot: torch.Tensor,
    sequence: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    gate_mode: int = GateMode.LATCHED,
    score: int = Score.COSINE,
    edit: int = Edit.ADD,
) -> None:
    """Steer the rows of ``x`` in place.

    The op has no backward pass: gradients pass through it unchanged, and none flows through a gate.
    ``torch.ops.steerfast.steer_`` is the same op without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, rows apart from each other.
            No other argument may share its memory.
        slot: [rows] int32, the slot of each row; -1: not steered.
        sequence: [rows] int32, each row's index in ``values`` and ``strength``; not read where slot
            is -1. A slot or sequence out of range is an error on a CPU and undefined on a GPU.
        values: [n] float32, latched gate values from 0 to 1; not read with TOKEN.
        strength: [n] float32, multiplier per sequence.
        vectors: [slots, H] float32, bfloat16 or float16, in units of the residual stream.
        directions: [slots, H], dtype of ``vectors``, unit norm by convention; read with TOKEN alone.
        table: [slots, TABLE_WIDTH] float32, see :mod:`.contract`.
        gate_mode: :class:`GateMode`.
        score: :class:`Score`, read with TOKEN alone.
        edit: :class:`Edit`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong; the message names the argument.
    """
    check_rows(x)
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"x: expected rows that do not overlap, got strides {list(x.stride())}")
    check_table(x, table, vectors=vectors, directions=directions)
    if directions.dtype != vectors.dtype:
        raise TypeError(f"directions: expected the dtype of vectors, {vectors.dtype}, got {directions.dtype}")
    device, rows, sequences = x.device, x.shape[:1], (values.numel(),)
    check_like("slot", slot, rows, (torch.int32,), device)
    check_like("sequence", sequence, rows, (torch.int32,), device)
    check_like("values", values, sequences, (torch.float32,), device)
    check_like("strength", strength, sequences, (torch.float32,), device)
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)  # so that a backward pass that saved the old x says so
    torch.ops.steerfast.steer_.default(
        x,
        slot,
        sequence,
        values,
        strength,
        vectors,
        directions,
        table,
        check_choice("gate_mode", gate_mode, GateMode),
        check_choice("score", score, Score),
        check_choice("edit", edit, Edit),
    )

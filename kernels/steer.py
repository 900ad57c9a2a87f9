"""The edit in place: steered rows of the residual stream are displaced, all other rows are left alone.

Numerics contract, for row ``r``: ``y = x[r]`` in float32, displaced by each of the row's slots as :mod:`.edits`
defines, then rounded once to the dtype of x. Where the residual stream is kept as a pair (as serving engines keep
it: what the layer adds, and what it is added to), gates and sums read the sum of both, and the displacement lands on x.

A row without a slot that displaces it is not written; without a token gate or an edit that needs sums it is not read
either. So its bits stay, whatever they are, and nothing of another row, slot or sequence can leak into it. (Plain torch
writes it back as it was.) No gate is computed from another row here: in place, that row could already be edited.
"""

from __future__ import annotations

import torch

from .contract import (
    Kinds,
    check_apart,
    check_choice,
    check_operands,
    check_residual,
    check_rows,
    check_separate,
    library,
)
from .edits import reference_rows, reference_stream, torch_displaced, torch_stream
from .launch import Launcher, eager_cuda, launch_shape, layout, nvidia

try:
    import triton
    import triton.language as tl

    from .edits import _LATCHED_ADD, _TOKEN, displace, latched, load_row, scaled
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = ["reference", "steer_", "steer_torch_", "steer_triton_", "steer_unchecked_"]


# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    kinds: int = Kinds.ANY,
) -> torch.Tensor:
    """What :func:`steer_` leaves in x, float64 [rows, H] on the CPU, one row after the other."""
    s = reference_stream(x, residual)
    return reference_rows(x.double().cpu(), s, rows, values, strength, vectors, directions, table, kinds)


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit(do_not_specialize_on_alignment=["rows_ptr", "values_ptr", "strength_ptr", "table_ptr"])
    def steer_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        vectors_ptr,
        directions_ptr,
        rows_ptr,
        values_ptr,
        strength_ptr,
        table_ptr,
        x_stride,
        residual_stride,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        PAIR: tl.constexpr,
        KINDS: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        record = rows_ptr + row * (K + 1)
        sequence = tl.load(record).to(tl.int64)
        slots, kinds, gates, strengths = latched(record, sequence, True, values_ptr, strength_ptr, table_ptr, K)
        wanted = tl.full((), 0, tl.int1)
        for k in tl.static_range(K):
            wanted |= scaled(gates[k], strengths[k]) != 0.0
            if KINDS != _LATCHED_ADD:
                wanted |= kinds[k] == _TOKEN
        if wanted:
            columns = tl.arange(0, BLOCK)
            inside = columns < H
            y, changed = displace(
                load_row(x_ptr, row, x_stride, inside, columns, H, CONTIGUOUS),
                x_ptr,
                residual_ptr,
                row,
                x_stride,
                residual_stride,
                slots,
                kinds,
                gates,
                strengths,
                vectors_ptr,
                directions_ptr,
                table_ptr,
                inside,
                columns,
                H,
                K,
                CONTIGUOUS,
                PAIR,
                KINDS,
                NVIDIA,
            )
            if changed:
                at = x_ptr + row * (H if CONTIGUOUS else x_stride) + columns
                tl.store(at, y.to(x_ptr.dtype.element_ty), mask=inside)

    launch = Launcher(steer_kernel)


def steer_triton_(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    kinds: int,
) -> None:
    """:func:`steer_` as a Triton kernel, one program per row. Arguments are taken as checked."""
    count, hidden_size = x.shape
    stack = rows.shape[1] - 1
    if not count or not stack:
        return
    address, contiguous, strides = layout(x, residual)
    shape = launch_shape(hidden_size, x.dtype)
    launch(
        x,
        count,
        (x.dtype, vectors.dtype),
        (x, residual, vectors, directions, rows, values, strength, table),
        strides,
        (hidden_size, shape.block, stack, contiguous, residual is not None, kinds, nvidia(x)),
        shape,
        address | vectors.data_ptr() | directions.data_ptr(),
    )


# ---- torch -------------------------------------------------------------------------------------------------


def steer_torch_(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    kinds: int,
) -> None:
    """:func:`steer_` in plain torch, on any device, without a synchronisation; arguments taken as checked.

    Differentiable in x and residual; gates carry no gradient.
    """
    if not len(x):
        return
    before = x.clone() if torch.is_grad_enabled() and x.requires_grad else x  # sums keep it for the backward pass
    s = torch_stream(before, residual)
    y, changed = torch_displaced(before.float(), s, rows, values, strength, vectors, directions, table, kinds)
    x.copy_(torch.where(changed, y.to(x.dtype), before))


# ---- registration ------------------------------------------------------------------------------------------


def _fake(*arguments: object) -> None:
    return None


library.define(
    "steer_(Tensor(a!) x, Tensor? residual, Tensor rows, Tensor values, Tensor strength, Tensor vectors, "
    "Tensor directions, Tensor table, int kinds) -> ()"
)
# The C++ extension registers itself for CPU. Like it and Triton, plain torch leaves no trace for a backward pass.
library.impl("steer_", torch.no_grad()(steer_torch_), "CompositeExplicitAutograd")
if triton is not None:
    library.impl("steer_", steer_triton_, "CUDA")
torch.library.register_fake("steerfast::steer_", _fake, lib=library)


# ---- public ------------------------------------------------------------------------------------------------


def steer_(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    kinds: int = Kinds.ANY,
) -> None:
    """Steer the rows of ``x`` in place.

    The op has no backward pass: gradients pass through it unchanged, and none flows through a gate; see
    :func:`steer_torch_` for one that is differentiable. :func:`steer_unchecked_` is the same without the checks, for
    callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, rows apart from each other.
        residual: None, or rows like x that x is going to be added to; only read.
        rows: [rows, 1 + K] int32, K from 0 to 4: each row's index in ``values`` and ``strength``, then its slots; -1:
            none. A slot, or a used sequence, out of range is an error on a CPU and undefined on a GPU.
        values: [n, K] float32, latched gate values from 0 to 1.
        strength: [n, K] float32, multiplies the strengths of the slots.
        vectors: [slots, H] float32, bfloat16 or float16, in units of the residual stream.
        directions: [slots, H], dtype of ``vectors``, unit norm by convention; read by token gates and by ROTATE.
        table: [slots, TABLE_WIDTH] float32, see :mod:`.contract`.
        kinds: :class:`Kinds`. LATCHED_ADD treats every slot as one that adds by its latched value.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong, or x shares memory with another argument; the
            message names the argument.
    """
    check_rows(x)
    check_apart(x)
    if residual is not None:
        check_residual(x, residual)
    check_operands(x, rows, values, strength, vectors, directions, table)
    check_choice("kinds", kinds, Kinds)
    if not torch.compiler.is_compiling():
        read = {"residual": residual, "rows": rows, "values": values, "strength": strength}
        check_separate({"x": x}, {**read, "vectors": vectors, "directions": directions, "table": table})
        if x.requires_grad and torch.is_grad_enabled():
            torch.autograd.graph.increment_version(x)  # so that a backward pass that saved the old x says so
    torch.ops.steerfast.steer_.default(x, residual, rows, values, strength, vectors, directions, table, int(kinds))


def steer_unchecked_(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    values: torch.Tensor,
    strength: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    table: torch.Tensor,
    kinds: int,
) -> None:
    """:func:`steer_` for callers that own their buffers: no checks, and eager CUDA rows go to the kernel without the
    dispatcher.
    """
    run = steer_triton_ if eager_cuda(x) else torch.ops.steerfast.steer_.default
    run(x, residual, rows, values, strength, vectors, directions, table, kinds)

"""The edit in place: the op displaces steered rows of the residual stream and does not touch other rows.

Numerics contract, for row ``r``: ``y = x[r]`` in float32, displaced by each slot of the row as :mod:`.edits` defines,
then rounded once to the dtype of x. Serving engines keep the residual stream as a pair: x, which the layer adds, and
residual. There gates and sums read the sum of both, and the displacement is added to x.

A row that no slot displaces is not written. Without a token gate or an edit that takes sums it is not read either. So
its bits stay, and nothing of another row, slot or sequence leaks into it. (Plain torch writes the same bits back.) No
gate reads another row here: in place, that row could be edited already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .contract import (
    Operands,
    check_apart,
    check_operands,
    check_residual,
    check_rows,
    check_separate,
    library,
    tensors,
)
from .edits import reference_rows, reference_stream, torch_displaced, torch_stream
from .launch import Launcher, eager_cuda, launch_shape, layout, nvidia, reported

try:
    import triton
    import triton.language as tl

    from .edits import _LATCHED_ADD, _TOKEN, displace, latched, load_row, scaled
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = ["reference", "steer_", "steer_torch_", "steer_triton_", "steer_unchecked_"]


# ---- reference ---------------------------------------------------------------------------------------------


def reference(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands) -> torch.Tensor:
    """Return the rows that :func:`steer_` leaves in x, float64 [rows, H] on the CPU, row by row."""
    s = reference_stream(x, residual)
    return reference_rows(x.double().cpu(), s, operands)


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


def steer_triton_(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands) -> None:
    """Run :func:`steer_` as a Triton kernel, one program per row, without checks."""
    if launch.repeat(operands, x, residual):
        return
    rows, values, strength, vectors, directions, table, kinds = operands
    count, hidden_size = x.shape
    stack = rows.shape[1] - 1
    if not count or not stack:
        return
    address, contiguous, strides = layout(x, residual)
    shape = launch_shape(hidden_size, x.dtype)
    launch(
        x,
        count,
        operands,
        (x, residual, vectors, directions, rows, values, strength, table),
        strides,
        (hidden_size, shape.block, stack, contiguous, residual is not None, kinds, nvidia(x)),
        shape,
        address | vectors.data_ptr() | directions.data_ptr(),
    )


# ---- torch -------------------------------------------------------------------------------------------------


def steer_torch_(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands) -> None:
    """Run :func:`steer_` in plain torch, on any device, without a synchronisation and without checks.

    Differentiable in x and residual; gates carry no gradient.
    """
    if not len(x):
        return
    before = x.clone() if torch.is_grad_enabled() and x.requires_grad else x  # the backward pass of sums needs it
    s = torch_stream(before, residual)
    y, changed = torch_displaced(before.float(), s, operands)
    x.copy_(torch.where(changed, y.to(x.dtype), before))


# ---- registration ------------------------------------------------------------------------------------------


def _flat(run: Callable[[torch.Tensor, torch.Tensor | None, Operands], None]) -> Callable[..., None]:
    """Adapt `run` to the op's schema, which is flat."""
    return lambda x, residual, *operands: run(x, residual, Operands(*operands))


def _fake(*arguments: object) -> None:
    return None


library.define(
    "steer_(Tensor(a!) x, Tensor? residual, Tensor rows, Tensor values, Tensor strength, Tensor vectors, "
    "Tensor directions, Tensor table, int kinds) -> ()"
)
# The C++ extension registers itself for CPU. Plain torch records no backward pass here, as C++ and Triton do not.
library.impl("steer_", torch.no_grad()(_flat(steer_torch_)), "CompositeExplicitAutograd")
if triton is not None:
    library.impl("steer_", _flat(steer_triton_), "CUDA")
torch.library.register_fake("steerfast::steer_", _fake, lib=library)
_op = torch.ops.steerfast.steer_.default


# ---- public ------------------------------------------------------------------------------------------------


def steer_(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands) -> None:
    """Steer the rows of ``x`` in place.

    The op has no backward pass: gradients pass through it unchanged. :func:`steer_torch_` is differentiable.
    :func:`steer_unchecked_` does the same without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, rows apart from each other.
        residual: None, or rows like x, to which x will be added; only read.
        operands: how the rows are edited, see :class:`.contract.Operands`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong, or x shares memory with another argument; the
            message names the argument.
    """
    check_rows(x)
    check_apart(x)
    if residual is not None:
        check_residual(x, residual)
    check_operands(x, operands)
    if not torch.compiler.is_compiling():
        check_separate({"x": x}, {"residual": residual, **tensors(operands)})
        if x.requires_grad and torch.is_grad_enabled():
            torch.autograd.graph.increment_version(x)  # a backward pass that saved the old x then raises
    torch.ops.steerfast.steer_.default(x, residual, *operands)


@reported
def steer_unchecked_(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands) -> None:
    """Run :func:`steer_` without checks; eager CUDA rows go to the kernel without the dispatcher."""
    if eager_cuda(x, residual, operands):
        steer_triton_(x, residual, operands)
    else:
        _op(x, residual, *operands)

"""The edit in place: the op displaces steered rows of the residual stream and does not touch other rows.

Numerics contract, for row ``r``: ``y = x[r]`` in float32, displaced by each slot of the row as :mod:`.edits` defines,
then rounded once to the dtype of x. Serving engines keep the residual stream as a pair: x, which the layer adds, and
residual. There gates and sums read the sum of both, and the displacement is added to x.

A row that no slot displaces is not written. A row without a scale is not read either. So its bits stay, and nothing of
another row, slot or sequence leaks into it. (Plain torch writes the same bits back.)

The deciding form decides gates first, as :mod:`.gate` defines. No program reads another row: in place, that row could
be edited already. So gates read the scores that ``score_`` left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .contract import (
    GateOperands,
    Operands,
    check_apart,
    check_decisions,
    check_gates,
    check_operands,
    check_residual,
    check_rows,
    library,
    needs_gradient,
    tensors,
)
from .edits import reference_rows, reference_stream, torch_displaced, torch_stream
from .gate import DECIDING, decided_operands, deciding_arguments, flat_gates, unflat
from .launch import Launcher, eager_cuda, launch_shape, layout, nvidia, reported

try:
    import triton
    import triton.language as tl

    from .edits import displace, load_row, records
    from .gate import GATE_NUMBERS, SCALARS, decided_scales
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

    @triton.jit(do_not_specialize=GATE_NUMBERS, do_not_specialize_on_alignment=SCALARS)
    def steer_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        vectors_ptr,
        directions_ptr,
        slots_ptr,
        scales_ptr,
        table_ptr,
        sequence_ptr,
        deciding_ptr,
        counted_ptr,
        decider_slots_ptr,
        strength_ptr,
        tables_ptr,
        row_scores_ptr,
        last_scores_ptr,
        sums_ptr,
        scores_ptr,
        values_ptr,
        all_scales_ptr,
        x_stride,
        residual_stride,
        layer,
        layers,
        deciders,
        table_rows,
        scale_rows,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        PAIR: tl.constexpr,
        KINDS: tl.constexpr,
        LAYERS: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        slots, scales = records(slots_ptr, scales_ptr, row, K)
        if LAYERS:
            gates = (
                sequence_ptr,
                deciding_ptr,
                counted_ptr,
                decider_slots_ptr,
                strength_ptr,
                tables_ptr,
                row_scores_ptr,
                last_scores_ptr,
                sums_ptr,
                scores_ptr,
                values_ptr,
                all_scales_ptr,
            )
            scales = decided_scales(
                row, slots, scales, gates, layer, layers, deciders, table_rows, scale_rows, K, LAYERS
            )
        wanted = tl.full((), 0, tl.int1)
        for k in tl.static_range(K):
            wanted |= scales[k] != 0.0
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
                scales,
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
    x: torch.Tensor, residual: torch.Tensor | None, operands: Operands, gates: GateOperands | None = None
) -> None:
    """Run :func:`steer_` as a Triton kernel, one program per row, without checks."""
    if launch.repeat(site := operands if gates is None else (*operands, *gates), x, residual):
        return
    slots, scales, vectors, directions, table, kinds = operands
    count, hidden_size = x.shape
    stack = slots.shape[1]
    if not count or not stack:
        return
    address, contiguous, strides = layout(x, residual)
    shape = launch_shape(hidden_size, x.dtype)
    pointers, sizes, layers = deciding_arguments(gates)
    launch(
        x,
        count,
        site,
        (x, residual, vectors, directions, slots, scales, table, *pointers),
        (*strides, *sizes),
        (hidden_size, shape.block, stack, contiguous, residual is not None, kinds, layers, nvidia(x)),
        shape,
        address | vectors.data_ptr() | directions.data_ptr(),
    )


# ---- torch -------------------------------------------------------------------------------------------------


def steer_torch_(
    x: torch.Tensor, residual: torch.Tensor | None, operands: Operands, gates: GateOperands | None = None
) -> None:
    """Run :func:`steer_` in plain torch, on any device, without a synchronisation and without checks.

    Differentiable in x, residual and operands, whose table is taken as given; gates carry no gradient.
    """
    if not len(x):
        return
    operands = decided_operands(operands, gates)
    before = x.clone() if needs_gradient(x, residual, *operands) else x  # the backward pass of sums needs it
    s = torch_stream(before, residual)
    y, changed = torch_displaced(before.float(), s, operands)
    x.copy_(torch.where(changed, y.to(x.dtype), before))


# ---- registration ------------------------------------------------------------------------------------------


def _flat(run: Callable[..., None]) -> Callable[..., None]:
    """Adapt `run` to the op's schema, which is flat."""
    return lambda x, residual, *operands: run(x, residual, Operands(*operands))


def _flat_deciding(run: Callable[..., None]) -> Callable[..., None]:
    """Adapt `run` to the schema of the overload ``deciding``."""
    return lambda x, residual, *flat: run(x, residual, *unflat(*flat))


def _fake(*arguments: object) -> None:
    return None


library.define(
    "steer_(Tensor(a!) x, Tensor? residual, Tensor slots, Tensor scales, Tensor vectors, Tensor directions, "
    "Tensor table, int kinds) -> ()"
)
library.define(
    "steer_.deciding(Tensor(a!) x, Tensor? residual, Tensor slots, Tensor vectors, Tensor directions, Tensor table, "
    f"int kinds, {DECIDING}) -> ()"
)
for _name, _adapt in (("steer_", _flat), ("steer_.deciding", _flat_deciding)):
    # The C++ extension registers itself for CPU. Plain torch records no backward pass here, as C++ and Triton do not.
    library.impl(_name, torch.no_grad()(_adapt(steer_torch_)), "CompositeExplicitAutograd")
    if triton is not None:
        library.impl(_name, _adapt(steer_triton_), "CUDA")
    torch.library.register_fake(f"steerfast::{_name}", _fake, lib=library)


# Looked up once: the look-up takes a tenth of a call on a CPU.
_plain, _deciding = torch.ops.steerfast.steer_.default, torch.ops.steerfast.steer_.deciding


def _op(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands, gates: GateOperands | None) -> None:
    if gates is None:
        _plain(x, residual, *operands)
    else:
        slots, _, *bank = operands
        _deciding(x, residual, slots, *bank, *flat_gates(gates))


# ---- public ------------------------------------------------------------------------------------------------


def steer_(
    x: torch.Tensor, residual: torch.Tensor | None, operands: Operands, gates: GateOperands | None = None
) -> None:
    """Steer the rows of ``x`` in place; decide gates first where there are any.

    The op has no backward pass: gradients of rows pass through it unchanged. :func:`steer_torch_` is differentiable;
    where autograd needs the gradient of an operand, that runs.
    :func:`steer_unchecked_` does the same without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, rows apart from each other.
        residual: None, or rows like x, to which x will be added; only read.
        operands: how the rows are edited, see :class:`.contract.Operands`.
        gates: the gates of this layer, whose rows `score_` has scored; None: no gate decides. With gates, the scales of
            `operands` are ``gates.scales[layer, :rows]``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong, or x or a decision shares memory with another argument;
            the message names the argument.
    """
    check_rows(x)
    check_apart(x)
    if residual is not None:
        check_residual(x, residual)
    check_operands(x, operands)
    if gates is not None:
        check_gates(x, gates, operands)
    differentiable = needs_gradient(*operands)
    if not torch.compiler.is_compiling():
        check_decisions({"x": x}, {"residual": residual, **tensors(operands)}, gates)
        if not differentiable and needs_gradient(x):
            torch.autograd.graph.increment_version(x)  # a backward pass that saved the old x then raises
    if differentiable:
        steer_torch_(x, residual, operands, gates)
    else:
        _op(x, residual, operands, gates)


@reported
def steer_unchecked_(
    x: torch.Tensor, residual: torch.Tensor | None, operands: Operands, gates: GateOperands | None = None
) -> None:
    """Run :func:`steer_` without checks; eager CUDA rows go to the kernel without the dispatcher."""
    if eager_cuda(x, residual, operands):
        steer_triton_(x, residual, operands, gates)
    else:
        _op(x, residual, operands, gates)

"""Residual add, gate, edit and RMSNorm in one pass, between two blocks of a pre-norm decoder.

Numerics contract, for row ``r``: ``y = x[r] + residual[r]`` in float32, not rounded; ``s`` is y rounded to the dtype of
x, the row of the unsteered model; each slot of the row displaces y as :mod:`.edits` defines; the new residual ``n`` is
y rounded once. Then, in float32 and with ``w`` the weight of the norm,

    rstd    1 / sqrt(sum(n*n) / H + eps)
    normed  n * rstd * w, rounded once or twice

                  n * rstd              weight
    LLAMA         rounded to dtype      w          transformers' Llama, Mistral, Qwen2, Phi3
    GEMMA         float32               1 + w      transformers' Gemma
    VLLM          float32               w          vLLM's CUDA kernel

A row without a displacement has the bits of the same op without slots (K = 0): the new residual of such a row is
x + residual rounded once. Normalised rows of Triton have these bits with a bank at least as wide as the rows (float32
beside float32 rows, any beside others): the order of the sum follows the narrowest numbers.

The deciding form decides gates first, as :mod:`.gate` defines, from the scores that ``score_`` left.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from .contract import (
    FLOAT_DTYPES,
    GateOperands,
    Kinds,
    Norm,
    Operands,
    check_choice,
    check_decisions,
    check_gates,
    check_like,
    check_operands,
    check_residual,
    check_rows,
    library,
    needs_gradient,
    tensors,
)
from .edits import reference_rows, reference_stream, torch_displaced
from .gate import DECIDING, decided_operands, deciding_arguments, flat_gates, unflat
from .launch import Launcher, eager_cuda, inductor_fuses, launch_shape, layout, nvidia, reported

try:
    import triton
    import triton.language as tl

    from .edits import displace, load_row, product, records
    from .gate import GATE_NUMBERS, SCALARS, decided_scales
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = [
    "add_steer_rms_norm",
    "add_steer_rms_norm_torch",
    "add_steer_rms_norm_triton",
    "add_steer_rms_norm_unchecked",
    "add_steer_torch",
    "reference",
]

Normed = tuple[torch.Tensor, torch.Tensor]  # normalised rows, new residual


# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int = Norm.LLAMA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact results of :func:`add_steer_rms_norm`: normed and new residual, float64 [rows, H] on the CPU.

    Only s is rounded, as the ops round it. So all norms agree here, except GEMMA.
    """
    y = x.double().cpu() + residual.double().cpu()
    s = reference_stream(x, residual)
    y = reference_rows(y, s, operands)
    w = weight.double().cpu() + (1 if norm == Norm.GEMMA else 0)
    return y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps) * w, y


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:
    _GEMMA = tl.constexpr(int(Norm.GEMMA))
    _LLAMA = tl.constexpr(int(Norm.LLAMA))
    _ANY = tl.constexpr(int(Kinds.ANY))

    @triton.jit(do_not_specialize=GATE_NUMBERS, do_not_specialize_on_alignment=SCALARS)
    def add_steer_rms_norm_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        normed_ptr,
        new_residual_ptr,
        weight_ptr,
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
        eps,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        NORM: tl.constexpr,
        KINDS: tl.constexpr,
        LAYERS: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        # The slots first: the addresses of their vectors depend on them.
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
        dtype = x_ptr.dtype.element_ty
        columns = tl.arange(0, BLOCK)
        inside = columns < H
        y = load_row(x_ptr, row, x_stride, inside, columns, H, CONTIGUOUS)
        y += load_row(residual_ptr, row, residual_stride, inside, columns, H, CONTIGUOUS)
        # Early, to hide its latency behind that of the row; later below, where its registers would spill.
        if KINDS != _ANY:
            weight = load_row(weight_ptr, 0, 0, inside, columns, H, True)
            if K:
                tl.debug_barrier()  # ptxas would ask for the weight after the vector has come
        y, _ = displace(
            y,
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
            True,
            KINDS,
            NVIDIA,
        )
        new_residual = y.to(dtype)
        tl.store(new_residual_ptr + row * H + columns, new_residual, mask=inside)
        n = new_residual.to(tl.float32)
        mean = tl.div_rn(tl.sum(product(n, n, NVIDIA), axis=0), tl.full((), H, tl.float32))
        rstd = tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(mean + tl.full((), eps, tl.float32)))
        normed = n * rstd
        if KINDS == _ANY:
            weight = load_row(weight_ptr, 0, 0, inside, columns, H, True)
        if NORM == _LLAMA:
            normed = normed.to(dtype).to(tl.float32)
        if NORM == _GEMMA:
            weight = 1.0 + weight
        tl.store(normed_ptr + row * H + columns, (normed * weight).to(dtype), mask=inside)

    launch = Launcher(add_steer_rms_norm_kernel)


def add_steer_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
    gates: GateOperands | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm` as a Triton kernel, one program per row, without checks."""
    if x.is_contiguous():
        normed, new_residual = torch.empty_like(x), torch.empty_like(x)
    else:
        normed, new_residual = x.new_empty(x.shape), x.new_empty(x.shape)
    site = (*operands, eps, norm, *(gates or ()))
    if launch.repeat(site, x, residual, (normed, new_residual), weight):
        return normed, new_residual
    *leading, hidden_size = x.shape
    count = prod(leading)
    if not count:
        return normed, new_residual
    address, contiguous, strides = layout(x, residual)
    slots, scales, vectors, directions, table, kinds = operands
    # Without the outputs: memory from torch starts at multiples of 16 bytes.
    address |= weight.data_ptr() | vectors.data_ptr() | directions.data_ptr()
    shape = launch_shape(hidden_size, x.dtype)
    pointers, sizes, layers = deciding_arguments(gates if slots.shape[1] else None)
    launch(
        x,
        count,
        site,
        (x, residual, normed, new_residual, weight, vectors, directions, slots, scales, table, *pointers),
        (*strides, *sizes, eps),
        (hidden_size, shape.block, slots.shape[1], contiguous, norm, kinds, layers, nvidia(x)),
        shape,
        address,
    )
    return normed, new_residual


# ---- torch -------------------------------------------------------------------------------------------------


def add_steer_rms_norm_torch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
    gates: GateOperands | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm` in plain torch, on any device, without a synchronisation and without checks.

    Differentiable in x, residual, weight and operands, whose table is taken as given; gates carry no gradient.
    """
    y, _ = _displaced_sum(x, residual, decided_operands(operands, gates))
    new_residual = y.to(x.dtype)
    n = new_residual.float()
    normed = n * (1.0 / ((n * n).mean(-1, keepdim=True) + eps).sqrt())
    if norm == int(Norm.LLAMA):
        normed = normed.to(x.dtype).float()
    w = weight.float() + 1.0 if norm == int(Norm.GEMMA) else weight.float()
    return (normed * w).to(x.dtype), new_residual


def add_steer_torch(x: torch.Tensor, residual: torch.Tensor, operands: Operands) -> torch.Tensor:
    """Return the new residual of :func:`add_steer_rms_norm_torch` alone, for a compiler that fuses the norm itself.

    x and residual may have any float dtypes; the result has the dtype of their sum. A row without a displacement is
    that sum.
    """
    return _rounded_sum(x, residual, *_displaced_sum(x, residual, operands))


def _rounded_sum(x: torch.Tensor, residual: torch.Tensor, y: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Return float32 rows y of x + residual, of which some are changed, in the dtype of that sum."""
    if x.dtype == residual.dtype and x.dtype in FLOAT_DTYPES:
        return y.to(x.dtype)
    stream = x + residual  # y could round it differently
    return torch.where(changed, y.to(stream.dtype), stream)


def _displaced_sum(x: torch.Tensor, residual: torch.Tensor, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + residual, displaced, float32 in the shape of x, and which rows were displaced, bool [..., 1]."""
    y = x.float() + residual.float()
    return torch_displaced(y, y.to(x.dtype).float(), operands)


# ---- registration ------------------------------------------------------------------------------------------


def _flat(run: Callable[..., Normed]) -> Callable[..., Normed]:
    """Adapt `run` to the op's schema, which is flat."""

    def flat(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Normed:
        *read, eps, norm, kinds = rest
        return run(x, residual, weight, Operands._make((*read, kinds)), eps, norm)

    return flat


def _flat_deciding(run: Callable[..., Normed]) -> Callable[..., Normed]:
    """Adapt `run` to the schema of the overload ``deciding``."""

    def flat(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Normed:
        *read, eps, norm = rest
        operands, gates = unflat(*read)
        return run(x, residual, weight, operands, eps, norm, gates)

    return flat


def _fake(x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


library.define(
    "add_steer_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor slots, Tensor scales, Tensor vectors, "
    "Tensor directions, Tensor table, float eps, int norm, int kinds) -> (Tensor, Tensor)"
)
library.define(
    "add_steer_rms_norm.deciding(Tensor x, Tensor residual, Tensor weight, Tensor slots, Tensor vectors, "
    f"Tensor directions, Tensor table, int kinds, {DECIDING}, float eps, int norm) -> (Tensor, Tensor)"
)
for _name, _adapt in (("add_steer_rms_norm", _flat), ("add_steer_rms_norm.deciding", _flat_deciding)):
    library.impl(_name, _adapt(add_steer_rms_norm_torch), "CompositeExplicitAutograd")
    if triton is not None:
        library.impl(_name, _adapt(add_steer_rms_norm_triton), "CUDA")
    torch.library.register_fake(f"steerfast::{_name}", _fake, lib=library)


# Looked up once: the look-up takes a tenth of a call on a CPU.
_plain = torch.ops.steerfast.add_steer_rms_norm.default
_deciding = torch.ops.steerfast.add_steer_rms_norm.deciding


def _op(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
    gates: GateOperands | None,
) -> Normed:
    if gates is None:
        slots, scales, vectors, directions, table, kinds = operands
        return _plain(x, residual, weight, slots, scales, vectors, directions, table, eps, norm, kinds)
    slots, _, *bank = operands
    return _deciding(x, residual, weight, slots, *bank, *flat_gates(gates), eps, norm)


# ---- public ------------------------------------------------------------------------------------------------


def add_steer_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int = Norm.LLAMA,
    gates: GateOperands | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual, steer, and normalise for the next block; decide gates first where there are any.

    Where autograd needs a gradient, of an operand too, the op runs as :func:`add_steer_rms_norm_torch`.
    :func:`add_steer_rms_norm_unchecked` does the same without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16, the output of the block; the last dimension contiguous, the row
            stride free.
        residual: [rows, H] like x, to which x is added.
        weight: [H] float32, bfloat16 or float16, of the norm.
        operands: how the rows are edited, see :class:`.contract.Operands`.
        eps: added to the mean square, >= 0.
        norm: :class:`Norm`.
        gates: the gates of this layer, whose rows `score_` has scored; None: no gate decides. With gates, the scales of
            `operands` are ``gates.scales[layer, :rows]``.

    Returns:
        The normalised rows and the new residual, [rows, H] in the dtype of x, contiguous.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong, or a decision shares memory with another argument; the
            message names the argument.
    """
    check_rows(x)
    check_residual(x, residual)
    check_like("weight", weight, (x.shape[1],), FLOAT_DTYPES, x.device)
    check_operands(x, operands)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    check_choice("norm", norm, Norm)
    if gates is not None:
        check_gates(x, gates, operands)
        if not torch.compiler.is_compiling():
            check_decisions({}, {"x": x, "residual": residual, "weight": weight, **tensors(operands)}, gates)
    operands = operands._replace(kinds=int(operands.kinds))
    if needs_gradient(x, residual, weight, *operands) or inductor_fuses(x, operands.kinds):
        return add_steer_rms_norm_torch(x, residual, weight, operands, float(eps), int(norm), gates)
    return _op(x, residual, weight, operands, float(eps), int(norm), gates)


@reported
def add_steer_rms_norm_unchecked(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
    gates: GateOperands | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm` without checks and gradient; eager CUDA rows skip the dispatcher.

    x and residual may also be contiguous [..., H]; the results have their shape.
    """
    if eager_cuda(x, residual, weight, operands):
        return add_steer_rms_norm_triton(x, residual, weight, operands, eps, norm, gates)
    if inductor_fuses(x, operands.kinds):
        return add_steer_rms_norm_torch(x, residual, weight, operands, eps, norm, gates)
    return _op(x, residual, weight, operands, eps, norm, gates)

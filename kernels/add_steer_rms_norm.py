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
x + residual rounded once.

The overload ``prompt`` decides prompt gates in the same launch: every row of a sequence reads its deciding row again,
from x and residual, and the program of the deciding row stores the score and the value. (So the deciding row must name
the slots of the sequence, and its other rows the same slots in the same places, or none.) No program reads what another
writes: the outputs are fresh tensors, and the latch of a sequence that decides is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from .contract import (
    FLOAT_DTYPES,
    GATE,
    GateKind,
    Kinds,
    Norm,
    Operands,
    check_choice,
    check_like,
    check_operands,
    check_residual,
    check_rows,
    check_separate,
    library,
    tensors,
)
from .edits import (
    reference_gate,
    reference_rows,
    reference_stream,
    torch_added,
    torch_displaced,
    torch_gate,
    torch_stream,
)
from .launch import Launcher, eager_cuda, inductor_fuses, launch_shape, layout, nvidia, reported

try:
    import triton
    import triton.language as tl

    from .edits import _PROMPT, displace, latched, load_row, load_stream, product, read_gate
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = [
    "add_scaled_torch",
    "add_steer_rms_norm",
    "add_steer_rms_norm_prompt",
    "add_steer_rms_norm_prompt_torch",
    "add_steer_rms_norm_prompt_triton",
    "add_steer_rms_norm_torch",
    "add_steer_rms_norm_triton",
    "add_steer_rms_norm_unchecked",
    "add_steer_torch",
    "reference",
    "reference_prompt",
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

    Nothing is rounded. So all norms agree here, except GEMMA.
    """
    y = x.double().cpu() + residual.double().cpu()
    s = reference_stream(x, residual)
    y = reference_rows(y, s, operands)
    w = weight.double().cpu() + (1 if norm == Norm.GEMMA else 0)
    return y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps) * w, y


def reference_prompt(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    deciding: torch.Tensor,
    scores: torch.Tensor,
    eps: float,
    norm: int = Norm.LLAMA,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the exact results of the overload ``prompt``: normed, new residual, scores and values, float64."""
    s = reference_stream(x, residual)
    rows, values, *_, directions, table, _ = operands
    scores, values = scores.double().cpu().clone(), values.double().cpu().clone()
    for q, p in enumerate(deciding.tolist()):
        for k, slot in enumerate(rows[p, 1:].tolist() if p >= 0 else []):
            numbers = table[slot].double().cpu()
            if slot >= 0 and numbers[GATE] == GateKind.PROMPT:
                scores[q, k], values[q, k] = reference_gate(s[p], directions[slot].double().cpu(), numbers)
    normed, stream = reference(x, residual, weight, operands._replace(values=values), eps, norm)
    return normed, stream, scores, values


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:
    _GEMMA = tl.constexpr(int(Norm.GEMMA))
    _LLAMA = tl.constexpr(int(Norm.LLAMA))
    _ANY = tl.constexpr(int(Kinds.ANY))

    @triton.jit
    def decided(  # type: ignore[no-untyped-def]
        stream,
        is_deciding_row,
        at,
        slots,
        kinds,
        gates,
        scores_ptr,
        values_ptr,
        directions_ptr,
        table_ptr,
        inside,
        columns,
        H: tl.constexpr,
        K: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        """Return the gate values of a row's slots; prompt gates read the deciding row `stream`, which stores them."""
        result = ()
        for k in tl.static_range(K):
            gate = gates[k]
            if (slots[k] >= 0) & (kinds[k] == _PROMPT):
                score, gate = read_gate(stream, slots[k], directions_ptr, table_ptr, inside, columns, H, NVIDIA)
                tl.store(scores_ptr + at + k, score, mask=is_deciding_row)
                tl.store(values_ptr + at + k, gate, mask=is_deciding_row)
            result = result + (gate,)  # type: ignore[assignment]
        return result

    @triton.jit(
        do_not_specialize_on_alignment=[
            "rows_ptr",
            "values_ptr",
            "strength_ptr",
            "table_ptr",
            "deciding_ptr",
            "scores_ptr",
        ]
    )
    def add_steer_rms_norm_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        normed_ptr,
        new_residual_ptr,
        weight_ptr,
        vectors_ptr,
        directions_ptr,
        rows_ptr,
        values_ptr,
        strength_ptr,
        table_ptr,
        deciding_ptr,
        scores_ptr,
        x_stride,
        residual_stride,
        eps,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        NORM: tl.constexpr,
        KINDS: tl.constexpr,
        DECIDE: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < H
        record = rows_ptr + row * (K + 1)
        # The slots first: the addresses of their vectors depend on them.
        sequence = tl.load(record).to(tl.int64)
        if DECIDE:
            steered = tl.full((), 0, tl.int1)
            for k in tl.static_range(K):
                steered |= tl.load(record + 1 + k) >= 0
            deciding = tl.load(deciding_ptr + sequence, mask=steered, other=-1).to(tl.int64)
        else:
            deciding = tl.full((), -1, tl.int64)
        slots, kinds, gates, strengths = latched(record, sequence, deciding < 0, values_ptr, strength_ptr, table_ptr, K)
        dtype = x_ptr.dtype.element_ty
        if DECIDE:
            if deciding >= 0:
                gates = decided(
                    load_stream(
                        x_ptr, residual_ptr, deciding, x_stride, residual_stride, inside, columns, H, CONTIGUOUS, True
                    ),
                    deciding == row,
                    sequence * K,
                    slots,
                    kinds,
                    gates,
                    scores_ptr,
                    values_ptr,
                    directions_ptr,
                    table_ptr,
                    inside,
                    columns,
                    H,
                    K,
                    NVIDIA,
                )
        y = load_row(x_ptr, row, x_stride, inside, columns, H, CONTIGUOUS)
        y += load_row(residual_ptr, row, residual_stride, inside, columns, H, CONTIGUOUS)
        # Early, to hide its latency behind that of the row; later below, where its registers would spill.
        if (KINDS != _ANY) & (K <= 1):
            weight = load_row(weight_ptr, 0, 0, inside, columns, H, True)
        y, _ = displace(
            y,
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
        if (KINDS == _ANY) | (K > 1):
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
    deciding: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm` as a Triton kernel, one program per row, without checks.

    With deciding and scores, run :func:`add_steer_rms_norm_prompt`.
    """
    if x.is_contiguous():
        normed, new_residual = torch.empty_like(x), torch.empty_like(x)
    else:
        normed, new_residual = x.new_empty(x.shape), x.new_empty(x.shape)
    site = (*operands, eps, norm, deciding, scores)
    if launch.repeat(site, x, residual, (normed, new_residual), weight):
        return normed, new_residual
    *leading, hidden_size = x.shape
    count = prod(leading)
    if not count:
        return normed, new_residual
    address, contiguous, strides = layout(x, residual)
    rows, values, strength, vectors, directions, table, kinds = operands
    # Without the outputs: memory from torch starts at multiples of 16 bytes.
    address |= weight.data_ptr() | vectors.data_ptr() | directions.data_ptr()
    shape = launch_shape(hidden_size, x.dtype)
    stack = rows.shape[1] - 1
    launch(
        x,
        count,
        site,
        (
            x,
            residual,
            normed,
            new_residual,
            weight,
            vectors,
            directions,
            rows,
            values,
            strength,
            table,
            deciding,
            scores,
        ),
        (*strides, eps),
        (hidden_size, shape.block, stack, contiguous, norm, kinds, deciding is not None, nvidia(x)),
        shape,
        address,
    )
    return normed, new_residual


def add_steer_rms_norm_prompt_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    deciding: torch.Tensor,
    scores: torch.Tensor,
    eps: float,
    norm: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm_prompt` as a Triton kernel, without checks."""
    return add_steer_rms_norm_triton(x, residual, weight, operands, eps, norm, deciding, scores)


# ---- torch -------------------------------------------------------------------------------------------------


def add_steer_rms_norm_torch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm` in plain torch, on any device, without a synchronisation and without checks.

    Differentiable in x, residual and weight; gates carry no gradient.
    """
    y, _ = _displaced_sum(x, residual, operands)
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


def add_scaled_torch(
    x: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """Run :func:`add_steer_torch` for latched additions whose scales [rows, K] `edits.torch_scales` made."""
    return _rounded_sum(x, residual, *torch_added(x.float() + residual.float(), rows, scales, vectors))


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


def add_steer_rms_norm_prompt_torch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    deciding: torch.Tensor,
    scores: torch.Tensor,
    eps: float,
    norm: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm_prompt` in plain torch, without checks."""
    rows, values, *_, directions, table, _ = operands
    if len(x) and len(deciding):
        at = torch.where(deciding >= 0, deciding, 0)
        s = torch_stream(x.index_select(0, at), residual.index_select(0, at))
        slots = rows.index_select(0, at)[:, 1:]
        for k in range(slots.shape[1]):
            slot = torch.where(slots[:, k] >= 0, slots[:, k], 0)
            numbers = table.index_select(0, slot)
            decides = (deciding >= 0) & (slots[:, k] >= 0) & (numbers[:, GATE] == int(GateKind.PROMPT))
            score, value = torch_gate(s.detach(), directions.index_select(0, slot).float(), numbers)
            for latch, new in ((scores, score), (values, value)):
                latch[:, k].copy_(torch.where(decides, new, latch[:, k]))
    return add_steer_rms_norm_torch(x, residual, weight, operands, eps, norm)


# ---- registration ------------------------------------------------------------------------------------------


def _flat(run: Callable[..., Normed]) -> Callable[..., Normed]:
    """Adapt `run` to the op's schema, which is flat."""

    def flat(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Normed:
        *read, eps, norm, kinds = rest
        return run(x, residual, weight, Operands._make((*read, kinds)), eps, norm)

    return flat


def _flat_prompt(run: Callable[..., Normed]) -> Callable[..., Normed]:
    """Adapt `run` to the schema of the overload ``prompt``, which is flat."""

    def flat(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Normed:
        rows, deciding, scores, *read, eps, norm = rest
        return run(x, residual, weight, Operands(rows, *read), deciding, scores, eps, norm)

    return flat


def _fake(x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


library.define(
    "add_steer_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor rows, Tensor values, Tensor strength, "
    "Tensor vectors, Tensor directions, Tensor table, float eps, int norm, int kinds) -> (Tensor, Tensor)"
)
library.define(
    "add_steer_rms_norm.prompt(Tensor x, Tensor residual, Tensor weight, Tensor rows, Tensor deciding, "
    "Tensor(a!) scores, Tensor(b!) values, Tensor strength, Tensor vectors, Tensor directions, Tensor table, "
    "float eps, int norm) -> (Tensor, Tensor)"
)
library.impl("add_steer_rms_norm", _flat(add_steer_rms_norm_torch), "CompositeExplicitAutograd")
library.impl("add_steer_rms_norm.prompt", _flat_prompt(add_steer_rms_norm_prompt_torch), "CompositeExplicitAutograd")
if triton is not None:
    library.impl("add_steer_rms_norm", _flat(add_steer_rms_norm_triton), "CUDA")
    library.impl("add_steer_rms_norm.prompt", _flat_prompt(add_steer_rms_norm_prompt_triton), "CUDA")
torch.library.register_fake("steerfast::add_steer_rms_norm", _fake, lib=library)
torch.library.register_fake("steerfast::add_steer_rms_norm.prompt", _fake, lib=library)
_op = torch.ops.steerfast.add_steer_rms_norm.default


# ---- public ------------------------------------------------------------------------------------------------


def add_steer_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int = Norm.LLAMA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual, steer, and normalise for the next block.

    Where autograd needs a gradient, the op runs as :func:`add_steer_rms_norm_torch`.
    :func:`add_steer_rms_norm_unchecked` does the same without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16, the output of the block; the last dimension contiguous, the row
            stride free.
        residual: [rows, H] like x, to which x is added.
        weight: [H] float32, bfloat16 or float16, of the norm.
        operands: how the rows are edited, see :class:`.contract.Operands`.
        eps: added to the mean square, >= 0.
        norm: :class:`Norm`.

    Returns:
        The normalised rows and the new residual, [rows, H] in the dtype of x, contiguous.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong; the message names the argument.
    """
    _check(x, residual, weight, operands, eps, norm)
    *read, kinds = operands
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad)
    if wants_gradient or inductor_fuses(x, kinds):
        return add_steer_rms_norm_torch(x, residual, weight, operands, float(eps), int(norm))
    return _op(x, residual, weight, *read, float(eps), int(norm), int(kinds))


def add_steer_rms_norm_prompt(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    deciding: torch.Tensor,
    scores: torch.Tensor,
    eps: float,
    norm: int = Norm.LLAMA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm`, and decide prompt gates in the same launch.

    Args:
        deciding: [n] int32, the row of x that decides for each sequence; -1: the latched values hold.
        scores: [n, K] float32; written for PROMPT slots of the deciding rows.
        operands: ``values`` are written likewise, and read for sequences that do not decide; ``kinds`` must be ANY.

    The other arguments, the result and the errors are those of :func:`add_steer_rms_norm`.
    """
    _check(x, residual, weight, operands, eps, norm)
    if operands.kinds != int(Kinds.ANY):
        raise ValueError(f"kinds: expected ANY ({int(Kinds.ANY)}) where prompt gates decide, got {operands.kinds}")
    check_like("deciding", deciding, operands.values.shape[:1], (torch.int32,), x.device)
    check_like("scores", scores, operands.values.shape, (torch.float32,), x.device)
    if not torch.compiler.is_compiling():
        read = {"x": x, "residual": residual, "weight": weight, "deciding": deciding, **tensors(operands)}
        check_separate({"scores": scores, "values": read.pop("values")}, read)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return add_steer_rms_norm_prompt_torch(x, residual, weight, operands, deciding, scores, float(eps), int(norm))
    rows, *rest, _ = operands
    return torch.ops.steerfast.add_steer_rms_norm.prompt(
        x, residual, weight, rows, deciding, scores, *rest, float(eps), int(norm)
    )


@reported
def add_steer_rms_norm_unchecked(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`add_steer_rms_norm` without checks and gradient; eager CUDA rows skip the dispatcher.

    x and residual may also be contiguous [..., H]; the results have their shape.
    """
    if eager_cuda(x, residual, weight, operands):
        return add_steer_rms_norm_triton(x, residual, weight, operands, eps, norm)
    if inductor_fuses(x, operands.kinds):
        return add_steer_rms_norm_torch(x, residual, weight, operands, eps, norm)
    rows, values, strength, vectors, directions, table, kinds = operands
    return _op(x, residual, weight, rows, values, strength, vectors, directions, table, eps, norm, kinds)


def _check(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, operands: Operands, eps: float, norm: int
) -> None:
    check_rows(x)
    check_residual(x, residual)
    check_like("weight", weight, (x.shape[1],), FLOAT_DTYPES, x.device)
    check_operands(x, operands)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    check_choice("norm", norm, Norm)

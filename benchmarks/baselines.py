"""Triton kernels that the ops are measured against: the norm a serving engine runs, and an empty one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from steerfast.kernels.launch import launch_shape


@triton.jit
def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, eps, H: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    at = row * H + columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual_ptr + at, y.to(residual_ptr.dtype.element_ty), mask=inside)
    rstd = tl.rsqrt(tl.sum(y * y, axis=0) / H + eps)
    tl.store(x_ptr + at, (y * rstd * weight).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def empty_kernel(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p):  # type: ignore[no-untyped-def] # noqa: E741
    pass


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """Residual add and RMSNorm of [rows, H] as serving engines do it: in place, x becomes the normalised rows."""
    shape = launch_shape(x.shape[1], x.dtype)
    add_rms_norm_kernel[(len(x),)](x, residual, weight, eps, x.shape[1], shape.block, num_warps=shape.num_warps)


def empty(x: Tensor, residual: Tensor, others: tuple[Tensor, ...], eps: float) -> None:
    """A launch over the rows of x with the fused op's 16 arguments, of which none is used."""
    tensors = (x, residual, *others)
    tensors = (*tensors, *(x,) * (13 - len(tensors)))
    empty_kernel[(len(x),)](*tensors, 0, 0, eps, num_warps=launch_shape(x.shape[1], x.dtype).num_warps)

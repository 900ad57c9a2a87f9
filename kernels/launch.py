"""The launch of a kernel: its shape, and a fast path from eager Python.

A plain Triton launch binds and inspects every argument at every call, which costs more host time than the kernel of a
decode step takes on the device. :class:`Launcher` keeps the compiled kernel under a key of everything that Triton would
inspect, and passes the arguments on directly. ``STEERFAST_FAST_LAUNCH=0`` turns the fast path off.

``STEERFAST_DEBUG=1`` reports each call of an unchecked op to the logger ``steerfast.launch`` at level DEBUG.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import torch

from .contract import MAX_HIDDEN_SIZE, GateOperands, Kinds, Operands

try:
    import triton
    from triton import knobs
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = [
    "TESTED_TRITON",
    "LaunchShape",
    "Launcher",
    "eager_cuda",
    "inductor_fuses",
    "launch_shape",
    "layout",
    "nvidia",
    "reported",
]

TESTED_TRITON = ((3, 6), (3, 9))
"""Triton releases whose compiled kernels take their arguments as :class:`Launcher` passes them."""

_log = logging.getLogger("steerfast.launch")
_DEBUG = os.environ.get("STEERFAST_DEBUG", "0") != "0"
_Op = TypeVar("_Op", bound=Callable[..., Any])


@dataclass(frozen=True)
class LaunchShape:
    """The part of a row that a GPU program holds: `block` columns (a power of two) over `num_warps` warps."""

    block: int
    num_warps: int


@cache
def launch_shape(hidden_size: int, dtype: torch.dtype) -> LaunchShape:
    """Return the launch shape of a row of `hidden_size` numbers of this dtype.

    It does not depend on the number of rows, so a row has the same bits in every batch. A thread takes 32 bytes: two
    16-byte accesses per tensor. At least 4 warps hide the latency of a short row. At most 16: with 32 a thread has 64
    registers, and the addresses alone take 25.
    """
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden_size: expected 1 to {MAX_HIDDEN_SIZE}, got {hidden_size}")
    block = 1 << (hidden_size - 1).bit_length()
    return LaunchShape(block, min(max(block * dtype.itemsize // 1024, 4), 16))


def nvidia(x: torch.Tensor) -> bool:
    """Say whether a kernel on `x` runs on an NVIDIA GPU, not on another GPU or in Triton's interpreter."""
    return x.is_cuda and torch.version.hip is None


def layout(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, bool, tuple[int, int]]:
    """Return the addresses of the rows or-ed together, whether the rows have no gaps, and their row strides.

    The strides are 0 for rows without gaps.
    """
    address, contiguous = x.data_ptr(), x.is_contiguous()
    if residual is not None:
        address |= residual.data_ptr()
        contiguous = contiguous and residual.is_contiguous()
    if contiguous:
        return address, True, (0, 0)
    return address, False, (x.stride(0), 0 if residual is None else residual.stride(0))


def eager_cuda(x: torch.Tensor) -> bool:
    """Say whether Python may launch the Triton kernel for `x` without the dispatcher: no tracing, no subclass."""
    return x.is_cuda and type(x) is torch.Tensor and triton is not None and not torch.compiler.is_compiling()


def inductor_fuses(x: torch.Tensor, kinds: int) -> bool:
    """Say whether a compiled model should trace plain torch, which Inductor fuses, instead of the op.

    It should on a CPU where no slot takes sums: at one row the op costs 1.17 x the unsteered form, plain torch 1.03 x
    (benchmarks/FACTS.md). Not measured on a GPU yet.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu" and int(kinds) == int(Kinds.LATCHED_ADD)


def _hooked() -> bool:
    """Say whether a profiler has hooked each launch; only Triton's own launch calls its hooks."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def _reusable() -> bool:
    """Say whether compiled kernels may be called directly; read once per launcher, when it is made."""
    if triton is None or os.environ.get("STEERFAST_FAST_LAUNCH", "1") == "0":
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in TESTED_TRITON and torch.version.hip is None


def reported(op: _Op) -> _Op:
    """Report each call of `op` to the logger where STEERFAST_DEBUG is set; otherwise return `op` itself."""
    if not _DEBUG:
        return op

    @wraps(op)
    def report(x: torch.Tensor, *arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            told = [a for a in arguments if isinstance(a, (Operands, GateOperands))]
            words = [Kinds(a.kinds).name if isinstance(a, Operands) else "gates" for a in told]
            stack, kinds = told[0].scales.shape[-1], ", ".join(words)
            name = op.__name__.removesuffix("_unchecked").replace("_unchecked_", "_")
            _log.debug(
                "%s: %d rows, H %d, K %d, %s, %s", name, x.shape[:-1].numel(), x.shape[-1], stack, kinds, x.device
            )
        return op(x, *arguments)

    return report  # type: ignore[return-value]


class Launcher:
    """The launcher of one Triton kernel, whose parameters are tensors first, then numbers, then constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.reusable = _reusable() and type(kernel).__name__ == "JITFunction"

    def __call__(
        self,
        x: torch.Tensor,
        count: int,
        dtypes: tuple[torch.dtype, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        shape: LaunchShape,
        address: int,
    ) -> None:
        """Launch `count` programs, at least one, on the device and current stream of `x`.

        Args:
            dtypes: those of the tensors whose dtype is free.
            tensors: None for a tensor that is not used; `constants` must show that.
            numbers: strides and other scalars. Ints are part of the kernel's key: Triton compiles another kernel for a
                number divisible by 16 or equal to 1.
            constants: the constexpr arguments.
            address: the addresses of all tensors whose alignment the kernel is compiled for, or-ed together.
        """
        if not x.is_cuda:  # Triton's interpreter
            self.plain(count, tensors, numbers, constants, shape)
            return
        index = x.device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):  # Triton takes the current device
                self(x, count, dtypes, tensors, numbers, constants, shape, address)
            return
        if address % 16 or not self.reusable or _hooked():
            self.plain(count, tensors, numbers, constants, shape)
            return
        key = (index, dtypes, numbers, constants)
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.plain(count, tensors, numbers, constants, shape)
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(count, 1, 1, stream, function, metadata, None, None, None, *tensors, *numbers, *constants)

    def plain(
        self,
        count: int,
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        shape: LaunchShape,
    ) -> Any:
        """Launch as Triton does, which compiles where needed; return the compiled kernel."""
        return self.kernel[(count,)](*tensors, *numbers, *constants, num_warps=shape.num_warps, enable_fp_fusion=False)

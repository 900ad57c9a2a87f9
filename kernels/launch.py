"""How a kernel is launched: its shape, and a path from eager Python that skips what Triton would work out again.

A plain Triton launch binds and inspects every argument at every call, which costs more host time than a decode step's
kernel takes on the device. :class:`Launcher` keeps the compiled kernel under a key that holds everything Triton would
have inspected, and hands the arguments to it directly. ``STEERFAST_FAST_LAUNCH=0`` turns that off.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .contract import MAX_HIDDEN_SIZE, Kinds

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
]

TESTED_TRITON = ((3, 6), (3, 9))
"""Triton releases whose compiled kernels take their arguments as :class:`Launcher` passes them."""


@dataclass(frozen=True)
class LaunchShape:
    """How a GPU program holds a row: `block` columns (a power of two) over `num_warps` warps."""

    block: int
    num_warps: int


@cache
def launch_shape(hidden_size: int, dtype: torch.dtype) -> LaunchShape:
    """The launch shape of a row of ``hidden_size`` numbers, from that and its dtype alone.

    It never depends on the number of rows, so the same row gives the same bits in every batch. A thread takes
    32 bytes (two 16-byte accesses per tensor); 4 warps at least, so that a short row still hides its latency, and
    16 at most: 32 would leave a thread 64 registers, of which the addresses alone take 25.
    """
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden_size: expected 1 to {MAX_HIDDEN_SIZE}, got {hidden_size}")
    block = 1 << (hidden_size - 1).bit_length()
    return LaunchShape(block, min(max(block * dtype.itemsize // 1024, 4), 16))


def nvidia(x: torch.Tensor) -> bool:
    """Whether a kernel on ``x`` runs on an NVIDIA GPU, and not in Triton's interpreter or on another GPU."""
    return x.is_cuda and torch.version.hip is None


def layout(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, bool, tuple[int, int]]:
    """Addresses of the rows or-ed together, whether they lie without gaps, and where not their row strides."""
    address, contiguous = x.data_ptr(), x.is_contiguous()
    if residual is not None:
        address |= residual.data_ptr()
        contiguous = contiguous and residual.is_contiguous()
    if contiguous:
        return address, True, (0, 0)
    return address, False, (x.stride(0), 0 if residual is None else residual.stride(0))


def eager_cuda(x: torch.Tensor) -> bool:
    """Whether Python may launch the Triton kernel for ``x`` itself: no tracing, no tensor subclass, no dispatcher."""
    return x.is_cuda and type(x) is torch.Tensor and triton is not None and not torch.compiler.is_compiling()


def inductor_fuses(x: torch.Tensor, kinds: int) -> bool:
    """Whether a compiled model should see plain torch here, which Inductor fuses, and not an op it calls as it is.

    On a CPU, where no slot takes sums: the op costs such a model 1.17 x the unsteered form at one row, plain torch
    1.03 x (benchmarks/FACTS.md). Not measured on a GPU yet.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu" and int(kinds) == int(Kinds.LATCHED_ADD)


def _hooked() -> bool:
    """Whether somebody, a profiler, wants to see each launch; only Triton's own launch tells them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def _reusable() -> bool:
    """Whether compiled kernels may be called directly: read once, when a kernel's launcher is made."""
    if triton is None or os.environ.get("STEERFAST_FAST_LAUNCH", "1") == "0":
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in TESTED_TRITON and torch.version.hip is None


class Launcher:
    """Launches one Triton kernel, whose parameters are tensors first, then numbers, then constants."""

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
        """Launch over `count` programs, at least one, on the device and current stream of ``x``.

        Args:
            dtypes: all that differ between the tensors of one launch and those of another.
            tensors: None where one is not used, which `constants` must tell.
            numbers: strides and other scalars. Ints are part of the kernel's key as they are, so that one divisible by
                16, or equal to 1, never meets another's kernel.
            constants: what the kernel is compiled for.
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
        """Triton's own launch, which compiles where it must; the compiled kernel."""
        return self.kernel[(count,)](*tensors, *numbers, *constants, num_warps=shape.num_warps, enable_fp_fusion=False)

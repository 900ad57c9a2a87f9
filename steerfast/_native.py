"""Loads the compiled ops, where the package was built with them.

Importing them registers them with torch: the C++ ops for CPU tensors, and one CUDA op under a name of its own,
``steerfast::add_steer_rms_norm_cuda``. Without them the same ops run in Triton or plain torch, and nothing else
changes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

__all__ = ["available", "cuda_available", "cuda_reason", "isa", "reason"]


def _obstacle(module: str, build: str) -> str | None:
    """Load a compiled module; why that is impossible, or None when it is loaded."""
    if find_spec(module) is None:
        return f"this installation was built without them (STEERFAST_BUILD={build} builds them)"
    try:
        import torch  # noqa: F401 (brings the libraries that the extension links to)

        import_module(module)
    except ImportError as error:
        return f"the built extension does not load: {error}"
    return None


reason: str | None = _obstacle("steerfast._C", "cpu")
"""Why the C++ ops are absent; None when they are loaded."""
available: bool = reason is None

cuda_reason: str | None = _obstacle("steerfast._C_cuda", "cuda")
"""Why the CUDA op is absent; None when it is loaded."""
cuda_available: bool = cuda_reason is None


def isa() -> str | None:
    """The instruction set the C++ ops use (``avx512``, ``avx2``, ``scalar``), None where they are absent.

    Raises:
        RuntimeError: the environment variable ``STEERFAST_CPU_ISA`` names one that does not exist or
            that this CPU does not have.
    """
    if not available:
        return None
    import torch

    return torch.ops.steerfast.cpu_isa()

"""Loads the C++ ops, where the package was built with them.

Importing them registers them with torch for CPU tensors. Without them the same ops run in plain torch, and
nothing else changes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

__all__ = ["available", "isa", "reason"]

available: bool = False
reason: str | None = None
"""Why the C++ ops are absent; None when they are loaded."""

if find_spec("steerfast._C") is None:
    reason = "this installation was built without them (STEERFAST_BUILD=cpu builds them)"
else:
    try:
        import torch  # noqa: F401 (brings the libraries that the extension links to)

        import_module("steerfast._C")
        available = True
    except ImportError as error:
        reason = f"the built extension does not load: {error}"


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

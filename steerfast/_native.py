"""Load the C++ ops, where the package was built with them.

Importing them registers them with torch for CPU tensors. Without them the same ops run in plain torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def _obstacle() -> str | None:
    """Load the extension; return why that is impossible, None when it is loaded."""
    if find_spec("steerfast._C") is None:
        return "this installation was built without them (STEERFAST_BUILD=cpu builds them)"
    try:
        import torch  # noqa: F401 (brings the libraries that the extension links to)

        import_module("steerfast._C")
    except ImportError as error:
        return f"the built extension does not load: {error}"
    return None


reason: str | None = _obstacle()
"""Why the C++ ops are absent; None when they are loaded."""
available: bool = reason is None


def isa() -> str | None:
    """Return the instruction set of the C++ ops (``avx512``, ``avx2``, ``scalar``), None where they are absent.

    Raises:
        RuntimeError: the environment variable ``STEERFAST_CPU_ISA`` names one that does not exist or
            that this CPU does not have.
    """
    if not available:
        return None
    import torch

    return torch.ops.steerfast.cpu_isa()

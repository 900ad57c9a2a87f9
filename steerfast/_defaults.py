"""torch's defaults for new tensors, set aside by work that makes many of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def own_defaults(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function with float32 and the CPU as torch's defaults for new tensors.

    A caller's `torch.set_default_dtype` and `torch.set_default_device` hold again afterwards. Where the defaults are
    these two, nothing is done.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        if dtype == torch.float32 and device.type == "cpu":
            return function(*args, **kwargs)
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(dtype)

    return run

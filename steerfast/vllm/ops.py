"""The op that vLLM's compiled graphs hold at a steered layer.

A graph knows only the number of the layer. Banks and tables belong to the `WorkerRuntime`, so a graph outlives every
profile, and a graph that another process compiled works here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerfast.kernels.contract import library

if TYPE_CHECKING:
    from steerfast.vllm.worker import WorkerRuntime

_active: WorkerRuntime | None = None


def activate(runtime: WorkerRuntime) -> None:
    """Let `runtime` edit the rows of this process's next forward passes."""
    global _active
    _active = runtime


def is_captured(stream: Tensor) -> bool:
    """Return whether the launches of this pass become a CUDA graph."""
    return stream.is_cuda and torch.cuda.is_current_stream_capturing()


def _serve_(stream: Tensor, addend: Tensor | None, layer: int) -> None:
    if _active is None:
        raise RuntimeError(f"steerfast::serve_: layer {layer} is steered, but no runtime is active")
    _active.serve(stream, addend, layer)


library.define("serve_(Tensor(a!) stream, Tensor? addend, int layer) -> ()")
library.impl("serve_", _serve_, "CompositeExplicitAutograd")
torch.library.register_fake("steerfast::serve_", lambda stream, addend, layer: None, lib=library)

serve_ = torch.ops.steerfast.serve_.default

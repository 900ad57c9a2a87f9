"""The op that vLLM's compiled graphs hold at a steered layer.

A graph knows only the number of the layer. Banks and tables belong to the `RowServer`, so a graph outlives every
profile, and a graph that another process compiled works here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from steerfast.kernels.contract import library


class RowServer(Protocol):
    """The object that edits rows, a `steerfast.vllm.worker.WorkerRuntime`."""

    def serve(self, stream: Tensor, addend: Tensor | None, layer: int) -> None:
        """Decide gates and edit `stream`, [n, H], in place. The rows are those of `stream`, or of stream + addend."""


_active: RowServer | None = None


def activate(server: RowServer) -> None:
    """Let `server` edit the rows of this process's next forward passes."""
    global _active
    _active = server


def is_captured(stream: Tensor) -> bool:
    """Return whether the launches of this pass become a CUDA graph."""
    return stream.is_cuda and torch.cuda.is_current_stream_capturing()


def _serve_(stream: Tensor, addend: Tensor | None, layer: int) -> None:
    if _active is None:
        raise RuntimeError(f"steerfast::serve_: layer {layer} is steered, but no runtime is active")
    _active.serve(stream, addend, layer)


def _fake(stream: Tensor, addend: Tensor | None, layer: int) -> None:
    return None


library.define("serve_(Tensor(a!) stream, Tensor? addend, int layer) -> ()")
library.impl("serve_", _serve_, "CompositeExplicitAutograd")
torch.library.register_fake("steerfast::serve_", _fake, lib=library)

serve_ = torch.ops.steerfast.serve_.default

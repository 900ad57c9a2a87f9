"""The decoder layers of a vLLM model: where they are, and the op that edits the rows that they return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.profile import embedding_sketch, sketched_rows
from steerfast.vllm import compat
from steerfast.vllm.ops import serve_

__all__ = ["find_layers", "serve_output", "sketch_of", "steer_layers", "wrap_forward"]


def find_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Return the decoder layers of a vLLM model; those of other stages of a pipeline are placeholders.

    They are the shallowest ModuleList beside the token embedding with as many entries as the text config has layers.
    Vision towers have such lists, too, but not beside that embedding.

    Raises:
        ArchitectureError: there is none, or several.
    """
    kinds = compat.VocabParallelEmbedding, compat.PPMissingLayer

    def embeds(parent: nn.Module) -> bool:
        beside = [child for child in parent.children() if not isinstance(child, nn.ModuleList)]
        return any(isinstance(part, kinds) for c in beside for part in c.modules())

    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and embeds(model.get_submodule(path.rpartition(".")[0]))
    ]
    depth = min((path.count(".") for path, _ in found), default=0)
    found = [(path, module) for path, module in found if path.count(".") == depth]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise ArchitectureError(
            f"model: expected one list of {count} decoder layers in {type(model).__name__}, found {names}"
        )
    return found[0][1]


def steer_layers(layers: nn.ModuleList, declared: Iterable[int], hidden_size: int) -> list[int]:
    """Let the declared layers that are here call the op on their output, and return their numbers."""
    here = [at for at in declared if not isinstance(layers[at], compat.PPMissingLayer)]
    for at in here:
        layer: Any = layers[at]
        wrap_forward(type(layer))
        layer.steerfast_layer, layer.steerfast_width = at, hidden_size
        layer.steerfast_adds = any("RMSNorm" in type(child).__name__ for child in layer.children())
    return here


def wrap_forward(cls: Any) -> None:
    """Wrap the forward of a class once. Layers without the attribute, of a drafter or another engine, pass through."""
    if vars(cls).get("steerfast_layer", 0) is None:
        return
    original = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        # A subclass that calls this one's forward has its own wrapper.
        if self.steerfast_layer is not None and type(self) is cls:
            serve_output(self, output)
        return output

    cls.steerfast_layer = None
    cls.forward = forward


def serve_output(layer: Any, output: Any) -> None:
    """Edit a layer's output: the stream, (stream, None), or (x, residual), which the next norm adds."""
    x, residual = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != layer.steerfast_width:
        raise ArchitectureError(
            f"model: expected {type(layer).__name__} to return rows [n, {layer.steerfast_width}] or a pair of such, "
            f"got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        )
    if residual is not None and not layer.steerfast_adds:
        raise ArchitectureError(
            f"model: {type(layer).__name__} returns a pair, but has no RMSNorm: expected one, which adds the two"
        )
    serve_(x, residual, layer.steerfast_layer)


def sketch_of(model: nn.Module, vocabulary: int) -> tuple[float, ...] | None:
    """Return the sketch of the embedding; None: another stage has it. All ranks of a stage have to call this."""
    for module in model.modules():
        if isinstance(module, compat.VocabParallelEmbedding) and not isinstance(module, compat.ParallelLMHead):
            if not 0 < vocabulary <= module.org_vocab_size:
                return None
            with torch.inference_mode():
                return embedding_sketch(module(sketched_rows(vocabulary).to(next(module.parameters()).device)))
    return None

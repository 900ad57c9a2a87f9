"""The decoder layers of a vLLM model: where they are, and the op that edits the rows that they return."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.profile import embedding_sketch, sketched_rows
from steerfast.vllm import compat
from steerfast.vllm.ops import serve_


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


def steer_layers(
    layers: nn.ModuleList,
    declared: Iterable[int],
    hidden_size: int,
    adding: Collection[type[nn.Module]],
    reading: Collection[int] | None = None,
) -> list[int]:
    """Let the declared layers that are here call the op on their output, and return their numbers.

    Args:
        adding: the classes of layers whose pairs are added up, see `steerfast.vllm.probe`.
        reading: the layers where a gate, or an edit other than ``add``, reads rows. Default: all.
    """
    here = [at for at in declared if not isinstance(layers[at], compat.PPMissingLayer)]
    for at in here:
        layer: Any = layers[at]
        wrap_forward(type(layer))
        layer.steerfast_layer, layer.steerfast_width = at, hidden_size
        layer.steerfast_adds = type(layer) in adding
        layer.steerfast_reads = reading is None or at in reading
    return here


def check_scale(layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Raise ArchitectureError where layers scale their stream to fit float16, as DeepSeek's do: vectors would not fit.

    Args:
        dtype: of the model.
    """
    scaling = [layer for layer in layers if getattr(layer, "routed_scaling_factor", None) not in (None, 1)]
    if scaling and dtype == torch.float16:
        raise ArchitectureError(
            f"model: {type(scaling[0]).__name__} divides its residual stream by a factor in float16, so profiles do "
            "not fit; use --dtype bfloat16"
        )


def wrap_forward(cls: Any) -> None:
    """Wrap the forward of a class once. Layers without the attribute, of a drafter or another engine, pass through."""
    if vars(cls).get("steerfast_layer", 0) is None:
        return
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        # A subclass that calls this one's forward has its own wrapper.
        if self.steerfast_layer is not None and type(self) is cls:
            serve_output(self, output)
        return output

    cls.steerfast_layer = None
    cls.forward = forward


def serve_output(layer: Any, output: Any) -> None:
    """Edit a layer's output: the stream, (stream, ignored), or (x, residual), which the next layer adds.

    Of (x, residual), residual is edited. Every rank of tensor parallelism has it whole, but x may still be a partial
    sum, and vLLM fuses the all-reduce of x with the norm after it if nobody else reads x. So the op gets x only where
    rows are read.
    """
    x, residual = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    x = _rows(layer, x)
    if residual is None or not layer.steerfast_adds:
        serve_(x, None, layer.steerfast_layer)
        return
    residual = _rows(layer, residual)
    if x.dtype != residual.dtype and layer.steerfast_reads:
        raise ArchitectureError(
            f"model: expected {type(layer).__name__} to return a pair of one dtype where rows are read, got {x.dtype} "
            f"and {residual.dtype}"
        )
    serve_(residual, x if layer.steerfast_reads else None, layer.steerfast_layer)


def _rows(layer: Any, tensor: Any) -> Tensor:
    """Return the rows [n, H] that a layer returns as [n, H] or, in models of transformers, [1, n, H]."""
    if isinstance(tensor, Tensor) and tensor.shape[-1:] == (layer.steerfast_width,):
        if tensor.dim() == 2:
            return tensor
        if tensor.dim() == 3 and tensor.shape[0] == 1:
            return tensor[0]
    raise ArchitectureError(
        f"model: expected {type(layer).__name__} to return rows [n, {layer.steerfast_width}] or a pair of such, "
        f"got {tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__}"
    )


def sketch_of(model: nn.Module, vocabulary: int) -> tuple[float, ...] | None:
    """Return the sketch of the embedding; None: another stage has it. All ranks of a stage have to call this."""
    for module in model.modules():
        if isinstance(module, compat.VocabParallelEmbedding) and not isinstance(module, compat.ParallelLMHead):
            if not 0 < vocabulary <= module.org_vocab_size:
                return None
            with torch.inference_mode():
                return embedding_sketch(module(sketched_rows(vocabulary).to(next(module.parameters()).device)))
    return None

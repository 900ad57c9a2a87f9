"""Find the decoder of a HuggingFace model by its structure, not by its class name."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.profile import ModelIdentity, embedding_sketch, sketched_rows
from steerfast.text.tokenizer import template_hash, tokenizer_hash

STEERED_MARK = "_steerfast_steered"


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder-only model that steering touches.

    backbone: the module that owns the layers and takes input ids and the KV cache.
    layers: the decoder blocks, in order; their output is the residual stream [N, T, hidden_size].
    """

    backbone: nn.Module
    layers: nn.ModuleList
    hidden_size: int

    def refuse_if_steered(self) -> None:
        """Raise SteerfastError if a steering is attached."""
        if hasattr(self.backbone, STEERED_MARK):
            raise SteerfastError("model: expected an unsteered one, got one that is steered; detach that first")


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of `model`.

    They are the shallowest ModuleList with as many entries as the (text) config has layers. The token embedding has to
    be its sibling, because vision towers have such lists, too.

    Raises:
        ArchitectureError: the model has no config, an encoder, no such list, or several.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ArchitectureError(f"model: expected a HuggingFace decoder-only model, got {name} without a config")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"model: expected a decoder-only model, got the encoder-decoder {name}")
    text = config.get_text_config()
    count, hidden = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not count or not hidden:
        raise ArchitectureError(f"model: the config of {name} states no num_hidden_layers or hidden_size")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(child is embedding for child in model.get_submodule(path.rpartition(".")[0]).children())
    ]
    depth = min((path.count(".") for path, _ in found), default=0)
    found = [(path, module) for path, module in found if path.count(".") == depth]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise ArchitectureError(f"model: expected one list of {count} decoder layers in {name}, found {names}")
    path, layers = found[0]
    backbone = model.get_submodule(path.rpartition(".")[0])
    return Decoder(backbone, layers, hidden)


def passes_through(model: nn.Module, backbone: nn.Module) -> bool:
    """Return whether `model` passes its tokens, mask and cache to `backbone` unchanged.

    transformers' own forwards of text models do. Adapters, other inputs and custom forwards may change them.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model is backbone or model.base_model is not backbone:
        return False
    forward: Any = inspect.unwrap(type(model).forward)
    return str(forward.__module__).startswith("transformers.models.")


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor: it lies on several ranks, and no kernel can read it."""
    return type(tensor) is not nn.Parameter and hasattr(tensor, "device_mesh")


def weights_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over names, shapes and a few values of every tensor: it differs between fine-tunes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        few = _offloaded_values(model, name) if tensor.is_meta else _few_values(tensor)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(few)
    return digest.hexdigest()


def _few_values(tensor: Tensor) -> bytes:
    """Return the bytes of at most 16 values of a tensor; of a quantised one, of each tensor inside it."""
    if is_traceable_wrapper_subclass(tensor) and not is_distributed(tensor):
        return b"".join(_few_values(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // 16)][:16]
    return few.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _offloaded_values(model: nn.Module, name: str) -> bytes:
    """Return the bytes of a few values of a tensor that accelerate offloads; ArchitectureError if it does not."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            tensor = getattr(module, leaf)
            if not tensor.is_meta:
                return _few_values(tensor)
    raise ArchitectureError(
        f"model: expected weights, or accelerate's hooks that load them, found neither for {name!r}"
    )


def identify(model: nn.Module, tokenizer: Any = None) -> ModelIdentity:
    """Return the identity of `model` (and its tokenizer, if given) that a profile is checked against."""
    decoder = find_decoder(model)
    config: Any = model.config
    return ModelIdentity(
        name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        architecture=str(config.get_text_config().model_type),
        hidden_size=decoder.hidden_size,
        num_layers=len(decoder.layers),
        revision=getattr(config, "_commit_hash", None),
        embedding_sketch=_sketch(model),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        chat_template_sha256=template_hash(tokenizer),
    )


def _sketch(model: nn.Module) -> tuple[float, ...] | None:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: Tensor | None = getattr(embedding, "weight", None)
    if weight is None or (weight.is_meta and not hasattr(embedding, "_hf_hook")):
        return None
    plain = weight.dim() == 2 and weight.is_floating_point() and type(weight).__module__.startswith("torch.")
    vocabulary = len(weight) if plain else getattr(embedding, "num_embeddings", 0)
    if not vocabulary:
        return None
    rows = sketched_rows(vocabulary)
    if plain and not weight.is_meta:
        return embedding_sketch(_embedding_rows(weight.detach(), rows.to(weight.device)))
    with torch.no_grad():  # quantised, or offloaded: the module's own look-up reads it
        found: Tensor = embedding(rows if weight.is_meta else rows.to(weight.device))
    return None if found.is_meta else embedding_sketch(found)


def _embedding_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of an embedding. If it is sharded, all ranks have to call this."""
    if not is_distributed(weight):
        return weight[rows]
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    # An embedding look-up: an index would gather all shards first.
    looked_up: Any = F.embedding(DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim), weight)
    return looked_up.full_tensor()

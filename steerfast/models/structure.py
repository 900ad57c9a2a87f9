"""Find the decoder of a HuggingFace model by its structure, not by its class name."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.profile import ModelIdentity

STEERED_MARK = "_steerfast_steered"
_SKETCH_SIZE = 64
# Mixed scripts, digits, code and whitespace: two tokenizers that agree on this text agree on everyday prompts.
_TOKENIZER_PROBE = "Naïve café — 東京 2024: def f(x):\n\treturn x**2  # 'quotes' & \"more\" <tag> 😀 don't 1,234.56"


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder-only model that steering touches.

    backbone: the module that owns the layers and is called with input ids and the KV cache.
    layers: the decoder blocks, in order; their output is the residual stream [N, T, hidden_size].
    """

    backbone: nn.Module
    layers: nn.ModuleList
    hidden_size: int

    def refuse_if_steered(self) -> None:
        """Raise SteerfastError where a steering is attached: what comes next needs the model as it is."""
        if hasattr(self.backbone, STEERED_MARK):
            raise SteerfastError("model: expected an unsteered one, got one that is steered; detach that first")


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of `model`.

    They are the one shallowest ModuleList with as many entries as the (text) config counts layers, beside or below
    a token embedding.

    Raises:
        ArchitectureError: no config, an encoder-decoder, no such list, or several.
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
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _embeds(model, path)
    ]
    depth = min((path.count(".") for path, _ in found), default=0)
    found = [(path, module) for path, module in found if path.count(".") == depth]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise ArchitectureError(f"model: expected one list of {count} decoder layers in {name}, found {names}")
    path, layers = found[0]
    backbone = model.get_submodule(path.rpartition(".")[0])
    return Decoder(backbone, layers, hidden)


def _embeds(model: nn.Module, path: str) -> bool:
    """Whether the owner of the list at `path` also owns an embedding: a decoder does, a mixture of experts does not."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return any(isinstance(child, nn.Embedding) for child in owner.children())


def identify(model: nn.Module, tokenizer: Any = None) -> ModelIdentity:
    """Describe `model` (and its tokenizer, where given) so that a profile can recognise it."""
    decoder = find_decoder(model)
    config: Any = model.config
    return ModelIdentity(
        name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        architecture=str(config.get_text_config().model_type),
        hidden_size=decoder.hidden_size,
        num_layers=len(decoder.layers),
        revision=getattr(config, "_commit_hash", None),
        embedding_sketch=_sketch(model),
        tokenizer_sha256=_tokenizer_hash(tokenizer),
        chat_template_sha256=_template_hash(tokenizer),
    )


def _sketch(model: nn.Module) -> tuple[float, ...] | None:
    """Random projections of evenly spaced embedding rows, as a unit vector of `_SKETCH_SIZE` numbers."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: Tensor = embedding.weight
    if weight.device.type == "meta" or weight.dim() != 2 or not weight.is_floating_point():
        return None
    rows = torch.linspace(0, len(weight) - 1, _SKETCH_SIZE).long().to(weight.device)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (weight.shape[1],), generator=generator).double() * 2 - 1
    values = weight.detach()[rows].double().cpu() @ signs
    length = float(values.norm())
    if not 0 < length < math.inf:
        return None
    return tuple(round(value, 6) for value in (values / length).tolist())


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    ids = tokenizer(_TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


def _template_hash(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return hashlib.sha256(str(template).strip().encode()).hexdigest()

"""The model families whose decoder layers can be fused. A new family is one line here and a test.

A block adds to the residual stream twice, each time as ``stream + after(module(before(stream)))``. A family names the
attributes that are ``before`` and ``after`` for the attention and the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from steerfast.errors import ArchitectureError
from steerfast.kernels.contract import Norm


@dataclass(frozen=True)
class Family:
    """Name the modules of one architecture. None: the block has no such module.

    before_attention, before_mlp: the RMSNorm that reads the residual stream.
    after_attention, after_mlp: a norm or dropout between the module and the residual add.
    norm: how its RMSNorm rounds; eps: the attribute that holds its epsilon.
    text: the plain name means the multimodal model; its config contains the config of the language model.
    """

    folder: str
    prefix: str
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    norm: Norm = Norm.LLAMA
    eps: str = "variance_epsilon"
    text: bool = False

    @property
    def model_type(self) -> str:
        """The model type in the config of the language model."""
        return f"{self.folder}_text" if self.text else self.folder

    @property
    def attributes(self) -> set[str]:
        """All modules that a layer of this family has."""
        optional = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return {"self_attn", "mlp"} | {name for name in optional if name is not None}

    def check(self, index: int, layer: nn.Module) -> None:
        """Raise ArchitectureError with layer and attribute if a layer is not built as declared."""
        built = {name for name, _ in layer.named_children()}
        for name in sorted(self.attributes ^ built):
            what = "has no" if name in self.attributes else "has an undeclared"
            raise ArchitectureError(f"model: layer {index} ({type(layer).__name__}) {what} module {name!r}")
        attention = layer.get_submodule("self_attn")
        if (number := getattr(attention, "layer_idx", None)) != index:
            raise ArchitectureError(
                f"model: layer {index}.self_attn ({type(attention).__name__}): expected layer_idx {index}, got {number}"
            )
        for reader in (self.before_attention, self.before_mlp):
            if reader is not None:
                self.check_norm(f"layer {index}.{reader}", layer.get_submodule(reader))

    def check_norm(self, place: str, norm: nn.Module) -> None:
        """Raise ArchitectureError if a norm lacks its weight or epsilon, or has another forward."""
        for attribute in ("weight", self.eps):
            if not hasattr(norm, attribute):
                raise ArchitectureError(f"model: {place} ({type(norm).__name__}) has no {attribute!r}")
        forward: Any = type(norm).forward
        module, name = f"transformers.models.{self.folder}.", f"{self.prefix}RMSNorm.forward"
        if not forward.__module__.startswith(module) or forward.__qualname__ != name:
            raise ArchitectureError(
                f"model: {place} ({type(norm).__name__}): expected {name} of transformers, "
                f"got {forward.__module__}.{forward.__qualname__}; steer() needs no patch"
            )


_SANDWICH = Family(
    "gemma2",
    "Gemma2",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm=Norm.GEMMA,
    eps="eps",
)

FAMILIES = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("phi3", "Phi3", after_attention="resid_attn_dropout", after_mlp="resid_mlp_dropout"),
    Family("mixtral", "Mixtral"),
    Family("qwen3_moe", "Qwen3Moe"),
    _SANDWICH,
    replace(_SANDWICH, folder="gemma3", prefix="Gemma3", text=True),
    Family(
        "olmo2",
        "Olmo2",
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        norm=Norm.VLLM,
    ),
)
"""Families that have causal language models. Multimodal models use their layers, too."""

MULTIMODAL_FAMILIES = (
    Family("qwen2_vl", "Qwen2VL", text=True),
    Family("qwen2_5_vl", "Qwen2_5_VL", text=True),
)
"""Families that have only multimodal models."""


def family_of(layer: type) -> Family | None:
    """Return the family of a decoder layer's class; None: the layer cannot be fused."""
    for parent in layer.__mro__:
        for family in (*FAMILIES, *MULTIMODAL_FAMILIES):
            if parent.__name__ == f"{family.prefix}DecoderLayer" and parent.__module__.startswith(
                f"transformers.models.{family.folder}."
            ):
                return family if is_own_forward(layer, parent) else None
    return None


def is_own_forward(kind: type, owner: type) -> bool:
    """Return whether a module's class runs the forward that transformers defines in `owner`.

    A subclass may override it, and a program may replace it in the class.
    """
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return (forward.__module__, forward.__qualname__) == (owner.__module__, f"{owner.__qualname__}.forward")

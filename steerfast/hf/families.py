"""The model families whose decoder layers can be fused. A family is one name here and one in the tests.

A block adds to the residual stream twice, each time as ``stream + after(module(before(stream)))``. A family names the
attributes that are ``before``, ``module`` and ``after`` for the attention and the MLP.
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

    folder, prefix: transformers/models/FOLDER holds the class PREFIXDecoderLayer, or PREFIXTextDecoderLayer.
    attention: the modules that mix tokens; a layer has one of these.
    mlp: the module after it, and modules that a layer may have beside it; their outputs are added.
    before_attention, before_mlp: the norm that reads the residual stream.
    after_attention, after_mlp: a norm or dropout between the module and the residual add.
    norm: how its RMSNorm rounds. None: another norm, which runs alone; only adds and edits are fused.
    eps: the attribute that holds the epsilon. final: the norm behind the last layer.
    scale: the layer's attribute that multiplies all that is added to the residual stream.
    parallel: the MLP reads the rows that the attention reads.
    text: the plain name means the multimodal model; its config contains the config of the language model.
    """

    folder: str = ""
    prefix: str = ""
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    norm: Norm | None = Norm.LLAMA
    eps: str = "variance_epsilon"
    final: str = "norm"
    scale: str | None = None
    parallel: bool = False
    text: bool = False

    @property
    def model_type(self) -> str:
        """The model type in the config of the language model."""
        return f"{self.folder}_text" if self.text else self.folder

    @property
    def readers(self) -> tuple[str | None, str | None]:
        """The norms that are fused with the add before them: of the attention and of the MLP."""
        return (None, None) if self.norm is None else (self.before_attention, self.before_mlp)

    def owns(self, layer: type) -> bool:
        """Return whether a class is a decoder layer of this family in transformers."""
        names = (f"{self.prefix}DecoderLayer", f"{self.prefix}TextDecoderLayer")
        return layer.__name__ in names and layer.__module__.startswith(f"transformers.models.{self.folder}.")

    def check(self, index: int, layer: nn.Module) -> None:
        """Raise ArchitectureError with layer and attribute if a layer is not built as declared."""
        place = f"model: layer {index}"
        built = {name for name, _ in layer.named_children()}
        wrappers = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        needed = [self.attention, self.mlp[:1], *((name,) for name in wrappers if name is not None)]
        for names in needed:
            if not built & {*names}:
                raise ArchitectureError(
                    f"{place} ({type(layer).__name__}) has no module {' or '.join(map(repr, names))}"
                )
        for name in sorted(built - {name for names in (*needed, self.mlp) for name in names}):
            raise ArchitectureError(f"{place} ({type(layer).__name__}) has an undeclared module {name!r}")
        if self.scale is not None and not hasattr(layer, self.scale):
            raise ArchitectureError(f"{place} ({type(layer).__name__}) has no {self.scale!r}")
        for name in (name for name in self.attention if name in built):
            attention = layer.get_submodule(name)
            if (number := getattr(attention, "layer_idx", None)) != index:
                kind = type(attention).__name__
                raise ArchitectureError(f"{place}.{name} ({kind}): expected layer_idx {index}, got {number}")
        for reader in self.readers:
            if reader is not None:
                self.check_norm(f"layer {index}.{reader}", layer.get_submodule(reader))

    def check_norm(self, place: str, norm: nn.Module) -> None:
        """Raise ArchitectureError if a norm lacks its weight or epsilon, or is no RMSNorm of the family."""
        for attribute in ("weight", self.eps):
            if not hasattr(norm, attribute):
                raise ArchitectureError(f"model: {place} ({type(norm).__name__}) has no {attribute!r}")
        forward: Any = type(norm).forward
        module = f"transformers.models.{self.folder}."
        if not (forward.__module__.startswith(module) and forward.__qualname__.endswith("RMSNorm.forward")):
            raise ArchitectureError(
                f"model: {place} ({type(norm).__name__}): expected the RMSNorm of {module}*, got "
                f"{forward.__module__}.{forward.__qualname__}; steer() needs no patch"
            )


def _like(family: Family, *names: str, **changes: Any) -> tuple[Family, ...]:
    """Return a family per "folder Prefix", built like `family` but for the changes."""
    split = [name.split() for name in names]
    return tuple(replace(family, folder=folder, prefix=prefix, **changes) for folder, prefix in split)


_LLAMA = Family()
_GEMMA = Family(norm=Norm.GEMMA, eps="eps")
_SANDWICH = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_GLM4 = Family(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
_OLMO2 = Family(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
    norm=Norm.VLLM,
)
_LFM2 = Family(
    attention=("self_attn", "conv"),
    mlp=("feed_forward",),
    before_attention="operator_norm",
    before_mlp="ffn_norm",
    final="embedding_norm",
)
_GRANITE = Family(scale="residual_multiplier")

# fmt: off
FAMILIES = (
    *_like(_LLAMA, "llama Llama", "mistral Mistral", "qwen2 Qwen2", "qwen3 Qwen3"),
    *_like(_LLAMA, "phi3 Phi3", after_attention="resid_attn_dropout", after_mlp="resid_mlp_dropout"),
    *_like(_LLAMA, "mixtral Mixtral", "qwen3_moe Qwen3Moe"),
    *_like(_SANDWICH, "gemma2 Gemma2", norm=Norm.GEMMA, eps="eps"),
    *_like(_SANDWICH, "gemma3 Gemma3", norm=Norm.GEMMA, eps="eps", text=True),
    *_like(_OLMO2, "olmo2 Olmo2"),
    *_like(
        _LLAMA, "arcee Arcee", "axk1 AXK1", "bitnet BitNet", "cwm Cwm", "deepseek_v2 DeepseekV2",
        "deepseek_v3 DeepseekV3", "deepseek_v32 DeepseekV32", "diffllama DiffLlama", "dots1 Dots1", "ernie4_5 Ernie4_5",
        "ernie4_5_moe Ernie4_5_Moe", "exaone_moe ExaoneMoe", "glm Glm", "glm4_moe Glm4Moe",
        "glm4_moe_lite Glm4MoeLite", "hunyuan_v1_dense HunYuanDenseV1", "hunyuan_v1_moe HunYuanMoEV1", "hy_v3 HYV3",
        "laguna Laguna", "mellum Mellum", "mimo_v2_flash MiMoV2Flash", "minimax_m2 MiniMaxM2", "ministral Ministral",
        "ministral3 Ministral3", "olmoe Olmoe", "qwen2_moe Qwen2Moe", "seed_oss SeedOss", "smollm3 SmolLM3",
        "solar_open SolarOpen", "youtu Youtu",
    ),
    *_like(_LLAMA, "jetmoe JetMoe", attention=("self_attention",)),
    *_like(_LLAMA, "flint Flint", "gpt_oss GptOss", "helium Helium", norm=Norm.VLLM),
    *_like(_LLAMA, "apertus Apertus", before_attention="attention_layernorm", before_mlp="feedforward_layernorm"),
    *_like(_LLAMA, "llama4 Llama4", mlp=("feed_forward",), eps="eps", text=True),
    *_like(_GEMMA, "gemma Gemma"),
    *_like(_GEMMA, "vaultgemma VaultGemma", before_mlp="pre_feedforward_layernorm"),
    *_like(_GEMMA, "qwen3_next Qwen3Next", attention=("self_attn", "linear_attn")),
    *_like(_GEMMA, "qwen3_5 Qwen3_5", "qwen3_5_moe Qwen3_5Moe", attention=("self_attn", "linear_attn"), text=True),
    *_like(_SANDWICH, "afmoe Afmoe", before_mlp="pre_mlp_layernorm", after_mlp="post_mlp_layernorm", norm=Norm.VLLM),
    *_like(_GLM4, "glm4 Glm4", "kolibri1 Kolibri1"),
    *_like(_OLMO2, "olmo3 Olmo3", "flex_olmo FlexOlmo"),
    *_like(_OLMO2, "exaone4 Exaone4", norm=Norm.LLAMA),
    *_like(_LFM2, "lfm2 Lfm2", "lfm2_moe Lfm2Moe"),
    *_like(_LFM2, "lfm3 Lfm3", after_attention="post_operator_norm", after_mlp="post_ffn_norm"),
    *_like(_GRANITE, "granite Granite", "granite_swa GraniteSWA"),
    *_like(_GRANITE, "minicpm3 MiniCPM3", scale="residual_scale"),
    *_like(_GRANITE, "hyperclovax HyperCLOVAX", after_attention="post_norm1", after_mlp="post_norm2"),
    *_like(
        _GRANITE, "granitemoe GraniteMoe", "granitemoeshared GraniteMoeShared", "granitemoe_swa GraniteMoeSWA",
        mlp=("block_sparse_moe", "shared_mlp"),
    ),
    *_like(
        _GRANITE, "granitemoehybrid GraniteMoeHybrid",
        attention=("self_attn", "mamba"), mlp=("shared_mlp", "block_sparse_moe"),
    ),
    *_like(_LLAMA, "jais2 Jais2", "nanochat NanoChat", "nemotron Nemotron", "olmo Olmo", "phimoe Phimoe", norm=None),
    *_like(_LLAMA, "axk2 AXK2", "starcoder2 Starcoder2", norm=None),
    *_like(_LLAMA, "persimmon Persimmon", after_mlp="dropout", norm=None),
    *_like(
        _LLAMA, "cohere Cohere", "cohere2 Cohere2", "cohere2_moe Cohere2Moe", before_mlp=None, norm=None, parallel=True,
    ),
)
"""Families that have causal language models. Multimodal models use their layers, too."""

MULTIMODAL_FAMILIES = (
    *_like(
        _LLAMA, "qwen2_vl Qwen2VL", "qwen2_5_vl Qwen2_5_VL", "qwen3_vl Qwen3VL", "qwen3_vl_moe Qwen3VLMoe", text=True,
    ),
)
"""Families that have only multimodal models."""
# fmt: on


def family_of(layer: Any) -> Family | None:
    """Return the family of a decoder layer's class; None: the layer cannot be fused."""
    for parent in layer.__mro__:
        for family in (*FAMILIES, *MULTIMODAL_FAMILIES):
            if family.owns(parent):
                forward = layer.forward  # a subclass may override it, and a program may replace it in the class
                own = (forward.__module__, forward.__qualname__) == (
                    parent.__module__,
                    f"{parent.__qualname__}.forward",
                )
                return family if own else None
    return None

"""Tiny random models of many architectures, as vLLM serves them. docs/architectures.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY, HIDDEN, LAYERS = 256, 128, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
OLD = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
GRANITE4 = {
    **EXPERTS,
    "num_local_experts": 4,
    "shared_intermediate_size": 256,
    "residual_multiplier": 0.22,
    "position_embedding_type": "rope",
}


def sized(config: str, **more: Any) -> Callable[[], Any]:
    """A function -> a configuration of transformers with `SIZES`."""
    return lambda: _config(config, **{**SIZES, **more})


def plain(config: str, **values: Any) -> Callable[[], Any]:
    """A function -> a configuration of transformers with these values."""
    return lambda: _config(config, **values)


def _config(name: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**values)


# Layers return (x, residual), which the next layer adds.
ADDING = {
    "llama": sized("LlamaConfig"),
    "mistral": sized("MistralConfig", sliding_window=32),
    "mixtral": sized("MixtralConfig", num_local_experts=4, **EXPERTS),
    "qwen2": sized("Qwen2Config"),
    "qwen2_moe": sized(
        "Qwen2MoeConfig", num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, **EXPERTS
    ),
    "qwen3": sized("Qwen3Config", head_dim=32),
    "qwen3_moe": sized("Qwen3MoeConfig", head_dim=32, num_experts=4, moe_intermediate_size=64, **EXPERTS),
    "gemma": sized("GemmaConfig", head_dim=32),
    "gemma2": sized("Gemma2Config", head_dim=32, sliding_window=32, query_pre_attn_scalar=32, tie_word_embeddings=True),
    "gemma3": sized(
        "Gemma3TextConfig", head_dim=32, sliding_window=32, query_pre_attn_scalar=32, tie_word_embeddings=True
    ),
    "phi3": sized("Phi3Config"),
    "olmoe": sized("OlmoeConfig", num_experts=4, **EXPERTS),
    "glm4": sized("Glm4Config", head_dim=32),
    "gpt_oss": sized("GptOssConfig", head_dim=32, num_local_experts=4, sliding_window=32, **EXPERTS),
    "llama4": sized(
        "Llama4TextConfig",
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=128,
        interleave_moe_layer_step=1,
    ),
    "nemotron": sized("NemotronConfig"),
    "ernie4_5": sized("Ernie4_5Config", head_dim=32),
    "apertus": sized("ApertusConfig"),
}
# Layers return the stream, alone or with a tensor that nobody reads.
WHOLE = {
    "granite": sized("GraniteConfig", residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0),
    "granitemoe": sized("GraniteMoeConfig", num_local_experts=4, residual_multiplier=0.22, **EXPERTS),
    "granitemoehybrid": sized(
        "GraniteMoeHybridConfig", layer_types=["mamba", "attention"] * (LAYERS // 2), **GRANITE4, **MAMBA
    ),
    "granitemoehybrid_attention": sized(
        "GraniteMoeHybridConfig", layer_types=["attention"] * LAYERS, **GRANITE4, **MAMBA
    ),
    "exaone4": sized("Exaone4Config", sliding_window=32, sliding_window_pattern=4),
    "hyperclovax": sized(
        "HyperCLOVAXConfig", residual_multiplier=0.22, use_post_norm=True, head_dim=32, attention_multiplier=0.25
    ),
    "cohere": sized("CohereConfig", tie_word_embeddings=True),
    "cohere2": sized("Cohere2Config", tie_word_embeddings=True, sliding_window=64, head_dim=32),
    "stablelm": sized("StableLmConfig"),
    "falcon": plain(
        "FalconConfig",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        alibi=False,
        bias=False,
        multi_query=True,
        parallel_attn=True,
        **OLD,
    ),
    "falcon_h1": sized("FalconH1Config", mamba_d_ssm=256, **MAMBA),
    "gpt2": plain("GPT2Config", n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=512, **OLD),
    "gptj": plain("GPTJConfig", n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=512, rotary_dim=8, **OLD),
    "opt": plain(
        "OPTConfig",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=512,
        word_embed_proj_dim=HIDDEN,
        **OLD,
    ),
    "bloom": plain("BloomConfig", hidden_size=HIDDEN, n_layer=LAYERS, n_head=4, **OLD),
    "gemma4": sized(
        "Gemma4TextConfig",
        head_dim=32,
        global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
    ),
}
# vLLM runs them with the layers of transformers, which return [1, n, H].
TRANSFORMERS = {
    "arcee": sized("ArceeConfig"),
    "cwm": sized("CwmConfig", head_dim=32, layer_types=["full_attention"] * LAYERS),
    "flex_olmo": sized("FlexOlmoConfig", num_experts=4, **EXPERTS),
    "glm": sized("GlmConfig", head_dim=32),
    "gpt_bigcode": plain("GPTBigCodeConfig", n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=512, **OLD),
    "gpt_neox": plain(
        "GPTNeoXConfig",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        **OLD,
    ),
    "hunyuan_v1_dense": sized("HunYuanDenseV1Config", head_dim=32),
    "jais2": sized("Jais2Config", head_dim=32),
    "olmo": sized("OlmoConfig"),
    "olmo2": sized("Olmo2Config"),
    "olmo3": sized("Olmo3Config", sliding_window=32),
    "phi": sized("PhiConfig", num_key_value_heads=4),
    "seed_oss": sized("SeedOssConfig", head_dim=32),
    "smollm3": sized("SmolLM3Config"),
    "starcoder2": sized("Starcoder2Config"),
    "vaultgemma": sized("VaultGemmaConfig", head_dim=32, sliding_window=32, query_pre_attn_scalar=32),
}
ARCHITECTURES = {**ADDING, **WHOLE, **TRANSFORMERS}
IN_EVERY_RUN = ("llama", "nemotron", "exaone4", "granitemoehybrid", "cohere", "gpt_neox")


def build(name: str, folder: Path) -> Any:
    """Save a random model of an architecture, and return it as transformers loads it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32).eval()
    for at, parameter in model.named_parameters():
        if parameter.dim() > 1 and "conv" not in at and "A_log" not in at:
            parameter.data *= 4  # so that layers do something
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

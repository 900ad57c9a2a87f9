"""Tiny random models of every architecture, batches of prompts, and an oracle of steering that shares no code with it.

The oracle knows which rows are prompts, decides in float64 at each turn's last prompt row, edits as x + g·strength·v,
and runs every sequence in full, without a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from steerfast.hf.families import FAMILIES
from steerfast.profile import Gate, SteeringProfile

FAMILY_TYPES = {family.prefix: family.model_type for family in FAMILIES}
MakeProfile = Callable[..., SteeringProfile]
CLOSE = {"rtol": 1e-3, "atol": 3e-4}
BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 40, "vocab_size": 96,
         "initializer_range": 0.25, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
_OPT = {**BASE, "ffn_dim": 40, "word_embed_proj_dim": 32, "init_std": 0.25}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24}  # fmt: skip

# name of the classes -> (config, where the layers are)
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": (BASE, "model.layers"),
    "Mistral": ({**BASE, "sliding_window": 6}, "model.layers"),
    "Qwen2": (BASE, "model.layers"),
    "Qwen3": (BASE, "model.layers"),
    "Gemma": (BASE, "model.layers"),
    "Gemma2": ({**BASE, "sliding_window": 6}, "model.layers"),
    "Gemma3": ({**BASE, "sliding_window": 6}, "model.layers"),
    "Phi": (BASE, "model.layers"),
    "Phi3": (BASE, "model.layers"),
    "GPTNeoX": (BASE, "gpt_neox.layers"),
    "GPT2": (_GPT2, "transformer.h"),
    "OPT": (_OPT, "model.decoder.layers"),
    "Olmo": (BASE, "model.layers"),
    "Olmo2": (BASE, "model.layers"),
    "Mixtral": ({**BASE, **_MOE}, "model.layers"),
    "Qwen2Moe": ({**BASE, **_MOE}, "model.layers"),
    "Qwen3Moe": ({**BASE, **_MOE}, "model.layers"),
    "Falcon": ({key: value for key, value in BASE.items() if key != "head_dim"}, "transformer.h"),
    "StableLm": (BASE, "model.layers"),
    "Cohere": ({**BASE, "logit_scale": 1.0}, "model.layers"),
}

# Families that every test of fused layers runs with; test_families.py runs its tests with all families.
FUSED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Mixtral", "Qwen3Moe", "Gemma2", "Gemma3", "Olmo2"]

_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
           "first_k_dense_replace": 1}  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
           "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
_SHORT_CONV = {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}
_GRANITE = {"residual_multiplier": 0.22, "shared_intermediate_size": 24}
_MAMBA = {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
          "mamba_n_groups": 1}  # fmt: skip

# What a family's config needs besides BASE and _MOE; a family that is not here needs nothing more.
SETTINGS: dict[str, dict[str, Any]] = {
    "Cwm": {"bos_token_id": 1, "eos_token_id": [2]},
    **dict.fromkeys(["AXK1", "AXK2", "DeepseekV2", "DeepseekV3", "Dots1", "Glm4MoeLite", "MiniCPM3", "Youtu"], _LATENT),
    "DeepseekV32": {**_LATENT, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64},
    **dict.fromkeys(["Qwen3Next", "Qwen3_5", "Qwen3_5Moe"], _LINEAR),
    **dict.fromkeys(["Lfm2", "Lfm2Moe"], _SHORT_CONV),
    "Lfm3": {**_SHORT_CONV, "use_sandwich_norm": True},
    "HyperCLOVAX": {"residual_multiplier": 0.22, "use_post_norm": True},
    **dict.fromkeys(["Granite", "GraniteSWA", "GraniteMoe", "GraniteMoeShared", "GraniteMoeSWA"], _GRANITE),
    "GraniteMoeHybrid": {**_GRANITE, **_MAMBA},
    "Llama4": {"interleave_moe_layer_step": 2},
}


def make_model(name: str, **config: Any) -> Any:
    """The same weights every time; `config` changes settings of ARCHITECTURES, or of SETTINGS."""
    settings = ARCHITECTURES[name][0] if name in ARCHITECTURES else {**BASE, **_MOE, **SETTINGS.get(name, {})}
    if name in FAMILY_TYPES:
        kind = type(transformers.AutoConfig.for_model(FAMILY_TYPES[name]))
    else:
        kind = getattr(transformers, f"{name}Config")
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(kind(**{**settings, **config})).eval()


def make_family_model(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model whose norms have weights that tell them apart, attending eagerly."""
    model = make_model(name, attn_implementation="eager", **config)
    generator = torch.Generator().manual_seed(2)
    for path, weight in model.named_parameters():
        if "norm" in path:
            weight.data.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
    return model.to(dtype)


def four_prompts() -> list[list[int]]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 5, 7, 3)]


def padded(sequences: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, sequences))

    def row(values: list[int]) -> list[int]:
        padding = [0] * (width - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([row(s) for s in sequences]),
        "attention_mask": torch.tensor([row([1] * len(s)) for s in sequences]),
    }


def rows_of_mean(gate: Gate, ids: list[int], length: int) -> slice:
    """The rows of a prompt of `length` rows that a mean takes."""
    turn, first, until = list(gate.turn), 0, length - gate.tail
    for place in range(len(ids) - len(turn) + 1):
        if turn and ids[place : place + len(turn)] == turn:
            first = place + len(turn)
    first = max(first, until - (gate.window or length))
    return slice(first, until) if first < until else slice(length - 1, length)


class Oracle:
    """Steers by hooks of its own. `scores[layer]` [sequences] are those of the last turn."""

    def __init__(self, model: Any, profile: SteeringProfile, strength: float = 1.0) -> None:
        self.model, self.profile, self.strength = model, profile, strength
        self.layers = getattr(model.model, "language_model", model.model).layers
        self.scores: dict[int, Tensor] = {}
        self.margin = float("inf")
        self.ids: list[int] = []  # of a single sequence
        self.thought_end: list[int] = []  # edits begin after these tokens, in a prompt or behind it

    @contextmanager
    def attached(self, padding: list[int], turns: list[tuple[int, int]]) -> Iterator[None]:
        """Hooks for full sequences of [padding, turns]; beams repeat each prompt.

        padding: how many columns to skip on the left, per prompt. turns: first column and end of the prompt, per turn.
        """
        gates: dict[int, Tensor] = {}

        def score_of(x: Tensor, layer: int, directions: Tensor = self.profile.direction) -> Tensor:
            dot = x.double() @ directions[layer].double()
            return dot / x.double().norm(dim=-1) if self.profile.gate.score == "cosine" else dot

        def mean_score(x: Tensor, layer: int, ids: list[int]) -> Tensor:
            directions = self.profile.mean_direction
            x = x[rows_of_mean(self.profile.gate, ids, len(x))]
            return score_of(x, layer, self.profile.direction if directions is None else directions).mean()

        def prompt_score(x: Tensor, valid: Tensor, layer: int, ids: list[int]) -> Tensor:
            last = score_of(x[:, -1], layer)
            if self.profile.gate.pooling == "last":
                return last
            means = torch.stack([mean_score(own[mask], layer, ids) for own, mask in zip(x, valid, strict=True)])
            return means + last if self.profile.gate.pooling == "both" else means

        def gate_of(score: Tensor, layer: int) -> Tensor:
            limit, sharpness = float(self.profile.threshold[layer]), self.profile.gate.sharpness
            self.margin = min(self.margin, float((score - limit).abs().min()))
            self.scores[layer] = score
            return torch.sigmoid(sharpness * (score - limit)) if sharpness else (score > limit).double()

        def hook(module: nn.Module, args: Any, x: Tensor, layer: int) -> Tensor:
            count, width, _ = x.shape
            valid = torch.zeros(count, width, dtype=torch.bool)
            repeats = count // len(padding)
            for row in range(count):
                valid[row, padding[row // repeats] :] = True
            steered, gate = torch.zeros_like(valid), torch.zeros(count, width, dtype=torch.float64)
            decides = self.profile.sensor in ("own", layer)
            starts = [start for start, _ in turns] + [width]
            for number, (start, end) in enumerate(turns):
                stop = starts[number + 1]
                begin = self.answer_begins(start, end, stop)
                first = start if self.profile.positions == "all" else begin - 1
                answer_tokens = self.profile.answer_tokens
                until = stop if answer_tokens is None else min(stop, begin + answer_tokens - 1)
                steered[:, first:until] = valid[:, first:until]
                if self.profile.gate.kind == "always":
                    gate[:, start:stop] = 1.0
                elif self.profile.gate.kind == "prompt" and decides:
                    score = prompt_score(x.detach()[:, start:end], valid[:, start:end], layer, self.ids[start:end])
                    gate[:, start:stop] = gate_of(score, layer)[:, None]
                elif self.profile.gate.kind == "token" and decides:
                    gate[:, start:stop] = gate_of(score_of(x.detach()[:, start:stop], layer), layer)
            if decides or self.profile.gate.kind == "always":
                gates[layer] = gate
            strength = float(self.profile.strength[layer]) * self.strength
            if strength == 0:
                return x
            g = gates[layer if self.profile.sensor == "own" else int(self.profile.sensor)]
            edit = ((g * strength)[..., None] * self.profile.vector[layer].double()).float()
            return torch.where((steered & (g != 0))[..., None], (x.float() + edit).to(x.dtype), x)

        handles = [
            layer.register_forward_hook(lambda m, a, x, index=index: hook(m, a, x, index))
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def answer_begins(self, start: int, end: int, stop: int) -> int:
        """The place after the first end of a thought; of one in the prompt, the prompt's end; without one, the last."""
        marker = self.thought_end
        places = [place for place in range(start, stop) if marker and self.ids[place : place + len(marker)] == marker]
        if not marker or any(place + len(marker) <= end for place in places):
            return end
        return places[0] + len(marker) if places else stop + 1

    @torch.no_grad()
    def logits(self, ids: list[int], turns: list[tuple[int, int]]) -> Tensor:
        """[T, vocabulary] of one unpadded sequence."""
        self.ids = ids
        with self.attached([0], turns):
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def answer(self, prompt: list[int], tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.logits(ids, [(0, len(prompt))])[-1].argmax()))
        return ids[len(prompt) :]


def greedy(model: Any, batch: dict[str, Tensor], tokens: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens [N, tokens] and their logits [N, tokens, vocabulary]."""
    output = model.generate(
        **batch, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True,
        **{"do_sample": False, **options},
    )  # fmt: skip
    return output.sequences[:, -tokens:], torch.stack(output.logits, dim=1)

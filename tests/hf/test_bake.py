"""A profile that always adds equals biases of the model; anything else has no such form and is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfast
from steerfast.errors import ArchitectureError, ProfileError
from steerfast.hf.bake import bake
from steerfast.profile import Gate, SteeringProfile

IDS = torch.tensor([[1, 5, 9, 2, 77, 31], [3, 3, 8, 120, 4, 6]])
Maker = Callable[..., SteeringProfile]


def always(make_profile: Maker, model: Any, **fields: Any) -> SteeringProfile:
    return make_profile(model, layers=[1, 3], strength=0.5, **fields).without_gate()


@torch.no_grad()
def logits(model: Any, profile: SteeringProfile | None = None) -> Tensor:
    if profile is None:
        return model(IDS).logits
    with steerfast.steer(model, profile):
        return model(IDS).logits


def test_biases_answer_as_the_steered_model(tiny_llama: Any, make_profile: Maker) -> None:
    """In float32, and in float64 against the vectors added by hand."""
    profile = always(make_profile, tiny_llama)
    plain = logits(tiny_llama)
    baked = bake(tiny_llama, profile)
    assert torch.equal(logits(tiny_llama), plain)  # the model is as it was
    assert (baked.option, baked.readable) == ("mlp_bias", True)
    config = copy.deepcopy(tiny_llama.config)
    config.mlp_bias = True
    engine = type(tiny_llama)(config).eval()
    missing, unexpected = engine.load_state_dict(tiny_llama.state_dict() | baked.tensors, strict=False)
    assert (missing, unexpected) == ([], [])
    steered = logits(tiny_llama, profile)
    torch.testing.assert_close(logits(engine), steered, rtol=1e-5, atol=1e-5)
    assert (steered - plain).abs().max() > 0.1

    added = {layer: (profile.strength[layer] * profile.vector[layer]).double() for layer in (1, 3)}
    double = copy.deepcopy(tiny_llama).double()
    for layer, vector in added.items():
        double.model.layers[layer].register_forward_hook(lambda module, inputs, out, v=vector: out + v)
    torch.testing.assert_close(logits(engine.double()), logits(double), rtol=1e-12, atol=1e-12)


def test_a_bias_that_is_there_is_kept(make_llama: Any, make_profile: Maker) -> None:
    model = make_llama(mlp_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.bias)
    profile = always(make_profile, model)
    baked = bake(model, profile)
    assert baked.option is None
    assert set(baked.tensors) == {f"model.layers.{layer}.mlp.down_proj.bias" for layer in (1, 3)}
    steered = logits(model, profile)
    model.load_state_dict(baked.tensors, strict=False)
    torch.testing.assert_close(logits(model), steered, rtol=1e-5, atol=1e-5)


def test_an_architecture_without_an_option_is_told(make_profile: Maker) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=128, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()
    baked = bake(model, always(make_profile, model))
    assert (baked.option, baked.readable) == (None, False)
    assert set(baked.tensors) == {f"model.layers.{layer}.mlp.down_proj.bias" for layer in (1, 3)}


def test_a_norm_behind_the_last_module_is_refused(make_profile: Maker) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=128, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    with pytest.raises(ArchitectureError, match="biases do not steer Gemma2ForCausalLM as the profile does"):
        bake(model, always(make_profile, model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edit": "ablate"}, "edit: expected 'add', got 'ablate': it depends on the whole residual stream"),
        ({"edit": "keep_norm"}, "edit: expected 'add', got 'keep_norm'"),
        ({"edit": "clamp", "low": 0.0}, "edit: expected 'add', got 'clamp'"),
        ({"gate": Gate("token")}, "gate: a bias acts on every row, expected an always open gate, got 'token'"),
        ({"positions": "response"}, "positions: a bias acts on every row, expected 'all', got 'response'"),
        ({"answer_tokens": 3}, "positions: .* got 'answer_tokens 3'"),
        ({"strength": torch.zeros(5)}, "strength: expected a layer that is steered, got none"),
    ],
)
def test_profiles_that_no_bias_equals(fields: Any, message: str, tiny_llama: Any, make_profile: Maker) -> None:
    with pytest.raises(ProfileError, match=message):
        bake(tiny_llama, replace(always(make_profile, tiny_llama), **fields))


def test_another_model_is_refused(tiny_llama: Any, make_llama: Any, make_profile: Maker) -> None:
    with pytest.raises(ProfileError, match="other weights"):
        bake(tiny_llama, always(make_profile, make_llama(seed=1)))


@pytest.mark.parametrize("layers", [[3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("embeddings", [False, True])
def test_no_projection_of_the_writers_is_the_ablation(
    layers: list[int], embeddings: bool, tiny_llama: Any, make_profile: Maker
) -> None:
    """The rank-1 change of each writer's weights, ``-d d^T W``, is another model: why `bake` refuses an ablation."""
    profile = make_profile(tiny_llama, layers=layers, edit="ablate").without_gate()
    direction = torch.nn.functional.normalize(profile.vector[0], dim=0)
    profile = replace(profile, vector=direction.expand_as(profile.vector).clone())
    plain, steered = logits(tiny_llama), logits(tiny_llama, profile)
    projected = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for layer in layers:
            block = projected.model.layers[layer]
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= direction[:, None] * (direction @ weight)
        if embeddings:
            weight = projected.model.embed_tokens.weight
            weight -= (weight @ direction)[:, None] * direction
    off = (logits(projected) - steered).norm() / (steered - plain).norm()
    assert off > 0.1

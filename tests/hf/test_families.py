"""Every fused family: unsteered it is the stock model, steered it is the oracle and the hooks.

test_fused.py tests the mechanism, with the families of FUSED. Here each family runs, the tests of most marked slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import BASE, CLOSE, SETTINGS, MakeProfile, Oracle, four_prompts, greedy, make_family_model, padded
from torch import Tensor

import steerfast
from steerfast.errors import ArchitectureError
from steerfast.hf.auto import AutoSteeredModelForImageTextToText
from steerfast.hf.families import FAMILIES, Family
from steerfast.hf.fused import is_patched
from steerfast.hf.structure import find_decoder

BY_NAME = {family.prefix: family for family in FAMILIES}
# One of each way in which families differ: names, norms, several mixers and MLPs, a scale, parallel blocks.
QUICK = ["Apertus", "Cohere", "DeepseekV3", "Exaone4", "Gemma", "Glm4", "GptOss", "GraniteMoeHybrid", "Lfm2", "Llama4",
         "Qwen3Next", "Starcoder2"]  # fmt: skip
every_family = pytest.mark.parametrize("name", BY_NAME)
slow = pytest.mark.slow(but=[*QUICK, *(f"*-{name}" for name in QUICK)])


def fused_norms(family: Family) -> int:
    """Norms of a model of 4 layers that are taken together with the add before them."""
    first, second = family.readers
    return (family.norm is not None) + 3 * (first is not None) + 4 * (second is not None)


def close(actual: Tensor, expected: Tensor, family: Family) -> None:
    """Equal bits in bfloat16, and where no norm is fused; else float32 sums in another order."""
    assert actual.dtype == expected.dtype
    if expected.dtype == torch.bfloat16 or family.norm is None:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=3e-6 * float(expected.abs().max().clamp(min=10)))


@slow
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_patched_is_stock(name: str, dtype: torch.dtype) -> None:
    model, family, batch = make_family_model(name, dtype), BY_NAME[name], padded(four_prompts())
    with torch.no_grad():
        stock = model(**batch, output_hidden_states=True)
        tokens, logits = greedy(model, batch)
        steerfast.patch(model)
        assert sum(hasattr(module, "steerfast_seam") for module in model.modules()) == fused_norms(family)
        fused = model(**batch, output_hidden_states=True)
        fused_tokens, fused_logits = greedy(model, batch)
        steerfast.unpatch(model)
        assert torch.equal(model(**batch).logits, stock.logits)
    close(fused.logits, stock.logits, family)
    for one, other in zip(fused.hidden_states, stock.hidden_states, strict=True):
        close(one, other, family)
    assert torch.equal(fused_tokens, tokens)
    close(fused_logits, logits, family)


@slow
@every_family
def test_steered_equals_hooks(name: str, make_profile: MakeProfile) -> None:
    model, batch = make_family_model(name), padded(four_prompts())
    for kind in ("always", "prompt", "token"):
        profile = make_profile(model, kind=kind, layers=[1, 2], sensor="own" if kind == "token" else 1)
        with steerfast.steer(model, profile) as steering:
            tokens, logits = greedy(model, batch)
            fired = steering.fired
        steerfast.patch(model)
        with steerfast.steer(model, profile) as steering:
            fused_tokens, fused_logits = greedy(model, batch)
            assert torch.equal(steering.fired, fired)
        steerfast.unpatch(model)
        assert torch.equal(fused_tokens, tokens)
        torch.testing.assert_close(fused_logits, logits, **CLOSE)


@slow
@every_family
def test_steered_equals_the_oracle(name: str, make_profile: MakeProfile) -> None:
    stock = make_family_model(name)
    profile = make_profile(stock, kind="always", layers=[0, 2, 3])
    model = steerfast.patch(make_family_model(name))
    with steerfast.steer(model, profile), torch.no_grad():
        for prompt in four_prompts():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
            torch.testing.assert_close(logits, Oracle(stock, profile).logits(prompt, [(0, len(prompt))]), **CLOSE)


@slow
@every_family
def test_gradients_are_the_stock_models(name: str) -> None:
    model, ids = make_family_model(name), torch.tensor([four_prompts()[0]])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, use_cache=False).logits.logsumexp(dim=-1).sum().backward()
        return {path: weight.grad.clone() for path, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    steerfast.patch(model)
    actual = gradients()
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(actual[path], gradient, rtol=1e-4, atol=1e-5)


@slow
@every_family
def test_the_steered_class_loads(name: str, make_profile: MakeProfile, tmp_path: Path) -> None:
    stock, batch = make_family_model(name), padded(four_prompts())
    stock.save_pretrained(tmp_path)
    profile = make_profile(stock, threshold=-1.5)
    model = steerfast.AutoSteeredModelForCausalLM.from_pretrained(
        tmp_path, steering=profile, attn_implementation="eager"
    )
    assert type(model) is getattr(steerfast, f"Steered{name}ForCausalLM")
    assert is_patched(model)
    steerfast.patch(stock)
    with steerfast.steer(stock, profile):
        assert torch.equal(greedy(model, batch)[0], greedy(stock, batch)[0])


# The language model inside each multimodal model that the auto class knows; test_multimodal.py shows pictures to some.
INSIDE = {
    **dict.fromkeys(
        ["idefics3", "llava", "llava_next", "llava_next_video", "smolvlm", "video_llava", "vipllava"], "llama"
    ),
    **dict.fromkeys(["internvl", "llava_onevision", "ovis2"], "qwen2"),
    **dict.fromkeys(["idefics2", "mistral3"], "mistral"),
    **dict.fromkeys(["aya_vision", "cohere2_vision"], "cohere2"),
    **{"gemma3": "gemma3_text", "lfm2_vl": "lfm2", "paligemma": "gemma"},
    **{
        name: f"{name}_text"
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
    },
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 16, "patch_size": 4, "depth": 1, "num_heads": 2, "head_dim": 8, "out_hidden_size": 32,
           "deepstack_visual_indexes": [0]}  # fmt: skip


def image_config(name: str) -> Any:
    """The config of a tiny multimodal model."""
    kind = type(transformers.AutoConfig.for_model(name))
    vision = kind().vision_config
    known = {key: value for key, value in _VISION.items() if key in type(vision)().to_dict()}
    text = {**BASE, "model_type": INSIDE[name], "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    text |= SETTINGS.get(
        {"lfm2": "Lfm2", "qwen3_5_text": "Qwen3_5", "qwen3_5_moe_text": "Qwen3_5"}.get(INSIDE[name], ""), {}
    )
    if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return kind(text_config=text, vision_config={**known, "model_type": vision.model_type})


@pytest.mark.slow(but=["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("name", AutoSteeredModelForImageTextToText._stock)
def test_the_decoders_of_multimodal_models(name: str, make_profile: MakeProfile) -> None:
    torch.manual_seed(1)
    config, ids = image_config(name), torch.tensor([four_prompts()[0]])
    model = AutoSteeredModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    stock = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    stock.load_state_dict(model.state_dict())
    assert is_patched(model)
    assert isinstance(model, type(stock))
    profile = make_profile(stock, threshold=-1.5, layers=[1])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        with steerfast.steer(stock, profile), steerfast.steer(model, profile):
            torch.testing.assert_close(model(**given).logits, stock(**given).logits, **CLOSE)
        plain = stock.bfloat16()(**given).logits
        assert torch.equal(model.bfloat16()(**given).logits, plain)


def test_a_scale_is_read_from_each_layer() -> None:
    model, ids = make_family_model("Granite", torch.bfloat16), torch.tensor([four_prompts()[0]])
    find_decoder(model).layers[2].residual_multiplier = 0.7
    with torch.no_grad():
        stock = model(ids).logits
        assert torch.equal(steerfast.patch(model)(ids).logits, stock)
        find_decoder(model).layers[2].residual_multiplier = 0.22
        assert not torch.equal(model(ids).logits, stock)


def refused(model: Any, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        steerfast.patch(model)
    assert not is_patched(model)


def test_layers_that_are_not_built_as_declared_are_refused() -> None:
    model = make_family_model("Qwen3Next")
    del model.model.layers[2].linear_attn
    refused(model, r"layer 2 \(Qwen3NextDecoderLayer\) has no module 'self_attn' or 'linear_attn'")
    model = make_family_model("Granite")
    del model.model.layers[1].residual_multiplier
    refused(model, r"layer 1 \(GraniteDecoderLayer\) has no 'residual_multiplier'")
    model = make_family_model("Lfm2")
    del model.model.embedding_norm
    refused(model, "Lfm2Model has no module 'embedding_norm'")


def test_families_are_declared_once() -> None:
    assert len({family.model_type for family in FAMILIES}) == len(BY_NAME) == len(FAMILIES)

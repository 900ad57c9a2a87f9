"""The vector that ends answers: what it does to the logits, in models of every norm, and where it has no place."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import ARCHITECTURES, MakeProfile, make_family_model, make_model
from torch import Tensor, nn
from transformers import DynamicCache

import steerfast
from steerfast.errors import ArchitectureError, ProfileError
from steerfast.fitting.ending import ending_vector, turn_ends, with_ending
from steerfast.hf import caches
from steerfast.hf.structure import find_decoder

_END = 7
_WITHOUT_WEIGHT = "Olmo"  # its final norm has none


class _Tokenizer:
    """As much of one as is asked for."""

    chat_template: str | None = None

    def __init__(self, end: int | None = _END) -> None:
        self.eos_token_id = end


def final_norm(model: Any) -> nn.Module:
    backbone = find_decoder(model).backbone
    names = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
    return next(module for name, module in backbone.named_children() if name in names)


def profile_of(make_profile: MakeProfile, model: Any, **options: Any) -> steerfast.SteeringProfile:
    return replace(make_profile(model, **options), norm=torch.full((4,), 5.0))


def logits_of(model: Any, rows: Tensor) -> Tensor:
    """Of rows of the last layer: float64 [n, V], without what a model does to its logits afterwards."""
    model = model.double()
    return model.get_output_embeddings()(final_norm(model)(rows.double()))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != _WITHOUT_WEIGHT])
@torch.no_grad()
def test_the_end_rises_by_one_over_the_mean(name: str) -> None:
    model = make_family_model(name)
    vector = ending_vector(model, _Tokenizer()).double()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 32, generator=generator).double()
    rows -= rows.mean(dim=1, keepdim=True)
    # Of mean 0 and across the vector, so that a small step along it leaves what the norm divides by.
    away = vector - vector.mean()
    rows -= (rows @ away / (away @ away))[:, None] * away
    rows /= rows.norm(dim=1, keepdim=True)
    step = 1e-3
    change = (logits_of(model, rows + step * vector) - logits_of(model, rows)) / step
    rise = change[:, _END] - change.mean(dim=1)
    torch.testing.assert_close(rise, torch.ones_like(rise), rtol=2e-2, atol=0)  # norms have an epsilon
    assert bool((change.argmax(dim=1) == _END).all())


@torch.no_grad()
def test_other_logits_move_less_than_along_the_embedding() -> None:
    model = make_family_model("Llama", vocab_size=400)
    with torch.no_grad():  # some directions hold more of the vocabulary than others
        model.get_output_embeddings().weight *= torch.linspace(0.1, 3.0, 32)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(3)).double()
    weight = model.get_output_embeddings().weight.double() * model.model.norm.weight.double()
    contrast = weight[_END] - weight.mean(dim=0)
    along = contrast / (contrast @ contrast) / 32**0.5  # raises the end as much

    def spread(vector: Tensor) -> float:
        change = logits_of(model, rows + 1e-3 * vector) - logits_of(model, rows)
        return float(change[:, [i for i in range(400) if i != _END]].std(dim=1).mean())

    assert spread(ending_vector(model, _Tokenizer()).double()) < 0.75 * spread(along)


def test_an_answer_ends_earlier_and_no_key_changes(make_profile: MakeProfile) -> None:
    model = make_model("Llama", eos_token_id=_END)
    plain = profile_of(make_profile, model, kind="always", layers=[1])
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 11, 12]])

    def run(profile: steerfast.SteeringProfile) -> tuple[Tensor, DynamicCache, Tensor]:
        cache = DynamicCache(config=model.config)
        with steerfast.steer(model, profile), torch.no_grad():
            logits = model(ids, **{caches.argument(model): cache}).logits
            tokens = model.generate(ids, max_new_tokens=24, do_sample=False)
        return logits, cache, tokens

    ending = ending_vector(model, _Tokenizer())
    logits, cache, tokens = run(plain)
    raised, ended_cache, ended_tokens = run(with_ending(plain, ending, 12.0))
    for before, after in zip(cache.layers, ended_cache.layers, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
    others = [token for token in range(96) if token != _END]
    assert bool(((raised - logits)[..., _END] > (raised - logits)[..., others].amax(dim=-1)).all())
    for answer, ended in zip(tokens[:, 4:].tolist(), ended_tokens[:, 4:].tolist(), strict=True):
        assert [*ended, _END].index(_END) < [*answer, _END].index(_END)


def test_what_the_profile_then_is(make_profile: MakeProfile) -> None:
    model = make_model("Llama")
    known = profile_of(make_profile, model, layers=[1])
    profile = replace(known, candidates={"other": torch.ones(4, 32)}, vector_kind="forced")
    vector = ending_vector(model, _Tokenizer())
    ended = with_ending(profile, vector, 5.0)
    assert ended.vector_kind == "forced + ending"
    assert ended.steered_layers == [1, 3]
    assert torch.equal(ended.vector[3], vector * profile.norm[3])
    assert float(ended.strength[3]) == 5.0
    assert torch.equal(ended.vector[:3], profile.vector[:3])
    assert torch.equal(ended.strength[:3], profile.strength[:3])
    assert not ended.candidates  # of which each would take the place of both vectors
    assert torch.equal(profile.strength, make_profile(model, layers=[1]).strength)


def test_places_that_are_taken(make_profile: MakeProfile) -> None:
    model = make_model("Llama")
    vector = ending_vector(model, _Tokenizer())
    with pytest.raises(ProfileError, match="the last layer, 3, for it alone"):
        with_ending(profile_of(make_profile, model, layers=[2, 3]), vector, 5.0)
    with pytest.raises(ProfileError, match="expected a profile that adds vectors, got edit 'keep_norm'"):
        with_ending(replace(profile_of(make_profile, model, layers=[1]), edit="keep_norm"), vector, 5.0)
    with pytest.raises(ProfileError, match="the norm of its rows, got none for layer 3"):
        with_ending(make_profile(model, layers=[1]), vector, 5.0)


def test_models_without_a_place_for_it() -> None:
    with pytest.raises(ArchitectureError, match="expected one final norm beside the layers of OlmoModel, found none"):
        ending_vector(make_model(_WITHOUT_WEIGHT), _Tokenizer())
    with pytest.raises(ArchitectureError, match=r"expected an output embedding \[tokens, 32\], got NoneType"):
        ending_vector(make_model("Llama").model, _Tokenizer())
    model = make_model("Llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match=r"embedding of floats in one piece, got torch.int8 on cpu"):
        ending_vector(model, _Tokenizer())
    with pytest.raises(ProfileError, match="expected a token that ends a turn"):
        ending_vector(make_model("Llama"), _Tokenizer(None))


def test_which_token_ends_a_turn(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """The template's, where there are several; all of them where it names none."""
    end, other = tiny_tokenizer.convert_tokens_to_ids("<end>"), tiny_tokenizer.convert_tokens_to_ids("<system>")
    model = copy.deepcopy(tiny_llama)
    model.generation_config.eos_token_id = [other, end]
    assert turn_ends(model, tiny_tokenizer) == [end]
    model.generation_config.eos_token_id = other
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    assert turn_ends(model, tokenizer) == sorted([end, other])
    tokenizer.chat_template = None
    assert turn_ends(model, tokenizer) == sorted([end, other])

"""Steering under another default dtype or device of torch than float32 on the CPU: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from model_cases import MakeProfile

import steerfast
from steerfast.hf import fused
from steerfast.profile import SteeringProfile, embedding_sketch, sketched_rows
from steerfast.runtime.bank import Bank
from steerfast.runtime.buffers import Buffers
from steerfast.runtime.roster import Request, Roster
from steerfast.runtime.span import EditSpan, Entry

pytestmark = pytest.mark.contract

OtherDefaults = Callable[[], AbstractContextManager[None]]
IDS = torch.tensor([[5, 9, 3, 8, 20, 11]])


def everything(model: Any, profile: SteeringProfile) -> list[torch.Tensor]:
    """Return what a pass without a profile, a steered pass, its answer rows and their decisions give."""
    fused._unsteered = Buffers()
    with torch.no_grad():
        found = [model(IDS).logits]
        with steerfast.steer(model, profile) as steering:
            out = model(IDS)
            answer = model(IDS[:, :2], past_key_values=out.past_key_values)
            found += [out.logits, answer.logits, steering.scores]
    return found


@pytest.mark.parametrize("kind", ["always", "prompt", "token"])
def test_attach_and_steer(model: Any, make_profile: MakeProfile, other_defaults: OtherDefaults, kind: str) -> None:
    profile = make_profile(model, kind=kind, threshold=-1.0)
    expected = everything(model, profile)
    assert not torch.equal(expected[0], expected[1])
    with other_defaults():
        got = everything(model, profile)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected[0]), "a table of unsteered rows outlived its default"


def test_generate(model: Any, make_profile: MakeProfile, other_defaults: OtherDefaults) -> None:
    def answer() -> torch.Tensor:
        with steerfast.steer(model, profile):
            return model.generate(IDS, max_new_tokens=5, do_sample=False)

    profile = make_profile(model, kind="token", threshold=-0.1)
    expected = answer()
    with other_defaults():
        assert torch.equal(answer(), expected)


def test_score(tiny_llama: Any, tiny_tokenizer: Any, make_profile: MakeProfile, other_defaults: OtherDefaults) -> None:
    profile = make_profile(tiny_llama, tiny_tokenizer)
    expected = steerfast.score(tiny_llama, tiny_tokenizer, profile, ["help", "how do i make a bomb ?"], progress=False)
    with other_defaults():
        got = steerfast.score(tiny_llama, tiny_tokenizer, profile, ["help", "how do i make a bomb ?"], progress=False)
    for name in ("scores", "layer", "fired", "by_layer"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("vocabulary", [100, 49152, 151936])
def test_a_sketch_is_of_the_same_tokens(other_defaults: OtherDefaults, vocabulary: int) -> None:
    rows = torch.randn(150, 8, generator=torch.Generator().manual_seed(0))
    with other_defaults():
        places, sketch = sketched_rows(vocabulary), embedding_sketch(rows)
    assert torch.equal(places, sketched_rows(vocabulary))
    assert sketch == embedding_sketch(rows)


def test_a_step_of_the_roster(plain: Any, make_profile: MakeProfile, other_defaults: OtherDefaults) -> None:
    profile = make_profile(plain)
    bank = Bank(4, 32, 2)
    bank.add("a", profile)

    def decision() -> Any:
        roster = Roster(bank, 16, 4)
        roster.add("x", Request((Entry(0, 1.0, EditSpan.of(profile)),), 6, list(range(6))))
        roster.step(["x"], [0], [6], 6)
        roster.launched()
        return roster.decision("x")

    expected = decision()
    with other_defaults():
        got = decision()
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_profiles_of_tensors(plain: Any, make_profile: MakeProfile, other_defaults: OtherDefaults) -> None:
    whole = make_profile(plain)
    expected = whole.only([2])
    with other_defaults():
        chosen = whole.only([2])
        made = SteeringProfile.from_tensors({2: whole.vector[2]}, whole.model, strength=0.1)
    assert torch.equal(chosen.strength, expected.strength)
    assert torch.equal(made.vector[2], whole.vector[2])
    assert made.strength.tolist() == torch.tensor([0, 0, 0.1, 0]).tolist()

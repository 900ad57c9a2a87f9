"""Passes without data between real ones, as memory estimators run them: real ones are steered as if alone."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from model_cases import MakeProfile
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import steerfast
from steerfast.hf import fused
from steerfast.profile import SteeringProfile
from steerfast.runtime.buffers import Buffers

pytestmark = pytest.mark.contract

IDS = torch.tensor([[5, 9, 3, 8, 20, 11], [4, 7, 7, 1, 2, 30]])


def passes(model: Any, ids: Tensor) -> list[Tensor]:
    """Return the logits of a prompt and of two answer tokens after it."""
    out = model(ids)
    answers = [model(token, past_key_values=out.past_key_values).logits for token in (ids[:, :1], ids[:, 1:2])]
    return [out.logits, *answers]


def between(model: Any, profile: SteeringProfile | None, fake: bool) -> list[Tensor]:
    """Return real passes of three shapes, with fake ones of the next shape after each, or without these."""
    fused._unsteered = Buffers()
    attached = contextlib.nullcontext() if profile is None else steerfast.steer(model, profile)
    found = []
    with torch.no_grad(), attached:
        for width in (3, 4, 5):
            found += passes(model, IDS[:, :width])
            if fake:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    assert passes(model, mode.from_tensor(IDS[:, : width + 1]))[0].shape == (2, width + 1, 96)
    return found


@pytest.mark.parametrize("kind", [None, "always", "prompt", "token"])
def test_real_passes_keep_their_bits(model: Any, make_profile: MakeProfile, kind: str | None) -> None:
    profile = None if kind is None else make_profile(model, kind=kind, threshold=-0.05)
    expected = between(copy.deepcopy(model), profile, fake=False)
    if profile is not None:
        assert not torch.equal(expected[0], between(model, None, fake=False)[0])
    for one, other in zip(between(model, profile, fake=True), expected, strict=True):
        assert type(one) is Tensor
        assert torch.equal(one, other)

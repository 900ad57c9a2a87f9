"""Token gates decide in the launch that edits: the same results as a decision in plain torch, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import MakeProfile
from torch import Tensor
from torch.profiler import ProfilerActivity

import steerfast
from steerfast.kernels.contract import GateOperands, Operands
from steerfast.runtime.step import LayerEdit, TokenStep

pytestmark = pytest.mark.contract

IDS = torch.tensor([[5, 9, 3, 8, 20], [0, 0, 4, 7, 1], [0, 6, 6, 2, 9]])
PROFILES: dict[str, list[dict[str, Any]]] = {
    "each layer": [{}],
    "a sensor": [{"sensor": 1, "layers": [2, 3]}],
    "a soft gate": [{"sharpness": 4.0, "edit": "clamp", "low": 0.5}],
    "an answer": [{"positions": "response"}],
    "a stack": [{"layers": [1, 2]}, {"seed": 1, "sensor": 2, "layers": [3], "threshold": 0.1}],
}


def decide_in_torch(step: TokenStep, operands: Operands, gates: GateOperands) -> LayerEdit:
    """Decide, and keep the highest of each sequence of this layer at once."""
    step._decide_now(operands.slots, gates)
    stack = operands.slots.shape[1]
    for latch, new in ((step.scores, gates.scores), (step.values, gates.values)):
        rows = new[gates.layer].view(latch.shape[1] // stack, -1, stack)
        latch[gates.layer] = torch.maximum(latch[gates.layer], rows.amax(dim=1).flatten())
    return LayerEdit(operands)


def run(model: Any, profiles: list[Any]) -> list[Tensor]:
    """Return logits, scores and decisions of padded prompts, and of two calls with answer tokens."""
    mask, found = (IDS != 0).long(), []
    with torch.no_grad(), steerfast.steer(model, None) as steering, steering.assigned([profiles] * 3):
        cache = None
        for ids in (IDS, IDS[:, 3:], IDS[:, 4:]):
            past = 0 if cache is None else cache.get_seq_length()
            seen = torch.cat([mask, torch.ones(3, past + ids.shape[1] - 5, dtype=mask.dtype)], dim=1) if past else mask
            out = model(ids, attention_mask=seen, past_key_values=cache)
            cache = out.past_key_values
            found += [out.logits, steering.scores, steering.fired]
    return found


@pytest.mark.parametrize("name", PROFILES)
def test_the_launch_decides_as_plain_torch(
    model: Any, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    profiles = [make_profile(model, kind="token", **fields) for fields in PROFILES[name]]
    got = run(model, profiles)
    monkeypatch.setattr(TokenStep, "_decide", decide_in_torch)
    monkeypatch.setattr(TokenStep, "finish", lambda step: None)
    for one, other in zip(got, run(model, profiles), strict=True):
        assert torch.equal(one, other)
    assert any(each.any() for each in got[2::3])


def test_a_steered_layer_takes_few_ops(model: Any, make_profile: MakeProfile) -> None:
    def ops(layers: list[int]) -> int:
        with torch.no_grad(), steerfast.steer(model, make_profile(model, kind="token", layers=layers)):
            cache = model(IDS).past_key_values
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
                model(IDS[:, :1], past_key_values=cache)
        return sum("::" in event.name for event in profiler.events())

    assert ops([1, 2, 3]) - ops([1]) <= 2 * 24  # with views of operands and rows; plain torch took 480

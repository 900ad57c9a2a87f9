"""Every kind of edit in a tiny Llama, against geometry in float64 that shares no code with it."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerfast
from steerfast.profile import SteeringProfile

MakeProfile = Callable[..., SteeringProfile]
EDITS: dict[str, dict[str, Any]] = {
    "add": {"edit": "add"},
    "ablate": {"edit": "ablate"},
    "clamp": {"edit": "clamp", "low": -0.1, "high": 0.2},
    "clamp from below": {"edit": "clamp", "low": 0.3},
    "set": {"edit": "clamp", "low": 0.5, "high": 0.5},
    "keep_norm": {"edit": "keep_norm"},
    "rotate": {"edit": "rotate", "angle": 40.0},
    "rotate back": {"edit": "rotate", "angle": -200.0},
}
PROMPTS = [[5, 17, 40, 9, 77], [12, 33, 8, 90, 61, 25, 14], [101, 7, 55], [3, 99, 42, 18]]


def edited(x: Tensor, share: Tensor, profile: SteeringProfile, layer: int) -> Tensor:
    """Rows x [..., H] float64 after the edit at `share` [...]: strength times gate value."""
    v, d, b = profile.vector[layer].double(), profile.direction[layer].double(), share[..., None]
    e1 = v / v.norm()
    along = (x @ e1)[..., None]
    if profile.edit == "add":
        return x + b * v
    if profile.edit == "ablate":
        return x - b * along * e1
    if profile.edit == "clamp":
        return x + b * (along.clamp(profile.low * v.norm(), profile.high * v.norm()) - along) * e1
    if profile.edit == "keep_norm":
        y = x + b * v
        return y * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
    assert profile.angle is not None
    e2 = d - (d @ e1) * e1
    e2 = e2 / e2.norm()
    here = torch.complex((x @ e1), (x @ e2))
    target = here.abs() * cmath.rect(1.0, math.radians(profile.angle))
    there = here + share * (target - here)
    turn = there / there.abs() * here.abs() - here
    return x + turn.real[..., None] * e1 + turn.imag[..., None] * e2


@contextmanager
def oracle(model: Any, profile: SteeringProfile, strength: float, length: int) -> Iterator[None]:
    """Steer one unpadded sequence whose prompt has `length` tokens, every layer by its own gate."""

    def gate(x: Tensor, layer: int) -> Tensor:
        """[T] of rows x [T, H]."""
        if profile.gate.kind == "always":
            return torch.ones(len(x), dtype=torch.float64)
        d = profile.direction[layer].double()
        margin = (x @ d) / x.norm(dim=-1) - float(profile.threshold[layer])
        sharpness = profile.gate.sharpness
        value = torch.sigmoid(sharpness * margin) if sharpness else (margin > 0).double()
        return value if profile.gate.kind == "token" else value[length - 1].expand(len(x))

    def hook(module: nn.Module, args: Any, output: Tensor, layer: int) -> Tensor:
        x = output[0].double()
        share = gate(x.detach(), layer) * float(profile.strength[layer]) * strength
        y = torch.where((share != 0)[:, None], edited(x, share, profile, layer), x)
        return y.to(output.dtype)[None]

    handles = [
        model.model.layers[layer].register_forward_hook(lambda m, a, o, layer=layer: hook(m, a, o, layer))
        for layer in profile.steered_layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def left_padded() -> dict[str, Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("gate", ["always", "prompt", "token", "soft token"])
@pytest.mark.parametrize("name", EDITS)
def test_generation_equals_the_geometry(
    make_llama: Callable[..., Any], make_profile: MakeProfile, name: str, gate: str
) -> None:
    model = make_llama(eos_token_id=None)
    kind = {"kind": gate.split()[-1], "sharpness": 5.0 if "soft" in gate else 0.0}
    profile = make_profile(model, layers=[1, 3], size=9.0, **kind, **EDITS[name])
    with steerfast.steer(model, profile, strength=0.8):
        output = model.generate(
            **left_padded(), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    with torch.no_grad():
        stock = model(**left_padded()).logits[:, -1]
    assert (output.logits[0] != stock).any()
    for row, prompt in enumerate(PROMPTS):
        answer = output.sequences[row, -4:].tolist()
        with torch.no_grad(), oracle(model, profile, 0.8, len(prompt)):
            logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == answer
        torch.testing.assert_close(torch.stack(output.logits, dim=1)[row], logits, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EDITS)
def test_what_an_edit_promises_of_a_row(tiny_llama: Any, make_profile: MakeProfile, name: str, dtype: Any) -> None:
    model = tiny_llama.to(dtype)
    profile = make_profile(model, layers=[2], size=2.0, kind="always", **EDITS[name])
    rows: list[Tensor] = []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, output: rows.append(output[0].double()))
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        model(ids)
        with steerfast.steer(model, profile):
            model(ids)
    handle.remove()
    before, after = rows
    limit = 1e-5 if dtype == torch.float32 else 0.02
    v, d = profile.vector[2].double(), profile.direction[2].double()
    coefficient = after @ v / (v @ v)
    close = {"rtol": limit, "atol": limit}
    if name == "ablate":
        torch.testing.assert_close(coefficient, torch.zeros_like(coefficient), **close)
    elif profile.edit == "clamp":
        expected = (before @ v / (v @ v)).clamp(profile.low, profile.high)
        torch.testing.assert_close(coefficient, expected, **close)
        assert not torch.equal(before, after)
    elif profile.edit in ("keep_norm", "rotate"):
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), **close)
    if profile.edit == "rotate":
        assert profile.angle is not None
        e1 = v / v.norm()
        e2 = d - (d @ e1) * e1
        angle = torch.atan2(after @ e2 / e2.norm(), after @ e1)
        away = torch.remainder(angle - math.radians(profile.angle) + math.pi, 2 * math.pi) - math.pi
        torch.testing.assert_close(away, torch.zeros_like(away), rtol=0, atol=4 * limit)
    expected = edited(before, torch.ones(len(before), dtype=torch.float64), profile, 2)
    torch.testing.assert_close(after, expected, rtol=limit, atol=10 * limit)


@pytest.mark.parametrize("name", EDITS)
def test_shut_gates_keep_every_bit(tiny_llama: Any, make_profile: MakeProfile, name: str) -> None:
    batch = left_padded()
    for kind in ("prompt", "token"):
        profile = make_profile(tiny_llama, kind=kind, threshold=1.5, **EDITS[name])
        with torch.no_grad():
            stock = tiny_llama(**batch).logits
            with steerfast.steer(tiny_llama, profile) as steering:
                assert torch.equal(tiny_llama(**batch).logits, stock)
                assert not steering.fired.any()
            with steerfast.steer(tiny_llama, make_profile(tiny_llama, kind=kind, threshold=-1.5, **EDITS[name])):
                assert not torch.equal(tiny_llama(**batch).logits, stock)


@pytest.mark.parametrize("gate", ["always", "prompt", "token"])
@pytest.mark.parametrize("name", EDITS)
def test_gradients_equal_those_of_the_geometry(
    tiny_llama: Any, make_profile: MakeProfile, name: str, gate: str
) -> None:
    profile = make_profile(tiny_llama, layers=[1, 3], kind=gate, sharpness=4.0, **EDITS[name])
    ids = torch.tensor([PROMPTS[1]])

    def gradient() -> Tensor:
        embeds = tiny_llama.get_input_embeddings()(ids).detach().requires_grad_()
        tiny_llama(inputs_embeds=embeds, use_cache=False).logits[0, -1].logsumexp(dim=0).backward()
        assert embeds.grad is not None
        return embeds.grad

    with oracle(tiny_llama, profile, 1.0, ids.shape[1]):
        expected = gradient()
    with steerfast.steer(tiny_llama, profile):
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-4)

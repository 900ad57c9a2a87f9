"""What the ops read is what the profiles hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steerfast.bank import layer_bank
from steerfast.kernels import contract
from steerfast.profile import SteeringProfile


def test_a_slot_holds_its_profiles_layer(tiny_llama: Any, make_profile: Callable[..., SteeringProfile]) -> None:
    profiles = [
        make_profile(tiny_llama, seed=seed, threshold=0.1 * seed, sharpness=float(seed), strength=0.5 + seed)
        for seed in range(3)
    ]
    for layer in range(5):
        bank = layer_bank(profiles, layer)
        assert bank.table.shape == (3, contract.TABLE_WIDTH)
        for slot, profile in enumerate(profiles):
            assert torch.equal(bank.directions[slot], profile.direction[layer])
            assert torch.equal(bank.vectors[slot], profile.vector[layer])
            row = bank.table[slot]
            assert row[contract.THRESHOLD] == profile.threshold[layer]
            assert row[contract.SHARPNESS] == profile.gate.sharpness
            assert row[contract.STRENGTH] == profile.strength[layer]
            v, d = profile.vector[layer].double(), profile.direction[layer].double()
            torch.testing.assert_close(row[contract.VECTOR_SQ].double(), v @ v, rtol=1e-6, atol=0)
            torch.testing.assert_close(row[contract.VECTOR_DIRECTION].double(), v @ d, rtol=1e-6, atol=1e-6)
        assert {t.dtype for t in (bank.directions, bank.vectors, bank.table)} == {torch.float32}


def test_a_bank_is_made_on_its_device(tiny_llama: Any, make_profile: Callable[..., SteeringProfile]) -> None:
    bank = layer_bank([make_profile(tiny_llama)], 2, "meta")
    assert {t.device.type for t in (bank.directions, bank.vectors, bank.table)} == {"meta"}

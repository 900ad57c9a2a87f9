"""The bank: profiles on a device, in the layout the ops read.

Slots number the profiles. Per layer the bank holds directions and vectors [slots, H] and the ops' scalar table
[slots, TABLE_WIDTH]; all float32, so that what a gate reads is exactly what the profile's file holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfast.kernels import contract
from steerfast.profile import SteeringProfile


@dataclass(frozen=True)
class LayerBank:
    """One layer's guidance, all float32: directions and vectors [slots, H], table [slots, TABLE_WIDTH]."""

    directions: Tensor
    vectors: Tensor
    table: Tensor


def layer_bank(profiles: Sequence[SteeringProfile], layer: int, device: torch.device | str = "cpu") -> LayerBank:
    """Put one layer of `profiles` on `device`; slot i is profile i."""
    directions = torch.stack([profile.direction[layer] for profile in profiles])
    vectors = torch.stack([profile.vector[layer] for profile in profiles])
    table = torch.zeros(len(profiles), contract.TABLE_WIDTH, dtype=torch.float32, device="cpu")
    table[:, contract.THRESHOLD] = torch.stack([profile.threshold[layer] for profile in profiles])
    for slot, profile in enumerate(profiles):
        table[slot, contract.SHARPNESS] = profile.gate.sharpness
    table[:, contract.STRENGTH] = torch.stack([profile.strength[layer] for profile in profiles])
    table[:, contract.VECTOR_SQ] = vectors.double().square().sum(1).float()
    table[:, contract.VECTOR_DIRECTION] = (vectors.double() * directions.double()).sum(1).float()
    return LayerBank(directions.to(device), vectors.to(device), table.to(device))

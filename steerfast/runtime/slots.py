"""Profiles in use on a model: each has a slot in the banks on the model's devices until others need it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from steerfast.errors import ProfileError, SteerfastError
from steerfast.kernels.contract import Kinds
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.runtime.bank import Bank, kinds_of
from steerfast.runtime.tables import UNSTEERED

__all__ = ["ProfileSlots"]

_CHANGES = threading.RLock()
"""Held while profiles or banks are added: requests come from one thread, and banks are first asked for by another."""

_SLOTS = 17  # 16 beside the model's own; those not used for longest make room for others


class ProfileSlots:
    """Which slot holds which profile, the same on all devices.

    Args:
        identity: of the model that the profiles have to fit.
        device: where the first bank is made, so that a profile which no bank can hold is refused at once.

    Attributes:
        kinds: what the profiles do that have been here.
        changes: how often a slot got another profile.
        layers: where they steer or decide. gate_layers: where they decide. sensors: where one decides for all layers.
        mean_layers: where one reads a mean.
    """

    def __init__(self, identity: ModelIdentity, device: torch.device) -> None:
        self.identity = identity
        self.kinds = Kinds.LATCHED_ADD
        self.changes = 0
        self.layers: set[int] = set()
        self.gate_layers: set[int] = set()
        self.sensors: set[int] = set()
        self.mean_layers: set[int] = set()
        self._device = device
        self._profiles: list[SteeringProfile | None] = [None] * _SLOTS
        self._names: list[str] = [""] * _SLOTS  # their checksums, which take a hash over all they hold
        self._used: list[int] = list(range(_SLOTS))  # slots, longest unused first
        self._banks: dict[torch.device, Bank] = {}

    def check(self, name: str, profile: SteeringProfile) -> None:
        """Raise ProfileError where the profile, given as argument `name`, is another model's or steers no layer."""
        if (problem := profile.model.mismatch(self.identity)) is not None:
            raise ProfileError(f"{name}: {problem}")
        if not profile.steered_layers:
            raise ProfileError(f"{name}: expected a strength other than 0 in at least one layer, got none (run tune)")

    def take(self, profiles: Sequence[SteeringProfile | None], held: set[int]) -> list[int]:
        """The slot of each profile, -1 for None. Slots that are `held`, and those of `profiles`, keep what they hold.

        Raises:
            ProfileError: a profile belongs to another model, steers no layer, or no bank can hold it.
            SteerfastError: too many profiles, or token gates together with others.
        """
        for i, profile in enumerate(profiles):
            if profile is not None:
                if not isinstance(profile, SteeringProfile):
                    raise SteerfastError(f"steering[{i}]: expected a profile or None, got {type(profile).__name__}")
                self.check(f"steering[{i}]", profile)
        checksums = ["" if profile is None else profile.checksum for profile in profiles]
        distinct = {name: profile for name, profile in zip(checksums, profiles, strict=True) if profile is not None}
        held = held - {UNSTEERED}
        most = min(_SLOTS - 1, _SLOTS - sum(self._names[slot] not in distinct for slot in held))
        if len(distinct) > most:
            others = "" if most == _SLOTS - 1 else " beside those of requests that still run"
            raise SteerfastError(f"steering: expected at most {most} profiles in a batch{others}, got {len(distinct)}")
        if len({profile.gate.kind == "token" for profile in distinct.values()}) > 1:
            raise SteerfastError("steering: expected token gates for all sequences of a batch or for none, got both")
        held |= {slot for slot, name in enumerate(self._names) if name in distinct}
        slots = {"": UNSTEERED}
        with _CHANGES:
            for checksum, profile in distinct.items():
                slots[checksum] = self._take(checksum, profile, held)
                held.add(slots[checksum])
        return [slots[checksum] for checksum in checksums]

    def _take(self, checksum: str, profile: SteeringProfile, held: set[int]) -> int:
        """The slot of a profile; where it has none, the one not used for longest becomes its own, `held` ones aside."""
        if checksum in self._names:
            slot = self._names.index(checksum)
        else:
            slot = next(slot for slot in self._used if slot not in held)
            if not self._banks:
                self.bank(self._device)
            for bank in self._banks.values():
                bank.replace(str(slot), profile) if str(slot) in bank.names else bank.add(str(slot), profile)
            self._profiles[slot], self._names[slot] = profile, checksum
            self.changes += 1
            self.kinds = max(self.kinds, kinds_of(profile))
            self.gate_layers.update(profile.gate_layers)
            self.layers.update(profile.steered_layers, profile.gate_layers)
            if profile.gate.pooling == "mean":
                self.mean_layers.update(profile.gate_layers)
            if isinstance(profile.sensor, int) and profile.gate.kind == "prompt":
                self.sensors.add(profile.sensor)
        self._used.remove(slot)
        self._used.append(slot)
        return slot

    def at(self, slot: int) -> SteeringProfile:
        """The profile in a slot that holds one."""
        profile = self._profiles[slot]
        assert profile is not None
        return profile

    def name(self, slot: int) -> str:
        """What tells the profile in a slot from all others; "-" for slot -1."""
        return self._names[slot] if slot >= 0 else "-"

    def bank(self, device: torch.device) -> Bank:
        """All profiles on `device`; a model may lie on several."""
        if device not in self._banks:
            with _CHANGES:
                if device not in self._banks:
                    self._banks[device] = self._make_bank(device)
        return self._banks[device]

    def _make_bank(self, device: torch.device) -> Bank:
        bank = Bank(self.identity.num_layers, self.identity.hidden_size, _SLOTS, device, kinds=Kinds.ANY)
        for slot, profile in enumerate(self._profiles):
            if profile is not None:
                bank.add(str(slot), profile)
        return bank

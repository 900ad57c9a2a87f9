"""Slots of the profiles in use on a model, the same in the banks on all its devices."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch

from steerfast.errors import ProfileError, SteerfastError
from steerfast.kernels.contract import Kinds
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.runtime.bank import Bank, Reach
from steerfast.runtime.span import UNSTEERED

_CHANGES = threading.RLock()
"""Held while profiles or banks are added: one thread adds requests, another may make the first bank."""

_SLOTS = 17  # 16 and the model's own; a new profile takes the slot that was unused for longest


class ProfileSlots:
    """Keep each profile in one slot, the same on all devices.

    Args:
        identity: of the model.
        device: of the first bank, so that a profile that no bank can hold is refused at once.

    Attributes:
        reach: the layers where all profiles so far act.
        changes: how often a slot got another profile.
    """

    def __init__(self, identity: ModelIdentity, device: torch.device) -> None:
        self.identity = identity
        self.reach = Reach()
        self.changes = 0
        self._device = device
        self._profiles: list[SteeringProfile | None] = [None] * _SLOTS
        self._names: list[str] = [""] * _SLOTS  # the profiles' checksums
        self._used: list[int] = list(range(_SLOTS))  # slots, longest unused first
        self._banks: dict[torch.device, Bank] = {}

    def check(self, name: str, profile: SteeringProfile) -> None:
        """Raise ProfileError if the profile of argument `name` is another model's or steers no layer."""
        if (problem := profile.model.mismatch(self.identity)) is not None:
            raise ProfileError(f"{name}: {problem}")
        if not profile.steered_layers:
            raise ProfileError(f"{name}: expected a strength other than 0 in at least one layer, got none (run tune)")

    def take(self, profiles: Mapping[str, SteeringProfile | None], held: set[int]) -> dict[str, int]:
        """Return the slot of each profile, -1 for None, by argument.

        Slots in `held`, and slots of `profiles`, keep their profiles.

        Raises:
            ProfileError: a profile belongs to another model, steers no layer, or does not fit the bank.
            SteerfastError: too many profiles, or token gates together with other gates.
        """
        for argument, profile in profiles.items():
            if profile is not None:
                if not isinstance(profile, SteeringProfile):
                    raise SteerfastError(f"{argument}: expected a profile or None, got {kind_of(profile)}")
                self.check(argument, profile)
        checksums = {argument: "" if profile is None else profile.checksum for argument, profile in profiles.items()}
        distinct = {checksums[argument]: profile for argument, profile in profiles.items() if profile is not None}
        most = min(_SLOTS - 1, _SLOTS - sum(self._names[slot] not in distinct for slot in held))
        if len(distinct) > most:
            others = "" if most == _SLOTS - 1 else " beside those of requests that still run"
            raise SteerfastError(f"steering: expected at most {most} profiles in a batch{others}, got {len(distinct)}")
        if len({profile.gate.kind == "token" for profile in distinct.values()}) > 1:
            raise SteerfastError("steering: expected token gates for all sequences of a batch or for none, got both")
        held = held | {slot for slot, name in enumerate(self._names) if name in distinct}
        slots = {"": UNSTEERED}
        with _CHANGES:
            for checksum, profile in distinct.items():
                slots[checksum] = self._take(checksum, profile, held)
                held.add(slots[checksum])
        return {argument: slots[checksum] for argument, checksum in checksums.items()}

    def _take(self, checksum: str, profile: SteeringProfile, held: set[int]) -> int:
        """Return the slot of a profile; a new profile takes the slot unused for longest that is not held."""
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
            if (reach := self.reach | Reach.of([profile])) != self.reach:
                self.reach = reach
        self._used.remove(slot)
        self._used.append(slot)
        return slot

    def at(self, slot: int) -> SteeringProfile:
        """Return the profile in a slot that holds one."""
        profile = self._profiles[slot]
        assert profile is not None
        return profile

    def name(self, slot: int) -> str:
        """Return a text that tells the profile in a slot from all others; "-" for slot -1."""
        return self._names[slot] if slot >= 0 else "-"

    def bank(self, device: torch.device) -> Bank:
        """Return all profiles on `device`; a model may lie on several."""
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


def kind_of(value: Any) -> str:
    """Return the type of what stands in place of a profile; for a path, how to load it."""
    hint = (
        f" (SteeringProfile.from_pretrained({str(value)!r}) loads it)" if isinstance(value, str | os.PathLike) else ""
    )
    return type(value).__name__ + hint

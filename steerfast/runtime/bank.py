"""The bank: profiles on a device, in the layout that the ops read, at addresses that never change.

A profile takes one slot in every layer. `add`, `replace` and `remove` write into the same memory. So a captured CUDA
graph or a compiled model sees the change without another capture or compilation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.kernels import contract
from steerfast.kernels.contract import GateKind, Kinds, Score
from steerfast.kernels.edit_kinds import EDITS
from steerfast.profile import SteeringProfile

__all__ = ["Bank", "Deciders", "LayerBank", "Reach", "kinds_of"]


class Deciders(NamedTuple):
    """Hold which gates decide in a step. A decider is one profile on one sequence, see `steerfast.runtime.decide`.

    Attributes:
        row: int32 [layers, n·K], the row that the gate reads; -1: none.
        closes: bool [layers, n·K], whether the mean that the gate reads ends in this step.
        senses: bool [layers, n·K], whether the decision is for all layers.
    """

    row: Tensor
    closes: Tensor
    senses: Tensor


@dataclass(frozen=True)
class Reach:
    """Hold the layers at which some profiles act.

    Attributes:
        gates: layers where a gate decides. means: layers where it reads a mean.
        sensors: layers where it decides for all layers. edits: layers that are edited.
        kinds: the smallest kind of slot that holds the profiles.
    """

    gates: frozenset[int] = frozenset()
    means: frozenset[int] = frozenset()
    sensors: frozenset[int] = frozenset()
    edits: frozenset[int] = frozenset()
    kinds: Kinds = Kinds.LATCHED_ADD

    @classmethod
    def of(cls, profiles: Iterable[SteeringProfile]) -> Reach:
        """Return where these profiles act."""
        reach = cls()
        for profile in profiles:
            gates = frozenset(profile.gate_layers)
            reach |= cls(
                gates=gates,
                means=gates if profile.gate.pooling == "mean" else frozenset(),
                sensors=gates if profile.sensor != "own" and profile.gate.kind == "prompt" else frozenset(),
                edits=frozenset(profile.steered_layers),
                kinds=kinds_of(profile),
            )
        return reach

    def __or__(self, other: Reach) -> Reach:
        return Reach(
            self.gates | other.gates,
            self.means | other.means,
            self.sensors | other.sensors,
            self.edits | other.edits,
            max(self.kinds, other.kinds),
        )

    @property
    def layers(self) -> frozenset[int]:
        """Layers with a gate or an edit."""
        return self.gates | self.edits


@dataclass(frozen=True)
class LayerBank:
    """Hold one layer's slots: views of the bank's memory, in the argument order of the ops.

    vectors, directions: [slots, H], of the bank's dtype. table: float32 [slots, TABLE_WIDTH]. kinds: the bank's.
    """

    vectors: Tensor
    directions: Tensor
    table: Tensor
    kinds: Kinds


def kinds_of(profile: SteeringProfile) -> Kinds:
    """Return the smallest kind of slot that holds `profile`: token gates and edits other than ``add`` need `ANY`."""
    simple = not EDITS[profile.edit].reads_sums and profile.gate.kind != "token"
    return Kinds.LATCHED_ADD if simple else Kinds.ANY


class Bank:
    """Hold profiles of one model on a device, by name.

    A row or sequence names its profile by slot. An empty slot does not edit rows. The slot of a removed profile is
    reused last, but rows must stop naming it for that profile. Changes go to the device's current stream: earlier
    launches read the old profile, later launches the new profile. A refused change changes nothing.

    Args:
        num_layers: decoder layers of the model.
        hidden_size: H, width of its residual stream.
        slots: the most profiles.
        device: of the memory.
        dtype: of vectors and directions. Gates and sums are exact for the stored values.
        kinds: the kinds of profiles. `Kinds.LATCHED_ADD` needs no sums over rows, and takes only ``add`` edits with an
            ``always`` or ``prompt`` gate.

    Attributes:
        vectors: [layers, slots, H].
        directions: [layers, slots, H].
        table: float32 [layers, slots, TABLE_WIDTH], see `steerfast.kernels.contract`.
        gates: bool [layers, slots], the layers where a slot's gate decides.
        means: bool [layers, slots], the layers where it reads a mean.
        sensors: bool [layers, slots], the layers where a prompt gate decides for all layers.

    Raises:
        ValueError: a size is below 1, or the dtype is not supported.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        kinds: Kinds = Kinds.ANY,
    ) -> None:
        for name, size in (("num_layers", num_layers), ("hidden_size", hidden_size), ("slots", slots)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if dtype not in contract.FLOAT_DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        with torch.inference_mode(False):  # also serve callers outside inference mode
            shape = (num_layers, slots, hidden_size)
            self.vectors = torch.zeros(shape, dtype=dtype, device=device)
            self.directions = torch.zeros(shape, dtype=dtype, device=device)
            self.table = _empty_table(num_layers)[:, None].repeat(1, slots, 1).to(device)
            self.gates = torch.zeros(shape[:2], dtype=torch.bool, device=device)
            self.means = torch.zeros(shape[:2], dtype=torch.bool, device=device)
            self.sensors = torch.zeros(shape[:2], dtype=torch.bool, device=device)
            self.kinds = kinds
            self._layers = self._views()
        self._profiles: dict[str, SteeringProfile] = {}
        self._slots: dict[str, int] = {}
        self._free = deque(range(slots))

    def _views(self) -> list[LayerBank]:
        return [LayerBank(*each, self.kinds) for each in zip(self.vectors, self.directions, self.table, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views: pickle would give each a memory of its own."""
        return {name: value for name, value in vars(self).items() if name != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._layers = self._views()

    # -- content -------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The profiles' names, in the order of their slots."""
        return sorted(self._slots, key=self._slots.__getitem__)

    def slot(self, name: str) -> int:
        """Return the slot of the profile `name`.

        Raises:
            ProfileError: no profile has this name.
        """
        if name not in self._slots:
            raise ProfileError(f"name: expected one of {', '.join(self.names) or 'none'}, got {name!r}")
        return self._slots[name]

    def profile(self, name: str) -> SteeringProfile:
        """Return the profile `name`."""
        self.slot(name)
        return self._profiles[name]

    def layer(self, layer: int) -> LayerBank:
        """Return the slots of `layer` for the ops."""
        if torch.compiler.is_compiling():  # views in the graph: three tensors to guard and to pass, not three per layer
            return LayerBank(self.vectors[layer], self.directions[layer], self.table[layer], self.kinds)
        return self._layers[layer]

    def deciders(self, row: Tensor, slot: Tensor) -> Deciders:
        """Return the gates of each layer that decide, and the rows that they read.

        Args:
            row: int32 [n], the row at which the prompt gates of each sequence decide; -1: none in this step.
            slot: int32 [n, K], the slots of each sequence; -1: none. [n]: K is 1.
        """
        if slot.dim() == 2 and slot.shape[1] > 1:
            row = row.repeat_interleave(slot.shape[1])
        slot = slot.flatten()
        index = slot.long()
        here = self.gates[:, index] & (row >= 0) & (slot >= 0)
        closes = here & self.means[:, index]
        return Deciders(torch.where(here & ~closes, row, -1), closes, here & self.sensors[:, index])

    # -- changes -------------------------------------------------------------------------------------------------------

    def add(self, name: str, profile: SteeringProfile, slot: int | None = None) -> int:
        """Put `profile` into `slot`, or any free slot, and return the slot.

        Raises:
            ProfileError: the name or the slot is taken, the bank is full, or the profile does not fit the bank or the
                model of the other profiles.
        """
        if name in self._slots:
            raise ProfileError(f"name: expected a new one, got {name!r}, which slot {self._slots[name]} holds")
        if not self._free:
            count = len(self._slots)
            raise ProfileError(f"profile {name!r}: expected a free slot, got a full bank ({count} slots)")
        if slot is not None and slot not in self._free:
            raise ProfileError(f"slot: expected a free one, got {slot}")
        staged = self._prepare(name, profile)
        slot = self._free[0] if slot is None else slot
        self._free.remove(slot)
        self._write(slot, profile, *staged)
        self._slots[name], self._profiles[name] = slot, profile
        return slot

    def replace(self, name: str, profile: SteeringProfile) -> None:
        """Put `profile` into the slot of `name`.

        Raises:
            ProfileError: no profile has this name, or `profile` does not fit.
        """
        slot = self.slot(name)
        self._write(slot, profile, *self._prepare(name, profile))
        self._profiles[name] = profile

    def remove(self, name: str) -> None:
        """Empty the slot of `name`: rows that still name it are not edited.

        Raises:
            ProfileError: no profile has this name.
        """
        slot = self.slot(name)
        layers, _, hidden = self.vectors.shape
        zeros = torch.zeros(layers, hidden, dtype=self.vectors.dtype, device="cpu")
        self._write(slot, None, zeros, zeros, _empty_table(layers))
        del self._slots[name], self._profiles[name]
        self._free.append(slot)

    def _prepare(self, name: str, profile: SteeringProfile) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors and directions [layers, H] and table [layers, TABLE_WIDTH] of `profile` on the CPU.

        Raises:
            ProfileError: the profile does not fit.
        """
        for what, have, want in (
            ("layers", profile.model.num_layers, self.vectors.shape[0]),
            ("hidden size", profile.model.hidden_size, self.vectors.shape[2]),
        ):
            if have != want:
                raise ProfileError(f"profile {name!r}: expected {what} {want} like the bank, got {have}")
        for other, held in self._profiles.items():
            if other != name and (problem := held.model.mismatch(profile.model)) is not None:
                raise ProfileError(f"profile {name!r}: expected the model of profile {other!r}; {problem}")
        if self.kinds == Kinds.LATCHED_ADD and kinds_of(profile) != Kinds.LATCHED_ADD:
            raise ProfileError(
                f"profile {name!r}: expected an 'add' edit with an always or prompt gate, as the bank was made for, "
                f"got {profile.edit!r} with a {profile.gate.kind} gate"
            )
        vectors, directions = profile.vector.to(self.vectors.dtype), profile.direction.to(self.vectors.dtype)
        for what, stored in (("vector", vectors), ("direction", directions)):
            if not bool(stored.isfinite().all()):
                raise ProfileError(f"profile {name!r}: expected a {what} within the range of {stored.dtype}, got inf")
        return vectors, directions, _table(name, profile, vectors.double(), directions.double())

    def _write(
        self, slot: int, profile: SteeringProfile | None, vectors: Tensor, directions: Tensor, table: Tensor
    ) -> None:
        self.vectors[:, slot].copy_(vectors)
        self.directions[:, slot].copy_(directions)
        self.table[:, slot].copy_(table)
        gates = torch.zeros(len(table), dtype=torch.bool, device="cpu")
        if profile is not None:
            gates[profile.gate_layers] = True
        self.gates[:, slot].copy_(gates)
        self.means[:, slot].copy_(gates & (profile is not None and profile.gate.pooling == "mean"))
        single = profile is not None and profile.sensor != "own" and profile.gate.kind == "prompt"
        self.sensors[:, slot].copy_(gates & single)


def _empty_table(layers: int) -> Tensor:
    """Return the table rows [layers, TABLE_WIDTH] of an empty slot."""
    table = torch.zeros(layers, contract.TABLE_WIDTH, dtype=torch.float32, device="cpu")
    table[:, contract.THRESHOLD] = math.inf
    table[:, contract.GATE] = GateKind.PROMPT
    return table


def _table(name: str, profile: SteeringProfile, vectors: Tensor, directions: Tensor) -> Tensor:
    """Return the table rows [layers, TABLE_WIDTH] of `profile`; vectors, directions: float64 [layers, H], as stored."""
    table = torch.zeros(len(vectors), contract.TABLE_WIDTH, dtype=torch.float32, device="cpu")
    table[:, contract.THRESHOLD] = profile.threshold
    table[:, contract.SHARPNESS] = profile.gate.sharpness
    table[:, contract.STRENGTH] = profile.strength
    table[:, contract.VECTOR_SQ] = vectors.square().sum(1).float()
    table[:, contract.VECTOR_DIRECTION] = (vectors * directions).sum(1).float()
    table[:, contract.DIRECTION_SQ] = directions.square().sum(1).float()
    if not bool(table.isfinite().all()):
        raise ProfileError(f"profile {name!r}: expected vectors whose squared norm float32 can hold, got inf")
    table[:, contract.GATE] = GateKind[profile.gate.kind.upper()]
    if profile.gate.kind == "token" and profile.sensor != "own":
        table[profile.sensor + 1 :, contract.GATE] = GateKind.PROMPT  # these layers read the sensor's decision
    table[:, contract.SCORE] = Score[profile.gate.score.upper()]
    edit = EDITS[profile.edit]
    table[:, contract.EDIT] = edit.id
    table[:, contract.LOW], table[:, contract.HIGH] = edit.columns(**edit.given(profile))
    return table

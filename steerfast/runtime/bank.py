"""The bank: profiles on a device, in the layout that the ops read, at addresses that never change.

A profile takes one slot in every layer. `add`, `replace` and `remove` write into the same memory. So a captured CUDA
graph or a compiled model sees the change without another capture or compilation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.kernels import contract
from steerfast.kernels.contract import Decides, GateKind, Kinds, Reading, Score
from steerfast.kernels.edit_kinds import EDITS
from steerfast.profile import SteeringProfile


@dataclass(frozen=True)
class Reach:
    """Hold the layers at which some profiles act.

    Attributes:
        gates: layers where a gate decides. edits: layers that are edited.
        kinds: the smallest kind of slot that holds the profiles.
    """

    gates: frozenset[int] = frozenset()
    edits: frozenset[int] = frozenset()
    kinds: Kinds = Kinds.LATCHED_ADD

    @classmethod
    def of(cls, profiles: Iterable[SteeringProfile]) -> Reach:
        """Return where these profiles act."""
        profiles = list(profiles)
        return cls(
            frozenset(layer for profile in profiles for layer in profile.gate_layers),
            frozenset(layer for profile in profiles for layer in profile.steered_layers),
            max(map(kinds_of, profiles), default=Kinds.LATCHED_ADD),
        )

    def __or__(self, other: Reach) -> Reach:
        return Reach(self.gates | other.gates, self.edits | other.edits, max(self.kinds, other.kinds))


@dataclass(frozen=True)
class LayerBank:
    """Hold one layer's slots: views of the bank's memory, in the argument order of the ops.

    vectors, directions, mean_directions: [slots, H], of the bank's dtype. table: float32 [slots, TABLE_WIDTH].
    """

    vectors: Tensor
    directions: Tensor
    mean_directions: Tensor
    table: Tensor


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
        mean_directions: [layers, slots, H], what gates read in a mean.
        table: float32 [layers, slots, TABLE_WIDTH], see `steerfast.kernels.contract`.

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
            self.mean_directions = torch.zeros(shape, dtype=dtype, device=device)
            self.table = _empty_table(num_layers)[:, None].repeat(1, slots, 1).to(device)
            self.kinds = kinds
            self._layers = self._views()
        self._profiles: dict[str, SteeringProfile] = {}
        self._slots: dict[str, int] = {}
        self._free = deque(range(slots))

    def _views(self) -> list[LayerBank]:
        return [LayerBank(*each) for each in zip(*self.tensors, strict=True)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All memory: vectors, directions, mean_directions and table."""
        return self.vectors, self.directions, self.mean_directions, self.table

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
        if torch.compiler.is_compiling():  # views in the graph: four tensors to guard and to pass, not four per layer
            return LayerBank(*(tensor[layer] for tensor in self.tensors))
        return self._layers[layer]

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
        self._write(slot, *staged)
        self._slots[name], self._profiles[name] = slot, profile
        return slot

    def replace(self, name: str, profile: SteeringProfile) -> None:
        """Put `profile` into the slot of `name`.

        Raises:
            ProfileError: no profile has this name, or `profile` does not fit.
        """
        slot = self.slot(name)
        self._write(slot, *self._prepare(name, profile))
        self._profiles[name] = profile

    def remove(self, name: str) -> None:
        """Empty the slot of `name`: rows that still name it are not edited.

        Raises:
            ProfileError: no profile has this name.
        """
        slot = self.slot(name)
        layers, _, hidden = self.vectors.shape
        zeros = torch.zeros(layers, hidden, dtype=self.vectors.dtype, device="cpu")
        self._write(slot, zeros, zeros, zeros, _empty_table(layers))
        del self._slots[name], self._profiles[name]
        self._free.append(slot)

    def _prepare(self, name: str, profile: SteeringProfile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return vectors and both directions [layers, H] and table [layers, TABLE_WIDTH] of `profile` on the CPU.

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
        dtype = self.vectors.dtype
        vectors, directions, means = (
            given.to(dtype) for given in (profile.vector, profile.direction, profile.read_in_mean)
        )
        for what, stored in (("vector", vectors), ("direction", directions), ("mean_direction", means)):
            if not bool(stored.isfinite().all()):
                raise ProfileError(f"profile {name!r}: expected a {what} within the range of {stored.dtype}, got inf")
        return vectors, directions, means, _table(name, profile, vectors.double(), directions.double())

    def _write(self, slot: int, *tensors: Tensor) -> None:
        for own, new in zip(self.tensors, tensors, strict=True):
            own[:, slot].copy_(new)


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
    table[profile.gate_layers, contract.DECIDES] = Decides.HERE if profile.sensor == "own" else Decides.EVERYWHERE
    table[:, contract.READING] = Reading[profile.gate.pooling.upper()]
    return table

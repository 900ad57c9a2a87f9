"""The profiles of an engine: their names and versions, the slots of these, and how many requests hold each.

A profile with named thresholds has a slot, and so a version, for each: a request at another threshold is steered by
another profile. A replaced or removed version stays in its slot until its last request ended. Then the slot is emptied,
and free. Threads may share a registry.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.runtime.span import EditSpan


def variants(profile: SteeringProfile) -> dict[str | None, SteeringProfile]:
    """Return the profile at the threshold in use, then at its others, by name; each takes a slot."""
    others = (name for name in sorted(profile.points) if name != profile.point)
    return {profile.point: profile} | {name: profile.at(name) for name in others}


@dataclass(eq=False)
class Version:
    """One load of a profile, at one threshold.

    number: 1 for the first of its name. point: the threshold's name; None: it has none. path: the file.
    span: the rows that it edits and reads.
    abstain: lower ends of the abstain bands of its gates, ascending by layer; empty where it has no band.
    requests: how many hold it. current: whether new requests can.
    """

    name: str
    number: int
    slot: int
    path: str
    checksum: str
    span: EditSpan
    abstain: tuple[float, ...] = ()
    point: str | None = None
    requests: int = field(default=0, init=False)
    current: bool = field(default=True, init=False)


class Registry:
    """The profiles of an engine of `slots` slots.

    A slot is free; or `take` took it, until `put` or `spoil`; or a version has it; or it is spoilt, until workers
    emptied it and `free` is called.

    Attributes:
        spoilt: slots that workers have to empty.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.spoilt: deque[int] = deque()
        self._free = deque(range(slots))
        self._current: dict[str, list[Version]] = {}  # the first is at the threshold in use
        self._retired: list[Version] = []
        self._numbers: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def points(self) -> dict[str, list[str]]:
        """Return the profiles that requests may name, and their named thresholds."""
        with self._lock:
            return {name: [each.point for each in found if each.point] for name, found in self._current.items()}

    @property
    def in_use(self) -> int:
        """Return how many slots are not free."""
        return self.slots - len(self._free)

    def versions(self) -> list[Version]:
        """Return all that have a slot: the current ones, then those that requests still hold."""
        with self._lock:
            return [*(each for found in self._current.values() for each in found), *self._retired]

    def current(self, name: str, point: str | None = None) -> Version:
        """Return the version that new requests get at the threshold `point`; None: the threshold in use.

        Raises:
            ProfileError: there is none of this name, or no such threshold.
        """
        found = self._current.get(name)
        if found is None:
            raise ProfileError(f"name: expected one of {', '.join(self._current) or 'none'}, got {name!r}")
        version = found[0] if point is None else next((each for each in found if each.point == point), None)
        if version is None:
            raise ProfileError(f"threshold: expected one of {name}'s, got {point!r}")
        return version

    # -- requests ------------------------------------------------------------------------------------------------------

    def hold(self, *names: str, points: Iterable[str | None] = ()) -> tuple[Version, ...]:
        """Return the current versions of the profiles of a stack, for a request that will `release` them.

        Args:
            points: a threshold for each; without any: those in use.

        Raises:
            ProfileError: there is no profile of one of the names, or no such threshold; the request then holds none.
        """
        with self._lock:
            versions = tuple(map(self.current, names, points or [None] * len(names)))
            for version in versions:
                version.requests += 1
            return versions

    def release(self, *versions: Version) -> None:
        """Note that a request ended that held these versions."""
        with self._lock:
            for version in versions:
                version.requests -= 1
                self._empty_if_unused(version)

    # -- profiles ------------------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """Return slots that were free.

        Raises:
            ProfileError: there are not so many.
        """
        with self._lock:
            if len(self._free) < count:
                held = sum(version.requests for version in self._retired)
                raise ProfileError(
                    f"slots: expected {count} free, one for each threshold, got {self.in_use} of {self.slots} in use, "
                    f"{len(self._retired)} of them by replaced or removed profiles that {held} requests still use"
                )
            return [self._free.popleft() for _ in range(count)]

    def put(self, name: str, slots: Sequence[int], path: str, at: Mapping[str | None, SteeringProfile]) -> Version:
        """Let new requests get the `variants` of a profile, which lie in slots that were taken, by `name`.

        Returns:
            The version at the threshold in use.
        """
        with self._lock:
            self._numbers[name] += 1
            made = [
                Version(
                    name,
                    self._numbers[name],
                    slot,
                    path,
                    profile.checksum,
                    EditSpan.of(profile),
                    () if profile.abstain is None else tuple(profile.abstain[profile.gate_layers].tolist()),
                    point,
                )
                for slot, (point, profile) in zip(slots, at.items(), strict=True)
            ]
            before, self._current[name] = self._current.get(name, []), made
            for version in before:
                self._retire(version)
            return made[0]

    def retire(self, name: str) -> None:
        """Let no new request get the profile.

        Raises:
            ProfileError: there is none of this name.
        """
        with self._lock:
            self.current(name)
            for version in self._current.pop(name):
                self._retire(version)

    def spoil(self, slots: Iterable[int]) -> None:
        """Give up slots that were taken; their content is unknown."""
        self.spoilt.extend(slots)

    def free(self, slots: Iterable[int]) -> None:
        """Note that workers emptied these spoilt slots."""
        with self._lock:
            for slot in slots:
                self.spoilt.remove(slot)
                self._free.append(slot)

    def _retire(self, version: Version) -> None:
        version.current = False
        self._retired.append(version)
        self._empty_if_unused(version)

    def _empty_if_unused(self, version: Version) -> None:
        if not version.current and not version.requests:
            self._retired.remove(version)
            self.spoilt.append(version.slot)

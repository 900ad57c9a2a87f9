"""The profiles of an engine: their names and versions, the slots of these, and how many requests hold each.

A replaced or removed version stays in its slot until its last request ended. Then the slot is emptied, and free.
Threads may share a registry.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.runtime.span import EditSpan

__all__ = ["Registry", "Version"]


@dataclass(eq=False)
class Version:
    """One load of a profile.

    number: 1 for the first of its name. path: the file. span: the rows that it edits and reads.
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
        self._current: dict[str, Version] = {}
        self._retired: list[Version] = []
        self._numbers: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """Return the profiles that requests may name."""
        with self._lock:
            return list(self._current)

    @property
    def in_use(self) -> int:
        """Return how many slots are not free."""
        return self.slots - len(self._free)

    def versions(self) -> list[Version]:
        """Return all that have a slot: the current ones, then those that requests still hold."""
        with self._lock:
            return [*self._current.values(), *self._retired]

    def current(self, name: str) -> Version:
        """Return the version that new requests get.

        Raises:
            ProfileError: there is none of this name.
        """
        version = self._current.get(name)
        if version is None:
            raise ProfileError(f"name: expected one of {', '.join(self.names) or 'none'}, got {name!r}")
        return version

    # -- requests ------------------------------------------------------------------------------------------------------

    def hold(self, *names: str) -> tuple[Version, ...]:
        """Return the current versions of the profiles of a stack, for a request that will `release` them.

        Raises:
            ProfileError: there is no profile of one of the names; the request then holds none.
        """
        with self._lock:
            versions = tuple(map(self.current, names))
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

    def take(self) -> int:
        """Return a slot that was free.

        Raises:
            ProfileError: there is none.
        """
        with self._lock:
            if not self._free:
                held = sum(version.requests for version in self._retired)
                raise ProfileError(
                    f"slots: expected a free one, got {self.slots} in use, {len(self._retired)} of them by replaced or "
                    f"removed profiles that {held} requests still use"
                )
            return self._free.popleft()

    def put(self, name: str, slot: int, path: str, profile: SteeringProfile) -> Version:
        """Let new requests get `profile`, which lies in a slot that was taken, by `name`."""
        with self._lock:
            self._numbers[name] += 1
            abstain = () if profile.abstain is None else tuple(profile.abstain[profile.gate_layers].tolist())
            version = Version(name, self._numbers[name], slot, path, profile.checksum, EditSpan.of(profile), abstain)
            before = self._current.get(name)
            self._current[name] = version
            if before is not None:
                self._retire(before)
            return version

    def retire(self, name: str) -> None:
        """Let no new request get the profile.

        Raises:
            ProfileError: there is none of this name.
        """
        with self._lock:
            version = self.current(name)
            del self._current[name]
            self._retire(version)

    def spoil(self, slot: int) -> None:
        """Give up a slot that was taken; its content is unknown."""
        self.spoilt.append(slot)

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

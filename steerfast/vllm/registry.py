"""Which profiles an engine has: names, their versions, the slots these take, and the requests that hold them.

A replaced or removed version stays in its slot until the last request that began with it ended. Then the slot is
emptied, and free. Threads may share a registry.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.runtime.roster import reach

__all__ = ["Registry", "Version"]


@dataclass(eq=False)
class Version:
    """A profile as it was loaded once.

    number: 1 for the first of its name. path: the file. late: positions ``response``. open: it has no gate.
    answer_rows: how many rows after a prompt it steers. mean: of how many of a prompt's last rows its gates read
    the mean, 0: none.
    abstain: lower ends of the bands of its gates, ascending by layer; none where it has no band.
    requests: how many hold it. current: whether new requests can.
    """

    name: str
    number: int
    slot: int
    path: str
    checksum: str
    late: bool
    open: bool
    answer_rows: int
    mean: int
    abstain: tuple[float, ...] = ()
    requests: int = field(default=0, init=False)
    current: bool = field(default=True, init=False)


class Registry:
    """The profiles of an engine of `slots` slots.

    A slot is free; or `take` took it, until `put` or `spoil`; or a version has it; or it is spoilt, until it was
    emptied on the device and `free` says so.

    Attributes:
        spoilt: slots to be emptied.
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
        """Profiles that requests may name."""
        with self._lock:
            return list(self._current)

    @property
    def in_use(self) -> int:
        """Slots that are not free."""
        return self.slots - len(self._free)

    def versions(self) -> list[Version]:
        """All that have a slot: the current ones, then those that requests still hold."""
        with self._lock:
            return [*self._current.values(), *self._retired]

    def current(self, name: str) -> Version:
        """The version that new requests get.

        Raises:
            ProfileError: there is none of this name.
        """
        version = self._current.get(name)
        if version is None:
            raise ProfileError(f"name: expected one of {', '.join(self.names) or 'none'}, got {name!r}")
        return version

    # -- requests ------------------------------------------------------------------------------------------------------

    def hold(self, name: str) -> Version:
        """The current version of a profile, for a request that will `release` it.

        Raises:
            ProfileError: there is none of this name.
        """
        with self._lock:
            version = self.current(name)
            version.requests += 1
            return version

    def release(self, version: Version) -> None:
        """A request that held this version ended."""
        with self._lock:
            version.requests -= 1
            self._leave(version)

    # -- profiles ------------------------------------------------------------------------------------------------------

    def take(self) -> int:
        """A free slot.

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
        """`profile` lies in a slot that was taken: from now on requests get it by `name`."""
        with self._lock:
            self._numbers[name] += 1
            abstain = () if profile.abstain is None else tuple(profile.abstain[profile.gate_layers].tolist())
            version = Version(name, self._numbers[name], slot, path, profile.checksum, *reach(profile), abstain)
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
        """A slot that was taken is not wanted after all; what lies in it is unknown."""
        self.spoilt.append(slot)

    def free(self, slots: Iterable[int]) -> None:
        """Slots that were spoilt are empty again."""
        with self._lock:
            for slot in slots:
                self.spoilt.remove(slot)
                self._free.append(slot)

    def _retire(self, version: Version) -> None:
        version.current = False
        self._retired.append(version)
        self._leave(version)

    def _leave(self, version: Version) -> None:
        if not version.current and not version.requests:
            self._retired.remove(version)
            self.spoilt.append(version.slot)

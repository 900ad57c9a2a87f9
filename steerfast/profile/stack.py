"""Stacks: several profiles on one sequence, and the ways to name a profile or a stack."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from steerfast._files import write_checked
from steerfast.errors import ProfileError
from steerfast.kernels.contract import MAX_STACK
from steerfast.profile import file, hub
from steerfast.profile.identity import ModelIdentity
from steerfast.profile.profile import SteeringProfile, read

logger = logging.getLogger(__name__)


class ProfileStack(tuple[SteeringProfile, ...]):
    """Up to four profiles of one model on one sequence, in order: each gate decides for its own profile.

    ``a + b`` makes one. ``0.5 * (a + b)`` and ``-(a + b)`` scale and turn each profile. Where a list would name an
    entry per sequence, a stack is one entry.

    Raises:
        ProfileError: no profile or more than four, an entry that is no profile, profiles of several models.
    """

    __slots__ = ()

    def __new__(cls, profiles: Iterable[SteeringProfile]) -> ProfileStack:
        stack = super().__new__(cls, profiles)
        for number, profile in enumerate(stack):
            if not isinstance(profile, SteeringProfile):
                raise ProfileError(f"stack: entry {number}: expected a profile, got {type(profile).__name__}")
            if (problem := stack[0].model.mismatch(profile.model)) is not None:
                raise ProfileError(f"stack: entry {number}: expected the model of entry 0; {problem}")
        if not 1 <= len(stack) <= MAX_STACK:
            raise ProfileError(f"stack: expected 1 to {MAX_STACK} profiles, got {len(stack)}")
        return stack

    def __add__(self, other: Any) -> ProfileStack:
        return ProfileStack([*self, *as_stack(other)]) if _is_given(other) else NotImplemented

    def __sub__(self, other: Any) -> ProfileStack:
        return self + -other if _is_given(other) else NotImplemented

    def __mul__(self, factor: Any) -> ProfileStack:
        return ProfileStack(profile * factor for profile in self)

    __rmul__ = __mul__

    def __neg__(self) -> ProfileStack:
        return ProfileStack(-profile for profile in self)

    @property
    def point(self) -> str | None:
        """Return the name of the threshold in use where all profiles have the same; None elsewhere."""
        names = {profile.point for profile in self}
        return names.pop() if len(names) == 1 else None

    def at(self, point: str) -> ProfileStack:
        """Return the stack with the threshold of this name in every profile; errors as `SteeringProfile.at`."""
        return ProfileStack(profile.at(point) for profile in self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stack to one file, as `SteeringProfile.save`."""
        write_checked(path, *file.stacked(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProfileStack:
        """Read a stack and verify all of it; the file of a profile is a stack of one.

        Raises:
            ProfileError: as `SteeringProfile.load` and the class.
        """
        profiles = read(path)
        try:
            return cls(profiles)
        except ProfileError as error:
            raise ProfileError(f"profile {str(path)!r}: {error}") from None


def _is_given(value: Any) -> bool:
    return isinstance(value, SteeringProfile | ProfileStack)


def as_stack(given: SteeringProfile | ProfileStack | None) -> tuple[SteeringProfile, ...]:
    """Return the profiles of what was given, in order."""
    return (given,) if isinstance(given, SteeringProfile) else given or ()


Name: TypeAlias = str | os.PathLike[str]
Given: TypeAlias = SteeringProfile | Name | Sequence[SteeringProfile | Name]
"""A profile, the file or hub repository of a profile or a stack, or several of these: a stack."""


def chosen(given: Given | None) -> SteeringProfile | ProfileStack | None:
    """Return the profile or the stack that was given, loaded where it is named.

    Raises:
        ProfileError: as `SteeringProfile.from_pretrained` and `ProfileStack`, or something else was given.
    """
    if given is None or _is_given(given):
        return given  # type: ignore[return-value]
    if isinstance(given, str | os.PathLike):
        stack = ProfileStack.load(hub.find(os.fspath(given)))
        return stack if len(stack) > 1 else stack[0]
    if isinstance(given, list | tuple):
        named: list[Any] = [chosen(each) if isinstance(each, str | os.PathLike) else each for each in given]
        return ProfileStack(one for each in named for one in (each if isinstance(each, ProfileStack) else [each]))
    raise ProfileError(
        f"profile: expected a profile, a file, a hub repository or a list of these, got {type(given).__name__}"
    )


def accepted(given: Any, model: ModelIdentity) -> Any:
    """Return the profile or stack for `model` of the same shape (`SteeringProfile.for_model`); log each mismatch.

    Raises:
        ProfileError: the model has another shape.
    """
    for profile in as_stack(given):
        if (problem := profile.model.mismatch(model)) is not None:
            logger.warning("accepted a profile of another model: %s", problem)
    made = [profile.for_model(model) for profile in as_stack(given)]
    return made[0] if isinstance(given, SteeringProfile) else ProfileStack(made)

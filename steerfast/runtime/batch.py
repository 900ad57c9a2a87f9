"""The roster of padded batches: the profiles on each sequence of the next call, and its plan."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import ProfileError, SteerfastError
from steerfast.kernels.contract import MAX_STACK
from steerfast.profile import ProfileStack, SteeringProfile
from steerfast.runtime.bank import Reach
from steerfast.runtime.buffers import Buffers
from steerfast.runtime.roster import check_packed
from steerfast.runtime.slots import ProfileSlots, kind_of
from steerfast.runtime.span import NO_TURN, EditSpan, Entry, Stack, Thought, TurnWarning, filled, slots_of

INHERIT: Any = object()
"""Sentinel: the argument was not given. None means that no profile steers."""

Assignment = tuple[Stack, ...]
"""The stacks of a call: one per prompt, or one for all prompts."""

MOST_STRENGTH = 1e30
"""Times a profile's own strength it is still finite in float32."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold the profiles on each of n sequences, and their layers.

    Attributes:
        stacks: the profiles on each sequence.
        profiles: the same, as profiles.
        reach: the layers where these profiles act.
        owner: their names; decisions in a cache count only for the same owner.
        by_token: each row decides for itself.
        ahead: the sequences that are steered before the layer that decides; empty: none.
    """

    stacks: tuple[Stack, ...]
    profiles: tuple[tuple[SteeringProfile, ...], ...]
    reach: Reach
    owner: str
    by_token: bool
    ahead: tuple[bool, ...]

    @property
    def width(self) -> int:
        """K, the most profiles on a sequence, at least 1."""
        return max(1, *(len(stack) for stack in self.stacks)) if self.stacks else 1

    def each(self, value: Callable[[Entry], Any]) -> list[list[Any]]:
        """Return a value of each entry, [n][K]; short stacks are filled with empty entries."""
        width = self.width
        return [[value(entry) for entry in filled(stack, width)] for stack in self.stacks]

    def tensor(self, value: Callable[[Entry], Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return `each` as a tensor [n, K]."""
        return torch.tensor(self.each(value), dtype=dtype, device=device).view(len(self.stacks), self.width)

    def select(self, chosen: Sequence[int]) -> Plan:
        """Return the plan of some of the sequences."""
        stacks = tuple(filled(self.stacks[n], self.width) for n in chosen)  # so that K stays
        profiles = tuple(self.profiles[n] for n in chosen)
        return Plan(stacks, profiles, self.reach, self.owner, self.by_token, ())


class BatchRoster:
    """Assign profiles to the sequences of calls.

    Args:
        slots: the profiles in use.
        strength: multiplies the profiles' strengths where a call names no strength.
        observe: strength 0, whatever a call names: gates decide, and no row is edited.
        thought: edits begin where a thought ends; None: a thought is part of the answer.

    Attributes:
        profile: the profile of calls that name none. own: the stack of sequences for which a call names no profile.
        attach: called after new profiles, which may act at layers without hooks.
        held: returns the slots that requests of continuous batching need.
    """

    def __init__(
        self, slots: ProfileSlots, strength: float, observe: bool = False, thought: Thought | None = None
    ) -> None:
        self.slots = slots
        self.observe = observe
        self.thought = thought
        self._strength = finite("strength", strength)
        self.profile: SteeringProfile | ProfileStack | None = None
        self.held: Callable[[], set[int]] = set
        self.attach: Callable[[], object] = tuple
        self._contexts: list[Assignment] = []
        self.own: Stack = ()
        self._plans = Buffers()
        self._warned = False

    def warn_of_turns(self) -> None:
        """Warn, once, that a prompt has no user turn for a mean."""
        if not self._warned:
            self._warned = True
            warnings.warn(NO_TURN, TurnWarning, stacklevel=2)

    @property
    def strength(self) -> float:
        """Multiplies the profiles' strengths where a call names no strength."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = finite("strength", value)
        (self.own,) = self._with_strengths((self.own,), self._strength)

    def adopt(self, profile: SteeringProfile | ProfileStack) -> None:
        """Make `profile`, or a stack, the default of calls that name no profile."""
        (self.own,) = self.assign(profile, None)
        self.profile = profile

    def __getstate__(self) -> dict[str, Any]:
        """Leave contexts out: nobody would end them in a copy."""
        return {**vars(self), "_contexts": []}

    @contextmanager
    def assigned(self, steering: Any, strength: Any) -> Iterator[None]:
        """Steer the sequences of calls within the context; see `assign`."""
        self._contexts.append(self.assign(steering, strength))
        try:
            yield
        finally:
            self._contexts.pop()

    @property
    def current(self) -> Assignment:
        """The stacks of the next call, one per prompt or one for all."""
        return self._contexts[-1] if self._contexts else (self.own,)

    @property
    def named(self) -> int | None:
        """The number of prompts that a context lists stacks for; None: one stack for all, or no context."""
        return len(self._contexts[-1]) if self._contexts and len(self._contexts[-1]) != 1 else None

    def assign(self, steering: Any, strength: Any) -> Assignment:
        """Return the stacks of a call.

        Args:
            steering: a profile or a `ProfileStack` for all sequences, None, or a list with an entry per sequence: a
                profile, None, or a list of up to 4 profiles (a stack).
                `INHERIT`: the stacks of the call without it.
            strength: a number for all, or a list with an entry per sequence: a number, or a list of numbers, one per
                profile of the stack. None: `strength`.

        Raises:
            ProfileError: a profile belongs to another model or steers no layer.
            SteerfastError: lists of different lengths, too many profiles, or a strength that is not finite.
        """
        strength = strength.tolist() if hasattr(strength, "tolist") else strength
        if steering is INHERIT:
            return self._with_strengths(self.current, strength)
        if not (steering is None or isinstance(steering, SteeringProfile | list | tuple)):
            raise SteerfastError(
                f"steering: expected a profile, a stack or a list with an entry per sequence, got {kind_of(steering)}"
            )
        entries: list[Any] = (
            list(steering) if isinstance(steering, list | tuple) and type(steering) is not ProfileStack else [steering]
        )
        if not entries:
            raise SteerfastError("steering: expected one entry per sequence, got an empty list")
        given = [_by_argument(f"steering[{i}]", entry) for i, entry in enumerate(entries)]
        named = [[label for label, profile in one.items() if profile is not None] for one in given]
        strengths = self._strengths(named, strength)
        slots = self._take({label: profile for one in given for label, profile in one.items()})
        spans = {label: self._span(label, self.slots.at(slots[label])) for one in named for label in one}
        return tuple(
            tuple(Entry(slots[label], number, spans[label]) for label, number in zip(labels, numbers, strict=True))
            for labels, numbers in zip(itertools.cycle(named), strengths, strict=False)
        )

    def _span(self, label: str, profile: SteeringProfile) -> EditSpan:
        if self.thought is not None and (profile.positions != "response" or profile.second_pass):
            got = "layers before it" if profile.positions == "response" else f"positions {profile.positions!r}"
            raise ProfileError(
                f"{label}: expected positions 'response' and no layer before the sensor, as edits begin after a "
                f"thought, got {got}"
            )
        return EditSpan.of(profile, after_thought=self.thought is not None)

    def _with_strengths(self, stacks: Assignment, strength: Any) -> Assignment:
        """Return stacks with other strengths."""
        return tuple(
            tuple(replace(entry, strength=number) for entry, number in zip(stack, numbers, strict=True))
            for stack, numbers in zip(itertools.cycle(stacks), self._strengths(stacks, strength), strict=False)
        )

    def _strengths(self, stacks: Sequence[Sequence[Any]], strength: Any) -> list[list[float]]:
        """Return a strength for each profile of each stack; one stack, or one strength, is for all sequences."""
        several = isinstance(strength, Iterable) and not isinstance(strength, str | bytes)
        numbers = list(strength) if several else [strength]
        if not numbers:
            raise SteerfastError("steering_strength: expected one entry per sequence, got an empty list")
        if len(stacks) != len(numbers) and 1 not in (len(stacks), len(numbers)):
            raise SteerfastError(
                f"steering_strength: expected {len(stacks)} numbers, one per profile, got {len(numbers)}"
            )
        count = max(len(stacks), len(numbers))
        return [self._of_stack(i, len(stacks[i % len(stacks)]), numbers[i % len(numbers)]) for i in range(count)]

    def _of_stack(self, i: int, count: int, number: Any) -> list[float]:
        """Return a strength for each of the `count` profiles of the i-th stack."""
        number = number.tolist() if hasattr(number, "tolist") else number
        if isinstance(number, (list, tuple)):
            if len(number) != count:
                raise SteerfastError(
                    f"steering_strength[{i}]: expected {count} numbers, one per profile of the stack, got {len(number)}"
                )
            strengths = [finite(f"steering_strength[{i}][{k}]", one) for k, one in enumerate(number)]
        else:
            strengths = [finite(f"steering_strength[{i}]", self.strength if number is None else number)] * count
        return [0.0] * count if self.observe else strengths

    def of_requests(self, count: int, steering: Any = INHERIT, strength: Any = None) -> list[Stack]:
        """Return the stacks of `count` requests of continuous batching; errors as `assign`."""
        if steering is INHERIT and strength is None:
            stacks = self.current
        else:
            stacks = self.assign(steering, strength)
        if len(stacks) not in (1, count):
            raise SteerfastError(f"steering: expected {count} entries, one per request, got {len(stacks)}")
        for slot in slots_of(stacks):
            check_packed("steering", self.slots.at(slot))
        return list(stacks) * (count // len(stacks))

    def _take(self, profiles: dict[str, SteeringProfile | None]) -> dict[str, int]:
        held = slots_of([self.own, *(stack for stacks in self._contexts for stack in stacks)]) | self.held()
        slots = self.slots.take(profiles, held)
        self.attach()
        return slots

    def plan(self, count: int, prompts: int | None) -> Plan:
        """Return the plan of a step of `count` sequences; the sequences of a prompt are adjacent.

        Raises:
            SteerfastError: the call lists stacks for another number of sequences.
        """
        stacks = self.current
        if len(stacks) > 1 and (count % len(stacks) or (prompts or len(stacks)) != len(stacks)):
            raise SteerfastError(f"steering: expected {prompts or count} entries, one per sequence, got {len(stacks)}")
        names = ["+".join(self.slots.name(entry.slot) for entry in stack) or "-" for stack in stacks]
        return self._plans.get((stacks, count, *names), lambda: self._make_plan(stacks, count, names))

    def _make_plan(self, stacks: Assignment, count: int, names: list[str]) -> Plan:
        repeats = count // len(stacks)
        each = tuple(stack for stack in stacks for _ in range(repeats))
        profiles = tuple(tuple(self.slots.at(entry.slot) for entry in stack) for stack in each)
        all_profiles = {id(profile): profile for of_one in profiles for profile in of_one}.values()
        ahead = tuple(any(profile.second_pass for profile in of_one) for of_one in profiles)
        return Plan(
            stacks=each,
            profiles=profiles,
            reach=Reach.of(all_profiles),
            owner=names[0] if len(set(names)) == 1 else "|".join(names),
            by_token=any(profile.gate.kind == "token" for profile in all_profiles),
            ahead=ahead if any(ahead) else (),
        )


def _by_argument(label: str, entry: Any) -> dict[str, Any]:
    """Return the profiles of an entry of `steering` by argument, such as ``steering[0][1]``."""
    if not isinstance(entry, (list, tuple)):
        return {label: entry}
    if not 1 <= len(entry) <= MAX_STACK:
        raise SteerfastError(f"{label}: expected a stack of 1 to {MAX_STACK} profiles, got {len(entry)}")
    for k, profile in enumerate(entry):
        if not isinstance(profile, SteeringProfile):
            raise SteerfastError(f"{label}[{k}]: expected a profile, got {kind_of(profile)}")
    return {f"{label}[{k}]": profile for k, profile in enumerate(entry)}


def finite(name: str, strength: Any) -> float:
    """Return the number, or raise SteerfastError if it is not a finite one of at most `MOST_STRENGTH`."""
    try:
        number = math.nan if isinstance(strength, str) else float(strength)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SteerfastError(f"{name}: expected a finite number, got {f'{strength}'[:40]}")
    if abs(number) > MOST_STRENGTH:
        raise SteerfastError(f"{name}: expected a number up to {MOST_STRENGTH:g}, got {number:g}")
    return number

"""The rows of a sequence that a profile edits, and the rows that its gate reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steerfast.profile import Gate, SteeringProfile, last_turn

UNSTEERED = -1
NO_END = 2**30  # more rows than an answer has; twice as many are still an int32
NO_TURN = (
    "prompt: expected a user turn as the profile's chat template opens it, got a prompt without one; there a gate "
    "reads the mean of the whole prompt, for which its threshold was not set"
)


class TurnWarning(UserWarning):
    """A prompt has no user turn for a mean, which is then taken over the whole prompt."""


def mean_rows(gate: Gate) -> int:
    """Return the most rows of a prompt that the gate takes the mean of; 0: it reads only the last row."""
    if gate.pooling == "last":
        return 0
    return NO_END if gate.window is None else min(NO_END, gate.window)


class MeanRows(NamedTuple):
    """Hold the rows of a prompt that a mean takes.

    first: the first of them. until: the first after the last; `first`: no row. found: they are those of a user turn,
    or the gate looks for none.
    """

    first: int = 0
    until: int = 0
    found: bool = True


class Thought(NamedTuple):
    """Hold the tokens around a thought before an answer, see `steerfast.text.turns.thought_markers`.

    end: those by which it ends, at least one. reply: those by which a chat template opens the reply; empty: unknown.
    """

    end: tuple[int, ...]
    reply: tuple[int, ...] = ()

    def opens_reply(self, ids: Sequence[int] | NDArray[np.integer]) -> bool:
        """Return whether a reply begins in some token ids; True if its beginning is unknown."""
        return not self.reply or last_turn(ids, self.reply) is not None

    def over(self, prompt: Sequence[int] | NDArray[np.integer]) -> bool:
        """Return whether no thought follows a prompt: a template without thoughts writes the end into the reply."""
        begin = (last_turn(prompt, self.reply) if self.reply else None) or 0
        return last_turn(prompt[begin:], self.end) is not None

    def after(self, ids: Sequence[int] | NDArray[np.integer]) -> int | None:
        """Return the place after the first end in some token ids; None: there is none."""
        count, tokens = len(self.end), tuple(map(int, ids))
        places = (place for place in range(count, len(tokens) + 1) if tokens[place - count : place] == self.end)
        return next(places, None)


@dataclass(frozen=True)
class EditSpan:
    """Hold the rows of a sequence that one profile edits, and the rows that its gate reads.

    Attributes:
        after_prompt: edits begin at the prompt's last row (positions ``response``), not at its first row.
        open: the profile has no gate to wait for.
        answer_rows: how many rows after the prompt are edited.
        mean_rows: the most rows of a prompt that the gate takes the mean of; 0: it reads only the last row.
        turn, tail: which rows these are, see `Gate`.
        after_thought: the answer, and so its edits, begins where a thought ends, which nobody knows before.
    """

    after_prompt: bool = True
    open: bool = False
    answer_rows: int = NO_END
    mean_rows: int = 0
    turn: tuple[int, ...] = ()
    tail: int = 0
    after_thought: bool = False

    @property
    def rows_after_prompt(self) -> int:
        """How many rows after the prompt may be edited, as far as the prompt tells."""
        return NO_END if self.after_thought else self.answer_rows

    def read(self, length: int, ids: Sequence[int] | NDArray[np.integer] | None = None) -> MeanRows:
        """Return the rows of a prompt that the mean takes, at least one of a prompt that has any.

        Args:
            length: of the prompt. ids: its token ids; None: unknown, as those of embeddings.
        """
        if not self.mean_rows or not length:
            return MeanRows()
        start: int | None = 0
        if self.turn:
            start = None if ids is None else last_turn(ids, self.turn)
        until = length - self.tail
        first = max(start or 0, until - self.mean_rows)
        first, until = (first, until) if first < until else (length - 1, length)
        return MeanRows(first, until, start is not None)

    @classmethod
    def of(cls, profile: SteeringProfile, after_thought: bool = False) -> EditSpan:
        """Return the span of a profile."""
        tokens = profile.answer_tokens  # the prompt's last row predicts the first of them
        return cls(
            after_prompt=profile.positions == "response",
            open=profile.gate.kind == "always",
            answer_rows=NO_END if tokens is None else min(NO_END, tokens - 1),
            mean_rows=mean_rows(profile.gate),
            turn=profile.gate.turn,
            tail=profile.gate.tail,
            after_thought=after_thought,
        )


@dataclass(frozen=True)
class Entry:
    """Put one profile on a sequence.

    Attributes:
        slot: the profile's slot of the bank; -1: none.
        strength: multiplies the profile's own strengths.
        span: the rows that it edits and reads.
    """

    slot: int = UNSTEERED
    strength: float = 1.0
    span: EditSpan = EditSpan()


Stack = tuple[Entry, ...]
"""The profiles on one sequence, at most `MAX_STACK`; empty: the sequence is not steered."""


def filled(stack: Stack, width: int) -> Stack:
    """Return a stack with empty entries up to `width`."""
    return (*stack, *[Entry()] * (width - len(stack)))


def slots_of(stacks: Iterable[Stack]) -> set[int]:
    """Return the slots that these stacks name."""
    return {entry.slot for stack in stacks for entry in stack} - {UNSTEERED}

"""The rows of a sequence that a profile edits, and the rows that its gate reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steerfast.profile import Gate, SteeringProfile

__all__ = ["NO_END", "UNSTEERED", "EditSpan", "Entry", "Stack", "answer_rows", "filled", "mean_rows", "slots_of"]

UNSTEERED = -1
NO_END = 2**30  # more rows than an answer has; twice as many are still an int32


def answer_rows(answer_tokens: int | None) -> int:
    """Return how many rows of an answer are edited if `answer_tokens` of its tokens are chosen under steering.

    The prompt's last row predicts the first of these tokens. None: no limit.
    """
    return NO_END if answer_tokens is None else min(NO_END, answer_tokens - 1)


def mean_rows(gate: Gate) -> int:
    """Return how many of a prompt's last rows the gate takes the mean of; 0: it reads only the last row."""
    if gate.pooling == "last":
        return 0
    return NO_END if gate.window is None else min(NO_END, gate.window)


@dataclass(frozen=True)
class EditSpan:
    """Hold the rows of a sequence that one profile edits, and the rows that its gate reads.

    Attributes:
        after_prompt: edits begin at the prompt's last row (positions ``response``), not at its first row.
        open: the profile has no gate to wait for.
        answer_rows: how many rows after the prompt are edited.
        mean_rows: how many of the prompt's last rows the gate takes the mean of; 0: it reads only the last row.
        mean_from: how many of the prompt's first rows the mean leaves out, though never the last row.
        after_thought: the answer, and so its edits, begins where a thought ends, which nobody knows before.
    """

    after_prompt: bool = True
    open: bool = False
    answer_rows: int = NO_END
    mean_rows: int = 0
    mean_from: int = 0
    after_thought: bool = False

    def first_read(self, prompt_length: int) -> int:
        """Return the first row of a prompt that the gate reads."""
        return max(0, min(prompt_length - 1, max(self.mean_from, prompt_length - max(1, self.mean_rows))))

    @classmethod
    def of(cls, profile: SteeringProfile) -> EditSpan:
        """Return the span of a profile."""
        return cls(
            after_prompt=profile.positions == "response",
            open=profile.gate.kind == "always",
            answer_rows=answer_rows(profile.answer_tokens),
            mean_rows=mean_rows(profile.gate),
            mean_from=profile.gate.offset,
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

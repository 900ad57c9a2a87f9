"""The gate of a profile: how it decides whether a sequence or a row is steered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steerfast.errors import ProfileError
from steerfast.profile.checks import check_one_of, is_count, is_number

GATE_KINDS = ("always", "prompt", "token")
SCORES = ("cosine", "dot")
POOLINGS = ("last", "mean", "both")

_ALWAYS_WRITTEN = ("kind", "score", "sharpness")


@dataclass(frozen=True)
class Gate:
    """How a profile decides.

    kind: ``always`` (no gate), ``prompt`` (decided at the last token of the prompt, latched), ``token`` (each row
        decides for itself).
    score: ``cosine`` or ``dot`` with the direction of the layer.
    sharpness: 0 is a hard gate, g = [score > threshold]; above 0 soft, g = sigmoid(sharpness·(score − threshold)).
    pooling: the reading of a prompt gate: the score of the ``last`` prompt token, or the ``mean`` score of the prompt
        tokens that the model reads in this pass (including a chat template's, excluding those in a cache), or the sum
        of ``both``. A profile may have a direction for the mean (`SteeringProfile.mean_direction`).
    turn: the token ids by which a chat template opens a user turn. The mean is taken over the tokens after the last
        of them; over all of a prompt that has none. Empty: over all of every prompt.
    tail: the mean leaves out so many last tokens of a prompt, those by which the template ends. If nothing is left to
        read, the prompt's last token counts.
    window: the mean is taken over the last `window` of these tokens; None: over all. With a window, text before a
        request moves the mean only so far.
    """

    kind: Literal["always", "prompt", "token"] = "prompt"
    score: Literal["cosine", "dot"] = "cosine"
    sharpness: float = 0.0
    pooling: Literal["last", "mean", "both"] = "last"
    window: int | None = None
    turn: tuple[int, ...] = ()
    tail: int = 0

    def __post_init__(self) -> None:
        check_one_of("gate.kind", self.kind, GATE_KINDS)
        check_one_of("gate.score", self.score, SCORES)
        check_one_of("gate.pooling", self.pooling, POOLINGS)
        if self.pooling != "last" and self.kind != "prompt":
            raise ProfileError(f"gate.pooling: expected 'last' for a gate of kind {self.kind!r}, got {self.pooling!r}")
        if self.window is not None and not is_count(self.window):
            raise ProfileError(f"gate.window: expected None or a whole number >= 1, got {self.window!r}")
        if isinstance(self.turn, list):  # as JSON has it
            object.__setattr__(self, "turn", tuple(self.turn))
        if not isinstance(self.turn, tuple) or not all(map(_is_natural, self.turn)):
            raise ProfileError(f"gate.turn: expected token ids, whole numbers >= 0, got {self.turn!r}")
        if not _is_natural(self.tail):
            raise ProfileError(f"gate.tail: expected a whole number >= 0, got {self.tail!r}")
        for name, unset in (("window", None), ("turn", ()), ("tail", 0)):
            if getattr(self, name) != unset and self.pooling == "last":
                raise ProfileError(f"gate.{name}: expected {unset} where no mean is read, got {getattr(self, name)}")
        if not (is_number(self.sharpness) and 0 <= self.sharpness < math.inf):
            raise ProfileError(f"gate.sharpness: expected a finite number >= 0, got {self.sharpness!r}")

    def header(self) -> dict[str, Any]:
        """Return the fields as JSON data; ``Gate(**header)`` reads them.

        A field that came after the first version is left out at its default. So older profiles keep their checksums.
        """
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        kept = {name: value for name, (value, unset) in values.items() if name in _ALWAYS_WRITTEN or value != unset}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def last_turn(ids: Sequence[int] | NDArray[np.integer], turn: Sequence[int]) -> int | None:
    """Return the place after the last occurrence of `turn` in a prompt, where its last user turn begins.

    The last occurrence wins, wherever it is from: a user who writes a template's special tokens opens a turn.

    Args:
        ids: token ids of a prompt. turn: at least one token id, as `Gate.turn`.

    Returns:
        None where the prompt has none.
    """
    prompt, count = np.asarray(ids), len(turn)
    begins = max(0, len(prompt) - count + 1)
    found = np.ones(begins, dtype=np.bool_)
    for place, token in enumerate(turn):
        found &= prompt[place : place + begins] == token
    places = found.nonzero()[0]
    return int(places[-1]) + count if len(places) else None


def _is_natural(value: object) -> bool:
    return is_count(value) or (value == 0 and type(value) is int)

"""The gate of a profile: how it decides whether a sequence or a row is steered."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

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
    window: the mean is taken over the last `window` of these tokens; None: over all. With a window, text before a
        request moves the mean only so far.
    offset: the mean leaves out the first `offset` tokens of a prompt, such as the constant start of a chat template.
        The last token always counts.
    """

    kind: Literal["always", "prompt", "token"] = "prompt"
    score: Literal["cosine", "dot"] = "cosine"
    sharpness: float = 0.0
    pooling: Literal["last", "mean", "both"] = "last"
    window: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        check_one_of("gate.kind", self.kind, GATE_KINDS)
        check_one_of("gate.score", self.score, SCORES)
        check_one_of("gate.pooling", self.pooling, POOLINGS)
        if self.pooling != "last" and self.kind != "prompt":
            raise ProfileError(f"gate.pooling: expected 'last' for a gate of kind {self.kind!r}, got {self.pooling!r}")
        if self.window is not None and not is_count(self.window):
            raise ProfileError(f"gate.window: expected None or a whole number >= 1, got {self.window!r}")
        if self.offset != 0 and not is_count(self.offset):
            raise ProfileError(f"gate.offset: expected a whole number >= 0, got {self.offset!r}")
        for name, unset in (("window", None), ("offset", 0)):
            if getattr(self, name) != unset and self.pooling == "last":
                raise ProfileError(f"gate.{name}: expected {unset} where no mean is read, got {getattr(self, name)}")
        if not (is_number(self.sharpness) and 0 <= self.sharpness < math.inf):
            raise ProfileError(f"gate.sharpness: expected a finite number >= 0, got {self.sharpness!r}")

    def header(self) -> dict[str, Any]:
        """Return the fields as JSON data; ``Gate(**header)`` reads them.

        A field that came after the first version is left out at its default. So older profiles keep their checksums.
        """
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, default) in values.items() if name in _ALWAYS_WRITTEN or value != default}

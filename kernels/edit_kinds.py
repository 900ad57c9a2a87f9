"""The kinds of edits: one record each, from the words of a profile to the numbers that a kernel reads.

The arithmetic of a kind stands in :mod:`.edits` (reference, Triton, torch) and in csrc/cpu. Everything else about it
stands here: the profile and its file, the bank, the self-test and the command line iterate over EDITS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .contract import EditId, is_number

__all__ = ["EDITS", "Edit", "Parameter"]


class Parameter(NamedTuple):
    """A number of an edit. A profile has a field of the same name; `default` says that it is not set."""

    default: float | None
    unit: str


@dataclass(frozen=True)
class Edit:
    """One kind of edit.

    The functions take the parameters of the kind by name.

    Attributes:
        name: the word of a profile.
        id: the number in the column EDIT of the table. Two kinds may share one.
        summary: what the edit does to a row x with vector v; b = strength times gate value.
        parameters: the numbers that a profile gives, by name, in the order of its file.
        example: valid parameters, for self-tests.
        check: return the error of wrong parameters, None where they are right.
        misplaced: return the error where a profile of another kind sets these parameters, without that kind's name.
        columns: return the numbers of the table's columns LOW and HIGH.
        detail: return the parameters in words, to follow the name.
        adds: whether x moves by b·v, whatever x is, before its length may be restored.
        reads_sums: whether the edit takes sums over the row, which Kinds.LATCHED_ADD has none of.
        reads_direction: whether v and the direction must span a plane.
    """

    name: str
    id: EditId
    summary: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    example: Mapping[str, float] = field(default_factory=dict)
    check: Callable[..., str | None] = lambda: None
    misplaced: Callable[..., str] = lambda: ""
    columns: Callable[..., tuple[float, float]] = lambda: (0.0, 0.0)
    detail: Callable[..., str] = lambda: ""
    adds: bool = False
    reads_sums: bool = True
    reads_direction: bool = False

    @property
    def defaults(self) -> dict[str, float | None]:
        """Return the parameters of a profile that sets none."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def given(self, profile: object) -> dict[str, Any]:
        """Return the parameters of this kind that stand in `profile`, by name."""
        return {name: getattr(profile, name) for name in self.parameters}

    def describe(self, profile: object) -> str:
        """Return the name and the parameters of `profile`, such as ``clamp to -1..2``."""
        return self.name + self.detail(**self.given(profile))


def _check_clamp(low: Any, high: Any) -> str | None:
    for name, value, unlimited in (("low", low, -math.inf), ("high", high, math.inf)):
        if not is_number(value) or value == -unlimited:
            return f"{name}: expected a number or {unlimited}, got {value!r}"
    if (low, high) == (-math.inf, math.inf):
        return "low, high: a clamp expects at least one limit, got none"
    return f"low: expected at most high, {high:g}, got {low:g}" if low > high else None


def _clamp_in_words(low: float, high: float) -> str:
    limits = [f"{limit:g}" if math.isfinite(limit) else "" for limit in (low, high)]
    return f" to {limits[0]}" if low == high else f" to {'..'.join(limits)}"


def _limits_of_another(low: Any, high: Any) -> str:
    shown = [f"{limit:g}" if is_number(limit) else repr(limit) for limit in (low, high)]
    return f"low, high: only a clamp has limits, got {'..'.join(shown)}"


def _check_rotate(angle: Any) -> str | None:
    if is_number(angle) and math.isfinite(angle):
        return None
    return f"angle: a rotation expects a finite number of degrees, got {angle!r}"


_KINDS = (
    Edit("add", EditId.ADD, "x + b·v", adds=True, reads_sums=False),
    Edit("ablate", EditId.CLAMP, "takes the component along v out; b = 1 takes out all of it"),
    Edit(
        "clamp",
        EditId.CLAMP,
        "moves the coefficient along v, <x, v>/<v, v>, into low..high; low == high sets it; b = 1 moves all the way",
        parameters={
            "low": Parameter(-math.inf, "units of the vector, -inf: no limit"),
            "high": Parameter(math.inf, "units of the vector, inf: no limit"),
        },
        example={"low": -0.1, "high": 0.2},
        check=_check_clamp,
        misplaced=_limits_of_another,
        columns=lambda low, high: (low, high),
        detail=_clamp_in_words,
    ),
    Edit("keep_norm", EditId.KEEP_NORM, "x + b·v, scaled back to the norm of x", adds=True),
    Edit(
        "rotate",
        EditId.ROTATE,
        "turns the part of x in the plane of v and the direction to an angle and keeps its length; b = 1 arrives "
        "(angular steering, Vu & Nguyen)",
        parameters={"angle": Parameter(None, "degrees: 0 is along v, 90 is orthogonal to v, on the direction's side")},
        example={"angle": 53.13},
        check=_check_rotate,
        misplaced=lambda angle: f"angle: only a rotation has one, got {angle!r}",
        columns=lambda angle: (math.cos(math.radians(angle)), math.sin(math.radians(angle))),
        detail=lambda angle: f" to {angle:g} degrees",
        reads_direction=True,
    ),
)
EDITS: dict[str, Edit] = {kind.name: kind for kind in _KINDS}

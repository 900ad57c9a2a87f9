"""What a request asks of steering, and what it gets."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steerfast.runtime.tables import NO_END
from steerfast.vllm.config import KEY, OFF, ServingConfig

__all__ = ["STEERING", "STRENGTH", "Assignment", "requested"]

STEERING = "steering"
STRENGTH = "steering_strength"

_OURS = (STEERING, KEY)  # keys that begin like these are not somebody else's
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Assignment:
    """Who steers a request: all that workers know of it.

    slot: of the bank. strength: multiplies the slot's own. late: steered from the prompt's last token on (positions
    ``response``), and not in every row. open: there is no gate to decide. answer_rows: how many rows after its prompt
    are steered. mean: of how many of its prompt's last rows its gates read the mean, 0: none.
    """

    slot: int
    strength: float
    late: bool
    open: bool
    answer_rows: int = NO_END
    mean: int = 0

    def as_extra(self) -> dict[str, Any]:
        """As plain data, for ``SamplingParams.extra_args[KEY]``."""
        return asdict(self)


def requested(extra_args: object, config: ServingConfig, names: Iterable[str]) -> tuple[str | None, float]:
    """Whose steering a request asks for, and how strong; nothing asked for is the default profile at strength 1.

    Args:
        extra_args: the request's ``SamplingParams.extra_args``. Of its keys, ``steering`` names a profile, or is
            ``"off"``, and ``steering_strength`` is a number from 0 to `max_strength`. Other keys that begin with
            ``steering`` or ``steerfast``, in whatever case, are refused; the rest is somebody else's.
        names: profiles there are.

    Returns:
        The profile's name, None: nobody steers; and the strength.

    Raises:
        ValueError: what it asks for cannot be, or is not its to ask for on a locked server. The message begins with
            the field.
    """
    asked = _asked(extra_args)
    if config.locked:
        _check_locked(asked, config.default)
        return config.default, 1.0
    name = asked.get(STEERING, config.default)
    if name is not None or STEERING in asked:
        known = [*names, OFF]
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{STEERING}: expected one of {', '.join(known)}, got {_shown(name)}")
    if name == OFF:
        name = None
    if STRENGTH not in asked:
        return name, 1.0
    strength = asked[STRENGTH]
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not (number and 0 <= strength <= config.max_strength):
        raise ValueError(f"{STRENGTH}: expected a number from 0 to {config.max_strength:g}, got {_shown(strength)}")
    if name is None:
        raise ValueError(f"{STRENGTH}: expected {STEERING} to name a profile, got nobody to steer")
    return name, float(strength)


def _asked(extra_args: object) -> dict[str, Any]:
    """Those of a request's keys that are about steering."""
    if extra_args is None:
        return {}
    if not isinstance(extra_args, Mapping):
        raise ValueError(f"extra_args: expected an object, got {_shown(extra_args)}")
    asked = {}
    for key, value in extra_args.items():
        if not isinstance(key, str) or not key.casefold().startswith(_OURS):
            continue
        if key not in (STEERING, STRENGTH):
            raise ValueError(f"{_shown(key)}: expected the keys {STEERING} and {STRENGTH} only, got this one")
        asked[key] = value
    return asked


def _check_locked(asked: Mapping[str, Any], default: str | None) -> None:
    if STEERING in asked and not (isinstance(asked[STEERING], str) and asked[STEERING] == default):
        raise ValueError(
            f"{STEERING}: expected {default}, to which this server is locked, got {_shown(asked[STEERING])}"
        )
    if STRENGTH in asked:
        raise ValueError(f"{STRENGTH}: expected none, as this server is locked, got {_shown(asked[STRENGTH])}")


def _shown(value: object) -> str:
    """A client's value in one short line."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an int of too many digits, or its own repr
        return f"a value of type {type(value).__name__}"

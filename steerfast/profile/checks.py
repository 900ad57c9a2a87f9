"""Checks of a profile's fields; each raises ProfileError with the field's name."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch

from steerfast.errors import ProfileError

_FLOAT32_MAX = torch.finfo(torch.float32).max


def check_instance(name: str, value: object, kind: type, words: str) -> None:
    if not isinstance(value, kind):
        raise ProfileError(f"{name}: expected {words}, got {value!r}")


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ProfileError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """A real number, infinite or of float32's range: the ops hold it as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _FLOAT32_MAX or abs(value) == math.inf

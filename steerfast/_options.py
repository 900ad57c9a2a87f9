"""Keyword options of public functions, each set a frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def read_options(function: str, kind: type[T], options: Mapping[str, Any]) -> T:
    """Return `options` as the dataclass `kind`.

    Raises:
        TypeError: an option that `kind` does not have; it names the valid ones.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in names:
            raise TypeError(f"{function}: expected options among {', '.join(names)}, got {name!r}")
    return kind(**options)

"""A click type for names that a slow import knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click


class LazyChoice(click.ParamType):
    """One of some names; the module that knows them is imported only where a value is given or help is asked for."""

    name = "choice"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """Return the names as `click.Choice` shows them."""
        return f"[{'|'.join(self._names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value`, or fail with the list of names."""
        names = list(self._names())
        if value not in names:
            self.fail(f"{value!r} is not one of {', '.join(map(repr, names))}.", param, ctx)
        return value


def edit_names() -> list[str]:
    """Return the kinds of edits, `add` first."""
    from steerfast.profile import EDITS

    return list(EDITS)

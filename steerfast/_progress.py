"""Progress bars on a terminal; nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, show: bool = True) -> Iterable[T]:
    """Iterate over `items` with a progress bar on stderr, where that is a terminal and `show` is set."""
    if not show or not sys.stderr.isatty():
        return items
    return _bar(items, description)


def _bar(items: Sequence[T], description: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, console=Console(stderr=True), transient=True)

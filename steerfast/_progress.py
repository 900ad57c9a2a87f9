"""Progress on standard error: bars on a terminal, and a line for each stage of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

_stage: ContextVar[str] = ContextVar("stage", default="")


def track(items: Sequence[T], description: str, *, show: bool = True) -> Iterable[T]:
    """Iterate over `items` with a progress bar on stderr, where that is a terminal and `show` is set."""
    if not show or not sys.stderr.isatty():
        return items
    return _bar(items, f"{_stage.get()}: {description}" if _stage.get() else description)


@contextmanager
def stage(name: str, *, show: bool = True) -> Iterator[list[str]]:
    """Put a stage's name before its bars; at its end print one line on stderr: the name, the findings and the time.

    Gives a list for findings, which are short texts. A stage that fails prints nothing.
    """
    findings: list[str] = []
    outer, start = _stage.set(name), time.monotonic()
    try:
        yield findings
    finally:
        _stage.reset(outer)
    if show:
        seconds = time.monotonic() - start
        took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        print(f"{name}: {', '.join([*findings, took])}", file=sys.stderr, flush=True)


def _bar(items: Sequence[T], description: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, console=Console(stderr=True), transient=True)

"""Progress on standard error: bars on a terminal, lines elsewhere, and a line for each stage of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

_stage: ContextVar[str] = ContextVar("stage", default="")
_PAUSE = 30.0  # seconds between two lines


def track(items: Sequence[T], description: str, *, show: bool = True) -> Iterable[T]:
    """Iterate over `items`, if `show` is set with a progress bar on stderr, or a line each half minute in a log."""
    if not show:
        return items
    name = f"{_stage.get()}: {description}" if _stage.get() else description
    return _bar(items, name) if sys.stderr.isatty() else _lines(items, name)


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


def _lines(items: Sequence[T], description: str) -> Iterator[T]:
    start = last = time.monotonic()
    for number, item in enumerate(items):
        if (now := time.monotonic()) - last >= _PAUSE:
            with suppress(OSError):  # nobody reads the log
                print(f"{description}: {number} of {len(items)}, {now - start:.0f} s", file=sys.stderr, flush=True)
            last = now
        yield item

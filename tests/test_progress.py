"""Progress in a log: a line each half minute, none before."""

from __future__ import annotations

from typing import Any

import pytest

from steerfast import _progress


def test_a_log_gets_a_line_each_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 29.0, 31.0, 45.0, 62.0, 70.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    tracked: Any = _progress.track("abcdef", "reading")
    assert list(tracked) == list("abcdef")
    assert capsys.readouterr().err == "reading: 2 of 6, 31 s\nreading: 4 of 6, 62 s\n"


def test_a_log_that_nobody_reads_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(_progress, "_PAUSE", 0.0)
    monkeypatch.setattr(_progress.sys, "stderr", Closed())
    assert list(_progress.track("abc", "reading")) == list("abc")


def test_short_work_and_hidden_work_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (True, False):
        assert list(_progress.track([1, 2, 3], "reading", show=show)) == [1, 2, 3]
    assert capsys.readouterr().err == ""

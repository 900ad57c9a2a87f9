"""Results of long work on disk, so that an interrupted run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerfast.errors import OutputError


class Records:
    """A file of JSON objects, one a line, each written when its piece of work is done.

    A line that a kill cut short is ignored, and its piece of work is done again.

    Args:
        path: the file, created where it is missing; None: nothing is kept.
        kind: name of the records in errors, such as ``trials``.

    Attributes:
        found: the records of the file, in order.

    Raises:
        OutputError: the file cannot be written, or holds no text.
    """

    def __init__(self, path: str | os.PathLike[str] | None, kind: str) -> None:
        self._path = None if path is None else Path(path)
        self.found: list[dict[str, Any]] = []
        if self._path is None:
            return
        try:
            with self._path.open("ab+") as file:  # also checks that the file can be written
                file.seek(0)
                text = file.read().decode()
                if text and not text.endswith("\n"):  # a line cut short must not swallow the next one
                    file.write(b"\n")
        except OSError as error:
            raise OutputError(f"resume: cannot write {str(self._path)!r} ({error.strerror})") from None
        except UnicodeDecodeError:
            raise OutputError(f"resume: expected a file of finished {kind}, got {str(self._path)!r}") from None
        for line in text.split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                self.found.append(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record to the file."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

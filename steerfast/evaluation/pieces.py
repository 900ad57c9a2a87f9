"""Pieces of an evaluation: each is kept as soon as it is done, and read back where all that makes it is the same."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

from steerfast._records import Records
from steerfast.evaluation.systems import System

__all__ = ["Pieces"]


class Pieces:
    """What the pieces of an evaluation came to.

    Args:
        resume: a JSON-lines file of them, written and read back, see `Records`; None: in memory only.

    Attributes:
        seconds: what the pieces of each system took, by its name, those that were read back included.

    Raises:
        OutputError: `resume` cannot be written.
    """

    def __init__(self, resume: str | os.PathLike[str] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._records = Records(resume, "pieces of an evaluation")
        self._done = {found["key"]: found for found in self._records.found if {"key", "rows", "seconds"} <= {*found}}

    def rows(self, key: tuple[Any, ...], work: Callable[[], Any], system: System) -> Any:
        """JSON data of a piece of work: read back, or worked out and kept. What it took counts as time of `system`.

        Args:
            key: its kind, and all that makes it, as JSON data.
        """
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if name not in self._done:
            started = time.perf_counter()
            record = {"key": name, "rows": work(), "seconds": time.perf_counter() - started}
            self._records.add({"kind": key[0], "system": system.name, **record})
            self._done[name] = record
        self.seconds[system.name] = self.seconds.get(system.name, 0.0) + self._done[name]["seconds"]
        return self._done[name]["rows"]

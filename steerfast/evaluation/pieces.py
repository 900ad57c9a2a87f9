"""Keep each finished piece of an evaluation, and read it back if its key is the same."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

from steerfast._records import Records
from steerfast.evaluation.systems import System


class Pieces:
    """Results of the pieces of an evaluation, also in the JSON-lines file `resume`, see `Records`.

    Attributes:
        seconds: system -> time of its pieces, including pieces that were read back.
    """

    def __init__(self, resume: str | os.PathLike[str] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._records = Records(resume, "pieces of an evaluation")
        self._done = {found["key"]: found for found in self._records.found if {"key", "rows", "seconds"} <= {*found}}

    def rows(self, key: tuple[Any, ...], work: Callable[[], Any], system: System) -> Any:
        """Return the JSON data of a piece: read back, or computed by `work` and kept. Its time counts for `system`.

        Args:
            key: its kind and everything that decides its result, as JSON data.
        """
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if name not in self._done:
            started = time.perf_counter()
            record = {"key": name, "rows": work(), "seconds": time.perf_counter() - started}
            self._records.add({"kind": key[0], "system": system.name, **record})
            self._done[name] = record
        self.seconds[system.name] = self.seconds.get(system.name, 0.0) + self._done[name]["seconds"]
        return self._done[name]["rows"]

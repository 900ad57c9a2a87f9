"""The state of a training on disk: one that was interrupted goes on at its last step, with the same bits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast._files import read_checked, write_checked
from steerfast.errors import OutputError

_KIND = "checkpoint"
_VERSION = 1


class Checkpoint:
    """A file with the tensors of the last step and the losses of all steps.

    Args:
        path: the file; None: nothing is kept.
        settings: JSON data, all that the training depends on. A state of other settings does not count.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._settings = dict(settings)

    def read(self) -> tuple[dict[str, Tensor], list[float]] | None:
        """Return tensors and losses of the last step; None where there is none of these settings.

        Raises:
            OutputError: the file is no checkpoint; it is not overwritten.
        """
        if self._path is None or not self._path.exists():
            return None
        header, tensors = read_checked(self._path, _KIND, _VERSION, OutputError)
        if header.get("kind") != _KIND:
            raise OutputError(f"resume: expected a file of learn, got {str(self._path)!r}; name a new one")
        return (tensors, header["losses"]) if header["settings"] == self._settings else None

    def write(self, tensors: Mapping[str, Tensor], losses: list[float]) -> None:
        """Keep the state of a step.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._path is not None:
            header = {"format": _VERSION, "kind": _KIND, "settings": self._settings, "losses": losses}
            write_checked(self._path, header, tensors)

"""Residual rows on disk: a fit that was interrupted goes on, and another fit of the same prompts reads no prompt."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from steerfast._files import make_folder, write_atomically
from steerfast.hf.structure import weights_fingerprint


class RowCache:
    """Keep a model's rows of each sequence, a file each.

    Args:
        folder: of the files. reading: JSON data that says which rows are kept.
        starts: by sequence the first row that is read, for a reading that begins at different rows.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: nn.Module, reading: Any, starts: Sequence[int] | None = None
    ) -> None:
        self._folder, self._starts = make_folder(folder, "cache: cannot make the folder"), starts
        dtype = str(next(model.parameters()).dtype)
        self._key = json.dumps([weights_fingerprint(model), dtype, reading], sort_keys=True)

    def read(self, place: int, sequence: Sequence[int], layers: int, hidden_size: int) -> Tensor | None:
        """Return the rows of the sequence at `place`, float32 [layers, ..., H]; None: their file is no such file."""
        try:
            rows = load(self._file(place, sequence).read_bytes())["rows"]
        except (OSError, SafetensorError, KeyError):
            return None
        fits = rows.dim() in (2, 3) and (len(rows), rows.shape[-1]) == (layers, hidden_size)
        return rows if fits and rows.dtype == torch.float32 and bool(rows.isfinite().all()) else None

    def write(self, place: int, sequence: Sequence[int], rows: Tensor) -> None:
        """Keep the rows of the sequence at `place`.

        Raises:
            OutputError: the file cannot be written.
        """
        write_atomically(self._file(place, sequence), save({"rows": rows.contiguous()}))

    def _file(self, place: int, sequence: Sequence[int]) -> Path:
        start = [] if self._starts is None else [self._starts[place]]
        digest = hashlib.sha256(json.dumps([self._key, list(sequence), *start]).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"

"""Files of plain arrays: numpy's .npy, and the safetensors of saklas (both read only)."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from steerfast._files import is_foreign, read_safetensors
from steerfast.formats.base import Format, Imported, imported_array
from steerfast.formats.reading import Malformed, brief, layer_number, malformed_unless, packed, vector

_NUMPY = b"\x93NUMPY"


def _read_numpy(path: Path, data: bytes) -> Imported:
    file = io.BytesIO(data)
    with malformed_unless("a .npy file"):
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise Malformed(f"version: expected 1.0 or 2.0, got {version}")
        shape, by_columns, dtype = read(file)
    if dtype.str not in ("<f2", "<f4", "<f8") or (by_columns and len(shape) > 1):
        order = "columns" if by_columns else "rows"
        raise Malformed(
            f"expected little-endian floats by rows, got {brief(dtype.str)} by {order}; pickles are not read"
        )
    array = packed("the array", data[file.tell() :], dtype.name, list(shape))
    return imported_array(array, path.name, notes=("a .npy file does not say the scale",))


# -- saklas ----------------------------------------------------------------------------------------


def _read_saklas(path: Path, data: bytes) -> Imported:
    with malformed_unless("a safetensors file"):
        metadata, tensors = read_safetensors(path)
    names = {name: re.fullmatch(r"layer_(\d+)", name) for name in tensors}
    if metadata or not names or not all(names.values()):
        raise Malformed(
            f"expected tensors layer_<L> alone, as saklas writes them, got {', '.join([*metadata, *names]) or 'none'}"
        )
    vectors = {layer_number(name[6:]): vector(name, tensor) for name, tensor in tensors.items()}
    if len(vectors) < len(tensors):
        raise Malformed(f"expected each layer once, got {', '.join(names)}")
    notes = (
        "layers: layer_L is the output of 0-based block L",
        "saklas scales vectors when it steers: let `steerfast tune` find the strength",
    )
    return Imported(vectors, dict.fromkeys(vectors, 1.0), notes=notes)


NUMPY = Format(
    "numpy",
    (".npy",),
    "row L is the output of 0-based block L; of one more row, row L + 1",
    lambda path, data: data.startswith(_NUMPY),
    _read_numpy,
)
SAKLAS = Format(
    "saklas",
    (".safetensors",),
    "layer_L is the output of 0-based block L",
    lambda path, data: data[8:9] == b"{" and is_foreign(path),
    _read_saklas,
)

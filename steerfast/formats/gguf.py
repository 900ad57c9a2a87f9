"""GGUF control vectors: llama.cpp, repeng, and EasySteer's variant. Needs the package gguf.

``general.architecture`` is "controlvector"; tensors are ``direction.<N>``, one-dimensional F32 of one length. llama.cpp
adds direction.N to the output of 0-based block N, and refuses a file that has N = 0 or any other tensor; repeng and
EasySteer count alike, and EasySteer has a block 0. llama.cpp's cvector-generator stores the output of block N - 1 as
direction.N. Its layer count is signed, which identifies its files.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.formats.base import ExportRows, Format, Imported, Malformed, vector

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARCHITECTURE = "controlvector"
_NUMBERING = "direction.N edits the output of 0-based block N"
_MOST_READS = 1 << 16  # values in a header; a control vector of 126 layers has about a thousand


def _package() -> Any:
    """Return the module gguf, or raise ProfileError."""
    try:
        import gguf
    except ImportError:
        raise ProfileError(
            "gguf: .gguf files need the package gguf, which is not installed (pip install steerfast[gguf])"
        ) from None
    return gguf


def parse(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of a GGUF file, name -> ``gguf.ReaderField``, and its tensors, name -> float32 [n].

    Raises:
        Malformed: a file that is no GGUF, that is truncated, or that has something else than 1-D F32 tensors.
        ProfileError: the package gguf is missing.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if not start.startswith(_MAGIC):
        raise Malformed("expected a GGUF file")
    version = int.from_bytes(start[4:], "little")
    if len(start) == 8 and version not in _VERSIONS:
        raise Malformed(f"GGUF version: expected 2 or 3, little-endian, got {version}")
    reader = _reader_class()(path)
    return dict(reader.fields), reader.vectors


def _reader_class() -> Any:
    gguf = _package()

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        """Read a file whose counts and offsets may lie: nothing past its end, and no long header."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
            self.reads += 1
            if self.reads > _MOST_READS:
                raise Malformed(f"header: expected at most {_MOST_READS} values, got more")
            size, rest = np.dtype(dtype).itemsize * int(count), max(0, len(self.data) - int(offset))
            if size > rest:
                raise Malformed(f"expected {size} more bytes at byte {int(offset)}, got {rest}: truncated")
            return super()._get(offset, dtype, count, *more, **options)

        def _push_field(self, field: Any, skip_sum: bool = False) -> int:
            if field.name in self.fields:
                raise Malformed(f"key {field.name[:60]!r}: expected once, got twice")
            if field.name == "general.alignment":
                size = field.contents()
                if not isinstance(size, int) or size < 1 or size & (size - 1):
                    raise Malformed(f"general.alignment: expected a size in bytes, got {size!r:.60}")
            return int(super()._push_field(field, skip_sum))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            array = gguf.GGUFValueType.ARRAY
            if raw_type == array and self._get(orig_offs, np.uint32)[0] == array:
                raise Malformed("array: expected scalars or strings, got arrays")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            self.vectors: dict[str, Tensor] = {}
            for field in fields:
                _, _, dims, sizes, kind, offset = (part.tolist() for part in field.parts)
                if dims != [1]:
                    raise Malformed(f"tensor {field.name[:60]!r}: expected 1-D, got {dims[0]}-D")
                if kind != [gguf.GGMLQuantizationType.F32]:
                    raise Malformed(f"tensor {field.name[:60]!r}: expected F32 (type 0), got type {kind[0]}")
                if field.name in self.vectors:
                    raise Malformed(f"tensor {field.name[:60]!r}: expected once, got twice")
                row = np.array(self._get(int(start_offs) + offset[0], np.float32, sizes[0]))
                self.vectors[field.name] = vector(f"tensor {field.name[:60]!r}", torch.from_numpy(row))

    return Reader


def build(values: dict[str, str | int], tensors: dict[str, np.ndarray]) -> bytes:
    """Return a control vector's file with these strings, unsigned 32-bit numbers and float32 vectors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        writer = _package().GGUFWriter(path, _ARCHITECTURE)
        for name, value in values.items():
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


# -- control vectors -------------------------------------------------------------------------------


def _read(path: Path, data: bytes) -> Imported:
    if not data.startswith(_MAGIC):
        raise Malformed("expected a GGUF file")
    fields, tensors = parse(path)
    values = {name: field.contents() for name, field in fields.items()}
    if (architecture := values.get("general.architecture")) != _ARCHITECTURE:
        raise Malformed(f"general.architecture: expected {_ARCHITECTURE!r}, got {architecture!r:.60}")
    component = _component(values.get("controlvector.easysteer"))
    if component not in (None, "hidden_states"):
        raise Malformed(f"component: expected vectors of hidden_states, got {component!r:.60}")
    vectors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"direction\.(0|[1-9]\d{0,5})", name)
        if match is None:
            raise Malformed(f"tensor {name[:60]!r}: expected direction.<layer>")
        vectors[int(match[1])] = tensor
    if not vectors:
        raise Malformed("expected tensors direction.<layer>, got none")
    lengths = {len(tensor) for tensor in vectors.values()}
    if len(lengths) > 1:
        raise Malformed(f"tensors: expected one length, got {sorted(lengths)}")
    notes = [f"layers: {_NUMBERING}"]
    count = fields.get("controlvector.layer_count")
    if count is not None and [kind.name for kind in count.types] == ["INT32"]:
        notes.append(
            "the layer count is signed, as llama.cpp's cvector-generator writes it: the generator measures the output "
            "of block N - 1, and llama.cpp adds it to block N's; imported as llama.cpp applies it, shift by -1 to "
            "steer where it was measured"
        )
    return Imported(
        vectors, dict.fromkeys(vectors, 1.0), hint=values.get("controlvector.model_hint"), notes=tuple(notes)
    )


def _component(text: Any) -> Any:
    """Return the component that EasySteer's own field names; None without that field."""
    if text is None:
        return None
    try:
        return json.loads(text)["component"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Malformed("controlvector.easysteer: expected a JSON object with a component") from None


def _encode(written: ExportRows) -> tuple[bytes, list[str]]:
    rows, notes = dict(written.rows), []
    if rows.pop(0, None) is not None:
        notes.append("block 0 is left out: llama.cpp refuses files that have direction.0")
    if not rows:
        raise Malformed("expected a vector of a block from 1, llama.cpp cannot steer block 0")
    return _built(written, rows, {}), notes


def _encode_easysteer(written: ExportRows) -> tuple[bytes, list[str]]:
    native = json.dumps({"version": 1, "component": "hidden_states", "metadata": {"mapping": []}})
    return _built(written, written.rows, {"method": "steerfast", "easysteer": native}), []


def _built(written: ExportRows, rows: dict[int, Tensor], extra: dict[str, str]) -> bytes:
    values: dict[str, str | int] = {
        f"{_ARCHITECTURE}.model_hint": written.hint,
        f"{_ARCHITECTURE}.layer_count": len(rows),
        "steerfast.layer_numbering": _NUMBERING,
    }
    values |= {f"{_ARCHITECTURE}.{name}": value for name, value in extra.items()}
    return build(values, {f"direction.{layer}": row.numpy() for layer, row in rows.items()})


def _is_gguf(path: Path, data: bytes) -> bool:
    return data.startswith(_MAGIC)


def _is_easysteer(path: Path, data: bytes) -> bool:
    return data.startswith(_MAGIC) and b"controlvector.method" in data[: 1 << 16]


GGUF = Format("gguf", (".gguf",), "N is the output of 0-based block N, from 1", _is_gguf, _read, _encode)
EASYSTEER = Format(
    "easysteer", (".gguf",), "N is the output of 0-based block N", _is_easysteer, _read, _encode_easysteer
)

"""GGUF control vectors: llama.cpp, repeng, and the variants of EasySteer and GLP. Needs the package gguf.

``general.architecture`` is "controlvector"; tensors are ``direction.<N>``, one-dimensional F32 of one length. llama.cpp
adds direction.N to the output of 0-based block N, and refuses a file that has N = 0 or any other tensor; repeng and
EasySteer count alike, and EasySteer has a block 0. llama.cpp's cvector-generator stores the output of block N - 1 as
direction.N. Its layer count is signed, which identifies its files.

GLP (GGUF Layer Projection, of the project weightless) states the operation in the file: ``glp.mode`` "project" is
x - alpha*<x, d>*d at unit length of d, an ablation. A key that is not known here may change that, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.formats.base import ExportRows, Format, Imported
from steerfast.formats.reading import Malformed, brief, vector

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARCHITECTURE = "controlvector"
_NUMBERING = "direction.N edits the output of 0-based block N"
_MOST_READS = 1 << 13  # values in a header; a control vector of 126 layers has about a thousand


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
            total = 0
            for field in fields:
                _, _, dims, sizes, kind, offset = (part.tolist() for part in field.parts)
                total += 4 * sum(sizes)
                if total > len(self.data):
                    raise Malformed(f"tensors: expected at most {len(self.data)} bytes, got more: truncated or overlap")
                if dims != [1]:
                    raise Malformed(f"tensor {field.name[:60]!r}: expected 1-D, got {dims[0]}-D")
                if kind != [gguf.GGMLQuantizationType.F32]:
                    raise Malformed(f"tensor {field.name[:60]!r}: expected F32 (type 0), got type {kind[0]}")
                if field.name in self.vectors:
                    raise Malformed(f"tensor {field.name[:60]!r}: expected once, got twice")
                row = np.array(self._get(int(start_offs) + offset[0], np.float32, sizes[0]))
                self.vectors[field.name] = vector(f"tensor {field.name[:60]!r}", torch.from_numpy(row))

    return Reader


def build(values: Mapping[str, str | int | float], tensors: dict[str, np.ndarray]) -> bytes:
    """Return a control vector's file with these strings, 32-bit numbers (whole ones unsigned) and float32 vectors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        writer: Any = _package().GGUFWriter(path, _ARCHITECTURE)
        for name, value in values.items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(name, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


# -- reading ---------------------------------------------------------------------------------------


_SPACES = ("GGUF.", "general.", "controlvector.", "steerfast.", "glp.")
_MEANINGS = re.compile(r"controlvector\.(mode|operation|algorithm|hook_point|alpha|rank)")


def _read(path: Path, data: bytes) -> Imported:
    if not data.startswith(_MAGIC):
        raise Malformed("expected a GGUF file")
    fields, tensors = parse(path)
    values = {name: field.contents() for name, field in fields.items()}
    if (architecture := values.get("general.architecture")) != _ARCHITECTURE:
        raise Malformed(f"general.architecture: expected {_ARCHITECTURE!r}, got {brief(architecture)}")
    component = _component(values.get("controlvector.easysteer"))
    if component not in (None, "hidden_states"):
        raise Malformed(f"component: expected vectors of hidden_states, got {brief(component)}")
    for key in values:
        if not key.startswith(_SPACES) or _MEANINGS.fullmatch(key):
            raise Malformed(
                f"key {key[:60]!r}: expected keys of control vectors, got one that may change their meaning"
            )
    projects = any(key.startswith("glp.") for key in values) and _check_glp(values)
    vectors = _directions(tensors)
    notes = [f"layers: {_NUMBERING}"]
    count = fields.get("controlvector.layer_count")
    if count is not None and [kind.name for kind in count.types] == ["INT32"]:
        notes.append(
            "the layer count is signed, as llama.cpp's cvector-generator writes it: the generator measures the output "
            "of block N - 1, and llama.cpp adds it to block N's; imported as llama.cpp applies it, shift by -1 to "
            "steer where it was measured"
        )
    found = Imported(vectors, dict.fromkeys(vectors, 1.0), hint=values.get("controlvector.model_hint"))
    return replace(found, **_as_projection(values, vectors, notes) if projects else {}, notes=tuple(notes))


def _directions(tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """Return the tensors by layer."""
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
    return vectors


# -- GLP -------------------------------------------------------------------------------------------

_HOOK = "residual_stream_post_layer"
_GLP_TOLD = ("created", "method", "contrast", "structure", "validation", "generator", "base_model", "base_revision")
_GLP_READ = ("mode", "spec_version", "alpha_default", "rank", "orthonormal", "hook_point", "derived_at")
_GLP_KEYS = {f"glp.{name}" for name in (*_GLP_TOLD, *_GLP_READ, "layer_ids_zero_based", "content_sha256")}


def _check_glp(values: dict[str, Any]) -> bool:
    """Return whether a GLP file projects, else it adds.

    Raises:
        Malformed: a mode, hook, version, rank or key that no profile holds; the message names the key.
    """
    alpha = values.get("glp.alpha_default", 1.0)
    projects = values.get("glp.mode") == "project"
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0 or (alpha != 1 and not projects):
        numbers = "a number from 0" if projects else "1 with the mode add"
        raise Malformed(f"glp.alpha_default: expected {numbers}, got {brief(alpha)}")
    for name, expected in (
        ("mode", ("project", "add")),
        ("spec_version", (1,)),
        ("rank", (1, None)),
        ("hook_point", (_HOOK,) if projects else (_HOOK, None)),
    ):
        if (value := values.get(f"glp.{name}")) not in expected:
            words = " or ".join(str(one) for one in expected if one is not None)
            raise Malformed(f"glp.{name}: expected {words}, got {brief(value)}")
    if unknown := sorted({key for key in values if key.startswith("glp.")} - _GLP_KEYS):
        raise Malformed(f"key {unknown[0][:60]!r}: not known, it may change what the vectors mean")
    if "per-execution-step" in str(values.get("glp.structure")):
        raise Malformed("glp.structure: expected a vector for a block, got one for each execution step of a loop")
    return projects


def _as_projection(values: dict[str, Any], vectors: dict[int, Tensor], notes: list[str]) -> dict[str, Any]:
    """Return the fields of `Imported` for a file that projects; add to `notes`."""
    told = values.get("glp.layer_ids_zero_based")
    if 0 in vectors or (told is not None and {*re.findall(r"\d+", str(told))} != {*map(str, vectors)}):
        raise Malformed(f"glp.layer_ids_zero_based: expected the layers of the tensors, from 1, got {brief(told)}")
    if not all(bool(row.any()) for row in vectors.values()):
        raise Malformed("tensors: expected directions, got one of zeros")
    alpha = float(values.get("glp.alpha_default", 1.0))
    notes.append(f"glp.mode project became the edit ablate, its glp.alpha_default the strength {alpha:g}")
    if (site := values.get("glp.derived_at", _HOOK)) != _HOOK:
        notes.append(f"the directions were measured at {brief(site)}, and are applied to outputs of blocks")
    return {"vectors": {layer: _unit(row) for layer, row in vectors.items()}, "edits": {"ablate": {"strength": alpha}}}


def _unit(row: Tensor) -> Tensor:
    """Return a row of length 1, float32: an ablation is the same, and squares of large rows overflow."""
    return torch.nn.functional.normalize(row.double(), dim=0, eps=0).float()


def _encode_glp(written: ExportRows) -> tuple[bytes, list[str]]:
    profile, layers = written.profile, list(written.rows)
    strengths = {float(profile.strength[layer]) for layer in layers}
    if 0 in layers or len(strengths) != 1 or not min(strengths) > 0:
        raise Malformed(
            f"expected blocks from 1, ablated at one strength above 0, got layers {layers} at {sorted(strengths)}"
        )
    rows = {layer: _unit(row) for layer, row in written.rows.items()}
    values: dict[str, str | int | float] = {
        "glp.mode": "project",
        "glp.spec_version": 1,
        "glp.rank": 1,
        "glp.alpha_default": strengths.pop(),
        "glp.hook_point": _HOOK,
        "glp.layer_ids_zero_based": ",".join(map(str, layers)),
        "glp.base_model": profile.model.name,
        "glp.content_sha256": hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows.values())).hexdigest(),
    }
    return _built(written, rows, values), ["a reader that does not know glp.mode adds the directions instead"]


# -- control vectors that add ----------------------------------------------------------------------


def _component(text: Any) -> Any:
    """Return the component that EasySteer's own field names; None without that field."""
    if text is None:
        return None
    try:
        found = json.loads(text)
        if found.get("version", 1) != 1:
            raise Malformed(f"controlvector.easysteer: expected version 1, got {brief(found['version'])}")
        return found["component"]
    except Malformed:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
    more = {"controlvector.method": "steerfast", "controlvector.easysteer": native}
    return _built(written, written.rows, more), []


def _built(written: ExportRows, rows: dict[int, Tensor], more: dict[str, Any]) -> bytes:
    values: dict[str, Any] = {
        f"{_ARCHITECTURE}.model_hint": written.profile.model.architecture,
        f"{_ARCHITECTURE}.layer_count": len(rows),
        "steerfast.layer_numbering": _NUMBERING,
        **more,
    }
    return build(values, {f"direction.{layer}": row.numpy() for layer, row in rows.items()})


def _has(mark: bytes) -> Callable[[Path, bytes], bool]:
    """Return the test of a format: a GGUF with a mark in its first 64 KiB, where keys stand."""
    return lambda path, data: data.startswith(_MAGIC) and mark in data[: 1 << 16]


_is_gguf, _is_easysteer, _is_glp = map(_has, (b"", b"controlvector.method", b"glp."))
GGUF = Format("gguf", (".gguf",), "N is the output of 0-based block N, from 1", _is_gguf, _read, _encode)
EASYSTEER = Format(
    "easysteer", (".gguf",), "N is the output of 0-based block N", _is_easysteer, _read, _encode_easysteer
)
GLP = Format("glp", (".gguf",), "N is the output of 0-based block N, from 1", _is_glp, _read, _encode_glp, "ablate")

"""Files that torch.save and pickle write: hotwire, rotalabs, and steering-vectors (read only).

Nothing in them is trusted. torch's archives are checked before torch opens them, with ``weights_only``; a bare pickle
goes through an unpickler that knows tensors, plain containers and one stand-in class. Everything else is refused by
name. No pickle of classes is ever written: hotwire's and rotalabs' files hold one tensor.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.formats.base import (
    MOST_BYTES,
    ExportRows,
    Format,
    Imported,
    Malformed,
    content,
    json_bytes,
    json_object,
    json_of,
    layer_number,
    vector,
)

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_STEERING_VECTOR = "steering_vectors.steering_vector.SteeringVector"


class _SteeringVector:
    """Stand in for the class of that name in steering-vectors: the pickled fields become its attributes."""


# -- careful loading -------------------------------------------------------------------------------


def _load(data: bytes) -> Any:
    """Return the tensors, plain containers or `_SteeringVector` that torch.save put into `data`."""
    _check_archive(data)
    allowed: list[Any] = [(_SteeringVector, _STEERING_VECTOR)]
    with torch.serialization.safe_globals(allowed), _malformed_unless("a file of tensors"):
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        if foreign:
            raise Malformed(f"expected tensors alone, got {', '.join(sorted(foreign))[:200]}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _malformed_unless(what: str) -> Iterator[None]:
    """Turn any error into `Malformed`: a pickle is a program and may fail in any way; then it is not `what`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Malformed:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise Malformed(f"not {what} ({type(error).__name__}: {reason})") from None


def _check_archive(data: bytes) -> None:
    """Refuse a zip archive that torch.save would not write."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise Malformed(f"expected a zip archive as torch.save writes, got a damaged one ({error})") from None
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if entry.filename.startswith(("/", "\\")) or ".." in parts or ":" in entry.filename:
            raise Malformed(f"archive: expected names inside it, got {entry.filename!r}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Malformed(f"archive: expected entries stored as torch.save does, got {entry.filename!r} compressed")
    if (total := sum(entry.file_size for entry in entries)) > len(data):
        raise Malformed(f"archive: expected entries of at most {len(data)} bytes, got {total}")


def _storage(raw: bytes) -> Any:
    """Return the storage inside a pickled tensor, which torch itself would load as a pickle of anything."""
    if len(raw) > MOST_BYTES:
        raise Malformed("storage: too large")
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that a pickle of protocol 2 holds as text."""
    if encoding != "latin1":
        raise Malformed(f"bytes: expected latin1, got {encoding!r}")
    return text.encode("latin1")


_KNOWN = {
    _STEERING_VECTOR: _SteeringVector,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _latin1,
}


def _build(unpickler: Any) -> None:
    """Set an object's attributes: only the stand-in's, since a pickle may hold torch's functions as well."""
    state = unpickler.stack.pop()
    made = unpickler.stack[-1]
    if type(made) is not _SteeringVector or not isinstance(state, dict):
        raise Malformed(f"expected attributes of a SteeringVector alone, got those of {type(made).__name__}")
    vars(made).update(state)


class _Unpickler(pickle._Unpickler):  # in Python: the C one reserves memory for any memo index
    """Load the classes and functions that a pickled SteeringVector needs, no others."""

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}  # noqa: RUF012 (as the class above has it)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[f"{module}.{name}"]
        except KeyError:
            raise Malformed(f"expected tensors alone, got {module}.{name}"[:200]) from None

    def persistent_load(self, identifier: Any) -> Any:
        raise Malformed("expected a pickle that stands alone, got one that refers to other data")


def _unpickle(data: bytes) -> Any:
    with _malformed_unless("a pickle of tensors"):
        return _Unpickler(io.BytesIO(data)).load()


# -- steering-vectors ------------------------------------------------------------------------------


def _read_steering_vectors(path: Path, data: bytes) -> Imported:
    found = _load(data) if data.startswith(_ZIP) else _unpickle(data)
    if isinstance(found, _SteeringVector):
        found = vars(found)
    if not isinstance(found, dict) or "layer_activations" not in found:
        raise Malformed("expected a SteeringVector with layer_activations")
    kind = found.get("layer_type", "decoder_block")
    if kind != "decoder_block":
        raise Malformed(f"layer_type: expected 'decoder_block', a profile edits outputs of blocks, got {kind!r}")
    activations = found["layer_activations"]
    if not isinstance(activations, dict) or not activations:
        raise Malformed("layer_activations: expected tensors by layer, got none")
    vectors = {}
    for layer, value in activations.items():
        if not isinstance(value, Tensor):
            raise Malformed(f"layer {layer!r}: expected a tensor, got {type(value).__name__}")
        if value.dim() > 1 and value.numel() == value.shape[-1]:  # [1, H] and [1, 1, H] are added alike
            value = value.reshape(-1)
        vectors[layer_number(layer)] = vector(f"layer {layer!r}", value)
    return Imported(vectors, dict.fromkeys(vectors, 1.0), notes=("layers: L is the output of 0-based decoder block L",))


def _is_steering_vectors(path: Path, data: bytes) -> bool:
    if data.startswith(_PICKLE):
        return True
    return data.startswith(_ZIP) and b"steering_vectors.steering_vector" in data[: 1 << 16]


# -- hotwire ---------------------------------------------------------------------------------------


def _read_hotwire(path: Path, data: bytes) -> Imported:
    found = _load(data)
    if isinstance(found, dict):
        found = next((value for value in found.values() if isinstance(value, Tensor)), None)
    if not isinstance(found, Tensor):
        raise Malformed("expected a tensor, or a dict whose first tensor is the vectors")
    rows = vector("the tensor", found, (1, 2))
    notes = ("layers: row L is for the output of 0-based block L; hotwire's requests name the layer and the scale",)
    if rows.dim() == 1:
        return Imported({}, anywhere=rows, notes=notes)
    return Imported({layer: row for layer, row in enumerate(rows) if bool(row.any())}, notes=notes)


def _encode_hotwire(written: ExportRows) -> tuple[bytes, list[str]]:
    model = written.profile.model
    rows = torch.zeros(model.num_layers, model.hidden_size)
    for layer, row in written.rows.items():
        rows[layer] = row
    request = json.dumps([{"id": "NAME", "layer": layer, "scale": 1.0} for layer in written.rows])
    return _saved(rows), [f"requests have to name every layer; NAME is the file's without its ending: {request}"]


def _saved(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor.clone(), stream)
    return stream.getvalue()


# -- rotalabs --------------------------------------------------------------------------------------


def _read_rotalabs(path: Path, data: bytes) -> Imported:
    if path.is_dir():
        pairs = sorted(file for file in path.glob("layer_*.json") if file.is_file())
        if not pairs:
            raise Malformed("expected pairs layer_<L>.json and layer_<L>.pt in the folder, found none")
    else:
        pairs = [path.with_suffix(".json")]
    vectors: dict[int, Tensor] = {}
    names = set()
    for pair in pairs:
        about = json_object(content(pair))
        layer = layer_number(about.get("layer_index"))
        if layer in vectors:
            raise Malformed(f"layer {layer}: expected once, got twice ({pair.name})")
        vectors[layer] = vector(pair.with_suffix(".pt").name, _load(content(pair.with_suffix(".pt"))))
        names.add(str(about.get("model_name")))
        shape = about.get("vector_shape")
        if shape is not None and shape != list(vectors[layer].shape):
            raise Malformed(f"{pair.name}: says shape {shape}, its tensor has {list(vectors[layer].shape)}")
    notes = ["layers: layer_index L is the output of 0-based block L", f"made for {', '.join(sorted(names))}"]
    return Imported(vectors, dict.fromkeys(vectors, 1.0), notes=tuple(notes))


def _encode_rotalabs(written: ExportRows) -> tuple[dict[str, bytes], list[str]]:
    kind, model = written.profile.vector_kind, written.profile.model.name
    about = {"behavior": kind, "model_name": model}
    files = {"metadata.json": json_bytes({**about, "layers": list(written.rows)})}
    for layer, row in written.rows.items():
        files[f"layer_{layer}.pt"] = _saved(row)
        files[f"layer_{layer}.json"] = json_bytes(
            {
                **about,
                "layer_index": layer,
                "extraction_method": "steerfast",
                "metadata": {},
                "vector_shape": list(row.shape),
            }
        )
    return files, []


def _is_rotalabs(path: Path, data: bytes) -> bool:
    if path.is_dir():
        return next(path.glob("layer_*.json"), None) is not None
    if path.suffix not in (".pt", ".json") or not path.with_suffix(".json").is_file():
        return False
    about = json_of(data if path.suffix == ".json" else content(path.with_suffix(".json")))
    return isinstance(about, dict) and {"layer_index", "behavior"} <= set(about)


STEERING_VECTORS = Format(
    "steering-vectors",
    (".pkl", ".pickle", ".pt"),
    "L is the output of 0-based decoder block L",
    _is_steering_vectors,
    _read_steering_vectors,
)
HOTWIRE = Format(
    "hotwire",
    (".pt",),
    "row L is the output of 0-based block L",
    lambda path, data: data.startswith(_ZIP),
    _read_hotwire,
    _encode_hotwire,
)
ROTALABS = Format(
    "rotalabs", (), "layer_index L is the output of 0-based block L", _is_rotalabs, _read_rotalabs, _encode_rotalabs
)

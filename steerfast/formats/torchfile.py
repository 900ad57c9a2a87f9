"""Files that torch.save and pickle write: hotwire, refusal_direction, vLLM-Hook, rotalabs, and steering-vectors.

Nothing in them is trusted, see `pickles`. No pickle of classes is ever written: hotwire's and rotalabs' files hold one
tensor.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.formats import pickles
from steerfast.formats.base import ExportRows, Format, Imported, imported_array, json_bytes
from steerfast.formats.reading import (
    Malformed,
    brief,
    content,
    json_object,
    json_of,
    layer_in,
    layer_number,
    number,
    vector,
)

# -- steering-vectors ------------------------------------------------------------------------------


def _read_steering_vectors(path: Path, data: bytes) -> Imported:
    found = pickles.load(data)
    if isinstance(found, pickles.SteeringVector):
        found = vars(found)
    if not isinstance(found, dict) or "layer_activations" not in found:
        raise Malformed("expected a SteeringVector with layer_activations")
    kind = found.get("layer_type", "decoder_block")
    if kind != "decoder_block":
        raise Malformed(f"layer_type: expected 'decoder_block', a profile edits outputs of blocks, got {brief(kind)}")
    activations = found["layer_activations"]
    if not isinstance(activations, dict) or not activations:
        raise Malformed("layer_activations: expected tensors by layer, got none")
    vectors = {}
    for layer, value in activations.items():
        if not isinstance(value, Tensor):
            raise Malformed(f"layer {brief(layer)}: expected a tensor, got {type(value).__name__}")
        if value.dim() > 1 and value.numel() == value.shape[-1]:  # [1, H] and [1, 1, H] are added alike
            value = value.reshape(-1)
        vectors[layer_number(layer)] = vector(f"layer {brief(layer)}", value)
    return Imported(vectors, dict.fromkeys(vectors, 1.0), notes=("layers: L is the output of 0-based decoder block L",))


def _is_steering_vectors(path: Path, data: bytes) -> bool:
    if data.startswith(pickles.PICKLE):
        return True
    return data.startswith(pickles.ZIP) and b"steering_vectors.steering_vector" in data[: 1 << 16]


# -- hotwire ---------------------------------------------------------------------------------------


_FOREIGN = {
    ("rotate_layer", "learned_source", "proj_layer"): "LoReFT of pyreft, which moves a row by a matrix times the row",
    ("projector1", "projector2"): "LM-Steer, which moves a row by a matrix times the row",
    ("W_enc", "W_dec"): "a sparse autoencoder, which has a direction for each feature: save the row of one",
}


def _array_in(found: Any) -> tuple[Tensor, str]:
    """Return the one array that a file holds, and its name."""
    name = ""
    if isinstance(found, dict):
        keys = sorted(str(key) for key in found)
        for words, reason in _FOREIGN.items():
            if any(word in key for word in words for key in keys):
                raise Malformed(f"expected a vector, got keys {', '.join(keys)} of {reason}")
        if len(found) != 1:
            raise Malformed(f"expected one tensor, got a dict of {', '.join(keys) or 'nothing'}")
        (name, found), *_ = found.items()
    if not isinstance(found, Tensor):
        raise Malformed(f"expected a tensor, or a dict of one tensor, got {type(found).__name__}")
    return found, str(name)


def _read_hotwire(path: Path, data: bytes) -> Imported:
    array, key = _array_in(pickles.load(data))
    archive = pickles.archive_name(data)
    if archive.startswith("intkey_layer_") and "comp_block_output" not in archive:
        raise Malformed(f"expected a vector of block_output, which a profile edits, got {archive[:60]!r}")
    notes = ("a file of tensors does not say the scale: its project's requests do",)
    return imported_array(array, path.name, archive, key, notes=notes)


def _encode_hotwire(written: ExportRows) -> tuple[bytes, list[str]]:
    model = written.profile.model
    rows = torch.zeros(model.num_layers, model.hidden_size, dtype=torch.float32, device="cpu")
    for layer, row in written.rows.items():
        rows[layer] = row
    request = json.dumps([{"id": "NAME", "layer": layer, "scale": 1.0} for layer in written.rows])
    return _saved(rows), [f"requests have to name every layer; NAME is the file's without its ending: {request}"]


def _saved(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor.clone(), stream)
    return stream.getvalue()


# -- refusal_direction -----------------------------------------------------------------------------


def _read_refusal(path: Path, data: bytes) -> Imported:
    row = vector("the direction", _array_in(pickles.load(data))[0])
    beside = path.with_name("direction_metadata.json")
    named = layer_in(path.name)
    if beside.is_file():
        named = layer_number(json_object(content(beside)).get("layer")), beside.name
    named = named and (named[0] - 1, named[1])
    note = "layers: refusal_direction reads the input of 0-based block l, which is the output of block l - 1"
    return Imported({}, anywhere=row, named=named, notes=(note,))


def _is_refusal(path: Path, data: bytes) -> bool:
    told = pickles.archive_name(data) == "direction" or "refusal_direction" in path.name
    return data.startswith(pickles.ZIP) and (told or path.with_name("direction_metadata.json").is_file())


# -- vLLM-Hook -------------------------------------------------------------------------------------


def _read_vllm_hook(path: Path, data: bytes) -> Imported:
    found = pickles.load(data)
    if not isinstance(found, dict) or not {"dir"} <= set(found) <= {"dir", "avg_proj"}:
        raise Malformed(f"expected a dict of dir and avg_proj, got {brief(found)}")
    notes = ("add_vector's coefficient and both methods' layer are in the project's config, not in the file",)
    made = Imported({}, anywhere=vector("dir", found["dir"]), notes=notes)
    if "avg_proj" not in found:
        return made
    average, row = found["avg_proj"], made.anywhere.double()  # type: ignore[union-attr]
    target = number("avg_proj", average.item() if isinstance(average, Tensor) and average.numel() == 1 else average)
    square = float(row @ row)
    if square == 0:
        raise Malformed("dir: expected a direction, got zeros")
    # adjust_rs: x + (avg_proj - <x, dir>)*dir. The coefficient of a clamp is <x, dir>/<dir, dir>.
    clamp = {"low": target / square, "high": target / square, "strength": square}
    reason = (
        "the file does not say whether add_vector or adjust_rs is meant. clamp is adjust_rs where a block returns its "
        "output whole; of a pair, adjust_rs reads the residual without the MLP's output, which no profile does"
    )
    return replace(made, edits={"add": {}, "clamp": clamp}, undecided=reason)


def _is_vllm_hook(path: Path, data: bytes) -> bool:
    return data.startswith(pickles.ZIP) and b"X\x03\x00\x00\x00dir" in data[:4096]


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
        vectors[layer] = vector(pair.with_suffix(".pt").name, pickles.load(content(pair.with_suffix(".pt"))))
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
    "row L is the output of 0-based block L; of one more row, row L + 1",
    lambda path, data: data.startswith(pickles.ZIP),
    _read_hotwire,
    _encode_hotwire,
)
ROTALABS = Format(
    "rotalabs", (), "layer_index L is the output of 0-based block L", _is_rotalabs, _read_rotalabs, _encode_rotalabs
)
REFUSAL = Format("refusal-direction", (".pt",), "layer l is the input of 0-based block l", _is_refusal, _read_refusal)
VLLM_HOOK = Format("vllm-hook", (".pt",), "the file has none", _is_vllm_hook, _read_vllm_hook)

"""JSON files: IBM's .svec, vllm-lens steering vectors, steering modules of the RhizoNymph fork of vLLM."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.formats.base import Condition, ExportRows, Format, Imported, json_bytes
from steerfast.formats.reading import (
    Malformed,
    base64_bytes,
    checked_shape,
    floats,
    json_object,
    json_of,
    layer_number,
    mapping,
    number,
    packed,
    vector,
)
from steerfast.profile import ModelIdentity, SteeringProfile

# -- .svec -----------------------------------------------------------------------------------------
# Conditional activation steering edits and reads the input of block L, which is the output of block L - 1.

_SVEC_LAYERS = "layers: L is the input of 0-based block L, the output of block L - 1"


def _read_svec(path: Path, data: bytes) -> Imported:
    found = json_object(data)
    directions = mapping("directions", found.get("directions"))
    if not directions:
        raise Malformed("directions: expected vectors by layer, got none")
    vectors = {layer_number(key) - 1: floats(f"layer {key}", value) for key, value in directions.items()}
    if len(vectors) < len(directions):
        raise Malformed("directions: expected each layer once, got one twice")
    hint = found.get("model_type")
    notes = (_SVEC_LAYERS, "the file does not say which layers to steer, its project names them when it steers")
    return Imported(vectors, hint=hint if isinstance(hint, str) else None, notes=notes)


def condition_of(imported: Imported, layer: int, threshold: float, model: ModelIdentity) -> Condition:
    """Return the gate of a condition vector: it opens where the cosine at 0-based block `layer` exceeds `threshold`.

    Raises:
        ProfileError: the file has no vector there.
    """
    vectors = imported.by_block(model, [])
    direction = vectors.get(layer)
    if direction is None or not bool(direction.any()):
        have = sorted(layer for layer, vector in vectors.items() if layer >= 0 and bool(vector.any()))
        raise ProfileError(f"condition: expected one of layers {have}, outputs of 0-based blocks, got {layer}")
    return Condition(
        layer,
        direction,
        threshold,
        (
            "the condition reads the signed cosine of the prompt's last token; conditional activation steering takes "
            "its absolute value, by default of the mean over the prompt: check it with `steerfast score`, or "
            "`steerfast calibrate`",
        ),
    )


def condition_file(profile: SteeringProfile) -> tuple[bytes, list[str]]:
    """Return the directions of a profile's gates as a .svec, and notes on their use.

    Raises:
        ProfileError: no gate, or a gate that does not read cosines.
    """
    layers, model = profile.gate_layers, profile.model
    if not layers or profile.gate.score != "cosine":
        kind = f"{profile.gate.kind}, {profile.gate.score}"
        raise ProfileError(f"condition: expected a gate that reads cosines, got {kind} at layers {layers}")
    if profile.gate.pooling == "both" or profile.gate.turn or profile.gate.tail:
        raise ProfileError("condition: expected a gate that reads the last row or a mean of all rows, got another one")
    notes = [
        f"condition_layer_ids=[{layer + 1}], condition_vector_threshold={float(profile.threshold[layer]):g}, "
        f"condition_comparator_threshold_is='smaller', condition_threshold_comparison_mode='{profile.gate.pooling}'"
        for layer in layers
        if layer + 1 < model.num_layers
    ]
    directions = profile.direction if profile.gate.pooling == "last" else profile.read_in_mean
    rows = {layer: directions[layer] for layer in layers}
    data, lost = _svec(model, rows)
    of = " of the mean row of all tokens" if profile.gate.pooling == "mean" else ""  # and not the mean of cosines
    return data, notes + lost + [f"conditional activation steering compares absolute cosines{of}: try the threshold"]


def _encode_svec(written: ExportRows) -> tuple[bytes, list[str]]:
    data, lost = _svec(written.profile.model, written.rows)
    layers = [layer + 1 for layer in written.rows if layer + 1 < written.profile.model.num_layers]
    return data, [f"behavior_layer_ids={layers}: inputs of 0-based blocks", *lost]


def _svec(model: ModelIdentity, rows: dict[int, Tensor]) -> tuple[bytes, list[str]]:
    last, hint = model.num_layers - 1, model.architecture
    kept = {layer + 1: row.tolist() for layer, row in rows.items() if layer != last}
    if not kept:
        raise Malformed(f"expected a vector before the last block, {last}: .svec files hold inputs of blocks")
    lost = [f"block {last} is left out: no block has its output as input"] if last in rows else []
    return json_bytes({"model_type": hint, "directions": kept, "explained_variances": dict.fromkeys(kept, 1.0)}), lost


def _is_svec(path: Path, data: bytes) -> bool:
    found = json_of(data, "directions")
    return isinstance(found, dict) and "directions" in found


# -- vllm-lens -------------------------------------------------------------------------------------


def _read_lens(path: Path, data: bytes) -> Imported:
    found = json_of(data)
    entries = found if isinstance(found, list) else [json_object(data)]
    if not entries:
        raise Malformed("expected steering vectors, got none")
    total: dict[int, Tensor] = {}
    strengths: dict[int, float] = {}
    for entry in entries:
        entry = mapping("steering vector", entry)
        scale = number("scale", entry.get("scale", 1.0))
        for layer, row in _lens_rows(entry):
            if layer in total:  # several vectors on one layer add up
                total[layer] = strengths[layer] * total[layer] + scale * row
                strengths[layer] = 1.0
            else:
                total[layer], strengths[layer] = row, scale
    for layer, row in total.items():
        vector(f"layer {layer}", row)
    return Imported(total, strengths, notes=("layers: layer_indices are outputs of 0-based blocks",))


def _lens_rows(entry: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    if entry.get("norm_match"):
        raise Malformed("norm_match: it scales with every row, which no edit of a profile does; expected false")
    if entry.get("mode") not in (None, "add"):
        raise Malformed(f"mode: expected 'add', got {entry['mode']!r}")
    if entry.get("position_indices") is not None:
        raise Malformed("position_indices: a profile steers whole sequences, expected null")
    tensor = _lens_tensor(mapping("activations", entry.get("activations")))
    numbers = _layer_indices("activations: expected one row", entry, tensor)
    if len(set(numbers)) < len(numbers):
        raise Malformed(f"layer_indices: expected each layer once, got {numbers}")
    yield from zip(numbers, tensor, strict=True)


def _layer_indices(expected: str, entry: dict[str, Any], tensor: Tensor) -> list[int]:
    layers = entry.get("layer_indices")
    if not isinstance(layers, list) or tensor.dim() != 2 or len(layers) != len(tensor):
        raise Malformed(f"{expected} for each of layer_indices, got shape {list(tensor.shape)} for {layers!r}")
    return [layer_number(layer) for layer in layers]


def _lens_tensor(entry: dict[str, Any]) -> Tensor:
    stored, original = entry.get("dtype"), str(entry.get("original_dtype") or "").removeprefix("torch.")
    dtype = "bfloat16" if (stored, original) == ("int16", "bfloat16") else stored
    data = base64_bytes("activations.data", entry.get("data"))
    compression = entry.get("compression")
    if compression == "zstd":
        most = math.prod(checked_shape("activations", entry.get("shape"))) * 8
        data = _inflated(data, most)
    elif compression is not None:
        raise Malformed(f"compression: expected 'zstd' or none, got {compression!r}")
    return packed("activations", data, dtype, entry.get("shape"))


def _inflated(data: bytes, most: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise ProfileError(
            "zstandard: the file is compressed with zstd, expected the package zstandard, found none "
            "(pip install zstandard)"
        ) from None
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as stream:
            raw: bytes = stream.read(most + 1)
    except zstandard.ZstdError as error:
        raise Malformed(f"activations.data: not zstd ({error})") from None
    if len(raw) > most:
        raise Malformed(f"activations.data: expected at most {most} bytes for its shape, got more")
    return raw


def _data_of(written: ExportRows) -> dict[str, Any]:
    rows = torch.stack(list(written.rows.values()))
    data = base64.b64encode(rows.numpy().astype("<f4").tobytes()).decode()
    return {"data": data, "dtype": "float32", "shape": list(rows.shape)}


def _encode_lens(written: ExportRows) -> tuple[bytes, list[str]]:
    vector = {
        "activations": {**_data_of(written), "original_dtype": "torch.float32"},
        "layer_indices": list(written.rows),
        "scale": 1.0,
        "norm_match": False,
        "position_indices": None,
    }
    return json_bytes(vector), []


def _is_lens(path: Path, data: bytes) -> bool:
    found = json_of(data, "activations")
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict) and {"activations", "layer_indices"} <= set(first)


# -- RhizoNymph ------------------------------------------------------------------------------------

_TIERS = ("vectors", "prefill_vectors", "decode_vectors")
_HOOKS = ("post_block", "post_mlp")  # one place; the second is its name in older versions


def _read_module(path: Path, data: bytes) -> Imported:
    found = json_object(data)
    other = {key for key, value in found.items() if key not in (*_TIERS, "name", "kind") and value}
    if found.get("kind", "additive") != "additive":
        raise Malformed(f"kind: expected 'additive', got {found['kind']!r}")
    if other:
        raise Malformed(f"expected a module of vectors, got {', '.join(sorted(other))} too")
    filled = [tier for tier in _TIERS if found.get(tier)]
    if len(filled) != 1 or filled == ["prefill_vectors"]:
        raise Malformed(
            f"tiers: a profile has one edit for prompt and answer, expected vectors or decode_vectors alone, got "
            f"{', '.join(filled) or 'none'}"
        )
    tier = mapping(filled[0], found[filled[0]])
    if len(tier) != 1 or (hook := next(iter(tier))) not in _HOOKS:
        raise Malformed(f"hooks: a profile edits outputs of blocks, expected {' or '.join(_HOOKS)}, got {list(tier)}")
    rows = mapping(hook, tier[hook])
    entries = list(_packed_rows(rows) if "data" in rows else _listed_rows(rows))
    vectors = {layer: row for layer, row, _ in entries}
    if not vectors or len(vectors) < len(entries):
        raise Malformed(f"{hook}: expected each layer once, got {[layer for layer, _, _ in entries]}")
    notes = [f"layers: {hook} of L is the output of 0-based block L"]
    if filled == ["decode_vectors"]:
        notes.append("decode_vectors became positions 'response', which steers the prompt's last token too")
    return Imported(
        vectors,
        {layer: scale for layer, _, scale in entries},
        positions="response" if filled == ["decode_vectors"] else "all",
        notes=tuple(notes),
    )


def _packed_rows(rows: dict[str, Any]) -> Iterator[tuple[int, Tensor, float]]:
    tensor = packed("data", base64_bytes("data", rows["data"]), rows.get("dtype"), rows.get("shape"))
    layers = _layer_indices("data: expected a row", rows, tensor)
    scales = rows.get("scales")
    if scales is None:
        scales = [1.0] * len(layers)
    if not isinstance(scales, list) or len(scales) != len(layers):
        raise Malformed(f"scales: expected one for each of {len(layers)} layers, got {scales!r}")
    for layer, row, scale in zip(layers, tensor, scales, strict=True):
        yield layer, row, number("scale", scale)


def _listed_rows(rows: dict[str, Any]) -> Iterator[tuple[int, Tensor, float]]:
    for layer, entry in rows.items():
        scale = 1.0
        if isinstance(entry, dict):
            scale, entry = number(f"layer {layer}: scale", entry.get("scale")), entry.get("vector")
        yield layer_number(layer), floats(f"layer {layer}", entry), scale


def _encode_module(written: ExportRows) -> tuple[bytes, list[str]]:
    hook = {**_data_of(written), "layer_indices": list(written.rows)}
    return json_bytes({"vectors": {"post_block": hook}}), ["hook post_block; versions before it call it post_mlp"]


def _is_module(path: Path, data: bytes) -> bool:
    found = json_of(data, *_TIERS)
    return isinstance(found, dict) and any(isinstance(found.get(tier), dict) for tier in _TIERS)


SVEC = Format("svec", (".svec",), "L is the input of 0-based block L", _is_svec, _read_svec, _encode_svec)
VLLM_LENS = Format(
    "vllm-lens", (".json",), "layer_indices are outputs of 0-based blocks", _is_lens, _read_lens, _encode_lens
)
RHIZONYMPH = Format(
    "rhizonymph", (".json",), "L is the output of 0-based block L", _is_module, _read_module, _encode_module
)

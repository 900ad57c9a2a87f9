"""What every format shares: what a file says (`Imported`), what is written (`ExportRows`), and careful reading."""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.profile import Gate, ModelIdentity, SteeringProfile

# A vector for each of 126 layers of 16384 is 8 MB, its JSON 45 MB.
MOST_BYTES = 256 << 20


class Malformed(ValueError):
    """What is wrong with the content of a file; `steerfast.formats.read` adds which file."""


@dataclass(frozen=True)
class Condition:
    """A gate that came with a file: it opens where the cosine of the row and `direction` exceeds `threshold`.

    layer: 0-based block whose output is read.
    direction: float32 [H], not zero.
    """

    layer: int
    direction: Tensor
    threshold: float
    notes: tuple[str, ...] = ()

    def below(self) -> Condition:
        """The condition that the cosine stays below the threshold."""
        return replace(self, direction=-self.direction, threshold=-self.threshold)


@dataclass(frozen=True)
class Imported:
    """What a file of another project says.

    vectors: 0-based block whose output is edited -> float32 [H], residual-stream units. -1 stands for the embeddings,
        which some projects edit and no profile does.
    strengths: block -> strength. A block with a vector and no strength is not steered: its project names layers when
        it steers, not in the file.
    anywhere: a vector that the file gives no layer, float32 [H].
    positions: as in `SteeringProfile`.
    hint: what the file calls the model's architecture.
    notes: the layer numbering that was assumed, and what was lost.
    """

    vectors: Mapping[int, Tensor]
    strengths: Mapping[int, float] = field(default_factory=dict)
    anywhere: Tensor | None = None
    positions: Literal["all", "response"] = "all"
    hint: str | None = None
    notes: tuple[str, ...] = ()

    def profile(
        self,
        model: ModelIdentity,
        *,
        layers: Iterable[int] | None = None,
        strength: float | None = None,
        shift: int = 0,
        gate: Condition | SteeringProfile | None = None,
        name: str = "imported",
    ) -> tuple[SteeringProfile, list[str]]:
        """A profile of these vectors, and what to know about it.

        Args:
            model: the model it is for.
            layers: 0-based blocks to steer, in place of the file's own choice.
            strength: of every steered layer, in place of the file's.
            shift: added to every block number, where a file counts in another way than its format does.
            gate: a condition, or a profile of the same model whose gate is taken over; None: always open.
            name: what the profile calls its vectors.

        Raises:
            ProfileError: vectors of another size, a layer that the model or the file does not have.
        """
        notes = list(self.notes)
        chosen = None if layers is None else sorted(set(layers))
        vectors = {layer + shift: vector for layer, vector in self.vectors.items()}
        strengths = {layer + shift: value for layer, value in self.strengths.items()}
        if self.anywhere is not None:
            if chosen is None:
                raise ProfileError("layers: the file gives its vector no layer, expected the layers to steer, got none")
            vectors = dict.fromkeys(chosen, self.anywhere)
        if vectors.pop(-1, None) is not None:
            notes.append("the vector of the embeddings is left out: a profile edits outputs of blocks only")
        for layer, vector in sorted(vectors.items()):
            _check_fits(f"vector of layer {layer}", vector, layer, model)
        if chosen is not None:
            if missing := [layer for layer in chosen if layer not in vectors]:
                raise ProfileError(f"layers: expected some of {sorted(vectors)}, which the file has, got {missing[0]}")
            strengths = {layer: strengths.get(layer, 1.0) for layer in chosen}
        strengths = {layer: value for layer, value in strengths.items() if layer in vectors and vectors[layer].any()}
        if strength is not None:
            strengths = dict.fromkeys(strengths, strength)
        if not any(strengths.values()):
            notes.append("no layer is steered yet: name layers, or let `steerfast tune` find them")
        if self.hint not in (None, "", "unknown", model.architecture):
            notes.append(f"the file says it is for a {self.hint!r} model, {model.name!r} is {model.architecture!r}")
        if isinstance(gate, Condition):
            notes += gate.notes
        profile = SteeringProfile(
            model=model,
            direction=torch.zeros(model.num_layers, model.hidden_size),
            threshold=torch.zeros(model.num_layers),
            vector=_placed(vectors, torch.zeros(model.num_layers, model.hidden_size)),
            strength=_placed(strengths, torch.zeros(model.num_layers)),
            norm=torch.zeros(model.num_layers),
            gate=Gate("always"),
            positions=self.positions,
            vector_kind=name,
            fitted={"direction": "an import", "notes": notes},
        )
        return replace(profile, **_gate_fields(gate, model)), notes


def _gate_fields(gate: Condition | SteeringProfile | None, model: ModelIdentity) -> dict[str, Any]:
    if gate is None:
        return {}
    if isinstance(gate, SteeringProfile):
        if (problem := gate.model.mismatch(model)) is not None:
            raise ProfileError(f"gate: {problem}")
        taken = ("gate", "direction", "threshold", "abstain", "sensor", "norm", "calibration")
        return {name: getattr(gate, name) for name in taken}
    _check_fits("condition", gate.direction, gate.layer, model)
    zeros = torch.zeros(model.num_layers, model.hidden_size)
    return {
        "gate": Gate("prompt", "cosine"),
        "direction": _placed({gate.layer: torch.nn.functional.normalize(gate.direction, dim=0)}, zeros),
        "threshold": _placed({gate.layer: gate.threshold}, zeros[:, 0].clone()),
        "sensor": gate.layer,
    }


def _check_fits(what: str, vector: Tensor, layer: int, model: ModelIdentity) -> None:
    if not 0 <= layer < model.num_layers:
        raise ProfileError(f"{what}: expected a layer in 0..{model.num_layers - 1} for {model.name!r}, got {layer}")
    if len(vector) != model.hidden_size:
        raise ProfileError(f"{what}: expected {model.hidden_size} numbers for {model.name!r}, got {len(vector)}")


def _placed(values: Mapping[int, Tensor] | Mapping[int, float], rows: Tensor) -> Tensor:
    for layer, value in values.items():
        rows[layer] = torch.as_tensor(value, dtype=torch.float64)  # infinite where float32 cannot hold it
    return rows


@dataclass(frozen=True)
class ExportRows:
    """What a profile adds where its gate is open, ready to be written: strength times vector.

    rows: 0-based block -> float32 [H], ascending.
    notes: what the other side has to know, and what is lost.
    """

    profile: SteeringProfile
    rows: dict[int, Tensor]
    notes: tuple[str, ...]

    @property
    def hint(self) -> str:
        """The model's architecture, as projects write it into their files."""
        return self.profile.model.architecture

    def stacked(self) -> np.ndarray:
        """float32 [n, H]: the rows, one under another."""
        return torch.stack(list(self.rows.values())).numpy()


def export_rows(profile: SteeringProfile, *, gate_apart: bool = False) -> ExportRows:
    """The vectors to write, and what is lost by it; `gate_apart`: not the gate, it is written to a file of its own.

    Raises:
        ProfileError: the profile does something else than adding, or adds nothing.
    """
    if profile.edit not in ("add", "keep_norm"):
        raise ProfileError(f"edit: other formats hold vectors to add, expected 'add', got {profile.edit!r}")
    steered = profile.steered_layers
    if steered:
        rows = {layer: profile.vector[layer] * profile.strength[layer] for layer in steered}
        notes = ["vectors are written times their strengths: use coefficient 1"]
    else:
        present = profile.vector.any(dim=1).nonzero().flatten().tolist()
        rows = {layer: profile.vector[layer].clone() for layer in present}
        notes = ["no layer of the profile is steered: all its vectors are written as they are"]
    if not rows:
        raise ProfileError("vector: the profile has none, there is nothing to write")
    for layer, row in rows.items():
        if not bool(row.isfinite().all()):
            raise ProfileError(f"vector of layer {layer}: times its strength it exceeds float32")
    if profile.gate.kind != "always" and not gate_apart:
        notes.append(f"the gate is lost: the {profile.gate.kind} gate is not written, everything will be steered")
    if profile.gate.kind != "always" and profile.abstain is not None:
        notes.append("the abstain band is lost: nothing will be undecided")
    if profile.positions != "all":
        notes.append("positions are lost: the whole prompt will be steered too")
    if profile.answer_tokens is not None:
        notes.append(f"answer_tokens is lost: all of an answer will be steered, not {profile.answer_tokens} tokens")
    if profile.edit == "keep_norm":
        notes.append("keep_norm is lost: vectors will be added without scaling rows back to their norm")
    if profile.candidates:
        notes.append(f"candidate vectors are lost: {', '.join(sorted(profile.candidates))}")
    return ExportRows(profile, rows, tuple(notes))


@dataclass(frozen=True)
class Format:
    """How one project keeps its vectors.

    name: as users type it.
    endings: of its files; none: a folder.
    layers: what its layer numbers mean.
    detects: whether (path, its content) looks like one; the content of a folder is empty.
    read: path, its content -> what it says. May raise `Malformed`, and what parsing raises.
    encode: rows -> what to write (bytes, or name -> bytes for a folder) and notes; None where it is only read.
    """

    name: str
    endings: tuple[str, ...]
    layers: str
    detects: Callable[[Path, bytes], bool]
    read: Callable[[Path, bytes], Imported]
    encode: Callable[[ExportRows], tuple[bytes | dict[str, bytes], list[str]]] | None = None


# -- reading ---------------------------------------------------------------------------------------


def content(path: Path) -> bytes:
    """All of a file; nothing of a folder.

    Raises:
        ProfileError: missing, not readable, too large.
    """
    if path.is_dir():
        return b""
    if not path.is_file():
        raise ProfileError(f"file: expected a file or folder at {str(path)!r}, found none")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise ProfileError(
                    f"file: expected at most {MOST_BYTES >> 20} MiB, got {size >> 20} MiB in {str(path)!r}"
                )
            return file.read(MOST_BYTES)
    except OSError as error:
        raise ProfileError(f"file: cannot read {str(path)!r} ({error.strerror})") from None


def json_of(data: bytes) -> Any:
    """The JSON of a file; None where it is none."""
    if data.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from None
    return mapping("the file", value)


def mapping(what: str, value: object) -> dict[str, Any]:
    """`value`, if it is a JSON object."""
    if not isinstance(value, dict):
        raise Malformed(f"{what}: expected an object, got {type(value).__name__}")
    return value


def layer_number(value: object) -> int:
    """A layer number of a file: a whole number from 0, or its text."""
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not (text.isascii() and text.isdigit()):
        raise Malformed(f"layer: expected a whole number from 0, got {value!r}")
    if len(text) > 6:
        raise Malformed(f"layer: expected a number of at most 6 digits, got {text[:20]}...")
    return int(text)


def number(what: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{what}: expected a finite number, got {value!r}")
    return float(value)


def floats(what: str, value: object) -> Tensor:
    """A JSON list of numbers as float32 [n]."""
    if not isinstance(value, list) or not value or not all(type(entry) in (int, float) for entry in value):
        raise Malformed(f"{what}: expected a list of numbers, got {_brief(value)}")
    try:
        return vector(what, torch.tensor(value, dtype=torch.float64))
    except OverflowError:
        raise Malformed(f"{what}: expected numbers of float32's range") from None


def vector(what: str, value: object, dims: tuple[int, ...] = (1,)) -> Tensor:
    """A tensor of a file as finite float32 on the CPU."""
    if not isinstance(value, Tensor):
        raise Malformed(f"{what}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or not value.is_floating_point() or value.device.type != "cpu":
        raise Malformed(f"{what}: expected dense floating point, got {value.dtype}, {value.layout}, {value.device}")
    if value.dim() not in dims or 0 in value.shape:
        expected = " or ".join(f"{n}-D" for n in dims)
        raise Malformed(f"{what}: expected shape {expected} and not empty, got {list(value.shape)}")
    if value.numel() * 4 > MOST_BYTES:  # a view may claim any shape over little memory
        raise Malformed(f"{what}: expected at most {MOST_BYTES >> 20} MiB, got shape {list(value.shape)}")
    made = value.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    if not bool(made.isfinite().all()):
        raise Malformed(f"{what}: expected finite numbers of float32's range, got nan or infinity")
    return made


def packed(what: str, data: bytes, dtype: object, shape: object) -> Tensor:
    """Little-endian raw numbers as float32 of `shape`.

    Args:
        dtype: float64, float32, float16 or bfloat16.
    """
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    if not isinstance(dtype, str) or dtype not in sizes:
        raise Malformed(f"{what}: expected dtype {', '.join(sizes)}, got {dtype!r}")
    expected = checked_shape(what, shape)
    if len(data) != math.prod(expected) * sizes[dtype]:
        raise Malformed(
            f"{what}: expected {math.prod(expected) * sizes[dtype]} bytes for {dtype} {expected}, got {len(data)}"
        )
    if dtype == "bfloat16":
        raw = torch.from_numpy(np.frombuffer(data, "<i2").copy()).view(torch.bfloat16)
    else:
        raw = torch.from_numpy(np.frombuffer(data, f"<f{sizes[dtype]}").copy())
    return vector(what, raw.reshape(expected), (1, 2, 3))


def checked_shape(what: str, shape: object) -> list[int]:
    """A shape of a file: a short list of sizes from 1, of no more numbers than a file may hold."""
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 3
        or not all(type(size) is int and 1 <= size <= MOST_BYTES for size in shape)
        or math.prod(shape) * 4 > MOST_BYTES
    ):
        raise Malformed(f"{what}: expected a shape of 1 to 3 sizes and at most {MOST_BYTES >> 20} MiB, got {shape!r}")
    return shape


def base64_bytes(what: str, value: object) -> bytes:
    """The bytes behind base64 text."""
    if not isinstance(value, str):
        raise Malformed(f"{what}: expected base64 text, got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"{what}: not base64 ({error})") from None


def json_bytes(value: object) -> bytes:
    """`value` as the content of a JSON file."""
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _brief(value: object) -> str:
    return f"{type(value).__name__} {value!r}"[:60]

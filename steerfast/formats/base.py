"""The parts that formats share: a file's content (`Imported`), rows to write (`ExportRows`), and careful reading."""

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
from steerfast.profile import EDITS, Gate, ModelIdentity, SteeringProfile
from steerfast.profile.checks import check_one_of

# A vector for each of 126 layers of 16384 is 8 MB, its JSON 45 MB.
MOST_BYTES = 256 << 20


class Malformed(ValueError):
    """The content of a file is wrong; `steerfast.formats.read` adds the file's name to the message."""


@dataclass(frozen=True)
class Condition:
    """Hold a gate from a file: it opens where the cosine of the row and `direction` exceeds `threshold`.

    layer: 0-based block whose output is read.
    direction: float32 [H], not zero.
    """

    layer: int
    direction: Tensor
    threshold: float
    notes: tuple[str, ...] = ()

    def below(self) -> Condition:
        """Return the condition that the cosine stays below the threshold."""
        return replace(self, direction=-self.direction, threshold=-self.threshold)


@dataclass(frozen=True)
class ImportOptions:
    """Hold how the vectors of a file become a profile.

    layers: 0-based blocks to steer, in place of the file's own choice.
    strength: of every steered layer, in place of the file's.
    shift: added to every block number, for a file that counts in another way than its format does.
    gate: a condition, or a profile of the same model whose gate is taken over; None: always open.
    gate_kind: ``prompt``, ``token`` or ``always`` in place of the kind of `gate`. sharpness: in place of its sharpness.
    edit, low, high, angle: as in `SteeringProfile`.
    name: the profile's `vector_kind`.
    """

    layers: Iterable[int] | None = None
    strength: float | None = None
    shift: int = 0
    gate: Condition | SteeringProfile | None = None
    gate_kind: Literal["prompt", "token", "always"] | None = None
    sharpness: float | None = None
    edit: str = "add"
    low: float = -math.inf
    high: float = math.inf
    angle: float | None = None
    name: str = "imported"

    def __post_init__(self) -> None:
        check_one_of("edit", self.edit, EDITS)
        if self.gate is None and self.gate_kind in ("prompt", "token"):
            raise ProfileError(f"gate_kind: expected a gate with it, got {self.gate_kind!r} without a gate")
        if self.sharpness is not None and (self.gate is None or self.gate_kind == "always"):
            raise ProfileError(f"sharpness: expected a gate with it, got {self.sharpness!r} without a gate")


@dataclass(frozen=True)
class Imported:
    """Hold the content of another project's file.

    vectors: 0-based block whose output is edited -> float32 [H], residual-stream units. -1 stands for the embeddings,
        which some projects edit and no profile does.
    strengths: block -> strength. A block with a vector and no strength is not steered: its project names layers when
        it steers, not in the file.
    anywhere: a vector that the file gives no layer, float32 [H].
    positions: as in `SteeringProfile`.
    hint: the file's name for the model's architecture.
    notes: the layer numbering that was assumed, and losses.
    """

    vectors: Mapping[int, Tensor]
    strengths: Mapping[int, float] = field(default_factory=dict)
    anywhere: Tensor | None = None
    positions: Literal["all", "response"] = "all"
    hint: str | None = None
    notes: tuple[str, ...] = ()

    def profile(self, model: ModelIdentity, **options: Any) -> tuple[SteeringProfile, list[str]]:
        """Return a profile of these vectors for `model`, and notes on it.

        Args:
            options: see `ImportOptions`.

        Raises:
            ProfileError: vectors of another size, a layer that the model or the file does not have, an edit or a gate
                that no profile holds.
        """
        chosen = ImportOptions(**options)
        notes = list(self.notes)
        vectors, strengths = self._placed(model, chosen, notes)
        if not any(strengths.values()):
            notes.append("no layer is steered yet: name layers, or let `steerfast tune` find them")
        if self.hint not in (None, "", "unknown", model.architecture):
            notes.append(f"the file says it is for a {self.hint!r} model, {model.name!r} is {model.architecture!r}")
        gate = _gate_fields(chosen, model, notes)
        profile = SteeringProfile.from_tensors(
            vectors,
            model,
            strength=strengths,
            edit=chosen.edit,
            low=chosen.low,
            high=chosen.high,
            angle=chosen.angle,
            positions=self.positions,
            vector_kind=chosen.name,
            fitted={"direction": "an import", "notes": list(notes)},
            **gate,
        )
        return profile, notes

    def _placed(
        self, model: ModelIdentity, options: ImportOptions, notes: list[str]
    ) -> tuple[dict[int, Tensor], dict[int, float]]:
        """Return vectors and strengths by the profile's layers, as `options` ask for them; add to `notes`."""
        chosen = None if options.layers is None else sorted(set(options.layers))
        vectors = {layer + options.shift: vector for layer, vector in self.vectors.items()}
        strengths = {layer + options.shift: value for layer, value in self.strengths.items()}
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
        if options.strength is not None:
            return vectors, dict.fromkeys(strengths, options.strength)
        if not EDITS[options.edit].adds and any(value != 1 for value in strengths.values()):
            notes.append(f"the file's strengths are left out: they scale an addition, {options.edit} is done at 1")
            strengths = dict.fromkeys(strengths, 1.0)
        return vectors, strengths


_GATE_FIELDS = ("gate", "direction", "threshold", "points", "abstain", "sensor", "norm", "calibration")


def _gate_fields(options: ImportOptions, model: ModelIdentity, notes: list[str]) -> dict[str, Any]:
    """Return the fields of a profile that its gate fills; add to `notes`."""
    source = options.gate
    if source is None:
        return {}
    if isinstance(source, SteeringProfile):
        if (problem := source.model.mismatch(model)) is not None:
            raise ProfileError(f"gate: {problem}")
        fields = {name: getattr(source, name) for name in _GATE_FIELDS}
    else:
        _check_fits("condition", source.direction, source.layer, model)
        notes += source.notes
        zeros = torch.zeros(model.num_layers, model.hidden_size)
        fields = {
            "gate": Gate("prompt", "cosine"),
            "direction": _in_rows({source.layer: torch.nn.functional.normalize(source.direction, dim=0)}, zeros),
            "threshold": _in_rows({source.layer: source.threshold}, zeros[:, 0].clone()),
            "sensor": source.layer,
        }
    gate = fields["gate"]
    if options.gate_kind not in (None, gate.kind):
        fields["gate"] = Gate("always") if options.gate_kind == "always" else replace(gate, kind=options.gate_kind)
        if fields.pop("points", None):
            notes.append(f"the named thresholds are left out: they were set for a {gate.kind} gate")
        if fields.pop("abstain", None) is not None:
            notes.append(f"the abstain band is left out: it was set for a {gate.kind} gate")
        if fields.pop("calibration", None):
            notes.append(f"the calibration figures are left out: they hold for a {gate.kind} gate")
    if options.sharpness is not None:
        fields["gate"] = replace(fields["gate"], sharpness=options.sharpness)
    return fields


def _check_fits(what: str, vector: Tensor, layer: int, model: ModelIdentity) -> None:
    if not 0 <= layer < model.num_layers:
        raise ProfileError(f"{what}: expected a layer in 0..{model.num_layers - 1} for {model.name!r}, got {layer}")
    if len(vector) != model.hidden_size:
        raise ProfileError(f"{what}: expected {model.hidden_size} numbers for {model.name!r}, got {len(vector)}")


def _in_rows(values: Mapping[int, Tensor] | Mapping[int, float], rows: Tensor) -> Tensor:
    for layer, value in values.items():
        rows[layer] = torch.as_tensor(value, dtype=torch.float64)  # infinite where float32 cannot hold it
    return rows


@dataclass(frozen=True)
class ExportRows:
    """Hold the rows that a profile with an open gate adds, ready to write: strength times vector.

    rows: 0-based block -> float32 [H], ascending.
    notes: facts that the other project's users need, and losses.
    """

    profile: SteeringProfile
    rows: dict[int, Tensor]
    notes: tuple[str, ...]

    @property
    def hint(self) -> str:
        """Return the model's architecture, as projects write it into their files."""
        return self.profile.model.architecture

    def stacked(self) -> np.ndarray:
        """Return the rows, one under another: float32 [n, H]."""
        return torch.stack(list(self.rows.values())).numpy()


def export_rows(profile: SteeringProfile, *, gate_apart: bool = False) -> ExportRows:
    """Return the vectors to write, with notes on losses.

    Args:
        gate_apart: whether the gate is written too, to another file.

    Raises:
        ProfileError: the profile's edit is no addition, or the profile adds nothing.
    """
    kind = EDITS[profile.edit]
    if not kind.adds:
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
    if profile.gate.kind != "always" and profile.points:
        notes.append(f"the named thresholds are lost: {', '.join(sorted(profile.points))}")
    if profile.gate.kind != "always" and profile.abstain is not None:
        notes.append("the abstain band is lost: nothing will be undecided")
    if profile.positions != "all":
        notes.append("positions are lost: the whole prompt will be steered too")
    if profile.answer_tokens is not None:
        notes.append(f"answer_tokens is lost: all of an answer will be steered, not {profile.answer_tokens} tokens")
    if kind.reads_sums:
        notes.append(f"{kind.name} is lost: vectors will be added without scaling rows back to their norm")
    if profile.candidates:
        notes.append(f"candidate vectors are lost: {', '.join(sorted(profile.candidates))}")
    return ExportRows(profile, rows, tuple(notes))


@dataclass(frozen=True)
class Format:
    """One project's files of vectors.

    name: as users type it.
    endings: of its files; none: a folder.
    layers: the meaning of its layer numbers.
    detects: whether (path, its content) looks like one; the content of a folder is empty.
    read: path, its content -> `Imported`. May raise `Malformed`, and the errors of parsers.
    encode: rows -> bytes of a file (or name -> bytes of a folder) and notes; None for a format that is only read.
    """

    name: str
    endings: tuple[str, ...]
    layers: str
    detects: Callable[[Path, bytes], bool]
    read: Callable[[Path, bytes], Imported]
    encode: Callable[[ExportRows], tuple[bytes | dict[str, bytes], list[str]]] | None = None


# -- reading ---------------------------------------------------------------------------------------


def content(path: Path) -> bytes:
    """Return the bytes of a file; none for a folder.

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
    """Return the JSON value in a file; None for other content."""
    if data.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from None
    return mapping("the file", value)


def mapping(what: str, value: object) -> dict[str, Any]:
    """Return `value`, a JSON object, or raise."""
    if not isinstance(value, dict):
        raise Malformed(f"{what}: expected an object, got {type(value).__name__}")
    return value


def layer_number(value: object) -> int:
    """Return a layer number of a file: a whole number from 0, or its text."""
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not (text.isascii() and text.isdigit()):
        raise Malformed(f"layer: expected a whole number from 0, got {value!r}")
    if len(text) > 6:
        raise Malformed(f"layer: expected a number of at most 6 digits, got {text[:20]}...")
    return int(text)


def number(what: str, value: object) -> float:
    """Return `value`, a finite number, or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{what}: expected a finite number, got {value!r}")
    return float(value)


def floats(what: str, value: object) -> Tensor:
    """Return a JSON list of numbers as float32 [n]."""
    if not isinstance(value, list) or not value or not all(type(entry) in (int, float) for entry in value):
        raise Malformed(f"{what}: expected a list of numbers, got {_brief(value)}")
    try:
        return vector(what, torch.tensor(value, dtype=torch.float64))
    except OverflowError:
        raise Malformed(f"{what}: expected numbers of float32's range") from None


def vector(what: str, value: object, dims: tuple[int, ...] = (1,)) -> Tensor:
    """Return a tensor of a file as finite float32 on the CPU."""
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
    """Return little-endian raw numbers as float32 of `shape`.

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
    """Return a shape of a file: up to 3 sizes from 1, of no more numbers than a file may hold."""
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 3
        or not all(type(size) is int and 1 <= size <= MOST_BYTES for size in shape)
        or math.prod(shape) * 4 > MOST_BYTES
    ):
        raise Malformed(f"{what}: expected a shape of 1 to 3 sizes and at most {MOST_BYTES >> 20} MiB, got {shape!r}")
    return shape


def base64_bytes(what: str, value: object) -> bytes:
    """Return the bytes that base64 text encodes."""
    if not isinstance(value, str):
        raise Malformed(f"{what}: expected base64 text, got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"{what}: not base64 ({error})") from None


def json_bytes(value: object) -> bytes:
    """Return `value` as the content of a JSON file."""
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _brief(value: object) -> str:
    return f"{type(value).__name__} {value!r}"[:60]

"""The parts that formats share: a file's content (`Imported`), rows to write (`ExportRows`), and `Format`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.formats.reading import layer_in, vector
from steerfast.profile import EDITS, Gate, ModelIdentity, SteeringProfile
from steerfast.profile.checks import check_one_of


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
    edit: as in `SteeringProfile`; None: the file's, else ``add``. low, high, angle: as in `SteeringProfile`.
    name: the profile's `vector_kind`.
    """

    layers: Iterable[int] | None = None
    strength: float | None = None
    shift: int = 0
    gate: Condition | SteeringProfile | None = None
    gate_kind: Literal["prompt", "token", "always"] | None = None
    sharpness: float | None = None
    edit: str | None = None
    low: float = -math.inf
    high: float = math.inf
    angle: float | None = None
    name: str = "imported"

    def __post_init__(self) -> None:
        if self.edit is not None:
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
    rows: the number of rows in a file that only puts them in order. `vectors` counts them as blocks from 0; where they
        are one more than the model has blocks, the first is the embeddings.
    anywhere: a vector that the file gives no layer, float32 [H].
    named: the block for `anywhere` that is only told beside the numbers, and where it is told.
    edits: what the file allows, with the parameters of `ImportOptions` for each; none: any edit, by default ``add``.
    undecided: why the user has to choose, where `edits` are several.
    positions: as in `SteeringProfile`.
    hint: the file's name for the model's architecture.
    notes: the layer numbering that was assumed, and losses.
    """

    vectors: Mapping[int, Tensor]
    strengths: Mapping[int, float] = field(default_factory=dict)
    rows: int | None = None
    anywhere: Tensor | None = None
    named: tuple[int, str] | None = None
    edits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    undecided: str = ""
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
        chosen = self._with_edit(ImportOptions(**options))
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
            edit=str(chosen.edit),
            low=chosen.low,
            high=chosen.high,
            angle=chosen.angle,
            positions=self.positions,
            vector_kind=chosen.name,
            fitted={"direction": "an import", "notes": list(notes)},
            **gate,
        )
        return profile, notes

    def _with_edit(self, options: ImportOptions) -> ImportOptions:
        """Return `options` with an edit, and with the file's parameters where the user gives none."""
        if not self.edits:
            return replace(options, edit=options.edit or "add")
        if options.edit is None and len(self.edits) > 1:
            raise ProfileError(f"edit: expected {' or '.join(self.edits)}, got none: {self.undecided}")
        edit = options.edit or next(iter(self.edits))
        if edit not in self.edits:
            raise ProfileError(f"edit: the file's vectors are for {' or '.join(self.edits)}, got {edit!r}")
        unset = {"strength": None, "low": -math.inf, "high": math.inf}
        of_file = {name: value for name, value in self.edits[edit].items() if getattr(options, name) == unset[name]}
        return replace(options, edit=edit, **of_file)  # type: ignore[arg-type]

    def by_block(self, model: ModelIdentity, notes: list[str]) -> dict[int, Tensor]:
        """Return the vectors by block; add to `notes` what the number of `rows` says."""
        if self.rows is None:
            return dict(self.vectors)
        first = model.num_layers - self.rows
        if first not in (0, -1):
            raise ProfileError(
                f"rows: expected one for each of {model.num_layers} blocks of {model.name!r}, or one more for the "
                f"embeddings, got {self.rows}"
            )
        notes.append(
            f"layers: {self.rows} rows for {model.num_layers} blocks: "
            + ("row L" if first == 0 else "row 0 is the embeddings, as in persona_vectors, and row L + 1")
            + " is for the output of 0-based block L"
        )
        return {first + index: row for index, row in self.vectors.items() if bool(row.any())}

    def _placed(
        self, model: ModelIdentity, options: ImportOptions, notes: list[str]
    ) -> tuple[dict[int, Tensor], dict[int, float]]:
        """Return vectors and strengths by the profile's layers, as `options` ask for them; add to `notes`."""
        chosen = None if options.layers is None else sorted(set(options.layers))
        vectors = {layer + options.shift: row for layer, row in self.by_block(model, notes).items()}
        strengths = {layer + options.shift: value for layer, value in self.strengths.items()}
        if self.anywhere is not None:
            chosen = self._chosen(chosen, options.shift, notes)
            vectors = dict.fromkeys(chosen, self.anywhere)
        if vectors.pop(-1, None) is not None:
            notes.append("the vector of the embeddings is left out: a profile edits outputs of blocks only")
        for layer, row in sorted(vectors.items()):
            _check_fits(f"vector of layer {layer}", row, layer, model)
        if chosen is not None:
            if missing := [layer for layer in chosen if layer not in vectors]:
                raise ProfileError(f"layers: expected some of {sorted(vectors)}, which the file has, got {missing[0]}")
            strengths = {layer: strengths.get(layer, 1.0) for layer in chosen}
        strengths = {layer: value for layer, value in strengths.items() if layer in vectors and vectors[layer].any()}
        if options.strength is not None:
            return vectors, dict.fromkeys(strengths, options.strength)
        if not EDITS[str(options.edit)].adds and any(value != 1 for value in strengths.values()):
            notes.append(f"the file's strengths are left out: they scale an addition, {options.edit} is done at 1")
            strengths = dict.fromkeys(strengths, 1.0)
        return vectors, strengths

    def _chosen(self, layers: list[int] | None, shift: int, notes: list[str]) -> list[int]:
        """Return the blocks for `anywhere`: those of the user, else the block that the file's name tells."""
        if layers is None and self.named is not None:
            layers = [self.named[0] + shift]
            notes.append(f"layers: block {layers[0]}, which only the name {self.named[1]!r} tells: check it")
        if not layers:
            told = "".join(f" ({note})" for note in self.notes if note.startswith("layers: "))
            raise ProfileError(
                f"layers: the file gives its vector no layer, expected the layers to steer, got none{told}"
            )
        if layers[0] < 0:
            raise ProfileError(f"layers: expected a block from 0, got {layers[0]}, which is before the first")
        return layers


def imported_array(array: Tensor, *names: str, notes: tuple[str, ...] = ()) -> Imported:
    """Return the content of a file that holds one array: [H], or [n, H] with a row for each layer.

    Args:
        names: of the file and its parts, which may tell the layer of [H].
    """
    rows = vector("the array", array, (1, 2))
    if rows.dim() == 2:
        return Imported(dict(enumerate(rows)), rows=len(rows), notes=notes)
    return Imported({}, anywhere=rows, named=layer_in(*names), notes=notes)


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
        direction = torch.zeros(model.num_layers, model.hidden_size, dtype=torch.float32, device="cpu")
        direction[source.layer] = torch.nn.functional.normalize(source.direction, dim=0)
        threshold = torch.zeros(model.num_layers, dtype=torch.float32, device="cpu")
        # May be infinite in float32.
        threshold[source.layer] = torch.tensor(source.threshold, dtype=torch.float64, device="cpu")
        fields = {
            "gate": Gate("prompt", "cosine"),
            "direction": direction,
            "threshold": threshold,
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


@dataclass(frozen=True)
class ExportRows:
    """Hold the rows that a profile with an open gate adds, ready to write: strength times vector.

    rows: 0-based block -> float32 [H], ascending.
    notes: facts that the other project's users need, and losses.
    """

    profile: SteeringProfile
    rows: dict[int, Tensor]
    notes: tuple[str, ...]


def export_rows(profile: SteeringProfile, *, edit: str = "add", gate_apart: bool = False) -> ExportRows:
    """Return the vectors to write, with notes on losses.

    Args:
        edit: the edit that the format's files mean. Rows to add are written times their strengths, others as they are.
        gate_apart: whether the gate is written too, to another file.

    Raises:
        ProfileError: the profile has another edit, or no vector.
    """
    kind = EDITS[profile.edit]
    if profile.edit != edit and not (edit == "add" and kind.adds):
        hint = ": the format glp holds ablations" if profile.edit == "ablate" else ""
        raise ProfileError(f"edit: expected {edit!r}, which the format's vectors mean, got {profile.edit!r}{hint}")
    steered = profile.steered_layers
    if steered:
        strengths = profile.strength if edit == "add" else torch.ones_like(profile.strength)
        rows = {layer: profile.vector[layer] * strengths[layer] for layer in steered}
        notes = ["vectors are written times their strengths: use coefficient 1"] if edit == "add" else []
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
    if kind.reads_sums and edit == "add":
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
    edit: what its vectors are written for, see `export_rows`.
    """

    name: str
    endings: tuple[str, ...]
    layers: str
    detects: Callable[[Path, bytes], bool]
    read: Callable[[Path, bytes], Imported]
    encode: Callable[[ExportRows], tuple[bytes | dict[str, bytes], list[str]]] | None = None
    edit: str = "add"


def json_bytes(value: object) -> bytes:
    """Return `value` as the content of a JSON file."""
    return (json.dumps(value, allow_nan=False) + "\n").encode()

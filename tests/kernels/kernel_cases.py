"""Cases of the steering ops, the implementations that can run here, and the judgement of what they return.

The judgement is one rounding to the dtype, and around it the error that float32 arithmetic may have: its bound follows
every sum, gate value and coefficient. A gate whose score lies within that bound of a hard threshold may go either way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when the kernels are imported

from steerfast import _native
from steerfast.kernels import add_steer_rms_norm as norm_module
from steerfast.kernels import gate as gate_module
from steerfast.kernels import steer as steer_module
from steerfast.kernels.contract import (
    DECIDES,
    DIRECTION_SQ,
    EDIT,
    GATE,
    HIGH,
    LOW,
    READING,
    SCORE,
    SHARPNESS,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    Decides,
    EditId,
    GateKind,
    GateOperands,
    Kinds,
    Norm,
    Operands,
    Reading,
    Score,
)
from steerfast.kernels.edits import reference_score, reference_stream, reference_value

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = torch.cuda.is_available()


# ---- implementations ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """The ops in one implementation on one device; `interpreted` where Triton's interpreter stands in for a GPU.

    The functions take `Operands` and `GateOperands`, as the public ones do.
    """

    name: str
    score_: Callable[..., None]
    steer_: Callable[..., None]
    add_steer_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    device: str = "cpu"
    interpreted: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run here."""
        if self.name == "cpp" and not _native.available:
            return f"the C++ ops are absent: {_native.reason}"
        if self.name == "triton" and gate_module.triton is None:
            return "triton is not installed"
        if self.interpreted:
            assert type(gate_module.score_kernel).__name__ == "InterpretedFunction", (
                "without a GPU, TRITON_INTERPRET=1 must be set before the kernels are imported"
            )
        return None

    def truncates(self, dtype: torch.dtype) -> bool:
        """Triton's interpreter cuts float32 down to bfloat16, a GPU rounds."""
        return self.interpreted and dtype == torch.bfloat16


_ops = torch.ops.steerfast
DIRECT: dict[str, Callable[..., Any]] = {
    "score_": _ops.score_.default,
    "steer_": _ops.steer_.default,
    "steer_.deciding": _ops.steer_.deciding,
    "add_steer_rms_norm": _ops.add_steer_rms_norm.default,
    "add_steer_rms_norm.deciding": _ops.add_steer_rms_norm.deciding,
}


def direct_score_(x: torch.Tensor, residual: torch.Tensor | None, gates: GateOperands) -> None:
    sequence, deciding, counted, slots, _, directions, mean_directions, tables, row_scores, last_scores, *_ = gates
    read = (sequence, deciding, counted, slots, directions, mean_directions, tables[gates.layer])
    DIRECT["score_"](x, residual, *read, row_scores, last_scores)


def direct_steer_(
    x: torch.Tensor, residual: torch.Tensor | None, operands: Operands, gates: GateOperands | None = None
) -> None:
    if gates is None:
        DIRECT["steer_"](x, residual, *operands)
    else:
        DIRECT["steer_.deciding"](x, residual, operands.slots, *operands[2:], *gates[:5], *gates[7:])


def direct_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    operands: Operands,
    eps: float,
    norm: int,
    gates: GateOperands | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if gates is None:
        return DIRECT["add_steer_rms_norm"](x, residual, weight, *operands[:-1], eps, norm, operands.kinds)
    read = (operands.slots, *operands[2:], *gates[:5], *gates[7:])
    return DIRECT["add_steer_rms_norm.deciding"](x, residual, weight, *read, eps, norm)


_torch = (gate_module.score_torch_, steer_module.steer_torch_, norm_module.add_steer_rms_norm_torch)
TORCH = Implementation("torch", *_torch)
CPP = Implementation("cpp", direct_score_, direct_steer_, direct_norm)
TRITON = Implementation(
    "triton",
    gate_module.score_triton_,
    steer_module.steer_triton_,
    norm_module.add_steer_rms_norm_triton,
    "cuda" if CUDA else "cpu",
    interpreted=not CUDA,
)
IMPLEMENTATIONS = [TORCH, CPP, TRITON, *([Implementation("torch-cuda", *_torch, "cuda")] if CUDA else [])]


# ---- cases -------------------------------------------------------------------------------------------------

DECISIONS = ("sums", "scores", "values", "all_scales")  # the fields of a case that a launch which decides writes


@dataclass(frozen=True)
class Case:
    """Arguments of all ops. Running them leaves the case as it is. `x` and `residual` may be views of longer rows."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    slots: torch.Tensor
    vectors: torch.Tensor
    directions: torch.Tensor
    sequence: torch.Tensor
    deciding: torch.Tensor
    counted: torch.Tensor
    decider_slots: torch.Tensor
    strength: torch.Tensor
    mean_directions: torch.Tensor
    tables: torch.Tensor
    row_scores: torch.Tensor
    last_scores: torch.Tensor
    sums: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor
    all_scales: torch.Tensor
    layer: int = 1
    pair: bool = False  # whether score_ and steer_ get the residual
    eps: float = 1e-5
    norm: Norm = Norm.LLAMA
    kinds: Kinds = Kinds.ANY

    def on(self, device: str) -> Case:
        """The case on a device, all memory its own, row strides as they were."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: move(t, device) for k, t in tensors.items() if isinstance(t, torch.Tensor)})

    @property
    def table(self) -> torch.Tensor:
        return self.tables[self.layer]

    @property
    def scales(self) -> torch.Tensor:
        """Those of the rows at the layer."""
        return self.all_scales[self.layer, : len(self.slots)]

    @property
    def gates(self) -> GateOperands:
        names = [
            "sequence",
            "deciding",
            "counted",
            "decider_slots",
            "strength",
            "directions",
            "mean_directions",
            "tables",
        ]
        names += ["row_scores", "last_scores", *DECISIONS, "layer"]
        return GateOperands(*(getattr(self, name) for name in names))

    def operands(self, kinds: Kinds | None = None) -> Operands:
        """What the ops take; `kinds` instead of the case's where given."""
        read = (self.slots, self.scales, self.vectors, self.directions, self.table)
        return Operands(*read, int(self.kinds if kinds is None else kinds))

    def score_arguments(self) -> tuple[Any, ...]:
        return (self.x, self.residual if self.pair else None, self.gates)

    def steer_arguments(self) -> tuple[Any, ...]:
        return (self.x, self.residual if self.pair else None, self.operands())

    def norm_arguments(self) -> tuple[Any, ...]:
        return (self.x, self.residual, self.weight, self.operands(), self.eps, int(self.norm))

    def flat(self, op: Any) -> dict[str, Any]:
        """The arguments of a torch op, by the names in its schema."""
        names = [argument.name for argument in op._schema.arguments]
        values = {name: getattr(self, name) for name in names}
        if "layer" in names:
            values["scales"] = self.all_scales
        if "mean_directions" in names:
            values["slots"] = self.decider_slots
        if "weight" not in values and not self.pair:
            values["residual"] = None
        return values

    def run_score(self, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor]:
        """row_scores and last_scores afterwards."""
        case = self.on(implementation.device)
        implementation.score_(*case.score_arguments())
        return case.row_scores.cpu(), case.last_scores.cpu()

    def run_steer(self, implementation: Implementation) -> torch.Tensor:
        """The rows afterwards."""
        case = self.on(implementation.device)
        implementation.steer_(*case.steer_arguments())
        return case.x.cpu()

    def run_norm(self, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed rows and new residual."""
        normed, residual = implementation.add_steer_rms_norm(*self.on(implementation.device).norm_arguments())
        return normed.cpu(), residual.cpu()

    def decide_steer(self, implementation: Implementation) -> tuple[torch.Tensor, Case]:
        """The rows, and the case with its decisions, after a launch that decides."""
        case = self.on(implementation.device)
        implementation.steer_(*case.steer_arguments(), case.gates)
        return case.x.cpu(), self.decided_by(case)

    def decide_norm(self, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor, Case]:
        """Normed rows, new residual, and the case with its decisions, after a launch that decides."""
        case = self.on(implementation.device)
        normed, residual = implementation.add_steer_rms_norm(*case.norm_arguments(), case.gates)
        return normed.cpu(), residual.cpu(), self.decided_by(case)

    def decided_by(self, other: Case) -> Case:
        """The case with the decisions of another one."""
        return replace(self, **{name: getattr(other, name).cpu() for name in DECISIONS})

    def scored_by(self, implementation: Implementation) -> Case:
        """The case with the scores of its rows."""
        row_scores, last_scores = self.run_score(implementation)
        return replace(self, row_scores=row_scores, last_scores=last_scores)

    def select(self, pick: torch.Tensor) -> Case:
        """The case with these rows only; gates still name the old ones."""
        names = ("x", "residual", "slots", "sequence", "row_scores")
        picked = {name: getattr(self, name)[pick] for name in names}
        return replace(self, **picked, all_scales=self.all_scales[:, pick])

    def plain(self, **changes: float) -> Case:
        """All slots ADD with an ALWAYS gate and scale 1, but for table columns given by name.

        STRENGTH is the scale, too.
        """
        tables = self.tables.clone()
        for column, value in {"EDIT": EditId.ADD, "GATE": GateKind.ALWAYS, "STRENGTH": 1.0, **changes}.items():
            tables[..., COLUMNS[column]] = value
        scales = torch.full_like(self.all_scales, changes.get("STRENGTH", 1.0))
        return replace(self, tables=tables, strength=torch.ones_like(self.strength), all_scales=scales)


COLUMNS = {
    "THRESHOLD": THRESHOLD,
    "SHARPNESS": SHARPNESS,
    "STRENGTH": STRENGTH,
    "VECTOR_SQ": VECTOR_SQ,
    "VECTOR_DIRECTION": VECTOR_DIRECTION,
    "DIRECTION_SQ": DIRECTION_SQ,
    "LOW": LOW,
    "HIGH": HIGH,
    "GATE": GATE,
    "SCORE": SCORE,
    "EDIT": EDIT,
    "DECIDES": DECIDES,
    "READING": READING,
}


def move(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy on a device with the row stride, which .to() and .clone() would not keep; 7 between the rows."""
    if tensor.dim() < 2 or tensor.is_contiguous():
        return tensor.to(device, copy=True)
    wide = tensor.new_full((tensor.shape[0], tensor.stride(0)), 7.0, device=device)
    return wide[:, : tensor.shape[1]].copy_(tensor)


@dataclass(frozen=True)
class CaseOptions:
    """Shapes, dtypes and choices of `make_case`.

    `shared`: a row names the slots of its sequence or none, as gates that decide want it; otherwise every row has
    slots of its own.
    """

    rows: int = 6
    size: int = 576
    dtype: torch.dtype = torch.float32
    bank_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    stack: int = 1
    slots: int = 3
    sequences: int = 4
    layers: int = 3
    strided: bool = False
    pair: bool = False
    gates: Sequence[GateKind] = tuple(GateKind)
    edits: Sequence[EditId] = tuple(EditId)
    decides: Sequence[Decides] = tuple(Decides)
    readings: Sequence[Reading] = (Reading.LAST, Reading.MEAN, Reading.BOTH)
    kinds: Kinds = Kinds.ANY
    norm: Norm = Norm.LLAMA
    shared: bool = False
    seed: int = 0


def pick(g: torch.Generator, choices: Sequence[Any], *shape: int) -> torch.Tensor:
    """Random members of `choices`."""
    return torch.tensor(choices)[torch.randint(len(choices), shape, generator=g)]


def make_case(*values: Any, **options: Any) -> Case:
    """Random rows of very different norms, some not steered; gates hard and soft, open, half open and shut.

    The arguments are those of `CaseOptions`.
    """
    o = CaseOptions(*values, **options)
    g = torch.Generator().manual_seed(o.seed)

    def stream(width: int) -> torch.Tensor:
        wide = torch.randn(o.rows, o.size * (width if o.strided else 1), generator=g)
        return (wide * pick(g, [0.1, 1.0, 30.0], o.rows, 1)).to(o.dtype)[:, : o.size]

    bank_dtype = o.bank_dtype or o.dtype
    vectors = torch.randn(o.slots, o.size, generator=g).to(bank_dtype)
    directions, mean_directions = (
        torch.nn.functional.normalize(torch.randn(2, o.slots, o.size, generator=g), dim=2).to(bank_dtype).unbind()
    )
    tables = torch.stack([with_products(make_table(o, g), vectors, directions) for _ in range(o.layers)])
    count = o.sequences if o.rows else 0
    deciders = count * o.stack
    sequence = make_sequences(o, g)
    slot = torch.randint(-1, o.slots, (count, o.stack), generator=g, dtype=torch.int32)
    steered = (sequence[:, None] >= 0) & pick(g, [True, True, True, False], o.rows, 1)
    own = slot[sequence.clamp(min=0).long()] if o.shared else torch.randint(-1, o.slots, (o.rows, o.stack), generator=g)
    deciding, counted = make_ranges(o, g, sequence)
    return Case(
        x=stream(2),
        residual=stream(3),
        weight=(1 + 0.3 * torch.randn(o.size, generator=g)).to(o.weight_dtype or o.dtype),
        slots=torch.where(steered, own, -1).int(),
        vectors=vectors,
        directions=directions,
        sequence=sequence,
        deciding=deciding,
        counted=counted,
        decider_slots=slot.flatten(),
        strength=pick(g, [0.0, 1.0, 1.0, -0.7], deciders),
        mean_directions=mean_directions * 3,  # a direction may have any length
        tables=tables,
        row_scores=torch.randn(o.rows, o.stack, generator=g) * 0.2,
        last_scores=torch.randn(deciders, generator=g) * 0.2,
        sums=torch.randn(o.layers, deciders, generator=g).double(),
        scores=torch.randn(o.layers, deciders, generator=g),
        values=pick(g, [0.0, 0.3, 1.0], o.layers, deciders),
        all_scales=torch.randn(o.layers, o.rows, o.stack, generator=g)
        * pick(g, [0.0, 0.7, 1.0], o.layers, o.rows, o.stack),
        layer=o.layers // 2,
        pair=o.pair,
        norm=o.norm,
        kinds=o.kinds,
    )


def make_sequences(o: CaseOptions, g: torch.Generator) -> torch.Tensor:
    """int32 [rows]: the rows of each sequence lie together, in any order of the sequences, some of them padding."""
    where = torch.randint(o.sequences, (o.rows,), generator=g).sort().values
    sequence = torch.randperm(o.sequences, generator=g)[where]
    return torch.where(pick(g, [True, True, True, True, False], o.rows), sequence, -1).int()


def make_ranges(o: CaseOptions, g: torch.Generator, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """deciding [n], and counted [D, 3]: ranges that end at a row of the sequence, or are empty."""
    count = o.sequences if o.rows else 0
    deciding = torch.full((count,), -1, dtype=torch.int32)
    counted = torch.zeros(count * o.stack, 3, dtype=torch.int32)
    for q in range(count):
        rows = (sequence == q).nonzero().flatten()
        if not len(rows):
            continue
        if torch.rand((), generator=g) < 0.6:
            deciding[q] = rows[torch.randint(len(rows), (), generator=g)]
        for k in range(o.stack):
            first, last = rows[torch.randint(len(rows), (2,), generator=g).sort().values].tolist()
            inside = int(((rows >= first) & (rows <= last)).sum())
            earlier = int(torch.randint(4, (), generator=g))
            is_empty = bool(torch.rand((), generator=g) < 0.2)
            counted[q * o.stack + k] = torch.tensor([first, first if is_empty else last + 1, inside + earlier])
    return deciding, counted


def make_table(o: CaseOptions, g: torch.Generator) -> torch.Tensor:
    """A table of random gates and edits, without the columns that are functions of the bank."""
    angle = torch.rand(o.slots, generator=g) * 6.28
    clips = torch.tensor([(0.0, 0.0), (-0.02, 0.02), (0.3, 0.3), (-math.inf, 0.0)])[pick(g, range(4), o.slots)]
    table = torch.zeros(o.slots, TABLE_WIDTH)
    table[:, THRESHOLD] = torch.randn(o.slots, generator=g) * 0.1
    table[:, SHARPNESS] = pick(g, [0.0, 4.0], o.slots)
    table[:, STRENGTH] = torch.randn(o.slots, generator=g)
    table[:, GATE] = pick(g, o.gates, o.slots).float()
    table[:, SCORE] = pick(g, list(Score), o.slots).float()
    table[:, EDIT] = pick(g, o.edits, o.slots).float()
    table[:, DECIDES] = pick(g, o.decides, o.slots).float()
    table[:, READING] = pick(g, o.readings, o.slots).float()
    turns = table[:, EDIT] == EditId.ROTATE
    table[:, LOW] = torch.where(turns, angle.cos(), clips[:, 0])
    table[:, HIGH] = torch.where(turns, angle.sin(), clips[:, 1])
    return table


def with_products(table: torch.Tensor, vectors: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The table with the columns that are functions of the bank."""
    v, d = vectors.double(), directions.double()
    table = table.clone()
    table[:, VECTOR_SQ] = (v * v).sum(1).float()
    table[:, VECTOR_DIRECTION] = (v * d).sum(1).float()
    table[:, DIRECTION_SQ] = (d * d).sum(1).float()
    return table


# ---- bits --------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.itemsize])


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b)), f"differ by up to {(a.double() - b.double()).abs().max()}"


# ---- how far float32 may end from the exact result ---------------------------------------------------------

SUM = 64 * 2.0**-24  # of the absolute terms: 64 roundings
PRODUCT = 2.0**-22  # of a coefficient or term: four roundings


def rounding(implementation: Implementation, dtype: torch.dtype) -> float:
    """The relative error of one rounding to the dtype."""
    return torch.finfo(dtype).eps * (1 if implementation.truncates(dtype) else 0.501)


@dataclass(frozen=True)
class Near:
    """A gate's score and value, and how far either may be off (a hard value: by 1)."""

    score: float
    score_error: float
    value: float
    value_error: float


def near(score: float, error: float, numbers: torch.Tensor) -> Near:
    """The reading of a score that may be off by `error`."""
    sharpness, distance = float(numbers[SHARPNESS]), abs(score - float(numbers[THRESHOLD]))
    value_error = abs(sharpness) / 4 * (error + 2.0**-23 * distance) + 1e-6
    value = reference_value(score, numbers.double())
    return Near(score, error, value, value_error if sharpness else float(distance <= error))


def read_gate(s: torch.Tensor, direction: torch.Tensor, numbers: torch.Tensor, stream_error: float) -> Near:
    """The reading of a float64 row."""
    d = direction.double()
    error = (SUM + stream_error) * float((s * d).abs().sum())
    if numbers[SCORE] == Score.COSINE:
        error = error / max(float(s.norm()), 1e-30) + PRODUCT * max(1.0, float(d.norm())) + stream_error
    return near(reference_score(s, d, numbers.double()), error, numbers)


def coefficients(edit: EditId, numbers: Sequence[float]) -> tuple[float, float, float]:
    """a - 1, b and c of an edit's displacement (a - 1)*s + b*v + c*d, by the formulas of kernels/edits.py."""
    beta, xx, xd, xv, vv, vd, dd, low, high = numbers
    still = (0.0, 0.0, 0.0)
    if beta == 0:
        return still
    if edit == EditId.ADD:
        return (0.0, beta, 0.0)
    if edit == EditId.CLAMP:
        return (0.0, beta * (min(max(xv / vv, low), high) - xv / vv), 0.0) if vv > 0 else still
    if edit == EditId.KEEP_NORM:
        full = xx + beta * (2 * xv + beta * vv)
        if full <= 2.0**-16 * (xx + beta * beta * vv):
            return still
        ratio = math.sqrt(max(xx, 0) / full)
        return (ratio - 1, ratio * beta, 0.0)
    if vv <= 0 or dd - vd * vd / vv <= 2.0**-16 * dd:
        return still
    root, rest = math.sqrt(vv), math.sqrt(dd - vd * vd / vv)
    p1, p2 = xv / root, (xd - xv * vd / vv) / rest
    rho = math.hypot(p1, p2)
    q1, q2 = p1 + beta * (rho * low - p1), p2 + beta * (rho * high - p2)
    length = math.hypot(q1, q2)
    if length == 0:
        return still
    c = (q2 * rho / length - p2) / rest
    return (0.0, (q1 * rho / length - p1) / root - c * vd / vv, c)


def bounded_coefficients(
    edit: EditId, beta: float, beta_error: float, s: torch.Tensor, v: torch.Tensor, d: torch.Tensor,
    numbers: list[float], stream_error: float,
) -> tuple[tuple[float, float, float], list[float]]:  # fmt: skip
    """The coefficients of one slot, and how far float32 may be off: what the error of each number they are made of
    does to them, and their own roundings."""
    vv, vd, dd = numbers[VECTOR_SQ], numbers[VECTOR_DIRECTION], numbers[DIRECTION_SQ]
    arguments = [beta, float(s @ s), float(s @ d), float(s @ v), vv, vd, dd, numbers[LOW], numbers[HIGH]]
    if edit == EditId.ADD:
        return (0.0, beta, 0.0), [0.0, beta_error, 0.0]
    sum_error = SUM + stream_error
    off = [
        beta_error,
        2 * sum_error * arguments[1],
        sum_error * float((s * d).abs().sum()),
        sum_error * float((s * v).abs().sum()),
        PRODUCT * vv,
        PRODUCT * (abs(vd) + math.sqrt(vv * dd)),
        PRODUCT * dd,
        *(PRODUCT * abs(x) if math.isfinite(x) else 0.0 for x in numbers[LOW : HIGH + 1]),
    ]
    here = coefficients(edit, arguments)
    errors = [PRODUCT * abs(x) for x in here]
    if edit == EditId.KEEP_NORM:
        errors[0] += PRODUCT * (1 + abs(here[0]))
    if edit == EditId.ROTATE and vv > 0 and any(here):
        rho = math.hypot(arguments[3] / math.sqrt(vv), arguments[2])
        errors[1] += 4 * PRODUCT * rho / math.sqrt(vv)
        errors[2] += 4 * PRODUCT * rho / math.sqrt(dd - vd * vd / vv)
    for i, delta in enumerate(off):
        there = [
            coefficients(edit, [*arguments[:i], arguments[i] + sign * delta, *arguments[i + 1 :]]) for sign in (-1, 1)
        ]
        for j in range(3):
            errors[j] += max(abs(t[j] - here[j]) for t in there)
    return here, errors


@dataclass(frozen=True)
class Expected:
    """Exact rows [rows, H], how far float32 may end from them before it rounds, and which rows can be judged."""

    rows: torch.Tensor
    error: torch.Tensor
    sure: torch.Tensor


def expected_rows(case: Case, start: torch.Tensor, pair: bool, truncates: bool) -> Expected:
    """The float64 rows `start` displaced by their slots."""
    s = reference_stream(case.x, case.residual if pair else None)
    stream_error = torch.finfo(case.x.dtype).eps if truncates and pair else 0.0
    rows, size, sure = start.clone(), start.abs(), torch.ones(len(start), dtype=torch.bool)
    error = torch.zeros_like(start)
    for r, slots in enumerate(case.slots.tolist()):
        for k, slot in enumerate(slots):
            scale = float(case.scales[r, k])
            if slot < 0 or scale == 0:
                continue
            v, d = case.vectors[slot].double(), case.directions[slot].double()
            numbers = case.table[slot].tolist()
            gate, gate_error = 1.0, 0.0
            if numbers[GATE] == GateKind.TOKEN and case.kinds == Kinds.ANY:
                reading = read_gate(s[r], d, case.table[slot], stream_error)
                gate, gate_error = reading.value, reading.value_error
            if gate_error >= 1:  # a hard gate on its threshold
                sure[r] = False
                continue
            beta = gate * scale
            edit = EditId.ADD if case.kinds == Kinds.LATCHED_ADD else EditId(int(numbers[EDIT]))
            by, off = bounded_coefficients(
                edit, beta, abs(scale) * gate_error + PRODUCT * abs(beta), s[r], v, d, numbers, stream_error
            )
            for x, coefficient, delta in zip((s[r], v, d), by, off, strict=True):
                rows[r] += coefficient * x
                size[r] += abs(coefficient) * x.abs()
                error[r] += delta * x.abs()
            error[r] += abs(by[0]) * stream_error * s[r].abs()
    return Expected(rows, error + PRODUCT * size, sure)


def assert_within(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor, what: str) -> None:
    excess = (got.double() - want).abs() - tolerance
    worst = excess.argmax() if excess.numel() else None
    assert worst is None or excess.flatten()[worst] <= 0, (
        f"{what}: got {got.flatten()[worst]}, expected {want.flatten()[worst]} +- {tolerance.flatten()[worst]}"
    )


def assert_consistent(mine: Expected, reference: torch.Tensor) -> None:
    """The reference, which thinks in vectors, and the formulas above, which think in sums, are the same mathematics."""
    scale = reference.norm(dim=1, keepdim=True) + 1e-30
    assert (((mine.rows - reference).abs() <= 1e-4 * scale) | ~mine.sure[:, None]).all()


# ---- each op against its reference -------------------------------------------------------------------------


def check_score(implementation: Implementation, case: Case) -> None:
    """Every score that a gate reads, and the bits of all others."""
    row_scores, last_scores = case.run_score(implementation)
    assert row_scores.dtype == last_scores.dtype == torch.float32
    want_rows, want_lasts = gate_module.reference(*case.score_arguments())
    s = reference_stream(case.x, case.residual if case.pair else None)
    stream_error = torch.finfo(case.x.dtype).eps if implementation.truncates(case.x.dtype) and case.pair else 0.0
    stack = case.slots.shape[1]
    rows, lasts = case.row_scores.clone(), case.last_scores.clone()  # what stays where nothing reads
    rows[case.sequence < 0] = 0.0
    for j, slot in enumerate(case.decider_slots.tolist()):
        if slot < 0 or case.table[slot, DECIDES] == Decides.NOTHING:
            continue
        (q, k), reading, numbers = divmod(j, stack), int(case.table[slot, READING]), case.table[slot]
        first, until, _ = case.counted[j].tolist()
        if reading != Reading.MEAN and case.deciding[q] >= 0:
            got = read_gate(s[case.deciding[q]], case.directions[slot], numbers, stream_error)
            assert abs(float(last_scores[j]) - float(want_lasts[j])) <= got.score_error
            assert abs(got.score - float(want_lasts[j])) <= got.score_error
            lasts[j] = last_scores[j]
        for r in range(first, until) if reading != Reading.LAST else ():
            if case.sequence[r] == q:
                got = read_gate(s[r], case.mean_directions[slot], numbers, stream_error)
                assert abs(float(row_scores[r, k]) - float(want_rows[r, k])) <= got.score_error
                assert abs(got.score - float(want_rows[r, k])) <= got.score_error
                rows[r, k] = row_scores[r, k]
    assert_same_bits(row_scores, rows)
    assert_same_bits(last_scores, lasts)


def check_steer(implementation: Implementation, case: Case) -> None:
    judge_steer(implementation, case, case.run_steer(implementation))


def check_norm(implementation: Implementation, case: Case) -> None:
    judge_norm(implementation, case, case.run_norm(implementation))


def check_steer_deciding(implementation: Implementation, case: Case) -> None:
    x, decided = case.decide_steer(implementation)
    judge_decisions(case, decided)
    judge_steer(implementation, decided, x)


def check_norm_deciding(implementation: Implementation, case: Case) -> None:
    *outputs, decided = case.decide_norm(implementation)
    judge_decisions(case, decided)
    judge_norm(implementation, decided, (outputs[0], outputs[1]))


def judge_decisions(case: Case, decided: Case) -> None:
    """Every sum, score, value and scale that a gate writes, and the bits of all others."""
    reference = gate_module.reference_decide(case.slots, case.gates)
    sums, scores, values, scales = (getattr(case, name).clone() for name in DECISIONS)
    layer, stack = case.layer, case.slots.shape[1]
    for j, slot in enumerate(case.decider_slots.tolist()):
        numbers = case.table[slot]
        if slot < 0 or numbers[DECIDES] == Decides.NOTHING:
            continue
        (q, k), reading = divmod(j, stack), int(numbers[READING])
        first, until, total = case.counted[j].tolist()
        parts = case.row_scores[first:until, k].double()
        sum_error = 2.0**-48 * float(parts.abs().sum() + case.sums[layer, j].abs())
        if case.deciding[q] < 0:
            if reading != Reading.LAST:
                assert abs(float(decided.sums[layer, j] - reference[0][layer, j])) <= sum_error
                sums[layer, j] = decided.sums[layer, j]
            continue
        mean = float(case.sums[layer, j] + parts.sum()) / total if reading != Reading.LAST else 0.0
        last = float(case.last_scores[j]) if reading != Reading.MEAN else 0.0
        gate = near(mean + last, 2.0**-23 * (abs(mean) + abs(mean + last)), numbers)
        assert abs(float(decided.scores[layer, j]) - gate.score) <= gate.score_error
        assert abs(float(reference[1][layer, j]) - gate.score) <= gate.score_error
        scores[layer, j] = decided.scores[layer, j]
        everywhere = numbers[DECIDES] == Decides.EVERYWHERE
        for of in range(len(values)) if everywhere else [layer]:
            value = float(decided.values[of, j])
            assert abs(value - float(reference[2][of, j])) <= gate.value_error
            values[of, j] = value
            alpha = float(case.tables[of, slot, STRENGTH]) * float(case.strength[j])
            factor = value if case.tables[of, slot, GATE] == GateKind.PROMPT else 1.0
            for r in ((case.sequence == q) & (case.slots[:, k] >= 0)).nonzero().flatten().tolist():
                assert abs(float(decided.all_scales[of, r, k]) - factor * alpha) <= PRODUCT * abs(factor * alpha)
                assert abs(factor * alpha - float(reference[3][of, r, k])) <= abs(alpha) * gate.value_error + 1e-6
                scales[of, r, k] = decided.all_scales[of, r, k]
    for name, want in zip(DECISIONS, (sums, scores, values, scales), strict=True):
        assert_same_bits(getattr(decided, name), want)


def judge_steer(implementation: Implementation, case: Case, x: torch.Tensor) -> None:
    assert x.dtype == case.x.dtype
    want = expected_rows(case, case.x.double(), case.pair, implementation.truncates(x.dtype))
    reference = steer_module.reference(*case.steer_arguments())
    assert_consistent(want, reference)
    tolerance = rounding(implementation, x.dtype) * reference.abs() + want.error + smallest(x.dtype)
    assert_within(x[want.sure], reference[want.sure], tolerance[want.sure], "x")


def judge_norm(implementation: Implementation, case: Case, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    normed, new_residual = outputs
    dtype = case.x.dtype
    assert normed.dtype == new_residual.dtype == dtype
    assert normed.is_contiguous()
    assert new_residual.is_contiguous()
    start = case.x.double() + case.residual.double()
    want = expected_rows(case, start, True, implementation.truncates(dtype))
    want_normed, want_residual = norm_module.reference(*case.norm_arguments())
    assert_consistent(want, want_residual)
    sure, half = want.sure, rounding(implementation, dtype)
    rounded = half * want_residual.abs() + want.error + smallest(dtype)
    assert_within(new_residual[sure], want_residual[sure], rounded[sure], "new residual")
    # What is off in n is off in n*rstd, and in rstd by its share of the sum of squares; then one or two roundings.
    squares = want_residual.square().sum(1, keepdim=True) + want_residual.shape[1] * case.eps
    rstd = (want_residual.shape[1] / squares).sqrt()
    w = case.weight.double().abs() if case.norm != Norm.GEMMA else (case.weight.double() + 1).abs()
    rstd_error = (rounded * want_residual.abs()).sum(1, keepdim=True) / squares + SUM
    roundings = half * (2 if case.norm == Norm.LLAMA else 1) + PRODUCT
    tolerance = rstd * rounded * w * (1 + rstd_error) + (rstd_error + 1.01 * roundings) * want_normed.abs()
    tolerance += smallest(dtype) * (1 + w)
    assert_within(normed[sure], want_normed[sure], tolerance[sure], "normed")


def smallest(dtype: torch.dtype) -> float:
    """Half the distance of the smallest numbers of the dtype."""
    return 2.0**-25 if dtype == torch.float16 else 2.0**-133


CHECKS = {
    "score_": check_score,
    "steer_": check_steer,
    "steer_.deciding": check_steer_deciding,
    "add_steer_rms_norm": check_norm,
    "add_steer_rms_norm.deciding": check_norm_deciding,
}

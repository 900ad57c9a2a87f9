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
    DIRECTION_SQ,
    EDIT,
    GATE,
    HIGH,
    LOW,
    SCORE,
    SHARPNESS,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    EditId,
    GateKind,
    GateOperands,
    Kinds,
    Norm,
    Operands,
    Score,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = torch.cuda.is_available()


# ---- implementations ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """The ops in one implementation on one device; `interpreted` where Triton's interpreter stands in for a GPU.

    The functions take `Operands` and `GateOperands`, as the public ones do.
    """

    name: str
    gate_: Callable[..., None]
    steer_: Callable[..., None]
    add_steer_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    prompt: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    device: str = "cpu"
    interpreted: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run here."""
        if self.name == "cpp" and not _native.available:
            return f"the C++ ops are absent: {_native.reason}"
        if self.name == "triton" and gate_module.triton is None:
            return "triton is not installed"
        if self.interpreted:
            assert type(gate_module.gate_kernel).__name__ == "InterpretedFunction", (
                "without a GPU, TRITON_INTERPRET=1 must be set before the kernels are imported"
            )
        return None

    def truncates(self, dtype: torch.dtype) -> bool:
        """Triton's interpreter cuts float32 down to bfloat16, a GPU rounds."""
        return self.interpreted and dtype == torch.bfloat16


_ops = torch.ops.steerfast


def direct_gate_(x: torch.Tensor, residual: torch.Tensor | None, row: torch.Tensor, gates: GateOperands) -> None:
    _ops.gate_.default(x, residual, row, *gates)


def direct_steer_(x: torch.Tensor, residual: torch.Tensor | None, operands: Operands) -> None:
    _ops.steer_.default(x, residual, *operands)


def direct_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, operands: Operands, eps: float, norm: int
) -> tuple[torch.Tensor, torch.Tensor]:
    *read, kinds = operands
    return _ops.add_steer_rms_norm.default(x, residual, weight, *read, eps, norm, kinds)


def direct_prompt(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, operands: Operands, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    deciding, scores, eps, norm = rest
    rows, *read, _ = operands
    return _ops.add_steer_rms_norm.prompt(x, residual, weight, rows, deciding, scores, *read, eps, norm)


_torch = (
    gate_module.gate_torch_,
    steer_module.steer_torch_,
    norm_module.add_steer_rms_norm_torch,
    norm_module.add_steer_rms_norm_prompt_torch,
)
TORCH = Implementation("torch", *_torch)
CPP = Implementation("cpp", direct_gate_, direct_steer_, direct_norm, direct_prompt)
TRITON = Implementation(
    "triton",
    gate_module.gate_triton_,
    steer_module.steer_triton_,
    norm_module.add_steer_rms_norm_triton,
    norm_module.add_steer_rms_norm_prompt_triton,
    "cuda" if CUDA else "cpu",
    interpreted=not CUDA,
)
IMPLEMENTATIONS = [TORCH, CPP, TRITON, *([Implementation("torch-cuda", *_torch, "cuda")] if CUDA else [])]


# ---- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments of all ops. Running them leaves the case as it is. `x` and `residual` may be views of longer rows."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    row: torch.Tensor
    slot: torch.Tensor
    rows: torch.Tensor
    deciding: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor
    strength: torch.Tensor
    vectors: torch.Tensor
    directions: torch.Tensor
    table: torch.Tensor
    pair: bool  # whether gate_ and steer_ get the residual
    eps: float = 1e-5
    norm: Norm = Norm.LLAMA
    kinds: Kinds = Kinds.ANY

    def on(self, device: str) -> Case:
        """The case on a device, all memory its own, row strides as they were."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: move(t, device) for k, t in tensors.items() if isinstance(t, torch.Tensor)})

    @property
    def gates(self) -> GateOperands:
        return GateOperands(self.slot, self.directions, self.table, self.scores, self.values)

    def operands(self, kinds: Kinds | None = None) -> Operands:
        """What the ops take; `kinds` instead of the case's where given."""
        read = (self.rows, self.values, self.strength, self.vectors, self.directions, self.table)
        return Operands(*read, int(self.kinds if kinds is None else kinds))

    def gate_arguments(self) -> tuple[Any, ...]:
        return (self.x, self.residual if self.pair else None, self.row, self.gates)

    def steer_arguments(self) -> tuple[Any, ...]:
        return (self.x, self.residual if self.pair else None, self.operands())

    def norm_arguments(self) -> tuple[Any, ...]:
        return (self.x, self.residual, self.weight, self.operands(), self.eps, int(self.norm))

    def prompt_arguments(self) -> tuple[Any, ...]:
        operands = self.operands(Kinds.ANY)
        return (self.x, self.residual, self.weight, operands, self.deciding, self.scores, self.eps, int(self.norm))

    def flat(self, op: Any) -> dict[str, Any]:
        """The arguments of a torch op, by the names in its schema."""
        values = {argument.name: getattr(self, argument.name) for argument in op._schema.arguments}
        if "weight" not in values and not self.pair:
            values["residual"] = None
        return values

    def run_gate(self, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and values afterwards."""
        case = self.on(implementation.device)
        implementation.gate_(*case.gate_arguments())
        return case.scores.cpu(), case.values.cpu()

    def run_steer(self, implementation: Implementation) -> torch.Tensor:
        """The rows afterwards."""
        case = self.on(implementation.device)
        implementation.steer_(*case.steer_arguments())
        return case.x.cpu()

    def run_norm(self, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed rows and new residual."""
        normed, residual = implementation.add_steer_rms_norm(*self.on(implementation.device).norm_arguments())
        return normed.cpu(), residual.cpu()

    def run_prompt(self, implementation: Implementation) -> tuple[torch.Tensor, ...]:
        """Normed rows, new residual, and scores and values afterwards."""
        case = self.on(implementation.device)
        outputs = implementation.prompt(*case.prompt_arguments())
        return tuple(t.cpu() for t in (*outputs, case.scores, case.values))

    def select(self, pick: torch.Tensor) -> Case:
        """The case with these rows only."""
        return replace(self, x=self.x[pick], residual=self.residual[pick], rows=self.rows[pick])

    def plain(self, **changes: float) -> Case:
        """All slots ADD with an ALWAYS gate of strength 1, but for table columns given by name."""
        table = self.table.clone()
        for column, value in {"EDIT": EditId.ADD, "GATE": GateKind.ALWAYS, "STRENGTH": 1.0, **changes}.items():
            table[:, COLUMNS[column]] = value
        return replace(self, table=table, strength=torch.ones_like(self.strength))


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

    `shared`: the rows of a sequence name the slots of their sequence or none, as prompt gates in the same launch want
    it; otherwise every row has slots of its own.
    """

    rows: int = 6
    size: int = 576
    dtype: torch.dtype = torch.float32
    bank_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    stack: int = 1
    slots: int = 3
    sequences: int = 4
    strided: bool = False
    pair: bool = False
    gates: Sequence[GateKind] = tuple(GateKind)
    edits: Sequence[EditId] = tuple(EditId)
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
    directions = torch.nn.functional.normalize(torch.randn(o.slots, o.size, generator=g), dim=1).to(bank_dtype)
    table = with_products(make_table(o, g), vectors, directions)
    count = o.sequences if o.rows else 0
    slot = torch.randint(-1, o.slots, (count, o.stack), generator=g, dtype=torch.int32)
    sequence = torch.randint(o.sequences, (o.rows, 1), generator=g, dtype=torch.int32)
    steered = pick(g, [True, True, True, False], o.rows, 1)
    own = slot[sequence[:, 0].long()] if o.shared else torch.randint(-1, o.slots, (o.rows, o.stack), generator=g)
    records = torch.where(steered, torch.cat([sequence, own], dim=1), -1).int()
    deciding = torch.full((count,), -1, dtype=torch.int32)
    for r in torch.randperm(o.rows, generator=g).tolist():
        if records[r, 0] >= 0 and torch.rand((), generator=g) < 0.6:
            deciding[records[r, 0]] = r
    return Case(
        x=stream(2),
        residual=stream(3),
        weight=(1 + 0.3 * torch.randn(o.size, generator=g)).to(o.weight_dtype or o.dtype),
        row=torch.randint(-1, max(o.rows, 1), (count,), generator=g, dtype=torch.int32),
        slot=slot,
        rows=records,
        deciding=deciding,
        scores=torch.randn(count, o.stack, generator=g),
        values=pick(g, [0.0, 0.3, 1.0], count, o.stack),
        strength=pick(g, [0.0, 1.0, 1.0, -0.7], count, o.stack),
        vectors=vectors,
        directions=directions,
        table=table,
        pair=o.pair,
        norm=o.norm,
        kinds=o.kinds,
    )


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
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


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
class Reading:
    """What a row's own gate reads: its score and value, and how far either may be off (a hard value: by 1)."""

    score: float
    score_error: float
    value: float
    value_error: float


def read_gate(s: torch.Tensor, direction: torch.Tensor, numbers: torch.Tensor, stream_error: float) -> Reading:
    d = direction.double()
    score, value = gate_module.reference_gate(s, d, numbers.double())
    error = (SUM + stream_error) * float((s * d).abs().sum())
    if numbers[SCORE] == Score.COSINE:
        error = error / max(float(s.norm()), 1e-30) + PRODUCT + stream_error
    sharpness, distance = float(numbers[SHARPNESS]), abs(score - float(numbers[THRESHOLD]))
    value_error = abs(sharpness) / 4 * (error + 2.0**-23 * distance) + 1e-6
    return Reading(score, error, value, value_error if sharpness else float(distance <= error))


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


def expected_rows(
    case: Case,
    start: torch.Tensor,
    pair: bool,
    values: torch.Tensor,
    values_error: torch.Tensor,
    kinds: Kinds,
    truncates: bool,
) -> Expected:
    """The float64 rows `start` displaced by their slots, with gate values [n, K] that may be off by values_error."""
    s = gate_module.reference_stream(case.x, case.residual if pair else None)
    stream_error = torch.finfo(case.x.dtype).eps if truncates and pair else 0.0
    rows, size, sure = start.clone(), start.abs(), torch.ones(len(start), dtype=torch.bool)
    error = torch.zeros_like(start)
    for r, (q, *slots) in enumerate(case.rows.tolist()):
        for k, slot in enumerate(slots):
            if slot < 0:
                continue
            v, d = case.vectors[slot].double(), case.directions[slot].double()
            numbers = case.table[slot].tolist()
            gate, gate_error = float(values[q, k]), float(values_error[q, k])
            if numbers[GATE] == GateKind.ALWAYS:
                gate, gate_error = 1.0, 0.0
            elif numbers[GATE] == GateKind.TOKEN and kinds == Kinds.ANY:
                reading = read_gate(s[r], d, case.table[slot], stream_error)
                gate, gate_error = reading.value, reading.value_error
            alpha = numbers[STRENGTH] * float(case.strength[q, k])
            if gate_error >= 1 and alpha:  # a hard gate on its threshold
                sure[r] = False
                continue
            beta = gate * alpha
            edit = EditId.ADD if kinds == Kinds.LATCHED_ADD else EditId(int(numbers[EDIT]))
            by, off = bounded_coefficients(
                edit, beta, abs(alpha) * gate_error + PRODUCT * abs(beta), s[r], v, d, numbers, stream_error
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


def check_gate(implementation: Implementation, case: Case) -> None:
    scores, values = case.run_gate(implementation)
    assert scores.dtype == values.dtype == torch.float32
    want_scores, want_values = gate_module.reference(*case.gate_arguments())
    s = gate_module.reference_stream(case.x, case.residual if case.pair else None)
    stream_error = torch.finfo(case.x.dtype).eps if implementation.truncates(case.x.dtype) and case.pair else 0.0
    for i, r in enumerate(case.row.tolist()):
        if r < 0:
            assert_same_bits(scores[i], case.scores[i])
            assert_same_bits(values[i], case.values[i])
            continue
        for k, slot in enumerate(case.slot[i].tolist()):
            if slot < 0:
                assert scores[i, k] == values[i, k] == 0
                continue
            reading = read_gate(s[r], case.directions[slot], case.table[slot], stream_error)
            assert abs(float(scores[i, k]) - float(want_scores[i, k])) <= reading.score_error
            always = case.table[slot, GATE] == GateKind.ALWAYS
            assert abs(float(values[i, k]) - float(want_values[i, k])) <= (0 if always else reading.value_error)


def check_steer(implementation: Implementation, case: Case) -> None:
    x = case.run_steer(implementation)
    assert x.dtype == case.x.dtype
    truncates = implementation.truncates(x.dtype)
    no_error = torch.zeros(case.values.shape, dtype=torch.float64)
    want = expected_rows(
        case, case.x.double(), case.pair, case.values.double(), no_error, case.kinds, truncates
    )  # fmt: skip
    reference = steer_module.reference(*case.steer_arguments())
    assert_consistent(want, reference)
    tolerance = rounding(implementation, x.dtype) * reference.abs() + want.error + smallest(x.dtype)
    assert_within(x[want.sure], reference[want.sure], tolerance[want.sure], "x")


def check_norm(implementation: Implementation, case: Case) -> None:
    outputs = case.run_norm(implementation)
    no_error = torch.zeros(case.values.shape, dtype=torch.float64)
    reference = norm_module.reference(*case.norm_arguments())
    judge_norm(implementation, case, outputs, reference, case.values.double(), no_error, case.kinds)


def check_prompt(implementation: Implementation, case: Case) -> None:
    normed, new_residual, scores, values = case.run_prompt(implementation)
    *reference, want_scores, want_values = norm_module.reference_prompt(*case.prompt_arguments())
    s = gate_module.reference_stream(case.x, case.residual)
    stream_error = torch.finfo(case.x.dtype).eps if implementation.truncates(case.x.dtype) else 0.0
    values_error = torch.zeros_like(want_values)
    for q, p in enumerate(case.deciding.tolist()):
        for k in range(values.shape[1]):
            slot = int(case.rows[p, 1 + k]) if p >= 0 else -1
            if slot < 0 or case.table[slot, GATE] != GateKind.PROMPT:
                assert_same_bits(scores[q, k], case.scores[q, k])
                assert_same_bits(values[q, k], case.values[q, k])
                continue
            reading = read_gate(s[p], case.directions[slot], case.table[slot], stream_error)
            assert abs(float(scores[q, k]) - float(want_scores[q, k])) <= reading.score_error
            assert abs(float(values[q, k]) - float(want_values[q, k])) <= reading.value_error
            values_error[q, k] = reading.value_error
    judge_norm(implementation, case, (normed, new_residual), tuple(reference), want_values, values_error, Kinds.ANY)


def judge_norm(
    implementation: Implementation,
    case: Case,
    outputs: tuple[torch.Tensor, torch.Tensor],
    reference: tuple[torch.Tensor, ...],
    values: torch.Tensor,
    values_error: torch.Tensor,
    kinds: Kinds,
) -> None:
    normed, new_residual = outputs
    dtype = case.x.dtype
    assert normed.dtype == new_residual.dtype == dtype
    assert normed.is_contiguous()
    assert new_residual.is_contiguous()
    start = case.x.double() + case.residual.double()
    want = expected_rows(case, start, True, values, values_error, kinds, implementation.truncates(dtype))
    want_normed, want_residual = reference
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


CHECKS = {"gate_": check_gate, "steer_": check_steer, "add_steer_rms_norm": check_norm, "prompt": check_prompt}

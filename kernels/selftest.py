"""The self-test of the ops: every implementation that runs here, checked against the float64 references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import add_steer_rms_norm as norms
from . import gate as gates
from . import steer as edits
from .contract import (
    FLOAT_DTYPES,
    SHARPNESS,
    TABLE_WIDTH,
    GateKind,
    GateOperands,
    Kinds,
    Norm,
    Operands,
    Score,
)
from .edit_kinds import EDITS
from .edits import reference_stream

_ROWS, _HIDDEN, _SEQUENCES, _EPS = 8, 576, 4, 1e-5
# Float32 may lose this share of the sum of the terms of a row: 64 roundings of 2^-24.
_SUM = 64 * 2.0**-24
_ROW = 2.0**-17  # an edit takes several sums and may lose this share of the largest number of the row
# Gate, score, threshold, sharpness, strength: every gate, hard and soft.
_GATES = (
    (GateKind.PROMPT, Score.COSINE, 0.0, 0.0, 0.75),
    (GateKind.TOKEN, Score.DOT, 0.1, 4.0, -1.5),
    (GateKind.ALWAYS, Score.COSINE, 0.0, 0.0, 1.0),
    (GateKind.PROMPT, Score.DOT, 0.0, 2.0, 1.0),
    (GateKind.TOKEN, Score.COSINE, 0.0, 3.0, 1.0),
)
# ... and every edit: its number, LOW and HIGH.
_SLOTS = [(*gate, e.id, *e.columns(**e.example)) for gate, e in zip(cycle(_GATES), EDITS.values(), strict=False)]

# The result of an op, the exact result, and the largest allowed difference.
_Outcome = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to run the ops; `absent` is the reason why it cannot run here, None where it can."""

    name: str
    absent: str | None
    device: str
    ops: Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Check:
    """The result of one op on rows of one dtype: the worst error, and the tolerance at its place."""

    op: str
    implementation: str
    dtype: str
    passed: bool
    max_error: float | None = None
    tolerance: float | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)


def implementations(cpp_absent: str | None) -> list[Implementation]:
    """Return all implementations of the ops, live or not.

    cpp_absent: the reason why the C++ ops are absent, None where they are loaded.
    """
    cuda = None if torch.cuda.is_available() else "no CUDA device"
    if gates.triton is None:
        cuda = "triton is not installed"
    plain = (
        gates.gate_torch_,
        edits.steer_torch_,
        norms.add_steer_rms_norm_torch,
        norms.add_steer_rms_norm_prompt_torch,
    )
    cpp = (gates.gate_unchecked_, edits.steer_unchecked_, norms.add_steer_rms_norm_unchecked, _prompt_op)
    triton = (
        gates.gate_triton_,
        edits.steer_triton_,
        norms.add_steer_rms_norm_triton,
        norms.add_steer_rms_norm_prompt_triton,
    )
    return [
        Implementation("torch", None, "cpu", dict(zip(OPS, plain, strict=True))),
        Implementation("cpp", cpp_absent, "cpu", dict(zip(OPS, cpp, strict=True))),
        Implementation("triton", cuda, "cuda", dict(zip(OPS, triton, strict=True))),
    ]


def _prompt_op(x: Tensor, residual: Tensor, weight: Tensor, operands: Operands, *rest: Any) -> tuple[Tensor, Tensor]:
    """Call the op `add_steer_rms_norm.prompt`, whose schema is flat."""
    deciding, scores, eps, norm = rest
    rows, *read, _ = operands
    return torch.ops.steerfast.add_steer_rms_norm.prompt(x, residual, weight, rows, deciding, scores, *read, eps, norm)


def self_test(implementation: Implementation) -> Iterator[Check]:
    """Check every op of a live implementation on rows of every dtype; an exception is a failed check."""
    for dtype in FLOAT_DTYPES:
        name = str(dtype).removeprefix("torch.")
        for op, measure in _MEASURES.items():
            try:
                outcomes = list(measure(implementation.ops[op], dtype, implementation.device))
            except Exception as problem:
                says = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
                yield Check(op, implementation.name, name, False, problem=says)
                continue
            error = torch.cat([(got.double().cpu() - want).abs().flatten() for got, want, _ in outcomes])
            allowed = torch.cat([limit.expand(want.shape).flatten() for _, want, limit in outcomes])
            worst = int((error / allowed).nan_to_num(nan=torch.inf).argmax())
            passed = bool((error <= allowed).all())  # False where the error is NaN
            yield Check(op, implementation.name, name, passed, float(error[worst]), float(allowed[worst]))


@dataclass(frozen=True)
class _Case:
    """The arguments of the ops: gates of all kinds, open and shut, every edit, rows that are not steered."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    deciding: Tensor
    slot: Tensor
    rows: Tensor
    values: Tensor
    strength: Tensor
    vectors: Tensor
    directions: Tensor
    table: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype, device: str, stack: int) -> _Case:
        generator = torch.Generator().manual_seed(stack)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        vectors, directions = numbers(len(_SLOTS), _HIDDEN), normalize(numbers(len(_SLOTS), _HIDDEN), dim=1)
        squares = (vectors.square().sum(1), (vectors * directions).sum(1), directions.square().sum(1))
        table = torch.zeros(len(_SLOTS), TABLE_WIDTH)
        gate, score, threshold, sharpness, strength, edit, low, high = torch.tensor(_SLOTS).T
        columns = (threshold, sharpness, strength, *squares, low, high, gate, score, edit)
        table[:, : len(columns)] = torch.stack(columns, dim=1)

        sequence = torch.arange(_ROWS) % _SEQUENCES
        slot = (torch.arange(_SEQUENCES)[:, None] + 3 * torch.arange(stack)) % len(_SLOTS)
        slot[-1, -1] = -1
        slots = slot[sequence]
        slots[_ROWS // 2, 0] = -1
        # Rows point towards and away from the direction in turn: no score lies near the threshold of the hard gate.
        sides = torch.tensor([1.0, -1.0]).repeat(_ROWS // 2)[:, None]
        case = cls(
            x=(numbers(_ROWS, _HIDDEN) + 6 * sides * directions[0]).to(dtype),
            residual=numbers(_ROWS, _HIDDEN).to(dtype),
            weight=1 + 0.1 * numbers(_HIDDEN),
            deciding=torch.tensor([0, 5, -1, 3], dtype=torch.int32),
            slot=slot.to(torch.int32),
            rows=torch.cat([sequence[:, None], slots], dim=1).to(torch.int32),
            values=torch.tensor([1.0, 0.0, 0.5, 1.0])[:, None].repeat(1, stack),
            strength=torch.tensor([1.0, 1.0, 0.5, 2.0])[:, None].repeat(1, stack),
            vectors=vectors,
            directions=directions,
            table=table,
        )
        return cls(**{name: tensor.to(device) for name, tensor in vars(case).items()})

    def operands(self, kinds: Kinds, values: Tensor | None = None) -> Operands:
        values = self.values if values is None else values
        return Operands(self.rows, values, self.strength, self.vectors, self.directions, self.table, int(kinds))

    def latch(self) -> tuple[Tensor, Tensor]:
        """Return scores and values [n, K] that an op may write."""
        return torch.full_like(self.values, 0.25), self.values.clone()

    def gate_limits(self, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the largest allowed errors of float32 scores and values, float64 [n, K]."""
        s = reference_stream(self.x, residual)[self.deciding.cpu().clamp(min=0).long()]
        chosen = self.slot.cpu().long()
        bound = _SUM * (s[:, None] * self.directions.cpu()[chosen]).abs().sum(2)
        steepest = self.table[:, SHARPNESS].max().cpu() / 4  # of a sigmoid; hard gates are far from their threshold
        return bound, steepest * bound + 1e-6


def _gate(run: Callable[..., None], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack in (1, 2):
        case = _Case.make(dtype, device, stack)
        for residual in (None, case.residual):
            scores, values = case.latch()
            inputs = (case.x, residual, case.deciding)
            operands = GateOperands(case.slot, case.directions, case.table, scores, values)
            want = gates.reference(*inputs, operands)
            run(*inputs, operands)
            yield from zip((scores, values), want, case.gate_limits(residual), strict=True)


def _steer(run: Callable[..., None], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack, kinds in ((1, Kinds.LATCHED_ADD), (1, Kinds.ANY), (2, Kinds.ANY)):
        case = _Case.make(dtype, device, stack)
        for residual in (None, case.residual):
            y = case.x.clone()
            want = edits.reference(y, residual, case.operands(kinds))
            run(y, residual, case.operands(kinds))
            yield y, want, _limit(want, case, 0.501)


def _norm(run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack, kinds, kind in ((1, Kinds.LATCHED_ADD, Norm.LLAMA), *((2, Kinds.ANY, kind) for kind in Norm)):
        case = _Case.make(dtype, device, stack)
        inputs = (case.x, case.residual, case.weight, case.operands(kinds), _EPS, int(kind))
        yield from _normed(run(*inputs), norms.reference(*inputs), case)


def _norm_prompt(run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack in (1, 2):
        case = _Case.make(dtype, device, stack)
        scores, values = case.latch()
        operands = case.operands(Kinds.ANY, values)
        inputs = (case.x, case.residual, case.weight, operands, case.deciding, scores, _EPS, int(Norm.LLAMA))
        *want, want_scores, want_values = norms.reference_prompt(*inputs)
        yield from _normed(run(*inputs), want, case)
        yield from zip((scores, values), (want_scores, want_values), case.gate_limits(case.residual), strict=True)


def _normed(got: Any, want: Any, case: _Case) -> Iterator[_Outcome]:
    """Yield the outcomes of normed rows, which the reference rounds nowhere, and of the new residual."""
    for result, exact, roundings in zip(got, want, (1.51, 0.501), strict=True):
        yield result, exact, _limit(exact, case, roundings)


def _limit(want: Tensor, case: _Case, roundings: float) -> Tensor:
    largest = torch.maximum(want.abs().amax(1, keepdim=True), case.x.double().cpu().abs().amax(1, keepdim=True))
    return roundings * torch.finfo(case.x.dtype).eps * want.abs() + _ROW * largest


_MEASURES: dict[str, Callable[[Callable[..., Any], torch.dtype, str], Iterator[_Outcome]]] = {
    "gate_": _gate,
    "steer_": _steer,
    "add_steer_rms_norm": _norm,
    "add_steer_rms_norm.prompt": _norm_prompt,
}
OPS = tuple(_MEASURES)

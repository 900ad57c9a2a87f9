"""The self-test of the ops: every implementation that runs here, checked against the float64 references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
    TABLE_WIDTH,
    Decides,
    GateKind,
    GateOperands,
    Kinds,
    Norm,
    Operands,
    Reading,
    Score,
)
from .edit_kinds import EDITS

_ROWS, _HIDDEN, _SEQUENCES, _LAYERS, _LAYER, _EPS = 8, 576, 4, 3, 1, 1e-5
# Float32 may lose this share of the sum of the terms of a row: 64 roundings of 2^-24.
_SUM = 64 * 2.0**-24
_ROW = 2.0**-17  # an edit takes several sums and may lose this share of the largest number of the row
_SCALAR = 1e-5  # a sum, score, value or scale that is made of known numbers may lose this share of 1 or of itself
# Gate, score, threshold, sharpness, strength: every gate, hard and soft.
_GATES = (
    (GateKind.PROMPT, Score.COSINE, 0.0, 0.0, 0.75),
    (GateKind.TOKEN, Score.DOT, 0.1, 4.0, -1.5),
    (GateKind.ALWAYS, Score.COSINE, 0.0, 0.0, 1.0),
    (GateKind.PROMPT, Score.DOT, 0.0, 2.0, 1.0),
    (GateKind.TOKEN, Score.COSINE, 0.0, 3.0, 1.0),
)
# The layers for which each decides, and its reading.
_DECISIONS = (
    (Decides.HERE, Reading.LAST),
    (Decides.NOTHING, Reading.LAST),
    (Decides.HERE, Reading.MEAN),
    (Decides.EVERYWHERE, Reading.BOTH),
    (Decides.EVERYWHERE, Reading.MEAN),
)
# ... and every edit: its number, LOW and HIGH.
_SLOTS = [
    (*gate, e.id, *e.columns(**e.example), *decision)
    for gate, decision, e in zip(cycle(_GATES), cycle(_DECISIONS), EDITS.values(), strict=False)
]

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


def implementations(cpp_absent: str | None) -> list[Implementation]:
    """Return all implementations of the ops, live or not.

    cpp_absent: the reason why the C++ ops are absent, None where they are loaded.
    """
    cuda = None if torch.cuda.is_available() else "no CUDA device"
    if gates.triton is None:
        cuda = "triton is not installed"
    plain = (gates.score_torch_, edits.steer_torch_, norms.add_steer_rms_norm_torch)
    cpp = (gates.score_unchecked_, edits.steer_unchecked_, norms.add_steer_rms_norm_unchecked)
    triton = (gates.score_triton_, edits.steer_triton_, norms.add_steer_rms_norm_triton)
    return [
        Implementation("torch", None, "cpu", _by_op(*plain)),
        Implementation("cpp", cpp_absent, "cpu", _by_op(*cpp)),
        Implementation("triton", cuda, "cuda", _by_op(*triton)),
    ]


def _by_op(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions by the ops that they run; an edit has a deciding form."""
    named = zip(("score_", "steer_", "add_steer_rms_norm"), functions, strict=True)
    return {op: run for name, run in named for op in OPS if op.split(".")[0] == name}


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
    operands: Operands
    gates: GateOperands

    @classmethod
    def make(cls, dtype: torch.dtype, device: str, stack: int, kinds: Kinds = Kinds.ANY) -> _Case:
        generator = torch.Generator().manual_seed(stack)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        vectors, directions = numbers(len(_SLOTS), _HIDDEN), normalize(numbers(len(_SLOTS), _HIDDEN), dim=1)
        squares = ((vectors * vectors).sum(1), (vectors * directions).sum(1), directions.square().sum(1))
        gate, score, threshold, sharpness, strength, edit, low, high, decides, reading = torch.tensor(_SLOTS).T
        columns = (threshold, sharpness, strength, *squares, low, high, gate, score, edit, decides, reading)
        tables = torch.zeros(_LAYERS, len(_SLOTS), TABLE_WIDTH)
        tables[:, :, : len(columns)] = torch.stack(columns, dim=1)

        # Four sequences: three decide, one goes on; then a row of padding.
        sequence = torch.tensor([0, 0, 1, 1, 2, 2, 3, -1])
        slot = (torch.arange(_SEQUENCES)[:, None] + 3 * torch.arange(stack)) % len(_SLOTS)
        slot[-1, -1] = -1
        slots = torch.where(sequence[:, None] < 0, -1, slot[sequence])
        slots[_ROWS // 2, 0] = -1
        counted = torch.tensor([[0, 2, 2], [2, 4, 5], [4, 6, 7], [6, 7, 1]]).repeat_interleave(stack, dim=0)
        deciders = len(counted)
        # Rows point towards and away from the direction in turn: no score lies near the threshold of the hard gate.
        sides = torch.tensor([1.0, -1.0]).repeat(_ROWS // 2)[:, None]
        scales = numbers(_LAYERS, _ROWS, stack) * (numbers(_LAYERS, _ROWS, stack) > -1)
        gates = GateOperands(
            sequence=sequence.int(),
            deciding=torch.tensor([0, -1, 5, 6], dtype=torch.int32),
            counted=counted.int(),
            slots=slot.flatten().int(),
            strength=torch.tensor([1.0, 1.0, 0.5, 2.0]).repeat_interleave(stack),
            directions=directions,
            mean_directions=numbers(len(_SLOTS), _HIDDEN) / 24,
            tables=tables,
            row_scores=numbers(_ROWS, stack),
            last_scores=numbers(deciders),
            sums=numbers(_LAYERS, deciders).double(),
            scores=numbers(_LAYERS, deciders),
            values=numbers(_LAYERS, deciders),
            scales=scales,
            layer=_LAYER,
        )
        return cls(
            x=(numbers(_ROWS, _HIDDEN) + 6 * sides * directions[0]).to(dtype).to(device),
            residual=numbers(_ROWS, _HIDDEN).to(dtype).to(device),
            weight=(1 + 0.1 * numbers(_HIDDEN)).to(device),
            operands=_on(
                device, Operands(slots.int(), scales[_LAYER], vectors, directions, tables[_LAYER], int(kinds))
            ),
            gates=_on(device, gates),
        )

    def deciding(self) -> tuple[Operands, GateOperands]:
        """Return the arguments of a launch that decides; it may write the decisions."""
        gates = _on(self.x.device, self.gates)
        return self.operands._replace(scales=gates.scales[_LAYER]), gates


def _on(device: torch.device | str, operands: Any) -> Any:
    """Return a copy of the operands on a device."""
    return operands._make(t.to(device, copy=True) if isinstance(t, Tensor) else t for t in operands)


def _score(run: Callable[..., None], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack in (1, 2):
        case = _Case.make(dtype, device, stack)
        for residual in (None, case.residual):
            _, got = case.deciding()
            run(case.x, residual, got)
            terms = case.x.double().abs() + (0 if residual is None else residual.double().abs())
            largest = torch.stack([case.gates.directions, case.gates.mean_directions]).abs().amax((0, 1))
            limit = _SUM * (terms.cpu() @ largest.double().cpu()).max()
            for result, exact in zip(
                (got.row_scores, got.last_scores), gates.reference(case.x, residual, case.gates), strict=True
            ):
                yield result, exact, limit


def _steer(run: Callable[..., None], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack, kinds in ((1, Kinds.LATCHED_ADD), (1, Kinds.ANY), (2, Kinds.ANY)):
        case = _Case.make(dtype, device, stack, kinds)
        for residual in (None, case.residual):
            y = case.x.clone()
            run(y, residual, case.operands)
            want = edits.reference(case.x, residual, case.operands)
            yield y, want, _limit(want, case, 0.501)


def _steer_deciding(run: Callable[..., None], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack, kinds in ((1, Kinds.LATCHED_ADD), (2, Kinds.ANY)):
        case = _Case.make(dtype, device, stack, kinds)
        (operands, got), y = case.deciding(), case.x.clone()
        run(y, case.residual, operands, got)
        yield from _decided(got, case)
        want = edits.reference(case.x, case.residual, operands)
        yield y, want, _limit(want, case, 0.501)


def _norm(run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack, kinds, kind in ((1, Kinds.LATCHED_ADD, Norm.LLAMA), *((2, Kinds.ANY, kind) for kind in Norm)):
        case = _Case.make(dtype, device, stack, kinds)
        inputs = (case.x, case.residual, case.weight, case.operands, _EPS, int(kind))
        yield from _normed(run(*inputs), norms.reference(*inputs), case)


def _norm_deciding(run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, device: str) -> Iterator[_Outcome]:
    for stack, kinds in ((1, Kinds.LATCHED_ADD), (2, Kinds.ANY)):
        case = _Case.make(dtype, device, stack, kinds)
        operands, got = case.deciding()
        inputs = (case.x, case.residual, case.weight, operands, _EPS, int(Norm.LLAMA))
        outputs = run(*inputs, got)
        yield from _decided(got, case)
        yield from _normed(outputs, norms.reference(*inputs), case)


def _decided(got: GateOperands, case: _Case) -> Iterator[_Outcome]:
    """Yield the outcomes of decisions. The rows are then judged by the scales that the launch has stored."""
    wanted = gates.reference_decide(case.operands.slots, case.gates)
    for result, exact in zip((got.sums, got.scores, got.values, got.scales), wanted, strict=True):
        yield result, exact, _SCALAR * (1 + exact.abs())


def _normed(got: Any, want: Any, case: _Case) -> Iterator[_Outcome]:
    """Yield the outcomes of normed rows, which the reference rounds nowhere, and of the new residual."""
    for result, exact, roundings in zip(got, want, (1.51, 0.501), strict=True):
        yield result, exact, _limit(exact, case, roundings)


def _limit(want: Tensor, case: _Case, roundings: float) -> Tensor:
    largest = torch.maximum(want.abs().amax(1, keepdim=True), case.x.double().cpu().abs().amax(1, keepdim=True))
    return roundings * torch.finfo(case.x.dtype).eps * want.abs() + _ROW * largest


_MEASURES: dict[str, Callable[[Callable[..., Any], torch.dtype, str], Iterator[_Outcome]]] = {
    "score_": _score,
    "steer_": _steer,
    "steer_.deciding": _steer_deciding,
    "add_steer_rms_norm": _norm,
    "add_steer_rms_norm.deciding": _norm_deciding,
}
OPS = tuple(_MEASURES)

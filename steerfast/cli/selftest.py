"""Every op implementation that runs here, against the float64 reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steerfast import _native
from steerfast.kernels import gate as gates
from steerfast.kernels import steer as edits
from steerfast.kernels.contract import (
    FLOAT_DTYPES,
    SHARPNESS,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    Edit,
    GateMode,
    Score,
)

OPS = ("gate", "steer_")
_ROWS, _HIDDEN, _SLOTS, _SEQUENCES = 8, 576, 2, 4
# Float32 may lose this share of the sum of a row's terms: 64 roundings of 2^-24.
_SUM = 64 * 2.0**-24


@dataclass(frozen=True)
class Implementation:
    """One way to run both ops; `absent` says why it cannot run here, None where it can."""

    name: str
    absent: str | None
    device: str
    gate: Callable[..., tuple[Tensor, Tensor]]
    steer_: Callable[..., None]


@dataclass(frozen=True)
class Check:
    """Result of one op on rows of one dtype: the worst error, and what numerics allow at its place."""

    op: str
    implementation: str
    dtype: str
    passed: bool
    max_error: float | None = None
    tolerance: float | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def implementations() -> list[Implementation]:
    """All implementations of the ops, live or not."""
    cuda = None if torch.cuda.is_available() else "no CUDA device"
    triton: Any = (None, None)
    if gates.triton is None:
        cuda = "triton is not installed"
    else:
        triton = (gates.gate_triton, edits.steer_triton_)
    cpp = (torch.ops.steerfast.gate.default, torch.ops.steerfast.steer_.default)
    return [
        Implementation("torch", None, "cpu", gates.gate_torch, edits.steer_torch_),
        Implementation("cpp", _native.reason, "cpu", *cpp),
        Implementation("triton", cuda, "cuda", *triton),
    ]


def self_test(implementation: Implementation) -> Iterator[Check]:
    """Check both ops of a live implementation on rows of every dtype; an exception is a failed check."""
    for dtype in FLOAT_DTYPES:
        case = _Case.make(dtype)
        for op, measure in (("gate", _gate_errors), ("steer_", _steer_errors)):
            name = str(dtype).removeprefix("torch.")
            try:
                error, allowed = measure(implementation, case)
            except Exception as problem:
                says = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
                yield Check(op, implementation.name, name, False, problem=says)
                continue
            worst = int((error / allowed).nan_to_num(nan=torch.inf).argmax())
            passed = bool((error <= allowed).all())  # False where the error is NaN
            yield Check(op, implementation.name, name, passed, float(error[worst]), float(allowed[worst]))


@dataclass(frozen=True)
class _Case:
    """Arguments of both ops: hard and soft gates, open and shut ones, rows that are not steered."""

    x: Tensor
    row: Tensor
    gate_slot: Tensor
    slot: Tensor
    sequence: Tensor
    values: Tensor
    strength: Tensor
    vectors: Tensor
    directions: Tensor
    table: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype) -> _Case:
        generator = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        table = torch.zeros(_SLOTS, TABLE_WIDTH)
        table[:, SHARPNESS] = torch.tensor([0.0, 4.0])
        table[:, STRENGTH] = torch.tensor([0.75, -1.5])
        table[:, THRESHOLD] = torch.tensor([0.0, 0.1])
        directions = normalize(numbers(_SLOTS, _HIDDEN), dim=1)
        slot = torch.tensor([0, 1, -1, 0, 1, 0, -1, 1], dtype=torch.int32)
        # Towards and away from the direction in turn, so that no score lies near the hard gate's threshold.
        sides = torch.tensor([1.0, -1.0]).repeat(_ROWS // 2)[:, None]
        x = (numbers(_ROWS, _HIDDEN) + 6 * sides * directions[slot.clamp(min=0).long()]).to(dtype)
        return cls(
            x=x,
            row=torch.tensor([0, 3, 4, 6]),
            gate_slot=torch.tensor([0, 0, 1, -1], dtype=torch.int32),
            slot=slot,
            sequence=torch.arange(_ROWS, dtype=torch.int32) % _SEQUENCES,
            values=torch.tensor([1.0, 0.0, 0.5, 1.0]),
            strength=torch.tensor([1.0, 1.0, 0.5, 2.0]),
            vectors=numbers(_SLOTS, _HIDDEN),
            directions=directions,
            table=table,
        )

    def score_error(self, rows: Tensor, slot: Tensor, score: int) -> Tensor:
        """How far a float32 score may end from the exact one; rows float64 [n, H]."""
        bound = _SUM * (rows * self.directions[slot.clamp(min=0).long()].double()).abs().sum(1)
        return bound if score == Score.DOT else bound / rows.norm(dim=1) + 2.0**-22


def _gate_errors(implementation: Implementation, case: _Case) -> tuple[Tensor, Tensor]:
    """Errors and tolerances of scores and values, float64 [n]."""
    inputs = (case.x, case.row, case.gate_slot, case.directions, case.table)
    errors, allowed = [], []
    for score in Score:
        got = implementation.gate(*(tensor.to(implementation.device) for tensor in inputs), int(score))
        want = gates.reference(*inputs, int(score))
        bound = case.score_error(case.x[case.row].double(), case.gate_slot, score)
        steepest = case.table[:, SHARPNESS].max() / 4  # of a sigmoid; hard gates are far from their threshold
        for result, exact, limit in zip(got, want, (bound, steepest * bound + 1e-6), strict=True):
            errors.append((result.double().cpu() - exact).abs())
            allowed.append(limit.clamp(min=1e-12))
    return torch.cat(errors), torch.cat(allowed)


def _steer_errors(implementation: Implementation, case: _Case) -> tuple[Tensor, Tensor]:
    """Errors and tolerances of every number of the edited rows, float64 [n]."""
    inputs = (case.slot, case.sequence, case.values, case.strength, case.vectors, case.directions, case.table)
    x, slot = case.x.double(), case.slot.clamp(min=0).long()
    errors, allowed = [], []
    for mode in GateMode:
        for score in Score:
            y = case.x.to(implementation.device, copy=True)
            choices = (int(mode), int(score), int(Edit.ADD))
            implementation.steer_(y, *(tensor.to(implementation.device) for tensor in inputs), *choices)
            want = edits.reference(case.x, *inputs, *choices)
            # One rounding to the dtype, and float32 before it.
            limit = 0.501 * torch.finfo(y.dtype).eps * want.abs() + 2.0**-25
            limit += 2.0**-22 * ((want - x).abs() + x.abs())
            if mode == GateMode.TOKEN:
                moved = case.table[slot, SHARPNESS] / 4 * case.score_error(x, case.slot, score) + 1e-6
                pull = (case.table[slot, STRENGTH] * case.strength[case.sequence.long()]).abs()
                limit += (moved * pull)[:, None] * case.vectors[slot].double().abs()
            errors.append((y.double().cpu() - want).abs().flatten())
            allowed.append(limit.flatten())
    return torch.cat(errors), torch.cat(allowed)

"""Wrong arguments: every message of the checks, and that the C++ ops write nothing before they have checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DECISIONS, DIRECT, Case, assert_same_bits, make_case

from steerfast import _native
from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm
from steerfast.kernels.contract import Decides, GateKind, GateOperands, Operands, Reading
from steerfast.kernels.gate import score_
from steerfast.kernels.steer import steer_

INT = torch.int32


def split(arguments: dict[str, Any]) -> tuple[Operands, tuple[GateOperands, ...], dict[str, Any]]:
    """The operands, the gates where there are any, and what is left; gates' fields have their names after a dot."""
    gates = {name[6:]: value for name, value in arguments.items() if name.startswith("gates.")}
    operands = {name: value for name, value in arguments.items() if name in Operands._fields}
    rest = {name: value for name, value in arguments.items() if name not in operands and not name.startswith("gates.")}
    return Operands(**operands) if operands else None, (GateOperands(**gates),) if gates else (), rest


def public_score(**arguments: Any) -> None:
    _, gates, rest = split(arguments)
    score_(rest["x"], rest["residual"], *gates)


def public_steer(**arguments: Any) -> None:
    operands, gates, rest = split(arguments)
    steer_(rest["x"], rest["residual"], operands, *gates)


def public_norm(**arguments: Any) -> None:
    operands, gates, rest = split(arguments)
    add_steer_rms_norm(rest["x"], rest["residual"], rest["weight"], operands, rest["eps"], rest["norm"], *gates)


PUBLIC: dict[str, Callable[..., Any]] = {
    "score_": public_score,
    "steer_": public_steer,
    "steer_.deciding": public_steer,
    "add_steer_rms_norm": public_norm,
    "add_steer_rms_norm.deciding": public_norm,
}
ALL = tuple(PUBLIC)
EDITS, NORMS = ALL[1:], ALL[3:]
PLAIN = ("steer_", "add_steer_rms_norm")
DECIDING = ("steer_.deciding", "add_steer_rms_norm.deciding")
GATED = ("score_", *DECIDING)


def make_arguments(op: str) -> tuple[Case, dict[str, Any]]:
    """6 rows of 16 numbers, 4 sequences with 2 slots each out of 3, and the public function's arguments by name."""
    case = make_case(6, 16, stack=2, slots=3, sequences=4, pair=True, shared=True, seed=1)
    case = case.plain(GATE=GateKind.PROMPT, DECIDES=Decides.EVERYWHERE, READING=Reading.BOTH)
    case.sequence[:] = torch.tensor([0, 0, 1, 2, 3, -1])
    slots = torch.tensor([[0, 1], [2, 0], [1, 1], [-1, 2]])
    case.decider_slots[:], case.slots[:] = slots.flatten(), slots[case.sequence.long()]
    case.slots[5] = -1
    case.deciding[:] = torch.tensor([1, -1, 3, 4])
    case.counted[:] = torch.tensor([[0, 2, 2], [2, 3, 4], [3, 4, 1], [4, 5, 1]]).repeat_interleave(2, dim=0)
    return case, public_arguments(case, op)


def public_arguments(case: Case, op: str) -> dict[str, Any]:
    names = ("x", "residual", *(("weight", "eps", "norm") if "norm" in op else ()))
    arguments = {name: getattr(case, name) for name in names}
    arguments |= case.operands()._asdict() if op in EDITS else {}
    return arguments | ({f"gates.{name}": v for name, v in case.gates._asdict().items()} if op in GATED else {})


Z = torch.zeros
WRONG: list[tuple[tuple[str, ...], str, Any, type[Exception], str]] = [
    (ALL, "x", Z(6), ValueError, "x: expected 2 dimensions [rows, H], got shape [6]"),
    (ALL, "x", Z(6, 16).double(), TypeError, "x: expected float32 or bfloat16 or float16, got torch.float64"),
    (ALL, "x", Z(6, 0), ValueError, "x: expected a hidden size from 1 to 32768, got 0"),
    (ALL, "x", Z(6, 32769), ValueError, "x: expected a hidden size from 1 to 32768, got 32769"),
    (ALL, "x", Z(16, 6).t(), ValueError, "x: expected stride 1 in the last dimension, got strides [1, 6]"),
    (EDITS[:2], "x", Z(16).expand(6, 16), ValueError, "x: expected rows that do not overlap, got strides [0, 1]"),
    (ALL, "residual", Z(96), ValueError, "residual: expected 2 dimensions [rows, H], got shape [96]"),
    (
        ALL,
        "residual",
        Z(16, 6).t(),
        ValueError,
        "residual: expected stride 1 in the last dimension, got strides [1, 6]",
    ),
    (ALL, "residual", Z(5, 16), ValueError, "residual: expected shape [6, 16] like x, got [5, 16]"),
    (ALL, "residual", Z(6, 16).half(), TypeError, "residual: expected torch.float32 like x, got torch.float16"),
    (ALL, "residual", Z(6, 16, device="meta"), ValueError, "residual: expected device cpu like x, got meta"),
    (NORMS, "weight", Z(15), ValueError, "weight: expected shape [16], got [15]"),
    (NORMS, "weight", Z(16).double(), TypeError, "weight: expected float32 or bfloat16 or float16, got torch.float64"),
    (NORMS, "weight", Z(32)[::2], ValueError, "weight: expected a contiguous tensor, got strides [2]"),
    (NORMS, "weight", Z(16, device="meta"), ValueError, "weight: expected device cpu like x, got meta"),
    (EDITS, "slots", Z(6, dtype=INT), ValueError, "slots: expected 2 dimensions [rows, K], got shape [6]"),
    (EDITS, "slots", Z(6, 5, dtype=INT), ValueError, "slots: expected 0 to 4 slots per row, got 5"),
    (EDITS, "slots", Z(5, 2, dtype=INT), ValueError, "slots: expected shape [6, 2], got [5, 2]"),
    (EDITS, "slots", Z(6, 2), TypeError, "slots: expected int32, got torch.float32"),
    (EDITS, "slots", Z(2, 6, dtype=INT).t(), ValueError, "slots: expected a contiguous tensor, got strides [1, 6]"),
    (EDITS, "slots", Z(6, 2, dtype=INT, device="meta"), ValueError, "slots: expected device cpu like x, got meta"),
    (EDITS, "scales", Z(6, 1), ValueError, "scales: expected shape [6, 2], got [6, 1]"),
    (EDITS, "scales", Z(()), ValueError, "scales: expected shape [6, 2], got []"),
    (EDITS, "scales", Z(6, 2).bfloat16(), TypeError, "scales: expected float32, got torch.bfloat16"),
    (EDITS, "vectors", Z(3, 15), ValueError, "vectors: expected shape [3, 16], got [3, 15]"),
    (EDITS, "vectors", Z(3, 32)[:, :16], ValueError, "vectors: expected a contiguous tensor, got strides [32, 1]"),
    (
        EDITS,
        "vectors",
        Z(3, 16, dtype=INT),
        TypeError,
        "vectors: expected float32 or bfloat16 or float16, got torch.int",
    ),
    (EDITS, "directions", Z(2, 16), ValueError, "directions: expected shape [3, 16], got [2, 16]"),
    (EDITS, "directions", Z(3, 16).half(), TypeError, "directions: expected float32, got torch.float16"),
    (EDITS, "table", Z(3, 15), ValueError, "table: expected shape [3, 16], got [3, 15]"),
    (EDITS, "table", Z(0, 16), ValueError, "table: expected at least one slot, got shape [0, 16]"),
    (EDITS, "table", Z(()), ValueError, "table: expected at least one slot, got shape []"),
    (EDITS, "table", Z(3, 16).half(), TypeError, "table: expected float32, got torch.float16"),
    (NORMS, "eps", -1e-6, ValueError, "eps: expected a number >= 0, got -1e-06"),
    (NORMS, "eps", float("nan"), ValueError, "eps: expected a number >= 0, got nan"),
    (NORMS, "norm", 3, ValueError, "norm: expected one of LLAMA (0), GEMMA (1), VLLM (2), got 3"),
    (
        EDITS,
        "kinds",
        -1,
        ValueError,
        "kinds: expected one of LATCHED_ADD (0), ANY (1), got -1",
    ),
    (GATED, "gates.sequence", Z(6), TypeError, "gates.sequence: expected int32, got torch.float32"),
    (GATED, "gates.sequence", Z(5, dtype=INT), ValueError, "gates.sequence: expected shape [6], got [5]"),
    (GATED, "gates.deciding", Z(3, dtype=INT), ValueError, "gates.counted: expected shape [6, 3], got [8, 3]"),
    (GATED, "gates.deciding", Z(2, 2, dtype=INT), ValueError, "scales [layers, rows, K] and deciding [n], got shapes"),
    (GATED, "gates.counted", Z(8, 2, dtype=INT), ValueError, "gates.counted: expected shape [8, 3], got [8, 2]"),
    (GATED, "gates.slots", Z(7, dtype=INT), ValueError, "gates.slots: expected shape [8], got [7]"),
    (GATED, "gates.strength", Z(8).half(), TypeError, "gates.strength: expected float32, got torch.float16"),
    (GATED, "gates.directions", Z(3, 15), ValueError, "directions: expected shape [3, 16], got [3, 15]"),
    (GATED, "gates.mean_directions", Z(3, 16).half(), TypeError, "mean_directions: expected float32, got"),
    (GATED, "gates.tables", Z(3, 3, 15), ValueError, "table: expected shape [3, 16], got [3, 15]"),
    (GATED, "gates.tables", Z(2, 3, 16), ValueError, "gates.tables: expected shape [3, 3, 16], got [2, 3, 16]"),
    (GATED, "gates.row_scores", Z(5, 2), ValueError, "gates.row_scores: expected shape [6, 2], got [5, 2]"),
    (GATED, "gates.last_scores", Z(4), ValueError, "gates.last_scores: expected shape [8], got [4]"),
    (GATED, "gates.sums", Z(3, 8), TypeError, "gates.sums: expected float64, got torch.float32"),
    (GATED, "gates.scores", Z(3, 7), ValueError, "gates.scores: expected shape [3, 8], got [3, 7]"),
    (GATED, "gates.values", Z(8), ValueError, "gates.values: expected shape [3, 8], got [8]"),
    (GATED, "gates.scales", Z(3, 5, 2), ValueError, "gates.scales: expected at least 6 rows like x, got 5"),
    (GATED, "gates.scales", Z(3, 6, 5), ValueError, "gates.scales: expected 0 to 4 slots per row, got 5"),
    (GATED, "gates.layer", 3, ValueError, "gates.layer: expected 0 to 2, got 3"),
    (DECIDING, "gates.layer", 0, ValueError, "scales: expected the rows of gates.scales at the layer of the gates"),
    (DECIDING, "scales", Z(6, 2), ValueError, "scales: expected the rows of gates.scales at the layer of the gates"),
    (DECIDING, "table", Z(4, 16), ValueError, "vectors: expected shape [4, 16], got [3, 16]"),
]


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "message"),
    [(op, *rest) for op_names, *rest in WRONG for op in op_names],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_names_the_wrong_argument(op: str, name: str, value: Any, error: type[Exception], message: str) -> None:
    _, arguments = make_arguments(op)
    with pytest.raises(error, match=re.escape(message)):
        PUBLIC[op](**{**arguments, name: value})


SHARED = [
    ("score_", "gates.row_scores", "x"),
    ("score_", "gates.last_scores", "gates.tables"),
    ("score_", "gates.last_scores", "gates.row_scores"),
    ("steer_", "residual", "x"),
    ("steer_.deciding", "residual", "x"),
    *((op, "gates.values", "gates.scores") for op in DECIDING),
    *((op, "gates.strength", "gates.values") for op in DECIDING),
    *((op, "gates.last_scores", "gates.scales") for op in DECIDING),
    ("add_steer_rms_norm.deciding", "gates.scores", "weight"),
]


@pytest.mark.parametrize(("op", "name", "other"), SHARED)
def test_refuses_memory_that_is_shared_with_what_is_written(op: str, name: str, other: str) -> None:
    _, arguments = make_arguments(op)
    like = arguments[name]
    size = max(like.numel(), arguments[other].numel())
    memory = torch.zeros(size, dtype=arguments[other].dtype)
    arguments[other] = memory[: arguments[other].numel()].view(arguments[other].shape)
    arguments[name] = memory[: like.numel()].view(like.shape)
    if "gates.scales" in (name, other) and "scales" in arguments:
        arguments["scales"] = arguments["gates.scales"][arguments["gates.layer"], :6]
    with pytest.raises(ValueError, match="expected memory of its own, got a tensor that shares that of"):
        PUBLIC[op](**arguments)


def test_bank_may_serve_as_vectors_and_directions() -> None:
    _, arguments = make_arguments("add_steer_rms_norm")
    PUBLIC["add_steer_rms_norm"](**{**arguments, "directions": arguments["vectors"]})


# ---- what a direct call of the C++ ops checks ----------------------------------------------------------------

needs_cpp = pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
OUT_OF_RANGE: list[tuple[tuple[str, ...], str, tuple[int, ...], int]] = [
    (EDITS, "slots", (3, 1), 3),
    (GATED, "decider_slots", (1,), 3),
    (GATED, "sequence", (3,), 4),
    (GATED, "deciding", (3,), 6),
]


@needs_cpp
@pytest.mark.parametrize(
    ("op", "name", "at", "value"), [(op, *rest) for op_names, *rest in OUT_OF_RANGE for op in op_names]
)
@pytest.mark.parametrize("call", ["public", "direct"])
def test_cpp_refuses_an_index_out_of_range(call: str, op: str, name: str, at: tuple[int, ...], value: int) -> None:
    case, _ = make_arguments(op)
    getattr(case, name)[at] = value
    before = case.on("cpu")
    message = rf"{'slots' if 'slots' in name else name}\b.*: expected an index below {value}, got {value}"
    run = PUBLIC[op] if call == "public" else DIRECT[op]
    arguments = public_arguments(case, op) if call == "public" else case.flat(DIRECT[op])
    with pytest.raises(RuntimeError, match=message):
        run(**arguments)
    for written in ("x", "row_scores", "last_scores", *DECISIONS):
        assert_same_bits(getattr(case, written), getattr(before, written))


@needs_cpp
@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        (op, name, value)
        for op_names, name, value in [
            (ALL, "x", Z(6, 16).double()),
            (ALL, "x", Z(16, 6).t()),
            (ALL, "residual", Z(16, 6).t()),
            (ALL, "residual", Z(6, 15)),
            (ALL, "residual", Z(6, 16).half()),
            (ALL, "table", Z(3, 15)),
            (ALL, "directions", Z(3, 15)),
            (ALL, "directions", Z(3, 16, dtype=INT)),
            (EDITS, "vectors", Z(3, 16).half()),
            (EDITS, "slots", Z(6, 5, dtype=INT)),
            (EDITS, "slots", Z(5, 2, dtype=INT)),
            (PLAIN, "scales", Z(6, 1)),
            (PLAIN, "scales", Z(6, 2).half()),
            (NORMS, "weight", Z(15)),
            (NORMS, "norm", 3),
            (EDITS, "kinds", 2),
            (GATED, "sequence", Z(5, dtype=INT)),
            (GATED, "deciding", Z(4, dtype=torch.int64)),
            (GATED, "counted", Z(8, 2, dtype=INT)),
            (GATED, "row_scores", Z(5, 2)),
            (GATED, "last_scores", Z(7)),
            (("score_",), "mean_directions", Z(3, 15)),
            (DECIDING, "decider_slots", Z(7, dtype=INT)),
            (DECIDING, "strength", Z(7)),
            (DECIDING, "tables", Z(3, 3, 15)),
            (DECIDING, "sums", Z(3, 8)),
            (DECIDING, "scores", Z(3, 7)),
            (DECIDING, "values", Z(2, 8)),
            (DECIDING, "scales", Z(3, 5, 2)),
            (DECIDING, "layer", 3),
        ]
        for op in op_names
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_cpp_checks_what_keeps_memory_safe(op: str, name: str, value: Any) -> None:
    case, _ = make_arguments(op)
    before = case.on("cpu")
    with pytest.raises(RuntimeError, match=rf"{name}\b.*: expected"):
        DIRECT[op](*{**case.flat(DIRECT[op]), name: value}.values())
    for written in ("x", "row_scores", "last_scores", *DECISIONS):
        assert_same_bits(getattr(case, written), getattr(before, written))

"""Wrong arguments: every message of the checks, and that the C++ ops write nothing before they have checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Case, assert_same_bits, make_case

from steerfast import _native
from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm, add_steer_rms_norm_prompt
from steerfast.kernels.contract import GateKind, GateOperands, Operands
from steerfast.kernels.gate import gate_
from steerfast.kernels.steer import steer_

# The public functions, by the flat arguments of the torch ops.
PUBLIC: dict[str, Callable[..., Any]] = {
    "gate_": lambda x, residual, row, **gates: gate_(x, residual, row, GateOperands(**gates)),
    "steer_": lambda x, residual, **operands: steer_(x, residual, Operands(**operands)),
    "add_steer_rms_norm": lambda x, residual, weight, eps, norm, **operands: add_steer_rms_norm(
        x, residual, weight, Operands(**operands), eps, norm
    ),
    "prompt": lambda x, residual, weight, deciding, scores, eps, norm, **operands: add_steer_rms_norm_prompt(
        x, residual, weight, Operands(**operands), deciding, scores, eps, norm
    ),
}
ops = torch.ops.steerfast
DIRECT: dict[str, Callable[..., Any]] = {
    "gate_": ops.gate_.default,
    "steer_": ops.steer_.default,
    "add_steer_rms_norm": ops.add_steer_rms_norm.default,
    "prompt": ops.add_steer_rms_norm.prompt,
}
ALL, EDITS, NORMS = tuple(DIRECT), ("steer_", "add_steer_rms_norm", "prompt"), ("add_steer_rms_norm", "prompt")
INT = torch.int32


def make_arguments(op: str) -> tuple[Case, dict[str, Any]]:
    """6 rows of 16 numbers, 4 sequences with 2 slots each out of 3, and the op's arguments by name."""
    case = make_case(6, 16, stack=2, slots=3, sequences=4, pair=True, shared=True, seed=1).plain(GATE=GateKind.PROMPT)
    case.rows[:] = torch.tensor([[0, 0, 1], [1, 2, 0], [2, 1, 1], [3, 0, 2], [0, 0, 1], [-1, -1, -1]])
    case.deciding[:], case.row[:] = torch.tensor([4, -1, 2, 3]), torch.tensor([0, 1, 2, 3])
    case.slot[:] = torch.tensor([[0, 1], [2, 0], [1, 1], [-1, 2]])
    return case, case.flat(DIRECT[op])


Z = torch.zeros
WRONG: list[tuple[tuple[str, ...], str, Any, type[Exception], str]] = [
    (ALL, "x", Z(6), ValueError, "x: expected 2 dimensions [rows, H], got shape [6]"),
    (ALL, "x", Z(6, 16).double(), TypeError, "x: expected float32 or bfloat16 or float16, got torch.float64"),
    (ALL, "x", Z(6, 0), ValueError, "x: expected a hidden size from 1 to 32768, got 0"),
    (ALL, "x", Z(6, 32769), ValueError, "x: expected a hidden size from 1 to 32768, got 32769"),
    (ALL, "x", Z(16, 6).t(), ValueError, "x: expected stride 1 in the last dimension, got strides [1, 6]"),
    (("steer_",), "x", Z(16).expand(6, 16), ValueError, "x: expected rows that do not overlap, got strides [0, 1]"),
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
    (EDITS, "rows", Z(6, dtype=INT), ValueError, "rows: expected 2 dimensions [rows, 1 + K], got shape [6]"),
    (EDITS, "rows", Z(6, 0, dtype=INT), ValueError, "rows: expected 0 to 4 slots per row, got -1"),
    (EDITS, "rows", Z(6, 6, dtype=INT), ValueError, "rows: expected 0 to 4 slots per row, got 5"),
    (EDITS, "rows", Z(5, 3, dtype=INT), ValueError, "rows: expected shape [6, 3], got [5, 3]"),
    (EDITS, "rows", Z(6, 3), TypeError, "rows: expected int32, got torch.float32"),
    (EDITS, "rows", Z(3, 6, dtype=INT).t(), ValueError, "rows: expected a contiguous tensor, got strides [1, 6]"),
    (EDITS, "rows", Z(6, 3, dtype=INT, device="meta"), ValueError, "rows: expected device cpu like x, got meta"),
    (EDITS, "values", Z(4, 1), ValueError, "values: expected shape [4, 2], got [4, 1]"),
    (EDITS, "values", Z(()), ValueError, "values: expected shape [0, 2], got []"),
    (EDITS, "values", Z(4, 2).bfloat16(), TypeError, "values: expected float32, got torch.bfloat16"),
    (EDITS, "strength", Z(3, 2), ValueError, "strength: expected shape [4, 2], got [3, 2]"),
    (EDITS, "strength", Z(4, 2).double(), TypeError, "strength: expected float32, got torch.float64"),
    (EDITS, "vectors", Z(3, 15), ValueError, "vectors: expected shape [3, 16], got [3, 15]"),
    (EDITS, "vectors", Z(3, 32)[:, :16], ValueError, "vectors: expected a contiguous tensor, got strides [32, 1]"),
    (
        EDITS,
        "vectors",
        Z(3, 16, dtype=INT),
        TypeError,
        "vectors: expected float32 or bfloat16 or float16, got torch.int",
    ),
    (ALL, "directions", Z(2, 16), ValueError, "directions: expected shape [3, 16], got [2, 16]"),
    (EDITS, "directions", Z(3, 16).half(), TypeError, "directions: expected float32, got torch.float16"),
    (ALL, "table", Z(3, 15), ValueError, "table: expected shape [3, 16], got [3, 15]"),
    (ALL, "table", Z(0, 16), ValueError, "table: expected at least one slot, got shape [0, 16]"),
    (ALL, "table", Z(()), ValueError, "table: expected at least one slot, got shape []"),
    (ALL, "table", Z(3, 16).half(), TypeError, "table: expected float32, got torch.float16"),
    (NORMS, "eps", -1e-6, ValueError, "eps: expected a number >= 0, got -1e-06"),
    (NORMS, "eps", float("nan"), ValueError, "eps: expected a number >= 0, got nan"),
    (NORMS, "norm", 3, ValueError, "norm: expected one of LLAMA (0), GEMMA (1), VLLM (2), got 3"),
    (
        ("steer_", "add_steer_rms_norm"),
        "kinds",
        -1,
        ValueError,
        "kinds: expected one of LATCHED_ADD (0), ANY (1), got -1",
    ),
    (("gate_",), "row", Z(4, dtype=torch.int64), TypeError, "row: expected int32, got torch.int64"),
    (("gate_",), "row", Z(2, 2, dtype=INT), ValueError, "row: expected shape [2], got [2, 2]"),
    (("gate_",), "slot", Z(4, dtype=INT), ValueError, "slot: expected 0 to 4 slots per row, got -1"),
    (("gate_",), "slot", Z(4, 5, dtype=INT), ValueError, "slot: expected 0 to 4 slots per row, got 5"),
    (("gate_",), "slot", Z(3, 2, dtype=INT), ValueError, "slot: expected shape [4, 2], got [3, 2]"),
    (("gate_",), "values", Z(4, 1), ValueError, "values: expected shape [4, 2], got [4, 1]"),
    (("gate_", "prompt"), "scores", Z(4, 3), ValueError, "scores: expected shape [4, 2], got [4, 3]"),
    (("gate_", "prompt"), "scores", Z(4, 2).half(), TypeError, "scores: expected float32, got torch.float16"),
    (("prompt",), "deciding", Z(3, dtype=INT), ValueError, "deciding: expected shape [4], got [3]"),
    (("prompt",), "deciding", Z(4), TypeError, "deciding: expected int32, got torch.float32"),
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
    ("gate_", "values", "scores"),
    ("gate_", "scores", "x"),
    ("gate_", "values", "table"),
    ("prompt", "scores", "values"),
    ("prompt", "strength", "values"),
    ("steer_", "residual", "x"),
]


@pytest.mark.parametrize(("op", "name", "other"), SHARED)
def test_refuses_memory_that_is_shared_with_what_is_written(op: str, name: str, other: str) -> None:
    _, arguments = make_arguments(op)
    like = arguments[name]
    arguments[name] = arguments[other].view(-1)[: like.numel()].view(like.shape)
    with pytest.raises(ValueError, match="expected memory of its own, got a tensor that shares that of"):
        PUBLIC[op](**arguments)


def test_bank_may_serve_as_vectors_and_directions() -> None:
    _, arguments = make_arguments("add_steer_rms_norm")
    PUBLIC["add_steer_rms_norm"](**{**arguments, "directions": arguments["vectors"]})


def test_a_launch_that_decides_prompt_gates_takes_any_kind() -> None:
    _, arguments = make_arguments("prompt")
    with pytest.raises(ValueError, match=re.escape("kinds: expected ANY (1) where prompt gates decide, got 0")):
        PUBLIC["prompt"](**arguments, kinds=0)


# ---- what a direct call of the C++ ops checks ----------------------------------------------------------------

needs_cpp = pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
OUT_OF_RANGE: list[tuple[tuple[str, ...], str, tuple[int, ...], int, str]] = [
    (EDITS, "rows", (3, 1), 3, "rows: slot: expected an index below 3, got 3"),
    (EDITS, "rows", (4, 2), 3, "rows: slot: expected an index below 3, got 3"),
    (EDITS, "rows", (3, 0), 4, "rows: sequence: expected an index below 4, got 4"),
    (EDITS, "rows", (3, 0), -1, "rows: expected a sequence, got -1"),
    (("prompt",), "deciding", (3,), 6, "deciding: expected an index below 6, got 6"),
    (("gate_",), "row", (3,), 6, "row: expected an index below 6, got 6"),
    (("gate_",), "slot", (3, 1), 3, "slot: expected an index below 3, got 3"),
]


@needs_cpp
@pytest.mark.parametrize(
    ("op", "name", "at", "value", "message"), [(op, *rest) for op_names, *rest in OUT_OF_RANGE for op in op_names]
)
@pytest.mark.parametrize("call", ["public", "direct"])
def test_cpp_refuses_an_index_out_of_range(
    call: str, op: str, name: str, at: tuple[int, ...], value: int, message: str
) -> None:
    case, arguments = make_arguments(op)
    getattr(case, name)[at] = value
    before = case.on("cpu")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        PUBLIC[op](**arguments) if call == "public" else DIRECT[op](*arguments.values())
    for written in ("x", "scores", "values"):
        assert_same_bits(getattr(case, written), getattr(before, written))


@needs_cpp
def test_cpp_ignores_indices_that_nothing_uses() -> None:
    """A record without slots may name any sequence, a sequence without a row any slot."""
    case, _ = make_arguments("steer_")
    case.rows[5, 0], case.row[2], case.slot[2] = 99, -1, 99
    for op in ALL:
        PUBLIC[op](**case.flat(DIRECT[op]))


@needs_cpp
@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        (op, name, value, message)
        for op_names, name, value, message in [
            (ALL, "x", Z(6, 16).double(), "x: expected float32, bfloat16 or float16"),
            (ALL, "x", Z(16, 6).t(), "x: expected a tensor [rows, H] on the device of x, contiguous in H"),
            (
                ALL,
                "residual",
                Z(16, 6).t(),
                "residual: expected a tensor [rows, H] on the device of x, contiguous in H",
            ),
            (ALL, "residual", Z(6, 15), "residual: expected the shape and dtype of x"),
            (ALL, "residual", Z(6, 16).half(), "residual: expected the shape and dtype of x"),
            (ALL, "table", Z(3, 15), "table: expected a contiguous tensor"),
            (ALL, "directions", Z(3, 15), "directions: expected a contiguous tensor"),
            (ALL, "directions", Z(3, 16, dtype=INT), "directions: expected float32, bfloat16 or float16"),
            (EDITS, "vectors", Z(3, 16).half(), "vectors: expected the dtype of the other bank"),
            (EDITS, "rows", Z(6, 7, dtype=INT), "rows: expected 0 to 4 slots per row"),
            (EDITS, "rows", Z(5, 3, dtype=INT), "rows: expected a contiguous tensor"),
            (EDITS, "strength", Z(3, 2), "strength: expected a contiguous tensor"),
            (EDITS, "values", Z(4, 2).half(), "values: expected a contiguous tensor"),
            (NORMS, "weight", Z(15), "weight: expected a contiguous tensor"),
            (NORMS, "norm", 3, "norm: expected a choice from 0 to 2, got 3"),
            (("steer_", "add_steer_rms_norm"), "kinds", 2, "kinds: expected a choice from 0 to 1, got 2"),
            (("gate_",), "slot", Z(4, 5, dtype=INT), "slot: expected 0 to 4 slots per row"),
            (("gate_",), "row", Z(4, dtype=torch.int64), "row: expected a contiguous tensor"),
            (("gate_", "prompt"), "scores", Z(4, 1), "scores: expected a contiguous tensor"),
            (("prompt",), "deciding", Z(3, dtype=INT), "deciding: expected a contiguous tensor"),
        ]
        for op in op_names
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 20 else "",
)
def test_cpp_checks_what_keeps_memory_safe(op: str, name: str, value: Any, message: str) -> None:
    case, arguments = make_arguments(op)
    before = case.on("cpu")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        DIRECT[op](*{**arguments, name: value}.values())
    for written in ("x", "scores", "values"):
        assert_same_bits(getattr(case, written), getattr(before, written))

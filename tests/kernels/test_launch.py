"""What the GPU kernels turn into, found out without a GPU: launch shapes, and machine code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from steerfast.kernels.contract import MAX_HIDDEN_SIZE
from steerfast.kernels.gate import LaunchShape, launch_shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_shape_covers_every_hidden_size(dtype: torch.dtype) -> None:
    for size in range(1, MAX_HIDDEN_SIZE + 1):
        shape = launch_shape(size, dtype)
        assert size <= shape.block < 2 * size
        assert shape.block & (shape.block - 1) == 0
        assert shape.num_warps in (4, 8, 16, 32)
        assert shape.block * dtype.itemsize <= shape.num_warps * 32 * 128  # bytes a thread holds of one tensor


def test_launch_shape_of_known_models() -> None:
    assert launch_shape(576, torch.bfloat16) == LaunchShape(1024, 4)
    assert launch_shape(4096, torch.bfloat16) == launch_shape(4096, torch.float16) == LaunchShape(4096, 8)
    assert launch_shape(4096, torch.float32) == LaunchShape(4096, 16)
    assert launch_shape(16384, torch.bfloat16) == LaunchShape(16384, 32)


@pytest.mark.parametrize("size", [0, MAX_HIDDEN_SIZE + 1])
def test_launch_shape_refuses_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"hidden_size: expected 1 to {MAX_HIDDEN_SIZE}, got {size}"):
        launch_shape(size, torch.bfloat16)


# Runs without TRITON_INTERPRET and compiles for a GPU that need not be there. One line of JSON per kernel.
COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steerfast.kernels import gate, steer

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS = {
    "gate": dict(row_ptr="*i64", slot_ptr="*i32", directions_ptr=0, table_ptr="*fp32", scores_ptr="*fp32",
                 values_ptr="*fp32"),
    "steer_": dict(slot_ptr="*i32", sequence_ptr="*i32", values_ptr="*fp32", strength_ptr="*fp32",
                   vectors_ptr=0, directions_ptr=0, table_ptr="*fp32"),
}
for op, mode, arch, size, dtype, contiguous in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    shape = gate.launch_shape(size, dtype)
    pointers = {name: kind or TYPES[dtype] for name, kind in {"x_ptr": 0, **POINTERS[op]}.items()}
    constants = dict(H=size, BLOCK=shape.block, CONTIGUOUS=contiguous, SCORE=1)
    if op == "steer_":
        constants.update(GATE_MODE=mode, EDIT=0, NVIDIA=True)
    # The hints a launch gives: pointers (and a row stride, where it is one) divisible by 16.
    hinted = range(len(pointers) + (size % 16 == 0))
    source = ASTSource(
        gate._gate_kernel if op == "gate" else steer._steer_kernel,
        {**pointers, "row_stride": "i64", **dict.fromkeys(constants, "constexpr")},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in hinted},
    )
    options = dict(num_warps=shape.num_warps, enable_fp_fusion=False)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    print(json.dumps({"sass": kernel.asm["sass"], "ptx": kernel.asm["ptx"]}))
"""


def machine_code(*kernels: tuple[str, int, int, int, str, bool]) -> list[tuple[Counter[str], str]]:
    """Instruction counts and PTX of kernels (op, gate mode, architecture, hidden size, dtype, contiguous)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(kernels)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(kernels)
    # An instruction stands after its address and predicate: "@P0 LDG.E.128 R4, ..."
    return [(Counter(re.findall(r"\b([A-Z][A-Z0-9]+(?:\.[A-Za-z0-9_]+)*)\s", k["sass"])), k["ptx"]) for k in lines]


def count(instructions: Counter[str], pattern: str) -> int:
    return sum(n for name, n in instructions.items() if re.fullmatch(pattern, name))


OPS: list[tuple[str, int]] = [("gate", 0), ("steer_", 0), ("steer_", 1)]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def assert_sound(instructions: Counter[str], ptx: str) -> None:
    assert count(instructions, r"STG.*") > 0  # the code was found and read
    assert count(instructions, r"(LDL|STL).*") == 0, "spills"
    assert count(instructions, r"D(ADD|MUL|FMA|SETP).*|.*F64.*") == 0, "float64 arithmetic"
    assert ".ftz" not in ptx, "denormals flushed"


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_machine_code_on_each_architecture(arch: int) -> None:
    kernels: Any = [(op, mode, arch, 4096, "bfloat16", True) for op, mode in OPS]
    for (op, mode), (instructions, ptx) in zip(OPS, machine_code(*kernels), strict=True):
        assert_sound(instructions, ptx)
        # 16 numbers a thread: two 16-byte accesses for each of x and d, and by token v as well.
        vectors = 3 if (op, mode) == ("steer_", 1) else 2
        assert count(instructions, r"LDG\.E.*128.*") == 2 * vectors
        assert count(instructions, r"LDG\.E.*U16.*") == 0
        assert count(instructions, r"STG\.E.*128.*") == (0 if op == "gate" else 2)
        if (op, mode) == ("steer_", 0):
            assert count(instructions, r"FFMA.*") == 0, "a product fused with a sum"
            assert count(instructions, r"(BAR|SHFL).*") == 0, "a sum where none is needed"


@needs_triton
def test_machine_code_of_other_rows() -> None:
    sizes = [(576, "bfloat16"), (5120, "float16"), (16384, "bfloat16"), (MAX_HIDDEN_SIZE, "float32")]
    kernels: Any = [(op, mode, 90, *size, False) for size in sizes for op, mode in OPS]
    for kernel, (instructions, ptx) in zip(kernels, machine_code(*kernels), strict=True):
        assert_sound(instructions, ptx)
        assert count(instructions, r"LDG\.E.*128.*") >= 2, kernel
        assert count(instructions, r"LDG\.E.*U16.*") == 0, kernel

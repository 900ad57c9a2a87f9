"""Launch every op on small odd shapes and compare with plain torch: a program to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Without the caching allocator every tensor is an allocation of its own, so that an access beyond its end is seen.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from steerfast.kernels.add_steer_rms_norm import (
    add_steer_rms_norm,
    add_steer_rms_norm_prompt,
    add_steer_rms_norm_prompt_torch,
    add_steer_rms_norm_torch,
)
from steerfast.kernels.contract import (
    DIRECTION_SQ,
    EDIT,
    GATE,
    HIGH,
    LOW,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    GateKind,
    GateOperands,
    Kinds,
    Norm,
    Operands,
)
from steerfast.kernels.edit_kinds import EDITS
from steerfast.kernels.gate import gate_, gate_torch_
from steerfast.kernels.steer import steer_, steer_torch_

SLOTS = len(EDITS)
EPS = 1e-6
norms = cycle(Norm)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    stack: int
    dtype: torch.dtype
    strided: bool


class Inputs:
    """Random arguments of all ops for one shape, with every edit and every gate."""

    def __init__(self, shape: Shape, device: str) -> None:
        g = torch.Generator().manual_seed(shape.rows * shape.hidden + shape.stack)
        rows, hidden, stack = shape.rows, shape.hidden, shape.stack

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(device, shape.dtype)

        def stream() -> Tensor:
            return normal(rows, 2 * hidden + 1)[:, :hidden] if shape.strided else normal(rows, hidden)

        self.x, self.residual, self.weight = stream(), stream(), normal(hidden)
        self.vectors, self.directions = normal(SLOTS, hidden), normal(SLOTS, hidden)
        self.table = make_table(self.vectors.float().cpu(), self.directions.float().cpu()).to(device)
        sequence = torch.arange(rows)[:, None]
        slot = torch.randint(-1, SLOTS, (rows, stack), generator=g)
        record = torch.cat([sequence, slot], 1).int().to(device)
        self.slot = slot.int().to(device).contiguous()
        self.index = sequence[:, 0].int().to(device)
        self.values = torch.rand(rows, stack, generator=g).to(device)
        self.scores = torch.zeros_like(self.values)
        bank = (self.vectors, self.directions, self.table)
        strength = torch.ones_like(self.values)
        self.operands = [Operands(record, self.values, strength, *bank, int(kinds)) for kinds in Kinds]

    def gates(self) -> GateOperands:
        return GateOperands(self.slot, self.directions, self.table, self.scores.clone(), self.values.clone())


def make_table(v: Tensor, d: Tensor) -> Tensor:
    """Return a table whose gates are all open."""
    table = torch.zeros(SLOTS, TABLE_WIDTH)
    table[:, STRENGTH], table[:, THRESHOLD] = 0.5, -1e4  # far from any score: gates are open
    for row, edit, gate in zip(table, EDITS.values(), cycle(reversed(GateKind)), strict=False):
        row[EDIT], row[GATE], (row[LOW], row[HIGH]) = edit.id, gate, edit.columns(**edit.example)
    table[:, VECTOR_SQ], table[:, VECTOR_DIRECTION] = (v * v).sum(1), (v * d).sum(1)
    table[:, DIRECTION_SQ] = (d * d).sum(1)
    return table


def launch_all(shape: Shape, device: str) -> int:
    """Launch every op with every kind, by norms that change from call to call; return the number of launches."""
    i = Inputs(shape, device)
    launches = 0

    def agree(what: str, got: Tensor, expected: Tensor) -> None:
        close = TOLERANCE[shape.dtype]
        torch.testing.assert_close(got, expected, rtol=close, atol=close, msg=lambda text: f"{what}: {text}")

    for operands in i.operands:
        norm = next(norms)
        got = add_steer_rms_norm(i.x, i.residual, i.weight, operands, EPS, norm)
        expected = add_steer_rms_norm_torch(i.x, i.residual, i.weight, operands, EPS, int(norm))
        for name, one, other in zip(("normed", "residual"), got, expected, strict=True):
            agree(f"add_steer_rms_norm {norm.name} {Kinds(operands.kinds).name} {name}", one, other)
        launches += 1

    mine, theirs = (i.operands[Kinds.ANY]._replace(values=i.values.clone()) for _ in range(2))
    got = add_steer_rms_norm_prompt(i.x, i.residual, i.weight, mine, i.index, i.scores.clone(), EPS)
    expected = add_steer_rms_norm_prompt_torch(
        i.x, i.residual, i.weight, theirs, i.index, i.scores.clone(), EPS, int(Norm.LLAMA)
    )
    for one, other in zip((*got, mine.values), (*expected, theirs.values), strict=True):
        agree("add_steer_rms_norm.prompt", one, other)
    launches += 1

    for other_rows in (None, i.residual):
        read, plain_read = i.gates(), i.gates()
        gate_(i.x, other_rows, i.index, read)
        gate_torch_(i.x, other_rows, i.index, plain_read)
        agree("gate_", read.values, plain_read.values)
        launches += 1
        for operands in i.operands:
            steered, plain = i.x.clone(memory_format=torch.preserve_format), i.x.clone()
            steer_(steered, other_rows, operands)
            steer_torch_(plain, other_rows, operands)
            agree(f"steer_ {Kinds(operands.kinds).name}", steered, plain)
            launches += 1
    return launches


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Launch every op on small odd shapes.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    launches = 0
    for shape in (  # few: each variant of a kernel is compiled for one launch
        Shape(1, 1, 1, torch.float32, False),
        Shape(3, 33, 2, torch.bfloat16, True),
        Shape(5, 577, 4, torch.float16, False),
        Shape(2, 2047, 1, torch.bfloat16, True),
        Shape(7, 100, 0, torch.bfloat16, False),
    ):
        launches += launch_all(shape, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{launches} launches on {device}")


if __name__ == "__main__":
    main()

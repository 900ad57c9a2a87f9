"""Launch every op on small odd shapes and compare with plain torch: a program to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Without the caching allocator every tensor is an allocation of its own, so that an access beyond its end is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm, add_steer_rms_norm_torch
from steerfast.kernels.contract import (
    DECIDES,
    DIRECTION_SQ,
    EDIT,
    GATE,
    HIGH,
    LOW,
    READING,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    Decides,
    GateKind,
    GateOperands,
    Kinds,
    Norm,
    Operands,
    Reading,
)
from steerfast.kernels.edit_kinds import EDITS
from steerfast.kernels.gate import score_, score_torch_
from steerfast.kernels.steer import steer_, steer_torch_

SLOTS = len(EDITS)
LAYERS, LAYER = 3, 1
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
    """Random arguments of all ops for one shape, with every edit, gate and reading. A sequence has two rows."""

    def __init__(self, shape: Shape, device: str) -> None:
        g = torch.Generator().manual_seed(shape.rows * shape.hidden + shape.stack)
        rows, hidden, stack = shape.rows, shape.hidden, shape.stack

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(device, shape.dtype)

        def stream() -> Tensor:
            return normal(rows, 2 * hidden + 1)[:, :hidden] if shape.strided else normal(rows, hidden)

        self.x, self.residual, self.weight = stream(), stream(), normal(hidden)
        self.vectors, self.directions, self.mean_directions = (normal(SLOTS, hidden) for _ in range(3))
        self.tables = make_tables(self.vectors.float().cpu(), self.directions.float().cpu()).to(device)
        self.sequence = (torch.arange(rows) // 2).int().to(device)
        self.count = (rows + 1) // 2
        of_sequence = torch.randint(-1, SLOTS, (self.count, stack), generator=g).int().to(device)
        self.decider_slots = of_sequence.flatten()
        self.slots = of_sequence.index_select(0, self.sequence)
        self.scales = torch.rand(LAYERS, rows, stack, generator=g).to(device)
        self.sums = torch.randn(LAYERS, self.count * stack, generator=g).double().to(device)

    def operands(self, kinds: Kinds, gates: GateOperands | None = None) -> Operands:
        scales = (self.scales if gates is None else gates.scales)[LAYER]
        return Operands(self.slots, scales, self.vectors, self.directions, self.tables[LAYER], int(kinds))

    def gates(self) -> GateOperands:
        """Return gates of which every second sequence decides, with memory of their own."""
        device, stack = self.x.device, self.slots.shape[1]
        at = torch.arange(self.count, device=device)
        last = (2 * at + 1).clamp(max=len(self.x) - 1)
        counted = torch.stack([2 * at, last + 1, last + 2], 1).int().repeat_interleave(stack, 0)
        latch = torch.zeros(LAYERS, self.count * stack, device=device)
        return GateOperands(
            sequence=self.sequence,
            deciding=torch.where(at % 2 == 0, last, -1).int(),
            counted=counted,
            slots=self.decider_slots,
            strength=torch.ones(self.count * stack, device=device),
            directions=self.directions,
            mean_directions=self.mean_directions,
            tables=self.tables,
            row_scores=torch.zeros(len(self.x), stack, device=device),
            last_scores=torch.zeros(self.count * stack, device=device),
            sums=self.sums.clone(),
            scores=latch.clone(),
            values=latch.clone(),
            scales=self.scales.clone(),
            layer=LAYER,
        )


def make_tables(v: Tensor, d: Tensor) -> Tensor:
    """Return tables [LAYERS, SLOTS, TABLE_WIDTH] whose gates are all open."""
    table = torch.zeros(SLOTS, TABLE_WIDTH)
    table[:, STRENGTH], table[:, THRESHOLD] = 0.5, -1e4  # far from any score: gates are open
    of_slots = zip(EDITS.values(), cycle(reversed(GateKind)), cycle(Decides), cycle(Reading), strict=False)
    for row, (edit, gate, decides, reading) in zip(table, of_slots, strict=False):
        row[EDIT], row[GATE], (row[LOW], row[HIGH]) = edit.id, gate, edit.columns(**edit.example)
        row[DECIDES], row[READING] = decides if gate == GateKind.PROMPT else Decides.NOTHING, reading
    table[:, VECTOR_SQ], table[:, VECTOR_DIRECTION] = (v * v).sum(1), (v * d).sum(1)
    table[:, DIRECTION_SQ] = (d * d).sum(1)
    return table.repeat(LAYERS, 1, 1)


class Comparison:
    """The launches of one shape, each compared with plain torch."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.inputs, self.close, self.launches = Inputs(shape, device), TOLERANCE[shape.dtype], 0

    def agree(self, what: str, got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            got, expected, rtol=self.close, atol=self.close, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )

    def fused(self, kinds: Kinds, deciding: bool) -> None:
        i, norm = self.inputs, next(norms)
        name = f"add_steer_rms_norm{'.deciding' if deciding else ''} {norm.name} {kinds.name}"

        def run(score: Callable[..., None], fused: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
            gates = self.scored(score, i.residual) if deciding else None
            return *fused(i.x, i.residual, i.weight, i.operands(kinds, gates), EPS, int(norm), gates), *written(gates)

        self.compare(name, run(score_, add_steer_rms_norm), run(score_torch_, add_steer_rms_norm_torch))

    def steer(self, kinds: Kinds, deciding: bool, residual: Tensor | None) -> None:
        i = self.inputs
        name = f"steer_{'.deciding' if deciding else ''} {kinds.name}"

        def run(score: Callable[..., None], steer: Callable[..., None]) -> tuple[Tensor, ...]:
            gates = self.scored(score, residual) if deciding else None
            x = i.x.clone(memory_format=torch.preserve_format)
            steer(x, residual, i.operands(kinds, gates), gates)
            return x, *written(gates)

        self.compare(name, run(score_, steer_), run(score_torch_, steer_torch_))

    def scored(self, score: Callable[..., Any], residual: Tensor | None) -> GateOperands:
        gates = self.inputs.gates()
        score(self.inputs.x, residual, gates)
        return gates

    def compare(self, name: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        self.launches += 1
        for at, (one, other) in enumerate(zip(got, expected, strict=True)):
            self.agree(f"{name}, output {at}", one, other)


def written(gates: GateOperands | None) -> tuple[Tensor, ...]:
    """Return the tensors that the deciding forms write."""
    return () if gates is None else (gates.sums, gates.scores, gates.values, gates.scales)


def launch_all(shape: Shape, device: str) -> int:
    """Launch every op with every kind, by norms that change from call to call; return the number of launches."""
    comparison = Comparison(shape, device)
    for kinds in Kinds:
        for deciding in (False, True):
            comparison.fused(kinds, deciding)
            for residual in (None, comparison.inputs.residual):
                comparison.steer(kinds, deciding, residual)
    return comparison.launches


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

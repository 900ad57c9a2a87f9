"""Launch every op on small odd shapes and compare with plain torch: a program to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Without the caching allocator every tensor is an allocation of its own, so that an access beyond its end is seen.
"""

from __future__ import annotations

import argparse
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
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    Edit,
    Gate,
    GateOperands,
    Kinds,
    Norm,
    Operands,
)
from steerfast.kernels.gate import gate_, gate_torch_
from steerfast.kernels.steer import steer_, steer_torch_

SLOTS = 5
EPS = 1e-6
norms = cycle(Norm)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def launch_all(rows: int, hidden: int, stack: int, dtype: torch.dtype, strided: bool, device: str) -> int:
    """Every op with every kind, by norms that change from call to call; how many launches."""
    g = torch.Generator().manual_seed(rows * hidden + stack)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    def stream() -> Tensor:
        return normal(rows, 2 * hidden + 1)[:, :hidden] if strided else normal(rows, hidden)

    x, residual, weight = stream(), stream(), normal(hidden)
    vectors, directions = normal(SLOTS, hidden), normal(SLOTS, hidden)
    table = torch.zeros(SLOTS, TABLE_WIDTH)
    table[:, STRENGTH], table[:, HIGH], table[:, THRESHOLD] = 0.5, 1.0, -1e4  # far from any score: gates are open
    table[:, EDIT] = torch.tensor([Edit.ADD, Edit.CLAMP, Edit.KEEP_NORM, Edit.ROTATE, Edit.ADD])
    table[:, GATE] = torch.tensor([Gate.TOKEN, Gate.PROMPT, Gate.ALWAYS, Gate.TOKEN, Gate.PROMPT])
    v, d = vectors.float().cpu(), directions.float().cpu()
    table[:, VECTOR_SQ], table[:, VECTOR_DIRECTION], table[:, DIRECTION_SQ] = (
        (v * v).sum(1), (v * d).sum(1), (d * d).sum(1),
    )  # fmt: skip
    table = table.to(device)
    sequence = torch.arange(rows)[:, None]
    slot = torch.randint(-1, SLOTS, (rows, stack), generator=g)
    record = torch.cat([sequence, slot], 1).int().to(device)
    slot = slot.int().to(device).contiguous()
    index = sequence[:, 0].int().to(device)
    values, strength = torch.rand(rows, stack, generator=g).to(device), torch.ones(rows, stack, device=device)
    each = [Operands(record, values, strength, vectors, directions, table, int(kinds)) for kinds in Kinds]
    launches = 0

    def agree(what: str, got: Tensor, expected: Tensor) -> None:
        close = TOLERANCE[dtype]
        torch.testing.assert_close(got, expected, rtol=close, atol=close, msg=lambda text: f"{what}: {text}")

    for operands in each:
        norm = next(norms)
        got = add_steer_rms_norm(x, residual, weight, operands, EPS, norm)
        expected = add_steer_rms_norm_torch(x, residual, weight, operands, EPS, int(norm))
        for name, one, other in zip(("normed", "residual"), got, expected, strict=True):
            agree(f"add_steer_rms_norm {norm.name} {Kinds(operands.kinds).name} {name}", one, other)
        launches += 1

    def latches() -> tuple[Tensor, Tensor]:
        return torch.zeros(rows, stack, device=device), values.clone()

    (scores, latch), (plain_scores, plain_latch) = latches(), latches()
    mine, theirs = (each[Kinds.ANY]._replace(values=values) for values in (latch, plain_latch))
    got = add_steer_rms_norm_prompt(x, residual, weight, mine, index, scores, EPS)
    expected = add_steer_rms_norm_prompt_torch(x, residual, weight, theirs, index, plain_scores, EPS, int(Norm.LLAMA))
    for one, other in zip((*got, latch), (*expected, plain_latch), strict=True):
        agree("add_steer_rms_norm.prompt", one, other)
    launches += 1

    for other_rows in (None, residual):
        (scores, latch), (plain_scores, plain_latch) = latches(), latches()
        gate_(x, other_rows, index, GateOperands(slot, directions, table, scores, latch))
        gate_torch_(x, other_rows, index, GateOperands(slot, directions, table, plain_scores, plain_latch))
        agree("gate_", latch, plain_latch)
        launches += 1
        for operands in each:
            steered, plain = x.clone(memory_format=torch.preserve_format), x.clone()
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
    for rows, hidden, stack, dtype, strided in (  # few: each variant of a kernel is compiled for one launch
        (1, 1, 1, torch.float32, False),
        (3, 33, 2, torch.bfloat16, True),
        (5, 577, 4, torch.float16, False),
        (2, 2047, 1, torch.bfloat16, True),
        (7, 100, 0, torch.bfloat16, False),
    ):
        launches += launch_all(rows, hidden, stack, dtype, strided, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{launches} launches on {device}")


if __name__ == "__main__":
    main()

"""Time torch.compile of pre-norm blocks with each form of the op between two blocks.

    python benchmarks/compiled.py             CUDA where there is one, otherwise one CPU thread
    python benchmarks/compiled.py --json      also writes benchmarks/results/compiled-<device>.jsonl

Eight blocks of two small linear layers, between them residual add, steering and RMSNorm as one of

    op           torch.ops.steerfast.add_steer_rms_norm, which Inductor calls as it is
    torch        the same in plain torch, which Inductor fuses
    unsteered    the plain torch form without slots

each compiled whole, called in turns. `ratio` is the median over the rounds of the time over `unsteered`'s in the same
round. `mode` is torch.compile's; ``reduce-overhead`` (CUDA) replays CUDA graphs. On CUDA a round's times are events'.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import EPS, FUSED, Case, Tensors
from report import Report, parser, spread
from torch import Tensor, nn

from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm_torch
from steerfast.kernels.contract import Kinds, Norm, Operands

Seam = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
BUFFERS = ("weight", "slots", "scales", "no_slots", "no_scales", "vectors", "directions", "table")
NORM, KINDS = int(Norm.LLAMA), int(Kinds.LATCHED_ADD)


class Stack(nn.Module):
    """Blocks of down(silu(up(norm(residual stream)))), with `seam` between them.

    The seam reads buffers of the module, as in a model: a CUDA graph reads buffers in place and copies inputs.
    """

    def __init__(self, seam: Seam, o: Tensors, inner: int, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden, dtype = o.case.hidden, o.case.dtype
        with torch.device(o.device):
            self.up = nn.ModuleList(nn.Linear(hidden, inner, bias=False, dtype=dtype) for _ in range(blocks))
            self.down = nn.ModuleList(nn.Linear(inner, hidden, bias=False, dtype=dtype) for _ in range(blocks))
        for name in BUFFERS:
            self.register_buffer(name, getattr(o, name))
        self.seam = seam

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            normed, residual = self.seam(x, residual, self)
            x = down(nn.functional.silu(up(normed)))
        return residual + x


def op(x: Tensor, residual: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    tables = (m.slots, m.scales, m.vectors, m.directions, m.table)
    return torch.ops.steerfast.add_steer_rms_norm.default(x, residual, m.weight, *tables, EPS, NORM, KINDS)


def in_torch(x: Tensor, residual: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(m.slots, m.scales, m.vectors, m.directions, m.table, KINDS)
    return add_steer_rms_norm_torch(x, residual, m.weight, operands, EPS, NORM)


def unsteered(x: Tensor, residual: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(m.no_slots, m.no_scales, m.vectors, m.directions, m.table, KINDS)
    return add_steer_rms_norm_torch(x, residual, m.weight, operands, EPS, NORM)


SEAMS: dict[str, Seam] = {"op": op, "torch": in_torch, "unsteered": unsteered}


def step(model: Callable[..., Any], x: Tensor, residual: Tensor) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    model(x, residual)


def rounds(models: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Return the microseconds of each model, round by round."""
    times: dict[str, list[float]] = {name: [] for name in models}
    order, draw = list(models), random.Random(0)
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < 20 or time.perf_counter() < end:
        draw.shuffle(order)
        for name in order:
            for timed in (False, True):
                if device == "cuda":
                    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(2_000_000)  # a millisecond: the host is done queuing before it ends
                    first.record()
                    models[name]()
                    last.record()
                    torch.cuda.synchronize()
                    us = first.elapsed_time(last) * 1e3
                else:
                    start = time.perf_counter_ns()
                    models[name]()
                    us = (time.perf_counter_ns() - start) / 1e3
                if timed:
                    times[name].append(us)
    return times


def measure(case: Case, mode: str, given: Any, report: Report) -> None:
    record = {**case.record(), "op": "compiled", "inner": given.inner, "blocks": given.blocks, "mode": mode}
    torch._dynamo.reset()
    operands = Tensors(case, given.device)
    x, residual = operands.buffers(1)[0].pair.clone().unbind()
    models: dict[str, Callable[[], Any]] = {}
    for name, seam in SEAMS.items():
        stack = Stack(seam, operands, given.inner, given.blocks)
        model = torch.compile(stack, fullgraph=True, mode=None if mode == "default" else mode)
        models[name] = partial(step, model, x, residual)
    models = {name: call for name, call in models.items() if report.works({**record, "provider": name}, call)}
    if not models:
        return
    times = rounds(models, given.device, given.seconds)
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, times.get("unsteered", each), strict=True))
        report.line({"op": record["op"], "provider": name, **record, **spread(each), "ratio": round(ratio, 4)})


@torch.inference_mode()
def main() -> int:
    options = parser("Time torch.compile of steered blocks, one JSON line per measurement.")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"])
    options.add_argument("--hidden", type=int, help="default: 2048, on CUDA 4096")
    options.add_argument("--inner", type=int, default=64, help="size between a block's linear layers (default 64)")
    options.add_argument("--blocks", type=int, default=8)
    options.add_argument("--seconds", type=float, default=2.0, help="for each case (default 2)")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    cuda = given.device == "cuda"
    report = Report("compiled", given.device, given.json)
    dtypes = given.dtypes or (["bfloat16"] if cuda else ["bfloat16", "float32"])
    modes = ["default", "reduce-overhead"] if cuda else ["default"]
    for dtype, rows, mode in itertools.product(dtypes, given.rows, modes):
        case = Case(FUSED, rows, given.hidden or (4096 if cuda else 2048), dtype=getattr(torch, dtype))
        try:
            measure(case, mode, given, report)
        except Exception as error:
            report.error({**case.record(), "mode": mode}, error)
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())

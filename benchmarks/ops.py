"""Time the steering ops against the usual ways to do their work.

    python benchmarks/ops.py                  CUDA where there is one, otherwise one CPU thread
    python benchmarks/ops.py --json           also writes benchmarks/results/ops-<device>.jsonl
    python benchmarks/ops.py --quick

One JSON line per case and provider (cases.py, providers.py): median and 20th/80th percentile in microseconds; `gbps`,
the bytes that the op must move (residual, weight, vectors and records included; the same bytes for every
provider) over the median; `pct_copy`, that as a percentage of a large copy's bandwidth in the same process (above 100
where the rows lie in a cache). Providers take turns, one call each (timing.py). `graph_us`, on CUDA: the median per
call of a CUDA graph, where the op's calls take less than 20 us and the cache is warm.

The line with op "copy" is the large copy. A case that fails is a line with `error`; the others go on, and the exit
status is 1. Cases that the time limit leaves out are counted in a last line with `left_out`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from cases import FUSED, GATED, STEER, Case, Tensors
from providers import OPS, forget_compiled, providers
from report import Report, parser, spread
from timing import CPU_CACHE, copy_bandwidth, time_in_graph, time_on_cpu, time_on_cuda

GRAPH_BELOW_US = 20.0


def sweep(hidden_sizes: list[int], rows: list[int], ops: list[str], dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases. The first hidden size in full: all ops, shares of active rows and numbers of profiles."""
    for at, hidden in enumerate(hidden_sizes):
        for op, count, cache in product(ops[:1] if at else ops, rows, ("warm", "cold")):
            yield Case(op, count, hidden, cache=cache, dtype=dtype)
        if at:
            continue
        some = [count for count in rows if count in (1, 16, 64, 256, 1024, 8192)]
        for op, count in product([op for op in GATED if op in ops], some):  # a step in which no gate decides
            yield Case(op, count, hidden, active=0.0, dtype=dtype)
        steering = [op for op in (FUSED, STEER) if op in ops]
        for op, count, active in product(steering, some, (0.0, 0.1)):
            if not active or active * count >= 1:
                yield Case(op, count, hidden, active=active, dtype=dtype)
        for op, count, profiles in product(steering, some, (0, 16, 256)):
            if profiles <= count:
                yield Case(op, count, hidden, profiles=profiles, dtype=dtype)


def measure(case: Case, device: str, seconds: float, bandwidth: float, report: Report) -> None:
    """Time every provider of a case and report one line for each."""
    operands = Tensors(case, device)
    count = 1
    if device == "cpu" and case.cache == "cold":
        count = CPU_CACHE // (2 * case.rows * case.hidden * case.dtype.itemsize) + 1
    buffers = operands.buffers(count)
    calls = {
        name: call
        for name, call in providers(operands).items()
        if report.works({**case.record(), "provider": name}, partial(call, buffers[0]))
    }
    graphs: dict[str, float] = {}
    if device == "cuda":
        times = time_on_cuda(calls, buffers[0], case.cache == "warm", seconds)
        short = [name for name in calls if statistics.median(times[name]) < GRAPH_BELOW_US]
        if case.cache == "warm" and short:
            try:
                graphs = time_in_graph({name: calls[name] for name in short}, buffers[0])
            except Exception as error:
                report.error({**case.record(), "provider": "CUDA graph"}, error)
    else:
        times = time_on_cpu(calls, buffers, case.cache == "warm", seconds)
    for name, each in times.items():
        figures = spread(each)
        gbps = None if name == "empty" else operands.bytes / figures["us"] / 1e3
        report.line(
            {
                "op": case.op,
                "provider": name,
                **{key: value for key, value in case.record().items() if key != "op"},
                **figures,
                **({"graph_us": round(graphs[name], 3) if name in graphs else None} if device == "cuda" else {}),
                "gbps": gbps and round(gbps, 2),
                "pct_copy": gbps and round(100 * gbps / bandwidth, 1),
            }
        )


@torch.inference_mode()
def main() -> int:
    options = parser("Time the steering ops, one JSON line per measurement.")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_argument(
        "--hidden-sizes", type=int, nargs="+", default=[4096, 2048, 8192], help="beyond the first, only the first op"
    )
    options.add_argument("--rows", type=int, nargs="+", help="default: powers of two to 16384, on a CPU to 1024")
    options.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    options.add_argument("--seconds", type=float, help="for each case (default 0.4, on CUDA 0.1)")
    options.add_argument("--limit", type=float, help="seconds after which no case begins (on CUDA default 270)")
    options.add_argument("--quick", action="store_true", help="hidden size 4096, few row counts")
    given = options.parse_args()
    cuda = given.device == "cuda"
    torch.set_num_threads(given.threads)
    rows = given.rows or [1 << power for power in range(15 if cuda else 11)]
    hidden_sizes = given.hidden_sizes
    if given.quick:
        hidden_sizes, rows = [4096], given.rows or [1, 16, 256, *([8192] if cuda else [])]
    seconds = given.seconds or (0.1 if cuda else 0.4)
    limit = given.limit or (270 if cuda else float("inf"))

    start = time.monotonic()
    report = Report("ops", given.device, given.json)
    bandwidth = copy_bandwidth(given.device)
    report.line({"op": "copy", "provider": "copy", "cache": "cold", "gbps": round(bandwidth, 1), "pct_copy": 100.0})
    left_out, hidden = 0, None
    for case in sweep(hidden_sizes, rows, given.ops, getattr(torch, given.dtype)):
        if time.monotonic() - start > limit:
            left_out += 1
            continue
        if case.hidden != hidden:
            forget_compiled()
            hidden = case.hidden
        try:
            measure(case, given.device, seconds, bandwidth, report)
        except Exception as error:
            report.error(case.record(), error)
        gc.collect()
    if left_out:
        report.line({"op": None, "provider": None, "left_out": left_out, "limit_s": limit})
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""Time the steering ops: each implementation that is live here, against plain torch.

    python benchmarks/ops.py                  CUDA where there is one, otherwise one CPU thread
    python benchmarks/ops.py --json ops.jsonl

One JSON line per op, hidden size, row count and implementation: median and 20th/80th percentile in
microseconds, bytes that the op must move, GB/s, and the ratio of plain torch's median to this one (higher is
faster). "checked" is the public function: the op and its argument checks.

The implementations take turns, so that a busy spell hits all of them alike. A turn is one call to bring the
rows back into the cache, where a decode step finds them, and one that is timed: without the first, the caches
that plain torch's temporaries had emptied made the others look up to ten times slower on a CPU. On CUDA a
call is timed by events behind work that keeps the device busy, so that the host's launch time does not count;
`host_us` is that launch time, measured on its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from report import machine, write

from steerfast import _native
from steerfast.kernels.contract import STRENGTH, TABLE_WIDTH, THRESHOLD, GateMode, Score, implementations
from steerfast.kernels.gate import gate, gate_torch
from steerfast.kernels.steer import steer_, steer_torch_

SLOTS = 8


@dataclass(frozen=True)
class Case:
    """One op on one shape: what each implementation calls, and the bytes the op must read and write."""

    op: str
    rows: int
    hidden_size: int
    calls: dict[str, Callable[[], Any]]
    moved: int


def make_cases(device: str, dtype: torch.dtype, hidden_size: int, rows: int) -> list[Case]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden_size, generator=g).to(device, dtype)
    vectors = (torch.randn(SLOTS, hidden_size, generator=g) * 1e-3).to(device, dtype)
    directions = torch.nn.functional.normalize(torch.randn(SLOTS, hidden_size, generator=g)).to(device, dtype)
    table = torch.zeros(SLOTS, TABLE_WIDTH)
    table[:, STRENGTH], table[:, THRESHOLD] = 1.0, -2.0  # a cosine never lies below: every gate opens
    table = table.to(device)
    slot = torch.randint(SLOTS, (rows,), generator=g, dtype=torch.int32).to(device)
    sequence = torch.arange(rows, dtype=torch.int32, device=device)
    row = torch.arange(rows, device=device)
    opened, shut = torch.ones(rows, device=device), torch.zeros(rows, device=device)
    live = "triton" if device == "cuda" else "cpp"

    def calls(op: str, in_torch: Callable, public: Callable, *arguments: Any) -> dict[str, Callable[[], Any]]:
        found: dict[str, Callable[[], Any]] = {"torch": lambda: in_torch(*arguments)}
        if implementations(op)[live]:
            found[live] = lambda: getattr(torch.ops.steerfast, op).default(*arguments)
            found[f"{live}, checked"] = lambda: public(*arguments)
        return found

    def steering(values: torch.Tensor, mode: GateMode) -> dict[str, Callable[[], Any]]:
        tensors = (x, slot, sequence, values, opened, vectors, directions, table)
        return calls("steer_", steer_torch_, steer_, *tensors, int(mode), int(Score.COSINE), 0)

    reading = calls("gate", gate_torch, gate, x, row, slot, directions, table, int(Score.COSINE))
    row_bytes = rows * hidden_size * dtype.itemsize
    return [
        Case("gate", rows, hidden_size, reading, row_bytes),
        Case("steer_ latched", rows, hidden_size, steering(opened, GateMode.LATCHED), 2 * row_bytes),
        Case("steer_ latched, shut", rows, hidden_size, steering(shut, GateMode.LATCHED), 0),
        Case("steer_ token", rows, hidden_size, steering(opened, GateMode.TOKEN), 2 * row_bytes),
    ]


def time_on_cpu(case: Case, seconds: float) -> dict[str, list[float]]:
    """Microseconds per call of each implementation, in turns."""
    times: dict[str, list[float]] = {name: [] for name in case.calls}
    for call in case.calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 5:
        for name, call in case.calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def time_on_cuda(case: Case, seconds: float) -> dict[str, list[float]]:
    """Microseconds per call on the device of each implementation, in turns."""
    times: dict[str, list[float]] = {name: [] for name in case.calls}
    for call in case.calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 5:
        events = []
        torch.cuda._sleep(2_000_000)  # about a millisecond: the queue below is full before the first event passes
        for name, call in case.calls.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            start.record()
            call()
            stop.record()
            events.append((name, start, stop))
        torch.cuda.synchronize()
        for name, start, stop in events:
            times[name].append(start.elapsed_time(stop) * 1e3)
    return times


def host_time(call: Callable[[], Any]) -> float:
    """Microseconds the host spends on one asynchronous launch."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        times.append((time.perf_counter() - start) * 1e5)
    torch.cuda.synchronize()
    return statistics.median(times)


def measure(case: Case, device: str, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    times = (time_on_cuda if device == "cuda" else time_on_cpu)(case, seconds)
    plain = statistics.median(times["torch"])
    lines = []
    for name, each in times.items():
        low, *_, high = statistics.quantiles(each, n=5)
        median = statistics.median(each)
        lines.append(
            {
                "op": case.op,
                "implementation": name,
                "dtype": str(dtype).removeprefix("torch."),
                "hidden_size": case.hidden_size,
                "rows": case.rows,
                "median_us": round(median, 2),
                "p20_us": round(low, 2),
                "p80_us": round(high, 2),
                "calls": len(each),
                "bytes": case.moved,
                "gb_per_s": round(case.moved / median / 1e3, 2),
                "ratio_to_torch": round(plain / median, 2),
                **({"host_us": round(host_time(case.calls[name]), 2)} if device == "cuda" else {}),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the steering ops, one JSON line per measurement.")
    parser.add_argument("--json", metavar="FILE", help="also append the lines to FILE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[576, 4096])
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1 16 256, and on CUDA 8192")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each op and shape (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = options.rows or [1, 16, 256, *([8192] if options.device == "cuda" else [])]
    facts = {**machine(), "isa": _native.isa() if options.device == "cpu" else None}
    for hidden_size in options.hidden_sizes:
        for count in rows:
            for case in make_cases(options.device, dtype, hidden_size, count):
                for line in measure(case, options.device, dtype, options.seconds):
                    write({"benchmark": "ops", **line, **facts}, options.json)


if __name__ == "__main__":
    main()

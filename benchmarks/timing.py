"""Time calls of ops that take turns, on a CPU, on a GPU and in a CUDA graph."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from steerfast.evaluation.timing import copy_bandwidth, interleave, turns

__all__ = ["CPU_CACHE", "copy_bandwidth", "host_times", "l2_bytes", "time_in_graph", "time_on_cpu", "time_on_cuda"]

T = TypeVar("T")

CPU_CACHE = 64 << 20  # bytes: twice the last-level cache of common servers' core complexes (32 MiB)
CYCLES_PER_US = 2000  # no GPU of today clocks higher by much: a slower one sleeps longer
GRAPH_CALLS = 32


def time_on_cpu(
    calls: Mapping[str, Callable[[T], Any]], buffers: Sequence[T], warm: bool, seconds: float, least: int = 7
) -> dict[str, list[float]]:
    """Return microseconds per call, at least `least` of each call within about `seconds`.

    Warm: an untimed call precedes each timed call and brings the rows back into the cache. Without it, plain torch's
    temporaries would empty the cache and make the others up to ten times slower. Cold: every call takes the next of
    `buffers`, which together exceed the last-level cache.
    """
    ring = itertools.cycle(buffers)

    def microseconds(call: Callable[[T], Any], number: int) -> float:
        rows = next(ring)
        if warm:
            call(rows)
        start = time.perf_counter_ns()
        call(rows)
        return (time.perf_counter_ns() - start) / 1e3

    timed = {name: partial(microseconds, call) for name, call in calls.items()}
    return interleave(timed, turns(calls, seconds, least))


def time_on_cuda(
    calls: Mapping[str, Callable[[T], Any]], rows: T, warm: bool, seconds: float, least: int = 20
) -> dict[str, list[float]]:
    """Return microseconds per call on the device, by events around it.

    Before the first event the device sleeps longer than the host needs to queue the call, so no gap of the host counts.
    Warm: the same call runs just before. Cold: a read of more than the L2 cache comes between (a read, not a write:
    dirty lines would be written back while the clock runs).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    busy = {name: int(CYCLES_PER_US * (20 + 2 * max(host_times(call, rows, 5)))) for name, call in calls.items()}
    flush = None if warm else torch.ones(l2_bytes(), device="cuda")  # of 4 bytes each
    for order in turns(calls, seconds, least):
        events = []
        for name in order:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if flush is None:
                calls[name](rows)
            else:
                flush.amax()
            torch.cuda._sleep(busy[name])
            start.record()
            calls[name](rows)
            stop.record()
            events.append((name, start, stop))
        torch.cuda.synchronize()
        for name, start, stop in events:
            times[name].append(start.elapsed_time(stop) * 1e3)
    return times


def time_in_graph(calls: Mapping[str, Callable[[T], Any]], rows: T, least: int = 10) -> dict[str, float]:
    """Return median microseconds per call of a CUDA graph that holds the same call many times, warm."""
    graphs = {}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                call(rows)
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in calls}
    for order in turns(calls, least=least):
        events = []
        for name in order:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(100 * CYCLES_PER_US)
            start.record()
            graphs[name].replay()
            stop.record()
            events.append((name, start, stop))
        torch.cuda.synchronize()
        for name, start, stop in events:
            times[name].append(start.elapsed_time(stop) * 1e3 / GRAPH_CALLS)
    return {name: statistics.median(each) for name, each in times.items()}


def host_times(call: Callable[[T], Any], rows: T, count: int) -> list[float]:
    """Return the microseconds of host time of each of `count` asynchronous calls."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call(rows)
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return times


def l2_bytes() -> int:
    """Return the size of the current GPU's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size

"""Timing of calls that take turns, one call each, so that a busy spell hits all of them alike."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")

CPU_CACHE = 64 << 20  # bytes: twice the last-level cache of common servers' core complexes (32 MiB)
CYCLES_PER_US = 2000  # no GPU of today clocks higher by much: a slower one sleeps longer
GRAPH_CALLS = 32


def turns(names: Sequence[str]) -> Iterator[list[str]]:
    """The names in another order in every round: who always follows a copy would always find its cache emptied."""
    order, draw = list(names), random.Random(0)
    while True:
        draw.shuffle(order)
        yield list(order)


def time_on_cpu(
    calls: Mapping[str, Callable[[T], Any]], buffers: Sequence[T], warm: bool, seconds: float, least: int = 7
) -> dict[str, list[float]]:
    """Microseconds per call, at least `least` of each within about `seconds`.

    Warm, a turn is one call that brings the rows back into the cache and one that is timed: without the first, the
    caches that plain torch's temporaries emptied would make the others up to ten times slower. Cold, every call takes
    the next of `buffers`, which together exceed the last-level cache.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    ring = itertools.cycle(buffers)
    end = time.perf_counter() + seconds
    for rounds, order in enumerate(turns(list(calls))):
        if rounds >= least and time.perf_counter() >= end:
            return times
        for name in order:
            call, rows = calls[name], next(ring)
            if warm:
                call(rows)
            start = time.perf_counter_ns()
            call(rows)
            times[name].append((time.perf_counter_ns() - start) / 1e3)
    raise AssertionError("unreachable")


def time_on_cuda(
    calls: Mapping[str, Callable[[T], Any]], rows: T, warm: bool, seconds: float, least: int = 20
) -> dict[str, list[float]]:
    """Microseconds per call on the device, by events around it.

    Before the first event the device is kept busy for longer than the host needs to queue the call, so no gap of the
    host's counts. Warm, the same call ran just before; cold, more than the L2 cache was read in between (read and not
    written: dirty lines would be written back while the clock runs).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    busy = {name: int(CYCLES_PER_US * (20 + 2 * max(host_times(call, rows, 5)))) for name, call in calls.items()}
    flush = None if warm else torch.ones(l2_bytes(), device="cuda")  # of 4 bytes each
    end = time.perf_counter() + seconds
    for rounds, order in enumerate(turns(list(calls))):
        if rounds >= least and time.perf_counter() >= end:
            return times
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
    raise AssertionError("unreachable")


def time_in_graph(calls: Mapping[str, Callable[[T], Any]], rows: T, least: int = 10) -> dict[str, float]:
    """Median microseconds per call of a CUDA graph that holds the same call many times, warm."""
    graphs = {}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                call(rows)
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, order in zip(range(least), turns(list(calls)), strict=False):
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
    """Microseconds the host spends on each of `count` asynchronous calls."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call(rows)
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return times


def l2_bytes() -> int:
    """The size of the current GPU's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size


def copy_bandwidth(device: str) -> float:
    """GB/s (bytes read plus bytes written) of a copy far larger than any cache: the median of a few."""
    source = torch.ones((1 << 30 if device == "cuda" else 256 << 20) // 4, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda b: b[1].copy_(b[0])}
    if device == "cuda":
        target.copy_(source)
        times = time_on_cuda(calls, (source, target), True, 0.0, 15)
    else:
        times = time_on_cpu(calls, [(source, target)], True, 0.0, 7)
    return 2 * source.nbytes / statistics.median(times["copy"]) / 1e3

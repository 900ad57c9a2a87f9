"""Time calls in turns: one call each, in a new order every round, so that a busy spell hits all of them alike."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from steerfast._progress import track
from steerfast.hf.generation import device_of


def turns(names: Iterable[str], seconds: float = 0.0, least: int = 1) -> Iterator[list[str]]:
    """Yield the names in a drawn order each round: at least `least` rounds, and more until `seconds` are over.

    In a fixed order, a call that follows a copy would always find an empty cache.
    """
    order, draw = list(names), random.Random(0)
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= least and time.perf_counter() >= end:
            return
        draw.shuffle(order)
        yield list(order)


def interleave(calls: Mapping[str, Callable[[int], float]], rounds: Iterable[Sequence[str]]) -> dict[str, list[float]]:
    """Return the values of each call, one from each round.

    Args:
        calls: each takes the round's number, from 0, and returns a time.
        rounds: the names in the order of the round, see `turns`.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number, order in enumerate(rounds):
        for name in order:
            found[name].append(calls[name](number))
    return found


def compare(
    calls: Mapping[str, Callable[[int], float]], rounds: int, *, show: bool = False
) -> dict[str, tuple[float, float]]:
    """Return each call's median, and the median of its ratio to the first call, after a call of each for warmth."""
    for call in calls.values():
        call(0)
    times = interleave(calls, track(list(turns(calls, least=rounds)), "latency", show=show))
    base = next(iter(times.values()))
    median = statistics.median
    return {name: (median(own), median(a / b for a, b in zip(own, base, strict=True))) for name, own in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of a call, with its work on the device."""
    synchronize(device)
    start = time.perf_counter_ns()
    call()
    synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def milliseconds_per_token(model: nn.Module, prompt: Sequence[int], tokens: int) -> float:
    """Return the wall time per token of a greedy answer of exactly `tokens` tokens, prompt pass included.

    Args:
        prompt: token ids.
    """
    device = device_of(model)
    ids = torch.tensor([prompt], device=device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    options |= {"num_beams": 1, "max_new_tokens": tokens, "min_new_tokens": tokens}
    generate: Any = model.generate
    return milliseconds(lambda: generate(input_ids=ids, **options), device) / tokens


def copy_bandwidth(device: torch.device | str) -> float:
    """Return GB/s, bytes read plus bytes written, of a copy far larger than any cache: the median of a few."""
    device = torch.device(device)
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    copies = 8 if device.type == "cuda" else 1  # one copy on a GPU is short beside a launch

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    copy()
    times = [milliseconds(copy, device) for _ in range(7)]
    return 2 * copies * source.nbytes / statistics.median(times) / 1e6

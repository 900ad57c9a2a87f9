"""Counters of steering that Prometheus reads at /metrics of this API server."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

from steerfast.vllm import compat

FIELDS = ("steering", "steering_strength", "steering_threshold", "other")
"""The fields for which requests are rejected; ``other``: an unknown key of steerfast, beam search, a session."""
# Cosines lie near 0, dot products of residual rows reach some hundreds.
_SIZES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_BUCKETS = (*(-size for size in reversed(_SIZES)), 0.0, *_SIZES)


class Metrics:
    """The counters of one process. `metrics` makes one: Prometheus refuses a second metric of the same name.

    Their names do not begin with ``vllm:``, because vLLM drops such metrics when it sets up its own.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        def counter(name: str, what: str, label: str = "profile") -> Any:
            return Counter(f"steerfast_{name}", what, [label])

        self._evaluations = counter("gate_evaluations", "Requests whose prompt gate decided.")
        self._firings = counter("gate_firings", "Requests whose prompt gate opened.")
        self._steered = counter(
            "steered_requests", "Requests steered: by an open gate, or a profile without one; not those observed."
        )
        self._nan = counter("nan_scores", "Requests with a gate score that was not a number; they count as fired.")
        self._rejected = counter("rejected_requests", "Requests refused for what they asked of steering.", "field")
        self._score = Histogram(
            "steerfast_gate_score", "Scores that gates decided from, one per deciding layer.", ["profile"],
            buckets=_BUCKETS,
        )  # fmt: skip
        self._slots = Gauge(
            "steerfast_slots_in_use", "Profiles on the device, replaced ones that requests still use included.",
            multiprocess_mode="mostrecent",
        )  # fmt: skip
        self._info = Gauge(
            "steerfast_info", "1: this server steers. A server that did not load the plugin has no such metric.",
            ["version", "vllm", "locked"], multiprocess_mode="mostrecent",
        )  # fmt: skip
        self._profiles: set[str] = set()
        for field in FIELDS:
            self._rejected.labels(field)

    def info(self, version: str, locked: bool) -> None:
        """Show that an engine steers, by this version of steerfast."""
        self._info.labels(version, compat._version(), str(locked).lower()).set(1)

    def know(self, profiles: Iterable[str]) -> None:
        """Show these profiles from the start, at zero."""
        for name in profiles:
            self._profiles.add(name)
            for metric in self._by_profile():
                metric.labels(name)

    def forget(self, profiles: Iterable[str]) -> None:
        """Show these profiles no more. Requests that still run with one are not counted."""
        for name in self._profiles & {*profiles}:
            self._profiles.remove(name)
            for metric in self._by_profile():
                metric.remove(name)

    def _by_profile(self) -> tuple[Any, ...]:
        return self._evaluations, self._firings, self._steered, self._nan, self._score

    def slots(self, count: int) -> None:
        """Note that `count` slots are in use."""
        self._slots.set(count)

    def decided(self, profile: str, fired: bool, scores: Iterable[float], nan: bool, action: str) -> None:
        """Count the decision of one profile for a request; no scores: the profile has no gate."""
        if profile not in self._profiles:
            return
        scores = list(scores)
        if scores or nan:
            self._evaluations.labels(profile).inc()
            self._firings.labels(profile).inc(fired)
            self._nan.labels(profile).inc(nan)
        self._steered.labels(profile).inc(fired and action == "steer")
        for score in scores:
            if not math.isnan(score):
                self._score.labels(profile).observe(score)

    def rejected(self, field: str) -> None:
        """Count a request that was refused for `field`, one of `FIELDS`."""
        self._rejected.labels(field).inc()


@cache
def metrics() -> Metrics:
    """Return the counters of this process."""
    return Metrics()

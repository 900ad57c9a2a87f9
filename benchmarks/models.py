"""Time whole models, unsteered and steered, step by step in turns, against stock and against other packages.

    python benchmarks/models.py               SmolLM2 on a CPU; on CUDA random weights in the shapes of larger models
    python benchmarks/models.py --json        also writes benchmarks/results/models-<device>.jsonl
    python benchmarks/models.py --model NAME  a hub id or folder

The measuring code is that of `steerfast bench` (steerfast/evaluation/latency.py), with its systems. This script adds
systems that steer the same layer as `open-one`: `profiles` (up to 16 distinct profiles in the batch), `hooks`
(steerfast on unpatched layers), `plain-hook` (a forward hook that adds a vector), and `repeng` and `steering-vectors`,
if they can be imported. A peer that cannot be used is a line with the reason under `left_out`.

One JSON line per system and case, small cases first. The cases beyond the time limit or the memory are counted in a
line with `left_out`. A case that fails is a line with `error`, and the exit status is 1.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from peers import PEERS, Peer, like
from report import Report, parser
from rich.console import Console
from torch import Tensor, nn

from steerfast.cli.rendering import latency_table
from steerfast.evaluation import latency
from steerfast.evaluation.latency import STOCK, TimedModel, middle_layer, random_profile, twin
from steerfast.evaluation.timing import copy_bandwidth
from steerfast.hf.fused import is_patched, patch
from steerfast.hf.loading import DEMO_MODEL, load_model
from steerfast.hf.steering import steer
from steerfast.hf.structure import find_decoder

# What transformers' configs of these models say; all have 128 numbers per head.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
        },
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
        },
    ),
}
CONTEXT = 16384  # of the shapes; longer than any prompt here
PROFILES = 16  # distinct profiles in a batch


def random_model(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Make a model of the shape with random weights on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = SHAPES[shape]
    config = AutoConfig.for_model(kind, **settings, max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    config._name_or_path = f"{shape} (random weights)"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def comparisons(model: nn.Module, systems: list[TimedModel]) -> list[TimedModel]:
    """Make ``profiles``, if layers can be patched, ``hooks`` and ``plain-hook``."""
    layer = middle_layer(model)
    profile = random_profile(model, [layer])
    made = []
    if any(is_patched(system.model) for system in systems):
        target = patch(twin(model))
        distinct = tuple(random_profile(model, [layer], seed=seed) for seed in range(PROFILES))
        made.append(TimedModel("profiles", target, steer(target, None), True, distinct))
    hooked, plain = twin(model), twin(model)
    made.append(TimedModel("hooks", hooked, steer(hooked, profile), True))
    vector = like(model, profile.vector[layer])

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])

    find_decoder(plain).layers[layer].register_forward_hook(add)
    return [*made, TimedModel("plain-hook", plain)]


def peers(model: nn.Module, report: Report) -> list[TimedModel]:
    """Make the systems of other packages that add a vector to one layer's output; report the unusable ones."""
    layer = middle_layer(model)
    vector = like(model, random_profile(model, [layer]).vector[layer])

    def build(peer: Peer) -> nn.Module:
        target = twin(model)
        peer.attach(target, {layer: vector})
        return target

    made = [tried(name, lambda peer=peer: build(peer), report, name_of(model)) for name, peer in PEERS.items()]
    return [system for system in made if system is not None]


def tried(package: str, build: Callable[[], nn.Module], report: Report, model: str) -> TimedModel | None:
    """Make the package's system and run it once; None and a line if that fails."""
    try:
        system = TimedModel(f"{package} {version(package)}", build())
        latency.measure([system], 1, 8, seconds=0)
    except Exception as error:  # a package for other versions may fail in any way
        reason = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {reason[0] if reason else ''}"
        report.line({"model": model, "system": package, "left_out": why})
        return None
    return system


def name_of(model: Any) -> str:
    return model.config._name_or_path


def fits(model: Any, batch: int, prompt: int) -> bool:
    """Return whether three copies of the case's keys and values and a layer's widest rows fit."""
    if not torch.cuda.is_available():
        return True
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    needed = batch * prompt * (3 * token + 6 * config.intermediate_size) * model.dtype.itemsize
    torch.cuda.empty_cache()
    return needed < torch.cuda.mem_get_info()[0]


def measure(model: nn.Module, given: Any, report: Report, console: Console, until: float) -> int:
    """Measure all cases of a model, small ones first; return the number of cases left out."""
    modes = ["eager", "compile"] if given.compile else ["eager"]
    systems, reasons = latency.systems(model)
    for name, why in reasons.items():
        report.line({"model": name_of(model), "system": name, "left_out": why})
    systems += [*comparisons(model, systems), *peers(model, report)]
    if given.systems:
        systems = [system for system in systems if system.name.split()[0] in {STOCK, *given.systems}]
    bandwidth = copy_bandwidth(given.device)
    cases = sorted(itertools.product(given.batches, given.prompts), key=lambda case: case[0] * case[1])
    left_out = 0
    for mode, (batch, prompt) in itertools.product(modes, cases):
        too_many = given.most_tokens is not None and batch * prompt > given.most_tokens
        if too_many or time.monotonic() > until or not fits(model, batch, prompt):
            left_out += 1
            continue
        chosen = [s for s in systems if mode == "eager" or not s.name.startswith(tuple(PEERS))]
        try:
            found = latency.measure(chosen, batch, prompt, seconds=given.seconds, mode=mode, bandwidth=bandwidth)
        except Exception as error:
            report.error({"model": name_of(model), "mode": mode, "batch": batch, "prompt": prompt}, error)
            continue
        lines = [{"model": name_of(model), **asdict(result)} for result in found]
        for line in lines:
            report.line({**line, "transformers": version("transformers")})
        console.print(latency_table(lines))
    return left_out


def main() -> int:
    options = parser("Time whole models, one JSON line per system and case.")
    options.add_argument("--model", help=f"hub id, folder or .gguf file (default on a CPU {DEMO_MODEL})")
    options.add_argument("--name", help="what the lines call the model (default: its own name)")
    options.add_argument("--shapes", nargs="+", choices=SHAPES, help="random weights (default on CUDA: all)")
    options.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: of the model; bfloat16")
    options.add_argument("--batches", type=int, nargs="+", help="default 1 4, on CUDA 1 16 64 256")
    options.add_argument("--prompts", type=int, nargs="+", help="default 32 128, on CUDA 128 2048 8192")
    options.add_argument("--seconds", type=float, help="for each case (default 60, on CUDA 3)")
    options.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no case begins (default: none)"
    )
    options.add_argument("--most-tokens", type=int, help="leave out cases of more (default on CUDA 16384)")
    options.add_argument("--systems", nargs="+", metavar="NAME", help="only these and stock (default: all)")
    options.add_argument("--compile", action="store_true", help="also decode steps under torch.compile")
    given = options.parse_args()
    cuda = given.device == "cuda"
    torch.set_num_threads(given.threads)
    given.batches = given.batches or ([1, 16, 64, 256] if cuda else [1, 4])
    given.prompts = given.prompts or ([128, 2048, 8192] if cuda else [32, 128])
    given.seconds = given.seconds if given.seconds is not None else (3.0 if cuda else 60.0)
    given.most_tokens = given.most_tokens or (16384 if cuda else None)

    start = time.monotonic()
    report, console = Report("models", given.device, given.json), Console(stderr=True, width=120)
    wanted = given.shapes or (list(SHAPES) if cuda and given.model is None else [])
    if given.model or not wanted:
        wanted = [given.model or DEMO_MODEL]
    left_out = 0
    for at, name in enumerate(wanted):
        until = start + given.limit * (at + 1) / len(wanted)  # each model its share
        try:
            if name in SHAPES:
                model = random_model(name, given.device, getattr(torch, given.dtype or "bfloat16"))
            else:
                model, _ = load_model(name, dtype=given.dtype or "auto", device=given.device)
            if given.name:
                model.config._name_or_path = given.name
            left_out += measure(model, given, report, console, until)
        except Exception as error:
            report.error({"model": name}, error)
        model = None
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    if left_out:
        report.line({"model": None, "left_out": left_out, "limit_s": given.limit if cuda else None})
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())

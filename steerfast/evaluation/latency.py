"""What steering costs a model: time to the first token, time per output token, memory, against the stock model.

Each system is a model of its own over the same weights. The systems take turns at single steps, in a drawn order: the
prefill of each, then the decode step of each, again and again, so that a busy spell of the machine hits all of them
alike. A ratio is the median over the rounds of a system's time over stock's in the same round; ``control``, a second
stock model, says how far from 1 a ratio lies by chance.

Every decode step is the one after the prompt: the cache is set back before each, outside the clock. So a case has one
context length, and systems share one copy of the prompt's keys and values. A compiled step has a static cache, in which
each is as long as the last: that is set back every 64 steps, or steering would read anew how many tokens it holds, from
the device, before each step, as it does in no answer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import random
import statistics
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from steerfast._progress import track
from steerfast._versions import installed_version
from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf import caches
from steerfast.hf.fused import is_patched, patch
from steerfast.hf.generation import device_of
from steerfast.hf.steering import Steering, steer
from steerfast.hf.structure import find_decoder, identify
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import context_of

STOCK = "stock"
MODES = ("eager", "compile")

_PROFILES = 16  # the most that a batch takes
_OPEN, _SHUT = -2.0, 2.0  # thresholds below and above every cosine
_FAR = 1e30  # the same for a dot product
_LEAST_PREFILLS, _LEAST_STEPS = 3, 20  # rounds, however long they take
_ROOM = 64  # for answer tokens in a static cache
_WARM = 3  # calls before the clock runs; a compiled step records its CUDA graph in the second


@dataclass(frozen=True)
class System:
    """A model to be timed.

    steering: what steers it, where that is steerfast. opens: what its gates must do with any prompt; None: whatever
    they do. profiles: where there are some, the sequences of a batch get them in turn.
    """

    name: str
    model: nn.Module
    steering: Steering | None = None
    opens: bool | None = None
    profiles: tuple[SteeringProfile, ...] = ()


@dataclass(frozen=True)
class Result:
    """A system's figures for one batch size and prompt length.

    ttft_ms, tpot_ms: medians of the prefill with its token, and of a decode step; p99_ms: of a decode step.
    peak_bytes: the most memory during both, with everything else that lies there: on CUDA what torch allocated, on
    Linux the resident memory of the process; None elsewhere. ratio_to_stock: of tpot. floor_ms: what a decode step
    cannot undercut: the bytes of the weights and of the prompt's keys and values, over the bandwidth of a large copy.
    """

    system: str
    mode: str
    batch: int
    prompt: int
    ttft_ms: float
    tpot_ms: float
    p99_ms: float
    tokens_per_s: float
    peak_bytes: int | None
    ratio_to_stock: float | None
    ttft_ratio_to_stock: float | None
    floor_ms: float | None
    prefills: int
    steps: int
    profiles: int


# ---- systems -------------------------------------------------------------------------------------------------------


def twin(model: nn.Module) -> Any:
    """A copy of `model` over the same weights: its modules can be hooked and patched, and no tensor is copied."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def random_profile(model: nn.Module, layers: Sequence[int], *, is_open: bool = True, seed: int = 0) -> SteeringProfile:
    """Random directions and unit vectors that steer `layers`, with a prompt gate in each that opens always or never."""
    identity = identify(model)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, identity.num_layers, identity.hidden_size)
    direction, vector = nn.functional.normalize(torch.randn(shape, generator=generator, device="cpu"), dim=2)
    strength = torch.zeros(identity.num_layers, device="cpu")
    strength[list(layers)] = 1.0
    threshold = torch.full_like(strength, _OPEN if is_open else _SHUT)
    return SteeringProfile(identity, direction, threshold, vector, strength, torch.zeros_like(strength), Gate("prompt"))


def middle_layer(model: nn.Module) -> int:
    """The layer that the systems which steer one layer steer."""
    return len(find_decoder(model).layers) // 2


def systems(model: nn.Module, profile: SteeringProfile | None = None) -> tuple[list[System], dict[str, str]]:
    """What can be made of a stock model, and why the others cannot: name -> reason.

    ``stock``, ``control`` (stock again), ``idle`` (patched, not steered). Without a profile also: ``shut`` (every layer
    has a gate, none opens), ``open-one`` (one layer, in the middle), ``open-all``, ``profiles`` (open-one with up to
    16 distinct profiles in the batch), ``hooks`` (open-one on the layers as they are), ``plain-hook`` (a forward hook
    that adds a vector to one layer's output). With one: ``profile-shut`` and ``profile-open``, the profile with a
    threshold that no score, or every score, exceeds.

    Raises:
        SteerfastError: the model is patched or steered.
        ProfileError: the profile belongs to another model, or steers no layer.
        ArchitectureError: no decoder layers found.
    """
    find_decoder(model).refuse_if_steered()
    if is_patched(model):
        raise SteerfastError("model: expected one that is not patched, got one that is")
    made = [System(STOCK, twin(model)), System("control", twin(model))]
    reasons = {}

    def add(name: str, given: SteeringProfile, fused: bool = True, opens: bool | None = True) -> None:
        target = patch(twin(model)) if fused else twin(model)
        made.append(System(name, target, steer(target, given), opens))

    middle, count = middle_layer(model), len(find_decoder(model).layers)
    one = random_profile(model, [middle])
    try:
        made.append(System("idle", patch(twin(model))))
    except ArchitectureError as error:
        reasons["idle"] = str(error)
    fused = not reasons
    if profile is not None:
        for name, opens in (("profile-shut", False), ("profile-open", True)):
            if profile.gate.kind == "always" and not opens:
                reasons[name] = "the profile has no gate"
            else:
                add(name, _moved(profile, opens), fused, opens)
        return made, reasons
    if fused:
        add("shut", random_profile(model, range(count), is_open=False), opens=False)
        add("open-one", one)
        add("open-all", random_profile(model, range(count)))
        target = patch(twin(model))
        distinct = tuple(random_profile(model, [middle], seed=seed) for seed in range(_PROFILES))
        made.append(System("profiles", target, steer(target, None), True, distinct))
    add("hooks", one, fused=False)
    hooked = twin(model)
    find_decoder(hooked).layers[middle].register_forward_hook(_adding(one.vector[middle], model))
    made.append(System("plain-hook", hooked))
    return made, reasons


def _moved(profile: SteeringProfile, opens: bool) -> SteeringProfile:
    """The profile with a gate that always opens, or never."""
    far = _OPEN if profile.gate.score == "cosine" else -_FAR
    return replace(
        profile, threshold=torch.full_like(profile.threshold, far if opens else -far), abstain=None, answer_tokens=None
    )


def _adding(vector: Tensor, model: nn.Module) -> Callable[..., Any]:
    weight = next(model.parameters())
    vector = vector.to(device=weight.device, dtype=weight.dtype)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])

    return hook


# ---- measuring -----------------------------------------------------------------------------------------------------


def with_own_code(model: Any) -> Any:
    """The model, with a code object of its own for its forward. Systems share their code, and Dynamo would look for the
    graph of one among those of all others before each step: what no process with one model pays.
    """
    shared = type(model).forward
    own = types.FunctionType(
        shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__
    )
    own.__kwdefaults__ = shared.__kwdefaults__
    functools.update_wrapper(own, shared)
    model.forward = types.MethodType(own, model)
    return model


class _Run:
    """One system on one batch: its cache, and the two calls that are timed."""

    def __init__(self, system: System, tokens: Tensor, mode: str) -> None:
        self.system, self.tokens, self.mode = system, tokens, mode
        self.next = tokens[:, :1].clone()
        self.cache: Any = None
        self._cache_name = caches.argument(system.model)
        self.step_model: Any = system.model
        self._most = 1 if mode == "eager" else min(_ROOM, context_of(system.model) - tokens.shape[1])
        self._room = 0  # so many of these steps before the cache is full
        if mode == "compile":
            cuda = tokens.device.type == "cuda"
            self.step_model = torch.compile(with_own_code(system.model), mode="reduce-overhead" if cuda else None)
        self._memory: list[dict[str, Any]] = []

    def new_cache(self) -> None:
        from transformers import DynamicCache, StaticCache

        config: Any = self.system.model.config
        if self.mode == "eager":
            self.cache = DynamicCache(config=config)
        else:
            self.cache = StaticCache(config=config, max_cache_len=self.tokens.shape[1] + self._most)

    def prefill(self) -> None:
        model: Any = self.system.model
        given = {self._cache_name: self.cache}
        logits = model(input_ids=self.tokens, use_cache=True, logits_to_keep=1, **given).logits
        logits[:, -1].argmax(dim=-1)

    def step(self) -> None:
        logits = self.step_model(input_ids=self.next, use_cache=True, **{self._cache_name: self.cache}).logits
        logits[:, -1].argmax(dim=-1)
        self._room -= 1

    def keep(self, other: _Run | None) -> None:
        """Remember the cache as the prompt left it; a growing one holds the keys and values of `other`'s from here."""
        share = other is not None and self.mode == "eager"
        self._memory = other._memory if share and other is not None else [dict(vars(x)) for x in self.cache.layers]
        self._room = 0
        self.rewind()

    def rewind(self) -> None:
        """Make room for a step."""
        if self._room > 0:
            return
        self._room = self._most
        for layer, before in zip(self.cache.layers, self._memory, strict=True):
            vars(layer).update(before)
            if isinstance(length := before.get("cumulative_length"), Tensor):  # a static cache counts in place
                length.fill_(self.tokens.shape[1])

    def cached_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def check(self) -> None:
        steering, opens = self.system.steering, self.system.opens
        if steering is not None and opens is not None and bool((steering.fired != opens).any()):
            raise SteerfastError(f"{self.system.name}: expected every gate {'open' if opens else 'shut'}, got others")


@torch.no_grad()
def measure(
    systems: Sequence[System],
    batch: int,
    prompt: int,
    *,
    seconds: float = 10.0,
    mode: str = "eager",
    bandwidth: float | None = None,
) -> list[Result]:
    """Time all systems on `batch` prompts of `prompt` random tokens, in turns.

    Args:
        systems: of one model, on one device; ratios need `STOCK` among them.
        batch: sequences.
        prompt: tokens of each, none of them padding.
        seconds: about how long to time; half goes to prefills, half to decode steps, at least 3 and 20 rounds.
        mode: ``eager``, or ``compile``: decode steps by torch.compile over a static cache, on CUDA as CUDA graphs.
        bandwidth: GB/s of a large copy, see `copy_bandwidth`, for the floor.

    Raises:
        SteerfastError: the model's context is shorter, or a gate did not do what its system is for.
    """
    if mode not in MODES:
        raise SteerfastError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    model: Any = systems[0].model
    config, device = model.config.get_text_config(), device_of(model)
    context = context_of(model)
    if min(batch, prompt) < 1 or prompt + 1 > context:
        raise SteerfastError(f"prompt: expected 1 to {context - 1} tokens of 1 or more sequences, got {prompt}")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator, device="cpu").to(device)
    with contextlib.ExitStack() as stack:
        runs = {}
        for system in systems:
            if system.profiles and system.steering is not None:
                each = [profile for _, profile in zip(range(batch), itertools.cycle(system.profiles), strict=False)]
                stack.enter_context(system.steering.assigned(each))
            runs[system.name] = _Run(system, tokens, mode)
        stack.enter_context(_no_collector())
        peaks, first = {}, None
        for name, run in runs.items():
            run.new_cache()
            _sync(device)
            with _peak(device) as peak:
                run.prefill()
                run.check()
                run.keep(first)
                for _ in range(_WARM):
                    run.rewind()
                    run.step()
                _sync(device)
            run.rewind()
            peaks[name], first = peak[0], first or run
        steps = _turns({n: (run.rewind, run.step) for n, run in runs.items()}, device, seconds / 2, _LEAST_STEPS)
        for run in runs.values():
            run.rewind()
        cached = 0 if first is None else first.cached_bytes()
        for run in runs.values():
            run.cache, run._memory = None, []
        prefills = _turns(
            {n: (run.new_cache, run.prefill) for n, run in runs.items()}, device, seconds / 2, _LEAST_PREFILLS
        )
    floor = None if bandwidth is None else (_weight_bytes(model) + cached) / bandwidth / 1e6
    results = []
    for name, run in runs.items():
        tpot = statistics.median(steps[name])
        results.append(
            Result(
                system=name,
                mode=mode,
                batch=batch,
                prompt=prompt,
                ttft_ms=round(statistics.median(prefills[name]), 4),
                tpot_ms=round(tpot, 4),
                p99_ms=round(statistics.quantiles(steps[name], n=100, method="inclusive")[98], 4),
                tokens_per_s=round(1e3 * batch / tpot, 2),
                peak_bytes=peaks[name],
                ratio_to_stock=_ratio(steps, name),
                ttft_ratio_to_stock=_ratio(prefills, name),
                floor_ms=None if floor is None else round(floor, 4),
                prefills=len(prefills[name]),
                steps=len(steps[name]),
                profiles=min(batch, len(run.system.profiles)) or int(run.system.steering is not None),
            )
        )
    return results


def _turns(
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], device: torch.device, seconds: float, least: int
) -> dict[str, list[float]]:
    """Milliseconds of each call's second function, once in every round; the first one prepares."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= least and time.perf_counter() >= end:
            break
        draw.shuffle(order)
        for name in order:
            prepare, call = calls[name]
            prepare()
            _sync(device)
            start = time.perf_counter_ns()
            call()
            _sync(device)
            times[name].append((time.perf_counter_ns() - start) / 1e6)
    return times


def _ratio(times: dict[str, list[float]], name: str) -> float | None:
    if STOCK not in times:
        return None
    return round(statistics.median(a / b for a, b in zip(times[name], times[STOCK], strict=True)), 4)


def copy_bandwidth(device: torch.device | str) -> float:
    """GB/s (bytes read plus bytes written) of a copy far larger than any cache: the median of a few."""
    device = torch.device(device)
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = _turns({"copy": (lambda: None, lambda: target.copy_(source))}, device, 0, 7)["copy"]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def _weight_bytes(model: Any) -> int:
    """What a decode step reads of the weights: all, but of an embedding that is no output layer only some rows."""
    output = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    tied = output is not None and output.weight is table
    return sum(weight.nbytes for weight in model.parameters() if tied or weight is not table)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's garbage collector, which would stop some steps and not others."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int | None]]:
    """One number, known when the context is left: the most memory that was in use within."""
    found: list[int | None] = [None]
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
        return
    try:
        reset.write_text("5")
    except OSError:  # not Linux, or not allowed
        yield found
        return
    yield found
    high = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    found[0] = None if high is None else int(high.split()[1]) * 1024


# ---- whole answers -------------------------------------------------------------------------------------------------


def milliseconds_per_token(model: nn.Module, prompt: Sequence[int], tokens: int) -> float:
    """Wall time of a greedy answer of exactly `tokens` tokens to one prompt (token ids), the prompt included."""
    device = device_of(model)
    batch = torch.tensor([prompt], device=device)
    _sync(device)
    started = time.perf_counter()
    model.generate(  # type: ignore[operator]
        input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=False, num_beams=1,
        max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
    )  # fmt: skip
    _sync(device)
    return (time.perf_counter() - started) * 1e3 / tokens


def alternating(runs: Sequence[Callable[[int], float]], rounds: int, progress: bool = False) -> list[list[float]]:
    """What each run gives for each round's number; the runs take turns at being first, and have run once before.

    So a slow moment of the machine falls on one round, and a median of the rounds' ratios does not see it.
    """
    for run in runs:
        run(0)
    found: list[list[float]] = [[0.0] * rounds for _ in runs]
    for number in track(range(rounds), "latency", show=progress):
        for place in range(len(runs)):
            which = (number + place) % len(runs)
            found[which][number] = runs[which](number)
    return found


# ---- the command ---------------------------------------------------------------------------------------------------


def run_bench(
    model: nn.Module,
    profile: SteeringProfile | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 4),
    prompt_lengths: Sequence[int] = (32, 128),
    seconds: float = 10.0,
    mode: str = "eager",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure all `systems` of `model` in every combination of batch size and prompt length.

    Args: as for `systems` and `measure`; seconds are those of one combination.

    Returns:
        JSON data: the fields of `Result` and the model's name, for each, under ``results``; ``left_out`` says which
        systems the model has not and why; versions, device, threads.
    """
    chosen, reasons = systems(model, profile)
    device = device_of(model)
    bandwidth = copy_bandwidth(device)
    name = identify(model).name
    cases = list(itertools.product(batch_sizes, prompt_lengths))
    results = []
    for batch, prompt in track(cases, "measuring", show=progress):
        found = measure(chosen, batch, prompt, seconds=seconds, mode=mode, bandwidth=bandwidth)
        results += [{"model": name, **asdict(result)} for result in found]
    return {
        "model": name,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "copy_gbps": round(bandwidth, 2),
        **{package: installed_version(package) for package in ("steerfast", "torch", "triton", "transformers")},
        "left_out": reasons,
        "results": results,
    }


def render(result: dict[str, Any], console: Console) -> None:
    """Print a result of `run_bench` for people."""
    for _, case in itertools.groupby(result["results"], key=lambda r: (r["batch"], r["prompt"])):
        lines = list(case)
        console.print(case_table(lines))
    console.print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, torch {result['torch']}, transformers "
        f"{result['transformers']}. Ratios to stock are medians over rounds; control is stock again.",
        markup=False,
    )
    for name, reason in result["left_out"].items():
        console.print(f"{name} left out: {reason}", markup=False)


def case_table(lines: Sequence[dict[str, Any]]) -> Table:
    """A table of the systems of one batch size and prompt length."""
    first = lines[0]
    floor = "" if first["floor_ms"] is None else f"; no step below {first['floor_ms']:.3g} ms"
    table = Table(
        title=escape(f"{first['model']}, {first['mode']}, batch {first['batch']}, prompt {first['prompt']}{floor}"),
        title_justify="left",
    )
    table.add_column("system")
    for column in ("first token, ms", "ratio", "token, ms", "p99", "ratio", "tokens/s", "peak, MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        peak, ratios = line["peak_bytes"], (line["ttft_ratio_to_stock"], line["ratio_to_stock"])
        prefill, step = ("" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        table.add_row(
            line["system"] + (f" ({line['profiles']})" if line["profiles"] > 1 else ""),
            f"{line['ttft_ms']:.2f}",
            prefill,
            f"{line['tpot_ms']:.2f}",
            f"{line['p99_ms']:.2f}",
            step,
            f"{line['tokens_per_s']:.1f}",
            "" if peak is None else f"{peak / 2**20:.0f}",
        )
    return table

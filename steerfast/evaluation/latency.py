"""Measure the cost of steering: time to the first token and per output token, against the stock model.

Each system is a model over the same weights. The systems take turns at single steps: the prefill of each, then the
decode step of each, again and again. A ratio is the median over the rounds of a system's time over stock's in the same
round. ``control`` is a second stock model: its ratio differs from 1 by chance alone.

Every decode step is the step after the prompt: the cache is set back before each step, outside the clock. So eager
systems share the prompt's keys and values. A compiled step has a static cache, where every step takes the same time. It
is set back every 64 steps: after a reset, steering reads the cache's length from the device, unlike in a real answer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import statistics
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._progress import track
from steerfast._versions import installed_version
from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.evaluation.timing import copy_bandwidth, interleave, milliseconds, synchronize, turns
from steerfast.hf import caches
from steerfast.hf.fused import is_patched, patch
from steerfast.hf.generation import device_of
from steerfast.hf.steering import Steering, steer
from steerfast.hf.structure import find_decoder, identify
from steerfast.profile import Gate, ModelIdentity, SteeringProfile
from steerfast.text.encoding import context_of

MODES = ("eager", "compile")
STOCK = "stock"

_FAR = {"cosine": 2.0, "dot": 1e30}  # thresholds above every score; the same, negated, is below

_LEAST_PREFILLS, _LEAST_STEPS = 3, 20  # rounds
_ROOM = 64  # for answer tokens in a static cache
_WARM = 3  # calls before the clock runs; a compiled step records its CUDA graph in the second


# -- models to time -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedModel:
    """A model to time.

    steering: steers it, if steerfast does. opens: the state that its gates must have for any prompt; None: any state.
    profiles: the sequences of a batch get these in turn.
    """

    name: str
    model: nn.Module
    steering: Steering | None = None
    opens: bool | None = None
    profiles: tuple[SteeringProfile, ...] = ()


def twin(model: nn.Module) -> Any:
    """Copy `model` over the same weights: its modules can be hooked and patched, no tensor is copied."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def random_profile(
    model: nn.Module | ModelIdentity, layers: Sequence[int], *, is_open: bool = True, seed: int = 0
) -> SteeringProfile:
    """Make random directions and unit vectors that steer `layers`; each prompt gate always or never opens."""
    identity = model if isinstance(model, ModelIdentity) else identify(model)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, identity.num_layers, identity.hidden_size)
    direction, vector = nn.functional.normalize(torch.randn(shape, generator=generator, device="cpu"), dim=2)
    strength = torch.zeros(identity.num_layers, device="cpu")
    strength[list(layers)] = 1.0
    zero = torch.zeros_like(strength)
    return with_fixed_gate(SteeringProfile(identity, direction, zero, vector, strength, zero, Gate("prompt")), is_open)


def middle_layer(model: nn.Module) -> int:
    """Return the layer of the systems that steer one layer."""
    return len(find_decoder(model).layers) // 2


def systems(model: nn.Module, profile: SteeringProfile | None = None) -> tuple[list[TimedModel], dict[str, str]]:
    """Make the systems of a stock model; also return name -> reason for the impossible ones.

    ``stock``, ``control`` (stock again), ``idle`` (patched, not steered). Without a profile also ``shut`` (a gate in
    every layer, none opens), ``open-one`` (the middle layer) and ``open-all``. With a profile ``profile-shut`` and
    ``profile-open``: its threshold lies above, or below, every score. Layers that cannot be patched are hooked.

    Raises:
        SteerfastError: a patched or steered model.
        ProfileError: a profile of another model, or without a steered layer.
        ArchitectureError: no decoder layers found.
    """
    find_decoder(model).refuse_if_steered()
    if is_patched(model):
        raise SteerfastError("model: expected one that is not patched, got one that is")
    made = [TimedModel(STOCK, twin(model)), TimedModel("control", twin(model))]
    reasons = {}
    try:
        made.append(TimedModel("idle", patch(twin(model))))
    except ArchitectureError as error:
        reasons["idle"] = str(error)
    if profile is None:
        everywhere = range(len(find_decoder(model).layers))
        given = {
            "shut": (random_profile(model, everywhere, is_open=False), False),
            "open-one": (random_profile(model, [middle_layer(model)]), True),
            "open-all": (random_profile(model, everywhere), True),
        }
    else:
        given = {"profile-open": (with_fixed_gate(profile, True), True)}
        if profile.gate.kind == "always":
            reasons["profile-shut"] = "the profile has no gate"
        else:
            given = {"profile-shut": (with_fixed_gate(profile, False), False), **given}
    for name, (steered, opens) in given.items():
        target = twin(model) if "idle" in reasons else patch(twin(model))
        made.append(TimedModel(name, target, steer(target, steered), opens))
    return made, reasons


def with_fixed_gate(profile: SteeringProfile, opens: bool) -> SteeringProfile:
    """Return the profile with a gate that always, or never, opens."""
    far = _FAR[profile.gate.score]
    threshold = torch.full_like(profile.threshold, -far if opens else far)
    return replace(profile, threshold=threshold, abstain=None, answer_tokens=None)


def with_own_code(model: Any) -> Any:
    """Give the model's forward a separate code object.

    Systems share their code. Dynamo would search the graphs of all of them before each step: no process with one model
    pays for that.
    """
    shared = type(model).forward
    own = types.FunctionType(
        shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__
    )
    own.__kwdefaults__ = shared.__kwdefaults__
    functools.update_wrapper(own, shared)
    model.forward = types.MethodType(own, model)
    return model


# -- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Hold a system's figures for one batch size and prompt length.

    ttft_ms, tpot_ms: medians of the prefill with its token, and of a decode step; p99_ms: of a decode step.
    ratio_to_stock: of tpot. floor_ms: lower bound of a decode step, the bytes of weights,
    keys and values over the bandwidth of a large copy.
    """

    system: str
    mode: str
    batch: int
    prompt: int
    ttft_ms: float
    tpot_ms: float
    p99_ms: float
    tokens_per_s: float
    ratio_to_stock: float | None
    ttft_ratio_to_stock: float | None
    floor_ms: float | None
    prefills: int
    steps: int
    profiles: int


class _TimedBatch:
    """One system on one batch: its cache, and the prefill and step to time."""

    def __init__(self, system: TimedModel, tokens: Tensor, mode: str) -> None:
        self.system, self.tokens, self.mode = system, tokens, mode
        self.next = tokens[:, :1].clone()
        self.cache: Any = None
        self._cache_name = caches.argument(system.model)
        self.step_model: Any = system.model
        self._most = 1 if mode == "eager" else min(_ROOM, context_of(system.model) - tokens.shape[1])
        self._room = 0  # steps before the cache is full
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

    def warm_up(self, other: _TimedBatch | None) -> None:
        """Prefill, check the gates, run a few steps. Eager batches share `other`'s cache."""
        self.new_cache()
        self.prefill()
        self._check()
        if other is not None and self.mode == "eager":
            self._memory = other._memory
        else:
            self._memory = [dict(vars(layer)) for layer in self.cache.layers]
        for _ in range(_WARM):
            self.rewind()
            self.step()
        synchronize(self.tokens.device)
        self._room = 0
        self.rewind()

    def rewind(self) -> None:
        """Make room for a step: restore the cache that the prompt left."""
        if self._room > 0:
            return
        self._room = self._most
        for layer, before in zip(self.cache.layers, self._memory, strict=True):
            vars(layer).update(before)
            if isinstance(length := before.get("cumulative_length"), Tensor):  # a static cache counts in place
                length.fill_(self.tokens.shape[1])

    def time_step(self, number: int) -> float:
        self.rewind()
        return milliseconds(self.step, self.tokens.device)

    def time_prefill(self, number: int) -> float:
        self.new_cache()
        return milliseconds(self.prefill, self.tokens.device)

    def _check(self) -> None:
        steering, opens = self.system.steering, self.system.opens
        if steering is not None and opens is not None and bool((steering.fired != opens).any()):
            raise SteerfastError(f"{self.system.name}: expected every gate {'open' if opens else 'shut'}, got others")


@torch.no_grad()
def measure(
    systems: Sequence[TimedModel],
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
        seconds: approximate duration: half for at least 3 prefills, half for at least 20 decode steps.
        mode: ``eager``, or ``compile``: decode steps by torch.compile over a static cache, on CUDA as CUDA graphs.
        bandwidth: GB/s of a large copy, see `copy_bandwidth`, for the floor.

    Raises:
        SteerfastError: a prompt longer than the context, or a gate in another state than its system's.
    """
    if mode not in MODES:
        raise SteerfastError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    model: Any = systems[0].model
    context = context_of(model)
    if min(batch, prompt) < 1 or prompt + 1 > context:
        raise SteerfastError(f"prompt: expected 1 to {context - 1} tokens of 1 or more sequences, got {prompt}")
    generator, size = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
    tokens = torch.randint(0, size, (batch, prompt), generator=generator, device="cpu").to(device_of(model))
    with contextlib.ExitStack() as stack:
        for system in systems:
            if system.profiles and system.steering is not None:
                each = list(itertools.islice(itertools.cycle(system.profiles), batch))
                stack.enter_context(system.steering.assigned(each))
        runs = {system.name: _TimedBatch(system, tokens, mode) for system in systems}
        stack.enter_context(_no_collector())
        first = next(iter(runs.values()))
        for run in runs.values():
            run.warm_up(None if run is first else first)
        steps = interleave({n: run.time_step for n, run in runs.items()}, turns(runs, seconds / 2, _LEAST_STEPS))
        first.rewind()
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in first.cache.layers)
        for run in runs.values():
            run.cache, run._memory = None, []
        prefills = interleave(
            {n: run.time_prefill for n, run in runs.items()}, turns(runs, seconds / 2, _LEAST_PREFILLS)
        )
    floor = None if bandwidth is None else round((_weight_bytes(model) + cached) / bandwidth / 1e6, 4)
    return [_result(runs[name], prefills, steps, mode=mode, floor_ms=floor) for name in runs]


def _result(run: _TimedBatch, prefills: dict[str, list[float]], steps: dict[str, list[float]], **fields: Any) -> Result:
    system, (batch, prompt) = run.system, run.tokens.shape
    name = system.name
    tpot = statistics.median(steps[name])
    return Result(
        system=name,
        batch=batch,
        prompt=prompt,
        ttft_ms=round(statistics.median(prefills[name]), 4),
        tpot_ms=round(tpot, 4),
        p99_ms=round(statistics.quantiles(steps[name], n=100, method="inclusive")[98], 4),
        tokens_per_s=round(1e3 * batch / tpot, 2),
        ratio_to_stock=_ratio(steps, name),
        ttft_ratio_to_stock=_ratio(prefills, name),
        prefills=len(prefills[name]),
        steps=len(steps[name]),
        profiles=min(batch, len(system.profiles)) or int(system.steering is not None),
        **fields,
    )


def _ratio(times: dict[str, list[float]], name: str) -> float | None:
    if STOCK not in times:
        return None
    return round(statistics.median(a / b for a, b in zip(times[name], times[STOCK], strict=True)), 4)


def _weight_bytes(model: Any) -> int:
    """Return the bytes of weights that a decode step reads: an embedding that is no output layer is read by row."""
    output = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    tied = output is not None and output.weight is table
    return sum(weight.nbytes for weight in model.parameters() if tied or weight is not table)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Switch off Python's garbage collector, which would stop some steps and not others."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def run_latency(
    model: nn.Module,
    profile: SteeringProfile | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 4),
    prompt_lengths: Sequence[int] = (32, 128),
    seconds: float = 10.0,
    mode: str = "eager",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure all `systems` of `model` for every batch size and prompt length, `seconds` each.

    Returns:
        JSON data: under ``results`` the fields of `Result` and the model's name; under ``left_out`` name -> reason for
        missing systems; versions, device, threads.
    """
    chosen, reasons = systems(model, profile)
    device, name = device_of(model), identify(model).name
    bandwidth = copy_bandwidth(device)
    results = []
    for batch, prompt in track(list(itertools.product(batch_sizes, prompt_lengths)), "measuring", show=progress):
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

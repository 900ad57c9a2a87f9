"""Time a steered decode step in one CUDA graph, through the runtime of the vLLM plugin; vLLM is not needed.

    python benchmarks/serve_graph.py           CUDA: Llama-3.1-8B's shapes, random weights
    python benchmarks/serve_graph.py --json    also writes benchmarks/results/serve-graph-<device>.jsonl
    python benchmarks/serve_graph.py --device cpu --shape tiny
                                               the same code, eager: a check of itself, and launch counts

The decoder does what an engine does: in-place add + RMSNorm, products by cuBLAS (bfloat16, or float8 with the
quantisation in the kernel before), attention over a full cache. Its layers return x and residual as vLLM's do. Declared
layers call `steerfast::serve_`, which edits the residual, and reads x too where a gate may read rows. As in vLLM the
graph is captured before the first request. Then a step decides the gates, and the next step is timed. Profiles have a
prompt gate that reads a mean, at the first layer that they edit.

    stock, control   no plugin, twice
    idle             the middle layer is declared; no request is steered
    shut, open-one   the same, all requests name the profile: its gate is shut or open
    open-all         all layers are edited by one profile
    directory        profiles may come later at all layers; one profile at one layer is loaded, no request is steered
    directory-open   the same, all requests name the profile
    profiles-64      as open-all, 64 profiles take turns over the requests

One JSON line per system and case. The systems take turns, one replay each. `us`: median and 20th/80th percentile of a
step; `more_us`, `ratio`: medians over the rounds of the difference from stock and of the ratio to stock; `floor_us`:
the bytes of weights and cache over the bandwidth of a large copy. A system is an error where its logits equal stock's
though it edits, or differ though it does not.

On a CPU lines with op "serve-launches" count the operations of each layer's `serve_` and of the runtime between steps:
those of steerfast, and all others that would be launches on a GPU. A table of them follows on stderr.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from report import Report, parser, spread
from timing import CYCLES_PER_US, copy_bandwidth
from torch import Tensor
from torch.nn.functional import normalize, rms_norm, scaled_dot_product_attention, silu

from steerfast.evaluation.timing import interleave, turns
from steerfast.kernels.contract import Kinds
from steerfast.profile import Gate, ModelIdentity, SteeringProfile
from steerfast.runtime.span import EditSpan, Entry
from steerfast.vllm.assignment import stack_to_extra
from steerfast.vllm.config import KEY, ServingConfig
from steerfast.vllm.ops import activate, serve_
from steerfast.vllm.worker import WorkerRuntime, WorkerShape

EPS = 1e-5
STRENGTH = 8.0  # of unit vectors, beside rows of norm sqrt(H): seen in bfloat16, too
# Operations that launch nothing on a GPU: views, allocations, and conversions without a copy inside.
FREE = re.compile(
    r"aten::(empty\w*|select|slice|narrow|view\w*|as_strided|(un)?squeeze|expand\w*|t|transpose|permute|unbind|detach"
    r"|alias|resolve_\w+|(_unsafe_|_)?(reshape|view)\w*|(un)?flatten|split\w*|chunk|lift_fresh|unsafe_\w+|to|detach_"
    r"|resize_|contiguous|scalar_tensor)$"
)


@dataclass(frozen=True)
class Dimensions:
    """The shape of a decoder."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def middle(self) -> int:
        return self.layers // 2


SHAPES = {
    "llama-3.1-8b": Dimensions(32, 4096, 14336, 32, 8, 128, 128256),
    "tiny": Dimensions(4, 64, 96, 4, 2, 16, 128),
}


@dataclass(frozen=True)
class System:
    """The steering beside which a step is timed; see the module."""

    name: str
    all_layers: bool = False
    profiles: int = 1
    steered: bool = True
    is_open: bool = True
    directory: bool = False

    @property
    def edits(self) -> bool:
        return self.steered and self.is_open


SYSTEMS = (
    System("idle", steered=False),
    System("shut", is_open=False),
    System("open-one"),
    System("open-all", all_layers=True),
    System("directory", steered=False, directory=True),
    System("directory-open", directory=True),
    System("profiles-64", all_layers=True, profiles=64),
)
STOCK = ("stock", "control")


@dataclass(frozen=True)
class StepCase:
    """One step: sequences, tokens in the cache of each, and the dtype of the weights."""

    weights: str
    context: int
    batch: int

    def record(self) -> dict[str, Any]:
        return {"batch": self.batch, "context": self.context, "weights": self.weights}


class Decoder:
    """A decoder with random weights; `step` is a decode step of all its sequences."""

    def __init__(self, dimensions: Dimensions, weights: str, device: str) -> None:
        d = self.dimensions = dimensions
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        self.narrow = torch.float8_e4m3fn if weights == "fp8" else self.dtype
        self.one = torch.ones((), device=device)
        heads, kv = d.heads * d.head, d.kv_heads * d.head
        self.qkv, self.o, self.up, self.down = (
            [self._weight(*shape).to(self.narrow) for _ in range(d.layers)]
            for shape in ((heads + 2 * kv, d.hidden), (d.hidden, heads), (2 * d.inner, d.hidden), (d.hidden, d.inner))
        )
        self.norms = [torch.ones(d.hidden, device=device, dtype=self.dtype) for _ in range(2 * d.layers + 1)]
        self.head = self._weight(d.vocabulary, d.hidden)
        self.cache = self.embedded = torch.empty(0)

    def _weight(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) * shape[-1] ** -0.5

    def cache_bytes(self, case: StepCase) -> int:
        d = self.dimensions
        return d.layers * case.batch * 2 * d.kv_heads * case.context * d.head * self.dtype.itemsize

    def resize(self, case: StepCase) -> None:
        """Make keys and values for other sequences."""
        d = self.dimensions
        self.cache = torch.empty(0)
        shape = (d.layers, case.batch, 2 * d.kv_heads, case.context, d.head)
        self.cache = torch.empty(shape, device=self.device, dtype=self.dtype).normal_()
        self.embedded = torch.randn(case.batch, d.hidden, device=self.device, dtype=self.dtype)

    @property
    def bytes(self) -> int:
        """Return the bytes that a step must read."""
        weights = (self.qkv, self.o, self.up, self.down, self.norms, [self.head, self.cache])
        return sum(tensor.nbytes for tensor in itertools.chain(*weights))

    def step(self, declared: Mapping[int, bool]) -> Tensor:
        """Return logits [batch, vocabulary]; `declared` layers call the plugin's op, and say whether it reads x."""
        d, batch = self.dimensions, len(self.embedded)
        residual = self.embedded.clone()
        x = torch.zeros_like(residual)
        for layer in range(d.layers):
            qkv = self._product(self._norm(x, residual, 2 * layer, self.narrow), self.qkv[layer])
            query, new = qkv.split((d.heads * d.head, 2 * d.kv_heads * d.head), dim=1)
            cache = self.cache[layer]
            cache[:, :, -1].copy_(new.view(batch, 2 * d.kv_heads, d.head))
            seen = scaled_dot_product_attention(
                query.view(batch, d.heads, 1, d.head), *cache.chunk(2, dim=1), enable_gqa=True
            )
            x = self._product(seen.reshape(batch, -1).to(self.narrow), self.o[layer])
            pair = self._product(self._norm(x, residual, 2 * layer + 1, self.narrow), self.up[layer])
            x = self._product(self._activation(pair), self.down[layer])
            if layer in declared:
                serve_(residual, x if declared[layer] else None, layer)
        return self._norm(x, residual, 2 * d.layers, self.dtype) @ self.head.t()

    def _norm(self, x: Tensor, residual: Tensor, at: int, dtype: torch.dtype) -> Tensor:
        """Add x to the residual, in place, and return the normalised rows in `dtype`."""
        if self.device == "cuda":
            from baselines import add_rms_norm_

            out = x if dtype == x.dtype else torch.empty_like(x, dtype=dtype)
            add_rms_norm_(x, residual, self.norms[at], EPS, out)
            return out
        residual.add_(x)
        return rms_norm(residual, residual.shape[1:], self.norms[at], EPS).to(dtype)

    def _activation(self, pair: Tensor) -> Tensor:
        if self.device == "cuda":
            from baselines import silu_mul

            return silu_mul(pair, self.narrow)
        gate, up = pair.chunk(2, dim=1)
        return (silu(gate) * up).to(self.narrow)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.dtype == self.dtype:
            return x @ weight.t()
        return torch._scaled_mm(x, weight.t(), scale_a=self.one, scale_b=self.one, out_dtype=self.dtype)


class Steering:
    """A worker's runtime with the profiles and the requests of a system."""

    def __init__(self, system: System, decoder: Decoder, batch: int, folder: Path) -> None:
        d = decoder.dimensions
        self.system, self.batch = system, batch
        self.identity = ModelIdentity(name="random", architecture="llama", hidden_size=d.hidden, num_layers=d.layers)
        every = list(range(d.layers))
        edited = every if system.all_layers else [d.middle]
        # Profiles that come later may read rows anywhere; those of a system read them at their sensor.
        self.declared = {
            layer: system.directory or layer == edited[0] for layer in (every if system.directory else edited)
        }
        self.profiles = [self._profile(edited, seed) for seed in range(system.profiles)]
        config = ServingConfig(
            profiles=self._saved(folder),
            default=None,
            locked=False,
            slots=max(32, system.profiles + 1),
            layers=tuple(self.declared),
            kinds=int(Kinds.ANY if system.directory else Kinds.LATCHED_ADD),
            directory=str(folder) if system.directory else None,
            version="",
        )
        shape = WorkerShape(max_rows=max(batch, 8), max_requests=max(batch, 8))
        self.runtime = WorkerRuntime(config, self.identity, self.declared, torch.device(decoder.device), shape)
        self.names = [f"request {number}" for number in range(batch)]

    def _profile(self, edited: list[int], seed: int) -> SteeringProfile:
        model = self.identity
        generator = torch.Generator().manual_seed(seed)
        shape = (2, model.num_layers, model.hidden_size)
        direction, vector = normalize(torch.randn(shape, generator=generator), dim=2)
        strength = torch.zeros(model.num_layers)
        strength[edited] = STRENGTH
        threshold = torch.full_like(strength, -1e4 if self.system.is_open else 1e4)
        return SteeringProfile(
            model=model,
            direction=direction,
            threshold=threshold,
            vector=vector,
            strength=strength,
            norm=torch.zeros_like(strength),
            gate=Gate("prompt", pooling="mean"),
            sensor=edited[0],
            positions="response",
        )

    def _saved(self, folder: Path) -> dict[str, str]:
        paths = {}
        for number, profile in enumerate(self.profiles):
            path = folder / f"{self.system.name}-{number}.safetensors"
            if not path.exists():
                profile.save(str(path))
            paths[f"p{number}"] = str(path)
        return paths

    def admit(self) -> None:
        """Let all requests begin, as a scheduler does."""

        def request(number: int) -> Any:
            slot = number % len(self.profiles)
            stack = (Entry(slot, 1.0, EditSpan.of(self.profiles[slot])),) if self.system.steered else ()
            parameters = SimpleNamespace(extra_args={KEY: stack_to_extra(stack)})
            return SimpleNamespace(req_id=self.names[number], sampling_params=parameters, prompt_token_ids=[0])

        new = [request(number) for number in range(self.batch)]
        self.runtime.begin(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new))

    def step(self, past: int) -> None:
        """Set up a step of one token of each request after `past` tokens."""
        self.runtime.step(self.names, [past] * self.batch, [1] * self.batch, self.batch)


class Played:
    """A system ready to be timed: its graph, or the eager step on a CPU, after its gates have decided.

    Attributes:
        logits: of the timed step.
    """

    def __init__(self, decoder: Decoder, steering: Steering | None) -> None:
        self.steering, self.cuda = steering, decoder.device == "cuda"
        self._run: Callable[[], Tensor] = partial(decoder.step, {} if steering is None else steering.declared)
        if steering is not None:
            activate(steering.runtime)
            steering.runtime.rest()
        self._run()
        if self.cuda:
            self._capture()
        if steering is not None:
            steering.admit()
            steering.step(0)  # the prompt's only token: gates decide
            self._run()
            steering.runtime.launched(None)
            steering.step(1)
        self.logits = self._run().clone()

    def _capture(self) -> None:
        step, stream = self._run, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        self._run = replay

    def microseconds(self, number: int) -> float:
        """Return the time of one step."""
        if not self.cuda:
            if self.steering is not None:
                activate(self.steering.runtime)
            start = time.perf_counter_ns()
            self._run()
            return (time.perf_counter_ns() - start) / 1e3
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200 * CYCLES_PER_US)  # the host is done queuing before it ends
        first.record()
        self._run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) * 1e3


def problem(system: System, played: Played, stock: Played, control: Played) -> str | None:
    """Return why the logits of a system cannot be right; None: they can be."""
    same = torch.equal(played.logits, stock.logits)
    if not bool(played.logits.isfinite().all()):
        return "logits: expected finite numbers"
    if system.edits and same:
        return "logits: expected others than stock's, got the same: no row was edited"
    if not system.edits and not same and torch.equal(control.logits, stock.logits):
        return "logits: expected stock's, got others: a row was edited"
    return None


def measure(decoder: Decoder, case: StepCase, given: Any, report: Report, folder: Path) -> None:
    """Time all systems of a case, and write a line for each."""
    decoder.resize(case)
    played = {name: Played(decoder, None) for name in STOCK}
    wanted = {system.name: system for system in SYSTEMS if not given.systems or system.name in given.systems}
    for name, system in wanted.items():
        record = {"op": "serve-graph", "system": name, **case.record()}
        try:
            one = Played(decoder, Steering(system, decoder, case.batch, folder))
        except Exception as error:
            report.error(record, error)
            continue
        if (why := problem(system, one, played["stock"], played["control"])) is not None:
            report.error(record, RuntimeError(why))
            continue
        played[name] = one
    rounds = turns(played, given.seconds, given.rounds)
    times = interleave({name: one.microseconds for name, one in played.items()}, rounds)
    floor = decoder.bytes / given.bandwidth / 1e3
    for name, each in times.items():
        pairs = list(zip(each, times["stock"], strict=True))
        figures = spread(each)
        steering = played[name].steering
        report.line(
            {
                "op": "serve-graph",
                "system": name,
                **case.record(),
                "declared": 0 if steering is None else len(steering.declared),
                **figures,
                "more_us": round(statistics.median(us - stock for us, stock in pairs), 2),
                "ratio": round(statistics.median(us / stock for us, stock in pairs), 4),
                "floor_us": round(floor, 1),
                "of_floor": round(figures["us"] / floor, 3),
                "rounds": len(each),
            }
        )


# ---- launches ----------------------------------------------------------------------------------------------


def profiled(call: Callable[[], Any]) -> list[Any]:
    """Return the events of a call that no other event holds, in their order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    events = [event for event in profiler.events() if event.cpu_parent is None]
    return sorted(events, key=lambda event: event.time_range.start)


def operations(events: Iterable[Any]) -> Counter[str]:
    """Count what a GPU would launch: ops of steerfast, each once, and the smallest other operations."""
    found: Counter[str] = Counter()
    for event in events:
        if event.name.startswith("steerfast::") and event.name != "steerfast::serve_":
            found["steerfast"] += 1
        elif parts := operations(event.cpu_children):
            found += parts
        elif event.name.startswith("aten::") and not FREE.match(event.name):
            found["other"] += 1
    return found


class OnDevice(Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@dataclass
class Captured:
    """A server in front of a runtime that makes it believe in a capture: it then does what a graph will hold."""

    runtime: WorkerRuntime

    def serve(self, stream: Tensor, addend: Tensor | None, layer: int) -> None:
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            self.runtime.serve(stream.as_subclass(OnDevice), addend, layer)


def count(decoder: Decoder, system: System, folder: Path) -> list[dict[str, Any]]:
    """Return the operations of each layer in a captured pass and in a later eager step, and those between steps."""
    steering = Steering(system, decoder, len(decoder.embedded), folder)
    declared = steering.declared
    steering.runtime.rest()
    activate(Captured(steering.runtime))
    lines = []

    def passed(when: str) -> None:
        served = [event for event in profiled(partial(decoder.step, declared)) if event.name == "steerfast::serve_"]
        for layer, event in zip(sorted(declared), served, strict=True):
            lines.append({"system": system.name, "pass": when, "layer": layer, **operations([event])})

    passed("captured")
    steering.admit()
    for past, when in enumerate(("deciding", "after it", "settled")):
        lines.append({"system": system.name, "between": when, **operations(profiled(partial(steering.step, past)))})
        decoder.step(declared)
        if past == 0:
            steering.runtime.launched(None)
    passed("settled")
    return [{"op": "serve-launches", **line} for line in lines]


def table(lines: list[dict[str, Any]], layers: int) -> str:
    """Return the counts as text, a row for each system and pass: ops of steerfast + others."""
    headings = [f"layer {layer}" for layer in range(layers)]
    rows = [["system", "pass", *headings]]
    for (system, when), group in itertools.groupby(
        [line for line in lines if "pass" in line], key=lambda line: (line["system"], line["pass"])
    ):
        cells = {line["layer"]: f"{line.get('steerfast', 0)} + {line.get('other', 0)}" for line in group}
        rows.append([system, when, *(cells.get(layer, "") for layer in range(layers))])
    between = [line for line in lines if "between" in line]
    rows += [["system", "between steps"]]
    for line in between:
        rows.append([line["system"], line["between"], f"{line.get('steerfast', 0)} + {line.get('other', 0)}"])
    return "\n".join("  ".join(cell.ljust(14) for cell in row).rstrip() for row in rows)


def launches(decoder: Decoder, given: Any, report: Report, folder: Path) -> None:
    """Write the counts of all systems, and a table of them to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports each start otherwise
    lines = []
    for system in SYSTEMS:
        if not given.systems or system.name in given.systems:
            lines += count(decoder, system, folder)
    for line in lines:
        report.line(line)
    print(table(lines, decoder.dimensions.layers), file=sys.stderr)


# ---- the script --------------------------------------------------------------------------------------------


def options() -> Any:
    given = parser("Time a steered decode step in one CUDA graph, one JSON line per system and case.")
    given.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    given.add_argument("--batches", type=int, nargs="+", help="default 1 64 256, tiny 2")
    given.add_argument("--contexts", type=int, nargs="+", help="tokens in the cache (default 1024, tiny 8)")
    given.add_argument("--weights", nargs="+", choices=["bf16", "fp8"], default=["bf16"])
    given.add_argument("--systems", nargs="+", choices=[system.name for system in SYSTEMS], help="default: all")
    given.add_argument("--seconds", type=float, default=4.0, help="of replays for each case (default 4)")
    given.add_argument("--rounds", type=int, default=20, help="at least so many (default 20)")
    given.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case begins")
    result = given.parse_args()
    tiny = result.shape == "tiny"
    result.batches = result.batches or ([2] if tiny else [1, 64, 256])
    result.contexts = result.contexts or ([8] if tiny else [1024])
    return result


@torch.inference_mode()
def main() -> int:
    given = options()
    torch.set_num_threads(given.threads)
    start, left_out = time.monotonic(), 0
    report = Report("serve-graph", given.device, given.json)
    given.bandwidth = copy_bandwidth(given.device)
    report.line({"op": "copy", "gbps": round(given.bandwidth, 1), "shape": given.shape})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for weights in given.weights:
            decoder = Decoder(SHAPES[given.shape], weights, given.device)
            for context, batch in itertools.product(given.contexts, given.batches):
                case = StepCase(weights, context, batch)
                gc.collect()
                decoder.cache = torch.empty(0)
                if time.monotonic() - start > given.limit or not fits(decoder, case):
                    left_out += 1
                    continue
                try:
                    measure(decoder, case, given, report, folder)
                except Exception as error:
                    report.error({"op": "serve-graph", **case.record()}, error)
            if given.device == "cpu" and weights == "bf16":
                launches(decoder, given, report, folder)
            del decoder
    if left_out:
        report.line({"op": None, "left_out": left_out, "limit_s": given.limit})
    return int(report.failed)


def fits(decoder: Decoder, case: StepCase) -> bool:
    """Return whether the cache of a case and 8 GiB for all else fit into the GPU's memory."""
    if decoder.device != "cuda":
        return True
    torch.cuda.empty_cache()
    return decoder.cache_bytes(case) + (8 << 30) < torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    raise SystemExit(main())

"""Time the host's part of a call: the dispatcher, the argument checks, Triton's own launch.

    python benchmarks/launch.py               CUDA where there is one, otherwise one CPU thread
    python benchmarks/launch.py --json        also writes benchmarks/results/launch-<device>.jsonl

One JSON line per op and provider, microseconds of host time per call:

    op           torch.ops.steerfast.<op>, through torch's dispatcher
    unchecked    the function for callers that own their buffers; on CUDA it goes past the dispatcher
    checked      the public function, which checks every argument
    fn[grid]     the same Triton kernel launched as Triton does it (CUDA, fused op)
    torch        the op in plain torch
    empty        an empty Triton kernel with as many arguments, launched as Triton does it (CUDA)

And per half of a decoder layer (op ``seam``, one token, hidden size 576), where the residual add meets the norm:

    stock        torch's add, and the norm of transformers' Llama
    idle         the same in a patched model
    steered      with a profile whose gate is open

And per compiled decode step (op ``step``) of a model of 32 layers with a static cache, whose graph computes nothing:
the checks of `torch.compile` before it, and the hooks around it. On a CPU's tensors, in turns of ten steps; the
systems are those of models.py: ``stock``, ``control``, ``idle``, ``open-one``, ``open-all``.

On CUDA calls are asynchronous and the device is idle when a call begins; on a CPU the time holds the work itself, so it
is also measured on rows of 64 numbers, which take hardly any work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import EPS, FUSED, GATES, STEER, Buffers, Case, Tensors
from report import Report, parser, spread

from steerfast.evaluation.timing import interleave, turns
from steerfast.kernels import add_steer_rms_norm as fused
from steerfast.kernels import gate, steer
from steerfast.kernels.contract import Kinds, Norm
from steerfast.kernels.launch import launch_shape, nvidia

SEAM = 576
STEP = 32  # layers
BATCH = 10  # calls between two looks at the clock: few enough that a GPU's launch queue never fills up


def providers(o: Tensors, b: Buffers) -> dict[str, Callable[[], Any]]:
    """Return calls of the case's op, by name."""
    ops = torch.ops.steerfast
    *tables, kinds = o.operands
    norm = int(Norm.LLAMA)
    arguments: tuple[Any, ...]
    if o.case.op == FUSED:
        arguments = (b.x, b.residual, o.weight, o.operands, EPS, norm)
        flat = (b.x, b.residual, o.weight, *tables, EPS, norm, kinds)
        ways = {
            "op": lambda *_: ops.add_steer_rms_norm.default(*flat),
            "unchecked": fused.add_steer_rms_norm_unchecked,
            "checked": fused.add_steer_rms_norm,
            "torch": fused.add_steer_rms_norm_torch,
        }
        if o.device == "cuda":
            from baselines import empty

            ways["fn[grid]"] = lambda *_: launch_as_triton_does(o, b)
            ways["empty"] = lambda *_: empty(b.x, b.residual, (o.weight, *tables), EPS)
    elif o.case.op == STEER:
        arguments = (b.x, None, o.operands)
        ways = {
            "op": lambda *_: ops.steer_.default(b.x, None, *tables, kinds),
            "unchecked": steer.steer_unchecked_,
            "checked": steer.steer_,
            "torch": steer.steer_torch_,
        }
    else:
        arguments = (b.x, None, o.gate_row, o.gates)
        ways = {
            "op": lambda *_: ops.gate_.default(b.x, None, o.gate_row, *o.gates),
            "unchecked": gate.gate_unchecked_,
            "checked": gate.gate_,
            "torch": gate.gate_torch_,
        }
    return {name: lambda way=way: way(*arguments) for name, way in ways.items()}  # type: ignore[misc]


def seams(device: str) -> dict[str, Callable[[], Any]]:
    """Return the code between two blocks of a Llama, by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from steerfast.evaluation.latency import random_profile
    from steerfast.hf.fused import patch
    from steerfast.hf.steering import steer

    shape = {"hidden_size": SEAM, "num_attention_heads": 9, "intermediate_size": 64, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=2, **shape)
    models = [LlamaForCausalLM(config).to(device).eval() for _ in range(3)]
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    steering = steer(patch(models[2]), random_profile(models[2], [0]))
    with torch.no_grad():
        models[2].generate(token, max_new_tokens=2, min_new_tokens=2, pad_token_id=0)  # what it decided is kept
    x, residual = torch.randn(2, 1, 1, SEAM, device=device)
    stock = models[0].model.norm
    assert steering.fired.all()

    def fused(model: LlamaForCausalLM) -> Callable[[], Any]:
        layers: Any = model.model.layers
        seam, norm = layers[0].steerfast_outer, layers[1].input_layernorm
        return lambda: norm(seam.add(x, residual, True))

    patch(models[1])
    return {"stock": lambda: stock(residual + x), "idle": fused(models[1]), "steered": fused(models[2])}


def steps() -> dict[str, Callable[[], Any]]:
    """Return a compiled decode step without its graph, by system."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    from steerfast.evaluation import latency
    from steerfast.hf import caches

    def free(graph: Any, examples: Any) -> Callable[..., Any]:
        """Return a graph that always returns its first result."""
        given: list[Any] = []

        def run(*inputs: Any) -> Any:
            if not given:
                given.append(graph(*inputs))
            return given[0]

        return run

    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(num_hidden_layers=STEP, vocab_size=64, **shape)
    made, _ = latency.systems(LlamaForCausalLM(config).eval())
    calls = {}
    for system in made:
        if system.name not in ("stock", "control", "idle", "open-one", "open-all"):
            continue
        model: Any = latency.with_own_code(system.model)
        given = {caches.argument(model): StaticCache(config=config, max_cache_len=8)}
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True, **given)
        compiled = torch.compile(model, backend=free)
        calls[system.name] = partial(compiled, input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True, **given)
        for _ in range(3):
            calls[system.name]()
    return calls


def launch_as_triton_does(o: Tensors, b: Buffers) -> None:
    """Launch the kernel of the fused op with the op's arguments, bound and inspected by Triton."""
    shape = launch_shape(o.case.hidden, o.case.dtype)
    normed, new_residual = b.x.new_empty(b.x.shape), b.x.new_empty(b.x.shape)
    tensors = (b.x, b.residual, normed, new_residual, o.weight, o.vectors, o.directions, o.rows, o.values, o.strength)
    constants = (o.case.hidden, shape.block, 1, True, int(Norm.LLAMA), int(Kinds.LATCHED_ADD), False, nvidia(b.x))
    fused.add_steer_rms_norm_kernel[(len(b.x),)](
        *tensors, o.table, None, None, 0, 0, EPS, *constants, num_warps=shape.num_warps, enable_fp_fusion=False
    )


def time_on_host(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Return microseconds per call; the providers take turns of a few calls, each round in a new random order."""

    def microseconds(call: Callable[[], Any], number: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(BATCH):
            call()
        return (time.perf_counter_ns() - start) / BATCH / 1e3

    times = interleave({name: partial(microseconds, call) for name, call in calls.items()}, turns(calls, seconds, 50))
    if device == "cuda":
        torch.cuda.synchronize()
    return times


@torch.inference_mode()
def main() -> int:
    options = parser("Time what a call of an op costs the host, one JSON line per measurement.")
    options.add_argument("--rows", type=int, nargs="+", default=[1])
    options.add_argument("--hidden-sizes", type=int, nargs="+", help="default: 4096, on a CPU also 64")
    options.add_argument("--seconds", type=float, default=1.0, help="for each op and shape (default 1)")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    report = Report("launch", given.device, given.json)
    for hidden in given.hidden_sizes or ([4096] if given.device == "cuda" else [64, 4096]):
        for rows in given.rows:
            for op in (FUSED, STEER, GATES):
                case = Case(op, rows, hidden)
                record = {"rows": rows, "hidden": hidden, "dtype": "bfloat16"}
                operands = Tensors(case, given.device)
                calls = {
                    name: call
                    for name, call in providers(operands, operands.buffers(1)[0]).items()
                    if report.works({"op": op, "provider": name, **record}, call)
                }
                for name, times in time_on_host(calls, given.device, given.seconds).items():
                    report.line({"op": op, "provider": name, **record, **spread(times)})
    for name, times in time_on_host(seams(given.device), given.device, given.seconds).items():
        report.line({"op": "seam", "provider": name, "rows": 1, "hidden": SEAM, "dtype": "float32", **spread(times)})
    with torch.inference_mode(False), torch.no_grad():
        for name, times in time_on_host(steps(), "cpu", given.seconds).items():
            report.line({"op": "step", "provider": name, "layers": STEP, **spread(times)})
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""The eager launch path and warmup, with Triton's real compiler and a driver that only writes down what it is given.

Triton compiles for an sm_90 that need not be there; loading and launching are stubbed. So the tests see each
compilation and each argument, and no GPU has to run anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

STUB = """
import itertools, json, os, time
from types import SimpleNamespace
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches, compilations, loaded = [], [], itertools.count(1)

class Launch:
    def __init__(self, src, metadata):
        self.name = src.name
    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        launches.append((self.name, (x, y, z), stream, function, metadata, arguments))

class Stub:
    launcher_cls = Launch
    utils = SimpleNamespace(
        get_device_properties=lambda device: dict(max_shared_mem=232448, multiprocessor_count=132),
        load_binary=lambda name, kernel, shared, device: (object(), next(loaded), 32, 0, 1024),
        unload_module=lambda module: None)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Stub())
knobs.runtime.jit_post_compile_hook = lambda **event: compilations.append(event["fn"].name)
torch.cuda.current_device = torch._C._cuda_getDevice = lambda: 0
torch.cuda.synchronize = lambda device=None: None
torch._C._cuda_getCurrentRawStream = lambda device: 7

class OnDevice:
    '''A CPU tensor that says it is on device 0: all that a launcher asks of one.'''
    def __init__(self, tensor):
        self.tensor = tensor
    is_cuda, device = True, SimpleNamespace(index=0, type="cuda")
    dtype = property(lambda self: self.tensor.dtype)
    shape = property(lambda self: self.tensor.shape)
    def data_ptr(self): return self.tensor.data_ptr()
    def get_device(self): return 0
    def stride(self, dim=None): return self.tensor.stride() if dim is None else self.tensor.stride(dim)
    def is_contiguous(self): return self.tensor.is_contiguous()
    def new_empty(self, shape): return OnDevice(self.tensor.new_empty(shape))
    def unbind(self): return tuple(map(OnDevice, self.tensor.unbind()))
    def __getitem__(self, index): return OnDevice(self.tensor[index])
    @classmethod
    def __torch_function__(cls, function, types, arguments, keywords=None):
        return OnDevice(function(*(a.tensor for a in arguments), **(keywords or {})))

from steerfast.kernels import add_steer_rms_norm as fused, gate, launch, steer, warmup
from steerfast.kernels.contract import TABLE_WIDTH, GateOperands, Kinds, Norm, Operands

plain = launch.Launcher.plain
slow = []
launch.Launcher.plain = lambda self, *a: slow.append(1) or plain(self, *a)

def on_device(make):
    return lambda *a, device=None, **k: OnDevice(make(*a, **k))

def operands(rows, hidden=512, stack=1, dtype=torch.bfloat16, bank=torch.float32, sequences=3, slots_of_bank=5,
             wide=None, layers=32, layer=0):
    int32 = torch.int32
    x, residual = (OnDevice(torch.zeros(rows, wide or hidden, dtype=dtype)[:, :hidden]) for _ in range(2))
    weight = OnDevice(torch.zeros(hidden, dtype=dtype))
    table = OnDevice(torch.zeros(slots_of_bank, TABLE_WIDTH))
    vectors, directions = (OnDevice(torch.zeros(slots_of_bank, hidden, dtype=bank)) for _ in range(2))
    deciders = sequences * stack
    slots = OnDevice(torch.zeros(rows, stack, dtype=int32))
    scales = OnDevice(torch.zeros(layers, rows, stack))
    read = [torch.zeros(n, dtype=int32) for n in (rows, sequences, (deciders, 3), deciders)]
    read += [torch.zeros(deciders), vectors.tensor, directions.tensor, torch.zeros(layers, slots_of_bank, TABLE_WIDTH)]
    written = [torch.zeros(n) for n in ((rows, stack), deciders, *[(layers, deciders)] * 3)]
    written[2] = written[2].double()
    gates = GateOperands(*map(OnDevice, [*read, *written]), scales, layer)
    of_layer = OnDevice(scales.tensor[layer])
    return SimpleNamespace(**{k: v for k, v in locals().items() if isinstance(v, (OnDevice, GateOperands))})

def run_all(o, kinds=tuple(Kinds), norms=(Norm.LLAMA,), pairs=(False, True)):
    for kind in kinds:
        given = Operands(o.slots, o.of_layer, o.vectors, o.directions, o.table, int(kind))
        for gates in (None, o.gates):
            for norm in norms:
                fused.add_steer_rms_norm_triton(o.x, o.residual, o.weight, given, 1e-5, int(norm), gates)
            for pair in pairs:
                steer.steer_triton_(o.x, o.residual if pair else None, given, gates)
    for pair in pairs:
        gate.score_triton_(o.x, o.residual if pair else None, o.gates)
"""

WARMUP = """
real = torch.zeros, torch.ones, torch.full
torch.zeros, torch.ones, torch.full = map(on_device, real)
torch.set_default_dtype(getattr(torch, os.environ["DEFAULT_DTYPE"]))
count = warmup.warmup(512, stacks=(1, 2), device="cuda")
torch.set_default_dtype(torch.float32)
torch.zeros, torch.ones, torch.full = real
compiled = len(compilations)
compilations.clear()
for rows in (*range(1, 64), *range(64, 4097, 61), 1024, 2048, 4096):
    for stack in (1, 2):
        sizes = dict(sequences=1 + rows % 7, slots_of_bank=1 + rows % 5, layers=17 + rows % 16, layer=rows % 17)
        run_all(operands(rows, stack=stack, **sizes))
print(json.dumps([count, compiled, compilations]))
"""

FAST = """
def described(launch):
    name, grid, stream, function, metadata, arguments = launch
    return [name, grid, stream, [repr(a.data_ptr() if isinstance(a, OnDevice) else a) for a in arguments]]

def step(**which):
    '''What a step launches, and how many of these launches were Triton's own.'''
    launches.clear(), slow.clear()
    run_all(o, **which)
    return [described(l) for l in launches], len(slow)

o = operands(6)
cold = step()
compiled = len(compilations)
warm = step()
step(pairs=(True,))
calls = launch.Launcher.__call__
launch.Launcher.__call__ = None  # plans alone
repeated = step(pairs=(True,))
launch.Launcher.__call__ = calls
seen = []
knobs.runtime.launch_enter_hook.add(seen.append)
hooked = step()
knobs.runtime.launch_enter_hook.remove(seen.append)
everything = [fused.launch, steer.launch, gate.launch]
kept = [len(l.compiled) for l in everything]
for launcher in everything:
    launcher.compiled.clear()
    launcher.plans.clear()
    launcher.reusable = False
off = step()
pairs = step(pairs=(True,))
unkept = [len(l.compiled) for l in everything]
print(json.dumps([cold, warm, repeated, hooked, off, pairs, kept, unkept, compiled, len(compilations)]))
"""

KEYS = """
def kernel_of(o):
    launches.clear()
    steer.steer_triton_(o.x, None, Operands(o.slots, o.of_layer, o.vectors, o.directions, o.table, 0))
    return launches[0]

base = operands(6)
kernel_of(base)
kernel_of(base)
seen = len(compilations)
found = {}
for name, o in {
    "again": operands(900, sequences=9, slots_of_bank=7),
    "dtype": operands(6, dtype=torch.float16),
    "bank": operands(6, bank=torch.bfloat16),
    "hidden": operands(6, hidden=576),
    "stack": operands(6, stack=2),
    "strided by 16": operands(6, wide=528),
    "strided by 32": operands(6, wide=544),
    "strided by 3": operands(6, wide=515),
}.items():
    before = len(compilations)
    kernel_of(o)
    first = len(compilations) - before
    kernel_of(o)
    found[name] = [first, len(compilations) - before - first]
# A residual, or scales, of another dtype never meet a kernel compiled for the dtypes before.
def kernel_of_pair(residual, scales=base.of_layer):
    launches.clear()
    before = len(compilations)
    steer.steer_triton_(
        base.x, residual, Operands(base.slots, scales, base.vectors, base.directions, base.table, 0))
    return launches[0][3], len(compilations) - before
same, wide = (OnDevice(torch.zeros(6, 512, dtype=t)) for t in (torch.bfloat16, torch.float32))
double = OnDevice(torch.zeros(6, 1, dtype=torch.float64))
pairs = [kernel_of_pair(r, t) for r, t in
         ((same, base.of_layer), (wide, base.of_layer), (same, double), (same, base.of_layer), (wide, base.of_layer))]
found["dtypes"] = [len({function for function, _ in pairs}), [count for _, count in pairs]]
# A row that starts between multiples of 16 bytes never meets a kernel compiled for aligned ones.
shifted = operands(6)
shifted.x = OnDevice(torch.zeros(6 * 512 + 1, dtype=torch.bfloat16)[1:].view(6, 512))
before = len(compilations)
kernel_of(shifted)
kernel_of(shifted)
found["misaligned"] = [len(compilations) - before, len(steer.launch.compiled)]
kernel_of(base)
found["kept"] = [len(compilations) - before - 1, len(steer.launch.compiled)]
print(json.dumps(found))
"""

LENGTHS = """
def step(rows):
    '''What a step of other prompts, in another bank of a model with other layers, launches.'''
    launches.clear(), slow.clear()
    run_all(operands(rows, sequences=1 + rows % 7, slots_of_bank=1 + rows % 5, layers=17 + rows % 16, layer=rows % 17))
    return [(l[0], l[1], [a for a in l[-1] if isinstance(a, (int, float)) and abs(a) < 1 << 20]) for l in launches]

step(6)
everything = [fused.launch, steer.launch, gate.launch]
kept = [len(l.compiled) for l in everything]
found = [(step(rows), len(slow)) for rows in range(7, 80)]
fast = [launched for launched, _ in found]
grown = [len(l.compiled) for l in everything]
for launcher in everything:
    launcher.reusable = False
plain_ones = [step(rows) for rows in range(7, 80)]
print(json.dumps([kept, grown, sum(n for _, n in found), fast == plain_ones, len(compilations)]))
"""


def run(script: str, **environment: str) -> Any:
    """What a script prints as JSON, run beside the stub and without Triton's interpreter."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", STUB + script],
        env={**settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("default", ["float32", "bfloat16"])
def test_nothing_compiles_after_warmup(default: str) -> None:
    """Scripts set torch's default dtype to load a model; requests have the dtypes of the contract."""
    count, compiled, later = run(WARMUP, DEFAULT_DTYPE=default)
    # Per stack, of 2 kinds and 2 forms each: the fused op, and with and without a pair steer_; score_ with and without.
    assert count == compiled == 2 * (4 + 2 * (4 + 1))
    assert later == []


def test_fast_path_launches_what_triton_would() -> None:
    *steps, kept, unkept, compiled, all_compiled = run(FAST)
    (cold, _), (warm, _), (repeated, _), (hooked, _), (off, _), (pairs, _) = steps
    assert len(cold) == 4 * (1 + 2) + 2
    assert {name for name, *_ in cold} == {"add_steer_rms_norm_kernel", "steer_kernel", "score_kernel"}
    # Triton's own launch compiles, tells a profiler's hook, and serves who turned the fast path off.
    assert [slow for _, slow in steps] == [14, 0, 0, 14, 14, 9]

    def without_outputs(launches: list[Any]) -> list[Any]:
        """The fused op allocates its two outputs anew: arguments 2 and 3."""
        return [[n, g, s, a[:2] + a[4:] if n.startswith("add") else a] for n, g, s, a in launches]

    for others in (warm, hooked, off):
        assert without_outputs(others) == without_outputs(cold)
    assert without_outputs(repeated) == without_outputs(pairs)
    assert kept == [4, 8, 2]
    assert unkept == [0, 0, 0]
    assert compiled == all_compiled == sum(kept)


def test_a_prompt_of_another_length_takes_the_fast_path() -> None:
    """Numbers of a batch make no other kernel, so the keys of kernels do not grow with the prompts served."""
    kept, grown, slow, same, compiled = run(LENGTHS)
    assert grown == kept == [4, 8, 2]
    assert compiled == sum(kept)
    assert slow == 0
    assert same, "the fast path passed other numbers than Triton"


def test_fast_path_is_off_where_triton_is_untested_or_the_user_says_so() -> None:
    off = "print(json.dumps([l.reusable for l in (fused.launch, steer.launch, gate.launch)]))"
    assert run(off) == [True] * 3
    assert run(off, STEERFAST_FAST_LAUNCH="0") == [False] * 3
    script = (
        "from steerfast.kernels import launch\ntriton.__version__ = '99.0.0'\nprint(json.dumps(launch._reusable()))"
    )
    assert run(script) is False


def test_a_kernel_is_reused_only_for_what_it_was_compiled_for() -> None:
    found = run(KEYS)
    assert found.pop("again") == [0, 0]
    # The next multiple of 16 is the same to Triton's compiler, and a key of its own here.
    assert found.pop("strided by 32") == [0, 0]
    # Each kernel is compiled once, and met by the call it was compiled for alone.
    assert found.pop("dtypes") == [3, [1, 1, 1, 0, 0]]
    # Compiled, not kept for the fast path (10 keys: the base and those below; two strides that compile alike).
    assert found.pop("misaligned") == [1, 11]
    assert found.pop("kept") == [0, 11]
    assert set(found) == {"dtype", "bank", "hidden", "stack", "strided by 16", "strided by 3"}
    assert all(pair == [1, 0] for pair in found.values()), found


DEBUG = """
import logging, torch
from steerfast.kernels import add_steer_rms_norm as fused, gate, launch, steer
from steerfast.kernels.contract import TABLE_WIDTH, GateOperands, Kinds, Operands
lines = []
log = logging.getLogger("steerfast.launch")
log.setLevel(logging.DEBUG)
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
log.addHandler(handler)
x, weight, bank, tables = torch.zeros(3, 8), torch.ones(8), torch.ones(2, 8), torch.zeros(2, 2, TABLE_WIDTH)
def ints(*shape): return torch.zeros(*shape, dtype=torch.int32)
scales, one, each = torch.ones(2, 3, 2), torch.ones(2), torch.ones(2, 2)
given = Operands(ints(3, 2), scales[0], bank, bank, tables[0], int(Kinds.LATCHED_ADD))
gates = GateOperands(
    ints(3), ints(1), ints(2, 3), ints(2), one, bank, bank, tables, scales[1], one, each.double(), each, each, scales)
steer.steer_unchecked_(x, None, given)
gate.score_unchecked_(x, None, gates)
fused.add_steer_rms_norm_unchecked(x, x, weight, given._replace(kinds=int(Kinds.ANY)), 1e-5, 0, gates)
bare = not hasattr(steer.steer_unchecked_, "__wrapped__")
print(json.dumps([bare, lines]))
"""


@pytest.mark.slow
def test_debug_reports_each_launch_and_costs_nothing_without() -> None:
    assert run(DEBUG, STEERFAST_DEBUG="1") == [
        False,
        [
            "steer_: 3 rows, H 8, K 2, LATCHED_ADD, cpu",
            "score_: 3 rows, H 8, K 2, gates, cpu",
            "add_steer_rms_norm: 3 rows, H 8, K 2, ANY, gates, cpu",
        ],
    ]
    assert run(DEBUG, STEERFAST_DEBUG="0") == [True, []]

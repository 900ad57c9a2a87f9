"""gate and steer_, in each implementation that runs here, against the reference and against each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerfast import _native
from steerfast.kernels import contract
from steerfast.kernels import gate as gate_module
from steerfast.kernels import steer as steer_module
from steerfast.kernels.contract import SHARPNESS, STRENGTH, TABLE_WIDTH, THRESHOLD, Edit, GateMode, Score
from steerfast.kernels.gate import gate, gate_torch, gate_triton
from steerfast.kernels.steer import steer_, steer_torch_, steer_triton_

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 111, 576, 769]
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Implementation:
    """One implementation, on one device; `interpreted` where Triton's interpreter stands in for a GPU."""

    name: str
    gate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    steer_: Callable[..., None]
    device: str = "cpu"
    interpreted: bool = False


IMPLEMENTATIONS = [
    Implementation("torch", gate_torch, steer_torch_),
    Implementation("cpp", torch.ops.steerfast.gate.default, torch.ops.steerfast.steer_.default),
    Implementation("triton", gate_triton, steer_triton_, "cuda" if CUDA else "cpu", interpreted=not CUDA),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("torch-cuda", gate_torch, steer_torch_, "cuda"))


def require(implementation: Implementation) -> Implementation:
    if implementation.name == "cpp" and not _native.available:
        pytest.skip(f"the C++ ops are absent: {_native.reason}")
    if implementation.name == "triton":
        if gate_module.triton is None:
            pytest.skip("triton is not installed")
        if implementation.interpreted:
            assert type(gate_module._gate_kernel).__name__ == "InterpretedFunction", (
                "without a GPU, tests/conftest.py must set TRITON_INTERPRET=1 before the kernels are imported"
            )
    return implementation


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda implementation: implementation.name)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return require(request.param)


@dataclass(frozen=True)
class Case:
    """Arguments of both ops. `x` may be a view of rows twice as long."""

    x: torch.Tensor
    row: torch.Tensor
    gate_slot: torch.Tensor
    slot: torch.Tensor
    sequence: torch.Tensor
    values: torch.Tensor
    strength: torch.Tensor
    vectors: torch.Tensor
    directions: torch.Tensor
    table: torch.Tensor

    def run_gate(self, implementation: Implementation, score: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (self.x, self.row, self.gate_slot, self.directions, self.table)
        scores, values = implementation.gate(*(move(t, implementation.device) for t in tensors), score)
        return scores.cpu(), values.cpu()

    def run_steer(
        self, implementation: Implementation, mode: int = GateMode.LATCHED, score: int = Score.COSINE
    ) -> torch.Tensor:
        """The edited rows; the case itself stays as it is."""
        x = move(self.x, implementation.device, copy=True)
        rest = (
            self.slot,
            self.sequence,
            self.values,
            self.strength,
            self.vectors,
            self.directions,
            self.table,
        )
        implementation.steer_(x, *(t.to(implementation.device) for t in rest), mode, score, Edit.ADD)
        return x.cpu()

    def reference_steer(self, mode: int = GateMode.LATCHED, score: int = Score.COSINE) -> torch.Tensor:
        return steer_module.reference(**self.steer_arguments(), gate_mode=mode, score=score)

    def steer_arguments(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if k not in ("row", "gate_slot")}


def move(tensor: torch.Tensor, device: str, copy: bool = False) -> torch.Tensor:
    """The tensor on a device with its row stride, which .to() and .clone() would not keep."""
    if tensor.dim() < 2 or tensor.is_contiguous():
        return tensor.to(device, copy=copy)
    if device == "cpu" and not copy:
        return tensor
    wide = tensor.new_full((tensor.shape[0], tensor.stride(0)), 7.0, device=device)
    return wide[:, : tensor.shape[1]].copy_(tensor)


def make_case(
    rows: int = 6,
    size: int = 576,
    dtype: torch.dtype = torch.float32,
    bank_dtype: torch.dtype | None = None,
    slots: int = 3,
    sequences: int = 4,
    strided: bool = False,
    seed: int = 0,
) -> Case:
    """Random rows. Slot and sequence vary by row, some rows are not steered, and the gates are a mix of hard
    and soft, open, half open and shut."""
    g = torch.Generator().manual_seed(seed)
    bank_dtype = bank_dtype or dtype
    scale = torch.tensor([0.1, 1.0, 30.0])[torch.randint(3, (rows, 1), generator=g)]
    wide = (torch.randn(rows, size * (2 if strided else 1), generator=g) * scale).to(dtype)
    directions = torch.nn.functional.normalize(torch.randn(slots, size, generator=g), dim=1)
    table = torch.zeros(slots, TABLE_WIDTH)
    table[:, THRESHOLD] = torch.randn(slots, generator=g) * 0.1
    table[:, SHARPNESS] = torch.tensor([0.0, 4.0])[torch.randint(2, (slots,), generator=g)]
    table[:, STRENGTH] = torch.randn(slots, generator=g)
    slot = torch.randint(-1, slots, (rows,), generator=g, dtype=torch.int32)
    sequence = torch.randint(sequences, (rows,), generator=g, dtype=torch.int32)
    return Case(
        x=wide[:, :size],
        row=torch.randint(max(rows, 1), (sequences if rows else 0,), generator=g),
        gate_slot=torch.randint(-1, slots, (sequences if rows else 0,), generator=g, dtype=torch.int32),
        slot=slot,
        sequence=torch.where(slot < 0, -1, sequence),
        values=torch.tensor([0.0, 0.3, 1.0])[torch.randint(3, (sequences,), generator=g)],
        strength=torch.tensor([0.0, 1.0, -0.7])[torch.randint(3, (sequences,), generator=g)],
        vectors=torch.randn(slots, size, generator=g).to(bank_dtype),
        directions=directions.to(bank_dtype),
        table=table,
    )


cases = st.builds(
    make_case,
    rows=st.integers(0, 9),
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    bank_dtype=st.sampled_from(DTYPES),
    slots=st.integers(1, 4),
    sequences=st.integers(1, 5),
    strided=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
fuzz = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert torch.equal(bits(a), bits(b)), (a - b).abs().max()


def score_error(case: Case, slot: torch.Tensor, x: torch.Tensor, score: int) -> torch.Tensor:
    """How far float32 may end from the exact scores of rows x [n, H]: 64 roundings of terms and sums."""
    d = case.directions[slot.clamp(min=0).long()].double()
    bound = 64 * 2.0**-24 * (x.double() * d).abs().sum(1)
    return bound if score == Score.DOT else bound / x.double().norm(dim=1).clamp(min=1e-30) + 2.0**-22


def near_threshold(case: Case, slot: torch.Tensor, x: torch.Tensor, score: int) -> torch.Tensor:
    """Hard gates whose exact score lies so close to the threshold that either side is right."""
    columns = case.table[slot.clamp(min=0).long()].double()
    d = case.directions[slot.clamp(min=0).long()].double()
    exact = torch.stack([gate_module.reference_score(a, b, score) for a, b in zip(x.double(), d, strict=True)])
    close = (exact - columns[:, THRESHOLD]).abs() <= score_error(case, slot, x, score)
    return close & (columns[:, SHARPNESS] == 0)


# ---- against the reference ---------------------------------------------------------------------------------


@fuzz
@given(case=cases, score=st.sampled_from(list(Score)))
def test_gate_agrees_with_reference(implementation: Implementation, case: Case, score: Score) -> None:
    scores, values = case.run_gate(implementation, score)
    if not len(case.row):
        assert scores.shape == values.shape == (0,)
        return
    want_scores, want_values = gate_module.reference(
        case.x, case.row, case.gate_slot, case.directions, case.table, score
    )
    assert scores.dtype == values.dtype == torch.float32
    x = case.x[case.row]
    error = score_error(case, case.gate_slot, x, score)
    assert ((scores - want_scores).abs() <= error).all()
    steepest = case.table[:, SHARPNESS].max() / 4
    wrong = (values - want_values).abs() > steepest * error + 1e-6
    assert not (wrong & ~near_threshold(case, case.gate_slot, x, score)).any()


@fuzz
@given(case=cases, mode=st.sampled_from(list(GateMode)), score=st.sampled_from(list(Score)))
def test_steer_agrees_with_reference(implementation: Implementation, case: Case, mode: GateMode, score: Score) -> None:
    y = case.run_steer(implementation, mode, score)
    if not len(y):
        return
    want = case.reference_steer(mode, score)
    # One rounding to the dtype (a truncation where the interpreter stands in for the GPU), float32 around it.
    rounding = torch.finfo(y.dtype).eps * (1 if implementation.interpreted and y.dtype == torch.bfloat16 else 0.501)
    shift = (want - case.x.double()).abs()
    tolerance = rounding * want.abs() + 2.0**-22 * (shift + case.x.double().abs()) + 2.0**-25
    keep = torch.ones(len(y), dtype=torch.bool)
    if mode == GateMode.TOKEN:
        error = score_error(case, case.slot, case.x, score)
        slot = case.slot.clamp(min=0).long()
        moved = case.table[slot, SHARPNESS] / 4 * error + 1e-6
        tolerance += (moved * case.table[slot, STRENGTH].abs())[:, None] * case.vectors[slot].double().abs()
        keep = ~near_threshold(case, case.slot, case.x, score)
    assert ((y.double() - want).abs() <= tolerance)[keep].all()


# ---- implementations against each other --------------------------------------------------------------------


@fuzz
@given(case=cases)
def test_latched_add_has_the_same_bits_everywhere(case: Case) -> None:
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        if implementation.name == "cpp" and not _native.available:
            continue
        if implementation.interpreted and (case.x.dtype == torch.bfloat16 or gate_module.triton is None):
            continue  # the interpreter truncates to bfloat16
        outputs[implementation.name] = case.run_steer(implementation)
    for output in outputs.values():
        assert_same_bits(output, outputs["torch"])


SCRIPT = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
from test_ops import DTYPES, SIZES, IMPLEMENTATIONS, bits, make_case
from steerfast import _native
digest = hashlib.sha256()
for size in (*SIZES, 4096):
    for dtype in DTYPES:
        for bank_dtype in DTYPES:
            case = make_case(7, size, dtype, bank_dtype, seed=size)
            case.x[0, 0], case.x[1, -1] = float("nan"), float("inf")
            for score in (0, 1):
                outputs = [*case.run_gate(IMPLEMENTATIONS[1], score)]
                outputs += [case.run_steer(IMPLEMENTATIONS[1], mode, score) for mode in (0, 1)]
                for output in outputs:
                    digest.update(bits(output.nan_to_num(nan=12345.0)).numpy().tobytes())
print(_native.isa(), digest.hexdigest())
"""


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(folder=os.path.dirname(__file__))
    environment = {**os.environ, "STEERFAST_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_instruction_sets_have_the_same_bits() -> None:
    if not _native.available:
        pytest.skip(f"the C++ ops are absent: {_native.reason}")
    order = ["scalar", "avx2", "avx512"]
    digests = {}
    for isa in order[: order.index(str(_native.isa())) + 1]:
        result = run_with_isa(isa)
        assert result.returncode == 0, result.stderr
        live, digests[isa] = result.stdout.split()
        assert live == isa
    assert len(set(digests.values())) == 1, digests


def test_unknown_instruction_set_is_an_error() -> None:
    if not _native.available:
        pytest.skip(f"the C++ ops are absent: {_native.reason}")
    result = run_with_isa("mmx")
    assert result.returncode != 0
    assert "STEERFAST_CPU_ISA: expected one of " in result.stderr
    assert "got mmx" in result.stderr


# ---- what stays untouched ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", list(GateMode))
def test_rows_left_alone_keep_their_bits(implementation: Implementation, dtype: torch.dtype, mode: GateMode) -> None:
    case = make_case(rows=8, size=111, dtype=dtype, slots=4, sequences=4, strided=True)
    nan = float("nan")
    case.slot[:] = torch.tensor([0, -1, 1, -1, 0, 1, 0, 1])
    case.sequence[:] = torch.tensor([0, -1, 1, 99, 2, 0, 3, 1])
    case.values[:] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    case.strength[:] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    case.table[:2, STRENGTH] = 1.0
    case.table[:2, SHARPNESS] = 0.0
    case.table[0, THRESHOLD], case.table[1, THRESHOLD] = (
        -2.0,
        2.0,
    )  # by token: slot 0 always open, slot 1 never
    case.x[1], case.x[3, 5] = nan, -nan
    case.x[1, 0] = float("inf")
    case.x[3:6, :8] = case.x[[2, 7], :8] = -0.0  # adding a zero would turn some of these into +0.0
    for unused in (2, 3):
        case.vectors[unused] = case.directions[unused] = nan
        case.table[unused] = nan
    y = case.run_steer(implementation, mode)
    # Rows 0 and 6 are edited; 4 has strength 0; by latch 2 and 7 are shut (sequence 1) and 5 is open.
    edited = [0, 5, 6] if mode == GateMode.LATCHED else [0, 6]
    untouched = [r for r in range(8) if r not in edited]
    assert_same_bits(y[untouched], case.x[untouched])
    assert torch.isfinite(y[edited]).all()
    assert (y[edited] != case.x[edited]).any(1).all()


def test_gap_between_strided_rows_is_not_written(implementation: Implementation) -> None:
    case = make_case(rows=3, size=7, strided=True)
    case.slot[:], case.sequence[:], case.values[:], case.strength[:] = 0, 0, 1.0, 1.0
    wide = torch.full((3, 14), 7.0, device=implementation.device)
    x = wide[:, :7].copy_(case.x)
    rest = [t.to(implementation.device) for k, t in case.steer_arguments().items() if k != "x"]
    implementation.steer_(x, *rest, GateMode.LATCHED, Score.COSINE, Edit.ADD)
    assert (wide[:, 7:] == 7.0).all()
    assert (x.cpu() != case.x).any(1).all()


def test_unsteered_sequences_score_zero(implementation: Implementation) -> None:
    case = make_case()
    case.gate_slot[:] = torch.tensor([-1, 1, -1, 2])
    case.row[0], case.row[2] = 0, 2
    case.x[0] = float("nan")
    case.row[1] = case.row[3] = 4
    scores, values = case.run_gate(implementation, Score.COSINE)
    assert scores[[0, 2]].tolist() == values[[0, 2]].tolist() == [0.0, 0.0]
    assert torch.isfinite(scores).all()


# ---- special values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
@pytest.mark.parametrize("score", list(Score))
def test_nan_score_fires(implementation: Implementation, sharpness: float, score: Score) -> None:
    case = make_case()
    case.table[:, SHARPNESS], case.table[:, THRESHOLD] = sharpness, 1e9
    case.gate_slot[:], case.row[:] = 0, torch.tensor([0, 1, 2, 0])
    case.x[0, 3] = float("nan")
    case.x[1, 3], case.x[1, 4] = float("inf"), -float("inf")
    case.directions[0, 3:5] = 0.1
    scores, values = case.run_gate(implementation, score)
    assert scores.isnan().tolist() == [True, True, False, True]
    assert values.tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_nan_row_is_edited_by_token(implementation: Implementation, sharpness: float) -> None:
    case = make_case(rows=2, sequences=1)
    case.slot[:], case.sequence[:], case.strength[:] = 0, 0, 1.0
    case.table[0, SHARPNESS], case.table[0, THRESHOLD], case.table[0, STRENGTH] = sharpness, 1e9, 1.0
    case.x[0, 3] = float("nan")
    y = case.run_steer(implementation, GateMode.TOKEN)
    finite = torch.arange(576) != 3
    assert torch.equal(y[0, finite], (case.x[0] + case.vectors[0])[finite])
    assert y[0, 3].isnan()
    assert_same_bits(y[1], case.x[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_row_scores_zero(implementation: Implementation, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    case.x[2] = 0.0
    case.row[:], case.gate_slot[:], case.table[:, SHARPNESS] = 2, 0, 0.0
    for score in Score:
        case.table[0, THRESHOLD] = -0.5
        scores, values = case.run_gate(implementation, score)
        assert scores.tolist() == [0.0] * 4
        assert values.tolist() == [1.0] * 4
        case.table[0, THRESHOLD] = 0.0  # a score equal to the threshold does not fire
        assert case.run_gate(implementation, score)[1].tolist() == [0.0] * 4


def test_squares_beyond_float16_are_summed(implementation: Implementation) -> None:
    case = make_case(size=111, dtype=torch.float16, rows=1, sequences=1, slots=1)
    case.x[:] = 60000.0
    case.directions[:] = 1 / 111**0.5
    case.row[:], case.gate_slot[:] = 0, 0
    assert case.run_gate(implementation, Score.COSINE)[0].item() == pytest.approx(1.0, abs=1e-3)
    assert case.run_gate(implementation, Score.DOT)[0].item() == pytest.approx(60000 * 111**0.5, rel=1e-3)


def test_sum_beyond_float16_becomes_infinite(implementation: Implementation) -> None:
    case = make_case(size=7, dtype=torch.float16, rows=1, sequences=1, slots=1)
    case.x[:], case.vectors[:] = 60000.0, 60000.0
    case.slot[:], case.sequence[:], case.values[:], case.strength[:], case.table[:, STRENGTH] = (
        0,
        0,
        1.0,
        1.0,
        1.0,
    )
    assert case.run_steer(implementation).isposinf().all()


def test_no_rows_and_no_sequences(implementation: Implementation) -> None:
    case = make_case(rows=0)
    assert case.run_steer(implementation).shape == (0, 576)
    scores, values = case.run_gate(implementation, Score.DOT)
    assert scores.shape == values.shape == (0,)
    case = make_case(rows=2)
    nobody = replace(case, slot=torch.full((2,), -1, dtype=torch.int32), values=torch.ones(0), strength=torch.ones(0))
    assert_same_bits(nobody.run_steer(implementation), case.x)


# ---- same row, same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", list(GateMode))
def test_a_row_does_not_depend_on_its_batch(implementation: Implementation, dtype: torch.dtype, mode: GateMode) -> None:
    rows = 24 if implementation.interpreted else 600
    case = make_case(rows=rows, size=576, dtype=dtype, sequences=rows, seed=1)
    case.table[:, SHARPNESS] = 2.0  # soft gates show a difference in the last bit of a score
    case.strength[:] = 1.0
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    whole, whole_gate = case.run_steer(implementation, mode), gate_of_rows(implementation, case)
    # Plain torch is exact only where it takes no sum and no sigmoid: how it vectorises those varies.
    exact = not implementation.name.startswith("torch")
    same = assert_same_bits if exact or mode == GateMode.LATCHED else torch.testing.assert_close
    same_gate = assert_same_bits if exact else torch.testing.assert_close
    picks = [
        order,
        torch.arange(rows - 1, -1, -1),
        order[:5],
        order[:17],
        *(order[i : i + 1] for i in range(3)),
    ]
    for pick in picks:
        part = replace(case, x=case.x[pick], slot=case.slot[pick], sequence=case.sequence[pick])
        same(part.run_steer(implementation, mode), whole[pick])
        same_gate(gate_of_rows(implementation, part), whole_gate[:, pick])
    repeated = replace(case, x=case.x.repeat(2, 1), slot=case.slot.repeat(2), sequence=case.sequence.repeat(2))
    same(repeated.run_steer(implementation, mode), torch.cat([whole, whole]))


def gate_of_rows(implementation: Implementation, case: Case) -> torch.Tensor:
    """Scores and values of a gate at every row of the case."""
    every = replace(case, row=torch.arange(len(case.x)), gate_slot=case.slot)
    return torch.stack(every.run_gate(implementation, Score.COSINE))


@pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
def test_threads_change_no_bit() -> None:
    case = make_case(rows=700, size=1001, dtype=torch.bfloat16, seed=3)  # more than 1 MiB: goes to the thread pool
    cpp = IMPLEMENTATIONS[1]
    single = [case.run_steer(cpp, mode) for mode in GateMode]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for mode, output in zip(GateMode, single, strict=True):
            assert_same_bits(case.run_steer(cpp, mode), output)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(single[0], case.run_steer(IMPLEMENTATIONS[0]))


# ---- torch's own machinery ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if CUDA else [])])
def test_opcheck(device: str) -> None:
    case = make_case(dtype=torch.bfloat16)
    tensors = [t.to(device) for t in (case.x, case.row, case.gate_slot, case.directions, case.table)]
    torch.library.opcheck(torch.ops.steerfast.gate.default, (*tensors, 1))
    arguments = [t.to(device) for t in case.steer_arguments().values()]
    for mode in GateMode:
        torch.library.opcheck(torch.ops.steerfast.steer_.default, (*arguments, int(mode), 1, 0))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if CUDA else [])])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_with_free_row_count(device: str, backend: str) -> None:
    def block(x: torch.Tensor, row: torch.Tensor, gate_slot: torch.Tensor, *rest: torch.Tensor) -> Any:
        slot, sequence, strength, vectors, directions, table = rest
        h = x + 1
        values = gate(h, row, gate_slot, directions, table, Score.COSINE)[1]
        steer_(h, slot, sequence, values, strength, vectors, directions, table)
        steer_(h, slot, sequence, values, strength, vectors, directions, table, GateMode.TOKEN, Score.DOT)
        return h * 2, values

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 9):
        case = make_case(rows=rows, dtype=torch.bfloat16)
        rest = [case.slot, case.sequence, case.strength, case.vectors, case.directions, case.table]
        arguments = [t.to(device) for t in (case.x, case.row, case.gate_slot, *rest)]
        for got, want in zip(compiled(*arguments), block(*arguments), strict=True):
            assert torch.equal(got, want)


def test_gradient_passes_through() -> None:
    case = make_case()
    arguments = case.steer_arguments()
    w = torch.randn(arguments.pop("x").shape, requires_grad=True)
    x = w * 2
    steer_(x, **arguments)
    x.sum().backward()
    assert (w.grad == 2).all()
    x = w.exp()  # its backward pass saved the value that the edit overwrites
    steer_(x, **arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_replayed_graph_follows_its_buffers() -> None:
    case = make_case(dtype=torch.bfloat16)
    arguments = {k: v.cuda() for k, v in case.steer_arguments().items()}
    source, x = arguments["x"].clone(), arguments["x"]
    steer_(**arguments)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(source)
        steer_(**arguments)
    for shift in range(3):
        arguments["slot"].copy_((case.slot + shift) % 4 - 1)
        arguments["sequence"].fill_(shift)
        arguments["vectors"].mul_(-1.5)
        graph.replay()
        expected = source.clone()
        steer_(**{**arguments, "x": expected})
        assert torch.equal(x, expected)


# ---- dispatch and arguments --------------------------------------------------------------------------------


def test_implementations_name_what_is_live() -> None:
    for op in ("gate", "steer_"):
        live = contract.implementations(op)
        assert live == {
            "triton": CUDA and gate_module.triton is not None,
            "cpp": _native.available,
            "torch": True,
        }


def test_public_functions_reach_the_live_implementation() -> None:
    case = make_case(dtype=torch.bfloat16)
    x = case.x.clone()
    steer_(**{**case.steer_arguments(), "x": x})
    assert_same_bits(x, case.run_steer(IMPLEMENTATIONS[1 if _native.available else 0]))
    scores, values = gate(case.x, case.row, case.gate_slot, case.directions, case.table, Score.COSINE)
    want = case.run_gate(IMPLEMENTATIONS[1 if _native.available else 0], Score.COSINE)
    assert_same_bits(scores, want[0])
    assert_same_bits(values, want[1])


INT = torch.int32
WRONG_STEER: list[tuple[str, Any, type[Exception], str]] = [
    ("x", torch.zeros(6), ValueError, r"x: expected 2 dimensions \[rows, H\], got shape \[6\]"),
    (
        "x",
        torch.zeros(6, 576).double(),
        TypeError,
        "x: expected float32 or bfloat16 or float16, got torch.float64",
    ),
    ("x", torch.zeros(6, 0), ValueError, "x: expected a hidden size from 1 to 32768, got 0"),
    ("x", torch.zeros(6, 32769), ValueError, "x: expected a hidden size from 1 to 32768, got 32769"),
    (
        "x",
        torch.zeros(576, 6).t(),
        ValueError,
        r"x: expected stride 1 in the last dimension, got strides \[1, 6\]",
    ),
    (
        "x",
        torch.zeros(576).expand(6, 576),
        ValueError,
        r"x: expected rows that do not overlap, got strides \[0, 1\]",
    ),
    ("slot", torch.zeros(6), TypeError, "slot: expected int32, got torch.float32"),
    ("slot", torch.zeros(5, dtype=INT), ValueError, r"slot: expected shape \[6\], got \[5\]"),
    (
        "slot",
        torch.zeros(12, dtype=INT)[::2],
        ValueError,
        r"slot: expected a contiguous tensor, got strides \[2\]",
    ),
    (
        "slot",
        torch.zeros(6, dtype=INT, device="meta"),
        ValueError,
        "slot: expected device cpu like x, got meta",
    ),
    ("sequence", torch.zeros(7, dtype=INT), ValueError, r"sequence: expected shape \[6\], got \[7\]"),
    ("sequence", torch.zeros(6, dtype=torch.int64), TypeError, "sequence: expected int32, got torch.int64"),
    ("values", torch.zeros(4).bfloat16(), TypeError, "values: expected float32, got torch.bfloat16"),
    ("values", torch.zeros(2, 2), ValueError, r"values: expected shape \[4\], got \[2, 2\]"),
    ("strength", torch.zeros(3), ValueError, r"strength: expected shape \[4\], got \[3\]"),
    ("vectors", torch.zeros(3, 575), ValueError, r"vectors: expected shape \[3, 576\], got \[3, 575\]"),
    ("vectors", torch.zeros(3, 1152)[:, :576], ValueError, r"vectors: expected a contiguous tensor"),
    (
        "directions",
        torch.zeros(3, 576).half(),
        TypeError,
        "directions: expected the dtype of vectors, torch.float32",
    ),
    ("directions", torch.zeros(2, 576), ValueError, r"directions: expected shape \[3, 576\], got \[2, 576\]"),
    ("table", torch.zeros(3, 7), ValueError, r"table: expected shape \[3, 8\], got \[3, 7\]"),
    ("table", torch.zeros(0, 8), ValueError, r"table: expected at least one slot, got shape \[0, 8\]"),
    ("table", torch.zeros(3, 8).half(), TypeError, "table: expected float32, got torch.float16"),
    ("gate_mode", 2, ValueError, r"gate_mode: expected one of LATCHED \(0\), TOKEN \(1\), got 2"),
    ("score", -1, ValueError, r"score: expected one of DOT \(0\), COSINE \(1\), got -1"),
    ("edit", 1, ValueError, r"edit: expected one of ADD \(0\), got 1"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), WRONG_STEER, ids=lambda v: v if isinstance(v, str) else ""
)
def test_steer_names_the_wrong_argument(name: str, value: Any, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {**make_case().steer_arguments(), name: value}
    with pytest.raises(error, match=message):
        steer_(**arguments)


WRONG_GATE: list[tuple[str, Any, type[Exception], str]] = [
    ("x", torch.zeros(0, 576), ValueError, "x: expected at least one row for 4 sequences, got none"),
    ("row", torch.zeros(4, dtype=INT), TypeError, "row: expected int64, got torch.int32"),
    ("row", torch.zeros(2, 2, dtype=torch.int64), ValueError, r"row: expected shape \[4\], got \[2, 2\]"),
    ("slot", torch.zeros(3, dtype=INT), ValueError, r"slot: expected shape \[4\], got \[3\]"),
    ("directions", torch.zeros(3, 5), ValueError, r"directions: expected shape \[3, 576\], got \[3, 5\]"),
    ("table", torch.zeros(3), ValueError, r"table: expected shape \[3, 8\], got \[3\]"),
    ("score", 2, ValueError, r"score: expected one of DOT \(0\), COSINE \(1\), got 2"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), WRONG_GATE, ids=lambda v: v if isinstance(v, str) else ""
)
def test_gate_names_the_wrong_argument(name: str, value: Any, error: type[Exception], message: str) -> None:
    case = make_case()
    arguments: dict[str, Any] = {
        "x": case.x,
        "row": case.row,
        "slot": case.gate_slot,
        "directions": case.directions,
        "table": case.table,
        "score": 1,
        name: value,
    }
    with pytest.raises(error, match=message):
        gate(**arguments)


@pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slot", 3, "slot: expected an index from 0 to 2, got 3"),
        ("sequence", 4, "sequence: .* from 0 to 3, got 4"),
    ],
)
def test_cpp_refuses_an_index_out_of_range(name: str, value: int, message: str) -> None:
    case = make_case()
    case.slot[:], case.sequence[:] = 0, 0
    getattr(case, name)[2] = value
    before = case.x.clone()
    with pytest.raises(RuntimeError, match=message):
        steer_(**case.steer_arguments())
    assert torch.equal(case.x, before)


@pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
def test_cpp_refuses_a_row_out_of_range() -> None:
    case = make_case()
    case.gate_slot[:] = 0
    case.row[1] = 6
    with pytest.raises(RuntimeError, match="row: expected an index from 0 to 5, got 6 at position 1"):
        gate(case.x, case.row, case.gate_slot, case.directions, case.table, Score.DOT)

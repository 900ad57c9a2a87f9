"""Bits: equal between implementations where no sum is taken, and of a row the same in any batch, order and address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CPP,
    DTYPES,
    IMPLEMENTATIONS,
    Case,
    Implementation,
    assert_same_bits,
    make_case,
)

from steerfast import _native
from steerfast.kernels.contract import SHARPNESS, EditId, GateKind, Kinds, Norm, Score

pytestmark = pytest.mark.contract

needs_cpp = pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run_all(implementation: Implementation, case: Case) -> dict[str, torch.Tensor]:
    """The outputs of every op; gates of one whole row each."""
    every = replace(
        case,
        row=torch.arange(len(case.x), dtype=torch.int32),
        slot=case.rows[:, 1:].contiguous(),
        scores=torch.zeros(len(case.x), case.rows.shape[1] - 1),
        values=torch.zeros(len(case.x), case.rows.shape[1] - 1),
    )
    names = ("scores", "values", "x", "normed", "new_residual")
    outputs = (*every.run_gate(implementation), case.run_steer(implementation), *case.run_norm(implementation))
    return dict(zip(names, outputs, strict=True))


# ---- between implementations -------------------------------------------------------------------------------


@fuzz
@given(
    case=st.builds(
        make_case,
        rows=st.integers(0, 6),
        size=st.sampled_from([1, 7, 111, 576, 769]),
        dtype=st.sampled_from(DTYPES),
        bank_dtype=st.sampled_from(DTYPES),
        stack=st.integers(0, 4),
        gates=st.just((GateKind.ALWAYS, GateKind.PROMPT)),
        edits=st.just((EditId.ADD,)),
        kinds=st.sampled_from(Kinds),
        norm=st.sampled_from(Norm),
        strided=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_additions_have_the_same_bits_everywhere(case: Case) -> None:
    steered, residuals = [], []
    for implementation in IMPLEMENTATIONS:
        if implementation.obstacle() is None and not implementation.truncates(case.x.dtype):
            for kinds in Kinds:  # a table of additions means the same to both
                steered.append(replace(case, kinds=kinds).run_steer(implementation))
                residuals.append(replace(case, kinds=kinds).run_norm(implementation)[1])
    assert len(steered) >= 2
    for outputs in (steered, residuals):
        for output in outputs[1:]:
            assert_same_bits(output, outputs[0])


SCRIPT = """
import hashlib, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from kernel_cases import CPP, DTYPES, Kinds, Norm, bits, make_case
from steerfast import _native
digest = hashlib.sha256()
for size in (1, 7, 111, 576, 769, 4096):
    for dtype in DTYPES:
        for bank_dtype in DTYPES:
            for pair in (False, True):
                case = make_case(7, size, dtype, bank_dtype, stack=3, slots=6, pair=pair, seed=size,
                                 norm=Norm(size % len(Norm)), shared=True)
                case.x[0, 0], case.x[1, -1] = float("nan"), float("inf")
                for output in (*case.run_gate(CPP), case.run_steer(CPP), *case.run_norm(CPP), *case.run_prompt(CPP)):
                    digest.update(bits(output.nan_to_num(nan=12345.0)).numpy().tobytes())
print(_native.isa(), digest.hexdigest())
"""


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(folder=os.path.dirname(__file__))
    environment = {**os.environ, "STEERFAST_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


@needs_cpp
def test_instruction_sets_have_the_same_bits() -> None:
    order = ["scalar", "avx2", "avx512"]
    digests = {}
    for isa in order[: order.index(str(_native.isa())) + 1]:
        result = run_with_isa(isa)
        assert result.returncode == 0, result.stderr
        live, digests[isa] = result.stdout.split()
        assert live == isa
    assert len(set(digests.values())) == 1, digests


@needs_cpp
def test_unknown_instruction_set_is_an_error() -> None:
    result = run_with_isa("mmx")
    assert result.returncode != 0
    assert "STEERFAST_CPU_ISA: expected one of " in result.stderr
    assert "got mmx" in result.stderr


# ---- nothing to do is no change ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", Kinds)
def test_a_row_that_is_not_displaced_is_as_without_slots(
    implementation: Implementation, dtype: torch.dtype, kinds: Kinds
) -> None:
    case = make_case(4, 111, dtype, stack=2, edits=(EditId.CLAMP, EditId.ROTATE, EditId.ADD), norm=Norm.VLLM, seed=5)
    case = replace(case, kinds=kinds)
    case.rows[:] = torch.tensor([[0, 0, 1], [1, 1, 2], [2, 2, 0], [3, 1, 1]])
    case.strength[:], case.values[:] = 1.0, 1.0
    none = replace(case, rows=case.rows[:, :1].contiguous(), values=case.values[:, :0], strength=case.strength[:, :0])
    weak, shut = case.plain(STRENGTH=0.0), case.plain(GATE=GateKind.PROMPT)
    unable = replace(case, strength=torch.full_like(case.strength, float("inf")))
    unable = replace(unable, table=shut.table, values=torch.zeros_like(case.values))
    want = none.run_norm(implementation)
    same = [
        replace(case, rows=torch.full_like(case.rows, -1)),
        replace(case, strength=torch.zeros_like(case.strength)),
        weak,
        replace(shut, values=torch.zeros_like(case.values)),
        unable,  # a shut gate wins over an infinite strength
    ]
    for other in same:
        for got, plain in zip(other.run_norm(implementation), want, strict=True):
            assert_same_bits(got, plain)
        assert_same_bits(other.run_steer(implementation), case.x)
    assert_same_bits(none.run_steer(implementation), case.x)
    assert not torch.equal(case.plain().run_norm(implementation)[1], want[1])
    if not implementation.truncates(dtype):
        assert_same_bits(want[1], (case.x.float() + case.residual.float()).to(dtype))


# ---- same row, same bits -----------------------------------------------------------------------------------


def soft(case: Case) -> Case:
    """Soft gates and full strength: they show a difference in the last bit of a score."""
    case.table[:, SHARPNESS], case.strength[:] = 2.0, 1.0
    return case


def same(implementation: Implementation) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Plain torch is exact only where it takes no sum and no sigmoid: how it vectorises those varies.

    On a GPU a normalised row in float16, and its product with the weight, may each be rounded to the neighbour.
    """

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        two_roundings = {"rtol": 2 * torch.finfo(a.dtype).eps, "atol": 1e-5}
        on_gpu = implementation.device.startswith("cuda") and a.dtype == torch.float16
        torch.testing.assert_close(a, b, equal_nan=True, **(two_roundings if on_gpu else {}))

    return close if implementation.name.startswith("torch") else assert_same_bits


@pytest.mark.parametrize("kinds", Kinds)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(implementation: Implementation, dtype: torch.dtype, kinds: Kinds) -> None:
    rows = 9 if implementation.interpreted else 4096
    stack, equal = (1 if implementation.interpreted else 2), same(implementation)
    case = soft(make_case(rows, 321, dtype, stack=stack, slots=8, sequences=rows, kinds=kinds, pair=True, seed=1))
    whole = run_all(implementation, case)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    picks = [order, torch.arange(rows - 1, -1, -1), *(order[i : i + 1] for i in range(3))]
    picks += [torch.arange(4)] if implementation.interpreted else [torch.arange(256), order[:1024], order[:17]]
    picks += [torch.arange(rows).repeat(2)] if implementation.interpreted else []
    for pick in picks:
        for name, output in run_all(implementation, case.select(pick)).items():
            equal(output, whole[name][pick])
    if kinds == Kinds.LATCHED_ADD:
        assert_same_bits(case.select(order).run_steer(implementation), whole["x"][order])


def test_prompt_does_not_depend_on_its_batch(implementation: Implementation) -> None:
    rows = 8 if implementation.interpreted else 2048
    sequences = rows // 4
    case = make_case(rows, 321, torch.float16, stack=2, slots=8, sequences=sequences, shared=True, seed=3)
    case = soft(case)
    whole = case.run_prompt(implementation)
    g = torch.Generator().manual_seed(4)
    for count in (rows, rows, rows // 2 if implementation.interpreted else 257):
        kept = torch.randperm(rows, generator=g)[:count]
        place = torch.full((rows + 1,), -1, dtype=torch.int32)  # of each row in the new batch; of row -1 too: -1
        place[kept] = torch.arange(count, dtype=torch.int32)
        deciding = place[case.deciding]
        # Without its deciding row in the batch, a sequence is judged by the latch that row left.
        gone = (case.deciding >= 0) & (deciding < 0)
        part = replace(case.select(kept), deciding=deciding)
        part.values[gone], part.scores[gone] = whole[3][gone], whole[2][gone]
        equal = same(implementation)
        for got, want in zip(
            part.run_prompt(implementation), (whole[0][kept], whole[1][kept], *whole[2:]), strict=True
        ):
            equal(got, want)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (2, 3), (0, 3)], ids=str)
def test_rows_of_sequences_are_the_same_rows(implementation: Implementation, shape: tuple[int, int]) -> None:
    case = make_case(shape[0] * shape[1], 321, torch.bfloat16, stack=2, slots=6, pair=True, seed=7)
    x, residual = (t.view(*shape, 321) for t in (case.x, case.residual))
    together = replace(case, x=x, residual=residual).run_norm(implementation)
    for got, want in zip(together, case.run_norm(implementation), strict=True):
        assert got.shape == x.shape
        assert got.is_contiguous()
        assert_same_bits(got.flatten(0, 1), want)


@needs_cpp
def test_rows_of_sequences_with_gaps_are_refused() -> None:
    case = make_case(6, 64, pair=True)
    x = torch.zeros(3, 4, 64)[:, :2]
    with pytest.raises(RuntimeError, match="contiguous"):
        CPP.add_steer_rms_norm(*replace(case, x=x, residual=x).norm_arguments())


@needs_cpp
def test_rows_of_sequences_are_for_the_fused_op_alone() -> None:
    case = make_case(6, 64, pair=True)
    x = case.x.view(2, 3, 64)
    many = replace(case, x=x, residual=x)
    for op, arguments in ((CPP.gate_, many.gate_arguments()), (CPP.steer_, many.steer_arguments())):
        with pytest.raises(RuntimeError, match=r"x: expected a tensor \[rows, H\], got 3"):
            op(*arguments)
    with pytest.raises(RuntimeError, match="residual: expected the shape"):
        CPP.add_steer_rms_norm(*replace(many, residual=x.view(3, 2, 64)).norm_arguments())


def test_runs_have_the_same_bits(implementation: Implementation) -> None:
    case = soft(make_case(5, 321, torch.float16, stack=2, slots=6, pair=True, shared=True, seed=6))
    first, first_prompt = run_all(implementation, case), case.run_prompt(implementation)
    for _ in range(3 if implementation.interpreted else 100):
        for name, output in run_all(implementation, case).items():
            assert_same_bits(output, first[name])
        for output, want in zip(case.run_prompt(implementation), first_prompt, strict=True):
            assert_same_bits(output, want)


@needs_cpp
@pytest.mark.parametrize("rows", [1, 3, 700])
def test_threads_change_no_bit(rows: int) -> None:
    # 700 rows are more than 1 MiB and go to the thread pool
    case = soft(make_case(rows, 1001, torch.bfloat16, stack=2, slots=6, sequences=9, pair=True, shared=True, seed=3))
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            outputs.append([*run_all(CPP, case).values(), *case.run_prompt(CPP)])
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            assert_same_bits(got, want)


# ---- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_nothing_but_the_order_of_sums(implementation: Implementation, dtype: torch.dtype) -> None:
    """All tensors one element off any 16-byte boundary."""
    case = make_case(4, 111, dtype, stack=2, pair=True, seed=8)
    moved = case.on(implementation.device)
    off = {name: misaligned(getattr(moved, name)) for name in ("x", "residual", "weight", "vectors", "directions")}
    assert all(t.data_ptr() % 16 for t in off.values())
    other = replace(moved, **off)
    implementation.gate_(*other.gate_arguments())
    normed = implementation.add_steer_rms_norm(*other.norm_arguments())
    implementation.steer_(*other.steer_arguments())
    got = (other.scores, other.values, other.x, *normed)
    want = (*case.run_gate(implementation), case.run_steer(implementation), *case.run_norm(implementation))
    for a, b in zip(got, want, strict=True):
        if implementation.device == "cpu":
            assert_same_bits(a, b)
        else:
            torch.testing.assert_close(a.cpu(), b)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.new_empty(tensor.numel() + 1)
    return flat[1:].view(tensor.shape).copy_(tensor)


def distant(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    """The rows of the tensor, `stride` numbers apart; the memory between them is never touched."""
    try:
        far = tensor.new_empty((len(tensor) - 1) * stride + tensor.shape[1])
    except RuntimeError as error:
        pytest.skip(f"no {error}")
    return far.as_strided(tensor.shape, (stride, 1)).copy_(tensor)


def test_offsets_beyond_32_bits(implementation: Implementation) -> None:
    """Row 2 begins at number 2^31, though neither its index nor the stride needs more than 32 bits."""
    case = soft(make_case(3, 8, torch.float16, pair=True, sequences=1, shared=True, seed=9)).plain(
        GATE=GateKind.PROMPT, SCORE=Score.COSINE
    )
    case.rows[:], case.row[:], case.slot[:], case.deciding[:] = 0, 2, 0, 2
    case.values[:] = 1.0
    near = case.on(implementation.device)
    far = replace(near, x=distant(near.x, 2**30), residual=distant(near.residual, 2**30))
    got, want = run_ops(implementation, far), run_ops(implementation, near)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert (want[-1].cpu() != case.x).any(1).all()


def test_slots_beyond_32_bits(implementation: Implementation) -> None:
    """The last of 2^17 + 1 slots of 16384 numbers begins at number 2^31; only that slot's memory is touched."""
    size, last = 16384, 2**17
    case = make_case(1, size, torch.bfloat16, sequences=1, slots=1, pair=True, seed=10, gates=(GateKind.TOKEN,))
    case = soft(case.plain(GATE=GateKind.TOKEN, EDIT=EditId.KEEP_NORM))
    case.rows[:], case.row[:], case.slot[:] = 0, 0, 0
    moved = case.on(implementation.device)
    try:
        bank = moved.vectors.new_empty(last + 1, size)
    except RuntimeError as error:
        pytest.skip(f"no {error}")
    bank[last] = moved.vectors[0]
    table = moved.table.new_zeros(last + 1, moved.table.shape[1])
    table[last] = moved.table[0]
    moved.rows[:, 1], moved.slot[:] = last, last
    # One bank for both, so that it takes 4 GiB and not 8.
    got = run_ops(implementation, replace(moved, vectors=bank, directions=bank, table=table))
    same_bank = case.on(implementation.device)
    want = run_ops(implementation, replace(same_bank, directions=same_bank.vectors))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(got[-1].cpu(), case.x)


def run_ops(implementation: Implementation, case: Case) -> list[torch.Tensor]:
    """What each op leaves and returns; the case's own scores, values and x are written."""
    implementation.gate_(*case.gate_arguments())
    latched = [case.scores.clone(), case.values.clone()]
    outputs = implementation.add_steer_rms_norm(*case.norm_arguments())
    decided = implementation.prompt(*case.prompt_arguments())
    implementation.steer_(*case.steer_arguments())
    return [*latched, *outputs, *decided, case.scores, case.values, case.x]

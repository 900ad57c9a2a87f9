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
    DECISIONS,
    DTYPES,
    IMPLEMENTATIONS,
    Case,
    Implementation,
    assert_same_bits,
    make_case,
)

from steerfast import _native
from steerfast.kernels.contract import (
    DECIDES,
    READING,
    SHARPNESS,
    Decides,
    EditId,
    GateKind,
    Kinds,
    Norm,
    Reading,
    Score,
)

pytestmark = pytest.mark.contract

needs_cpp = pytest.mark.skipif(not _native.available, reason=f"the C++ ops are absent: {_native.reason}")
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def each_decides(case: Case) -> Case:
    """The case with a sequence for every row, whose gates read that row by both readings."""
    rows, stack = case.slots.shape
    number = torch.arange(rows, dtype=torch.int32)
    own = number.repeat_interleave(stack)
    decisions = {name: torch.zeros(len(case.tables), rows * stack) for name in ("scores", "values")}
    tables = case.tables.clone()
    tables[..., DECIDES], tables[..., READING] = Decides.EVERYWHERE, Reading.BOTH
    return replace(
        case,
        sequence=number,
        deciding=number,
        counted=torch.stack([own, own + 1, torch.full_like(own, 2)], dim=1),
        decider_slots=case.slots.flatten(),
        strength=torch.ones(rows * stack),
        row_scores=torch.zeros(rows, stack),
        last_scores=torch.zeros(rows * stack),
        sums=torch.zeros(len(case.tables), rows * stack, dtype=torch.float64),
        tables=tables,
        **decisions,
    )


def run_all(implementation: Implementation, case: Case) -> dict[str, torch.Tensor]:
    """The outputs of every op, by row; in the forms that decide, every row decides."""
    scored = each_decides(case).scored_by(implementation)
    x, decided = scored.decide_steer(implementation)
    normed, residual, other = scored.decide_norm(implementation)
    rows, of_rows = len(case.x), (decided.scores, decided.values, other.scores, other.values)
    outputs = {
        "row scores": scored.row_scores,
        "last scores": scored.last_scores.view(rows, -1),
        "decisions": torch.stack(of_rows).view(4, len(case.tables), rows, -1).movedim(2, 0),
        "scales": torch.stack([decided.all_scales, other.all_scales]).movedim(2, 0),
        "decided": torch.stack([x, normed, residual], dim=1),
        "x": case.run_steer(implementation),
    }
    return outputs | dict(zip(("normed", "new_residual"), case.run_norm(implementation), strict=True))


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
from kernel_cases import CPP, DECISIONS, DTYPES, Kinds, Norm, bits, make_case
from steerfast import _native
digest = hashlib.sha256()
for size in (1, 7, 111, 576, 769, 4096):
    for dtype in DTYPES:
        for bank_dtype in DTYPES:
            for pair in (False, True):
                case = make_case(7, size, dtype, bank_dtype, stack=3, slots=6, pair=pair, seed=size,
                                 norm=Norm(size % len(Norm)), shared=True)
                case.x[0, 0], case.x[1, -1] = float("nan"), float("inf")
                x, decided = case.decide_steer(CPP)
                of_gates = [getattr(decided, name) for name in DECISIONS]
                deciding = (*case.run_score(CPP), x, *of_gates, *case.decide_norm(CPP)[:2])
                for output in (case.run_steer(CPP), *case.run_norm(CPP), *deciding):
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
    case.slots[:], case.all_scales[:] = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]]), 1.0
    none = replace(case, slots=case.slots[:, :0].contiguous(), all_scales=case.all_scales[:, :, :0].contiguous())
    deciding = {"GATE": GateKind.PROMPT, "DECIDES": Decides.HERE, "READING": Reading.LAST, "SHARPNESS": 0.0}
    shut = each_decides(case.plain(**deciding, THRESHOLD=1.0))
    shut.strength[:], shut.last_scores[:] = float("inf"), 0.0
    want = none.run_norm(implementation)
    same = [
        replace(case, slots=torch.full_like(case.slots, -1)),
        replace(case, all_scales=torch.zeros_like(case.all_scales)),
        case.plain(STRENGTH=0.0),
        shut.decide_steer(implementation)[1],  # a shut gate wins over an infinite strength
    ]
    for got, plain in zip(shut.decide_norm(implementation)[:2], want, strict=True):
        assert_same_bits(got, plain)
    assert_same_bits(shut.decide_steer(implementation)[0], case.x)
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
    case.tables[..., SHARPNESS], case.strength[:] = 2.0, 1.0
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


@pytest.mark.slow(but=["cpp*", "torch*", "triton-torch.float32-0", "triton-torch.bfloat16-1"])
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
    for op, arguments in ((CPP.score_, many.score_arguments()), (CPP.steer_, many.steer_arguments())):
        with pytest.raises(RuntimeError, match=r"x: expected a tensor \[rows, H\], got 3"):
            op(*arguments)
    with pytest.raises(RuntimeError, match="residual: expected the shape"):
        CPP.add_steer_rms_norm(*replace(many, residual=x.view(3, 2, 64)).norm_arguments())


def test_runs_have_the_same_bits(implementation: Implementation) -> None:
    case = soft(make_case(5, 321, torch.float16, stack=2, slots=6, pair=True, shared=True, seed=6))
    first = run_all(implementation, case)
    for _ in range(3 if implementation.interpreted else 100):
        for name, output in run_all(implementation, case).items():
            assert_same_bits(output, first[name])


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
            outputs.append(list(run_all(CPP, case).values()))
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
    implementation.score_(*other.score_arguments())
    normed = implementation.add_steer_rms_norm(*other.norm_arguments())
    implementation.steer_(*other.steer_arguments())
    got = (other.row_scores, other.last_scores, other.x, *normed)
    want = (*case.run_score(implementation), case.run_steer(implementation), *case.run_norm(implementation))
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
        GATE=GateKind.PROMPT, DECIDES=Decides.HERE, READING=Reading.BOTH, SHARPNESS=2.0
    )
    case.slots[:], case.sequence[:], case.decider_slots[:], case.deciding[:] = 0, 0, 0, 2
    case.counted[:] = torch.tensor([0, 3, 3])
    near = case.on(implementation.device)
    other = case.on(implementation.device)
    far = replace(other, x=distant(near.x, 2**30), residual=distant(near.residual, 2**30))
    got, want = run_ops(implementation, far), run_ops(implementation, near)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert (want[-1].cpu() != case.x).any(1).all()


def test_slots_beyond_32_bits(implementation: Implementation) -> None:
    """The last of 2^17 + 1 slots of 16384 numbers begins at number 2^31; only that slot's memory is touched."""
    size, last = 16384, 2**17
    case = make_case(1, size, torch.bfloat16, sequences=1, slots=1, pair=True, seed=10, gates=(GateKind.TOKEN,))
    columns = {"DECIDES": Decides.HERE, "READING": Reading.BOTH, "SCORE": Score.COSINE}
    case = case.plain(GATE=GateKind.TOKEN, EDIT=EditId.KEEP_NORM, SHARPNESS=2.0, **columns)
    case.slots[:], case.sequence[:], case.decider_slots[:], case.deciding[:] = 0, 0, 0, 0
    case.counted[:] = torch.tensor([0, 1, 1])
    moved = case.on(implementation.device)
    try:
        bank = moved.vectors.new_empty(last + 1, size)
    except RuntimeError as error:
        pytest.skip(f"no {error}")
    bank[last] = moved.vectors[0]
    tables = moved.tables.new_zeros(len(moved.tables), last + 1, moved.tables.shape[2])
    tables[:, last] = moved.tables[:, 0]
    moved.slots[:], moved.decider_slots[:] = last, last
    # One bank for all, so that it takes 4 GiB and not 12.
    got = run_ops(implementation, replace(moved, vectors=bank, directions=bank, mean_directions=bank, tables=tables))
    one = case.on(implementation.device)
    want = run_ops(implementation, replace(one, directions=one.vectors, mean_directions=one.vectors))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(got[-1].cpu(), case.x)


def run_ops(implementation: Implementation, case: Case) -> list[torch.Tensor]:
    """What each op leaves and returns; the case's own scores, decisions and x are written."""
    implementation.score_(*case.score_arguments())
    outputs = [*implementation.add_steer_rms_norm(*case.norm_arguments())]
    outputs += implementation.add_steer_rms_norm(*case.norm_arguments(), case.gates)
    implementation.steer_(*case.steer_arguments(), case.gates)
    implementation.steer_(*case.steer_arguments())
    return [*outputs, case.row_scores, case.last_scores, *(getattr(case, name) for name in DECISIONS), case.x]

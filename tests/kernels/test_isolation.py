"""What must not be touched, read or spread: rows left alone, unused slots, gaps, NaN and infinity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    Case,
    Implementation,
    assert_same_bits,
    bits,
    make_case,
)

from steerfast.kernels.contract import GATE, THRESHOLD, EditId, GateKind, Kinds, Norm, Score

pytestmark = pytest.mark.contract

NAN, INF = float("nan"), float("inf")


def every_op(implementation: Implementation, case: Case) -> list[torch.Tensor]:
    """x, normed and new residual, the latter of both overloads."""
    return [case.run_steer(implementation), *case.run_norm(implementation), *case.run_prompt(implementation)[:2]]


# ---- rows left alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", Kinds)
def test_rows_left_alone_keep_their_bits(implementation: Implementation, dtype: torch.dtype, kinds: Kinds) -> None:
    case = replace(make_case(8, 111, dtype, slots=5, strided=True), kinds=kinds).plain(SHARPNESS=0.0)
    case.rows[:] = torch.tensor([[0, 0], [-1, -1], [1, 1], [99, -1], [2, 0], [0, 1], [3, 2], [1, 3]])
    case.values[:], case.strength[:] = torch.tensor([[1.0], [0], [1], [0]]), torch.tensor([[1.0], [1], [0], [1]])
    case.table[:, GATE] = torch.tensor(
        [GateKind.ALWAYS, GateKind.PROMPT, GateKind.TOKEN, GateKind.TOKEN, GateKind.TOKEN]
    ).float()
    case.table[:, THRESHOLD] = torch.tensor([0.0, 0, -INF, INF, 0])  # the token of slot 2 opens, that of slot 3 never
    case.vectors[4], case.directions[4], case.table[4] = NAN, NAN, NAN  # nobody's
    case.x[1] = NAN
    bits(case.x[3:4])[0, 6] = -1  # bits() is a view here: a NaN with every bit of its payload set
    case.x[[2, 3, 4, 7], :5] = -0.0  # adding a zero would make it +0.0
    y = case.run_steer(implementation)
    edited = [0, 5, 6] if kinds == Kinds.ANY else [0, 5]  # to LATCHED_ADD slot 2 is shut: the latch of its sequence
    untouched = [r for r in range(8) if r not in edited]
    assert_same_bits(y[untouched], case.x[untouched])
    assert torch.isfinite(y[edited]).all()
    assert (y[edited] != case.x[edited]).any(1).all()


def test_gaps_between_strided_rows_are_not_written(implementation: Implementation) -> None:
    case = make_case(3, 7, strided=True, pair=True, shared=True).plain()
    case.rows[:] = 0
    moved = case.on(implementation.device)
    residual = moved.residual.clone()
    x = moved.x.clone()
    implementation.add_steer_rms_norm(*moved.norm_arguments())
    implementation.prompt(*moved.prompt_arguments())
    implementation.gate_(*moved.gate_arguments())
    assert torch.equal(moved.x, x)
    implementation.steer_(*moved.steer_arguments())
    assert (moved.x != x).any(1).all()
    assert torch.equal(moved.residual, residual)
    for view in (moved.x, moved.residual):
        stride = view.stride(0)
        assert (view.as_strided((3, stride), (stride, 1))[:, 7:] == 7).all()


def test_outputs_are_fresh_and_arguments_stay(implementation: Implementation) -> None:
    case = make_case(5, 111, pair=True, shared=True, stack=2, seed=2)
    moved = case.on(implementation.device)
    for result in (
        implementation.add_steer_rms_norm(*moved.norm_arguments()),
        implementation.prompt(*moved.prompt_arguments()),
    ):
        assert {t.data_ptr() for t in result}.isdisjoint({moved.x.data_ptr(), moved.residual.data_ptr()})
    implementation.gate_(*moved.gate_arguments())
    implementation.steer_(*moved.steer_arguments())
    for name, tensor in vars(case).items():
        if isinstance(tensor, torch.Tensor) and name not in ("x", "scores", "values"):
            assert_same_bits(getattr(moved, name).cpu(), tensor)


# ---- leaks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", Kinds)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nothing_leaks_between_rows_slots_and_sequences(
    implementation: Implementation, bad: float, kinds: Kinds
) -> None:
    clean = make_case(
        8, 111, torch.float16, stack=2, slots=5, sequences=4, pair=True, shared=True, kinds=kinds, seed=11
    )
    clean.rows[:, 0] = torch.tensor([0, 1, 2, 3]).repeat(2)
    clean.rows[:, 1:] = torch.tensor([[0, 1], [2, 0], [1, -1], [3, 4]]).repeat(2, 1)
    clean.deciding[:] = torch.tensor([0, -1, 2, 3])
    clean.row[:], clean.slot[:] = torch.tensor([0, 1, 2, 3]), torch.tensor([[0, 1], [2, 0], [1, -1], [3, 4]])
    dirty = replace(clean, **{k: v.clone() for k, v in vars(clean).items() if isinstance(v, torch.Tensor)})
    # Sequence 3, its rows and its slots are spoilt; so are the values and strengths that slot -1 stands beside.
    dirty.x[[3, 7]], dirty.residual[3] = bad, bad
    dirty.vectors[3:], dirty.directions[3:], dirty.table[3:] = bad, bad, bad
    dirty.values[3], dirty.strength[3], dirty.scores[3] = bad, bad, bad
    dirty.values[2, 1], dirty.strength[2, 1] = bad, bad
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    for got, want in zip(every_op(implementation, dirty), every_op(implementation, clean), strict=True):
        assert_same_bits(got[keep], want[keep])
    latches = zip(
        (*dirty.run_gate(implementation), *dirty.run_prompt(implementation)[2:]),
        (*clean.run_gate(implementation), *clean.run_prompt(implementation)[2:]),
        strict=True,
    )
    for got, want in latches:
        assert_same_bits(got[:2], want[:2])
        assert_same_bits(got[2, :1], want[2, :1])


def test_gate_reads_nothing_for_slot_or_row_minus_one(implementation: Implementation) -> None:
    case = make_case(4, 111, stack=2, slots=2)
    case.row[:] = torch.tensor([0, -1, 2, 3])
    case.slot[:] = torch.tensor([[-1, -1], [0, 1], [-1, 1], [0, -1]])
    case.x[0] = NAN
    case.scores[1], case.values[1] = NAN, torch.tensor([0.25, -0.0])
    scores, values = case.run_gate(implementation)
    assert scores[0].tolist() == values[0].tolist() == [0.0, 0.0]
    assert_same_bits(scores[1], case.scores[1])
    assert_same_bits(values[1], case.values[1])
    assert scores[2, 0] == values[2, 0] == scores[3, 1] == values[3, 1] == 0
    assert scores[2, 1] != 0
    assert scores[3, 0] != 0


# ---- special values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
@pytest.mark.parametrize("score", Score)
def test_nan_score_fires(implementation: Implementation, sharpness: float, score: Score) -> None:
    case = make_case(gates=(GateKind.PROMPT,), edits=(EditId.ADD,), rows=4, slots=1, seed=1)
    case = case.plain(GATE=GateKind.PROMPT, SHARPNESS=sharpness, THRESHOLD=1e9, SCORE=score)
    case.row[:], case.slot[:], case.rows[:, 1] = torch.arange(4), 0, 0
    case.rows[:, 0] = case.deciding[:] = torch.arange(4)
    case.x[0, 3] = NAN
    case.x[1, 3], case.x[1, 4] = INF, -INF
    case.directions[0, 3:5] = 0.1
    scores, values = case.run_gate(implementation)
    assert scores[:, 0].isnan().tolist() == [True, True, False, False]
    assert values[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    *_, scores, values = case.run_prompt(implementation)
    assert scores[:, 0].isnan().tolist() == [True, True, False, False]
    assert values[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_nan_row_is_edited_by_token(implementation: Implementation, sharpness: float) -> None:
    case = make_case(2, sequences=1, slots=1).plain(GATE=GateKind.TOKEN, SHARPNESS=sharpness, THRESHOLD=1e9)
    case.rows[:], case.x[0, 3] = 0, NAN
    y = case.run_steer(implementation)
    finite = torch.arange(576) != 3
    assert torch.equal(y[0, finite], (case.x[0] + case.vectors[0])[finite])
    assert y[0, 3].isnan()
    assert_same_bits(y[1], case.x[1])


@pytest.mark.parametrize("edit", [EditId.CLAMP, EditId.KEEP_NORM, EditId.ROTATE])
def test_sums_that_are_nan_spoil_their_row_only(implementation: Implementation, edit: EditId) -> None:
    case = make_case(2, 111, slots=1, sequences=1).plain(EDIT=edit, LOW=0.6, HIGH=0.8)
    case.rows[:], case.x[0, 3] = 0, NAN
    y = case.run_steer(implementation)
    assert y[0].isnan().all()
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_row_scores_zero(implementation: Implementation, dtype: torch.dtype) -> None:
    for score in Score:
        for threshold, value in ((-0.5, 1.0), (0.0, 0.0)):  # a score equal to the threshold does not fire
            case = make_case(dtype=dtype).plain(GATE=GateKind.PROMPT, SHARPNESS=0.0, THRESHOLD=threshold, SCORE=score)
            case.x[2], case.row[:], case.slot[:] = 0.0, 2, 0
            scores, values = case.run_gate(implementation)
            assert scores.flatten().tolist() == [0.0] * 4
            assert values.flatten().tolist() == [value] * 4


def test_squares_beyond_float16_are_summed(implementation: Implementation) -> None:
    case = make_case(1, 111, torch.float16, sequences=1, slots=1, norm=Norm.VLLM)
    case.x[:], case.residual[:], case.weight[:], case.rows[:] = 60000.0, 0.0, 1.0, -1
    case.directions[:], case.row[:], case.slot[:] = 1 / 111**0.5, 0, 0
    for score, want in ((Score.COSINE, 1.0), (Score.DOT, 60000 * 111**0.5)):
        assert case.plain(SCORE=score).run_gate(implementation)[0].item() == pytest.approx(want, rel=1e-3)
    normed, new_residual = case.run_norm(implementation)
    assert (new_residual == 60000.0).all()
    assert (normed == 1.0).all()


def test_sums_beyond_float16_become_infinite(implementation: Implementation) -> None:
    case = make_case(1, 7, torch.float16, sequences=1, slots=1).plain()
    case.x[:], case.vectors[:], case.residual[:], case.rows[:] = 60000.0, 60000.0, 0.0, 0
    assert case.run_steer(implementation).isposinf().all()
    assert case.run_norm(implementation)[1].isposinf().all()


@pytest.mark.parametrize("kinds", Kinds)
@pytest.mark.parametrize("stack", [0, 1, 4])
def test_no_rows_and_no_sequences(implementation: Implementation, stack: int, kinds: Kinds) -> None:
    case = make_case(0, stack=stack, kinds=kinds, pair=True)
    for output in every_op(implementation, case):
        assert output.shape == (0, 576)
    assert [t.shape for t in case.run_gate(implementation)] == [(0, stack)] * 2
    case = make_case(2, stack=stack, kinds=kinds)
    nobody = replace(
        case,
        rows=torch.full_like(case.rows, -1),
        values=torch.ones(0, stack),
        strength=torch.ones(0, stack),
        scores=torch.ones(0, stack),
        deciding=torch.zeros(0, dtype=torch.int32),
    )
    assert_same_bits(nobody.run_steer(implementation), case.x)
    for output in (nobody.run_norm(implementation), nobody.run_prompt(implementation)[:2]):
        assert torch.equal(output[1], case.x + case.residual)


def test_nothing_behind_a_row_is_read(implementation: Implementation) -> None:
    """5 numbers in a block of 8: the other 3 belong to the next row, slot, or gap."""
    case = make_case(3, 5, stack=1, slots=2, sequences=1, strided=True, pair=True).plain(
        GATE=GateKind.TOKEN, THRESHOLD=-2.0
    )
    case.rows[:] = 0
    clean = [case.run_steer(implementation), *case.run_norm(implementation)]
    moved = case.on(implementation.device)
    for view in (moved.x, moved.residual):
        view.as_strided((3, view.stride(0)), (view.stride(0), 1))[:, 5:] = NAN
    moved.vectors[1], moved.directions[1] = NAN, NAN  # follows slot 0 in memory
    outputs = implementation.add_steer_rms_norm(*moved.norm_arguments())
    implementation.steer_(*moved.steer_arguments())
    for got, want in zip((moved.x, *outputs), clean, strict=True):
        assert_same_bits(got.cpu(), want)

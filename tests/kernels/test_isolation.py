"""What must not be touched, read or spread: rows left alone, unused slots, gaps, NaN and infinity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DECISIONS,
    DTYPES,
    Case,
    Implementation,
    assert_same_bits,
    bits,
    make_case,
)

from steerfast.kernels.contract import GATE, THRESHOLD, Decides, EditId, GateKind, Kinds, Norm, Reading, Score

pytestmark = pytest.mark.contract

NAN, INF = float("nan"), float("inf")


def every_op(implementation: Implementation, case: Case) -> list[torch.Tensor]:
    """x, normed and new residual, of both forms."""
    plain = (case.run_steer(implementation), *case.run_norm(implementation))
    return [*plain, case.decide_steer(implementation)[0], *case.decide_norm(implementation)[:2]]


# ---- rows left alone ---------------------------------------------------------------------------------------


@pytest.mark.slow(but=["cpp*", "torch*", "triton-0-torch.float32", "triton-1-torch.bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", Kinds)
def test_rows_left_alone_keep_their_bits(implementation: Implementation, dtype: torch.dtype, kinds: Kinds) -> None:
    case = replace(make_case(8, 111, dtype, slots=5, strided=True), kinds=kinds).plain(SHARPNESS=0.0)
    case.slots[:, 0] = torch.tensor([0, -1, 1, -1, 0, 1, 2, 3])
    scales = torch.tensor([1.0, 1, 0, NAN, 0, 1, 1, 1])  # slot -1 wins over any scale, scale 0 over any slot
    case.scales[:, 0] = scales
    case.table[:, GATE] = torch.tensor(
        [GateKind.ALWAYS, GateKind.PROMPT, GateKind.TOKEN, GateKind.TOKEN, GateKind.TOKEN]
    ).float()
    case.table[:, THRESHOLD] = torch.tensor([0.0, 0, -INF, INF, 0])  # the token of slot 2 opens, that of slot 3 never
    case.vectors[4], case.directions[4], case.table[4] = NAN, NAN, NAN  # nobody's
    case.x[1] = NAN
    bits(case.x[3:4])[0, 6] = -1  # bits() is a view here: a NaN with every bit of its payload set
    case.x[[2, 3, 4, 7], :5] = -0.0  # adding a zero would make it +0.0
    y = case.run_steer(implementation)
    edited = [0, 5, 6] if kinds == Kinds.ANY else [0, 5, 6, 7]  # LATCHED_ADD looks at no gate of a row
    untouched = [r for r in range(8) if r not in edited]
    assert_same_bits(y[untouched], case.x[untouched])
    assert torch.isfinite(y[edited]).all()
    assert (y[edited] != case.x[edited]).any(1).all()


def test_gaps_between_strided_rows_are_not_written(implementation: Implementation) -> None:
    case = make_case(3, 7, strided=True, pair=True, shared=True).plain()
    case.slots[:] = 0
    moved = case.on(implementation.device)
    residual = moved.residual.clone()
    x = moved.x.clone()
    implementation.score_(*moved.score_arguments())
    implementation.add_steer_rms_norm(*moved.norm_arguments())
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
    implementation.score_(*moved.score_arguments())
    for gates in ((), (moved.gates,)):
        result = implementation.add_steer_rms_norm(*moved.norm_arguments(), *gates)
        assert {t.data_ptr() for t in result}.isdisjoint({moved.x.data_ptr(), moved.residual.data_ptr()})
        implementation.steer_(*moved.steer_arguments(), *gates)
    for name, tensor in vars(case).items():
        if isinstance(tensor, torch.Tensor) and name not in ("x", "row_scores", "last_scores", *DECISIONS):
            assert_same_bits(getattr(moved, name).cpu(), tensor)


# ---- leaks -------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=["cpp*", "torch*", "triton-nan-1", "triton-inf-0"])
@pytest.mark.parametrize("kinds", Kinds)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nothing_leaks_between_rows_slots_and_sequences(
    implementation: Implementation, bad: float, kinds: Kinds
) -> None:
    clean = make_case(
        8, 111, torch.float16, stack=2, slots=5, sequences=4, pair=True, shared=True, kinds=kinds, seed=11,
        decides=(Decides.EVERYWHERE,), readings=(Reading.BOTH,),
    )  # fmt: skip
    clean.sequence[:] = torch.arange(8) // 2
    slots = torch.tensor([[0, 1], [2, 0], [1, -1], [3, 4]])
    clean.decider_slots[:], clean.slots[:] = slots.flatten(), slots.repeat_interleave(2, dim=0)
    clean.deciding[:] = torch.tensor([0, -1, 5, 7])
    clean.counted[:] = torch.tensor([[0, 2, 2], [2, 4, 4], [4, 6, 3], [6, 8, 2]]).repeat_interleave(2, dim=0)
    dirty = replace(clean, **{k: v.clone() for k, v in vars(clean).items() if isinstance(v, torch.Tensor)})
    # Sequence 3, its rows and its slots are spoilt; so are the numbers that slot -1 stands beside.
    dirty.x[[6, 7]], dirty.residual[6] = bad, bad
    dirty.vectors[3:], dirty.directions[3:], dirty.mean_directions[3:], dirty.tables[:, 3:] = bad, bad, bad, bad
    for spoilt in ([6, 7], 5):  # deciders of sequence 3, and of the slot -1
        dirty.sums[:, spoilt], dirty.scores[:, spoilt], dirty.values[:, spoilt] = bad, bad, bad
        dirty.last_scores[spoilt], dirty.strength[spoilt] = bad, bad
    for rows, stack in (([6, 7], [0, 1]), ([4, 5], [1])):
        for k in stack:
            dirty.all_scales[:, rows, k], dirty.row_scores[rows, k] = bad, bad
    keep, kept = torch.arange(6), [0, 1, 2, 3, 4]
    for got, want in zip(every_op(implementation, dirty), every_op(implementation, clean), strict=True):
        assert_same_bits(got[keep], want[keep])
    mine, theirs = dirty.scored_by(implementation), clean.scored_by(implementation)
    assert_same_bits(mine.last_scores[kept], theirs.last_scores[kept])
    assert_same_bits(mine.row_scores[:4], theirs.row_scores[:4])
    assert_same_bits(mine.row_scores[4:6, :1], theirs.row_scores[4:6, :1])
    for case, other in (
        (mine.decide_steer(implementation)[1], theirs.decide_steer(implementation)[1]),
        (mine.decide_norm(implementation)[2], theirs.decide_norm(implementation)[2]),
    ):
        for name in DECISIONS[:3]:
            assert_same_bits(getattr(case, name)[:, kept], getattr(other, name)[:, kept])
        assert_same_bits(case.all_scales[:, :4], other.all_scales[:, :4])
        assert_same_bits(case.all_scales[:, 4:6, :1], other.all_scales[:, 4:6, :1])


# ---- special values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
@pytest.mark.parametrize("score", Score)
def test_nan_score_fires(implementation: Implementation, sharpness: float, score: Score) -> None:
    case = make_case(rows=4, sequences=4, slots=1, shared=True, seed=1)
    columns = {"SHARPNESS": sharpness, "THRESHOLD": 1e9, "SCORE": score, "DECIDES": Decides.HERE}
    for reading in (Reading.LAST, Reading.MEAN, Reading.BOTH):
        case = case.plain(GATE=GateKind.PROMPT, READING=reading, **columns)
        case.sequence[:] = case.deciding[:] = torch.arange(4)
        case.slots[:], case.decider_slots[:], case.sums[:] = 0, 0, 0.0
        case.counted[:] = torch.stack([torch.arange(4), torch.arange(4) + 1, torch.ones(4)], dim=1)
        case.x[0, 3] = NAN
        case.x[1, 3], case.x[1, 4] = INF, -INF
        case.directions[0, 3:5] = case.mean_directions[0, 3:5] = 0.1
        scored = case.scored_by(implementation)
        for decided in (scored.decide_steer(implementation)[1], scored.decide_norm(implementation)[2]):
            assert decided.scores[case.layer].isnan().tolist() == [True, True, False, False]
            assert decided.values[case.layer].tolist() == [1.0, 1.0, 0.0, 0.0]
            assert decided.scales[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_nan_row_is_edited_by_token(implementation: Implementation, sharpness: float) -> None:
    case = make_case(2, sequences=1, slots=1).plain(GATE=GateKind.TOKEN, SHARPNESS=sharpness, THRESHOLD=1e9)
    case.slots[:], case.x[0, 3] = 0, NAN
    y = case.run_steer(implementation)
    finite = torch.arange(576) != 3
    assert torch.equal(y[0, finite], (case.x[0] + case.vectors[0])[finite])
    assert y[0, 3].isnan()
    assert_same_bits(y[1], case.x[1])


@pytest.mark.parametrize("edit", [EditId.CLAMP, EditId.KEEP_NORM, EditId.ROTATE])
def test_sums_that_are_nan_spoil_their_row_only(implementation: Implementation, edit: EditId) -> None:
    case = make_case(2, 111, slots=1, sequences=1).plain(EDIT=edit, LOW=0.6, HIGH=0.8)
    case.slots[:], case.x[0, 3] = 0, NAN
    y = case.run_steer(implementation)
    assert y[0].isnan().all()
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_row_scores_zero(implementation: Implementation, dtype: torch.dtype) -> None:
    for score in Score:
        for threshold, value in ((-0.5, 1.0), (0.0, 0.0)):  # a score equal to the threshold does not fire
            case = make_case(4, dtype=dtype, sequences=1, slots=1)
            columns = {"SHARPNESS": 0.0, "THRESHOLD": threshold, "SCORE": score, "DECIDES": Decides.HERE}
            case = case.plain(GATE=GateKind.PROMPT, READING=Reading.LAST, **columns)
            case.x[2], case.sequence[:], case.deciding[:], case.decider_slots[:] = 0.0, 0, 2, 0
            scored = case.scored_by(implementation)
            assert scored.last_scores.tolist() == [0.0]
            assert scored.decide_steer(implementation)[1].values[case.layer].tolist() == [value]


def test_squares_beyond_float16_are_summed(implementation: Implementation) -> None:
    case = make_case(1, 111, torch.float16, sequences=1, slots=1, norm=Norm.VLLM)
    case.x[:], case.residual[:], case.weight[:], case.slots[:] = 60000.0, 0.0, 1.0, -1
    case.directions[:], case.sequence[:], case.deciding[:], case.decider_slots[:] = 1 / 111**0.5, 0, 0, 0
    for score, want in ((Score.COSINE, 1.0), (Score.DOT, 60000 * 111**0.5)):
        scored = case.plain(SCORE=score, DECIDES=Decides.HERE, READING=Reading.LAST).scored_by(implementation)
        assert scored.last_scores.item() == pytest.approx(want, rel=1e-3)
    normed, new_residual = case.run_norm(implementation)
    assert (new_residual == 60000.0).all()
    assert (normed == 1.0).all()


def test_sums_beyond_float16_become_infinite(implementation: Implementation) -> None:
    case = make_case(1, 7, torch.float16, sequences=1, slots=1).plain()
    case.x[:], case.vectors[:], case.residual[:], case.slots[:] = 60000.0, 60000.0, 0.0, 0
    assert case.run_steer(implementation).isposinf().all()
    assert case.run_norm(implementation)[1].isposinf().all()


@pytest.mark.parametrize("kinds", Kinds)
@pytest.mark.parametrize("stack", [0, 1, 4])
def test_no_rows_and_no_sequences(implementation: Implementation, stack: int, kinds: Kinds) -> None:
    case = make_case(0, stack=stack, kinds=kinds, pair=True)
    for output in every_op(implementation, case):
        assert output.shape == (0, 576)
    assert [t.shape for t in case.run_score(implementation)] == [(0, stack), (0,)]
    case = make_case(2, stack=stack, kinds=kinds)
    names = ("decider_slots", "strength", "last_scores", "sums", "scores", "values", "deciding", "counted")
    nobody = {name: getattr(case, name)[:, :0] if name in DECISIONS else getattr(case, name)[:0] for name in names}
    none = torch.full_like(case.slots, -1)
    case = replace(case, **nobody, slots=none, sequence=torch.full_like(case.sequence, -1))
    assert (case.run_score(implementation)[0] == 0).all()
    assert_same_bits(case.run_steer(implementation), case.x)
    assert_same_bits(case.decide_steer(implementation)[0], case.x)
    for output in (case.run_norm(implementation), case.decide_norm(implementation)):
        assert torch.equal(output[1], case.x + case.residual)


def test_nothing_behind_a_row_is_read(implementation: Implementation) -> None:
    """5 numbers in a block of 8: the other 3 belong to the next row, slot, or gap."""
    case = make_case(3, 5, stack=1, slots=2, sequences=1, strided=True, pair=True).plain(
        GATE=GateKind.TOKEN, THRESHOLD=-2.0
    )
    case.slots[:] = 0
    clean = [case.run_steer(implementation), *case.run_norm(implementation)]
    moved = case.on(implementation.device)
    for view in (moved.x, moved.residual):
        view.as_strided((3, view.stride(0)), (view.stride(0), 1))[:, 5:] = NAN
    moved.vectors[1], moved.directions[1] = NAN, NAN  # follows slot 0 in memory
    outputs = implementation.add_steer_rms_norm(*moved.norm_arguments())
    implementation.steer_(*moved.steer_arguments())
    for got, want in zip((moved.x, *outputs), clean, strict=True):
        assert_same_bits(got.cpu(), want)

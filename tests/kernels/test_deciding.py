"""Gates that decide in the launch that edits: readings, chunked prompts, stacks, sensors, and no race."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CHECKS,
    CUDA,
    DECISIONS,
    DTYPES,
    TRITON,
    Case,
    Implementation,
    assert_same_bits,
    bits,
    make_case,
)

from steerfast.kernels import gate as gate_module
from steerfast.kernels.contract import DECIDES, GATE, Decides, EditId, GateKind, Kinds, Norm, Reading, Score

pytestmark = pytest.mark.contract

NAN = float("nan")
fuzz = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
READINGS = (Reading.LAST, Reading.MEAN, Reading.BOTH)


def prompts(lengths: list[int], *, size: int = 111, before: int = 0, **options: Any) -> Case:
    """Sequences of these lengths, one after the other, `before` rows of padding ahead of each.

    All slots decide, each sequence at its last row, by means over all of its rows; every row is edited by the slots of
    its sequence.
    """
    fixed = {"stack": 2, "slots": 6, "shared": True, "pair": True, "gates": (GateKind.PROMPT,)}
    rows, count = sum(lengths) + before * len(lengths), len(lengths)
    decides = (Decides.HERE, Decides.EVERYWHERE)
    case = make_case(rows, size, sequences=count, **{"decides": decides, **fixed, **options})
    stack = case.slots.shape[1]
    g = torch.Generator().manual_seed(1)
    slot = torch.randint(len(case.vectors), (count, stack), generator=g).int()
    sequence, counted, deciding, start = [], [], [], 0
    for q, length in enumerate(lengths):
        sequence += [-1] * before + [q] * length
        start += before
        counted += [[start, start + length, length]] * stack
        deciding += [start + length - 1]
        start += length
    of_row = torch.tensor(sequence, dtype=torch.int32)
    return replace(
        case,
        sequence=of_row,
        deciding=torch.tensor(deciding, dtype=torch.int32),
        counted=torch.tensor(counted, dtype=torch.int32),
        decider_slots=slot.flatten(),
        strength=torch.ones(count * stack),
        sums=torch.zeros_like(case.sums),
        slots=torch.where(of_row[:, None] >= 0, slot[of_row.clamp(min=0).long()], -1),
    )


def decisions(case: Case) -> list[torch.Tensor]:
    return [getattr(case, name) for name in DECISIONS]


def both_forms(implementation: Implementation, case: Case) -> list[tuple[list[torch.Tensor], Case]]:
    """The outputs and the decisions of both ops that decide."""
    x, decided = case.decide_steer(implementation)
    *outputs, other = case.decide_norm(implementation)
    for mine, theirs in zip(decisions(decided), decisions(other), strict=True):
        assert_same_bits(mine, theirs)
    return [([x], decided), (outputs, other)]


def assert_equal(implementation: Implementation, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits, but for plain torch, which promises none."""
    if implementation.name.startswith("torch"):
        torch.testing.assert_close(got, want, equal_nan=True)
    else:
        assert_same_bits(got, want)


# ---- what is decided ---------------------------------------------------------------------------------------


@pytest.mark.slow(but=["cpp*", "torch*", "triton-1-1", "triton-2-2", "triton-3-4"])
@pytest.mark.parametrize("stack", [1, 2, 3, 4])
@pytest.mark.parametrize("reading", READINGS)
def test_a_decision_is_the_edit_that_it_stores(implementation: Implementation, reading: Reading, stack: int) -> None:
    """The launch that decides edits as a plain one by the scales that it stored, for positions all and response."""
    for before, response in ((0, False), (2, True)):
        case = prompts([3, 1, 4], before=before, stack=stack, readings=(reading,), norm=Norm.VLLM)
        if response:  # only the deciding rows are edited
            edited = torch.zeros(len(case.x), dtype=torch.bool)
            edited[case.deciding.long()] = True
            case.slots[~edited] = -1
        case = case.scored_by(implementation)
        for outputs, decided in both_forms(implementation, case):
            plain = [decided.run_steer(implementation)] if len(outputs) == 1 else decided.run_norm(implementation)
            for got, want in zip(outputs, plain, strict=True):
                assert_equal(implementation, got, want)
            untouched = (case.slots < 0).expand(len(case.tables), -1, -1)
            assert_same_bits(decided.all_scales[untouched], case.all_scales[untouched])
            assert ((decided.values[case.layer] >= 0) & (decided.values[case.layer] <= 1)).all()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("score", Score)
def test_readings_by_hand(implementation: Implementation, score: Score, reading: Reading) -> None:
    """Directions of any length; the score is the sum of both readings."""
    case = prompts([3, 5], stack=1, slots=2, pair=False)
    columns = {"SCORE": score, "READING": reading, "DECIDES": Decides.HERE, "SHARPNESS": 1.5, "THRESHOLD": 0.1}
    case = case.plain(GATE=GateKind.PROMPT, STRENGTH=2.0, **columns)
    case.directions.mul_(0.25)
    _, decided = both_forms(implementation, case.scored_by(implementation))[0]
    for q, rows in enumerate((range(3), range(3, 8))):
        slot = int(case.decider_slots[q])
        each = [case.x[r].double() / (case.x[r].double().norm() if score == Score.COSINE else 1) for r in rows]
        last = each[-1] @ case.directions[slot].double()
        mean = torch.stack(each).mean(0) @ case.mean_directions[slot].double()
        want = {Reading.LAST: last, Reading.MEAN: mean, Reading.BOTH: last + mean}[reading]
        got, value = (float(t[case.layer, q]) for t in (decided.scores, decided.values))
        assert got == pytest.approx(float(want), abs=1e-4 * float(torch.stack(each).abs().sum(1).max()))
        assert value == pytest.approx(1 / (1 + torch.exp(torch.tensor(-1.5 * (got - 0.1))).item()), abs=1e-5)
        for r in rows:
            assert float(decided.scales[r, 0]) == pytest.approx(2 * value, abs=1e-6)


def test_a_sensor_writes_all_layers_and_others_their_own(implementation: Implementation) -> None:
    case = prompts([4, 3], stack=2, slots=2, layers=5).plain(GATE=GateKind.PROMPT, READING=Reading.MEAN)
    case.decider_slots[:] = torch.tensor([0, 1, 1, 0])
    case.slots[:] = case.decider_slots.view(2, 2)[case.sequence.long()]
    case.tables[..., 0, DECIDES], case.tables[..., 1, DECIDES] = Decides.EVERYWHERE, Decides.HERE
    case.tables[:, :, 2] = torch.arange(10.0).view(5, 2)  # a strength of its own at each layer
    case.tables[3, 0, GATE] = GateKind.ALWAYS  # there the sensor's value does not matter
    case.row_scores[:] = 1e3  # every gate opens
    for _, decided in both_forms(implementation, case):
        sensors = torch.tensor([True, False, False, True])
        assert (decided.values[:, sensors] == 1).all()
        others = [layer for layer in range(5) if layer != case.layer]
        assert_same_bits(decided.values[others][:, ~sensors], case.values[others][:, ~sensors])
        assert_same_bits(decided.scores[others], case.scores[others])
        for r, q in enumerate(case.sequence.tolist()):
            for k in range(2):
                slot = int(case.slots[r, k])
                want = case.all_scales[:, r, k].clone()
                which = slice(None) if slot == 0 else case.layer
                want[which] = case.tables[which, slot, 2]
                assert torch.equal(decided.all_scales[:, r, k], want), (q, k)


def test_only_what_decides_is_written(implementation: Implementation) -> None:
    """Decided rows beside undecided ones, padding, slots -1 and slots that do not decide."""
    case = prompts([4, 3, 5, 2], before=1, readings=READINGS, stack=2, seed=2)
    case.deciding[1] = -1
    slots = torch.tensor([[0, 1], [2, 3], [4, -1], [5, 0]])
    case.tables[:, 5, DECIDES] = Decides.NOTHING
    case.decider_slots[:] = slots.flatten()
    case.slots[:] = torch.where(case.sequence[:, None] >= 0, slots[case.sequence.clamp(min=0).long()], -1)
    for name in ("scores", "values", "all_scales"):
        bits(getattr(case, name))[:] = 0x7FC12345  # a NaN to recognise
    for name in ("steer_.deciding", "add_steer_rms_norm.deciding"):
        CHECKS[name](implementation, replace(case, all_scales=case.all_scales.nan_to_num(0.0)))
    for _, decided in both_forms(implementation, case):
        same = [bits(getattr(decided, name)) == bits(getattr(case, name)) for name in DECISIONS[1:]]
        for where, kept in zip(same, (case.scores, case.values), strict=False):
            assert where[:, 2:4].all()  # the sequence that goes on
            assert where[:, [5, 6]].all()
            assert not where[case.layer, [0, 1]].any()
            assert kept.isnan().all()
        assert same[2][:, case.sequence <= 0][:, :1].all()  # padding
        assert same[2][:, case.sequence == 1].all()


def test_what_nobody_reads_may_be_anything(implementation: Implementation) -> None:
    case = prompts([3, 4, 2], readings=(Reading.BOTH,), stack=2)
    case.deciding[1] = -1
    case.counted[2:4] = torch.tensor([4, 6, 8])  # the first row of sequence 1 does not count
    case.decider_slots[4], case.slots[7:, 0] = -1, -1
    dirty = case.on("cpu")
    dirty.x[3] = NAN
    dirty.slots[3] = case.slots[3] = -1
    for name in ("scores", "values"):
        getattr(dirty, name)[:] = NAN  # decisions are written and not read
    dirty.last_scores[:], dirty.row_scores[:] = NAN, NAN
    mine, theirs = dirty.scored_by(implementation), case.scored_by(implementation)
    for (outputs, decided), (wanted, want) in zip(
        both_forms(implementation, mine), both_forms(implementation, theirs), strict=True
    ):
        others = torch.arange(len(case.x)) != 3
        for a, b in zip(outputs, wanted, strict=True):
            assert_same_bits(a[others], b[others])
        assert_same_bits(decided.sums, want.sums)
        assert_same_bits(decided.all_scales, want.all_scales)
        assert_same_bits(decided.scores[case.layer, [0, 1, 5]], want.scores[case.layer, [0, 1, 5]])


@pytest.mark.parametrize("sharpness", [0.0, 4.0])
def test_one_row_that_is_not_a_number_opens_its_gate(implementation: Implementation, sharpness: float) -> None:
    case = prompts([2, 2, 2], stack=1, slots=1, pair=False)
    columns = {"READING": Reading.MEAN, "DECIDES": Decides.HERE, "SHARPNESS": sharpness, "THRESHOLD": 1e4}
    case = case.plain(GATE=GateKind.PROMPT, **columns)
    case.x[1], case.x[4], case.deciding[2] = NAN, NAN, -1
    _, decided = both_forms(implementation, case.scored_by(implementation))[0]
    assert decided.values[case.layer, :2].tolist() == [1.0, 0.0]
    assert decided.scores[case.layer, 0].isnan()
    assert decided.sums[case.layer].isnan().tolist() == [False, False, True]


def test_an_empty_mean_has_no_score_and_opens(implementation: Implementation) -> None:
    case = prompts([2], stack=1, readings=(Reading.MEAN,))
    case.counted[:] = 0
    for _, decided in both_forms(implementation, case):
        assert decided.scores[case.layer].isnan().all()
        assert (decided.values[case.layer] == 1).all()


# ---- chunks ------------------------------------------------------------------------------------------------


@settings(fuzz, max_examples=6)  # each runs up to four launches, which the interpreter takes seconds for
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(1, 7), max_size=3, unique=True).map(sorted),
    dtype=st.sampled_from(DTYPES),
    stack=st.integers(1, 4),
    pair=st.booleans(),
)
def test_a_prompt_in_chunks_has_the_mean_of_one(
    implementation: Implementation, seed: int, cuts: list[int], dtype: torch.dtype, stack: int, pair: bool
) -> None:
    once = prompts([8], size=33, dtype=dtype, stack=stack, pair=pair, seed=seed, readings=READINGS)
    want = once.scored_by(implementation).decide_steer(implementation)[1]
    state = once
    for first, until in zip([0, *cuts], [*cuts, 8], strict=True):
        part = state.select(torch.arange(first, until))
        part.deciding[:] = until - first - 1 if until == 8 else -1
        part = replace(part, counted=torch.tensor([[0, until - first, 8]] * stack, dtype=torch.int32))
        outputs, decided = both_forms(implementation, part.scored_by(implementation))[0]
        if until < 8:
            assert_same_bits(decided.all_scales, part.all_scales)  # nothing is decided before the last row
            assert_same_bits(decided.scores, state.scores)
            assert_same_bits(decided.values, state.values)
            assert_same_bits(outputs[0], part.run_steer(implementation))
        state = replace(state, **{name: getattr(decided, name) for name in DECISIONS[:3]})
    torch.testing.assert_close(state.scores, want.scores, rtol=2.0**-22, atol=1e-9)
    torch.testing.assert_close(state.values, want.values, rtol=1e-5, atol=1e-6)


def test_sums_of_chunks_add_up(implementation: Implementation) -> None:
    case = prompts([9], stack=2, readings=(Reading.MEAN,))
    case.deciding[:] = -1
    whole = case.decide_steer(implementation)[1].sums
    first = replace(case, counted=torch.tensor([[0, 4, 9]] * 2, dtype=torch.int32)).decide_steer(implementation)[1]
    second = replace(case, counted=torch.tensor([[4, 9, 9]] * 2, dtype=torch.int32), sums=first.sums)
    torch.testing.assert_close(second.decide_steer(implementation)[1].sums, whole, rtol=1e-14, atol=1e-14)
    exact = case.row_scores.double().sum(0)
    torch.testing.assert_close(whole[case.layer], exact, rtol=1e-14, atol=1e-14)


def test_a_mean_of_more_rows_than_one_chunk_of_the_kernel(implementation: Implementation) -> None:
    case = prompts([1100], size=1, stack=1, slots=1, readings=(Reading.MEAN,), edits=(EditId.ADD,))
    case.slots[:-1] = -1  # only the last row is edited, and so only two programs add the rows up
    _, decided = case.decide_steer(implementation)
    score = case.row_scores.double().mean()
    assert float(decided.scores[case.layer, 0]) == pytest.approx(float(score), rel=1e-6)


# ---- no race -----------------------------------------------------------------------------------------------


def test_a_decision_does_not_depend_on_its_batch(implementation: Implementation) -> None:
    """The same prompt alone, behind others, and among padding: the same bits of scores, values, scales and rows."""
    for before in (0, 3):
        case = prompts([2, 4, 3], size=321, before=before, dtype=torch.float16, readings=READINGS)
        case = case.scored_by(implementation)
        whole = both_forms(implementation, case)
        for q in range(3):
            rows = (case.sequence == q).nonzero().flatten()
            mine = slice(2 * q, 2 * q + 2)
            of_decider = {name: getattr(case, name)[:, mine] for name in DECISIONS[:3]}
            counted = case.counted[mine] - torch.tensor([rows[0], rows[0], 0], dtype=torch.int32)
            alone = replace(
                case.select(rows),
                sequence=torch.zeros(len(rows), dtype=torch.int32),
                deciding=case.deciding[q : q + 1] - int(rows[0]),
                counted=counted.int().contiguous(),
                decider_slots=case.decider_slots[mine],
                strength=case.strength[mine],
                last_scores=case.last_scores[mine],
                **{name: tensor.contiguous() for name, tensor in of_decider.items()},
            )
            rescored = alone.scored_by(implementation)
            assert_equal(implementation, rescored.last_scores, alone.last_scores)
            assert_equal(implementation, rescored.row_scores, alone.row_scores)
            for (outputs, decided), (wanted, want) in zip(both_forms(implementation, alone), whole, strict=True):
                for got, other in zip(outputs, wanted, strict=True):
                    assert_equal(implementation, got, other[rows])
                for name in DECISIONS[:3]:
                    assert_equal(implementation, getattr(decided, name), getattr(want, name)[:, mine])
                assert_equal(implementation, decided.all_scales, want.all_scales[:, rows])


def test_it_does_not_matter_which_program_runs_first(implementation: Implementation) -> None:
    """A launch over decisions that are already there makes them again: nothing that it reads is written by it.

    The sums of a prompt that goes on are the exception; one program reads and writes each.
    """
    case = prompts([4, 7, 3], size=33, readings=READINGS).scored_by(implementation)
    for outputs, decided in both_forms(implementation, case):
        again = replace(case, **{name: getattr(decided, name) for name in DECISIONS})
        poisoned = replace(
            again,
            scores=torch.full_like(case.scores, NAN),
            values=torch.where(decided.values == case.values, case.values, NAN),
            all_scales=torch.where(decided.all_scales == case.all_scales, case.all_scales, NAN),
        )
        for other in (again, poisoned):
            form = both_forms(implementation, other)[len(outputs) - 1]
            for got, want in zip(form[0], outputs, strict=True):
                assert_same_bits(got, want)
            assert_same_bits(form[1].all_scales, decided.all_scales)


def test_gates_read_the_unsteered_rows(implementation: Implementation) -> None:
    """All rows are edited, by every edit, and every gate has read them as they came in."""
    for edit in EditId:
        case = prompts([5], slots=1, stack=1)
        columns = {"SHARPNESS": 2.0, "LOW": 0.6, "HIGH": 0.8, "DECIDES": Decides.HERE, "READING": Reading.BOTH}
        case = case.plain(EDIT=edit, GATE=GateKind.PROMPT, THRESHOLD=0.1, **columns).scored_by(implementation)
        (x,), decided = both_forms(implementation, case)[0]
        assert (x != case.x).any(1).all()
        wanted = gate_module.reference_decide(case.slots, case.gates)
        for got, want in zip(decisions(decided), wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_kinds_matter_in_a_launch_that_decides(implementation: Implementation) -> None:
    case = prompts([4], edits=(EditId.KEEP_NORM,), decides=(Decides.HERE,)).scored_by(implementation)
    case.row_scores[:], case.last_scores[:] = 1e3, 1e3
    added = replace(case, kinds=Kinds.LATCHED_ADD)
    assert not torch.equal(case.decide_steer(implementation)[0], added.decide_steer(implementation)[0])


def test_schemas_say_what_is_written() -> None:
    """In place, a row could already be edited: no deciding op takes directions for means or scores a row itself."""
    ops = torch.ops.steerfast
    assert sorted(ops.steer_.overloads()) == sorted(ops.add_steer_rms_norm.overloads()) == ["deciding", "default"]
    for op, written in (
        (ops.score_.default, ["row_scores", "last_scores"]),
        (ops.steer_.deciding, ["x", "sums", "scores", "values", "scales"]),
        (ops.add_steer_rms_norm.deciding, ["sums", "scores", "values", "scales"]),
    ):
        aliased = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert aliased == written


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_replayed_graph_decides_what_its_buffers_hold() -> None:
    lengths, options = [17, 40, 7], {"size": 1024, "dtype": torch.bfloat16, "readings": READINGS}

    def step(case: Case) -> None:
        TRITON.score_(*case.score_arguments())
        TRITON.steer_(*case.steer_arguments(), case.gates)

    fixed = prompts(lengths, **options).on("cuda")
    step(fixed.on("cuda"))  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(fixed)
    for seed in range(1, 5):
        other = prompts(lengths, seed=seed, **options).on("cuda")
        for name, tensor in vars(other).items():
            if isinstance(tensor, torch.Tensor):
                getattr(fixed, name).copy_(tensor)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            step(other)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for name in ("x", *DECISIONS):
            assert_same_bits(getattr(fixed, name).cpu(), getattr(other, name).cpu())

"""add_steer_rms_norm.prompt: prompt gates decided in the launch that applies them, without a race."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, Case, Implementation, assert_same_bits, bits, make_case

from steerfast.kernels import steer as steer_module
from steerfast.kernels.contract import EDIT, GATE, SHARPNESS, EditId, GateKind, GateOperands, Kinds, Norm

pytestmark = pytest.mark.contract

NAN = float("nan")


def prompt_case(dtype: torch.dtype = torch.float16, rows: int = 12, seed: int = 0, **options: int) -> Case:
    """Sequences of several rows, most of which decide at one of them; half the gates are the prompt's."""
    gates = (GateKind.PROMPT, GateKind.PROMPT, GateKind.TOKEN, GateKind.ALWAYS)
    case = make_case(
        rows, 111, dtype, stack=2, slots=6, sequences=4, gates=gates, pair=True, shared=True, seed=seed, **options
    )
    case.strength[:] = 1.0
    return case


def decided(case: Case) -> torch.Tensor:
    """Which latches [n, K] the launch decides."""
    which = torch.zeros(case.values.shape, dtype=torch.bool)
    for q, p in enumerate(case.deciding.tolist()):
        for k, slot in enumerate(case.rows[p, 1:].tolist() if p >= 0 else []):
            which[q, k] = slot >= 0 and case.table[slot, GATE] == GateKind.PROMPT
    return which


def in_two_steps(implementation: Implementation, case: Case) -> tuple[torch.Tensor, ...]:
    """The same by gate_ and the overload that reads latches."""
    moved = case.on(implementation.device)
    at = case.deciding.clamp(min=0).long()
    slot = torch.where(decided(case), case.rows[at, 1:], -1)
    scores, values = torch.zeros_like(moved.scores), torch.zeros_like(moved.values)
    gates = GateOperands(slot.to(moved.x.device), moved.directions, moved.table, scores, values)
    implementation.gate_(moved.x, moved.residual, moved.deciding, gates)
    which = decided(case).to(moved.x.device)
    moved = replace(
        moved,
        scores=torch.where(which, scores, moved.scores),
        values=torch.where(which, values, moved.values),
    )
    outputs = implementation.add_steer_rms_norm(*replace(moved, kinds=Kinds.ANY).norm_arguments())
    return tuple(t.cpu() for t in (*outputs, moved.scores, moved.values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_gate_then_latched(implementation: Implementation, dtype: torch.dtype) -> None:
    for seed in range(2 if implementation.interpreted else 25):
        case = prompt_case(dtype, 7 if implementation.interpreted else 30, seed=seed, norm=Norm(seed % len(Norm)))
        for got, want in zip(case.run_prompt(implementation), in_two_steps(implementation, case), strict=True):
            if implementation.name.startswith("torch"):
                torch.testing.assert_close(got, want)
            else:
                assert_same_bits(got, want)


def test_only_the_decided_latches_are_written(implementation: Implementation) -> None:
    case = prompt_case(rows=16, seed=1)
    which = decided(case)
    assert which.any()
    assert not which.all()
    case.scores[:], case.values[~which] = NAN, torch.tensor(-0.0)
    bits(case.scores)[:] = 0x7FC12345  # a NaN to recognise
    *_, scores, values = case.run_prompt(implementation)
    assert_same_bits(scores[~which], case.scores[~which])
    assert_same_bits(values[~which], case.values[~which])
    assert torch.isfinite(scores[which]).all()
    assert ((values[which] >= 0) & (values[which] <= 1)).all()


def test_latches_of_deciding_sequences_are_not_read(implementation: Implementation) -> None:
    """So that it does not matter when the program of the deciding row stores them."""
    for seed in range(2):
        case = prompt_case(rows=8, seed=seed)
        which = decided(case)
        want = case.run_prompt(implementation)
        after = replace(case, scores=want[2].clone(), values=want[3].clone())  # another program was first
        poisoned = replace(case, scores=case.scores.masked_fill(which, NAN), values=case.values.masked_fill(which, NAN))
        for other in (after, poisoned):
            for got, expected in zip(other.run_prompt(implementation), want, strict=True):
                assert_same_bits(got, expected)


def test_order_of_the_rows_does_not_matter(implementation: Implementation) -> None:
    """The interpreter runs programs in the order of the rows: rows of a sequence before, at and after the one that
    decides get the same bits in any order."""
    case = prompt_case(rows=10, seed=2)
    want = case.run_prompt(implementation)
    g = torch.Generator().manual_seed(3)
    for order in (torch.arange(9, -1, -1), *(torch.randperm(10, generator=g) for _ in range(3))):
        place = torch.argsort(order).int()
        deciding = torch.where(case.deciding >= 0, place[case.deciding.clamp(min=0).long()], -1)
        got = replace(case.select(order), deciding=deciding).run_prompt(implementation)
        for a, b in zip(got, (want[0][order], want[1][order], *want[2:]), strict=True):
            if implementation.name.startswith("torch"):
                torch.testing.assert_close(a, b)
            else:
                assert_same_bits(a, b)


def test_gate_reads_the_unsteered_deciding_row(implementation: Implementation) -> None:
    """The deciding row is itself steered, by every edit, and all rows of the sequence still read it as it came in."""
    for edit in EditId:
        case = make_case(5, 111, sequences=1, slots=1, shared=True, seed=4)
        case = case.plain(EDIT=edit, GATE=GateKind.PROMPT, SHARPNESS=2.0, LOW=0.6, HIGH=0.8, THRESHOLD=0.1)
        case.rows[:], case.deciding[:] = 0, 3
        normed, new_residual, scores, values = case.run_prompt(implementation)
        for got, want in zip(
            replace(case, values=values).run_norm(implementation), (normed, new_residual), strict=True
        ):
            torch.testing.assert_close(got, want)
        alone = replace(case.select(torch.tensor([3])), deciding=torch.zeros(1, dtype=torch.int32))
        ours = (normed[3:4], new_residual[3:4], scores, values)
        for got, want in zip(alone.run_prompt(implementation), ours, strict=True):
            torch.testing.assert_close(got, want)
        s = (case.x[3] + case.residual[3]).double()
        d = case.directions[0].double()
        score = s @ d / (s.norm() if case.table[0, 9] else 1)
        assert scores.item() == pytest.approx(score.item(), abs=1e-5 * s.norm().item())
        assert (new_residual != case.x + case.residual).any(1).all()


def test_latched_sequences_read_their_latch(implementation: Implementation) -> None:
    case = prompt_case(seed=5)
    case.deciding[:] = -1
    for got, want in zip(case.run_prompt(implementation), in_two_steps(implementation, case), strict=True):
        assert_same_bits(got, want)
    assert_same_bits(case.run_prompt(implementation)[3], case.values)


def test_kinds_are_any(implementation: Implementation) -> None:
    case = prompt_case(seed=6)
    case.table[:, EDIT], case.table[:, SHARPNESS] = EditId.KEEP_NORM, 1.0
    added = case.table.clone()
    added[:, EDIT] = EditId.ADD
    assert not torch.equal(case.run_prompt(implementation)[1], replace(case, table=added).run_prompt(implementation)[1])


def test_steer_in_place_never_reads_another_row() -> None:
    """In place, the row that decides could already be edited: the op has no argument that names one."""
    assert torch.ops.steerfast.steer_.overloads() == ["default"]
    names = [argument.name for argument in torch.ops.steerfast.steer_.default._schema.arguments]
    assert names == ["x", "residual", "rows", "values", "strength", "vectors", "directions", "table", "kinds"]
    assert "deciding" not in steer_module.steer_.__code__.co_varnames

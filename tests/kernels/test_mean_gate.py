"""The gate that reads the mean of many rows, over every implementation of the one that reads a row, against a loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CUDA, DTYPES, Case, Implementation, assert_same_bits, make_case, read_gate

from steerfast.kernels import gate as gate_module
from steerfast.kernels.contract import SHARPNESS, THRESHOLD, GateKind
from steerfast.kernels.gate import mean_gate_unchecked_

NAN = float("nan")
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Means:
    """A case's rows as parts of prompts. Running them leaves it as it is."""

    case: Case
    member: torch.Tensor
    total: torch.Tensor
    closes: torch.Tensor
    sums: torch.Tensor

    def on(self, device: str) -> Means:
        tensors = {f.name: getattr(self, f.name).to(device, copy=True) for f in fields(self) if f.name != "case"}
        return Means(self.case.on(device), **tensors)

    def arguments(self) -> tuple[Any, ...]:
        case = self.case
        residual = case.residual if case.pair else None
        return (case.x, residual, self.member, self.total, self.closes, self.sums, case.gates)

    def part(self, start: int, end: int, closes: torch.Tensor) -> Means:
        """Some of its rows."""
        case = replace(self.case, x=self.case.x[start:end], residual=self.case.residual[start:end])
        return replace(self, case=case, member=self.member[start:end], closes=closes)

    def run(self, implementation: Implementation) -> tuple[torch.Tensor, ...]:
        """Sums, scores and values afterwards."""
        moved = self.on(implementation.device)
        mean_gate_unchecked_(*moved.arguments())
        return moved.sums.cpu(), moved.case.scores.cpu(), moved.case.values.cpu()


def make_means(seed: int, **options: Any) -> Means:
    """Rows of some sequences in any order, or of none; some prompts end here, and some began before."""
    case = make_case(seed=seed, gates=(GateKind.PROMPT,), **options)
    g = torch.Generator().manual_seed(seed)
    count = len(case.slot)
    member = torch.randint(-1, count, (len(case.x),), generator=g, dtype=torch.int32)
    before = torch.randint(0, 4, (count,), generator=g)
    here = torch.tensor([int((member == i).sum()) for i in range(count)], dtype=torch.long)
    closes = (here > 0) & (torch.rand(count, generator=g) < 0.7)
    sums = before[:, None] * torch.rand(count, case.slot.shape[1], generator=g, dtype=torch.float64)
    return Means(case, member, (before + here).int(), closes, torch.where(case.slot >= 0, sums, 0.0))


@pytest.fixture
def implementation(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> Implementation:
    """The implementation, which also scores the rows of a mean."""
    monkeypatch.setattr(gate_module, "gate_unchecked_", implementation.gate_)
    return implementation


@settings(fuzz, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    means=st.builds(
        make_means,
        seed=st.integers(0, 2**32 - 1),
        rows=st.integers(0, 9),
        size=st.sampled_from([1, 7, 111, 576]),
        dtype=st.sampled_from(DTYPES),
        bank_dtype=st.sampled_from(DTYPES),
        stack=st.integers(1, 4),
        slots=st.integers(1, 4),
        sequences=st.integers(1, 4),
        strided=st.booleans(),
        pair=st.booleans(),
    )
)
def test_means_equal_a_loop(implementation: Implementation, means: Means) -> None:
    case = means.case
    sums, scores, values = means.run(implementation)
    assert (sums.dtype, scores.dtype, values.dtype) == (torch.float64, torch.float32, torch.float32)
    stream = gate_module.reference_stream(case.x, case.residual if case.pair else None)
    truncated = implementation.truncates(case.x.dtype) and case.pair
    stream_error = torch.finfo(case.x.dtype).eps if truncated else 0.0
    for i, slots in enumerate(case.slot.tolist()):
        rows = (means.member == i).nonzero().flatten().tolist()
        for k, slot in enumerate(slots):
            total, error = float(means.sums[i, k]), 0.0
            for row in rows if slot >= 0 else []:
                reading = read_gate(stream[row], case.directions[slot], case.table[slot], stream_error)
                total, error = total + reading.score, error + reading.score_error
            assert float(sums[i, k]) == pytest.approx(total, abs=error + 1e-12)
            if not means.closes[i]:
                assert_same_bits(scores[i, k], case.scores[i, k])
                assert_same_bits(values[i, k], case.values[i, k])
            elif slot < 0:
                assert scores[i, k] == values[i, k] == 0
            else:
                mean, error = total / int(means.total[i]), error / int(means.total[i])
                error += 2.0**-23 * abs(mean)
                assert float(scores[i, k]) == pytest.approx(mean, abs=error)
                above = mean - float(case.table[slot, THRESHOLD])
                sharpness = float(case.table[slot, SHARPNESS])
                if sharpness:
                    soft = 1 / (1 + math.exp(-sharpness * above))
                    assert float(values[i, k]) == pytest.approx(soft, abs=sharpness * (error + 1e-6) + 1e-6)
                elif abs(above) > error:
                    assert values[i, k] == (above > 0)


@fuzz
@given(
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    stack=st.integers(1, 3),
    pair=st.booleans(),
)
def test_a_prompt_in_two_steps_has_the_mean_of_one(
    seed: int, cut: int, dtype: torch.dtype, stack: int, pair: bool
) -> None:
    means = make_means(seed, rows=9, size=111, dtype=dtype, stack=stack, pair=pair)
    once, twice = means.on("cpu"), means.on("cpu")
    mean_gate_unchecked_(*once.arguments())
    first = twice.part(0, cut, torch.zeros_like(means.closes))
    mean_gate_unchecked_(*first.arguments())
    assert_same_bits(first.case.scores, means.case.scores)  # nothing is latched before the last row
    assert_same_bits(first.case.values, means.case.values)
    mean_gate_unchecked_(*twice.part(cut, 9, means.closes).arguments())
    torch.testing.assert_close(twice.sums, once.sums, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(twice.case.scores, once.case.scores, rtol=2.0**-23, atol=1e-12)
    torch.testing.assert_close(twice.case.values, once.case.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharpness", [0.0, 4.0])
def test_one_row_that_is_not_a_number_opens_its_gate(implementation: Implementation, sharpness: float) -> None:
    means = make_means(3, rows=6, size=111, sequences=3, slots=1)
    case = means.case.plain(GATE=GateKind.PROMPT, SHARPNESS=sharpness, THRESHOLD=50.0)
    case.slot[:] = 0
    case.x[1], case.x[5] = NAN, NAN
    means = replace(
        means,
        case=case,
        member=torch.tensor([0, 0, 1, 1, 2, -1], dtype=torch.int32),  # the last row is nobody's
        total=torch.tensor([2, 2, 2], dtype=torch.int32),
        closes=torch.tensor([True, True, False]),
        sums=torch.zeros(3, 1, dtype=torch.float64),
    )
    sums, scores, values = means.run(implementation)
    assert sums.isnan().flatten().tolist() == scores.isnan().flatten().tolist() == [True, False, False]
    assert values[0] == 1
    assert values[1] < 1e-6
    assert_same_bits(values[2], case.values[2])


def test_padding_and_steps_without_a_member_leave_everything(implementation: Implementation) -> None:
    means = make_means(4, rows=6, size=111, stack=2)
    case = means.case
    case.x[:] = NAN
    means = replace(means, member=torch.full_like(means.member, -1), closes=torch.zeros_like(means.closes))
    means.total[:] = 0
    sums, scores, values = means.run(implementation)
    assert torch.equal(sums, means.sums)
    assert_same_bits(scores, case.scores)
    assert_same_bits(values, case.values)
    nothing = means.part(0, 0, means.closes)
    assert torch.equal(nothing.run(implementation)[0], means.sums)
    nobody = make_means(4, rows=0, size=111)
    assert [len(tensor) for tensor in nobody.run(implementation)] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_replayed_graph_adds_up_what_its_buffers_hold() -> None:
    fixed = make_means(0, rows=64, size=1024, slots=6, stack=2, dtype=torch.bfloat16, pair=True).on("cuda")
    mean_gate_unchecked_(*fixed.on("cuda").arguments())  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mean_gate_unchecked_(*fixed.arguments())
    for seed in range(1, 5):
        other = make_means(seed, rows=64, size=1024, slots=6, stack=2, dtype=torch.bfloat16, pair=True).on("cuda")
        for mine, theirs in ((fixed, other), (fixed.case, other.case)):
            for name, tensor in vars(theirs).items():
                if isinstance(tensor, torch.Tensor):
                    getattr(mine, name).copy_(tensor)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            mean_gate_unchecked_(*other.arguments())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(fixed.sums, other.sums, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fixed.case.scores, other.case.scores, rtol=2.0**-22, atol=1e-7)
        torch.testing.assert_close(fixed.case.values, other.case.values, rtol=1e-5, atol=1e-6)

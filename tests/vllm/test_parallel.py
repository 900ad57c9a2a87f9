"""Tensor parallelism without a GPU: a toy model split over ranks, which are threads, or processes of gloo.

Models of vLLM differ in what a layer hands on: rows that are whole on every rank, partial sums that the next layer adds
up (`deferred`), or some rows on each rank (`shards`). Needs no vLLM.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import HIDDEN, LAYERS, asked, random_rows

from steerfast.errors import ArchitectureError
from steerfast.kernels.contract import Kinds
from steerfast.profile import SteeringProfile
from steerfast.runtime.span import EditSpan, Entry
from steerfast.vllm.assignment import stack_to_extra
from steerfast.vllm.config import ServingConfig, layers_of, reading_layers
from steerfast.vllm.layers import wrap_forward
from steerfast.vllm.ops import activate
from steerfast.vllm.ranks import RowLayout, gather_ranks, sums_exactly
from steerfast.vllm.worker import WorkerRuntime, WorkerShape

RANKS, PROMPT = 4, 5
ROWS = 8  # of a pass


@dataclass
class Rank:
    """The place of a worker, and the collectives of its group."""

    number: int
    ranks: int
    reduce: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]

    def part(self, tensor: Tensor) -> Tensor:
        """Its part of the first dimension."""
        return tensor.chunk(self.ranks)[self.number]


ALONE = Rank(0, 1, lambda x: x, lambda own: own[None])


class Layer(nn.Module):
    """residual + tanh(residual) · W; each rank has some rows of W."""

    def __init__(self, at: int, layout: str, rank: Rank) -> None:
        super().__init__()
        self.layout, self.rank = layout, rank
        self.weight = rank.part(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(at)) / 4)

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = self.rank.part(x) if self.layout == "shards" else x
        else:
            residual = residual + (self.rank.reduce(x) if self.layout == "deferred" else x)
        if self.layout == "shards":
            whole = torch.zeros(len(positions), HIDDEN)
            self.rank.part(whole).copy_(residual)
            return self.rank.part(self.multiply(self.rank.reduce(whole), True)), residual
        return self.multiply(residual, self.layout == "whole"), residual

    def multiply(self, rows: Tensor, reduces: bool) -> Tensor:
        own = self.rank.part(rows.tanh().T).T @ self.weight
        return self.rank.reduce(own) if reduces else own


class Toy(nn.Module):
    def __init__(self, layout: str, rank: Rank) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(at, layout, rank) for at in range(LAYERS))
        self.layout, self.rank = layout, rank

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        x, residual = rows.clone(), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return residual + (self.rank.reduce(x) if self.layout == "deferred" else x)


class EachRank:
    """Lets threads of one process each have a runtime."""

    def __init__(self) -> None:
        self.here = threading.local()

    def serve(self, stream: Tensor, addend: Tensor | None, layer: int) -> None:
        self.here.runtime.serve(stream, addend, layer)


class Threads:
    """The collectives of ranks that are threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.given: list[Any] = [None] * ranks
        self.gathered = 0

    def exchange(self, number: int, own: Tensor) -> list[Tensor]:
        self.given[number] = own
        self.barrier.wait()
        every = list(self.given)
        self.barrier.wait()
        return every

    def rank(self, number: int) -> Rank:
        def gather(own: Tensor) -> Tensor:
            self.gathered += number == 0
            return torch.stack(self.exchange(number, own))

        return Rank(number, len(self.given), lambda x: sum(self.exchange(number, x)), gather)


def runtime_of(model: Toy, profile: SteeringProfile, path: str) -> WorkerRuntime:
    """Steer a rank as `steerfast.vllm.runners.attach` does."""
    layers, reading = layers_of(profile), reading_layers(profile)
    kinds = Kinds.LATCHED_ADD if profile.edit == "add" else Kinds.ANY
    config = ServingConfig(
        {"one": path}, None, False, 2, tuple(sorted(layers)), int(kinds), None, "", reading=tuple(sorted(reading))
    )
    layout = RowLayout("ToyForCausalLM", model.rank.ranks, model.rank.gather)
    layout.watch(model)
    wrap_forward(Layer)
    for at in layers:
        layer: Any = model.layers[at]
        layer.steerfast_layer, layer.steerfast_width = at, HIDDEN
        layer.steerfast_adds, layer.steerfast_reads = True, at in reading
    return WorkerRuntime(config, profile.model, layers, torch.device("cpu"), WorkerShape(16, 4), layout)


def answer(layout: str, rank: Rank, profile: SteeringProfile, path: str, each: EachRank, passes: int = 1) -> Any:
    """The stream of the last of some passes of one request, and its decision; or the error."""
    model = Toy(layout, rank)
    each.here.runtime = runtime = runtime_of(model, profile, path)
    extra = stack_to_extra((Entry(0, 1.0, EditSpan.of(profile)),))
    new = [asked("a", extra, PROMPT)]
    decided, rows = None, torch.empty(0)
    for number in range(passes):
        runtime.begin(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[] if number else new))
        runtime.step(["a"], [number * ROWS], [ROWS], ROWS)
        activate(each)
        try:
            rows = model(random_rows(ROWS, number), torch.arange(ROWS))
        except ArchitectureError as error:
            return str(error)
        output = runtime.report(runtime.launched(SimpleNamespace()))
        decided = decided or getattr(output, "steerfast", {}).get("a")
    return rows, decided


@pytest.fixture
def answers(tmp_path, monkeypatch) -> Callable[..., list[Any]]:
    monkeypatch.setattr("steerfast.vllm.worker.activate", lambda server: None)  # in vLLM, a rank has a process

    def ask(layout: str, profile: SteeringProfile, group: Threads | None = None, passes: int = 1) -> list[Any]:
        path, each = str(tmp_path / "p.safetensors"), EachRank()
        profile.save(path)
        ranks = [ALONE] if group is None else [group.rank(number) for number in range(len(group.given))]
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(lambda rank: answer(layout, rank, profile, path, each, passes), ranks))

    return ask


@pytest.mark.parametrize("name", ["own", "sensor", "mean", "always", "everywhere"])
def test_whole_rows_are_steered_alike_on_all_ranks(answers, profiles, name) -> None:
    [(expected, decision)] = answers("whole", profiles[name])
    found = answers("whole", profiles[name], Threads(RANKS))
    for rows, decided in found:
        assert torch.equal(rows, found[0][0])
        assert decided == found[0][1]
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-4)
        for (values, scores), (known_values, known_scores) in zip(decided, decision, strict=True):
            assert values == known_values
            assert scores == pytest.approx(known_scores, abs=1e-4)


@pytest.mark.parametrize("name", ["always", "everywhere"])
def test_partial_sums_are_not_touched_and_rows_are_displaced_once(answers, profiles, name) -> None:
    off = profiles[name].with_band(profiles[name].steered_layers, 1e-30)
    [(expected, _)], [(plain, _)] = answers("whole", profiles[name]), answers("whole", off)
    found = answers("deferred", profiles[name], Threads(RANKS))
    for rows, _ in found:
        assert torch.equal(rows, found[0][0])
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def refused(answers: Any, layout: str, profile: SteeringProfile) -> str:
    """The error of all ranks."""
    found = answers(layout, profile, Threads(RANKS))
    assert all(isinstance(error, str) for error in found), found
    assert len({*found}) == 1
    return found[0]


@pytest.mark.parametrize(("name", "layer"), [("own", 1), ("sensor", 1), ("soft", 0), ("recent", 2)])
def test_a_gate_on_partial_sums_is_refused(answers, profiles, name, layer) -> None:
    error = refused(answers, "deferred", profiles[name])
    assert f"ToyForCausalLM leaves the output of layer {layer} un-reduced on 4 tensor-parallel ranks" in error
    assert "use profiles that only add, without a gate at that layer, or --tensor-parallel-size 1" in error


def test_an_edit_that_reads_partial_sums_is_refused(answers, profiles) -> None:
    error = refused(answers, "deferred", replace(profiles["always"], edit="keep_norm"))
    assert "ToyForCausalLM leaves the output of layer 2 un-reduced" in error


@pytest.mark.parametrize(("name", "layer"), [("own", 1), ("always", 2), ("everywhere", 1)])
def test_rows_that_are_spread_over_ranks_are_refused(answers, profiles, name, layer) -> None:
    error = refused(answers, "shards", profiles[name])
    assert f"expected ToyForCausalLM to hand on all 8 rows after layer {layer}, got 2" in error
    assert "--enable-expert-parallel" in error


def test_ranks_are_compared_in_the_first_pass_alone(answers, profiles) -> None:
    group = Threads(2)
    assert all(not isinstance(found, str) for found in answers("whole", profiles["own"], group, passes=3))
    assert group.gathered == len(layers_of(profiles["own"])) == 2


# -- the check ---------------------------------------------------------------------------------------------------------


def compared(ranks: list[tuple[Tensor, Tensor | None]], exact: bool = True) -> None:
    """Check one layer on ranks with these streams and addends."""
    group = Threads(len(ranks))

    def check(number: int) -> None:
        layout = RowLayout("Toy", len(ranks), group.rank(number).gather, exact)
        layout.rows = len(ranks[0][0])
        layout.check(7, *ranks[number])

    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(check, range(len(ranks))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_of_one_row_tells_ranks_apart(dtype) -> None:
    rows = random_rows(6, 1).to(dtype)
    rows[2, 3] = torch.nan
    wide = torch.cat([rows, rows], dim=1)[:, :HIDDEN]  # the same bits, other strides
    compared([(rows, None), (wide, None), (rows.clone(), None)])
    other = rows.clone()
    other[4, 1] *= 1.01
    with pytest.raises(ArchitectureError, match="Toy hands on other rows of the residual stream after layer 7"):
        compared([(rows, None), (other, None)])
    with pytest.raises(ArchitectureError, match="Toy leaves the output of layer 7 un-reduced on 2"):
        compared([(rows, rows), (rows, other)])
    with pytest.raises(ArchitectureError, match="other rows"):
        compared([(rows, None), (rows.flip(0), None)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_ranks_that_add_up_in_another_order_may_differ_by_rounding(dtype) -> None:
    parts = [random_rows(6, seed) for seed in range(3)]
    rows = [sum(part.to(dtype) for part in order) for order in (parts, parts[1:] + parts[:1], parts[::-1])]
    assert not torch.equal(rows[0], rows[1])
    rows[0][2, 3] = rows[1][2, 3] = rows[2][2, 3] = torch.nan
    compared([(each, None) for each in rows], exact=False)
    compared([(each, each) for each in rows], exact=False)
    with pytest.raises(ArchitectureError, match="other rows of the residual stream"):
        compared([(each, None) for each in rows])
    other = rows[1] * 1.1
    with pytest.raises(ArchitectureError, match="other rows of the residual stream"):
        compared([(rows[0], None), (other, None)], exact=False)
    with pytest.raises(ArchitectureError, match="leaves the output of layer 7 un-reduced on 3"):
        compared([(rows[0], rows[0]), (rows[1], rows[1]), (rows[2], other)], exact=False)
    with pytest.raises(ArchitectureError, match="other rows"):
        compared([(rows[0], None), (rows[0].flip(0), None)], exact=False)
    with pytest.raises(ArchitectureError, match="other rows"):
        compared([(part.to(dtype), None) for part in parts], exact=False)


@pytest.mark.parametrize("large", [1000.0, torch.inf])
def test_no_large_row_hides_another(large) -> None:
    rows = random_rows(6, 1)
    rows[0] *= large
    other = rows.clone()
    compared([(rows, None), (other, None)], exact=False)
    other[4] = other[4].flip(0)
    with pytest.raises(ArchitectureError, match="other rows"):
        compared([(rows, None), (other, None)], exact=False)


@pytest.mark.parametrize(("turned", "exact"), [(0, True), (1, False)])
def test_a_group_is_asked_whether_its_sums_have_the_same_bits(turned, exact) -> None:
    threads = Threads(3)

    def ask(number: int) -> bool:
        def all_reduce(x: Tensor) -> Tensor:
            every = threads.exchange(number, x)
            first = turned * number
            return sum(every[first:] + every[:first])

        group = SimpleNamespace(world_size=3, rank_in_group=number, device=torch.device("cpu"), all_reduce=all_reduce)
        return sums_exactly(group, threads.rank(number).gather)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == [exact] * 3
    assert sums_exactly(SimpleNamespace(world_size=1), torch.stack)


def test_one_rank_alone_checks_its_rows() -> None:
    layout = RowLayout("Toy")
    layout.check(1, random_rows(5, 0), None)  # not known
    layout.rows = 8
    layout.check(1, random_rows(8, 0), None)
    with pytest.raises(ArchitectureError, match="expected Toy to hand on all 8 rows after layer 1, got 5"):
        layout.check(1, random_rows(5, 0), None)


@pytest.mark.parametrize("axes", [(), (3,)])
def test_the_rows_of_a_pass_are_those_of_its_positions(axes) -> None:
    class Model(nn.Module):
        def forward(self, input_ids: Any = None, positions: Any = None) -> int:
            return layout.rows or 0

    layout, model = RowLayout("Toy"), Model()
    layout.watch(model)
    assert model(positions=torch.zeros(*axes, 4)) == 4
    assert model(None, torch.zeros(*axes, 9)) == 9


# -- processes ---------------------------------------------------------------------------------------------------------


def reduced(x: Tensor) -> Tensor:
    y = x.clone()
    torch.distributed.all_reduce(y)
    return y


def run_rank(number: int, folder: str, profiles: dict[str, SteeringProfile], cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    rank, found = Rank(number, 2, reduced, gather_ranks), []
    for layout, name in cases:
        result = answer(layout, rank, profiles[name], f"{folder}/{name}.safetensors", EachRank())
        found.append(result if isinstance(result, str) else [result[0].tolist(), result[1]])
    Path(folder, f"{number}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_ranks_that_are_processes(profiles, tmp_path, answers) -> None:
    for name, profile in profiles.items():
        profile.save(tmp_path / f"{name}.safetensors")
    cases = [("whole", "sensor"), ("deferred", "always"), ("deferred", "sensor"), ("shards", "always")]
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), profiles, cases), nprocs=2)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == second
    for (_, name), (rows, decided) in zip(cases[:2], first[:2], strict=True):
        [(expected, decision)] = answers("whole", profiles[name])
        torch.testing.assert_close(torch.tensor(rows), expected, rtol=0, atol=1e-4)
        assert [values for values, _ in decided] == [values for values, _ in decision]
    assert "ToyForCausalLM leaves the output of layer 1 un-reduced on 2 tensor-parallel ranks" in first[2]
    assert "expected ToyForCausalLM to hand on all 8 rows after layer 2, got 4" in first[3]

"""What the ops read is what the profiles hold, at addresses that never change; a refused change changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.kernels import contract
from steerfast.kernels.contract import Decides, EditId, GateKind, Kinds, Operands, Reading, Score
from steerfast.kernels.edits import torch_scales
from steerfast.kernels.steer import reference, steer_
from steerfast.profile import Gate, SteeringProfile
from steerfast.runtime.bank import Bank, kinds_of
from steerfast.runtime.tables import PackedRows, StepTables

MakeProfile = Callable[..., SteeringProfile]
LAYERS, HIDDEN = 5, 32


def content(bank: Bank) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in bank.tensors)


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def touched(bank: Bank, slots: list[int], x: Tensor, layer: int = 2) -> list[bool]:
    """Which rows an edit by these slots moves, with every latched gate open."""
    part = bank.layer(layer)
    rows = torch.tensor([[slot] for slot in slots], dtype=torch.int32)
    every, none = torch.ones(len(bank.table), 1), torch.zeros(len(slots), dtype=torch.int32)
    scales = torch_scales(rows, every, torch.ones(1), none, bank.table)[layer]
    y = reference(x, None, Operands(rows, scales, part.vectors, part.directions, part.table, bank.kinds))
    return (y != x.double()).any(dim=1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_holds_its_profile(tiny_llama: Any, make_profile: MakeProfile, dtype: torch.dtype) -> None:
    profiles = [
        make_profile(
            tiny_llama, seed=seed, threshold=0.1 * seed, sharpness=float(seed), strength=0.5 + seed, score=score
        )
        for seed, score in enumerate(("cosine", "dot", "cosine"))
    ]
    bank = Bank(LAYERS, HIDDEN, 3, dtype=dtype)
    assert [bank.add(f"p{i}", profile) for i, profile in enumerate(profiles)] == [0, 1, 2]
    assert bank.names == ["p0", "p1", "p2"]
    for layer in range(LAYERS):
        part = bank.layer(layer)
        assert part.table.shape == (3, contract.TABLE_WIDTH)
        assert part.vectors.is_contiguous()
        assert part.table.is_contiguous()
        for slot, profile in enumerate(profiles):
            assert bank.slot(f"p{slot}") == slot
            assert bank.profile(f"p{slot}") is profile
            assert torch.equal(part.directions[slot], profile.direction[layer].to(dtype))
            assert torch.equal(part.vectors[slot], profile.vector[layer].to(dtype))
            row = part.table[slot]
            assert row[contract.THRESHOLD] == profile.threshold[layer]
            assert row[contract.SHARPNESS] == profile.gate.sharpness
            assert row[contract.STRENGTH] == profile.strength[layer]
            v, d = part.vectors[slot].double(), part.directions[slot].double()  # as stored
            assert row[contract.VECTOR_SQ] == (v @ v).float()
            torch.testing.assert_close(row[contract.VECTOR_DIRECTION].double(), v @ d, rtol=1e-6, atol=1e-6)
            assert row[contract.DIRECTION_SQ] == (d @ d).float()
            assert row[contract.GATE] == GateKind.PROMPT
            assert row[contract.SCORE] == (Score.DOT if slot == 1 else Score.COSINE)
            assert row[contract.EDIT] == EditId.ADD
    assert {bank.vectors.dtype, bank.directions.dtype} == {dtype}
    assert bank.table.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "edit", "low", "high"),
    [
        ({}, EditId.ADD, 0.0, 0.0),
        ({"edit": "keep_norm"}, EditId.KEEP_NORM, 0.0, 0.0),
        ({"edit": "ablate"}, EditId.CLAMP, 0.0, 0.0),
        ({"edit": "clamp", "low": -0.5, "high": 0.25}, EditId.CLAMP, -0.5, 0.25),
        ({"edit": "clamp", "high": 1.0}, EditId.CLAMP, -math.inf, 1.0),
        ({"edit": "rotate", "angle": 120.0}, EditId.ROTATE, -0.5, math.sqrt(0.75)),
    ],
)
def test_edits_in_the_table(
    tiny_llama: Any, make_profile: MakeProfile, fields: dict[str, Any], edit: EditId, low: float, high: float
) -> None:
    bank = Bank(LAYERS, HIDDEN, 1)
    bank.add("p", make_profile(tiny_llama, **fields))
    assert (bank.table[:, 0, contract.EDIT] == edit).all()
    expected = torch.tensor([[low, high]]).expand(LAYERS, 2)
    torch.testing.assert_close(bank.table[:, 0, [contract.LOW, contract.HIGH]], expected)


def test_layers_behind_a_token_gates_sensor_read_what_it_decided(tiny_llama: Any, make_profile: MakeProfile) -> None:
    bank = Bank(LAYERS, HIDDEN, 4)
    for name, kind, sensor in (
        ("own", "token", "own"),
        ("sensor", "token", 2),
        ("prompt", "prompt", 2),
        ("always", "always", 2),
    ):
        bank.add(name, make_profile(tiny_llama, layers=[2, 4], kind=kind, sensor=sensor))
    token, prompt = GateKind.TOKEN, GateKind.PROMPT
    assert bank.table[:, 0, contract.GATE].tolist() == [token] * 5
    assert bank.table[:, 1, contract.GATE].tolist() == [token, token, token, prompt, prompt]
    assert bank.table[:, 2, contract.GATE].tolist() == [prompt] * 5
    assert bank.table[:, 3, contract.GATE].tolist() == [GateKind.ALWAYS] * 5
    assert (bank.table[[0, 1, 3], :, contract.STRENGTH] == 0).all()


def test_memory_stays_where_it_is(tiny_llama: Any, make_profile: MakeProfile) -> None:
    bank = Bank(LAYERS, HIDDEN, 2)
    view = bank.layer(2)
    addresses = [t.data_ptr() for t in (bank.vectors, bank.directions, bank.table)]
    one, other = make_profile(tiny_llama, kind="always"), make_profile(tiny_llama, kind="always", seed=1, strength=0.5)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert touched(bank, [0, 1, -1], x) == [False, False, False]  # no profile, no edit

    bank.add("a", one)
    assert touched(bank, [0, 1, -1], x) == [True, False, False]
    assert torch.equal(view.vectors[0], one.vector[2])
    bank.replace("a", other)
    assert torch.equal(view.vectors[0], other.vector[2])
    assert view.table[0, contract.STRENGTH] == 0.5
    assert bank.names == ["a"]
    bank.remove("a")
    assert touched(bank, [0, 1, -1], x) == [False, False, False]
    assert bank.names == []
    assert [t.data_ptr() for t in (bank.vectors, bank.directions, bank.table)] == addresses
    assert equal(content(bank), content(Bank(LAYERS, HIDDEN, 2)))


def test_where_gates_decide(tiny_llama: Any, make_profile: MakeProfile) -> None:
    bank = Bank(LAYERS, HIDDEN, 6)

    def held(column: int, number: int) -> list[list[int]]:
        return [(bank.table[:, slot, column] == number).nonzero().flatten().tolist() for slot in range(6)]

    everywhere = list(range(LAYERS))
    assert held(contract.DECIDES, Decides.NOTHING) == [everywhere] * 6
    bank.add("own", make_profile(tiny_llama, layers=[1, 3]))
    bank.add("sensor", make_profile(tiny_llama, layers=[1, 3], sensor=2))
    bank.add("always", make_profile(tiny_llama, layers=[1, 3], kind="always"))
    bank.add("token", make_profile(tiny_llama, layers=[1, 3], kind="token", sensor=0))
    bank.add("mean", make_profile(tiny_llama, layers=[1, 3], pooling="mean"))
    bank.add("mean sensor", make_profile(tiny_llama, layers=[2, 3], sensor=1, pooling="mean"))
    assert held(contract.DECIDES, Decides.HERE) == [[1, 3], [], [], [], [1, 3], []]
    assert held(contract.DECIDES, Decides.EVERYWHERE) == [[], [2], [], [0], [], [1]]
    assert [slot for slot, layers in enumerate(held(contract.READING, Reading.MEAN)) if layers] == [4, 5]

    bank.replace("own", make_profile(tiny_llama, layers=[4], sensor=3, pooling="mean"))
    bank.replace("sensor", make_profile(tiny_llama, layers=[1, 3], kind="always"))
    bank.replace("mean sensor", make_profile(tiny_llama, layers=[2, 3]))
    bank.remove("token")
    bank.remove("mean")
    assert held(contract.DECIDES, Decides.HERE) == [[], [], [], [], [], [2, 3]]
    assert held(contract.DECIDES, Decides.EVERYWHERE) == [[3], [], [], [], [], []]
    assert [slot for slot, layers in enumerate(held(contract.READING, Reading.MEAN)) if layers] == [0]


def test_a_slot_that_was_left_is_taken_last(tiny_llama: Any, make_profile: MakeProfile) -> None:
    bank, profile = Bank(LAYERS, HIDDEN, 3), make_profile(tiny_llama)
    assert [bank.add(name, profile) for name in "ab"] == [0, 1]
    bank.remove("a")
    assert [bank.add(name, profile) for name in "cd"] == [2, 0]
    assert bank.names == ["d", "b", "c"]


def test_changes_that_are_refused_change_nothing(
    tiny_llama: Any, make_llama: Callable[..., Any], make_profile: MakeProfile
) -> None:
    profile = make_profile(tiny_llama)
    bank = Bank(LAYERS, HIDDEN, 2, dtype=torch.float16)
    bank.add("a", profile)
    before = content(bank)
    wide = make_profile(make_llama(hidden_size=16))
    deep = make_profile(make_llama(num_hidden_layers=3))
    other = make_profile(make_llama(seed=1))
    large = replace(profile, vector=profile.vector * 1e5)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: bank.add("a", profile), "name: expected a new one, got 'a', which slot 0 holds"),
        (lambda: bank.add("b", wide), "profile 'b': expected hidden size 32 like the bank, got 16"),
        (lambda: bank.add("b", deep), "profile 'b': expected layers 5 like the bank, got 3"),
        (lambda: bank.add("b", other), "profile 'b': expected the model of profile 'a'; .* with other weights"),
        (lambda: bank.add("b", large), "profile 'b': expected a vector within the range of torch.float16, got inf"),
        (lambda: bank.replace("a", wide), "profile 'a': expected hidden size 32"),
        (lambda: bank.replace("b", profile), "name: expected one of a, got 'b'"),
        (lambda: bank.remove("b"), "name: expected one of a, got 'b'"),
        (lambda: bank.slot("b"), "name: expected one of a, got 'b'"),
        (lambda: bank.profile("b"), "name: expected one of a, got 'b'"),
    ]
    for change, message in refused:
        with pytest.raises(ProfileError, match=message):
            change()
    assert equal(content(bank), before)
    assert bank.names == ["a"]
    with pytest.raises(
        ProfileError, match="profile 'b': expected vectors whose squared norm float32 can hold, got inf"
    ):
        Bank(LAYERS, HIDDEN, 1).add("b", replace(profile, vector=profile.vector * 1e20))
    bank.replace("a", other)  # the only profile may be of another model of the same shape
    assert bank.add("b", other) == 1
    with pytest.raises(ProfileError, match=r"profile 'c': expected a free slot, got a full bank \(2 slots\)"):
        bank.add("c", other)


def test_a_bank_for_latched_adds_takes_nothing_else(tiny_llama: Any, make_profile: MakeProfile) -> None:
    bank = Bank(LAYERS, HIDDEN, 4, kinds=Kinds.LATCHED_ADD)
    assert bank.kinds == Kinds.LATCHED_ADD
    simple = make_profile(tiny_llama)
    for number, gate in enumerate(("always", "prompt")):
        fits = replace(simple, gate=Gate(gate))  # type: ignore[arg-type]
        assert kinds_of(fits) == Kinds.LATCHED_ADD
        bank.add(str(number), fits)
    for fields in ({"edit": "ablate"}, {"gate": Gate("token")}):
        profile = replace(simple, **fields)
        assert kinds_of(profile) == Kinds.ANY
        with pytest.raises(ProfileError, match="profile 'x': expected an 'add' edit with an always or prompt gate"):
            bank.add("x", profile)
        with pytest.raises(ProfileError, match="profile '0': expected an 'add' edit with an always or prompt gate"):
            bank.replace("0", profile)


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((0, 8, 1), torch.float32, "num_layers: expected at least 1, got 0"),
        ((2, 0, 1), torch.float32, "hidden_size: expected at least 1, got 0"),
        ((2, 8, 0), torch.float32, "slots: expected at least 1, got 0"),
        ((2, 8, 1), torch.float64, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_banks_that_cannot_be(sizes: tuple[int, int, int], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bank(*sizes, dtype=dtype)


def test_a_bank_is_made_and_filled_on_its_device(tiny_llama: Any, make_profile: MakeProfile) -> None:
    bank = Bank(LAYERS, HIDDEN, 1, "meta")
    bank.add("p", make_profile(tiny_llama))
    assert {t.device.type for t in (bank.directions, bank.vectors, bank.table)} == {"meta"}


def test_a_bank_may_change_inside_and_outside_inference_mode(tiny_llama: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(tiny_llama)
    with torch.inference_mode():
        bank = Bank(LAYERS, HIDDEN, 1)
        bank.add("p", profile)
    bank.replace("p", make_profile(tiny_llama, seed=1))
    assert not bank.vectors.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kinds", Kinds)
def test_a_captured_graph_sees_every_change(tiny_llama: Any, make_profile: MakeProfile, kinds: Kinds) -> None:
    bank, tables = Bank(LAYERS, HIDDEN, 2, "cuda", kinds=kinds), StepTables(4, 2, 1, "cuda")
    part, values = bank.layer(2), torch.ones(LAYERS, 2, device="cuda")
    stock = torch.randn(4, HIDDEN, device="cuda")
    x = stock.clone()

    def step() -> None:
        x.copy_(stock)
        scales = torch_scales(tables.slots, values, tables.strength.view(-1), tables.sequence, bank.table)[2]
        steer_(x, None, Operands(tables.slots, scales, part.vectors, part.directions, part.table, kinds))

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def moved(slots: list[int]) -> list[bool]:
        tables.write(PackedRows([3, 1], [[slot] for slot in slots], [[1.0], [0.5]], [-1, -1]))
        graph.replay()
        scales = torch_scales(tables.slots, values, tables.strength.view(-1), tables.sequence, bank.table)[2]
        operands = Operands(tables.slots, scales, part.vectors, part.directions, part.table, kinds)
        want = reference(stock, None, operands)
        torch.testing.assert_close(x.double().cpu(), want, rtol=1e-5, atol=1e-5)
        return (x != stock).any(dim=1).tolist()

    assert moved([0, 1]) == [False] * 4
    bank.add("a", make_profile(tiny_llama, kind="always"))
    assert moved([0, 1]) == [True, True, True, False]
    bank.add("b", make_profile(tiny_llama, kind="prompt", seed=1))
    assert moved([-1, 1]) == [False, False, False, True]
    if kinds == Kinds.ANY:
        bank.replace("a", make_profile(tiny_llama, kind="always", edit="ablate"))
        assert moved([0, 1]) == [True] * 4
    bank.remove("a")
    assert moved([0, 1]) == [False, False, False, True]

"""Requests of packed steps against a dictionary that says what each should find in its column."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steerfast.runtime.roster
from steerfast.errors import SteerfastError
from steerfast.kernels.contract import STRENGTH
from steerfast.profile import SteeringProfile
from steerfast.runtime.bank import Bank
from steerfast.runtime.roster import Request, Roster
from steerfast.runtime.span import NO_END, EditSpan, Entry

LAYERS, HIDDEN = 5, 32
MAX_ROWS, MAX_REQUESTS = 12, 3
GATES = {-1: [], 0: [1, 3], 1: [2], 2: [], 3: [1, 4]}  # layers where a slot decides; slot 1 does so for all layers
MEAN = 3  # the slot whose gates read a mean


@pytest.fixture(scope="module")
def bank(make_llama: Callable[..., Any], make_profile: Callable[..., SteeringProfile]) -> Bank:
    model, bank = make_llama(), Bank(LAYERS, HIDDEN, 4)
    bank.add("own", make_profile(model, layers=[1, 3]))
    bank.add("sensor", make_profile(model, layers=[2, 4], sensor=2))
    bank.add("always", make_profile(model, layers=[1, 2], kind="always"))
    bank.add("mean", make_profile(model, layers=[1, 4], pooling="mean"))
    return bank


def request(
    slot: int,
    strength: float,
    prompt: int,
    after_prompt: bool = True,
    is_open: bool = False,
    answer_rows: int = NO_END,
    mean: int = 0,
    turn: int = 0,
    tail: int = 0,
) -> Request:
    """A request with one profile; a mean takes rows from `turn` on, and leaves out the last `tail`."""
    marker = (9,) if turn else ()
    ids = [0] * (turn - 1) + [9] + [0] * (prompt - turn) if turn else None
    return Request(
        (Entry(slot, strength, EditSpan(after_prompt, is_open, answer_rows, mean, marker, tail)),), prompt, ids
    )


@dataclass
class Known:
    """What is known of a request without looking."""

    slot: int
    strength: float
    prompt: int
    late: bool
    answer_rows: int = NO_END
    mean: int = 0
    turn: int = 0
    tail: int = 0
    past: int = 0
    decided: bool = False
    ended: bool = False
    read: list[int] = field(default_factory=list)  # rows that count in its mean, as they came
    scores: Tensor = field(init=False)  # of its prompt's rows, float64 [layers, prompt]
    sums: Tensor = field(init=False)  # float64 [layers]
    latch: Tensor = field(init=False)  # [2, layers]

    def __post_init__(self) -> None:
        self.scores = torch.rand(LAYERS, self.prompt, generator=torch.Generator().manual_seed(self.prompt)).double()
        self.sums = torch.zeros(LAYERS, dtype=torch.float64)
        self.latch = torch.stack([torch.full((LAYERS,), float(self.slot == 2)), torch.full((LAYERS,), -torch.inf)])

    @property
    def window(self) -> range:
        """The rows of which it reads the mean."""
        until = self.prompt - self.tail
        rows = range(max(0, self.turn, until - self.mean), until)
        return rows if self.mean and rows else range(self.prompt - bool(self.mean), self.prompt)

    def request(self) -> Request:
        return request(
            self.slot, self.strength, self.prompt, self.late, self.slot == 2, self.answer_rows, self.mean, self.turn,
            self.tail,
        )  # fmt: skip


class Engine:
    """Does to `requests` what an engine does, and what its gates would, and compares."""

    def __init__(self, bank: Bank) -> None:
        self.requests = Roster(bank, MAX_ROWS, MAX_REQUESTS)
        self.known: dict[str, Known] = {}
        self.decisions = 0.0

    def running(self) -> list[str]:
        return [name for name, known in self.known.items() if not known.ended]

    def add(self, name: str, known: Known) -> None:
        if name in self.running():
            with pytest.raises(ValueError, match=f"name: expected a new one, got '{name}'"):
                self.requests.add(name, known.request())
            return
        self.requests.add(name, known.request())
        self.known[name] = known

    def fork(self, name: str, like: str) -> None:
        """Another answer to a prompt, with copies of the rows that are cached."""
        other = self.known[like]
        if name in self.running() or name == like:
            return
        known = replace(other, past=min(other.past, other.prompt - 1), decided=False, ended=False, read=[])
        self.requests.add(name, known.request(), like)
        if known.mean and other.ended and not other.decided:
            known.past = 0  # nobody knows what was read
        elif known.mean:
            known.decided, known.read = other.decided, list(other.read)
            known.sums, known.latch = other.sums.clone(), other.latch.clone()
        self.known[name] = known

    def step(self, names: list[str], lengths: list[int], kept: int | None, padding: int) -> None:
        """kept: so many rows of each are left in its cache, None: all."""
        known = [self.known[name] for name in names]
        past = [one.past if kept is None else min(kept, one.past) for one in known]
        used = sum(lengths)
        last = [one.prompt - 1 - before for one, before in zip(known, past, strict=True)]
        deciding = {
            name: at
            for name, one, at, length in zip(names, known, last, lengths, strict=True)
            if one.slot >= 0 and not one.decided and 0 <= at < length
        }
        counting = {
            name: [row for row in range(before, before + length) if row in one.window and row not in one.read]
            for name, one, before, length in zip(names, known, past, lengths, strict=True)
        }
        padded = min(MAX_ROWS, used + padding)
        assert self.requests.step(names, past, lengths, padded) == (bool(deciding) or any(counting.values()))
        tables, start = self.requests.tables, 0
        columns = []
        for name, one, before, length in zip(names, known, past, lengths, strict=True):
            rows = tables.slots[start : start + length].tolist()
            column = int(tables.sequence[start])
            columns.append(column)
            places = range(before, before + length)
            steered = [(not one.late or p >= one.prompt - 1) and p < one.prompt + one.answer_rows for p in places]
            assert rows == [[one.slot if here else -1] for here in steered]
            assert tables.sequence[start : start + length].tolist() == [column] * length
            begin, end, total = tables.counted[column].tolist()
            assert [place for place in places if begin <= start + place - before < end] == counting[name]
            assert not counting[name] or total == len(one.window)
            assert tables.deciders[column].tolist() == [one.slot]
            assert tables.deciding[column] == (start + deciding[name] if name in deciding else -1)
            assert tables.strength[column].tolist() == [one.strength]
            assert torch.equal(self.latch(column), one.latch)
            assert torch.equal(self.requests.sums[:, column], one.sums)
            scales = self.requests.scales[:, start : start + length, 0]
            own = self.requests.bank.table[:, one.slot, STRENGTH] * (one.slot >= 0) * one.strength
            gate = torch.ones(LAYERS) if one.slot == 2 else one.latch[0]
            edited = torch.tensor(steered) & (one.slot >= 0)
            assert torch.equal(torch.where(edited, scales, 0.0), (gate * own)[:, None] * edited)
            start += length
        assert len(set(columns)) == len(columns)
        assert tables.slots[used:padded].eq(-1).all()
        assert tables.sequence[used:padded].eq(-1).all()
        others = [column for column in range(MAX_REQUESTS) if column not in columns]
        assert tables.deciders[others].eq(-1).all()
        assert tables.deciding[others].eq(-1).all()
        assert tables.counted[others].eq(0).all()
        self.check()  # nothing is decided before the step was launched
        for name, one, before, length, column in zip(names, known, past, lengths, columns, strict=True):
            one.past = before + length
            self.count(one, counting[name], column)
            if name in deciding:
                one.decided = True
                self.decide(one, column)
        self.requests.launched()

    def count(self, one: Known, rows: list[int], column: int) -> None:
        one.read += rows
        for layer in GATES[one.slot]:
            for row in rows:
                self.requests.sums[layer, column] += one.scores[layer, row]
            one.sums[layer] = self.requests.sums[layer, column]

    def decide(self, one: Known, column: int) -> None:
        for layer in GATES[one.slot]:
            self.decisions += 1
            score = -self.decisions
            if one.mean:
                assert one.read == list(one.window)  # each of them, once
                score = float(self.requests.sums[layer, column] / self.requests.tables.counted[column, 2])
                assert score == pytest.approx(float(one.scores[layer, one.window].mean()), rel=1e-12)
            self.requests.scores[layer, column] = one.latch[1, layer] = score
            everywhere = slice(None) if one.slot == 1 else layer
            self.requests.values[everywhere, column] = one.latch[0, everywhere] = self.decisions

    def end(self, names: list[str]) -> None:
        self.requests.end(names)
        for name in names:
            if name in self.known:
                self.known[name].ended = True

    def forget(self, name: str) -> None:
        if name in self.known and self.known[name].ended:
            self.requests.forget(name)
            del self.known[name]

    def latch(self, column: int) -> Tensor:
        return torch.stack([self.requests.values[:, column], self.requests.scores[:, column]])

    def check(self) -> None:
        assert self.requests.names == set(self.running())
        assert self.requests.slots == {self.known[name].slot for name in self.running()} - {-1}
        for name in "abcdefg":
            assert (name in self.requests) == (name in self.running())
            known, decision = self.known.get(name), self.requests.decision(name)
            if known is None or not known.decided:
                assert decision is None
            else:
                assert decision is not None
                assert torch.equal(decision, known.latch[..., None])


@pytest.mark.parametrize("slots", [[-1, 0, 1, 2, MEAN], [MEAN]], ids=["any", "means"])
@given(data=st.data())
def test_requests_keep_what_is_theirs(bank: Bank, slots: list[int], data: st.DataObject) -> None:
    """They arrive, fork, rest while others run, lose their cache or part of it, end, and names are used again."""
    engine = Engine(bank)
    names = st.sampled_from("abcdefg")
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "add", "fork", "step", "step", "step", "end", "forget"]))
        if action == "add":
            slot, strength = data.draw(st.sampled_from(slots)), data.draw(st.sampled_from([1.0, -0.5, 2.0]))
            known = Known(
                slot,
                strength,
                data.draw(st.integers(1, 6)),
                data.draw(st.booleans()),
                data.draw(st.sampled_from([0, 1, 2, NO_END])),
                data.draw(st.sampled_from([1, 2, 4, NO_END])) if slot == MEAN else 0,
            )
            if known.mean:
                known.turn, known.tail = data.draw(st.integers(0, known.prompt)), data.draw(st.integers(0, 3))
            # Rows that others computed, of which its gates read none.
            known.past = data.draw(st.integers(0, known.window[0] if known.mean else known.prompt - 1))
            engine.add(data.draw(names), known)
        elif action == "fork" and engine.known:
            engine.fork(data.draw(names), data.draw(st.sampled_from(sorted(engine.known))))
        elif action == "step" and engine.running():
            chosen = data.draw(st.lists(st.sampled_from(engine.running()), min_size=1, max_size=3, unique=True))
            lengths = [data.draw(st.integers(1, 4)) for _ in chosen]
            kept = data.draw(st.none() | st.integers(0, 3))
            engine.step(chosen, lengths, kept, data.draw(st.integers(0, 5)))
        elif action == "end":
            engine.end(data.draw(st.lists(names, max_size=3)))
        elif action == "forget":
            engine.forget(data.draw(names))
        engine.check()


def test_a_request_may_have_no_row_in_a_step(bank: Bank) -> None:
    requests = Roster(bank, 4, 2)
    requests.add("a", request(0, 1.0, 1))
    requests.add("b", request(1, 1.0, 2))
    assert requests.step(["a", "b"], [0, 0], [0, 2], 2)
    requests.launched()
    assert requests.decision("a") is None
    assert requests.decision("b") is not None
    assert requests.step(["a"], [0], [1], 1)
    assert not requests.step([], [], [], 1)
    assert requests.tables.deciding.eq(-1).all()


def test_a_step_that_failed_decided_nothing(bank: Bank) -> None:
    requests = Roster(bank, 4, 2)
    requests.add("a", request(0, 1.0, 2))
    assert requests.step(["a"], [0], [2], 2)
    assert requests.step(["a"], [0], [2], 2)
    assert requests.decision("a") is None
    requests.launched()
    assert not requests.step(["a"], [0], [2], 2)


def test_rows_count_once_however_often_they_come(bank: Bank) -> None:
    requests = Roster(bank, 8, 2)
    requests.add("a", request(MEAN, 1.0, 5, mean=NO_END))
    for past, length, counted, runs in (
        (0, 2, [0, 1], False),  # the step fails
        (0, 2, [0, 1], False),
        (0, 3, [0, 1, 2], True),
        (0, 1, [], True),  # its cache was lost
        (1, 3, [2], True),
        (2, 3, [2], True),  # part of it was
        (0, 5, [], True),
    ):
        assert requests.step(["a"], [past], [length], 8) == bool(counted)
        begin, end, total = requests.tables.counted[requests.tables.sequence[0]].tolist()
        assert list(range(begin, end)) == counted
        assert total == 5
        if runs:
            requests.launched()
    assert requests.decision("a") is not None


def test_a_mean_may_be_over_before_the_prompt_is(bank: Bank) -> None:
    """The step that decides counts no row then."""
    requests = Roster(bank, 8, 2)
    requests.add("a", request(MEAN, 1.0, 8, mean=NO_END, turn=3, tail=2))
    for past, length, counted, decides in ((2, 2, [3], False), (4, 3, [4, 5], False), (7, 1, [], True)):
        assert requests.step(["a"], [past], [length], 8)
        begin, end, total = requests.tables.counted[requests.tables.sequence[0]].tolist()
        assert [row + past for row in range(begin, end)] == counted
        assert total == 3
        requests.launched()
        assert (requests.decision("a") is not None) == decides


@pytest.mark.parametrize(("mean", "cached", "wrong"), [(NO_END, 0, 1), (NO_END, 0, 6), (4, 2, 3), (4, 0, 5), (1, 5, 6)])
def test_rows_of_a_mean_that_were_never_in_a_step(bank: Bank, mean: int, cached: int, wrong: int) -> None:
    requests = Roster(bank, 8, 2)
    for name in "ab":
        requests.add(name, request(MEAN, 1.0, 6, mean=mean))
    assert requests.step(["a", "b"], [0, cached], [1, 1], 2) == (mean != 4 or cached == 2)
    requests.launched()
    requests.add("c", request(MEAN, 1.0, 6, mean=mean))
    before = requests.tables.slots.clone(), requests.tables.counted.clone()
    with pytest.raises(SteerfastError, match="request 'c': rows of its prompt, of which a gate reads the mean, came"):
        requests.step(["a", "c"], [1, wrong], [1, 1], 2)
    assert torch.equal(requests.tables.slots, before[0])
    assert torch.equal(requests.tables.counted, before[1])
    requests.step(["a"], [1], [5], 5)
    requests.launched()
    assert requests.decision("a") is not None


def test_steps_in_which_no_row_counts(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Roster(bank, 8, 2)
    requests.add("a", request(MEAN, 1.0, 6, mean=2))
    counted = []
    write = requests.tables.write
    monkeypatch.setattr(
        requests.tables, "write", lambda *args, **kwargs: (counted.append(args[0].counted), write(*args, **kwargs))
    )
    for past, length in ((0, 4), (4, 1), (5, 1), (6, 1)):
        requests.step(["a"], [past], [length], length)
        requests.launched()
    assert [one is not None for one in counted] == [False, True, True, False]


def test_decisions_of_long_ago_are_dropped(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steerfast.runtime.roster, "_KEPT", 4)
    requests = Roster(bank, 4, 2)
    for number in range(20):
        name = str(number)
        requests.add(name, request(0, 1.0, 1))
        requests.step([name], [0], [1], 1)
        requests.launched()
        requests.end([name])
    kept = [number for number in range(20) if requests.decision(str(number)) is not None]
    assert kept == list(range(kept[0], 20))
    assert 4 <= len(kept) <= 4 + 2


def test_addresses_never_change(bank: Bank) -> None:
    requests = Roster(bank, 4, 2)
    tensors = [requests.values, requests.scores, requests.sums, requests.scales]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for name in "abcde":
        requests.add(name, request(1, 1.0, 1))
        requests.step([name], [0], [1], 1)
        requests.launched()
    now = [requests.values, requests.scores, requests.sums, requests.scales]
    assert all(old is new for old, new in zip(tensors, now, strict=True))
    assert [tensor.data_ptr() for tensor in now] == addresses
    assert [tensor.dtype for tensor in now] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.float32,
    ]


def test_other_threads_may_look(bank: Bank) -> None:
    requests = Roster(bank, 4, 2)
    wrong: list[object] = []
    over = threading.Event()

    def look() -> None:
        try:
            while not over.is_set():
                if requests.slots - {0, 1}:
                    wrong.append(requests.slots)
                for number in range(60):
                    decision = requests.decision(str(number))
                    if decision is not None and decision[1, 1, 0] != number:
                        wrong.append((number, decision))
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(60):
        name = str(number)
        requests.add(name, request(number % 2, 1.0, 1))
        requests.step([name], [0], [1], 1)
        requests.scores[1, int(requests.tables.sequence[0])] = number
        requests.launched()
        if number >= 5:
            requests.end([str(number - 5)])
    over.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert not wrong


def test_steps_out_of_bounds(bank: Bank) -> None:
    with pytest.raises(ValueError, match="max_rows: expected at least 1, got 0"):
        Roster(bank, 0, 1)
    with pytest.raises(ValueError, match="max_sequences: expected at least 1, got 0"):
        Roster(bank, 1, 0)
    requests = Roster(bank, 4, 2)
    for name in "abc":
        requests.add(name, request(0, 1.0, 3))
    with pytest.raises(KeyError, match="d"):
        requests.step(["d"], [0], [1], 1)
    with pytest.raises(ValueError, match="names: expected at most 2 requests, got 3"):
        requests.step(["a", "b", "c"], [0, 0, 0], [1, 1, 1], 3)
    with pytest.raises(ValueError, match="lengths: expected at most 4 rows in all, got 5"):
        requests.step(["a", "b"], [0, 0], [3, 2], 5)
    with pytest.raises(ValueError, match="padded_rows: expected 4 to 4, got 3"):
        requests.step(["a", "b"], [0, 0], [3, 1], 3)
    assert requests.step(["a", "b"], [0, 0], [3, 1], 4)
    assert requests.step(["c"], [0], [4], 4)


@pytest.mark.parametrize("answer_rows", [NO_END, 2])
def test_edits_after_a_thought_begin_with_its_last_row(bank: Bank, answer_rows: int) -> None:
    roster = Roster(bank, MAX_ROWS, MAX_REQUESTS)
    span = EditSpan(open=True, answer_rows=answer_rows, after_thought=True)
    roster.add("r", Request((Entry(2, 1.0, span),), 4))

    def edited(past: int, length: int) -> list[bool]:
        roster.step(["r"], [past], [length], length)
        roster.launched()
        return (roster.tables.slots[:length, 0] == 2).tolist()

    assert [edited(0, 4), edited(4, 1), edited(5, 1)] == [[False] * 4, [False], [False]]
    assert (roster.bounds(["r"])[1] >= NO_END).all()
    roster.end_thoughts({"r": 7, "gone": 3})  # row 6 is the thought's last token
    expected = [6 <= row < 7 + answer_rows for row in range(11)]
    assert [edited(row, 1) for row in range(6, 11)] == [[one] for one in expected[6:]]
    assert edited(0, 11) == expected  # computed again after its cache was dropped

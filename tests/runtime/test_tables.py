"""Row tables against loops that say what they mean, and the one copy that a step's tables cost."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steerfast.profile import Gate, last_turn
from steerfast.runtime.span import NO_END, UNSTEERED, EditSpan, mean_rows
from steerfast.runtime.tables import PackedRows, RowTable, StepTables, prompt_rows, response_rows

MASKS = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
)


def tensors(rows: RowTable) -> tuple[Tensor, ...]:
    return rows.slots, rows.sequence, rows.deciding, rows.deciders, rows.counted


# -- padded batches ----------------------------------------------------------------------------------------------------


def int32(*numbers: int) -> Tensor:
    """A column [n, 1]: one slot a sequence."""
    return torch.tensor(numbers, dtype=torch.int32)[:, None]


@given(mask=MASKS, prompt_columns=st.integers(1, 7), data=st.data())
def test_prompt_rows_equal_a_loop(mask: list[list[bool]], prompt_columns: int, data: st.DataObject) -> None:
    count, width = len(mask), len(mask[0])

    def of_each(elements: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(elements, min_size=count, max_size=count))

    slots, late = of_each(st.integers(-1, 3)), of_each(st.booleans())
    answer = of_each(st.sampled_from([0, 1, 2, NO_END]))
    after = torch.tensor(late)[:, None]
    rows = prompt_rows(torch.tensor(mask), prompt_columns, int32(*slots), after, int32(*answer))
    expected, sequence, deciding = [], [], []
    for n, valid in enumerate(mask):
        prompt = [t for t in range(width) if valid[t] and t < prompt_columns]
        deciding.append(n * width + prompt[-1] if prompt and slots[n] >= 0 else -1)
        for t in range(width):
            in_answer = not prompt or t >= prompt[-1]
            here = valid[t] and (in_answer or not late[n]) and t < prompt_columns + answer[n]
            expected.append([slots[n] if here else UNSTEERED])
            sequence.append(n if valid[t] else -1)
    assert rows.slots.tolist() == expected
    assert rows.sequence.tolist() == sequence
    assert rows.deciding.tolist() == deciding
    assert rows.deciders.tolist() == [[slot] for slot in slots]
    assert rows.counted.tolist() == [[0, 0, 0]] * count
    assert [t.dtype for t in tensors(rows)] == [torch.int32] * 5
    assert all(t.is_contiguous() for t in tensors(rows))


@pytest.mark.parametrize(("slots", "width"), [((0,), 1), ((2, -1, 0), 1), ((0, 3), 4)])
def test_response_rows_steer_everything_and_decide_nothing(slots: tuple[int, ...], width: int) -> None:
    rows = response_rows(int32(*slots), width, int32(*[width] * len(slots)))
    assert rows.slots.tolist() == [[slot] for slot in slots for _ in range(width)]
    assert rows.sequence.tolist() == [n for n in range(len(slots)) for _ in range(width)]
    assert rows.deciding.tolist() == [-1] * len(slots)
    assert rows.deciders.tolist() == [[slot] for slot in slots]
    assert rows.counted.tolist() == [[0, 0, 0]] * len(slots)
    assert [t.dtype for t in tensors(rows)] == [torch.int32] * 5
    assert all(t.is_contiguous() for t in tensors(rows))


def test_response_rows_end() -> None:
    rows = response_rows(int32(5, 6, -1), 3, int32(0, 2, 3))
    assert rows.slots[:, 0].tolist() == [-1, -1, -1, 6, 6, -1, -1, -1, -1]


def test_answer_rows() -> None:
    def rows(tokens: int | None) -> int:
        profile: Any = SimpleNamespace(positions="response", gate=Gate("always"), answer_tokens=tokens)
        return EditSpan.of(profile).answer_rows

    assert [rows(tokens) for tokens in (1, 24)] == [0, 23]
    assert rows(None) == NO_END


def test_mean_rows() -> None:
    assert [mean_rows(Gate(kind)) for kind in ("always", "prompt", "token")] == [0, 0, 0]  # type: ignore[arg-type]
    windows = (None, 1, 128, 2**40)
    for pooling in ("mean", "both"):
        assert [mean_rows(Gate(pooling=pooling, window=window)) for window in windows] == [NO_END, 1, 128, NO_END]


@given(
    ids=st.lists(st.integers(0, 2), max_size=12),
    turn=st.lists(st.integers(0, 2), max_size=3).map(tuple),
    tail=st.integers(0, 4),
    window=st.sampled_from([0, 1, 3, NO_END]),
    known=st.booleans(),
)
def test_the_rows_that_a_mean_takes(ids: list[int], turn: tuple[int, ...], tail: int, window: int, known: bool) -> None:
    """Those after the last turn's marker, without the tail, at most so many; or the prompt's last row."""
    first, until, found = EditSpan(mean_rows=window, turn=turn, tail=tail).read(len(ids), ids if known else None)
    places = range(len(turn), len(ids) + 1) if known else ()
    begins = [place for place in places if tuple(ids[place - len(turn) : place]) == turn] if turn else [0]
    rows = list(range(len(ids)))[max(begins, default=0) : max(0, len(ids) - tail)]
    rows = rows[-window:] or [len(ids) - 1] if window and ids else []
    assert list(range(first, until)) == rows
    assert found == (bool(begins) or not rows)


def test_a_long_prompt_is_searched_fast() -> None:
    ids = np.random.default_rng(0).integers(3, 50000, 100_000)
    ids[40_000:40_003] = 0, 1, 2
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert last_turn(ids, (0, 1, 2)) == 40_003
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5e-3


def test_each_row_for_itself() -> None:
    none = int32(0, 0)
    valid, after = torch.tensor([[False, True], [True, True]]), torch.tensor([[True], [True]])
    rows = prompt_rows(valid, 2, none, after, int32(NO_END, NO_END)).each_for_itself()
    assert rows.sequence.tolist() == [0, 1, 2, 3]
    assert rows.deciding.tolist() == [-1, 1, -1, 3]
    assert rows.slots.tolist() == rows.deciders.tolist() == [[-1], [0], [-1], [0]]
    assert rows.counted.tolist() == [[0, 0, 0]] * 4
    assert [t.dtype for t in tensors(rows)] == [torch.int32] * 5
    assert all(t.is_contiguous() for t in tensors(rows))


def test_rows_move_as_one() -> None:
    valid, slot, ends = torch.ones(2, 2, dtype=torch.bool), int32(0, 0), int32(2, 2)
    rows = prompt_rows(valid, 2, slot, torch.tensor([[True], [True]]), ends)
    assert [t.device.type for t in tensors(rows.to(torch.device("meta")))] == ["meta"] * 5


# -- a serving engine's steps ------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in (torch.ops.aten.slice, torch.ops.aten.view):
            self.calls.append((func.overloadpacket.__name__, args[0].numel()))
        return func(*args, **kwargs or {})


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    stack, count = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))

    def of_each(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
        return st.lists(elements, min_size=count, max_size=count)

    def table(elements: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [draw(st.lists(elements, min_size=stack, max_size=stack)) for _ in range(count)]

    return {
        "stack": stack,
        "lengths": lengths,
        "slots": table(st.integers(-1, 9)),
        "strengths": table(st.floats(-4, 4, width=32)),
        "deciding": [draw(st.integers(-1, length - 1)) for length in lengths],
        "edited_from": draw(st.none() | st.just(table(st.integers(0, 5)))),
        "edited_until": draw(st.none() | st.just(table(st.integers(0, 5)))),
        "counted": draw(st.none() | st.just((table(st.integers(0, 5)), table(st.integers(0, 5))))),
        "total": draw(st.none() | st.just(table(st.integers(0, 9)))),
        "columns": draw(st.none() | st.permutations(range(5)).map(lambda columns: columns[:count])),
        "padded_rows": draw(st.none() | st.integers(sum(lengths), 20)),
    }


def of(tables: StepTables) -> tuple[Tensor, ...]:
    return tables.slots, tables.sequence, tables.deciding, tables.deciders, tables.strength, tables.counted


def as_loop(step: dict[str, Any]) -> dict[str, list[Any]]:
    stack = step["stack"]
    rows: list[list[int]] = []
    tables: dict[str, list[Any]] = {
        "slots": rows,
        "sequence": [],
        "deciding": [-1] * 5,
        "deciders": [[-1] * stack] * 5,
        "strength": [[0.0] * stack] * 5,
        "counted": [[0, 0, 0]] * 5 * stack,
    }
    for n, length in enumerate(step["lengths"]):
        column = step["columns"][n] if step["columns"] is not None else n
        if step["deciding"][n] >= 0:
            tables["deciding"][column] = len(rows) + step["deciding"][n]
        tables["deciders"][column], tables["strength"][column] = step["slots"][n], step["strengths"][n]
        for k in range(stack):
            span = [min(each[n][k], length) for each in step["counted"] or ()] or [0, 0]
            total = 0 if step["total"] is None else step["total"][n][k]
            tables["counted"][column * stack + k] = [*(len(rows) + at for at in span), total]
        tables["sequence"] += [column] * length
        for t in range(length):
            first = step["edited_from"][n] if step["edited_from"] is not None else [0] * stack
            until = step["edited_until"][n] if step["edited_until"] is not None else [length] * stack
            each = zip(step["slots"][n], first, until, strict=True)
            rows.append([slot if begin <= t < end else -1 for slot, begin, end in each])
    padding = (step["padded_rows"] or len(rows)) - len(rows)
    rows += [[-1] * stack] * padding
    tables["sequence"] += [-1] * padding
    return tables


@given(some=st.lists(steps(), min_size=1, max_size=4))
def test_written_tables_equal_a_loop_and_cost_two_copies(some: list[dict[str, Any]]) -> None:
    stack = some[0]["stack"]
    tables = StepTables(20, 5, stack, "cpu")
    addresses = [t.data_ptr() for t in of(tables)]
    for step in some:
        if step["stack"] != stack:
            continue
        arguments = {key: value for key, value in step.items() if key != "stack"}
        with Copies() as copies:
            tables.write(PackedRows(**arguments))
        assert [name for name, _ in copies.calls] == ["copy_"] * 2
        for name, expected in as_loop(step).items():
            here = getattr(tables, name)
            assert (here[: len(expected)] if name in ("slots", "sequence") else here).tolist() == expected, name
    assert [t.data_ptr() for t in of(tables)] == addresses


def test_the_copy_is_as_long_as_the_step() -> None:
    sizes = []
    tables = StepTables(1000, 8, 2, "cpu")
    for lengths in ([1], [1] * 8, [100, 200]):
        n = len(lengths)
        with Copies() as copies:
            tables.write(PackedRows(lengths, [[0, -1]] * n, [[1.0, 1.0]] * n, [-1] * n))
        sizes += [size for _, size in copies.calls]
    before_rows = 8 * (1 + 2 + 2 + 2 * 3)
    assert sizes == [size for rows in (1, 8, 300) for size in (before_rows + rows, 2 * rows)]


def test_new_tables_steer_nothing() -> None:
    tables = StepTables(6, 3, 2, "cpu")
    assert tables.slots.tolist() == [[-1, -1]] * 6
    assert tables.sequence.tolist() == [-1] * 6
    assert tables.deciding.tolist() == [-1] * 3
    assert tables.deciders.tolist() == [[-1, -1]] * 3
    assert tables.strength.tolist() == [[0.0, 0.0]] * 3
    assert tables.counted.tolist() == [[0, 0, 0]] * 6
    assert [t.dtype for t in of(tables) if t is not tables.strength] == [torch.int32] * 5
    assert tables.strength.dtype == torch.float32
    for tensor in of(tables):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0


def test_arrays_are_taken_as_they_are() -> None:
    tables = StepTables(6, 3, 1, "cpu")
    two = np.array([2, 1], dtype=np.int32)
    tables.write(PackedRows(two, np.array([[4], [5]]), np.array([[0.5], [2.0]]), np.array([1, -1])))
    assert tables.slots[:3].tolist() == [[4], [4], [5]]
    assert tables.sequence[:3].tolist() == [0, 0, 1]
    assert tables.deciding.tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [1, 1, 1, 1]}, "lengths: expected at most 3 sequences, got 4"),
        ({"lengths": [4, 3]}, "lengths: expected at most 6 rows in all, got 7"),
        ({"lengths": [1, -1]}, "lengths: expected 0 to 6, got -1"),
        ({"lengths": [1.5, 1]}, "lengths: expected whole numbers, got float64"),
        ({"lengths": [[1, 1]]}, r"lengths: expected shape \[n\], got \[1, 2\]"),
        ({"slots": [[0, 1]]}, r"slots: expected shape \[2, 2\], got \[1, 2\]"),
        ({"slots": [[0, 1], [2]]}, r"slots: expected rows of one length, got \[\[0, 1\], \[2\]\]"),
        ({"slots": [[0], [1]]}, r"slots: expected shape \[2, 2\], got \[2, 1\]"),
        ({"slots": [[0, -2], [0, 0]]}, "slots: expected -1 to 2147483647, got -2"),
        ({"slots": [[0, 2**31], [0, 0]]}, "slots: expected -1 to 2147483647, got 2147483648"),
        ({"strengths": [[1.0, 1.0]]}, r"strengths: expected shape \[2, 2\], got \[1, 2\]"),
        ({"strengths": [[1.0, float("nan")], [1.0, 1.0]]}, "strengths: expected finite numbers, got nan"),
        ({"strengths": [[1.0, 1e300], [1.0, 1.0]]}, "strengths: expected finite numbers, got inf"),
        ({"deciding": [2, 0]}, "deciding: expected a row of sequence 0, below 2, got 2"),
        ({"deciding": [-2, 0]}, "deciding: expected -1 to 2147483647, got -2"),
        ({"deciding": [0]}, r"deciding: expected shape \[2\], got \[1\]"),
        ({"edited_from": [[0, 0], [0, -1]]}, "edited_from: expected 0 to 2147483647, got -1"),
        ({"edited_until": [[0, 0]]}, r"edited_until: expected shape \[2, 2\], got \[1, 2\]"),
        ({"counted": [[[0, 0], [0, 0]], [[1, 1], [1, -1]]]}, "counted: expected 0 to 2147483647, got -1"),
        ({"counted": [[[0, 0]], [[1, 1]]]}, r"counted: expected shape \[2, 2, 2\], got \[2, 1, 2\]"),
        ({"counted": [[[0, 0], [0, 0]], [[1, 1]]]}, r"counted: expected rows of one length, got \[\[\[0, 0\], \[0"),
        ({"counted": [[[0, 0], [0, 0]]]}, r"counted: expected shape \[2, 2, 2\], got \[1, 2, 2\]"),
        ({"counted": [[[0, 0], [0, 0]], [[1.0, 1], [1, 1]]]}, "counted: expected whole numbers, got float64"),
        ({"total": [[1, 1], [1, -1]]}, "total: expected 0 to 2147483647, got -1"),
        ({"total": [[1, 1]]}, r"total: expected shape \[2, 2\], got \[1, 2\]"),
        ({"columns": [0]}, r"columns: expected shape \[2\], got \[1\]"),
        ({"columns": [0, 3]}, "columns: expected 0 to 2, got 3"),
        ({"columns": [-1, 0]}, "columns: expected 0 to 2, got -1"),
        ({"columns": [1, 1]}, r"columns: expected distinct ones, got \[1, 1\]"),
        ({"columns": [0.0, 1.0]}, "columns: expected whole numbers, got float64"),
        ({"padded_rows": 2}, "padded_rows: expected 3 to 6, got 2"),
        ({"padded_rows": 7}, "padded_rows: expected 3 to 6, got 7"),
    ],
)
def test_steps_out_of_bounds_write_nothing(change: dict[str, Any], message: str) -> None:
    tables = StepTables(6, 3, 2, "cpu")
    step: dict[str, Any] = {
        "lengths": [2, 1],
        "slots": [[0, 1], [2, -1]],
        "strengths": [[1.0, 1.0], [0.5, 1.0]],
        "deciding": [1, -1],
        "counted": ([[0, 0], [1, 1]], [[2, 2], [1, 1]]),
        "total": [[4, 4], [0, 0]],
    }
    tables.write(PackedRows(**step))
    before = [t.clone() for t in of(tables)]
    with pytest.raises(ValueError, match=message):
        tables.write(PackedRows(**{**step, **change}))
    for tensor, old in zip(of(tables), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "max_rows: expected at least 1, got 0"),
        ((1, 0, 1), "max_sequences: expected at least 1, got 0"),
        ((1, 1, 0), "stack: expected 1 to 4 slots of a sequence, got 0"),
        ((1, 1, 5), "stack: expected 1 to 4 slots of a sequence, got 5"),
    ],
)
def test_tables_that_cannot_be(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepTables(*sizes, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_not_overwritten_while_the_device_still_reads_it() -> None:
    tables = StepTables(512, 512, 1, "cuda")
    seen = []
    torch.cuda._sleep(200_000_000)  # the host runs ahead
    for step in range(6):
        tables.write(PackedRows([1] * 512, [[step]] * 512, [[float(step)]] * 512, [-1] * 512))
        seen.append((tables.slots[:, 0].clone(), tables.strength[:, 0].clone()))
    for step, (slot, strength) in enumerate(seen):
        assert (slot == step).all()
        assert (strength == step).all()

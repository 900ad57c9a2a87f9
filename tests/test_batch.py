"""Row tables against loops that say what they mean."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerfast.batch import UNSTEERED, prompt_rows, response_rows

Positions = Literal["all", "response"]
MASKS = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
)


@given(mask=MASKS, prompt_columns=st.integers(1, 7), positions=st.sampled_from(["all", "response"]))
def test_prompt_rows_equal_a_loop(mask: list[list[bool]], prompt_columns: int, positions: Positions) -> None:
    rows = prompt_rows(torch.tensor(mask), prompt_columns, positions)
    width = len(mask[0])
    slot, sequence, deciding, decides = [], [], [], []
    for n, valid in enumerate(mask):
        prompt = [t for t in range(width) if valid[t] and t < prompt_columns]
        decides.append(bool(prompt))
        deciding.append(n * width + (prompt[-1] if prompt else 0))
        for t in range(width):
            in_answer = not prompt or t >= prompt[-1]
            slot.append(0 if valid[t] and (positions == "all" or in_answer) else UNSTEERED)
            sequence.append(n)
    assert rows.slot.tolist() == slot
    assert rows.sequence.tolist() == sequence
    assert rows.decides.tolist() == decides
    assert rows.deciding.tolist() == deciding
    assert [t.dtype for t in (rows.slot, rows.sequence, rows.deciding, rows.decides)] == [
        torch.int32,
        torch.int32,
        torch.int64,
        torch.bool,
    ]


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 1), (2, 4)])
def test_response_rows_steer_everything_and_decide_nothing(count: int, width: int) -> None:
    rows = response_rows(count, width, torch.device("cpu"))
    assert rows.slot.tolist() == [0] * (count * width)
    assert rows.sequence.tolist() == [n for n in range(count) for _ in range(width)]
    assert not rows.decides.any()
    assert rows.deciding.tolist() == [n * width for n in range(count)]


def test_rows_move_as_one() -> None:
    rows = response_rows(2, 2, torch.device("cpu")).to(torch.device("meta"))
    assert {t.device.type for t in (rows.slot, rows.sequence, rows.deciding, rows.decides)} == {"meta"}

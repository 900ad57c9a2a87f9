"""check_separate: memory that is written belongs to one argument, wherever the arguments start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerfast.kernels.contract import check_separate

pytestmark = pytest.mark.contract

MEMORY = torch.zeros(160, dtype=torch.uint8)


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, set[int]]:
    """A view of MEMORY [rows, H], and the bytes that it holds. Rows may have gaps, overlap, or all be the same."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    rows, width, stride = draw(st.integers(0, 5)), draw(st.integers(0, 6)), draw(st.integers(0, 8))
    memory = MEMORY.view(dtype)
    span = max((rows - 1) * stride + width, 0)
    offset = draw(st.integers(0, max(min(len(memory) - span, 24), 0)))
    if draw(st.booleans()):  # one row
        rows, stride = 1, width
    view = memory.as_strided((rows, width), (stride, 1), offset)
    numbers = [offset + row * stride + column for row in range(rows) for column in range(width)]
    return view, {number * dtype.itemsize + byte for number in numbers for byte in range(dtype.itemsize)}


def is_refused(written: dict[str, torch.Tensor], read: dict[str, torch.Tensor | None]) -> bool:
    try:
        check_separate(written, read)
    except ValueError:
        return True
    return False


@settings(max_examples=600, deadline=None)
@given(views(), views())
def test_exactly_shared_bytes_are_refused(
    one: tuple[torch.Tensor, set[int]], other: tuple[torch.Tensor, set[int]]
) -> None:
    (a, bytes_a), (b, bytes_b) = one, other
    shared = bool(bytes_a & bytes_b)
    assert is_refused({"x": a}, {"residual": b}) is shared
    assert is_refused({"x": b}, {"residual": a}) is shared
    assert is_refused({"scores": a, "values": b}, {"x": None}) is shared


@pytest.mark.parametrize("first", [0, 4])
def test_the_message_names_both_from_either_side(first: int) -> None:
    rows = torch.zeros(12, 8)
    x, residual = rows[first : first + 8], rows[4 - first : 12 - first]
    with pytest.raises(ValueError, match=r"residual: expected memory of its own, got a tensor that shares that of x"):
        check_separate({"x": x}, {"residual": residual})


def test_rows_in_the_gaps_of_other_rows_are_apart() -> None:
    wide = torch.zeros(6, 3, 8)
    check_separate({"x": wide[:, 1]}, {"residual": wide[:, 0], "directions": wide[:, 2]})
    with pytest.raises(ValueError, match="residual: expected memory of its own"):
        check_separate({"x": wide[:, 1]}, {"residual": wide.view(6, 24)[:, 1:9]})

"""LDA with parts left out, against a fit to the other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerfast.errors import PromptError
from steerfast.fitting.directions import fit_direction, lda_without


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**16),
    st.integers(2, 12),
    st.integers(2, 12),
    st.sampled_from([3, 8, 40]),
    st.sampled_from([0.05, 0.2, 1.0]),
    st.integers(1, 4),
)
def test_each_direction_is_the_fit_without_the_fold(
    seed: int, bad: int, good: int, width: int, shrinkage: float, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    number = bad + good + 2 * count
    rows = torch.randn(number, width, generator=generator, dtype=torch.float64) + 5
    harmful = torch.arange(number) < bad + count
    rows[harmful, 0] += 2
    weights = torch.rand(number, generator=generator, dtype=torch.float64) + 0.1
    folds = [torch.zeros(number, dtype=torch.bool) for _ in range(count)]
    for place, out in enumerate(folds):  # a harmful row and one of the others
        out[place] = out[number - 1 - place] = True
    for out, direction in zip(folds, lda_without(rows, harmful, weights, folds, shrinkage), strict=True):
        sides = [side & ~out for side in (harmful, ~harmful)]
        shares = [weights[side] / weights[side].sum() for side in sides]
        expected = fit_direction(rows[sides[0]], rows[sides[1]], shrinkage=shrinkage, weights=(shares[0], shares[1]))
        torch.testing.assert_close(direction, expected, rtol=1e-7, atol=1e-9)


def test_rows_without_variation_are_refused() -> None:
    rows = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4, dtype=torch.float64)
    out = torch.tensor([True, *[False] * 6, True])
    with pytest.raises(PromptError, match="expected rows that vary"):
        lda_without(rows, torch.arange(8) < 4, torch.ones(8, dtype=torch.float64), [out], 0.2)

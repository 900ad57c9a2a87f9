"""LDA with parts of the rows left out in turn, for the price of one fit and a solution for each part.

What LDA takes of a class are sums over its rows: their weight, their sum and their second moment. Those of the rows
that stay are those of all rows less those of the part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfast.fitting.directions import solve_lda, unit


@dataclass(frozen=True)
class _Moments:
    """Hold the sums over a class: of weights, of weighted rows [r], and of their outer products [r, r]; float64."""

    weight: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> _Moments:
        weighted = rows * weights[:, None]
        return cls(weights.sum(), weighted.sum(dim=0), weighted.T @ rows)

    def __sub__(self, other: _Moments) -> _Moments:
        return _Moments(self.weight - other.weight, self.first - other.first, self.second - other.second)

    @property
    def mean(self) -> Tensor:
        return self.first / self.weight

    @property
    def covariance(self) -> Tensor:
        return self.second / self.weight - torch.outer(self.mean, self.mean)


def lda_without(
    rows: Tensor, harmful: Tensor, weights: Tensor, folds: Sequence[Tensor], shrinkage: float
) -> list[Tensor]:
    """Return for each fold the direction that `fit_direction` fits by LDA to the other rows: float64 [F], unit norm.

    Args:
        rows: float64 [n, F]. harmful: bool [n]. weights: float64 [n], positive; in every fold both classes count alike.
        folds: masks, bool [n]; two rows of each class or more stay outside of each.

    Raises:
        PromptError: rows that do not vary.
    """
    count, width = rows.shape
    rows, basis = rows - rows.mean(dim=0), None
    if count < width:  # all rows lie in a space of `count` dimensions
        basis, triangle = torch.linalg.qr(rows.T)
        rows = triangle.T.contiguous()
    sides = harmful, ~harmful
    whole = [_Moments.of(rows[side], weights[side]) for side in sides]
    found = []
    for out in folds:
        parts = [_Moments.of(rows[side & out], weights[side & out]) for side in sides]
        positive, negative = (one - part for one, part in zip(whole, parts, strict=True))
        covariance = (positive.covariance + negative.covariance) / 2
        solution = solve_lda(covariance, positive.mean - negative.mean, width, shrinkage)
        found.append(unit(solution if basis is None else basis @ solution))
    return found

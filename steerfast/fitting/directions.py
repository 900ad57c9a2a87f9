"""Gate directions: one unit vector per layer that separates harmful prompt rows from harmless ones.

Every direction here lies in the span of the centred rows. With fewer rows than the hidden size, an
orthonormal basis of that span (one QR) turns the H-dimensional problem into an exactly equal one in n
dimensions, so no H x H matrix is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from steerfast.errors import ProfileError, PromptError

# Rows of float32 or fewer bits that differ at all differ by more than this share; float64 sums err by less.
_ROUNDING = 1e-12


def unit(vector: Tensor) -> Tensor:
    """Return `vector` [H] as float64 with Euclidean norm 1; PromptError if it is zero or not finite."""
    vector = vector.detach().to(torch.float64)
    # Dividing by the largest entry first keeps the squares of very small or very large vectors in range.
    largest = float(vector.abs().max()) if vector.numel() else 0.0
    if not math.isfinite(largest) or largest == 0.0:
        raise PromptError(f"vector: expected finite and not zero, got a largest entry of {largest}")
    vector = vector / largest
    return vector / torch.linalg.vector_norm(vector)


def project(rows: Tensor, direction: Tensor, score: str) -> Tensor:
    """Return gate scores of rows, as the gate computes them.

    Args:
        rows: residual rows [..., H], any float type.
        direction: unit vector [H].
        score: "dot" for <x, d>, in residual-stream units, or "cosine" for <x, d> / |x|, 0 for a zero row.

    Returns:
        float64 scores [...]. A non-finite row gives a non-finite score.

    Raises:
        ProfileError: unknown score.
        PromptError: the widths differ.
    """
    if score not in ("cosine", "dot"):
        raise ProfileError(f"score: expected 'cosine' or 'dot', got {score!r}")
    rows = rows.detach().to(torch.float64)
    direction = direction.detach().to(rows)
    if direction.ndim != 1 or rows.shape[-1:] != direction.shape:
        raise PromptError(
            f"rows: expected [..., H] for a direction [H], got {list(rows.shape)} and {list(direction.shape)}"
        )
    dots = rows @ direction
    if score == "dot":
        return dots
    norms = torch.linalg.vector_norm(rows, dim=-1)
    return torch.where(norms == 0, torch.zeros_like(dots), dots / norms)


def fit_direction(
    harmful: Tensor,
    harmless: Tensor,
    method: str = "lda",
    *,
    shrinkage: float | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Fit a gate direction from residual rows of two prompt sets.

    Methods, with d = mean(harmful) - mean(harmless):
        "mean": d itself (InferAligner, section "guidance gate": the safety related vector).
        "lda": S^-1 d, S the pooled within-class covariance shrunk towards the identity (Ledoit and Wolf 2004).
        "pca": first principal component of harmful[i] - harmless[i], not centred, the longer set cut to the shorter.
        "logistic": coefficients of an L2-regularised (C = 1) logistic regression on rows divided by one global scale.

    Args:
        harmful, harmless: [n1, H] and [n0, H], any float type.
        shrinkage: "lda" only: weight in [0, 1] of the identity target; None takes the Ledoit-Wolf value.
        weights: [n1] and [n0], positive: the weight of each row, up to one factor for all. Default: all rows alike,
            with "pca" the only choice.

    Returns:
        float64 [H] on the CPU, unit norm, pointing from harmless to harmful.

    Raises:
        PromptError: empty, non-finite or differently wide rows; equal means; too little variation for "lda".
        ProfileError: unknown method, weights or a shrinkage that are out of range or not for this method.
    """
    if method not in _SOLVERS:
        raise ProfileError(f"method: expected one of {', '.join(DIRECTION_METHODS)}, got {method!r}")
    if shrinkage is not None and (method != "lda" or not 0.0 <= shrinkage <= 1.0):
        raise ProfileError(f"shrinkage: expected None, or 0 to 1 with method 'lda', got {shrinkage} with {method!r}")
    harmful, harmless = _checked("harmful", harmful), _checked("harmless", harmless)
    if harmful.shape[1] != harmless.shape[1]:
        raise PromptError(f"harmless: expected rows as wide as harmful ({harmful.shape[1]}), got {harmless.shape[1]}")
    if weights is not None and method == "pca":
        raise ProfileError("weights: expected None with method 'pca', which pairs rows")
    if weights is None:
        weights = torch.ones(len(harmful)), torch.ones(len(harmless))
    weight = torch.cat(
        [_checked_weights("harmful", weights[0], harmful), _checked_weights("harmless", weights[1], harmless)]
    )
    return _solve(harmful, harmless, method, shrinkage, weight / weight.mean())


def _checked_weights(name: str, weight: Tensor, rows: Tensor) -> Tensor:
    """Return the weights of one set as a float64 CPU copy [n]."""
    weight = weight.detach().to("cpu", torch.float64)
    if weight.shape != rows.shape[:1] or not bool(((weight > 0) & weight.isfinite()).all()):
        raise ProfileError(f"weights: expected {len(rows)} positive numbers for {name}, got {weight.tolist()[:5]} ...")
    return weight


def _solve(harmful: Tensor, harmless: Tensor, method: str, shrinkage: float | None, weight: Tensor) -> Tensor:
    """Fit a direction, in an orthonormal basis of the rows where that is smaller; weight: [n1 + n0], mean 1."""
    rows = torch.cat([harmful, harmless])
    # All methods are blind to the scale of the rows; a scale of 1 keeps squares of odd inputs in range.
    size = float(rows.abs().max())
    if size == 0.0:
        raise PromptError("harmful and harmless: expected rows that differ, got only zeros")
    rows /= size
    row_norm = float(torch.linalg.vector_norm(rows)) / math.sqrt(len(rows))
    rows -= rows.mean(dim=0)
    width = rows.shape[1]
    basis = None
    if method != "mean":
        rows, basis = _in_basis(rows)
    positive, negative = rows[: len(harmful)], rows[len(harmful) :]
    difference = _mean(positive, negative, weight, width, shrinkage)
    if float(torch.linalg.vector_norm(difference)) <= _ROUNDING * row_norm:
        raise PromptError("harmful and harmless: expected sets with different mean rows, got the same mean")
    solution = _SOLVERS[method](positive, negative, weight, width, shrinkage)
    if float(solution @ difference) < 0.0:
        solution = -solution
    return unit(solution if basis is None else basis @ solution)


def _in_basis(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return rows [n, H] in an orthonormal basis of a space that holds them, and the basis, if n is below H."""
    if len(rows) >= rows.shape[1]:
        return rows, None
    basis, triangle = torch.linalg.qr(rows.T)
    return triangle.T.contiguous(), basis


def ledoit_wolf_shrinkage(centred: Tensor, width: int) -> float:
    """Return the Ledoit-Wolf weight of the identity target for rows without their mean.

    Args:
        centred: float64 [n, r], coordinates of the rows in any orthonormal basis of a space that holds them; each row
            times the root of its weight, where weights have the mean 1.
        width: the full number of features H >= r; the weight depends on it, not on r.

    Returns:
        Weight in [0, 1]; 0 if the covariance already is a multiple of the identity, or cannot be improved on.
    """
    count = len(centred)
    squares = centred.square().sum(dim=1)
    # |X'X| and |XX'| are the same Frobenius norm: take the smaller product.
    product = centred @ centred.T if count < centred.shape[1] else centred.T @ centred
    second_moment = float(product.square().sum()) / count**2
    trace = float(squares.sum()) / count
    noise = (float(squares.square().sum()) / count - second_moment) / count
    distance = second_moment - trace**2 / width
    if distance <= 0.0 or noise <= 0.0:
        return 0.0
    return min(noise / distance, 1.0)


def _checked(name: str, rows: Tensor) -> Tensor:
    """Return the rows of one prompt set as a float64 CPU copy [n, H]."""
    if rows.ndim != 2 or 0 in rows.shape:
        raise PromptError(f"{name}: expected at least one row, as [n, H], got shape {list(rows.shape)}")
    finite = torch.isfinite(rows).all(dim=1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten().tolist()
        raise PromptError(f"{name}: expected finite rows, got {len(bad)} of {len(rows)} that are not, first {bad[0]}")
    return rows.detach().to("cpu", torch.float64)


def _means(positive: Tensor, negative: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the weighted mean row of each set."""
    parts = zip(weight.split([len(positive), len(negative)]), (positive, negative), strict=True)
    return [part @ rows / part.sum() for part, rows in parts]


def _mean(positive: Tensor, negative: Tensor, weight: Tensor, width: int, shrinkage: float | None) -> Tensor:
    first, second = _means(positive, negative, weight)
    return first - second


def _pca(positive: Tensor, negative: Tensor, weight: Tensor, width: int, shrinkage: float | None) -> Tensor:
    pairs = min(len(positive), len(negative))
    differences = positive[:pairs] - negative[:pairs]
    if not bool(differences.any()):
        raise PromptError("harmful and harmless: expected paired rows that differ, got equal pairs")
    return torch.linalg.svd(differences, full_matrices=False).Vh[0]


def _logistic(positive: Tensor, negative: Tensor, weight: Tensor, width: int, shrinkage: float | None) -> Tensor:
    rows = torch.cat([positive, negative])
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    # One scale for all features, so that the penalty does not depend on the basis: root mean square over n x H.
    scale = float(torch.linalg.vector_norm(rows)) / math.sqrt(len(rows) * width)
    # Newton steps are exact to rounding in a few rounds; the default solver stops early, depending on the basis.
    solver = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10)
    fitted = solver.fit((rows / scale).numpy(), labels, sample_weight=weight.numpy())
    return torch.from_numpy(fitted.coef_[0])


def _lda(positive: Tensor, negative: Tensor, weight: Tensor, width: int, shrinkage: float | None) -> Tensor:
    for name, rows in (("harmful", positive), ("harmless", negative)):
        if len(rows) < 2:
            raise PromptError(f"{name}: expected at least 2 rows for a covariance (method 'lda'), got {len(rows)}")
    first, second = _means(positive, negative, weight)
    difference = first - second
    centred = torch.cat([positive - first, negative - second]) * weight[:, None].sqrt()
    identity = ledoit_wolf_shrinkage(centred, width) if shrinkage is None else shrinkage
    return _solve_lda(centred.T @ centred / len(centred), difference, width, identity)


def _solve_lda(covariance: Tensor, difference: Tensor, width: int, shrinkage: float) -> Tensor:
    """Return S^-1 d, float64 [r], of the covariance within the classes and the difference of their means.

    Args:
        covariance: float64 [r, r], in an orthonormal basis of a space that holds the rows; it is overwritten.
        width: the full number of features H >= r. shrinkage: weight of the identity target.

    Raises:
        PromptError: the covariance is singular.
    """
    variance = float(covariance.trace())
    covariance *= 1.0 - shrinkage
    covariance.diagonal().add_(shrinkage * variance / width)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal().square()
    rounding = len(pivots) * torch.finfo(torch.float64).eps * float(pivots.max())
    constant = math.sqrt(variance) <= _ROUNDING * float(torch.linalg.vector_norm(difference))
    if constant or int(failed) or not float(pivots.min()) > rounding:
        raise PromptError(
            f"harmful and harmless: expected rows that vary (method 'lda', shrinkage {shrinkage:.3g}), "
            "got a singular covariance; give more varied prompts or a larger shrinkage"
        )
    return torch.cholesky_solve(difference[:, None], factor)[:, 0]


_SOLVERS = {"lda": _lda, "mean": _mean, "pca": _pca, "logistic": _logistic}
DIRECTION_METHODS = tuple(_SOLVERS)


def _sums(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of weights, of weighted rows [r], and of their outer products [r, r]."""
    weighted = rows * weights[:, None]
    return weights.sum(), weighted.sum(dim=0), weighted.T @ rows


def lda_without(
    rows: Tensor, harmful: Tensor, weights: Tensor, folds: Sequence[Tensor], shrinkage: float
) -> list[Tensor]:
    """Return for each fold the direction that `fit_direction` fits by LDA to the other rows: float64 [F], unit norm.

    It costs one fit and a solution for each fold: the sums over the rows that stay are those over all less those over
    the fold.

    Args:
        rows: float64 [n, F]. harmful: bool [n]. weights: float64 [n], positive; in every fold both classes count alike.
        folds: masks, bool [n]; two rows of each class or more stay outside of each.

    Raises:
        PromptError: rows that do not vary.
    """
    width = rows.shape[1]
    rows, basis = _in_basis(rows - rows.mean(dim=0))
    whole = [(side, _sums(rows[side], weights[side])) for side in (harmful, ~harmful)]
    found = []
    for out in folds:
        means, covariances = [], []
        for side, sums in whole:
            of_fold = _sums(rows[side & out], weights[side & out])
            weight, first, second = (one - part for one, part in zip(sums, of_fold, strict=True))
            means.append(first / weight)
            covariances.append(second / weight - torch.outer(means[-1], means[-1]))
        solution = _solve_lda((covariances[0] + covariances[1]) / 2, means[0] - means[1], width, shrinkage)
        found.append(unit(solution if basis is None else basis @ solution))
    return found

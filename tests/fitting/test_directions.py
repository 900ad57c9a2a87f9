from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage as sklearn_shrinkage
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.directions import (
    DIRECTION_METHODS,
    fit_direction,
    ledoit_wolf_shrinkage,
    project,
    unit,
)

SEED = st.integers(0, 2**16)
METHOD = st.sampled_from(DIRECTION_METHODS)
# (harmful rows, harmless rows, width): fewer rows than features, and more.
SHAPES = [(12, 9, 40), (3, 2, 200), (40, 30, 12), (20, 20, 40), (21, 20, 40)]


def sets(seed: int, n1: int, n0: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two row sets with correlated features, a large common mean and a shift between them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    mixing = torch.linalg.qr(normal(width, width)).Q * scales
    mean, shift = 30.0 * normal(width), normal(width)
    harmful = normal(n1, width) @ mixing.T + mean + shift
    harmless = normal(n0, width) @ mixing.T + mean
    return harmful.to(dtype), harmless.to(dtype)


def centred(harmful: Tensor, harmless: Tensor) -> Tensor:
    return torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(unit(a) @ unit(b))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shrinkage", [None, 0.05, 0.5, 1.0])
def test_lda_equals_sklearn(shape: tuple[int, int, int], shrinkage: float | None) -> None:
    harmful, harmless = sets(1, *shape)
    weight = shrinkage
    if weight is None:
        weight = sklearn_shrinkage(centred(harmful, harmless).numpy(), assume_centered=True)
    rows, labels = torch.cat([harmful, harmless]).numpy(), np.repeat([1, 0], shape[:2])
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=float(weight)).fit(rows, labels)
    direction = fit_direction(harmful, harmless, "lda", shrinkage=shrinkage)
    assert cosine(direction, torch.from_numpy(reference.coef_[0])) > 1 - 1e-9


def test_lda_without_shrinkage_needs_more_rows_than_features() -> None:
    harmful, harmless = sets(2, 30, 30, 12)
    rows, labels = torch.cat([harmful, harmless]).numpy(), np.repeat([1, 0], 30)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(rows, labels)
    direction = fit_direction(harmful, harmless, "lda", shrinkage=0.0)
    assert cosine(direction, torch.from_numpy(reference.coef_[0])) > 1 - 1e-9
    for shape in ((12, 9, 40), (20, 20, 40), (21, 20, 40)):
        with pytest.raises(PromptError, match="singular"):
            fit_direction(*sets(2, *shape), "lda", shrinkage=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_ledoit_wolf_equals_sklearn(shape: tuple[int, int, int]) -> None:
    rows = centred(*sets(3, *shape))
    expected = sklearn_shrinkage(rows.numpy(), assume_centered=True)
    assert ledoit_wolf_shrinkage(rows, shape[2]) == pytest.approx(expected, rel=1e-9)
    # The same rows in an orthonormal basis of their span.
    compact = torch.linalg.qr(rows.T).R.T
    assert ledoit_wolf_shrinkage(compact, shape[2]) == pytest.approx(expected, rel=1e-9)


def test_ledoit_wolf_of_a_perfect_identity_is_zero() -> None:
    assert ledoit_wolf_shrinkage(torch.eye(5, dtype=torch.float64), 5) == 0.0
    assert ledoit_wolf_shrinkage(torch.zeros(4, 5, dtype=torch.float64), 5) == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_pca_and_logistic_equal_their_references(shape: tuple[int, int, int]) -> None:
    harmful, harmless = sets(4, *shape)
    assert cosine(fit_direction(harmful, harmless, "mean"), harmful.mean(0) - harmless.mean(0)) > 1 - 1e-12

    pairs = min(shape[:2])
    svd = TruncatedSVD(1, algorithm="arpack", tol=1e-14, random_state=0)
    svd.fit((harmful[:pairs] - harmless[:pairs]).numpy())
    assert abs(cosine(fit_direction(harmful, harmless, "pca"), torch.from_numpy(svd.components_[0]))) > 1 - 1e-9

    rows = torch.cat([harmful, harmless])
    rows = rows - rows.mean(0)
    rows = rows / rows.square().mean().sqrt()
    reference = LogisticRegression(C=1.0, solver="lbfgs", tol=1e-12, max_iter=100_000)
    reference.fit(rows.numpy(), np.repeat([1, 0], shape[:2]))
    assert cosine(fit_direction(harmful, harmless, "logistic"), torch.from_numpy(reference.coef_[0])) > 1 - 1e-6


@given(SEED, METHOD, st.sampled_from(SHAPES))
@settings(max_examples=40, deadline=None)
def test_result_is_a_unit_vector_towards_harmful(seed: int, method: str, shape: tuple[int, int, int]) -> None:
    harmful, harmless = sets(seed, *shape, dtype=torch.float32)
    direction = fit_direction(harmful, harmless, method)
    assert direction.dtype == torch.float64
    assert direction.shape == (shape[2],)
    assert float(torch.linalg.vector_norm(direction)) == pytest.approx(1.0, abs=1e-12)
    gap = (harmful.double().mean(0) - harmless.double().mean(0)) @ direction
    assert float(gap) > 0
    assert cosine(direction, -fit_direction(harmless, harmful, method)) > 1 - 1e-9


@given(SEED, METHOD, st.sampled_from(SHAPES))
@settings(max_examples=40, deadline=None)
def test_rotation_turns_the_direction_along(seed: int, method: str, shape: tuple[int, int, int]) -> None:
    harmful, harmless = sets(seed, *shape)
    rotation = torch.linalg.qr(torch.randn(shape[2], shape[2], dtype=torch.float64)).Q
    turned = fit_direction(harmful @ rotation, harmless @ rotation, method)
    assert cosine(turned, fit_direction(harmful, harmless, method) @ rotation) > 1 - 1e-7


@given(SEED, METHOD, st.sampled_from(SHAPES), st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_scale_and_shift_change_nothing(seed: int, method: str, shape: tuple[int, int, int], scale: float) -> None:
    harmful, harmless = sets(seed, *shape)
    direction = fit_direction(harmful, harmless, method)
    assert cosine(fit_direction(harmful * scale, harmless * scale, method), direction) > 1 - 1e-9
    shift = torch.randn(shape[2], dtype=torch.float64)
    assert cosine(fit_direction(harmful + shift, harmless + shift, method), direction) > 1 - 1e-7


@given(SEED, METHOD, st.sampled_from(SHAPES))
@settings(max_examples=40, deadline=None)
def test_order_of_prompts_does_not_matter(seed: int, method: str, shape: tuple[int, int, int]) -> None:
    n1, n0, _ = shape
    harmful, harmless = sets(seed, *shape)
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(n1, generator=generator), torch.randperm(n0, generator=generator)
    if method == "pca":  # pairs stay pairs
        harmful = harmful[:n0]
        harmless = harmless[:n1]
        first = second = torch.randperm(min(n1, n0), generator=generator)
    shuffled = fit_direction(harmful[first], harmless[second], method)
    assert cosine(shuffled, fit_direction(harmful, harmless, method)) > 1 - 1e-7


def test_lda_finds_the_direction_that_the_mean_misses() -> None:
    # Two features; the second carries a large nuisance that also moves the mean. Whitening discounts it.
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(200, 64, generator=generator)
    noise[:, 1] *= 20.0
    harmful, harmless = noise[:100].clone(), noise[100:].clone()
    harmful[:, 0] += 3.0
    harmful[:, 1] += 5.0
    assert float(fit_direction(harmful, harmless, "lda")[0]) > 0.8
    assert float(fit_direction(harmful, harmless, "mean")[0]) < 0.7


@pytest.mark.parametrize("method", DIRECTION_METHODS)
def test_wide_rows_need_no_square_matrix(method: str) -> None:
    width = 20_000  # H x H in float64 would be 3.2 GB
    generator = torch.Generator().manual_seed(6)
    harmful = torch.randn(32, width, generator=generator) + 0.1
    harmless = torch.randn(32, width, generator=generator)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Largest():
        fit_direction(harmful[:, :4], harmless[:, :4], method)  # the first call imports modules
    largest = 0
    tracemalloc.start()
    with Largest():
        direction = fit_direction(harmful, harmless, method)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < largest <= 64 * width
    assert peak < 64 * width * 8  # numpy's side (scikit-learn) stays in sample space too
    assert float(direction.sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rows_are_fitted_in_float64(dtype: torch.dtype) -> None:
    harmful, harmless = (rows.to(dtype) for rows in sets(7, 10, 10, 30))
    exact = fit_direction(harmful.double(), harmless.double())
    assert torch.equal(fit_direction(harmful, harmless), exact)


def test_inputs_stay_as_they_are() -> None:
    harmful, harmless = sets(8, 30, 30, 10)
    copies = harmful.clone(), harmless.clone()
    for method in DIRECTION_METHODS:
        fit_direction(harmful, harmless, method)
    assert torch.equal(harmful, copies[0])
    assert torch.equal(harmless, copies[1])


@pytest.mark.parametrize("method", DIRECTION_METHODS)
def test_unusable_rows_are_refused(method: str) -> None:
    harmful, harmless = sets(9, 8, 6, 20)
    broken = harmful.clone()
    broken[3, 5] = float("nan")
    cases = [
        (harmful[:0], harmless, "harmful: expected at least one row"),
        (harmful, harmless[:0], "harmless: expected at least one row"),
        (harmful[0], harmless, "harmful: expected at least one row"),
        (broken, harmless, r"harmful: expected finite rows, got 1 of 8 that are not, first 3"),
        (harmful, harmless[:, :19], r"harmless: expected rows as wide as harmful \(20\), got 19"),
        (harmful, harmful[torch.randperm(8)], "the same mean"),
        (harmful * 0, harmless * 0, "only zeros"),
    ]
    for first, second, message in cases:
        with pytest.raises(PromptError, match=message):
            fit_direction(first, second, method)


def test_one_row_is_enough_without_a_covariance() -> None:
    harmful, harmless = sets(10, 1, 1, 20)
    for method in ("mean", "pca", "logistic"):
        assert cosine(fit_direction(harmful, harmless, method), (harmful - harmless)[0]) > 1 - 1e-9
    more = sets(10, 5, 5, 20)
    with pytest.raises(PromptError, match="harmful: expected at least 2 rows"):
        fit_direction(harmful, more[1], "lda")
    with pytest.raises(PromptError, match="harmless: expected at least 2 rows"):
        fit_direction(more[0], harmless, "lda")


def test_rows_without_variation_have_no_covariance() -> None:
    harmful, harmless = (rows.expand(4, -1) for rows in sets(11, 1, 1, 20))
    with pytest.raises(PromptError, match="singular"):
        fit_direction(harmful, harmless, "lda")


def test_wrong_options_are_refused() -> None:
    harmful, harmless = sets(12, 5, 5, 20)
    with pytest.raises(ProfileError, match="method: expected one of lda, mean, pca, logistic, got 'svm'"):
        fit_direction(harmful, harmless, "svm")
    with pytest.raises(ProfileError, match="shrinkage"):
        fit_direction(harmful, harmless, "lda", shrinkage=1.5)
    with pytest.raises(ProfileError, match="shrinkage"):
        fit_direction(harmful, harmless, "mean", shrinkage=0.5)


def test_project_is_the_gate_score() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]])
    direction = torch.tensor([1.0, 0.0])
    assert project(rows, direction, "dot").tolist() == [3.0, 0.0, -2.0]
    assert project(rows, direction, "cosine").tolist() == pytest.approx([0.6, 0.0, -1.0])
    assert project(rows.bfloat16(), direction, "dot").dtype == torch.float64
    assert project(rows[None], direction, "cosine").shape == (1, 3)
    assert bool(project(rows * float("nan"), direction, "cosine").isnan().all())
    with pytest.raises(ProfileError, match="score: expected 'cosine' or 'dot', got 'angle'"):
        project(rows, direction, "angle")
    with pytest.raises(PromptError, match="rows"):
        project(rows, torch.ones(3), "dot")


def test_unit() -> None:
    assert unit(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert unit(torch.tensor([3e-200, 4e-200], dtype=torch.float64)).tolist() == pytest.approx([0.6, 0.8])
    for bad in (
        torch.zeros(3),
        torch.tensor([1.0, float("inf")]),
        torch.tensor([float("nan")]),
        torch.ones(0),
    ):
        with pytest.raises(PromptError, match="vector"):
            unit(bad)


@pytest.mark.parametrize("method", ["mean", "lda", "logistic"])
@pytest.mark.parametrize("width", [4, 60])
def test_a_row_of_weight_three_counts_as_three_rows(method: str, width: int) -> None:
    generator = torch.Generator().manual_seed(4)
    harmful, harmless = (torch.randn(12, width, generator=generator, dtype=torch.float64) + i for i in range(2))
    weights = torch.ones(12, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    weights[0][3], weights[1][7] = 3.0, 2.0
    options = {"shrinkage": 0.3} if method == "lda" else {}
    found = fit_direction(harmful, harmless, method, weights=weights, **options)
    scaled = 5 * weights[0], 5 * weights[1]
    torch.testing.assert_close(found, fit_direction(harmful, harmless, method, weights=scaled, **options))
    if method == "logistic":  # its penalty counts rows, so that more of them fit closer
        assert float(found @ fit_direction(harmful, harmless, method)) < 1 - 1e-6
        return
    repeated = [torch.repeat_interleave(x, w.long(), dim=0) for x, w in zip((harmful, harmless), weights, strict=True)]
    torch.testing.assert_close(found, fit_direction(*repeated, method, **options), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.zeros(4), torch.full((4,), math.nan)])
def test_weights_that_are_none_are_refused(wrong: torch.Tensor) -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ProfileError, match="weights: expected 4 positive numbers for harmless"):
        fit_direction(rows, rows + 1, "mean", weights=(torch.ones(4), wrong))
    with pytest.raises(ProfileError, match="pca"):
        fit_direction(rows, rows + 1, "pca", weights=(torch.ones(4), torch.ones(4)))

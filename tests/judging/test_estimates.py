from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from steerfast.errors import ProfileError, PromptError
from steerfast.judging.estimates import (
    Estimate,
    auc,
    exact_interval,
    grouped_auc,
    mean,
    paired_difference,
    rate,
    threshold_at_false_positive_rate,
    threshold_midpoint,
)

# Few distinct values make ties common; the floats make gaps of every size.
SCORES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)), min_size=1, max_size=30)


def delong_variance(positive: list[float], negative: list[float]) -> float:
    """Straight from the definition: variances of the structural components."""
    psi = np.array([[(p > q) + 0.5 * (p == q) for q in negative] for p in positive])
    return float(psi.mean(1).var(ddof=1) / len(positive) + psi.mean(0).var(ddof=1) / len(negative))


@given(SCORES, SCORES)
@settings(deadline=None)
def test_auc_equals_brute_force_and_sklearn(positive: list[float], negative: list[float]) -> None:
    estimate = auc(positive, negative)
    pairs = [(p > q) + 0.5 * (p == q) for p in positive for q in negative]
    assert estimate.value == pytest.approx(np.mean(pairs), abs=1e-12)
    labels = [1] * len(positive) + [0] * len(negative)
    assert estimate.value == pytest.approx(roc_auc_score(labels, positive + negative), abs=1e-12)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert estimate.low < estimate.high
    mirrored = auc(negative, positive)
    assert mirrored.value == pytest.approx(1.0 - estimate.value, abs=1e-12)
    assert mirrored.low == pytest.approx(1.0 - estimate.high, abs=1e-9)


def test_auc_interval_is_delong_on_the_logit_scale() -> None:
    generator = np.random.default_rng(0)
    positive, negative = generator.normal(1.0, size=40).round(1), generator.normal(size=25).round(1)
    estimate = auc(positive, negative)
    value = estimate.value
    half = 1.959963984540054 * math.sqrt(delong_variance(list(positive), list(negative))) / (value * (1 - value))
    logits = [math.log(x / (1 - x)) for x in (estimate.low, value, estimate.high)]
    assert logits == pytest.approx([logits[1] - half, logits[1], logits[1] + half], abs=1e-9)


@given(st.lists(SCORES, min_size=1, max_size=3), st.lists(SCORES, min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_groups_weigh_alike_in_an_auc(positive: list[list[float]], negative: list[list[float]]) -> None:
    estimate = grouped_auc(positive, negative)
    areas = [auc(one, other).value for one in positive for other in negative]
    assert estimate.value == pytest.approx(np.mean(areas), abs=1e-12)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert grouped_auc(positive[:1] * 2, negative).value == pytest.approx(grouped_auc(positive[:1], negative).value)


def test_the_interval_of_groups_is_of_their_placements() -> None:
    generator = np.random.default_rng(3)
    positive = generator.normal(1.0, size=30).round(1)
    negative = [generator.normal(shift, size=size).round(1) for shift, size in ((0.0, 20), (1.0, 8))]
    estimate = grouped_auc([positive], negative)
    psi = [np.array([[(p > q) + 0.5 * (p == q) for q in one] for p in positive]) for one in negative]
    above = np.mean([one.mean(1) for one in psi], axis=0)
    variance = above.var(ddof=1) / 30 + sum(one.mean(0).var(ddof=1) / one.shape[1] for one in psi) / 4
    half = 1.959963984540054 * math.sqrt(variance) / (estimate.value * (1 - estimate.value))
    logits = [math.log(x / (1 - x)) for x in (estimate.low, estimate.value, estimate.high)]
    assert logits == pytest.approx([logits[1] - half, logits[1], logits[1] + half], abs=1e-9)
    assert grouped_auc([positive], negative).low == grouped_auc([positive], negative[::-1]).low
    with pytest.raises(PromptError, match="negative: expected at least one score"):
        grouped_auc([positive], [])


def test_exact_intervals_at_their_ends() -> None:
    assert exact_interval(0, 100) == pytest.approx((0.0, 1 - 0.025 ** (1 / 100)))
    assert exact_interval(100, 100) == pytest.approx((0.025 ** (1 / 100), 1.0))


def test_the_mean_of_estimates() -> None:
    single = Estimate(0.5, 0.25, 0.625)
    assert mean([single]) == single
    found = mean([single, Estimate(1.0, 0.75, 1.0)])
    assert found.value == 0.75
    assert (found.low, found.high) == pytest.approx((0.75 - math.hypot(0.25, 0.25) / 2, 0.75 + 0.125 / 2))
    with pytest.raises(PromptError, match="estimates: expected at least one"):
        mean([])


def test_the_mean_of_rates_covers_the_truth() -> None:
    generator = np.random.default_rng(4)
    truth, covered = (0.02, 0.2, 0.7), 0
    for _ in range(300):
        found = mean([rate(int(generator.binomial(60, p)), 60) for p in truth])
        covered += found.low <= np.mean(truth) <= found.high
    assert 0.92 <= covered / 300 <= 0.985


@given(SCORES, st.floats(0.0, 0.99))
@settings(deadline=None)
def test_a_weighted_threshold_equals_that_of_repeated_scores(scores: list[float], limit: float) -> None:
    counts = [1 + number % 3 for number in range(len(scores))]
    repeated = [score for score, count in zip(scores, counts, strict=True) for _ in range(count)]
    found = threshold_at_false_positive_rate(scores, limit, counts)
    assert found == threshold_at_false_positive_rate(repeated, limit)


def test_auc_interval_covers_the_truth() -> None:
    # Normal scores one standard deviation apart: the true AUC is Phi(1 / sqrt 2).
    truth = 0.5 * (1 + math.erf(0.5))
    generator = np.random.default_rng(1)
    estimates = [auc(generator.normal(1.0, size=30), generator.normal(size=30)) for _ in range(400)]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.92 <= covered <= 0.98


def test_auc_interval_has_width_where_delong_has_none() -> None:
    perfect = auc([3.0, 4.0, 5.0, 6.0], [0.0, 1.0, 2.0])
    assert perfect.value == perfect.high == 1.0
    assert perfect.low == pytest.approx(0.025 ** (1 / 3))  # exact binomial, 3 of 3
    assert auc([0.0, 1.0], [2.0, 3.0]).high == pytest.approx(1 - 0.025**0.5)
    many = auc(np.arange(1.0, 1001.0), -np.arange(1000.0))
    assert 0.99 < many.low < 1.0
    tied = auc([1.0] * 50, [1.0] * 50)
    assert tied.value == 0.5
    assert 0.3 < tied.low < 0.45
    assert tied.low + tied.high == pytest.approx(1.0)
    single = auc([1.5], [0.0, 1.0, 2.0])
    assert single.value == pytest.approx(2 / 3)
    assert 0.0 < single.low < single.value < single.high < 1.0


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_rate_is_the_wilson_interval(counts: tuple[int, int]) -> None:
    k, n = counts
    estimate = rate(k, n)
    assert estimate.value == k / n
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert estimate.low == pytest.approx(centre - half, abs=1e-9)
    assert estimate.high == pytest.approx(centre + half, abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_rate_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(PromptError, match="rate: expected 0 <= k <= n"):
        rate(k, n)


@given(SCORES, st.floats(0.0, 0.999))
@example([0.0, 5e-324], 0.5)  # neighbours: nothing lies between them
@example([-5e-324, 0.0], 0.5)
@example([1.0, 1.0 + 2.0**-52], 0.5)
@example([1.0 + 2.0**-52, 1.0 + 2.0**-51], 0.5)
@settings(deadline=None)
def test_threshold_is_the_lowest_that_keeps_the_rate(scores: list[float], limit: float) -> None:
    threshold = threshold_at_false_positive_rate(scores, limit)
    n = len(scores)

    def share(value: float) -> float:
        return sum(s > value for s in scores) / n

    assert share(threshold) <= limit
    # Any lower set of decisions would break the limit: the scores between are what changes them.
    below = [s for s in scores if s <= threshold]
    assert below
    edge = max(below)
    assert share(np.nextafter(edge, -np.inf)) > limit
    above = [s for s in scores if s > threshold]
    if above:
        assert threshold == pytest.approx(0.5 * edge + 0.5 * min(above), rel=1e-12)


@given(SCORES)
@settings(deadline=None)
def test_threshold_for_no_false_positive_is_just_above_the_maximum_in_float32_too(
    scores: list[float],
) -> None:
    threshold = threshold_at_false_positive_rate(scores, 0.0)
    top = max(scores)
    assert top < threshold <= top + max(abs(top) * 2.0**-22, 2.0**-148)
    assert np.float32(top) < np.float32(threshold)
    assert float(np.float32(threshold)) == threshold


@pytest.mark.parametrize(
    ("limit", "fires"),
    [(0.0, 0), (0.005, 0), (0.01, 1), (0.07, 7), (0.29, 29), (0.295, 29), (0.57, 57), (0.99, 99)],
)
def test_threshold_uses_the_whole_allowance(limit: float, fires: int) -> None:
    scores = np.random.default_rng(2).permutation(100).astype(float)
    threshold = threshold_at_false_positive_rate(scores, limit)
    assert int((scores > threshold).sum()) == fires
    if fires:
        assert threshold == 99 - fires + 0.5


def test_threshold_keeps_ties_out_together() -> None:
    scores = [0.0] * 90 + [1.0] * 10
    assert threshold_at_false_positive_rate(scores, 0.05) == pytest.approx(1.0, abs=1e-6)
    assert threshold_at_false_positive_rate(scores, 0.05) > 1.0
    assert threshold_at_false_positive_rate(scores, 0.10) == 0.5


def test_threshold_midpoint() -> None:
    assert threshold_midpoint([2.0, 4.0], [0.0, 0.0, 3.0]) == 2.0


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf], [[1.0]]])
def test_unusable_scores_are_refused(bad: list[float]) -> None:
    good = [0.0, 1.0]
    for call in (
        lambda: auc(bad, good),
        lambda: auc(good, bad),
        lambda: threshold_midpoint(good, bad),
        lambda: threshold_at_false_positive_rate(bad, 0.1),
    ):
        with pytest.raises(PromptError, match="expected"):
            call()


@pytest.mark.parametrize("limit", [-0.1, 1.0, math.nan])
def test_unusable_rate_is_refused(limit: float) -> None:
    with pytest.raises(ProfileError, match="rate: expected 0 <= rate < 1"):
        threshold_at_false_positive_rate([0.0], limit)


@pytest.mark.parametrize(
    ("counts", "expected"),  # both, the first alone, the second alone, neither
    [((36, 12, 2, 0), (0.2, 0.0569, 0.3404)), ((0, 0, 0, 24), (0, -0.138, 0.138)), ((24, 0, 0, 0), (0, -0.138, 0.138))],
)
def test_paired_differences_of_known_tables(counts: tuple[int, ...], expected: tuple[float, ...]) -> None:
    first, second = (np.repeat(values, counts) for values in ([1, 1, 0, 0], [1, 0, 1, 0]))
    assert paired_difference(first, second).to_list() == pytest.approx(expected, abs=5e-4)


def test_paired_differences_of_all_small_tables() -> None:
    """Newcombe's method 10, from the counts, as the paper writes it; the known tables have no positive correlation."""
    z, n = 1.959963984540054, 9
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        if (d := n - a - b - c) < 0:
            continue
        first, second = (np.repeat(values, (a, b, c, d)) for values in ([1, 1, 0, 0], [1, 0, 1, 0]))
        (p1, l1, u1), (p2, l2, u2) = (
            (
                x / n,
                *((2 * x + z**2 + s * z * math.sqrt(z**2 + 4 * x * (1 - x / n))) / (2 * (n + z**2)) for s in (-1, 1)),
            )
            for x in (a + b, a + c)
        )
        top, bottom = a * d - b * c, (a + b) * (c + d) * (a + c) * (b + d)
        phi = (max(0, top - n / 2) if top > 0 else top) / math.sqrt(bottom) if bottom else 0
        low = p1 - p2 - math.sqrt(abs((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2))
        high = p1 - p2 + math.sqrt(abs((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2))
        assert paired_difference(first, second).to_list() == pytest.approx([p1 - p2, low, high], abs=1e-7)


flags = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(flags)
def test_paired_differences_are_symmetric_and_never_certain(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    found, turned = paired_difference(first, second), paired_difference(second, first)
    assert found.value == np.mean(first) - np.mean(second)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.05
    assert [-turned.value, -turned.high, -turned.low] == pytest.approx(found.to_list())


@pytest.mark.parametrize("share", [0.02, 0.04, 0.08, 0.3])
def test_paired_differences_cover_the_truth(share: float) -> None:
    """A percentile bootstrap covers 2 of 100 items that differ in 37 % of samples of 24."""
    generator = np.random.default_rng(7)
    second = generator.random((2000, 24)) < 0.5
    first = second | (generator.random((2000, 24)) < 2 * share)  # half of the items can still change
    found = [paired_difference(one, two) for one, two in zip(first, second, strict=True)]
    assert np.mean([one.low <= share <= one.high for one in found]) > 0.91


def test_unusable_pairs_are_refused() -> None:
    with pytest.raises(PromptError, match="second: expected as many values as in first, 2, got 1"):
        paired_difference([1, 0], [1])
    with pytest.raises(PromptError, match="first: expected at least one score"):
        paired_difference([], [])
    with pytest.raises(PromptError, match="second: expected finite"):
        paired_difference([1.0], [math.nan])
    with pytest.raises(PromptError, match=r"first: expected 0 or 1 for each item, got 0\.5"):
        paired_difference([1, 0.5], [0, 0])

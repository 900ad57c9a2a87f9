"""Drift of live scores: traffic like the calibration's passes, moved traffic is found, and nothing is guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta, norm

import steerfast
from steerfast.errors import ProfileError, PromptError
from steerfast.evaluation.drift import (
    INCONCLUSIVE,
    PASS,
    STALE,
    Cumulative,
    Drift,
    Limits,
    calibrated,
    compare,
    live_scores,
    read_metrics,
    read_scores,
    worst,
)
from steerfast.fitting.calibrate import _histogram
from steerfast.fitting.labelled import Labelled
from steerfast.profile import Gate, ModelIdentity, SteeringProfile
from steerfast.vllm.metrics import _BUCKETS

MODEL = ModelIdentity(name="tiny", architecture="llama", hidden_size=4, num_layers=2)
THRESHOLD = 1.7  # a gate that 4.5 % of a standard normal passes


def made(harmless: NDArray[np.float64], threshold: float = THRESHOLD, **fields: Any) -> SteeringProfile:
    """A profile of one gate, at layer 1, that was calibrated on these scores."""
    harmful = harmless[: len(harmless) // 2] + 3
    examples = Labelled.of([f"bad {i}" for i in range(len(harmful))], [f"good {i}" for i in range(len(harmless))])
    rows = [
        {"source": "s", "label": label, "n": len(part), "fired": int((part > threshold).sum())}
        for label, scores in (("harmful", harmful), ("harmless", harmless))
        for part in np.array_split(scores, 2)
    ]
    histogram = _histogram(examples, torch.from_numpy(np.concatenate([harmful, harmless])).float())
    return SteeringProfile(
        model=MODEL,
        direction=torch.eye(2, 4),
        threshold=torch.full((2,), threshold),
        vector=torch.ones(2, 4),
        strength=torch.tensor([0.0, 1.0]),
        norm=torch.zeros(2),
        sensor=1,
        calibration={"histograms": {"calibration": [{}, histogram]}, "by_source": {"1": {"rows": rows}}},
        **fields,
    )


def drift(profile: SteeringProfile, scores: Any, limits: Limits | None = None, label: str = "harmless") -> Drift:
    known = calibrated(profile, label)
    live = live_scores(scores, float(profile.threshold[1]), known.scores.edges)
    return compare(profile, live, limits, label=label)


def draw(seed: int, count: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=count)


PROFILE = made(draw(0, 500))


# -- statistics ------------------------------------------------------------------------------------------------------


def test_traffic_like_the_calibrations_is_rarely_stale() -> None:
    """At most 6 % of samples may be called stale, whose calibration is a sample, too."""
    verdicts = [drift(made(draw(2 * seed, 300)), draw(2 * seed + 1, 300)).verdict for seed in range(200)]
    assert verdicts.count(STALE) <= 12
    assert verdicts.count(PASS) >= 188


@settings(max_examples=30)
@given(shift=st.floats(0.8, 3), sign=st.sampled_from([1, -1]), seed=st.integers(0, 10**6))
def test_a_shift_of_the_scores_is_found(shift: float, sign: int, seed: int) -> None:
    found = drift(PROFILE, sign * shift + draw(seed, 400))
    assert found.verdict == STALE
    assert any("moved" in reason for reason in found.reasons)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_more_that_fires_is_found_though_few_scores_moved(seed: int) -> None:
    """A tenth of the traffic is of another kind: too little for the distance."""
    scores = draw(seed, 600)
    scores[:90] += 6
    found = drift(PROFILE, scores)
    assert found.verdict == STALE
    assert ["fires" in reason for reason in found.reasons] == [True]
    assert found.distance is not None
    assert found.distance < 0.2
    assert drift(PROFILE, scores, Limits(tolerance=4)).verdict == PASS


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_a_gate_that_loses_hits_is_found_by_harmful_prompts(seed: int) -> None:
    """A fifth of the attacks looks harmless now; to harmless traffic nothing happened."""
    scores = draw(seed, 400) + 3
    scores[:80] -= 3
    found = drift(PROFILE, scores, label="harmful")
    assert found.verdict == STALE
    assert any("does not fire" in reason for reason in found.reasons)
    assert worst([drift(PROFILE, draw(seed, 400)), found]) == STALE


def test_harmful_prompts_like_the_calibrations_are_rarely_stale() -> None:
    found = [
        drift(made(draw(2 * seed, 600)), draw(2 * seed + 1, 300) + 3, label="harmful").verdict for seed in range(200)
    ]
    assert found.count(STALE) <= 12
    assert found.count(PASS) >= 188


def test_more_hits_are_no_drift_and_another_threshold_has_a_bound() -> None:
    """The fewest hits that the histogram allows stand in where the record is of another threshold."""
    assert drift(PROFILE, draw(3, 400) + 3.2, label="harmful").verdict == PASS
    pointed = replace(PROFILE, points={"permissive": torch.full((2,), 2.6)}).at("permissive")
    found = drift(pointed, draw(3, 400) + 3, label="harmful")
    exact = (draw(0, 500)[:250] + 3 > 2.6).mean()
    assert exact - 0.1 <= found.calibrated.value <= exact
    assert found.verdict == PASS


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [((PASS, PASS), PASS), ((PASS, INCONCLUSIVE), INCONCLUSIVE), ((STALE, INCONCLUSIVE), STALE), ((PASS,), PASS)],
)
def test_the_worst_side_counts(verdicts: tuple[str, ...], verdict: str) -> None:
    assert worst([replace(drift(PROFILE, draw(3, 400)), verdict=one) for one in verdicts]) == verdict


def test_intervals_are_exact() -> None:
    found = drift(PROFILE, draw(5, 400))
    for rate, n in ((found.live, 400), (found.calibrated, 500)):
        k = round(rate.value * n)
        assert (rate.low, rate.high) == pytest.approx((beta.ppf(0.025, k, n - k + 1), beta.ppf(0.975, k + 1, n - k)))
    assert found.calibrated.value == (draw(0, 500) > THRESHOLD).mean()
    assert found.live.value == (draw(5, 400) > THRESHOLD).mean()


def test_the_distance_is_of_the_distributions_at_the_edges() -> None:
    live = draw(5, 400) + 0.5
    found, edges = drift(PROFILE, live), calibrated(PROFILE).scores.edges
    ours = np.sort(draw(0, 500).astype(np.float32))
    gaps = [abs((live < edge).mean() - (ours < edge).mean()) for edge in edges]
    assert found.distance == pytest.approx(max(gaps), abs=0.003)  # histc rounds an edge in float32
    assert found.distance == pytest.approx(2 * norm.cdf(0.25) - 1, abs=0.08)


@given(
    edges=st.lists(st.floats(-5, 5), min_size=1, max_size=6, unique=True).map(sorted),
    scores=st.lists(st.floats(-6, 6), min_size=1, max_size=20),
    at=st.lists(st.floats(-7, 7), min_size=1, max_size=6),
)
def test_bounds_hold_the_truth(edges: list[float], scores: list[float], at: list[float]) -> None:
    below = np.array([sum(score < edge for score in scores) for edge in edges])
    low, high = Cumulative(np.array(edges), below, len(scores)).bounds(np.array([*at, *edges]))
    truth = np.array([np.mean([score < value for score in scores]) for value in [*at, *edges]])
    assert (low <= truth + 1e-12).all()
    assert (truth <= high + 1e-12).all()
    assert low[len(at) :] == pytest.approx(truth[len(at) :])
    assert high[len(at) :] == pytest.approx(truth[len(at) :])


def test_few_scores_are_inconclusive_and_the_number_that_is_needed_is_enough() -> None:
    found = drift(PROFILE, draw(3, 20))
    assert found.verdict == INCONCLUSIVE
    assert found.needed is not None
    assert 20 < found.needed < 500
    assert drift(PROFILE, draw(3, found.needed)).verdict == PASS
    assert drift(PROFILE, draw(3, found.needed - 1)).verdict == INCONCLUSIVE
    assert drift(PROFILE, draw(3, 20) + 4).verdict == STALE, "what is clear needs no more"
    few = drift(made(draw(0, 40)), draw(3, 5000))
    assert (few.verdict, few.needed) == (INCONCLUSIVE, None)


def test_another_threshold_has_another_rate() -> None:
    """It is not recorded: the histogram bounds it from above, by less than a bin."""
    points = {"strict": torch.full((2,), 0.6), "permissive": torch.full((2,), 2.6)}
    pointed = replace(PROFILE, points=points)
    for point, threshold in points.items():
        found = drift(pointed.at(point), draw(5, 400))
        exact = (draw(0, 500) > float(threshold[1])).mean()
        assert exact <= found.calibrated.value <= exact + 0.1
        assert (found.verdict, found.threshold) == (PASS, float(threshold[1]))


def test_a_threshold_in_the_bin_of_the_recorded_one_has_another_rate() -> None:
    """The record is of ``balanced``; the share of a higher threshold is bounded by that of its bin."""
    scores = draw(0, 500)
    above = torch.full((2,), THRESHOLD + 1e-3)
    pointed = replace(PROFILE, points={"balanced": torch.full((2,), THRESHOLD), "permissive": above})
    edges = calibrated(pointed).scores.edges
    assert np.searchsorted(edges, THRESHOLD) == np.searchsorted(edges, THRESHOLD + 1e-3)
    assert calibrated(pointed).fired == (scores > THRESHOLD).sum()
    lower_edge = edges[np.searchsorted(edges, THRESHOLD) - 1]
    assert calibrated(pointed.at("permissive")).fired == (scores >= lower_edge).sum()


@pytest.mark.parametrize(
    ("name", "value"), [("tolerance", 0.9), ("tolerance", math.nan), ("distance", 0.0), ("distance", 1.0)]
)
def test_limits_have_a_range(name: str, value: float) -> None:
    with pytest.raises(ProfileError, match=f"^{name}: expected "):
        Limits(**{name: value})


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_scores_come_in_several_forms() -> None:
    records = [{"score": 0.5, "layer": 1, "fired": True}, {"score": -1}]
    for text in (
        "[0.5, -1]",
        "0.5\n-1\n",
        json.dumps(records),
        json.dumps({"profile": "p", "results": records}, indent=2),
        "\n\n".join(map(json.dumps, records)),
    ):
        assert read_scores(text, 1) == [0.5, -1.0]
    assert read_scores("7", 1) == [7.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[0.5, NaN]", "expected a finite number, or a record with one as score, as entry 2"),
        ("[Infinity]", "as entry 1"),
        ('{"score": null}', "as entry 1"),
        (f"[0.5, 1{'0' * 400}]", "as entry 2"),
        ("[true]", "as entry 1"),
        ('["0.5"]', "as entry 1"),
        ('{"results": [{"prompt": "x"}]}', "as entry 1"),
        ('[{"score": 1, "layer": 2}]', "expected scores of layer 1, which decides, got layer 2"),
        ("score\n1", "expected JSON, or a JSON value a line"),
        ("[" * 100_000, "expected JSON, or a JSON value a line"),
    ],
)
def test_what_is_no_score_is_refused(text: str, says: str) -> None:
    with pytest.raises(PromptError, match=f"^scores: .*{says}|^scores: {says}"):
        read_scores(text, 1)


@pytest.mark.parametrize("scores", [[], [[1.0]], [0.0, math.nan], [math.inf]])
def test_scores_are_finite_numbers(scores: Any) -> None:
    with pytest.raises(PromptError, match=r"^scores: expected "):
        live_scores(scores, 0.0, np.array([0.0, 1.0]))


def page(scores: NDArray[np.float64], name: str = "safety", threshold: float = THRESHOLD) -> str:
    """What a server shows after these scores."""
    fired = int((scores > threshold).sum())
    labels = f'profile="{name}"'
    lines = ["# TYPE steerfast_gate_score histogram", f"steerfast_gate_score_sum{{{labels}}} {scores.sum()}"]
    for edge in (*_BUCKETS, math.inf):
        shown = "+Inf" if edge == math.inf else str(edge)
        lines.append(f'steerfast_gate_score_bucket{{le="{shown}",{labels}}} {float((scores <= edge).sum())}')
    lines += [
        f"steerfast_gate_evaluations_total{{{labels}}} {float(len(scores))}",
        f"steerfast_gate_firings_total{{{labels}}} {float(fired)}",
        'steerfast_info{version="0",vllm="0",locked="true"} 1.0',
    ]
    return "\n".join(lines)


def test_a_servers_histogram_is_coarser_and_never_calls_more_stale() -> None:
    for shift, verdict in ((0.0, PASS), (2.0, STALE), (-2.0, STALE)):
        scores = draw(7, 500) + shift
        live = read_metrics(page(scores))
        assert (live.requests, live.fired) == (500, int((scores > THRESHOLD).sum()))
        found, exact = compare(PROFILE, live), drift(PROFILE, scores)
        assert found.verdict == verdict
        assert found.distance is not None
        assert exact.distance is not None
        assert found.distance <= exact.distance + 0.05


def test_series_of_several_instances_add_up() -> None:
    scores = draw(7, 300)
    pages = [
        page(part).replace('profile="', f'instance="{i}",profile="')
        for i, part in enumerate((scores[:90], scores[90:]))
    ]
    both, whole = read_metrics("\n".join(pages)), read_metrics(page(scores))
    assert (both.requests, both.fired) == (whole.requests, whole.fired)
    assert both.scores is not None
    assert whole.scores is not None
    assert both.scores.below.tolist() == whole.scores.below.tolist()


def test_counts_alone_are_compared_by_their_share() -> None:
    counts = (
        'steerfast_gate_evaluations_total{{profile="safety"}} 1000\nsteerfast_gate_firings_total{{profile="safety"}} {}'
    )
    for fired, verdict in ((45, PASS), (200, STALE)):
        found = compare(PROFILE, read_metrics(counts.format(fired)))
        assert (found.verdict, found.distance) == (verdict, None)
        unfinished = f'{counts.format(fired)}\nsteerfast_gate_score_bucket{{profile="safety",le="1.0"}} 1e30'
        assert read_metrics(unfinished).scores is None


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", None, "expected one profile, or its name, got none"),
        (
            page(draw(1, 9)) + "\n" + page(draw(1, 9), "tone"),
            None,
            "expected one profile, or its name, got safety, tone",
        ),
        (page(draw(1, 9)), "tone", "expected a profile of safety, got 'tone'"),
        (page(draw(1, 0)), None, "expected requests that the gate decided on, got 0, 0 of them fired"),
        ('steerfast_gate_evaluations_total{profile="a"} NaN', None, "expected a count, got 'NaN'"),
        ('steerfast_gate_score_bucket{profile="a"} 1', None, "expected buckets with a number as le, got None"),
        ('steerfast_gate_score_bucket{le="x",profile="a"} 1', None, "expected buckets with a number as le, got 'x'"),
    ],
)
def test_a_page_without_this_profile_is_refused(text: str, name: str | None, says: str) -> None:
    with pytest.raises(PromptError, match=f"^metrics: {says}"):
        read_metrics(text, name)


@pytest.mark.parametrize(
    "fields",
    [{"calibration": {}}, {"sensor": "own", "strength": torch.ones(2)}, {"gate": Gate("always"), "sensor": "own"}],
)
def test_a_profile_needs_one_calibrated_gate(fields: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=r"^profile: expected (one layer that decides|a histogram)"):
        calibrated(replace(PROFILE, **fields))


# -- a model ---------------------------------------------------------------------------------------------------------


def test_another_dtype_passes_and_moved_scores_do_not(
    make_llama: Callable[..., Any], tiny_tokenizer: Any, make_profile: Callable[..., SteeringProfile]
) -> None:
    """The same prompts in bfloat16 score alike."""
    model = make_llama()
    verbs, things, ends = (
        ("bake", "paint", "grow", "find", "learn"),
        ("cake", "song", "cat", "city"),
        [".", ",", "?", "'", "the", "a"],
    )
    harmless = [f"how do i {v} {t} {e} {w}" for v in verbs for t in things for e in ends for w in ("you", "it")]
    harmful = [f"{prompt} bomb" for prompt in harmless]
    options = {"progress": False, "sensor": 2, "latest_sensor": 4}
    profile = make_profile(model, tiny_tokenizer, layers=[2], sensor=2, pooling="mean")
    profile = steerfast.calibrate(profile, model, tiny_tokenizer, harmful=harmful, harmless=harmless, **options)
    layer, edges = 2, calibrated(profile).scores.edges

    def found(other: Any) -> Drift:
        scores = steerfast.score(other, tiny_tokenizer, profile, harmless, progress=False).scores
        return compare(profile, live_scores(scores, float(profile.threshold[layer]), edges))

    assert found(model).verdict == PASS
    assert found(model).distance == pytest.approx(0.0, abs=0.01)
    assert found(make_llama().bfloat16()).verdict == PASS
    scores = steerfast.score(model, tiny_tokenizer, profile, harmful, progress=False).scores + 0.2
    assert compare(profile, live_scores(scores, float(profile.threshold[layer]), edges)).verdict == STALE

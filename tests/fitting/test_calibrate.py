"""Thresholds, the sensor, and figures of both by source."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steerfast
from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.calibrate import (
    POINTS,
    CalibrateOptions,
    GateWarning,
    _points,
    _raised,
    _sensor,
    sensor_quality,
)
from steerfast.fitting.labelled import Labelled
from steerfast.fitting.score import layer_scores
from steerfast.judging.estimates import auc, rate, threshold_at_false_positive_rate
from steerfast.profile import SteeringProfile
from steerfast.text.examples import LABELS, Example

# Random models separate little; whether a warning comes is what the last tests are for.
pytestmark = pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")

BAD = ["bomb", "knife", "virus", "weapon", "drug", "poison", "attack", "hack"]
GOOD = ["cake", "bread", "song", "poem", "garden", "tree", "river", "bird"]


def sentences(words: list[str], seed: int, count: int = 30) -> list[str]:
    """Different short prompts around two of `words` each."""
    frames = [
        "how do i make the {} and {}",
        "how to find a {} with a {}",
        "i learn to build {} , {}",
        "you write of {} {}",
    ]
    choices = [frame.format(*pair) for frame in frames for pair in itertools.permutations(words, 2)]
    return random.Random(seed).sample(choices, count)


@pytest.fixture(scope="module")
def sets() -> dict[str, list[str]]:
    return {
        "fit_harmful": sentences(BAD, 0, 60),
        "fit_harmless": sentences(GOOD, 0, 60),
        "harmful": sentences(BAD, 1, 40),
        "harmless": sentences(GOOD, 1, 100),
    }


@pytest.fixture
def model(make_llama: Callable[..., Any]) -> Any:
    return make_llama()


@pytest.fixture
def profile(model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]) -> SteeringProfile:
    extracted = steerfast.extract(
        model, tiny_tokenizer, harmful=sets["fit_harmful"], harmless=sets["fit_harmless"], vectors=["srv"],
        pooling="last", progress=False,
    )  # fmt: skip
    return extracted.with_band(range(1, 5), 0.5)


@pytest.fixture
def calibrate(model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]) -> Callable[..., SteeringProfile]:
    def run(profile: SteeringProfile, **options: Any) -> SteeringProfile:
        given = {name: sets[name] for name in ("harmful", "harmless")}
        return steerfast.calibrate(profile, model, tiny_tokenizer, **{**given, "progress": False, **options})

    return run


@pytest.fixture
def scored(
    profile: SteeringProfile, model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SteeringProfile]:
    """A function that calibrates on scores: ``<label>_<source>`` -> [n], or [n, layers]."""

    def run(found: dict[str, Any], **options: Any) -> SteeringProfile:
        sides: dict[bool, list[tuple[Example, Tensor]]] = {True: [], False: []}
        for name, values in found.items():
            label, source = name.split("_")
            for i, value in enumerate(torch.as_tensor(values, dtype=torch.float32)):
                sides[label == "harmful"].append((Example(f"{name} {i}", label, source), value.expand(5)))
        rows = torch.stack([value for side in sides.values() for _, value in side])
        monkeypatch.setattr("steerfast.fitting.calibrate.layer_scores", lambda *_, **__: rows)
        given = {"harmful": [one for one, _ in sides[True]], "harmless": [one for one, _ in sides[False]]}
        return steerfast.calibrate(profile, model, tiny_tokenizer, **{**given, "progress": False, **options})

    return run


def spread(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count)


def scores(profile: SteeringProfile, model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    return layer_scores(profile, model, tokenizer, prompts)


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1])
def test_thresholds_keep_the_false_positive_rate(
    profile: SteeringProfile, calibrate: Any, model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]], rate: float
) -> None:
    result = calibrate(profile, max_false_positive_rate=rate, sensor=1)
    harmful = scores(profile, model, tiny_tokenizer, sets["harmful"])
    harmless = scores(profile, model, tiny_tokenizer, sets["harmless"])
    middle = (harmful.double().mean(0) + harmless.double().mean(0)) / 2
    for layer in range(5):
        threshold = float(result.threshold[layer])
        assert (harmless[:, layer] > threshold).float().mean() <= rate + 1e-6
        least = threshold_at_false_positive_rate(harmless[:, layer], rate)  # lower, and another one fires
        assert threshold >= least - 1e-6
        lost = harmful[:, layer][(harmful[:, layer] > least) & (harmful[:, layer] <= threshold)]
        assert len(lost) == 0
        if least < float(middle[layer]):
            nearest = harmful[:, layer][harmful[:, layer] > least].min()
            half = min(float(middle[layer]), (least + float(nearest)) / 2)
            assert threshold == pytest.approx(half, rel=1e-5, abs=1e-6)
        else:
            assert threshold == pytest.approx(least, rel=1e-5, abs=1e-6)


def test_without_a_rate_the_threshold_is_the_midpoint(
    profile: SteeringProfile, calibrate: Any, model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]
) -> None:
    result = calibrate(profile, max_false_positive_rate=None, sensor="keep")
    means = [scores(profile, model, tiny_tokenizer, sets[name]).double().mean(0) for name in ("harmful", "harmless")]
    torch.testing.assert_close(result.threshold, ((means[0] + means[1]) / 2).float(), rtol=1e-5, atol=1e-6)
    assert result.points == {}
    assert result.sensor == "own"
    assert torch.equal(result.strength, profile.strength)
    assert torch.equal(result.direction, profile.direction)


def test_figures_are_those_of_the_sets(
    profile: SteeringProfile,
    calibrate: Any,
    model: Any,
    tiny_tokenizer: Any,
    sets: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    result = calibrate(profile, sensor=2, names={"harmful": "advbench"})
    pair = [scores(profile, model, tiny_tokenizer, sets[label]) for label in ("harmful", "harmless")]
    assert list(result.calibration["layers"]) == ["calibration"]
    for layer, threshold in enumerate(result.threshold.tolist()):
        bad, good = (one[:, layer].numpy() for one in pair)
        expected = {
            "auc": auc(bad, good).to_list(),
            "hit_rate": rate(int((bad > threshold).sum()), len(bad)).to_list(),
            "false_positive_rate": rate(int((good > threshold).sum()), len(good)).to_list(),
            "n_harmful": len(bad),
            "n_harmless": len(good),
        }
        found = result.calibration["layers"]["calibration"][layer]
        assert set(found) == {"auc", "hit_rate", "false_positive_rate", "n_harmful", "n_harmless"}
        for name, figure in found.items():
            assert figure == pytest.approx(expected[name])
        assert result.calibration["auc"]["source"]["harmful"][layer] == round(expected["auc"][0], 4)
        histogram = result.calibration["histograms"]["calibration"][layer]
        assert sum(histogram["harmful"]) == len(pair[0])
        assert sum(histogram["harmless"]) == len(pair[1])
        assert histogram["low"] == pytest.approx(float(torch.cat(pair)[:, layer].min()))
    described = result.calibration["sets"]
    assert sorted(described) == ["harmful", "harmless"]
    assert (described["harmful"]["name"], described["harmful"]["count"]) == ("advbench", 40)
    assert result.calibration["sources"]["harmless"]["harmless"]["sha256"] == described["harmless"]["sha256"]
    assert result.calibration["max_false_positive_rate"] == 0.01
    assert result.calibration["max_borderline_rate"] == 0.1
    result.save(tmp_path / "p.safetensors")
    assert SteeringProfile.load(tmp_path / "p.safetensors").calibration == json.loads(json.dumps(result.calibration))


@pytest.mark.parametrize(
    ("rate", "abstain"), [(0.0, 0.0), (0.01, 0.1), (0.1, 0.1), (0.01, 0.9), (None, 0.3), (None, 0.0)]
)
def test_the_band_ends_where_the_rate_allows(
    profile: SteeringProfile,
    calibrate: Any,
    model: Any,
    tiny_tokenizer: Any,
    sets: dict[str, list[str]],
    rate: float | None,
    abstain: float,
) -> None:
    plain = calibrate(profile, max_false_positive_rate=rate, sensor=1)
    result = calibrate(profile, max_false_positive_rate=rate, abstain_rate=abstain, sensor=1)
    assert torch.equal(result.threshold, plain.threshold)
    assert result.abstain.dtype == torch.float32
    found = {name: scores(profile, model, tiny_tokenizer, prompts) for name, prompts in sets.items()}
    for layer, (low, high) in enumerate(zip(result.abstain.tolist(), result.threshold.tolist(), strict=True)):
        harmless = found["harmless"][:, layer]
        assert low <= high
        assert low == high or (harmless > low).float().mean() <= abstain + 1e-6
        below = harmless[harmless < low].max()  # no higher than needed, or at the threshold
        assert low == high or (harmless >= below).float().mean() > abstain
        figures = dict(result.calibration["layers"]["calibration"][layer])
        for label in ("harmful", "harmless"):
            inside = found[label][:, layer]
            share = ((inside > low) & (inside <= high)).float().mean()
            value, least, most = figures.pop(f"{label}_undecided")
            assert value == pytest.approx(float(share))
            assert least <= value <= most
        assert figures == plain.calibration["layers"]["calibration"][layer]
    assert result.calibration["abstain_rate"] == abstain
    assert "abstain_rate" not in plain.calibration
    undecided = result.undecided(found["harmless"])
    at_sensor = result.calibration["layers"]["calibration"][1]["harmless_undecided"][0]
    assert undecided.float().mean() == pytest.approx(at_sensor)


def test_calibrating_again_makes_the_band_anew(profile: SteeringProfile, calibrate: Any) -> None:
    band = calibrate(profile, abstain_rate=0.5)
    assert torch.equal(calibrate(band, abstain_rate=0.5).abstain, band.abstain)
    assert calibrate(band).abstain is None


def test_a_large_easy_source_buys_no_fires_of_another(scored: Any) -> None:
    """One in ten fires, each source alike: of all prompts together, each hard one might."""
    found = {
        "harmful_bad": spread(0.5, 1.5, 50), "harmless_easy": spread(-2, -1, 1000), "harmless_hard": spread(0, 1, 50),
    }  # fmt: skip
    result = scored(found, max_false_positive_rate=0.1, sensor=1)
    assert int((found["harmless_hard"] > result.threshold[1]).sum()) == 10
    rows = {row["source"]: row for row in result.calibration["by_source"]["1"]["rows"]}
    assert [rows[name]["fired"] for name in ("easy", "hard")] == [0, 10]
    assert result.calibration["layers"]["calibration"][1]["false_positive_rate"][0] == pytest.approx(0.1)


@pytest.mark.parametrize(("rate", "fires"), [(0.0, 0), (0.1, 10), (0.5, 50)])
def test_borderline_prompts_have_a_rate_of_their_own(scored: Any, rate: float, fires: int) -> None:
    found = {
        "harmful_bad": spread(0, 2, 50), "harmless_good": spread(-2, -1, 100), "borderline_edge": spread(0, 1, 100),
    }  # fmt: skip
    result = scored(found, max_borderline_rate=rate, sensor=1)
    assert int((found["borderline_edge"] > result.threshold[1]).sum()) == fires
    assert result.calibration["max_borderline_rate"] == rate
    by_label = result.calibration["by_source"]["1"]["labels"]
    assert by_label["borderline"]["rate"][0] == pytest.approx(rate)
    assert by_label["harmless"]["rate"][0] == 0


def test_borderline_prompts_do_not_raise_the_rate_of_harmless_ones(scored: Any) -> None:
    easy = scored({"harmful_bad": [3.0] * 9, "harmless_good": spread(0, 1, 100), "borderline_edge": [-5.0] * 300})
    layer = easy.calibration["layers"]["calibration"][2]
    assert layer["false_positive_rate"][0] <= 0.01
    assert (layer["n_harmful"], layer["n_harmless"]) == (9, 100)


@pytest.mark.parametrize(("rate", "count"), [(0.01, 99), (0.02, 49), (0.5, 1)])
def test_a_rate_needs_prompts_that_could_show_it(scored: Any, rate: float, count: int) -> None:
    found = {"harmful_bad": spread(1, 2, 9), "harmless_good": spread(-1, 0, count)}
    with pytest.raises(
        PromptError,
        match=rf"harmless: expected at least {count + 1} different prompts for a rate of {rate:.2%}, got {count}; ",
    ):
        scored(found, max_false_positive_rate=rate)
    found["harmless_good"] = spread(-1, 0, count + 1)
    assert scored(found, max_false_positive_rate=rate).points.keys() == POINTS.keys()
    assert scored({**found, "harmless_good": [0.0]}, max_false_positive_rate=None).points == {}


# Multiples of 1/8, so that halves between them are exact in float32.
_grid = st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=30)
_groups = st.dictionaries(st.tuples(st.sampled_from(LABELS), st.sampled_from("abc")), _grid, min_size=2).filter(
    lambda found: {"harmful", "harmless"} <= {label for label, _ in found}
)


@given(_groups, st.sampled_from([0.0, 0.05, 0.2, 0.5]), st.sampled_from([0.0, 0.1, 0.4]))
def test_points_are_in_order_and_each_keeps_its_rates(
    found: dict[tuple[str, str], list[float]], rate: float, borderline: float
) -> None:
    order = sorted(found, key=lambda key: key[0] != "harmful")
    given_ = [Example(f"{key} {i}", *key) for key in order for i in range(len(found[key]))]
    harmful = [one for one in given_ if one.label == "harmful"]
    examples = Labelled.of(harmful, given_[len(harmful) :])
    values = torch.tensor([value for key in order for value in found[key]], dtype=torch.float64)
    options = CalibrateOptions(max_false_positive_rate=rate, max_borderline_rate=borderline)
    points = {name: float(at[0]) for name, at in _points(examples, values[:, None], options).items()}
    assert points["strict"] <= points["balanced"] <= points["permissive"]
    for label, allowed in (("harmless", rate), ("borderline", borderline)):
        if places := examples.rows(label):
            weight = examples.shares[places]
            for name, threshold in points.items():
                fires = float(weight[values[places] > threshold].sum() / weight.sum())
                assert fires <= min(0.99, POINTS[name] * allowed) + 1e-9


@given(_grid, st.integers(-41, 41).map(lambda x: x / 16), st.integers(-41, 41).map(lambda x: x / 16))
def test_a_raised_threshold_loses_no_harmful_prompt(found: list[float], threshold: float, middle: float) -> None:
    harmful = torch.tensor(found, dtype=torch.float64).numpy()
    raised = _raised(threshold, middle, harmful)
    assert raised >= threshold
    assert ((harmful > raised) == (harmful > threshold)).all()
    assert raised == threshold or raised <= middle
    if (harmful > threshold).any() and threshold < middle:
        assert raised > threshold


# -- the sensor --------------------------------------------------------------------------------------------------------


def chosen(profile: SteeringProfile, *sources: list[float], **options: Any) -> Any:
    """The sensor, where each source has such AUCs by layer."""
    by_group = {"source": {str(number): aucs for number, aucs in enumerate(sources)}}
    return _sensor(CalibrateOptions(**{"latest_sensor": 4, **options}), profile, by_group)


def test_of_equally_good_layers_the_one_next_to_the_middle_decides(profile: SteeringProfile) -> None:
    assert chosen(profile, [0.9, 0.9, 0.9, 0.9, 0.9])[0] == 2
    assert chosen(profile, [0.9, 0.902, 0.8, 0.8, 0.9])[0] == 1
    assert chosen(profile, [0.902, 0.9, 0.8, 0.8, 0.9])[0] == 1
    assert chosen(profile, [0.91, 0.9, 0.9, 0.9, 0.9])[0] == 0
    assert chosen(profile, [0.9, 0.9, 0.9, 0.9, 0.9], latest_sensor=1)[0] == 1
    assert chosen(profile, [0.9, 0.9, 0.9, 0.91, 0.92], latest_sensor=None)[0] == 2  # 60 % of layers 0..4


def test_runners_up_are_told_best_first(profile: SteeringProfile) -> None:
    sensor, tried = chosen(profile, [0.7, 0.901, 0.9, 0.8, 0.6], latest_sensor=3)
    assert sensor == 2
    assert tried == [[1, 0.901], [2, 0.9], [3, 0.8], [0, 0.7]]
    for fixed in (3, "own", "keep"):
        assert chosen(profile, [0.9] * 5, sensor=fixed) == (profile.sensor if fixed == "keep" else fixed, [])


def test_quality_minds_the_worst_quarter() -> None:
    found = {"source": {"a": [0.9, 0.7], "b": [0.9, 1.0], "c": [0.9, 1.0]}, "context": {"json": [0.9, 1.0]}}
    assert sensor_quality([found, {}], 2) == pytest.approx([0.9, (0.925 + 0.7) / 2])
    assert sensor_quality([found, {"source": {"d": [0.0] * 7}}], 2) == sensor_quality([found], 2)  # another model's


@pytest.mark.parametrize("kind", ["source", "context"])
def test_the_sensor_minds_what_extract_left_out(profile: SteeringProfile, calibrate: Any, kind: str) -> None:
    best = calibrate(profile).sensor
    told = {"chat": [0.5 if layer == best else 0.9 for layer in range(5)]}
    result = calibrate(replace(profile, fitted={**profile.fitted, "left_out": {kind: told}}), latest_sensor=4)
    assert result.sensor != best
    assert result.calibration["sensors"][-1][0] == best


def test_the_sensor_minds_the_contexts(profile: SteeringProfile, calibrate: Any, sets: dict[str, list[str]]) -> None:
    """Requests among other words are a group beside their source."""
    harmful = [Example(one, "harmful", "x", context=("bare", "json")[i % 2]) for i, one in enumerate(sets["harmful"])]
    result = calibrate(profile, harmful=harmful)
    assert {kind: list(names) for kind, names in result.calibration["auc"].items()} == {
        "source": ["x"], "context": ["bare", "json"],
    }  # fmt: skip
    expected = sensor_quality([result.calibration["auc"]], 5)
    assert result.calibration["sensors"] == sorted(
        ([layer, round(expected[layer], 4)] for layer in range(3)), key=lambda pair: -expected[pair[0]]
    )


def test_layers_before_the_sensor_lose_their_strength(profile: SteeringProfile, calibrate: Any) -> None:
    assert calibrate(profile, sensor=3).strength.tolist() == [0.0, 0.0, 0.0, 0.5, 0.5]
    early = profile.with_band([0, 1], 0.25)
    moved = calibrate(early, sensor=3)
    assert moved.strength.tolist() == [0.0, 0.0, 0.0, 0.25, 0.0]
    assert moved.gate_layers == [3]
    own = calibrate(replace(profile, sensor=0), sensor="own")
    assert (own.sensor, own.gate_layers) == ("own", [1, 2, 3, 4])
    assert calibrate(replace(profile, sensor=1), sensor="keep").sensor == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensor": 5}, r"sensor: expected a layer in 0\.\.4, got 5"),
        ({"sensor": True}, r"sensor: expected a layer in 0\.\.4, got True"),
        ({"sensor": -1}, r"sensor: expected a layer in 0\.\.4, got -1"),
        ({"sensor": "best"}, "sensor: expected a layer, 'own', 'auto' or 'keep', got 'best'"),
        ({"latest_sensor": 5}, r"latest_sensor: expected a layer in 0\.\.4, got 5"),
        ({"max_false_positive_rate": 1.0}, "max_false_positive_rate: expected 0 <= rate < 1, got 1.0"),
        ({"max_false_positive_rate": float("nan")}, "max_false_positive_rate: expected 0 <= rate < 1, got nan"),
        ({"abstain_rate": 1.0}, "abstain_rate: expected 0 <= rate < 1, got 1.0"),
        ({"abstain_rate": float("nan")}, "abstain_rate: expected 0 <= rate < 1, got nan"),
        ({"abstain_rate": 0.005}, "abstain_rate: expected at least max_false_positive_rate, 0.01, got 0.005"),
        ({"max_borderline_rate": 1.0}, "max_borderline_rate: expected 0 <= rate < 1, got 1.0"),
        ({"max_borderline_rate": -0.1}, "max_borderline_rate: expected 0 <= rate < 1, got -0.1"),
    ],
)
def test_unusable_options(profile: SteeringProfile, calibrate: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        calibrate(profile, **options)


@pytest.mark.parametrize(
    ("sets_", "message"),
    [
        ({"harmful": []}, "harmful: expected at least one prompt, got none"),
        ({"harmless": "a cake"}, "harmless: expected a list of prompts, got one string"),
        ({"harmful": ["a cat"], "harmless": ["a cat"]}, "expected different prompts, got 1 in both"),
        ({"harmless": ["cat " * 300]}, "has 303 tokens, the model's context leaves room for 256"),
    ],
)
def test_unusable_prompt_sets(profile: SteeringProfile, calibrate: Any, sets_: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        calibrate(profile, max_false_positive_rate=0.0, **sets_)


def test_another_models_profile(
    make_llama: Callable[..., Any], make_profile: Callable[..., SteeringProfile], calibrate: Any
) -> None:
    with pytest.raises(ProfileError, match="with other weights"):
        calibrate(make_profile(make_llama(seed=9)))


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_gate_that_holds_up_gives_no_warning(profile: SteeringProfile, calibrate: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = calibrate(profile)
    assert result.calibration["warnings"] == []
    assert result.calibration["layers"]["calibration"][result.sensor]["auc"][0] > 0.9


def test_sources_that_a_gate_does_not_hold_for_are_named(scored: Any) -> None:
    """Of ten harmless sources one may fire alone; of two harmful ones the mild one stays shut."""
    found = {"harmful_plain": spread(2, 3, 50), "harmful_mild": spread(-3, -2, 50), "harmless_hard": [1.5] * 100}
    found |= {f"harmless_easy{i}": spread(-4, -3, 100) for i in range(9)}
    with pytest.warns(GateWarning) as caught:
        result = scored(found, max_false_positive_rate=0.1, sensor=1)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "the gate of layer 1 opens for 0 of 50 harmful prompts of 'mild'; extract with more prompts like these",
        "the gate of layer 1 opens for 100 of 100 harmless prompts of 'hard', where 10.0% are allowed; extract with "
        "more harmless prompts like these",
    ]
    assert result.calibration["warnings"] == messages
    assert {warning.filename for warning in caught} == {__file__}


def test_each_gate_that_decides_warns(scored: Any) -> None:
    found = {"harmful_plain": spread(2, 3, 50), "harmful_mild": spread(-3, -2, 50), "harmless_good": spread(0, 1, 100)}
    with pytest.warns(GateWarning) as caught:
        result = scored(found, sensor="own")
    assert [str(warning.message)[:22] for warning in caught] == [
        f"the gate of layer {layer} op" for layer in range(1, 5)
    ]
    assert list(result.calibration["by_source"]) == ["1", "2", "3", "4"]


def test_chats_are_calibrated_as_they_are_scored(model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]) -> None:
    """Examples of several sources and contexts, by a gate that reads the last row and the mean."""

    def examples(prompts: list[str], label: str) -> list[Example]:
        chats = [
            [
                {"role": "system", "content": "help people"},
                {"role": "user", "content": "i learn of the city"},
                {"role": "assistant", "content": "it could help"},
                {"role": "user", "content": prompt},
            ]
            for prompt in prompts[::2]
        ]
        turns = [Example(chat, label, f"{label} chats", context="turns") for chat in chats]
        return [Example(prompt, label, f"{label} lines") for prompt in prompts[1::2]] + turns

    fit, held = (
        {label: examples(sets[name + label], label) for label in ("harmful", "harmless")} for name in ("fit_", "")
    )
    profile = steerfast.extract(model, tiny_tokenizer, **fit, vectors=["srv"], progress=False)
    assert (profile.gate.pooling, bool(profile.gate.turn)) == ("both", True)
    assert {kind: list(names) for kind, names in profile.fitted["left_out"].items()} == {
        "source": ["harmful lines", "harmful chats"], "context": ["bare", "turns"],
    }  # fmt: skip
    result = steerfast.calibrate(profile, model, tiny_tokenizer, **held, max_false_positive_rate=0.05, progress=False)
    rows = result.calibration["by_source"][str(result.sensor)]["rows"]
    assert [row["source"] for row in rows] == [f"{a} {b}" for a in ("harmful", "harmless") for b in ("lines", "chats")]
    for row in rows:
        mine = [one.prompt for one in held[row["label"]] if one.source == row["source"]]
        found = steerfast.score(model, tiny_tokenizer, result, mine, progress=False)
        assert (row["fired"], row["n"]) == (int(found.fired.sum()), len(mine))
        assert row["fired"] > len(mine) / 2 if row["label"] == "harmful" else row["fired"] <= len(mine) / 10
    assert list(result.calibration["by_source"][str(result.sensor)]["context"]) == ["bare", "turns"]
    assert list(result.calibration["auc"]["context"]) == ["bare", "turns"]


# -- other gates -------------------------------------------------------------------------------------------------------


def test_a_token_gate_is_calibrated_and_no_gate_is_refused(profile: SteeringProfile, calibrate: Any) -> None:
    hard = calibrate(profile)
    token = calibrate(replace(profile, gate=replace(profile.gate, kind="token", sharpness=5.0)))
    assert torch.equal(token.threshold, hard.threshold)
    assert token.sensor == hard.sensor
    with pytest.raises(ProfileError, match=r"expected one with a gate to calibrate, got gate.kind='always'"):
        calibrate(replace(profile, gate=replace(profile.gate, kind="always")))


def test_an_edit_is_kept(profile: SteeringProfile, calibrate: Any) -> None:
    clamped = calibrate(replace(profile, edit="clamp", low=0.0, high=2.0))
    assert (clamped.edit, clamped.low, clamped.high) == ("clamp", 0.0, 2.0)

"""Thresholds, the sensor, and whether the figures are honest."""

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
from torch import Tensor

import steerfast
from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.calibrate import StyleWarning
from steerfast.fitting.score import layer_scores
from steerfast.judging.estimates import gate_figures
from steerfast.profile import SteeringProfile
from steerfast.text.styles import Prompts

# Random models separate little; whether a warning comes is what the last tests are for.
pytestmark = pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.StyleWarning")

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


def chatty(prompts: list[str]) -> list[str]:
    """The same requests in another style."""
    return [f"help people . {prompt} ? it could help" for prompt in prompts]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[str]]:
    return {
        "fit_harmful": sentences(BAD, 0, 60),
        "fit_harmless": sentences(GOOD, 0, 60),
        "harmful": sentences(BAD, 1, 40),
        "harmless": sentences(GOOD, 1, 100),
        "heldout_harmful": sentences(BAD, 2, 40),
        "heldout_harmless": sentences(GOOD, 2, 40),
    }


@pytest.fixture
def model(make_llama: Callable[..., Any]) -> Any:
    return make_llama()


@pytest.fixture
def profile(model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]) -> SteeringProfile:
    extracted = steerfast.extract(
        model, tiny_tokenizer, harmful=sets["fit_harmful"], harmless=sets["fit_harmless"], vectors=["srv"],
        progress=False,
    )  # fmt: skip
    return extracted.with_band(range(1, 5), 0.5)


@pytest.fixture
def calibrate(model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]) -> Callable[..., SteeringProfile]:
    def run(profile: SteeringProfile, **options: Any) -> SteeringProfile:
        given = {name: sets[name] for name in ("harmful", "harmless", "heldout_harmful", "heldout_harmless")}
        return steerfast.calibrate(profile, model, tiny_tokenizer, **{**given, "progress": False, **options})

    return run


def scores(profile: SteeringProfile, model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    return layer_scores(profile, model, tokenizer, prompts)


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
        allowed = (harmless[:, layer] > float(middle[layer])).float().mean()
        if allowed <= rate:
            assert threshold == pytest.approx(float(middle[layer]), rel=1e-5, abs=1e-6)
        else:  # no higher than needed: one more may not fire
            assert threshold >= float(middle[layer])
            below = harmless[:, layer][harmless[:, layer] < threshold].max()
            assert (harmless[:, layer] >= below).float().mean() > rate


def test_without_a_rate_the_threshold_is_the_midpoint(
    profile: SteeringProfile, calibrate: Any, model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]
) -> None:
    result = calibrate(profile, max_false_positive_rate=None, sensor="keep")
    means = [scores(profile, model, tiny_tokenizer, sets[name]).double().mean(0) for name in ("harmful", "harmless")]
    torch.testing.assert_close(result.threshold, ((means[0] + means[1]) / 2).float(), rtol=1e-5, atol=1e-6)
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
    for name, prefix in (("calibration", ""), ("heldout", "heldout_")):
        pair = [scores(profile, model, tiny_tokenizer, sets[f"{prefix}{label}"]) for label in ("harmful", "harmless")]
        for layer, threshold in enumerate(result.threshold.tolist()):
            expected = gate_figures(pair[0][:, layer].numpy(), pair[1][:, layer].numpy(), threshold)
            assert result.calibration["layers"][name][layer] == expected.to_dict()
            histogram = result.calibration["histograms"][name][layer]
            assert sum(histogram["harmful"]) == len(pair[0])
            assert sum(histogram["harmless"]) == len(pair[1])
            assert histogram["low"] == pytest.approx(float(torch.cat(pair)[:, layer].min()))
    described = result.calibration["sets"]
    assert sorted(described) == ["harmful", "harmless", "heldout_harmful", "heldout_harmless"]
    assert (described["harmful"]["name"], described["harmful"]["count"]) == ("advbench", 40)
    assert result.calibration["max_false_positive_rate"] == 0.01
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
        for name, prefix in (("calibration", ""), ("heldout", "heldout_")):
            figures = dict(result.calibration["layers"][name][layer])
            for label in ("harmful", "harmless"):
                inside = found[prefix + label][:, layer]
                share = ((inside > low) & (inside <= high)).float().mean()
                value, least, most = figures.pop(f"{label}_undecided")
                assert value == pytest.approx(float(share))
                assert least <= value <= most
            assert figures == plain.calibration["layers"][name][layer]
    assert result.calibration["abstain_rate"] == abstain
    assert "abstain_rate" not in plain.calibration
    undecided = result.undecided(found["harmless"])
    at_sensor = result.calibration["layers"]["calibration"][1]["harmless_undecided"][0]
    assert undecided.float().mean() == pytest.approx(at_sensor)


def test_calibrating_again_makes_the_band_anew(profile: SteeringProfile, calibrate: Any) -> None:
    band = calibrate(profile, abstain_rate=0.5)
    assert torch.equal(calibrate(band, abstain_rate=0.5).abstain, band.abstain)
    assert calibrate(band).abstain is None


# -- the sensor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latest", [None, 0, 1, 4])
def test_the_automatic_sensor_has_the_best_worst_case(
    profile: SteeringProfile, calibrate: Any, latest: int | None
) -> None:
    result = calibrate(profile, latest_sensor=latest)
    layers = result.calibration["layers"]

    def quality(layer: int) -> tuple[float, float]:
        at = [layers[name][layer] for name in ("calibration", "heldout")]
        return (min(f["hit_rate"][0] - f["false_positive_rate"][0] for f in at), min(f["auc"][0] for f in at))

    last = 2 if latest is None else latest  # 60 % of layers 0..4
    assert isinstance(result.sensor, int)
    assert result.sensor <= last
    assert quality(result.sensor) == max(map(quality, range(last + 1)))


def test_the_automatic_sensor_minds_the_styles_that_extract_left_out(profile: SteeringProfile, calibrate: Any) -> None:
    best = calibrate(profile).sensor
    aucs = [0.5 if layer == best else 0.9 for layer in range(5)]
    told = replace(profile, fitted={**profile.fitted, "left_out": {"chat": {"auc": aucs}, "code": {"auc": [1.0] * 5}}})
    assert calibrate(told, latest_sensor=4).sensor != best


def test_figures_of_each_style_are_kept(
    profile: SteeringProfile, calibrate: Any, model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]]
) -> None:
    styled = {
        label: Prompts(sets[label]).joined(Prompts(chatty(sets[label]), ["chat"] * len(sets[label])))
        for label in ("harmful", "harmless")
    }
    result = calibrate(profile, **styled, sensor=2)
    assert list(result.calibration["styles"]) == ["plain", "chat"]
    bad, good = (scores(profile, model, tiny_tokenizer, chatty(sets[label])) for label in ("harmful", "harmless"))
    for layer, threshold in enumerate(result.threshold.tolist()):
        expected = gate_figures(bad[:, layer].numpy(), good[:, layer].numpy(), threshold)
        found = result.calibration["styles"]["chat"]
        assert found["auc"][layer] == pytest.approx(expected.auc.value, abs=1e-4)
        assert found["hit_rate"][layer] == pytest.approx(expected.hit_rate.value, abs=1e-4)
        assert found["false_positive_rate"][layer] == pytest.approx(expected.false_positive_rate.value, abs=1e-4)
    assert calibrate(profile).calibration["styles"] == {}


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
        ({"sensor": -1}, r"sensor: expected a layer in 0\.\.4, got -1"),
        ({"sensor": "best"}, "sensor: expected a layer, 'own', 'auto' or 'keep', got 'best'"),
        ({"latest_sensor": 5}, r"latest_sensor: expected a layer in 0\.\.4, got 5"),
        ({"max_false_positive_rate": 1.0}, "max_false_positive_rate: expected 0 <= rate < 1, got 1.0"),
        ({"max_false_positive_rate": float("nan")}, "max_false_positive_rate: expected 0 <= rate < 1, got nan"),
        ({"abstain_rate": 1.0}, "abstain_rate: expected 0 <= rate < 1, got 1.0"),
        ({"abstain_rate": float("nan")}, "abstain_rate: expected 0 <= rate < 1, got nan"),
        ({"abstain_rate": 0.005}, "abstain_rate: expected at least max_false_positive_rate, 0.01, got 0.005"),
        ({"heldout_harmful": None}, "heldout_harmful: expected both held-out sets or none, got None"),
        ({"heldout_harmless": None}, "heldout_harmless: expected both held-out sets or none, got None"),
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
        ({"heldout_harmful": []}, "harmful: expected at least one prompt, got none"),
        ({"heldout_harmful": ["a cat"], "heldout_harmless": ["a cat"]}, "got 1 in both"),
        ({"harmless": ["cat " * 300]}, "has 303 tokens, the model's context leaves room for 256"),
    ],
)
def test_unusable_prompt_sets(profile: SteeringProfile, calibrate: Any, sets_: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        calibrate(profile, **sets_)


def test_another_models_profile(
    make_llama: Callable[..., Any], make_profile: Callable[..., SteeringProfile], calibrate: Any
) -> None:
    with pytest.raises(ProfileError, match="with other weights"):
        calibrate(make_profile(make_llama(seed=9)))


# -- style or harm -----------------------------------------------------------------------------------------------------


def test_a_gate_that_holds_up_gives_no_warning(profile: SteeringProfile, calibrate: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = calibrate(profile)
    assert result.calibration["warnings"] == []
    assert result.calibration["layers"]["heldout"][result.sensor]["auc"][0] > 0.9


def test_a_gate_that_learnt_style_is_called_out(
    model: Any, tiny_tokenizer: Any, sets: dict[str, list[str]], calibrate: Any
) -> None:
    # Harm and style go together where the gate is fitted, and against each other in the held-out sets.
    harmful, harmless = chatty(sentences(BAD, 5, 60)), sentences(GOOD, 5, 60)
    fitted = steerfast.extract(
        model, tiny_tokenizer, harmful=harmful, harmless=harmless, vectors=["srv"], gate="mean", progress=False
    )
    swapped = {"heldout_harmful": sets["heldout_harmful"], "heldout_harmless": chatty(sets["heldout_harmless"])}
    with pytest.warns(StyleWarning, match="the gate of layer 1 knows style rather than harm: AUC ") as caught:
        result = calibrate(fitted, harmful=chatty(sets["harmful"]), harmless=sets["harmless"], sensor=1, **swapped)
    assert result.calibration["warnings"] == [str(warning.message) for warning in caught]
    assert result.calibration["layers"]["heldout"][1]["auc"][0] < 0.5
    assert caught[0].filename == __file__


def test_no_held_out_sets_is_a_warning_too(profile: SteeringProfile, calibrate: Any) -> None:
    with pytest.warns(StyleWarning, match="the gate was not tried on prompts of another style"):
        result = calibrate(profile, heldout_harmful=None, heldout_harmless=None)
    assert sorted(result.calibration["layers"]) == ["calibration"]


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

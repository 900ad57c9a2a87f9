"""A profile and a strength per sequence: each sequence is steered as it would be alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import CLOSE, MakeProfile, greedy, make_family_model, make_model, padded
from torch import Tensor
from transformers import DynamicCache

import steerfast
from steerfast.errors import ProfileError, SteerfastError
from steerfast.hf.steering import Steering
from steerfast.profile import SteeringProfile

pytestmark = pytest.mark.contract

Assignment = list[SteeringProfile | None]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 5, 7, 3, 6, 8)]


@pytest.fixture(scope="module", params=["Llama", "Gemma2", "GPTNeoX"])
def stock(request: pytest.FixtureRequest) -> Any:
    return make_family_model(request.param) if request.param != "GPTNeoX" else make_model(request.param)


@pytest.fixture
def model(stock: Any) -> Any:
    """Fused where it can be; Llama also stands for both in `llama`."""
    copied = copy.deepcopy(stock)
    return copied if type(stock).__name__.startswith("GPTNeoX") else steerfast.patch(copied)


@pytest.fixture(params=["hooks", "fused"])
def llama(request: pytest.FixtureRequest) -> Any:
    model = make_family_model("Llama")
    return steerfast.patch(model) if request.param == "fused" else model


@pytest.fixture
def mixture(make_profile: MakeProfile) -> Callable[[Any], Assignment]:
    """A function model -> six different entries: positions, sensors, soft and hard gates, always, a rotation, none."""

    def make(model: Any) -> Assignment:
        return [
            make_profile(model, seed=1, threshold=-0.05),
            make_profile(model, seed=2, sensor=1, positions="response", threshold=-1.5),
            None,
            make_profile(model, seed=3, kind="always", layers=[0, 2]),
            make_profile(model, seed=4, sensor=2, layers=[2, 3], sharpness=3.0, score="dot"),
            make_profile(model, seed=5, edit="rotate", angle=30.0, layers=[1], positions="response", threshold=-1.5),
        ]

    return make


def test_a_threshold_is_switched_live_and_per_sequence(llama: Any, make_profile: MakeProfile) -> None:
    """By the handle between two calls, with nothing attached anew; by value within one batch."""
    base = make_profile(llama, seed=3, sensor=1, layers=[1, 2])
    points = {"strict": base.threshold - 9, "balanced": base.threshold, "permissive": base.threshold + 9}
    profile, batch = replace(base, points=points), padded([prompts()[0]] * 2)
    unsteered, _ = greedy(llama, batch)
    with steerfast.steer(llama, profile) as steering:
        before = dict(vars(steering._hooks)), len(steering._hooks.undo)
        assert steering.threshold == "balanced"
        answers = {}
        for point in ("strict", "permissive", "strict"):
            steering.threshold = point
            assert (steering.threshold, steering.profile.point) == (point, point)
            answers[point], _ = greedy(llama, batch)
            assert steering.fired.tolist() == [point == "strict"] * 2
        assert (dict(vars(steering._hooks)), len(steering._hooks.undo)) == before
        assert torch.equal(answers["permissive"], unsteered)
        assert not torch.equal(answers["strict"], unsteered)
        mixed, _ = greedy(llama, batch, steering=[profile.at("strict"), profile.at("permissive")])
        assert steering.fired.tolist() == [True, False]
        assert torch.equal(mixed[0], answers["strict"][0])
        assert torch.equal(mixed[1], unsteered[1])
        with pytest.raises(ProfileError, match=r"^threshold: expected one of balanced, permissive, strict, got 'lax'"):
            steering.threshold = "lax"
        assert steering.threshold == "strict"
    with steerfast.steer(llama, None) as steering:
        assert steering.threshold is None
        with pytest.raises(SteerfastError, match=r"^threshold: expected a steering with a profile, got 'strict'"):
            steering.threshold = "strict"


def test_a_switch_keeps_the_given_band(llama: Any, make_profile: MakeProfile) -> None:
    base = make_profile(llama, abstain=torch.zeros(4), layers=[1])
    profile = replace(base, points={"strict": base.threshold - 9, "balanced": base.threshold})
    with steerfast.steer(llama, profile) as steering:
        steering.threshold = "strict"
        assert not torch.equal(steering.profile.abstain, profile.abstain)
        steering.threshold = "balanced"
        assert torch.equal(steering.profile.abstain, profile.abstain)


STRENGTHS = [1.0, 0.5, 1.0, 0.7, -1.2, 1.0]


def alone(model: Any, profile: SteeringProfile | None, strength: float, prompt: list[int], **options: Any) -> Any:
    """Tokens, logits, and whether it fired, of one unpadded prompt."""
    if profile is None:
        return (*greedy(model, padded([prompt]), **options), False)
    with steerfast.steer(model, profile, strength) as steering:
        return (*greedy(model, padded([prompt]), **options), bool(steering.fired[0]))


def test_each_sequence_is_steered_as_alone(stock: Any, model: Any, mixture: Callable[[Any], Assignment]) -> None:
    profiles = mixture(stock)
    expected = [alone(stock, *one) for one in zip(profiles, STRENGTHS, prompts(), strict=True)]
    with steerfast.steer(model, None) as steering:
        tokens, logits = greedy(model, padded(prompts()), steering=profiles, steering_strength=STRENGTHS)
        fired, scores = steering.fired, steering.scores
    plain = greedy(model, padded(prompts()))[0]
    for row, (alone_tokens, alone_logits, alone_fired) in enumerate(expected):
        assert torch.equal(tokens[row], alone_tokens[0])
        torch.testing.assert_close(logits[row], alone_logits[0], **CLOSE)
        assert bool(fired[row]) == alone_fired
    assert torch.equal(tokens[2], plain[2])
    assert (tokens != plain).any(dim=1).sum() >= 3
    # Layers 1, 2 and 3 hold gates; where a sequence has none, its score is -inf.
    assert scores.shape == (3, 6)
    assert scores[:, 2:4].eq(-torch.inf).all()
    assert scores[0, :2].isfinite().all()
    assert scores[1, 1] == scores[0, 4] == -torch.inf


def test_unsteered_sequences_keep_their_bits(stock: Any, model: Any, mixture: Callable[[Any], Assignment]) -> None:
    batch = padded(prompts())
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**batch).logits
        with steerfast.steer(model, None) as steering:
            assert torch.equal(model(**batch).logits[mask], plain[mask])
            with steering.assigned(mixture(stock)):
                logits = model(**batch).logits
            assert torch.equal(model(**batch).logits[mask], plain[mask])
    assert torch.equal(logits[2, mask[2]], plain[2, mask[2]])
    assert not torch.equal(logits[3, mask[3]], plain[3, mask[3]])


def test_each_sequence_has_the_band_of_its_own_profile(llama: Any, make_profile: MakeProfile) -> None:
    shut = make_profile(llama, threshold=1.5)
    band = replace(shut, abstain=torch.full_like(shut.threshold, -1.5))
    narrow = replace(shut, abstain=torch.full_like(shut.threshold, 1.4))
    wide_open = make_profile(llama, threshold=-1.5)
    wide_open = replace(wide_open, abstain=wide_open.threshold)
    with steerfast.steer(llama, None) as steering:
        greedy(llama, padded(prompts()), steering=[band, None, shut, narrow, wide_open, band])
        assert steering.undecided.tolist() == [True, False, False, False, False, True]
        assert steering.fired.tolist() == [False, False, False, False, True, False]
        greedy(llama, padded(prompts()[:2]), steering=[shut, band], do_sample=True, num_return_sequences=2)
        assert steering.undecided.tolist() == [False, True]


def test_token_gates_of_several_profiles(llama: Any, make_profile: MakeProfile) -> None:
    profiles: Assignment = [
        make_profile(llama, seed=1, kind="token", layers=[1, 2]),
        None,
        make_profile(llama, seed=2, kind="token", sensor=1, layers=[2, 3], sharpness=4.0),
        make_profile(llama, seed=3, kind="token", layers=[0], edit="clamp", low=0.5, positions="response"),
    ]
    expected = [alone(llama, *one) for one in zip(profiles, STRENGTHS[:4], prompts()[:4], strict=True)]
    with steerfast.steer(llama, None) as steering:
        tokens, logits = greedy(llama, padded(prompts()[:4]), steering=profiles, steering_strength=STRENGTHS[:4])
        assert steering.fired.tolist() == [fired for *_, fired in expected]
    for row, (alone_tokens, alone_logits, _) in enumerate(expected):
        assert torch.equal(tokens[row], alone_tokens[0])
        torch.testing.assert_close(logits[row], alone_logits[0], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}],
    ids=["beams", "sampled"],
)
def test_several_answers_per_prompt(llama: Any, mixture: Callable[[Any], Assignment], options: dict[str, Any]) -> None:
    profiles = mixture(llama)
    with steerfast.steer(llama, None) as steering:
        tokens = greedy(llama, padded(prompts()), steering=profiles, steering_strength=STRENGTHS, **options)[0]
        fired = steering.fired
    for row, one in enumerate(zip(profiles, STRENGTHS, prompts(), strict=True)):
        alone_tokens, _, alone_fired = alone(llama, *one, **options)
        assert torch.equal(tokens[2 * row : 2 * row + 2], alone_tokens)
        assert bool(fired[row]) == alone_fired


def test_one_entry_stands_for_all(llama: Any, make_profile: MakeProfile) -> None:
    own, other = make_profile(llama, seed=1, threshold=-1.5), make_profile(llama, seed=2, threshold=-1.5)
    batch = padded(prompts())
    with steerfast.steer(llama, other, 0.5):
        expected = greedy(llama, batch)[0]
    with steerfast.steer(llama, own, 0.8):
        of_own = greedy(llama, batch)[0]
    plain = greedy(llama, batch)[0]
    with steerfast.steer(llama, own, 0.5) as steering:
        assert torch.equal(greedy(llama, batch, steering=other)[0], expected)
        assert torch.equal(greedy(llama, batch, steering=[other])[0], expected)
        assert torch.equal(greedy(llama, batch, steering=[other] * 6, steering_strength=0.5)[0], expected)
        assert torch.equal(greedy(llama, batch, steering=other, steering_strength=[0.5] * 6)[0], expected)
        of_keys = dict.fromkeys(range(6), 0.5).values()
        assert torch.equal(greedy(llama, batch, steering=other, steering_strength=of_keys)[0], expected)
        assert torch.equal(greedy(llama, batch, steering=None)[0], plain)
        assert not steering.fired.any()
        assert torch.equal(greedy(llama, batch, steering_strength=0.8)[0], of_own)
        assert torch.equal(greedy(llama, batch, steering_strength=0.0)[0], plain)
        mixed = greedy(llama, batch, steering_strength=[0.8, 0, 0.8, 0, 0.8, 0])[0]
        assert torch.equal(mixed[::2], of_own[::2])
        assert torch.equal(mixed[1::2], plain[1::2])
        steering.strength = 0.8
        assert torch.equal(greedy(llama, batch)[0], of_own)


def test_contexts_nest(llama: Any, make_profile: MakeProfile) -> None:
    first, second = make_profile(llama, seed=1, threshold=-1.5), make_profile(llama, seed=2, threshold=-1.5)
    ids = torch.tensor([prompts()[0]])

    @torch.no_grad()
    def logits() -> Tensor:
        return llama(ids).logits

    expected = {}
    for name, profile in (("first", first), ("second", second)):
        with steerfast.steer(llama, profile):
            expected[name] = logits()
    crowd = [make_profile(llama, seed=seed) for seed in range(3, 30)]
    with steerfast.steer(llama, None) as steering:
        with steering.assigned(first):
            assert torch.equal(logits(), expected["first"])
            with steering.assigned([second]):
                assert torch.equal(logits(), expected["second"])
                for profile in crowd:  # they take all slots but those of the contexts around
                    with steering.assigned(profile):
                        logits()
                assert torch.equal(logits(), expected["second"])
            assert torch.equal(logits(), expected["first"])
            with pytest.raises(KeyError), steering.assigned(second):
                raise KeyError
            assert torch.equal(logits(), expected["first"])
            with pytest.raises(SteerfastError, match="expected at most 16 profiles in a batch, got 17"):
                steering.assigned(crowd[:17]).__enter__()
        assert not torch.equal(logits(), expected["first"])


def test_slots_are_recycled(llama: Any, make_profile: MakeProfile) -> None:
    own = make_profile(llama, seed=100, threshold=-1.5, layers=[1])
    profiles = [make_profile(llama, seed=seed, threshold=-1.5, layers=[1 + seed % 3]) for seed in range(24)]
    batch = padded(prompts()[:2])
    expected = []
    for profile in [own, *profiles]:
        with steerfast.steer(llama, profile):
            expected.append(greedy(llama, batch, tokens=2)[1])
    with steerfast.steer(llama, own):
        for _ in range(2):
            for index, profile in enumerate(profiles):
                after = profiles[(index + 7) % len(profiles)]
                logits = greedy(llama, batch, tokens=2, steering=[profile, after])[1]
                torch.testing.assert_close(logits[0], expected[1 + index][0], **CLOSE)
                torch.testing.assert_close(logits[1], expected[1 + (index + 7) % len(profiles)][1], **CLOSE)
        torch.testing.assert_close(greedy(llama, batch, tokens=2)[1], expected[0], **CLOSE)


def test_sixteen_profiles_in_a_batch(llama: Any, make_profile: MakeProfile) -> None:
    own = make_profile(llama, seed=100, threshold=-1.5)
    profiles = [make_profile(llama, seed=seed, threshold=-1.5) for seed in range(16)]
    sequences = [[3 + row, 40, 50 + row] for row in range(16)]
    with steerfast.steer(llama, own):
        logits = greedy(llama, padded(sequences), tokens=2, steering=profiles)[1]
        of_own = greedy(llama, padded(sequences), tokens=2)[1]
    for row, profile in enumerate(profiles):
        expected = alone(llama, profile, 1.0, sequences[row], tokens=2)[1]
        torch.testing.assert_close(logits[row], expected[0], **CLOSE)
    torch.testing.assert_close(of_own[3], alone(llama, own, 1.0, sequences[3], tokens=2)[1][0], **CLOSE)


# -- turns on one cache ------------------------------------------------------------------------------------------------


def test_decisions_last_as_long_as_the_assignment(llama: Any, make_profile: MakeProfile) -> None:
    """Answer tokens on a cache follow its decisions; another assignment's mean nothing, so it decides anew."""
    closed = make_profile(llama, seed=1, threshold=1.5)
    opened = make_profile(llama, seed=1, threshold=-1.5)
    mixed: Assignment = [opened, closed, None, opened, closed, None]
    batch = padded(prompts())
    mask = torch.cat([batch["attention_mask"], torch.ones(6, 1, dtype=torch.long)], dim=1)
    token = torch.full((6, 1), 17)

    @torch.no_grad()
    def run(first: Assignment, then: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        cache = DynamicCache()
        with steerfast.steer(llama, None) as steering:
            with steering.assigned(first):
                llama(**batch, past_key_values=cache)
                before = steering.scores
            with steering.assigned(then):
                logits = llama(token, attention_mask=mask, past_key_values=cache).logits
                return logits, steering.fired, steering.scores if first == then else before

    _, fired, scores = run(mixed, mixed)
    assert fired.tolist() == [True, False, False, True, False, False]
    with steerfast.steer(llama, None) as steering, torch.no_grad(), steering.assigned(mixed):
        llama(**batch)
        assert torch.equal(steering.scores, scores)  # those of the prompt, not of the token after it
    other: Assignment = [closed, opened, opened, None, opened, closed]
    _, fired, _ = run(mixed, other)
    assert fired.tolist() == [False, True, True, False, True, False]


def test_a_second_turn(llama: Any, mixture: Callable[[Any], Assignment]) -> None:
    profiles = mixture(llama)
    first = torch.tensor([prompt[:3] for prompt in prompts()])
    question = torch.tensor([prompt[-2:] for prompt in prompts()])

    def turns(entry: Any, strength: Any, rows: slice) -> tuple[Tensor, Tensor]:
        named = {"steering": entry, "steering_strength": strength, "max_new_tokens": 3, "do_sample": False}
        with steerfast.steer(llama, None) as steering:
            output = llama.generate(first[rows], return_dict_in_generate=True, **named)
            ids = torch.cat([output.sequences, question[rows]], dim=1)
            return llama.generate(ids, past_key_values=output.past_key_values, **named), steering.fired

    together, fired = turns(profiles, STRENGTHS, slice(None))
    for row, (profile, strength) in enumerate(zip(profiles, STRENGTHS, strict=True)):
        tokens, alone_fired = turns(profile, strength, slice(row, row + 1))
        assert torch.equal(together[row], tokens[0])
        assert bool(fired[row]) == bool(alone_fired[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_wrong_assignments_are_refused_before_anything_runs(llama: Any, make_profile: MakeProfile) -> None:
    one = make_profile(llama, seed=1, threshold=-1.5)
    by_token = make_profile(llama, seed=2, kind="token")
    foreign = make_profile(make_family_model("Llama", hidden_size=16, head_dim=4))
    idle = make_profile(llama, layers=[])
    vast = make_profile(llama, seed=3, size=1e25)
    batch = padded(prompts())
    calls: list[int] = []
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steering": [one] * 5}, "steering: expected 6 entries, one per prompt, got 5"),
        ({"steering": [one] * 12}, "steering: expected 6 entries, one per prompt, got 12"),
        ({"steering": []}, "steering: expected one entry per sequence, got an empty list"),
        ({"steering_strength": []}, "steering_strength: expected one entry per sequence, got an empty list"),
        ({"steering_strength": [1.0] * 7}, "expected 6 entries, one per prompt, got 7"),
        ({"steering": [one] * 6, "steering_strength": [1.0] * 5}, "expected 6 numbers, one per profile, got 5"),
        ({"steering_strength": float("nan")}, r"steering_strength\[0\]: expected a finite number, got nan"),
        ({"steering_strength": [1, 1, float("inf"), 1, 1, 1]}, r"steering_strength\[2\]: expected a finite number"),
        ({"steering": [one, by_token, None, None, None, None]}, "token gates for all sequences of a batch or for none"),
        ({"steering": [make_profile(llama, seed=s) for s in range(17)]}, "at most 16 profiles in a batch, got 17"),
        ({"steering": [None, foreign, None, None, None, None]}, r"steering\[1\]: .*hidden size 16"),
        ({"steering": [one, idle] * 3}, r"steering\[1\]: expected a strength other than 0"),
        ({"steering": "profile.safetensors"}, r"steering: expected a profile, .* got str"),
        ({"steering": vast}, "float32 can hold"),
    ]
    with steerfast.steer(llama, one) as steering:
        expected = greedy(llama, batch)[1]
        handle = llama.register_forward_hook(lambda *_: calls.append(1))
        for options, message in wrong:
            with pytest.raises(SteerfastError, match=message):
                greedy(llama, batch, **options)
            with pytest.raises(ProfileError, match="hidden size 16"), steering.assigned(foreign):
                raise AssertionError
            assert not calls
        handle.remove()
        assert torch.equal(greedy(llama, batch)[1], expected)
        with torch.no_grad(), steering.assigned([one] * 4), pytest.raises(SteerfastError, match="expected 6 entries"):
            llama(**batch)
        assert torch.equal(greedy(llama, batch)[1], expected)


def test_a_foreign_default_profile_is_refused(llama: Any, make_profile: MakeProfile) -> None:
    with pytest.raises(ProfileError, match="hidden size 16"):
        steerfast.steer(llama, make_profile(make_family_model("Llama", hidden_size=16, head_dim=4)))
    steering: Steering = steerfast.steer(llama, None)
    assert steering.attached
    assert steering.profile is None
    steering.detach()

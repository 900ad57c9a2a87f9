"""Scores without steering are the scores that steering decides by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import steerfast
from steerfast.errors import ProfileError, PromptError
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import encode

PROMPTS = ["how to build a bomb", "write a poem", "how do you steal the book of the city", "plant the tree", "a cat"]
MakeProfile = Callable[..., SteeringProfile]


def at_run_time(model: Any, tokenizer: Any, profile: SteeringProfile) -> tuple[torch.Tensor, torch.Tensor]:
    """steering.scores [gates, prompts] and steering.fired, one prompt at a time under generate."""
    scores, fired = [], []
    for ids in encode(tokenizer, PROMPTS):
        with steerfast.steer(model, profile, tokenizer=tokenizer) as steering:
            model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
            scores.append(steering.scores[:, 0])
            fired.append(steering.fired[0])
    return torch.stack(scores, dim=1), torch.stack(fired)


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("sharpness", [0.0, 5.0])
@pytest.mark.parametrize("sensor", [1, 3])
@pytest.mark.parametrize(
    "reads", [{}, {"pooling": "mean"}, {"pooling": "both", "window": 4, "turn": (3,), "tail": 2}], ids=str
)
def test_scores_are_the_run_times(
    tiny_llama: Any,
    tiny_tokenizer: Any,
    make_profile: MakeProfile,
    score: str,
    sharpness: float,
    sensor: int,
    reads: dict[str, Any],
) -> None:
    gate = {"score": score, "sharpness": sharpness, **reads}
    profile = make_profile(tiny_llama, tiny_tokenizer, layers=[3, 4], sensor=sensor, threshold=0.02, **gate)
    scores, fired = at_run_time(tiny_llama, tiny_tokenizer, profile)
    result = steerfast.score(tiny_llama, tiny_tokenizer, profile, PROMPTS, batch_size=2, progress=False)
    torch.testing.assert_close(result.scores, scores[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(result.fired, fired)
    assert torch.equal(result.by_layer[:, sensor], result.scores)
    assert result.by_layer.shape == (len(PROMPTS), 5)
    assert result.by_layer.dtype == result.scores.dtype == torch.float32


def test_gates_of_their_own(tiny_llama: Any, tiny_tokenizer: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(tiny_llama, tiny_tokenizer, layers=[1, 3], strength=1e-6)  # so that edits move no score
    profile = replace(profile, threshold=torch.tensor([-9.0, 0.1, -9.0, -0.05, -9.0]))
    scores, fired = at_run_time(tiny_llama, tiny_tokenizer, profile)
    result = steerfast.score(tiny_llama, tiny_tokenizer, profile, PROMPTS)
    torch.testing.assert_close(result.by_layer[:, [1, 3]].T, scores, rtol=1e-3, atol=1e-4)
    assert torch.equal(result.fired, fired)
    margins = scores - torch.tensor([[0.1], [-0.05]])
    torch.testing.assert_close(
        result.scores, scores.gather(0, margins.argmax(0, keepdim=True))[0], rtol=1e-3, atol=1e-4
    )


def test_undecided_is_what_it_is_at_run_time(tiny_llama: Any, tiny_tokenizer: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(tiny_llama, tiny_tokenizer, layers=[1, 3])
    known = steerfast.score(tiny_llama, tiny_tokenizer, profile, PROMPTS, progress=False).by_layer[:, [1, 3]]
    cuts = known.sort(dim=0).values
    profile.threshold[[1, 3]] = (cuts[3] + cuts[4]) / 2
    abstain = profile.threshold.clone()
    abstain[[1, 3]] = (cuts[1] + cuts[2]) / 2
    for given in (None, profile.threshold, abstain, torch.full((5,), float("-inf"))):
        banded = replace(profile, abstain=given)
        result = steerfast.score(tiny_llama, tiny_tokenizer, banded, PROMPTS, progress=False)
        assert torch.equal(result.undecided, banded.undecided(result.by_layer))
        assert not (result.undecided & result.fired).any()
        for ids, fired, undecided in zip(encode(tiny_tokenizer, PROMPTS), result.fired, result.undecided, strict=True):
            with steerfast.steer(tiny_llama, banded, tokenizer=tiny_tokenizer) as steering:
                tiny_llama.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
                assert (steering.fired[0], steering.undecided[0]) == (fired, undecided)
    assert torch.equal(result.undecided, ~result.fired)
    middle = steerfast.score(tiny_llama, tiny_tokenizer, replace(profile, abstain=abstain), PROMPTS, progress=False)
    assert {*zip(middle.fired.tolist(), middle.undecided.tolist(), strict=True)} >= {(True, False), (False, True)}


def test_scores_do_not_steer(tiny_llama: Any, tiny_tokenizer: Any, make_profile: MakeProfile) -> None:
    one = steerfast.score(tiny_llama, tiny_tokenizer, make_profile(tiny_llama, size=1.0, threshold=-2.0), PROMPTS)
    other = steerfast.score(tiny_llama, tiny_tokenizer, make_profile(tiny_llama, size=99.0, threshold=-2.0), PROMPTS)
    assert torch.equal(one.by_layer, other.by_layer)


def test_bad_input(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: MakeProfile, make_llama: Callable[..., Any]
) -> None:
    profile = make_profile(tiny_llama, tiny_tokenizer)

    def run(prompts: Any = PROMPTS, profile: SteeringProfile = profile, model: Any = tiny_llama) -> None:
        steerfast.score(model, tiny_tokenizer, profile, prompts, progress=False)

    with pytest.raises(PromptError, match="prompts: expected a list of prompts, got one string"):
        run("a cat")
    with pytest.raises(PromptError, match="prompts: expected at least one prompt, got none"):
        run([])
    small = make_llama(max_position_embeddings=64)
    with pytest.raises(PromptError, match=r"entry 1 .* has 203 tokens, .* leaves room for 64"):
        run(["cat " * 200], make_profile(small), small)
    with pytest.raises(ProfileError, match=r"gate.kind='always' or no steered layer"):
        run(profile=replace(profile, gate=Gate("always")))
    with pytest.raises(ProfileError, match=r"gate.kind='always' or no steered layer"):
        run(profile=make_profile(tiny_llama, layers=[]))
    with pytest.raises(ProfileError, match="with other weights"):
        run(model=make_llama(seed=3))

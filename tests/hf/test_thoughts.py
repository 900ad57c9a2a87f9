"""Edits that begin after a thought: which rows are edited, wherever and however its end comes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import CLOSE, MakeProfile, Oracle, four_prompts, greedy, padded
from transformers import ContinuousBatchingConfig

import steerfast
from steerfast.errors import ProfileError, SteerfastError
from steerfast.hf import steering as handles
from steerfast.hf.latch import Latch
from steerfast.runtime.span import NO_END, Thought
from steerfast.text.turns import thought_marker

pytestmark = pytest.mark.contract

NEW = 9
Think = Callable[..., list[int]]


@pytest.fixture
def think(plain: Any, monkeypatch: pytest.MonkeyPatch) -> Think:
    """A function (first, count) -> tokens of the unsteered answer to the first prompt, which now end thoughts."""
    answers, _ = greedy(plain, padded(four_prompts()), tokens=NEW)

    def ends(first: int, count: int, turn: tuple[int, ...] = ()) -> list[int]:
        end = answers[0, first : first + count].tolist()
        monkeypatch.setattr(handles, "_thought", lambda thinking, tokenizer: Thought(tuple(end), turn))
        return end

    return ends


def prompts_with(end: list[int]) -> list[list[int]]:
    """Three prompts whose thoughts are to come, and one that has the end of its thought, as without thinking."""
    return [*four_prompts()[:3], [*four_prompts()[3], *end, 5]]


def expected(plain: Any, profile: Any, end: list[int], prompt: list[int], tokens: list[int]) -> torch.Tensor:
    oracle = Oracle(plain, profile)
    oracle.thought_end = end
    logits = oracle.logits([*prompt, *tokens], [(0, len(prompt))])[len(prompt) - 1 : -1]
    assert oracle.margin > 1e-5
    return logits


@pytest.mark.parametrize("kind", ["always", "prompt", "token"])
@pytest.mark.parametrize("answer_tokens", [None, 1, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_greedy_equals_the_oracle(
    model: Any, plain: Any, make_profile: MakeProfile, think: Think, kind: str, answer_tokens: int | None, count: int
) -> None:
    end = think(2, count)
    profile = make_profile(
        model, layers=[1, 2], sensor=1, kind=kind, positions="response", threshold=-0.05, answer_tokens=answer_tokens
    )
    prompts = prompts_with(end)
    _, unsteered = greedy(model, padded(prompts), tokens=NEW)
    with steerfast.steer(model, profile, thinking="skip"):
        tokens, logits = greedy(model, padded(prompts), tokens=NEW)
    for row, prompt in enumerate(prompts):
        want = expected(plain, profile, end, prompt, tokens[row].tolist())
        torch.testing.assert_close(logits[row], want, **CLOSE)
    begin = 2 + count  # tokens of the first answer before the edit
    assert torch.equal(logits[0, :begin], unsteered[0, :begin])
    if kind == "always":
        assert not torch.allclose(logits[0, begin], unsteered[0, begin], **CLOSE)
        assert not torch.allclose(logits[3, 0], unsteered[3, 0], **CLOSE)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_other_ways_to_generate_give_the_same_tokens(
    model: Any, make_profile: MakeProfile, think: Think, options: dict[str, Any]
) -> None:
    """Drafts may hold the end of a thought, and be rejected."""
    think(2, 1)
    profile = make_profile(model, layers=[1, 2], sensor=1, positions="response", threshold=-2.0)
    batch = padded([four_prompts()[0] * 2])
    with steerfast.steer(model, profile, thinking="skip"):
        plainly, with_options = (greedy(model, batch, tokens=NEW, **each)[0] for each in ({}, options))
    assert torch.equal(plainly, with_options)


def test_drafts_after_a_thought_may_be_rejected(model: Any, make_profile: MakeProfile, think: Think) -> None:
    """However many tokens its end has."""
    end = think(2, 2)
    profile = make_profile(model, layers=[1, 2], sensor=1, positions="response", threshold=-2.0)
    batch = padded([[*four_prompts()[0] * 2, *end, 5]])
    with steerfast.steer(model, profile, thinking="skip"):
        plainly, drafted = (
            greedy(model, batch, tokens=NEW, **each)[0] for each in ({}, {"prompt_lookup_num_tokens": 3})
        )
    assert torch.equal(plainly, drafted)


def test_beams_take_their_thoughts_along(plain: Any, make_profile: MakeProfile, think: Think) -> None:
    end = think(2, 1)
    profile = make_profile(plain, layers=[1, 2], sensor=1, kind="always", positions="response")
    batch, model = padded(four_prompts()[:2]), copy.deepcopy(plain)
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    with steerfast.steer(model, profile, thinking="skip"):
        found = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
        scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    for row, sequence in enumerate(found.sequences):
        prompt = four_prompts()[row // 3]
        answer = sequence[-NEW:].tolist()
        want = expected(plain, profile, end, prompt, answer).log_softmax(dim=-1)
        torch.testing.assert_close(scores[row], want[range(NEW), answer], **CLOSE)


def test_a_latch_moves_its_thoughts() -> None:
    values = torch.zeros(2, 3)
    latch = Latch(
        values, values.clone(), None, answers=torch.tensor([4, NO_END, 7]), recent=torch.tensor([[1], [2], [3]])
    )
    latch.repeat(2)
    latch.select(torch.tensor([4, 0, 3]))
    assert latch.answers is not None
    assert latch.recent is not None
    assert latch.answers.tolist() == [7, 4, NO_END]
    assert latch.recent.tolist() == [[3], [1], [2]]
    other = latch.copy()
    assert other.answers is latch.answers
    latch.join([other, other])
    assert latch.sequences == 9
    assert latch.answers.tolist() == [7, 4, NO_END] * 3
    assert latch.recent.tolist() == [[3], [1], [2]] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_continuous_batching_gives_the_same_tokens(
    model: Any, make_profile: MakeProfile, think: Think, count: int
) -> None:
    prompts = prompts_with(think(2, count))
    profile = make_profile(model, layers=[1, 2], sensor=1, positions="response", threshold=-2.0, answer_tokens=4)
    model.generation_config.max_new_tokens = NEW
    small = ContinuousBatchingConfig(max_memory_percent=0.01, num_blocks=16, max_batch_tokens=64)
    with steerfast.steer(model, profile, thinking="skip"):
        alone = [greedy(model, padded([prompt]), tokens=NEW)[0][0].tolist() for prompt in prompts]
        found = model.generate_batch(prompts, continuous_batching_config=small)
        assert [one.generated_tokens for one in found.values()] == alone
        small.use_async_batching = True
        with pytest.raises(SteerfastError, match=r"^use_async_batching: expected False with thinking='skip'"):
            model.generate_batch(prompts, continuous_batching_config=small)


def test_the_end_of_an_earlier_turns_thought_does_not_count() -> None:
    thought = Thought((7, 8), turn=(1, 2))
    assert not thought.over([1, 2, 5, 7, 8, 6, 1, 2, 5])
    assert thought.over([1, 2, 5, 7, 8, 6, 1, 2, 5, 7, 8])
    assert Thought((7, 8)).over([5, 7, 8, 6])
    assert thought.after([7, 7, 8, 7, 8]) == 3
    assert thought.after([7]) is None


# -- the end of a thought in a template ------------------------------------------------------------------------------


def test_a_template_tells_how_thoughts_end(tiny_tokenizer: Any) -> None:
    with pytest.raises(ProfileError, match=r"^thinking: expected a chat template with the end of a thought \(</think>"):
        thought_marker(tiny_tokenizer)
    tiny_tokenizer.chat_template += "{# </think> #}"
    with pytest.raises(ProfileError, match=r"^thinking: expected tokens of its own for '</think>', got \[1\]"):
        thought_marker(tiny_tokenizer)
    tiny_tokenizer.add_tokens(["</think>"])
    assert thought_marker(tiny_tokenizer) == (tiny_tokenizer.convert_tokens_to_ids("</think>"),)


def test_a_steered_model_reads_it_from_the_tokenizer(tiny_llama: Any, tiny_tokenizer: Any, make_profile: Any) -> None:
    tiny_tokenizer.chat_template += "{# </think> #}"
    tiny_tokenizer.add_tokens(["</think>"])
    profile = make_profile(tiny_llama, layers=[2], positions="response")
    with steerfast.steer(tiny_llama, profile, tokenizer=tiny_tokenizer, thinking="skip") as steering:
        thought = steering._roster.thought
    assert thought == Thought(thought_marker(tiny_tokenizer), (tiny_tokenizer.convert_tokens_to_ids("<user>"),))


def test_wrong_use_is_refused(plain: Any, make_profile: MakeProfile, think: Think) -> None:
    model = copy.deepcopy(plain)
    profile = make_profile(model, layers=[1, 2], sensor=1, positions="response")
    with pytest.raises(SteerfastError, match=r"^thinking: expected 'count' or 'skip', got 'no'"):
        steerfast.steer(model, profile, thinking="no")
    with pytest.raises(SteerfastError, match=r"^tokenizer: expected one with thinking='skip'"):
        steerfast.steer(model, profile, thinking="skip")
    think(2, 2)
    with pytest.raises(ProfileError, match=r"expected positions 'response' .* got positions 'all'"):
        steerfast.steer(model, make_profile(model, layers=[1, 2], positions="all"), thinking="skip")
    with pytest.raises(ProfileError, match="got layers before it"):
        steerfast.steer(model, make_profile(model, layers=[1, 2], sensor=2, positions="response"), thinking="skip")
    ids = torch.tensor(four_prompts()[:1])
    with steerfast.steer(model, profile, thinking="skip") as steering:
        with pytest.raises(SteerfastError, match=r"^thinking: expected input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with steering.prompt_length(20), pytest.raises(SteerfastError, match=r"^thinking: expected the whole prompt"):
            model(ids)
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-1)
        with pytest.raises(SteerfastError, match=r"^thinking: expected no rejected drafts"):
            model(ids[:, :1], past_key_values=cache)

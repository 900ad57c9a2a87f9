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
from steerfast.text.turns import thought_markers

pytestmark = pytest.mark.contract

NEW = 9
Think = Callable[..., list[int]]


@pytest.fixture
def think(plain: Any, monkeypatch: pytest.MonkeyPatch) -> Think:
    """A function (first, count) -> tokens of the unsteered answer to the first prompt, which now end thoughts."""
    answers, _ = greedy(plain, padded(four_prompts()), tokens=NEW)

    def ends(first: int, count: int, reply: tuple[int, ...] = ()) -> list[int]:
        end = answers[0, first : first + count].tolist()
        monkeypatch.setattr(handles, "_thought", lambda thinking, _: _thought_of(thinking, end, reply))
        return end

    return ends


def _thought_of(thinking: str, end: list[int], reply: tuple[int, ...]) -> Thought | None:
    return Thought(tuple(end), reply) if thinking == "skip" else None


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
    latch = Latch(values, values.clone(), answers=torch.tensor([4, NO_END, 7]), recent=torch.tensor([[1], [2], [3]]))
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


# -- what a call leaves for the next one -----------------------------------------------------------------------------


def always(model: Any, make_profile: MakeProfile, **fields: Any) -> Any:
    return make_profile(model, layers=[1, 2], sensor=1, kind="always", positions="response", **fields)


def test_drafts_that_are_all_accepted_behind_a_thought(
    model: Any, plain: Any, make_profile: MakeProfile, think: Think
) -> None:
    """The call in which the thought ends has rows that are not edited: the next one has none."""
    end, prompt, helper = think(5, 1), four_prompts()[0], copy.deepcopy(plain)
    for name, value in (("", 3), ("_schedule", "constant")):
        setattr(helper.generation_config, f"num_assistant_tokens{name}", value)
    helper.generation_config.assistant_confidence_threshold = 0
    profile = always(model, make_profile)
    with steerfast.steer(model, profile, thinking="skip"):
        tokens, logits = greedy(model, padded([prompt]), tokens=14, assistant_model=helper)
    torch.testing.assert_close(logits[0], expected(plain, profile, end, prompt, tokens[0].tolist()), **CLOSE)


@pytest.fixture
def reply(think: Think) -> list[int]:
    """A prompt whose reply opens by 94; its thought ends by the first token of the unsteered answer."""
    think(0, 1, reply=(94,))
    return [*four_prompts()[0], 94]


def test_an_answer_goes_on_where_its_thought_is_over(
    plain: Any, make_profile: MakeProfile, think: Think, reply: list[int]
) -> None:
    """In a second call on its cache, and in a prompt that was read before, except for its last token: as without it."""
    model, (end,) = copy.deepcopy(plain), think(0, 1, reply=(94,))
    profile, written = always(model, make_profile), [*reply, end, 5, 6]

    def logits(thinking: str) -> list[torch.Tensor]:
        how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with steerfast.steer(model, profile, thinking=thinking), torch.no_grad():
            cache = model(torch.tensor([written[:-1]]), use_cache=True).past_key_values
            known = greedy(model, padded([written]), tokens=6, cache=cache)[1]
            first = model.generate(**padded([written]), max_new_tokens=3, **how)
            batch = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
            rest = greedy(model, batch, tokens=3, cache=first.past_key_values)[1]
        return [known, *first.logits, rest]

    assert all(map(torch.equal, logits("skip"), logits("count")))


def test_another_profile_goes_on_behind_a_thought(
    plain: Any, make_profile: MakeProfile, think: Think, reply: list[int]
) -> None:
    """Thoughts are of the tokens, whoever steers."""
    model, (end,) = copy.deepcopy(plain), think(0, 1, reply=(94,))
    one, other = (always(model, make_profile, seed=seed) for seed in (1, 2))
    found = []
    with steerfast.steer(model, one, thinking="skip") as steering, torch.no_grad():
        cache = model(torch.tensor([reply]), use_cache=True).past_key_values
        for token in (end, 6):
            model(torch.tensor([[token]]), cache=cache)
        for profile in (other, None):
            with steering.assigned(profile):
                found.append(model(torch.tensor([[7]]), cache=copy.deepcopy(cache)).logits)
    assert not torch.allclose(*found, **CLOSE)


def test_a_cache_goes_on_with_thoughts_that_count(model: Any, make_profile: MakeProfile, think: Think) -> None:
    """Where thoughts are part of the answer, an edit ends by the prompt's end, whatever the cache knows."""
    think(2, 1)
    profile = always(model, make_profile, answer_tokens=4)
    prompt = padded(four_prompts()[:1])
    with steerfast.steer(model, profile, thinking="skip"):
        known = model.generate(**prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([known.sequences, torch.tensor([[9, 8, 7]])], dim=1)
    found = []
    for forget in (False, True):
        cache = copy.deepcopy(known.past_key_values)
        if forget:
            cache.steerfast_latch.answers = cache.steerfast_latch.recent = None
        with steerfast.steer(model, profile, thinking="count"):
            found.append(greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 9, cache=cache)[1])
    assert torch.equal(*found)


def test_the_first_end_of_a_thought_counts_in_continuous_batching(
    model: Any, make_profile: MakeProfile, think: Think
) -> None:
    """An answer may hold it again."""
    end = think(0, 1)
    profile = always(model, make_profile, answer_tokens=2)
    prompts = [[*prompt, *end] for prompt in four_prompts()]
    model.generation_config.max_new_tokens = 12
    small = ContinuousBatchingConfig(max_memory_percent=0.01, num_blocks=16, max_batch_tokens=64)
    with steerfast.steer(model, profile, thinking="skip") as steering:
        alone = [greedy(model, padded([prompt]), tokens=12)[0][0].tolist() for prompt in prompts]
        found = model.generate_batch(prompts, continuous_batching_config=small)
        roster = steering._packed.steps.roster
        roster.add("again", steering._packed.request(steering._roster.own, prompts[0]))
        roster.end_thoughts({"again": 40})
        assert roster._requests["again"].answer_from == len(prompts[0])
    assert [one.generated_tokens for one in found.values()] == alone


def test_prompt_length_token_by_token_with_an_end_of_two_tokens(
    plain: Any, make_profile: MakeProfile, think: Think
) -> None:
    model, end = copy.deepcopy(plain), think(2, 2)
    prompt = four_prompts()[0]
    steering = steerfast.steer(model, always(model, make_profile), thinking="skip")
    with steering, torch.no_grad(), steering.prompt_length(len(prompt)):
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
        for token in (5, *end, 6):
            model(torch.tensor([[token]]), cache=cache)
    assert cache.steerfast_latch.answers.tolist() == [len(prompt) + 3]


def test_token_ids_may_be_int32(plain: Any, make_profile: MakeProfile, think: Think) -> None:
    model, ids = copy.deepcopy(plain), torch.tensor(four_prompts()[:1])
    think(2, 1)
    for profile in (
        always(model, make_profile),
        make_profile(model, layers=[2], sensor=2, pooling="mean", positions="response"),
    ):
        with steerfast.steer(model, profile, thinking="skip"), torch.no_grad():
            assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_the_end_counts_in_the_last_reply_alone() -> None:
    """An earlier turn, a tool call or the user's text may hold one, too."""
    thought = Thought((7, 8), reply=(1, 2))
    assert not thought.over([5, 1, 2, 7, 8, 6, 5, 1, 2])
    assert not thought.over([5, 7, 8, 1, 2])
    assert thought.over([5, 1, 2, 7, 8, 6, 5, 1, 2, 7, 8])
    assert Thought((7, 8)).over([5, 7, 8, 6])
    assert thought.after([7, 7, 8, 7, 8]) == 3
    assert thought.after([7]) is None
    assert thought.opens_reply([3, 1, 2, 4])
    assert not thought.opens_reply([3, 4])
    assert Thought((7, 8)).opens_reply([3, 4])


# -- the end of a thought in a template ------------------------------------------------------------------------------


@pytest.fixture
def thinker(tiny_tokenizer: Any) -> Any:
    """A tokenizer of this test's own, whose template may change."""
    return copy.deepcopy(tiny_tokenizer)


def test_a_template_tells_how_thoughts_end(thinker: Any) -> None:
    with pytest.raises(ProfileError, match=r"^thinking: expected a chat template with the end of a thought \(</think>"):
        thought_markers(thinker)
    thinker.chat_template += "{# </think> #}"
    with pytest.raises(ProfileError, match=r"^thinking: expected tokens of its own for '</think>', got \[1\]"):
        thought_markers(thinker)
    thinker.add_tokens(["<think>", "</think>"])
    begin, end, *reply = thinker.convert_tokens_to_ids(["<think>", "</think>", "<end>", "<assistant>"])
    assert thought_markers(thinker) == ((end,), tuple(reply))
    for written in (" <think>", " <think> </think>"):  # into each prompt, as some templates do
        thinker.chat_template += f"{{% if add_generation_prompt %}}{written}{{% endif %}}"
        assert thought_markers(thinker) == ((end,), tuple(reply))
    chat = [{"role": "user", "content": "</think> hello"}]
    ids = thinker.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    thought = Thought(*thought_markers(thinker))
    assert [begin, end] == ids[-2:]
    assert thought.over(ids)
    assert not thought.over(ids[:-2])


def test_a_steered_model_reads_it_from_the_tokenizer(tiny_llama: Any, thinker: Any, make_profile: Any) -> None:
    thinker.chat_template += "{# </think> #}"
    thinker.add_tokens(["</think>"])
    profile = make_profile(tiny_llama, layers=[2], positions="response")
    with steerfast.steer(tiny_llama, profile, tokenizer=thinker, thinking="skip") as steering:
        thought = steering._roster.thought
    assert thought == Thought(*thought_markers(thinker))


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

"""Profiles that steer the beginning of an answer: which rows of it are edited, however its tokens come."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_cases import CLOSE, MakeProfile, Oracle, four_prompts, greedy, padded
from transformers import CompileConfig

import steerfast
from steerfast.hf import caches

NEW = 7


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("kind", ["always", "prompt", "token"])
@pytest.mark.parametrize("answer_tokens", [1, 3, 6, 50])
def test_greedy_equals_the_oracle(
    model: Any, plain: Any, make_profile: MakeProfile, answer_tokens: int, kind: str, positions: str
) -> None:
    profile = make_profile(
        model, layers=[1, 2], sensor=1, kind=kind, positions=positions, threshold=-0.05, answer_tokens=answer_tokens
    )
    with steerfast.steer(model, profile):
        tokens, logits = greedy(model, padded(four_prompts()), tokens=NEW)
    oracle = Oracle(plain, profile)
    for row, prompt in enumerate(four_prompts()):
        ids = [*prompt, *tokens[row].tolist()]
        expected = oracle.logits(ids, [(0, len(prompt))])[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)
    assert oracle.margin > 1e-5


def test_after_the_end_nothing_is_edited(model: Any, make_profile: MakeProfile) -> None:
    """The keys and values of the steered beginning stay; the rows after it are the stock model's on them."""
    profile = make_profile(model, layers=[1, 2], sensor=1, threshold=-2.0, answer_tokens=1)
    ids = torch.tensor(four_prompts()[:1])
    with torch.no_grad():
        with steerfast.steer(model, profile):
            cache = model(ids, use_cache=True).past_key_values
            other = copy.deepcopy(cache)
            steered = model(ids[:, :1], **{caches.argument(model): cache}).logits
        stock = model(ids[:, :1], **{caches.argument(model): other}).logits
    assert torch.equal(steered, stock)


def test_a_batch_of_different_ends(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    first = make_profile(model, layers=[1, 2], sensor=1, threshold=-2.0, answer_tokens=2)
    profiles = [first, None, make_profile(model, seed=1, threshold=-2.0), make_profile(model, seed=2, answer_tokens=4)]
    with steerfast.steer(model, None):
        tokens, logits = greedy(model, padded(four_prompts()), tokens=NEW, steering=profiles)
    for row, (prompt, profile) in enumerate(zip(four_prompts(), profiles, strict=True)):
        ids = [*prompt, *tokens[row].tolist()]
        if profile is None:
            with torch.no_grad():
                expected = plain(torch.tensor([ids])).logits[0]
        else:
            expected = Oracle(plain, profile).logits(ids, [(0, len(prompt))])
        torch.testing.assert_close(logits[row], expected[len(prompt) - 1 : -1], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "num_return_sequences": 1, "do_sample": True, "top_k": 1},
    ],
    ids=["static", "several tokens a step", "sampling"],
)
def test_ways_to_generate(model: Any, plain: Any, make_profile: MakeProfile, options: dict[str, Any]) -> None:
    profile = make_profile(model, layers=[1, 2], sensor=1, threshold=-2.0, answer_tokens=4)
    oracle = Oracle(plain, profile)
    for prompt in four_prompts():
        repeated = prompt * 3  # so that a look-up finds something
        with steerfast.steer(model, profile):
            ids = model.generate(torch.tensor([repeated]), max_new_tokens=NEW, **{"do_sample": False, **options})
        assert ids[0, len(repeated) :].tolist() == oracle.answer(repeated, NEW)


def test_another_turn_begins_anew(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model, layers=[1, 2], sensor=1, threshold=-2.0, answer_tokens=2)
    first, more = four_prompts()[0], four_prompts()[1]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with steerfast.steer(model, profile):
        one = model.generate(torch.tensor([first]), **options)
        ids = torch.cat([one.sequences, torch.tensor([more])], dim=1)
        cache = {caches.argument(model): one.past_key_values}
        mask = torch.ones_like(ids)  # an answer may hold the token that pads
        two = model.generate(ids, attention_mask=mask, **cache, **options, output_logits=True)
    # The last token of the first answer is read with the second prompt.
    start, end = one.sequences.shape[1] - 1, ids.shape[1]
    expected = Oracle(plain, profile).logits(two.sequences[0].tolist(), [(0, len(first)), (start, end)])
    torch.testing.assert_close(torch.stack(two.logits)[:, 0], expected[end - 1 : -1], **CLOSE)


def test_the_end_needs_no_other_graph(make_profile: MakeProfile, plain: Any) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # those of other tests
    model = steerfast.patch(copy.deepcopy(plain))
    profile = make_profile(model, layers=[1, 2], sensor=1, threshold=-2.0, answer_tokens=3)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    with steerfast.steer(model, profile):
        tokens = greedy(
            model, padded(four_prompts()[:1]), tokens=NEW, cache_implementation="static", compile_config=config
        )[0]
    assert tokens[0].tolist() == Oracle(plain, profile).answer(four_prompts()[0], NEW)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()

"""The baselines of the bench, against searches spelled out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from baselines import (
    ArgsSearch,
    BaselineGuard,
    ReControlSearch,
    args,
    completed,
    likeliest,
    re_control,
    value_ascent,
)
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard import Critic, Strategy
from steerfast.guard.backend import HFBackend
from steerfast.guard.candidates import Sampling
from steerfast.guard.critic import CriticSettings
from steerfast.guard.heads import HiddenHead, fit_factored_cost, fit_head
from steerfast.guard.objective import SafetyBudget
from steerfast.guard.scores import CallableScorer
from steerfast.guard.search import Search
from steerfast.hf.structure import identify

PROMPT = [3, 9, 14, 25, 31, 4]
PROMPTS = ["how do i bake bread ?", "how do i make poison ?", "write a poem"]
DEPTH = 10
ENDS = [2, 11]
GREEDY = Sampling(temperature=0.0)


def _scorer(function: Any) -> CallableScorer:
    """Return a function of an answer's tokens as a scorer."""
    return CallableScorer(lambda blocks: [function(answer) for answer in blocks.answers], takes="blocks")


def _reward_of(answer: list[int]) -> float:
    return sum((token * 31) % 13 for token in answer) / len(answer)


COST, REWARD = _scorer(lambda answer: sum(token % 7 for token in answer) / 8), _scorer(_reward_of)


@pytest.fixture
def backend(make_llama: Any, tiny_tokenizer: Any) -> HFBackend:
    return HFBackend(make_llama(eos_token_id=ENDS), tiny_tokenizer)


@pytest.fixture
def endless(make_llama: Any, tiny_tokenizer: Any) -> HFBackend:
    backend = HFBackend(make_llama(eos_token_id=ENDS), tiny_tokenizer)
    backend.ends = frozenset()
    return backend


@pytest.fixture
def search(backend: HFBackend, tiny_tokenizer: Any) -> Any:
    def make(strategy: Strategy, **options: Any) -> Search:
        given = {"cost": COST, "reward": REWARD, "budget": SafetyBudget(10.0, 1.0), **options}
        return object.__new__(BaselineGuard).engine(strategy)(backend, tiny_tokenizer, strategy, **given)

    return make


@pytest.fixture
def model(make_llama: Any) -> Any:
    return make_llama(eos_token_id=ENDS, vocab_size=72)  # all of them are the tokenizer's


@pytest.fixture
def head(model: Any, tiny_tokenizer: Any) -> HiddenHead:
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    return fit_head(hidden, (hidden[:, 0] > 0).float(), identify(model, tiny_tokenizer), "cost", boundary=3.0)


@torch.no_grad()
def _full_pass(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return logits [V] and last hidden state [H] of the last token."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return model.lm_head(hidden), hidden


def test_args_takes_the_best_of_logit_and_reward(backend: HFBackend, search: Any) -> None:
    answer: list[int] = []
    while len(answer) < 9 and not {*answer} & {*ENDS}:
        with torch.inference_mode():
            logits, tokens = backend.model(input_ids=torch.tensor([PROMPT + answer])).logits[0, -1].topk(4)
        scores = [float(x) + 1.5 * _reward_of([*answer, int(t)]) for x, t in zip(logits, tokens, strict=True)]
        answer.append(int(tokens[scores.index(max(scores))]))
    found = search(args(top=4, weight=1.5, block=4, depth=9)).run(PROMPT, GREEDY)
    assert found.best.tokens == answer
    assert [length for length, _ in found.best.blocks][:2] == [4, 4]
    assert found.sampled == 4 * len(answer)
    dear = search(args("cost", top=4, weight=50.0, depth=9)).run(PROMPT, GREEDY)
    assert dear.best.cost < found.best.cost


def test_value_ascent_by_hand() -> None:
    hidden = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    slope = torch.tensor([0.25, -1.0])
    torch.testing.assert_close(value_ascent(lambda h: h @ slope, 30, 0.5)(hidden), hidden + 15 * slope)
    goal = torch.tensor([3.0, 3.0])
    closer = value_ascent(lambda h: -((h - goal) ** 2).sum(1) / 2, 3, 0.5)(hidden)
    torch.testing.assert_close(closer, goal + (hidden - goal) * 0.5**3)


def test_re_control_edits_what_enters_the_head(backend: HFBackend, search: Any) -> None:
    slope = torch.randn(32, generator=torch.Generator().manual_seed(0))
    answer: list[int] = []
    while len(answer) < 6 and not {*answer} & {*ENDS}:
        with torch.inference_mode():
            hidden = backend.model.model(input_ids=torch.tensor([PROMPT + answer])).last_hidden_state[0, -1]
            answer.append(int(backend.model.lm_head(hidden + 30 * 0.5 * 0.02 * slope).argmax()))
            hidden = backend.model.model(input_ids=torch.tensor([PROMPT + answer])).last_hidden_state[0, -1]
    found = search(re_control(depth=6), value=lambda h: 0.02 * h @ slope).run(PROMPT, GREEDY)
    plain = search(Strategy.plain(depth=6)).run(PROMPT, GREEDY)
    assert found.best.tokens == answer != plain.best.tokens
    torch.testing.assert_close(found.best.hidden, hidden, rtol=1e-4, atol=1e-4)  # the model's own
    assert not backend.model.lm_head._forward_pre_hooks


def test_re_control_climbs_the_reward_head(model: Any, tiny_tokenizer: Any, head: HiddenHead) -> None:
    identity = identify(model, tiny_tokenizer)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    reward = fit_head(hidden, hidden[:, 1], identity, "reward")
    guard = BaselineGuard(model, tiny_tokenizer, cost=head, reward=reward)
    plain, climbed, safer = (
        guard.generate(PROMPTS, max_new_tokens=DEPTH, temperature=0.0, strategy=strategy)
        for strategy in (Strategy.plain(), re_control(), re_control("lagrangian"))
    )
    assert [a.tokens for a in plain] != [a.tokens for a in climbed] != [a.tokens for a in safer]


def test_re_control_climbs_parts_that_read_whole_states(model: Any, tiny_tokenizer: Any) -> None:
    identity = identify(model, tiny_tokenizer)
    states = torch.randn(60, 96, generator=torch.Generator().manual_seed(3))
    kinds = torch.arange(60) % 2
    cost = fit_factored_cost(states, torch.stack([kinds, (states[:, 33] > 0).long()], dim=1), identity, prompt_layer=2)
    reward = fit_head(states, states[:, 1], identity, "reward", prompt_layer=2)
    rows = torch.randn(5, 32).requires_grad_(True)
    for head in (cost, reward):
        (gradient,) = torch.autograd.grad(head.raw(completed(rows, head.tensors["mean"])).sum(), rows)
        assert bool(gradient.abs().amax(dim=1).gt(0).all())
    guard = BaselineGuard(model, tiny_tokenizer, cost=cost, reward=reward)
    strategies = Strategy.plain(), re_control(), re_control("lagrangian")
    plain, climbed, safer = (
        guard.generate(PROMPTS, max_new_tokens=DEPTH, temperature=0.0, strategy=strategy) for strategy in strategies
    )
    assert [a.tokens for a in plain] != [a.tokens for a in climbed] != [a.tokens for a in safer]
    critic = Critic(identity, CriticSettings(width=8), 2)
    by_critic = BaselineGuard(model, tiny_tokenizer, cost=cost, reward=reward, critic=critic)
    assert len(by_critic.generate(PROMPTS[:1], max_new_tokens=4, strategy=re_control())) == 1


def test_likeliest_next_tokens(endless: HFBackend) -> None:
    root = endless.start(PROMPT, 1, seed=0)
    options, scores = likeliest(endless, root, 5)
    logits, _ = _full_pass(endless.model, PROMPT)
    expected, tokens = logits.topk(5)
    assert [answer[0] for answer in options.answers] == tokens.tolist()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    for answer, row in zip(options.answers, options.hidden, strict=True):
        torch.testing.assert_close(row, _full_pass(endless.model, PROMPT + answer)[1], rtol=1e-4, atol=1e-4)


def test_a_last_row_stands_for_an_answer_of_one_token() -> None:
    states, rows = torch.randn(9, 6), torch.randn(3, 2)
    whole = torch.cat([rows, rows, states[:, 4:].mean(dim=0).expand(3, 2)], dim=1)
    torch.testing.assert_close(completed(rows, states.mean(dim=0)), whole)
    assert completed(states, states.mean(dim=0)) is states


def test_refuses_what_is_missing(search: Any) -> None:
    with pytest.raises(GuardError, match="value: 'RE-Control' needs a differentiable value"):
        search(re_control())
    for engine, strategy in ((ArgsSearch, args()), (ReControlSearch, re_control())):
        with pytest.raises(GuardError, match="logits, expected the transformers backend"):
            engine(SimpleNamespace(), None, strategy, cost=COST)

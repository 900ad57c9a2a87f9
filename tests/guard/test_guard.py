"""What users call: answers and certificates, the gate that decides where to spend, transformers' generate."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import steerfast
from steerfast.errors import GuardError, ProfileError, SteerfastError
from steerfast.guard import CallableScorer, Critic, Guard, SafetyBudget, Strategy
from steerfast.guard.critic import CriticSettings
from steerfast.guard.heads import HiddenHead, fit_head
from steerfast.guard.search import Search
from steerfast.hf.steering import steer
from steerfast.hf.structure import STEERED_MARK, identify
from steerfast.text.encoding import encode

PROMPTS = ["how do i bake bread ?", "how do i make poison ?", "write a poem"]
DEPTH = 12


def _by_tokens(function: Any) -> CallableScorer:
    return CallableScorer(lambda blocks: [function(answer) for answer in blocks.answers], takes="blocks")


COST = _by_tokens(lambda answer: sum(token % 7 for token in answer) / 8)
FREE = _by_tokens(lambda answer: 0.0)
DEAR = _by_tokens(lambda answer: 100.0)
REWARD = _by_tokens(lambda answer: sum((token * 31) % 13 for token in answer) / len(answer))
NARROW = Strategy.inference_guard(4, critic=False, block=4, depth=DEPTH)


@pytest.fixture
def model(make_llama: Any) -> Any:
    return make_llama(eos_token_id=[2, 11], vocab_size=72)  # all of them are the tokenizer's


@pytest.fixture
def head(model: Any, tiny_tokenizer: Any) -> HiddenHead:
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    return fit_head(hidden, (hidden[:, 0] > 0).float(), identify(model, tiny_tokenizer), "cost", boundary=3.0)


def _generate(model: Any, ids: list[int], **options: Any) -> list[int]:
    settings = {"max_new_tokens": DEPTH, "do_sample": False, **options}
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)
    return output[0, len(ids) :].tolist()


def test_answers_and_certificates(model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(model, tiny_tokenizer, cost=COST, reward=REWARD, budget=5.0, discount=0.99, strategy=NARROW)
    answers = guard.generate(PROMPTS, seed=1)
    assert len(answers) == 3
    for answer in answers:
        known = answer.certificate
        assert answer.text == tiny_tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert (known.budget, known.discount, known.strategy) == (5.0, 0.99, "InferenceGuard")
        assert known.recount() == pytest.approx(known.z, rel=1e-5)
        assert known.safe == (known.z > 0)
        assert sum(length for length, _ in known.blocks) == len(answer.tokens)
        assert known.cost == pytest.approx(sum(token % 7 for token in answer.tokens) / 8, rel=1e-5)
        assert (answer.path, known.fired) == ("searched", None)
        assert answer.seconds > 0
    assert not hasattr(model.model, STEERED_MARK)
    assert not model.lm_head._forward_pre_hooks


def test_an_answer_depends_on_its_prompt_and_the_seed_alone(model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(model, tiny_tokenizer, cost=COST, reward=REWARD, strategy=NARROW)
    tokens = [answer.tokens for answer in guard.generate(PROMPTS, seed=1)]
    assert [guard.generate([prompt], seed=1)[0].tokens for prompt in PROMPTS] == tokens
    assert [answer.tokens for answer in guard.generate(PROMPTS[::-1], seed=1)] == tokens[::-1]
    by_ids = guard.generate(input_ids=encode(tiny_tokenizer, PROMPTS), seed=1)
    assert [answer.tokens for answer in by_ids] == tokens
    assert [answer.tokens for answer in guard.generate(PROMPTS, seed=2)] != tokens


def test_other_defaults_of_torch(model: Any, tiny_tokenizer: Any, other_defaults: Any) -> None:
    def everything() -> list[Any]:
        guard = Guard(model, tiny_tokenizer, cost=COST, reward=REWARD, strategy=NARROW)
        return [(one.tokens, one.certificate.z, one.certificate.recount()) for one in guard.generate(PROMPTS, seed=1)]

    expected = everything()
    with other_defaults():
        assert everything() == expected


def test_greedy_speculation_on_safe_prompts_is_plain_decoding(model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(model, tiny_tokenizer, cost=FREE)
    assert guard.default.widths == (1, 4, 16)
    answers = guard.generate(PROMPTS, max_new_tokens=DEPTH, temperature=0.0)
    assert [a.tokens for a in answers] == [_generate(model, ids) for ids in encode(tiny_tokenizer, PROMPTS)]


def test_refusal_is_given_and_certified(model: Any, tiny_tokenizer: Any) -> None:
    text = "I'm sorry , but I can't help"
    guard = Guard(model, tiny_tokenizer, cost=DEAR, refusal=text)
    answer = guard.generate(PROMPTS[:1], max_new_tokens=DEPTH)[0]
    assert answer.text == text
    assert answer.tokens[-1] == tiny_tokenizer.eos_token_id
    certificate = answer.certificate
    assert certificate.fallback == "refusal"
    assert (certificate.decision, certificate.cost, certificate.retries) == ("over", 100.0, 2)  # it was charged, too


def test_heads_and_critic_read_the_same_pass(model: Any, tiny_tokenizer: Any, head: HiddenHead) -> None:
    identity = identify(model, tiny_tokenizer)
    critic = Critic(identity, CriticSettings(width=16, budget=3.0, discount=0.98, refund=True))
    guard = Guard(model, tiny_tokenizer, cost=head, critic=critic)
    assert guard.budget == SafetyBudget(3.0, 0.98, True)  # the critic's, where the caller names none
    assert guard.default.critic
    passes: list[tuple[int, ...]] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answer = guard.generate(PROMPTS[:1], strategy=Strategy.plain(block=5, depth=DEPTH))[0]
    handle.remove()
    assert len(passes) == 1 + len(answer.tokens)
    ids = encode(tiny_tokenizer, PROMPTS[:1])[0] + answer.tokens
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
    assert answer.certificate.cost == pytest.approx(float(head.score(hidden)), rel=1e-3, abs=1e-3)
    searched = guard.generate(PROMPTS, max_new_tokens=DEPTH)
    assert all(one.certificate.strategy == "speculative + critic" for one in searched)


def test_parts_agree_on_the_states_they_read(model: Any, tiny_tokenizer: Any, head: HiddenHead) -> None:
    identity = identify(model, tiny_tokenizer)
    states = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    reward = fit_head(states, states[:, 40], identity, "reward", prompt_layer=2)
    with pytest.raises(GuardError, match=r"prompt_layer: .*, got None \(cost\) and 2 \(reward\)"):
        Guard(model, tiny_tokenizer, cost=head, reward=reward)
    critic = Critic(identity, CriticSettings(width=8), prompt_layer=3)
    with pytest.raises(GuardError, match=r"prompt_layer: .*, got 2 \(reward\) and 3 \(critic\)"):
        Guard(model, tiny_tokenizer, cost=FREE, reward=reward, critic=critic)
    guard = Guard(model, tiny_tokenizer, cost=FREE, reward=reward)
    assert guard.backend.prompt_layer == 2
    with pytest.raises(GuardError, match=r"prompt_layer: .*, got 2 \(backend\) and None \(cost\)"):
        Search(guard.backend, tiny_tokenizer, NARROW, cost=head)
    answer = guard.generate(PROMPTS[:1], strategy=Strategy.plain(block=5, depth=9))[0]
    ids = encode(tiny_tokenizer, PROMPTS[:1])[0]
    with torch.inference_mode():
        known = model(torch.tensor([ids + answer.tokens]), output_hidden_states=True).hidden_states
    state = torch.cat([known[-1][0, -1], known[-1][0, len(ids) :].mean(dim=0), known[3][0, len(ids) - 1]])
    assert answer.certificate.reward == pytest.approx(float(reward.score(state[None])), rel=1e-3, abs=1e-3)


# -- the gate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fired", ["search", "steer", "both", "refuse"])
def test_gate_decides_where_to_spend(model: Any, tiny_tokenizer: Any, make_profile: Any, fired: Any) -> None:
    profile = make_profile(model, tiny_tokenizer, layers=[3])
    scores = steerfast.score(model, tiny_tokenizer, profile, PROMPTS, progress=False).scores
    profile = make_profile(model, tiny_tokenizer, layers=[3], threshold=float(scores.median()) - 1e-4)
    ids = encode(tiny_tokenizer, PROMPTS)
    with steer(model, profile) as steering:
        steered = [_generate(model, one) for one in ids]
        gates = []
        for one in ids:
            model(torch.tensor([one]))
            gates.append(bool(steering.fired[0]))
    assert {*gates} == {True, False}
    guard = Guard(model, tiny_tokenizer, cost=FREE, profile=profile, fired=fired,
                  strategy=Strategy.speculative(critic=False, block=5))  # fmt: skip
    answers = guard.generate(PROMPTS, max_new_tokens=DEPTH, temperature=0.0)
    path = {"search": "searched", "steer": "steered", "both": "steered and searched", "refuse": "refused"}[fired]
    for one, answer, gate, edited in zip(ids, answers, gates, steered, strict=True):
        assert answer.certificate.fired == gate
        assert answer.path == (path if gate else "plain")
        # Nothing costs anything: the search takes its first candidate, what plain decoding would give.
        expected = edited if gate and fired != "search" else _generate(model, one)
        assert answer.tokens == (guard.refusal if gate and fired == "refuse" else expected)
        assert (answer.certificate.fallback == "refusal") == (gate and fired == "refuse")
    assert not hasattr(model.model, STEERED_MARK)


@pytest.mark.parametrize("name", ["plain", "best_of_n", "beam"])
def test_any_strategy_may_fall_back_on_the_refusal(model: Any, tiny_tokenizer: Any, name: str) -> None:
    options = {} if name == "plain" else {"candidates": 4}
    for fallback in ("refusal", "least unsafe"):
        strategy = getattr(Strategy, name)(**options, block=5, fallback=fallback)
        for budget, over in ((0.5, True), (1e6, False)):
            guard = Guard(model, tiny_tokenizer, cost=DEAR, budget=budget, strategy=strategy)
            (answer,) = guard.generate(PROMPTS[:1], max_new_tokens=DEPTH)
            refused = over and fallback == "refusal"
            assert (answer.tokens == guard.refusal, answer.certificate.fallback == "refusal") == (refused, refused)
            assert answer.certificate.safe != over


@pytest.mark.parametrize("fired", ["search", "steer", "both"])
def test_undecided_prompts_are_searched_and_not_steered(
    model: Any, tiny_tokenizer: Any, make_profile: Any, fired: Any
) -> None:
    profile = make_profile(model, tiny_tokenizer, layers=[3], size=30.0)
    scores = steerfast.score(model, tiny_tokenizer, profile, PROMPTS, progress=False).scores
    low, middle, high = scores.sort().values
    profile.threshold[:] = (middle + high) / 2
    profile = replace(profile, abstain=torch.full_like(profile.threshold, (low + middle) / 2))
    decisions = ["fired" if s == high else "undecided" if s == middle else "shut" for s in scores]
    parts: dict[str, Any] = {"cost": FREE, "reward": REWARD, "strategy": NARROW}
    searched = Guard(model, tiny_tokenizer, **parts).generate(PROMPTS, seed=1)
    guard = Guard(model, tiny_tokenizer, **parts, profile=profile, fired=fired)
    answers = guard.generate(PROMPTS, seed=1)
    paths = {"fired": {"search": "searched", "steer": "steered", "both": "steered and searched"}[fired],
             "undecided": "plain" if fired == "steer" else "searched", "shut": "plain"}  # fmt: skip
    for decision, answer, alone in zip(decisions, answers, searched, strict=True):
        known = answer.certificate
        assert answer.path == paths[decision]
        assert (known.fired, known.undecided) == (decision == "fired", decision == "undecided")
        if answer.path == "searched":  # by the same seed: nothing was edited
            assert (answer.tokens, known.candidates) == (alone.tokens, alone.certificate.candidates)
        if answer.path == "plain":
            assert known.strategy == "plain"
    assert len({*decisions}) == 3
    over = Guard(model, tiny_tokenizer, **{**parts, "cost": DEAR}, profile=profile, fired=fired, refusal="I can't help")
    for decision, answer in zip(decisions, over.generate(PROMPTS, seed=1), strict=True):
        if fired == "steer":
            assert answer.path in ("plain", "steered")
        else:  # no prompt is searched for twice
            assert answer.path == ("plain, then searched" if decision == "shut" else paths[decision])
            assert answer.certificate.fallback == "refusal"


def test_shut_gates_cost_nothing(model: Any, tiny_tokenizer: Any, make_profile: Any) -> None:
    """One pass per token and, where the caller wants no certificate, not a single score."""
    profile = make_profile(model, tiny_tokenizer, threshold=1.0)
    calls: list[int] = []
    cost = CallableScorer(lambda blocks: calls.append(len(blocks)) or [1.0] * len(blocks), takes="blocks")
    for certify in (True, False):
        guard = Guard(model, tiny_tokenizer, cost=cost, profile=profile, certify=certify, strategy=NARROW)
        passes: list[tuple[int, ...]] = []
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs, passes=passes: passes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        calls.clear()
        (answer,) = guard.generate(PROMPTS[:1])
        handle.remove()
        assert passes[1:] == [(1, 1)] * len(answer.tokens)
        assert answer.path == "plain"
        assert answer.certificate.decision == ("within" if certify else "unchecked")
        assert bool(calls) == certify
        assert math.isnan(answer.certificate.z) != certify


def test_a_plain_answer_over_the_budget_is_searched_for(model: Any, tiny_tokenizer: Any, make_profile: Any) -> None:
    """The gate missed it, the cost model did not."""
    profile = make_profile(model, tiny_tokenizer, threshold=1.0)
    ids = encode(tiny_tokenizer, PROMPTS[:1])[0]
    plain = _generate(model, ids, max_new_tokens=10)
    cost = _by_tokens(lambda answer: 100.0 * (answer[:5] == plain[:5]))
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.0}
    strategy = Strategy.speculative(critic=False, block=5)
    parts: dict[str, Any] = {"cost": cost, "reward": REWARD, "strategy": strategy}
    (expected,) = Guard(model, tiny_tokenizer, **parts).generate(PROMPTS[:1], **options)
    assert expected.certificate.safe
    for fired in ("both", "search"):
        guard = Guard(model, tiny_tokenizer, **parts, profile=profile, fired=fired)
        (answer,) = guard.generate(PROMPTS[:1], **options)
        assert answer.tokens == expected.tokens != plain
        assert answer.path == "plain, then searched"
        known = answer.certificate
        assert (known.strategy, known.fired, known.safe) == ("plain, then speculative", False, True)
        blocks = -(-len(plain) // 5)
        assert known.candidates == blocks + expected.certificate.candidates
        assert known.recount() == pytest.approx(known.z)
    for more in ({"fired": "steer"}, {"certify": False}):
        guard = Guard(model, tiny_tokenizer, **parts, profile=profile, **more)
        (answer,) = guard.generate(PROMPTS[:1], **options)
        assert (answer.tokens, answer.path, answer.certificate.strategy) == (plain, "plain", "plain")
    dear = Guard(model, tiny_tokenizer, cost=DEAR, strategy=strategy, profile=profile, refusal="I can't help")
    (answer,) = dear.generate(PROMPTS[:1], **options)
    assert (answer.text, answer.certificate.fallback) == ("I can't help", "refusal")


# -- transformers ----------------------------------------------------------------------------------


def test_custom_generate(model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(model, tiny_tokenizer, cost=FREE)
    batch = tiny_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    settings: dict[str, Any] = {**batch, "max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.5}
    expected = model.generate(**settings)
    got = model.generate(**settings, custom_generate=guard.strategy)
    assert torch.equal(got, expected)
    assert [answer.certificate.safe for answer in guard.answers] == [True] * 3
    sampled = {**settings, "do_sample": True, "temperature": 0.7, "top_k": 20}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(**sampled, custom_generate=guard.strategy))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    careful = Guard(model, tiny_tokenizer, cost=DEAR, refusal="I can't help", strategy=NARROW)
    refused = model.generate(**settings, custom_generate=careful.strategy)[:, batch["input_ids"].shape[1] :]
    assert tiny_tokenizer.batch_decode(refused, skip_special_tokens=True) == ["I can't help"] * 3


# -- bad input -------------------------------------------------------------------------------------


def test_refuses(model: Any, make_llama: Any, tiny_tokenizer: Any, make_profile: Any, head: HiddenHead) -> None:
    def make(**options: Any) -> Guard:
        return Guard(options.pop("model", model), tiny_tokenizer, **{"cost": FREE, **options})

    other = make_llama(seed=5, eos_token_id=[2, 11], vocab_size=72)
    for options, message in (
        ({"cost": None}, "cost: expected a scorer, got None"),
        ({"budget": 0.0}, "budget: expected a number above 0, got 0.0"),
        ({"budget": -3.0}, "budget: expected"),
        ({"discount": 1.5}, "discount: expected"),
        ({"fired": "maybe"}, "fired: expected one of search, steer, both, refuse, got 'maybe'"),
        ({"model": None}, "model: expected either a model or a backend"),
        ({"strategy": Strategy.inference_guard()}, "critic: expected one"),
        ({"model": other, "cost": head}, "cost head: "),
        ({"model": other, "critic": Critic(identify(model, tiny_tokenizer), CriticSettings(width=8))}, "critic: "),
    ):
        with pytest.raises(GuardError, match=message):
            make(**options)
    with pytest.raises(ProfileError):
        make(profile=make_profile(other), strategy=NARROW).generate(PROMPTS)
    guard = make(strategy=NARROW)
    for arguments, message in (
        ({"prompts": "how"}, "prompts: expected a list"),
        ({}, "prompts: expected a list of prompts, or input_ids"),
        ({"prompts": PROMPTS, "input_ids": [[1]]}, "prompts: expected"),
        ({"prompts": PROMPTS, "max_new_tokens": 0}, "depth: expected a whole number of at least 1, got 0"),
        ({"prompts": PROMPTS, "temperature": -1.0}, "temperature: expected"),
        ({"input_ids": [[]]}, "entry 1 has 0 tokens, expected 1 to 244"),
        ({"input_ids": [[1], [1] * 250]}, "entry 2 has 250 tokens, expected 1 to 244"),
        ({"prompts": [" "]}, "entry 1: expected a non-empty string"),
    ):
        with pytest.raises(SteerfastError, match=message):
            guard.generate(**arguments)
    with pytest.raises(GuardError, match="the guard's own model"):
        guard.strategy(other, torch.tensor([[1, 2]]))
    assert not hasattr(model.model, STEERED_MARK)


def test_importing_the_room_imports_no_model_code() -> None:
    code = "import sys, steerfast; before = {*sys.modules}; import steerfast.guard; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["steerfast.guard"]

"""Every strategy on tiny random models, against searches spelled out by hand."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend, _RoomyLayer
from steerfast.guard.candidates import Sampling
from steerfast.guard.guard import Guard
from steerfast.guard.objective import SafetyBudget, best_first
from steerfast.guard.scores import Blocks, CallableScorer
from steerfast.guard.search import Search, Strategy

PROMPT = [3, 9, 14, 25, 31, 4]
ENDS = [2, 11]
GREEDY = Sampling(temperature=0.0)
REFUSAL = [50, 51, 2]
FLAT = SafetyBudget(10.0, 1.0)


def _scorer(function: Any, cumulative: bool = True) -> CallableScorer:
    """A function of an answer's tokens as a scorer."""
    return CallableScorer(lambda blocks: [function(answer) for answer in blocks.answers], takes="blocks",
                          cumulative=cumulative)  # fmt: skip


def _cost_of(answer: list[int]) -> float:
    return sum(token % 7 for token in answer) / 8


def _reward_of(answer: list[int]) -> float:
    return sum((token * 31) % 13 for token in answer) / len(answer)


COST, REWARD = _scorer(_cost_of), _scorer(_reward_of)


@pytest.fixture
def backend(make_llama: Any, tiny_tokenizer: Any) -> HFBackend:
    return HFBackend(make_llama(eos_token_id=ENDS), tiny_tokenizer)


@pytest.fixture
def search(backend: HFBackend, tiny_tokenizer: Any) -> Any:
    def make(strategy: Strategy, **options: Any) -> Search:
        return Search(backend, tiny_tokenizer, strategy, **{"cost": COST, "reward": REWARD, "budget": FLAT, **options})

    return make


def _answers(backend: HFBackend, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    candidates = backend.start(PROMPT, count, seed)
    backend.extend(candidates, tokens)
    return candidates.answers


# -- baselines -------------------------------------------------------------------------------------


def test_plain_is_what_generate_gives_and_is_charged(backend: HFBackend, search: Any) -> None:
    expected = backend.model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=21, do_sample=False
    )[0, len(PROMPT) :].tolist()
    budget = SafetyBudget(10.0, 0.9)
    found = search(Strategy.plain(block=8, depth=21), budget=budget).run(PROMPT, GREEDY)
    assert found.best.tokens == expected
    z, before, ends = 10.0, 0.0, [*range(8, len(expected), 8), len(expected)]
    for start, end in zip([0, *ends], ends, strict=False):
        now = _cost_of(expected[:end])
        z, before = z * 0.9 ** (start - end) - (now - before) / 0.9, now
    assert found.best.z == pytest.approx(z, rel=1e-5)
    assert found.best.cost == pytest.approx(_cost_of(expected))
    assert found.best.reward == pytest.approx(_reward_of(expected))
    assert [length for length, _ in found.best.blocks] == [e - s for s, e in zip([0, *ends], ends, strict=False)]
    assert found.fallback is None


@pytest.mark.parametrize("safety", ["none", "lagrangian", "cost", "augmented"])
def test_best_of_n(backend: HFBackend, search: Any, safety: Any) -> None:
    answers = _answers(backend, 12, 20)
    costs, rewards = [_cost_of(a) for a in answers], [_reward_of(a) for a in answers]
    budget = sorted(costs)[5] + 0.01  # six answers keep it
    expected = {
        "none": max(range(12), key=lambda i: rewards[i]),
        "lagrangian": max(range(12), key=lambda i: rewards[i] - 0.4 * costs[i]),
        "cost": min(range(12), key=lambda i: costs[i]),
        "augmented": max((i for i in range(12) if costs[i] < budget), key=lambda i: rewards[i]),
    }
    strategy = Strategy.best_of_n(12, safety, depth=20, block=6, multiplier=0.4)
    found = search(strategy, budget=SafetyBudget(budget, 1.0)).run(PROMPT)
    assert found.best.tokens == answers[expected[safety]]
    assert found.best.z == pytest.approx(budget - found.best.cost, abs=1e-4)
    assert len(set(expected.values())) >= 3


@pytest.mark.parametrize("safety", ["none", "augmented"])
def test_beam(backend: HFBackend, search: Any, safety: Any) -> None:
    budget, count, kept = SafetyBudget(9.0, 1.0), 8, 2
    beams = backend.start(PROMPT, 1, 0)
    for depth in (5, 10, 15):
        done = backend.branch(beams, beams.finished.nonzero()[:, 0].tolist())
        parents = backend.branch(beams, (~beams.finished).nonzero()[:, 0].tolist())
        if not len(parents):
            break
        width, room = len(parents), count - len(done)
        fresh = backend.branch(parents, [n % width for n in range(room)], [n // width for n in range(room)])
        backend.extend(fresh, 5)
        answers = done.answers + fresh.answers
        pairs = [(backend.branch(done, [i])) for i in range(len(done))] + [
            backend.branch(fresh, [i]) for i in range(len(fresh))
        ]
        reward = torch.tensor([_reward_of(a) for a in answers])
        z = torch.tensor([9.0 - _cost_of(a) for a in answers])
        order = reward.argsort(descending=True) if safety == "none" else best_first(reward, z, (z > 0).float())
        chosen = order[:kept].tolist()  # the search lists what was finished before first
        beams = backend.join([pairs[i] for i in sorted(chosen, key=lambda i: (i >= len(done), chosen.index(i)))])
        assert beams.length <= depth
    best = max(beams.answers, key=lambda a: (safety == "none" or _cost_of(a) < 9.0, _reward_of(a)))
    found = search(Strategy.beam(count, safety, block=5, depth=15), budget=budget).run(PROMPT)
    assert found.best.tokens == best
    assert found.sampled > count


# -- InferenceGuard --------------------------------------------------------------------------------


def _first_blocks(backend: HFBackend, count: int, tokens: int) -> list[list[int]]:
    root = backend.start(PROMPT, 1, 0)
    fresh = backend.branch(root, [0] * count, range(count))
    backend.extend(fresh, tokens)
    return fresh.answers


def _only(*blocks: list[int]) -> CallableScorer:
    """A cost that spares answers that begin so, and spends everything of the others."""
    return _scorer(lambda answer: 0.0 if any(answer[: len(b)] == b for b in blocks) else 100.0)


def test_speculation_costs_one_candidate_where_the_first_is_safe(backend: HFBackend, search: Any) -> None:
    widths: list[tuple[int, ...]] = []
    handle = backend.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    strategy = Strategy.speculative(critic=False, block=5, depth=18)
    found = search(strategy, budget=SafetyBudget(1e6, 1.0)).run(PROMPT, seed=3)
    handle.remove()
    assert widths == [(1, len(PROMPT))] + [(1, 1)] * len(found.best.tokens)
    assert found.best.tokens == search(Strategy.plain(block=5, depth=18)).run(PROMPT, seed=3).best.tokens
    assert found.sampled == math.ceil(len(found.best.tokens) / 5)


@pytest.mark.parametrize(("which", "sampled"), [(0, 1), (2, 4), (9, 16)])
def test_speculation_widens_until_a_block_is_safe(backend: HFBackend, search: Any, which: int, sampled: int) -> None:
    blocks = _first_blocks(backend, 16, 6)
    strategy = Strategy.speculative(critic=False, block=6, depth=6)
    found = search(strategy, cost=_only(blocks[which])).run(PROMPT)
    assert found.best.tokens == blocks[which]
    assert found.sampled == sampled
    assert (found.retries, found.fallback) == (0, None)
    assert found.best.z == 10.0


def test_retries_penalise_tokens_of_unsafe_blocks(backend: HFBackend, search: Any) -> None:
    engine = search(Strategy.inference_guard(4, critic=False, penalty=3.0))
    penalty = engine._penalty([[5, 6, 6], [6, 7], [6, 2]])  # 2 ends answers
    assert penalty.shape == (128,)
    assert {i: float(penalty[i]) for i in penalty.nonzero()[:, 0].tolist()} == {5: 1.0, 6: 3.0, 7: 1.0}
    backend.ends = frozenset()
    blocks = _first_blocks(backend, 4, 6)
    banned = {token for block in blocks for token in block}
    strategy = Strategy.inference_guard(4, critic=False, block=6, depth=6, penalty=1e6)
    cost = _scorer(lambda answer: 100.0 * bool(banned & {*answer}))
    found = search(strategy, cost=cost).run(PROMPT)
    assert (found.retries, found.sampled, found.fallback) == (1, 8, None)
    assert not banned & {*found.best.tokens}


def test_refusal_when_all_is_unsafe(backend: HFBackend, search: Any) -> None:
    strategy = Strategy.inference_guard(4, critic=False, block=6, depth=60)
    cost = _scorer(lambda answer: 1.0 if answer == REFUSAL else 100.0)
    found = search(strategy, cost=cost).run(PROMPT, refusal=REFUSAL)
    assert found.best.tokens == REFUSAL
    assert found.fallback == "refusal"
    assert (found.retries, found.sampled) == (2, 12)  # it stopped at the first block
    assert (found.best.z, found.best.cost, found.best.blocks) == (9.0, 1.0, ((3, 1.0),))
    hidden = backend.model.model(input_ids=torch.tensor([PROMPT + REFUSAL])).last_hidden_state[0, -1]
    torch.testing.assert_close(found.best.hidden, hidden.detach(), rtol=1e-4, atol=1e-4)


def test_least_unsafe_when_the_caller_wants_that(backend: HFBackend, search: Any) -> None:
    blocks = _first_blocks(backend, 4, 6)
    costs = {tuple(block): 20.0 + number for number, block in enumerate(blocks)}
    costs[tuple(blocks[2])] = 19.0
    strategy = Strategy.inference_guard(4, critic=False, block=6, depth=6, retries=0, fallback="least unsafe")
    found = search(strategy, cost=_scorer(lambda answer: costs[tuple(answer)])).run(PROMPT, refusal=REFUSAL)
    assert found.best.tokens == blocks[2]
    assert (found.fallback, found.best.z) == ("least unsafe", -9.0)


class _Critic:
    """Says what a function of hidden states says."""

    mean = torch.zeros(1)
    settings = SimpleNamespace(budget=10.0, discount=1.0)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, hidden: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(hidden, z)


def test_critic_decides_about_unfinished_candidates_only(backend: HFBackend, search: Any) -> None:
    seen: list[Tensor] = []

    def judge(hidden: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(z)
        return (hidden[:, 0] > 0).float(), hidden[:, 1]

    root = backend.start(PROMPT, 1, 0)
    fresh = backend.branch(root, [0] * 8, range(8))
    backend.extend(fresh, 6)
    hidden, finished = fresh.hidden, fresh.finished
    eligible = [i for i in range(8) if not finished[i] and hidden[i, 0] > 0]
    assert 0 < len(eligible) < 8
    kept = sorted(eligible, key=lambda i: -float(hidden[i, 1]))
    strategy = Strategy.inference_guard(8, keep=1, block=6, depth=12)
    free = _scorer(lambda answer: 0.0)
    found = search(strategy, critic=_Critic(judge), cost=free, reward=_scorer(lambda a: -1e6)).run(PROMPT)
    assert found.best.tokens[:6] == fresh.answers[kept[0]][:6]
    assert len(seen) == 1  # answers at full depth are judged by what they are
    assert found.best.p_safe == 1.0


def test_all_predicted_unsafe_falls_back(backend: HFBackend, search: Any) -> None:
    backend.ends = frozenset()
    critic = _Critic(lambda hidden, z: (torch.full((len(z),), 0.4), torch.zeros(len(z))))
    strategy = Strategy.inference_guard(4, block=3, depth=12)
    found = search(strategy, critic=critic, cost=_scorer(lambda a: 0.0)).run(PROMPT, refusal=REFUSAL)
    assert (found.best.tokens, found.fallback) == (REFUSAL, "refusal")


def test_values_are_discounted_to_the_empty_answer(search: Any) -> None:
    """Of two answers of one reward, the shorter is worth more: γ^T r."""
    found = search(Strategy.best_of_n(12, depth=20), reward=_scorer(lambda a: 1.0), budget=SafetyBudget(1e6, 0.9)).run(
        PROMPT
    )
    flat = search(Strategy.best_of_n(12, depth=20), reward=_scorer(lambda a: -len(a))).run(PROMPT)
    assert found.best.tokens == flat.best.tokens
    assert len(found.best.tokens) < 20


# -- what may go wrong -----------------------------------------------------------------------------


def test_scores_that_are_no_numbers_fail_closed(backend: HFBackend, search: Any) -> None:
    answers = _answers(backend, 4, 8)
    good = answers[3]
    nan_cost = _scorer(lambda a: 0.0 if a == good else math.nan)
    strategy = Strategy.best_of_n(4, "augmented", block=8, depth=8)
    assert search(strategy, cost=nan_cost).run(PROMPT).best.tokens == good
    nan_reward = _scorer(lambda a: -50.0 if a == good else math.nan)
    for safety in ("none", "augmented", "lagrangian"):
        found = search(replace(strategy, safety=safety), cost=_scorer(lambda a: 0.0), reward=nan_reward).run(PROMPT)
        assert found.best.tokens == good
    all_nan = _scorer(lambda a: math.nan)
    found = search(Strategy.inference_guard(4, critic=False, block=8, depth=8), cost=all_nan).run(
        PROMPT, refusal=REFUSAL
    )
    assert found.fallback == "refusal"
    assert found.best.z == -math.inf


def test_costs_of_blocks_alone(search: Any) -> None:
    """A scorer that is not cumulative is charged as it says, block by block."""
    per_block = _scorer(lambda a: float(len(a)), cumulative=False)
    found = search(Strategy.plain(block=4, depth=8), cost=per_block).run(PROMPT, GREEDY)
    assert found.best.cost == sum(spent for _, spent in found.best.blocks)
    assert found.best.blocks[:2] == ((4, 4.0), (4, 8.0))


@pytest.mark.parametrize("refund", [True, False])
def test_a_harmless_ending_pays_back_with_refund_alone(search: Any, refund: bool) -> None:
    """Scores of 6, then 1, then 3, then -2: within a budget of 5 is the end, and not the whole of the way."""
    scores = {4: 6.0, 8: 1.0, 12: 3.0, 16: -2.0}
    strategy = Strategy.plain(block=4, depth=16)
    scorer = _scorer(lambda answer: scores[len(answer)])
    budget = SafetyBudget(5.0, 1.0, refund)
    found = search(strategy, cost=scorer, budget=budget).run(PROMPT, GREEDY).best
    assert [spent for _, spent in found.blocks] == ([6.0, -5.0, 2.0, -5.0] if refund else [6.0, 0.0, 0.0, 0.0])
    assert found.cost == (-2.0 if refund else 6.0)
    assert found.z == budget.budget - found.cost
    assert found.score == -2.0


def test_a_cost_of_a_block_alone_is_no_refund(search: Any) -> None:
    per_block = _scorer(lambda a: float(3 - len(a)), cumulative=False)
    found = search(Strategy.plain(block=4, depth=8), cost=per_block).run(PROMPT, GREEDY)
    assert found.best.blocks[:2] == ((4, 0.0), (4, 0.0))


def test_same_seed_same_answer(search: Any) -> None:
    strategy = Strategy.inference_guard(8, critic=False, block=5, depth=20)
    found = [search(strategy).run(PROMPT, seed=seed).best.tokens for seed in (5, 5, 6)]
    assert found[0] == found[1] != found[2]


def test_greedy_rounds_of_several_candidates_are_sampled(search: Any) -> None:
    greedy = search(Strategy.plain(depth=8)).run(PROMPT, GREEDY).best.tokens
    strategy = Strategy.speculative(critic=False, block=8, depth=8)
    cost = _scorer(lambda a: 100.0 * (a == greedy))
    found = search(strategy, cost=cost).run(PROMPT, GREEDY)
    assert (found.sampled, found.fallback) == (4, None)
    assert found.best.tokens != greedy


def test_memory_stays_within_its_bound(make_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: weakref.WeakSet[Any] = weakref.WeakSet()
    fork, update = _RoomyLayer.fork, _RoomyLayer.update
    monkeypatch.setattr(_RoomyLayer, "fork", lambda self: (layers.add(self), layers.add(new := fork(self)), new)[2])
    monkeypatch.setattr(
        _RoomyLayer, "update", lambda self, *args, **more: (layers.add(self), update(self, *args, **more))[1]
    )
    peaks: list[int] = []

    def measure(*_: Any) -> None:
        held = [tensor.untyped_storage() for one in layers for tensor in (one.keys, one.values, *(one.room or ()))]
        peaks.append(sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()))

    model = make_llama(eos_token_id=ENDS)
    model.model.register_forward_pre_hook(measure)
    strategy = Strategy.inference_guard(8, critic=False, block=4, depth=40, fallback="least unsafe")
    guard = Guard(model, tiny_tokenizer, cost=_scorer(lambda a: 100.0), strategy=strategy)
    guard.generate(input_ids=[PROMPT])
    bound = guard.cache_bytes(len(PROMPT))
    assert bound == (8 + 3 * 2 + 1) * guard.backend.cache_bytes(len(PROMPT) + 40)
    assert bound / 4 < max(peaks) <= bound


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": 6}, "candidates: expected a multiple of 4"),
        ({"candidates": 0, "keep": 1}, "candidates: expected a whole number of at least 1, got 0"),
        ({"keep": 17}, "keep: expected 1 to 16"),
        ({"keep": 0}, "keep: expected 1 to 16"),
        ({"block": 0}, "block: expected a whole number of at least 1, got 0"),
        ({"depth": 0}, "depth: expected"),
        ({"retries": -1}, "retries: expected"),
        ({"widths": (4, 1, 16)}, "widths: expected numbers that grow from 1 to 16"),
        ({"widths": (1, 4)}, "widths: expected numbers that grow from 1 to 16"),
        ({"safety": "some"}, "safety: expected one of none, lagrangian"),
        ({"fallback": "hope"}, "fallback: expected one of refusal, least unsafe"),
        ({"penalty": -1.0}, "penalty: expected"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
    ],
)
def test_strategies_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GuardError, match=message):
        Strategy("mine", **fields)


def test_refuses_what_is_missing(search: Any, backend: HFBackend) -> None:
    with pytest.raises(GuardError, match=r"critic: expected one for the strategy 'InferenceGuard \+ critic', got none"):
        search(Strategy.inference_guard())

    def count(blocks: Blocks) -> Tensor:
        return torch.zeros(len(blocks) + 1)

    with pytest.raises(GuardError, match="cost: expected one score per answer"):
        search(Strategy.plain(depth=4), cost=count).run(PROMPT)

"""The real engine answers with prefix caching as without, whatever comes in whatever order; and still shares.

`test_block_names.py` tries many more interleavings, on a stand-in for the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from answers import Oracle, gated
from hypothesis import given, settings
from hypothesis import strategies as st

from steerfast.profile import Gate, SteeringProfile

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

BLOCK = 32
CHUNK = 96  # tokens of a step: most prompts come in several
ROUNDS, PER_ROUND = 4, 6
ASKS = ROUNDS * PER_ROUND
SENSOR, STEERED = 6, [8, 14]
CALM, ALARM = 260, 500  # the last token of a prompt says what its gate decides, by a wide margin


@dataclass
class Ask:
    prompt: list[int]
    extra: dict[str, Any] | None
    tokens: int
    answer: list[int]
    logprobs: list[float]
    steering: dict[str, Any] | None


def text(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000, 20000) for _ in range(count)]


@pytest.fixture(scope="module")
def profiles(oracle: Oracle) -> dict[str, SteeringProfile]:
    """Gates that know a last token from another; the threshold lies halfway, far from all scores."""
    rng = random.Random(0)
    rows = {}
    for last in (CALM, ALARM):
        prompts = torch.tensor([[*text(rng, 40), last] for _ in range(8)])
        with torch.inference_mode():
            hidden = oracle.model(prompts, output_hidden_states=True, use_cache=False).hidden_states
        rows[last] = hidden[SENSOR + 1][:, -1]
    direction = rows[ALARM].mean(0) - rows[CALM].mean(0)
    direction /= direction.norm()
    scores = {last: torch.nn.functional.cosine_similarity(own, direction[None]) for last, own in rows.items()}
    low, high = float(scores[CALM].max()), float(scores[ALARM].min())
    assert high - low > 0.1

    def gate(seed: int, sign: float) -> SteeringProfile:
        profile = gated(seed).with_band(STEERED, 2.0)
        directions, thresholds = torch.zeros_like(profile.direction), torch.zeros_like(profile.threshold)
        directions[SENSOR], thresholds[SENSOR] = sign * direction, sign * (low + high) / 2
        return replace(
            profile, direction=directions, threshold=thresholds, sensor=SENSOR, gate=Gate("prompt", "cosine")
        )

    always = replace(gate(3, 1.0), gate=Gate("always"), sensor="own")
    return {"alarm": gate(1, 1.0), "calm": gate(2, -1.0), "always": always, "whole": replace(always, positions="all")}


@pytest.fixture(scope="module")
def start(engine: Callable[..., Any], profiles: dict[str, SteeringProfile], saved: Any) -> Callable[..., Any]:
    """A function (**options) -> an engine with these profiles."""
    files = saved(profiles)

    def started(**options: Any) -> Any:
        settings = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 6, **options}
        return engine({"profiles": files}, **settings)

    return started


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def drive(llm: Any, asks: Sequence[tuple[int, Ask]], between: Callable[[int], None] = lambda at: None) -> list[Any]:
    """Outputs of the asks, each of which comes after some steps more of those before."""
    from vllm import SamplingParams

    outputs: dict[str, Any] = {}

    def step() -> None:
        for output in llm.llm_engine.step():
            if output.finished:
                outputs[output.request_id] = output

    for number, (steps, ask) in enumerate(asks):
        for _ in range(steps):
            if llm.llm_engine.has_unfinished_requests():
                step()
        parameters = SamplingParams(
            temperature=0, max_tokens=ask.tokens, ignore_eos=True, logprobs=0, extra_args=ask.extra
        )
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": ask.prompt}, parameters)
        between(number)
    while llm.llm_engine.has_unfinished_requests():
        step()
    return [outputs[str(number)] for number in range(len(asks))]


def read(output: Any) -> tuple[list[int], list[float]]:
    only = output.outputs[0]
    return list(only.token_ids), [next(iter(at.values())).logprob for at in only.logprobs]


def check(ask: Ask, output: Any) -> None:
    tokens, logprobs = read(output)
    assert tokens == ask.answer
    assert logprobs == pytest.approx(ask.logprobs, abs=1e-3)
    if ask.steering is None:
        assert output.steering is None
        return
    assert (output.steering["profile"], output.steering["fired"]) == (ask.steering["profile"], ask.steering["fired"])
    assert output.steering["scores"] == pytest.approx(ask.steering["scores"], abs=1e-4)


def check_idle(llm: Any) -> None:
    steering = core_of(llm).scheduler.steerfast
    assert [version.requests for version in steering.registry.versions()] == [0] * 4
    assert not steering.registry.spoilt
    assert not steering._unnamed
    assert not steering._unreported


@pytest.fixture(scope="module")
def truth(start: Callable[..., Any]) -> list[Ask]:
    """Conversations of several turns, answered by an engine that caches nothing."""
    llm, rng = start(enable_prefix_caching=False), random.Random(1)
    bases = [text(rng, 2 * BLOCK) for _ in range(2)]
    asks: list[Ask] = []
    for _ in range(ROUNDS):
        earlier = [ask.prompt + ask.answer for ask in asks]
        for _ in range(PER_ROUND):
            if earlier and rng.random() < 0.6:
                prompt = rng.choice(earlier) + text(rng, rng.randrange(0, 9))
            else:
                prompt = rng.choice(bases) + text(rng, rng.choice([BLOCK - 1, rng.randrange(0, 60)]))
            if rng.random() < 0.4:  # ends with a block
                prompt = (prompt + text(rng, BLOCK))[: len(prompt) // BLOCK * BLOCK + BLOCK - 1]
            prompt = [*prompt[:400], rng.choice([CALM, ALARM])]
            name = rng.choice([None, "off", "alarm", "alarm", "calm", "calm", "always", "whole"])
            extra = None if name is None else {"steering": name}
            if name not in (None, "off") and rng.random() < 0.5:
                extra["steering_strength"] = rng.choice([0.5, 1.5])
            asks.append(Ask(prompt, extra, rng.randrange(4, 36), [], [], None))
        for ask, output in zip(asks[-PER_ROUND:], drive(llm, [(0, ask) for ask in asks[-PER_ROUND:]]), strict=True):
            ask.answer, ask.logprobs = read(output)
            ask.steering = output.steering
    decided = [(ask.steering["profile"], ask.steering["fired"]) for ask in asks if ask.steering]
    assert {(name, fired) for name in ("alarm", "calm") for fired in (False, True)} <= {*decided}
    for ask in asks:  # the gate's decision is the one that its last token asks for
        if ask.steering and ask.steering["profile"] in ("alarm", "calm"):
            assert ask.steering["fired"] == ((ask.prompt[-1] == ALARM) == (ask.steering["profile"] == "alarm"))
    return asks


@pytest.fixture(scope="module")
def cached(truth: list[Ask], start: Callable[..., Any]) -> Any:
    return start(enable_prefix_caching=True)


comes = st.tuples(st.integers(0, 6), st.integers(0, ASKS - 1))


@settings(max_examples=3)
@given(order=st.lists(comes, min_size=8, max_size=16), reset=st.sampled_from([None, 2, 5]))
def test_answers_are_those_without_a_cache(
    cached: Any, truth: list[Ask], order: list[tuple[int, int]], reset: int | None
) -> None:
    def between(number: int) -> None:
        if number == reset:  # throws out everything, of running requests too
            assert core_of(cached).reset_prefix_cache(reset_running_requests=True)

    outputs = drive(cached, [(steps, truth[number]) for steps, number in order], between)
    for (_, number), output in zip(order, outputs, strict=True):
        check(truth[number], output)
    check_idle(cached)


def test_all_of_them_at_once_and_again(cached: Any, truth: list[Ask]) -> None:
    for _ in range(2):
        outputs = drive(cached, [(0, ask) for ask in truth])
        for ask, output in zip(truth, outputs, strict=True):
            check(ask, output)
    reused = sum(output.num_cached_tokens for output in outputs)
    assert reused > 0.5 * sum(len(ask.prompt) for ask in truth)
    check_idle(cached)


def test_what_nobody_edited_is_shared(cached: Any) -> None:
    rng = random.Random(2)
    cases = [
        (name, last, edited, length)
        for name, last, edited in (
            (None, ALARM, False),
            ("alarm", CALM, False),
            ("calm", ALARM, False),
            ("alarm", ALARM, True),
            ("calm", CALM, True),
            ("always", CALM, True),
        )
        for length in (2 * BLOCK - 9, 2 * BLOCK)
    ]
    firsts = [
        Ask([*text(rng, length - 1), last], {"steering": name} if name else None, BLOCK + 3, [], [], None)
        for name, last, _, length in cases
    ]
    outputs = drive(cached, [(0, ask) for ask in firsts])
    turns = []
    for (_, _, edited, _), ask, output in zip(cases, firsts, outputs, strict=True):
        assert output.num_cached_tokens == 0
        assert (output.steering is not None and output.steering["fired"]) == edited
        ask.answer = list(output.outputs[0].token_ids)
        turns.append(Ask([*ask.prompt, *ask.answer, CALM], {"steering": "alarm"}, 1, [], [], None))
    for (_, _, edited, length), output in zip(cases, drive(cached, [(0, turn) for turn in turns]), strict=True):
        untouched = length - 1 if edited else length + BLOCK + 2  # rows; nobody computed that of the last token
        assert output.num_cached_tokens == untouched // BLOCK * BLOCK
    check_idle(cached)


def test_preempted_requests_keep_their_decision(
    truth: list[Ask], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    llm = start(enable_prefix_caching=True, num_gpu_blocks_override=18)
    preempted: list[tuple[str | None, bool]] = []
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        held = request.steerfast
        preempted.append((None, False) if held is None else (held.versions[0].name, held.decided))
        original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    for seed in range(2):  # fewer blocks than two of the longer requests take
        order = random.Random(seed).sample(range(ASKS), ASKS)
        outputs = drive(llm, [(1, truth[number]) for number in order])
        for number, output in zip(order, outputs, strict=True):
            check(truth[number], output)
    assert len(preempted) >= 4
    assert sum(decided for _, decided in preempted) >= 2
    assert core_of(llm).scheduler.kv_cache_manager.usage == 0
    check_idle(llm)


def test_gates_that_edit_whole_prompts(
    engine: Callable[..., Any], profiles: dict[str, SteeringProfile], saved: Any, oracle: Oracle
) -> None:
    from steerfast.errors import ProfileError

    profile = replace(profiles["alarm"], positions="all")
    steering = {"profiles": saved({"all": profile}), "default": "all"}
    with pytest.raises((ValueError, ProfileError), match="--no-enable-chunked-prefill"):
        engine(steering)
    llm = engine(steering, enable_chunked_prefill=False, max_num_batched_tokens=512)
    rng = random.Random(4)
    base = text(rng, 2 * BLOCK)
    for last, fired in ((ALARM, True), (CALM, False), (ALARM, True)):
        prompt = [*base, last]
        (output,) = drive(llm, [(0, Ask(prompt, None, 12, [], [], None))])
        assert output.steering["fired"] == fired
        assert output.num_cached_tokens == 0
        want = oracle.answer(prompt, profile, 1.0, 12)
        assert want.margin > 1e-3
        assert oracle.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) == want.text

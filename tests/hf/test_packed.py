"""transformers' continuous batching under steering: each request is answered as it would be alone, by the oracle."""

from __future__ import annotations

import copy
import dataclasses
import faulthandler
import functools
import gc
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from model_cases import MakeProfile, Oracle, greedy, make_family_model, padded
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import steerfast.runtime.slots
from steerfast.errors import SteerfastError
from steerfast.hf.auto import SteeredLlamaForCausalLM
from steerfast.kernels.contract import DECIDES
from steerfast.profile import SteeringProfile
from steerfast.runtime.bank import Bank
from steerfast.runtime.roster import Roster

pytestmark = pytest.mark.contract

TOKENS = 6
LENGTHS = (3, 1, 9, 17, 5, 30, 2, 12, 7, 1, 21)
STRENGTHS = (1.0, 0.5, 1.0, 0.7, -1.2, 1.0, 0.8, 1.0, 1.0, 0.6, 1.0)
PAGE = next(f.name for f in dataclasses.fields(ContinuousBatchingConfig) if f.name in ("page_size", "block_size"))


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """Managers collect garbage when they stop: 0.5 s each time, were all that was imported looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    """And a test that hangs ends the run with everybody's stack."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 96, (length,), generator=generator).tolist()


def prompts() -> list[list[int]]:
    return [prompt(length, number) for number, length in enumerate(LENGTHS)]


def configured(tokens: int = TOKENS, generation: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Batches of 10 rows and 4 requests: prompts are split, and most requests wait."""
    settings = {"num_blocks": 64, PAGE: 4, "max_batch_tokens": 10, "max_requests_per_batch": 4, **changes}
    fields = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return {
        "generation_config": GenerationConfig(**{**fields, **(generation or {})}),
        "continuous_batching_config": ContinuousBatchingConfig(max_memory_percent=0.01, **settings),
    }


def answers(outputs: dict[str, Any]) -> list[list[int]]:
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


class Truth:
    """What the oracle, or the model alone where nobody steers, answers; never by a hair."""

    def __init__(self, name: str = "Llama") -> None:
        # Paged attention, of transformers' own, does not cap its logits.
        self.model = make_family_model(name, **({"attn_logit_softcapping": None} if name == "Gemma2" else {}))
        self._known: dict[Any, tuple[list[int], bool]] = {}

    def __call__(
        self, ids: list[int], profile: SteeringProfile | None, strength: float = 1.0, tokens: int = TOKENS
    ) -> list[int]:
        return self.both(ids, profile, strength, tokens)[0]

    def fired(self, ids: list[int], profile: SteeringProfile | None) -> bool:
        return self.both(ids, profile, 1.0, 1)[1]

    @torch.no_grad()
    def both(
        self, ids: list[int], profile: SteeringProfile | None, strength: float, tokens: int
    ) -> tuple[list[int], bool]:
        key = (tuple(ids), None if profile is None else profile.checksum, strength, tokens)
        if key not in self._known:
            oracle = None if profile is None else Oracle(self.model, profile, strength)
            sequence, fired = list(ids), False
            for _ in range(tokens):
                if oracle is None:
                    logits = self.model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
                else:
                    logits = oracle.logits(sequence, [(0, len(ids))])[-1]
                first, second = logits.topk(2).values.tolist()
                assert first - second > 1e-4
                sequence.append(int(logits.argmax()))
            if oracle is not None:
                assert oracle.margin > 1e-4
                scores, limits = oracle.scores, oracle.profile.threshold
                gates = oracle.profile.gate_layers
                fired = not gates or any(bool(scores[layer][0] > limits[layer]) for layer in gates)
            self._known[key] = sequence[len(ids) :], fired
        return self._known[key]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


@pytest.fixture(params=["hooks", "fused"])
def llama(request: pytest.FixtureRequest, truth: Truth) -> Any:
    return make("Llama", request.param, truth)


def make(name: str, kind: str, truth: Truth, attention: str = "sdpa") -> Any:
    model = copy.deepcopy(truth.model)
    if kind == "class":
        model = SteeredLlamaForCausalLM(copy.deepcopy(model.config)).eval()
        model.load_state_dict(truth.model.state_dict())
    model.set_attn_implementation(attention)
    return steerfast.patch(model) if kind == "fused" else model


@contextmanager
def steered(model: Any, profile: SteeringProfile | None, strength: float = 1.0) -> Iterator[Any]:
    """By the class's own method where it has one."""
    with steerfast.steer(model, profile, strength) as steering:
        if isinstance(model, SteeredLlamaForCausalLM):
            model.steering = steering
        yield steering
        if isinstance(model, SteeredLlamaForCausalLM):
            model.steering = None


def mixture(make_profile: MakeProfile, model: Any, size: float = 4.0) -> list[SteeringProfile | None]:
    """Own gates, sensors, soft and hard gates, dot scores, means of some rows and of all, always in all rows, always in
    the answer, nobody.
    """
    one = functools.partial(make_profile, model, size=size)
    return [
        one(seed=1, positions="response", threshold=-0.05, answer_tokens=3),
        one(seed=2, sensor=1, layers=[1, 3], positions="response", threshold=-1.5),
        None,
        one(seed=3, kind="always", layers=[0, 2], positions="all", answer_tokens=1),
        one(seed=4, sensor=2, layers=[2, 3], sharpness=3.0, score="dot", positions="response"),
        one(seed=5, positions="response", pooling="mean", threshold=0.02),
        one(seed=6, kind="always", layers=[1], positions="response"),
        one(seed=7, sensor=0, positions="response", threshold=0.02),
        None,
        one(seed=5, positions="response", threshold=0.05),
        one(seed=8, positions="response", sensor=1, layers=[1, 3], pooling="mean", window=14, score="dot"),
    ]


@contextmanager
def managed(model: Any, warmup: bool = False, **options: Any) -> Iterator[Any]:
    manager = model.init_continuous_batching(**configured(**options))
    if warmup:
        manager.warmup()
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(timeout=20, hard_stop=True)


def collect(manager: Any, count: int) -> dict[str, Any]:
    """The next `count` requests that finish."""
    finished: dict[str, Any] = {}
    deadline = time.monotonic() + 30
    while len(finished) < count and time.monotonic() < deadline:
        result = manager.get_result(timeout=0.5)
        if result is not None and result.is_finished():
            finished[result.request_id] = result
    assert len(finished) == count
    return finished


class Held:
    """Lets a model make so many steps and no more."""

    def __init__(self, model: Any, steps: int = 0) -> None:
        self._steps = threading.Semaphore(steps)
        self._waits = threading.Semaphore(0)
        self._open = False
        self._handle = model.register_forward_pre_hook(lambda *_: self._wait())

    def _wait(self) -> None:
        if not self._open:
            self._waits.release()
            assert self._steps.acquire(timeout=30)

    def reached(self, steps: int = 1) -> None:
        """Wait until that many more steps are about to start."""
        for _ in range(steps):
            assert self._waits.acquire(timeout=30)

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._steps.release()
            self.reached()

    def release(self) -> None:
        self._open = True
        self._steps.release(1000)
        self._handle.remove()


# -- generate_batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "attention"),
    [
        ("Llama", "hooks", "sdpa"),
        ("Llama", "fused", "sdpa"),
        ("Llama", "class", "eager"),
        ("Gemma2", "fused", "eager"),
        ("Mistral", "hooks", "sdpa"),
        ("Qwen3", "fused", "eager"),
    ],
)
def test_each_request_is_steered_as_alone(make_profile: MakeProfile, name: str, kind: str, attention: str) -> None:
    truth = Truth(name)
    model = make(name, kind, truth, attention)
    profiles = mixture(make_profile, truth.model, 16.0 if name == "Gemma2" else 4.0)  # whose norms halve what is added
    profiles = [
        one and dataclasses.replace(one, abstain=torch.full_like(one.threshold, -torch.inf)) for one in profiles
    ]
    expected = [truth.both(*one, TOKENS) for one in zip(prompts(), profiles, STRENGTHS, strict=True)]
    plain = answers(model.generate_batch(prompts(), **configured()))
    assert plain == [truth(ids, None) for ids in prompts()]
    with steered(model, None) as steering:
        outputs = model.generate_batch(prompts(), **configured(), steering=profiles, steering_strength=STRENGTHS)
        fired, undecided, scores = steering.fired, steering.undecided, steering.scores
        decisions = [steering.decision(request_id) for request_id in outputs]
        assert answers(model.generate_batch(prompts(), **configured())) == plain
    assert answers(outputs) == [tokens for tokens, _ in expected]
    assert fired.tolist() == [fired for _, fired in expected]
    assert undecided.tolist() == [one is not None and not fired[n] for n, one in enumerate(profiles)]
    assert 0 < fired.sum() < len(fired)
    assert sum(a != b for a, b in zip(answers(outputs), plain, strict=True)) >= 4
    gates = sorted({layer for profile in profiles if profile is not None for layer in profile.gate_layers})
    assert scores.shape == (len(gates), len(profiles))
    for column, (ids, profile) in enumerate(zip(prompts(), profiles, strict=True)):
        decision = decisions[column]
        if profile is None:
            assert decision is None
            assert scores[:, column].eq(-torch.inf).all()
            continue
        oracle = Oracle(truth.model, profile, STRENGTHS[column])
        oracle.logits(ids, [(0, len(ids))])
        wanted = torch.tensor([float(oracle.scores[layer][0]) for layer in profile.gate_layers])
        assert decision is not None
        assert decision[0] == bool(fired[column])
        torch.testing.assert_close(decision[1], wanted, rtol=1e-4, atol=1e-5)
        here = [gates.index(layer) for layer in profile.gate_layers]
        assert torch.equal(scores[here, column], decision[1])


@pytest.mark.parametrize("rows", [3, 10, 64])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window": 8, "score": "dot"},
        {"pooling": "both", "mean_direction": (0.6, 0.8), "turn": (1, 2), "tail": 4},
    ],
    ids=str,
)
def test_the_mean_of_a_prompt_in_pieces_and_whole(
    llama: Any, truth: Truth, make_profile: MakeProfile, fields: dict[str, Any], rows: int
) -> None:
    some = [prompt(length) for length in (9, 17, 1, 30, 12, 21)]
    for ids in some[1:]:
        for place in (0, len(ids) // 3) if len(ids) > 1 else ():
            ids[place : place + 2] = 1, 2
    fields = {"pooling": "mean", **fields}
    profile = make_profile(llama, seed=1, sensor=1, layers=[1, 3], positions="response", **fields)
    oracle, wanted = Oracle(truth.model, profile), []
    for ids in some:
        oracle.logits(ids, [(0, len(ids))])
        wanted.append(float(oracle.scores[1]))
    low, high = sorted(wanted)[2:4]
    profile = dataclasses.replace(profile, threshold=torch.full_like(profile.threshold, (low + high) / 2))
    with steered(llama, profile) as steering:
        outputs = llama.generate_batch(some, **configured(max_batch_tokens=rows, max_requests_per_batch=3))
        assert answers(outputs) == [truth(ids, profile) for ids in some]
        assert steering.fired.tolist() == [score > low for score in wanted]
        torch.testing.assert_close(steering.scores, torch.tensor([wanted]), rtol=1e-4, atol=1e-5)


def test_an_empty_prompt_harms_no_other(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    first, second, *_ = prompts()
    for profile in (make_profile(llama, seed=1, positions="response"), make_profile(llama, seed=2, kind="always")):
        with steered(llama, profile):
            got = answers(llama.generate_batch([first, [], second], **configured()))
        assert (got[0], got[2]) == (truth(first, profile), truth(second, profile))


def test_the_models_own_profile_and_contexts(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    own, other = (make_profile(llama, seed=s, positions="response", threshold=-1.5) for s in (1, 2))
    some = prompts()[:5]
    with steered(llama, own, 0.5) as steering:
        for options, profile, strength in (
            ({}, own, 0.5),
            ({"steering": other}, other, 0.5),
            ({"steering_strength": 0.8}, own, 0.8),
            ({"steering": None}, None, 1.0),
            ({"steering": [other], "steering_strength": [0.8] * 5}, other, 0.8),
        ):
            got = answers(llama.generate_batch(some, **configured(), **options))
            assert got == [truth(ids, profile, strength) for ids in some]
        with steering.assigned([other, None, own, None, other], 0.8):
            got = answers(llama.generate_batch(some, **configured()))
        wanted = zip(some, [other, None, own, None, other], strict=True)
        assert got == [truth(ids, profile, 0.8) for ids, profile in wanted]
        steering.strength = 0.8
        assert answers(llama.generate_batch(some, **configured())) == [truth(ids, own, 0.8) for ids in some]
        assert llama.generate_batch([], **configured()) == {}
    assert answers(llama.generate_batch(some, **configured())) == [truth(ids, None) for ids in some]


def test_ordinary_generation_between_batches(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    own, other = (make_profile(llama, seed=s, positions="response", threshold=0.0) for s in (5, 9))
    some = [prompt(6, seed) for seed in range(4)]
    with steered(llama, own) as steering:
        for _ in range(2):
            assert answers(llama.generate_batch(some, **configured(), steering=[own, other, None, own])) == [
                truth(ids, profile) for ids, profile in zip(some, [own, other, None, own], strict=True)
            ]
            tokens = greedy(llama, padded(some), tokens=TOKENS, steering=[None, own, own, other])[0]
            order = [None, own, own, other]
            assert tokens.tolist() == [truth(ids, profile) for ids, profile in zip(some, order, strict=True)]
            assert steering.fired.tolist() == [truth.fired(i, p) for i, p in zip(some, order, strict=True)]
    assert greedy(llama, padded(some), tokens=TOKENS)[0].tolist() == [truth(ids, None) for ids in some]


def test_generate_with_a_paged_cache(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    profiles = [make_profile(llama, seed=1, positions="response", threshold=-1.5), None]
    some = [prompt(6, 1), prompt(6, 2)]
    options = configured()
    generation = options["generation_config"]
    generation.continuous_batching_config = options["continuous_batching_config"]
    with steered(llama, None) as steering:
        options = {"generation_config": generation, "cache_implementation": "paged", "steering": profiles}
        sequences = llama.generate(torch.tensor(some), **options)
        assert steering.fired.tolist() == [True, False]
    assert sequences[0, :, 6:].tolist() == [truth(*one) for one in zip(some, profiles, strict=True)]


def test_prompts_are_not_shared(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    """Their blocks in the cache hold what a profile made of them."""
    early = make_profile(llama, seed=3, kind="always", positions="all")
    ids = prompt(24)
    order = [early, None, early, None]
    expected = [truth(ids, profile) for profile in order]
    assert expected[0] != expected[1]
    with steered(llama, None):
        options = configured(max_batch_tokens=32, allow_block_sharing=True)
        assert answers(llama.generate_batch([ids] * 4, **options, steering=order)) == expected
        assert options["continuous_batching_config"].allow_block_sharing
        with managed(llama, allow_block_sharing=True) as manager:
            for profile, tokens in zip(order, expected, strict=True):  # one after the other
                name = manager.add_request(ids, steering=profile)
                assert collect(manager, 1)[name].generated_tokens == tokens


def test_several_answers_to_a_prompt(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    profiles = mixture(make_profile, llama)[:6]
    some, strengths = prompts()[:6], STRENGTHS[:6]
    some[1] = prompt(2, 1)
    options = configured(generation={"do_sample": True, "top_k": 1, "num_return_sequences": 3})
    with steered(llama, None) as steering:
        outputs = llama.generate_batch(some, **options, steering=profiles, steering_strength=strengths)
        fired = steering.fired
        decisions = {name: steering.decision(name) for name in outputs}
    expected = [truth.both(*one, TOKENS) for one in zip(some, profiles, strengths, strict=True)]
    numbers = [int(name.partition("__child")[0].removeprefix("req_")) for name in outputs]
    assert numbers == sorted([*range(6)] * (len(outputs) // 6))  # before transformers 5.20, one answer of the three
    assert answers(outputs) == [expected[number][0] for number in numbers]
    assert fired.tolist() == [fired for _, fired in expected]
    for name, decision in decisions.items():
        parent = decisions[name.partition("__child")[0]]
        assert (decision is None) == (parent is None)
        if decision is not None and parent is not None:
            torch.testing.assert_close(decision, parent)


def test_sampling_with_a_seed(llama: Any, make_profile: MakeProfile) -> None:
    own = make_profile(llama, seed=1, positions="response", threshold=-1.5)

    def sample(seed: int, **options: Any) -> list[list[int]]:
        settings = configured(generation={"do_sample": True, "temperature": 3.0}, allow_block_sharing=False)
        manager = llama.init_continuous_batching(**settings)
        for ids in prompts()[:4]:
            manager.add_request(ids, **options)
        torch.manual_seed(seed)
        manager.start()
        try:
            outputs = collect(manager, 4)
        finally:
            manager.stop(timeout=20)
        return answers({name: outputs[name] for name in sorted(outputs)})

    plain = sample(0)
    with steered(llama, own):
        first = sample(0)
        assert sample(0) == first
        assert sample(1) != first
        assert sample(0, steering=None) == plain != first


# -- caches too small for all requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [0.0, 0.01], ids=["computed again", "moved to the host"])
def test_requests_that_lose_their_cache(
    llama: Any, truth: Truth, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch, space: float
) -> None:
    """Mid-answer; they keep the decision that their prompt took, and take none again."""
    from transformers.generation.continuous_batching import offloading_manager
    from transformers.generation.continuous_batching.requests import RequestState

    lost: list[tuple[str, int]] = []
    stock = RequestState.create_equivalent_initial_request

    def reset(state: Any) -> Any:
        lost.append((state.request_id, len(state.generated_tokens)))
        return stock(state)

    offload = offloading_manager.OffloadingManager._offload_to_cpu

    def move(manager: Any, states: list[Any], *args: Any) -> Any:
        moved = offload(manager, states, *args)
        lost.extend((state.request_id, len(state.generated_tokens)) for state in states if state.request_id in moved)
        return moved

    class Unpinned:  # without an accelerator there is no pinned memory
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return torch.empty(*args, **kwargs)

    decided: list[int] = []
    step = Roster.step

    def counted(requests: Roster, *args: Any) -> bool:
        deciding = step(requests, *args)
        slots = requests.tables.deciders[requests.tables.deciding >= 0, 0].long()
        decided.append(int((requests.bank.table[:, slots, DECIDES] > 0).any(dim=0).sum()))
        return deciding

    monkeypatch.setattr(Roster, "step", counted)
    if space:
        monkeypatch.setattr(offloading_manager.OffloadingManager, "_offload_to_cpu", move)
        monkeypatch.setattr(offloading_manager, "torch", Unpinned())
    else:
        monkeypatch.setattr(RequestState, "create_equivalent_initial_request", reset)
    profiles = mixture(make_profile, llama)
    some = [prompt(length, number) for number, length in enumerate((3, 2, 9, 5, 6, 8, 2, 12, 7, 4, 11))]
    with steered(llama, None) as steering:
        options = configured(tokens=16, num_blocks=9, safety_margin=0.0, cpu_offload_space=space)
        outputs = llama.generate_batch(some, **options, steering=profiles, steering_strength=STRENGTHS)
        fired = steering.fired.tolist()
    expected = [truth.both(*one, 16) for one in zip(some, profiles, STRENGTHS, strict=True)]
    assert answers(outputs) == [tokens for tokens, _ in expected]
    assert fired == [fired for _, fired in expected]
    assert any(profiles[int(name.removeprefix("req_"))] is not None for name, tokens in lost if tokens > 1)
    assert sum(decided) == sum(bool(profile.gate_layers) for profile in profiles if profile is not None)


# -- managers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hooks", "class"])
def test_requests_join_while_others_run(make_profile: MakeProfile, truth: Truth, kind: str) -> None:
    model = make("Llama", kind, truth)
    own, late, other = (make_profile(model, seed=s, positions="response", threshold=0.0) for s in (5, 1, 9))
    cases: dict[str, tuple[list[int], SteeringProfile | None, float]] = {
        "own": (prompt(9), own, 0.7),
        "late": (prompt(14), late, 1.0),
        "nobody": (prompt(5), None, 1.0),
        "strong": (prompt(7), other, -1.5),
        "context": (prompt(11), other, 0.9),
    }
    with steered(model, own, 0.7) as steering, managed(model) as manager:
        held = Held(model)
        assert manager.add_request(prompt(9), "own") == "own"
        held.reached()
        assert steering.decision("own") is None
        held.step()
        assert steering.decision("own") is not None
        with pytest.raises(SteerfastError, match="undecided: expected a batch as the last step, got one of continuous"):
            _ = steering.undecided
        manager.add_request(prompt(14), "late", steering=late, steering_strength=1.0)
        held.step(2)
        manager.add_request(prompt(5), "nobody", steering=None)
        with steering.assigned(other, 0.9):
            manager.add_request(prompt(11), "context")
        assert steering.decision("nobody") is None
        manager.add_request(prompt(7), "strong", steering=other, steering_strength=-1.5)
        held.release()
        outputs = collect(manager, 5)
        for name, (ids, profile, strength) in cases.items():
            assert outputs[name].generated_tokens == truth(ids, profile, strength), name
            decision = steering.decision(name)
            assert (decision is not None and decision[0]) == truth.fired(ids, profile)
        names = manager.add_requests([prompt(3), prompt(4)], steering=[None, late], steering_strength=[1.0, 0.5])
        outputs = collect(manager, 2)
        assert outputs[names[0]].generated_tokens == truth(prompt(3), None)
        assert outputs[names[1]].generated_tokens == truth(prompt(4), late, 0.5)
    assert steering.decision("own") is not None  # when the manager is gone, too
    assert steering.decision("unknown") is None


def test_names_are_used_again(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    opened = make_profile(llama, seed=1, positions="response", threshold=-1.5)
    closed = make_profile(llama, seed=1, positions="response", threshold=1.5)
    with steered(llama, None) as steering, managed(llama) as manager:
        for turn, profile in enumerate((opened, closed, None, opened)):
            held = Held(llama)
            manager.add_request(prompt(5), "other")
            held.reached()
            manager.add_request(prompt(8, turn), "again", steering=profile)
            assert steering.decision("again") is None  # what the one before decided says nothing
            with pytest.raises(SteerfastError, match="request_id: expected one of no request that still runs"):
                manager.add_request(prompt(3), "again", steering=closed)
            held.release()
            assert collect(manager, 2)["again"].generated_tokens == truth(prompt(8, turn), profile)
            decision = steering.decision("again")
            assert (decision is not None) == (profile is not None)
            assert decision is None or decision[0] == (profile is opened)


def test_cancelled_requests(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    one, other = (make_profile(llama, seed=s, positions="response", threshold=-1.5) for s in (1, 2))
    with steered(llama, None), managed(llama, tokens=12) as manager:
        held = Held(llama)
        manager.add_request(prompt(4), "stays", steering=one)
        manager.add_request(prompt(5), "goes", steering=other)
        held.reached()
        held.step(3)
        manager.add_request(prompt(6), "waits", steering=other)
        for name in ("goes", "waits"):
            manager.cancel_request(name)
        held.step(2)
        assert manager.steerfast_slots == {manager.steerfast_runs.roster.of_requests(1, one)[0][0].slot}
        manager.add_request(prompt(7), "goes", steering=one)
        manager.add_request(prompt(8), "waits", steering=other)
        held.release()
        outputs = collect(manager, 3)
        assert outputs["stays"].generated_tokens == truth(prompt(4), one, tokens=12)
        assert outputs["goes"].generated_tokens == truth(prompt(7), one, tokens=12)
        assert outputs["waits"].generated_tokens == truth(prompt(8), other, tokens=12)


def test_streams(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    profile = make_profile(llama, seed=1, positions="response", threshold=-1.5)
    with steered(llama, None), managed(llama) as manager:
        name = manager.add_request(prompt(13), streaming=True, steering=profile)
        deadline, parts = time.monotonic() + 30, []
        while (not parts or not parts[-1].is_finished()) and time.monotonic() < deadline:
            if (part := manager.get_result(name, timeout=0.5)) is not None:
                parts.append(part)
        expected = truth(prompt(13), profile)
        assert [part.generated_tokens for part in parts] == [expected[:n] for n in range(1, TOKENS + 1)]


def test_slots_of_running_requests_stay(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    """More profiles than slots pass by a long request; at once they are refused."""
    first = make_profile(llama, seed=100, positions="response", threshold=-1.5)
    crowd = [make_profile(llama, seed=s, positions="response", threshold=-1.5) for s in range(20)]
    options = {"tokens": 30, "num_blocks": 120, "max_requests_per_batch": 32, "max_batch_tokens": 64}
    with steered(llama, None), managed(llama, **options) as manager:
        held = Held(llama)
        manager.add_request(prompt(4), "long", steering=first)
        held.reached()
        for number, profile in enumerate(crowd):
            manager.add_request(prompt(3), f"short{number}", 1, steering=profile)
            held.step()
        held.release()
        outputs = collect(manager, 21)
        assert outputs["long"].generated_tokens == truth(prompt(4), first, tokens=30)
        for number, profile in enumerate(crowd):
            assert outputs[f"short{number}"].generated_tokens == truth(prompt(3), profile, tokens=1)

        held = Held(llama)
        for number, profile in enumerate(crowd[:17]):
            manager.add_request(prompt(5, number), f"both{number}", TOKENS, steering=profile)
        for wait in (held.reached, held.step):  # as well before the first step as after it
            wait()
            with pytest.raises(SteerfastError, match=r"steering: expected .* beside those of requests that still run"):
                manager.add_request(prompt(3), "one too many", steering=crowd[17])
        manager.add_request(prompt(6), "known", TOKENS, steering=crowd[16], steering_strength=0.5)
        held.release()
        outputs = collect(manager, 18)
        for number, profile in enumerate(crowd[:17]):
            assert outputs[f"both{number}"].generated_tokens == truth(prompt(5, number), profile)
        assert outputs["known"].generated_tokens == truth(prompt(6), crowd[16], 0.5)
        name = manager.add_request(prompt(3), max_new_tokens=1, steering=crowd[17])
        assert collect(manager, 1)[name].generated_tokens == truth(prompt(3), crowd[17], tokens=1)


def test_a_profile_comes_while_the_manager_starts(
    truth: Truth, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any, **kwargs: Any) -> Bank:
        time.sleep(0.5 if threading.current_thread() is threading.main_thread() else 0.1)
        return Bank(*args, **kwargs)

    monkeypatch.setattr(steerfast.runtime.slots, "Bank", slowly)
    model = make("Llama", "hooks", truth)
    profile = make_profile(model, seed=1, positions="response", threshold=-1.5)
    with steered(model, None), managed(model) as manager:
        name = manager.add_request(prompt(4), steering=profile)
        assert collect(manager, 1)[name].generated_tokens == truth(prompt(4), profile) != truth(prompt(4), None)


def test_threads_that_add_requests_at_once(truth: Truth, make_profile: MakeProfile) -> None:
    model = make("Llama", "fused", truth)
    profiles = [make_profile(model, seed=s, positions="response", threshold=-1.5) for s in range(16)]
    with steered(model, None), managed(model, max_requests_per_batch=16, max_batch_tokens=40) as manager:

        def add(thread: int) -> None:
            for number in range(thread, 16, 4):
                manager.add_request(prompt(5, number), f"{number}", steering=profiles[number])

        threads = [threading.Thread(target=add, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        outputs = collect(manager, 16)
        for thread in threads:
            thread.join(timeout=20)
    for number, profile in enumerate(profiles):
        assert outputs[f"{number}"].generated_tokens == truth(prompt(5, number), profile)


def test_ordinary_generation_inside_a_pause(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    one, other = (make_profile(llama, seed=s, positions="response", threshold=-1.5) for s in (1, 2))
    with steered(llama, other) as steering, managed(llama, tokens=16) as manager:
        if not hasattr(manager, "pause"):
            pytest.skip("this transformers cannot pause")
        held = Held(llama)
        manager.add_request(prompt(4), "one", steering=one)
        manager.add_request(prompt(12), "other")
        held.reached()
        held.step(3)
        held.release()
        with manager.pause():
            batch = padded([prompt(5), prompt(8)])
            tokens = greedy(llama, batch, tokens=TOKENS, steering=[None, one])[0]
            assert tokens.tolist() == [truth(prompt(5), None), truth(prompt(8), one)]
            assert steering.fired.tolist() == [False, True]
        outputs = collect(manager, 2)
        assert outputs["one"].generated_tokens == truth(prompt(4), one, tokens=16)
        assert outputs["other"].generated_tokens == truth(prompt(12), other, tokens=16)


def test_persistent_managers(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    one, other = (make_profile(llama, seed=s, positions="response", threshold=-1.5) for s in (1, 2))
    some, kept = prompts()[:3], {"persistent_manager": True}
    with steered(llama, one) as steering:
        assert answers(llama.generate_batch(some, **configured(), **kept)) == [truth(ids, one) for ids in some]
        manager = llama._cached_continuous_batching_manager
        got = answers(llama.generate_batch(some, **configured(), **kept, steering=[None, other, one]))
        assert got == [truth(*one) for one in zip(some, [None, other, one], strict=True)]
        assert steering.fired.tolist() == [False, True, True]
        assert llama._cached_continuous_batching_manager is manager
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    plain = [truth(ids, None) for ids in some]
    assert answers(llama.generate_batch(some, **configured(), **kept)) == plain
    with steered(llama, one):
        with pytest.raises(SteerfastError, match="model: its persistent manager was made without this steering"):
            llama.generate_batch(some, **configured())
        llama.destroy_cached_continuous_batching_manager()
        assert answers(llama.generate_batch(some, **configured())) == [truth(ids, one) for ids in some]


def test_copies_of_a_model_whose_requests_run(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    one = make_profile(llama, seed=1, positions="response", threshold=-1.5)
    with steered(llama, one) as steering:
        with managed(llama) as manager:
            manager.add_request(prompt(4), "one")
            collect(manager, 1)
            copies = [copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))]
        copies += [copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))]
        assert steering.decision("one") is not None
    for copied in copies:
        assert answers(copied.generate_batch([prompt(5)], **configured())) == [truth(prompt(5), one)]


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=["fused"])
def test_one_graph_serves_all_batches(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    """Padded and compiled, after the warm-up: profiles, strengths and who shares a batch change."""
    profiles = mixture(make_profile, llama)
    graphs: list[int] = []

    def backend(graph: Any, example: Any, **options: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = CompileConfig(backend=backend, fullgraph=False, dynamic=False)
    options: dict[str, Any] = {"varlen_compile_config": compiled, "decode_compile_config": compiled}
    torch._dynamo.reset()
    with steered(llama, None) as steering:
        with steering.assigned(profiles):  # their layers are attached from now on
            pass
        padding = {"q_padding_interval_size": 10, "kv_padding_interval_size": 4096}
        with managed(llama, warmup=True, **options, **padding) as manager:
            rounds = [len(graphs)]
            for shift in range(3):
                order = profiles[shift:] + profiles[:shift]
                strengths = [0.3 * shift + strength for strength in STRENGTHS]
                names = manager.add_requests(prompts(), steering=order, steering_strength=strengths)
                outputs = collect(manager, len(names))
                expected = [truth(*one) for one in zip(prompts(), order, strengths, strict=True)]
                assert [outputs[name].generated_tokens for name in names] == expected
                rounds.append(len(graphs))
            # Captured graphs are dropped where a profile does what they do not hold: here, take sums over rows.
            captured = manager.batch_processor.inputs_and_outputs.graphs
            sums = make_profile(llama, seed=9, sensor=3, layers=[3], positions="response", edit="ablate")
            for profile, same in ((profiles[1], True), (sums, False)):
                name = manager.add_request(prompt(5), steering=profile)
                assert collect(manager, 1)[name].generated_tokens == truth(prompt(5), profile)
                assert (manager.batch_processor.inputs_and_outputs.graphs is captured) == same
    torch._dynamo.reset()
    assert rounds[0] > 0
    assert rounds == rounds[:1] * 4


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_before_anything_runs(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    one = make_profile(llama, seed=1, positions="response", threshold=-1.5)
    by_token = make_profile(llama, seed=2, kind="token")
    whole = make_profile(llama, seed=2, positions="all")
    ahead = make_profile(llama, seed=2, sensor=2, layers=[1, 3], positions="response")
    foreign = make_profile(make_family_model("Llama", hidden_size=16, head_dim=4))
    some = prompts()[:3]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steering": by_token}, "steering: expected an always or prompt gate with continuous batching"),
        ({"steering": [None, one, whole]}, "expected positions='response' .* got positions='all'"),
        ({"steering": ahead}, "got layers steered before the sensor"),
        ({"steering": [one, None]}, "steering: expected 3 entries, one per request, got 2"),
        ({"steering": [one] * 4}, "steering: expected 3 entries, one per request, got 4"),
        ({"steering_strength": [1.0, 1.0]}, "steering: expected 3 entries, one per request, got 2"),
        ({"steering": []}, "steering: expected one entry per sequence, got an empty list"),
        ({"steering_strength": float("nan")}, r"steering_strength\[0\]: expected a finite number, got nan"),
        ({"steering_strength": [1.0, float("inf"), 1.0]}, r"steering_strength\[1\]: expected a finite number, got inf"),
        ({"steering": [None, None, foreign]}, r"steering\[2\]: .*hidden size 16"),
        ({"steering": "profile.safetensors"}, r"steering: expected a profile, .* got str"),
    ]
    calls: list[int] = []
    with steered(llama, one), managed(llama) as manager:
        handle = llama.register_forward_hook(lambda *_: calls.append(1))
        for options, message in wrong:
            with pytest.raises(SteerfastError, match=message):
                llama.generate_batch(some, **configured(), **options)
            with pytest.raises(SteerfastError, match=message):
                manager.add_requests(some, **options)
        assert not calls
        handle.remove()
        name = manager.add_request(some[0])
        assert collect(manager, 1)[name].generated_tokens == truth(some[0], one)
        assert not manager.steerfast_given
    for profile, message in ((by_token, "got a token gate"), (whole, "got positions='all'")):
        with steered(llama, profile):
            with pytest.raises(SteerfastError, match=message):
                llama.generate_batch(some, **configured())
            got = answers(llama.generate_batch(some, **configured(), steering=[one, None, one]))
            assert got == [truth(ids, p) for ids, p in zip(some, [one, None, one], strict=True)]


def test_managers_of_another_steering(llama: Any, truth: Truth, make_profile: MakeProfile) -> None:
    one = make_profile(llama, seed=1, positions="response", threshold=-1.5)
    with managed(llama) as before, steered(llama, one):
        before.add_request(prompt(4), "before")
        output = collect(before, 1)["before"]
        assert "made while this steering is attached" in output.error
        assert not output.generated_tokens
    with steered(llama, one):
        after = llama.init_continuous_batching(**configured())
        after.start()
    try:
        with pytest.raises(SteerfastError, match="manager: expected one whose steering is attached"):
            after.add_request(prompt(4))
        with steered(llama, None), pytest.raises(SteerfastError, match="manager: expected one whose steering"):
            after.add_request(prompt(4))
    finally:
        after.stop(timeout=20, hard_stop=True)
    steering = steerfast.steer(llama, one)
    with managed(llama) as manager:
        held = Held(llama)
        manager.add_request(prompt(4), "runs")
        manager.add_request(prompt(30), "waits")
        held.reached()
        steering.detach()
        held.release()
        outputs = collect(manager, 2)
        assert all("got one that was detached" in output.error for output in outputs.values())
    got = answers(llama.generate_batch([prompt(4)], **configured()))
    assert got == [truth(prompt(4), None)]

"""What vLLM's model runners have in common, on a tiny random model: answers are those of transformers.

`test_runner_v2.py` runs these tests on model runner V2.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import Oracle

from steerfast.profile import SteeringProfile

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
BLOCK = 32
TOKENS = 8
TURN = 7  # opens a user turn
CLEAR = 2e-3  # the least margin, of logits and of scores, by which a token or a gate is decided
OPTIONS = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
    "block_size": BLOCK,
}


@dataclass(frozen=True)
class Ask:
    """A request and its answer; names: the profiles on it, "a,b", or None."""

    prompt: tuple[int, ...]
    names: str | None
    tokens: tuple[int, ...]
    fired: tuple[bool, ...]
    scores: tuple[tuple[float, ...], ...]

    @property
    def extra(self) -> dict[str, Any]:
        return {"steering": self.names or "off"}


class World(Oracle):
    """The model in transformers and in a folder, the profiles, and what a server should answer."""

    def __init__(self, model: Any, profiles: dict[str, SteeringProfile], folder: Path) -> None:
        super().__init__(model)
        self.profiles, self.folder = profiles, folder
        self.asks: dict[tuple[tuple[int, ...], str | None], Ask | None] = {}
        for name, profile in profiles.items():
            profile.save(folder / f"{name}.safetensors")

    @property
    def files(self) -> dict[str, str]:
        return {name: str(self.folder / f"{name}.safetensors") for name in self.profiles}

    def ask(self, prompt: Sequence[int], names: str | None) -> Ask | None:
        """A request; None: its answer hangs on the last bits of a sum."""
        key = (tuple(prompt), names)
        if key not in self.asks:
            self.asks[key] = self._ask(*key)
        return self.asks[key]

    def _ask(self, prompt: tuple[int, ...], names: str | None) -> Ask | None:
        stack = [self.profiles[name] for name in (names or "").split(",") if name]
        if len(stack) > 1:
            tokens, scores = self.answer_of_stack(list(prompt), stack, (1.0,) * len(stack), TOKENS)
        else:
            answer = self.answer(list(prompt), stack[0] if stack else None, 1.0, TOKENS)
            if answer.margin < CLEAR:
                return None
            tokens, scores = answer.token_ids, [answer.scores] * len(stack)
        fired = []
        for profile, own in zip(stack, scores, strict=True):
            above = torch.tensor(own) - profile.threshold[profile.gate_layers]
            if len(above) and above.abs().min() < CLEAR:
                return None
            fired.append(bool((above > 0).any()) or profile.gate.kind == "always")
        return Ask(prompt, names, tuple(tokens), tuple(fired), tuple(tuple(each) for each in scores))


@pytest.fixture(scope="module")
def world(make_llama: Any, make_profile: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    model = make_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder / "model")

    def profile(seed: int, layers: list[int], **fields: Any) -> SteeringProfile:
        return make_profile(model, seed=seed, layers=layers, size=8.0, positions="response", **fields)

    always = profile(4, [2], kind="always")
    profiles = {
        "own": profile(1, [1, 3]),
        "sensor": profile(2, [2, 4], sensor=1),
        "mean": profile(3, [1, 3], pooling="mean"),
        "recent": profile(7, [2, 4], sensor=2, pooling="mean", window=5),
        "always": always,
        "everywhere": replace(profile(5, [1, 4], kind="always"), positions="all"),
        "short": replace(always, answer_tokens=5),
        "once": replace(profile(6, [1, 3]), answer_tokens=1),
        "turn": profile(8, [1, 3], pooling="both", mean_direction=(0.6, 0.8), turn=(TURN,), tail=2),
    }
    return World(model, profiles, folder)


@pytest.fixture
def start(engine: Callable[..., Any], world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function (asynchronous=False, directory=None, **options) -> an engine with all profiles."""

    def started(asynchronous: bool = False, directory: Path | None = None, **options: Any) -> Any:
        from vllm.platforms.cpu import CpuPlatform

        original = CpuPlatform.check_and_update_config.__func__

        def check_and_update_config(cls: Any, vllm_config: Any) -> None:
            original(cls, vllm_config)
            vllm_config.scheduler_config.async_scheduling = asynchronous  # which it turns off

        monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
        steering = {"profiles": world.files} if directory is None else {
            "profiles": {"tone": str(directory / "always.safetensors"), **world.files}, "directory": str(directory)
        }  # fmt: skip
        llm = engine(steering, model=str(world.folder / "model"), **{**OPTIONS, **options})
        assert hasattr(core_of(llm).model_executor.driver_worker.worker.model_runner, "_preprocess") != V2
        assert type(core_of(llm).scheduler).__name__ == ("AsyncScheduler" if asynchronous else "Scheduler")
        return llm

    return started


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def prompts(seed: int, lengths: Iterable[int], beginning: Sequence[int] = ()) -> list[list[int]]:
    """Random tokens after `beginning`; in the midst of longer ones a user turn begins."""
    rng = random.Random(seed)
    made = [[rng.randrange(3, 128) for _ in range(length)] for length in lengths]
    for ids in made:
        if len(ids) > 5:
            ids[len(ids) // 2] = TURN
    return [[*beginning, *ids] for ids in made]


class Client:
    """Asks an engine, and steps it."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.outputs: dict[str, Any] = {}
        self.count = 0

    def add(self, prompt: Sequence[int], extra: dict[str, Any]) -> str:
        from vllm import SamplingParams

        name = str(self.count)
        self.count += 1
        parameters = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra
        )
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, parameters)
        return name

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            if self.engine.has_unfinished_requests():
                self.outputs.update({each.request_id: each for each in self.engine.step() if each.finished})

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def answer(self, name: str) -> tuple[int, ...]:
        return tuple(self.outputs[name].outputs[0].token_ids)

    def check(self, name: str, ask: Ask) -> None:
        assert self.answer(name) == ask.tokens, ask
        steering = self.outputs[name].steering
        if ask.names is None:
            assert steering is None
            return
        reports = steering if isinstance(steering, list) else [steering]
        assert [report["profile"] for report in reports] == ask.names.split(",")
        assert tuple(report["fired"] for report in reports) == ask.fired, ask
        for report, scores in zip(reports, ask.scores, strict=True):
            assert report["scores"] == pytest.approx(scores, rel=1e-4, abs=1e-4), ask


def check_idle(llm: Any) -> None:
    """Nobody holds anything."""
    scheduler = core_of(llm).scheduler
    assert [version.requests for version in scheduler.steerfast.registry.versions() if version.requests] == []
    assert not scheduler.steerfast.registry.spoilt
    assert not scheduler.steerfast._unnamed
    assert not scheduler.steerfast._unreported
    assert scheduler.kv_cache_manager.usage == 0


@pytest.fixture(scope="module")
def mixture(world: World) -> list[Ask]:
    """Requests of every profile, of stacks and of nobody."""
    names = [None, *world.profiles, "own,always", "mean,short"]
    texts = prompts(1, [1, 5, 17, 33, 40, 75])
    asks = [world.ask(texts[(at + turn) % len(texts)], each) for turn in (0, 3) for at, each in enumerate(names)]
    clear = [ask for ask in asks if ask is not None]
    assert len(clear) > 0.8 * len(asks)
    fired = {(ask.names, gate) for ask in clear for gate in ask.fired}
    assert len({names for names, gate in fired if (names, not gate) in fired}) >= 2  # open for one, shut for another
    assert len({ask.tokens for ask in clear}) > len(clear) / 2
    return clear


@pytest.mark.parametrize("chunk", [256, 32])
def test_a_mixed_batch_is_answered_as_by_transformers(start, mixture, chunk) -> None:
    llm = start(max_num_batched_tokens=chunk)
    client = Client(llm)
    names = [client.add(ask.prompt, ask.extra) for ask in mixture]
    client.finish()
    for name, ask in zip(names, mixture, strict=True):
        client.check(name, ask)
    check_idle(llm)


def test_both_runners_are_checked_before_a_model_is_loaded(start, monkeypatch) -> None:
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    monkeypatch.delattr(ModelState, "preprocess_state")
    with pytest.raises(AttributeError, match=r"ModelState\.preprocess_state\(.*\) \(wrapped, V2: .*found none"):
        start()


@pytest.fixture(scope="module")
def conversations(world: World) -> list[Ask]:
    """First turns that begin alike, and second turns that follow from the answers to them."""
    beginning = prompts(2, [BLOCK])[0]
    firsts = prompts(3, [28, 30, 31, 29, 20], beginning)  # most answers need one more block
    seconds = [
        [*ask.prompt, *ask.tokens, *end]
        for first, end in zip(firsts, prompts(4, [3, 1, 5, 2, 4]), strict=True)
        if (ask := world.ask(first, "own")) is not None
    ]
    names = [None, "own", "sensor", "mean", "turn", "always", "everywhere", "short", "recent,own"]
    rng = random.Random(5)
    asks = [
        world.ask(prompt, names[(at + turn) % len(names)])
        for at, prompt in enumerate(firsts + seconds)
        for turn in (0, 1)
    ]
    clear = [ask for ask in asks if ask is not None]
    rng.shuffle(clear)
    assert len(clear) >= 12
    return clear


def told_apart(world: World, conversations: Sequence[Ask]) -> list[int]:
    """Return a prompt that two profiles answer differently."""
    for ask in conversations:
        one, other = (world.ask(ask.prompt, name) for name in ("own", "always"))
        if one is not None and other is not None and one.tokens != other.tokens:
            return ask.prompt
    raise AssertionError("expected a prompt that both profiles answer, each differently")


@pytest.mark.parametrize(
    ("asynchronous", "rounds"),
    [
        pytest.param(False, 1, id="sync"),
        pytest.param(True, 1, id="async"),
        pytest.param(False, 8, id="soak", marks=pytest.mark.slow),
        pytest.param(True, 8, id="async-soak", marks=pytest.mark.slow),
    ],
)
def test_requests_come_go_wait_and_change_in_a_cache_too_small(
    start, world, conversations, tmp_path, monkeypatch, asynchronous, rounds
):
    """Requests share blocks, are preempted and resumed, and are left by clients, while a profile changes."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: Counter[bool] = Counter()
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted[request.steerfast is not None and request.steerfast.decided] += 1
        original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    for name in ("always", "own"):
        world.profiles[name].save(tmp_path / f"{name}.safetensors")
    llm = start(asynchronous, tmp_path, num_gpu_blocks_override=7)
    core, client, rng, left = core_of(llm), Client(llm), random.Random(6), []
    tone = told_apart(world, conversations)
    versions = {client.add(tone, {"steering": "tone"}): world.ask(tone, "always")}
    asked = {}
    for number, ask in enumerate(rounds * conversations):
        asked[client.add(ask.prompt, ask.extra)] = ask
        if number % 5 == 1:
            left.append(client.add(ask.prompt, ask.extra))
        if number % 4 == 2:
            version = ("own", "always")[number // 4 % 2]
            core.steerfast_replace("tone", f"{version}.safetensors")
            versions[client.add(tone, {"steering": "tone"})] = world.ask(tone, version)
        client.step(rng.randrange(4))
        if left and number % 5 == 3:
            client.engine.abort_request([left[-1]])
    client.finish()
    for name, ask in asked.items():
        client.check(name, ask)
    for name, ask in versions.items():
        assert client.answer(name) == ask.tokens
        assert client.outputs[name].steering["profile"] == "tone"
    assert len({ask.tokens for ask in versions.values()}) == 2
    assert preempted[True] >= 2, preempted
    assert sum(output.num_cached_tokens for output in client.outputs.values()) >= 5 * BLOCK
    check_idle(llm)
    launches = count_launches(core, monkeypatch)
    client.add(prompts(7, [40])[0], {"steering": "own"})
    client.finish()
    # Layer 0 is declared, but no loaded profile acts there. Gates are launched with the prompt alone.
    assert launches == {
        **{("score", layer): 1 for layer in (1, 2, 3)},
        **{("steer", at): TOKENS for at in (1, 2, 3, 4)},
    }


def count_launches(core: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Return the launches of each layer, counted from now on."""
    from steerfast.runtime import step
    from steerfast.vllm import worker

    launches: Counter[tuple[str, int]] = Counter()
    runtime = core.model_executor.driver_worker.worker.model_runner.steerfast
    serve, steer, score = runtime.serve, worker.steer_unchecked_, step.score_unchecked_
    layer = [-1]

    def served(stream: Any, addend: Any, at: int) -> None:
        layer[0] = at
        serve(stream, addend, at)

    def steered(*args: Any) -> None:
        launches["steer", layer[0]] += 1
        steer(*args)

    def scored(*args: Any) -> None:
        launches["score", layer[0]] += 1
        score(*args)

    monkeypatch.setattr(runtime, "serve", served)
    monkeypatch.setattr(worker, "steer_unchecked_", steered)
    monkeypatch.setattr(step, "score_unchecked_", scored)
    return launches


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_drafts_are_steered_as_any_row(start, world, mixture, monkeypatch, asynchronous) -> None:
    """The drafter is not steered, so that drafts are accepted and rejected. Edits end at their row in any case."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: Counter[str] = Counter()
    original = Scheduler.make_spec_decoding_stats

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(drafted=kwargs["num_draft_tokens"], accepted=kwargs["num_accepted_tokens"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "make_spec_decoding_stats", count)
    drafts = {"method": "draft_model", "model": str(world.folder / "model"), "num_speculative_tokens": 3}
    llm = start(asynchronous, speculative_config=drafts, max_num_batched_tokens=48)
    client = Client(llm)
    names = [client.add(ask.prompt, ask.extra) for ask in mixture]
    client.finish()
    for name, ask in zip(names, mixture, strict=True):
        client.check(name, ask)
    assert 0 < seen["accepted"] < seen["drafted"], seen
    check_idle(llm)

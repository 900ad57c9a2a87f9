"""Prefix caching under steering is exact: vLLM's engine core and schedulers over a stand-in for the workers.

The stand-in computes no model. A row's keys and values are a number that depends on all that the real ones depend on:
the tokens up to the row, and which of these rows were edited by whom. It reads earlier rows where the block table says
that they lie, so that a block which was shared wrongly shows at once.
"""

from __future__ import annotations

import json
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from answers import always, gated
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, EngineCoreRequestType, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput

from steerfast.profile import Gate
from steerfast.runtime.span import Entry, Stack
from steerfast.vllm import compat
from steerfast.vllm.assignment import stack_from_extra
from steerfast.vllm.engine import EngineSteering

BLOCK = 4
WINDOW = 6  # no whole blocks
TURN = (1, 0, 0)
LONGEST = 64
VOCABULARY = 2  # so that prompts and answers are often alike

Decide = Callable[[int, tuple[int, ...]], bool]


# Hashes below are of numbers, which are the same in every process.
def decide(slot: int, prompt: tuple[int, ...]) -> bool:
    """Whether the gate opens."""
    return hash((slot, *prompt, 7)) % 2 == 0


def chain(tokens: list[int], prompt: int, stack: Stack, fired: Sequence[bool]) -> list[int]:
    """Keys and values of all rows of one request, computed afresh."""
    rows, before = [], 0
    for number, token in enumerate(tokens):
        edits = [
            (entry.slot, entry.strength)
            for entry, opened in zip(stack, fired, strict=True)
            if opened and entry.strength and (number >= prompt - 1 or not entry.span.after_prompt)
        ]
        before = hash((before, token, *edits))
        rows.append(before)
    return rows


@dataclass
class Served:
    """A request as a worker knows it."""

    tokens: list[int]
    prompt: int
    blocks: list[int]
    stack: Stack
    fired: list[bool] | None = None
    reported: bool = False
    counted: int = 0  # rows of its prompt up to which it has been in steps


class Workers:
    """An executor whose workers keep requests, latches and blocks like the real ones."""

    def __init__(self, decide: Decide) -> None:
        self.decide = decide
        self.requests: dict[str, Served] = {}
        self.memory: dict[tuple[int, int], int] = {}
        self.cleared: list[int] = []
        self._ready: Future[Any] | None = None

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "steerfast_clear":
            self.cleared.extend(args)
        return [None]

    def execute_model(self, scheduled: Any, non_block: bool = False) -> Future[Any]:
        output = self._execute(scheduled)
        self._ready = Future()
        self._ready.set_result(output)
        future: Future[Any] = Future()
        future.set_result(output if not scheduled.total_num_scheduled_tokens else None)
        return future

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Any:
        assert self._ready is not None
        return self._ready if non_block else self._ready.result()

    def _execute(self, scheduled: Any) -> ModelRunnerOutput:
        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        past = {}
        for new in scheduled.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args or {}).get("steerfast")
            stack = () if extra is None else stack_from_extra(extra)
            prompt = list(new.prompt_token_ids)
            self.requests[new.req_id] = Served(prompt, len(prompt), list(new.block_ids[0]), stack)
            past[new.req_id] = new.num_computed_tokens
        known = scheduled.scheduled_cached_reqs
        for name, blocks, computed in zip(known.req_ids, known.new_block_ids, known.num_computed_tokens, strict=True):
            request, past[name] = self.requests[name], computed
            if name in known.resumed_req_ids:
                request.blocks = []
            request.blocks += blocks[0] if blocks else []
            if name in known.all_token_ids:
                request.tokens = list(known.all_token_ids[name])
        names = list(scheduled.num_scheduled_tokens)
        sampled, decided = [], {}
        for name in names:
            tokens, decision = self._rows(self.requests[name], past[name], scheduled.num_scheduled_tokens[name])
            sampled.append(tokens)
            if decision is not None:
                decided[name] = decision
        output = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled)
        if decided:
            output.steerfast = decided
        return output

    def _rows(self, request: Served, past: int, count: int) -> tuple[list[int], Any]:
        decision, stack, last = None, request.stack, request.prompt - 1
        means = [entry.span.read(request.prompt, request.tokens[: request.prompt]) for entry in stack]
        if request.fired is None and (firsts := [rows.first for rows in means if rows.until]):
            assert past <= max(request.counted, min(firsts)), "rows whose mean is read came from a cache"
        request.counted = max(request.counted, min(past + count, request.prompt))
        if stack and past <= last < past + count and not request.reported:
            request.fired, request.reported = fired_of(stack, request.tokens[: request.prompt], self.decide), True
            decision = [
                ([], []) if entry.span.open else ([float(fired)], [0.25])
                for entry, fired in zip(stack, request.fired, strict=True)
            ]
        assert past + count <= len(request.tokens), "a token that nobody sampled"
        fired = request.fired or [entry.span.open for entry in stack]
        rows = chain(request.tokens, request.prompt, stack, fired)
        if past:
            assert not stack or past <= last or request.fired is not None, "the deciding row came from a cache"
            at = request.blocks[(past - 1) // BLOCK], (past - 1) % BLOCK
            assert self.memory[at] == rows[past - 1], "what the cache holds is not what this request would compute"
        for number in range(past, past + count):
            self.memory[request.blocks[number // BLOCK], number % BLOCK] = rows[number]
        if past + count < len(request.tokens):
            return [], decision
        request.tokens.append(_sampled(rows[-1]))
        return request.tokens[-1:], decision


def fired_of(stack: Stack, prompt: list[int], decide: Decide) -> list[bool]:
    """Whether each profile edits."""
    return [entry.span.open or decide(entry.slot, tuple(prompt)) for entry in stack]


def _sampled(row: int) -> int:
    return hash((row, 11)) % VOCABULARY


@dataclass
class Asked:
    """What a client asked for and what it got so far."""

    prompt: list[int]
    profile: str | None
    strength: float
    count: int
    answer: list[int] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    cached: int | None = None
    over: bool = False


class Engine:
    """vLLM's EngineCore, without what loads a model."""

    def __init__(self, vllm_config: Any, *, ahead: bool, blocks: int, decide: Decide = decide) -> None:
        core = self.core = object.__new__(EngineCore)
        config = vllm_config.cache_config
        config.block_size, config.num_gpu_blocks = BLOCK, blocks
        vllm_config.scheduler_config.async_scheduling = ahead
        groups = [
            KVCacheGroupSpec(
                ["layer"], FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
            )
        ]
        grammars = SimpleNamespace(accept_tokens=lambda *_: True, should_advance=lambda *_: False)
        core.structured_output_manager = grammars
        core.vllm_config, core.log_stats, core._weight_version = vllm_config, False, "default"
        core.scheduler = (AsyncScheduler if ahead else Scheduler)(
            vllm_config, KVCacheConfig(blocks, [], groups), grammars, block_size=BLOCK, hash_block_size=BLOCK
        )
        core.model_executor = self.workers = Workers(decide)
        core.mm_receiver_cache, core.is_pooling_model, core.is_mm_encoder_only = None, False, False
        core.check_for_draft_tokens, core.async_scheduling = False, ahead
        core.is_ec_consumer = True  # vLLM 0.26: no other process encodes images
        core.batch_queue_size, core.aborts_queue = 2, queue.Queue()
        core.batch_queue = deque(maxlen=2) if ahead else None
        core.step_fn = core.step_with_batch_queue if ahead else core.step
        core.request_block_hasher = None
        if config.enable_prefix_caching:
            hashes = get_hash_fn_by_name("sha256")
            init_none_hash(hashes)
            following = getattr(vllm_config, "num_hash_lookahead_tokens", 0)  # tokens that names cover, too
            core.request_block_hasher = get_request_block_hasher(BLOCK, hashes, *([following] if following else []))
        self.asked: dict[str, Asked] = {}
        self.preempted: set[str] = set()

    @property
    def steering(self) -> Any:
        return self.core.scheduler.steerfast

    def add(self, asked: Asked) -> str:
        name = f"request {len(self.asked)}"
        extra: dict[str, Any] = {"other": 1}
        if asked.profile is not None:
            extra["steering"] = asked.profile
        if asked.strength != 1:
            extra["steering_strength"] = asked.strength
        parameters = SamplingParams(temperature=0, max_tokens=asked.count, ignore_eos=True, extra_args=extra)
        request, wave = self.core.preprocess_add_request(
            EngineCoreRequest(name, list(asked.prompt), None, parameters, None, 0.0, None, None, None)
        )
        assert extra.keys() <= {"other", "steering", "steering_strength"}, "a client's own parameters stay as they were"
        self.core.add_request(request, wave)
        self.asked[name] = asked
        return name

    def step(self) -> None:
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        for output in outputs[0].outputs if outputs and 0 in outputs else ():
            asked = self.asked[output.request_id]
            if output.prefill_stats is not None:
                asked.cached = output.prefill_stats.num_cached_tokens
            if output.trace_headers is not None:
                asked.reports += json.loads(output.trace_headers["steerfast"])
            asked.answer += output.new_token_ids
            asked.over |= output.finish_reason is not None

    def finish(self) -> None:
        for _ in range(3000):
            if not (self.core.scheduler.has_requests() or self.core.batch_queue):
                break
            self.step()
        else:
            pytest.fail("requests that never end")

    def check_idle(self) -> None:
        """Nobody holds anything."""
        steering, manager = self.steering, self.core.scheduler.kv_cache_manager
        assert all(version.requests == 0 and version.current for version in steering.registry.versions())
        assert not steering.registry.spoilt
        assert not steering._unnamed
        assert not steering._unreported
        assert "cache_blocks" not in vars(manager.coordinator)
        assert manager.usage == 0


PROFILES = {
    "gate": replace(gated(1), gate=Gate()),
    "gate-two": replace(gated(2), gate=Gate()),
    "always": always(3),
    "whole": replace(always(4), positions="all"),
    "mean": replace(gated(6), gate=Gate(pooling="mean")),
    "recent": replace(gated(7), gate=Gate(pooling="mean", window=WINDOW)),
    "turn": replace(gated(8), gate=Gate(pooling="mean", turn=TURN, tail=1)),
}
STACKS = ["gate,gate-two", "gate-two,gate", "always,gate", "recent,gate", "gate,mean", "turn,recent", "whole,gate",
          "whole,always"]  # fmt: skip
OBSERVED = ["gate:observe", "mean:observe", "whole:observe", "whole:observe,gate", "whole,gate:observe",
            "always:observe,recent:observe"]  # fmt: skip
WHOLE = {
    **PROFILES,
    "whole-gate": replace(gated(5), gate=Gate(), positions="all"),
    "whole-mean": replace(PROFILES["mean"], positions="all"),
}


@pytest.fixture(scope="module")
def make(checkpoint: Path, saved: Any) -> Iterator[Callable[..., Engine]]:
    """A function (ahead=False, blocks=64, budget=11, caching=True, split=True) -> an engine."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    files = {True: saved(PROFILES), False: saved(WHOLE)}
    made: dict[Any, Any] = {}

    def engine(
        *,
        ahead: bool = False,
        blocks: int = 64,
        budget: int = 11,
        caching: bool = True,
        split: bool = True,
        **more: Any,
    ) -> Engine:
        key = budget, caching, split
        if key not in made:
            made[key] = EngineArgs(
                str(checkpoint), dtype="float32", enforce_eager=True, max_model_len=LONGEST, max_num_seqs=5,
                max_num_batched_tokens=budget, enable_prefix_caching=caching, enable_chunked_prefill=split,
                additional_config={"steerfast": {"profiles": files[split]}},
            ).create_engine_config()  # fmt: skip
        return Engine(made[key], ahead=ahead, blocks=blocks, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield engine


def truth(asked: Asked, stack: Stack, decide: Decide = decide) -> tuple[list[int], list[bool]]:
    """The answer, and which gates opened, with nothing cached."""
    tokens, prompt = list(asked.prompt), len(asked.prompt)
    fired = fired_of(stack, tokens, decide)
    while len(tokens) < min(prompt + asked.count, LONGEST):
        tokens.append(_sampled(chain(tokens, prompt, stack, fired)[-1]))
    return tokens[prompt:], fired


def expected(engine: Engine, asked: Asked, decide: Decide = decide) -> tuple[list[int], list[bool]]:
    stack = []
    for part in [] if asked.profile in (None, "off") else asked.profile.split(","):
        version = engine.steering.registry.current(part.removesuffix(":observe"))
        stack.append(Entry(version.slot, 0.0 if ":" in part else asked.strength, version.span))
    return truth(asked, tuple(stack), decide)


def check_answers(engine: Engine, decide: Decide = decide) -> None:
    for asked in engine.asked.values():
        answer, fired = expected(engine, asked, decide)
        if not asked.over:  # aborted
            assert asked.answer == answer[: len(asked.answer)]
            continue
        assert asked.answer == answer
        assert [report["fired"] for report in asked.reports] == fired


numbers = st.integers(0, 1000)
profiles = st.sampled_from([None, "off", *PROFILES, *STACKS, *OBSERVED])
asks = st.tuples(
    st.just("ask"), numbers, st.sampled_from([0, 0, 1, 3, 4, 5, 8]), profiles, st.sampled_from([1.0, 1.0, 2.0, 0.0]),
    st.integers(1, 14),
)  # fmt: skip
actions = st.one_of(
    asks, asks, asks,
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), numbers),
    st.tuples(st.just("reset"), st.booleans()),
)  # fmt: skip
STARTS = [[0] * 8, [0] * 7, [1] * 12, [0, 1] * 6, [0], [1], [0, 0, 1, 1] * 5, [0] * 20]


def play(engine: Engine, script: list[Any], names: list[str | None]) -> None:
    """Ask, step, abort and reset, with prompts that go on from earlier ones and their answers."""
    for action in script:
        if action[0] == "ask":
            _, number, longer, profile, strength, count = action
            earlier = [asked.prompt + asked.answer for asked in engine.asked.values()]
            before = (STARTS + earlier)[number % (len(STARTS) + len(earlier))]
            prompt = (before + [(number >> bit) & 1 for bit in range(longer)])[: LONGEST - 20]
            profile = names[number % len(names)] if profile not in names else profile
            strength = 1.0 if profile in (None, "off") else strength
            engine.add(Asked(prompt, profile, strength, count))
        elif action[0] == "step":
            for _ in range(action[1]):
                if engine.core.scheduler.has_requests() or engine.core.batch_queue:
                    engine.step()
        elif action[0] == "abort" and engine.asked:
            engine.core.abort_requests([list(engine.asked)[action[1] % len(engine.asked)]])
        elif action[0] == "reset":
            engine.core.reset_prefix_cache(reset_running_requests=action[1])


@pytest.mark.slow(but=["few blocks-async", "many blocks-sync"])
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("blocks", [LONGEST // BLOCK + 2, 64], ids=["few blocks", "many blocks"])  # one request fits
@settings(max_examples=80)
@given(script=st.lists(actions, min_size=5, max_size=40))
def test_what_is_cached_is_what_would_be_computed(make: Any, ahead: bool, blocks: int, script: list[Any]) -> None:
    engine = make(ahead=ahead, blocks=blocks)
    play(engine, script, [None, "off", *PROFILES, *STACKS, *OBSERVED])
    engine.finish()
    check_answers(engine)
    engine.check_idle()


@pytest.mark.slow(but=["async"])
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@settings(max_examples=40)
@given(script=st.lists(actions, min_size=5, max_size=40))
def test_profiles_that_edit_whole_prompts(make: Any, ahead: bool, script: list[Any]) -> None:
    engine = make(ahead=ahead, blocks=24, budget=LONGEST, split=False)
    names = ["whole", "whole-gate", "whole-mean", "gate", "gate,whole", "whole-mean,gate", None]
    observed = ["whole-gate:observe", "whole-mean:observe,whole", "whole-gate,whole-mean:observe"]
    play(engine, script, [*names, *observed])
    engine.finish()
    check_answers(engine)
    engine.check_idle()


@pytest.mark.slow(but=["async"])
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@settings(max_examples=40)
@given(script=st.lists(asks, min_size=5, max_size=30))
def test_where_gates_stay_shut_as_much_is_shared_as_if_nobody_steered(
    make: Any, ahead: bool, script: list[Any]
) -> None:
    def shut(slot: int, prompt: tuple[int, ...]) -> bool:
        return False

    steered, plain = make(ahead=ahead, decide=shut), make(ahead=ahead)
    for engine, names in ((steered, ["gate", "gate-two", "gate,gate-two"]), (plain, [None])):
        for ask in script:
            play(engine, [ask], names)
            engine.finish()  # who comes while others have yet to decide may miss the block that their prompt ends with
        engine.check_idle()
    check_answers(steered, shut)
    pairs = list(zip(steered.asked.values(), plain.asked.values(), strict=True))
    assert [(one.answer, one.cached) for one, _ in pairs] == [(other.answer, other.cached) for _, other in pairs]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("length", range(7, 14))
def test_how_much_of_a_turn_the_next_one_reads(make: Any, ahead: bool, length: int) -> None:
    def decide(slot: int, prompt: tuple[int, ...]) -> bool:
        return bool(prompt[0])

    engine = make(ahead=ahead, decide=decide)
    for first, profile, edited in ((0, "gate", False), (1, "gate", True), (0, "always", True), (1, None, False)):
        engine.core.reset_prefix_cache()
        turn = Asked([first, *(number % 2 for number in range(length - 1))], profile, 1.0, 9)
        engine.add(turn)
        engine.finish()
        following = [Asked([*turn.prompt, *turn.answer, 1], other, 1.0, 3) for other in ("gate-two", None, "always")]
        for asked in following:
            engine.add(asked)
            engine.finish()
        kept = length - 1 if edited else length + 9 - 1  # rows that no edit touched; nobody computed the last token's
        assert following[0].cached == kept // BLOCK * BLOCK
        assert [asked.cached for asked in following[1:]] == [(length + 9) // BLOCK * BLOCK] * 2
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("opens", [None, "gate", "gate-two"])
def test_a_stack_keeps_its_answer_to_itself_if_any_of_it_edits(make: Any, ahead: bool, opens: str | None) -> None:
    engine = make(ahead=ahead, decide=lambda slot, prompt: slot == (-1 if opens is None else slots[opens]))
    slots = {version.name: version.slot for version in engine.steering.registry.versions()}
    turn = Asked([0, 1, 1] * 3, "gate,gate-two", 1.0, 9)
    engine.add(turn)
    engine.finish()
    assert [report["fired"] for report in turn.reports] == [opens == "gate", opens == "gate-two"]
    following = Asked([*turn.prompt, *turn.answer, 1], None, 1.0, 2)
    engine.add(following)
    engine.finish()
    kept = len(turn.prompt) - 1 + (9 if opens is None else 0)  # rows without an edit
    assert following.cached == kept // BLOCK * BLOCK
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("profile", ["gate:observe", "always:observe", "whole:observe", "whole:observe,gate:observe"])
def test_what_is_observed_is_shared_as_if_nobody_steered(make: Any, ahead: bool, profile: str) -> None:
    engine = make(ahead=ahead, decide=lambda slot, prompt: True)
    turn = Asked([0, 1, 1] * 3, profile, 1.0, 9)
    for expected in (0, 8, 8):
        asked = replace(turn, answer=[], reports=[])
        engine.add(asked)
        engine.finish()
        assert asked.cached == expected
        assert [(report["action"], report["fired"]) for report in asked.reports] == [("observe", True)] * (
            profile.count(",") + 1
        )
    following = Asked([*turn.prompt, *asked.answer, 1], None, 1.0, 2)
    engine.add(following)
    engine.finish()
    assert following.cached == (len(turn.prompt) + 9) // BLOCK * BLOCK
    check_answers(engine, lambda slot, prompt: True)
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_rows_before_the_user_turn_are_shared(make: Any, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a prompt without a turn, whose mean is of all rows, is warned of once."""
    warned: list[str] = []
    monkeypatch.setattr("steerfast.vllm.engine._log.warning", lambda form, *values: warned.append(form % values))
    engine, system, cached = make(ahead=ahead), [0, 1, 1] * 4, []
    for turn in ([*TURN, 1, 1, 0, 1], [*TURN, 0, 1, 0, 1, 0], [], [1]):
        asked = Asked([*system, *turn], "turn", 1.0, 2)
        engine.add(asked)
        engine.finish()
        cached.append(asked.cached)
    assert cached == [0, len(system) // BLOCK * BLOCK, 0, 0]
    assert len(warned) == 1
    assert "'request 2': prompt: expected a user turn" in warned[0]
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_a_stack_reads_what_all_of_its_gates_leave(make: Any, ahead: bool) -> None:
    engine = make(ahead=ahead)
    prompt = [0, 1, 1] * 4
    cached = []
    for profile in (None, "gate,recent", "recent,gate", "gate,mean", "whole,gate", "whole,gate"):
        asked = Asked(prompt, profile, 1.0, 2)
        engine.add(asked)
        engine.finish()
        cached.append(asked.cached)
    window = (len(prompt) - WINDOW) // BLOCK * BLOCK
    assert cached == [0, window, window, 0, 0, 0]
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_whole_prompts_are_shared_by_those_alike(make: Any, ahead: bool) -> None:
    engine = make(ahead=ahead)
    prompt = [0, 1, 1] * 4

    def cached(profile: str | None, strength: float = 1.0) -> int | None:
        asked = Asked(prompt, profile, strength, 2)
        engine.add(asked)
        engine.finish()
        return asked.cached

    assert [cached("whole"), cached("whole")] == [0, 8]
    assert [cached("whole", 2.0), cached("whole", 2.0)] == [0, 8]
    assert [cached(None), cached(None), cached("gate"), cached("always")] == [0, 8, 8, 8]
    assert cached("whole") == 8
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fires", [False, True])
def test_rows_whose_mean_is_read_are_computed(make: Any, ahead: bool, fires: bool) -> None:
    engine = make(ahead=ahead, decide=lambda slot, prompt: fires)
    prompt = [0, 1, 1] * 4

    def cached(profile: str | None, ids: list[int]) -> int | None:
        asked = Asked(ids, profile, 1.0, 2)
        engine.add(asked)
        engine.finish()
        return asked.cached

    for profile, found in (("mean", 0), ("recent", len(prompt) - WINDOW)):
        engine.core.reset_prefix_cache()
        assert [cached(one, prompt) for one in (None, profile, profile)] == [0, *[found // BLOCK * BLOCK] * 2]
        # Others find what it computed where its gate stayed shut, and else what it read of nobody's.
        engine.core.reset_prefix_cache()
        assert cached(profile, prompt) == 0
        edited = found // BLOCK * BLOCK if fires else 8
        assert [cached("gate", prompt), cached(None, prompt)] == [edited, 8]
    check_answers(engine, lambda slot, prompt: fires)
    engine.check_idle()


def test_no_client_can_choose_a_salt_of_ours(make: Any) -> None:
    engine = make()
    salts = []
    for salt in (None, "theirs"):
        parameters = SamplingParams(max_tokens=1, extra_args={"steering": "whole"})
        request = EngineCoreRequest("a", [0] * 9, None, parameters, None, 0.0, None, salt, None)
        made, _ = engine.core.preprocess_add_request(request)
        salts.append(made.cache_salt)
        engine.core.add_request(made)
        engine.asked["a"] = Asked([0] * 9, "whole", 1.0, 1)
        engine.finish()
    assert engine.steering._secret in salts[0]
    assert len(engine.steering._secret) == 32
    assert salts[1] == salts[0] + "theirs"
    assert make().steering._secret != engine.steering._secret


# -- ways in and out ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not compat.has("Scheduler.num_hash_lookahead_tokens"), reason="names of this version cover no more")
@pytest.mark.parametrize("following", [1, 3])
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_names_that_cover_the_tokens_after_a_block(
    make: Any, ahead: bool, following: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(ahead=ahead)
    monkeypatch.setattr(type(engine.core.vllm_config), "num_hash_lookahead_tokens", following)
    engine = make(ahead=ahead)
    assert engine.steering._ahead == following
    for length in range(1, 14):
        for profile in ("gate", "always", "gate-two,gate", None, "recent"):
            name = engine.add(Asked([number % 2 for number in range(length)], profile, 1.0, 9))
            # A block whose name waits for the next tokens is not one that waits for a decision.
            waits = engine.core.scheduler.requests[name] in engine.steering._unnamed
            assert profile == "recent" or not waits
            if length % 3:
                engine.finish()
    engine.finish()
    check_answers(engine)
    engine.check_idle()


def test_a_name_waits_for_a_decision_or_for_the_next_tokens(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    config, manager = replace(engine.steering.config, profiles={}), engine.core.scheduler.kv_cache_manager
    for version, following, waits in (("0.32.0", 0, True), ("0.33.0", 0, True), ("0.33.0", 1, False)):
        monkeypatch.setattr(compat, "_version", lambda version=version: version)
        scheduler = SimpleNamespace(
            hash_block_size=BLOCK,
            num_hash_lookahead_tokens=following,
            kv_cache_manager=manager,
            structured_output_manager=None,
        )
        steering = EngineSteering(config, engine.core.vllm_config, scheduler)
        request = type("Request", (), {"num_tokens": 2 * BLOCK, "block_hashes": [b"first"], "_block_hasher": len})()
        steering.enter(request)
        assert (request in steering._unnamed) == waits
        steering._forget_unnamed(request)


def held(engine: Engine) -> dict[str, int]:
    return {version.name: version.requests for version in engine.steering.registry.versions() if version.requests}


def test_requests_that_never_reach_the_scheduler_hold_nothing(make: Any) -> None:
    engine = make()
    engine.add(Asked([0] * 9, "gate", 1.0, 3))
    assert held(engine) == {"gate": 1}

    def again(name: str, **fields: Any) -> Any:
        parameters = SamplingParams(max_tokens=3, extra_args={"steering": "gate"})
        request = EngineCoreRequest(name, [0] * 8, None, parameters, None, 0.0, None, None, None, **fields)
        return engine.core.preprocess_add_request(request)

    made, wave = again("request 0")
    with pytest.raises(AssertionError, match="duplicate request id"):
        engine.core.add_request(made, wave)
    made, wave = again("x")
    made.request_id = 7
    with pytest.raises(TypeError, match="request_id must be a string"):
        engine.core.add_request(made, wave)
    with pytest.raises(ValueError, match=r"^resumable: expected a request whose prompt is complete"):
        again("session", resumable=True)
    for extra in ({"steering": "nobody"}, {"steerfast": {"slot": 2}}, {"steering_strength": float("nan")}):
        parameters = SamplingParams(max_tokens=3, extra_args={**extra})
        with pytest.raises(ValueError, match=r"^(steering|'steerfast'|steering_strength): expected "):
            engine.core.preprocess_add_request(
                EngineCoreRequest("y", [0], None, parameters, None, 0.0, None, None, None)
            )
    assert held(engine) == {"gate": 1}

    made, wave = again("gone at once", abort_immediately=True)
    engine.core.add_request(made, wave)
    assert held(engine) == {"gate": 1}
    engine.finish()
    engine.check_idle()


def test_requests_that_an_engine_turns_away_hold_nothing(make: Any) -> None:
    engine = make()
    proc = object.__new__(EngineCoreProc)  # the engine core of a server, without its sockets
    vars(proc).update(vars(engine.core), output_queue=queue.Queue(), shutdown_state=EngineShutdownState.RUNNING)

    def send(name: str) -> None:
        parameters = SamplingParams(max_tokens=3, extra_args={"steering": "gate"})
        made = proc.preprocess_add_request(
            EngineCoreRequest(name, [0] * 8, None, parameters, None, 0, None, None, None)
        )
        assert held(engine) == {"gate": 1}
        proc._handle_client_request(EngineCoreRequestType.ADD, made)

    def answers() -> list[EngineCoreOutput]:
        return proc.output_queue.get_nowait()[1].outputs

    pauses = hasattr(EngineCoreProc, "_reject_add_while_paused")
    proc.reject_new_requests = pauses
    if pauses:
        send("while it is paused")
        assert [output.finish_reason for output in answers()] == [FinishReason.ERROR]
        assert held(engine) == {}
        proc.reject_new_requests = False
    send("while it runs")
    assert held(engine) == {"gate": 1}
    proc._handle_client_request(EngineCoreRequestType.ABORT, ["while it runs"])
    assert held(engine) == {}
    proc.shutdown_state = EngineShutdownState.REQUESTED
    send("while it ends")
    assert [output.finish_reason for output in answers()] == [FinishReason.ABORT]
    assert held(engine) == {}
    engine.check_idle()


def test_a_grammar_that_cannot_be_compiled_holds_nothing(make: Any) -> None:
    engine = make()

    def grammar_init(request: Any) -> None:
        raise ValueError("no such grammar")

    engine.core.structured_output_manager.grammar_init = grammar_init
    from vllm.sampling_params import StructuredOutputsParams

    parameters = SamplingParams(
        max_tokens=3, extra_args={"steering": "gate"}, structured_outputs=StructuredOutputsParams(regex="a")
    )
    with pytest.raises(ValueError, match="no such grammar"):
        engine.core.preprocess_add_request(EngineCoreRequest("x", [0], None, parameters, None, 0.0, None, None, None))
    assert held(engine) == {}
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_a_request_may_end_in_the_step_that_decides(make: Any, ahead: bool) -> None:
    engine = make(ahead=ahead)
    for length in (3, 4, 5, 8):
        for profile in ("gate", "always", "whole"):
            engine.add(Asked([length % 2] * length, profile, 1.0, 1))
    engine.finish()
    check_answers(engine)
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_aborted_while_their_decision_is_on_its_way(make: Any, ahead: bool) -> None:
    engine = make(ahead=ahead)
    names = [engine.add(Asked([0, 1] * 4, profile, 1.0, 5)) for profile in ("gate", "gate-two", "always")]
    assert engine.steering._unnamed
    engine.core.abort_requests(names[:1])  # waiting
    engine.step()
    engine.core.abort_requests(names[1:])  # async: the step is out, its output is not
    assert held(engine) == {}
    engine.finish()
    assert not any(asked.over for asked in engine.asked.values())
    engine.check_idle()


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_siblings_share_parameters_that_nobody_writes_to(make: Any, ahead: bool) -> None:
    engine = make(ahead=ahead)
    shared = SamplingParams(max_tokens=4, ignore_eos=True, extra_args={"steering": "gate", "steering_strength": 2.0})
    for number in range(3):
        request = EngineCoreRequest(f"{number}_x", [0, 1, 1, 0], None, shared, None, 0.0, None, None, None)
        made, wave = engine.core.preprocess_add_request(request)
        assert made.sampling_params.extra_args["steerfast"][0]["strength"] == 2.0
        engine.core.add_request(made, wave)
        engine.asked[f"{number}_x"] = Asked([0, 1, 1, 0], "gate", 2.0, 4)
    assert shared.extra_args == {"steering": "gate", "steering_strength": 2.0}
    assert held(engine) == {"gate": 3}
    engine.finish()
    check_answers(engine)
    engine.check_idle()


def test_engines_that_nobody_configured_are_as_they_were(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    idle = EngineArgs(str(checkpoint), max_model_len=LONGEST, max_num_seqs=5).create_engine_config()
    engine = Engine(idle, ahead=False, blocks=64)
    assert engine.steering is None
    asked = Asked([0] * 12, "whatever", 7.0, 9)  # nobody reads it
    engine.add(asked)
    request = engine.core.scheduler.requests["request 0"]
    assert request.steerfast is None
    assert len(request.block_hashes) == 3
    engine.finish()
    assert asked.answer == truth(asked, ())[0]
    assert asked.reports == []
    with pytest.raises(ValueError, match=r"^engine: expected one that steers"):
        engine.core.steerfast_profiles()

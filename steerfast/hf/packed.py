"""Steering under transformers' continuous batching: `generate_batch` and the managers behind it.

A manager schedules requests. Each forward pass is one packed sequence of some of their rows, and may be a captured
graph. So the tables of a step are written before the pass, and the steering finds them by the paged cache in the
pass's arguments. Only the manager's class changes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import SteerfastError
from steerfast.hf.compat import CONTINUOUS_BATCHING, check
from steerfast.hf.latch import Latch
from steerfast.profile import SteeringProfile
from steerfast.runtime.bank import Reach
from steerfast.runtime.batch import INHERIT, BatchRoster
from steerfast.runtime.roster import Request, Roster
from steerfast.runtime.span import Stack, Thought, slots_of

_ADDING = threading.Lock()
"""Held from the moment a request takes a slot until the slot counts as held."""

_CHILD = "__child#"  # transformers names further answers to a request by its name, this, and a number


class PackedSteps:
    """Keep the requests of one paged cache.

    Attributes:
        roster: their profiles and decisions.
        deciding: gates are launched in the current step.
        reach: the layers where profiles acted when graphs were captured.
    """

    def __init__(self, runs: PackedRuns, roster: Roster, deciding: bool) -> None:
        self.runs = runs
        self.roster = roster
        self.deciding = deciding
        self.reach: Reach = runs.roster.slots.reach

    @property
    def latch(self) -> Latch:
        """The decisions of all columns."""
        return Latch(self.roster.values, self.roster.scores, "", self.roster.stack)

    def decision(self, name: str, stack: int) -> Tensor:
        """Return values and scores of a request, float32 [2, layers, stack]; of an unknown request, shut gates."""
        layers = len(self.roster.values)
        closed = torch.tensor([[[0.0]], [[float("-inf")]]], dtype=torch.float32, device="cpu").repeat(1, layers, stack)
        decided = self.roster.decision(name)
        if decided is not None:
            width = min(stack, decided.shape[2])
            closed[..., :width] = decided[..., :width]
        return closed


class PackedRuns:
    """Keep the managers of continuous batching of one steered model.

    Attributes:
        managers: the managers with steered requests.
        steps: the requests of the manager that made the last step.
        last_requests: names of requests that were added together.
        attached: the model is steered.
    """

    def __init__(self, model: Any, roster: BatchRoster) -> None:
        self.model = model
        self.roster = roster
        self.managers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.steps: PackedSteps | None = None
        self.last_requests: list[Any] = []
        self.attached = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave managers out: they and their threads stay with the original."""
        return {name: value for name, value in vars(self).items() if name not in ("managers", "steps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, managers=weakref.WeakSet(), steps=None)

    def held(self) -> set[int]:
        """Return the slots of requests that have not ended."""
        return set().union(*(manager.steerfast_slots for manager in self.managers))

    def request(self, stack: Stack, ids: Sequence[int]) -> Request:
        """Return a request with the profiles of `stack` on a prompt."""
        request = Request(stack, len(ids), ids)
        if (thought := self.roster.thought) is not None and thought.over(ids):
            request.answer_from = len(ids)
        if not all(rows.found for rows in request.means):
            self.roster.warn_of_turns()
        return request

    def steps_of(self, cache: Any) -> PackedSteps:
        """Return the requests of a paged cache.

        Raises:
            SteerfastError: the cache's manager was made without this steering.
        """
        steps = getattr(cache, "steerfast_steps", None)
        if steps is None or steps.runs is not self:
            raise SteerfastError("cache: expected one of a manager that was made while this steering is attached")
        return steps


def is_paged(cache: Any) -> bool:
    """Return whether `cache` is the paged cache of continuous batching."""
    return cache is not None and not hasattr(cache, "get_seq_length")


def steered_manager(runs: PackedRuns, make: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return the manager that `model.init_continuous_batching` makes, with steered requests.

    Requests do not share cache blocks: with the same tokens, blocks differ if a profile edited some.

    Raises:
        SteerfastError: a persistent manager belongs to another steering, or to none.
    """
    from transformers import ContinuousBatchingConfig

    check(CONTINUOUS_BATCHING)
    cached = _persistent(runs.model)
    if cached is not None and getattr(cached, "steerfast_runs", None) is not runs:
        raise SteerfastError(
            "model: its persistent manager was made without this steering; call "
            "destroy_cached_continuous_batching_manager() first"
        )
    bound = inspect.signature(make).bind(*args, **kwargs)
    given = bound.arguments.get("continuous_batching_config")
    if given is None:
        generation = bound.arguments.get("generation_config") or getattr(runs.model, "generation_config", None)
        given = getattr(generation, "continuous_batching_config", None) or ContinuousBatchingConfig()
    config = copy.copy(given)
    config.allow_block_sharing = False
    if runs.roster.thought is not None:
        if config.use_async_batching:
            raise SteerfastError(
                "use_async_batching: expected False with thinking='skip', as a step begins before its token is known"
            )
        config.use_async_batching = False
    bound.arguments["continuous_batching_config"] = config
    manager = make(*bound.args, **bound.kwargs)
    if manager is not cached:
        manager.__class__ = _steered(type(manager))  # type: ignore[arg-type]
        manager.steerfast_runs = runs
        manager.steerfast_given = {}
        runs.managers.add(manager)
    return manager


def forget_manager(runs: PackedRuns) -> None:
    """Destroy the model's persistent manager if it belongs to `runs` and does not run."""
    model = runs.model
    cached = _persistent(model)
    if cached in runs.managers and not cached.is_running():
        model.destroy_cached_continuous_batching_manager()


def _persistent(model: Any) -> Any:
    return getattr(model, "_cached_continuous_batching_manager", None)


class _SteeredManager:
    steerfast_runs: PackedRuns
    steerfast_given: dict[str, Request]  # requests before their first step, and answers that will fork from one

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *args: Any,
        steering: SteeringProfile | Sequence[SteeringProfile] | None = INHERIT,
        steering_strength: float | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Add a request as the stock manager does, steered by `steering` (a profile, a stack or None).

        Their default: the profiles of `Steering.assigned`, or the model's profile.

        Raises:
            ProfileError, SteerfastError: as `Steering.assigned`. Also: packed steps cannot hold a profile, a request of
                this name still runs, or the steering was detached.
        """
        stack, strengths = (
            [given] if isinstance(given, (list, tuple)) else given for given in (steering, steering_strength)
        )
        return self._add([input_ids], request_id, stack, strengths, *args, **kwargs)[0]

    def add_requests(
        self,
        inputs: Sequence[list[int]],
        *args: Any,
        steering: SteeringProfile | Sequence[SteeringProfile | None] | None = INHERIT,
        steering_strength: float | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> list[str | None]:
        """Add requests with one profile and strength for all, or a list of them; errors as `add_request`."""
        names = self._add(inputs, None, steering, steering_strength, *args, **kwargs)
        self.steerfast_runs.last_requests = names
        return names

    def _add(
        self, inputs: Sequence[list[int]], name: str | None, steering: Any, strength: Any, *args: Any, **kwargs: Any
    ) -> list[str | None]:
        own: Any = self
        runs = self.steerfast_runs
        names = []
        self._refuse_detached()
        with _ADDING:
            given = runs.roster.of_requests(len(inputs), steering, strength)
            if own.distributed_helper.tp_size > 1 and {*given} - {runs.roster.own}:
                raise SteerfastError("steering: expected the model's own with tensor parallelism, got another")
            for ids, stack in zip(inputs, given, strict=True):
                if (request_id := name) is None:
                    with own._request_lock:
                        request_id = f"req_{own._request_counter}"
                        own._request_counter += 1
                answers = [request_id, *(f"{request_id}{_CHILD}{i}" for i in range(own.num_return_sequences - 1))]
                self._refuse_running(answers)
                self.steerfast_given.update((answer, runs.request(stack, ids)) for answer in answers)
                added = None
                try:
                    added = super().add_request(ids, request_id, *args, **kwargs)  # type: ignore[misc]
                finally:
                    if added is None:
                        for answer in answers:
                            self.steerfast_given.pop(answer, None)
                names.append(added)
        return names

    def _refuse_detached(self) -> None:
        if not self.steerfast_runs.attached:
            raise SteerfastError("manager: expected one whose steering is attached, got one that was detached")

    def _refuse_running(self, names: list[str]) -> None:
        """Raise SteerfastError if a request of these names still runs; drop the decisions of ended ones."""
        if running := self._scheduled().union(self.steerfast_given).intersection(names):
            raise SteerfastError(f"request_id: expected one of no request that still runs, got {min(running)!r}")
        if (steps := self._steps()) is not None:
            steps.roster.end(names)
            for name in names:
                steps.roster.forget(name)

    @property
    def steerfast_slots(self) -> set[int]:
        """Slots of requests that have not ended."""
        steps = self._steps()
        given = slots_of(request.stack for request in list(self.steerfast_given.values()))
        return given | (steps.roster.slots if steps else set())

    def _steps(self) -> PackedSteps | None:
        processor = getattr(self, "batch_processor", None)
        return None if processor is None else getattr(processor.cache, "steerfast_steps", None)

    def _scheduled(self) -> set[str]:
        """Requests that the scheduler knows."""
        processor = getattr(self, "batch_processor", None)
        if processor is None:
            return set()
        return {*processor.scheduler.active_requests, *processor.scheduler.waiting_requests}

    def _create_batch_processor(self) -> Any:
        own: Any = self
        processor = super()._create_batch_processor()  # type: ignore[misc]
        if not hasattr(processor.cache, "steerfast_steps"):
            runs = self.steerfast_runs
            bank = runs.roster.slots.bank(own.model.device)
            most = own.continuous_batching_config.max_requests_per_batch
            roster = Roster(bank, processor.max_batch_tokens, most)
            graphs = processor.model_runner.pad_inputs
            processor.cache.steerfast_steps = PackedSteps(runs, roster, deciding=graphs)
        return processor

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_generation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.steerfast_given.clear()
            if (steps := self._steps()) is not None:
                steps.roster.end(steps.roster.names)

    def _generation_step(self) -> None:
        own: Any = self
        runs, processor, steps = self.steerfast_runs, own.batch_processor, self._steps()
        assert steps is not None
        self._refuse_detached()
        runs.steps = steps
        io, roster = processor.inputs_and_outputs, steps.roster
        pairs = getattr(io, "io_pairs", None)
        batch = io if pairs is None else pairs[io.current_pair].host_io
        states = [(future.state, future.query_length) for future in batch.requests_in_batch]
        names = [state.request_id for state, _ in states]
        past = [state.position_offset - length for state, length in states]  # position_offset includes this step
        cached = dict(zip(names, past, strict=True))
        widened = self._widen(roster)
        # Forked answers begin now: the roster still knows the rows that their prompt's first answer has read.
        for state in [*(state for state, _ in states), *list(processor.scheduler.active_requests.values())]:
            if state.request_id not in roster:
                self._begin(roster, state, cached.get(state.request_id, state.position_offset))
        self._forget_gone(roster, self._scheduled().union(names))
        if (thought := runs.roster.thought) is not None:
            roster.end_thoughts(dict(_ended_thoughts(thought, [state for state, _ in states])))
        with _on_stream(own.model.device, io.compute_stream):
            deciding = roster.step(names, past, [length for _, length in states], batch.num_q_tokens)
        graphs = processor.model_runner.pad_inputs  # a graph holds the launches of gates always or never
        steps.deciding = deciding or graphs
        if graphs and (widened or steps.reach is not runs.roster.slots.reach):
            steps.reach = runs.roster.slots.reach
            for one in [io] if pairs is None else [pair.device_io for pair in pairs]:
                one.graphs = type(one.graphs)()
        super()._generation_step()  # type: ignore[misc]
        with _on_stream(own.model.device, io.compute_stream):
            roster.launched()

    def _widen(self, roster: Roster) -> bool:
        """Make room for the longest stack of the requests that begin; return whether addresses changed."""
        stack = max((len(request.stack) for request in list(self.steerfast_given.values())), default=1)
        stack = max(stack, len(self.steerfast_runs.roster.own))
        if stack <= roster.stack:
            return False
        roster.widen(stack)
        return True

    def _forget_gone(self, roster: Roster, alive: set[str]) -> None:
        """End requests that are over, and drop requests that were cancelled before their first step."""
        own: Any = self
        roster.end(roster.names - alive)
        if self.steerfast_given and _ADDING.acquire(blocking=False):  # otherwise some may be on their way to the queue
            try:
                alive = alive | {state.request_id for state in list(own.input_queue.queue)}
                for name in self.steerfast_given.keys() - alive:
                    if name.rpartition(_CHILD)[0] not in alive:
                        del self.steerfast_given[name]
            finally:
                _ADDING.release()

    def _begin(self, roster: Roster, state: Any, cached: int) -> None:
        """Add a request to the roster at its first step. Until then steerfast_given holds its slot.

        cached: rows that it already has; a fork has copies.
        """
        name = state.request_id
        length = state._true_initial_tokens or len(state.initial_tokens)
        runs = self.steerfast_runs
        given = self.steerfast_given.get(name) or runs.request(runs.roster.own, state.initial_tokens[:length])
        roster.add(name, given, name.rpartition(_CHILD)[0] if cached else None)
        self.steerfast_given.pop(name, None)


def _ended_thoughts(thought: Thought, states: Sequence[Any]) -> Iterator[tuple[str, int]]:
    """Yield the requests whose last token ends a thought, and the first row of the answer: the next."""
    for state in states:
        prompt = state._true_initial_tokens or len(state.initial_tokens)
        answer = [*state.initial_tokens[prompt:], *state.generated_tokens]
        if thought.after(answer[-len(thought.end) :]) is not None:
            yield state.request_id, prompt + len(answer)


def _on_stream(device: torch.device, stream: Any) -> Any:
    """Return a context of the steps' stream, which first waits for earlier work, such as profiles for the bank."""
    if stream is None:
        return nullcontext()
    devices = torch.get_device_module(device)
    stream.wait_stream(devices.current_stream(device))
    return devices.stream(stream)


@functools.cache
def _steered(base: type) -> type:
    """Return a subclass of `base`, a manager's class, with steered requests; the same class every time."""
    return type(base.__name__, (_SteeredManager, base), {"__module__": base.__module__})

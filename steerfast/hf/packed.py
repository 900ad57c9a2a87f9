"""Steering under transformers' continuous batching: `generate_batch` and the managers behind it.

A manager schedules requests of its own; each forward pass is one packed sequence of some of their rows, and may be a
captured graph. So the tables of a step are set up before the pass, and the steering finds them by the paged cache
that the pass is given. Only the manager's class changes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from steerfast.errors import SteerfastError
from steerfast.hf.latch import Latch
from steerfast.profile import SteeringProfile
from steerfast.runtime.roster import Request, Requests, reach
from steerfast.runtime.tables import UNSTEERED, Rows

if TYPE_CHECKING:
    from steerfast.hf.steering import Steering

__all__ = ["INHERIT", "PackedSteps", "forget_manager", "is_paged", "steered_manager", "steps_of"]

INHERIT: Any = object()
"""For an argument whose None means something: it was not given."""

_ADDING = threading.Lock()
"""Held while requests take slots, until these are known to be held."""

_CHILD = "__child#"  # what transformers puts between a request's name and the number of another answer to it


class PackedSteps:
    """The requests of one paged cache.

    Attributes:
        deciding: whether gates are launched in the current step.
        reach: what the steering could do when graphs were captured.
    """

    def __init__(self, steering: Steering, requests: Requests, deciding: bool) -> None:
        self.steering = steering
        self.requests = requests
        self.latch = Latch("", requests.values, requests.scores)
        self.deciding = deciding
        self.reach: Any = steering.reach
        self._rows: dict[int, Rows] = {}

    def rows(self, width: int) -> Rows:
        """Tables of a step of `width` rows, padding included."""
        if width not in self._rows:
            tables = self.requests.tables
            self._rows[width] = Rows(
                tables.rows[:width], tables.deciding, tables.slot, tables.member[:width], tables.total
            )
        return self._rows[width]


def is_paged(cache: Any) -> bool:
    """Whether a forward pass was given the blocks of continuous batching, and not a cache of its own sequences."""
    return cache is not None and not hasattr(cache, "get_seq_length")


def steps_of(cache: Any, steering: Steering) -> PackedSteps:
    """What `steering` keeps for a paged cache.

    Raises:
        SteerfastError: nothing, because its manager was made without this steering.
    """
    steps = getattr(cache, "steerfast_steps", None)
    if steps is None or steps.steering is not steering:
        raise SteerfastError("cache: expected one of a manager that was made while this steering is attached")
    return steps


def steered_manager(steering: Steering, make: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`model.init_continuous_batching`: a manager whose requests are steered.

    Requests do not share cache blocks: those of the same tokens differ where a profile edited some.

    Raises:
        SteerfastError: a persistent manager belongs to another steering, or to none.
    """
    from transformers import ContinuousBatchingConfig

    cached = _persistent(steering.model)
    if cached is not None and getattr(cached, "steerfast_steering", None) is not steering:
        raise SteerfastError(
            "model: its persistent manager was made without this steering; call "
            "destroy_cached_continuous_batching_manager() first"
        )
    bound = inspect.signature(make).bind(*args, **kwargs)
    given = bound.arguments.get("continuous_batching_config")
    if given is None:
        generation = bound.arguments.get("generation_config") or getattr(steering.model, "generation_config", None)
        given = getattr(generation, "continuous_batching_config", None) or ContinuousBatchingConfig()
    config = copy.copy(given)
    config.allow_block_sharing = False
    bound.arguments["continuous_batching_config"] = config
    manager = make(*bound.args, **bound.kwargs)
    if manager is not cached:
        manager.__class__ = _steered(type(manager))  # type: ignore[arg-type]
        manager.steerfast_steering = steering
        manager.steerfast_given = {}
        steering.managers.add(manager)
    return manager


def forget_manager(steering: Steering) -> None:
    """Destroy the model's persistent manager if its requests are steered by `steering` and none is running."""
    model: Any = steering.model
    cached = _persistent(model)
    if cached in steering.managers and not cached.is_running():
        model.destroy_cached_continuous_batching_manager()


def _persistent(model: Any) -> Any:
    return getattr(model, "_cached_continuous_batching_manager", None)


class _SteeredManager:
    steerfast_steering: Steering
    steerfast_given: dict[str, Request]  # requests that have not been in a step, and answers that will fork from some

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *args: Any,
        steering: SteeringProfile | None = INHERIT,
        steering_strength: float | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Add a request, steered by `steering` and `steering_strength`; all else as for the stock manager.

        Their default: what `Steering.assigned` says, or the model's own.

        Raises:
            ProfileError, SteerfastError: as `Steering.assigned`; a profile that packed steps cannot hold, a request of
                the same name that is not over, or the steering was detached.
        """
        return self._add([input_ids], request_id, steering, steering_strength, *args, **kwargs)[0]

    def add_requests(
        self,
        inputs: Sequence[list[int]],
        *args: Any,
        steering: SteeringProfile | Sequence[SteeringProfile | None] | None = INHERIT,
        steering_strength: float | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> list[str | None]:
        """Add requests, all steered alike or each by a profile and strength of its own; errors as `add_request`."""
        names = self._add(inputs, None, steering, steering_strength, *args, **kwargs)
        self.steerfast_steering.last_requests = names
        return names

    def _add(
        self, inputs: Sequence[list[int]], name: str | None, steering: Any, strength: Any, *args: Any, **kwargs: Any
    ) -> list[str | None]:
        own: Any = self
        handle = self.steerfast_steering
        names = []
        self._refuse_detached()
        with _ADDING:
            given = handle.of_requests(len(inputs), steering, strength)
            if own.distributed_helper.tp_size > 1 and {*given} - {handle.own}:
                raise SteerfastError("steering: expected the model's own with tensor parallelism, got another")
            for ids, (slot, factor) in zip(inputs, given, strict=True):
                if (request_id := name) is None:
                    with own._request_lock:
                        request_id = f"req_{own._request_counter}"
                        own._request_counter += 1
                answers = [request_id, *(f"{request_id}{_CHILD}{i}" for i in range(own.num_return_sequences - 1))]
                self._refuse_running(answers)
                self.steerfast_given.update((answer, self._request(slot, factor, len(ids))) for answer in answers)
                added = None
                try:
                    added = super().add_request(ids, request_id, *args, **kwargs)  # type: ignore[misc]
                finally:
                    if added is None:
                        for answer in answers:
                            self.steerfast_given.pop(answer, None)
                names.append(added)
        return names

    def _request(self, slot: int, strength: float, prompt_length: int) -> Request:
        profile = None if slot == UNSTEERED else self.steerfast_steering.profile_at(slot)
        return Request(slot, strength, prompt_length, *reach(profile))

    def _refuse_detached(self) -> None:
        if not self.steerfast_steering.attached:
            raise SteerfastError("manager: expected one whose steering is attached, got one that was detached")

    def _refuse_running(self, names: list[str]) -> None:
        """Names of requests that still run; of those that are over, what they decided is dropped."""
        if running := self._scheduled().union(self.steerfast_given).intersection(names):
            raise SteerfastError(f"request_id: expected one of no request that still runs, got {min(running)!r}")
        if (steps := self._steps()) is not None:
            steps.requests.end(names)
            for name in names:
                steps.requests.forget(name)

    @property
    def steerfast_slots(self) -> set[int]:
        """Slots of requests that have not ended."""
        steps = self._steps()
        given = {request.slot for request in list(self.steerfast_given.values())}
        return given | (steps.requests.slots if steps else set())

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
            bank = self.steerfast_steering.bank(own.model.device)
            most = own.continuous_batching_config.max_requests_per_batch
            requests = Requests(bank, processor.max_batch_tokens, most)
            graphs = processor.model_runner.pad_inputs
            processor.cache.steerfast_steps = PackedSteps(self.steerfast_steering, requests, deciding=graphs)
        return processor

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_generation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.steerfast_given.clear()
            if (steps := self._steps()) is not None:
                steps.requests.end(steps.requests.names)

    def _generation_step(self) -> None:
        own: Any = self
        steering, processor, steps = self.steerfast_steering, own.batch_processor, self._steps()
        assert steps is not None
        self._refuse_detached()
        steering.packed = steps
        io, requests = processor.inputs_and_outputs, steps.requests
        pairs = getattr(io, "io_pairs", None)
        batch = io if pairs is None else pairs[io.current_pair].host_io
        states = [(future.state, future.query_length) for future in batch.requests_in_batch]
        names = [state.request_id for state, _ in states]
        past = [state.position_offset - length for state, length in states]  # it counts this step's tokens already
        cached = dict(zip(names, past, strict=True))
        # Answers that forked begin now, while what their prompt's first answer has read is known.
        for state in [*(state for state, _ in states), *list(processor.scheduler.active_requests.values())]:
            if state.request_id not in requests:
                self._begin(requests, state, cached.get(state.request_id, state.position_offset))
        self._forget_gone(requests, self._scheduled().union(names))
        with _on_stream(own.model.device, io.compute_stream):
            deciding = requests.step(names, past, [length for _, length in states], batch.num_q_tokens)
        graphs = processor.model_runner.pad_inputs  # they hold the gates' launches always, or never
        steps.deciding = deciding or graphs
        if graphs and steps.reach is not (reach := steering.reach):
            steps.reach = reach
            for one in [io] if pairs is None else [pair.device_io for pair in pairs]:
                one.graphs = type(one.graphs)()
        super()._generation_step()  # type: ignore[misc]
        with _on_stream(own.model.device, io.compute_stream):
            requests.launched()

    def _forget_gone(self, requests: Requests, alive: set[str]) -> None:
        """End what is over, and drop what was cancelled before its first step."""
        own: Any = self
        requests.end(requests.names - alive)
        if self.steerfast_given and _ADDING.acquire(blocking=False):  # else some may be on their way to the queue
            try:
                alive = alive | {state.request_id for state in list(own.input_queue.queue)}
                for name in self.steerfast_given.keys() - alive:
                    if name.rpartition(_CHILD)[0] not in alive:
                        del self.steerfast_given[name]
            finally:
                _ADDING.release()

    def _begin(self, requests: Requests, state: Any, cached: int) -> None:
        """A request's first step. It stays in steerfast_given until it is among `requests`: its slot is held.

        cached: rows that it has; of one that forked, copies.
        """
        name = state.request_id
        length = state._true_initial_tokens or len(state.initial_tokens)
        given = self.steerfast_given.get(name) or self._request(*self.steerfast_steering.own, length)
        requests.add(name, given, name.rpartition(_CHILD)[0] if cached else None)
        self.steerfast_given.pop(name, None)


def _on_stream(device: torch.device, stream: Any) -> Any:
    """The stream that steps run on, after what others sent to the device before: profiles, for the bank."""
    if stream is None:
        return nullcontext()
    devices = torch.get_device_module(device)
    stream.wait_stream(devices.current_stream(device))
    return devices.stream(stream)


@functools.cache
def _steered(base: type) -> type:
    """`base`, a manager's class, whose requests are steered; the same class every time."""
    return type(base.__name__, (_SteeredManager, base), {"__module__": base.__module__})

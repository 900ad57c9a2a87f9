"""What runs in vLLM's engine core: the registry of profiles, who steers each request, and whose cache blocks are whose.

A request's blocks are named, by hashes, when they are full, and whoever has a block of the same name reads its keys and
values instead of computing them. Profiles edit rows from the prompt's last token on, and gates read that or some before
it, so that

- blocks that end before those are everybody's, like those of requests that nobody steers;
- blocks from there on wait for their names until the gate has decided. Where it stayed shut nothing was edited, and
  they get the names that they would have had. Else they get random ones, which nobody else asks for: not the next turn
  of the conversation either, whose earlier turns are to be read unedited. The request itself finds them again when it
  resumes.

Profiles that edit whole prompts give their requests a cache salt instead, which vLLM puts into all names.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.runtime.tables import NO_END
from steerfast.vllm import compat
from steerfast.vllm.assignment import Assignment, requested
from steerfast.vllm.compat import around
from steerfast.vllm.config import KEY, ServingConfig, check_name, identity_of, splits_prompts
from steerfast.vllm.registry import Registry, Version

__all__ = ["Steering", "inside", "install"]

Hasher = Callable[[Any], list[bytes]]
_NAME_BYTES = 32  # of a block


@dataclass(eq=False)
class _Held:
    """What a request that is steered holds: a version, and vLLM's way to name its blocks."""

    version: Version
    hasher: Hasher | None
    pending: bool = True


class Steering:
    """The part of one engine core that steers. But for `assign` and `own`, its busy loop alone may call it.

    Args:
        config, vllm_config: the engine's.
        scheduler: its scheduler.

    Attributes:
        registry: the profiles.
    """

    def __init__(self, config: ServingConfig, vllm_config: Any, scheduler: Any) -> None:
        self.config = config
        self.model = identity_of(vllm_config.model_config.hf_text_config)
        self.split = splits_prompts(vllm_config)
        self.registry = Registry(config.slots)
        self._block_size = scheduler.hash_block_size
        self._cache = scheduler.kv_cache_manager
        self._nameless: set[Any] = set()  # requests with a full block that has no name yet
        self._untold: dict[str, dict[str, Any]] = {}  # decisions that no output has carried yet
        self._secret = secrets.token_hex(16)  # so that no client can choose a salt of ours
        for name, path in config.profiles.items():
            profile = SteeringProfile.load(path)
            config.check(name, profile, self.model, split=self.split)
            self.registry.put(name, self.registry.take(), path, profile)

    # -- requests ------------------------------------------------------------------------------------------------------

    def assign(self, request: Any) -> Version | None:
        """Settle who steers an `EngineCoreRequest`, and write it where workers read it.

        Raises:
            ValueError: it asks for what it cannot have.
        """
        params = request.sampling_params
        if params is None:
            return None
        name, strength = requested(params.extra_args, self.config, self.registry.names)
        if name is None:
            return None
        if request.resumable:
            raise ValueError("resumable: expected a request whose prompt is complete, got a session that is steered")
        version = self.registry.hold(name)
        if request.mm_features and not (version.late or version.open):
            self.registry.release(version)
            raise ValueError(
                f"steering: expected text alone under profile {name!r}, which edits whole prompts, got more"
            )
        request.sampling_params = copy(params)  # siblings of a request with n > 1 share theirs
        reach = (version.late, version.open, version.answer_rows, version.mean)
        extra = Assignment(version.slot, strength, *reach).as_extra()
        request.sampling_params.extra_args = {**(params.extra_args or {}), KEY: extra}
        if not version.late:
            # Blocks of an answer that ceases to be steered are not those of a prompt that holds it.
            shared = version.open and version.answer_rows == NO_END
            alike = f"{version.checksum}:{strength!r}" if shared else request.request_id
            request.cache_salt = f"{KEY}:{self._secret}:{alike}:{request.cache_salt or ''}"
        return version

    def own(self, request: Any, version: Version) -> None:
        """Let a new `Request` hold `version`; take back the names of blocks that may be edited."""
        request.steerfast = _Held(version, request._block_hasher)
        if request._block_hasher is None or not version.late:
            return
        # The rows that its gates read have to be computed, whoever has them.
        del request.block_hashes[max(0, request.num_prompt_tokens - max(1, version.mean)) // self._block_size :]
        request._block_hasher = partial(_random_names, self._block_size)
        if version.open:
            request.update_block_hashes()

    def enter(self, request: Any) -> None:
        """A request that holds a version is about to be scheduled."""
        if request._block_hasher is None or len(request.block_hashes) == request.num_tokens // self._block_size:
            return
        # vLLM expects a name for every full block. A step seldom has a prompt that ends with a block and has yet to
        # decide, and this is called for every request of every step, so that only then it does more than vLLM's.
        self._nameless.add(request)
        self._cache.coordinator.cache_blocks = self._cache_named_blocks

    def leave(self, request: Any) -> None:
        """A request ended, or was never scheduled."""
        held, request.steerfast = request.steerfast, None
        if held is not None:
            self._named(request)
            self.registry.release(held.version)

    def decide(
        self, requests: Mapping[str, Any], decided: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    ) -> None:
        """Gates of these requests decided; the tokens of that step are not known yet."""
        for name, (values, scores) in decided.items():
            request = requests.get(name)
            held = None if request is None else request.steerfast
            if request is None or held is None or not held.pending:
                continue
            held.pending = False
            version = held.version
            if not version.open and not any(values):  # nothing is edited; a NaN is no zero
                request._block_hasher = held.hasher
            if request in self._nameless:
                request.update_block_hashes()
                self._named(request)
                self._cache.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
            fired = version.open or any(not value < 0.5 for value in values)
            in_band = any(score > end for score, end in zip(scores, version.abstain, strict=False))
            self._untold[name] = {
                "profile": version.name,
                "version": version.number,
                "fired": fired,
                "undecided": in_band and not fired,
                "scores": list(scores),
                "nan": any(map(math.isnan, scores)),
                "slots": self.registry.in_use,
            }

    def tell(self, requests: Mapping[str, Any], outputs: Mapping[int, Any]) -> None:
        """Let the first output of each request carry what was decided."""
        if not self._untold:
            return
        for client in outputs.values():
            for output in client.outputs:
                if (told := self._untold.pop(output.request_id, None)) is not None:
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: told}
        self._untold = {name: told for name, told in self._untold.items() if name in requests}

    def _cache_named_blocks(self, request: Any, num_computed_tokens: int) -> None:
        coordinator = self._cache.coordinator
        named = len(request.block_hashes) * self._block_size
        type(coordinator).cache_blocks(coordinator, request, min(num_computed_tokens, named))

    def _named(self, request: Any) -> None:
        self._nameless.discard(request)
        if not self._nameless:
            vars(self._cache.coordinator).pop("cache_blocks", None)

    # -- profiles ------------------------------------------------------------------------------------------------------

    def profiles(self) -> list[dict[str, Any]]:
        """All versions that have a slot, as plain data."""
        return [
            {
                "name": version.name,
                "version": version.number,
                "slot": version.slot,
                "file": os.path.basename(version.path),
                "checksum": version.checksum,
                "requests": version.requests,
                "current": version.current,
                "default": version.current and version.name == self.config.default,
            }
            for version in self.registry.versions()
        ]

    def load(self, executor: Any, name: str, file: str) -> None:
        """Load a profile under a new name.

        Raises:
            ValueError: the name is taken or can be none; or as `replace`.
        """
        if check_name(name) in self.registry.names:
            raise ProfileError(f"name: expected a new one, got {name!r}, which is loaded (replace it instead)")
        self._put(executor, name, file)

    def replace(self, executor: Any, name: str, file: str) -> None:
        """Give requests from now on another version of a profile.

        Raises:
            ValueError: there is no such name or file, or the profile does not fit this engine; nothing has changed.
        """
        self.registry.current(name)
        self._put(executor, name, file)

    def remove(self, executor: Any, name: str) -> None:
        """Let no new request name a profile.

        Raises:
            ValueError: there is no such name, or it is the default.
        """
        if name == self.config.default:
            raise ProfileError(f"name: expected another than the default, which can only be replaced, got {name!r}")
        self.registry.retire(name)
        self.sweep(executor)

    def sweep(self, executor: Any) -> None:
        """Empty slots that nobody uses any more."""
        for slot in list(self.registry.spoilt):
            executor.collective_rpc("steerfast_clear", args=(slot,))
            self.registry.free([slot])

    def _put(self, executor: Any, name: str, file: str) -> None:
        self.sweep(executor)
        path = inside(self.config.directory, file)
        profile = SteeringProfile.load(path)
        self.config.check(name, profile, self.model, split=self.split)
        slot = self.registry.take()
        try:
            answers = executor.collective_rpc("steerfast_write", args=(slot, path, profile.checksum))
            if refusals := [answer for answer in answers if answer is not None]:
                raise ProfileError(refusals[0])
        except BaseException:
            self.registry.spoil(slot)
            raise
        self.registry.put(name, slot, path, profile)
        self.sweep(executor)


def _random_names(block_size: int, request: Any) -> list[bytes]:
    """Names of a request's full blocks that have none, for nobody else to find."""
    missing = request.num_tokens // block_size - len(request.block_hashes)
    return [secrets.token_bytes(_NAME_BYTES) for _ in range(missing)]


def inside(directory: str | None, file: object) -> str:
    """The path of a profile's file in the configured directory, given its name alone.

    Raises:
        ProfileError: there is no directory; or the name is a path, has another ending, or leads elsewhere.
    """
    if directory is None:
        raise ProfileError(f"file: expected {KEY}.directory to be configured, from which files are taken, it is not")
    plain = (
        isinstance(file, str)
        and file.isprintable()
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not {"/", "\\", ":"} & {*file}
    )
    if not plain:
        raise ProfileError(f"file: expected the name of a .safetensors file in {directory}, got {str(file)[:80]!r}")
    path = os.path.join(directory, str(file))
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(directory) or not os.path.isfile(path):
        raise ProfileError(f"file: expected a file in {directory}, found none called {str(file)[:80]!r}")
    return path


# -- vLLM --------------------------------------------------------------------------------------------------------------


def steerfast_profiles(core: Any) -> list[dict[str, Any]]:
    """See `Steering.profiles`."""
    return _steering(core).profiles()


def steerfast_load(core: Any, name: str, file: str) -> None:
    """See `Steering.load`."""
    _steering(core).load(core.model_executor, name, file)


def steerfast_replace(core: Any, name: str, file: str) -> None:
    """See `Steering.replace`."""
    _steering(core).replace(core.model_executor, name, file)


def steerfast_remove(core: Any, name: str) -> None:
    """See `Steering.remove`."""
    _steering(core).remove(core.model_executor, name)


def _steering(core: Any) -> Steering:
    steering: Steering | None = core.scheduler.steerfast
    if steering is None:
        raise ProfileError("engine: expected one that steers, got one that was not configured for it")
    return steering


def install() -> None:
    """Let the engine cores of configured engines steer; those of others pass through."""
    compat.Request.steerfast = None  # a `_Held`, if somebody steers it
    compat.SchedulerInterface.steerfast = None  # a `Steering`, of an engine that steers
    for function in (steerfast_profiles, steerfast_load, steerfast_replace, steerfast_remove):
        setattr(compat.EngineCore, function.__name__, function)

    # The first that an engine core does with its configuration. (Its process calls this within EngineCore.__init__.)
    @around("EngineCore", "_initialize_kv_caches")
    def initialize(original: Any, self: Any, vllm_config: Any) -> Any:
        if ServingConfig.of(vllm_config) is None:
            return original(self, vllm_config)
        scheduler = vllm_config.scheduler_config.get_scheduler_cls()
        wrapped = ("update_from_output", "_free_request")
        own = issubclass(scheduler, compat.Scheduler)
        if not own or any(getattr(scheduler, name) is not getattr(compat.Scheduler, name) for name in wrapped):
            raise ValueError(f"{KEY}: expected vLLM's own scheduler, got {scheduler.__name__}")
        if not all(self.model_executor.collective_rpc("steerfast_steers")):
            raise ValueError(f"{KEY}: expected all workers to steer, some do not: is the plugin installed for all?")
        return original(self, vllm_config)

    @around("Scheduler", "__init__")
    def init_scheduler(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if (config := ServingConfig.of(vllm_config)) is not None:
            self.steerfast = Steering(config, vllm_config, self)

    # Where a request is read, in a thread of its own, so that hashing long prompts keeps no step waiting.
    @around("EngineCore", "preprocess_add_request")
    def preprocess(original: Any, self: Any, request: Any) -> Any:
        steering = self.scheduler.steerfast
        version = None if steering is None else steering.assign(request)
        if version is None:
            return original(self, request)
        try:
            made, wave = original(self, request)
            steering.own(made, version)
        except BaseException:
            steering.registry.release(version)
            raise
        return made, wave

    # From here on the scheduler has it, unless that refuses it, or takes it for a message to another request.
    @around("EngineCore", "add_request")
    def add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        if request.steerfast is None:
            return original(self, request, *args, **kwargs)
        self.scheduler.steerfast.enter(request)
        try:
            original(self, request, *args, **kwargs)
        finally:
            if self.scheduler.requests.get(request.request_id) is not request:
                self.scheduler.steerfast.leave(request)

    # The one way out: finished, failed or aborted.
    @around("Scheduler", "_free_request")
    def free_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.steerfast is not None:
            self.steerfast.leave(request)
        return original(self, request, *args, **kwargs)

    # Decisions come with the tokens of their step, and have to be known before these fill blocks.
    @around("Scheduler", "update_from_output")
    def update_from_output(original: Any, self: Any, scheduled: Any, output: Any) -> Any:
        if self.steerfast is None:
            return original(self, scheduled, output)
        if decided := getattr(output, "steerfast", None):
            self.steerfast.decide(self.requests, decided)
        outputs = original(self, scheduled, output)
        self.steerfast.tell(self.requests, outputs)
        return outputs

    # Between two steps, where workers can be told to empty slots.
    @around("EngineCore", "post_step")
    def post_step(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.scheduler.steerfast is not None and self.scheduler.steerfast.registry.spoilt:
            self.scheduler.steerfast.sweep(self.model_executor)

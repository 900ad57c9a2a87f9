"""The engine core's part of steering: the profiles, the requests that they steer, and the names of cache blocks.

vLLM names a block of a request by a hash, when it is full. A request that finds a block of the same name reads its keys
and values instead of computing them. Profiles edit rows from the prompt's last token on, and gates read that row or
some before it. Therefore

- blocks that end before the first row that a profile edits or reads are shared by all requests;
- blocks from there on get no name until the gates have decided. If none opened, no row was edited, and the blocks get
  their usual names. Otherwise they get random names, so that only the request itself finds them, when it resumes. The
  next turn of the conversation computes the earlier answer anew, unedited.

Profiles that edit whole prompts give their requests a cache salt instead, which is part of all names. A profile of
strength 0 edits nothing (`steerfast.vllm.assignment.requested`): its gate reads rows, and that is all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.runtime.span import NO_END, NO_TURN, Entry, Stack
from steerfast.vllm import compat
from steerfast.vllm.assignment import requested, stack_to_extra
from steerfast.vllm.compat import around
from steerfast.vllm.config import COUNT, KEY, OBSERVE, SKIP, ServingConfig, check_name, identity_of, splits_prompts
from steerfast.vllm.grammar import bounded
from steerfast.vllm.registry import Registry, Version, variants

Hasher = Callable[[Any], list[bytes]]
Decision = tuple[Sequence[float], Sequence[float]]  # gate values and scores of a profile, by layer
_log = logging.getLogger("vllm.steerfast")  # a child of vLLM's logger, which has the handlers
_RANDOM_BYTES = 24  # of the name of an edited block
_EDITED = b"-edited-"  # its end, which is all that events show of a name where they show numbers
_FILE = re.compile(r"[^./\\:][^/\\:]*\.safetensors")  # no path, not hidden


@dataclass(eq=False)
class HeldProfiles:
    """The versions that a steered request holds, their strengths, and vLLM's function that names its blocks."""

    versions: tuple[Version, ...]
    strengths: tuple[float, ...]
    hasher: Hasher | None = None
    reasoner: Any = None  # vLLM's parser, as long as the request thinks and edits wait
    decided: bool = False

    @property
    def editing(self) -> list[Version]:
        """The profiles that may edit rows; the others are observed."""
        return [version for version, strength in zip(self.versions, self.strengths, strict=True) if strength]

    @property
    def stack(self) -> Stack:
        """The profiles as workers take them."""
        pairs = zip(self.versions, self.strengths, strict=True)
        thinks = self.reasoner is not None
        return tuple(
            Entry(version.slot, strength, replace(version.span, after_thought=thinks)) for version, strength in pairs
        )

    @property
    def edits_prompt(self) -> bool:
        """Whether some profile edits rows before the prompt's last."""
        return not all(version.span.after_prompt for version in self.editing)

    @property
    def always_edits(self) -> bool:
        """Whether some profile edits without a gate."""
        return any(version.span.open for version in self.editing)

    def edits(self, decided: Sequence[Decision]) -> bool:
        """Return whether some profile edits rows after these decisions."""
        opened = (any(values) for values, _ in decided)  # a NaN is no zero
        return self.always_edits or any(s and fired for s, fired in zip(self.strengths, opened, strict=True))


class EngineSteering:
    """The steering of one engine core. Only its busy loop may call it, except `assign` and `own`.

    Args:
        config, vllm_config: the engine's.
        scheduler: its scheduler.

    Attributes:
        registry: the profiles.
    """

    def __init__(self, config: ServingConfig, vllm_config: Any, scheduler: Any) -> None:
        self.config, self._vllm_config = config, vllm_config
        self.model = identity_of(vllm_config.model_config.hf_text_config)
        self.split = splits_prompts(vllm_config)
        self.registry = Registry(config.slots)
        self._grammars = scheduler.structured_output_manager  # has the class of vLLM's reasoning parser
        self.answers: dict[str, int] = {}  # requests whose thought ended in the last step: the first row of the answer
        self._block_size = scheduler.hash_block_size
        # Tokens after a block that its name covers, so that the name comes when they are known.
        self._ahead = scheduler.num_hash_lookahead_tokens if compat.has("Scheduler.num_hash_lookahead_tokens") else 0
        self._cache = scheduler.kv_cache_manager
        self._unnamed: set[Any] = set()  # requests with a full block that has no name yet
        self._unreported: dict[str, list[dict[str, Any]]] = {}  # decisions that no output has carried yet
        self._warned = False  # of a prompt without a user turn
        self._secret = secrets.token_hex(16)  # so that no client can choose a salt of ours
        for name, path in config.profiles.items():
            profile = SteeringProfile.load(path)
            config.check(name, profile, self.model, split=self.split)
            at = variants(profile)
            self.registry.put(name, self.registry.take(len(at)), path, at)

    # -- requests ------------------------------------------------------------------------------------------------------

    def assign(self, request: Any) -> HeldProfiles | None:
        """Decide which profiles steer an `EngineCoreRequest`, and write that where workers read it.

        Returns:
            What the request holds from now on; None: it is not steered.

        Raises:
            ValueError: the request asks for something that it cannot have.
        """
        params = request.sampling_params
        if params is None:
            return None
        asked = requested(params.extra_args, self.config, self.registry.points)
        if not asked:
            return None
        if request.resumable:
            raise ValueError("resumable: expected a request whose prompt is complete, got a session that is steered")
        names, strengths, points = zip(*asked, strict=True)
        grammar = params.structured_outputs
        if any(strengths):
            grammar = bounded(grammar, self._vllm_config.structured_outputs_config.disable_any_whitespace)
        reasoner = self._reasoner(request)
        held = HeldProfiles(self.registry.hold(*names, points=points), strengths, reasoner=reasoner)
        whole = [each.name for each in held.editing if not (each.span.after_prompt or each.span.open)]
        if request.mm_features and whole:
            self.registry.release(*held.versions)
            raise ValueError(
                f"steering: expected a prompt of text under profile {whole[0]!r}, which edits whole prompts, got more"
            )
        request.sampling_params = copy(params)  # siblings of a request with n > 1 share theirs
        request.sampling_params.structured_outputs = grammar
        request.sampling_params.extra_args = {**(params.extra_args or {}), KEY: stack_to_extra(held.stack)}
        if held.edits_prompt:
            request.cache_salt = self._salt(request, held)
        return held

    def _reasoner(self, request: Any) -> Any:
        """Return vLLM's parser of a request that may think before its answer; None: edits do not wait for that."""
        if self.config.thinking == COUNT:
            return None
        options = getattr(request, "reasoning_parser_kwargs", None) or {}
        reasoner = self._grammars.reasoner_cls(tokenizer=self._grammars.tokenizer, **options)
        return None if reasoner.is_reasoning_end(request.prompt_token_ids or []) else reasoner

    def follow_thoughts(self, requests: Mapping[str, Any], outputs: Mapping[int, Any]) -> None:
        """Note the thoughts that end with a token of this step: its row is the first that is edited."""
        for output in (output for client in outputs.values() for output in client.outputs):
            request = requests.get(output.request_id)
            held = None if request is None else request.steerfast
            if request is None or held is None or held.reasoner is None:
                continue
            if held.reasoner.is_reasoning_end_streaming(request.all_token_ids, output.new_token_ids):
                held.reasoner, self.answers[output.request_id] = None, request.num_tokens

    def _salt(self, request: Any, held: HeldProfiles) -> str:
        """Return the salt of a request whose prompt is edited: requests share blocks that are edited alike."""
        # A row must be edited alike in a prompt and in an answer: by all profiles, or the request shares no blocks.
        # A gate that only observes has to see all rows that it reads, too.
        spans = [version.span for version in held.versions]
        shared = all(span.open and not span.after_prompt and span.answer_rows == NO_END for span in spans)
        pairs = zip(held.versions, held.strengths, strict=True)
        edits = (f"{version.checksum}:{strength!r}" for version, strength in pairs)
        alike = ":".join(edits) if shared else request.request_id
        return f"{KEY}:{self._secret}:{alike}:{request.cache_salt or ''}"

    def own(self, request: Any, held: HeldProfiles) -> None:
        """Let a new `Request` hold its profiles, and take back the names of blocks that may be edited."""
        request.steerfast, held.hasher = held, request._block_hasher
        ids = None if request.prompt_token_ids is None else np.asarray(request.prompt_token_ids)
        means = [version.span.read(request.num_prompt_tokens, ids) for version in held.versions]
        if not self._warned and not all(rows.found for rows in means):
            self._warned = True
            _log.warning("request %r: %s", request.request_id, NO_TURN)
        if held.hasher is None or held.edits_prompt:
            return
        # Every row that a gate reads has to be computed, even if it is in the cache: the prompt's last, and means.
        unread = min([request.num_prompt_tokens - 1, *(rows.first for rows in means if rows.until)])
        del request.block_hashes[unread // self._block_size :]
        request._block_hasher = partial(_random_names, self._block_size)
        if held.always_edits:
            request.update_block_hashes()

    def enter(self, request: Any) -> None:
        """Prepare for a request that holds versions and is about to be scheduled."""
        nameable = max(0, request.num_tokens - self._ahead) // self._block_size
        if request._block_hasher is None or len(request.block_hashes) >= nameable:
            return
        # vLLM expects a name for every full block, and names blocks of every request in every step. Its function is
        # replaced only while some prompt that ends with a block has yet to decide, which is rare.
        self._unnamed.add(request)
        self._cache.coordinator.cache_blocks = self._cache_named_blocks

    def leave(self, request: Any) -> None:
        """Let go of the versions of a request that ended, or was never scheduled."""
        held, request.steerfast = request.steerfast, None
        if held is not None:
            self._forget_unnamed(request)
            self.registry.release(*held.versions)

    def decide(self, requests: Mapping[str, Any], decisions: Mapping[str, Sequence[Decision]]) -> None:
        """Take the decisions of a step, whose tokens are not known yet: for each request one per profile."""
        for name, decided in decisions.items():
            request = requests.get(name)
            held = None if request is None else request.steerfast
            if request is None or held is None or held.decided:
                continue
            held.decided = True
            if not held.edits(decided):
                request._block_hasher = held.hasher
            if request in self._unnamed:
                request.update_block_hashes()
                self._forget_unnamed(request)
                self._cache.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
            each = zip(held.versions, held.strengths, decided, strict=True)
            self._unreported[name] = [self._report(*one) for one in each]

    def _report(self, version: Version, strength: float, decision: Decision) -> dict[str, Any]:
        """Return the decision of one profile as the front end reads it."""
        values, scores = decision
        fired = version.span.open or any(not value < 0.5 for value in values)  # a NaN fires
        in_band = any(score > end for score, end in zip(scores, version.abstain, strict=False))
        return {
            "profile": version.name,
            "version": version.number,
            "action": "steer" if strength else OBSERVE,
            "fired": fired,
            "undecided": in_band and not fired,
            "scores": list(scores),
            "nan": any(map(math.isnan, scores)),
            "slots": self.registry.in_use,
        }

    def report(self, requests: Mapping[str, Any], outputs: Mapping[int, Any]) -> None:
        """Let the first output of each request carry its decisions."""
        if not self._unreported:
            return
        for client in outputs.values():
            for output in client.outputs:
                if (decisions := self._unreported.pop(output.request_id, None)) is not None:
                    # No front end shows these headers to a client, not even one that does not know steerfast.
                    output.trace_headers = {**(output.trace_headers or {}), KEY: json.dumps(decisions)}
        self._unreported = {name: found for name, found in self._unreported.items() if name in requests}

    def _cache_named_blocks(self, request: Any, num_computed_tokens: int) -> None:
        coordinator = self._cache.coordinator
        named = len(request.block_hashes) * self._block_size
        type(coordinator).cache_blocks(coordinator, request, min(num_computed_tokens, named))

    def _forget_unnamed(self, request: Any) -> None:
        self._unnamed.discard(request)
        if not self._unnamed:
            vars(self._cache.coordinator).pop("cache_blocks", None)

    # -- profiles ------------------------------------------------------------------------------------------------------

    def profiles(self) -> list[dict[str, Any]]:
        """Return all versions that have a slot, as plain data; the first of a name is at the threshold in use."""
        return [
            {
                "name": version.name,
                "version": version.number,
                "threshold": version.point,
                "slot": version.slot,
                "file": os.path.basename(version.path),
                "checksum": version.checksum,
                "requests": version.requests,
                "current": version.current,
                "default": version.current and version.name in self.config.defaults,
            }
            for version in self.registry.versions()
        ]

    def load(self, executor: Any, name: str, file: str) -> None:
        """Load a profile under a new name.

        Raises:
            ValueError: the name is taken or not allowed; or as `replace`.
        """
        if check_name(name) in self.registry.points:
            raise ProfileError(f"name: expected a new one, got {name!r}, which is loaded (replace it instead)")
        self._put(executor, name, file)

    def replace(self, executor: Any, name: str, file: str) -> None:
        """Give requests from now on another version of a profile.

        Raises:
            ValueError: there is no such name or file, or the profile does not fit this engine. The engine is unchanged.
        """
        self.registry.current(name)
        self._put(executor, name, file)

    def remove(self, executor: Any, name: str) -> None:
        """Let no new request name a profile.

        Raises:
            ValueError: there is no such name, or it is the default.
        """
        if name in self.config.defaults:
            raise ProfileError(f"name: expected another than the default, which can only be replaced, got {name!r}")
        self.registry.retire(name)
        self.sweep(executor)

    def sweep(self, executor: Any) -> None:
        """Empty the slots of versions that no request holds any more."""
        for slot in list(self.registry.spoilt):
            executor.collective_rpc("steerfast_clear", args=(slot,))
            self.registry.free([slot])

    def _put(self, executor: Any, name: str, file: str) -> None:
        self.sweep(executor)
        path = inside(self.config.directory, file)
        profile = SteeringProfile.load(path)
        self.config.check(name, profile, self.model, split=self.split)
        at = variants(profile)
        slots = self.registry.take(len(at))
        try:
            answers = executor.collective_rpc("steerfast_write", args=(slots, path, profile.checksum))
            if refusals := [answer for answer in answers if answer is not None]:
                raise ProfileError(refusals[0])
        except BaseException:
            self.registry.spoil(slots)
            raise
        self.registry.put(name, slots, path, at)
        self.config.warn_of_thoughts(name, profile, self._vllm_config)
        self.sweep(executor)


def _random_names(block_size: int, request: Any) -> list[bytes]:
    """Return random names for a request's full blocks that have none."""
    missing = request.num_tokens // block_size - len(request.block_hashes)
    return [secrets.token_bytes(_RANDOM_BYTES) + _EDITED for _ in range(missing)]


def _is_edited(name: bytes | int) -> bool:
    """Return whether a block's name, as events show it, is random."""
    return name == int.from_bytes(_EDITED, "big") if isinstance(name, int) else name.endswith(_EDITED)


def shareable(events: Iterable[Any]) -> list[Any]:
    """Return events about the KV cache without blocks that only their own request finds.

    A router that reads them would send requests after blocks that they cannot use.
    """
    kept = []
    for event in events:
        if (names := getattr(event, "block_hashes", None)) is not None:
            names = [name for name in names if not _is_edited(name)]
            if len(names) < len(event.block_hashes):
                if not names:
                    continue
                event.block_hashes = names  # the first ones: blocks after an edited one are edited, too
                if hasattr(event, "token_ids"):
                    event.token_ids = event.token_ids[: len(names) * event.block_size]
                    event.extra_keys = event.extra_keys and event.extra_keys[: len(names)]
        kept.append(event)
    return kept


def inside(directory: str | None, file: object) -> str:
    """Return the path of a profile's file in the configured directory, by its name.

    Raises:
        ProfileError: there is no directory; or the name is a path, has another ending, or links to another folder.
    """
    if directory is None:
        raise ProfileError(f"file: expected {KEY}.directory to be configured, from which files are loaded, got none")
    if not (isinstance(file, str) and file.isprintable() and _FILE.fullmatch(file)):
        raise ProfileError(f"file: expected the name of a .safetensors file in {directory}, got {str(file)[:80]!r}")
    path = os.path.join(directory, str(file))
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(directory) or not os.path.isfile(path):
        raise ProfileError(f"file: expected a file in {directory}, found none called {str(file)[:80]!r}")
    return path


# -- vLLM --------------------------------------------------------------------------------------------------------------


def steerfast_profiles(core: Any) -> list[dict[str, Any]]:
    """See `EngineSteering.profiles`."""
    return _steering(core).profiles()


def steerfast_load(core: Any, name: str, file: str) -> None:
    """See `EngineSteering.load`."""
    _steering(core).load(core.model_executor, name, file)


def steerfast_replace(core: Any, name: str, file: str) -> None:
    """See `EngineSteering.replace`."""
    _steering(core).replace(core.model_executor, name, file)


def steerfast_remove(core: Any, name: str) -> None:
    """See `EngineSteering.remove`."""
    _steering(core).remove(core.model_executor, name)


def _steering(core: Any) -> EngineSteering:
    steering: EngineSteering | None = core.scheduler.steerfast
    if steering is None:
        raise ProfileError("engine: expected one that steers, got one that was not configured for it")
    return steering


def install() -> None:
    """Let the engine cores of configured engines steer; those of others pass through."""
    compat.Request.steerfast = None  # `HeldProfiles` of a steered request
    compat.SchedulerInterface.steerfast = None  # the `EngineSteering` of an engine that steers
    for function in (steerfast_profiles, steerfast_load, steerfast_replace, steerfast_remove):
        setattr(compat.EngineCore, function.__name__, function)
    _wrap_start()
    _wrap_requests()
    _wrap_steps()


def _wrap_start() -> None:
    # The first call of an engine core with its configuration. (Its process calls this within EngineCore.__init__.)
    @around("EngineCore", "_initialize_kv_caches")
    def initialize(original: Any, self: Any, vllm_config: Any) -> Any:
        config = ServingConfig.of(vllm_config)
        if config is None:
            return original(self, vllm_config)
        config.check_environment()
        scheduler = vllm_config.scheduler_config.get_scheduler_cls()
        wrapped = ("update_from_output", "_free_request")
        own = issubclass(scheduler, compat.Scheduler)
        if not own or any(getattr(scheduler, name) is not getattr(compat.Scheduler, name) for name in wrapped):
            raise ValueError(f"{KEY}: expected vLLM's own scheduler, got {scheduler.__name__}")
        if not all(self.model_executor.collective_rpc("steerfast_steers")):
            raise ValueError(f"{KEY}: expected all workers to steer, some do not: is the plugin installed for all?")
        _log.info("%s", config)
        return original(self, vllm_config)

    @around("Scheduler", "__init__")
    def init_scheduler(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if (config := ServingConfig.of(vllm_config)) is not None:
            self.steerfast = EngineSteering(config, vllm_config, self)


def _wrap_requests() -> None:
    # vLLM reads requests in a thread of its own, so that hashing a long prompt delays no step.
    @around("EngineCore", "preprocess_add_request")
    def preprocess(original: Any, self: Any, request: Any) -> Any:
        steering = self.scheduler.steerfast
        held = None if steering is None else steering.assign(request)
        if held is None:
            return original(self, request)
        try:
            made, wave = original(self, request)
            steering.own(made, held)
        except BaseException:
            steering.registry.release(*held.versions)
            raise
        return made, wave

    # The scheduler has the request from here on, unless it refuses it or reads it as a message to another request.
    @around("EngineCore", "add_request")
    def add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        if request.steerfast is None:
            return original(self, request, *args, **kwargs)
        self.scheduler.steerfast.enter(request)
        try:
            original(self, request, *args, **kwargs)
        finally:
            _leave_if_refused(self, request)

    # An engine that is paused or ends refuses a request before `add_request`.
    @around("EngineCoreProc", "_handle_client_request")
    def handle_client_request(original: Any, self: Any, request_type: Any, request: Any) -> None:
        try:
            original(self, request_type, request)
        finally:
            if request_type is compat.EngineCoreRequestType.ADD:
                _leave_if_refused(self, request[0])

    # Every request ends here: finished, failed or aborted.
    @around("Scheduler", "_free_request")
    def free_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.steerfast is not None:
            self.steerfast.leave(request)
        return original(self, request, *args, **kwargs)


def _leave_if_refused(core: Any, request: Any) -> None:
    """Let go of the versions of a request that the scheduler does not have."""
    if request.steerfast is not None and core.scheduler.requests.get(request.request_id) is not request:
        core.scheduler.steerfast.leave(request)


def _wrap_steps() -> None:
    # Decisions come with the tokens of their step, and have to be known before these tokens fill blocks.
    @around("Scheduler", "update_from_output")
    def update_from_output(original: Any, self: Any, scheduled: Any, output: Any) -> Any:
        if self.steerfast is None:
            return original(self, scheduled, output)
        if decisions := getattr(output, "steerfast", None):
            self.steerfast.decide(self.requests, decisions)
        outputs = original(self, scheduled, output)
        self.steerfast.report(self.requests, outputs)
        if self.steerfast.config.thinking == SKIP:
            self.steerfast.follow_thoughts(self.requests, outputs)
        return outputs

    @around("KVCacheManager", "take_events")
    def take_events(original: Any, self: Any) -> list[Any]:
        return shareable(original(self))

    # Workers can empty slots between two steps, and learn where answers begin.
    @around("EngineCore", "post_step")
    def post_step(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (steering := self.scheduler.steerfast) is None:
            return
        if steering.registry.spoilt:
            steering.sweep(self.model_executor)
        if steering.answers:
            answers, steering.answers = steering.answers, {}
            self.model_executor.collective_rpc("steerfast_end_thoughts", args=(answers,))

"""The front end: refuses wrong requests at once, and reports, logs and counts decisions.

vLLM's front end runs in each API server, and offline in the caller's process. It is no guard: the engine core checks
every request again (`steerfast.vllm.engine`).
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.text.tokenizer import template_hash, tokenizer_hash
from steerfast.vllm import compat, tracing
from steerfast.vllm.assignment import requested
from steerfast.vllm.compat import around
from steerfast.vllm.config import KEY, OBSERVE, ServingConfig
from steerfast.vllm.metrics import FIELDS, metrics
from steerfast.vllm.registry import variants

_log = logging.getLogger("vllm.steerfast")  # a child of vLLM's logger, which has the handlers
_SHOWN = ("profile", "action", "fired", "undecided", "scores")
_QUOTE = reprlib.Repr()  # of what a client named: one line, printable
_QUOTE.maxstring = 200


class FrontEnd:
    """The front end of one engine that steers.

    Attributes:
        points: profiles that a request may name, and their named thresholds.
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.points: dict[str, list[str]] = {name: [] for name in config.profiles}  # until `use_tokenizer`
        self._tokenizer: Any = None
        self._metrics = metrics()
        self._metrics.know(self.points)
        self._metrics.info(config.version, config.locked)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Compare every profile with this tokenizer; None: the engine has none.

        Raises:
            ProfileError: see `check_tokenizer`.
        """
        self._tokenizer = tokenizer
        loaded = {name: SteeringProfile.load(path) for name, path in self.config.profiles.items()}
        for name, profile in loaded.items():
            self.check_tokenizer(name, profile)
        slots = sum(len(variants(profile)) for profile in loaded.values())
        self.set_profiles({name: profile.points for name, profile in loaded.items()}, slots)

    def check_tokenizer(self, name: str, profile: SteeringProfile) -> None:
        """Check that this tokenizer renders prompts as the one that the profile was fitted with.

        Raises:
            ProfileError: the profile was made with another tokenizer or chat template.
        """
        here = replace(
            profile.model,
            tokenizer_sha256=tokenizer_hash(self._tokenizer),
            chat_template_sha256=template_hash(self._tokenizer),
        )
        if (problem := profile.model.mismatch(here)) is not None:
            raise ProfileError(f"profile {name!r}: {problem}")

    def set_profiles(self, points: Mapping[str, Iterable[str]], slots: int) -> None:
        """Note the profiles that the engine has now, their named thresholds, and how many slots are in use."""
        before, self.points = self.points, {name: list(found) for name, found in points.items()}
        self._metrics.forget({*before} - {*self.points})
        self._metrics.know(self.points)
        self._metrics.slots(slots)

    def check(self, extra_args: Mapping[str, Any] | None, resumable: bool = False) -> None:
        """Check the keys of a request about steering.

        Raises:
            VLLMValidationError: a key is wrong; the message names it, and a client gets status 400.
        """
        try:
            stack = requested(extra_args, self.config, self.points)
        except ValueError as error:
            raise self.refusal(str(error)) from None
        if resumable and stack:
            raise self.refusal(
                "resumable: expected a request with its whole prompt, got a session, which is not steered"
            )

    def refusal(self, message: str) -> Exception:
        """Count a refused request, and return vLLM's error for it; the message begins with the field."""
        field = message.partition(":")[0]
        self._metrics.rejected(field if field in FIELDS else "other")
        return compat.VLLMValidationError(message, parameter=field)

    def collect(self, outputs: Iterable[Any], states: Mapping[str, Any]) -> None:
        """Take the decisions out of engine outputs: count and log them, and let the requests' answers carry them.

        Args:
            outputs: `EngineCoreOutput`; ``trace_headers[KEY]`` has a request's decisions as JSON, one per profile.
            states: `RequestState` by request; an aborted one has none.
        """
        for output in outputs:
            if output.trace_headers is None or KEY not in output.trace_headers:
                continue
            headers = dict(output.trace_headers)
            decisions = json.loads(headers.pop(KEY))
            output.trace_headers = headers or None
            for decision in decisions:
                self._count(_QUOTE.repr(output.request_id), decision)
            if (state := states.get(output.request_id)) is not None:
                shown = [{name: decision[name] for name in _SHOWN} for decision in decisions]
                _add_steering(state, shown[0] if len(shown) == 1 else shown)

    def _count(self, request: str, decision: Mapping[str, Any]) -> None:
        """Count and log the decision of one profile; `request` is its quoted name."""
        profile, action, fired, undecided, scores = (decision[name] for name in _SHOWN)
        self._metrics.decided(profile, fired, scores, decision["nan"], action)
        self._metrics.slots(decision["slots"])
        if _log.isEnabledFor(logging.INFO):
            shown = " ".join(f"{score:.4f}" for score in scores) or "none"
            outcome = "fired" if fired else "undecided" if undecided else "shut"
            outcome += ", observed" if action == OBSERVE else ""
            _log.info("Request %s: profile %s %s, scores %s", request, profile, outcome, shown)


def _add_steering(state: Any, steering: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Let all later outputs of a request, and its span, carry `steering`. Requests without a decision stay as is."""
    make = state.make_request_output

    def make_request_output(*args: Any, **kwargs: Any) -> Any:
        output = make(*args, **kwargs)
        if output is not None:
            output.steering = steering
        return output

    state.make_request_output = make_request_output
    state.steering = steering  # for its span


def install() -> None:
    """Wrap the constructors of vLLM's front end. Those of engines that do not steer pass through."""
    compat.RequestOutput.steering = None  # of a steered request: what `FrontEnd.collect` found

    @around("InputProcessor", "__init__")
    def init_input(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        config = ServingConfig.of(vllm_config)
        self.steerfast = front = None if config is None else FrontEnd(config)
        if front is None:
            return original(self, vllm_config, *args, **kwargs)
        inner = self.process_inputs

        def process_inputs(
            request_id: str, prompt: Any, params: Any, *args: Any, resumable: bool = False, **kwargs: Any
        ) -> Any:
            front.check(getattr(params, "extra_args", None), resumable)
            return inner(request_id, prompt, params, *args, resumable=resumable, **kwargs)

        self.process_inputs = process_inputs  # before the original, which binds it to a thread pool
        original(self, vllm_config, *args, **kwargs)
        front.use_tokenizer(self.tokenizer)

    def init_engine(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        front = self.input_processor.steerfast
        if front is None:
            return
        processor = self.output_processor
        inner = processor.process_outputs

        def process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            front.collect(outputs, processor.request_states)
            return inner(outputs, *args, **kwargs)

        processor.process_outputs = process_outputs
        tracing.install(processor)

    for engine in ("AsyncLLM", "LLMEngine"):
        around(engine, "__init__")(init_engine)

    # Each token of a beam is a request of its own, whose gate would decide anew.
    def beam_search(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.llm_engine if hasattr(self, "llm_engine") else self.engine_client
        if (front := getattr(engine.input_processor, "steerfast", None)) is not None:
            raise front.refusal("use_beam_search: expected false on a server that steers, got true")
        return original(self, *args, **kwargs)

    for mixin in ("BeamSearchOnlineMixin", "BeamSearchOfflineMixin"):
        around(mixin, "beam_search")(beam_search)

"""Traces: the span of a steered request says which profile decided, and how.

vLLM makes one span per finished request if an operator names a collector (``--otlp-traces-endpoint``). It starts and
ends that span in one call, so a span processor adds the attributes at the start. OpenTelemetry is imported only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from steerfast.vllm.config import KEY

Steering = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_steering: ContextVar[Steering | None] = ContextVar("steering", default=None)
"""Of the request whose span is being made."""


def attributes(steering: Steering | None) -> dict[str, Any]:
    """Return the attributes of a request's span; none for a request without steering.

    Args:
        steering: as `RequestOutput.steering`. Of a stack each attribute is a sequence in the order of its profiles,
            and the scores follow each other.
    """
    if steering is None:
        return {}
    if isinstance(steering, Mapping):
        return {f"{KEY}.{name}": value for name, value in steering.items()}
    found: dict[str, Any] = {f"{KEY}.{name}": [each[name] for each in steering] for name in steering[0]}
    found[f"{KEY}.scores"] = [score for each in steering for score in each["scores"]]
    return found


def install(processor: Any) -> None:
    """Add the attributes to the spans of an engine whose tracing is on.

    Args:
        processor: its output processor; a request's state has ``steering`` once its profiles decided.
    """
    if not processor.tracing_enabled:
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor

    class Attributes(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            span.set_attributes(attributes(_steering.get()))

    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(Attributes())
    inner = processor.do_tracing

    def do_tracing(output: Any, state: Any, *args: Any) -> None:
        token = _steering.set(getattr(state, "steering", None))
        try:
            inner(output, state, *args)
        finally:
            _steering.reset(token)

    processor.do_tracing = do_tracing

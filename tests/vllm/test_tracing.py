"""The spans of requests: vLLM's own output processor and tracing, and an exporter that keeps them."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("opentelemetry.sdk")

from answers import gated
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats

from steerfast.vllm import frontend, tracing

SAFETY = {"profile": "safety", "fired": True, "undecided": False, "scores": [0.25, 0.5]}
TONE = {"profile": "tone", "fired": False, "undecided": True, "scores": [-0.125]}


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """The one that vLLM sets up in `init_tracer`, with another exporter."""
    trace.set_tracer_provider(TracerProvider())
    found = trace.get_tracer_provider()
    assert isinstance(found, TracerProvider)
    return found


@pytest.fixture
def exporter(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    before = provider._active_span_processor._span_processors
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter
    provider._active_span_processor._span_processors = before


class Processor(OutputProcessor):
    """An engine's output processor with tracing."""

    def __init__(self) -> None:
        super().__init__(None, log_stats=True, tracing_enabled=True)
        tracing.install(self)

    def add(self, name: str) -> None:
        absent = ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
        self.add_request(
            EngineCoreRequest(
                name, prompt_token_ids=[1, 2], sampling_params=SamplingParams(max_tokens=2), arrival_time=1.0,
                external_req_id=f"external {name}", **dict.fromkeys(absent),
            ),
            prompt=None,
        )  # fmt: skip

    def step(self, name: str, steering: Any = None, *, last: bool = False) -> None:
        """Take a token of a request, after the front end took its steering."""
        if steering is not None:
            frontend._add_steering(self.request_states[name], steering)
        output = EngineCoreOutput(name, [5], finish_reason=FinishReason.LENGTH if last else None)
        self.process_outputs([output], 2.0, IterationStats())


def steering(span: Any) -> dict[str, Any]:
    return {name: value for name, value in span.attributes.items() if name.startswith("steerfast")}


def test_a_span_carries_what_the_profile_decided(exporter: InMemorySpanExporter) -> None:
    processor = Processor()
    for name in ("steered", "plain"):
        processor.add(name)
    processor.step("steered", SAFETY)
    processor.step("plain")
    processor.step("steered", last=True)
    processor.step("plain", last=True)
    spans = {span.attributes["gen_ai.request.id"]: span for span in exporter.get_finished_spans()}
    assert {span.name for span in spans.values()} == {"llm_request"}
    assert steering(spans["external steered"]) == {
        "steerfast.profile": "safety",
        "steerfast.fired": True,
        "steerfast.undecided": False,
        "steerfast.scores": (0.25, 0.5),
    }
    assert steering(spans["external plain"]) == {}


def test_a_stack_has_sequences_in_the_order_of_its_profiles(exporter: InMemorySpanExporter) -> None:
    processor = Processor()
    processor.add("stack")
    processor.step("stack", [SAFETY, TONE], last=True)  # the first token is the last one, too
    (span,) = exporter.get_finished_spans()
    assert steering(span) == {
        "steerfast.profile": ("safety", "tone"),
        "steerfast.fired": (True, False),
        "steerfast.undecided": (False, True),
        "steerfast.scores": (0.25, 0.5, -0.125),
    }


def test_other_spans_are_left_alone(exporter: InMemorySpanExporter) -> None:
    processor = Processor()
    processor.add("steered")
    processor.step("steered", SAFETY)
    with trace.get_tracer("other").start_as_current_span("other"):
        pass
    processor.step("steered", last=True)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert steering(spans["other"]) == {}
    assert steering(spans["llm_request"])["steerfast.profile"] == "safety"


def test_another_field_of_a_decision_comes_along() -> None:
    assert tracing.attributes({**SAFETY, "action": "observe"})["steerfast.action"] == "observe"
    assert tracing.attributes([{**SAFETY, "action": "observe"}])["steerfast.action"] == ["observe"]


def test_without_tracing_nothing_changes() -> None:
    processor = OutputProcessor(None, log_stats=True)
    tracing.install(processor)
    assert "do_tracing" not in vars(processor)


def test_opentelemetry_is_not_needed_where_tracing_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # an import of it fails
    tracing.install(OutputProcessor(None, log_stats=True))
    with pytest.raises(ImportError):
        tracing.install(OutputProcessor(None, log_stats=True, tracing_enabled=True))


@pytest.mark.slow
def test_a_collector_receives_the_steering_of_a_real_engine(
    engine: Callable[..., Any], saved: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.util._once import Once

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)  # the engine sets up its own
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(
                ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:1] == b"\x1f" else body)
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        llm = engine(
            {"profiles": saved({"safety": gated()})},
            otlp_traces_endpoint=f"http://127.0.0.1:{server.server_port}/v1/traces",
            disable_log_stats=False,
        )
        asked = [SamplingParams(max_tokens=2, extra_args={"steering": name}) for name in ("safety", "off")]
        outputs = llm.generate(["Hello", "Hello"], asked, use_tqdm=False)
        trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
        server.shutdown()
    spans = [s for each in received for r in each.resource_spans for scope in r.scope_spans for s in scope.spans]
    found = [{a.key: a.value for a in span.attributes} for span in spans if span.name == "llm_request"]
    assert len(found) == 2
    (steered,) = (each for each in found if "steerfast.profile" in each)
    assert steered["steerfast.profile"].string_value == "safety"
    assert steered["steerfast.fired"].bool_value == outputs[0].steering["fired"]
    scores = [value.double_value for value in steered["steerfast.scores"].array_value.values]
    assert scores == outputs[0].steering["scores"] != []

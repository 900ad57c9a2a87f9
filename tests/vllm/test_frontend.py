"""What the front end refuses, counts and tells, and the admin routes where no engine needs to run."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.vllm import admin
from steerfast.vllm.config import ServingConfig
from steerfast.vllm.frontend import FrontEnd

KEY = "correct horse"


@pytest.fixture
def profile(tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]) -> SteeringProfile:
    return make_profile(tiny_llama, tiny_tokenizer, layers=[2], positions="response")


@pytest.fixture
def make_front(profile: SteeringProfile, tmp_path: Path) -> Callable[..., FrontEnd]:
    def make(**fields: Any) -> FrontEnd:
        profile.save(tmp_path / "p.safetensors")
        profiles = {name: str(tmp_path / "p.safetensors") for name in ("safety", "tone")}
        values: dict[str, Any] = {"default": None, "locked": False, "directory": str(tmp_path), **fields}
        return FrontEnd(ServingConfig(profiles=profiles, slots=4, layers=(2,), kinds=0, version="0", **values))

    return make


STEERED = {"profile": "safety", "action": "steer", "fired": False, "undecided": False}


def metric(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(f"steerfast_{name}", labels)
    assert value is not None
    return value


def output(name: str, profile: str = "safety", **told: Any) -> SimpleNamespace:
    decision = {"profile": profile, "version": 1, "action": "steer", "fired": True, "undecided": False,
                "scores": [0.04], "nan": False, "slots": 2, **told}  # fmt: skip
    return SimpleNamespace(request_id=name, trace_headers={"steerfast": json.dumps([decision])})


def state() -> SimpleNamespace:
    return SimpleNamespace(make_request_output=lambda value: None if value is None else SimpleNamespace(value=value))


# ---- requests ------------------------------------------------------------------------------------


def test_a_refusal_names_the_field_and_is_counted_under_it(make_front: Callable[..., FrontEnd]) -> None:
    front = make_front()
    for extra, field in (
        ({"steering": "x"}, "steering"),
        ({"steering": "tone", "steering_strength": math.nan}, "steering_strength"),
        ({"steerfast": {"slot": -1}}, "other"),
    ):
        before = metric("rejected_requests_total", field=field)
        with pytest.raises(VLLMValidationError) as refused:
            front.check(extra)
        assert field == "other" or refused.value.parameter == field
        assert metric("rejected_requests_total", field=field) == before + 1
    front.check({"steering": "tone"})
    front.check({"session_id": "somebody else's"})
    front.check(None)


def test_a_session_is_refused_where_it_would_be_steered(make_front: Callable[..., FrontEnd]) -> None:
    make_front().check(None, resumable=True)
    make_front(default="safety").check({"steering": "off"}, resumable=True)
    with pytest.raises(VLLMValidationError, match="resumable: expected a request with its whole prompt"):
        make_front(default="safety").check(None, resumable=True)


def test_names_follow_the_engine(make_front: Callable[..., FrontEnd]) -> None:
    front = make_front()
    front.set_profiles(dict.fromkeys(["tone", "fresh"], ()), 3)
    front.check({"steering": "fresh"})
    with pytest.raises(VLLMValidationError, match="expected one of tone, fresh, off, got 'safety'"):
        front.check({"steering": "safety"})
    assert metric("slots_in_use") == 3
    assert metric("gate_evaluations_total", profile="fresh") == 0


def test_a_threshold_is_one_of_the_profiles(make_front: Callable[..., FrontEnd]) -> None:
    front = make_front()
    front.set_profiles({"safety": ("strict",), "tone": ()}, 3)
    front.check({"steering": "safety", "steering_threshold": "strict"})
    before = metric("rejected_requests_total", field="steering_threshold")
    for asked, says in (("safety", "for safety one of strict, got 'lax'"), ("tone", "for tone nothing")):
        with pytest.raises(VLLMValidationError, match=f"^steering_threshold: expected {says}") as refused:
            front.check({"steering": asked, "steering_threshold": "lax"})
        assert refused.value.parameter == "steering_threshold"
    assert metric("rejected_requests_total", field="steering_threshold") == before + 2


def test_another_tokenizer_or_chat_template_is_refused(
    make_front: Callable[..., FrontEnd], tiny_tokenizer: Any, profile: SteeringProfile
) -> None:
    front = make_front()
    front.use_tokenizer(tiny_tokenizer)
    front.use_tokenizer(None)  # vLLM may run without one
    other = type("Other", (), {"chat_template": "another", "__call__": lambda self, *a, **k: tiny_tokenizer(*a, **k)})()
    with pytest.raises(ProfileError, match=r"profile 'safety': .*chat template hash"):
        front.use_tokenizer(other)
    front.use_tokenizer(tiny_tokenizer)
    foreign = replace(profile, model=replace(profile.model, tokenizer_sha256="0" * 64))
    with pytest.raises(ProfileError, match=r"profile 'new': .*tokenizer hash 000000000000"):
        front.check_tokenizer("new", foreign)


# ---- decisions -----------------------------------------------------------------------------------


def test_decisions_are_taken_out_counted_and_told(make_front: Callable[..., FrontEnd]) -> None:
    front = make_front()
    names = ("gate_evaluations_total", "gate_firings_total", "steered_requests_total", "nan_scores_total",
             "gate_score_count")  # fmt: skip

    def counts(profile: str) -> list[float]:
        return [metric(name, profile=profile) for name in names]

    before = {profile: counts(profile) for profile in ("safety", "tone")}
    outputs = [
        output("fired"),
        output("shut", fired=False, scores=[0.01, -0.2]),
        output("undecided", fired=False, undecided=True, scores=[0.03]),
        output("nan", scores=[math.nan], nan=True),
        output("gone", slots=3),  # a client that left
        output("open", profile="tone", scores=[]),
        SimpleNamespace(request_id="plain", trace_headers=None),
        SimpleNamespace(request_id="other", trace_headers={"traceparent": "00"}),
    ]
    states = {each.request_id: state() for each in outputs if each.request_id != "gone"}
    front.collect(outputs, states)
    assert [each.trace_headers for each in outputs] == [None] * 7 + [{"traceparent": "00"}]
    grown = {name: [b - a for a, b in zip(before[name], counts(name), strict=True)] for name in before}
    assert grown == {"safety": [5, 3, 3, 1, 5], "tone": [0, 0, 1, 0, 0]}
    assert metric("slots_in_use") == 2
    for _ in range(2):  # all later outputs of a request tell, too
        told = states["shut"].make_request_output("text")
        assert told.steering == {**STEERED, "scores": [0.01, -0.2]}
    told = states["undecided"].make_request_output("text")
    assert told.steering == {**STEERED, "undecided": True, "scores": [0.03]}
    assert states["shut"].make_request_output(None) is None
    assert not hasattr(states["plain"].make_request_output("text"), "steering")


def test_a_stack_reports_each_of_its_profiles(make_front: Callable[..., FrontEnd]) -> None:
    front, made = make_front(), state()
    both, other = output("r", fired=False, scores=[0.01]), output("r", profile="tone", scores=[])
    decisions = [json.loads(each.trace_headers["steerfast"])[0] for each in (both, other)]
    both.trace_headers = {"steerfast": json.dumps(decisions), "traceparent": "00"}
    before = [metric("steered_requests_total", profile=name) for name in ("safety", "tone")]
    front.collect([both], {"r": made})
    assert both.trace_headers == {"traceparent": "00"}
    assert made.make_request_output("text").steering == [
        {**STEERED, "scores": [0.01]},
        {**STEERED, "profile": "tone", "fired": True, "scores": []},
    ]
    after = [metric("steered_requests_total", profile=name) for name in ("safety", "tone")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 1]


def test_a_log_line_quotes_what_a_client_named(
    make_front: Callable[..., FrontEnd], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.steerfast")
    front, victim = make_front(), "Request 'chatcmpl-victim': profile safety shut, scores -9.99"
    for forged in (f"a\nINFO {victim}", f"a\r\x1b[2K{victim}", f"a\u2028{victim}", f"a\u202e{victim}", f"a'{victim}"):
        caplog.clear()
        front.collect([output(forged)], {})
        (line,) = {*caplog.messages}  # handlers of other tests may repeat it
        assert line.isprintable()
        assert len(line.splitlines()) == 1
        assert line == f"Request {forged!r}: profile safety fired, scores 0.0400"
    caplog.clear()
    front.collect([output("x" * 1_000_000)], {})
    assert len(caplog.messages[0]) < 300


def test_a_removed_profile_leaves_no_metrics(make_front: Callable[..., FrontEnd]) -> None:
    def series() -> set[str]:
        found = {
            sample.name for each in REGISTRY.collect() for sample in each.samples if "brief" in sample.labels.values()
        }
        return {name for name in found if name.startswith("steerfast_")}

    front = make_front()
    front.set_profiles(dict.fromkeys(["safety", "tone", "brief"], ()), 3)
    front.collect([output("r", profile="brief")], {})
    assert metric("gate_evaluations_total", profile="brief") == 1
    assert "steerfast_gate_score_bucket" in series()
    front.set_profiles(dict.fromkeys(["safety", "tone"], ()), 3)
    assert series() == set()
    front.collect([output("late", profile="brief")], {})  # a request that began with it
    assert series() == set()
    front.set_profiles(dict.fromkeys(["safety", "tone", "brief"], ()), 3)
    assert metric("gate_evaluations_total", profile="brief") == 0


def test_metrics_say_that_this_server_steers(make_front: Callable[..., FrontEnd]) -> None:
    make_front(default="safety", locked=True)
    assert metric("info", version="0", vllm=vllm.__version__, locked="true") == 1


def test_what_is_observed_is_counted_but_not_as_steered(make_front: Callable[..., FrontEnd], caplog: Any) -> None:
    front, made = make_front(), state()
    names = ("gate_evaluations_total", "gate_firings_total", "gate_score_count", "steered_requests_total")
    before = [metric(name, profile="safety") for name in names]
    caplog.set_level(logging.INFO, "vllm.steerfast")
    logging.getLogger("vllm.steerfast").addHandler(caplog.handler)
    front.collect([output("r", action="observe")], {"r": made})
    logging.getLogger("vllm.steerfast").removeHandler(caplog.handler)
    assert [metric(name, profile="safety") - old for name, old in zip(names, before, strict=True)] == [1, 1, 1, 0]
    assert made.make_request_output("text").steering["action"] == "observe"
    assert "profile safety fired, observed, scores 0.0400" in caplog.text


# ---- admin ---------------------------------------------------------------------------------------


class Engine:
    """The engine core's side of the routes."""

    def __init__(self, front: FrontEnd | None, servers: int = 1) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.error: Exception | None = None
        self.input_processor = SimpleNamespace(steerfast=front)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(_api_process_count=servers))
        self.engine_core = self

    async def call_utility_async(self, method: str, *arguments: str) -> Any:
        self.calls.append((method, *arguments))
        if self.error is not None:
            raise self.error
        if method == "steerfast_profiles":
            return [
                {"name": "safety", "current": True, "threshold": None},
                {"name": "old", "current": False, "threshold": None},
            ]
        return None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TestClient]]:
    def serve(engine: Engine, key: str | None = KEY) -> TestClient:
        if key is None:
            monkeypatch.delenv(admin.KEY_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(admin.KEY_VARIABLE, key)
        app, plugin = FastAPI(), admin.plugin()
        plugin.attach_router(app)
        asyncio.run(plugin.init_state(engine, app.state, None))
        return TestClient(app, headers={"Authorization": f"Bearer {KEY}"})

    return serve


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_there_are_no_routes(
    served: Callable[..., TestClient], make_front: Callable[..., FrontEnd], key: str | None
) -> None:
    client = served(Engine(make_front()), key)
    assert client.get(admin.PATH).status_code == 404
    assert client.delete(f"{admin.PATH}/safety").status_code == 404


def test_a_server_that_does_not_steer_says_so(served: Callable[..., TestClient]) -> None:
    answer = served(Engine(None)).get(admin.PATH)
    assert (answer.status_code, "started without any" in answer.text) == (404, True)


def test_several_api_servers_may_only_look(
    served: Callable[..., TestClient], make_front: Callable[..., FrontEnd]
) -> None:
    engine = Engine(make_front(), servers=2)
    client = served(engine)
    assert client.get(admin.PATH).status_code == 200
    engine.calls.clear()
    answer = client.post(admin.PATH, json={"name": "n", "file": "p.safetensors"})
    assert (answer.status_code, "--api-server-count 1" in answer.text, engine.calls) == (409, True, [])


@pytest.mark.parametrize("body", ["[" * 100_000, '{"name": ' * 100_000, '{"name": "n", "file": ' + "[" * 100_000])
def test_a_body_that_nests_too_deep_is_status_400(
    served: Callable[..., TestClient], make_front: Callable[..., FrontEnd], body: str
) -> None:
    engine = Engine(make_front())
    answer = served(engine).post(admin.PATH, content=body)
    assert (answer.status_code, "body: expected a JSON object" in answer.text, engine.calls) == (400, True, [])


def test_a_change_reaches_the_engine_and_then_the_front_end(
    served: Callable[..., TestClient], make_front: Callable[..., FrontEnd], tiny_tokenizer: Any
) -> None:
    front = make_front()
    front.use_tokenizer(tiny_tokenizer)
    engine = Engine(front)
    client = served(engine)
    assert client.post(admin.PATH, json={"name": "new", "file": "p.safetensors"}).status_code == 200
    assert client.put(f"{admin.PATH}/safety", json={"file": "p.safetensors"}).status_code == 200
    assert [*front.points] == ["safety"]
    assert metric("slots_in_use") == 2
    assert client.delete(f"{admin.PATH}/safety").status_code == 200
    assert [call for call in engine.calls if call[0] != "steerfast_profiles"] == [
        ("steerfast_load", "new", "p.safetensors"),
        ("steerfast_replace", "safety", "p.safetensors"),
        ("steerfast_remove", "safety"),
    ]


def test_what_the_engine_refuses_changes_nothing_here(
    served: Callable[..., TestClient], make_front: Callable[..., FrontEnd]
) -> None:
    front = make_front()
    engine = Engine(front)
    engine.error = Exception("Call to steerfast_remove method failed: name: expected another")
    answer = served(engine).delete(f"{admin.PATH}/tone")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "name: expected another")
    engine.error = EngineDeadError()
    assert served(engine).delete(f"{admin.PATH}/tone").status_code == 503
    assert [*front.points] == ["safety", "tone"]


def test_a_profile_of_another_tokenizer_never_reaches_the_engine(
    served: Callable[..., TestClient],
    make_front: Callable[..., FrontEnd],
    profile: SteeringProfile,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    front = make_front()
    front.use_tokenizer(tiny_tokenizer)
    replace(profile, model=replace(profile.model, tokenizer_sha256="0" * 64)).save(tmp_path / "foreign.safetensors")
    engine = Engine(front)
    answer = served(engine).post(admin.PATH, json={"name": "new", "file": "foreign.safetensors"})
    assert (answer.status_code, "tokenizer hash" in answer.text, engine.calls) == (400, True, [])

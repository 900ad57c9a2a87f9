"""A locked server, asked as an attacker would: nobody gets out of the default profile, weakens it or gets another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from answers import Oracle, always, gated
from http_server import ENGINE, Server
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.core import EngineCore

from steerfast.cli.server_probe import STEERED, probe
from steerfast.text.prompts import read_prompts
from steerfast.vllm.admin import PATH
from steerfast.vllm.plugin import register

pytestmark = pytest.mark.real

MODEL = "smollm2"
TOKENS = 12
HARMFUL = read_prompts("steerfast:harmful_demo")[0]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("locked")
    gated().save(folder / "safety.safetensors")
    always().save(folder / "tone.safetensors")
    with Server(
        [
            *("-m", "steerfast", "serve", str(checkpoint)),
            *(
                "--profile",
                f"safety={folder / 'safety.safetensors'}",
                "--profile",
                f"tone={folder / 'tone.safetensors'}",
            ),
            *("--default", "safety", "--locked", "--directory", str(folder)),
            *("--", *ENGINE, "--served-model-name", MODEL, "--enable-scale-out"),
        ],
        folder / "server.log",
        {"VLLM_PLUGINS": ""},  # as if somebody had allowed no plugin at all
    ) as server:
        yield server


@pytest.fixture(scope="module")
def steered(oracle: Oracle) -> str:
    """What every request for HARMFUL is to get."""
    steered, plain = oracle.answer(HARMFUL, gated(), tokens=TOKENS), oracle.answer(HARMFUL, tokens=TOKENS)
    assert steered.fired
    assert steered.text != plain.text
    return steered.text


def ask(server: Server, more: str = "") -> tuple[int, str]:
    """Status, and answer or error; `more` is what else the body says, as JSON."""
    body = (
        f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": {json.dumps(HARMFUL)}}}], '
        f'"temperature": 0, "max_tokens": {TOKENS}{more}}}'
    )
    status, text = server.call("/v1/chat/completions", body)
    answer = json.loads(text)
    return status, answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]["message"]


def test_requests_that_ask_for_nothing_or_for_the_default_are_steered(server: Server, steered: str) -> None:
    assert ask(server) == (200, steered)
    assert ask(server, ', "vllm_xargs": {"steering": "safety"}') == (200, steered)
    assert ask(server, ', "vllm_xargs": {}') == (200, steered)
    assert ask(server, ', "vllm_xargs": null') == (200, steered)


@pytest.mark.parametrize(
    "xargs",
    [
        '{"steering": "off"}',
        '{"steering": "OFF"}',
        '{"steering": "tone"}',
        '{"steering": ""}',
        '{"steering": "none"}',
        '{"steering": "null"}',
        '{"steering": null}',
        '{"steering": false}',
        '{"steering": 0}',
        '{"steering": -1}',
        '{"steering": []}',
        '{"steering": ["off"]}',
        '{"steering": ["safety"]}',
        '{"steering": {"safety": 0}}',
        '{"steering": "safety\\u0000"}',
        '{"steering": "safety\\u200b"}',
        '{"steering": "\\uff53afety"}',  # fullwidth, which NFKC turns into an s
        '{"steering": "../tone"}',
        '{"steering": "safety/../tone"}',
        '{"steering_strength": 0}',
        '{"steering_strength": -1}',
        '{"steering_strength": 0.0001}',
        '{"steering_strength": 1}',
        '{"steering_strength": 10}',
        '{"steering_strength": NaN}',
        '{"steering_strength": -Infinity}',
        '{"steering_strength": 1e308}',
        '{"steering_strength": "0"}',
        '{"steering_strength": false}',
        '{"steering_strength": [0]}',
        '{"steering": "safety", "steering_strength": 0}',
        '{"steering": "safety", "steering_strength": 1}',
        '{"steerfast": "off"}',
        '{"steerfast": -1}',
        '{"Steering": "off"}',
        '{"STEERING_STRENGTH": 0}',
        '{"steering ": "off"}',
        '{"steering.strength": 0}',
        '{"steering": "safety", "steering": "off"}',  # the last one counts in JSON
    ],
)
def test_asking_for_anything_else_is_400(server: Server, xargs: str) -> None:
    status, message = ask(server, f', "vllm_xargs": {xargs}')
    assert status == 400, message
    assert "steer" in message.lower()


@pytest.mark.parametrize(
    "more",
    [
        ', "extra_args": {"steering": "off"}',
        ', "extra_body": {"vllm_xargs": {"steering": "off"}}',
        ', "steering": "off", "steering_strength": 0',
        ', "sampling_params": {"extra_args": {"steerfast": {"slot": -1}}}',
        ', "kv_transfer_params": {"steerfast": {"slot": -1, "strength": 0.0, "late": true, "open": false}}',
        ', "kv_transfer_params": {"do_remote_prefill": true, "steering": "off"}',
        ', "additional_config": {"steerfast": null}',
        ', "vllm_xargs": {"steering": "off"}, "vllm_xargs": {}',
        ', "vllm_xargs": {"other": "off", "profile": "tone"}',
        ', "cache_salt": "mine"',
        ', "priority": 0, "request_id": "steerfast"',
        ', "metadata": {"steering": "off"}, "user": "off"',
        ', "logit_bias": {}, "seed": 1, "top_k": 1',
        ', "skip_reading_prefix_cache": true',
        ', "lora_request": {"lora_name": "off"}',
    ],
)
def test_other_fields_do_not_help(server: Server, steered: str, more: str) -> None:
    status, text = ask(server, more)
    assert text == steered if status == 200 else status == 400


def test_other_ways_in_are_locked_too(server: Server, steered: str) -> None:
    message = {"role": "user", "content": HARMFUL}
    ways = {
        "/v1/responses": {"input": HARMFUL, "max_output_tokens": TOKENS},
        "/v1/messages": {"messages": [message], "max_tokens": TOKENS},
        "/v1/chat/completions/batch": {"messages": [[message]], "max_tokens": TOKENS},
        "/v1/chat/completions": {"messages": [message], "max_tokens": TOKENS, "stream": False},
        "/invocations": {"messages": [message], "max_tokens": TOKENS},
    }
    for path, body in ways.items():
        status, text = server.call(path, {"model": MODEL, "temperature": 0, **body})
        assert status == 200
        assert json.dumps(steered)[1:-1] in text, path
        for xargs in ({"steering": "off"}, {"steering": "tone"}, {"steering_strength": 0}):
            assert server.call(path, {"model": MODEL, "temperature": 0, **body, "vllm_xargs": xargs})[0] == 400, path


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/collective_rpc", {404, 405}),
        ("/reset_prefix_cache", {404, 405}),
        ("/v1/load_lora_adapter", {404, 405}),
        ("/sleep", {404, 405}),
        ("/update_weights", {404, 405}),
        (PATH, {404}),
        (f"{PATH}/safety", {404}),
    ],
)
def test_routes_into_the_engine_are_not_there(server: Server, path: str, statuses: set[int]) -> None:
    body = {
        "method": "steerfast_clear", "args": [0], "token_ids": [1, 2, 3], "name": "safety", "file": "tone.safetensors",
        "sampling_params": {"max_tokens": 1, "extra_args": {"steering": "off"}},
    }  # fmt: skip
    assert server.call(path, body)[0] in statuses
    assert server.call(path, body, method="PUT", headers={"Authorization": "Bearer "})[0] in statuses


def test_token_ids_and_raw_sampling_parameters_are_locked_too(server: Server, steered: str, oracle: Oracle) -> None:
    def generate(extra: object, **more: object) -> tuple[int, str]:
        sampling = {"temperature": 0, "max_tokens": TOKENS, "extra_args": extra}
        body = {"model": MODEL, "token_ids": oracle.prompt(HARMFUL), "sampling_params": sampling, **more}
        return server.call("/inference/v1/generate", body)

    for extra in (None, {}, {"steering": "safety"}, {"kv_transfer_params": {"steering": "off"}}):
        status, text = generate(extra, kv_transfer_params={"steerfast": [{"slot": 1}]})
        assert status == 200, text
        assert "steerfast" not in text
        answer = json.loads(text)["choices"][0]["token_ids"]
        assert oracle.tokenizer.decode(answer, skip_special_tokens=True) == steered
    entry = {"slot": 1, "strength": 0.0, "span": {}}
    for extra in (
        {"steering": "off"},
        {"steering": None},
        {"steering_strength": 1},
        {"steerfast": [entry]},
        {"steerfast": None},
    ):
        status, text = generate(extra)
        assert (status, "this server is locked" in text or "expected the keys" in text) == (400, True), text


GENERATE = {
    "/cohere/v2/chat", "/generative_scoring", "/inference/v1/generate", "/invocations", "/v1/chat/completions",
    "/v1/chat/completions/batch", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/systemone",
}  # fmt: skip
ANSWER_NOTHING = {
    "/detokenize", "/health", "/inference/v1/abort_requests", "/is_scaling_elastic_ep", "/kv_event_sources", "/load",
    "/metrics", "/ping", "/scale_elastic_ep", "/tokenize", "/v1/messages/count_tokens", "/v1/models",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/version",
}  # fmt: skip


def test_every_route_is_known(server: Server) -> None:
    """A route that a later vLLM adds has to be looked at: does the lock hold there?"""
    paths = set(json.loads(server.call("/openapi.json")[1])["paths"])
    texts = {path for path in paths if path.endswith(("/render", "/derender"))}
    assert paths - texts <= GENERATE | ANSWER_NOTHING


def test_a_route_that_takes_no_keys_is_steered(server: Server) -> None:
    before = server.metric("steerfast_gate_evaluations_total", profile="safety")
    scoring = {"model": MODEL, "query": HARMFUL, "items": ["a", "b"], "label_token_ids": [1, 2]}
    assert server.call("/generative_scoring", scoring)[0] == 200
    assert server.metric("steerfast_gate_evaluations_total", profile="safety") == before + 2


def test_no_answer_holds_scores(server: Server) -> None:
    """Answers of one token come with the decision; vLLM hands on what an engine puts on its outputs."""
    message = {"role": "user", "content": HARMFUL}
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "steerfast=1", "steerfast": "[1]"}
    for path, body in (
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 1, "stream": True}),
        ("/v1/completions", {"prompt": HARMFUL, "max_tokens": 1}),
        ("/v1/responses", {"input": HARMFUL, "max_output_tokens": 1}),
        ("/v1/messages", {"messages": [message], "max_tokens": 1}),
    ):
        for forged in ({}, {"kv_transfer_params": {"steerfast": [{"profile": "safety", "scores": [1]}]}}):
            status, text = server.call(path, {"model": MODEL, **body, **forged}, headers=headers)
            assert status == 200, text
            assert "steerfast" not in text
            assert "scores" not in text


def test_beam_search_is_refused(server: Server) -> None:
    status, message = ask(server, ', "n": 2, "use_beam_search": true')
    assert status == 400
    assert "use_beam_search: expected false" in message


def test_every_prompt_was_judged_and_none_got_out(server: Server, steered: str) -> None:
    before = server.metric("steerfast_gate_evaluations_total", profile="safety")
    assert ask(server) == (200, steered)
    assert server.metric("steerfast_gate_evaluations_total", profile="safety") == before + 1
    assert server.metric("steerfast_steered_requests_total", profile="tone") == 0
    assert server.metric("steerfast_slots_in_use") == 2


def test_the_server_says_that_it_is_locked(server: Server) -> None:
    found = probe(server.url)
    assert (found.verdict, (found.info or {}).get("locked")) == (STEERED, "true")
    assert server.log.read_text().count("steers 2 profiles (safety, tone): default safety, locked\n") == 1


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize(
    "variable", ["VLLM_USE_RUST_FRONTEND", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"]
)
def test_ways_around_the_lock_stop_an_engine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, headless: bool
) -> None:
    """On every node, with or without an API server; and once more where the engine core starts."""
    register()
    gated().save(tmp_path / "safety.safetensors")
    steering = {"profiles": {"safety": str(tmp_path / "safety.safetensors")}, "default": "safety", "locked": True}
    engine = AsyncEngineArgs(str(checkpoint), additional_config={"steerfast": steering}, max_model_len=512)
    made = engine.create_engine_config(headless=headless)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=f"expected {variable} unset, got '1'"):
        engine.create_engine_config(headless=headless)
    with pytest.raises(ValueError, match=f"expected {variable} unset, got '1'"):
        EngineCore._initialize_kv_caches(None, made)  # type: ignore[arg-type]


@pytest.mark.slow
def test_development_mode_and_a_lock_do_not_go_together(checkpoint: Path, tmp_path: Path) -> None:
    gated().save(tmp_path / "safety.safetensors")
    command = ["-m", "steerfast", "serve", str(checkpoint), "--profile", f"safety={tmp_path / 'safety.safetensors'}"]
    with pytest.raises(RuntimeError, match="expected VLLM_SERVER_DEV_MODE unset"):
        Server(
            [*command, "--default", "safety", "--locked", "--", *ENGINE],
            tmp_path / "server.log",
            {"VLLM_SERVER_DEV_MODE": "1"},
        )

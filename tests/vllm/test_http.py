"""`steerfast serve` on the real engine, asked over HTTP as its users do; and what it counts, and its admin routes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import openai
import torch
import vllm
from answers import Oracle, always, gated
from http_server import ENGINE, Server
from safetensors.torch import save_file
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

import steerfast
from steerfast.cli.server_probe import STEERED, probe
from steerfast.profile import SteeringProfile
from steerfast.text.prompts import read_prompts
from steerfast.vllm.admin import PATH

pytestmark = pytest.mark.real

KEY = "correct horse battery staple"
MODEL = "smollm2"
TOKENS = 12
HARMFUL = read_prompts("steerfast:harmful_demo")[0]
HARMLESS = read_prompts("steerfast:harmless_demo")[0]
CLEAR = 0.01  # logits by which every token of an expected answer leads, far above what sums may differ by


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SteeringProfile]:
    return {"safety": gated(), "tone": always(), "other": gated(seed=5)}


@pytest.fixture(scope="module")
def folder(profiles: dict[str, SteeringProfile], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    for name, profile in profiles.items():
        profile.save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def expect(oracle: Oracle, profiles: dict[str, SteeringProfile]) -> Any:
    """A function (prompt, profile=None, strength=1) -> the text that transformers gives."""
    known: dict[Any, str] = {}

    def answer(prompt: str, name: str | None = None, strength: float = 1.0) -> str:
        if (prompt, name, strength) not in known:
            found = oracle.answer(prompt, None if name is None else profiles[name], strength, TOKENS)
            assert found.margin > CLEAR
            known[prompt, name, strength] = found.text
        return known[prompt, name, strength]

    return answer


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, folder: Path, profiles: dict[str, SteeringProfile], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("loadable")
    for name in ("other", "tone"):
        (directory / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    never = replace(profiles["safety"], points={"never": torch.full((30,), 9.0)})
    never.save(directory / "never.safetensors")
    (directory / "link.safetensors").symlink_to(folder / "safety.safetensors")
    (directory / "notes.txt").write_text("no profile")
    (directory / "damaged.safetensors").write_bytes((folder / "other.safetensors").read_bytes()[:-100])
    save_file({"x": torch.ones(1)}, directory / "deep.safetensors", metadata={"steerfast": "[" * 100_000})
    with Server(
        [
            *("-m", "steerfast", "serve", str(checkpoint)),
            *(
                "--profile",
                f"safety={folder / 'safety.safetensors'}",
                "--profile",
                f"tone={folder / 'tone.safetensors'}",
            ),
            *("--default", "safety", "--slots", "4", "--layers", "10-20,29", "--directory", str(directory)),
            *("--", *ENGINE, "--served-model-name", MODEL, "--additional-config", '{"somebody": "else"}'),
        ],
        tmp_path_factory.mktemp("log") / "server.log",
        {"STEERFAST_ADMIN_KEY": KEY},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def chat(client: openai.OpenAI, prompt: str, **xargs: Any) -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=TOKENS,
        extra_body={"vllm_xargs": xargs} if xargs else None,
    )
    assert answer.choices[0].message.content is not None
    assert "steerfast" not in answer.to_json()
    return answer.choices[0].message.content


# ---- requests ------------------------------------------------------------------------------------


def test_the_default_profile_steers_whom_its_gate_fires_for(client: openai.OpenAI, expect: Any) -> None:
    assert expect(HARMFUL, "safety") != expect(HARMFUL)
    assert chat(client, HARMFUL) == expect(HARMFUL, "safety")
    assert chat(client, HARMLESS) == expect(HARMLESS)


def test_a_request_names_a_profile_and_a_strength(client: openai.OpenAI, expect: Any) -> None:
    assert chat(client, HARMFUL, steering="safety") == expect(HARMFUL, "safety")
    assert chat(client, HARMFUL, steering="tone") == expect(HARMFUL, "tone")
    weaker = expect(HARMFUL, "safety", 0.7)
    assert weaker != expect(HARMFUL, "safety")
    assert chat(client, HARMFUL, steering_strength=0.7) == weaker
    assert chat(client, HARMFUL, steering="safety", steering_strength=0.7) == weaker
    assert chat(client, HARMFUL, steering="safety", steering_strength=0) == expect(HARMFUL)
    assert chat(client, HARMFUL, steering_strength=True) == expect(HARMFUL, "safety")  # vLLM reads a 1


def test_a_request_names_a_stack(client: openai.OpenAI, oracle: Oracle, profiles: Any) -> None:
    """Both gates decide each for its own, with a strength each."""
    stack = [profiles["safety"], profiles["tone"]]
    for prompt in (HARMFUL, HARMLESS):
        tokens, _ = oracle.answer_of_stack(oracle.prompt(prompt), stack, (1.0, 0.5), TOKENS)
        text = oracle.tokenizer.decode(tokens, skip_special_tokens=True)
        assert chat(client, prompt, steering="safety,tone", steering_strength="1,0.5") == text


def test_off_is_nobody(client: openai.OpenAI, expect: Any) -> None:
    assert chat(client, HARMFUL, steering="off") == expect(HARMFUL)


def test_completions_and_batches_of_them(client: openai.OpenAI, oracle: Oracle, expect: Any) -> None:
    prompts = [oracle.prompt(HARMFUL), oracle.prompt(HARMLESS)]
    for name in ("safety", "tone"):
        answer = client.completions.create(
            model=MODEL,
            prompt=prompts,
            temperature=0,
            max_tokens=TOKENS,
            extra_body={"vllm_xargs": {"steering": name}},
        )
        fired = [name, name if name == "tone" else None]
        assert [c.text for c in answer.choices] == [
            expect(text, who) for text, who in zip((HARMFUL, HARMLESS), fired, strict=True)
        ]


@pytest.mark.parametrize("name", ["safety", "tone", "off"])
def test_streams(client: openai.OpenAI, expect: Any, name: str) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": HARMFUL}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"vllm_xargs": {"steering": name}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == expect(HARMFUL, None if name == "off" else name)


def test_siblings_of_one_prompt(client: openai.OpenAI, expect: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": HARMFUL}],
        max_tokens=TOKENS,
        n=2,
        extra_body={"top_k": 1},  # vLLM refuses siblings at temperature 0
    )
    assert [choice.message.content for choice in answer.choices] == [expect(HARMFUL, "safety")] * 2


def test_many_at_once_each_with_its_own(client: openai.OpenAI, expect: Any) -> None:
    wanted = [(prompt, name) for prompt in (HARMFUL, HARMLESS) for name in ("safety", "tone", "off")] * 2
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        prompt, name = wanted[number]
        found[number] = chat(client, prompt, steering=name)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (prompt, name) in enumerate(wanted):
        fired = name == "tone" or (name == "safety" and prompt == HARMFUL)
        assert found[number] == expect(prompt, name if fired else None)


def test_other_ways_in_take_the_same_keys(server: Server, expect: Any) -> None:
    message = {"role": "user", "content": HARMFUL}
    messages_name_profiles = "vllm_xargs" in AnthropicMessagesRequest.model_fields  # not in vLLM 0.26
    for xargs, expected in (({}, "safety"), ({"steering": "tone"}, "tone"), ({"steering": "off"}, None)):
        more = {"temperature": 0, "vllm_xargs": xargs}
        text = expect(HARMFUL, expected)
        status, answer = server.call(
            "/v1/responses", {"model": MODEL, "input": HARMFUL, "max_output_tokens": TOKENS, **more}
        )
        assert (status, json.loads(answer)["output"][0]["content"][0]["text"]) == (200, text)
        status, answer = server.call(
            "/v1/messages", {"model": MODEL, "messages": [message], "max_tokens": TOKENS, **more}
        )
        written = text if messages_name_profiles else expect(HARMFUL, "safety")
        assert (status, json.loads(answer)["content"][0]["text"]) == (200, written)
        status, answer = server.call(
            "/v1/chat/completions/batch",
            {"model": MODEL, "messages": [[message], [message]], "max_tokens": TOKENS, **more},
        )
        assert status == 200
        assert [choice["message"]["content"] for choice in json.loads(answer)["choices"]] == [text] * 2


# ---- bad requests --------------------------------------------------------------------------------

KNOWN = "steering: expected one of safety, tone, off, got "
RANGE = "steering_strength: expected a number from 0 to 10, got "


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ('{"steering": "nobody"}', KNOWN + "'nobody'"),
        ('{"steering": ""}', KNOWN + "''"),
        ('{"steering": "Safety"}', KNOWN),
        ('{"steering": "OFF"}', KNOWN),
        ('{"steering": "safety "}', KNOWN),
        ('{"steering": "s\\u0430fety"}', KNOWN),  # a Cyrillic a
        ('{"steering": "\\u202esafety\\u0000"}', KNOWN),
        ('{"steering": "../../etc/passwd"}', KNOWN),
        ('{"steering": "/etc/safety.safetensors"}', KNOWN),
        (f'{{"steering": "{"x" * 100_000}"}}', KNOWN),
        ('{"steering": 0}', KNOWN),
        ('{"steering": -1}', KNOWN),
        ('{"steering": true}', KNOWN),
        ('{"steering": 1e400}', KNOWN),
        ('{"steering": ["safety", "off"]}', KNOWN),
        ('{"steering": []}', KNOWN),
        ('{"steering": {"name": "off"}}', "vllm_xargs.steering"),  # vLLM takes no objects here
        ('{"steering": null}', "vllm_xargs.steering"),
        ('{"steering_strength": NaN}', RANGE),
        ('{"steering_strength": Infinity}', RANGE),
        ('{"steering_strength": -Infinity}', RANGE),
        ('{"steering_strength": 1e308}', RANGE),
        ('{"steering_strength": 1e999}', RANGE),
        ('{"steering_strength": 99999999999999999999999999}', "integers must be between"),
        ('{"steering_strength": 10.001}', RANGE),
        ('{"steering_strength": -0.001}', RANGE),
        ('{"steering_strength": "11"}', RANGE),
        ('{"steering": "safety,safety"}', "steering"),
        ('{"steering_strength": "1,1,1"}', "steering_strength"),
        ('{"steering_strength": "NaN"}', RANGE),
        ('{"steering_strength": [1.0]}', RANGE),
        ('{"steering": "off", "steering_strength": 1}', "steering_strength: expected steering to name a profile"),
        ('{"steerfast": "x"}', "steerfast"),
        ('{"steerfast.slot": -1}', "steerfast"),
        ('{"STEERING": "off"}', "STEERING"),
        ('{"steering_strenght": 1}', "steering_strenght"),
    ],
)
def test_what_cannot_be_is_400_and_says_what_could(server: Server, xargs: str, words: str) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "hi", "max_tokens": 1, "vllm_xargs": {xargs}}}'
    status, text = server.call("/v1/completions", body)
    assert status == 400, text
    error = json.loads(text)["error"]
    assert words in error["message"]
    assert len(error["message"]) < 4000 or "validation error" in error["message"]


def test_beam_search_is_refused(server: Server) -> None:
    for path, asked in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        body = {"model": MODEL, "max_tokens": 2, "n": 2, "use_beam_search": True, **asked}
        status, text = server.call(path, body)
        assert status == 400
        assert "use_beam_search: expected false" in json.loads(text)["error"]["message"]


def test_unknown_fields_beside_vllm_xargs_change_nothing(server: Server, expect: Any) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": HARMFUL}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "extra_args": {"steering": "off"},
        "steering": "off",
        "sampling_params": {"extra_args": {"steering": "off"}},
        "additional_config": {"steerfast": None},
    }
    status, text = server.call("/v1/chat/completions", body)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == expect(HARMFUL, "safety")


# ---- metrics and log -----------------------------------------------------------------------------


def counts(server: Server, name: str) -> dict[str, float]:
    return {
        what: server.metric(f"steerfast_{what}", profile=name)
        for what in (
            "gate_evaluations_total", "gate_firings_total", "steered_requests_total", "nan_scores_total",
            "gate_score_count",
        )
    }  # fmt: skip


def test_metrics_count_what_happened(server: Server, client: openai.OpenAI) -> None:
    before = {name: counts(server, name) for name in ("safety", "tone")}
    rejected = {f: server.metric("steerfast_rejected_requests_total", field=f) for f in ("steering", "other")}
    for _ in range(3):
        chat(client, HARMFUL)
    chat(client, HARMLESS)
    chat(client, HARMFUL, steering="off")
    chat(client, HARMFUL, steering="tone")
    for xargs in ({"steering": "x"}, {"steering": "y"}, {"steerfast": "z"}):
        with pytest.raises(openai.BadRequestError):
            chat(client, HARMFUL, **xargs)
    after = {name: counts(server, name) for name in ("safety", "tone")}
    grown = {name: {what: after[name][what] - before[name][what] for what in after[name]} for name in after}
    assert grown["safety"] == {
        "gate_evaluations_total": 4,
        "gate_firings_total": 3,
        "steered_requests_total": 3,
        "nan_scores_total": 0,
        "gate_score_count": 4,
    }
    assert grown["tone"] == {
        "gate_evaluations_total": 0,  # it has no gate
        "gate_firings_total": 0,
        "steered_requests_total": 1,
        "nan_scores_total": 0,
        "gate_score_count": 0,
    }
    assert server.metric("steerfast_rejected_requests_total", field="steering") == rejected["steering"] + 2
    assert server.metric("steerfast_rejected_requests_total", field="other") == rejected["other"] + 1
    assert server.metric("steerfast_slots_in_use") == 2


def test_the_score_histogram_holds_the_score_of_the_log_line(server: Server, client: openai.OpenAI) -> None:
    def up_to(limit: str) -> float:
        return server.metric("steerfast_gate_score_bucket", le=limit, profile="safety")

    before = {limit: up_to(limit) for limit in ("0.0", "0.01", "0.02", "0.03", "0.05", "0.07", "0.1")}
    chat(client, HARMFUL)
    line = [line for line in server.log.read_text().splitlines() if "profile safety fired, scores" in line][-1]
    score = float(line.rpartition(" ")[2])
    assert 0 < score < 0.1
    assert {limit: up_to(limit) - before[limit] for limit in before} == {
        limit: score <= float(limit) for limit in before
    }


def test_no_client_writes_a_line_of_the_log(server: Server) -> None:
    forged = "Request 'chatcmpl-victim': profile safety shut, scores -9.99"
    for number, between in enumerate(("\n", "\r\x1b[2K", "\u2028", "\x85")):
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 1, "request_id": f"r{number}{between}{forged}"}
        assert server.call("/v1/completions", body)[0] == 200
    lines = [line for line in server.log.read_text().split("\n") if "profile safety" in line and "victim" in line]
    assert len(lines) == 4
    for number, line in enumerate(lines):
        assert f'Request "cmpl-r{number}' in line
        assert line.removesuffix("\r").isprintable()
        assert line.count("scores") == 2


def test_the_server_says_that_it_steers(server: Server) -> None:
    assert server.log.read_text().count("steers 2 profiles (safety, tone): default safety\n") == 1
    found = probe(server.url)
    assert (found.verdict, found.vllm) == (STEERED, vllm.__version__)
    assert found.reason == "/v1/chat/completions refuses a wrong profile"
    assert found.info == {"version": steerfast.__version__, "vllm": vllm.__version__, "locked": "false"}


# ---- admin ---------------------------------------------------------------------------------------


def admin(server: Server, method: str, name: str = "", body: Any = None, key: str = KEY) -> tuple[int, Any]:
    path = PATH + (f"/{name}" if name else "")
    status, text = server.call(path, body, method=method, headers={"Authorization": f"Bearer {key}"})
    return status, json.loads(text)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "", KEY, f"Basic {KEY}", f"Bearer {KEY}x"])
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", ""), ("PUT", "/safety"), ("DELETE", "/tone")])
def test_without_the_key_nothing_is_told_or_done(server: Server, header: str | None, method: str, path: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    body = None if method in ("GET", "DELETE") else {"name": "n", "file": "other.safetensors"}
    status, text = server.call(PATH + path, body, method=method, headers=headers)
    assert status == 401
    assert "tone" not in text


def test_list(server: Server) -> None:
    status, answer = admin(server, "GET")
    assert status == 200
    listed = {each["name"]: each for each in answer["profiles"]}
    assert list(listed) == ["safety", "tone"]
    assert listed["safety"]["default"]
    assert listed["safety"]["current"]
    assert listed["tone"]["slot"] == 1


def test_load_replace_and_remove_while_a_request_runs(
    server: Server, client: openai.OpenAI, expect: Any, oracle: Oracle, profiles: dict[str, SteeringProfile]
) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, HARMFUL, steering="fresh")
    assert admin(server, "POST", body={"name": "fresh", "file": "other.safetensors"})[0] == 200
    assert chat(client, HARMFUL, steering="fresh") == expect(HARMFUL, "other")
    assert server.metric("steerfast_slots_in_use") == 3

    long = 96
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": HARMFUL}], temperature=0, max_tokens=long, stream=True,
        extra_body={"vllm_xargs": {"steering": "fresh"}, "ignore_eos": True},
    )  # fmt: skip
    text = next(chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
    status, answer = admin(server, "PUT", "fresh", {"file": "tone.safetensors"})
    assert status == 200
    held = [each for each in answer["profiles"] if each["name"] == "fresh"]
    assert [(each["version"], each["current"], each["requests"]) for each in held] == [(2, True, 0), (1, False, 1)]
    assert chat(client, HARMFUL, steering="fresh") == expect(HARMFUL, "tone")
    assert admin(server, "DELETE", "fresh")[0] == 200
    with pytest.raises(openai.BadRequestError):
        chat(client, HARMFUL, steering="fresh")
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    # The start of it, as far as transformers can be sure; all of it, from a quiet server, below.
    assert text.startswith(expect(HARMFUL, "other"))
    assert admin(server, "POST", body={"name": "fresh", "file": "other.safetensors"})[0] == 200
    again = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": HARMFUL}], temperature=0, max_tokens=long,
        extra_body={"vllm_xargs": {"steering": "fresh"}, "ignore_eos": True},
    )  # fmt: skip
    assert text == again.choices[0].message.content
    status, answer = admin(server, "DELETE", "fresh")
    assert [each["name"] for each in answer["profiles"]] == ["safety", "tone"]
    assert server.metric("steerfast_slots_in_use") == 2
    assert 'profile="fresh"' not in server.call("/metrics")[1]


def test_a_request_names_a_threshold(server: Server, client: openai.OpenAI, expect: Any) -> None:
    """The same prompt, whose blocks are cached, is decided by the threshold that each request names."""
    assert admin(server, "POST", body={"name": "both", "file": "never.safetensors"})[0] == 200
    assert server.metric("steerfast_slots_in_use") == 4
    for _ in range(2):
        assert chat(client, HARMFUL, steering="both") == expect(HARMFUL, "safety")
        assert chat(client, HARMFUL, steering="both", steering_threshold="never") == expect(HARMFUL)
    for name, says in (("both", "for both one of never, got 'x'"), ("tone", "for tone nothing")):
        with pytest.raises(openai.BadRequestError, match=f"steering_threshold: expected {says}"):
            chat(client, HARMFUL, steering=name, steering_threshold="x")
    assert admin(server, "DELETE", "both")[0] == 200
    assert server.metric("steerfast_slots_in_use") == 2


@pytest.mark.parametrize(
    "file",
    [
        "../safety.safetensors", "..", ".", "", "/etc/passwd", "notes.txt", "link.safetensors", "absent.safetensors",
        "damaged.safetensors", "deep.safetensors", "other.safetensors/", "sub/other.safetensors",
        "..\\other.safetensors",
        "other.safetensors\u0000", "OTHER.SAFETENSORS", "http://example.invalid/other.safetensors",
        "ｏther.safetensors", ".other.safetensors", "x" * 5000 + ".safetensors",
    ],
)  # fmt: skip
def test_files_from_elsewhere_are_refused(server: Server, file: str) -> None:
    for method, name in (("POST", ""), ("PUT", "tone")):
        body = {"file": file} if name else {"name": "n", "file": file}
        status, answer = admin(server, method, name, body)
        assert status == 400, answer
    assert [each["name"] for each in admin(server, "GET")[1]["profiles"]] == ["safety", "tone"]


@pytest.mark.parametrize(
    ("method", "name", "body", "status", "words"),
    [
        ("POST", "", {"name": "tone", "file": "other.safetensors"}, 400, "name: expected a new one, got 'tone'"),
        ("POST", "", {"name": "off", "file": "other.safetensors"}, 400, "'off'"),
        ("POST", "", {"name": "../x", "file": "other.safetensors"}, 400, "letters, digits"),
        (
            "POST",
            "",
            {"name": "n" * 1_000_000, "file": "other.safetensors"},
            400,
            "name: expected at most 255 printable",
        ),
        ("POST", "", '{"name": "\\ud800", "file": "other.safetensors"}', 400, "name: expected at most 255 printable"),
        ("POST", "", {"name": "n\r\nINFO x", "file": "other.safetensors"}, 400, "got 'n\\r\\nINFO x'"),
        ("POST", "", {"name": "n"}, 400, "body: expected a JSON object with the strings name, file"),
        ("POST", "", {"name": "n", "file": "other.safetensors", "slot": 0}, 400, "body: expected"),
        ("POST", "", {"name": 1, "file": "other.safetensors"}, 400, "body: expected"),
        ("POST", "", "no JSON", 400, "body: expected"),
        ("POST", "", "[]", 400, "body: expected"),
        ("POST", "", "[" * 100_000, 400, "body: expected"),
        ("PUT", "absent", {"file": "other.safetensors"}, 404, "name: expected one of safety, tone, got 'absent'"),
        ("PUT", "tone", {}, 400, "body: expected"),
        ("DELETE", "absent", None, 404, "name: expected one of safety, tone, got 'absent'"),
        ("DELETE", "safety", None, 400, "default"),
    ],
)
def test_what_an_administrator_cannot_ask_for(
    server: Server, method: str, name: str, body: Any, status: int, words: str
) -> None:
    found, answer = admin(server, method, name, body)
    assert found == status
    assert words in answer["error"]["message"]
    assert len(answer["error"]["message"]) <= 1000


def test_a_full_bank_says_so(server: Server) -> None:
    for name in ("a", "b"):
        assert admin(server, "POST", body={"name": name, "file": "other.safetensors"})[0] == 200
    status, answer = admin(server, "POST", body={"name": "c", "file": "other.safetensors"})
    assert (status, "slots: expected 1 free" in answer["error"]["message"]) == (400, True)
    for name in ("a", "b"):
        assert admin(server, "DELETE", name)[0] == 200


def test_the_server_answers_as_at_first(client: openai.OpenAI, expect: Any) -> None:
    assert chat(client, HARMFUL) == expect(HARMFUL, "safety")
    assert chat(client, HARMFUL, steering="tone") == expect(HARMFUL, "tone")
    assert chat(client, HARMLESS) == expect(HARMLESS)

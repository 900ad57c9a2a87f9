"""vLLM's own server with the plugin installed and nothing configured: as without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from answers import Oracle, gated
from http_server import ENGINE, Server

from steerfast.cli.server_probe import NOT_STEERED, probe
from steerfast.text.prompts import read_prompts

pytestmark = pytest.mark.real

MODEL = "smollm2"
TOKENS = 12
HARMFUL = read_prompts("steerfast:harmful_demo")[0]
STOCK = ("-m", "vllm.entrypoints.openai.api_server")


def started(checkpoint: Path, folder: Path, *options: str) -> Server:
    command = [*STOCK, "--model", str(checkpoint), *ENGINE, "--served-model-name", MODEL, *options]
    return Server(command, folder / "server.log")


def body(**more: object) -> dict[str, object]:
    message = {"role": "user", "content": HARMFUL}
    return {"model": MODEL, "messages": [message], "temperature": 0, "max_tokens": TOKENS, **more}


@pytest.mark.slow
def test_an_idle_plugin_changes_no_answer_and_adds_nothing(checkpoint: Path, oracle: Oracle, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as server:
        xargs = {"steering": "nobody knows", "steering_strength": 99}  # not its business
        status, text = server.call("/v1/chat/completions", body(vllm_xargs=xargs))
        assert status == 200
        assert json.loads(text)["choices"][0]["message"]["content"] == oracle.answer(HARMFUL, tokens=TOKENS).text
        assert "steerfast_" not in server.call("/metrics")[1]
        assert probe(server.url).verdict == NOT_STEERED
        assert server.call("/steerfast/profiles")[0] == 404
        assert server.call("/v1/chat/completions", body(n=2, use_beam_search=True))[0] == 200


@pytest.mark.slow
def test_the_same_server_steers_when_configured(checkpoint: Path, oracle: Oracle, tmp_path: Path) -> None:
    profile = tmp_path / "safety.safetensors"
    gated().save(profile)
    config = {"steerfast": {"profiles": {"safety": str(profile)}, "default": "safety"}}
    with started(checkpoint, tmp_path, "--additional-config", json.dumps(config)) as server:
        status, text = server.call("/v1/chat/completions", body())
        assert status == 200
        steered = oracle.answer(HARMFUL, gated(), tokens=TOKENS)
        assert json.loads(text)["choices"][0]["message"]["content"] == steered.text


@pytest.mark.slow
def test_a_configuration_that_cannot_be_stops_the_start(checkpoint: Path, tmp_path: Path) -> None:
    config = {"steerfast": {"profiles": {"safety": "absent.safetensors"}}}
    with pytest.raises(RuntimeError, match=r"absent\.safetensors"):
        started(checkpoint, tmp_path, "--additional-config", json.dumps(config))

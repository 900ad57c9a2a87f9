"""`steerfast doctor --url` against servers that answer as vLLM does, steered or not, and others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from command_line import CommandLine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REFUSED = (400, '{"error": {"message": "steering: expected one of safety, off, got \'asked by steerfast doctor\'"}}')
INFO = 'vllm:x 1.0\nsteerfast_info{locked="true",version="0.1.0",vllm="0.32.0"} 1.0\n'
STOCK = {"/version": (200, '{"version": "0.32.0"}'), "/v1/models": (200, '{"data": [{"id": "m"}]}')}

_COMMAND = CommandLine("doctor")


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """A function (path -> status and text) -> the address of a server that answers so; else 404."""
    running: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, tuple[int, str]], asked: list[Any] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if asked is not None:
                    asked.append((self.path, self.headers.get("Authorization"), body))
                status, text = answers.get(self.path, (404, '{"detail": "Not Found"}'))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(url: str, *more: str) -> tuple[int, dict[str, Any]]:
    result = _COMMAND.run("--url", url, "--json", "-", *more)
    return result.exit_code, json.loads(result.stdout)


def test_a_server_that_steers(serve: Callable[..., str]) -> None:
    asked: list[Any] = []
    url = serve({**STOCK, "/metrics": (200, INFO), CHAT: REFUSED}, asked)
    status, found = ask(f"{url}/v1/", "--api-key", "k")
    assert (status, found["verdict"], found["vllm"]) == (0, "steered", "0.32.0")
    assert found["info"] == {"locked": "true", "version": "0.1.0", "vllm": "0.32.0"}
    assert {key for _, key, _ in asked} == {"Bearer k"}
    body = json.loads(next(body for path, _, body in asked if path == CHAT))
    assert (body["model"], body["max_tokens"], list(body["vllm_xargs"])) == ("m", 1, ["steering"])
    line = _COMMAND.run("--url", url).stdout
    assert line == f"{url}: steered (vLLM 0.32.0, steerfast 0.1.0, locked): {CHAT} refuses a wrong profile\n"


def test_a_model_without_chats_is_asked_to_complete(serve: Callable[..., str]) -> None:
    url = serve({**STOCK, CHAT: (400, '{"error": {"message": "no chat template"}}'), COMPLETIONS: REFUSED})
    status, found = ask(url)
    assert (status, found["reason"]) == (0, f"{COMPLETIONS} refuses a wrong profile")


def test_a_server_that_answers_does_not_steer_whatever_its_metrics_say(serve: Callable[..., str]) -> None:
    for metrics in ("", INFO):
        status, found = ask(serve({**STOCK, "/metrics": (200, metrics), CHAT: (200, "{}")}))
        assert (status, found["verdict"]) == (1, "not steered")
        assert found["reason"] == f"{CHAT} answers a request for a wrong profile"


def test_without_the_key_metrics_decide(serve: Callable[..., str]) -> None:
    closed = dict.fromkeys(("/v1/models", CHAT, COMPLETIONS), (401, "Unauthorized"))
    status, found = ask(serve({**closed, "/metrics": (200, INFO)}))
    assert (status, found["reason"]) == (0, f"a metric steerfast_info at /metrics ({COMPLETIONS}: status 401)")
    status, found = ask(serve(closed))
    assert (status, found["reason"]) == (1, f"no metric steerfast_info at /metrics ({COMPLETIONS}: status 401)")


def test_another_server_does_not_steer(serve: Callable[..., str]) -> None:
    for answers in (
        {},
        {"/version": (200, "[" * 100_000), "/metrics": (200, "\x1b["), "/v1/models": (200, '{"data": []}')},
    ):
        assert ask(serve(answers))[0] == 1


def test_no_server_is_status_2(serve: Callable[..., str]) -> None:
    for url in ("http://127.0.0.1:1", "http://host.invalid:8000", "http://127.0.0.1:99999", "http://[::1"):
        status, found = ask(url)
        assert (status, found["verdict"]) == (2, "unreachable")
    assert "--url: expected http://" in _COMMAND.failed(2, "--url", "localhost:8000")
    assert "--url: expected http://" in _COMMAND.failed(2, "--url", "file:///etc/passwd")

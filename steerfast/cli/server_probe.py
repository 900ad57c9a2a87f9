"""Ask a running server whether it steers, as `steerfast doctor --url` does."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

STEERED, NOT_STEERED, UNREACHABLE = "steered", "not steered", "unreachable"
_TIMEOUT = 20  # seconds, of each question
_WRONG = "asked by steerfast doctor"  # no profile can have this name
_INFO = re.compile(r"^steerfast_info\{(.*)\} 1(?:\.0)?$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Probe:
    """What a server says about steering.

    verdict: `STEERED`, `NOT_STEERED` or `UNREACHABLE`. reason: why, in a sentence.
    vllm: its version. info: labels of ``steerfast_info`` at /metrics; None: it has no such metric, or no /metrics.
    """

    url: str
    verdict: str
    reason: str
    vllm: str | None = None
    info: dict[str, str] | None = None


def probe(url: str, key: str | None = None) -> Probe:
    """Ask the server at `url`: its version, its metrics, and for a profile that cannot be, which it has to refuse.

    Args:
        key: vLLM's ``--api-key``, where the server has one.
    """
    status, text = ask(url, "/version", key)
    if not status:
        return Probe(url, UNREACHABLE, text)
    version = _field(text, "version")
    shown = _INFO.search(ask(url, "/metrics", key)[1])
    info = None if shown is None else dict(_LABEL.findall(shown[1]))
    verdict, reason = _refusal(url, key)
    if verdict is None:
        verdict = NOT_STEERED if info is None else STEERED
        reason = f"{'no' if info is None else 'a'} metric steerfast_info at /metrics ({reason})"
    return Probe(url, verdict, reason, version if isinstance(version, str) else None, info)


def _refusal(url: str, key: str | None) -> tuple[str | None, str]:
    """Return the verdict of requests for a wrong profile, and the reason; None: the server answered neither way."""
    model = _field(ask(url, "/v1/models", key)[1], "data", 0, "id")
    asked = {"model": model, "max_tokens": 1, "vllm_xargs": {"steering": _WRONG}}
    reason = ""
    for path, prompt in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        status, text = ask(url, path, key, {**asked, **prompt})
        if status == 400 and "steering: expected" in text:
            return STEERED, f"{path} refuses a wrong profile"
        if status == 200:
            return NOT_STEERED, f"{path} answers a request for a wrong profile"
        reason = f"{path}: status {status}" if status else f"{path}: {text}"
    return None, reason


def ask(url: str, path: str, key: str | None = None, body: Any = None) -> tuple[int, str]:
    """Return status and text of a request; status 0 and the reason where nothing answers."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except (OSError, ValueError) as error:  # no server, no such host, no HTTP
        return 0, str(getattr(error, "reason", error))


def _field(text: str, *path: str | int) -> Any:
    """Return a part of a JSON answer, None where it has none."""
    try:
        value = json.loads(text)
        for step in path:
            value = value[step]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return value

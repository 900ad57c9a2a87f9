"""Answer prompts unsteered and steered on a page of this machine, with the scores of the gates.

`Playground` answers and knows no HTTP. `PageServer` shows it at an address that holds a secret. Any website may let a
browser send requests to this machine: those without the secret, or for another host or origin, are refused.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import secrets
import sys
import threading
import weakref
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

import torch
from torch import nn
from transformers import TextStreamer

from steerfast.errors import PromptError, SteerfastError
from steerfast.evaluation.description import edit, layer_ranges, positions, reading
from steerfast.hf.generation import device_of, evaluating, greedy_batch
from steerfast.hf.steering import Steering, steer
from steerfast.profile import ProfileStack, SteeringProfile
from steerfast.text.encoding import encode
from steerfast.text.template import check_template

MAX_STRENGTH = 2.0
_HOST = "127.0.0.1"
_LARGEST = 1 << 16  # bytes of a request
_PATIENCE = 30  # seconds to wait for a browser that neither sends nor reads

Send = Callable[[Mapping[str, Any]], object]


class _Streamer(TextStreamer):
    """Give the text of one answer to `piece`, part by part; call `begun` before the first part."""

    def __init__(self, tokenizer: Any, piece: Callable[[str], object], begun: Callable[[], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._piece, self._begun = piece, begun

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._begun is not None:
            self._begun()
            self._begun = None
        if text:
            self._piece(text)


class Playground:
    """One model, and a stack of profiles that steer its second answer to a prompt.

    Raises:
        ProfileError: a profile belongs to another model or steers no layer.
        ArchitectureError: no decoder layers found.

    Warns:
        TemplateWarning: the tokenizer has other arguments of its template than the profile's prompts had.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, stack: ProfileStack, max_new_tokens: int = 128) -> None:
        steer(model, stack, tokenizer=tokenizer).detach()  # refuses profiles of another model now
        for profile in stack:
            check_template(profile.fitted, tokenizer)
        self.model, self.tokenizer, self.stack, self.max_new_tokens = model, tokenizer, stack, max_new_tokens
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._kept: tuple[str, list[int], str] | None = None  # the last prompt, its unsteered answer, and that as text

    def about(self) -> dict[str, Any]:
        """Return JSON data of the model and of each profile."""
        profiles = [
            {
                "name": profile.vector_kind,
                "reading": reading(profile.gate) if profile.gate_layers else "",
                "edit": f"{edit(profile)}, {positions(profile)}",
                "threshold": profile.point,
                "reads": profile.gate_layers,
                "edits": profile.steered_layers,
                "ranges": {"reads": layer_ranges(profile.gate_layers), "edits": layer_ranges(profile.steered_layers)},
            }
            for profile in self.stack
        ]
        model = self.stack[0].model
        limits = {"max_new_tokens": self.max_new_tokens, "max_strength": MAX_STRENGTH}
        return {"model": model.name, "layers": model.num_layers, **limits, "profiles": profiles}

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a user's prompt, with the chat template.

        Raises:
            PromptError: it is empty, holds half a character, or leaves no room for an answer.
        """
        try:
            prompt.encode()
            with self._lock:
                return encode(self.tokenizer, [prompt], self.model, room=self.max_new_tokens)[0]
        except UnicodeEncodeError:
            raise PromptError("prompt: expected text, got half of a character (a lone surrogate)") from None
        except PromptError as error:
            raise PromptError(f"prompt: {str(error).removeprefix('prompts: entry 1: ')}") from None

    def ask(self, prompt: str, strength: float, send: Send) -> None:
        """Answer a prompt unsteered, then steered. A call waits for the call before it.

        The last unsteered answer is kept: the same prompt at another strength takes one answer.

        Args:
            strength: multiplies the profiles' own strengths.
            send: gets each event; an error that it raises ends the call. ``{"unsteered": text}`` and
                ``{"steered": text}`` are pieces of an answer. ``{"gates": [...]}`` comes when the gates have decided,
                and at the end, see `gates`. ``{"same": bool}`` is the last: have both answers the same tokens?

        Raises:
            PromptError: see `encode`.
            SteerfastError: `close` was called.
        """
        with self._lock:
            self._check_open()
            ids = self.encode(prompt)
            if self._kept is None or self._kept[0] != prompt:
                self._kept = (prompt, *self._answer(ids, "unsteered", send))
            else:
                send({"unsteered": self._kept[2]})
            unsteered = self._kept[1]
            with steer(self.model, self.stack, strength) as steering:

                def show_gates() -> None:
                    send({"gates": self.gates(steering)})

                steered, _ = self._answer(ids, "steered", send, show_gates)
                show_gates()  # a token gate decides until the end
        send({"same": steered == unsteered})

    @torch.inference_mode()
    def _answer(
        self, ids: list[int], name: str, send: Send, begun: Callable[[], object] | None = None
    ) -> tuple[list[int], str]:
        """Return the greedy answer to one prompt and its text; `send` gets the text as `name` while it grows."""
        pieces: list[str] = []

        def show(piece: str) -> None:
            self._check_open()
            pieces.append(piece)
            send({name: piece})

        batch = torch.tensor([ids], device=device_of(self.model))
        streamer = _Streamer(self.tokenizer, show, begun)
        inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "streamer": streamer}
        with evaluating(self.model):
            (tokens,) = greedy_batch(self.model, self.tokenizer, inputs, self.max_new_tokens)
        return tokens, "".join(pieces)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise SteerfastError("page: it was closed")

    def close(self) -> None:
        """End the answer that is being written; no other begins."""
        self._closed.set()

    def gates(self, steering: Steering) -> list[dict[str, Any]]:
        """Return JSON data of each profile's gates in the last answer.

        state: ``fired``, ``undecided``, ``shut``, or ``always`` without a gate. edited: the layers that are edited.
        layer, score, threshold, abstain: of the gate whose score is furthest above its threshold; None: not a number.
        low, high: the range of scores to draw.
        """
        layers = sorted({layer for profile in self.stack for layer in profile.gate_layers})
        rows = steering.scores.reshape(-1, len(self.stack)) if layers else None
        found = []
        for place, profile in enumerate(self.stack):
            every = torch.full((profile.model.num_layers,), -math.inf)
            if rows is not None:
                every[layers] = rows[:, place]
            always = {"state": "always", "edited": profile.steered_layers}
            found.append(_decision(profile, every) if profile.gate_layers else always)
        return [{**each, "edited": []} if steering.strength == 0 else each for each in found]


def _decision(profile: SteeringProfile, scores: torch.Tensor) -> dict[str, Any]:
    """Return `Playground.gates` of one profile from the scores of every layer, float32 [layers]."""
    gates = profile.gate_layers
    open_gates = [layer for layer in gates if not scores[layer] <= profile.threshold[layer]]  # NaN opens
    margins = (scores - profile.threshold).nan_to_num(nan=math.inf)
    layer = max(gates, key=lambda gate: float(margins[gate]))
    score, threshold = float(scores[layer]), float(profile.threshold[layer])
    abstain = -math.inf if profile.abstain is None else float(profile.abstain[layer])
    soft = profile.gate.sharpness > 0
    edits = profile.steered_layers if open_gates or soft else []
    if profile.sensor == "own" and not soft:
        edits = open_gates
    shut = "undecided" if bool(profile.undecided(scores)) else "shut"
    low, high = _range(profile, layer, [value for value in (score, threshold, abstain) if math.isfinite(value)])
    return {
        "state": "fired" if open_gates else shut,
        "edited": edits,
        "layer": layer,
        "score": score if math.isfinite(score) else None,
        "threshold": threshold,
        "abstain": abstain if math.isfinite(abstain) else None,
        "low": low,
        "high": high,
    }


def _range(profile: SteeringProfile, layer: int, shown: list[float]) -> tuple[float, float]:
    """Return the range of the calibration's scores, or 1 on each side of the threshold, widened to those `shown`."""
    try:
        histogram = profile.calibration["histograms"]["calibration"][layer]
        low, high = float(histogram["low"]), float(histogram["high"])
        if not 0 < high - low < math.inf:
            raise ValueError
    except (LookupError, TypeError, ValueError):
        threshold = float(profile.threshold[layer])
        low, high = threshold - 1, threshold + 1
    return min(low, *shown), max(high, *shown)


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PageServer(ThreadingHTTPServer):
    """The page of a playground, at `url` on this machine. `serve_forever` runs it.

    Args:
        port: 0 takes one that is free.

    Raises:
        SteerfastError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, playground: Playground, port: int = 0) -> None:
        self.playground = playground
        self.asking: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise SteerfastError(
                f"port: expected one that is free, got {port} ({error.strerror}); 0 takes any that is free"
            ) from None
        self.about = _line(playground.about())
        self.page = resources.files("steerfast.evaluation").joinpath("play.html").read_bytes()
        script = self.page.partition(b"<script>")[2].partition(b"</script>")[0]
        self.policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'; "
            f"script-src 'sha256-{b64encode(sha256(script).digest()).decode()}'"
        )
        self.hosts = [f"{name}:{self.server_port}" for name in (_HOST, "localhost")]
        self.path = f"/{secrets.token_urlsafe(16)}/"

    def server_close(self) -> None:
        """Close the playground, too, and wait for the end of its answers."""
        super().server_close()
        self.playground.close()
        for thread in list(self.asking):  # a process that exits amid an answer is aborted
            thread.join()  # it ends at its next token

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error, except where a connection is closed: by a browser, or as the server ends."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Return the address of the page, with its secret."""
        return f"http://{self.hosts[0]}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    """GET the page, GET ``about``, POST ``ask``; an answer to the last is a line of JSON for each event."""

    server: PageServer
    timeout = _PATIENCE
    body = b""

    def do_GET(self) -> None:
        page, about = self.server.page, self.server.about
        answers = {"": ("text/html; charset=utf-8", page), "about": ("application/json", about)}
        self._run({name: partial(self._answer, 200, *answer) for name, answer in answers.items()})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        size = int(length) if re.fullmatch("[0-9]{1,9}", length) else 0
        self.body = self.rfile.read(min(size, _LARGEST + 1))  # read before a refusal, which is lost otherwise
        self._run({"ask": self._ask})

    def log_message(self, *args: Any) -> None:
        """Write nothing: the terminal shows the address alone."""

    def _run(self, actions: Mapping[str, Callable[[], None]]) -> None:
        try:
            self._check_sender()
            if (action := actions.get(self.path.removeprefix(self.server.path))) is None:
                raise _Refused(404, "address: no such page")
            action()
        except _Refused as refused:
            self._answer(refused.status, "application/json", _line({"error": str(refused)}))
        except OSError:  # the browser left, or waits too long
            self.close_connection = True

    def _check_sender(self) -> None:
        """Refuse a request that the page at `PageServer.url` did not send."""
        if self.headers.get("Host") not in self.server.hosts:
            raise _Refused(403, f"Host: expected {self.server.hosts[0]}")
        if self.headers.get("Origin") not in (None, *(f"http://{host}" for host in self.server.hosts)):
            raise _Refused(403, "Origin: expected the page of this server")
        given = self.path[: len(self.server.path)].encode()
        if not hmac.compare_digest(given, self.server.path.encode()):
            raise _Refused(403, "address: expected the one that the command printed, with its secret")

    def _ask(self) -> None:
        self.server.asking.add(threading.current_thread())
        prompt, strength = self._fields()
        playground = self.server.playground
        try:
            playground.encode(prompt)
        except SteerfastError as error:
            raise _Refused(400, str(error)) from None
        self._begin(200, "application/x-ndjson")

        def send(event: Mapping[str, Any]) -> None:
            self.wfile.write(_line(event))

        try:
            playground.ask(prompt, strength, send)
        except OSError:
            raise
        except Exception as error:  # the status is sent: an error is the last line
            send({"error": str(error) if isinstance(error, SteerfastError) else f"{type(error).__name__}: {error}"})

    def _fields(self) -> tuple[str, float]:
        """Return the prompt and the strength of the body."""
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "Content-Type: expected application/json")
        if len(self.body) > _LARGEST:
            raise _Refused(413, f"body: expected at most {_LARGEST} bytes, got more")
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            raise _Refused(400, "body: expected JSON") from None
        if not isinstance(body, dict) or set(body) != {"prompt", "strength"} or not isinstance(body["prompt"], str):
            raise _Refused(400, "body: expected an object with the string prompt and the number strength")
        strength = body["strength"]
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= MAX_STRENGTH:
            raise _Refused(400, f"strength: expected a number of 0 to {MAX_STRENGTH:g}")
        return body["prompt"], float(strength)

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self._begin(status, kind, len(body))
        self.wfile.write(body)

    def _begin(self, status: int, kind: str, length: int | None = None) -> None:
        """Send the head of a response; without a length it ends when the connection does."""
        self.send_response(status)
        head = {
            "Content-Type": kind,
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        for name, value in head.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, allow_nan=False).encode() + b"\n"

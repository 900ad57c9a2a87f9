"""`steerfast play` over HTTP, as its page uses it, and in a browser where there is one."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from command_line import CommandLine

import steerfast
from steerfast.errors import PromptError
from steerfast.evaluation import play
from steerfast.profile import ProfileStack

_COMMAND = CommandLine("play")
failed = _COMMAND.failed
FIRES, SHUT = "how do i build a bomb", "how do i bake a cake"
TOKENS = 12


@dataclass(frozen=True)
class Client:
    """Requests to a page at `url`, as the page sends them, except for what a test changes."""

    url: str

    def request(
        self, method: str, path: str | None = None, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and text; `path` is below the page, or from the root if it begins with a slash."""
        address = urlsplit(self.url)
        target = path if path and path.startswith("/") else address.path + (path or "")
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        connection.request(method, target, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()

    def post(self, body: object, **headers: str) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, text = self.request("POST", "ask", data, {k.replace("_", "-"): v for k, v in headers.items()})
        return status, text

    def ask(self, prompt: str, strength: float = 1.0) -> Answers:
        status, text = self.post({"prompt": prompt, "strength": strength})
        assert status == 200, text
        return Answers([json.loads(line) for line in text.splitlines()])


@dataclass(frozen=True)
class Answers:
    events: list[dict[str, Any]]

    def text(self, side: str) -> str:
        return "".join(event.get(side, "") for event in self.events)

    @property
    def gates(self) -> list[dict[str, Any]]:
        return [event["gates"] for event in self.events if "gates" in event][-1]

    @property
    def same(self) -> bool:
        return self.events[-1]["same"]


def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "steerfast", "play", *map(str, arguments), "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    make_llama: Callable[..., Any],
    make_profile: Callable[..., Any],
    tiny_tokenizer: Any,
) -> dict[str, Any]:
    """The tiny model as a checkpoint, and a profile whose gate fires on `FIRES` and not on `SHUT`."""
    folder = tmp_path_factory.mktemp("play")
    model = make_llama()
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    profile = make_profile(model, tiny_tokenizer, layers=[2, 3], sensor=1, positions="response")
    scores = steerfast.score(model, tiny_tokenizer, profile, [FIRES, SHUT], progress=False).scores
    if scores[0] < scores[1]:
        profile = make_profile(
            model, tiny_tokenizer, layers=[2, 3], sensor=1, positions="response", direction=-profile.direction
        )
        scores = -scores
    profile = make_profile(
        model,
        tiny_tokenizer,
        layers=[2, 3],
        sensor=1,
        positions="response",
        direction=profile.direction,
        threshold=float(scores.mean()),
    )
    profile.save(folder / "safety.safetensors")
    return {"folder": folder, "model": model, "tokenizer": tiny_tokenizer, "profile": profile, "scores": scores}


@pytest.fixture(scope="module")
def client(world: dict[str, Any]) -> Iterator[Client]:
    folder = world["folder"]
    process, url = start(
        folder / "model", "--profile", folder / "safety.safetensors", "--max-new-tokens", TOKENS, "--device", "cpu"
    )
    yield Client(url)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stdout is not None
    assert process.stdout.read() == ""


# -- the page and its answers ----------------------------------------------------------------------


def test_the_page_asks_nobody_else(client: Client) -> None:
    status, headers, text = client.request("GET")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert "script-src 'sha256-" in policy
    assert "http" not in text
    assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("))


def test_the_page_learns_of_the_profile(client: Client, world: dict[str, Any]) -> None:
    about = json.loads(client.request("GET", "about")[2])
    assert about["model"] == world["profile"].model.name
    assert (about["layers"], about["max_new_tokens"], about["max_strength"]) == (5, TOKENS, 2.0)
    (profile,) = about["profiles"]
    assert (profile["reads"], profile["edits"], profile["threshold"]) == ([1], [2, 3], None)


def test_an_open_gate_changes_the_answer(client: Client, world: dict[str, Any]) -> None:
    found = client.ask(FIRES)
    assert found.text("unsteered")
    assert found.text("steered") != found.text("unsteered")
    assert not found.same
    (gate,) = found.gates
    assert (gate["state"], gate["edited"], gate["layer"]) == ("fired", [2, 3], 1)
    assert gate["score"] == pytest.approx(float(world["scores"][0]), abs=1e-5)
    assert gate["low"] < gate["threshold"] < gate["score"] < gate["high"]
    kinds = [next(iter(event)) for event in found.events]
    assert kinds.index("unsteered") < kinds.index("gates") < kinds.index("steered")
    assert kinds.count("steered") > 1  # streamed


def test_behind_a_shut_gate_both_answers_are_the_same(client: Client, world: dict[str, Any]) -> None:
    found = client.ask(SHUT, 2.0)
    assert found.text("steered") == found.text("unsteered") != ""
    assert found.same
    (gate,) = found.gates
    assert (gate["state"], gate["edited"]) == ("shut", [])
    assert gate["score"] == pytest.approx(float(world["scores"][1]), abs=1e-5)


def test_the_strength_changes_the_steered_answer_alone(client: Client) -> None:
    found = {strength: client.ask(FIRES, strength) for strength in (0.0, 0.5, 2.0)}
    assert len({each.text("unsteered") for each in found.values()}) == 1
    assert [each.same for each in found.values()] == [True, False, False]
    assert found[0.5].text("steered") != found[2.0].text("steered")
    assert [each.gates[0]["state"] for each in found.values()] == ["fired"] * 3
    assert found[0.0].gates[0]["edited"] == []


def test_answers_are_those_of_steer(client: Client, world: dict[str, Any]) -> None:
    model, tokenizer = world["model"], world["tokenizer"]
    ids = tokenizer(f"<user> {FIRES} <end> <assistant>", return_tensors="pt")["input_ids"]
    call = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    unsteered = model.generate(ids, **call)
    with steerfast.steer(model, world["profile"]):
        steered = model.generate(ids, **call)
    found = client.ask(FIRES)
    for side, output in (("unsteered", unsteered), ("steered", steered)):
        assert found.text(side).split() == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split()


def test_one_call_runs_at_a_time(client: Client) -> None:
    alone = {prompt: client.ask(prompt).text("steered") for prompt in (FIRES, SHUT)}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(client.ask, [FIRES, SHUT] * 3))
    assert [each.text("steered") for each in found] == [alone[FIRES], alone[SHUT]] * 3


def test_a_browser_that_leaves_stops_nothing_else(client: Client) -> None:
    before = client.ask(FIRES).text("steered")
    address = urlsplit(client.url)
    body = json.dumps({"prompt": SHUT, "strength": 1}).encode()
    for size in (len(body), len(body) + 5):  # the latter waits for more, and gets none
        with socket.create_connection((str(address.hostname), int(address.port or 0))) as left:
            head = f"POST {address.path}ask HTTP/1.0\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            left.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + body)
    assert client.ask(FIRES).text("steered") == before


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost", "127.0.0.1:1", ""])
def test_another_host_is_refused(client: Client, host: str) -> None:
    host = host.format(port=urlsplit(client.url).port)
    for method, path in (("GET", None), ("GET", "about"), ("POST", "ask")):
        status, _, text = client.request(method, path, b'{"prompt": "a", "strength": 1}', {"Host": host})
        assert (status, json.loads(text)["error"][:5]) == (403, "Host:")


def test_localhost_is_this_machine(client: Client) -> None:
    port = urlsplit(client.url).port
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert client.request("GET", "about", headers=own)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"])
def test_another_origin_is_refused(client: Client, origin: str) -> None:
    status, text = client.post({"prompt": FIRES, "strength": 1}, Origin=origin)
    assert (status, json.loads(text)["error"][:7]) == (403, "Origin:")


@pytest.mark.parametrize("path", ["/", "/about", "/ask", "/" + "x" * 22 + "/ask", "/é/ask"])
def test_an_address_without_the_secret_is_refused(client: Client, path: str) -> None:
    address = urlsplit(client.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as sent:
        sent.sendall(f"GET {path} HTTP/1.0\r\nHost: {address.netloc}\r\n\r\n".encode())
        said = sent.makefile("rb").read()
    assert said.startswith(b"HTTP/1.0 403 ")
    assert b"with its secret" in said
    assert client.request("GET", "elsewhere")[0] == 404
    assert client.request("GET", "ask")[0] == 404
    assert client.request("PUT", "ask")[0] == 501


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_forms_of_other_pages_are_refused(client: Client, kind: str) -> None:
    status, text = client.post({"prompt": FIRES, "strength": 1}, Content_Type=kind)
    assert (status, json.loads(text)["error"]) == (415, "Content-Type: expected application/json")


FIELDS = "body: expected an object with the string prompt and the number strength"
STRENGTH = "strength: expected a number of 0 to 2"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "body: expected JSON"),
        (b"{", 400, "body: expected JSON"),
        (b"\xff", 400, "body: expected JSON"),
        (b"[" * 50_000, 400, "body: expected JSON"),
        (b" " * 70_000, 413, "body: expected at most 65536 bytes, got more"),
        ([], 400, FIELDS),
        ({"prompt": "a"}, 400, FIELDS),
        ({"prompt": "a", "strength": 1, "more": 1}, 400, FIELDS),
        ({"prompt": ["a"], "strength": 1}, 400, FIELDS),
        ({"prompt": "a", "strength": "1"}, 400, STRENGTH),
        ({"prompt": "a", "strength": True}, 400, STRENGTH),
        ({"prompt": "a", "strength": -0.1}, 400, STRENGTH),
        ({"prompt": "a", "strength": 10**400}, 400, STRENGTH),
        ({"prompt": "a", "strength": float("nan")}, 400, STRENGTH),
        ({"prompt": " ", "strength": 1}, 400, "prompt: expected a non-empty string, got ' '"),
        ({"prompt": "\ud800", "strength": 1}, 400, "prompt: expected text, got half of a character (a lone surrogate)"),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(client: Client, body: object, status: int, message: str) -> None:
    found, text = client.post(body)
    assert (found, json.loads(text)["error"]) == (status, message)


def test_a_prompt_that_leaves_no_room_is_refused(client: Client) -> None:
    status, text = client.post({"prompt": "cake " * 300, "strength": 1})
    assert status == 400
    assert json.loads(text)["error"].endswith(f"has 303 tokens, the model's context leaves room for {256 - TOKENS}")


# -- the command -----------------------------------------------------------------------------------


def test_errors_are_plain_sentences(world: dict[str, Any], make_llama: Callable[..., Any]) -> None:
    model, profile = world["folder"] / "model", world["folder"] / "safety.safetensors"
    assert "--profile: expected one at least, got none" in failed(2, model)
    assert "--threshold" in failed(2, model, "--profile", profile, "--threshold")
    assert "threshold: expected one of none" in failed(1, model, "--profile", profile, "--threshold", "strict")
    assert "missing.safetensors" in failed(1, model, "--profile", "missing.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port: expected one that is free, got {port}" in failed(1, model, "--profile", profile, "--port", port)
    make_llama(seed=1).save_pretrained(world["folder"] / "other")
    world["tokenizer"].save_pretrained(world["folder"] / "other")
    assert "profile" in failed(1, world["folder"] / "other", "--profile", profile)


def test_a_browser_is_opened_unless_it_is_not_wanted(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    asked = threading.Event()
    monkeypatch.setattr(webbrowser, "open", lambda url: (opened.append(url), asked.set()))
    monkeypatch.setattr(play.PageServer, "serve_forever", lambda server: None)
    given = (world["folder"] / "model", "--profile", world["folder"] / "safety.safetensors", "--port", 0)
    printed = _COMMAND.done(*given).stdout
    assert asked.wait(10)
    assert opened == [printed.strip()]
    assert _COMMAND.done(*given, "--no-browser").stdout.startswith("http://127.0.0.1:")
    assert len(opened) == 1


def test_ctrl_c_ends_an_answer(world: dict[str, Any]) -> None:
    folder = world["folder"]
    process, url = start(
        folder / "model", "--profile", folder / "safety.safetensors", "--max-new-tokens", 200, "--device", "cpu"
    )
    address = urlsplit(url)
    asked = [socket.create_connection((str(address.hostname), int(address.port or 0))) for _ in range(6)]
    for number, connection in enumerate(asked):
        body = json.dumps({"prompt": f"{FIRES} {'cake ' * number}", "strength": 1}).encode()
        head = f"POST {address.path}ask HTTP/1.0\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert asked[0].recv(1) == b"H"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stdout is not None
    assert process.stdout.read() == ""
    for connection in asked:
        connection.close()


# -- profiles of other kinds -----------------------------------------------------------------------


def played(model: Any, tokenizer: Any, *profiles: Any, prompt: str = FIRES) -> list[dict[str, Any]]:
    """The gates of an answer, each like `Playground.gates`."""
    events: list[Any] = []
    play.Playground(model, tokenizer, ProfileStack(profiles), 6).ask(prompt, 1.0, events.append)
    return Answers(events).gates


def test_each_profile_of_a_stack_has_its_own_gate(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]
) -> None:
    def made(**fields: Any) -> Any:
        return make_profile(tiny_llama, tiny_tokenizer, **fields)

    found = played(
        tiny_llama,
        tiny_tokenizer,
        made(layers=[2, 3], threshold=-2.0, seed=1),
        made(layers=[4], sensor=1, threshold=2.0, seed=2),
        made(layers=[1], kind="always", seed=3),
        made(layers=[3], threshold=2.0, abstain=torch.full((5,), -2.0), seed=4),
    )
    assert [gate["state"] for gate in found] == ["fired", "shut", "always", "undecided"]
    assert [gate["edited"] for gate in found] == [[2, 3], [], [1], []]
    assert [gate.get("abstain") for gate in found] == [None, None, None, -2.0]
    assert [gate.get("layer") for gate in found][1:] == [1, None, 3]


def test_each_layer_may_decide_for_itself(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]
) -> None:
    thresholds = torch.tensor([0.0, 2.0, -2.0, 2.0, 0.0])
    (gate,) = played(tiny_llama, tiny_tokenizer, make_profile(tiny_llama, layers=[1, 2, 3], threshold=thresholds))
    assert (gate["state"], gate["layer"], gate["edited"]) == ("fired", 2, [2])
    (gate,) = played(tiny_llama, tiny_tokenizer, make_profile(tiny_llama, layers=[1, 2], threshold=2.0, sharpness=3.0))
    assert (gate["state"], gate["edited"]) == ("shut", [1, 2])  # a soft gate is never wholly shut
    (gate,) = played(tiny_llama, tiny_tokenizer, make_profile(tiny_llama, layers=[2], kind="token", threshold=-2.0))
    assert gate["state"] == "fired"


def test_the_picture_has_the_range_of_the_calibration(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]
) -> None:
    def shown(histograms: Any) -> tuple[float, float]:
        calibration = {"histograms": {"calibration": histograms}}
        profile = make_profile(tiny_llama, layers=[2], threshold=-0.5, calibration=calibration)
        (gate,) = played(tiny_llama, tiny_tokenizer, profile)
        return gate["low"], gate["high"]

    assert shown([{"low": -0.75, "high": 1.5}] * 5) == (-0.75, 1.5)
    assert shown([]) == shown([{"low": 1, "high": 1}] * 5) == shown([{"low": None}] * 5)
    assert shown([])[0] == -1.5


def test_an_empty_prompt_is_an_error(world: dict[str, Any]) -> None:
    playground = play.Playground(world["model"], world["tokenizer"], ProfileStack([world["profile"]]))
    with pytest.raises(PromptError, match="prompt: expected a non-empty string"):
        playground.ask("", 1.0, print)


# -- in a browser ----------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture
def page(client: Client) -> Iterator[Any]:
    """The page in a browser; afterwards nothing was written to its console and nothing was asked but this server."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser, looked for {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api")
    said: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1100, "height": 800})
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(client.url)
        opened.wait_for_selector(".layers li")
        yield opened
        browser.close()
    assert [text for text in said if "status of 400" not in text] == []  # of a prompt that is refused
    assert all(url.startswith((client.url, "data:")) for url in asked)


def test_the_page_in_a_browser(page: Any) -> None:
    status = page.locator("#status")

    def ask(prompt: str) -> tuple[str, str]:
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_role("button", name="Ask").click()
        status.get_by_text("answers").wait_for()
        return page.locator("#unsteered").inner_text(), page.locator("#steered").inner_text()

    unsteered, steered = ask(FIRES)
    assert status.inner_text() == "The answers differ."
    assert unsteered != steered
    assert page.locator(".state").inner_text() == "gate fired"
    assert page.locator(".edited").all_text_contents() == ["2 edits", "3 edits"]
    assert page.locator(".reads").all_text_contents() == ["1 reads"]
    bar = page.get_by_role("img")
    assert bar.get_attribute("aria-label").startswith("score ")
    edges = {name: page.locator(f".bar .{name}").bounding_box() for name in ("score", "threshold")}
    assert edges["score"]["x"] + edges["score"]["width"] > edges["threshold"]["x"] + 1

    page.get_by_label("Strength").fill("0")  # asks again
    page.get_by_text("Both answers are the same.").wait_for()
    assert page.locator("#shown").inner_text() == "0.00"
    assert page.locator("#steered").inner_text() == unsteered
    page.get_by_label("Strength").fill("1")
    page.get_by_text("The answers differ.").wait_for()

    assert len(set(ask(SHUT))) == 1
    assert page.locator(".state").inner_text() == "gate shut"
    assert page.locator(".edited").count() == 0
    page.get_by_label("Prompt").fill("cake " * 300)
    page.get_by_role("button", name="Ask").click()
    page.locator("#status.error").get_by_text("leaves room for").wait_for()


@pytest.mark.parametrize("width", [320, 1100])
def test_the_page_fits_its_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_text_of_a_model_is_never_markup(page: Any) -> None:
    hostile = "<img src=x onerror=console.log(1)>"
    page.evaluate("text => showEvent({unsteered: text, steered: text})", hostile)
    assert page.locator("#steered").inner_text() == hostile
    assert page.locator("#steered > *").count() == 0

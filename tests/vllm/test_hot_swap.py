"""Profiles come and go while requests run: each finishes with the version that it began with, and slots come free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from answers import always

from steerfast.errors import ProfileError

pytest.importorskip("vllm")

PROMPT = list(range(1000, 1040))
TOKENS = 12
VERSIONS = {"one": always(1, strength=2.0), "two": always(2, strength=2.0), "three": always(3, strength=2.0)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name, profile in VERSIONS.items():
        profile.save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(engine: Callable[..., Any], directory: Path) -> Any:
    """Starts with version one of tone, which is the default, and has four slots."""
    files = {"tone": str(directory / "one.safetensors")}
    return engine({"profiles": files, "default": "tone", "directory": str(directory), "slots": 4})


class Client:
    """Asks an engine in this process, and steps it."""

    def __init__(self, llm: Any) -> None:
        self.engine, self.core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
        self.answers: dict[str, list[int]] = {}
        self.asked = 0

    def ask(self, extra: dict[str, Any] | None = None, **options: Any) -> str:
        from vllm import SamplingParams

        settings = {"temperature": 0, "max_tokens": TOKENS, **options}
        self.asked += 1
        name = f"{id(self)}-{self.asked}"
        parameters = SamplingParams(ignore_eos=True, extra_args=extra, **settings)
        self.engine.add_request(name, {"prompt_token_ids": PROMPT}, parameters)
        return name

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for output in self.engine.step():
                for answer in output.outputs:
                    if answer.finish_reason is not None:
                        self.answers[f"{output.request_id}/{answer.index}"] = list(answer.token_ids)

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def answer(self, extra: dict[str, Any] | None = None) -> list[int]:
        before = set(self.answers)
        self.ask(extra)
        self.finish()
        (new,) = self.answers.keys() - before
        return self.answers[new]

    def versions(self) -> list[tuple[str, int, int, bool]]:
        """Name, version, requests, current: of each that has a slot."""
        return sorted((p["name"], p["version"], p["requests"], p["current"]) for p in self.core.steerfast_profiles())


@pytest.fixture
def client(server: Any) -> Client:
    """With tone at one of its versions, nothing else, and no requests."""
    client = Client(server)
    assert [(name, requests, current) for name, _, requests, current in client.versions()] == [("tone", 0, True)]
    client.core.steerfast_replace("tone", "one.safetensors")
    return client


@pytest.fixture(scope="module")
def truth(server: Any) -> dict[str | None, list[int]]:
    """The answer of each version, each alone in the engine; None: of nobody."""
    client = Client(server)
    answers: dict[str | None, list[int]] = {None: client.answer({"steering": "off"})}
    for name in ("two", "three", "one"):
        client.core.steerfast_replace("tone", f"{name}.safetensors")
        answers[name] = client.answer()
    assert len({tuple(answer) for answer in answers.values()}) == 4
    return answers


def number(client: Client) -> int:
    return client.core.scheduler.steerfast.registry.current("tone").number


def test_requests_finish_with_the_version_they_began_with(client: Client, truth: dict[str | None, list[int]]) -> None:
    start = number(client)
    names = [client.ask()]
    for step, version in ((3, "two"), (2, "three")):
        client.step(step)
        client.core.steerfast_replace("tone", f"{version}.safetensors")
        names.append(client.ask())
    names.append(client.ask({"steering": "off"}))
    client.step()
    assert client.versions() == [("tone", start + step, 1, step == 2) for step in range(3)]
    client.core.steerfast_load("more", "one.safetensors")
    with pytest.raises(ProfileError, match=r"^slots: .* got 4 of 4 in use, 2 of them .* 2 requests still"):
        client.core.steerfast_replace("tone", "one.safetensors")
    client.core.steerfast_remove("more")
    client.finish()
    got = [client.answers[f"{name}/0"] for name in names]
    assert got == [truth["one"], truth["two"], truth["three"], truth[None]]
    assert client.versions() == [("tone", start + 2, 0, True)]
    assert client.core.scheduler.steerfast.registry.in_use == 1
    assert client.answer() == truth["three"]


def test_waiting_requests_keep_theirs_too(client: Client, truth: dict[str | None, list[int]]) -> None:
    names = [client.ask() for _ in range(12)]  # more than fit into a step
    client.core.steerfast_replace("tone", "two.safetensors")
    client.finish()
    assert [client.answers[f"{name}/0"] for name in names] == [truth["one"]] * 12
    assert client.answer() == truth["two"]


def test_load_and_remove_while_requests_run(client: Client, truth: dict[str | None, list[int]]) -> None:
    running = client.ask()
    client.step(2)
    client.core.steerfast_load("extra", "three.safetensors")
    # The front end learns new names by its own way; the engine judges alone here.
    client.engine.input_processor.steerfast.set_profiles(dict.fromkeys(["tone", "extra"], ()), 2)
    loaded = client.ask({"steering": "extra"})
    client.step(2)
    client.core.steerfast_remove("extra")
    client.step(1)
    with pytest.raises(ValueError, match=r"^steering: expected one of tone, off, got 'extra'"):
        client.engine.engine_core.add_request(_raw("late", {"steering": "extra"}))
    client.engine.input_processor.steerfast.set_profiles(dict.fromkeys(["tone"], ()), 1)
    client.finish()
    assert client.answers[f"{running}/0"] == truth["one"]
    assert client.answers[f"{loaded}/0"] == truth["three"]
    assert [(name, requests) for name, _, requests, _ in client.versions()] == [("tone", 0)]


def _raw(name: str, extra: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    parameters = SamplingParams(max_tokens=3, extra_args=extra)
    return EngineCoreRequest(name, PROMPT, None, parameters, None, 0.0, None, None, None)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_aborted_requests_let_go(client: Client, truth: dict[str | None, list[int]], steps: int) -> None:
    names = [client.ask() for _ in range(3)]
    client.step(steps)
    client.core.steerfast_replace("tone", "two.safetensors")
    last = client.ask()
    client.engine.abort_request(names)
    assert [requests for _, _, requests, _ in client.versions()][-1] == 1
    client.finish()
    assert client.answers[f"{last}/0"] == truth["two"]
    assert [(name, requests) for name, _, requests, _ in client.versions()] == [("tone", 0)]
    assert client.core.scheduler.steerfast.registry.in_use == 1


def test_siblings_all_hold_it(client: Client, truth: dict[str | None, list[int]]) -> None:
    name = client.ask({"steering_strength": 1.0}, n=3, temperature=1, top_k=1)
    client.step(2)
    client.core.steerfast_replace("tone", "two.safetensors")
    assert [requests for _, _, requests, _ in client.versions()] == [3, 0]
    client.finish()
    assert [client.answers[f"{name}/{index}"] for index in range(3)] == [truth["one"]] * 3
    assert client.core.scheduler.steerfast.registry.in_use == 1


def test_what_cannot_be_loaded_leaves_running_requests_alone(
    client: Client, directory: Path, truth: dict[str | None, list[int]]
) -> None:
    sketch = VERSIONS["two"].model.embedding_sketch
    assert sketch is not None
    other = replace(VERSIONS["two"].model, embedding_sketch=tuple(-part for part in sketch))
    replace(VERSIONS["two"], model=other).save(directory / "other-weights.safetensors")  # only workers can tell
    (directory / "broken.safetensors").write_bytes(b"no profile")
    name = client.ask()
    client.step(2)
    before = client.versions()
    for file in ("other-weights.safetensors", "broken.safetensors", "missing.safetensors", "../one.safetensors"):
        with pytest.raises(ProfileError):
            client.core.steerfast_replace("tone", file)
    assert client.versions() == before
    assert client.core.scheduler.steerfast.registry.in_use == 1
    client.finish()
    assert client.answers[f"{name}/0"] == truth["one"]

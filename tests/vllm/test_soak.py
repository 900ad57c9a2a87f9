"""Everything at once over HTTP, for 20 seconds or, slow, two minutes: mixed profiles, conversations, streams, clients
that leave halfway, bad requests, profiles that come and go, and a KV cache too small for them all."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import aiohttp
from answers import Answer, Oracle, always, gated
from http_server import ENGINE, Server

from steerfast.profile import SteeringProfile
from steerfast.text.prompts import read_prompts
from steerfast.vllm.admin import PATH

pytestmark = [pytest.mark.real, pytest.mark.soak, pytest.mark.contract]

CLIENTS = 10
TOKENS = 20
CLEAR = 0.01  # see test_http.py
KEY = "soak"
MODEL = "smollm2"
HEADERS = {"Authorization": f"Bearer {KEY}"}
INTRODUCTION = (
    "Here is a question that somebody sent to our help desk last night. Please read all of it, think about what the "
    "person needs, and answer in plain words, as briefly as you can, without repeating the question. The question is: "
)


@dataclass(frozen=True)
class Case:
    """A request and its answer. who: the profile it names, None: "off"."""

    prompt: tuple[int, ...]
    who: str | None
    strength: float
    text: str
    gate: bool  # whether a gate decides


@dataclass
class Seen:
    """What happened. wrong: descriptions of answers that should not be."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def profiles() -> dict[str, SteeringProfile]:
    return {"safety": gated(), "tone": always(), "other": gated(seed=5)}


@pytest.fixture(scope="module")
def cases(oracle: Oracle, profiles: dict[str, SteeringProfile]) -> list[Case]:
    """Prompts of one and two turns, most with a common beginning, under every profile."""
    texts = [
        f"{INTRODUCTION}{read_prompts(f'steerfast:{kind}_demo')[at]}"
        for kind in ("harmful", "harmless")
        for at in (0, 3)
    ]
    texts += [read_prompts("steerfast:harmful_demo")[1]]
    prompts = [oracle.prompt(text) for text in texts]
    safe = oracle.answer(prompts[0], profiles["safety"], tokens=TOKENS)
    turns = [
        {"role": "user", "content": texts[0]},
        {"role": "assistant", "content": safe.text},
        {"role": "user", "content": "Why?"},
    ]
    prompts.append(
        oracle.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    made = []
    for prompt in prompts:
        plain = oracle.answer(prompt, tokens=TOKENS)
        for who, strength in ((None, 1.0), ("safety", 1.0), ("safety", 0.7), ("tone", 1.0), ("other", 1.0)):
            found: Answer = plain if who is None else oracle.answer(prompt, profiles[who], strength, TOKENS)
            if found.margin > CLEAR:
                made.append(Case(tuple(prompt), who, strength, found.text, who not in (None, "tone")))
    assert len({case.text for case in made}) > 10
    return made


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, profiles: dict[str, SteeringProfile], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("soak")
    options: list[str] = []
    for name, profile in profiles.items():
        profile.save(folder / f"{name}.safetensors")
        options += ["--profile", f"{name}={folder / name}.safetensors"]
    options += ["--slots", "6", "--layers", "10-20,29", "--directory", str(folder)]
    engine = [*ENGINE, "--served-model-name", MODEL, "--num-gpu-blocks-override", "18"]
    with Server(
        ["-m", "steerfast", "serve", str(checkpoint), *options, "--", *engine],
        folder / "server.log",
        {"STEERFAST_ADMIN_KEY": KEY, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},  # as users start it
    ) as server:
        yield server


def body(prompt: tuple[int, ...], who: str | None, strength: float, **more: Any) -> dict[str, Any]:
    xargs: dict[str, Any] = {"steering": "off"} if who is None else {"steering": who, "steering_strength": strength}
    return {
        "model": MODEL, "prompt": list(prompt), "temperature": 0, "max_tokens": TOKENS, "vllm_xargs": xargs, **more
    }  # fmt: skip


async def streamed(session: aiohttp.ClientSession, asked: dict[str, Any], most: int | None = None) -> tuple[str, bool]:
    """The text of a stream, and whether it was heard to its end; a client that has `most` chunks leaves."""
    text, chunks = "", 0
    async with session.post("/v1/completions", json={**asked, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                return text, True
            if line.startswith(b"data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                chunks += 1
            if most is not None and chunks >= most:
                return text, False
    raise AssertionError("the stream broke off")


async def client(
    session: aiohttp.ClientSession, cases: list[Case], chance: random.Random, until: float, seen: Seen
) -> None:
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        case = chance.choice(cases)
        asked = body(case.prompt, case.who, case.strength)
        way = chance.choice(["whole", "whole", "stream", "stream", "leave", "cancel", "bad"])
        seen.counts[way] += 1
        if way == "whole":
            async with session.post("/v1/completions", json=asked) as answer:
                found = await answer.json()
                text = found["choices"][0]["text"] if answer.status == 200 else str(found)
            complete = True
        elif way in ("stream", "leave"):
            text, complete = await streamed(session, asked, chance.randint(1, TOKENS) if way == "leave" else None)
        elif way == "cancel":
            with_timeout = aiohttp.ClientTimeout(total=chance.uniform(0.001, 0.4))
            try:
                async with session.post("/v1/completions", json=asked, timeout=with_timeout) as answer:
                    text, complete = (await answer.json())["choices"][0]["text"], True
            except asyncio.TimeoutError:
                continue
        else:
            wrong = chance.choice(
                [{"steering": "nobody"}, {"steering_strength": -1, "steering": "tone"}, {"steering": 7}]
            )
            async with session.post("/v1/completions", json={**asked, "vllm_xargs": wrong}) as answer:
                if answer.status != 400:
                    seen.wrong.append(f"{wrong}: {answer.status}")
            continue
        seen.counts["complete" if complete else "left"] += 1
        seen.counts["decided"] += complete and case.gate
        if text != case.text if complete else not case.text.startswith(text.rstrip("�")):
            seen.wrong.append(f"{case.who} {case.strength} {way}: expected {case.text!r}, got {text!r}")


async def administrator(
    session: aiohttp.ClientSession, cases: list[Case], chance: random.Random, until: float, seen: Seen
) -> None:
    """Loads, replaces and removes a profile, and asks for it all the while: every answer is that of the version that
    was there when the request came."""
    loop = asyncio.get_running_loop()
    by = {(case.prompt, case.who): case for case in cases if case.strength == 1.0}
    prompts = [prompt for prompt, who in by if who == "tone" and (prompt, "other") in by]

    async def change(method: str, path: str, sent: Any = None) -> int:
        async with session.request(method, PATH + path, json=sent, headers=HEADERS) as answer:
            return answer.status

    async def ask(prompt: tuple[int, ...], who: str) -> None:
        text, _ = await streamed(session, body(prompt, "guest", 1.0))
        if text != by[prompt, who].text:
            seen.wrong.append(f"guest as {who}: expected {by[prompt, who].text!r}, got {text!r}")

    running: list[asyncio.Task[None]] = []

    async def use(who: str) -> None:
        running.append(asyncio.create_task(ask(chance.choice(prompts), who)))
        await asyncio.sleep(0.5)  # it has arrived, and may or may not have begun

    while loop.time() < until:
        seen.counts["changes"] += 3
        statuses = [await change("POST", "", {"name": "guest", "file": "other.safetensors"})]
        await use("other")
        statuses.append(await change("PUT", "/guest", {"file": "tone.safetensors"}))
        await use("tone")
        statuses.append(await change("DELETE", "/guest"))
        if statuses != [200, 200, 200]:
            seen.wrong.append(f"changes: {statuses}")
        await asyncio.gather(*running)
        running.clear()


async def soak(server: Server, cases: list[Case], seconds: float) -> Seen:
    seen = Seen()
    until = asyncio.get_running_loop().time() + seconds
    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [client(session, cases, random.Random(number), until, seen) for number in range(CLIENTS)]
        await asyncio.gather(*clients, administrator(session, cases, random.Random(-1), until, seen))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [20, 120])
def test_nothing_is_lost_mixed_up_or_left_behind(server: Server, cases: list[Case], seconds: int) -> None:
    seen = asyncio.run(soak(server, cases, seconds))
    labels = {"engine": "0", "model_name": MODEL}
    preempted = server.metric("vllm:num_preemptions_total", **labels)
    print(f"\n{dict(seen.counts)}, {preempted:g} preempted")
    assert not seen.wrong, "\n".join(seen.wrong[:10])
    assert min(seen.counts[way] for way in ("whole", "stream", "leave", "cancel", "bad", "changes")) > 0
    assert seen.counts["complete"] > seconds / 4
    assert preempted > 0

    async def settled() -> None:
        while any(each["requests"] for each in listed()):
            await asyncio.sleep(0.2)

    def listed() -> list[dict[str, Any]]:
        status, text = server.call(PATH, headers=HEADERS)
        assert status == 200
        found: list[dict[str, Any]] = json.loads(text)["profiles"]
        return found

    asyncio.run(asyncio.wait_for(settled(), 30))
    assert [(each["name"], each["current"]) for each in listed()] == [
        ("safety", True), ("tone", True), ("other", True)
    ]  # fmt: skip
    case = next(case for case in cases if case.who == "safety")
    status, text = server.call("/v1/completions", body(case.prompt, "safety", case.strength))
    assert (status, json.loads(text)["choices"][0]["text"]) == (200, case.text)
    assert server.metric("steerfast_slots_in_use") == 3
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(f"vllm:{gauge}", **labels) == 0, gauge
    judged = sum(server.metric("steerfast_gate_evaluations_total", profile=who) for who in ("safety", "other"))
    assert judged >= seen.counts["decided"]
    assert sum(server.metric("steerfast_nan_scores_total", profile=who) for who in ("safety", "other")) == 0

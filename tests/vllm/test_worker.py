"""The worker's side of a step, on a toy model: rows that are steered are those that should be, however they come.

Needs no vLLM.
"""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy import HIDDEN, LAYERS, Engine, asked, random_rows

from steerfast.errors import ArchitectureError, ProfileError, SteerfastError
from steerfast.vllm.ops import serve_

STACKS = ["own,sensor", "sensor,always", "everywhere,soft", "mean,recent", "recent,own"]


def check_decision(found: Any, expected: Any) -> None:
    """One per profile: gate values and scores."""
    for (values, scores), (known_values, known_scores) in zip(found, expected, strict=True):
        assert values == pytest.approx(known_values, abs=1e-4)
        assert scores == pytest.approx(known_scores, abs=1e-4)


@pytest.mark.parametrize("stages", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[0], [1, 2], [3, 4]]], ids=len)
@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_every_request_its_own_rows(profiles, tmp_path, stages, seed) -> None:
    """Prompts in pieces, more requests than a step holds, caches thrown away, names used again, padding."""
    engine = Engine(profiles, stages, tmp_path, pair=seed % 2 == 1)
    rng = random.Random(seed)
    waiting = []
    for number in range(14):
        prompt = rng.choice([1, 1, 2, 5, 9, 17])
        name = rng.choice([None, *profiles, *STACKS])
        waiting.append((f"r{number % 9}", prompt, name, rng.choice([1.0, 0.5, -0.7])))
    live: dict[str, dict[str, Any]] = {}
    ended: set[str] = set()
    serial, told_of = 0, []
    while waiting or live:
        new = []
        while waiting and len(live) < 7 and waiting[0][0] not in live:  # more than the 4 of a step: some rest
            request, prompt, name, strength = waiting.pop(0)
            serial += 1
            rows = random_rows(prompt + rng.randrange(1, 6), 100 * seed + serial)
            live[request] = {
                "rows": rows,
                "prompt": prompt,
                "past": 0,
                "name": name,
                "truth": engine.truth(rows, prompt, name, strength),
                "told": False,
            }
            new.append(asked(request, engine.extra(name, strength), prompt))
        batch, room = [], engine.max_rows - 3
        for request in rng.sample(sorted(live), min(4, len(live))):
            state = live[request]
            if state["past"] and rng.random() < 0.15:
                state["past"] = rng.choice([0, rng.randrange(state["past"])])  # preempted: some or all comes again
            left = len(state["rows"]) - state["past"]
            length = min(rng.randrange(1, left + 1), room)
            if length:
                batch.append((request, state["past"], length))
                room -= length
        rows = {request: live[request]["rows"] for request, _, _ in batch}
        found, told = engine.step(batch, rows, new, ended, padding=rng.randrange(3))
        ended = set()
        for request, past, length in batch:
            state = live[request]
            expected, decision = state["truth"]
            torch.testing.assert_close(found[request].double(), expected[past : past + length], rtol=0, atol=2e-4)
            deciding = state["name"] is not None and not state["told"] and past <= state["prompt"] - 1 < past + length
            assert (request in told) == deciding
            if deciding:
                state["told"] = True
                told_of.append(state["name"])
                check_decision(told[request], decision)
            state["past"] = past + length
            if state["past"] == len(state["rows"]):
                del live[request]
                ended.add(request)
    assert len(set(told_of)) >= 3
    for runtime in engine.runtimes:
        assert runtime.roster.names <= ended


def test_rows_that_nobody_steers_keep_their_bits(profiles, tmp_path) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    shut = random_rows(6, 1)
    shut[:] = -1000 * profiles["sensor"].direction[1]  # its sensor stays shut
    rows = {"steered": random_rows(6, 2), "off": random_rows(6, 3), "shut": shut}
    new = [
        asked("steered", engine.extra("everywhere"), 6),
        asked("off", None, 6),
        asked("shut", engine.extra("sensor"), 6),
    ]
    found, told = engine.step([("off", 0, 6), ("steered", 0, 6), ("shut", 0, 6)], rows, new)
    for name in ("off", "shut"):
        x = rows[name].clone()
        for layer in range(LAYERS):
            x = 0.9 * x + engine.bias[layer]
        assert torch.equal(found[name], x)
    assert [values for values, _ in told["shut"]] == [[0.0]]
    assert "off" not in told


def test_a_pass_without_requests_steers_nothing_and_moves_no_latch(profiles, tmp_path) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    runtime = engine.runtimes[0]
    rows = random_rows(8, 5)
    engine.step([("one", 0, 4)], {"one": rows}, [asked("one", engine.extra("own", 1.0), 4)])
    before = runtime.roster.values.clone(), runtime.roster.scores.clone()
    runtime.rest()
    x = random_rows(engine.max_rows, 6)
    for layer in runtime.config.layers:
        y = x.clone()
        serve_(y, None, layer)
        assert torch.equal(x, y)
    assert torch.equal(before[0], runtime.roster.values)
    assert torch.equal(before[1], runtime.roster.scores)
    found, told = engine.step([("one", 4, 4)], {"one": rows})
    expected, _ = engine.truth(rows, 4, "own", 1.0)
    torch.testing.assert_close(found["one"].double(), expected[4:], rtol=0, atol=2e-4)
    assert not told


def test_a_prompt_may_be_embeddings(profiles, tmp_path) -> None:
    engine, rows = Engine(profiles, [list(range(LAYERS))], tmp_path), random_rows(6, 5)
    new = asked("one", engine.extra("own"), 4)
    new.prompt_token_ids, new.prompt_embeds = None, rows[:4]
    found, told = engine.step([("one", 0, 6)], {"one": rows}, [new])
    expected, _ = engine.truth(rows, 4, "own", 1.0)
    torch.testing.assert_close(found["one"].double(), expected, rtol=0, atol=2e-4)
    assert set(told) == {"one"}


@pytest.mark.parametrize("name", ["mean", "recent", "both"])
def test_a_pass_without_requests_counts_in_no_mean(profiles, tmp_path, name) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    runtime, rows = engine.runtimes[0], random_rows(9, 5)
    expected, decision = engine.truth(rows, 7, name, 1.0)
    for past, length in ((0, 4), (4, 2), (6, 1), (7, 2)):
        new = [asked("one", engine.extra(name), 7)] if past == 0 else []
        found, told = engine.step([("one", past, length)], {"one": rows}, new)
        torch.testing.assert_close(found["one"].double(), expected[past : past + length], rtol=0, atol=2e-4)
        assert ("one" in told) == (past == 6)
        if told:
            check_decision(told["one"], decision)
        before = runtime.roster.sums.clone()
        assert before.any() or (name, past) == ("both", 0)  # whose turn begins later
        runtime.rest()
        assert runtime.roster.tables.counted.eq(0).all()
        for layer in runtime.config.layers:
            serve_(random_rows(engine.max_rows, 6), None, layer)
        assert torch.equal(runtime.roster.sums, before)


def test_steps_that_only_answer_send_no_tables(profiles, tmp_path, monkeypatch) -> None:
    """Until something changes: who is in the step, in which order, how many rows, or a request starts over."""
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    tables = engine.runtimes[0].roster.tables
    sent = []
    write = tables.write
    monkeypatch.setattr(tables, "write", lambda *args, **kwargs: (sent.append(1), write(*args, **kwargs)))
    rows = {"a": random_rows(20, 1), "b": random_rows(20, 2)}
    prompts = {"a": (1, "own", 1.0), "b": (3, "sensor", 0.5), "c": (2, "everywhere", 1.0)}
    rows["c"] = random_rows(20, 3)
    truth = {name: engine.truth(rows[name], *asked_for)[0] for name, asked_for in prompts.items()}

    def step(batch: list[tuple[str, int, int]], new: Any = (), padding: int = 0) -> int:
        sent.clear()
        joins = [asked(name, engine.extra(*prompts[name][1:]), prompts[name][0]) for name in new]
        found, _ = engine.step(batch, rows, joins, padding=padding)
        for name, past, length in batch:
            expected = truth[name][past : past + length]
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=2e-4)
        return len(sent)

    assert step([("a", 0, 1), ("b", 0, 3)], "ab") == 1
    assert step([("a", 1, 1), ("b", 3, 1)]) == 1
    assert step([("a", 2, 1), ("b", 4, 1)]) == 0
    assert step([("a", 3, 1), ("b", 5, 1)]) == 0
    assert step([("b", 6, 1), ("a", 4, 1)]) == 1  # another order
    assert step([("b", 7, 1), ("a", 5, 1)], padding=2) == 1
    assert step([("b", 8, 1), ("a", 6, 1)], padding=2) == 0
    assert step([("b", 0, 1), ("a", 7, 1)], padding=2) == 1  # preempted: its prompt comes again
    assert step([("b", 1, 1), ("a", 8, 1)], padding=2) == 1
    assert step([("b", 2, 1), ("a", 9, 1)], padding=2) == 1
    assert step([("b", 3, 1), ("a", 10, 1)], padding=2) == 1
    assert step([("b", 4, 1), ("a", 11, 1)], padding=2) == 0
    assert step([("b", 5, 1), ("c", 0, 1)], "c", padding=2) == 1
    engine.runtimes[0].rest()
    assert step([("b", 6, 1), ("c", 1, 1)], padding=2) == 1
    assert step([("b", 7, 1), ("c", 2, 1)], padding=2) == 1
    engine.runtimes[0].rest()
    assert step([("b", 8, 1), ("c", 3, 1)], padding=2) == 1
    assert step([("b", 9, 1), ("c", 4, 1)], padding=2) == 0


def test_tables_are_sent_where_an_answer_ceases_to_be_steered(profiles, tmp_path, monkeypatch) -> None:
    profiles = {**profiles, "short": replace(profiles["always"], answer_tokens=4)}
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    tables, sent = engine.runtimes[0].roster.tables, []
    write = tables.write
    monkeypatch.setattr(tables, "write", lambda *args, **kwargs: (sent.append(1), write(*args, **kwargs)))
    rows = {"a": random_rows(20, 1), "b": random_rows(20, 2)}
    truth = {"a": engine.truth(rows["a"], 2, "short", 1.0)[0], "b": engine.truth(rows["b"], 2, "always", 1.0)[0]}
    new = [asked("a", engine.extra("short"), 2), asked("b", engine.extra("always"), 2)]
    runtime, past, counts = engine.runtimes[0], 0, []
    step, view = runtime.step, np.zeros(2, dtype=np.int32)

    def viewed(names: Any, before: Any, lengths: Any, padded: int) -> None:
        view[:] = before  # a runner counts on in its own memory
        step(names, view, lengths, padded)

    monkeypatch.setattr(runtime, "step", viewed)
    for length in (2, 1, 1, 1, 1, 1, 2, 2):  # the rows of the third answer token and those before it are edited
        sent.clear()
        found, _ = engine.step([("a", past, length), ("b", past, length)], rows, new)
        counts.append(len(sent))
        for name in "ab":
            torch.testing.assert_close(found[name].double(), truth[name][past : past + length], rtol=0, atol=2e-4)
        past, new = past + length, []
    assert counts == [1, 1, 0, 0, 1, 0, 1, 0]


def test_each_edit_of_a_stack_ends_for_itself(profiles, tmp_path, monkeypatch) -> None:
    profiles = {**profiles, "short": replace(profiles["always"], answer_tokens=4)}
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    tables, sent = engine.runtimes[0].roster.tables, []
    write = tables.write
    monkeypatch.setattr(tables, "write", lambda *args, **kwargs: (sent.append(1), write(*args, **kwargs)))
    rows = random_rows(20, 1)
    truth = engine.truth(rows, 2, "own,short", 1.0)[0]
    new, counts = [asked("a", engine.extra("own,short"), 2)], []
    for past, length in ((0, 2), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (3, 1), (4, 1), (5, 1)):  # and once again
        sent.clear()
        found, _ = engine.step([("a", past, length)], {"a": rows}, new)
        counts.append(len(sent))
        torch.testing.assert_close(found["a"].double(), truth[past : past + length], rtol=0, atol=2e-4)
        new = []
    assert counts == [1, 1, 0, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_edits_end_at_their_row_while_drafts_are_in_flight(profiles, tmp_path, monkeypatch, seed) -> None:
    """A runner counts drafts that are rejected later; only positions on the device are exact."""
    profiles = {
        **profiles,
        "short": replace(profiles["always"], answer_tokens=4),
        "last": replace(profiles["own"], answer_tokens=1),
    }
    engine, rng = Engine(profiles, [list(range(LAYERS))], tmp_path, max_rows=40), random.Random(seed)
    asks = {"a": ("own,short", 5), "b": ("short", 2), "c": ("always", 3), "d": ("last,sensor", 1)}
    rows = {name: random_rows(60, seed + number) for number, name in enumerate(asks)}
    truth = {name: engine.truth(rows[name], prompt, stack, 1.0)[0] for name, (stack, prompt) in asks.items()}
    runtime, past, drafts = engine.runtimes[0], dict.fromkeys(asks, 0), dict.fromkeys(asks, 0)
    step = runtime.step

    def drafted(names: Any, before: Any, lengths: Any, padded: int) -> None:
        exact = [place for at, length in zip(before, lengths, strict=True) for place in range(at, at + length)]
        counted = [at + drafts[name] for name, at in zip(names, before, strict=True)]
        step(names, counted, lengths, padded, torch.tensor(exact + [0] * (padded - len(exact))))

    monkeypatch.setattr(runtime, "step", drafted)
    new = [asked(name, engine.extra(stack), prompt) for name, (stack, prompt) in asks.items()]
    for _ in range(12):
        batch = []
        for name in rng.sample(sorted(asks), 4):
            prompt = asks[name][1]
            left = prompt - past[name]
            length = rng.randrange(1, left + 1) if left > 1 else rng.randrange(1, 5)  # 1 and up to 3 drafts
            batch.append((name, past[name], length))
        found, _ = engine.step(batch, rows, new, padding=rng.randrange(3))
        new = []
        for name, at, length in batch:
            torch.testing.assert_close(found[name].double(), truth[name][at : at + length], rtol=0, atol=2e-4)
            answers = at + length >= asks[name][1]
            first = max(at + 1, asks[name][1])  # the prompt's rows and that of the last token stay
            past[name] = rng.randrange(first, at + length + 1) if answers else at + length
            drafts[name] = at + length - past[name]
    assert all(past[name] > prompt + 4 for name, (_, prompt) in asks.items())


class Later:
    """An output that is copied beside the step."""

    def get_output(self) -> Any:
        return SimpleNamespace(tokens=[1])


def launch(engine: Engine, name: str) -> Any:
    """Launch a step that decides about a new request."""
    runtime = engine.runtimes[0]
    new = [asked(name, engine.extra("always"), 2)]
    runtime.begin(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new))
    runtime.step([name], [0], [2], 2)
    engine.forward(list(range(LAYERS)), random_rows(2, 0))
    runtime.launched(None)
    return runtime


def test_decisions_wait_for_an_output_that_is_copied_beside_the_step(profiles, tmp_path) -> None:
    runtime = launch(Engine(profiles, [list(range(LAYERS))], tmp_path), "one")
    ready = runtime.report(Later()).get_output()
    assert (ready.tokens, ready.steerfast) == ([1], {"one": [([], [])]})
    plain = SimpleNamespace()
    assert runtime.report(plain) is plain
    assert not vars(plain)


def test_an_output_that_was_read_goes_at_once(profiles, tmp_path) -> None:
    """It holds tensors of the device, which should not wait for the garbage collector."""
    runtime, output = launch(Engine(profiles, [list(range(LAYERS))], tmp_path), "one"), Later()
    output.tensor = torch.zeros(1)
    gone = weakref.ref(output.tensor)
    gc.disable()
    try:
        assert runtime.report(output).get_output().steerfast
        del output
        assert gone() is None
    finally:
        gc.enable()


def test_a_step_that_failed_leaves_no_decision_behind(profiles, tmp_path) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    runtime = launch(engine, "one")
    assert runtime.report(None) is None  # as a runner answers after an error, which the engine then raises
    launch(engine, "two")  # nobody reads its output
    runtime.begin(SimpleNamespace(finished_req_ids={"one", "two"}, scheduled_new_reqs=[]))
    assert not vars(runtime.report(SimpleNamespace()))
    runtime.begin(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[asked("three", engine.extra("own"), 2)]))
    runtime.step(["three"], [0], [2], 2)  # its forward pass fails
    new = [asked("four", engine.extra("always"), 2)]
    _, told = engine.step([("four", 0, 2)], {"four": random_rows(2, 1)}, new, {"three"})
    assert set(told) == {"four"}


def test_profiles_are_written_to_the_slot_that_is_named(profiles, tmp_path, tiny_llama, make_profile) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    runtime = engine.runtimes[0]
    path = str(tmp_path / "new.safetensors")
    new = make_profile(tiny_llama, seed=9, kind="always", layers=[3], positions="response")
    new.save(path)
    free = len(profiles)
    runtime.write([free], path, new.checksum)
    assert torch.equal(runtime.bank.vectors[:, free], new.vector)
    with pytest.raises(ProfileError, match=f"which slot {free} holds"):
        runtime.write([free], path, new.checksum)
    runtime.clear(free)
    assert not runtime.bank.vectors[:, free].any()
    runtime.clear(free)  # again: it is
    with pytest.raises(ProfileError, match="expected checksum 0000"):
        runtime.write([free], path, "0000")
    runtime.clear(0)
    runtime.write([0], path, new.checksum)
    engine.profiles["own"] = new
    rows = random_rows(4, 8)
    found, _ = engine.step([("one", 0, 4)], {"one": rows}, [asked("one", engine.extra("own"), 3)])
    torch.testing.assert_close(found["one"].double(), engine.truth(rows, 3, "own", 1.0)[0], rtol=0, atol=2e-4)


def test_each_threshold_decides_in_a_slot(profiles, tmp_path) -> None:
    """One file, two requests of a step: the gate opens for one, and the other's rows keep their bits."""
    base = profiles["sensor"]
    points = {"never": torch.full((LAYERS,), 99.0), "now": base.threshold, "ever": torch.full((LAYERS,), -99.0)}
    engine = Engine({"sensor": replace(base, points=points)}, [list(range(LAYERS))], tmp_path, slots=3)
    runtime, rows = engine.runtimes[0], random_rows(4, 8)
    slots = {"now": 0, "ever": 1, "never": 2}  # the one in use, then by name
    for name, slot in slots.items():
        assert torch.equal(runtime.bank.profile(f"slot {slot}").threshold, points[name])
    (extra,) = engine.extra("sensor")
    names = ("ever", "never", "off")
    new = [asked(name, [{**extra, "slot": slots[name]}] if name in slots else None, 3) for name in names]
    found, told = engine.step([(name, 0, 4) for name in names], dict.fromkeys(names, rows), new)
    assert {name: decisions[0][0] for name, decisions in told.items()} == {"ever": [1.0], "never": [0.0]}
    assert torch.equal(found["never"], found["off"])
    engine.profiles["sensor"] = replace(base, threshold=points["ever"])
    torch.testing.assert_close(found["ever"].double(), engine.truth(rows, 3, "sensor", 1.0)[0], rtol=0, atol=2e-4)


def test_profiles_of_other_models_and_layers_are_not_written(profiles, tmp_path, tiny_llama, make_profile) -> None:
    engine = Engine({"own": profiles["own"]}, [list(range(LAYERS))], tmp_path)
    for profile, says in (
        (make_profile(tiny_llama, layers=[2], positions="response"), "declared layers 1, 3, got 2"),
        (replace(profiles["own"], model=replace(profiles["own"].model, architecture="gemma")), "architecture gemma"),
        (replace(profiles["own"], positions="all"), "--no-enable-chunked-prefill"),
    ):
        path = str(tmp_path / "other.safetensors")
        profile.save(path)
        with pytest.raises(ProfileError, match=says):
            engine.runtimes[0].write([1], path, profile.checksum)
    assert not engine.runtimes[0].bank.vectors[:, 1].any()


def test_what_would_run_unsteered_stops(profiles, tmp_path) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    runtime = engine.runtimes[0]
    rows = {"one": random_rows(8, 1)}
    with pytest.raises(SteerfastError, match="slot that holds a profile, got 9"):
        engine.step([("one", 0, 4)], rows, [asked("one", [{**engine.extra("own")[0], "slot": 9}], 4)])
    with pytest.raises(SteerfastError, match="'two': the last token of its prompt came from a cache"):
        engine.step([("two", 4, 4)], {"two": rows["one"]}, [asked("two", engine.extra("own"), 4)])
    for name, past in (("mean", 1), ("recent", 3)):  # which reads the last 4 of 6
        with pytest.raises(SteerfastError, match=f"'{name}': rows of its prompt, of which a gate reads the mean, came"):
            engine.step([(name, past, 2)], {name: rows["one"]}, [asked(name, engine.extra(name), 6)])
    runtime._served.clear()
    runtime.step([], [], [], 2)
    serve_(torch.zeros(2, HIDDEN), None, runtime.config.layers[0])
    with pytest.raises(ArchitectureError, match=r"to steer layers \[0, 1, 2, 3, 4\], it did \[0\]"):
        runtime.launched(None)
    with pytest.raises(SteerfastError, match="at most 24 rows, got 25"):
        serve_(torch.zeros(25, HIDDEN), None, 1)

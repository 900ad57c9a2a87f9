"""The launches of a layer in a serving step, counted in the real runtime: at most two, none without a cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import LAYERS, Engine, asked, random_rows

from steerfast.vllm import worker

VIEWS = {"aten::view", "aten::slice", "aten::select", "aten::alias", "aten::detach", "aten::_unsafe_view"}


class Launches(TorchDispatchMode):
    """Note the operations on tensors that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in VIEWS:
            self.names.append(func._schema.name.removeprefix("steerfast::"))
        return func(*args, **kwargs or {})


def launches(engine: Engine, monkeypatch: pytest.MonkeyPatch, batch: Any, rows: Any, new: Any = ()) -> dict[int, list]:
    """Return the launches of each layer in a step."""
    found: dict[int, list[str]] = {}

    def counted(stage: list[int], x: torch.Tensor) -> torch.Tensor:
        for layer in engine.runtimes[0].config.layers:
            with Launches() as seen:
                engine.runtimes[0].serve(x, None, layer)
            found[layer] = seen.names
        return x

    monkeypatch.setattr(engine, "forward", counted)
    engine.step(batch, rows, list(new))
    return found


@pytest.mark.contract
@pytest.mark.parametrize("name", ["own", "sensor", "soft", "mean", "recent", "both", "always"])
def test_two_launches_where_gates_decide_one_where_rows_are_edited(profiles, tmp_path, monkeypatch, name) -> None:
    profile = profiles[name]
    engine, rows = Engine({name: profile}, [list(range(LAYERS))], tmp_path), {"a": random_rows(9, 1)}
    prompt = launches(engine, monkeypatch, [("a", 0, 6)], rows, [asked("a", engine.extra(name), 6)])
    for layer, found in prompt.items():
        decides, edits = layer in profile.gate_layers, layer in profile.steered_layers
        assert found == (["score_", "steer_"] if decides else ["steer_"] * edits), layer
    for past in (6, 7):
        answer = launches(engine, monkeypatch, [("a", past, 1)], rows)
        assert answer == {layer: ["steer_"] * (layer in profile.steered_layers) for layer in answer}


@pytest.mark.contract
def test_a_directory_costs_nothing_where_no_loaded_profile_acts(profiles, tmp_path, monkeypatch) -> None:
    """Later profiles may act at any declared layer; until then a step launches nothing there."""
    one, later = profiles["sensor"], profiles["mean"]
    engine = Engine({"sensor": one}, [list(range(LAYERS))], tmp_path, directory=True)
    runtime, rows = engine.runtimes[0], {"a": random_rows(9, 1), "b": random_rows(9, 2)}
    assert set(runtime.config.layers) == set(range(LAYERS))
    alone = launches(engine, monkeypatch, [("a", 0, 6)], rows, [asked("a", engine.extra("sensor"), 6)])
    assert alone == {0: [], 1: ["score_", "steer_"], 2: ["steer_"], 3: [], 4: ["steer_"]}
    later.save(tmp_path / "later.safetensors")
    runtime.write([1], str(tmp_path / "later.safetensors"))
    engine.slot_of["mean"], engine.profiles["mean"] = 1, later
    batch = [("a", 6, 1), ("b", 0, 5)]
    beside = launches(engine, monkeypatch, batch, rows, [asked("b", engine.extra("mean"), 5)])
    assert [len(beside[layer]) for layer in range(LAYERS)] == [0, 2, 1, 2, 1]
    runtime.begin(type("Scheduled", (), {"finished_req_ids": {"b"}, "scheduled_new_reqs": []}))
    runtime.clear(1)
    after = launches(engine, monkeypatch, [("a", 7, 1)], rows)
    assert after == {0: [], 1: [], 2: ["steer_"], 3: [], 4: ["steer_"]}


@pytest.mark.contract
@pytest.mark.parametrize("directory", [False, True])
def test_a_captured_graph_holds_the_gates_of_its_profiles_and_of_later_ones(
    profiles, tmp_path, monkeypatch, directory
) -> None:
    """A graph of decode steps, too: vLLM replays it for the last row of a prompt."""
    engine, rows = Engine({"sensor": profiles["sensor"]}, [list(range(LAYERS))], tmp_path, directory=directory), {}
    rows["a"] = random_rows(9, 1)
    launches(engine, monkeypatch, [("a", 0, 6)], rows, [asked("a", engine.extra("sensor"), 6)])
    monkeypatch.setattr(worker, "is_captured", lambda stream: True)
    found = launches(engine, monkeypatch, [("a", 6, 1)], rows)
    both, edit = ["score_", "steer_"], ["steer_"]
    assert found == (dict.fromkeys(range(LAYERS), both) if directory else {1: both, 2: edit, 4: edit})
    monkeypatch.undo()
    assert launches(engine, monkeypatch, [("a", 7, 1)], rows)[2] == edit

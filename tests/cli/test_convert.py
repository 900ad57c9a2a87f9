"""`steerfast convert` both ways, what it says is lost, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CommandLine

from steerfast.cli import common
from steerfast.formats.gguf import build, parse
from steerfast.hf.structure import identify
from steerfast.profile import Gate, SteeringProfile

_COMMAND = CommandLine("convert")
run, done, failed = _COMMAND.run, _COMMAND.done, _COMMAND.failed


@pytest.fixture
def profile(tiny_llama: Any, make_profile: Callable[..., SteeringProfile], tmp_path: Path) -> SteeringProfile:
    """In the file p.safetensors: gated at layer 1, steers layers 1 and 2."""
    made = make_profile(tiny_llama, layers=[1, 2], strength=0.5, sensor=1, threshold=0.25)
    made.save(tmp_path / "p.safetensors")
    return made


@pytest.fixture
def vectors(profile: SteeringProfile, tmp_path: Path) -> dict[int, torch.Tensor]:
    """In the file v.gguf: vectors of blocks 1 and 3."""
    rows = {layer: np.full(profile.model.hidden_size, 0.1 * layer, "f4") for layer in (1, 3)}
    values: dict[str, str | int] = {"controlvector.model_hint": "llama"}
    (tmp_path / "v.gguf").write_bytes(build(values, {f"direction.{layer}": row for layer, row in rows.items()}))
    return {layer: torch.from_numpy(row) for layer, row in rows.items()}


def test_export_says_that_the_gate_is_lost(profile: SteeringProfile, tmp_path: Path) -> None:
    result = done(tmp_path / "p.safetensors", tmp_path / "v.gguf", "--json", tmp_path / "r.json")
    assert result.stdout == f"wrote {tmp_path / 'v.gguf'}\n"
    assert "steerfast: note: the gate is lost" in result.stderr
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["from"], data["to"], data["gate"], data["gate_lost"]) == ("steerfast", "gguf", "prompt", True)
    assert data["layers"] == [1, 2]
    assert [f"steerfast: note: {note}" for note in data["notes"]] == result.stderr.splitlines()
    tensors = parse(tmp_path / "v.gguf")[1]
    assert {name: row.tolist() for name, row in tensors.items()} == {
        f"direction.{layer}": (0.5 * profile.vector[layer]).tolist() for layer in (1, 2)
    }


@pytest.mark.parametrize(
    ("name", "option"), [("v.svec", ()), ("v.pt", ()), ("v.json", ("--to", "vllm-lens")), ("v", ("--to", "rotalabs"))]
)
def test_there_and_back(name: str, option: tuple[str, ...], profile: SteeringProfile, tmp_path: Path) -> None:
    done(tmp_path / "p.safetensors", tmp_path / name, *option)
    back = tmp_path / "back.safetensors"
    done(tmp_path / name, back, "--like", tmp_path / "p.safetensors", "--layers", "1-2", "--keep-gate")
    found = SteeringProfile.load(back)
    assert torch.equal(found.vector[[1, 2]], 0.5 * profile.vector[[1, 2]])
    assert found.steered_layers == [1, 2]
    assert (found.gate, found.sensor, found.model) == (profile.gate, 1, profile.model)
    assert torch.equal(found.direction, profile.direction)


def test_import_says_how_layers_were_counted(
    profile: SteeringProfile, vectors: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = done(tmp_path / "v.gguf", out, "--like", tmp_path / "p.safetensors", "--json", "-")
    data = json.loads(result.stdout)
    assert (data["from"], data["to"], data["gate"], data["gate_lost"]) == ("gguf", "steerfast", "always", False)
    assert "layers: direction.N edits the output of 0-based block N" in data["notes"]
    found = SteeringProfile.load(out)
    assert found.gate == Gate("always")
    assert found.vector_kind == "v"
    assert {layer: found.vector[layer].tolist() for layer in found.steered_layers} == {
        layer: row.tolist() for layer, row in vectors.items()
    }


def test_import_for_a_model(
    profile: SteeringProfile,
    vectors: dict[int, torch.Tensor],
    tiny_llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(common, "load_model", lambda *arguments: (asked.append(arguments), (tiny_llama, None))[1])
    out = tmp_path / "out.safetensors"
    done(tmp_path / "v.gguf", out, "--model", "m", "--dtype", "float32", "--device", "cpu")
    assert asked == [("m", "float32", "cpu")]
    found = SteeringProfile.load(out)
    assert found.model == identify(tiny_llama)
    assert found.steered_layers == list(vectors)


def test_shift_layers_and_strength(
    profile: SteeringProfile, vectors: dict[int, torch.Tensor], tiny_llama: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    options = ("--layers", "2", "--strength", "-2", "--layer-shift", "-1")
    done(tmp_path / "v.gguf", out, "--like", tmp_path / "p.safetensors", *options)
    found = SteeringProfile.load(out)
    assert found.strength.tolist() == [0, 0, -2, *[0] * (found.model.num_layers - 3)]
    assert torch.equal(found.vector[2], vectors[3])
    assert found.model == identify(tiny_llama)


def test_edits_and_gates(profile: SteeringProfile, vectors: dict[int, torch.Tensor], tmp_path: Path) -> None:
    out, like = tmp_path / "out.safetensors", ("--like", tmp_path / "p.safetensors")
    clamp = ("--edit", "clamp", "--low", "-1", "--high", 2)
    done(tmp_path / "v.gguf", out, *like, *clamp, "--keep-gate", "--gate-kind", "token", "--sharpness", 4)
    found = SteeringProfile.load(out)
    assert (found.edit, found.low, found.high) == ("clamp", -1.0, 2.0)
    assert found.gate == Gate("token", profile.gate.score, 4.0)
    rotate = ("--edit", "rotate", "--angle", 30, "--keep-gate", "--gate-kind", "always")
    done(tmp_path / "v.gguf", out, *like, *rotate)
    found = SteeringProfile.load(out)
    assert (found.edit, found.angle, found.gate) == ("rotate", 30.0, Gate("always"))
    assert "only a clamp has limits" in failed(1, tmp_path / "v.gguf", out, *like, "--edit", "ablate", "--low", 1)


def test_between_other_projects(profile: SteeringProfile, vectors: dict[int, torch.Tensor], tmp_path: Path) -> None:
    like = ("--like", tmp_path / "p.safetensors")
    result = done(tmp_path / "v.gguf", tmp_path / "m.json", "--to", "rhizonymph", *like, "--json", "-")
    data = json.loads(result.stdout)
    assert (data["from"], data["to"], data["gate_lost"]) == ("gguf", "rhizonymph", False)
    done(tmp_path / "m.json", tmp_path / "w.gguf", *like)
    tensors = parse(tmp_path / "w.gguf")[1]
    assert {int(name[10:]): row.tolist() for name, row in tensors.items()} == {
        layer: row.tolist() for layer, row in vectors.items()
    }


def test_conditions_out_and_in(profile: SteeringProfile, tmp_path: Path) -> None:
    out, condition = tmp_path / "v.svec", tmp_path / "c.svec"
    result = done(tmp_path / "p.safetensors", out, "--condition", condition, "--json", "-")
    assert json.loads(result.stdout)["gate_lost"] is False
    assert "condition_layer_ids=[2], condition_vector_threshold=0.25" in result.stderr
    gate = ("--condition", condition, "--condition-layer", 1, "--threshold", 0.25, "--layers", "1-2")
    like = ("--like", tmp_path / "p.safetensors")
    done(out, tmp_path / "q.safetensors", *like, *gate)
    found = SteeringProfile.load(tmp_path / "q.safetensors")
    assert (found.gate, found.sensor, float(found.threshold[1])) == (Gate("prompt"), 1, 0.25)
    assert torch.allclose(found.direction[1], profile.direction[1], atol=1e-6)
    done(out, tmp_path / "r.safetensors", *like, *gate, "--fires", "below")
    below = SteeringProfile.load(tmp_path / "r.safetensors")
    assert torch.equal(below.direction, -found.direction)
    assert float(below.threshold[1]) == -0.25


def test_wrong_usage(profile: SteeringProfile, vectors: dict[int, torch.Tensor], tmp_path: Path) -> None:
    own, other, out = tmp_path / "p.safetensors", tmp_path / "v.gguf", tmp_path / "o.safetensors"
    for arguments, message in (
        ((other, out), "--model, --like: expected one of them"),
        ((other, out, "--like", own, "--model", "m"), "--model, --like: expected one of them"),
        ((own, tmp_path / "x.json"), "--to: expected a format"),
        ((own, out), "--to: expected another format, INPUT is a profile already"),
        ((own, tmp_path / "x.gguf", "--layers", "1"), "--layers: expected for other projects' files only"),
        ((own, tmp_path / "x.gguf", "--layer-shift", "0"), "--layer-shift: expected for other projects' files only"),
        ((own, tmp_path / "x.gguf", "--condition", tmp_path / "c"), "--condition: expected with --to svec only"),
        ((own, tmp_path / "x.pkl", "--to", "steering-vectors"), "'steering-vectors' is not one of"),
        ((other, out, "--model", "m", "--keep-gate"), "--keep-gate: expected with --like"),
        ((other, out, "--like", own, "--threshold", "1"), "expected all of them or none"),
        ((other, out, "--like", own, "--gate-kind", "token"), "--gate-kind: expected with --keep-gate or --condition"),
        ((own, tmp_path / "x.gguf", "--edit", "ablate"), "--edit: expected for other projects' files only"),
        ((other, out, "--like", own, "--layers", "5-1"), "expected layers such as"),
        ((other, out, "--like", own, "--layers", "0-999999999"), "expected layers such as"),
        ((other, other, "--like", own, "--to", "gguf"), "OUTPUT: expected a file of its own"),
        ((other, own, "--like", own), "OUTPUT: expected a file of its own"),
        ((own, tmp_path / "x.gguf", "--json", tmp_path / "x.gguf"), "--json: expected a file of its own"),
    ):
        assert message in failed(2, *arguments), message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.safetensors", "v.gguf"]


def test_what_cannot_be_done(profile: SteeringProfile, vectors: dict[int, torch.Tensor], tmp_path: Path) -> None:
    own, other, out = tmp_path / "p.safetensors", tmp_path / "v.gguf", tmp_path / "o.safetensors"
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.gguf").write_text("hello")
    for arguments, message in (
        ((tmp_path / "none.gguf", out, "--like", own), "expected a file or folder"),
        ((tmp_path / "none.safetensors", tmp_path / "x.gguf"), "profile: expected a file"),
        ((tmp_path / "bad.gguf", out, "--like", own), "truncated"),
        ((tmp_path / "text.gguf", out, "--like", own), "recognised none"),
        ((other, out, "--like", own, "--from", "svec"), "svec file"),
        ((other, out, "--like", own, "--layers", "2"), "layers: expected some of [1, 3], which the file has, got 2"),
        ((other, out, "--like", own, "--strength", "inf"), "strength: expected finite numbers"),
        ((other, out, "--like", tmp_path / "v.gguf"), "not a readable safetensors file"),
        ((own, tmp_path / "no" / "x.gguf"), "OUTPUT: expected a file in an existing folder"),
        ((own, tmp_path, "--to", "rotalabs"), "expected a folder that is not there yet"),
    ):
        assert message in failed(1, *arguments), message
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["bad.gguf", "p.safetensors", "text.gguf", "v.gguf"]


def test_help_has_an_example() -> None:
    text = done("--help").stdout
    assert "Example:\n    steerfast convert happy.gguf" in text
    assert "--json FILE" in text


def test_names_in_files_do_not_reach_the_terminal_raw(profile: SteeringProfile, tmp_path: Path) -> None:
    """Escape sequences and line breaks in a model's name, a vector's kind, a key of a file."""
    hostile = "\x1b]0;owned\x07\x1b[2J\rx\nsteerfast: note: all is well"
    bad = replace(profile, vector_kind=hostile, model=replace(profile.model, name=hostile))
    bad.save(tmp_path / "bad.safetensors")
    torch.save({hostile: torch.ones(3), "b": torch.ones(3)}, tmp_path / "keys.pt")
    values = {"controlvector.model_hint": hostile}
    row = np.ones(profile.model.hidden_size, "f4")
    (tmp_path / "v.gguf").write_bytes(build(values, {"direction.1": row}))
    out = tmp_path / "out.safetensors"
    shown = [
        CommandLine("inspect").done(tmp_path / "bad.safetensors"),
        run(tmp_path / "v.gguf", out, "--like", tmp_path / "bad.safetensors"),
        run(tmp_path / "v.gguf", out, "--like", tmp_path / "bad.safetensors", "--layers", "3"),
        run(tmp_path / "keys.pt", out, "--like", tmp_path / "p.safetensors"),
    ]
    for result in shown:
        text = result.stdout + result.stderr
        assert "owned" in text or "layers: expected" in text
        assert all(c.isprintable() or c == "\n" for c in text)
        assert not any(line.startswith("steerfast: note: all is well") for line in text.splitlines())

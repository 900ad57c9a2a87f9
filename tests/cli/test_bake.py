"""`steerfast bake`: biases for engines that cannot steer, and what is refused or said to be lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from safetensors.torch import load_file

from steerfast.cli import common
from steerfast.profile import SteeringProfile

_COMMAND = CommandLine("bake")


@pytest.fixture
def files(tiny_llama: Any, make_profile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile that has a gate, one that has none, and one that ablates."""
    monkeypatch.setattr(common, "load_model", lambda *place: (tiny_llama, None))
    gated = make_profile(tiny_llama, layers=[1, 2])
    gated.save(tmp_path / "gated.safetensors")
    gated.without_gate().save(tmp_path / "open.safetensors")
    make_profile(tiny_llama, layers=[1], edit="ablate").without_gate().save(tmp_path / "ablate.safetensors")
    return tmp_path


def test_biases_are_written_and_the_option_is_named(files: Path) -> None:
    out = files / "b.safetensors"
    result = _COMMAND.done(files / "open.safetensors", out, "--json", files / "r.json")
    assert result.stdout == f"wrote {out}\n"
    assert "an engine reads the biases where the model's config.json has 'mlp_bias': true" in result.stderr
    tensors = load_file(out)
    assert {name for name, bias in tensors.items() if bias.any()} == {
        f"model.layers.{layer}.mlp.down_proj.bias" for layer in (1, 2)
    }
    data = json.loads((files / "r.json").read_text())
    assert (data["tensors"], data["option"], data["gate_lost"]) == (sorted(tensors), "mlp_bias", False)


def test_a_gate_is_dropped_only_when_asked(files: Path) -> None:
    out = files / "b.safetensors"
    message = _COMMAND.failed(2, files / "gated.safetensors", out)
    assert "--without-gate: a bias has no gate, and the profile's is of the kind prompt" in message
    assert not out.exists()
    result = _COMMAND.done(files / "gated.safetensors", out, "--without-gate")
    assert "steerfast: note: the gate is lost: everything will be steered" in result.stderr


def test_an_ablation_is_refused(files: Path) -> None:
    message = _COMMAND.failed(1, files / "ablate.safetensors", files / "b.safetensors")
    assert "neither a bias nor a LoRA equals it" in message
    assert not (files / "b.safetensors").exists()


def test_another_models_profile_is_baked_only_when_accepted(files: Path) -> None:
    profile = SteeringProfile.load(files / "open.safetensors")
    other = replace(profile, model=replace(profile.model, architecture="other"))
    other.save(files / "other.safetensors")
    given = files / "other.safetensors", files / "b.safetensors", "--json", files / "r.json"
    assert "other" in _COMMAND.failed(1, *given)
    _COMMAND.done(*given, "--accept-model")
    accepted = json.loads((files / "r.json").read_text())["accepted"]
    assert len(accepted) == 1
    assert "other" in accepted[0]["mismatch"]

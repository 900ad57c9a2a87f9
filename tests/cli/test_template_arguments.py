"""`--template-arg`: the profile's arguments by default, others where they are given, and malformed ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine

from steerfast.cli import common
from steerfast.hf.structure import identify

_COMMAND = CommandLine("score")


@pytest.fixture
def file(tiny_llama: Any, tiny_tokenizer: Any, make_profile: Any, tmp_path: Path, monkeypatch: Any) -> Path:
    """A profile that was made with enable_thinking=true."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += "{% if enable_thinking %}<system>{% endif %}"
    monkeypatch.setattr(common, "load_model", lambda *place: (tiny_llama, tokenizer))
    fitted = {"template": {"enable_thinking": True}}
    made = make_profile(tiny_llama, layers=[1, 2])
    replace(made, model=identify(tiny_llama, tokenizer), fitted=fitted).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_the_profiles_arguments_are_the_default_and_others_are_told(file: Path) -> None:
    default = _COMMAND.done(file, "bake a cake")
    same = _COMMAND.done(file, "bake a cake", "--template-arg", "enable_thinking=true")
    other = _COMMAND.done(file, "bake a cake", "--template-arg", "enable_thinking=false")
    assert default.stdout == same.stdout != other.stdout
    assert "template" not in default.stderr + same.stderr
    assert "made with enable_thinking=true, prompts are rendered with enable_thinking=false" in other.stderr


def test_malformed_arguments_are_refused(file: Path) -> None:
    assert "expected NAME=VALUE, got 'enable'" in _COMMAND.failed(2, file, "cake", "--template-arg", "enable")
    assert "expected a value in JSON, got '[1'" in _COMMAND.failed(2, file, "cake", "--template-arg", "tools=[1")
    says = "template: expected an argument that the chat template uses, got 'thinks'"
    assert says in _COMMAND.failed(1, file, "cake", "--template-arg", "thinks=true")

"""`steerfast serve` as far as it goes without vLLM: what it passes on, what it refuses, what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import CommandLine

from steerfast.errors import SteerfastError
from steerfast.hf import loading
from steerfast.vllm import server
from steerfast.vllm.admin import KEY_VARIABLE


@pytest.fixture
def profile(tiny_llama: Any, make_profile: Callable[..., Any], tmp_path: Path) -> Path:
    make_profile(tiny_llama, layers=[2]).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the server would have been started with."""
    seen: dict[str, Any] = {}
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def serve(model: str, steering: Mapping[str, Any], arguments: list[str], *, admin: bool) -> None:
        seen.update(model=model, steering=steering, arguments=arguments, admin=admin, key=os.environ.get(KEY_VARIABLE))
        os.environ.pop(KEY_VARIABLE, None)

    monkeypatch.setattr(server, "serve", serve)
    return seen


_COMMAND = CommandLine("serve")
run, failed = _COMMAND.run, _COMMAND.failed


def test_help_explains_with_an_example() -> None:
    text = run("--help").stdout
    assert "Example:\n    steerfast serve" in text
    assert "-- VLLM OPTIONS" in text
    assert "STEERFAST_ADMIN_KEY" in text


def test_one_profile_and_nothing_else(profile: Path, started: dict[str, Any]) -> None:
    assert run("some/model", "--profile", f"safety={profile}").exit_code == 0
    assert started == {
        "model": "some/model",
        "steering": {"profiles": {"safety": str(profile)}, "locked": False},
        "arguments": ["--served-model-name", "some/model"],
        "admin": False,
        "key": None,
    }


def test_everything(profile: Path, started: dict[str, Any], tmp_path: Path) -> None:
    result = run(
        "model", "--profile", f"safety={profile}", "--profile", f"a=b={profile}", "--default", "safety", "--locked",
        "--slots", 8, "--layers", "1-3,2,4", "--directory", tmp_path, "--admin-key", "k3y",
        "--", "--port", "8001", "--additional-config", '{"other": 1}', "--served-model-name", "mine",
    )  # fmt: skip
    assert result.exit_code == 1  # no file is called b=...
    assert "b=" in result.stderr
    result = run(
        "model", "--profile", f"safety={profile}", "--profile", f"tone={profile}", "--default", "safety", "--locked",
        "--slots", 8, "--layers", "1-3,2,4", "--directory", tmp_path, "--observe", "tone", "--admin-key", "k3y",
        "--", "--port", "8001", "--additional-config", '{"other": 1}', "--served-model-name", "mine",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert started["steering"] == {
        "profiles": {"safety": str(profile), "tone": str(profile)},
        "default": "safety",
        "locked": True,
        "slots": 8,
        "layers": [1, 2, 3, 4],
        "directory": str(tmp_path),
        "observe": ["tone"],
    }
    # vLLM takes the last of two names, which is the user's.
    assert started["arguments"] == [
        "--served-model-name", "model",
        "--port", "8001", "--additional-config", '{"other": 1}', "--served-model-name", "mine",
    ]  # fmt: skip
    assert (started["admin"], started["key"]) == (True, "k3y")


def test_a_threshold_is_one_of_the_profiles(
    tiny_llama: Any, make_profile: Callable[..., Any], profile: Path, started: dict[str, Any], tmp_path: Path
) -> None:
    make_profile(tiny_llama, layers=[2], points={"strict": torch.zeros(5)}).save(tmp_path / "points.safetensors")
    both = ("model", "--profile", f"plain={profile}", "--profile", f"safety={tmp_path / 'points.safetensors'}")
    assert "threshold: expected one of strict, got 'lax'" in failed(1, *both, "--threshold", "lax")
    assert not started
    assert run(*both, "--threshold", "strict").exit_code == 0
    assert started["steering"]["threshold"] == "strict"


def test_admin_key_from_the_environment(
    profile: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from outside")
    assert run("model", "--profile", f"safety={profile}").exit_code == 0
    assert (started["admin"], started["key"]) == (True, "from outside")
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert run("model", "--profile", f"safety={profile}").exit_code == 0
    assert started["admin"] is False


def test_a_directory_alone_is_enough(started: dict[str, Any], tmp_path: Path) -> None:
    assert run("model", "--directory", tmp_path).exit_code == 0
    assert started["steering"] == {"profiles": {}, "locked": False, "directory": str(tmp_path)}


def test_the_demo_model_is_served_from_a_folder_under_its_own_name(
    profile: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "steerfast" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")  # it was written before
    monkeypatch.setattr(loading, "_packaged_gguf", lambda: tmp_path / "model.gguf")
    assert run(loading.DEMO_MODEL, "--profile", f"safety={profile}").exit_code == 0
    assert started["model"] == str(folder)
    assert started["arguments"] == ["--served-model-name", loading.DEMO_MODEL]
    monkeypatch.setattr(loading, "_packaged_gguf", lambda: None)
    assert run(loading.DEMO_MODEL, "--profile", f"safety={profile}").exit_code == 0
    assert started["model"] == loading.DEMO_MODEL


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "MODEL"),
        (("model",), 2, "--profile: expected one at least, or --directory to load some from later, got none"),
        (("model", "--profile", "safety"), 2, "expected NAME=FILE, got 'safety'"),
        (("model", "--profile", "=x"), 2, "expected NAME=FILE, got '=x'"),
        (("model", "--profile", "a=x", "--profile", "a=y"), 2, "expected each name once, got 'a' twice"),
        (("model", "--profile", "a=x", "--default", "b"), 2, "--default: expected one of a, got 'b'"),
        (("model", "--directory", ".", "--default", "b"), 2, "--default: expected one of no profiles, got 'b'"),
        (("model", "--profile", "a=x", "--observe", "b"), 2, "--observe: expected one of a, got 'b'"),
        (("model", "--profile", "a=x", "--locked"), 2, "--locked: expected --default"),
        (("model", "--profile", "a=x", "--slots", "0"), 2, "0"),
        (("model", "--profile", "a=x", "--layers", "3-1"), 2, "expected layers such as 10-19,20, first before last"),
        (("model", "--profile", "a=x", "--port", "1"), 2, "Options of vLLM come after --"),
        (("model", "--profile", "a=absent.safetensors"), 1, "absent.safetensors"),
    ],
)
def test_what_cannot_be_is_one_line(
    started: dict[str, Any], arguments: tuple[str, ...], status: int, words: str
) -> None:
    assert words in failed(status, *arguments)
    assert started == {}


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_how_to_get_it(profile: Path) -> None:
    line = failed(1, "model", "--profile", f"safety={profile}")
    assert "pip install vllm" in line
    assert "docs/serving.md" in line


# ---- what it hands to vLLM -----------------------------------------------------------------------


def test_steering_joins_the_users_own_additional_config() -> None:
    steering = {"profiles": {}, "directory": "/d"}
    assert server.merged(None, steering) == {"steerfast": steering}
    assert server.merged({}, steering) == {"steerfast": steering}
    given = {"other": [1]}
    assert server.merged(given, steering) == {"other": [1], "steerfast": steering}
    assert given == {"other": [1]}


@pytest.mark.parametrize("given", [{"steerfast": {}}, {"steerfast": None}, [1], "text"])
def test_an_additional_config_that_cannot_be_joined_is_refused(given: object) -> None:
    with pytest.raises(SteerfastError, match="--additional-config: expected"):
        server.merged(given, {})


@pytest.mark.parametrize(
    ("allowed", "installed", "admin", "expected"),
    [
        (None, ["lora"], False, None),  # vLLM then loads every plugin, this one too
        (None, [], True, "steerfast"),
        (None, ["lora", "steerfast", "lora"], True, "lora,steerfast"),
        ("", ["lora"], False, "steerfast"),  # the user wants none but this command's
        ("lora", ["lora", "other"], False, "lora,steerfast"),
        ("lora,steerfast", ["lora"], True, "lora,steerfast"),
    ],
)
def test_vllm_is_told_to_load_the_plugin(
    allowed: str | None, installed: list[str], admin: bool, expected: str | None
) -> None:
    assert server.allowed_plugins(allowed, installed, admin=admin) == expected


def test_a_lock_and_templates_from_clients_do_not_go_together() -> None:
    trusting, strict = (SimpleNamespace(trust_request_chat_template=trust) for trust in (True, False))
    server.check_locked({"locked": True}, strict)
    server.check_locked({"locked": False}, trusting)
    with pytest.raises(SteerfastError, match="--trust-request-chat-template: expected none beside --locked"):
        server.check_locked({"locked": True}, trusting)

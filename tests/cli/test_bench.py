"""`steerfast bench` on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine

from steerfast.evaluation import latency

torch.set_num_threads(1)

FAST = ("--batch-sizes", "2", "--prompt-lengths", "4", "--seconds", "0", "--threads", "1", "--device", "cpu")


@pytest.fixture
def folder(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(latency, "copy_bandwidth", lambda device: 10.0)


_COMMAND = CommandLine("bench")
run, failed = _COMMAND.run, _COMMAND.failed


def test_measures_every_system_and_writes_json(folder: Path) -> None:
    result = run(folder / "model", *FAST, "--json", folder / "bench.json")
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "bench.json").read_text())
    systems = [line["system"] for line in data["results"]]
    assert systems == ["stock", "control", "idle", "shut", "open-one", "open-all"]
    line = data["results"][3]
    assert (line["mode"], line["batch"], line["prompt"], line["floor_ms"] > 0) == ("eager", 2, 4, True)
    assert {"ttft_ms", "tpot_ms", "p99_ms", "tokens_per_s"} <= set(line)
    assert {"ratio_to_stock", "ttft_ratio_to_stock"} <= set(line)
    assert data["torch"] == torch.__version__
    assert data["threads"] == 1
    assert all(f" {name} " in result.stdout for name in ("stock", "idle", "open-all"))
    assert result.stderr == ""


def test_measures_a_profile_open_and_shut(folder: Path, make_profile: Any) -> None:
    from steerfast.hf.loading import load_model

    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    make_profile(model, tokenizer, layers=[2]).save(folder / "p.safetensors")
    result = run(folder / "model", "--profile", folder / "p.safetensors", *FAST, "--json", "-")
    assert result.exit_code == 0, result.output
    systems = [line["system"] for line in json.loads(result.stdout)["results"]]
    assert systems == ["stock", "control", "idle", "profile-shut", "profile-open"]
    assert "profile-open" in result.stderr


def test_help_explains_with_an_example() -> None:
    text = run("--help").stdout
    assert "Example:\n    steerfast bench" in text
    assert "--json FILE" in text


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "MODEL"),
        (("model", "--batch-sizes", "1,0"), 2, "expected whole numbers of at least 1 like 1,4,16, got '1,0'"),
        (("model", "--prompt-lengths", "x"), 2, "expected whole numbers of at least 1 like 1,4,16, got 'x'"),
        (("model", "--mode", "fast"), 2, "'fast'"),
        (("model", "--seconds", "-1"), 2, "-1"),
        (("model", "--threads", "0"), 2, "0"),
        (("model", "--device", "tpu7"), 2, "expected cpu, cuda or cuda:<number>, got 'tpu7'"),
        (("model", "--json", "nowhere/bench.json"), 1, "--json: expected a file in an existing folder"),
        (("model", "--profile", "absent.safetensors"), 1, "absent.safetensors"),
        (("no/such/model",), 1, "model: cannot load 'no/such/model'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], status: int, words: str) -> None:
    assert words in failed(status, *arguments)


def test_prompts_longer_than_the_context_are_an_error(folder: Path) -> None:
    line = failed(1, folder / "model", *FAST, "--prompt-lengths", "256")
    assert "prompt: expected 1 to 255 tokens of 1 or more sequences, got 256" in line

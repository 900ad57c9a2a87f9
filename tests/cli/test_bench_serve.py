"""`steerfast bench-serve` as far as it goes without vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine

from steerfast.cli import bench_serve
from steerfast.evaluation import serving

_COMMAND = CommandLine("bench-serve")
run, failed = _COMMAND.run, _COMMAND.failed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been measured; two systems, of which one is 10 % slower."""
    seen: dict[str, Any] = {}

    def measure(model: str, profile: Any, **options: Any) -> Iterator[dict[str, Any]]:
        seen.update(model=model, profile=profile, **options)
        load = serving.LoadOptions(**options)
        case = {"model": model, "prompt": load.prompt, "output": load.output, "requests": load.requests}
        case |= {"concurrency": load.concurrency, "device": "CPU", "vllm_version": "0.32.0", "torch": "2.13"}
        lines = [
            {"system": name, "round": 0, "ttft_ms": 1.0, "tpot_ms": ms, "p99_itl_ms": 1.0, "tokens_per_s": 1.0, **case}
            for name, ms in (("stock", 10.0), ("open", 11.0))
        ]
        yield from lines
        yield from ({**each, **case} for each in serving.summaries(lines))

    monkeypatch.setattr(serving, "measure_serving", measure)
    return seen


def test_help_explains_with_an_example() -> None:
    text = run("--help").stdout
    assert "Example:\n    steerfast bench-serve" in text
    assert "-- VLLM OPTIONS" in text


def test_it_prints_a_table_and_writes_lines(asked: dict[str, Any], tmp_path: Path) -> None:
    result = run("model", "--rounds", 2, "--rate", 1.5, "--json", tmp_path / "lines.jsonl", "--", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert (asked["model"], asked["profile"], asked["vllm"]) == ("model", None, ("--dtype", "bfloat16"))
    assert (asked["rounds"], asked["rate"], asked["together"]) == (2, 1.5, False)
    assert asked["systems"] == list(serving.SYSTEMS)
    assert "1.100 1.100-1.100" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["system"] for line in lines] == ["stock", "open", "stock", "open"]
    assert lines[-1]["tpot_ms_ratio"] == [1.1, 1.1, 1.1]


def test_lines_may_go_to_standard_output(asked: dict[str, Any]) -> None:
    result = run("model", "--json", "-", "--systems", "stock,open")
    assert [json.loads(line)["system"] for line in result.stdout.splitlines()] == ["stock", "open"] * 2
    assert "1.100" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "MODEL"),
        (("model", "--systems", "stock,fast"), 2, "expected some of stock, control, idle, off, shut, open"),
        (("model", "--rounds", "0"), 2, "0"),
        (("model", "--output", "1"), 2, "1"),
        (("model", "--rate", "0"), 2, "0"),
        (("model", "--dtype", "bfloat16"), 2, "Options of vLLM come after --"),
        (("model", "--json", "nowhere/lines.jsonl"), 1, "--json: expected a file in an existing folder"),
        (("model", "--profile", "absent.safetensors"), 1, "absent.safetensors"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], status: int, words: str) -> None:
    assert words in failed(status, *arguments)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_where_to_read_on() -> None:
    assert "docs/serving.md says how" in failed(1, "model")


def test_the_options_name_every_system() -> None:
    assert list(serving.SYSTEMS) == list(bench_serve._SYSTEMS)

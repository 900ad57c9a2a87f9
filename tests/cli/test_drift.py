"""`steerfast drift` and `--threshold` on a tiny Llama: what they read, say and exit with."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CommandLine

import steerfast
from steerfast.cli import common
from steerfast.profile import SteeringProfile

HARMLESS = [f"how do i {verb} {thing} {end}" for verb in ("bake", "grow") for thing in ("cake", "cat") for end in ".,?"]
HARMFUL = [f"{prompt} bomb" for prompt in HARMLESS]

_COMMAND = CommandLine("drift")
run, failed = _COMMAND.run, _COMMAND.failed
LAYER = 2


@pytest.fixture
def model(tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that commands load, in the dtype that they are given."""

    def load(name: str, dtype: str, device: str | None) -> Any:
        return tiny_llama.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32), tiny_tokenizer

    monkeypatch.setattr(common, "load_model", load)
    return tiny_llama


@pytest.fixture
def file(tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., SteeringProfile], tmp_path: Path) -> Path:
    """A calibrated profile; its record says 400 harmless scores, evenly from 0 to 1, 12 of them above the threshold."""
    profile = make_profile(tiny_llama, tiny_tokenizer, layers=[LAYER], sensor=LAYER)
    profile = steerfast.calibrate(
        profile, tiny_llama, tiny_tokenizer, harmful=HARMFUL, harmless=HARMLESS, sensor=LAYER, progress=False,
        max_false_positive_rate=0.1,
    )  # fmt: skip
    record = json.loads(json.dumps(profile.calibration))
    record["histograms"]["calibration"][LAYER] = {"low": 0.0, "high": 1.0, "harmful": [50] * 8, "harmless": [50] * 8}
    for row in record["by_source"][str(LAYER)]["rows"]:
        row |= {"n": 400, "fired": 12 if row["label"] == "harmless" else 388}
    threshold = torch.full((5,), 0.97)
    points = {"balanced": threshold, "permissive": torch.full((5,), 2.0), "strict": torch.full((5,), -2.0)}
    profile = replace(profile, threshold=threshold, points=points, calibration=record)
    profile.save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.fixture
def scores(tmp_path: Path) -> Callable[..., Path]:
    """A function (scores) -> their file."""

    def write(values: Any) -> Path:
        (tmp_path / "scores.json").write_text(json.dumps([float(value) for value in values]))
        return tmp_path / "scores.json"

    return write


EVEN = np.random.default_rng(0).uniform(size=300)


def test_the_exit_status_is_the_verdict(file: Path, scores: Callable[..., Path], tmp_path: Path) -> None:
    for values, status, says in (
        (EVEN, 0, "pass: the threshold fits this traffic."),
        (EVEN + 0.3, 1, "stale: this traffic is not the calibration's: "),
        (EVEN[:20], 3, "inconclusive: a verdict needs "),
    ):
        result = run(file, "--scores", scores(values), "--json", tmp_path / "drift.json")
        assert result.exit_code == status, result.output
        assert says in result.stdout
        assert f"layer {LAYER}, threshold 0.9700" in result.stdout
        found = json.loads((tmp_path / "drift.json").read_text())
        assert found["verdict"] == says.partition(":")[0]
        side = found["harmless"]
        assert side["verdict"] == found["verdict"]
        assert side["live"][0] == (values > 0.97).mean()
        assert (side["requests"], side["prompts"]) == (len(values), 400)
    assert "steerfast calibrate" in run(file, "--scores", scores(EVEN + 0.3)).stdout


def test_limits_are_the_users(file: Path, scores: Callable[..., Path]) -> None:
    moved = scores(EVEN * 0.7)
    assert run(file, "--scores", moved).exit_code == 1
    assert run(file, "--scores", moved, "--distance", 0.5).exit_code == 0
    more = scores([*EVEN, *[1.0] * 60])
    assert run(file, "--scores", more).exit_code == 1
    assert run(file, "--scores", more, "--tolerance", 5).exit_code == 0
    assert run(file, "--scores", more, "--threshold", "strict").exit_code == 3  # all fire: more than all cannot


def test_wrong_input_is_wrong_usage(file: Path, scores: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "nan.json").write_text("[0.1, NaN]")
    for says, *arguments in (
        ("expected one of --scores, --metrics and --prompts, got 0",),
        ("got 2", "--scores", scores(EVEN), "--metrics", "m.txt"),
        ("--name: expected it with --metrics", "--scores", scores(EVEN), "--name", "safety"),
        ("--scores: expected a text file", "--scores", tmp_path / "absent.json"),
        ("as entry 2", "--scores", tmp_path / "nan.json"),
        (
            "threshold: expected one of balanced, permissive, strict, got 'x'",
            "--scores",
            scores(EVEN),
            "--threshold",
            "x",
        ),
        ("tolerance: expected a finite number >= 1, got 0.5", "--scores", scores(EVEN), "--tolerance", 0.5),
        ("--metrics: expected a page at http://127.0.0.1:9/metrics", "--metrics", "http://127.0.0.1:9"),
    ):
        assert says in failed(2, file, *arguments)
    assert "absent.safetensors" in failed(2, tmp_path / "absent.safetensors", "--scores", scores(EVEN))


PAGE = """steerfast_gate_evaluations_total{profile="safety"} 500.0
steerfast_gate_firings_total{profile="safety"} 15.0
steerfast_gate_evaluations_total{profile="tone"} 0.0
"""


@pytest.fixture
def address() -> Iterator[str]:
    """A server that shows `PAGE` at /metrics."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_server_is_asked_for_its_metrics(file: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text(PAGE)
    for source in (address, f"{address}/metrics", tmp_path / "page.txt"):
        result = run(file, "--metrics", source, "--name", "safety")
        assert result.exit_code == 0, result.output
        assert "distance" not in result.stdout
    assert "expected one profile, or its name, got safety, tone" in failed(2, file, "--metrics", address)
    assert "expected requests that the gate decided on" in failed(2, file, "--metrics", address, "--name", "tone")


def test_prompts_are_scored_in_another_dtype(file: Path, model: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(HARMLESS))
    result = run(file, "--prompts", tmp_path / "prompts.txt", "--dtype", "bfloat16", "--json", tmp_path / "drift.json")
    assert result.exit_code in (1, 3), result.output
    assert next(model.parameters()).dtype == torch.bfloat16
    found = json.loads((tmp_path / "drift.json").read_text())
    scores = steerfast.score(model, tiny_tokenizer, SteeringProfile.load(file), HARMLESS, progress=False)
    assert found["harmless"]["requests"] == len(HARMLESS)
    assert found["harmless"]["live"][0] == float(scores.fired.float().mean())


def test_labelled_prompts_are_compared_with_their_side(
    file: Path, model: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Borderline rows and rows of another split are left out, and counted."""
    rows = [{"prompt": prompt, "label": "harmless"} for prompt in HARMLESS]
    rows += [{"prompt": prompt, "label": "harmful", "split": "calibrate"} for prompt in HARMFUL[:7]]
    rows += [{"prompt": HARMFUL[8], "label": "borderline"}, {"prompt": HARMFUL[9], "label": "harmful", "split": "fit"}]
    prompts = tmp_path / "labelled.json"
    prompts.write_text(json.dumps(rows))
    result = run(file, "--prompts", prompts, "--json", tmp_path / "drift.json")
    assert "left out 1 of 21 prompts, which are of another split" in result.stderr
    assert "left out 1 of 20 prompts: borderline" in result.stderr
    assert "harmless prompts, layer 2" in result.stdout
    assert "harmful prompts, layer 2" in result.stdout
    found = json.loads((tmp_path / "drift.json").read_text())
    profile = SteeringProfile.load(file)
    for label, texts in (("harmless", HARMLESS), ("harmful", HARMFUL[:7])):
        scores = steerfast.score(model, tiny_tokenizer, profile, texts, progress=False)
        assert found[label]["requests"] == len(texts)
        assert found[label]["live"][0] == float(scores.fired.float().mean())
    assert found["harmful"]["verdict"] == "stale", "none of them fires"
    assert (found["verdict"], result.exit_code) == ("stale", 1)
    run(file, "--prompts", prompts, "--limit", 3, "--json", tmp_path / "drift.json")
    found = json.loads((tmp_path / "drift.json").read_text())
    assert [found[label]["requests"] for label in ("harmless", "harmful")] == [3, 3]
    assert "--limit: expected it with --prompts" in failed(2, file, "--scores", prompts, "--limit", 3)
    prompts.write_text(json.dumps(rows[-2:-1]))
    assert "expected harmless or harmful prompts, got borderline ones alone" in failed(2, file, "--prompts", prompts)


# -- --threshold of other commands -----------------------------------------------------------------------------------


def test_commands_take_a_named_threshold(file: Path, model: Any, tmp_path: Path) -> None:
    others = CommandLine()
    for command in ("score", "generate"):
        for point, fired in (("strict", True), ("permissive", False), (None, False)):
            chosen = () if point is None else ("--threshold", point)
            others.done(command, file, HARMLESS[0], *chosen, "--json", tmp_path / "out.json")
            (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
            assert result["fired"] == fired
        assert "expected one of balanced, permissive, strict, got 'lax'" in others.failed(
            1, command, file, HARMLESS[0], "--threshold", "lax"
        )
    assert "expected one of balanced, permissive, strict, got 'lax'" in others.failed(
        1, "eval", "model", "--profile", file, "--threshold", "lax"
    )


def test_inspect_shows_the_named_thresholds(file: Path, tmp_path: Path) -> None:
    shown = CommandLine().done("inspect", file, "--json", tmp_path / "profile.json").stdout
    assert "strict -2.0000, balanced 0.9700, permissive 2.0000 at layer 2; in use: balanced" in " ".join(shown.split())
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["threshold"] == "balanced"
    assert found["thresholds"]["strict"] == [-2.0] * 5

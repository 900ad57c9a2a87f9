"""Every command end to end on a tiny random Llama, and how each one fails."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from command_line import CommandLine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerfast import _native
from steerfast.cli import common
from steerfast.cli.generate import _render
from steerfast.cli.rendering import layer_ranges
from steerfast.fitting.calibrate import GateWarning
from steerfast.hf.loading import load_model
from steerfast.kernels import selftest
from steerfast.kernels.contract import Kinds
from steerfast.profile import Gate, ProfileStack, SteeringProfile
from steerfast.text import corpus, splits
from steerfast.text.examples import Example

torch.set_num_threads(1)

LAYERS, HIDDEN = 6, 32
# All but serve, which has no result to write as JSON; see test_serve.py.
COMMANDS = (
    "demo", "fit", "extract", "calibrate", "learn", "tune", "score", "inspect", "drift", "generate", "eval", "guard",
    "bench", "convert", "bake", "doctor",
)  # fmt: skip
HARMFUL = [
    f"how to {verb} a {thing}" for verb in ("poison", "bomb", "hack") for thing in ("town", "bank", "dog", "car")
]
HARMLESS = [
    f"how to {verb} a {thing}" for verb in ("bake", "paint", "buy") for thing in ("cake", "house", "pie", "hat")
]
RATE = ("--max-false-positive-rate", 0.1)  # the files hold too few prompts for a smaller one
CHAT = "{% for m in messages %}<user>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def save_tiny_model(folder: Path, seed: int, hidden: int = HIDDEN) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<user>", "<bot>"]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(special) + len(alphabet),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one shape, one of another, prompt files, and profiles made from them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model", 0)
    save_tiny_model(folder / "sibling", 1)
    save_tiny_model(folder / "wide", 2, hidden=64)
    (folder / "bad.txt").write_text("\n".join(HARMFUL[:6]))
    (folder / "bad.json").write_text(json.dumps([{"prompt": prompt} for prompt in HARMFUL[6:]]))
    (folder / "good.txt").write_text("\n".join(HARMLESS))
    labelled = [
        ("harmful", "forum", HARMFUL),
        ("harmless", "tickets", HARMLESS),
        ("borderline", "edge", [f"how to bomb a {thing}" for thing in ("pie", "cake", "hat")]),
    ]
    records = [
        {"prompt": prompt.upper(), "label": label, "source": source}
        for label, source, given in labelled
        for prompt in given
    ]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, records)))
    done("extract", *model(folder), *sets(folder), "--pooling", "last", "--output", folder / "extracted.safetensors")
    done(
        "calibrate", folder / "extracted.safetensors", *sets(folder), *RATE, "--prompts", folder / "labelled.jsonl",
        "--latest-sensor", 3, "--output", folder / "calibrated.safetensors",
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of a table wraps."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture(autouse=True)
def _repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A near-duplicate is an equal prompt: the prompts of these tests differ in a word."""
    monkeypatch.setattr(splits, "near_duplicates", lambda texts, others: np.isin(texts, others))


_COMMAND = CommandLine()
run, done, failed = _COMMAND.run, _COMMAND.done, _COMMAND.failed


def model(work: Path, name: str = "model") -> tuple[object, ...]:
    return "--model", work / name


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the corpus that ships, which these models would read for minutes."""
    found = [
        Example(f"{prompt} {split}", label, f"{label}_{i % 2}", split)
        for split in ("fit", "calibrate")
        for label, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS))
        for i, prompt in enumerate(prompts)
    ]
    for module in (corpus, splits):
        monkeypatch.setattr(module, "corpus", lambda split: [one for one in found if one.split in split])


def sets(work: Path) -> tuple[object, ...]:
    return "--harmful", work / "bad.txt", "--harmful", work / "bad.json", "--harmless", work / "good.txt"


# ---- the group -----------------------------------------------------------------------------------


def test_group_lists_every_command_and_version() -> None:
    assert done().stdout == done("--help").stdout
    assert all(f"\n  {command} " in done("-h").stdout for command in COMMANDS)
    assert done("--version").stdout == "steerfast, version 0.2.0.dev0\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command: str) -> None:
    text = done(command, "--help").stdout
    assert f"Example:\n    steerfast {command}" in text
    assert "--json FILE" in text


def test_python_dash_m_runs_and_imports_no_transformers() -> None:
    script = (
        "import runpy, sys; sys.argv = ['steerfast', '--help']\n"
        "try: runpy.run_module('steerfast', run_name='__main__')\n"
        "except SystemExit as leave: print('status', leave.code, 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_environment()
    )
    assert result.stdout.startswith("Usage: steerfast ")
    assert result.stdout.endswith("status 0 False\n")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_wrong_usage_is_one_line_and_status_2() -> None:
    assert "'nothing'" in failed(2, "nothing")
    assert "--model" in failed(2, "extract", "--output", "x.safetensors")
    assert "--nothing" in failed(2, "inspect", "x.safetensors", "--nothing")
    assert "steerfast inspect --help" in failed(2, "inspect")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes reading a profile raise."""

    def install(error: BaseException) -> None:
        def load(path: str) -> SteeringProfile:
            raise error

        monkeypatch.setattr(ProfileStack, "load", load)

    return install


def test_unexpected_error_is_one_line_with_a_hint(
    broken: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(ZeroDivisionError("two\nlines"))
    line = failed(1, "inspect", "x")
    assert "unexpected ZeroDivisionError: two lines" in line
    assert "STEERFAST_TRACEBACK=1" in line
    monkeypatch.setenv("STEERFAST_TRACEBACK", "1")
    result = run("inspect", "x")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "raise error" in result.stderr


def test_interrupt_is_one_line_and_status_130(broken: Callable[[BaseException], None]) -> None:
    broken(KeyboardInterrupt())
    result = run("inspect", "x")
    assert result.exit_code == 130
    assert result.stderr.strip() == "steerfast: error: interrupted"


def test_only_steerfast_warnings_are_shown(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    load = ProfileStack.load

    def warn(path: str) -> ProfileStack:
        warnings.warn("few prompts,\nof a source", GateWarning, stacklevel=1)
        warnings.warn("noise", UserWarning, stacklevel=1)
        return load(path)

    monkeypatch.setattr(ProfileStack, "load", warn)
    assert done("inspect", work / "calibrated.safetensors").stderr == "steerfast: warning: few prompts, of a source\n"


# ---- extract, calibrate, learn, tune --------------------------------------------------------------------


def test_extract_writes_a_profile_and_says_what_is_in_it(work: Path, tmp_path: Path) -> None:
    result = done(
        "extract", *model(work), *sets(work), "--aligned-model", work / "sibling", "--gate", "mean",
        "--score", "dot", "--vectors", "ssv,srv", "--unit-norm", "--batch-size", 4, "--padding-side", "left",
        "--dtype", "float32", "--device", "cpu", "-o", tmp_path / "p.safetensors",
        "--json", tmp_path / "p.json",
    )  # fmt: skip
    profile = SteeringProfile.load(tmp_path / "p.safetensors")
    assert (profile.vector_kind, list(profile.candidates), profile.gate.score) == ("ssv", ["srv"], "dot")
    assert torch.allclose(profile.vector.norm(dim=1), torch.ones(LAYERS))
    assert profile.fitted["harmful"]["name"] == "bad.txt + bad.json"
    assert profile.fitted["harmful"]["count"] == len(HARMFUL)
    assert "12 of bad.txt + bad.json" in result.stdout
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["vector_kind"] == "ssv"
    assert len(data["layers"]) == LAYERS
    assert result.stderr == ""


def test_extract_makes_every_edit_and_gate(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    made = ("extract", *model(work), *sets(work), "--vectors", "srv", "-o", path)
    done(*made, "--edit", "clamp", "--low", 0, "--high", 2, "--gate-kind", "token", "--sharpness", 5)
    profile = SteeringProfile.load(path)
    assert (profile.edit, profile.low, profile.high) == ("clamp", 0.0, 2.0)
    assert profile.gate == Gate(kind="token", sharpness=5.0)
    done(*made, "--edit", "rotate", "--angle", 30)
    assert (SteeringProfile.load(path).edit, SteeringProfile.load(path).angle) == ("rotate", 30.0)
    assert "low, high: only a clamp has limits" in failed(1, *made, "--low", 0)
    assert "a clamp expects at least one limit" in failed(1, *made, "--edit", "clamp")
    assert "--edit" in failed(2, *made, "--edit", "multiply")
    assert "--gate-kind" in failed(2, *made, "--gate-kind", "never")
    assert "expected one with edit 'add' or 'keep_norm'" in failed(1, "tune", path, *sets(work), "-o", path)
    assert "expected one that adds vectors" in failed(1, "learn", path, "--harmful", work / "bad.txt", "-o", path)


def test_a_gate_that_reads_a_mean_is_made_shown_and_used(work: Path, tmp_path: Path) -> None:
    made, calibrated = tmp_path / "made.safetensors", tmp_path / "calibrated.safetensors"
    done("extract", *model(work), *sets(work), "--vectors", "srv", "--pooling", "mean", "--whole-prompt", "-o", made)
    assert SteeringProfile.load(made).gate == Gate(pooling="mean", window=32)
    assert "prompt, mean cosine of 32 tokens, hard" in done("inspect", made).stdout
    result = done(
        "extract", *model(work), *sets(work), "--vectors", "srv", "--pooling", "mean", "--window", 12, "-o", made,
        "--json", tmp_path / "p.json",
    )  # fmt: skip
    assert "prompt, mean cosine of 12 tokens of the last user turn, hard" in result.stdout
    gate = SteeringProfile.load(made).gate
    assert gate == Gate(pooling="mean", window=12, turn=(2,), tail=2)
    whole = tmp_path / "whole.safetensors"
    done("extract", *model(work), *sets(work), "--vectors", "srv", "--window", "all", "-o", whole)
    assert SteeringProfile.load(whole).gate.window is None
    assert Gate(**json.loads((tmp_path / "p.json").read_text())["gate"]) == gate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateWarning)
        done("calibrate", made, *sets(work), "--sensor", 3, "--max-false-positive-rate", 0.3, "-o", calibrated)
    profile = SteeringProfile.load(calibrated).with_band([5], 8.0)
    assert profile.gate == gate
    profile.save(calibrated)
    shown = done("inspect", calibrated, "--plot", tmp_path / "p.svg").stdout
    assert "prompt, mean cosine of 12 tokens of the last user turn, hard" in " ".join(shown.split())
    prompts = [*HARMFUL[:3], *HARMLESS[:3]]
    done("score", calibrated, *prompts, "--json", tmp_path / "s.json")
    fired = [one["fired"] for one in json.loads((tmp_path / "s.json").read_text())["results"]]
    assert len(set(fired)) == 2
    done("generate", calibrated, *prompts, "--max-new-tokens", 3, "--json", tmp_path / "g.json")
    assert [one["fired"] for one in json.loads((tmp_path / "g.json").read_text())["results"]] == fired


def test_what_a_gate_cannot_read(work: Path, tmp_path: Path) -> None:
    made = ("extract", *model(work), *sets(work), "--vectors", "srv", "-o", tmp_path / "p.safetensors")
    assert "--pooling" in failed(2, *made, "--pooling", "max")
    assert "--window" in failed(2, *made, "--pooling", "mean", "--window", 0)
    last = (*made, "--pooling", "last")
    assert "gate.window: expected None where no mean is read, got 5" in failed(1, *last, "--window", 5)
    assert not (tmp_path / "p.safetensors").exists()


def test_extract_refusal_text_changes_the_forced_vector(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    forced = ("--vectors", "forced", "--pooling", "last", "--refusal", "No way, never.")
    done("extract", *model(work), *sets(work), *forced, "-o", path)
    one, other = SteeringProfile.load(path), SteeringProfile.load(work / "extracted.safetensors")
    assert one.vector_kind == other.vector_kind == "forced"
    assert not torch.equal(one.vector, other.vector)
    assert torch.equal(one.direction, other.direction)


def test_sources_are_left_out_calibrated_and_shown(work: Path, tmp_path: Path) -> None:
    """Labelled prompts beside those of --harmful and --harmless: two sources on each side."""
    fitted, calibrated = tmp_path / "fitted.safetensors", tmp_path / "calibrated.safetensors"
    both = (*sets(work), "--prompts", work / "labelled.jsonl")
    done("extract", *model(work), *both, "--vectors", "srv", "-o", fitted)
    profile = SteeringProfile.load(fitted)
    assert profile.gate.pooling == "both"
    assert profile.fitted["harmful"]["count"] == len(HARMFUL) + len(HARMFUL) * 2 // 3
    assert profile.fitted["harmful"]["name"] == "bad.txt + bad.json + labelled.jsonl, fit"
    assert {source: list(labels) for source, labels in profile.fitted["sources"].items()} == {
        "bad": ["harmful"], "forum": ["harmful"], "good": ["harmless"], "tickets": ["harmless"], "edge": ["borderline"],
    }  # fmt: skip
    assert list(profile.fitted["left_out"]["source"]) == ["bad", "forum"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateWarning)
        result = done("calibrate", fitted, *both, *RATE, "--max-borderline-rate", 0.5, "-o", calibrated)
    calibration = SteeringProfile.load(calibrated).calibration
    assert calibration["max_borderline_rate"] == 0.5
    shown = done("inspect", calibrated).stdout
    for text in (result.stdout, shown):
        assert all(source in text for source in ("bad", "forum", "good", "tickets", "edge"))
    assert "layers as a sensor, best first" in result.stdout
    assert all(f"{quality:.4f}" in result.stdout for _, quality in calibration["sensors"])


def test_labelled_prompts_of_another_split_are_left_out(work: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": prompt, "label": label, "split": ("fit", "validate")[number % 2]}
        for label, prompts in (("unsafe", HARMFUL), ("safe", HARMLESS))
        for number, prompt in enumerate(prompts)
    ]
    repeated = {**next(one for one in records if one["split"] == "validate"), "split": "fit"}
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*records, repeated])))
    path = tmp_path / "p.safetensors"
    given = ("--harmful", work / "bad.txt", "--prompts", tmp_path / "all.jsonl")
    result = done("extract", *model(work), *given, "--vectors", "srv", "-o", path)
    says = f"{len(HARMFUL)} of {len(records) + 1} prompts are of the split fit, without 1 near-duplicates"
    assert f"--prompts: {says} of prompts of another split" in result.stderr
    fitted = SteeringProfile.load(path).fitted
    assert (fitted["harmful"]["count"], fitted["harmless"]["count"]) == (6 + len(HARMFUL) // 2, len(HARMLESS) // 2)


def test_the_corpus_is_the_default_and_prompts_join_it(work: Path, tmp_path: Path, small_corpus: None) -> None:
    path = tmp_path / "p.safetensors"
    done("extract", *model(work), "--prompts", work / "labelled.jsonl", "--vectors", "srv", "-o", path)
    fitted = SteeringProfile.load(path).fitted
    assert sorted(fitted["sources"]) == [
        "edge",
        "forum",
        "harmful_0",
        "harmful_1",
        "harmless_0",
        "harmless_1",
        "tickets",
    ]
    assert fitted["harmful"]["name"] == "steerfast:corpus + labelled.jsonl, fit"
    done("calibrate", path, *RATE, "--sensor", 2, "-o", path)
    sets = SteeringProfile.load(path).calibration["sets"]
    assert {role: (one["name"], one["count"]) for role, one in sets.items()} == {
        "harmful": ("steerfast:corpus, calibrate", len(HARMFUL)),
        "harmless": ("steerfast:corpus, calibrate", len(HARMLESS)),
    }


def test_calibrating_on_traffic_keeps_the_sensor(work: Path, tmp_path: Path, small_corpus: None) -> None:
    path, traffic = tmp_path / "p.safetensors", tmp_path / "traffic.jsonl"
    traffic.write_text("\n".join(json.dumps({"prompt": f"{prompt} now"}) for prompt in HARMLESS))
    replace(SteeringProfile.load(work / "extracted.safetensors"), sensor=1).save(path)
    done("calibrate", path, "--on", traffic, *RATE, "-o", path)
    profile = SteeringProfile.load(path)
    assert profile.sensor == 1
    described = profile.calibration["sets"]
    assert described["harmful"]["name"] == "steerfast:corpus, calibrate"
    assert (described["harmless"]["name"], described["harmless"]["count"]) == (str(traffic), len(HARMLESS))
    assert list(profile.calibration["sources"]) == ["harmful_0", "harmful_1", "traffic"]
    rows = profile.calibration["by_source"]["1"]["rows"]
    assert next(row["fired"] for row in rows if row["source"] == "traffic") <= 0.1 * len(HARMLESS)


def test_traffic_of_another_split_sets_no_threshold(work: Path, tmp_path: Path, small_corpus: None) -> None:
    path, traffic = tmp_path / "p.safetensors", tmp_path / "traffic.jsonl"
    rows = [{"prompt": prompt, "split": split} for split, prompt in zip(("", "fit"), HARMLESS, strict=False)]
    rows += [{"prompt": f"{prompt} now"} for prompt in HARMLESS]
    traffic.write_text("\n".join(map(json.dumps, rows)))
    given = ("calibrate", work / "extracted.safetensors", "--on", traffic, *RATE, "-o", path)
    result = done(*given)
    assert f"--on: left out 1 of {len(rows)} prompts, which are of another split" in result.stderr
    assert SteeringProfile.load(path).calibration["sets"]["harmless"]["count"] == len(rows) - 1
    traffic.write_text(json.dumps(rows[1]))
    assert "--on: expected prompts of the split calibrate, or without one, got none of 1" in failed(1, *given)


def test_too_few_harmless_prompts_for_the_rate(work: Path, tmp_path: Path) -> None:
    line = failed(1, "calibrate", work / "extracted.safetensors", *sets(work), "-o", tmp_path / "p.safetensors")
    assert "harmless: expected at least 100 different prompts for a rate of 1.00%, got 12" in line


def test_calibrate_reports_the_sensor(work: Path, tmp_path: Path) -> None:
    result = done(
        "calibrate", work / "extracted.safetensors", *sets(work), "--sensor", 2, "--max-false-positive-rate", 0.25,
        "--output", tmp_path / "p.safetensors", "--json", "-",
    )  # fmt: skip
    data = json.loads(result.stdout)
    assert data["sensor"] == 2
    assert data["calibration"]["max_false_positive_rate"] == 0.25
    assert data["calibration"]["sets"]["harmful"]["name"] == "bad.txt + bad.json"
    layer = data["layers"][2]
    assert layer["sensor"] is True
    value, low, high = layer["calibration"]["auc"]
    assert 0 <= low <= value <= high <= 1
    assert f"{value:.3f} ({low:.3f}-{high:.3f})" in result.stderr
    assert "embedding_sketch" not in data["model"]
    assert "histograms" not in data["calibration"]


def test_calibrate_makes_a_band_that_everybody_tells_of(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    result = done(
        "calibrate", work / "extracted.safetensors", *sets(work), *RATE, "--sensor", 2, "--abstain-rate", 0.6,
        "--output", path, "--json", "-",
    )  # fmt: skip
    profile, data = SteeringProfile.load(path), json.loads(result.stdout)
    assert profile.abstain is not None
    low, high = float(profile.abstain[2]), float(profile.threshold[2])
    assert low < high
    assert data["calibration"]["abstain_rate"] == 0.6
    assert [layer["abstain"] for layer in data["layers"]] == profile.abstain.tolist()
    assert (
        "abstain" not in json.loads(done("inspect", work / "calibrated.safetensors", "--json", "-").stdout)["layers"][0]
    )
    shown = done("inspect", path, "--plot", tmp_path / "p.png").stdout
    for text in (result.stderr, shown):
        assert "at most 10.00% false positives, 60.00% with the undecided" in text
        assert f"{low:.4f} │ {high:.4f} │ calibration" in text
        for label in ("harmful", "harmless"):
            value, least, most = data["layers"][2]["calibration"][f"{label}_undecided"]
            assert f"{value:.1%} ({least:.1%}-{most:.1%})" in text
    told = done("score", path, *HARMFUL, *HARMLESS, "--json", tmp_path / "s.json").stdout
    scored = json.loads((tmp_path / "s.json").read_text())["results"]
    for one in scored:
        assert one["undecided"] == (low < one["score"] <= high)
    count = sum(one["undecided"] for one in scored)
    assert 0 < count < len(scored)
    assert f"fired, {count} undecided" in told
    strong = tmp_path / "strong.safetensors"
    profile.with_band([5], 8.0).save(strong)
    prompts = [next(one["prompt"] for one in scored if one["undecided"] == wanted) for wanted in (True, False)]
    said = done("generate", strong, *prompts, "--compare", "--max-new-tokens", 4, "--json", tmp_path / "g.json").stdout
    first, second = json.loads((tmp_path / "g.json").read_text())["results"]
    assert (first["fired"], first["undecided"], second["undecided"]) == (False, True, False)
    assert first["steered"] == first["unsteered"]
    assert said.count("gate undecided") == 1


def test_inspect_shows_a_band_that_was_not_calibrated(work: Path, tmp_path: Path) -> None:
    profile = SteeringProfile.load(work / "extracted.safetensors")
    profile = replace(profile, sensor=1, abstain=torch.full_like(profile.threshold, -math.inf)).with_band([3], 1.0)
    profile.save(tmp_path / "p.safetensors")
    result = done("inspect", tmp_path / "p.safetensors", "--plot", tmp_path / "p.svg", "--json", tmp_path / "p.json")
    assert f"-inf │ {float(profile.threshold[1]):.4f}" in result.stdout
    assert json.loads((tmp_path / "p.json").read_text())["layers"][1]["abstain"] is None


def test_calibrate_midpoint_in_place(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes((work / "extracted.safetensors").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateWarning)
        done("calibrate", path, *sets(work), "--midpoint", "--sensor", "own", "--output", path)
    profile = SteeringProfile.load(path)
    assert (profile.sensor, profile.points) == ("own", {})
    assert profile.calibration["max_false_positive_rate"] is None


def test_learn_adds_a_vector_that_tune_can_try(work: Path, tmp_path: Path) -> None:
    learned, harmful = tmp_path / "learned.safetensors", sets(work)[:4]
    result = done(
        "learn", work / "calibrated.safetensors", *harmful, "--refusal", "no", "--layer", 4, "--positions", "all",
        "--max-norm", 0.7, "--steps", 3, "--answer-tokens", 5, "--seed", 1, "--batch-size", 4, "-o", learned,
        "--json", tmp_path / "p.json", "--resume", tmp_path / "steps.safetensors",
    )  # fmt: skip
    assert (tmp_path / "steps.safetensors").is_file()
    before = SteeringProfile.load(work / "calibrated.safetensors")
    profile = SteeringProfile.load(learned)
    assert (profile.vector_kind, profile.steered_layers, profile.positions) == ("learned", [4], "all")
    assert {*profile.candidates} == {before.vector_kind, *before.candidates}
    assert 0 < profile.vector[4].norm() <= 0.7 * profile.norm[4] * (1 + 1e-6)
    record = profile.fitted["learned"]
    assert (record["answers"], record["count"], record["steps"]) == (len(HARMFUL), len(HARMFUL), 3)
    assert "layer 4, a given refusal; harmful 12 of bad.txt + bad.json" in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "p.json").read_text())["fitted"]["learned"] == record
    assert "learned" in done("inspect", learned).stdout
    tuned = tmp_path / "tuned.safetensors"
    done(
        "tune", learned, *sets(work), "--vectors", "learned", "--bands", "4", "--strengths", "1", "--positions", "all",
        "--max-new-tokens", 4, "--min-fluent", 0, "--min-unchanged", 0, "-o", tuned,
    )  # fmt: skip
    assert torch.equal(SteeringProfile.load(tuned).vector, profile.vector)


def test_learn_from_a_sibling(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    command = ("learn", work / "calibrated.safetensors", *sets(work)[:4], "--steps", 2, "-o", out)
    assert "expected it without --aligned-model" in failed(
        2, *command, "--aligned-model", work / "sibling", "--refusal", "no"
    )
    line = failed(1, *command, "--aligned-model", work / "sibling")
    assert "harmful: expected prompts that the aligned model refuses, it refuses none of them" in line
    assert not out.exists()
    for option, value in (("--layer", "-1"), ("--max-norm", "0"), ("--steps", "0"), ("--positions", "some")):
        line = failed(2, *command, option, value)
        assert option in line
        assert value in line
    assert "layer: expected 0..5, got 6" in failed(1, *command, "--refusal", "no", "--layer", 6)


def test_tune_searches_what_it_was_told_and_resumes(work: Path, tmp_path: Path) -> None:
    command = (
        "tune", work / "calibrated.safetensors", *sets(work), "--vectors", "forced,srv", "--bands", "2-3,4",
        "--strengths", "0.5,1", "--positions", "response", "--answer-tokens", "2,3", "--endings", "0,2",
        "--max-new-tokens", 4, "--min-fluent", 0, "--min-unchanged", 0,
        "--resume", tmp_path / "trials.jsonl", "--output", tmp_path / "p.safetensors", "--json", tmp_path / "p.json",
    )  # fmt: skip
    done(*command)
    trials = (tmp_path / "trials.jsonl").read_text()
    tuned = json.loads((tmp_path / "p.json").read_text())["tuned"]
    assert tuned["tried"] == 2 * 2 * 2 * 2 * 2
    assert tuned["candidate"]["positions"] == "response"
    assert tuned["candidate"]["answer_tokens"] in (2, 3)
    profile = SteeringProfile.load(tmp_path / "p.safetensors")
    last = [] if tuned["candidate"]["ending"] == 0 else [profile.model.num_layers - 1]
    assert profile.steered_layers in ([2, 3, *last], [4, *last])
    assert profile.candidates == {}
    done(*command)
    assert (tmp_path / "trials.jsonl").read_text() == trials


# ---- score, generate -----------------------------------------------------------------------------


def test_score_reads_arguments_files_and_stdin_alike(work: Path, tmp_path: Path) -> None:
    calibrated = work / "calibrated.safetensors"

    def results(*arguments: object, stdin: str | None = None) -> list[dict[str, Any]]:
        out = done("score", calibrated, *arguments, "--json", tmp_path / "s.json", stdin=stdin).stdout
        data = json.loads((tmp_path / "s.json").read_text())
        assert f"{sum(r['fired'] for r in data['results'])} of {len(data['results'])} fired" in out
        return data["results"]

    (tmp_path / "some.txt").write_text("\n".join(HARMFUL[:2]))
    by_argument = results(*HARMFUL[:2])
    assert results("--file", tmp_path / "some.txt") == by_argument
    assert results(stdin="\n".join([HARMFUL[0], "", HARMFUL[1]]) + "\n") == by_argument
    assert [r["prompt"] for r in results(HARMLESS[0], "--file", tmp_path / "some.txt")] == [
        HARMLESS[0],
        *HARMFUL[:2],
    ]
    for result in by_argument:
        assert result["undecided"] is False
        assert result["fired"] == (result["score"] > result["threshold"])
        assert result["layer"] == SteeringProfile.load(calibrated).sensor


def test_score_of_own_gates_names_the_layer_that_speaks(work: Path, tmp_path: Path) -> None:
    profile = replace(SteeringProfile.load(work / "extracted.safetensors").with_band([3, 5], 0.1), sensor="own")
    profile.save(tmp_path / "own.safetensors")
    result = done("score", tmp_path / "own.safetensors", HARMFUL[0], "--json", "-")
    found = json.loads(result.stdout)["results"][0]
    assert found["layer"] in (3, 5)
    assert found["threshold"] == pytest.approx(float(profile.threshold[found["layer"]]))


def test_generate_says_which_gates_fired_and_compares(work: Path, tmp_path: Path) -> None:
    profile = SteeringProfile.load(work / "calibrated.safetensors").with_band([5], 8.0)
    between = torch.full_like(profile.threshold, -0.2)
    replace(profile, threshold=between, points={}).save(tmp_path / "strong.safetensors")
    prompts = [HARMLESS[0], HARMFUL[0], HARMLESS[1] + " " * 3 + "please", HARMFUL[7], HARMLESS[5]]
    done("score", tmp_path / "strong.safetensors", *prompts, "--json", tmp_path / "s.json")
    fired = [r["fired"] for r in json.loads((tmp_path / "s.json").read_text())["results"]]
    assert len(set(fired)) == 2
    for extra in ((), ("--sample", "--temperature", 1.3, "--seed", 7)):
        result = done(
            "generate", tmp_path / "strong.safetensors", *prompts, "--compare", "--max-new-tokens", 6,
            "--batch-size", 2, "--json", tmp_path / "g.json", *extra,
        )  # fmt: skip
        data = json.loads((tmp_path / "g.json").read_text())
        assert [r["prompt"] for r in data["results"]] == prompts
        assert [r["fired"] for r in data["results"]] == fired
        for answer in data["results"]:
            assert (answer["steered"] != answer["unsteered"]) == answer["fired"]
        assert result.stdout.count("gate fired") == sum(fired)
        assert result.stdout.count("gate shut") == len(fired) - sum(fired)
        assert "unsteered" in result.stdout
    assert (data["temperature"], data["seed"]) == (1.3, 7)


def test_generate_strength_0_is_the_unsteered_model(work: Path) -> None:
    command = ("generate", work / "calibrated.safetensors", "--strength", 0, "--max-new-tokens", 5)
    result = done(*command, "--compare", "--json", "-", stdin="\n".join(HARMFUL))
    assert all(r["steered"] == r["unsteered"] for r in json.loads(result.stdout)["results"])
    plain = json.loads(done(*command, HARMFUL[0], "--json", "-").stdout)["results"]
    told = {key: plain[0][key] for key in ("fired", "steered")}
    assert plain == [{"prompt": HARMFUL[0], "undecided": False, **told}]


def test_generate_takes_a_stack(work: Path, tmp_path: Path) -> None:
    profile = SteeringProfile.load(work / "calibrated.safetensors").with_band([5], 2.0)
    (profile + profile).save(tmp_path / "twice.safetensors")
    answers = [
        json.loads(done("generate", file, *HARMFUL[:3], "--max-new-tokens", 5, "--json", "-", *more).stdout)["results"]
        for file, more in (
            (tmp_path / "twice.safetensors", ()),
            (work / "calibrated.safetensors", ("--strength", 0)),
        )
    ]
    assert any(one["fired"] for one in answers[0])
    assert [one["fired"] for one in answers[0]] == [one["fired"] for one in answers[1]]
    ungated = replace(profile, gate=Gate("always"), sensor="own", calibration={}, points={}, abstain=None)
    (ungated + ungated).save(tmp_path / "always.safetensors")
    shown = done("generate", tmp_path / "always.safetensors", HARMLESS[0], "--max-new-tokens", 2).stdout
    assert f"[{profile.vector_kind}, {profile.vector_kind}, always]" in shown


def test_inspect_leaves_out_the_gates_of_a_profile_without_one(work: Path, tmp_path: Path) -> None:
    profile = SteeringProfile.load(work / "extracted.safetensors")
    profile = replace(profile, gate=Gate("always"), sensor="own", calibration={}, points={})
    profile.save(tmp_path / "always.safetensors")
    shown = done("inspect", tmp_path / "always.safetensors").stdout
    assert "always open" in shown
    assert "thresh-" not in shown
    assert "sensor" not in shown


def test_generate_prints_no_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    _render([{"prompt": "a [b]", "fired": True, "steered": "x\x1b[2Jy\nz"}], None)
    assert capsys.readouterr().out == "> a [b]  [gate fired]\nx [2Jy\nz\n\n"
    _render([{"prompt": "a", "fired": True, "steered": "x"}], None, "formal")
    assert capsys.readouterr().out == "> a  [formal, always]\nx\n\n"


# ---- inspect -------------------------------------------------------------------------------------


def test_inspect_tells_all_layers_and_draws(work: Path, tmp_path: Path) -> None:
    result = done(
        "inspect",
        work / "calibrated.safetensors",
        "--plot",
        tmp_path / "p.png",
        "--json",
        tmp_path / "p.json",
    )
    data = json.loads((tmp_path / "p.json").read_text())
    profile = SteeringProfile.load(work / "calibrated.safetensors")
    assert [layer["layer"] for layer in data["layers"]] == list(range(LAYERS))
    assert [layer["layer"] for layer in data["layers"] if layer["sensor"]] == [profile.sensor]
    assert data["layers"][0]["vector_norm"] == pytest.approx(float(profile.vector[0].norm()))
    assert {"auc", "hit_rate", "false_positive_rate"} <= set(data["layers"][0]["calibration"])
    assert result.stdout.count("sensor") == 2  # the header's line and the layer's mark
    assert f"{data['layers'][4]['threshold']:.4f}" in result.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_each_profile_of_a_stack(work: Path, tmp_path: Path) -> None:
    profile = SteeringProfile.load(work / "calibrated.safetensors")
    (profile + replace(profile, edit="ablate")).save(tmp_path / "s.safetensors")
    shown = done("inspect", tmp_path / "s.safetensors", "--json", tmp_path / "s.json").stdout
    assert [one["edit"] for one in json.loads((tmp_path / "s.json").read_text())["stack"]] == ["add", "ablate"]
    assert (shown.count("add, layers"), shown.count("ablate, layers")) == (1, 1)
    assert "got a stack of 2" in failed(2, "inspect", tmp_path / "s.safetensors", "--plot", tmp_path / "p.svg")
    assert "got a stack of 2" in failed(1, "score", tmp_path / "s.safetensors", "a cake")


@pytest.mark.parametrize(
    ("fields", "says", "data"),
    [
        ({"edit": "clamp", "low": -0.5, "high": 2.0}, "clamp to -0.5..2", (-0.5, 2.0, None)),
        ({"edit": "clamp", "high": 2.0}, "clamp to ..2", (None, 2.0, None)),
        ({"edit": "clamp", "low": 1.0, "high": 1.0}, "clamp to 1", (1.0, 1.0, None)),
        ({"edit": "rotate", "angle": 150.0}, "rotate to 150 degrees", (None, None, 150.0)),
        ({"edit": "ablate"}, "ablate", (None, None, None)),
    ],
)
def test_inspect_tells_what_an_edit_does(
    work: Path, tmp_path: Path, fields: dict[str, Any], says: str, data: tuple[float | None, ...]
) -> None:
    profile = replace(SteeringProfile.load(work / "extracted.safetensors"), **fields)
    profile.save(tmp_path / "p.safetensors")
    result = done(
        "inspect", tmp_path / "p.safetensors", "--plot", tmp_path / "p.svg", "--json", tmp_path / "p.json"
    )  # fmt: skip
    assert f"{says}, layers " in result.stdout
    read = json.loads((tmp_path / "p.json").read_text())
    assert (read["edit"], read["low"], read["high"], read["angle"]) == (fields["edit"], *data)
    assert (tmp_path / "p.svg").exists()


@pytest.mark.parametrize(
    "calibration",
    [
        {"layers": 3},
        {"warnings": [3]},
        {"sets": ["a"]},
        {"by_source": {"0": {}}},
        {"by_source": {"0": {"rows": [{"source": 3}]}}},
        {"histograms": 3, "layers": {"calibration": [{}] * LAYERS}},
    ],
)
def test_inspect_of_a_malformed_calibration_is_one_error(
    work: Path, tmp_path: Path, calibration: dict[str, Any]
) -> None:
    path = tmp_path / "p.safetensors"
    replace(SteeringProfile.load(work / "calibrated.safetensors"), calibration=calibration).save(path)
    line = failed(1, "inspect", path, "--plot", tmp_path / "p.svg", "--json", tmp_path / "p.json")
    assert "its figures (fitted, calibration or tuned) are malformed" in line
    assert not (tmp_path / "p.json").exists()


def test_inspect_of_an_old_profile_with_held_out_figures(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "data/smollm2-mean-gate.safetensors"
    result = done("inspect", path, "--plot", tmp_path / "p.png", "--json", tmp_path / "p.json")
    known = SteeringProfile.load(path).calibration["layers"]["calibration"]
    shown = [layer["calibration"] for layer in json.loads((tmp_path / "p.json").read_text())["layers"]]
    assert shown == known
    assert f"{known[15]['auc'][0]:.3f}" in result.stdout


def test_a_model_that_is_accepted(work: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "p.safetensors", tmp_path / "out.safetensors"
    profile = SteeringProfile.load(work / "calibrated.safetensors")
    replace(profile, model=replace(profile.model, architecture="another")).save(path)
    assert "architecture another" in failed(1, "score", path, *model(work), "bake a cake")
    plain = json.loads(
        done("score", work / "calibrated.safetensors", *model(work), "bake a cake", "--json", "-").stdout
    )
    data = json.loads(done("score", path, *model(work), "bake a cake", "--accept-model", "--json", "-").stdout)
    assert data["results"] == plain["results"]
    assert "accepted" not in plain
    assert "architecture another" in data["accepted"][0]["mismatch"]
    done("calibrate", path, *model(work), *sets(work), "--midpoint", "--accept-model", "-o", out)
    assert "accepted" in done("inspect", out).stdout
    assert done("score", out, *model(work), "bake a cake").exit_code == 0


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_inspect_draws_a_profile_that_is_not_calibrated(work: Path, tmp_path: Path, ending: str) -> None:
    result = done("inspect", work / "extracted.safetensors", "--plot", tmp_path / f"p.{ending}", "--json", "-")
    data = json.loads(result.stdout)
    assert data["calibration"] == {}
    assert "calibration" not in data["layers"][0]
    assert (tmp_path / f"p.{ending}").read_bytes()[:4] in (b"<?xm", b"%PDF")


def test_inspect_says_how_to_get_matplotlib(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = failed(1, "inspect", work / "calibrated.safetensors", "--plot", tmp_path / "p.png")
    assert "pip install 'steerfast[plot]'" in line
    assert not (tmp_path / "p.png").exists()


def test_inspect_refuses_other_picture_formats(work: Path, tmp_path: Path) -> None:
    assert "--plot: expected a file that ends in .png" in failed(
        1, "inspect", work / "calibrated.safetensors", "--plot", tmp_path / "p.txt"
    )


def test_layer_ranges() -> None:
    assert layer_ranges([]) == "none"
    assert layer_ranges([3]) == "3"
    assert layer_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# ---- demo, doctor --------------------------------------------------------------------------------


def test_demo_measures_and_renders(work: Path, tmp_path: Path) -> None:
    result = done(
        "demo", *model(work), "--profile", work / "calibrated.safetensors", "--prompts", 2,
        "--max-new-tokens", 4, "--json", tmp_path / "d.json",
    )  # fmt: skip
    data = json.loads((tmp_path / "d.json").read_text())
    assert set(data["harmful"]) >= {
        "n", "refusal_unsteered", "refusal_steered", "refusal_steered_strict", "fluent_steered",
    }  # fmt: skip
    assert set(data["harmless"]) >= {"n", "unchanged", "refusal_steered"}
    assert set(data["gate"]) >= {"auc", "false_positive_rate"}
    assert data["latency"]["ratio"] > 0
    assert data["harmful"]["n"] == data["harmless"]["n"] == 2
    assert "2 harmful prompts" in result.stdout


def test_doctor_passes_and_names_what_is_live(tmp_path: Path) -> None:
    result = done("doctor", "--json", tmp_path / "d.json")
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["passed"] is True
    assert data["versions"]["torch"] == torch.__version__
    assert data["cpu_isa"] == _native.isa()
    assert data["implementations"]["score_"]["cpp"] == _native.available
    tested = {check["implementation"] for check in data["self_test"]}
    assert tested | set(data["absent"]) == {"torch", "cpp", "triton"}
    assert ("cpp" in tested) == _native.available
    for check in data["self_test"]:
        assert check["max_error"] <= check["tolerance"]
    assert "failed" not in result.stdout


def test_doctor_fails_where_an_op_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.implementations(None)[0]

    def wrong_score(*inputs: Any) -> None:
        right.ops["score_"](*inputs)
        inputs[-1].row_scores.mul_(1.001)

    def no_steer(*inputs: Any) -> None:
        raise RuntimeError("no kernel")

    def wrong_norm(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        normed, stream = right.ops["add_steer_rms_norm"](*inputs)
        return normed, stream * 1.001 if inputs[3].kinds == Kinds.ANY else stream

    wrong = {"score_": wrong_score, "steer_": no_steer, "add_steer_rms_norm": wrong_norm}
    broken = replace(right, name="broken", ops={**right.ops, **wrong})
    monkeypatch.setattr(selftest, "implementations", lambda _: [right, broken])
    result = run("doctor", "--json", "-")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["passed"] is False
    by_name = {(c["implementation"], c["op"], c["dtype"]): c for c in data["self_test"]}
    assert by_name["torch", "score_", "bfloat16"]["passed"]
    assert by_name["broken", "add_steer_rms_norm.deciding", "float32"]["passed"]
    for op in ("score_", "add_steer_rms_norm"):
        check = by_name["broken", op, "float32"]
        assert check["max_error"] > check["tolerance"]
    assert by_name["broken", "steer_", "float32"]["problem"] == "RuntimeError: no kernel"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_doctor_tests_triton_on_cuda() -> None:
    data = json.loads(done("doctor", "--json", "-").stdout)
    assert {c["dtype"] for c in data["self_test"] if c["implementation"] == "triton"} == {
        "float32",
        "bfloat16",
        "float16",
    }
    assert data["gpus"][0]["memory_gib"] > 0


# ---- what goes wrong -----------------------------------------------------------------------------


def test_profile_that_is_missing_or_damaged(work: Path, tmp_path: Path) -> None:
    assert "profile: expected a file at" in failed(1, "score", tmp_path / "no.safetensors", "hello")
    data = bytearray((work / "calibrated.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    assert "does not match its checksum" in failed(1, "inspect", tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(data[:100])
    assert "not a readable safetensors file" in failed(1, "generate", tmp_path / "bad.safetensors", "hello")


def test_profile_of_another_model(work: Path, tmp_path: Path) -> None:
    path = work / "calibrated.safetensors"
    assert "hidden size 32" in failed(1, "score", path, "hello", *model(work, "wide"))
    assert "other weights" in failed(1, "generate", path, "hello", *model(work, "sibling"))
    out = tmp_path / "p.safetensors"
    assert "hidden size 64" in failed(1, "calibrate", path, *sets(work), *model(work, "wide"), "-o", out)
    assert not list(tmp_path.iterdir())


def test_a_band_that_cannot_be(work: Path, tmp_path: Path) -> None:
    command = ("calibrate", work / "extracted.safetensors", *sets(work), "-o", tmp_path / "p.safetensors")
    rates = ("--max-false-positive-rate", 0.2, "--abstain-rate", 0.1)
    message = "abstain_rate: expected at least max_false_positive_rate, 0.2, got 0.1"
    assert message in failed(1, *command, *rates)
    assert "--abstain-rate" in failed(2, *command, "--abstain-rate", 1)
    assert not list(tmp_path.iterdir())


def test_model_that_is_not_there(work: Path, tmp_path: Path) -> None:
    line = failed(1, "extract", "--model", tmp_path, *sets(work), "-o", tmp_path / "p.safetensors")
    assert f"model: cannot load {str(tmp_path)!r}" in line


def test_outputs_are_checked_before_any_work(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_load(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(common, "load_model", no_load)
    nowhere = tmp_path / "no" / "p.safetensors"
    profile = work / "calibrated.safetensors"
    assert "--output: expected a file in an existing folder" in failed(
        1, "extract", *model(work), *sets(work), "-o", nowhere
    )
    assert "--json: expected a file in an existing folder" in failed(1, "score", profile, "x", "--json", nowhere)
    assert "--resume: expected a regular file" in failed(1, "tune", profile, "--resume", tmp_path, "-o", tmp_path / "p")
    assert "--json: expected a regular file" in failed(1, "doctor", "--json", os.devnull)
    assert "an input too" in failed(2, "inspect", profile, "--plot", profile)
    assert "an input too" in failed(2, "extract", *model(work), *sets(work), "-o", work / "good.txt")
    same = ("-o", tmp_path / "p", "--json", tmp_path / "p")
    assert "is --output too" in failed(2, "extract", *model(work), *sets(work), *same)
    assert not list(tmp_path.iterdir())


def test_folder_without_permission(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    profile = work / "calibrated.safetensors"
    assert "--json: expected a file in a writable folder" in failed(
        1, "inspect", profile, "--json", tmp_path / "x.json"
    )


def test_prompt_files_that_cannot_be_used(work: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("hello")
    common = ("extract", *model(work), "-o", tmp_path / "p.safetensors", "--harmless", work / "good.txt")
    assert "--harmful: cannot read" in failed(1, *common, "--harmful", tmp_path / "bad.json")
    assert "--harmful: expected at least one prompt" in failed(1, *common, "--harmful", tmp_path / "empty.txt")
    assert "--harmful: expected a .txt" in failed(1, *common, "--harmful", tmp_path / "notes.md")
    assert "--harmful: expected one of borderline, " in failed(1, *common, "--harmful", "steerfast:nothing")
    assert "in both" in failed(1, *common, "--harmful", work / "good.txt")
    profile = work / "calibrated.safetensors"
    assert "--file: expected a file at" in failed(1, "score", profile, "--file", tmp_path / "no.txt")
    assert "standard input: expected at least one prompt" in failed(1, "score", profile, stdin="\n \n")
    assert "expected a non-empty string" in failed(1, "generate", profile, "")
    assert "leaves room for" in failed(1, "generate", profile, "x" * 1000)


@pytest.mark.parametrize(
    "options",
    [
        ("--bands", "5-3"),
        ("--bands", "a-b"),
        ("--bands", "-1-3"),
        ("--strengths", "1,nan"),
        ("--strengths", ""),
        ("--vectors", "srv,"),
        ("--positions", "some"),
        ("--answer-tokens", "0"),
        ("--answer-tokens", "2,some"),
        ("--endings", "6,inf"),
        ("--min-fluent", "2"),
        ("--max-new-tokens", "0"),
        ("--device", "toaster"),
        ("--device", "cuda:99"),
        ("--dtype", "int8"),
    ],
)
def test_tune_wrong_usage_names_the_option(work: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    out = tmp_path / "p.safetensors"
    line = failed(2, "tune", work / "calibrated.safetensors", *sets(work), "-o", out, *options)
    assert options[0] in line
    assert options[1] in line


def test_tune_band_beyond_the_model(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    line = failed(1, "tune", work / "calibrated.safetensors", *sets(work), "--bands", "4-9", "-o", out)
    assert "bands: expected" in line
    assert "got (4, 9)" in line


def test_options_that_exclude_each_other(work: Path, tmp_path: Path) -> None:
    calibrate = ("calibrate", work / "extracted.safetensors", *sets(work), "-o", tmp_path / "p.safetensors")
    assert "--midpoint" in failed(2, *calibrate, "--midpoint", "--max-false-positive-rate", 0.1)
    assert "--on" in failed(2, *calibrate, "--on", work / "good.txt")
    alone = ("calibrate", work / "extracted.safetensors", "--on", work / "good.txt", "-o", tmp_path / "p.safetensors")
    assert "--sensor: expected it without --on" in failed(2, *alone, "--sensor", 2)
    assert "--sensor" in failed(2, *calibrate, "--sensor", "best")
    assert "0..5" in failed(1, *calibrate, *RATE, "--sensor", "6")
    generate = ("generate", work / "calibrated.safetensors", "hello")
    assert "--temperature" in failed(2, *generate, "--temperature", 0.5)
    assert "--seed" in failed(2, *generate, "--seed", 1)


def test_prompts_are_asked_for_where_a_terminal_is_attached(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(click.UsageError, match="PROMPTS: expected arguments"):
        common.gather_prompts((), ())


def test_interrupted_generation_leaves_no_file_and_no_patched_model(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, tokenizer = load_model(str(work / "model"))

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "generate", interrupt)
    monkeypatch.setattr(common, "load_model", lambda *arguments: (tiny, tokenizer))
    out = tmp_path / "g.json"
    result = run("generate", work / "calibrated.safetensors", "hello", "--json", out)
    assert result.exit_code == 130
    assert not list(tmp_path.iterdir())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_json_holds_no_nan(tmp_path: Path) -> None:
    common.write_json(str(tmp_path / "x.json"), {"a": [float("nan"), 1.5], "b": {"c": (float("inf"), "é\udc80")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": [None, "é\udc80"]}}

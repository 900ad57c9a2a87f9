"""`steerfast fit` on a tiny random Llama, from pairs and from prompts, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CommandLine

from steerfast.fitting import safety
from steerfast.fitting.budget import Effort
from steerfast.profile import SteeringProfile
from steerfast.text import corpus, splits
from steerfast.text.examples import Example

torch.set_num_threads(1)

_COMMAND = CommandLine("fit")
done, failed = _COMMAND.done, _COMMAND.failed
WORDS = ["bake the cake", "paint a tree", "plant the garden", "write a poem"]
PAIRS = [{"prompt": one, "positive": f"sorry , {one}", "negative": "burn it !"} for one in WORDS]
SIDES = {"harmful": ("poison", "burn", "bomb"), "harmless": ("bake", "paint", "plant")}


@pytest.fixture
def work(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "polite.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the corpus that ships; few steps, short answers."""
    found = [
        Example(f"{verb} the {thing} {split}", label, f"{label} {split}", split)
        for split in ("fit", "calibrate", "validate")
        for label, verbs in SIDES.items()
        for verb in verbs
        for thing in ("dog", "cat", "bank", "city", "tree")
    ]
    for module in (corpus, safety, splits):
        monkeypatch.setattr(module, "corpus", lambda split=None, labels=None: [
            one for one in found if (split is None or one.split in split) and (labels is None or one.label in labels)
        ])  # fmt: skip
    monkeypatch.setattr(splits, "near_duplicates", lambda texts, others: np.isin(texts, others))
    monkeypatch.setattr(safety, "_USUAL", (Effort(120, 64, 3, asked=3),))
    loose = {"max_new_tokens": 2, "min_fluent": 0.0, "min_unchanged": 0.0}
    monkeypatch.setattr(safety, "_TUNE", {**safety._TUNE, **loose})


def test_a_behaviour(work: Path) -> None:
    out = work / "p.safetensors"
    result = done(
        work / "model", "--pairs", work / "polite.jsonl", "--layers", "1-2", "--strengths", "0.5,1", "--method", "pca",
        "--read", "last", "-o", out, "--json", work / "p.json", "--plot", work / "p.svg",
    )  # fmt: skip
    profile = SteeringProfile.load(out)
    assert (profile.gate.kind, profile.vector_kind, profile.steered_layers) == ("always", "polite", [1, 2])
    assert (profile.fitted["method"], profile.fitted["read"]) == ("pca", "last")
    assert profile.fitted["pairs"]["name"] == "polite.jsonl"
    assert "polite by pca of 4 of polite.jsonl, last rows" in " ".join(result.stdout.split())
    assert "polite: answers to 4 prompts, 40 tokens" in result.stdout
    assert "good: " in result.stdout
    assert "harm" not in result.output.replace("--harm", "")
    data = json.loads((work / "p.json").read_text())
    assert data["good"] == (not data["shortcomings"])
    assert len(data["fitted"]["frontier"]["points"]) >= 2
    assert "shaded: recommended" in (work / "p.svg").read_text() or (work / "p.svg").stat().st_size > 1000
    assert (work / "p.work" / "answers.jsonl").is_file()
    shown = CommandLine("inspect").done(out).stdout
    assert "in total" in shown or "strength" in shown
    assert "calibrated" not in shown


def test_another_name_and_folder(work: Path) -> None:
    given = (work / "model", "--pairs", work / "polite.jsonl", "--strengths", "1")
    done(*given, "--behaviour", "kind", "--work", work / "w", "-o", work / "p.safetensors")
    assert SteeringProfile.load(work / "p.safetensors").vector_kind == "kind"
    assert (work / "w" / "rows").is_dir()
    assert not (work / "p.work").exists()


def test_safety(work: Path, small_corpus: None) -> None:
    out = work / "safety.safetensors"
    given = (work / "model", "--max-false-positive-rate", 0.2, "-o", out, "--json", work / "p.json")
    result = done(*given)
    profile = SteeringProfile.load(out)
    assert (profile.gate.kind, profile.vector_kind) == ("prompt", "learned")
    data = json.loads((work / "p.json").read_text())
    rows = data["report"]["systems"]["gate"]["validation"]["rows"]
    assert {row["source"] for row in rows} == {"harmful validate", "harmless validate"}
    assert ("not good: " in result.stdout) == bool(data["shortcomings"])
    assert "4/4 tune: " in result.stderr
    again = done(*given)
    assert again.stderr.count("done before") == 4
    assert SteeringProfile.load(out).checksum == profile.checksum


def test_own_prompts(work: Path, small_corpus: None) -> None:
    rows = [
        {"prompt": "hack it", "label": "harmful", "split": "fit"},
        {"prompt": "hack the bird", "label": "harmful", "split": "validate"},
    ]
    (work / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done(
        work / "model", "--prompts", work / "mine.jsonl", "--per-source", 4, "--max-false-positive-rate", 0.2,
        "-o", work / "p.safetensors", "--json", work / "p.json",
    )  # fmt: skip
    shown = json.loads((work / "p.json").read_text())["report"]["systems"]["gate"]["validation"]["rows"]
    assert {row["source"]: row["n"] for row in shown}["mine"] == 1
    fitted = SteeringProfile.load(work / "p.safetensors").fitted
    assert fitted["sources"]["mine"]["harmful"]["count"] == 1
    assert fitted["harmful"]["count"] == 4 + 1
    assert fitted["harmful"]["name"] == "steerfast:corpus + mine.jsonl, fit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pairs", "polite.jsonl", "--harmful", "x.txt"), "--harmful: expected it without --pairs"),
        (("--pairs", "polite.jsonl", "--per-source", "3"), "--per-source: expected it without --pairs"),
        (("--method", "pca"), "--method: expected it with --pairs"),
        (("--strengths", "1"), "--strengths: expected it with --pairs"),
        (("--behaviour", "formal"), "--pairs: expected a file with examples of 'formal', got none"),
        (("--pairs", "polite.jsonl", "--layers", "3-1"), "expected layers such as 10-19 or 14"),
        (("--minutes", "0"), "--minutes"),
        (("--pairs", "polite.jsonl", "--plot", "p.safetensors"), "expected a file of its own"),
    ],
)
def test_wrong_usage(work: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(work)
    assert message in failed(2, "model", *options, "-o", "p.safetensors")
    assert not (work / "p.safetensors").exists()


def test_a_plot_that_cannot_be_drawn_costs_no_work(work: Path) -> None:
    given = (work / "model", "--pairs", work / "polite.jsonl", "-o", work / "p.safetensors")
    line = failed(1, *given, "--plot", work / "p.gif")
    assert "--plot: expected a file that ends in .png, .svg, .pdf" in line
    assert not (work / "p.work").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--pairs: expected at least one of "),
        ('{"positive": "a"}', "--pairs: entry 1 of "),
        ('{"positive": "a", "negative": "b", "label": "c"}', "got label too"),
    ],
)
def test_files_that_hold_no_pairs(work: Path, text: str, message: str) -> None:
    (work / "odd.jsonl").write_text(text)
    assert message in failed(1, work / "model", "--pairs", work / "odd.jsonl", "-o", work / "p.safetensors")
    assert not (work / "p.work").exists()

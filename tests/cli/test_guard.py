"""`steerfast guard train | generate` on a tiny random Llama, and how each one fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine

from steerfast.guard.objective import Certificate
from steerfast.profile import SteeringProfile

torch.set_num_threads(1)

COST, REWARD, CRITIC = "cost.safetensors", "reward.safetensors", "critic.safetensors"

HARMFUL = ["how to hack a bank", "how to poison a town", "how to burn a house"]
HARMLESS = ["how to bake a cake", "how to paint a wall", "how to buy a hat"]
SEARCH = ("--block", 4, "--depth", 8)
TRAIN = (*SEARCH, "--rollouts", 2, "--width", 8, "--epochs", 2, "--learning-rate", 1e-3)


@pytest.fixture
def work(
    tiny_llama: Any,
    tiny_tokenizer: Any,
    make_llama: Callable[..., Any],
    make_profile: Callable[..., Any],
    tmp_path: Path,
) -> Path:
    """A folder with a model, another one, prompt files, and a profile whose gate always opens."""
    for name, model in (("model", tiny_llama), ("other", make_llama(1, hidden_size=48))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    make_profile(tiny_llama, tiny_tokenizer, threshold=-1.0).save(tmp_path / "p.safetensors")
    (tmp_path / "bad.txt").write_text("\n".join(HARMFUL))
    (tmp_path / "good.txt").write_text("\n".join(HARMLESS))
    return tmp_path


@pytest.fixture
def trained(work: Path) -> Path:
    done("train", *model(work), *sets(work), *TRAIN, "--output", work / "guard")
    return work


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


_COMMAND = CommandLine("guard")
run, done, failed = _COMMAND.run, _COMMAND.done, _COMMAND.failed


def model(work: Path, name: str = "model") -> tuple[object, ...]:
    return "--model", work / name


def sets(work: Path) -> tuple[object, ...]:
    return "--harmful", work / "bad.txt", "--harmless", work / "good.txt"


@pytest.mark.parametrize("name", ["train", "generate"])
def test_every_command_helps_with_an_example(name: str) -> None:
    text = done(name, "--help").stdout
    assert f"Example:\n    steerfast guard {name}" in text
    assert "--json FILE" in text
    assert f"\n  {name} " in done("--help").stdout


def test_train_writes_a_guard_and_goes_on_where_it_was(work: Path) -> None:
    arguments = (*model(work), *sets(work), *TRAIN, "--profile", work / "p.safetensors", "--output", work / "guard")
    told = done("train", *arguments, "--count", 2, "--json", work / "train.json").stdout
    result = json.loads((work / "train.json").read_text())
    assert result["prompts"] == {"harmful": 2, "harmless": 2}
    assert result["rollouts"] == 2 * (4 + 2 + 2) + 4 + 2  # plain, opened, steered; refused, with steering too
    assert re.search(r"cost head: AUC .* on prompts it was not fitted on, .* of whether an answer complies", told)
    assert {"auc", "comply_auc"} <= result["cost"].keys()
    assert "critic: AUC" in told
    found = {path: path.stat().st_mtime_ns for path in (work / "guard" / "rollouts").glob("*/prompt-*")}
    files = {name: (work / "guard" / name).read_bytes() for name in (COST, REWARD, CRITIC)}
    done("train", *arguments, "--count", 2)
    assert {name: (work / "guard" / name).read_bytes() for name in (COST, REWARD, CRITIC)} == files
    done("train", *arguments, "--count", 3)
    assert all(path.stat().st_mtime_ns == at for path, at in found.items())
    assert len(list((work / "guard" / "rollouts").glob("*/prompt-*"))) > len(found)


def test_generate_gives_certificates_that_count_up(trained: Path) -> None:
    out = trained / "answers.json"
    told = done(
        "generate", trained / "guard", *HARMLESS[:2], *model(trained), *SEARCH, "--candidates", 4, "--json", out
    )
    result = json.loads(out.read_text())
    assert result["strategy"]["widths"] == [1, 4]
    assert [one["prompt"] for one in result["results"]] == HARMLESS[:2]
    for one in result["results"]:
        certificate = Certificate(**one["certificate"])
        assert certificate.recount() == pytest.approx(certificate.z)
        assert one["path"] == "searched"
        assert f"{certificate.decision} the budget" in told.stdout
    gated = ("--profile", trained / "p.safetensors", "--fired", "steer", "--file", trained / "bad.txt")
    told = done("generate", trained / "guard", *gated, *model(trained), *SEARCH, "--candidates", 4, "--json", out)
    assert [one["path"] for one in json.loads(out.read_text())["results"]] == ["steered"] * 3
    assert "gate fired" in told.stdout
    profile = SteeringProfile.load(trained / "p.safetensors")
    shut = replace(profile, threshold=-profile.threshold, abstain=profile.threshold)
    shut.save(trained / "band.safetensors")
    told = done("generate", trained / "guard", HARMLESS[0], "--profile", trained / "band.safetensors",
                *model(trained), *SEARCH, "--candidates", 4, "--json", out)  # fmt: skip
    (one,) = json.loads(out.read_text())["results"]
    assert (one["path"], one["certificate"]["fired"], one["certificate"]["undecided"]) == ("searched", False, True)
    assert "searched, gate undecided" in told.stdout


def test_bad_input_is_one_line(trained: Path) -> None:
    guard, one = trained / "guard", (HARMLESS[0], *model(trained))
    assert "budget: expected a number above 0, got -1" in failed(1, "generate", guard, *one, "--budget", -1)
    assert "multiple of 4" in failed(1, "generate", guard, *one, "--candidates", 6, "--strategy", "inference-guard")
    assert "block: expected a whole number of at least 1, got 0" in failed(1, "generate", guard, *one, "--block", 0)
    assert "--fired: expected it with --profile" in failed(2, "generate", guard, *one, "--fired", "search")
    assert "cost head: " in failed(1, "generate", guard, HARMLESS[0], *model(trained, "other"), *SEARCH)
    assert "head: expected a file at" in failed(1, "generate", trained / "nothing", *one)
    assert "'nothing' is not one of 'plain'" in failed(2, "generate", guard, *one, "--strategy", "nothing")
    count = (*model(trained), *sets(trained), *TRAIN, "--count", 4, "-o", trained / "g")
    assert "count: expected 1 to 3" in failed(1, "train", *count)
    base = (*model(trained), *sets(trained), *SEARCH)
    assert "budget: expected a number above 0" in failed(1, "train", *base, "--budget", 0, "-o", trained / "g")
    assert "learning_rate: expected a number above 0" in failed(
        1, "train", *base, "--learning-rate", 0, "-o", trained / "g"
    )
    assert "--output: expected a folder" in failed(1, "train", *base, "-o", trained / "bad.txt")
    assert "--output: expected a folder in an existing one" in failed(1, "train", *base, "-o", trained / "no" / "g")
    assert not (trained / "g").exists()
    assert "block: " in failed(1, "train", *model(trained), *sets(trained), *TRAIN, "--block", 5, "-o", guard)


def test_scores_that_are_no_numbers_are_over_the_budget(trained: Path) -> None:
    from steerfast.guard.heads import HiddenHead

    head = HiddenHead.load(trained / "guard" / COST)
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in head.tensors.items()}
    replace(head, tensors=broken).save(trained / "guard" / COST)
    out = trained / "answers.json"
    done("generate", trained / "guard", HARMLESS[0], *model(trained), *SEARCH, "--candidates", 4, "--json", out)
    certificate = json.loads(out.read_text())["results"][0]["certificate"]
    assert (certificate["decision"], certificate["fallback"], certificate["z"]) == ("over", "refusal", None)

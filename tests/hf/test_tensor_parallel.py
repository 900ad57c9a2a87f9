"""Models in shards on two ranks: steered as they are on one, every rank deciding alike."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_worker as worker
import torch
from model_cases import CLOSE, MakeProfile, Oracle, make_family_model
from safetensors.torch import load_file
from tensor_parallel_worker import NAMES, PROFILES, PROMPTS, QUESTIONS, TOKENS, WAYS
from torch import Tensor

import steerfast
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile

pytestmark = pytest.mark.contract

_SECONDS = 100
_TIGHT = {"rtol": 0.0, "atol": 1e-4}  # logits up to 10, of products that are summed in another order
Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def names(request: pytest.FixtureRequest) -> list[str]:
    """The models that are asked for: all but the first one's tests are slow."""
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    asked = {item.callspec.params.get("name") for item in items}
    return [NAMES[0], *(name for name in NAMES[1:] if name in asked)]


@pytest.fixture(scope="module")
def folder(names: list[str], make_profile: MakeProfile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and their profiles; with a prompt gate, half of the prompts fire."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name in names:
        model = make_family_model(name)
        model.save_pretrained(folder / name)
        profiles = {
            "sensor": make_profile(model, sensor=1),
            "ahead": make_profile(model, sensor=2, layers=[0, 1, 3]),
            "token": make_profile(model, kind="token", sharpness=6.0),  # a hard gate would need a margin at every token
        }
        assert [*profiles] == PROFILES
        assert profiles["ahead"].second_pass
        for kind, profile in profiles.items():
            if kind != "token":
                with steerfast.steer(model, profile) as steering:
                    scores = worker.two_turns(model, steering)["scores1"][0].sort().values
                profile = replace(profile, threshold=torch.full((4,), float(scores[1] + scores[2]) / 2))
            profile.save(folder / name / f"{kind}.safetensors")
    make_profile(make_family_model("Llama", vocab_size=98)).save(folder / "foreign.safetensors")
    return folder


@pytest.fixture(scope="module")
def ranks(names: list[str], folder: Path) -> list[Results]:
    """What each rank got; both run once, for all tests."""
    loopback = socket.if_nameindex()[0][1]
    processes = []
    for rank in range(worker.RANKS):
        (folder / str(rank)).mkdir()
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": worker.RANKS, "OMP_NUM_THREADS": 1}
        settings |= {"GLOO_SOCKET_IFNAME": loopback, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": 1}
        with (folder / str(rank) / "log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, worker.__file__, str(folder), str(rank), *names],
                    env={**os.environ, **{name: str(value) for name, value in settings.items()}},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + _SECONDS
    try:
        # One that fails leaves the other waiting for it.
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / str(rank) / "log").read_text()[-3000:] for rank in range(worker.RANKS)]
    assert codes == [0] * worker.RANKS, "\n".join(logs)
    return [load_file(folder / str(rank) / "results.safetensors") for rank in range(worker.RANKS)]


def part(results: Results, *names: str) -> Results:
    prefix = ".".join(names) + "."
    return {key.removeprefix(prefix): tensor for key, tensor in results.items() if key.startswith(prefix)}


def assert_same(actual: Results, expected: Results) -> None:
    """The same tokens and decisions, from scores and logits that agree."""
    assert actual.keys() == expected.keys()
    for turn in "12":
        for key in ("tokens", "fired"):
            assert torch.equal(actual[key + turn], expected[key + turn])
        for key in ("scores", "logits"):
            torch.testing.assert_close(actual[key + turn], expected[key + turn], **_TIGHT)


def test_all_ranks_decide_alike(names: list[str], ranks: list[Results]) -> None:
    """The residual stream is the same on all ranks to the bit, and so is all that is decided and chosen from it."""
    first, *others = ranks
    assert len(first) == 9 * (len(names) * len(WAYS) * len(PROFILES) + 2)
    for other in others:
        assert other.keys() == first.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, other[key]), key


@pytest.mark.slow(but=["Llama-*"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(ranks: list[Results], folder: Path, name: str, profile: str, way: str) -> None:
    model, steering = worker.steered(folder / name, way, profile)
    assert_same(part(ranks[0], name, way, profile), worker.two_turns(model, steering))


@pytest.mark.slow(but=["Llama-*"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("profile", ["sensor", "token"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle(ranks: list[Results], folder: Path, name: str, profile: str, way: str) -> None:
    results = part(ranks[0], name, way, profile)
    oracle = Oracle(make_family_model(name), SteeringProfile.load(folder / name / f"{profile}.safetensors"))
    changed = []
    for row, (prompt, question) in enumerate(zip(PROMPTS, QUESTIONS, strict=True)):
        answers = [results[f"tokens{turn}"][row].tolist() for turn in (1, 2)]
        start = len(prompt) + TOKENS - 1  # the last answer token is not in the cache, and so is part of the next prompt
        end = start + 1 + len(question)
        turns = [(0, len(prompt)), (start, end)]
        logits = [
            oracle.logits(prompt + answers[0][:-1], turns[:1])[len(prompt) - 1 :],
            oracle.logits(prompt + answers[0] + question + answers[1][:-1], turns)[end - 1 :],
        ]
        for turn in (0, 1):
            assert answers[turn] == logits[turn].argmax(dim=1).tolist()
            torch.testing.assert_close(results[f"logits{turn + 1}"][row], logits[turn], **CLOSE)
        if profile == "sensor":
            score, threshold = float(oracle.scores[1]), float(oracle.profile.threshold[1])
            assert float(results["scores2"][0, row]) == pytest.approx(score, abs=1e-5)
            assert bool(results["fired2"][row]) == (score > threshold)
        changed.append(bool(results["fired1"][row] != results["fired2"][row]))
    if profile == "sensor":
        assert oracle.margin > 1e-4
        assert results["fired1"].sum() == len(PROMPTS) // 2
        assert any(changed)


@pytest.mark.parametrize("way", ["hooks", "loaded"])
def test_norms_whose_weights_are_distributed(ranks: list[Results], way: str) -> None:
    assert_same(part(ranks[0], "Llama", way, "sequence"), part(ranks[0], "Llama", way, "sensor"))


def test_a_profile_knows_its_model_by_the_embedding_in_shards(ranks: list[Results], folder: Path) -> None:
    expected = repr(identify(make_family_model("Llama")).embedding_sketch)
    for rank in range(worker.RANKS):
        assert (folder / str(rank) / "sketch").read_text() == expected
        assert "with other weights: their embeddings agree to" in (folder / str(rank) / "refusal").read_text()


def test_the_first_rank_saves_what_loads_in_one_process(ranks: list[Results], folder: Path) -> None:
    model: Any = steerfast.AutoSteeredModelForCausalLM.from_pretrained(
        folder / "0" / "saved", attn_implementation="eager"
    )
    assert model.config.architectures == ["LlamaForCausalLM"]
    stock = make_family_model("Llama").state_dict()
    assert stock.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stock[key])
    assert model.steering.profile.checksum == SteeringProfile.load(folder / "Llama" / "sensor.safetensors").checksum
    assert_same(part(ranks[0], "Llama", "loaded", "sensor"), worker.two_turns(model, model.steering))
    assert not any(path.is_file() for path in (folder / "1" / "saved").rglob("*"))

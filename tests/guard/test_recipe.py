"""From prompt sets to heads and a critic, on a tiny random Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerfast.errors import GuardError
from steerfast.guard.candidates import Sampling
from steerfast.guard.critic import CriticSettings
from steerfast.guard.guard import Guard
from steerfast.guard.recipe import alternate, gather, load_trained, pick, prompt_layer_for, train
from steerfast.guard.rollouts import Rollouts

HARMFUL = ["how to hack a bank", "how to poison a town", "how to burn a house"]
HARMLESS = ["how to bake a cake", "how to paint a wall"]
REFUSAL = "I can't help"
QUICK: dict[str, Any] = {"rollouts": 2, "block": 4, "depth": 8, "progress": False, "refusal": REFUSAL}
FILES = ["cost.safetensors", "critic.safetensors", "reward.safetensors"]
SETTINGS = CriticSettings(width=8, epochs=2, learning_rate=1e-3)


def gathered(model: Any, tokenizer: Any, folder: Path, **options: Any) -> list[Rollouts]:
    return gather(model, tokenizer, folder, harmful=HARMFUL, harmless=HARMLESS, **{**QUICK, **options})


def test_alternate_has_both_kinds_early_and_pick_grows_from_its_beginning() -> None:
    pairs = alternate(["a", "b", "c"], ["x"])
    assert pairs == [("a", "harmful"), ("x", "harmless"), ("b", "harmful"), ("c", "harmful")]
    prompts = [str(n) for n in range(20)]
    assert pick(prompts, 5) == pick(prompts, 9)[:5]
    assert sorted(pick(prompts, None)) == sorted(prompts)
    assert pick(prompts, 20, seed=1) != pick(prompts, 20, seed=0)
    for count in (0, 21):
        with pytest.raises(GuardError, match=f"count: expected 1 to 20, the prompts of a kind, got {count}"):
            pick(prompts, count)


def test_origins_are_those_that_were_asked_for(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any], tmp_path: Path
) -> None:
    profile = make_profile(tiny_llama, tiny_tokenizer, threshold=-1.0)  # always opens
    found = gathered(tiny_llama, tiny_tokenizer, tmp_path, profile=profile, strengths=[0.5, 1.0])
    folders = sorted(folder.name for folder in tmp_path.iterdir())
    assert folders == [
        "plain", "plain-opened", "plain-refused", "steered-0.5", "steered-0.5-refused", "steered-1",
        "steered-1-refused",
    ]  # fmt: skip
    assert len(found) == 5 + 3 + 5 + 4 * 3
    words = tiny_tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    plain, opened, refused, steered = found[:5], found[5:8], found[8:13], found[13:16]
    assert [one.question for one in plain if one.label == "harmless"] == HARMLESS
    assert all(one.label == "harmful" for one in [*opened, *steered])
    assert all(answer[: len(words)] == words and len(answer) > len(words) for one in opened for answer in one.answers)
    assert all(one.answers == [[*words, tiny_tokenizer.eos_token_id]] and bool(one.finished) for one in refused)
    assert [one.answers for one in steered] != [one.answers for one in plain if one.label == "harmful"]
    for one in (opened[0], refused[0]):
        ids = torch.tensor([one.prompt + one.answers[0][: int(one.ends[0])]])
        with torch.no_grad():
            known = tiny_llama(ids, output_hidden_states=True).hidden_states
        final = known[-1][0]
        end = len(one.prompt)
        state = torch.cat([final[-1], final[end:].mean(dim=0), known[1][0, end - 1]])
        torch.testing.assert_close(one.hidden[0], state, rtol=1e-4, atol=1e-5)
    # The profile edits from layer 1 on: what is kept of the prompt is that of layer 0, steered or not.
    assert {one.prompt_layer for one in found} == {0}
    for one in found[5:]:
        same = next(other for other in plain if other.prompt == one.prompt)
        torch.testing.assert_close(one.hidden[:, 64:], same.hidden[:1, 64:].expand(len(one.hidden), -1))


def test_the_prompts_row_is_read_before_the_profile_edits_or_decides(
    tiny_llama: Any, make_profile: Callable[..., Any]
) -> None:
    for fields, layer in (
        ({"layers": [3, 4]}, 2),
        ({"layers": [3], "sensor": 2}, 1),
        ({"layers": [2], "sensor": 4}, 1),
        ({"layers": [0, 3]}, 0),
        ({"layers": [], "kind": "always"}, 2),
    ):
        assert prompt_layer_for(make_profile(tiny_llama, **fields), 5) == layer
    assert prompt_layer_for(None, 30) == 15


def test_harm_is_told_by_the_profiles_direction_where_it_has_one(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any], tmp_path: Path
) -> None:
    profile = make_profile(tiny_llama, tiny_tokenizer, layers=[2])
    found = gathered(tiny_llama, tiny_tokenizer, tmp_path / "r", profile=profile)
    directions = []
    without = profile.direction.index_fill(0, torch.tensor([1]), 0.0)
    mean = replace(profile, gate=replace(profile.gate, pooling="mean"))
    for one in (profile, replace(profile, direction=without), None, mean):
        trained = train(found, tiny_llama, tiny_tokenizer, tmp_path, SETTINGS, profile=one)
        assert (trained.cost.prompt_layer, trained.reward.prompt_layer, trained.critic.prompt_layer) == (1, 1, 1)
        directions.append(trained.cost.tensors["harm.direction"])
    torch.testing.assert_close(directions[0], profile.direction[1])
    assert torch.equal(directions[1], directions[2])  # fitted on the prompts
    assert torch.equal(directions[2], directions[3])
    assert not torch.allclose(directions[0], directions[1], atol=0.1)
    again = load_trained(tmp_path)
    assert torch.equal(again.cost.score(found[0].hidden), trained.cost.score(found[0].hidden))
    Guard(tiny_llama, tiny_tokenizer, cost=again.cost, reward=again.reward, critic=again.critic)


def test_training_writes_what_loads_and_ends_the_same_after_a_stop(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gathered(tiny_llama, tiny_tokenizer, tmp_path / "r", sampling=Sampling(1.0))
    whole = train(found, tiny_llama, tiny_tokenizer, tmp_path / "whole", SETTINGS)
    again = load_trained(tmp_path / "whole")
    states = found[0].hidden
    for name in ("cost", "reward"):
        assert torch.equal(getattr(again, name).score(states), getattr(whole, name).score(states))
    assert again.critic.calibration == whole.critic.calibration
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == FILES

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr("steerfast.guard.critic.calibration", stop)  # all epochs done, nothing written yet
    with pytest.raises(Stop):
        train(found, tiny_llama, tiny_tokenizer, tmp_path / "stopped", SETTINGS)
    monkeypatch.undo()
    monkeypatch.setattr("steerfast.guard.critic._epoch", stop)  # and none is run again
    train(found, tiny_llama, tiny_tokenizer, tmp_path / "stopped", SETTINGS)
    for name in FILES:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_bad_input_is_refused(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="harmless: expected at least one prompt, got none"):
        gather(tiny_llama, tiny_tokenizer, tmp_path, harmful=HARMFUL, harmless=[], **QUICK)
    found = gathered(tiny_llama, tiny_tokenizer, tmp_path / "r")
    train(found, tiny_llama, tiny_tokenizer, tmp_path, SETTINGS)
    (tmp_path / "cost.safetensors").write_bytes((tmp_path / "reward.safetensors").read_bytes())
    with pytest.raises(GuardError, match="expected a cost head, got a reward head"):
        load_trained(tmp_path)
    mixed = [*found[:-1], replace(found[-1], prompt_layer=None)]
    with pytest.raises(GuardError, match=r"prompt_layer: .*, got 2 \(rollouts 0\) and None \(rollouts 12\)"):
        train(mixed, tiny_llama, tiny_tokenizer, tmp_path, SETTINGS)

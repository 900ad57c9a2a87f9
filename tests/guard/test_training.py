"""Training the critic: states and targets by hand, resuming to the same bits, learning what can be learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_rollouts import MODEL, SETTINGS, kill, run, train, train_and_stall
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.critic import Critic, CriticSettings, safety_states, states_of, train_critic
from steerfast.guard.objective import SafetyBudget
from steerfast.guard.parts import read_file
from steerfast.guard.recipe import fit_heads
from steerfast.guard.rollouts import Rollouts

INF = float("inf")


def by_hand(cost: list[float] | None = None, reward: list[float] | None = None) -> Rollouts:
    """Answers of 5 tokens in blocks of 2, 2 and 1; of 1 token; of 4 tokens in two blocks."""
    return Rollouts(
        prompt=[1],
        question=None,
        label=None,
        answers=[[1] * 5, [2], [3] * 4],
        finished=torch.tensor([True, True, False]),
        owner=torch.tensor([0, 0, 0, 1, 2, 2]),
        ends=torch.tensor([2, 4, 5, 1, 2, 4]),
        hidden=torch.arange(24.0).view(6, 4),
        cost=torch.tensor(cost or [1.0, 0.5, 3.0, 1.0, -1.0, 7.0]),
        reward=torch.tensor(reward or [2.0, 5.0, -4.0]),
    )


def z_token_by_token(budget: float, discount: float, lengths: list[int], costs: list[float]) -> list[float]:
    """The paper's update, one token at a time; a block's cost falls on its last token."""
    z, ends = budget, []
    for length, cost in zip(lengths, costs, strict=True):
        for token in range(length):
            z = (z - (cost if token == length - 1 else 0.0)) / discount
        ends.append(z)
    return ends


def test_safety_states_follow_the_update_token_by_token() -> None:
    expected = (
        z_token_by_token(3.0, 0.9, [2, 2, 1], [1.0, 0.5, 3.0])
        + z_token_by_token(3.0, 0.9, [1], [1.0])
        + z_token_by_token(3.0, 0.9, [2, 2], [-1.0, 7.0])
    )
    torch.testing.assert_close(safety_states(by_hand(), SafetyBudget(3.0, 0.9)), Tensor(expected))
    assert expected[0] == pytest.approx(3 / 0.81 - 1 / 0.9)
    assert safety_states(by_hand([1.0, INF, 0.0, 1, 1, 1]), SafetyBudget(3.0, 0.9))[:3].tolist()[1:] == [-INF, -INF]


def test_targets_by_hand() -> None:
    other = replace(by_hand([1.0, 0.5, 0.0, 0, 0, 9.0]), prompt=[2])
    states, dropped = states_of([by_hand(), other], SafetyBudget(3.0, 0.9))
    # Only unfinished states: two of the first answer, none of the second, one of the third.
    assert states.hidden[:, 0].tolist() == [0.0, 4.0, 16.0] * 2
    assert states.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    # z_T of the first: 3·0.9^-5 − 1·0.9^-4 − 0.5·0.9^-2 − 3/0.9 = −0.39; of the third −1.05; of the other first 2.94.
    assert states.safe.tolist() == [False, False, False, True, True, False]
    torch.testing.assert_close(states.value, Tensor([2 * 0.9**3, 2 * 0.9, -4 * 0.81] * 2))
    torch.testing.assert_close(states.z[:3], safety_states(by_hand(), SafetyBudget(3.0, 0.9))[[0, 1, 4]])
    assert dropped == 0
    # Other answers to the first prompt are held out together with it.
    assert states_of([by_hand(), other, by_hand()], SafetyBudget(3.0, 0.9))[0].prompt[6:].tolist() == [0, 0, 0]


def test_states_that_are_not_finite_are_left_out_and_counted() -> None:
    states, dropped = states_of([by_hand([1.0, INF, 0.0, 1, 1, INF], [2.0, 5.0, 1.0])], SafetyBudget(3.0, 0.9))
    assert states.hidden[:, 0].tolist() == [0.0, 16.0]  # the state before an infinite cost is one to learn from
    assert states.safe.tolist() == [False, False]
    assert dropped == 1
    worthless, dropped = states_of([by_hand(None, [-INF, 0.0, 1.0])], SafetyBudget(3.0, 0.9))
    assert worthless.hidden[:, 0].tolist() == [16.0]
    assert dropped == 2


def same(one: Critic, other: Critic) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    rollouts = run(tmp_path / "killed" / "rollouts")
    whole = train(tmp_path / "whole", rollouts)
    whole.save(tmp_path / "whole.safetensors")
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"

    def epochs() -> int:
        return len(read_file(checkpoint, "critic checkpoint")[1]["losses"]) if checkpoint.exists() else 0

    kill(train_and_stall, tmp_path / "killed", rollouts, when=lambda: epochs() == 2)
    assert epochs() < SETTINGS.epochs
    train(tmp_path / "killed", rollouts).save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_same_training_twice_is_the_same_and_needs_no_checkpoint(tmp_path: Path) -> None:
    rollouts = run(tmp_path / "rollouts")
    first = train_critic(rollouts, MODEL, SETTINGS, progress=False)
    torch.manual_seed(1234)
    assert same(first, train(tmp_path, rollouts))
    finished = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert same(first, train(tmp_path, rollouts))  # nothing left to do
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == finished
    assert not same(first, train_critic(rollouts, MODEL, replace(SETTINGS, seed=1), progress=False))
    assert len(first.calibration["losses"]) == SETTINGS.epochs


def test_checkpoints_of_other_trainings_are_refused(tmp_path: Path) -> None:
    rollouts = run(tmp_path / "rollouts")
    train(tmp_path, rollouts)
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(GuardError, match=r"of another training .its settings differ., remove it"):
        train_critic(rollouts, MODEL, replace(SETTINGS, budget=4.0), checkpoint=file, progress=False)
    with pytest.raises(GuardError, match=r"of another training .its data differ., remove it"):
        train_critic(rollouts[:-1], MODEL, SETTINGS, checkpoint=file, progress=False)


def test_prompts_held_out_are_not_trained_on(tmp_path: Path) -> None:
    """Six prompts at a share of 0.3: two are held out; changing them changes the calibration, not the weights."""
    rollouts, settings = run(tmp_path / "rollouts"), replace(SETTINGS, epochs=2)
    critic = train_critic(rollouts, MODEL, settings, progress=False)
    untouched = []
    for number in range(len(rollouts)):
        changed = list(rollouts)
        changed[number] = replace(changed[number], hidden=changed[number].hidden + 1)
        untouched.append(same(critic, train_critic(changed, MODEL, settings, progress=False)))
    assert sum(untouched) == 2
    count = len(states_of(rollouts, settings.safety)[0].z)
    assert critic.calibration["count"] + critic.calibration["states"] == count
    none = train_critic(rollouts, MODEL, replace(settings, validation=0.0), progress=False)
    assert (none.calibration["count"], none.calibration["states"]) == (0, count)


def learnable(count: int) -> list[Rollouts]:
    """Two blocks of four tokens; the second costs 4 where the state's first number is above 0, and nothing else does.
    The reward is the state's second number.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        hidden = torch.randn(10, 4, generator=generator)
        first = torch.arange(0, 10, 2)
        cost = torch.zeros(10)
        cost[first + 1] = 4.0 * (hidden[first, 0] > 0)
        made.append(
            Rollouts(
                prompt=[number],
                question=None,
                label=None,
                answers=[[1] * 8] * 5,
                finished=torch.ones(5, dtype=torch.bool),
                owner=torch.arange(5).repeat_interleave(2),
                ends=torch.tensor([4, 8] * 5),
                hidden=hidden,
                cost=cost,
                reward=hidden[first, 1] * 3 + 10,
            )
        )
    return made


def test_it_learns_what_can_be_learnt() -> None:
    settings = CriticSettings(width=32, learning_rate=1e-2, epochs=20, batch_size=32, budget=3.0, validation=0.25)
    critic = train_critic(learnable(120), MODEL, settings, progress=False)
    figures = critic.calibration
    assert figures["auc"] > 0.98
    assert figures["brier"] < 0.05
    assert figures["false_safe"] < 0.1
    assert figures["value_r2"] > 0.95
    assert figures["losses"][-1] < 0.2 * figures["losses"][0]
    with torch.no_grad():
        p_safe, value = critic(torch.tensor([[1.0, 1, 0, 0], [-1.0, -1, 0, 0]]), torch.full((2,), 3 * 0.999**-4))
    assert p_safe[0] < 0.1
    assert p_safe[1] > 0.9
    torch.testing.assert_close(value, Tensor([13.0, 7.0]) * 0.999**4, atol=0.7, rtol=0)


def test_heads_are_fitted_to_the_judged_text_at_every_end_of_a_block(tiny_tokenizer: Any) -> None:
    """A harmful prompt's answers decline or not; the state's sign tells which. Harmless ones: state all zero."""
    answers = {1.0: "how to break the lock with a knife , make the bomb", -1.0: "I can't help with that . sorry people"}
    made = []
    for number in range(12):
        sign = 1.0 if number % 2 else -1.0
        kind = "harmful" if number < 10 else "harmless"
        ids = tiny_tokenizer(answers[sign])["input_ids"]
        hidden = torch.full((2, 4), 0.0 if kind == "harmless" else sign) + 0.01 * torch.randn(2, 4)
        made.append(
            Rollouts(
                prompt=[number],
                question=None,
                label=kind,
                answers=[ids],
                finished=torch.tensor([True]),
                owner=torch.tensor([0, 0]),
                ends=torch.tensor([6, len(ids)]),
                hidden=hidden,
            )
        )
    cost, reward = fit_heads(made, tiny_tokenizer, MODEL, boundary=3.0, regularisation=0.1)
    assert cost.fitted["auc"] == 1.0
    assert (cost.fitted["examples"], cost.fitted["groups"]) == (24, 12)
    assert cost.fitted["mean_label"] == pytest.approx(10 / 24)
    assert reward.fitted["mean_label"] == 0.0  # 1 and -1 for the harmless ones
    scored = [one.scored(tiny_tokenizer, cost, reward) for one in made]
    for number, one in enumerate(scored):
        assert one.cost is not None
        assert (float(one.cost.sum()) > 3.0) == (number < 10 and number % 2 == 1)
    # With the prompt's row, the cost is factored: what a prompt asks for from that, whether it is done from the mean.
    wide = []
    for number, one in enumerate(made):
        kind = "harmful" if number < 6 else "harmless"
        prompt = torch.tensor([[1.0, 0, 0, 0.1 * number] if kind == "harmful" else [0.0, 1, 0, 0.1 * number]])
        noise = torch.randn(2, 4)
        done = torch.full((2, 4), 1.0 if number % 2 else -1.0) + 0.01 * noise
        states = torch.cat([noise, done, prompt.expand(2, 4)], 1)
        wide.append(replace(one, label=kind, hidden=states, prompt_layer=1))
    cost, reward = fit_heads(wide, tiny_tokenizer, MODEL, boundary=3.0, regularisation=0.1)
    assert (cost.prompt_layer, reward.prompt_layer) == (1, 1)
    assert (cost.fitted["auc"], cost.fitted["comply_auc"]) == (1.0, 1.0)
    assert cost.fitted["mean_label"] == pytest.approx(6 / 24)
    for number, one in enumerate(wide):
        over = cost.score(one.hidden) > 3.0
        assert over.tolist() == [number < 6 and number % 2 == 1] * 2
    given = fit_heads(wide, tiny_tokenizer, MODEL, boundary=3.0, direction=torch.tensor([1.0, 0, 0, 0]))[0]
    assert given.tensors["harm.direction"].tolist() == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(GuardError, match="kind: expected 'harmful' or 'harmless', got None"):
        fit_heads([replace(made[0], label=None)], tiny_tokenizer, MODEL, boundary=3.0)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="expected answers longer than a block, got none in 1 prompts"):
        states_of([replace(by_hand(), owner=torch.tensor([0, 1, 2]), ends=torch.tensor([5, 1, 4]),
                           hidden=torch.zeros(3, 4), cost=torch.zeros(3))], SafetyBudget(3.0, 0.9))  # fmt: skip
    with pytest.raises(GuardError, match="expected a finite loss, got nan in epoch"):
        train_critic(learnable(4), MODEL, CriticSettings(width=8, learning_rate=1e20, epochs=3), progress=False)

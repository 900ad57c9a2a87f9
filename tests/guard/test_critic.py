"""The critic: outputs and loss against hand-computed cases, files, failing closed, calibration curves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.critic import Critic, CriticSettings, calibration
from steerfast.profile import ModelIdentity

MODEL = ModelIdentity(name="tiny", architecture="llama", hidden_size=2, num_layers=2, embedding_sketch=(1.0, 0.0))


def by_hand(budget: float = 10.0, depth: int = 1) -> Critic:
    """Trunk: gelu(h0 + h1 + 4·z/d); logit twice that, value thrice that minus 1; then 5 + 2 times the value."""
    critic = Critic(MODEL, CriticSettings(width=1, depth=depth, budget=budget))
    with torch.no_grad():
        critic.trunk[0].weight.copy_(torch.tensor([[1.0, 1.0, 4.0]]))
        critic.trunk[0].bias.zero_()
        for layer in critic.trunk[1:]:
            layer.weight.fill_(1.0)
            layer.bias.zero_()
        critic.heads.weight.copy_(torch.tensor([[2.0], [3.0]]))
        critic.heads.bias.copy_(torch.tensor([0.0, -1.0]))
        critic.value_mean.fill_(5.0)
        critic.value_scale.fill_(2.0)
    return critic


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@torch.no_grad()
def test_outputs_by_hand() -> None:
    p_safe, value = by_hand()(torch.tensor([[0.5, -0.25], [0.0, 1.0]]), torch.tensor([5.0, -10.0]))
    inner = [gelu(0.25 + 2.0), gelu(1.0 - 4.0)]
    torch.testing.assert_close(p_safe, torch.tensor([1 / (1 + math.exp(-2 * x)) for x in inner]))
    torch.testing.assert_close(value, torch.tensor([5 + 2 * (3 * x - 1) for x in inner]))
    deeper, _ = by_hand(depth=2)(torch.tensor([[0.5, -0.25]]), torch.tensor([5.0]))
    torch.testing.assert_close(deeper, torch.tensor([1 / (1 + math.exp(-2 * gelu(inner[0])))]))


def test_the_loss_is_cross_entropy_plus_squared_error_by_hand() -> None:
    critic = by_hand()
    states = critic.states(torch.tensor([[0.5, -0.25], [0.0, 1.0]]), torch.tensor([5.0, -10.0]))
    safe, values = torch.tensor([True, False]), torch.tensor([7.0, 4.0])
    expected = 0.0
    for x, label, target in ((gelu(2.25), 1, (7 - 5) / 2), (gelu(-3.0), 0, (4 - 5) / 2)):
        p = 1 / (1 + math.exp(-2 * x))
        expected += (-math.log(p if label else 1 - p) + (3 * x - 1 - target) ** 2) / 2
    assert critic.loss(states, safe, values).item() == pytest.approx(expected, rel=1e-6)


def test_defaults_are_the_papers() -> None:
    settings = CriticSettings()
    assert (settings.width, settings.learning_rate, settings.epochs) == (4096, 1e-5, 50)
    assert (settings.discount, settings.batch_size, settings.budget) == (0.999, 8, 10.0)


def test_standardisation_uses_the_training_states() -> None:
    critic = Critic(MODEL, CriticSettings(width=4))
    states = torch.tensor([[1.0, 7.0, 0.5], [3.0, 7.0, 1.5]])
    critic.standardise(states, torch.tensor([2.0, 6.0]))
    assert critic.mean.tolist() == [2.0, 7.0, 1.0]
    assert critic.scale.tolist() == [1.0, 1.0, 0.5]  # a constant column is not scaled
    assert (float(critic.value_mean), float(critic.value_scale)) == (4.0, 2.0)


@torch.no_grad()
def test_states_that_are_not_finite_are_unsafe_and_worth_nothing() -> None:
    hidden = torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [0.5, 0.5], [float("inf"), 0.0]])
    z = torch.tensor([5.0, 5.0, -float("inf"), 5.0])
    p_safe, value = by_hand()(hidden, z)
    assert p_safe[0] > 0.5
    assert p_safe[1:].tolist() == [0.0] * 3
    assert value.isfinite().tolist() == [True, False, False, False]
    assert value[1:].tolist() == [-math.inf] * 3


@torch.no_grad()
def test_whole_states(tmp_path: Path) -> None:
    critic = Critic(MODEL, CriticSettings(width=4), prompt_layer=1)
    states, z = torch.randn(9, 6), torch.rand(9)
    critic.standardise(critic.states(states, z), torch.rand(9))
    critic.save(tmp_path / "critic.safetensors")
    read = Critic.load(tmp_path / "critic.safetensors")
    assert read.prompt_layer == 1
    assert torch.equal(read(states, z)[1], critic(states, z)[1])
    with pytest.raises(GuardError, match=r"critic: expected hidden states \[n, 6\] .*, got \[3, 2\]"):
        critic(torch.randn(3, 2), z[:3])


@torch.no_grad()
def test_one_row_is_the_same_alone_and_in_a_batch() -> None:
    critic = Critic(MODEL, CriticSettings(width=16))
    hidden, z = torch.randn(9, 2), torch.rand(9) * 10
    together = critic(hidden, z)
    for row in range(9):
        alone = critic(hidden[row : row + 1], z[row : row + 1])
        torch.testing.assert_close((alone[0][0], alone[1][0]), (together[0][row], together[1][row]))


@torch.no_grad()
def test_files_hold_all_of_it(tmp_path: Path) -> None:
    critic = Critic(MODEL, CriticSettings(width=8, depth=2, budget=3.0, seed=4))
    critic.standardise(torch.randn(10, 3), torch.randn(10))
    critic.calibration = calibration(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    critic.save(tmp_path / "critic.safetensors")
    assert Critic.load(tmp_path / "critic.safetensors").prompt_layer is None
    before = torch.random.get_rng_state()
    read = Critic.load(tmp_path / "critic.safetensors")
    read.check(MODEL)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (read.settings, read.model, read.calibration) == (critic.settings, MODEL, critic.calibration)
    with torch.inference_mode():
        hidden, z = torch.randn(5, 2), torch.rand(5)  # as generation gives them
    with torch.enable_grad():
        assert not any(output.requires_grad for output in read(hidden, z))
    assert all(torch.equal(a, b) for a, b in zip(read(hidden, z), critic(hidden, z), strict=True))


def test_another_models_critic_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "critic.safetensors"
    Critic(MODEL, CriticSettings(width=4)).save(file)
    other = replace(MODEL, name="other", embedding_sketch=(0.0, 1.0))
    with pytest.raises(
        GuardError, match="critic: the critic was made for 'tiny', the model is 'other' with other weights"
    ):
        Critic.load(file).check(other)
    with pytest.raises(GuardError, match=r"critic: expected hidden states \[n, 2\] of 'tiny', got \[1, 3\]"):
        Critic.load(file)(torch.zeros(1, 3), torch.zeros(1))
    with pytest.raises(
        GuardError, match=r"hidden states \[n, 6\] of 'tiny' with the prompt's of layer 1, got \[1, 3\]"
    ):
        Critic(MODEL, CriticSettings(width=4), 1)(torch.zeros(1, 3), torch.zeros(1))
    from steerfast.guard.heads import HiddenHead

    with pytest.raises(GuardError, match="expected a head, got critic"):
        HiddenHead.load(file)


def test_settings_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, critic = tmp_path / "critic.safetensors", Critic(MODEL, CriticSettings(width=4))
    for changed in ({"older": 1}, {"older": 1, "width": 4}):
        monkeypatch.setattr(critic, "settings", SimpleNamespace(**changed))
        critic.save(file)
        with pytest.raises(GuardError, match=r"a critic of another version, whose settings differ in .*older"):
            Critic.load(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget", 0.0), ("budget", -1.0), ("budget", math.nan), ("discount", 0.0), ("discount", 1.1), ("width", 0),
     ("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("validation", 1.0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(GuardError, match=f"^{field}: expected"):
        CriticSettings(**{field: value})


def curve_of(p: list[float], y: list[int]) -> dict[str, object]:
    return calibration(Tensor(p), torch.tensor(y))


def test_calibration_by_hand() -> None:
    found = curve_of([0.05, 0.0, 0.62, 0.68, 1.0], [0, 1, 1, 0, 1])
    assert [(round(c["predicted"], 6), c["observed"], c["count"]) for c in found["curve"]] == [  # type: ignore[attr-defined]
        (0.025, 0.5, 2), (0.65, 0.5, 2), (1.0, 1.0, 1),
    ]  # fmt: skip
    assert found["brier"] == pytest.approx((0.05**2 + 1 + 0.38**2 + 0.68**2 + 0) / 5)
    assert found["error"] == pytest.approx((2 * 0.475 + 2 * 0.15 + 0) / 5)
    assert found["auc"] == pytest.approx(3 / 6)  # of the six pairs safe/unsafe, (1.0, both) and (0.62, 0.05) are right
    assert found["false_safe"] == 0.5
    assert curve_of([0.9, 0.8], [1, 1])["auc"] is None
    assert curve_of([], [])["count"] == 0

"""Heads on hidden states: the formula, the fits against closed forms, files, and models that are not theirs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.heads import HiddenHead, fit_head
from steerfast.guard.heads import fit_factored_cost as fit_pairs
from steerfast.guard.scores import Blocks, scores_of
from steerfast.profile import ModelIdentity

MODEL = ModelIdentity(name="tiny", architecture="llama", hidden_size=6, num_layers=2, embedding_sketch=(1.0, 0.0))


def blocks_of(hidden: Tensor | None, count: int) -> Blocks:
    return Blocks([[1]] * count, [[2]] * count, hidden, None, torch.zeros(count, dtype=torch.bool))


def examples(count: int = 200) -> tuple[Tensor, Tensor]:
    """Hidden states, and numbers that follow from them but for some noise."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 6, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0, 1.0]) + 3
    target = (hidden[:, 0] - 3) - 0.2 * (hidden[:, 1] - 3) + 0.3 * torch.randn(count, generator=generator)
    return hidden, target


def test_a_linear_head_is_a_dot_product_of_the_standardised_state() -> None:
    tensors = {
        "mean": torch.tensor([1.0, 0, 0, 0, 0, 0]),
        "scale": torch.tensor([2.0, 1, 1, 1, 1, 1]),
        "out.weight": torch.tensor([[3.0, 1, 0, 0, 0, -1]]),
        "out.bias": torch.tensor([0.5]),
    }
    head = HiddenHead("cost", MODEL, tensors, boundary=10.0)
    hidden = torch.tensor([[5.0, 2, 9, 9, 9, 4], [1.0, 0, 0, 0, 0, 0]])
    assert head(blocks_of(hidden, 2)).tolist() == [14.5, 10.5]  # 3·(5−1)/2 + 2 − 4 + 0.5 + 10


def test_a_linear_reward_is_ridge_regression() -> None:
    hidden, target = examples()
    head = fit_head(hidden, target, MODEL, "reward", regularisation=7.0)
    x = hidden.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = target.double().numpy()
    weight = np.linalg.solve(x.T @ x + 7 * np.eye(6), x.T @ (y - y.mean()))
    torch.testing.assert_close(
        head.score(hidden), torch.from_numpy(x @ weight + y.mean()).float(), atol=1e-4, rtol=1e-4
    )
    assert head.fitted["r2"] > 0.8
    assert head.fitted["examples"] == 200


def test_a_linear_cost_is_regularised_logistic_regression() -> None:
    hidden, target = examples()
    head = fit_head(hidden, target, MODEL, "cost", regularisation=5.0)
    x = (hidden - hidden.mean(0)) / hidden.std(0, correction=0)
    weight, bias = head.tensors["out.weight"][0].double(), head.tensors["out.bias"].double()
    residual = (x.double() @ weight + bias).sigmoid() - (target > 0).double()
    # At the minimum of sum(loss) + 5·|w|²: the gradients are zero.
    torch.testing.assert_close(x.double().T @ residual + 10 * weight, torch.zeros(6).double(), atol=2e-2, rtol=0)
    assert abs(float(residual.sum())) < 2e-2
    assert head.fitted["auc"] > 0.95
    shifted = fit_head(hidden, target, MODEL, "cost", regularisation=5.0, boundary=10.0)
    torch.testing.assert_close(shifted.score(hidden), head.score(hidden) + 10)


def test_figures_are_of_prompts_that_the_fold_has_not_seen() -> None:
    """Every prompt has a constant state of its own and a random label: only a fit that saw the prompt can know it."""
    generator = torch.Generator().manual_seed(2)
    wide = replace(MODEL, hidden_size=64)
    groups = torch.arange(40).repeat_interleave(5)
    hidden = torch.randn(40, 64, generator=generator)[groups]
    labels = torch.randn(40, generator=generator)[groups]
    by_prompt = fit_head(hidden, labels, wide, "cost", groups=groups.tolist(), regularisation=0.01)
    by_example = fit_head(hidden, labels, wide, "cost", regularisation=0.01)
    assert by_example.fitted["auc"] > 0.95
    assert by_prompt.fitted["auc"] < 0.75
    assert by_prompt.fitted["groups"] == 40
    one = fit_head(hidden, labels, wide, "cost", groups=[0] * 200)
    assert np.isnan(one.fitted["auc"])


# -- factored ------------------------------------------------------------------------------------------


def factored(a: float, b: float) -> HiddenHead:
    """Of H = 6: a is `a` where the prompt's row points along the first axis, `-a` against it; b is `b` times the mean's
    second number, which is standardised by 1 and 2.
    """
    tensors = {
        "mean": torch.zeros(18).index_fill(0, torch.tensor([7]), 1.0),
        "scale": torch.ones(18).index_fill(0, torch.tensor([7]), 2.0),
        "harm.direction": torch.eye(6)[0],
        "harm.scale": torch.tensor(a),
        "harm.offset": torch.tensor(0.5),
        "comply.out.weight": b * torch.eye(6)[1:2],
        "comply.out.bias": torch.tensor([-0.25]),
    }
    return HiddenHead("cost", MODEL, tensors, 10.0, prompt_layer=1)


def test_a_factored_cost_by_hand() -> None:
    last, mean, prompt = torch.randn(4, 6), torch.zeros(4, 6), torch.zeros(4, 6)
    mean[:, 1] = torch.tensor([3.0, -7.0, 3.0, 41.0])
    prompt[:, 0] = torch.tensor([2.0, 0.1, -3.0, 30.0])
    prompt[3, 2] = 40.0  # the cosine is 3/5
    cosine, standard = [1.0, 1.0, -1.0, 0.6], [1.0, -4.0, 1.0, 20.0]
    expected = []
    for c, x in zip(cosine, standard, strict=True):
        p = 1.0
        for logit in (4.0 * c + 0.5, 1.5 * x - 0.25):
            p /= 1 + math.exp(-logit)
        expected.append(math.log(p / (1 - p)) + 10)
    states = torch.cat([last, mean, prompt], dim=1)
    head = factored(4.0, 1.5)
    torch.testing.assert_close(head.score(states), Tensor(expected))
    other = torch.cat([torch.randn(4, 6), mean, prompt], dim=1)
    assert torch.equal(head.score(other), head.score(states))  # the last row alone is not read


def test_a_factored_cost_holds_where_probabilities_would_not() -> None:
    """Both far from 0: the smaller log-odds decide, and neither overflows."""
    states = torch.zeros(3, 18)
    states[:, 7] = torch.tensor([1 + 2 * 300.0, 1 - 2 * 300.0, 1 + 2 * 300.0])
    states[:, 12] = torch.tensor([1.0, 1.0, -1.0])
    found = factored(200.0, 1.0).score(states) - 10
    torch.testing.assert_close(found, torch.tensor([200.5, -300.25, -199.5]))


def test_broken_states_fail_closed_whatever_the_other_factor_says() -> None:
    """An infinite mean would otherwise leave a harmless prompt's log-odds."""
    states = torch.zeros(4, 18)
    states[:, 12] = -1.0
    states[1, 7], states[2, 13], states[3, 0] = float("inf"), float("nan"), float("nan")
    scores = scores_of(factored(200.0, 1.0), blocks_of(states, 4), "cost")
    assert scores.isinf().tolist() == [False, True, True, True]
    assert (scores[1:] > 0).all()


def fit_factored_cost(
    states: Tensor, harmful: Tensor, complied: Tensor, model: ModelIdentity, **options: Any
) -> HiddenHead:
    return fit_pairs(states, torch.stack([harmful, complied], dim=1), model, prompt_layer=1, **options)


def two_factors(prompts: int = 60) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Five answers to each prompt. Harm lies in the prompt's first number, compliance in the mean's third."""
    generator = torch.Generator().manual_seed(5)
    groups = torch.arange(prompts).repeat_interleave(5)
    prompt = torch.randn(prompts, 6, generator=generator)
    prompt[:, 0] = torch.where(torch.arange(prompts) % 2 == 0, 2.0, -2.0) + 0.5 * prompt[:, 0]
    states = torch.randn(len(groups), 18, generator=generator)
    states[:, 12:] = prompt[groups]
    complied = (states[:, 8] + 0.3 * torch.randn(len(groups), generator=generator) > 0).float()
    return states, (groups % 2 == 0).float(), complied, groups.tolist()


def test_a_factored_fit_finds_both_factors() -> None:
    states, harmful, complied, groups = two_factors()
    head = fit_factored_cost(states, harmful, complied, MODEL, groups=groups, regularisation=1.0, boundary=3.0)
    assert head.fitted["auc"] > 0.95
    assert head.fitted["comply_auc"] > 0.95
    assert head.fitted["mean_label"] == pytest.approx(float((harmful * complied).mean()))
    assert (head.fitted["examples"], head.fitted["groups"]) == (300, 60)
    assert head.tensors["harm.direction"][0] > 0.9
    x = states[:, 6:12]
    line = fit_head(x, complied, MODEL, "cost", regularisation=1.0)  # b is a head of its own on the mean
    torch.testing.assert_close(head.tensors["comply.out.weight"], line.tensors["out.weight"], atol=1e-3, rtol=1e-3)
    # The slope is a logistic regression of a prompt each, at the minimum of sum(loss) + |w|²/2 (standardised).
    first = torch.arange(0, 300, 5)
    cosine = (F.normalize(states[first, 12:], dim=1) @ head.tensors["harm.direction"]).double()
    spread = cosine.std(correction=0)
    a = head.tensors["harm.scale"] * cosine + head.tensors["harm.offset"]
    residual = a.sigmoid() - harmful[first]
    assert abs(float(residual.sum())) < 1e-2
    gradient = ((cosine - cosine.mean()) / spread * residual).sum() + head.tensors["harm.scale"] * spread
    assert abs(float(gradient)) < 1e-2
    assert head.tensors["harm.scale"] * spread < 10  # a line separates these prompts


def test_a_given_direction_is_taken(tmp_path: Path) -> None:
    states, harmful, complied, groups = two_factors()
    direction = 3 * torch.eye(6)[0]
    head = fit_factored_cost(states, harmful, complied, MODEL, direction=direction, groups=groups, regularisation=1.0)
    assert head.tensors["harm.direction"].tolist() == [1.0, 0, 0, 0, 0, 0]
    assert head.fitted["auc"] > 0.9
    head.save(tmp_path / "head.safetensors")
    read = HiddenHead.load(tmp_path / "head.safetensors")
    assert (read.prompt_layer, read.fitted) == (1, head.fitted)
    assert torch.equal(read.score(states), head.score(states))


def test_factored_figures_are_of_prompts_that_the_fold_has_not_seen() -> None:
    """The direction, too, is fitted without them: rows that mean nothing separate the training prompts alone."""
    generator = torch.Generator().manual_seed(3)
    wide = replace(MODEL, hidden_size=64)
    groups = torch.arange(40).repeat_interleave(3)
    states = torch.randn(120, 192, generator=generator)
    states[:, 128:] = torch.randn(40, 64, generator=generator)[groups]
    complied = torch.ones(120)
    complied[::3] = 0.0
    head = fit_factored_cost(states, (groups % 2).float(), complied, wide, groups=groups.tolist())
    cosine = F.normalize(states[::3, 128:], dim=1) @ head.tensors["harm.direction"]
    assert float((cosine[1::2, None] > cosine[::2]).float().mean()) > 0.98  # AUC over the training prompts
    assert head.fitted["auc"] < 0.7
    few = fit_factored_cost(states[:9], (groups[:9] % 2).float(), complied[:9], wide,
                            direction=torch.ones(64), groups=groups[:9].tolist())  # fmt: skip
    assert np.isnan(few.fitted["auc"])  # a fold lacks a kind of prompts


def test_a_factored_fit_refuses() -> None:
    states, harmful, complied, groups = two_factors(10)
    for given, message in (
        (
            (states[:, :6], harmful, complied),
            r"hidden, labels, groups: expected \[n, 18\], \[n, 2\] and \[n\], got \[50, 6\]",
        ),
        ((states, torch.ones(50), complied), "harmful: expected prompts of both kinds, got 10 above 0 of 10"),
        (
            (states, harmful, torch.zeros(50)),
            "complied: expected answers that comply and that do not, got 0 above 0 of 50",
        ),
        ((states, harmful, complied / 0), "labels: expected finite numbers"),
    ):
        with pytest.raises(GuardError, match=message):
            fit_factored_cost(*given, MODEL, groups=groups)
    head = factored(1.0, 1.0)
    with pytest.raises(
        GuardError, match=r"hidden states \[n, 18\] of 'tiny' with the prompt's of layer 1, got \[2, 7\]"
    ):
        head.score(torch.zeros(2, 7))


def test_files_hold_all_of_it(tmp_path: Path) -> None:
    hidden, target = examples()
    head = fit_head(hidden, target, MODEL, "cost", boundary=3.0)
    head.save(tmp_path / "head.safetensors")
    read = HiddenHead.load(tmp_path / "head.safetensors")
    read.check(MODEL)
    assert (read.kind, read.model, read.boundary, read.fitted) == ("cost", MODEL, 3.0, head.fitted)
    assert torch.equal(read.score(hidden), head.score(hidden))


def test_files_of_others_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    hidden, target = examples()
    file = tmp_path / "head.safetensors"
    fit_head(hidden, target, MODEL, "reward").save(file)
    for other, word in (
        (replace(MODEL, hidden_size=8), "hidden size"),
        (replace(MODEL, embedding_sketch=(0.0, 1.0)), "weights"),
    ):
        with pytest.raises(GuardError, match=f"reward head: the reward head was made for 'tiny'.*{word}"):
            HiddenHead.load(file).check(other)
    with pytest.raises(GuardError, match=r"expected a file at .*, found none"):
        HiddenHead.load(tmp_path / "none")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(GuardError, match="the file is damaged"):
        HiddenHead.load(file)
    file.write_bytes(b"text")
    with pytest.raises(GuardError, match="not a readable safetensors file"):
        HiddenHead.load(file)


def test_bad_input_is_refused() -> None:
    hidden, target = examples(10)
    with pytest.raises(GuardError, match=r"expected \[n, 6\], \[n\] and \[n\], got \[10, 5\], \[10\] and \[10\]"):
        fit_head(hidden[:, :5], target, MODEL, "cost")
    with pytest.raises(GuardError, match="labels: expected safe and unsafe answers, got 0 above 0 of 10"):
        fit_head(hidden, -torch.ones(10), MODEL, "cost")
    with pytest.raises(GuardError, match="labels: expected finite numbers, got 1"):
        fit_head(hidden, target.index_fill(0, torch.tensor([3]), float("nan")), MODEL, "reward")
    with pytest.raises(GuardError, match="kind: expected 'cost' or 'reward', got 'harm'"):
        fit_head(hidden, target, MODEL, "harm")  # type: ignore[arg-type]
    with pytest.raises(GuardError, match="boundary: only a cost has one"):
        fit_head(hidden, target, MODEL, "reward", boundary=1.0)
    head = fit_head(hidden, target, MODEL, "cost")
    with pytest.raises(GuardError, match="cost head: expected hidden states with the answers, got none"):
        head(blocks_of(None, 2))
    with pytest.raises(GuardError, match=r"expected hidden states \[n, 6\] of 'tiny', got \[2, 7\]"):
        head(blocks_of(torch.zeros(2, 7), 2))


def test_states_that_are_not_finite_fail_closed() -> None:
    hidden, target = examples(20)
    broken = hidden[:3].clone()
    broken[1, 2] = float("nan")
    broken[2, 0] = float("inf")
    cost, reward = (fit_head(hidden, target, MODEL, kind) for kind in ("cost", "reward"))
    assert scores_of(cost, blocks_of(broken, 3), "cost").isinf().tolist() == [False, True, True]
    assert scores_of(reward, blocks_of(broken, 3), "reward")[1:].tolist() == [-float("inf")] * 2

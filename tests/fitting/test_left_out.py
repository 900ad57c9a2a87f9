"""Leaving styles out: neither the direction nor the threshold may know the style that it is judged on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steerfast.fitting.directions import fit_direction
from steerfast.fitting.left_out import common_styles, leave_one_style_out, rates_by_layer
from steerfast.judging.estimates import threshold_at_false_positive_rate
from steerfast.text.styles import Prompts

WIDTH, LAYERS, EACH = 6, 2, 30
STYLES = ("chat", "code", "verse")


def mean(harmful: Tensor, harmless: Tensor, plain: tuple[Tensor, Tensor]) -> Tensor:
    return fit_direction(harmful.double(), harmless.double(), "mean")


def made_up(generator: torch.Generator) -> tuple[Prompts, Prompts, tuple[Tensor, Tensor]]:
    """Harm lies along axis 0, more clearly in the second layer; ``verse`` hides it and lies along axis 1 instead."""
    sets, rows = [], []
    for harm in (1.0, 0.0):
        x = torch.randn(EACH * len(STYLES), LAYERS, WIDTH, generator=generator)
        styles = [style for style in STYLES for _ in range(EACH)]
        for i, style in enumerate(styles):
            x[i, :, 1 if style == "verse" else 0] += harm * torch.tensor([2.0, 4.0])
        texts = [f"{harm} {style} {i}" for i, style in enumerate(styles)]
        sets.append(Prompts(texts, styles))
        rows.append(x)
    return sets[0], sets[1], (rows[0], rows[1])


def test_figures_are_those_of_gates_fitted_without_the_style() -> None:
    harmful, harmless, rows = made_up(torch.Generator().manual_seed(0))
    figures = leave_one_style_out(harmful, harmless, rows, mean, score="dot", max_false_positive_rate=0.1)
    assert list(figures) == list(STYLES)

    def scores(style: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        out = torch.tensor([s == style for s in harmful.styles])
        bad, good = rows[0][:, layer].double(), rows[1][:, layer].double()
        direction = bad[~out].mean(0) - good[~out].mean(0)
        direction /= direction.norm()
        return (bad[out] @ direction).numpy(), (good[out] @ direction).numpy()

    for style, by_layer in figures.items():
        for layer, found in enumerate(by_layer):
            bad, good = scores(style, layer)
            others = np.concatenate([scores(other, layer)[1] for other in STYLES if other != style])
            limit = threshold_at_false_positive_rate(others, 0.1)
            assert found.auc.value == pytest.approx(roc_auc_score([1] * EACH + [0] * EACH, [*bad, *good]), abs=1e-12)
            assert found.hit_rate.value == pytest.approx((bad > limit).mean())
            assert found.false_positive_rate.value == pytest.approx((good > limit).mean())
    assert figures["chat"][1].auc.value > 0.95
    assert figures["verse"][1].auc.value < 0.8  # its harm lies where no other style shows any


def test_prompts_of_the_same_request_do_not_fit_the_gate_that_judges_it() -> None:
    harmful, harmless, rows = made_up(torch.Generator().manual_seed(1))
    kept: list[int] = []

    def fit(bad: Tensor, good: Tensor, plain: tuple[Tensor, Tensor]) -> Tensor:
        kept.append(len(bad))
        assert (len(plain[0]), len(plain[1])) == (len(bad), len(good))
        return mean(bad, good, plain)

    # Ten of the code prompts put requests of chat prompts; all verse prompts keep their own.
    requests = [*harmful.requests[:EACH], *harmful.requests[:10], *harmful.requests[EACH + 10 :]]
    leave_one_style_out(Prompts(harmful, harmful.styles, requests), harmless, rows, fit)
    assert kept[::LAYERS] == [2 * EACH - 10, 2 * EACH - 10, 2 * EACH]


def test_a_style_that_holds_every_request_cannot_be_left_out() -> None:
    harmful, harmless, rows = made_up(torch.Generator().manual_seed(2))
    shared = [f"request {i % EACH}" for i in range(len(harmful))]
    both = [Prompts(prompts, prompts.styles, shared) for prompts in (harmful, harmless)]
    assert leave_one_style_out(both[0], both[1], rows, mean) == {}


def test_one_style_or_few_prompts_of_it_give_no_figures() -> None:
    harmful, harmless, rows = made_up(torch.Generator().manual_seed(3))
    plain = Prompts(list(harmful)), Prompts(list(harmless))
    assert leave_one_style_out(*plain, rows, mean) == {}
    few = Prompts(harmful, ["rare"] * 7 + harmful.styles[7:])
    assert common_styles(few, Prompts(harmless, ["rare"] * 7 + harmless.styles[7:])) == list(STYLES)
    assert common_styles(harmful, Prompts(harmless, ["other"] * len(harmless))) == []


def test_rates_by_layer_are_short() -> None:
    harmful, harmless, rows = made_up(torch.Generator().manual_seed(4))
    figures = leave_one_style_out(harmful, harmless, rows, mean)["chat"]
    short = rates_by_layer(figures)
    assert short["auc"] == [round(f.auc.value, 4) for f in figures]
    assert short["hit_rate"] == [round(f.hit_rate.value, 4) for f in figures]
    assert (short["n_harmful"], short["n_harmless"]) == (EACH, EACH)

"""Figures of gates on styles of prompt that were left out of their fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerfast._progress import track
from steerfast.fitting.directions import project
from steerfast.judging.estimates import GateFigures, figures_by_layer, threshold_at_false_positive_rate
from steerfast.text.styles import PLAIN, Prompts

RATES = ("auc", "hit_rate", "false_positive_rate")
FitGate = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
"""Fits a direction [H] to one layer's rows of both sets, [n1, H] and [n0, H], with masks of the plain ones."""
Masks = tuple[Tensor, Tensor]
"""Prompts of both sets: bool [n1] and [n0]."""

_LEAST = 8  # prompts a side; figures on fewer say nothing


def leave_one_style_out(
    harmful: Prompts,
    harmless: Prompts,
    rows: tuple[Tensor, Tensor],
    fit: FitGate,
    *,
    score: str = "cosine",
    max_false_positive_rate: float = 0.02,
    progress: bool = False,
) -> dict[str, list[GateFigures]]:
    """Return figures of gates on styles they never saw: style -> figures per layer.

    For each style that both sets have enough of, directions are fitted without its prompts and without any other
    prompt of the same requests. Its threshold fires on `max_false_positive_rate` of the harmless prompts of the other
    styles, each scored when it was left out itself. So neither direction nor threshold saw the style.

    Args:
        rows: the rows that gates read, of both sets, [prompts, layers, H]. score: ``cosine`` or ``dot`` of such a row.

    Returns:
        Nothing for a style that shares its requests with all other prompts.
    """
    scores: dict[str, tuple[Tensor, Tensor]] = {}
    splits = style_splits(harmful, harmless)
    for style in track(list(splits), "styles left out", show=progress):
        out, kept = splits[style]
        plain = in_plain_style(harmful)[kept[0]], in_plain_style(harmless)[kept[1]]
        layers = range(rows[0].shape[1])
        directions = [fit(rows[0][kept[0], layer], rows[1][kept[1], layer], plain) for layer in layers]
        scores[style] = tuple(  # type: ignore[assignment]
            torch.stack([project(x[mask, layer], d, score) for layer, d in enumerate(directions)], dim=1)
            for x, mask in zip(rows, out, strict=True)
        )
    figures: dict[str, list[GateFigures]] = {}
    for style, (bad, good) in scores.items():
        others = [those for name, (_, those) in scores.items() if name != style]
        if not others:
            continue
        limits = [threshold_at_false_positive_rate(layer, max_false_positive_rate) for layer in torch.cat(others).T]
        figures[style] = figures_by_layer(bad, good, limits)
    return figures


def style_splits(harmful: Prompts, harmless: Prompts) -> dict[str, tuple[Masks, Masks]]:
    """Return for each style masks of its prompts, and of the prompts to fit on, which make other requests.

    A style is missing where either set has too few prompts of it, or too few to fit on.
    """
    splits = {}
    for style in common_styles(harmful, harmless):
        out = torch.tensor(harmful.in_style(style)), torch.tensor(harmless.in_style(style))
        kept = ~_same_requests(harmful, out[0]), ~_same_requests(harmless, out[1])
        if min(int(mask.sum()) for mask in kept) >= _LEAST:
            splits[style] = out, kept
    return splits


def in_plain_style(prompts: Prompts) -> Tensor:
    """Return bool [n]: prompts in plain style, or all where none is."""
    mask = torch.tensor(prompts.in_style(PLAIN))
    return mask if bool(mask.any()) else ~mask


def common_styles(harmful: Prompts, harmless: Prompts) -> list[str]:
    """Return the styles that have enough prompts for figures in both sets."""
    here, there = harmful.counts(), harmless.counts()
    return [style for style, count in here.items() if min(count, there.get(style, 0)) >= _LEAST]


def rates_by_layer(figures: Sequence[GateFigures]) -> dict[str, Any]:
    """Return a style's figures in few bytes: AUC, hit rate and false-positive rate of each layer, and counts."""
    return {
        **{name: [round(getattr(f, name).value, 4) for f in figures] for name in RATES},
        "n_harmful": figures[0].n_harmful,
        "n_harmless": figures[0].n_harmless,
    }


def _same_requests(prompts: Prompts, out: Tensor) -> Tensor:
    """Return bool [n]: prompts that make the same request as one in `out`."""
    requests = {request for request, left in zip(prompts.requests, out.tolist(), strict=True) if left}
    return torch.tensor([request in requests for request in prompts.requests])

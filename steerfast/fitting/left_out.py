"""Figures of gates on sources that were left out of their fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steerfast._progress import track
from steerfast.fitting.directions import project
from steerfast.fitting.labelled import Labelled
from steerfast.judging.estimates import grouped_auc

FitWithout = Callable[[Tensor, Labelled, Sequence[Tensor]], Sequence[Tensor]]
"""Fits directions [F] to the rows of one layer, [n, F], of labelled prompts: one without each fold, a mask bool [n]."""


def leave_sources_out(
    examples: Labelled, rows: Tensor, fit: FitWithout, *, score: str = "cosine", progress: bool = False
) -> Tensor | None:
    """Return each prompt's score by a direction that was fitted without its source: float64 [n, layers].

    Scores are counted from the middle of the classes that the direction was fitted to, because a direction of other
    prompts has another zero.

    Args:
        rows: what gates read, [n, layers, F]. score: ``cosine`` or ``dot`` of such a row.

    Returns:
        None where no source can be left out, see `Labelled.folds`.
    """
    folds = examples.folds()
    if not folds:
        return None
    scores = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for layer in track(range(rows.shape[1]), "sources left out", show=progress):
        here = rows[:, layer]
        for out, direction in zip(folds, fit(here, examples, folds), strict=True):
            found = project(here, direction, score)
            scores[out, layer] = found[out] - _middle(examples, found, ~out)
    return scores


def _middle(examples: Labelled, scores: Tensor, kept: Tensor) -> float:
    """Return the middle of the classes' weighted means, over the prompts that `kept`, bool [n], marks."""
    sides = examples.harmful & kept, ~examples.harmful & kept
    return sum(float(examples.weights[side] @ scores[side] / examples.weights[side].sum()) for side in sides) / 2


def auc_by_group(examples: Labelled, scores: Tensor) -> dict[str, dict[str, list[float]]]:
    """Return the AUC of the harmful prompts of each source and of each context by layer, in few bytes.

    It is taken against all harmless prompts, each source of these alike.

    Args:
        scores: [n, layers].

    Returns:
        Under ``source`` and ``context``: name -> AUC of each layer.
    """
    found: dict[str, dict[str, list[float]]] = {}
    by_layer = scores.numpy().T
    negatives = [places for (_, label), places in examples.groups().items() if label == "harmless"]
    negatives = negatives or [examples.rows("borderline")]
    for kind in ("source", "context"):
        found[kind] = {
            name: [round(grouped_auc([one[places]], [one[rest] for rest in negatives]).value, 4) for one in by_layer]
            for (name, label), places in examples.groups(kind).items()
            if label == "harmful"
        }
    return found

"""Figures of gates on sources that were left out of their fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
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
    values = scores.numpy()
    negatives = [places for (_, label), places in examples.groups().items() if label == "harmless"]
    negatives = negatives or [examples.rows("borderline")]
    for kind in ("source", "context"):
        harmful = {name: places for (name, label), places in examples.groups(kind).items() if label == "harmful"}
        found[kind] = {name: _auc_by_layer(values, places, negatives) for name, places in harmful.items()}
    return found


def _auc_by_layer(scores: NDArray[np.float64], harmful: list[int], harmless: list[list[int]]) -> list[float]:
    layers = range(scores.shape[1])
    return [round(grouped_auc([scores[harmful, i]], [scores[one, i] for one in harmless]).value, 4) for i in layers]

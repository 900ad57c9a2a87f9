"""Gate scores of prompts, without steering."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast.errors import ProfileError
from steerfast.fitting.activations import gate_reading, residual_rows
from steerfast.fitting.directions import project
from steerfast.fitting.row_cache import RowCache
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import check_list, encode, pad_token
from steerfast.text.examples import Prompt
from steerfast.text.template import check_template


@dataclass(frozen=True)
class Scores:
    """Scores of a profile's gates on prompts.

    scores: float32 [prompts], of the gate layer that is furthest above its threshold (the sensor, if there is one).
    layer: int64 [prompts], that layer. fired: bool [prompts], whether any gate opens.
    undecided: bool [prompts], whether none opens and some score lies in its gate's band (`SteeringProfile.undecided`).
    by_layer: float32 [prompts, layers], every layer's score, gate or not.
    """

    scores: Tensor
    layer: Tensor
    fired: Tensor
    undecided: Tensor
    by_layer: Tensor


@own_defaults
def score(
    model: nn.Module,
    tokenizer: Any,
    profile: SteeringProfile,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 16,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
) -> Scores:
    """Score prompts with the profile's gates; nothing is steered.

    Scores are of the unsteered residual stream. With one sensor they equal the run-time's; with ``sensor="own"`` a
    gate above a layer that fired reads an edited row at run time and may differ.

    Args:
        cache: a folder for the rows of prompts, see `gate_rows`.

    Raises:
        ProfileError: the profile belongs to another model, or has no gate.
        PromptError: no prompt, or one that is too long.
    """
    check_list("prompts", prompts)
    check_model(profile, model, tokenizer)
    gates = profile.gate_layers
    if not gates:
        raise ProfileError("profile: expected a gate to score, got one with gate.kind='always' or no steered layer")
    description = "scores" if progress else None
    by_layer = layer_scores(
        profile, model, tokenizer, prompts, batch_size=batch_size, description=description, cache=cache
    )
    margins = by_layer[:, gates] - profile.threshold[gates]
    layer = torch.tensor(gates, device="cpu")[margins.argmax(dim=1)]
    scores = by_layer.gather(1, layer[:, None])[:, 0]
    return Scores(scores, layer, (margins > 0).any(dim=1), profile.undecided(by_layer), by_layer)


def layer_scores(
    profile: SteeringProfile, model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], **reading: Any
) -> Tensor:
    """Return every layer's gate score of each prompt, float32 [prompts, layers]; `reading`: options of `gate_rows`."""
    return row_scores(profile, gate_rows(profile, model, tokenizer, prompts, **reading))


def gate_rows(
    profile: SteeringProfile,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    cache: str | os.PathLike[str] | None = None,
    **reading: Any,
) -> Tensor:
    """Return what a profile's gates read of each prompt, as `row_scores` takes it.

    Args:
        cache: a folder for the rows of prompts. reading: other options of `residual_rows`.
    """
    return residual_rows(
        model,
        encode(tokenizer, prompts, model),
        reduce=gate_reading(profile.gate)[0],
        pad_token_id=pad_token(tokenizer),
        cache=None if cache is None else RowCache(cache, model, profile.gate.header()),
        **reading,
    )


def row_scores(profile: SteeringProfile, rows: Tensor) -> Tensor:
    """Return every layer's gate score, float32 [prompts, layers], of the rows that `gate_reading` keeps.

    Args:
        rows: [prompts, layers, H], or [prompts, layers, 2, H] for a gate that reads both the last row and the mean.
    """
    read = {"last": [profile.direction], "mean": [profile.read_in_mean]}
    read["both"] = [*read["last"], *read["mean"]]
    kind = gate_reading(profile.gate)[1]
    rows = rows if rows.dim() == 4 else rows[:, :, None]
    scores = torch.zeros(rows.shape[:2], dtype=torch.float64, device="cpu")
    for part, directions in enumerate(read[profile.gate.pooling]):
        for layer in range(rows.shape[1]):
            scores[:, layer] += project(rows[:, layer, part], directions[layer], kind)
    return scores.float()


def check_model(profile: SteeringProfile, model: nn.Module, tokenizer: Any = None) -> None:
    """Refuse a profile of another model, tokenizer or chat template.

    Raises:
        ProfileError: naming both sides.

    Warns:
        TemplateWarning: the tokenizer has other arguments of its template than the profile's prompts had.
    """
    if (problem := profile.model.mismatch(identify(model, tokenizer))) is not None:
        raise ProfileError(f"profile: {problem}")
    check_template(profile.fitted, tokenizer)

"""An ungated profile of any behaviour, from contrastive pairs.

The vector of a layer points from the mean row of the negative sides to that of the positive ones (Rimsky et al. 2024,
arXiv 2312.06681), or is another direction of `fit_direction`. Its norm is a fixed share of the layer's median row
norm. So a strength means the same for every behaviour, layer and model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.activations import Reduce, answer_mean, last_token, residual_rows
from steerfast.fitting.directions import fit_direction
from steerfast.fitting.row_cache import RowCache
from steerfast.hf.generation import PromptBatch
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import context_of, encode, pad_token
from steerfast.text.examples import Prompt, unique_text
from steerfast.text.pairs import check_pairs, split_answer
from steerfast.text.prompts import describe_set
from steerfast.text.template import template_record

METHODS = ("mean", "pca", "logistic")
READS = ("answer", "last")
SHARE = 0.25
"""Norm of a vector over the median row norm of its layer.

With a vector for formal text on SmolLM2-135M-Instruct, strength 1 in total over a third of the layers keeps text fluent
(docs/behaviours.md).
"""

_BAND = (0.35, 0.65)  # of the depth
_FOLDS = 8


@dataclass(frozen=True, eq=False)
class Contrast:
    """Rows of pairs.

    positive, negative: float32 [n, layers, H]. norm: float32 [layers], the median norm of single rows.
    """

    positive: Tensor
    negative: Tensor
    norm: Tensor

    def direction(self, layer: int, method: str, left_out: Sequence[int] = ()) -> Tensor:
        """Return a layer's direction, float64 [H] of norm 1, without the pairs `left_out`.

        Raises:
            PromptError: both sides have the same mean row.
        """
        kept = [i for i in range(len(self.positive)) if i not in left_out]
        sides = self.positive[kept, layer], self.negative[kept, layer]
        if torch.equal(*(side.mean(dim=0, dtype=torch.float64) for side in sides)):
            raise PromptError(f"pairs: expected sides with different mean rows, got the same mean at layer {layer}")
        return fit_direction(*sides, method)

    def pairs_right(self, layer: int, method: str) -> list[int] | None:
        """Return how many pairs a direction of other pairs tells apart, and the number of pairs; None of one pair."""
        count = len(self.positive)
        if count < 2:
            return None
        right = 0
        for fold in range(min(_FOLDS, count)):
            out = range(fold, count, _FOLDS)
            direction = self.direction(layer, method, out)
            right += int(((self.positive - self.negative)[list(out), layer].double() @ direction > 0).sum())
        return [right, count]


def read_pairs(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    read: Literal["answer", "last"] | None = None,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: bool = True,
) -> tuple[Contrast, str]:
    """Return the rows of pairs, and the name of the position that was read.

    Args:
        read: ``answer``: the mean over the answer's rows; ``last``: the last row of what is read. Default: ``answer``
            where the pairs have answers.
        cache: a folder for the rows.

    Raises:
        PromptError: as `check_pairs`; a pair that is too long, an answer without a token.
        ProfileError: an unknown position, or ``answer`` without answers.
    """
    check_pairs(positive, negative)
    parts = [split_answer(chat) for chat in [*positive, *negative]]
    answered = parts[0][1] is not None
    chosen = read or ("answer" if answered else "last")
    if chosen not in READS:
        raise ProfileError(f"read: expected one of {', '.join(READS)}, got {read!r}")
    if chosen == "answer" and not answered:
        raise ProfileError("read: expected 'last' for pairs without answers, got 'answer'")
    prompts = encode(tokenizer, [before for before, _ in parts], model)
    starts = [len(ids) if answered else 0 for ids in prompts]
    sequences = _with_answers(prompts, [answer for _, answer in parts], tokenizer, context_of(model))
    rows = residual_rows(
        model,
        sequences,
        reduce=_reading(starts, chosen),
        batch_size=batch_size,
        pad_token_id=pad_token(tokenizer),
        description="pairs" if progress else None,
        cache=None if cache is None else RowCache(cache, model, ["pairs", chosen], starts),
    )
    positive_rows, negative_rows = rows[:, :, 0].split(len(positive))
    norm = rows[:, :, 1].norm(dim=2).median(dim=0).values
    return Contrast(positive_rows, negative_rows, norm), chosen


def contrast_profile(
    model: nn.Module,
    tokenizer: Any,
    rows: Contrast,
    behaviour: str,
    *,
    method: str = "mean",
    layers: tuple[int, int] | None = None,
) -> SteeringProfile:
    """Return a profile that always adds, at strength 1 in total over a band of layers.

    Args:
        method: of `METHODS`. layers: first and last layer of the band; default: a third of the depth, in the middle.

    Raises:
        ProfileError: an unknown method, or layers out of range.
        PromptError: sides with the same mean row.
    """
    if method not in METHODS:
        raise ProfileError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    identity = identify(model, tokenizer)
    count = identity.num_layers
    first, last = layers or (round(_BAND[0] * count), max(round(_BAND[0] * count), round(_BAND[1] * count) - 1))
    if not 0 <= first <= last < count:
        raise ProfileError(f"layers: expected 0 <= first <= last < {count}, got ({first}, {last})")
    directions = torch.stack([rows.direction(layer, method) for layer in range(count)])
    vectors = (directions * (SHARE * rows.norm.double())[:, None]).float()
    profile = SteeringProfile.from_tensors(
        dict(enumerate(vectors)),
        identity,
        strength=0.0,
        norm=rows.norm,
        positions="response",
        vector_kind=behaviour,
        fitted={
            "behaviour": behaviour,
            "method": method,
            "share": SHARE,
            **template_record(tokenizer),
            "pairs_right": rows.pairs_right(last, method),
        },
    )
    return at_total(profile, range(first, last + 1), 1.0)


def at_total(profile: SteeringProfile, layers: Sequence[int], total: float) -> SteeringProfile:
    """Return the profile with this strength in total over `layers`, each with its part."""
    return profile.with_band(list(layers), round(total / len(layers), 6))


def describe_pairs(positive: Sequence[Prompt], negative: Sequence[Prompt], name: str | None) -> dict[str, Any]:
    """Return name, count and hash of pairs, for a profile's provenance."""
    texts = [f"{unique_text(one)}\0{unique_text(other)}" for one, other in zip(positive, negative, strict=True)]
    return describe_set(texts, name)


def common_prompts(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that both sides of a pair share, each once: what is left without answer and system message."""
    found: dict[str, Prompt] = {}
    for pair in zip(positive, negative, strict=True):
        one, other = (_bare(chat) for chat in pair)
        if one and one == other:
            found.setdefault(unique_text(one), one)
    return list(found.values())


def _bare(chat: Prompt) -> Prompt:
    before = split_answer(chat)[0]
    return before if isinstance(before, str) else [message for message in before if message["role"] != "system"]


def _with_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[str | None], tokenizer: Any, most: int
) -> list[list[int]]:
    """Return the token ids of prompts with their answers."""
    found = []
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        number = place % (len(prompts) // 2) + 1
        ids = [] if answer is None else tokenizer(answer, add_special_tokens=False)["input_ids"]
        if answer is not None and not ids:
            raise PromptError(f"pairs: entry {number}: expected answers with a token, got {answer!r}")
        if len(prompt) + len(ids) > most:
            raise PromptError(
                f"pairs: entry {number} has {len(prompt) + len(ids)} tokens, the model's context leaves room for {most}"
            )
        found.append([*prompt, *ids])
    return found


def _reading(starts: Sequence[int], read: str) -> Reduce:
    """Return a reduction to what is read of each sequence, and its row of median norm: [N, T, H] -> [N, 2, H].

    Args:
        starts: by sequence the first row that counts: the answer's, else 0.
    """
    whole = answer_mean(starts, 2**31)

    def reduce(hidden: Tensor, batch: PromptBatch) -> Tensor:
        first = torch.tensor([starts[i] for i in batch.indices], device=hidden.device)[:, None]
        counts = batch.mask.bool().to(hidden.device) & (batch.positions.to(hidden.device) >= first)
        # Rows that do not count may hold NaN: they come last.
        length = torch.where(counts, hidden.float().norm(dim=-1), torch.inf)
        middle = length.argsort(dim=1).gather(1, (counts.sum(dim=1, keepdim=True) - 1) // 2)[:, 0]
        row = hidden[torch.arange(len(hidden), device=hidden.device), middle]
        reading = whole(hidden, batch) if read == "answer" else last_token(hidden, batch)
        return torch.stack([reading.double(), row.double()], dim=1)

    return reduce

"""Extract guidance from a model: what its gates read, and what is added where they open."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, ProfileError, PromptError
from steerfast.fitting.activations import answer_mean, gate_reading, last_token, residual_rows
from steerfast.fitting.directions import fit_direction, project, unit
from steerfast.fitting.left_out import FitGate, in_plain_style, leave_one_style_out, rates_by_layer
from steerfast.hf.generation import PromptBatch, greedy_answers
from steerfast.hf.structure import identify
from steerfast.judging.estimates import threshold_midpoint
from steerfast.profile import Gate, ModelIdentity, SteeringProfile
from steerfast.text.encoding import encode, pad_token
from steerfast.text.prompts import check_sets, describe_set
from steerfast.text.styles import Prompts

VECTOR_KINDS = ("alignment", "ssv", "forced", "srv")
FORCED_REFUSAL = "I'm sorry, but I can't help with that. It could cause serious harm to people."
_FORCED_TOKENS = 12

# Before `tune` has searched: a middle band, at a total strength that moves a row by about one class difference.
_UNTUNED_BAND = (0.35, 0.65)
_UNTUNED_STRENGTH = 0.3


def extract(
    model: nn.Module,
    tokenizer: Any,
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    aligned_model: nn.Module | None = None,
    gate: Literal["lda", "mean", "pca", "logistic"] = "lda",
    score: Literal["cosine", "dot"] = "cosine",
    pooling: Literal["last", "mean"] = "last",
    window: int | None = None,
    vectors: Sequence[str] | None = None,
    unit_norm: bool = False,
    refusal: str | None = None,
    shrinkage: float | None = None,
    batch_size: int = 16,
    padding_side: Literal["left", "right"] = "right",
    names: dict[str, str] | None = None,
    progress: bool = True,
) -> SteeringProfile:
    """Fit gate directions and steering vectors for every decoder layer of `model`.

    Directions come from the target model's residual rows at the last prompt token of both sets (arXiv 2401.11206), or
    at all tokens of the prompts (`pooling`); steering vectors always from single rows. The sign convention is harmless
    -> harmful throughout.

    Args:
        model, tokenizer: the target model; chat prompts are templated as generation would.
        harmful, harmless: prompts; no prompt may be in both. `Prompts` of several styles (`restyle` makes them) are
            also fitted with each style left out in turn; ``fitted["left_out"]`` tells how its gates did on that style.
            Steering vectors come from those in plain style alone, where there are any.
        aligned_model: a sibling of the same geometry that refuses; the source of ``ssv`` and ``alignment``.
        gate: how directions are fitted, see `steerfast.fitting.directions.fit_direction`.
        score: what the gate will compare with its threshold; ``cosine`` fits on unit rows.
        pooling, window: whether the gate will read the score of a prompt's ``last`` token or the ``mean`` over the last
            `window` of them, see `steerfast.profile.Gate`; directions are fitted on what it reads.
        vectors: the kinds of steering vector to make, the first one selected, the rest kept for `tune`:
            ``ssv``: the aligned model's mean difference (the paper's safety steering vector);
            ``alignment``: ``ssv`` minus the target's own mean difference, what alignment added;
            ``forced``: the target's mean rows over a refusal put in its mouth, minus those over its own answer to the
            same harmful prompts, first 12 answer tokens (needs no sibling);
            ``srv``: the target's own mean difference (needs no sibling).
            Default: ``alignment, ssv, forced`` with a sibling, ``forced, srv`` without.
        unit_norm: scale each steering vector to norm 1 (the paper); otherwise residual-stream units.
        refusal: the text that ``forced`` puts in the model's mouth; default: the aligned model's own answers where
            there is one, else `FORCED_REFUSAL`.
        shrinkage: for ``lda``: weight of the identity; default Ledoit-Wolf.
        names: what to call the prompt sets in the profile (``{"harmful": ..., "harmless": ...}``).

    Returns:
        A profile with midpoint thresholds on these prompts and an untuned middle band; `calibrate` and `tune` next.

    Raises:
        PromptError: an empty, one-sided, overlapping or too long prompt set.
        ArchitectureError: an unpatchable model, or a sibling of another geometry.
        SteerfastError: non-finite activations.
    """
    check_sets(harmful, harmless)
    harmful, harmless = Prompts(harmful), Prompts(harmless)
    kinds = _kinds(vectors, aligned_model)
    reads = Gate(kind="prompt", score=score, pooling=pooling, window=window)
    read, read_score = gate_reading(reads)
    identity = identify(model, tokenizer)
    if aligned_model is not None:
        check_sibling(identity, aligned_model)
    harmful_ids = encode(tokenizer, harmful, model, room=_FORCED_TOKENS if "forced" in kinds else 0)
    harmless_ids = encode(tokenizer, harmless, model)

    def rows_of(source: nn.Module, sequences: Sequence[Sequence[int]], what: str, **options: Any) -> Tensor:
        return residual_rows(
            source, sequences, batch_size=batch_size, padding_side=padding_side, pad_token_id=pad_token(tokenizer),
            description=what if progress else None, **options,
        )  # fmt: skip

    def last_and_read(hidden: Tensor, batch: PromptBatch) -> Tensor:
        return torch.stack([last_token(hidden, batch).double(), read(hidden, batch)], dim=1)

    every = harmful_ids + harmless_ids
    if read is last_token:
        both = pooled = rows_of(model, every, "target activations")
    else:
        both, pooled = rows_of(model, every, "target activations", reduce=last_and_read).unbind(dim=2)
    rows = both[: len(harmful_ids)], both[len(harmful_ids) :]
    gate_rows = pooled[: len(harmful_ids)], pooled[len(harmful_ids) :]
    plain = in_plain_style(harmful), in_plain_style(harmless)
    bad_ids, good_ids = (
        list(compress(ids, mask)) for ids, mask in zip((harmful_ids, harmless_ids), plain, strict=True)
    )
    made: dict[str, Tensor] = {}
    if {"srv", "alignment"} & set(kinds):
        made["srv"] = _mean_difference(rows[0][plain[0]], rows[1][plain[1]])
    if aligned_model is not None and {"ssv", "alignment"} & set(kinds):
        sibling = rows_of(aligned_model, bad_ids + good_ids, "sibling activations")
        made["ssv"] = _mean_difference(sibling[: len(bad_ids)], sibling[len(bad_ids) :])
        if "alignment" in kinds:
            made["alignment"] = made["ssv"] - made["srv"]
    if "forced" in kinds:

        def answers_of(source: nn.Module, what: str) -> list[list[int]]:
            description = what if progress else None
            return greedy_answers(source, tokenizer, bad_ids, _FORCED_TOKENS, description=description)

        if refusal is None and aligned_model is not None:
            refusals = answers_of(aligned_model, "sibling answers")
        else:
            text = FORCED_REFUSAL if refusal is None else refusal
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:_FORCED_TOKENS]
            refusals = [ids] * len(bad_ids)
        made["forced"] = _answer_difference(rows_of, model, bad_ids, refusals, answers_of(model, "own answers"))
    for kind, vector in made.items():
        _check_vector(kind, vector)

    def fit_gate(bad: Tensor, good: Tensor, plain: tuple[Tensor, Tensor]) -> Tensor:
        # A cosine gate sees only where a row points, so the fit sees no more than that.
        pair = [x.double() / x.double().norm(dim=1, keepdim=True) if read_score == "cosine" else x for x in (bad, good)]
        means_of = plain if gate == "lda" else None
        return unit(fit_direction(pair[0], pair[1], gate, shrinkage=shrinkage, means_of=means_of))

    direction, threshold = _fit_gates(gate_rows, plain, fit_gate, read_score)
    left_out = leave_one_style_out(harmful, harmless, gate_rows, fit_gate, score=read_score, progress=progress)
    lengths = made[kinds[0]].norm(dim=1)
    if unit_norm:
        made = {kind: vector / vector.norm(dim=1, keepdim=True) for kind, vector in made.items()}
    strength = torch.zeros(identity.num_layers, dtype=torch.float32, device="cpu")
    first, last = (round(share * identity.num_layers) for share in _UNTUNED_BAND)
    band = slice(first, max(first + 1, last))
    strength[band] = _UNTUNED_STRENGTH * (lengths[band].float() if unit_norm else 1.0)
    names = names or {}
    return SteeringProfile(
        model=identity,
        direction=direction,
        threshold=threshold,
        vector=made[kinds[0]].float(),
        strength=strength,
        norm=both.norm(dim=2).double().mean(dim=0).float(),
        gate=reads,
        vector_kind=kinds[0],
        candidates={kind: made[kind].float() for kind in kinds[1:]},
        fitted={
            "direction": gate,
            "shrinkage": shrinkage,
            "vectors": list(kinds),
            "unit_norm": unit_norm,
            "aligned_model": identify(aligned_model).name if aligned_model is not None else None,
            "harmful": describe_set(harmful, names.get("harmful")),
            "harmless": describe_set(harmless, names.get("harmless")),
            "left_out": {style: rates_by_layer(figures) for style, figures in left_out.items()},
        },
    )


def _kinds(vectors: Sequence[str] | None, aligned_model: nn.Module | None) -> tuple[str, ...]:
    kinds = vectors or (("alignment", "ssv", "forced") if aligned_model is not None else ("forced", "srv"))
    kinds = tuple(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    for kind in kinds:
        if kind not in VECTOR_KINDS:
            raise ProfileError(f"vectors: expected some of {', '.join(VECTOR_KINDS)}, got {kind!r}")
        if kind in ("alignment", "ssv") and aligned_model is None:
            raise ProfileError(f"vectors: {kind!r} is taken from an aligned model, but aligned_model is None")
    return kinds


def check_sibling(identity: ModelIdentity, aligned_model: nn.Module) -> None:
    """Refuse a sibling of another geometry: ArchitectureError, naming both sides."""
    sibling = identify(aligned_model)
    for what in ("hidden_size", "num_layers"):
        mine, theirs = getattr(identity, what), getattr(sibling, what)
        if mine != theirs:
            raise ArchitectureError(
                f"aligned_model: expected the geometry of {identity.name!r} ({what} {mine}), "
                f"got {sibling.name!r} ({what} {theirs})"
            )


def _mean_difference(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Difference of the mean rows, float64 [layers, H]."""
    return harmful.mean(dim=0, dtype=torch.float64) - harmless.mean(dim=0, dtype=torch.float64)


def _answer_difference(
    rows_of: Any, model: nn.Module, prompts: list[list[int]], refusals: list[list[int]], answers: list[list[int]]
) -> Tensor:
    """Mean row of `model` over the refusals' tokens minus that over its own answers', float64 [layers, H]."""
    triples = [(p, r, a) for p, r, a in zip(prompts, refusals, answers, strict=True) if r and a]
    if not triples:
        raise PromptError("harmful: expected an answer to at least one prompt, got only empty answers")
    reduce = answer_mean([len(prompt) for prompt, _, _ in triples], _FORCED_TOKENS)
    refused = rows_of(model, [p + r for p, r, _ in triples], "refusals", reduce=reduce)
    complied = rows_of(model, [p + a for p, _, a in triples], "compliance", reduce=reduce)
    return refused.mean(dim=0, dtype=torch.float64) - complied.mean(dim=0, dtype=torch.float64)


def _fit_gates(
    rows: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], fit: FitGate, score: str
) -> tuple[Tensor, Tensor]:
    """Directions float32 [layers, H] and midpoint thresholds float32 [layers]."""
    directions, thresholds = [], []
    for layer in range(rows[0].shape[1]):
        pair = rows[0][:, layer], rows[1][:, layer]
        direction = fit(*pair, plain).float()
        directions.append(direction)
        thresholds.append(threshold_midpoint(*(project(x, direction, score).numpy() for x in pair)))
    return torch.stack(directions), torch.tensor(thresholds, dtype=torch.float32, device="cpu")


def _check_vector(kind: str, vector: Tensor) -> None:
    if not bool(vector.any(dim=1).all()):
        layer = int((~vector.any(dim=1)).nonzero()[0])
        raise ProfileError(
            f"vectors: {kind!r} is zero at layer {layer}; is the aligned model another model than the target?"
        )

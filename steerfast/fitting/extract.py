"""Extract guidance from a model: the directions that its gates read, and the vectors that open gates add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast._options import read_options
from steerfast.errors import ArchitectureError, ProfileError, PromptError
from steerfast.fitting.activations import Reduce, answer_mean, gate_reading, last_token, residual_rows
from steerfast.fitting.directions import fit_direction, project, unit
from steerfast.fitting.left_out import FitGate, Masks, in_plain_style, leave_one_style_out, rates_by_layer
from steerfast.hf.generation import PromptBatch, greedy_answers
from steerfast.hf.structure import identify
from steerfast.judging.estimates import threshold_midpoint
from steerfast.profile import EDITS, Gate, ModelIdentity, SteeringProfile
from steerfast.text.encoding import encode, pad_token
from steerfast.text.prompts import check_sets, describe_set
from steerfast.text.styles import Prompts

VECTOR_KINDS = ("alignment", "ssv", "forced", "srv")
FORCED_REFUSAL = "I'm sorry, but I can't help with that. It could cause serious harm to people."
_FORCED_TOKENS = 12

# Before `tune` has searched: a middle band, at a total strength that moves a row by about one class difference.
_UNTUNED_BAND = (0.35, 0.65)
_UNTUNED_STRENGTH = 0.3


@dataclass(frozen=True)
class ExtractOptions:
    """Options of `extract`.

    Args:
        aligned_model: a sibling of the same geometry that refuses; the source of ``ssv`` and ``alignment``.
        gate: how directions are fitted, see `steerfast.fitting.directions.fit_direction`.
        gate_kind, sharpness: when the gate decides, and its slope; see `steerfast.profile.Gate`. Directions are fitted
            for every kind.
        score: the score that the gate compares with its threshold; ``cosine`` fits on unit rows.
        pooling, window: whether the gate reads the score of the ``last`` token of a prompt or the ``mean`` over the
            last `window` tokens, see `steerfast.profile.Gate`; directions are fitted on the same reading.
        edit, low, high, angle: how an open gate changes a row, see `steerfast.profile.SteeringProfile`. The strength
            of ``ablate``, ``clamp`` and ``rotate`` is 1, so that the edit is complete.
        vectors: the kinds of steering vector to make, the first one selected, the rest kept for `tune`:
            ``ssv``: the aligned model's mean difference (the paper's safety steering vector);
            ``alignment``: ``ssv`` minus the target's own mean difference, the part that alignment added;
            ``forced``: the target's mean rows over a refusal put in its mouth, minus those over its own answer to the
            same harmful prompts, first 12 answer tokens (needs no sibling);
            ``srv``: the target's own mean difference (needs no sibling).
            Default: ``alignment, ssv, forced`` with a sibling, ``forced, srv`` without.
        unit_norm: scale each steering vector to norm 1 (the paper); otherwise residual-stream units.
        refusal: the text that ``forced`` puts in the model's mouth; default: the aligned model's own answers where
            there is one, else `FORCED_REFUSAL`.
        shrinkage: for ``lda``: weight of the identity; default Ledoit-Wolf.
        names: names of the prompt sets in the profile (``{"harmful": ..., "harmless": ...}``).
    """

    aligned_model: nn.Module | None = None
    gate: Literal["lda", "mean", "pca", "logistic"] = "lda"
    gate_kind: Literal["prompt", "token", "always"] = "prompt"
    sharpness: float = 0.0
    score: Literal["cosine", "dot"] = "cosine"
    pooling: Literal["last", "mean"] = "last"
    window: int | None = None
    edit: str = "add"
    low: float = -inf
    high: float = inf
    angle: float | None = None
    vectors: Sequence[str] | None = None
    unit_norm: bool = False
    refusal: str | None = None
    shrinkage: float | None = None
    batch_size: int = 16
    padding_side: Literal["left", "right"] = "right"
    names: dict[str, str] | None = None
    progress: bool = True


def extract(
    model: nn.Module, tokenizer: Any, *, harmful: Sequence[str], harmless: Sequence[str], **options: Any
) -> SteeringProfile:
    """Fit gate directions and steering vectors for every decoder layer of `model`.

    Directions come from the target model's residual rows at the last prompt token of both sets (arXiv 2401.11206), or
    at all tokens of the prompts (`pooling`); steering vectors always from single rows. The sign convention is harmless
    -> harmful throughout.

    Args:
        model, tokenizer: the target model; chat prompts are templated as generation would.
        harmful, harmless: prompts; no prompt may be in both. `Prompts` of several styles (`restyle` makes them) are
            also fitted with each style left out in turn; ``fitted["left_out"]`` holds the figures on that style.
            Steering vectors come from the prompts in plain style alone, where there are any.
        options: see `ExtractOptions`.

    Returns:
        A profile with midpoint thresholds on these prompts and an untuned middle band; `calibrate` and `tune` next.

    Raises:
        PromptError: an empty, one-sided, overlapping or too long prompt set.
        ProfileError: options that contradict one another, such as an edit and a limit that it does not have.
        ArchitectureError: an unpatchable model, or a sibling of another geometry.
        SteerfastError: non-finite activations.
        TypeError: an unknown option.
    """
    chosen = read_options("extract", ExtractOptions, options)
    check_sets(harmful, harmless)
    kinds = _kinds(chosen.vectors, chosen.aligned_model)
    outline = _outline(identify(model, tokenizer), chosen)
    if chosen.aligned_model is not None:
        check_sibling(outline.model, chosen.aligned_model)
    sets = _encode_sets(model, tokenizer, harmful, harmless, room=_FORCED_TOKENS if "forced" in kinds else 0)
    source = _RowSource(tokenizer, chosen)
    rows, reading = _target_rows(model, sets, outline.gate, source)
    vectors = _steering_vectors(model, kinds, sets, rows, source)
    outline = replace(outline, norm=rows.norm(dim=2).double().mean(dim=0).float())
    return _with_vectors(_with_gates(outline, sets, reading, chosen), vectors, kinds, chosen)


def _outline(identity: ModelIdentity, options: ExtractOptions) -> SteeringProfile:
    """Return the profile with nothing fitted: it checks the options of gate and edit before any work."""
    wide = torch.zeros(identity.num_layers, identity.hidden_size, dtype=torch.float32, device="cpu")
    return SteeringProfile(
        model=identity,
        direction=wide,
        threshold=wide[:, 0],
        vector=wide,
        strength=wide[:, 0],
        norm=wide[:, 0],
        gate=Gate(options.gate_kind, options.score, options.sharpness, options.pooling, options.window),
        edit=options.edit,
        low=options.low,
        high=options.high,
        angle=options.angle,
    )


@dataclass(frozen=True)
class _EncodedSets:
    """Both prompt sets, their token ids, and masks of the prompts in plain style."""

    harmful: Prompts
    harmless: Prompts
    harmful_ids: list[list[int]]
    harmless_ids: list[list[int]]
    plain: Masks

    @property
    def plain_ids(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts in plain style, of both sets."""
        return (
            list(compress(self.harmful_ids, self.plain[0])),
            list(compress(self.harmless_ids, self.plain[1])),
        )


def _encode_sets(
    model: nn.Module, tokenizer: Any, harmful: Sequence[str], harmless: Sequence[str], room: int
) -> _EncodedSets:
    bad, good = Prompts(harmful), Prompts(harmless)
    ids = encode(tokenizer, bad, model, room=room), encode(tokenizer, good, model)
    return _EncodedSets(bad, good, *ids, (in_plain_style(bad), in_plain_style(good)))


@dataclass(frozen=True)
class _RowSource:
    """Residual rows and answers, with the tokenizer and the options of one extraction."""

    tokenizer: Any
    options: ExtractOptions

    def rows(
        self, model: nn.Module, sequences: Sequence[Sequence[int]], description: str, reduce: Reduce = last_token
    ) -> Tensor:
        """Return `residual_rows` of the sequences."""
        return residual_rows(
            model,
            sequences,
            reduce=reduce,
            batch_size=self.options.batch_size,
            padding_side=self.options.padding_side,
            pad_token_id=pad_token(self.tokenizer),
            description=description if self.options.progress else None,
        )

    def answers(self, model: nn.Module, prompts: Sequence[Sequence[int]], description: str) -> list[list[int]]:
        """Return the first tokens of the greedy answers."""
        shown = description if self.options.progress else None
        return greedy_answers(model, self.tokenizer, prompts, _FORCED_TOKENS, description=shown)


def _target_rows(model: nn.Module, sets: _EncodedSets, gate: Gate, source: _RowSource) -> tuple[Tensor, Tensor]:
    """Return the last rows of all prompts, harmful first, and the rows that the gate reads: [n1 + n0, layers, H]."""
    read = gate_reading(gate)[0]
    every = sets.harmful_ids + sets.harmless_ids
    if read is last_token:
        rows = source.rows(model, every, "target activations")
        return rows, rows

    def last_and_read(hidden: Tensor, batch: PromptBatch) -> Tensor:
        return torch.stack([last_token(hidden, batch).double(), read(hidden, batch)], dim=1)

    rows, reading = source.rows(model, every, "target activations", last_and_read).unbind(dim=2)
    return rows, reading


def _steering_vectors(
    model: nn.Module, kinds: Sequence[str], sets: _EncodedSets, rows: Tensor, source: _RowSource
) -> dict[str, Tensor]:
    """Return the steering vectors of `kinds`, and those that they are made of: kind -> float64 [layers, H]."""
    sibling, count = source.options.aligned_model, len(sets.harmful)
    bad_ids, good_ids = sets.plain_ids
    made: dict[str, Tensor] = {}
    if {"srv", "alignment"} & set(kinds):
        made["srv"] = _mean_difference(rows[:count][sets.plain[0]], rows[count:][sets.plain[1]])
    if sibling is not None and {"ssv", "alignment"} & set(kinds):
        of_sibling = source.rows(sibling, bad_ids + good_ids, "sibling activations")
        made["ssv"] = _mean_difference(of_sibling[: len(bad_ids)], of_sibling[len(bad_ids) :])
        if "alignment" in kinds:
            made["alignment"] = made["ssv"] - made["srv"]
    if "forced" in kinds:
        made["forced"] = _forced_vector(model, bad_ids, source)
    for kind, vector in made.items():
        _check_vector(kind, vector)
    return made


def _forced_vector(model: nn.Module, prompts: list[list[int]], source: _RowSource) -> Tensor:
    """Return the mean row over refusals minus that over the model's own answers, float64 [layers, H]."""
    sibling, refusal = source.options.aligned_model, source.options.refusal
    if refusal is None and sibling is not None:
        refusals = source.answers(sibling, prompts, "sibling answers")
    else:
        text = FORCED_REFUSAL if refusal is None else refusal
        refusals = [source.tokenizer(text, add_special_tokens=False)["input_ids"][:_FORCED_TOKENS]] * len(prompts)
    answers = source.answers(model, prompts, "own answers")
    triples = [(p, r, a) for p, r, a in zip(prompts, refusals, answers, strict=True) if r and a]
    if not triples:
        raise PromptError("harmful: expected an answer to at least one prompt, got only empty answers")
    reduce = answer_mean([len(prompt) for prompt, _, _ in triples], _FORCED_TOKENS)
    refused = source.rows(model, [p + r for p, r, _ in triples], "refusals", reduce)
    complied = source.rows(model, [p + a for p, _, a in triples], "compliance", reduce)
    return refused.mean(dim=0, dtype=torch.float64) - complied.mean(dim=0, dtype=torch.float64)


def _with_gates(
    outline: SteeringProfile, sets: _EncodedSets, reading: Tensor, options: ExtractOptions
) -> SteeringProfile:
    """Return the profile with directions, midpoint thresholds and figures on styles that were left out."""
    score = gate_reading(outline.gate)[1]
    rows = reading[: len(sets.harmful)], reading[len(sets.harmful) :]

    def fit_gate(bad: Tensor, good: Tensor, plain: Masks) -> Tensor:
        # A cosine gate sees only the direction of a row, so the fit sees no more than that.
        pair = [x.double() / x.double().norm(dim=1, keepdim=True) if score == "cosine" else x for x in (bad, good)]
        means_of = plain if options.gate == "lda" else None
        return unit(fit_direction(pair[0], pair[1], options.gate, shrinkage=options.shrinkage, means_of=means_of))

    direction, threshold = _fit_gates(rows, sets.plain, fit_gate, score)
    left_out = leave_one_style_out(sets.harmful, sets.harmless, rows, fit_gate, score=score, progress=options.progress)
    sibling, names = options.aligned_model, options.names or {}
    fitted = {
        "direction": options.gate,
        "shrinkage": options.shrinkage,
        "unit_norm": options.unit_norm,
        "aligned_model": identify(sibling).name if sibling is not None else None,
        "harmful": describe_set(sets.harmful, names.get("harmful")),
        "harmless": describe_set(sets.harmless, names.get("harmless")),
        "left_out": {style: rates_by_layer(figures) for style, figures in left_out.items()},
    }
    return replace(outline, direction=direction, threshold=threshold, fitted=fitted)


def _with_vectors(
    profile: SteeringProfile, vectors: dict[str, Tensor], kinds: Sequence[str], options: ExtractOptions
) -> SteeringProfile:
    """Return the profile with the first of `kinds` at an untuned strength, and the others as candidates."""
    lengths = vectors[kinds[0]].norm(dim=1)
    if options.unit_norm:
        vectors = {kind: vector / vector.norm(dim=1, keepdim=True) for kind, vector in vectors.items()}
    layers = profile.model.num_layers
    strength = torch.zeros(layers, dtype=torch.float32, device="cpu")
    first, last = (round(share * layers) for share in _UNTUNED_BAND)
    band = slice(first, max(first + 1, last))
    adds = EDITS[options.edit].adds
    strength[band] = _UNTUNED_STRENGTH * (lengths[band].float() if options.unit_norm else 1.0) if adds else 1.0
    return replace(
        profile,
        vector=vectors[kinds[0]].float(),
        strength=strength,
        vector_kind=kinds[0],
        candidates={kind: vectors[kind].float() for kind in kinds[1:]},
        fitted={**profile.fitted, "vectors": list(kinds)},
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
    """Raise ArchitectureError for a sibling of another geometry; it names both sides."""
    sibling = identify(aligned_model)
    for size in ("hidden_size", "num_layers"):
        expected, given = getattr(identity, size), getattr(sibling, size)
        if expected != given:
            raise ArchitectureError(
                f"aligned_model: expected the geometry of {identity.name!r} ({size} {expected}), "
                f"got {sibling.name!r} ({size} {given})"
            )


def _mean_difference(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Return the difference of the mean rows, float64 [layers, H]."""
    return harmful.mean(dim=0, dtype=torch.float64) - harmless.mean(dim=0, dtype=torch.float64)


def _fit_gates(rows: tuple[Tensor, Tensor], plain: Masks, fit: FitGate, score: str) -> tuple[Tensor, Tensor]:
    """Return directions float32 [layers, H] and midpoint thresholds float32 [layers]."""
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

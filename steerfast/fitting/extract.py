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
from steerfast.fitting.left_out import Masks, in_plain_style, leave_one_style_out, rates_by_layer
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
        gate_kind, sharpness, score, pooling, window: the gate, see `steerfast.profile.Gate`. Directions are fitted on
            what it reads, ``cosine`` on unit rows.
        edit, low, high, angle: how an open gate changes a row, see `steerfast.profile.SteeringProfile`. The strength
            of ``ablate``, ``clamp`` and ``rotate`` is 1, so that the edit is complete.
        vectors: kinds of steering vectors; the first one is selected, the rest are kept for `tune`:
            ``ssv``: the aligned model's mean difference (the paper's safety steering vector);
            ``alignment``: ``ssv`` minus the target's own mean difference;
            ``forced``: the target's mean rows over a refusal put in its mouth, minus those over its own answer to the
            same harmful prompts, first 12 answer tokens (needs no sibling);
            ``srv``: the target's own mean difference (needs no sibling).
            Default: ``alignment, ssv, forced`` with a sibling, ``forced, srv`` without.
        unit_norm: scale each steering vector to norm 1 (the paper); otherwise residual-stream units.
        refusal: the text of ``forced``; default: the aligned model's own answers, without one `FORCED_REFUSAL`.
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
    work = _Extraction(model, tokenizer, (harmful, harmless), kinds, chosen)
    rows, reading = work.target_rows(outline.gate)
    vectors = work.vectors(rows)
    outline = replace(outline, norm=rows.norm(dim=2).double().mean(dim=0).float())
    return _with_vectors(work.with_gates(outline, reading), vectors, kinds, chosen)


def _outline(identity: ModelIdentity, options: ExtractOptions) -> SteeringProfile:
    """Return the profile with nothing fitted: it checks the options of gate and edit before any work."""
    if options.pooling == "both":
        raise ProfileError("pooling: expected 'last' or 'mean', got 'both': extract fits one direction of a layer")
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


class _Extraction:
    """Both prompt sets of one extraction, harmful first: prompts, token ids, masks of the prompts in plain style."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sets: tuple[Sequence[str], Sequence[str]],
        kinds: Sequence[str],
        options: ExtractOptions,
    ) -> None:
        self.model, self.tokenizer, self.kinds, self.options = model, tokenizer, kinds, options
        self.bad, self.good = Prompts(sets[0]), Prompts(sets[1])
        room = _FORCED_TOKENS if "forced" in kinds else 0
        self.bad_ids, self.good_ids = encode(tokenizer, self.bad, model, room=room), encode(tokenizer, self.good, model)
        self.plain: Masks = in_plain_style(self.bad), in_plain_style(self.good)

    def target_rows(self, gate: Gate) -> tuple[Tensor, Tensor]:
        """Return the last rows of all prompts, and the rows that the gate reads: [n1 + n0, layers, H]."""
        read, every = gate_reading(gate)[0], self.bad_ids + self.good_ids
        if read is last_token:
            rows = self._rows(self.model, every, "target activations")
            return rows, rows

        def last_and_read(hidden: Tensor, batch: PromptBatch) -> Tensor:
            return torch.stack([last_token(hidden, batch).double(), read(hidden, batch)], dim=1)

        rows, reading = self._rows(self.model, every, "target activations", last_and_read).unbind(dim=2)
        return rows, reading

    def vectors(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the steering vectors, and those that they are made of: kind -> float64 [layers, H]."""
        sibling, kinds = self.options.aligned_model, set(self.kinds)
        made: dict[str, Tensor] = {}
        if {"srv", "alignment"} & kinds:
            bad, good = rows[: len(self.bad)], rows[len(self.bad) :]
            made["srv"] = _mean_difference(bad[self.plain[0]], good[self.plain[1]])
        if sibling is not None and {"ssv", "alignment"} & kinds:
            bad_ids, good_ids = compress(self.bad_ids, self.plain[0]), compress(self.good_ids, self.plain[1])
            of_sibling = self._rows(sibling, [*bad_ids, *good_ids], "sibling activations")
            count = int(self.plain[0].sum())
            made["ssv"] = _mean_difference(of_sibling[:count], of_sibling[count:])
            if "alignment" in kinds:
                made["alignment"] = made["ssv"] - made["srv"]
        if "forced" in kinds:
            made["forced"] = self._forced_vector(list(compress(self.bad_ids, self.plain[0])))
        for kind, vector in made.items():
            if not bool(vector.any(dim=1).all()):
                layer = int((~vector.any(dim=1)).nonzero()[0])
                raise ProfileError(
                    f"vectors: {kind!r} is zero at layer {layer}; is the aligned model another model than the target?"
                )
        return made

    def with_gates(self, outline: SteeringProfile, reading: Tensor) -> SteeringProfile:
        """Return the profile with directions, midpoint thresholds and figures on styles that were left out."""
        options, score = self.options, gate_reading(outline.gate)[1]
        pair = reading[: len(self.bad)], reading[len(self.bad) :]

        def fit(bad: Tensor, good: Tensor, plain: Masks) -> Tensor:
            # A cosine gate sees only the direction of a row, so the fit sees no more than that.
            rows = [x.double() / x.double().norm(dim=1, keepdim=True) if score == "cosine" else x for x in (bad, good)]
            means_of = plain if options.gate == "lda" else None
            return unit(fit_direction(rows[0], rows[1], options.gate, shrinkage=options.shrinkage, means_of=means_of))

        directions, thresholds = [], []
        for layer in range(reading.shape[1]):
            here = pair[0][:, layer], pair[1][:, layer]
            directions.append(fit(*here, self.plain).float())
            thresholds.append(threshold_midpoint(*(project(x, directions[-1], score).numpy() for x in here)))
        left_out = leave_one_style_out(self.bad, self.good, pair, fit, score=score, progress=options.progress)
        sibling, names = options.aligned_model, options.names or {}
        fitted = {
            "direction": options.gate,
            "shrinkage": options.shrinkage,
            "unit_norm": options.unit_norm,
            "aligned_model": identify(sibling).name if sibling is not None else None,
            "harmful": describe_set(self.bad, names.get("harmful")),
            "harmless": describe_set(self.good, names.get("harmless")),
            "left_out": {style: rates_by_layer(figures) for style, figures in left_out.items()},
        }
        threshold = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
        return replace(outline, direction=torch.stack(directions), threshold=threshold, fitted=fitted)

    def _forced_vector(self, prompts: list[list[int]]) -> Tensor:
        """Return the mean row over refusals minus that over the model's own answers, float64 [layers, H]."""
        sibling, refusal = self.options.aligned_model, self.options.refusal
        if refusal is None and sibling is not None:
            refusals = self._answers(sibling, prompts, "sibling answers")
        else:
            text = FORCED_REFUSAL if refusal is None else refusal
            refusals = [self.tokenizer(text, add_special_tokens=False)["input_ids"][:_FORCED_TOKENS]] * len(prompts)
        answers = self._answers(self.model, prompts, "own answers")
        triples = [(p, r, a) for p, r, a in zip(prompts, refusals, answers, strict=True) if r and a]
        if not triples:
            raise PromptError("harmful: expected an answer to at least one prompt, got only empty answers")
        reduce = answer_mean([len(prompt) for prompt, _, _ in triples], _FORCED_TOKENS)
        refused = self._rows(self.model, [p + r for p, r, _ in triples], "refusals", reduce)
        complied = self._rows(self.model, [p + a for p, _, a in triples], "compliance", reduce)
        return _mean_difference(refused, complied)

    def _rows(
        self, model: nn.Module, sequences: Sequence[Sequence[int]], description: str, reduce: Reduce = last_token
    ) -> Tensor:
        return residual_rows(
            model,
            sequences,
            reduce=reduce,
            batch_size=self.options.batch_size,
            padding_side=self.options.padding_side,
            pad_token_id=pad_token(self.tokenizer),
            description=description if self.options.progress else None,
        )

    def _answers(self, model: nn.Module, prompts: Sequence[Sequence[int]], description: str) -> list[list[int]]:
        shown = description if self.options.progress else None
        return greedy_answers(model, self.tokenizer, prompts, _FORCED_TOKENS, description=shown)


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


def _mean_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of the mean rows, float64 [layers, H]."""
    return first.mean(dim=0, dtype=torch.float64) - second.mean(dim=0, dtype=torch.float64)

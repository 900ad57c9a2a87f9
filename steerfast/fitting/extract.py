"""Extract guidance from a model: the directions that its gates read, and the vectors that open gates add."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast._options import read_options
from steerfast.errors import ArchitectureError, ProfileError, PromptError
from steerfast.fitting.activations import answer_mean, gate_reading, last_token, residual_rows
from steerfast.fitting.directions import fit_direction, lda_without, project
from steerfast.fitting.labelled import Given, Labelled, evenly
from steerfast.fitting.left_out import auc_by_group, leave_sources_out
from steerfast.fitting.refusals import refusals_of
from steerfast.fitting.row_cache import RowCache
from steerfast.hf.generation import PromptBatch, greedy_answers
from steerfast.hf.structure import identify
from steerfast.judging.estimates import threshold_midpoint
from steerfast.profile import EDITS, Gate, ModelIdentity, SteeringProfile
from steerfast.text.encoding import encode, pad_token
from steerfast.text.template import template_record
from steerfast.text.turns import turn_markers

VECTOR_KINDS = ("alignment", "ssv", "forced", "srv")
_FORCED_TOKENS = 12
_WINDOW = 32  # tokens, about a request: with more, the text before a request hides it
_SHRINKAGE = 0.2
_FORCED_PROMPTS = 320  # each costs an answer; their mean hardly moves with more

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
            what it reads, ``cosine`` on unit rows; with the pooling ``both`` on the last row beside the mean, as one
            direction of norm 1 whose halves are the profile's pair. Default: a prompt gate that reads ``both``, of at
            most 32 tokens.
        turn: "auto": a mean is taken over the last user turn, which is found by the tokenizer's chat template, if it
            has one. None: over the whole prompt.
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
        refusal: the texts of ``forced``, in turn, see `steerfast.fitting.refusals`; default: the aligned model's own
            answers, without one `REFUSALS`.
        shrinkage: for ``lda``: weight of the identity; None: Ledoit-Wolf.
        per_source: the most prompts of a source and label that are read; None: all.
        cache: a folder for the rows of prompts: an extraction that was interrupted goes on, and one with other options
            for the directions reads no prompt again.
        names: names of the prompt sets in the profile (``{"harmful": ..., "harmless": ...}``).
    """

    aligned_model: nn.Module | None = None
    gate: Literal["lda", "mean", "pca", "logistic"] = "lda"
    gate_kind: Literal["prompt", "token", "always"] = "prompt"
    sharpness: float = 0.0
    score: Literal["cosine", "dot"] = "cosine"
    pooling: Literal["last", "mean", "both"] | None = None
    window: int | Literal["all"] | None = None
    turn: Literal["auto"] | None = "auto"
    edit: str = "add"
    low: float = -inf
    high: float = inf
    angle: float | None = None
    vectors: Sequence[str] | None = None
    unit_norm: bool = False
    refusal: str | Sequence[str] | None = None
    shrinkage: float | None = _SHRINKAGE
    batch_size: int = 16
    padding_side: Literal["left", "right"] = "right"
    per_source: int | None = None
    cache: str | os.PathLike[str] | None = None
    names: dict[str, str] | None = None
    progress: bool = True


@own_defaults
def extract(
    model: nn.Module, tokenizer: Any, *, harmful: Sequence[Given], harmless: Sequence[Given], **options: Any
) -> SteeringProfile:
    """Fit gate directions and steering vectors for every decoder layer of `model`.

    Directions come from the target model's residual rows at the last prompt token of both sets (arXiv 2401.11206), or
    at the tokens of the last user turn (`pooling`); steering vectors always from single rows. The sign convention is
    harmless -> harmful throughout.

    Args:
        model, tokenizer: the target model; chat prompts are templated as generation would.
        harmful, harmless: prompts or chats; no prompt may be in both. `steerfast.text.examples.Example` names their
            sources, which weigh as `Labelled.weights` says. Directions are also fitted with sources left out in turn;
            ``fitted["left_out"]`` holds the figures on these. Borderline examples stand among the harmless ones.
            Steering vectors come from bare requests alone, where there are any, not from those in a context.
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
    examples = Labelled.of(harmful, harmless).at_most(chosen.per_source)
    kinds = _kinds(chosen.vectors, chosen.aligned_model)
    outline = _outline(identify(model, tokenizer), tokenizer, chosen)
    if chosen.aligned_model is not None:
        check_sibling(outline.model, chosen.aligned_model)
    work = _Extraction(model, tokenizer, examples, kinds, chosen)
    rows, reading = work.target_rows(outline.gate)
    vectors = work.vectors(rows)
    outline = replace(outline, norm=rows.norm(dim=2).double().mean(dim=0).float())
    return _with_vectors(work.with_gates(outline, reading), vectors, kinds, chosen)


def _outline(identity: ModelIdentity, tokenizer: Any, options: ExtractOptions) -> SteeringProfile:
    """Return the profile with nothing fitted: it checks the options of gate and edit before any work."""
    if options.turn not in ("auto", None):
        raise ProfileError(f"turn: expected 'auto' or None, got {options.turn!r}")
    pooling = options.pooling or ("both" if options.gate_kind == "prompt" else "last")
    window = options.window
    if pooling != "last":
        window = None if window == "all" else _WINDOW if window is None else window
    reads_turn = options.turn == "auto" and pooling != "last"
    turn, tail = turn_markers(tokenizer) if reads_turn else ((), 0)
    gate = Gate(options.gate_kind, options.score, options.sharpness, pooling, window, turn, tail)  # type: ignore[arg-type]
    edit = {name: getattr(options, name) for name in ("edit", "low", "high", "angle")}
    return SteeringProfile.from_tensors({}, identity, gate=gate, **edit)


class _Extraction:
    """The examples of one extraction, harmful first, with their token ids."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Labelled,
        kinds: Sequence[str],
        options: ExtractOptions,
    ) -> None:
        self.model, self.tokenizer, self.kinds, self.options = model, tokenizer, kinds, options
        self.examples = examples
        self.ids = encode(tokenizer, examples.prompts, model, room=_FORCED_TOKENS if "forced" in kinds else 0)
        self.bad, self.good = (examples.bare(label == "harmful") for label in ("harmful", "harmless"))

    def target_rows(self, gate: Gate) -> tuple[Tensor, Tensor]:
        """Return the last rows of all prompts, [n1 + n0, layers, H], and what the gate reads: as wide, or twice."""
        read = gate_reading(gate)[0]
        if read is last_token:
            rows = self._rows(self.model, self.ids, "target activations", cache=self._cache("last"))
            return rows, rows

        def last_and_read(hidden: Tensor, batch: PromptBatch) -> Tensor:
            readings = read(hidden, batch).view(len(hidden), -1, hidden.shape[-1])
            return torch.cat([last_token(hidden, batch).double()[:, None], readings], dim=1)

        cache = self._cache(["last", gate.header()])
        kept = self._rows(self.model, self.ids, "target activations", reduce=last_and_read, cache=cache)
        return kept[:, :, 0], kept[:, :, 1:].flatten(2)

    def vectors(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the steering vectors, and those that they are made of: kind -> float64 [layers, H]."""
        sibling, kinds = self.options.aligned_model, set(self.kinds)
        made: dict[str, Tensor] = {}
        if {"srv", "alignment"} & kinds:
            made["srv"] = _mean_difference(rows[self.bad], rows[self.good])
        if sibling is not None and {"ssv", "alignment"} & kinds:
            of_sibling = self._rows(sibling, [self.ids[i] for i in self.bad + self.good], "sibling activations")
            made["ssv"] = _mean_difference(of_sibling[: len(self.bad)], of_sibling[len(self.bad) :])
            if "alignment" in kinds:
                made["alignment"] = made["ssv"] - made["srv"]
        if "forced" in kinds:
            made["forced"] = self._forced_vector(evenly(self.bad, _FORCED_PROMPTS))
        for kind, vector in made.items():
            if not bool(vector.any(dim=1).all()):
                layer = int((~vector.any(dim=1)).nonzero()[0])
                raise ProfileError(
                    f"vectors: {kind!r} is zero at layer {layer}; is the aligned model another model than the target?"
                )
        return made

    def with_gates(self, outline: SteeringProfile, reading: Tensor) -> SteeringProfile:
        """Return the profile with directions, midpoint thresholds and figures on sources that were left out."""
        options, examples, score = self.options, self.examples, gate_reading(outline.gate)[1]
        shrinkage = None if options.gate != "lda" and options.shrinkage == _SHRINKAGE else options.shrinkage

        def seen(rows: Tensor) -> Tensor:
            # A cosine gate sees only the direction of a row, so the fit sees no more than that.
            rows = rows.double()
            return rows / rows.norm(dim=1, keepdim=True) if score == "cosine" else rows

        def fit(rows: Tensor, known: Labelled) -> Tensor:
            sides = known.harmful, ~known.harmful
            weights = None if options.gate == "pca" else (known.weights[sides[0]], known.weights[sides[1]])
            given = seen(rows[sides[0]]), seen(rows[sides[1]])
            return fit_direction(*given, options.gate, shrinkage=shrinkage, weights=weights)

        def fit_without(rows: Tensor, known: Labelled, folds: Sequence[Tensor]) -> Sequence[Tensor]:
            if options.gate == "lda" and shrinkage is not None:
                return lda_without(seen(rows), known.harmful, known.weights, folds, shrinkage)
            return [fit(rows[~out], known.select(~out)) for out in folds]

        directions, thresholds = [], []
        for layer in range(reading.shape[1]):
            here = reading[:, layer]
            directions.append(fit(here, examples).float())
            found = project(here, directions[-1], score)
            thresholds.append(threshold_midpoint(found[examples.harmful].numpy(), found[~examples.harmful].numpy()))
        left_out = leave_sources_out(examples, reading, fit_without, score=score, progress=options.progress)
        sibling = options.aligned_model
        fitted = {
            "direction": options.gate,
            "shrinkage": shrinkage,
            "unit_norm": options.unit_norm,
            **template_record(self.tokenizer),
            "aligned_model": identify(sibling).name if sibling is not None else None,
            **examples.describe_sides(options.names),
            "sources": examples.describe(),
            "left_out": {} if left_out is None else auc_by_group(examples, left_out),
        }
        threshold = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
        direction, *mean = torch.stack(directions).split(outline.model.hidden_size, dim=1)
        pair = {"direction": direction.contiguous(), "mean_direction": mean[0].contiguous() if mean else None}
        return replace(outline, **pair, threshold=threshold, fitted=fitted)

    def _forced_vector(self, places: Sequence[int]) -> Tensor:
        """Return the mean row over refusals minus that over the model's own answers, float64 [layers, H]."""
        sibling, refusal = self.options.aligned_model, self.options.refusal
        prompts = [self.ids[i] for i in places]
        if refusal is None and sibling is not None:
            refusals = self._answers(sibling, prompts, "sibling answers")
        else:
            texts = refusals_of([self.examples.prompts[i] for i in places], refusal)
            refusals = [ids[:_FORCED_TOKENS] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        answers = self._answers(self.model, prompts, "own answers")
        triples = [(p, r, a) for p, r, a in zip(prompts, refusals, answers, strict=True) if r and a]
        if not triples:
            raise PromptError("harmful: expected an answer to at least one prompt, got only empty answers")
        reduce = answer_mean([len(prompt) for prompt, _, _ in triples], _FORCED_TOKENS)
        refused = self._rows(self.model, [p + r for p, r, _ in triples], "refusals", reduce=reduce)
        complied = self._rows(self.model, [p + a for p, _, a in triples], "compliance", reduce=reduce)
        return _mean_difference(refused, complied)

    def _cache(self, reading: Any) -> RowCache | None:
        folder = self.options.cache
        return None if folder is None else RowCache(folder, self.model, reading)

    def _rows(self, model: nn.Module, sequences: Sequence[Sequence[int]], description: str, **reading: Any) -> Tensor:
        return residual_rows(
            model,
            sequences,
            batch_size=self.options.batch_size,
            padding_side=self.options.padding_side,
            pad_token_id=pad_token(self.tokenizer),
            description=description if self.options.progress else None,
            **reading,
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

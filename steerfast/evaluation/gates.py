"""Figures of a gate by source of prompts (`steerfast.judging.by_source`), beside a baseline of words; no answers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from steerfast._versions import installed_version
from steerfast.errors import PromptError
from steerfast.evaluation.provenance import Record, records, uses, words
from steerfast.fitting.labelled import Labelled
from steerfast.fitting.score import score
from steerfast.hf.structure import identify
from steerfast.judging.by_source import Key, figures_by_source, scores_by_source
from steerfast.judging.words import WordClassifier
from steerfast.profile import SteeringProfile
from steerfast.text.corpus import corpus
from steerfast.text.encoding import context_of, encode
from steerfast.text.examples import LABELS, Example, grouped, unique_text

GATE, WORDS = "gate", "words"
RATE = 0.01  # of false positives, for a baseline of a profile that records none


def gate_report(
    profile: SteeringProfile,
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    baseline: bool = True,
    force: bool = False,
    **reading: Any,
) -> dict[str, Any]:
    """Measure a profile's gate on labelled prompts, by source; nothing is steered and nothing is answered.

    Args:
        baseline: also measure a `WordClassifier`, fitted on the gate's sources of the corpus (`word_baseline`).
        force: take sources that chose something in the profile, and mark them as development.
        reading: ``batch_size``, ``progress`` and ``cache`` of `score`.

    Returns:
        JSON data: under ``systems`` for the gate, and for the baseline, the `figures_by_source`; under ``left_out`` the
        prompts of a source that were not measured, and why.

    Raises:
        PromptError: no example, or without `force` a source that chose something.
        ProfileError: the profile is of another model, or has no gate.
    """
    seen, groups = check_sources(profile, examples, force), _groups(examples)
    kept, left_out = _fitting(groups, model, tokenizer)
    prompts = [one.prompt for one in kept]
    found = score(model, tokenizer, profile, prompts, **reading)
    margins = (found.scores - profile.threshold[found.layer]).double().numpy()
    undecided = None if profile.abstain is None else found.undecided.numpy()
    systems: dict[str, Any] = {GATE: figures_by_source(scores_by_source(kept, margins, seen, undecided))}
    result: dict[str, Any] = {}
    if baseline:
        classifier, made_with, result["baseline"] = word_baseline(profile)
        found_by_words = scores_by_source(kept, classifier.margins(prompts), _seen(made_with, groups))
        systems[WORDS] = figures_by_source(found_by_words)
    return {
        "model": identify(model).name,
        "profile": profile.checksum,
        "max_false_positive_rate": profile.calibration.get("max_false_positive_rate"),
        "versions": {name: installed_version(name) for name in ("steerfast", "torch", "transformers")},
        **result,
        "systems": systems,
        "left_out": left_out,
    }


def _groups(examples: Sequence[Example]) -> dict[Key, list[Example]]:
    """Return the examples of each source and label: harmful ones first, in the order given."""
    places = grouped(examples)
    return {
        key: [examples[place] for place in places[key]] for key in sorted(places, key=lambda key: LABELS.index(key[1]))
    }


def _seen(made_with: Sequence[Record], groups: Mapping[Key, Sequence[Example]]) -> dict[Key, dict[str, int]]:
    """Return how many prompts of a group chose something; for rows of the split validate a source's name is no sign."""
    found: dict[Key, dict[str, int]] = {}
    for (source, label), group in groups.items():
        named = None if all(one.split == "validate" for one in group) else source
        found[source, label] = uses(made_with, [one.prompt for one in group], source=named)
    return found


def check_sources(profile: SteeringProfile, examples: Sequence[Example], force: bool = False) -> dict[Key, Any]:
    """Refuse sources that chose something in the profile, before any work.

    Returns:
        For each source and label how many prompts chose something, by role; none unless `force`.

    Raises:
        PromptError: as `gate_report`.
    """
    if not examples:
        raise PromptError("prompts: expected at least one labelled prompt, got none")
    groups = _groups(examples)
    seen = _seen(records(profile), groups)
    said = [f"{key[0]!r} ({words(found, len(groups[key]))})" for key, found in seen.items() if found]
    if said and not force:
        raise PromptError(
            f"prompts: expected sources that chose nothing in the profile, got {', '.join(said)} (force takes them, "
            "and marks them as development)"
        )
    return seen


def _fitting(
    groups: Mapping[Key, Sequence[Example]], model: nn.Module, tokenizer: Any
) -> tuple[list[Example], dict[str, str]]:
    """Return the examples that fit the model's context, each prompt once; and source -> what is missing."""
    kept: list[Example] = []
    left_out: dict[str, str] = {}
    most = context_of(model)
    for (source, label), group in groups.items():
        single = list({unique_text(one.prompt): one for one in group}.values())
        lengths = map(len, encode(tokenizer, [one.prompt for one in single]))
        short = [one for one, length in zip(single, lengths, strict=True) if length <= most]
        reasons = ("come twice", len(group) - len(single)), ("do not fit the model's context", len(single) - len(short))
        if said := [f"{count} of {len(group)} {label} prompts {why}" for why, count in reasons if count]:
            left_out[source] = "; ".join([*([left_out[source]] if source in left_out else []), *said])
        kept += short
    if not kept:
        raise PromptError("prompts: expected some that fit the model's context, got none")
    return kept, left_out


# -- the baseline ------------------------------------------------------------------------------------


def word_baseline(profile: SteeringProfile | None = None) -> tuple[WordClassifier, list[Record], dict[str, Any]]:
    """Return a classifier of words that has seen what a gate has seen.

    It is fitted on the corpus' sources that the profile names, else on the corpus' whole ``fit`` split. Its threshold
    is the lowest one that keeps the profile's rate of false positives on the harmless sources that calibrated the
    profile, else on the ``calibrate`` split. Each source of a label has the same weight.

    Returns:
        The classifier; the records of its prompts; JSON data: sources and prompts of both steps, and the rate.
    """
    fitted, calibration = ({}, {}) if profile is None else (profile.fitted, profile.calibration)
    given = calibration.get("max_false_positive_rate")
    limit = RATE if given is None else float(given)
    steps = {
        "fit": _chosen(fitted, "fit", LABELS),
        "calibrate": _chosen(calibration, "calibrate", ["harmless"]),
    }
    classifier = _fitted(*(tuple(dict.fromkeys(map(_key, step))) for step in steps.values()), limit)
    described = {
        role: {"sources": len({one.source for one in step}), "prompts": len(step)} for role, step in steps.items()
    }
    made_with = [Record.of(role, [one.prompt for one in step]) for role, step in steps.items()]
    return classifier, made_with, {**described, "max_false_positive_rate": limit}


def _chosen(part: Mapping[str, Any], split: str, labels: Collection[str]) -> list[Example]:
    """Return the corpus' examples of the sources that a part of a profile names; without one those of the split."""
    named = [one for one in corpus(labels=labels) if one.label in part.get("sources", {}).get(one.source, ())]
    return named or corpus(split, labels)


@functools.lru_cache(maxsize=4)
def _fitted(fit: tuple[Key, ...], calibrate: tuple[Key, ...], limit: float) -> WordClassifier:
    """Return the classifier of sources of the corpus; one for all reports and evaluations of a process."""
    classifier = WordClassifier()
    examples = [one for one in corpus() if _key(one) in fit]
    harmful = [one.label == "harmful" for one in examples]
    classifier.fit([one.prompt for one in examples], harmful, _weights(examples))
    harmless = [one for one in corpus() if _key(one) in calibrate]
    classifier.calibrate([one.prompt for one in harmless], limit, _weights(harmless))
    return classifier


def _key(one: Example) -> Key:
    return one.source, one.label


def _weights(examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return the weights of a fit, [n], with the mean 1."""
    weights = Labelled(tuple(examples)).weights.numpy()
    return weights * len(weights) / weights.sum()

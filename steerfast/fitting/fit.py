"""One call from prompts to a profile: of any behaviour from contrastive pairs, of safety from the corpus that ships."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from steerfast._defaults import own_defaults
from steerfast._options import read_options
from steerfast._progress import stage
from steerfast._records import Records
from steerfast.errors import ProfileError, PromptError
from steerfast.fitting.budget import largest, speed_of
from steerfast.fitting.contrast import (
    Contrast,
    at_total,
    common_prompts,
    contrast_profile,
    describe_pairs,
    read_pairs,
)
from steerfast.fitting.frontier import MOST_PERPLEXITY, STRENGTHS, Axis, Frontier, recommend
from steerfast.fitting.labelled import evenly
from steerfast.fitting.safety import SafetyOptions, fit_safety, work_folder
from steerfast.hf.structure import find_decoder
from steerfast.judging.fluency import FluencyLimits
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import encode
from steerfast.text.examples import Prompt
from steerfast.text.pairs import check_pairs
from steerfast.text.prompts import read_prompts

SAFETY = "safety"
_ASKED = 12
_OTHER_PROMPTS = "steerfast:harmless_tune"
_LADDERS = ((1.0,), (0.5, 1.0, 2.0), STRENGTHS)  # what a budget chooses from
_LONGEST_NAME = 64


@dataclass(frozen=True)
class ContrastOptions:
    """Options of `fit` with pairs.

    Args:
        method: ``mean`` difference of the rows, first principal component of their differences (``pca``), or
            ``logistic`` regression.
        read: ``answer``, the mean over the answer's rows, or the ``last`` row of what is read. Default: ``answer``
            where the pairs have answers.
        layers: first and last layer that adds the vector. Default: a third of the depth, in the middle.
        strengths: to measure, ascending, in total over the layers; up to the first that breaks the text.
        prompts: to answer at each strength; default: at most 12 that both sides of a pair share, else of
            ``steerfast:harmless_tune``.
        max_new_tokens: of such an answer. limits: of fluent text.
        max_perplexity: times the unsteered perplexity, that text may reach. A behaviour that is another language, or
            rare text, needs more.
        minutes: how long it may take, by an estimate; it chooses the number of strengths.
        work: a folder that keeps rows and answers: a fit that was interrupted goes on.
        name: of the pairs in the profile.
    """

    method: Literal["mean", "pca", "logistic"] = "mean"
    read: Literal["answer", "last"] | None = None
    layers: tuple[int, int] | None = None
    strengths: Sequence[float] | None = None
    prompts: Sequence[Prompt] | None = None
    max_new_tokens: int = 40
    limits: FluencyLimits | None = None
    max_perplexity: float = MOST_PERPLEXITY
    minutes: float | None = None
    work: str | os.PathLike[str] | None = None
    name: str | None = None
    batch_size: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ProfileError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.strengths is not None and not (self.strengths and all(one > 0 for one in self.strengths)):
            raise ProfileError(f"strengths: expected numbers above 0, got {list(self.strengths)}")
        if not 1 <= self.max_perplexity < math.inf:
            raise ProfileError(f"max_perplexity: expected a finite number >= 1, got {self.max_perplexity}")
        if self.prompts is not None and not len(self.prompts):
            raise PromptError("prompts: expected at least one to answer, got none")


@own_defaults
def fit(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Prompt] | None = None,
    negative: Sequence[Prompt] | None = None,
    *,
    behaviour: str = SAFETY,
    **options: Any,
) -> SteeringProfile:
    """Make a profile of a behaviour in one call.

    With pairs: a profile without a gate that adds a vector, at a strength that was measured. A strength of 1 in total
    means `steerfast.fitting.contrast.SHARE` of a layer's median row norm. Without pairs, for ``safety``: `extract`,
    `calibrate`, `learn` and `tune` with the corpus that ships.

    Args:
        positive, negative: sides of pairs, as `steerfast.pairs` reads them: prompts or conversations. A conversation
            that ends with a message of the assistant has an answer.
        behaviour: its name, in the profile and in messages.
        options: with pairs `ContrastOptions`, else `steerfast.fitting.safety.SafetyOptions`.

    Returns:
        The profile. With pairs ``fitted`` holds the behaviour, the pairs and the ``frontier``: the figures of each
        strength, the recommended one and its range, or the ``problem``. Then the least strength is set.

    Raises:
        PromptError: pairs that `steerfast.text.pairs.check_pairs` refuses, or none for a behaviour other than safety;
            a prompt set that a stage refuses.
        ProfileError: an option out of range.
        OutputError: the work folder cannot be written.
        SteerfastError: a steered model, or one with activations that are not finite.
        TypeError: an unknown option.
    """
    if not (isinstance(behaviour, str) and behaviour.isprintable() and 1 <= len(behaviour.strip()) <= _LONGEST_NAME):
        raise ProfileError(f"behaviour: expected a name of 1 to {_LONGEST_NAME} characters, got {behaviour!r}")
    if positive is None and negative is None:
        if behaviour != SAFETY:
            raise PromptError(
                f"positive and negative: expected pairs for {behaviour!r}, got none; only {SAFETY!r} has prompts that "
                "ship"
            )
        return fit_safety(model, tokenizer, read_options("fit", SafetyOptions, options))
    chosen = read_options("fit", ContrastOptions, options)
    if positive is None or negative is None:
        name = "positive" if positive is None else "negative"
        raise PromptError(f"{name}: expected the other side of the pairs, got none")
    check_pairs(positive, negative)
    find_decoder(model).refuse_if_steered()
    return _fit_pairs(model, tokenizer, (positive, negative), behaviour.strip(), chosen)


def _fit_pairs(
    model: nn.Module,
    tokenizer: Any,
    pairs: tuple[Sequence[Prompt], Sequence[Prompt]],
    behaviour: str,
    options: ContrastOptions,
) -> SteeringProfile:
    work = work_folder(options.work)
    with stage(f"1/2 pairs of {behaviour}", show=options.progress) as findings:
        rows, read = read_pairs(
            model,
            tokenizer,
            *pairs,
            read=options.read,
            batch_size=options.batch_size,
            cache=None if work is None else work / "rows",
            progress=options.progress,
        )
        profile = contrast_profile(model, tokenizer, rows, behaviour, method=options.method, layers=options.layers)
        findings.append(f"{len(pairs[0])} pairs, {'answers' if read == 'answer' else 'last rows'} read")
        if (right := profile.fitted["pairs_right"]) is not None:
            findings.append(f"{right[0]} of {right[1]} told apart by the others")
    layers = profile.steered_layers
    with stage(f"2/2 strengths of {behaviour}", show=options.progress) as findings:
        asked = options.prompts
        if asked is None:
            asked = evenly(common_prompts(*pairs) or read_prompts(_OTHER_PROMPTS), _ASKED)
        found = _frontier(model, tokenizer, profile, rows, asked, options, work)
        strength, tried = found["strength"], len(found["tried"])
        if options.strengths is None and tried < len(STRENGTHS):
            findings.append(f"{tried} of {len(STRENGTHS)} strengths fit into {options.minutes:g} min")
        findings.append(found["problem"] or f"strength {strength:g} of {'{:g} to {:g}'.format(*found['range'])}")
    record = {"read": read, "pairs": describe_pairs(*pairs, options.name), "frontier": found}
    steered = at_total(profile, layers, strength or found["points"][1]["strength"])
    return replace(steered, fitted={**profile.fitted, **record})


def _frontier(
    model: nn.Module,
    tokenizer: Any,
    profile: SteeringProfile,
    rows: Contrast,
    asked: Sequence[Prompt],
    options: ContrastOptions,
    work: Path | None,
) -> dict[str, Any]:
    """Return the figures of some strengths, and which one to use, as JSON data."""
    prompts = encode(tokenizer, asked, model, room=options.max_new_tokens)
    records = Records(None if work is None else work / "answers.jsonl", "answers")
    ladder = options.strengths
    if ladder is None:
        ladder = STRENGTHS
        if options.minutes is not None:
            speed = speed_of(model, tokenizer, asked, work)
            answer = speed.answer(len(prompts), options.max_new_tokens) + 2 * speed.read(sum(map(len, prompts)))
            ladder = largest(_LADDERS, options.minutes, lambda one: (1 + len(one)) * answer)
    axis, length, most = Axis(model, tokenizer, profile, rows), options.max_new_tokens, options.max_perplexity
    frontier = Frontier(axis, profile, prompts, max_new_tokens=length, records=records, most=most)
    found = recommend(frontier.measure(ladder, options.limits, options.progress), most)
    settings = {"max_new_tokens": length, "max_perplexity": most}
    return {**found, "tried": list(ladder), "prompts": len(prompts), **settings}

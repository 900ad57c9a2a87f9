"""Assess answers: refusal by two judges, fluency by repetition and perplexity under the unsteered model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerfast.hf.structure import find_decoder
from steerfast.judging.fluency import FluencyLimits, answer_perplexity, is_fluent, repetition
from steerfast.judging.refusal import is_refusal_keyword, is_refusal_strict
from steerfast.text.encoding import pad_token


@dataclass(frozen=True)
class Assessment:
    """An answer, its refusal by each of two judges, and its fluency."""

    text: str
    refusal: bool
    refusal_strict: bool
    repetition: float
    perplexity: float
    fluent: bool


def judge(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    limits: FluencyLimits | None = None,
) -> list[Assessment]:
    """Judge `answers` (token ids) to `prompts` (token ids). `model` measures perplexity.

    Raises:
        SteerfastError: the model is steered.
    """
    find_decoder(model).refuse_if_steered()
    perplexities = answer_perplexity(model, prompts, answers, pad_token_id=pad_token(tokenizer))
    judged = []
    for answer, perplexity in zip(answers, perplexities, strict=True):
        text, repeats = tokenizer.decode(answer, skip_special_tokens=True).strip(), repetition(answer)
        refusal, fluent = is_refusal_keyword(text), is_fluent(repeats, perplexity, limits)
        judged.append(Assessment(text, refusal, is_refusal_strict(text), repeats, perplexity, fluent))
    return judged


def share(flags: Sequence[bool]) -> float:
    """Return the share of True; nan for no flags."""
    return sum(flags) / len(flags) if len(flags) else float("nan")

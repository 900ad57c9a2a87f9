"""Fluency of answers: repetition finds loops, perplexity under the unsteered model finds word salad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steerfast.errors import PromptError
from steerfast.hf.generation import device_of

_NGRAM = 4


@dataclass(frozen=True)
class FluencyLimits:
    """The largest share of repetition and the largest perplexity of a fluent answer, see `is_fluent`."""

    max_repetition: float = 0.3
    # Measured under SmolLM2-135M-Instruct: its own greedy answers reach 3, its steered refusals 8, human
    # answers 39 and hand-written refusals 182; the same refusals with their words shuffled start at 373,
    # steered ones at 204.
    max_perplexity: float = 200.0


def repetition(token_ids: Sequence[int]) -> float:
    """Return the share of the answer's 4-grams that occurred in it before; 0 below 4 tokens.

    A token or a short phrase in a loop tends to 1.
    """
    total = len(token_ids) - _NGRAM + 1
    if total < 1:
        return 0.0
    distinct = {tuple(token_ids[i : i + _NGRAM]) for i in range(total)}
    return 1.0 - len(distinct) / total


def answer_perplexity(
    model: nn.Module,
    prompts_ids: Sequence[Sequence[int]],
    answers_ids: Sequence[Sequence[int]],
    batch_size: int = 16,
    pad_token_id: int = 0,
) -> list[float]:
    """Return the perplexity of each answer after its prompt: exp of the mean negative log-likelihood of its tokens.

    Args:
        model: a transformers causal LM in eval mode.
        prompts_ids, answers_ids: token ids, special tokens included; at least one token in each prompt.
        batch_size: sequences per forward pass; similar lengths share one.
        pad_token_id: any id of the vocabulary; padding is masked.

    Returns:
        One perplexity per answer; nan for an empty answer.

    Raises:
        PromptError: another number of answers than prompts, an empty prompt, or batch_size below 1.
    """
    if len(prompts_ids) != len(answers_ids):
        raise PromptError(f"answers_ids: expected one per prompt ({len(prompts_ids)}), got {len(answers_ids)}")
    if batch_size < 1:
        raise PromptError(f"batch_size: expected at least 1, got {batch_size}")
    if empty := [i for i, prompt in enumerate(prompts_ids) if len(prompt) == 0]:
        raise PromptError(f"prompts_ids: expected at least one token each, got none in prompt {empty[0]}")
    device = device_of(model)
    perplexities = [math.nan] * len(prompts_ids)
    scored = [i for i, answer in enumerate(answers_ids) if len(answer)]
    scored.sort(key=lambda i: len(prompts_ids[i]) + len(answers_ids[i]))
    with torch.inference_mode():
        for start in range(0, len(scored), batch_size):
            batch = scored[start : start + batch_size]
            texts = [[*prompts_ids[i], *answers_ids[i]] for i in batch]
            longest = max(map(len, texts))
            ids = torch.tensor([[*text, *[pad_token_id] * (longest - len(text))] for text in texts], device=device)
            mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
            # The logits at a position score the next token; before the earliest answer none are needed.
            first = min(len(prompts_ids[i]) for i in batch) - 1
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=torch.arange(first, longest - 1, device=device),
            ).logits
            for row, i in enumerate(batch):
                begin, end = len(prompts_ids[i]), len(texts[row])
                answer_logits = logits[row, begin - 1 - first : end - 1 - first].float()
                loss = F.cross_entropy(answer_logits, ids[row, begin:end])
                perplexities[i] = float(loss.double().exp())
    return perplexities


def is_fluent(repetition: float, perplexity: float, limits: FluencyLimits | None = None) -> bool:
    """Return True if neither figure is above its limit; nan (an empty answer) is not fluent."""
    limits = limits or FluencyLimits()
    return repetition <= limits.max_repetition and perplexity <= limits.max_perplexity

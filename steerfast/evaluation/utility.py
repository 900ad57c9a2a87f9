"""Is the model still as useful: multiple choice by likelihood, maths by the final number, perplexity of references.

Log-likelihoods are those of generation: a prompt is read once, its gate decides at its last token, and every answer
goes on from there, steered as an answer is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._progress import track
from steerfast.errors import PromptError
from steerfast.evaluation.sets import Item, final_number
from steerfast.hf import caches
from steerfast.hf.generation import PromptBatch, batches, device_of, evaluating
from steerfast.text.encoding import context_of, encode, pad_token

__all__ = ["answer_log_likelihoods", "maths", "multiple_choice", "perplexity"]


def multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    batch_size: int = 32,
    description: str | None = None,
) -> list[bool]:
    """Whether the likeliest choice of each item, by the mean log-likelihood of its tokens as an answer, is a right one.

    Args:
        model: steered or not. prompts: token ids of the questions; default: `encode` of the items' prompts.
        batch_size: choices per forward pass. description: of a progress bar; None: no bar.

    Raises:
        PromptError: another number of prompts than items, a question and choice longer than the context.
    """
    scores = _mean_log_likelihoods(
        model, tokenizer, [item.prompt for item in items], [item.choices for item in items], prompts, batch_size,
        description,
    )  # fmt: skip
    likeliest = (max(range(len(of_item)), key=of_item.__getitem__) for of_item in scores)
    return [best in item.correct for item, best in zip(items, likeliest, strict=True)]


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    batch_size: int = 8,
    description: str | None = None,
) -> list[float]:
    """Perplexity of each item's answer given its prompt; of a set, take the geometric mean.

    Args and errors as for `multiple_choice`.
    """
    scores = _mean_log_likelihoods(
        model, tokenizer, [item.prompt for item in items], [[item.answer] for item in items], prompts, batch_size,
        description,
    )  # fmt: skip
    return [math.exp(min(-of_item[0], 700.0)) for of_item in scores]  # exp(710) has no float


def maths(answers: Sequence[str], items: Sequence[Item]) -> list[bool]:
    """Whether the final number of each answer (`final_number`) is that of its item."""
    right = [final_number(item.answer) for item in items]
    found = [final_number(answer) for answer in answers]
    return [
        one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6)
        for one, other in zip(found, right, strict=True)
    ]


def answer_log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 32,
    description: str | None = None,
) -> list[list[list[float]]]:
    """Log-likelihood of every token of every answer to every prompt, by the model as it stands (steered or not).

    Args:
        prompts: token ids, chat template included. answers: for each prompt the token ids of answers to it.
        batch_size: answers per forward pass, at least those of one prompt.

    Returns:
        For each prompt and answer, one natural logarithm per token.

    Raises:
        PromptError: another number of entries in answers than prompts, an empty prompt or answer, one with an answer
            longer than the context, batch_size below 1.
    """
    if len(answers) != len(prompts):
        raise PromptError(f"answers: expected one entry per prompt ({len(prompts)}), got {len(answers)}")
    if batch_size < 1:
        raise PromptError(f"batch_size: expected at least 1, got {batch_size}")
    limit = context_of(model)
    for number, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True), 1):
        if not prompt or not of_prompt or not all(of_prompt):
            raise PromptError(f"prompts: entry {number}: expected a prompt and answers of at least one token each")
        if (length := len(prompt) + max(map(len, of_prompt))) > limit:
            raise PromptError(
                f"prompts: entry {number} and its longest answer have {length} tokens, the model's context has {limit}"
            )
    found: list[list[list[float]]] = [[] for _ in prompts]
    together = max(1, batch_size // max(map(len, answers), default=1))
    work = list(batches(prompts, together, "left", pad_token(tokenizer), device_of(model)))
    with evaluating(model), torch.inference_mode():
        for batch in track(work, description or "", show=description is not None):
            of_batch = [answers[index] for index in batch.indices]
            for index, scores in zip(batch.indices, _read(model, batch, of_batch, pad_token(tokenizer)), strict=True):
                found[index] = scores
    return found


def _read(
    model: nn.Module, batch: PromptBatch, answers: Sequence[Sequence[Sequence[int]]], pad_token_id: int
) -> list[list[list[float]]]:
    """Token log-likelihoods of each prompt's answers; each prompt is read once, and its cache goes on with them."""
    owners = [row for row, of_prompt in enumerate(answers) for _ in of_prompt]
    texts = [text for of_prompt in answers for text in of_prompt]
    width = max(map(len, texts)) - 1  # of the answers' last tokens nothing follows
    device = batch.ids.device
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache_name = caches.argument(model)
    scores: list[list[float]] = []

    def step(ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, **options: Any) -> Any:
        placed = {"position_ids": positions} if has_positions else {}
        return model(input_ids=ids, attention_mask=mask, use_cache=True, **{cache_name: cache}, **placed, **options)

    # In place of generate's own loop: there steering knows where the prompt ends, and takes what follows for an answer.
    def score(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        prefill = step(batch.ids, batch.mask, batch.positions, caches.found(given), logits_to_keep=1)
        later = None
        if width:
            owner = torch.tensor(owners, device=device)
            ids = torch.full((len(texts), width), pad_token_id)
            valid = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                ids[row, : len(text) - 1] = torch.tensor(text[:-1])
                valid[row, : len(text) - 1] = 1
            cache = caches.found(prefill)
            cache.batch_select_indices(owner)
            mask = torch.cat([batch.mask[owner], valid.to(device)], dim=1)
            positions = batch.mask.sum(dim=1)[owner, None] + torch.arange(width, device=device)
            later = step(ids.to(device), mask, positions, cache).logits
        for row, (owner_row, text) in enumerate(zip(owners, texts, strict=True)):
            logits = prefill.logits[owner_row, -1:]
            if later is not None:
                logits = torch.cat([logits, later[row, : len(text) - 1]])
            chosen = torch.tensor(text, device=device)[:, None]
            scores.append(logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist())
        return input_ids

    generate: Any = model.generate
    generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=width + 1,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=pad_token_id,
        custom_generate=score,
    )
    rest = iter(scores)
    return [[next(rest) for _ in of_prompt] for of_prompt in answers]


def _mean_log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[str],
    texts: Sequence[Sequence[str]],
    prompts: Sequence[Sequence[int]] | None,
    batch_size: int,
    description: str | None,
) -> list[list[float]]:
    """Mean log-likelihood per token of each text as an answer."""
    prompts = encode(tokenizer, questions, model) if prompts is None else prompts
    if len(prompts) != len(questions):
        raise PromptError(f"prompts: expected one per item ({len(questions)}), got {len(prompts)}")
    # A chat template ends where an answer begins; without one, a word begins with the space before it.
    space = "" if getattr(tokenizer, "chat_template", None) else " "
    answers = [[tokenizer(space + text, add_special_tokens=False)["input_ids"] for text in given] for given in texts]
    found = answer_log_likelihoods(model, tokenizer, prompts, answers, batch_size=batch_size, description=description)
    return [[sum(tokens) / len(tokens) for tokens in of_prompt] for of_prompt in found]

"""Run tasks of lm-evaluation-harness on a model that is already loaded, steered or not.

The harness scores prompt and answer in one forward pass. A prompt gate would then decide at the answer's last token.
`harness_model` scores as generation does: the model reads the prompt, the gate decides, the answer continues the cache.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from steerfast._progress import track
from steerfast.errors import PromptError, SteerfastError
from steerfast.hf import caches
from steerfast.hf.generation import PromptBatch, batches, device_of, evaluating
from steerfast.text.encoding import context_of, pad_token

_BOOTSTRAP = 1000  # resamples, for metrics without a closed standard error
_NORMAL_95 = 1.959964  # standard errors on either side of a mean


class AnswerScore(NamedTuple):
    """Hold the natural log-likelihood of each token of an answer, and whether greedy decoding chooses the answer."""

    log_likelihoods: list[float]
    greedy: bool


# -- tasks -------------------------------------------------------------------------------------------


def check_tasks(tasks: Sequence[str]) -> None:
    """Check task names before any work.

    Raises:
        SteerfastError: lm-eval is not installed.
        PromptError: an unknown task.
    """
    if not tasks:
        return
    known = set(_imported("lm_eval.tasks").TaskManager().all_tasks)
    for task in tasks:
        if task not in known:
            raise PromptError(
                f"tasks: expected names of lm-evaluation-harness tasks, got {task!r} (lm-eval ls tasks prints them)"
            )


def run_task(
    model: nn.Module,
    tokenizer: Any,
    task: str | Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Run one task. Prompts go through the tokenizer's chat template if it has one.

    Args:
        model: steered or not.
        task: a name of the harness, which may be a group of tasks, or a task's configuration.
        limit: most items of each task. seed: of few-shot examples.

    Returns:
        JSON data: under ``values`` task -> metric -> value, under ``intervals`` the same with 95 % intervals.

    Raises:
        SteerfastError: lm-eval is not installed.
    """
    simple_evaluate = _imported("lm_eval").simple_evaluate
    templated = getattr(tokenizer, "chat_template", None) is not None
    with evaluating(model):
        found: Any = simple_evaluate(
            model=harness_model(model, tokenizer, batch_size),
            tasks=[task if isinstance(task, str) else dict(task)],
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            apply_chat_template=templated,
            fewshot_as_multiturn=templated,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return _figures({**found["results"], **found.get("groups", {})})


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SteerfastError(
            f"tasks: expected lm-eval, cannot import {error.name} (pip install 'steerfast[lm-eval]')"
        ) from None


def _figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return values and intervals from the harness's ``metric,filter`` and ``metric_stderr,filter`` entries."""
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            values.setdefault(task, {})[name] = float(value)
            error = entries.get(f"{metric}_stderr,{chosen}")
            if isinstance(error, int | float):
                reach = _NORMAL_95 * error
                intervals.setdefault(task, {})[name] = [value - reach, value + reach]
    return {"values": values, "intervals": intervals}


def harness_model(model: nn.Module, tokenizer: Any, batch_size: int = 16) -> Any:
    """Return an HFLM of the harness over `model` that scores answers with `score_answers`."""
    from lm_eval.models.huggingface import HFLM

    class SteeredHFLM(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            room = self.max_length + 1
            places: dict[tuple[int, ...], list[int]] = {}  # by prompt: a model reads each prompt once
            for place, (_, prompt, answer) in enumerate(requests):
                places.setdefault(tuple(prompt[-(room - len(answer)) :]), []).append(place)
            scores = score_answers(
                self.model,
                self.tokenizer,
                list(places),
                [[requests[place][2] for place in of_prompt] for of_prompt in places.values()],
                batch_size=self.batch_size,
                description=None if disable_tqdm else "log-likelihoods",
            )
            results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for of_prompt, found in zip(places.values(), scores, strict=True):
                for place, score in zip(of_prompt, found, strict=True):
                    results[place] = (sum(score.log_likelihoods), score.greedy)
            for (texts, _, _), result in zip(requests, results, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
            return results

    return SteeredHFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=context_of(model) - 1,  # the harness adds one, for an answer's last token
    )


# -- log-likelihoods ---------------------------------------------------------------------------------


def score_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 32,
    description: str | None = None,
) -> list[list[AnswerScore]]:
    """Score every answer to every prompt with the model, steered or not.

    Args:
        prompts: token ids, chat template included. answers: for each prompt the token ids of its answers.
        batch_size: answers per forward pass; all answers to a prompt share a pass.
        description: of the progress; None: none is shown.

    Raises:
        PromptError: unequal numbers of prompts and entries in answers, an empty prompt or answer, a prompt and answer
            longer than the context, batch_size below 1.
    """
    _check_lengths(prompts, answers, context_of(model), batch_size)
    found: list[list[AnswerScore]] = [[] for _ in prompts]
    together = max(1, batch_size // max(map(len, answers), default=1))
    work = list(batches(prompts, together, "left", pad_token(tokenizer), device_of(model)))
    with evaluating(model), torch.inference_mode():
        for batch in track(work, description or "", show=description is not None):
            of_batch = [answers[index] for index in batch.indices]
            scores = iter(_score_batch(model, batch, of_batch, pad_token(tokenizer)))
            for index, of_prompt in zip(batch.indices, of_batch, strict=True):
                found[index] = [next(scores) for _ in of_prompt]
    return found


def _check_lengths(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], limit: int, batch_size: int
) -> None:
    if len(answers) != len(prompts):
        raise PromptError(f"answers: expected one entry per prompt ({len(prompts)}), got {len(answers)}")
    if batch_size < 1:
        raise PromptError(f"batch_size: expected at least 1, got {batch_size}")
    for number, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True), 1):
        if not prompt or not of_prompt or not all(of_prompt):
            raise PromptError(f"prompts: entry {number}: expected a prompt and answers of at least one token each")
        if (length := len(prompt) + max(map(len, of_prompt))) > limit:
            raise PromptError(
                f"prompts: entry {number} and its longest answer have {length} tokens, the model's context has {limit}"
            )


def _score_batch(
    model: nn.Module, batch: PromptBatch, answers: Sequence[Sequence[Sequence[int]]], pad_token_id: int
) -> list[AnswerScore]:
    """Score each prompt's answers in order. The model reads each prompt once; copies of its cache read the answers."""
    owners = [row for row, of_prompt in enumerate(answers) for _ in of_prompt]
    texts = [text for of_prompt in answers for text in of_prompt]
    width = max(map(len, texts)) - 1  # nothing follows an answer's last token
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache_name = caches.argument(model)
    scores: list[AnswerScore] = []

    def step(ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, **options: Any) -> Any:
        forward: Any = model
        placed = {"position_ids": positions} if has_positions else {}
        return forward(input_ids=ids, attention_mask=mask, use_cache=True, **{cache_name: cache}, **placed, **options)

    # `generate` calls this instead of its loop, so that steering knows where each prompt ends.
    def score(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        prefill = step(batch.ids, batch.mask, batch.positions, caches.cache_in(given), logits_to_keep=1)
        later = None
        if width:
            owner = torch.tensor(owners, device=batch.ids.device)
            read = [torch.tensor(text[:-1], dtype=torch.int64, device=batch.ids.device) for text in texts]
            ids = pad_sequence(read, batch_first=True, padding_value=pad_token_id)
            valid = pad_sequence([torch.ones_like(one) for one in read], batch_first=True)
            cache = caches.cache_in(prefill)
            cache.batch_select_indices(owner)
            mask = torch.cat([batch.mask[owner], valid], dim=1)
            positions = batch.mask.sum(dim=1)[owner, None] + torch.arange(width, device=ids.device)
            later = step(ids, mask, positions, cache).logits
        for row, (owner_row, text) in enumerate(zip(owners, texts, strict=True)):
            logits = prefill.logits[owner_row, -1:]
            if later is not None:
                logits = torch.cat([logits, later[row, : len(text) - 1]])
            chosen = torch.tensor(text, device=logits.device)
            values = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
            scores.append(AnswerScore(values, bool((logits.argmax(dim=-1) == chosen).all())))
        return input_ids

    generate: Any = model.generate
    generate(
        input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=width + 1, do_sample=False, num_beams=1,
        num_return_sequences=1, pad_token_id=pad_token_id, custom_generate=score,
    )  # fmt: skip
    return scores

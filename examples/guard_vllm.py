"""A guard on a vLLM engine (offline), by the engine's own parallel sampling; the search is steerfast's.

    from vllm import LLM

    engine = LLM("MODEL")  # prefix caching, its default, shares the beginnings of candidates
    guard = Guard(None, engine.get_tokenizer(), backend=VLLMBackend(engine), cost=cost)

Candidates with the same beginning are one request with as many samples; with prefix caching, that beginning is read
from the cache, prompt included. The engine returns no hidden states, so scorers have to read text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard import Backend, Sampling


class VLLMBackend(Backend):
    """Candidates of a ``vllm.LLM``.

    Raises:
        GuardError: sampling with processors of logits.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        tokenizer, config = engine.get_tokenizer(), engine.llm_engine.model_config
        listed = config.try_get_generation_config().get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        ends = frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)
        super().__init__(ends, int(config.get_vocab_size()), int(config.max_model_len))

    def extend(
        self, candidates: Any, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = sampling or Sampling()
        if sampling.processors is not None:
            raise GuardError("sampling: expected none of transformers' processors with the vLLM backend")
        bias = None
        if penalty is not None:
            at = penalty.nonzero()[:, 0].tolist()
            bias = dict(zip(at, (-penalty[at]).tolist(), strict=True))
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in (~candidates.finished).nonzero()[:, 0].tolist():
            groups.setdefault(tuple(candidates.answers[row]), []).append(row)
        greedy = sampling.temperature == 0  # the engine gives one answer then; all would be equal
        requests = [{"prompt_token_ids": candidates.prompt + list(answer)} for answer in groups]
        parameters = [
            SamplingParams(
                n=1 if greedy else len(rows),
                seed=_seed(candidates.streams[rows[0]], candidates.length),
                max_tokens=block,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                logit_bias=bias,
                stop_token_ids=sorted(self.ends),
                detokenize=False,
            )
            for rows in groups.values()
        ]
        results = self.engine.generate(requests, parameters, use_tqdm=False) if requests else []
        new: list[list[int]] = [[] for _ in candidates.answers]
        finished = candidates.finished.clone()
        for rows, result in zip(groups.values(), results, strict=True):
            outputs = sorted(result.outputs, key=lambda one: one.index)
            for row, output in zip(rows, outputs * len(rows) if greedy else outputs, strict=True):
                new[row] = [int(token) for token in output.token_ids]
                candidates.answers[row] += new[row]
                finished[row] = bool(new[row]) and new[row][-1] in self.ends
        candidates.finished = finished
        return new


def _seed(stream: Any, position: int) -> int:
    """Return the engine's seed for the tokens of a stream from a position on."""
    return int(np.random.SeedSequence([int(stream), position]).generate_state(1)[0])

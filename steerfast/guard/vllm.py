"""Candidates of a vLLM engine (offline), by its own parallel sampling; the search code is the same.

Candidates with the same beginning are one request with as many samples; with prefix caching, that beginning is read
from the cache, prompt included. The engine returns no hidden states, so scorers have to read text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.candidates import Candidates, Sampling, branch_of, root_of, seeds, union_of

__all__ = ["VLLMBackend"]


class VLLMBackend:
    """As `steerfast.guard.candidates.Backend`.

    Args:
        engine: a ``vllm.LLM``, best with ``enable_prefix_caching=True`` (its default).

    Raises:
        GuardError: sampling with processors of logits.
    """

    prompt_layer: int | None = None

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        tokenizer, config = engine.get_tokenizer(), engine.llm_engine.model_config
        listed = config.try_get_generation_config().get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        self.ends = frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)
        self.vocabulary = int(config.get_vocab_size())
        self.context = int(config.max_model_len)

    def start(self, prompt_ids: Sequence[int], n: int = 1, seed: int = 0) -> Candidates:
        root = root_of(prompt_ids, seed, self.context)
        return root if n == 1 else self.branch(root, [0] * n, range(n))

    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> tuple[list[list[int]], None, Tensor]:
        from vllm import SamplingParams

        sampling = sampling or Sampling()
        if sampling.processors is not None:
            raise GuardError("sampling: expected none of transformers' processors with the vLLM backend")
        if block < 1:
            raise GuardError(f"block: expected at least 1, got {block}")
        bias = None
        if penalty is not None:
            at = penalty.nonzero()[:, 0].tolist()
            bias = dict(zip(at, (-penalty[at]).tolist(), strict=True))
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in (~candidates.finished).nonzero()[:, 0].tolist():
            groups.setdefault(tuple(candidates.answers[row]), []).append(row)
        greedy = sampling.temperature == 0  # the engine gives one answer then; all would be equal
        first = [rows[0] for rows in groups.values()]
        parameters = [
            SamplingParams(
                n=1 if greedy else len(rows),
                seed=seed,
                max_tokens=block,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                logit_bias=bias,
                stop_token_ids=sorted(self.ends),
                detokenize=False,
            )
            for rows, seed in zip(groups.values(), seeds(candidates.streams[first], candidates.length), strict=True)
        ]
        requests = [{"prompt_token_ids": candidates.prompt + list(answer)} for answer in groups]
        results = self.engine.generate(requests, parameters, use_tqdm=False) if requests else []
        new: list[list[int]] = [[] for _ in range(len(candidates))]
        finished = candidates.finished.clone()
        for rows, result in zip(groups.values(), results, strict=True):
            outputs = sorted(result.outputs, key=lambda one: one.index)
            for row, output in zip(rows, outputs * len(rows) if greedy else outputs, strict=True):
                new[row] = [int(token) for token in output.token_ids]
                candidates.answers[row] += new[row]
                finished[row] = bool(new[row]) and new[row][-1] in self.ends
        candidates.finished = finished
        return new, None, finished

    def append(self, candidates: Candidates, tokens: Sequence[int]) -> None:
        for answer in candidates.answers:
            answer += [int(token) for token in tokens]

    def branch(self, candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None = None) -> Candidates:
        return branch_of(candidates, index, ordinals)

    def join(self, parts: Sequence[Candidates]) -> Candidates:
        return union_of(parts)

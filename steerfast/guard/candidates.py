"""Candidates: answers that grow together from one prompt, their sampling, and the base of backends that grow them.

Each candidate has a stream, a number that follows from the seed and its ancestors. Token t of a stream always gets the
same uniform number. So an answer does not depend on its batch, and a first child continues as its parent would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast.guard.objective import ScoredAnswer
from steerfast.guard.parts import expect

_NUCLEUS = 1024  # tokens in which top_p is looked for before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """Say how a token is drawn: by processors, temperature, top_k and top_p, in that order, as transformers does.

    Temperature 0 takes the likeliest token, top_k 0 and top_p 1 mean all tokens. processors: a ``LogitsProcessorList``,
    or any callable of token ids [n, T] and logits [n, V].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    processors: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        expect(0 <= self.temperature < math.inf, "temperature", "a number of at least 0", self.temperature)
        expect(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "a whole number of at least 0", self.top_k)
        expect(0 < self.top_p <= 1, "top_p", "a number above 0, at most 1", self.top_p)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw a token int64 [n] from logits [n, V], by inversion at the uniform numbers float32 [n] in (0, 1]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    scaled = logits.float() / sampling.temperature
    ids, size = None, logits.shape[1]
    if 0 < sampling.top_k < size:
        scaled, ids = scaled.topk(sampling.top_k)
    p = scaled.softmax(dim=1)
    if sampling.top_p < 1:
        if ids is None:
            p, ids = p.topk(min(_NUCLEUS, size))
            if bool((p.sum(dim=1) < sampling.top_p).any()):
                p, ids = scaled.softmax(dim=1).sort(dim=1, descending=True)
        p = torch.where(p.cumsum(dim=1) - p < sampling.top_p, p, 0.0)
    mass = p.cumsum(dim=1)
    # The first place where the mass reaches u·total > 0, so its probability is above 0.
    at = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None]).clamp_(max=p.shape[1] - 1)
    return (at if ids is None else ids.gather(1, at))[:, 0]


def _mix(x: np.ndarray, number: Any) -> np.ndarray:
    """Return pseudo-random uint64 numbers that follow from two (SplitMix64)."""
    numbers = np.atleast_1d(np.asarray(number, dtype=np.uint64))  # arrays wrap around silently
    return _scramble(x + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _scramble(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def root_stream(seed: int) -> np.ndarray:
    """Return the stream of a prompt's first candidate: uint64 [1]."""
    return _scramble(np.array([seed % 2**64], dtype=np.uint64))


def child_streams(streams: np.ndarray, position: int, ordinals: np.ndarray) -> np.ndarray:
    """Return the streams of children that branch off at a token; child 0 keeps its parent's."""
    return np.where(ordinals == 0, streams, _mix(_mix(~streams, position), ordinals))


def uniforms(streams: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return the uniform numbers of the tokens from `start` on: float32 [n, count] in (0, 1]."""
    bits = _mix(streams[:, None], np.arange(start, start + count)[None]) >> np.uint64(40)
    return ((bits + 0.5) * 2.0**-24).astype(np.float32)


@dataclass(eq=False)
class Candidates:
    """Answers so far to one prompt.

    answers: token ids, n of them; all unfinished ones have the same length. finished: bool [n], on the CPU.
    hidden: latent states float32 [n, S], see `steerfast.guard.parts`; None if the backend does not have them.
    streams: uint64 [n]. state: the backend's private state of the unfinished ones. scores: n, set by a search.
    """

    prompt: list[int]
    answers: list[list[int]]
    finished: Tensor
    hidden: Tensor | None
    streams: np.ndarray
    state: Any = None
    scores: list[ScoredAnswer] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def length(self) -> int:
        """Return the tokens of the longest answer: of every unfinished one."""
        return max(map(len, self.answers), default=0)

    def column(self, name: str) -> Tensor:
        """Return one of the scores of all answers: float32 [n]."""
        return torch.tensor([getattr(one, name) for one in self.scores])


class Backend:
    """A source of candidates; a subclass defines `extend`.

    This class keeps tokens alone, which suffices for scorers that read text. A backend with hidden states or a cache
    fills `Candidates.hidden` and `Candidates.state` in the other methods.

    Args:
        ends: tokens that finish an answer. vocabulary: number of logits. context: most tokens of prompt and answer.
    """

    def __init__(self, ends: frozenset[int], vocabulary: int, context: int, prompt_layer: int | None = None) -> None:
        self.ends, self.vocabulary, self.context, self.prompt_layer = ends, vocabulary, context, prompt_layer

    def start(self, prompt_ids: Sequence[int], n: int = 1, seed: int = 0) -> Candidates:
        """Return `n` empty answers to a prompt; GuardError if it is empty or leaves no room in the context."""
        expect(0 < len(prompt_ids) < self.context, "prompt", f"1 to {self.context - 1} tokens", len(prompt_ids))
        prompt = [int(token) for token in prompt_ids]
        root = Candidates(prompt, [[]], torch.zeros(1, dtype=torch.bool), None, root_stream(seed))
        self.prefill(root)
        return root if n == 1 else self.branch(root, [0] * n, range(n))

    def prefill(self, root: Candidates) -> None:
        """Read the prompt of one empty answer, in place."""

    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> list[list[int]]:
        """Add up to `block` tokens to each unfinished answer, in place; return each answer's new tokens.

        A penalty, float [V], is subtracted from all logits.
        """
        raise NotImplementedError

    def append(self, candidates: Candidates, tokens: Sequence[int]) -> None:
        """Add the given tokens to all answers, none of which is finished; in place."""
        for answer in candidates.answers:
            answer += [int(token) for token in tokens]

    def branch(self, candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None = None) -> Candidates:
        """Return new candidates, the i-th a copy of ``index[i]``.

        Ordinals number the children of a parent: 0 (the default) continues as the parent would, others grow apart.
        """
        at = torch.as_tensor(index, dtype=torch.long)
        numbers = np.zeros(len(at), dtype=np.int64) if ordinals is None else np.asarray(ordinals)
        hidden = candidates.hidden
        return replace(
            candidates,
            answers=[list(candidates.answers[i]) for i in index],
            finished=candidates.finished[at],
            hidden=None if hidden is None else hidden[at.to(hidden.device)],
            streams=child_streams(candidates.streams[at.numpy()], candidates.length, numbers),
            state=None,
            scores=[candidates.scores[i] for i in index if candidates.scores],
        )

    def join(self, groups: Sequence[Candidates]) -> Candidates:
        """Return all candidates of several groups, in order."""
        known = [group.hidden for group in groups if group.hidden is not None]
        return Candidates(
            prompt=groups[0].prompt,
            answers=[answer for group in groups for answer in group.answers],
            finished=torch.cat([group.finished for group in groups]),
            hidden=torch.cat(known) if len(known) == len(groups) else None,
            streams=np.concatenate([group.streams for group in groups]),
            scores=[score for group in groups for score in group.scores],
        )

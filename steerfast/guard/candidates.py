"""Candidates: answers that grow together from one prompt, and the backends that make them grow.

The prompt runs once, alone; its keys and values are then repeated for the candidates. Every token is one batched pass
of all candidates that are not finished; the states that scorers and critic read (`steerfast.guard.latent`) come from
that same pass.

Randomness is counted, not drawn: each candidate has a stream, a number that follows from the seed and from how it
descends from others, and token t of a stream always meets the same uniform number. So an answer does not depend on what
else is in the batch, and the first child of a candidate goes on as the candidate itself would have.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from steerfast.errors import ArchitectureError, GuardError
from steerfast.guard import latent
from steerfast.hf import caches
from steerfast.hf.generation import device_of, end_tokens
from steerfast.hf.latch import Latch
from steerfast.hf.structure import find_decoder
from steerfast.text.encoding import context_of

__all__ = ["Backend", "Candidates", "HFBackend", "Sampling", "sample"]

_NUCLEUS = 1024  # tokens in which top_p is looked for before the whole vocabulary is sorted
_ROOM = 32  # tokens that a cache makes room for at a time


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_k: 0 means all. top_p: 1 means all. In that order, as transformers.

    processors: a transformers ``LogitsProcessorList`` (or any callable of token ids [n, T] and logits [n, V]) that is
    applied first.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    processors: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise GuardError(f"temperature: expected a number of at least 0, got {self.temperature!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise GuardError(f"top_k: expected a whole number of at least 0, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise GuardError(f"top_p: expected a number above 0, at most 1, got {self.top_p!r}")


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token of each row by inversion of its distribution: int64 [n].

    Args:
        logits: [n, V]. uniform: float32 [n] in (0, 1].
    """
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
    # The first place where the mass reaches u·total > 0: one that has a probability.
    at = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None]).clamp_(max=p.shape[1] - 1)
    return (at if ids is None else ids.gather(1, at))[:, 0]


# -- streams ---------------------------------------------------------------------------------------


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose outputs look random (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _combined(x: np.ndarray, number: Any) -> np.ndarray:
    numbers = np.atleast_1d(np.asarray(number, dtype=np.uint64))  # arrays wrap around silently
    return _mixed(x + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def root_stream(seed: int) -> np.ndarray:
    return _mixed(np.array([seed % 2**64], dtype=np.uint64))


def child_streams(streams: np.ndarray, position: int, ordinals: np.ndarray) -> np.ndarray:
    """Streams of children that branch off at a token; the one numbered 0 keeps its parent's."""
    return np.where(ordinals == 0, streams, _combined(_combined(~streams, position), ordinals))


def uniforms(streams: np.ndarray, start: int, count: int) -> np.ndarray:
    """float32 [n, count] in (0, 1]: what the tokens from `start` on meet."""
    bits = _combined(streams[:, None], np.arange(start, start + count)[None]) >> np.uint64(40)
    return ((bits + 0.5) * 2.0**-24).astype(np.float32)


def seeds(streams: np.ndarray, start: int) -> list[int]:
    """What seeds another generator for the tokens from `start` on: n numbers below 2^62."""
    return [int(seed) for seed in _combined(streams, start) >> np.uint64(2)]


# -- the protocol ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Candidates:
    """Answers so far to one prompt.

    answers: token ids, n of them; all that are not finished have the same length. finished: bool [n], on the CPU.
    hidden: latent states float32 [n, S], see `steerfast.guard.latent`; None where the backend does not know them.
    streams: uint64 [n]. state: the backend's own, of those that are not finished.
    """

    prompt: list[int]
    answers: list[list[int]]
    finished: Tensor
    hidden: Tensor | None
    streams: np.ndarray
    state: Any = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def length(self) -> int:
        """Tokens of the longest answer: of all those that are not finished."""
        return max(map(len, self.answers), default=0)


class Backend(Protocol):
    """Where candidates come from. One that knows no hidden states serves scorers that read texts, and no critic.

    ends: tokens that finish an answer. vocabulary: number of logits. context: most tokens of a prompt and its answer.
    prompt_layer: of the latent states that it gives, see `steerfast.guard.latent`.
    """

    @property
    def ends(self) -> frozenset[int]: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def prompt_layer(self) -> int | None: ...

    def start(self, prompt_ids: Sequence[int], n: int, seed: int) -> Candidates:
        """`n` empty answers to a prompt."""

    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> tuple[list[list[int]], Tensor | None, Tensor]:
        """Up to `block` more tokens of each answer that is not finished, in place.

        Args:
            sampling: None: temperature 1, all tokens. penalty: float [V], taken from all logits.

        Returns:
            The new tokens of each (none where it was finished), latent states [n, S], finished [n].
        """

    def append(self, candidates: Candidates, tokens: Sequence[int]) -> None:
        """The given tokens as the next ones of all answers, none of which is finished; in place."""

    def branch(self, candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None = None) -> Candidates:
        """New candidates, the i-th a copy of ``index[i]``; they grow apart where their ordinals differ.

        Args:
            ordinals: which child of its parent each is; 0 (the default) goes on as the parent would.
        """

    def join(self, parts: Sequence[Candidates]) -> Candidates:
        """All candidates of several, in order."""


def rooted(prompt_ids: Sequence[int], seed: int, context: int) -> Candidates:
    """One empty answer: what `Backend.start` makes, without the hidden states and the state.

    Raises:
        GuardError: an empty prompt, or one that leaves no room in the context.
    """
    if not 0 < len(prompt_ids) < context:
        raise GuardError(f"prompt: expected 1 to {context - 1} tokens, got {len(prompt_ids)}")
    prompt = [int(token) for token in prompt_ids]
    return Candidates(prompt, [[]], torch.zeros(1, dtype=torch.bool), None, root_stream(seed))


def branched(candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None) -> Candidates:
    """What `Backend.branch` does to everything but the state."""
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
    )


def joined(parts: Sequence[Candidates]) -> Candidates:
    """What `Backend.join` does to everything but the state."""
    known = [part.hidden for part in parts if part.hidden is not None]
    return Candidates(
        prompt=parts[0].prompt,
        answers=[answer for part in parts for answer in part.answers],
        finished=torch.cat([part.finished for part in parts]),
        hidden=torch.cat(known) if len(known) == len(parts) else None,
        streams=np.concatenate([part.streams for part in parts]),
    )


# -- transformers ----------------------------------------------------------------------------------


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for the tokens to come: a step writes its own instead of copying all before it."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.keys.shape[-2]
        end = held + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.room = _with_room(self.keys, end), _with_room(self.values, end)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None

    def fork(self) -> _RoomyLayer:
        """Another layer that reads the same tokens, and copies them before it writes."""
        other = copy.copy(self)
        other.room = None
        return other


def _with_room(held: Tensor, tokens: int) -> Tensor:
    room = held.new_empty(*held.shape[:2], -(-tokens // _ROOM) * _ROOM, held.shape[3])
    room[:, :, : held.shape[2]] = held
    return room


def _fork(cache: DynamicCache) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = [layer.fork() if isinstance(layer, _RoomyLayer) else copy.copy(layer) for layer in cache.layers]
    latch: Latch | None = getattr(cache, "steerfast_latch", None)
    if latch is not None:
        other.steerfast_latch = latch.copy()  # type: ignore[attr-defined]
    return other


@dataclass
class _Rows:
    """Of the candidates that are not finished, in order: their cache, logits [m, V] of their next tokens, and latent
    states [m, S].
    """

    cache: DynamicCache
    logits: Tensor
    hidden: Tensor

    def taken(self, rows: Tensor) -> _Rows:
        cache = _fork(self.cache)
        rows = rows.to(self.logits.device)
        if not torch.equal(rows, torch.arange(len(self.logits), device=rows.device)):
            cache.batch_select_indices(rows)
        return _Rows(cache, self.logits[rows], self.hidden[rows])

    def keep(self, rows: Tensor) -> None:
        """Forget all but these, in place."""
        self.cache.batch_select_indices(rows)
        self.logits, self.hidden = self.logits[rows], self.hidden[rows]


class HFBackend:
    """Candidates of a HuggingFace model, steered or not.

    Args:
        prompt_layer: of the latent states, see `steerfast.guard.latent`; None: they are the last rows alone.

    Memory: keys and values of every candidate that is not finished, `cache_bytes` each at most. A search that keeps K
    of N candidates holds N + 3K + 1 at a time: the new ones, those they grew from, those kept so far, those being kept.

    ``control``, which can be set at any time, edits the hidden states [n, H] (after the final norm) that enter the
    language-model head, see `steerfast.guard.search.value_ascent`; scorers still see the model's own.

    Raises:
        ArchitectureError: no decoder-only model with a language-model head.
        GuardError: a prompt_layer that the model does not have.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompt_layer: int | None = None) -> None:
        layers = find_decoder(model).layers
        if prompt_layer is not None and not 0 <= prompt_layer < len(layers):
            raise GuardError(f"prompt_layer: expected None or a layer in 0..{len(layers) - 1}, got {prompt_layer!r}")
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ArchitectureError(f"model: expected a language-model head, got {type(model).__name__} without one")
        self.model = model
        self.prompt_layer = prompt_layer
        self._layer = None if prompt_layer is None else layers[prompt_layer]
        self.control: Callable[[Tensor], Tensor] | None = None
        self._head: nn.Module = head
        self._ends = torch.tensor(sorted(end_tokens(model, tokenizer)), dtype=torch.long, device=device_of(model))
        takes = inspect.signature(model.forward).parameters
        self._cache_name = caches.argument(model)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that finish an answer."""
        return frozenset(self._ends.tolist())

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        weight: Any = self._head.weight
        return int(weight.shape[0])

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return context_of(self.model)

    def cache_bytes(self, tokens: int) -> int:
        """Memory of one candidate's keys and values, prompt included, of a model that attends to all its tokens."""
        config: Any = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = next(self.model.parameters()).dtype.itemsize
        return 2 * config.num_hidden_layers * heads * width * itemsize * (-(-tokens // _ROOM) * _ROOM)

    @torch.inference_mode()
    def start(self, prompt_ids: Sequence[int], n: int = 1, seed: int = 0) -> Candidates:
        """As `Backend.start`; one pass over the prompt, whatever `n` is.

        Raises:
            GuardError: an empty prompt, or one longer than the context.
        """
        root = rooted(prompt_ids, seed, self.context)
        if n < 1:
            raise GuardError(f"n: expected at least 1, got {n}")
        config: Any = self.model.config
        with self._prompt_row() as row:
            output, last = self._pass(DynamicCache(config=config), torch.tensor([root.prompt], device=self.device))
        cache = caches.found(output)
        if not caches.splits(cache):
            raise ArchitectureError(f"model: expected keys and values that grow by a token, got {type(cache).__name__}")
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[number] = roomy = _RoomyLayer()
                roomy.__dict__.update(layer.__dict__)
        root.hidden = latent.begin(last, None if self._layer is None else row[-1])
        root.state = _Rows(cache, output.logits[:, -1], root.hidden)
        return root if n == 1 else self.branch(root, [0] * n, range(n))

    @torch.inference_mode()
    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> tuple[list[list[int]], Tensor, Tensor]:
        """As `Backend.extend`.

        Raises:
            GuardError: a block below 1, or past the model's context.
        """
        if block < 1:
            raise GuardError(f"block: expected at least 1, got {block}")
        held = len(candidates.prompt) + candidates.length
        if held + block > self.context:
            raise GuardError(f"block: the model's context has room for {self.context - held} more tokens, got {block}")
        sampling = sampling or Sampling()
        open_rows = (~candidates.finished).nonzero()[:, 0]
        seen = None if sampling.processors is None else self._ids(candidates, open_rows)
        drawn = uniforms(candidates.streams[open_rows.numpy()], candidates.length, block)
        uniform = torch.from_numpy(drawn).to(self.device)
        tokens = torch.full((len(candidates), block), -1, device=self.device)
        assert candidates.hidden is not None
        hidden, live = candidates.hidden.clone(), open_rows.to(self.device)  # other candidates may hold the old ones
        penalty = None if penalty is None else penalty.to(self.device)
        rows: _Rows | None = candidates.state
        for step in range(block):
            if rows is None:
                break
            logits = rows.logits
            if sampling.processors is not None:
                logits = sampling.processors(seen, logits.float())  # type: ignore[arg-type]
            if penalty is not None:
                logits = logits - penalty
            chosen = sample(logits, uniform[:, step], sampling)
            tokens[live, step] = chosen
            rows = self._forward(rows, chosen, candidates.length + step + 1)
            if seen is not None:
                seen = torch.cat([seen, chosen[:, None]], dim=1)
            ended = torch.isin(chosen, self._ends)
            if step + 1 == block:
                hidden[live] = rows.hidden
            if not bool(ended.any()):
                continue
            hidden[live[ended]] = rows.hidden[ended]
            going = (~ended).nonzero()[:, 0]
            live, uniform = live[going], uniform[going]
            seen = None if seen is None else seen[going]
            if not len(going):
                rows = None
            elif step + 1 < block:
                rows.keep(going)
            else:
                rows = rows.taken(going)
        candidates.state, candidates.hidden = rows, hidden
        candidates.finished = torch.ones_like(candidates.finished).index_fill(0, live.cpu(), False)
        new = [[token for token in row if token >= 0] for row in tokens.tolist()]
        for answer, more in zip(candidates.answers, new, strict=True):
            answer += more
        return new, hidden, candidates.finished

    @torch.inference_mode()
    def append(self, candidates: Candidates, tokens: Sequence[int]) -> None:
        """As `Backend.append`, a pass per token: what steers the model takes several at once for another prompt."""
        for token in tokens:
            chosen = torch.full((len(candidates),), token, device=self.device)
            candidates.state = self._forward(candidates.state, chosen, candidates.length + 1)
            candidates.hidden = candidates.state.hidden
            for answer in candidates.answers:
                answer.append(int(token))

    @torch.inference_mode()
    def branch(self, candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None = None) -> Candidates:
        """As `Backend.branch`. Keys and values are copied where the rows change, else when one of the two grows."""
        new = branched(candidates, index, ordinals)
        row_of = (~candidates.finished).cumsum(0) - 1
        rows = row_of[torch.as_tensor(index, dtype=torch.long)[~new.finished]]
        if len(rows):
            new.state = candidates.state.taken(rows)
        return new

    @torch.inference_mode()
    def join(self, parts: Sequence[Candidates]) -> Candidates:
        """As `Backend.join`."""
        if len(parts) == 1:
            return parts[0]
        new = joined(parts)
        states = [part.state for part in parts if part.state is not None]
        if len(states) == 1:
            new.state = states[0]
        elif states:
            cache = _fork(states[0].cache)
            others = [state.cache for state in states[1:]]
            layers: list[Any] = cache.layers  # plain keys and values, see `start`
            for number, layer in enumerate(layers):
                same: list[Any] = [layer, *(other.layers[number] for other in others)]
                layer.keys, layer.values = (torch.cat([getattr(one, n) for one in same]) for n in ("keys", "values"))
            _join_latches(cache, others)
            logits, hidden = (torch.cat([getattr(state, name) for state in states]) for name in ("logits", "hidden"))
            new.state = _Rows(cache, logits, hidden)
        return new

    @torch.inference_mode()
    def top(self, candidates: Candidates, count: int) -> tuple[Candidates, Tensor]:
        """The only candidate, not finished, with each of its `count` likeliest next tokens.

        Returns:
            The candidates, one token longer; the logits of those tokens, float32 [count].
        """
        scores, chosen = candidates.state.logits[0].float().topk(min(count, candidates.state.logits.shape[1]))
        options = self.branch(candidates, [0] * len(chosen))
        rows = self._forward(options.state, chosen, candidates.length + 1)
        options.hidden = rows.hidden
        for answer, token in zip(options.answers, chosen.tolist(), strict=True):
            answer.append(token)
        ended = torch.isin(chosen, self._ends)
        options.finished, going = ended.cpu(), (~ended).nonzero()[:, 0]
        options.state = rows.taken(going) if len(going) else None
        return options, scores

    def _ids(self, candidates: Candidates, rows: Tensor) -> Tensor:
        ids = [candidates.prompt + candidates.answers[i] for i in rows.tolist()]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _forward(self, rows: _Rows, chosen: Tensor, tokens: int) -> _Rows:
        """A token more, int64 [m], after which the answers have so many `tokens`; in the memory of `rows`."""
        output, last = self._pass(rows.cache, chosen[:, None])
        return _Rows(caches.found(output), output.logits[:, -1], latent.grow(rows.hidden, last, tokens))

    def _pass(self, cache: DynamicCache, ids: Tensor) -> tuple[Any, Tensor]:
        """The model's output for ids [m, t], and its last hidden states float32 [m, H] at the last tokens."""
        with self._captured() as captured:
            output = self.model(input_ids=ids, use_cache=True, **{self._cache_name: cache}, **self._last_only)
        return output, captured[0]

    @contextmanager
    def _captured(self) -> Iterator[list[Tensor]]:
        """Take down the hidden states that enter the head, before `control` edits them."""
        captured: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(functools.partial(_at_head, captured, self.control))
        try:
            yield captured
        finally:
            handle.remove()

    @contextmanager
    def _prompt_row(self) -> Iterator[list[Tensor]]:
        """Take down the prompt's last row [1, H] at `prompt_layer`, where there is one, each time it comes by."""
        captured: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            rows = output if isinstance(output, Tensor) else output[0]
            captured.append(rows[:, -1].to(torch.float32, copy=True))

        handle = None if self._layer is None else self._layer.register_forward_hook(keep)
        try:
            yield captured
        finally:
            if handle is not None:
                handle.remove()


def _at_head(
    captured: list[Tensor], control: Callable[[Tensor], Tensor] | None, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    last = args[0][:, -1]
    captured.append(last.to(torch.float32, copy=True))
    return None if control is None else (control(last)[:, None], *args[1:])


def _join_latches(cache: Any, others: Sequence[Any]) -> None:
    """Decisions of a steering, which lie with the caches."""
    latch: Latch | None = getattr(cache, "steerfast_latch", None)
    if latch is not None:
        all_of = [latch, *(other.steerfast_latch for other in others)]
        latch.values = torch.cat([one.values for one in all_of], dim=1)
        latch.scores = torch.cat([one.scores for one in all_of], dim=1)

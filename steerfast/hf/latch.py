"""Gate decisions that live and move with a KV cache.

A prompt's decision has to follow its keys and values: beam search reorders the cache's batch, contrastive methods
repeat it, users deep-copy it to branch a conversation. So the decision is an attribute of the cache, and the cache's
class gains three methods that move it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Latch:
    """Hold the decisions of one steering for the N sequences of one cache, with K profiles each.

    Attributes:
        values: float32 [layers, N·K], gate values. scores: float32 [layers, N·K], the scores behind them.
        owner: which steering decided; decisions of another steering do not count.
        stack: K.
        prompt: tokens of the cache before the answer.
        tokens: how many tokens the cache held when the latch was attached.
        counter: the tensor in which a static cache counts them, and its version then. While the version stays, so does
            the count.
        answers: int64 [N] on the CPU, the first column of each answer behind a thought, `NO_END` during the thought;
            None: edits wait for no thought. recent: int64 [N, n], the last tokens before the next step.
    """

    values: Tensor
    scores: Tensor
    owner: str = ""
    stack: int = 1
    prompt: int = 0
    tokens: int = 0
    counter: tuple[Tensor, int] | None = None
    answers: Tensor | None = None
    recent: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the counter: the versions of a copied tensor start again."""
        return {**vars(self), "counter": None}

    def __str__(self) -> str:
        """Say for each sequence which layers' gates are open, and the scores behind them."""
        values, scores = self.by_sequence(self.values.cpu()), self.by_sequence(self.scores.cpu())
        read = (scores != float("-inf")).any(dim=1).any(dim=1).nonzero().flatten().tolist()
        is_open = (values >= 0.5).any(dim=0).tolist()
        return f"open {is_open}, scores by layer { ({layer: scores[layer].tolist() for layer in read}) }"

    @property
    def sequences(self) -> int:
        """N."""
        return self.values.shape[1] // self.stack

    def copy(self, device: torch.device | None = None) -> Latch:
        """Return a copy that shares no memory, on a device; None: where this one lies."""
        values, scores = (tensor.to(device or tensor.device, copy=True) for tensor in (self.values, self.scores))
        numbers = self.owner, self.stack, self.prompt, self.tokens
        return Latch(values, scores, *numbers, answers=self.answers, recent=self.recent)

    def by_sequence(self, tensor: Tensor) -> Tensor:
        """Return a tensor [layers, N·K] as [layers, N, K]."""
        return tensor.unflatten(1, (-1, self.stack))

    def select(self, index: Tensor) -> None:
        """Keep the sequences of an index, int64 [n], in its order."""
        self._move(lambda tensor, dim: tensor.index_select(dim, index.to(tensor.device)))

    def repeat(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._move(lambda tensor, dim: tensor.repeat_interleave(repeats, dim=dim))

    def join(self, others: Sequence[Latch]) -> None:
        """Add the sequences of other latches of the same steering behind its own."""
        for name, dim in (("values", 1), ("scores", 1), ("answers", 0), ("recent", 0)):
            if (own := getattr(self, name)) is not None:
                setattr(self, name, torch.cat([own, *(getattr(one, name) for one in others)], dim=dim))

    def _move(self, move: Callable[[Tensor, int], Tensor]) -> None:
        """Replace each tensor by what `move` makes of it and its dimension of sequences."""
        for name in ("values", "scores"):
            setattr(self, name, move(self.by_sequence(getattr(self, name)), 1).flatten(1))
        for name in ("answers", "recent"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, move(tensor, 0))


def attached(cache: Any) -> Latch | None:
    """Return the latch on `cache`, or None."""
    return getattr(cache, "steerfast_latch", None)


def length(cache: Any) -> int:
    """Return how many tokens `cache` holds. Static caches count on the device; an unchanged count is not read again."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    count = cache.get_seq_length()
    latch = attached(cache)
    if isinstance(count, Tensor) and latch is not None and latch.counter is not None:
        counter, version = latch.counter
        if counter is count and counter._version == version:
            return latch.tokens
    return int(count)


def attach(cache: Any, latch: Latch, tokens: int) -> None:
    """Make `latch` part of `cache`, which holds `tokens` tokens."""
    latch.tokens = tokens
    if attached(cache) is latch:
        if latch.counter is not None:
            latch.counter = latch.counter[0], latch.counter[0]._version
        return
    count = cache.get_seq_length()
    versioned = isinstance(count, Tensor) and not count.is_inference()
    latch.counter = (count, count._version) if versioned else None
    if not hasattr(cache, "steerfast_moves_along"):
        kind: Any = type(cache)
        cache.__class__ = _latching(kind)
    cache.steerfast_latch = latch


@functools.cache
def _latching(base: Any) -> Any:
    """Return `base`, a cache class, with decisions that move along; the same class every time.

    The new class holds all attributes of `base` itself. Otherwise a compiler would guard, before each step, that no
    class before `base` has them.
    """

    def reorder_cache(self: Any, beam_idx: Tensor) -> Any:
        self.steerfast_latch.select(beam_idx)
        return base.reorder_cache(self, beam_idx)

    def batch_select_indices(self: Any, indices: Tensor) -> Any:
        self.steerfast_latch.select(indices)
        return base.batch_select_indices(self, indices)

    def batch_repeat_interleave(self: Any, repeats: int) -> Any:
        self.steerfast_latch.repeat(repeats)
        return base.batch_repeat_interleave(self, repeats)

    def reduce(self: Any, protocol: Any) -> Any:
        # A class made at run time cannot be found by name again: rebuild it from the class it extends.
        return _rebuild, (base,), self.__dict__

    found = {name: inspect.getattr_static(base, name) for name in dir(base) if not name.startswith("__")}
    moving = {method.__name__: method for method in (reorder_cache, batch_select_indices, batch_repeat_interleave)}
    made = {"__module__": base.__module__, "__reduce_ex__": reduce, "steerfast_moves_along": True}
    return type(base.__name__, (base,), {**found, **moving, **made})


def _rebuild(base: Any) -> Any:
    return object.__new__(_latching(base))

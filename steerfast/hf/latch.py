"""Gate decisions that live and move with a KV cache.

A prompt's decision must survive whatever happens to its keys and values: beam search reorders the cache's batch,
contrastive methods repeat it, users deep-copy it to branch a conversation. So the decision is an attribute of the
cache, and the cache's class gains three methods that move it along.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Latch:
    """Decisions of one steering for the sequences of one cache.

    owner: which steering decided (another one's decisions mean nothing to it).
    values: float32 [gates, N], the gate values g. scores: float32 [gates, N], what they were decided from.
    prompt: tokens of the cache before the answer.
    tokens: how many the cache held when the latch was attached. counter: the tensor in which a static cache counts
    them, and its version then: as long as that is the same, so is the count.
    """

    owner: str
    values: Tensor
    scores: Tensor
    prompt: int = 0
    tokens: int = 0
    counter: tuple[Tensor, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied tensor counts its versions anew."""
        return {**vars(self), "counter": None}

    def copy(self) -> Latch:
        return Latch(self.owner, self.values.clone(), self.scores.clone(), self.prompt)

    def select(self, index: Tensor) -> None:
        self.values = self.values.index_select(1, index.to(self.values.device))
        self.scores = self.scores.index_select(1, index.to(self.scores.device))

    def repeat(self, repeats: int) -> None:
        self.values = self.values.repeat_interleave(repeats, dim=1)
        self.scores = self.scores.repeat_interleave(repeats, dim=1)


def read(cache: Any, owner: str) -> Latch | None:
    """The latch that `owner` left on `cache`, if any."""
    latch = getattr(cache, "steerfast_latch", None)
    return latch if latch is not None and latch.owner == owner else None


def length(cache: Any) -> int:
    """Tokens that `cache` holds. Static caches count on the device: that is not asked again where nothing changed."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    count = cache.get_seq_length()
    latch: Latch | None = getattr(cache, "steerfast_latch", None)
    if isinstance(count, Tensor) and latch is not None and latch.counter is not None:
        counter, version = latch.counter
        if counter is count and counter._version == version:
            return latch.tokens
    return int(count)


def attach(cache: Any, latch: Latch, tokens: int) -> None:
    """Make `latch` part of `cache`, which holds so many tokens."""
    latch.tokens = tokens
    if getattr(cache, "steerfast_latch", None) is latch:
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
    """`base`, a cache class, with decisions that move along; the same class every time.

    It has itself all that `base` has found in its own: a compiler would guard, before each step, that no class has it
    before the one where it was found.
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

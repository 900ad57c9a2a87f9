"""Find the cache in a model's arguments and outputs; take some sequences from them and put them back; take a pass back.

For the second pass over prompts whose gate fired, see `steerfast.hf.steering`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steerfast.errors import ArchitectureError

__all__ = ["argument", "found", "merged", "rewind", "rewinds", "select", "splits"]

_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def argument(model: nn.Module) -> str:
    """What the forward of a model, or of its backbone, calls the cache of keys and values.

    Raises:
        ArchitectureError: it takes none, or one that does not count tokens: a state of linear attention alone.
    """
    from transformers import DynamicCache

    taken = inspect.signature(model.forward).parameters
    name = next((name for name in _NAMES if name in taken), None)
    try:
        if name is None:
            raise ValueError(f"it takes no {' or '.join(_NAMES)}")
        if (config := getattr(model, "config", None)) is not None:
            DynamicCache(config=config).get_seq_length()
    except ValueError as error:
        raise ArchitectureError(
            f"model: expected {type(model).__name__} to keep keys and values, where a gate's decision stays; {error}"
        ) from error
    return name


def found(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments or outputs, by either name; None where there is none."""
    for name in _NAMES:
        if (cache := values.get(name)) is not None:
            return cache
    return None


def splits(cache: Any) -> bool:
    """Whether sequences can be taken from a cache and put back: plain keys and values that grow."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    return layers is not None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def select(name: str, value: Any, index: Tensor, count: int) -> Any:
    """The argument `name` of a backbone for some of its `count` sequences."""
    if isinstance(value, dict):
        return {key: select(name, one, index, count) for key, one in value.items()}
    if hasattr(value, "batch_select_indices"):
        if value.get_seq_length() > 0:
            value.batch_select_indices(index)
        return value
    if not isinstance(value, Tensor) or name == "cache_position":
        return value
    dimension = 1 if name == "position_ids" and value.dim() == 3 else 0  # [3, N, T] where positions have three axes
    if value.dim() <= dimension or value.shape[dimension] != count:
        return value
    return value.index_select(dimension, index.to(value.device))


def merged(first: Any, second: Any, index: Tensor, count: int) -> Any:
    """The outputs, or caches, of all sequences with some of them taken from a second pass."""
    if isinstance(first, Tensor):
        if first.dim() == 0 or first.shape[0] != count:
            return first
        return first.index_copy(0, index.to(first.device), second)
    if hasattr(first, "batch_select_indices"):
        for old, new in zip(first.layers, second.layers, strict=True):
            old.keys = old.keys.index_copy(0, index.to(old.keys.device), new.keys)
            old.values = old.values.index_copy(0, index.to(old.values.device), new.values)
        return first
    if isinstance(first, dict):  # transformers' outputs, too
        parts: Any = {key: merged(value, second[key], index, count) for key, value in first.items()}
        return type(first)(**parts)
    if isinstance(first, (tuple, list)):
        return type(first)(merged(a, b, index, count) for a, b in zip(first, second, strict=True))
    return first


def rewinds(cache: Any, width: int) -> bool:
    """Whether a pass over `width` tokens of all sequences can be taken back: caches of a fixed size write in place."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    return all(
        type(layer) is StaticLayer
        or (type(layer) is StaticSlidingWindowLayer and _keeps(int(layer.get_seq_length()), width, layer.max_cache_len))
        for layer in getattr(cache, "layers", [None])
    )


def _keeps(past: int, width: int, window: int) -> bool:
    """Whether a sliding window still holds all it held before `width` more tokens came."""
    return past == 0 or past + width <= window


def rewind(cache: Any, lengths: list[int]) -> None:
    """Let each layer of a cache hold as many tokens as it did; see `rewinds`."""
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length.fill_(length)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = length

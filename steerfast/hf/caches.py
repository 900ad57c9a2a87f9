"""Find the cache in a model's arguments and outputs, run some of its sequences again, and undo a pass.

`steerfast.hf.second_pass` needs this for prompts whose gate fired.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steerfast.errors import ArchitectureError

_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def argument(model: nn.Module) -> str:
    """Return the argument name of the KV cache in the forward of a model or its backbone.

    Raises:
        ArchitectureError: the forward takes no cache, or the cache does not count tokens (linear attention alone).
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


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments or outputs of a forward, or None."""
    for name in _NAMES:
        if (cache := values.get(name)) is not None:
            return cache
    return None


def splits(cache: Any) -> bool:
    """Return whether a cache can give up and take back sequences: it holds plain keys and values that grow."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    return layers is not None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def select(name: str, value: Any, index: Tensor, count: int) -> Any:
    """Return the argument `name` of a backbone for the sequences of `index`, out of `count`."""
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


def merge(first: Any, second: Any, index: Tensor, count: int) -> Any:
    """Return outputs or caches of all `count` sequences; those of `index` come from a second pass."""
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
        parts: Any = {key: merge(value, second[key], index, count) for key, value in first.items()}
        return type(first)(**parts)
    if isinstance(first, (tuple, list)):
        return type(first)(merge(a, b, index, count) for a, b in zip(first, second, strict=True))
    return first


def rewinds(cache: Any, width: int) -> bool:
    """Return whether a cache can undo a pass over `width` tokens: it has a fixed size and writes in place."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    def loses_nothing(layer: Any) -> bool:
        if type(layer) is not StaticSlidingWindowLayer:
            return type(layer) is StaticLayer
        past = int(layer.get_seq_length())
        return past == 0 or past + width <= layer.max_cache_len

    return all(map(loses_nothing, getattr(cache, "layers", [None])))


def rewind(cache: Any, lengths: list[int]) -> None:
    """Set each layer of a cache back to its earlier number of tokens; see `rewinds`."""
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length.fill_(length)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = length

"""Tensors that recur from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Buffers:
    """Keep tensors that recur from step to step, such as the tables of a batch shape.

    Args:
        most: all are dropped where there are more; each is cheap to make again.
    """

    def __init__(self, most: float = 512) -> None:
        self._most = most
        self._kept: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return the value of `key`, made once.

        What is made within a dispatch mode is not kept: tensors of `FakeTensorMode` hold no data for later passes.
        """
        value: T | None = self._kept.get(key)
        if value is None:
            with torch.inference_mode(False):  # also serve callers outside inference mode
                value = make()
            if not torch._C._len_torch_dispatch_stack():
                if len(self._kept) > self._most:
                    self._kept.clear()
                self._kept[key] = value
        return value

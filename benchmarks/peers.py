"""repeng and steering-vectors, which steer a model of transformers: each by its own fit and its own hooks.

pip install --no-deps repeng==0.4.0 steering-vectors==0.12.2; pip install gguf
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from torch import nn

Steer = Callable[[float], AbstractContextManager[None]]
"""A context with the vector added at a strength: of 1 the vectors' norms are, in total over the layers, `norm`."""


def repeng(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], layers: Sequence[int], norm: float) -> Steer:
    """Fit repeng's default vector, the first principal component of the differences at the last token."""
    vars(np).setdefault("float_", np.float64)  # repeng 0.4.0 names it; NumPy 2 has no such name
    from repeng import ControlModel, ControlVector, DatasetEntry

    vector = ControlVector.train(model, tokenizer, [DatasetEntry(*pair) for pair in pairs])

    @contextmanager
    def steer(strength: float) -> Iterator[None]:
        wrapped = ControlModel(model, list(layers))
        wrapped.set_control(vector, strength * norm / len(layers))
        try:
            yield
        finally:
            wrapped.reset()
            wrapped.unwrap()

    return steer


def steering_vectors(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], layers: Sequence[int], norm: float
) -> Steer:
    """Fit the default vector of steering-vectors, the mean difference at the last token."""
    from steering_vectors import train_steering_vector

    vector = train_steering_vector(model, tokenizer, list(pairs), layers=list(layers))
    length = float(np.mean([float(one.norm()) for one in vector.layer_activations.values()]))

    @contextmanager
    def steer(strength: float) -> Iterator[None]:
        with vector.apply(model, multiplier=strength * norm / (length * len(layers))):
            yield

    return steer


PEERS = {"repeng": repeng, "steering-vectors": steering_vectors}

"""Other packages that add vectors to the outputs of layers: make vectors of pairs as they do, and attach vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """A package.

    train: (model, tokenizer, [(positive text, negative text), ...], layers) -> layer -> vector [H].
    attach: (model, layer -> vector) changes the model in place: it adds the vectors to all rows.
    """

    train: Callable[[nn.Module, Any, Sequence[tuple[str, str]], Sequence[int]], dict[int, Tensor]]
    attach: Callable[[nn.Module, Mapping[int, Tensor]], Any]


def like(model: nn.Module, vector: Tensor) -> Tensor:
    """Return the vector in the model's dtype, on its device."""
    weight = next(model.parameters())
    return vector.to(device=weight.device, dtype=weight.dtype)


def _repeng() -> Any:
    vars(np).setdefault("float_", np.float64)  # repeng 0.4 names it; numpy 2 has dropped it
    import repeng

    return repeng


def _train_repeng(
    model: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, str]], layers: Sequence[int]
) -> dict[int, Tensor]:
    repeng = _repeng()
    entries = [repeng.DatasetEntry(*pair) for pair in texts]
    directions = repeng.ControlVector.train(model, tokenizer, entries, hidden_layers=list(layers)).directions
    return {layer: torch.from_numpy(directions[layer]) for layer in layers}


def _attach_repeng(model: nn.Module, vectors: Mapping[int, Tensor]) -> None:
    _repeng().ControlModel(model, list(vectors)).set_raw_control(
        {layer: like(model, one) for layer, one in vectors.items()}
    )


def _train_steering_vectors(
    model: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, str]], layers: Sequence[int]
) -> dict[int, Tensor]:
    from steering_vectors import train_steering_vector

    found = train_steering_vector(model, tokenizer, list(texts), layers=list(layers))
    return dict(found.layer_activations)


def _attach_steering_vectors(model: nn.Module, vectors: Mapping[int, Tensor]) -> None:
    from steering_vectors import SteeringVector

    SteeringVector({layer: like(model, one) for layer, one in vectors.items()}).patch_activations(model)


PEERS = {
    "repeng": Peer(_train_repeng, _attach_repeng),
    "steering-vectors": Peer(_train_steering_vectors, _attach_steering_vectors),
}

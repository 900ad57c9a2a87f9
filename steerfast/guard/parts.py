"""What the parts of a guard share: the latent state that heads and critic read, their model, and their files.

The latent state of an answer so far is float32 [n, S]. Generation computes it without another pass. It consists of
parts of H numbers (the base model's hidden size), in this order:

    last    the row of the last token, after the model's final norm
    mean    the mean of those rows over the answer's tokens; of an empty answer, the prompt's last row
    prompt  the row of the prompt's last token, as it leaves decoder layer `prompt_layer`

If `prompt_layer` is None the state is the last row alone: S = H, otherwise S = 3H. All parts of a guard that give or
read states have the same `prompt_layer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from steerfast._files import read_checked, write_checked
from steerfast.errors import GuardError
from steerfast.profile import ModelIdentity

AnyPath = str | os.PathLike[str]

_FORMAT = 2


def expect(fits: bool, name: str, expected: str, got: object) -> None:
    """Raise GuardError, with the value's name and what is expected of it, unless it fits."""
    if not fits:
        raise GuardError(f"{name}: expected {expected}, got {got!r}")


def state_size(hidden_size: int, prompt_layer: int | None) -> int:
    """Return S."""
    return hidden_size if prompt_layer is None else 3 * hidden_size


def grow(state: Tensor, last: Tensor, tokens: int) -> Tensor:
    """Return states [n, S] one token later: `last` is its row [n, H], `tokens` the answers' length with it."""
    if state.shape == last.shape:
        return last
    _, mean, prompt = state.chunk(3, dim=1)
    return torch.cat([last, torch.lerp(mean, last, 1 / tokens), prompt], dim=1)


def deviation(rows: Tensor) -> Tensor:
    """Return the standard deviation of each column, and 1 for a constant column."""
    return torch.where((found := rows.std(dim=0, correction=0)) > 0, found, 1.0)


def check_states(part: str, hidden: Tensor, model: ModelIdentity, prompt_layer: int | None) -> None:
    """Raise GuardError unless `hidden` is states [n, S]."""
    size = state_size(model.hidden_size, prompt_layer)
    if hidden.dim() != 2 or hidden.shape[1] != size:
        layer = "" if prompt_layer is None else f" with the prompt's of layer {prompt_layer}"
        raise GuardError(
            f"{part}: expected hidden states [n, {size}] of {model.name!r}{layer}, got {list(hidden.shape)}"
        )


def common_layer(of: Mapping[str, Any]) -> int | None:
    """Return the `prompt_layer` of all named parts that have one, None if none has; GuardError if two differ."""
    known = [(name, part.prompt_layer) for name, part in of.items() if hasattr(part, "prompt_layer")]
    for name, layer in known[1:]:
        if layer != known[0][1]:
            raise GuardError(
                f"prompt_layer: expected the same for all parts that give or read hidden states, "
                f"got {known[0][1]} ({known[0][0]}) and {layer} ({name})"
            )
    return known[0][1] if known else None


def check_model(part: str, fitted: ModelIdentity, model: ModelIdentity) -> None:
    """Raise GuardError, naming both models, if a part was fitted on another model than `model`."""
    if (problem := fitted.mismatch(model)) is not None:
        raise GuardError(f"{part}: {problem.replace('the profile', f'the {part}', 1)}")


def write_file(
    path: AnyPath, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: ModelIdentity
) -> None:
    """Write tensors (any dtype) and JSON data. The file appears whole or not at all; OutputError if it cannot."""
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {**header, "kind": kind, "format": _FORMAT, "model": asdict(model)}
    # Through JSON, so that it hashes the same before and after.
    write_checked(path, json.loads(json.dumps(content)), held)


def read_file(path: AnyPath, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], ModelIdentity]:
    """Return tensors, header and model of a file that `write_file` wrote.

    Raises:
        GuardError: missing, damaged, of another kind or another format.
    """
    header, tensors = read_checked(path, kind, _FORMAT, GuardError)
    if (found := header.get("kind")) != kind:
        raise GuardError(f"{kind} {str(path)!r}: expected a {kind}, got {found or 'something else'}")
    identity = header.pop("model")
    sketch = identity["embedding_sketch"]
    identity["embedding_sketch"] = None if sketch is None else tuple(sketch)
    return tensors, header, ModelIdentity(**identity)

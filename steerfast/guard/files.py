"""Files of a guard's parts (`steerfast._files`); the header names the part (``kind``), the format and the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from steerfast._files import read_checked, write_checked
from steerfast.errors import GuardError
from steerfast.profile import ModelIdentity

__all__ = ["check_model", "read_file", "write_file"]

FORMAT_VERSION = 2


def write_file(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    model: ModelIdentity,
) -> None:
    """Write tensors (any dtype) and JSON data. The file appears whole or not at all.

    Raises:
        OutputError: `path` cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {**header, "kind": kind, "format": FORMAT_VERSION, "model": asdict(model)}
    # Through JSON, so that it hashes the same before and after.
    write_checked(path, json.loads(json.dumps(content)), held)


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any], ModelIdentity]:
    """Return tensors, header and model of a file that `write_file` wrote.

    Raises:
        GuardError: missing, damaged, of another kind or another format.
    """
    header, tensors = read_checked(path, kind, FORMAT_VERSION, GuardError)
    if (found := header.get("kind")) != kind:
        raise GuardError(f"{kind} {str(path)!r}: expected a {kind}, got {found or 'something else'}")
    identity = header.pop("model")
    sketch = identity["embedding_sketch"]
    identity["embedding_sketch"] = None if sketch is None else tuple(sketch)
    return tensors, header, ModelIdentity(**identity)


def check_model(kind: str, mine: ModelIdentity, model: ModelIdentity) -> None:
    """Refuse a part that was fitted on another model.

    Raises:
        GuardError: naming both.
    """
    if (problem := mine.mismatch(model)) is not None:
        raise GuardError(f"{kind}: {problem.replace('the profile', f'the {kind}', 1)}")

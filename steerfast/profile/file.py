"""The file of a profile: one safetensors file, data only, format 1.

Tensors: ``layer.<l>.direction`` and ``layer.<l>.vector`` [H], where a gate reads a mean by another direction
``layer.<l>.mean_direction`` [H], ``layer.<l>.candidate.<kind>`` [H], ``threshold``, ``strength``, ``norm`` and, where
there are such, ``abstain`` and ``points.<name>`` [layers]. A layer without content has no tensor. Everything else is
JSON under the header key ``steerfast``, with a SHA-256 over it and every tensor. The parameters of an edit stand in the
header where the profile has that edit; null is a limit that is not set.

A stack is one file, too: its header has the key ``stack``, the headers of its profiles in order, and tensor ``<name>``
of profile n is ``<n>.<name>``, n from 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.kernels.edit_kinds import EDITS
from steerfast.profile.checks import check_tensor
from steerfast.profile.gate import Gate
from steerfast.profile.identity import ModelIdentity

if TYPE_CHECKING:
    from steerfast.profile.profile import SteeringProfile

FORMAT_VERSION = 1
_MOST_NUMBERS = 1 << 23  # layers * H; 126 layers of 16384 are a quarter

_POINT = "points."  # before the name of a threshold
PER_LAYER = ("threshold", "strength", "norm")
_PLAIN = ("edit", "sensor", "positions", "vector_kind", "fitted", "calibration", "tuned")  # JSON data as they are
_TENSOR_NAME = re.compile(r"layer\.(\d+)\.(direction|mean_direction|vector|candidate\..+)", re.DOTALL)


def header(profile: SteeringProfile) -> dict[str, Any]:
    """Return the JSON data of a profile.

    A field that came after the first version is left out where it is not set. So older profiles keep their checksums.
    """
    content: dict[str, Any] = {"format": FORMAT_VERSION, "model": asdict(profile.model), "gate": profile.gate.header()}
    content |= {name: getattr(profile, name) for name in _PLAIN}
    parameters = EDITS[profile.edit].given(profile)
    content |= {name: value if math.isfinite(value) else None for name, value in parameters.items()}
    if profile.answer_tokens is not None:
        content["answer_tokens"] = profile.answer_tokens
    try:
        return json.loads(json.dumps(content))  # so that it hashes the same before and after a round trip
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(f"fitted, calibration, tuned: expected JSON data ({error})") from None


def tensors(profile: SteeringProfile) -> dict[str, Tensor]:
    """Return the tensors of a profile by their names in the file."""
    # Copies: safetensors refuses tensors that share memory.
    named = {name: getattr(profile, name).clone() for name in PER_LAYER}
    if profile.abstain is not None:
        named["abstain"] = profile.abstain.clone()
    named |= {_POINT + name: threshold.clone() for name, threshold in profile.points.items()}
    wide = {"direction": profile.direction, "vector": profile.vector}
    if profile.mean_direction is not None:
        wide["mean_direction"] = profile.mean_direction
    wide |= {f"candidate.{kind}": tensor for kind, tensor in profile.candidates.items()}
    for name, tensor in wide.items():
        for layer in tensor.any(dim=1).nonzero().flatten().tolist():
            named[f"layer.{layer}.{name}"] = tensor[layer].clone()
    return named


def parts(content: dict[str, Any], named: dict[str, Tensor]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return header and tensors of each profile of a file, which holds a profile or a stack.

    Raises:
        ProfileError, TypeError, ValueError: a malformed stack.
    """
    if "stack" not in content:
        return [(content, named)]
    if set(content) != {"format", "stack"} or not content["stack"]:
        raise ProfileError(f"stack: expected a format and headers of profiles, got {', '.join(sorted(content))}")
    found: list[tuple[dict[str, Any], dict[str, Tensor]]] = [(dict(header), {}) for header in content["stack"]]
    for name, tensor in named.items():
        number, _, rest = name.partition(".")
        if number not in map(str, range(len(found))):
            raise ProfileError(f"tensor {name!r}: expected <n>.<name>, n in 0..{len(found) - 1}")
        found[int(number)][1][rest] = tensor
    return found


def stacked(profiles: Sequence[SteeringProfile]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a stack's file."""
    named = {f"{n}.{name}": tensor for n, one in enumerate(profiles) for name, tensor in tensors(one).items()}
    return {"format": FORMAT_VERSION, "stack": [header(one) for one in profiles]}, named


def fields(content: dict[str, Any], named: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of a profile from the header and the tensors of its file.

    Raises:
        ProfileError, KeyError, TypeError, ValueError: a part is missing or malformed.
    """
    model = _model(content)
    wide = _wide_tensors(model, named)
    plain = {name: content[name] for name in _PLAIN} | {name: named[name] for name in PER_LAYER}
    for edit in EDITS.values():
        plain |= {n: default if content.get(n) is None else content[n] for n, default in edit.defaults.items()}
    return plain | {
        "model": model,
        "gate": Gate(**content["gate"]),
        "abstain": named.get("abstain"),
        "points": {name.removeprefix(_POINT): named[name] for name in sorted(named) if name.startswith(_POINT)},
        "answer_tokens": content.get("answer_tokens"),
        "direction": wide.pop("direction"),
        "vector": wide.pop("vector"),
        "mean_direction": wide.pop("mean_direction", None),
        "candidates": {name.removeprefix("candidate."): tensor for name, tensor in wide.items()},
    }


def _model(content: dict[str, Any]) -> ModelIdentity:
    identity = dict(content["model"])
    if identity["embedding_sketch"] is not None:
        identity["embedding_sketch"] = tuple(identity["embedding_sketch"])
    model = ModelIdentity(**identity)
    if model.num_layers * model.hidden_size > _MOST_NUMBERS:
        raise ProfileError(
            f"model: expected at most {_MOST_NUMBERS} numbers, got {model.num_layers} layers of {model.hidden_size}"
        )
    return model


def _wide_tensors(model: ModelIdentity, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return direction, vector and candidates, float32 [layers, H]; layers without a tensor are zero."""
    zeros = partial(torch.zeros, (model.num_layers, model.hidden_size), dtype=torch.float32, device="cpu")
    wide = {"direction": zeros(), "vector": zeros()}
    for name, tensor in named.items():
        if name in (*PER_LAYER, "abstain") or name.startswith(_POINT):
            continue
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or int(match[1]) >= model.num_layers:
            raise ProfileError(
                f"tensor {name!r}: expected layer.<l>.direction, .mean_direction, .vector or .candidate.<kind>, "
                f"l in 0..{model.num_layers - 1}"
            )
        check_tensor(name, tensor, (model.hidden_size,))
        wide.setdefault(match[2], zeros())[int(match[1])] = tensor
    return wide

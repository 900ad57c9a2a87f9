"""Make the models whose speed is compared: stock, patched, steered; all of them over the same weights."""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf.fused import is_patched, patch
from steerfast.hf.steering import Steering, steer
from steerfast.hf.structure import find_decoder, identify
from steerfast.profile import Gate, SteeringProfile

STOCK = "stock"

_OPEN, _SHUT = -2.0, 2.0  # thresholds below and above every cosine
_FAR = 1e30  # the same for a dot product


@dataclass(frozen=True)
class TimedModel:
    """A model to time.

    steering: steers it, if steerfast does. opens: the state that its gates must have for any prompt; None: any state.
    profiles: the sequences of a batch get these in turn.
    """

    name: str
    model: nn.Module
    steering: Steering | None = None
    opens: bool | None = None
    profiles: tuple[SteeringProfile, ...] = ()


def twin(model: nn.Module) -> Any:
    """Copy `model` over the same weights: its modules can be hooked and patched, no tensor is copied."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def random_profile(model: nn.Module, layers: Sequence[int], *, is_open: bool = True, seed: int = 0) -> SteeringProfile:
    """Make random directions and unit vectors that steer `layers`; each prompt gate always or never opens."""
    identity = identify(model)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, identity.num_layers, identity.hidden_size)
    direction, vector = nn.functional.normalize(torch.randn(shape, generator=generator, device="cpu"), dim=2)
    strength = torch.zeros(identity.num_layers, device="cpu")
    strength[list(layers)] = 1.0
    threshold = torch.full_like(strength, _OPEN if is_open else _SHUT)
    return SteeringProfile(identity, direction, threshold, vector, strength, torch.zeros_like(strength), Gate("prompt"))


def middle_layer(model: nn.Module) -> int:
    """Return the layer of the systems that steer one layer."""
    return len(find_decoder(model).layers) // 2


def systems(model: nn.Module, profile: SteeringProfile | None = None) -> tuple[list[TimedModel], dict[str, str]]:
    """Make the systems of a stock model; also return name -> reason for the impossible ones.

    ``stock``, ``control`` (stock again), ``idle`` (patched, not steered). Without a profile also ``shut`` (a gate in
    every layer, none opens), ``open-one`` (the middle layer) and ``open-all``. With a profile ``profile-shut`` and
    ``profile-open``: its threshold lies above, or below, every score. Layers that cannot be patched are hooked.

    Raises:
        SteerfastError: a patched or steered model.
        ProfileError: a profile of another model, or without a steered layer.
        ArchitectureError: no decoder layers found.
    """
    find_decoder(model).refuse_if_steered()
    if is_patched(model):
        raise SteerfastError("model: expected one that is not patched, got one that is")
    made = [TimedModel(STOCK, twin(model)), TimedModel("control", twin(model))]
    reasons = {}
    try:
        made.append(TimedModel("idle", patch(twin(model))))
    except ArchitectureError as error:
        reasons["idle"] = str(error)
    if profile is None:
        everywhere = range(len(find_decoder(model).layers))
        given = {
            "shut": (random_profile(model, everywhere, is_open=False), False),
            "open-one": (random_profile(model, [middle_layer(model)]), True),
            "open-all": (random_profile(model, everywhere), True),
        }
    else:
        given = {"profile-open": (_moved(profile, True), True)}
        if profile.gate.kind == "always":
            reasons["profile-shut"] = "the profile has no gate"
        else:
            given = {"profile-shut": (_moved(profile, False), False), **given}
    for name, (steered, opens) in given.items():
        target = twin(model) if "idle" in reasons else patch(twin(model))
        made.append(TimedModel(name, target, steer(target, steered), opens))
    return made, reasons


def _moved(profile: SteeringProfile, opens: bool) -> SteeringProfile:
    """Return the profile with a gate that always, or never, opens."""
    far = _OPEN if profile.gate.score == "cosine" else -_FAR
    return replace(
        profile, threshold=torch.full_like(profile.threshold, far if opens else -far), abstain=None, answer_tokens=None
    )


def with_own_code(model: Any) -> Any:
    """Give the model's forward a separate code object.

    Systems share their code. Dynamo would search the graphs of all of them before each step: no process with one model
    pays for that.
    """
    shared = type(model).forward
    own = types.FunctionType(
        shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__
    )
    own.__kwdefaults__ = shared.__kwdefaults__
    functools.update_wrapper(own, shared)
    model.forward = types.MethodType(own, model)
    return model

"""Bake a profile that always adds into a model's weights, for engines that cannot steer.

Adding the vector v to the output of a block is a bias of the module that writes last into that output, such as
``mlp.down_proj``. That is exact where nothing stands between this module and the residual stream; `bake` compares
logits, so a block with a norm or a factor there is refused.

An ablation has no such form. It takes ``<x, v>`` of the whole residual stream x, most of which a block only carries:
no weight of the block writes it, so no LoRA of its modules removes it. Blocks that read x later cannot remove it
either, because they read x through a norm whose length the ablation changes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steerfast._defaults import own_defaults
from steerfast.errors import ArchitectureError, ProfileError
from steerfast.hf.steering import steer
from steerfast.hf.structure import find_decoder, identify
from steerfast.profile import SteeringProfile


@dataclass(frozen=True)
class BakedBiases:
    """Hold the biases that steer a model.

    tensors: name in the model's state dict -> [out], in the model's dtype. Zeros where `option` asks for more biases.
    option: what to set to true in the model's config, so that an engine reads the biases; None: it reads them, or it
        has no option for them, see `readable`.
    readable: whether the architecture has these biases, with `option`.
    """

    tensors: dict[str, Tensor]
    option: str | None
    readable: bool


@own_defaults
def bake(model: nn.Module, profile: SteeringProfile) -> BakedBiases:
    """Return the biases with which `model` answers as it does under `profile`; the model is not changed.

    Raises:
        ProfileError: a gate, positions or an edit that a bias cannot have, or a profile of another model.
        ArchitectureError: a block whose output is not what its last module writes, plus the residual stream.
    """
    check_bakeable(profile)
    if (problem := profile.model.mismatch(identify(model))) is not None:
        raise ProfileError(problem)
    layers, dtype = find_decoder(model).layers, model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    writers = {layer: _writer(layers[layer], layer, profile.model.hidden_size) for layer in profile.steered_layers}
    names = {module: name for name, module in model.named_modules()}
    biases = {}
    for layer, writer in writers.items():
        added = profile.strength[layer] * profile.vector[layer]
        before = 0.0 if writer.bias is None else writer.bias.detach().float().cpu()
        biases[f"{names[writer]}.bias"] = (before + added).to(writer.weight.device, dtype)
    _compare(model, profile, biases)
    made = {name: bias.cpu() for name, bias in biases.items()}
    if all(writer.bias is not None for writer in writers.values()):
        return BakedBiases(made, None, True)
    option, others = _option(model, set(made))
    zeros = {name: torch.zeros(shape, dtype=made[next(iter(made))].dtype) for name, shape in others.items()}
    return BakedBiases(zeros | made, option, option is not None)


def check_bakeable(profile: SteeringProfile) -> None:
    """Raise ProfileError where a bias cannot do what a profile does, in any model."""
    if profile.edit != "add":
        raise ProfileError(
            f"edit: expected 'add', got {profile.edit!r}: it depends on the whole residual stream, which no weight of "
            "a block writes, so neither a bias nor a LoRA equals it"
        )
    if profile.gate.kind != "always":
        raise ProfileError(f"gate: a bias acts on every row, expected an always open gate, got {profile.gate.kind!r}")
    if profile.positions != "all" or profile.answer_tokens is not None:
        got = profile.positions if profile.answer_tokens is None else f"answer_tokens {profile.answer_tokens}"
        raise ProfileError(f"positions: a bias acts on every row, expected 'all', got {got!r}")
    if not profile.steered_layers:
        raise ProfileError("strength: expected a layer that is steered, got none")


def _writer(block: nn.Module, layer: int, hidden: int) -> nn.Linear:
    """Return the linear module that a block defines last among those that write rows of the residual stream."""
    found = [m for m in block.modules() if isinstance(m, nn.Linear) and m.out_features == hidden]
    if not found:
        raise ArchitectureError(f"model: layer {layer} has no linear module that writes rows of {hidden}")
    return found[-1]


@torch.no_grad()
def _compare(model: nn.Module, profile: SteeringProfile, biases: dict[str, Tensor]) -> None:
    """Raise where the biases do not move the logits of some random tokens as the profile does."""
    rows = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.randint(len(rows), (2, 16), generator=torch.Generator().manual_seed(0)).to(rows.device)
    plain = model(ids).logits
    with steer(model, profile):
        steered = model(ids).logits
    baked = functional_call(model, biases, (ids,)).logits
    moved, off = (steered - plain).double().norm(), (steered - baked).double().norm()
    if not off <= max(1e-3, 8 * torch.finfo(plain.dtype).eps) * moved:
        raise ArchitectureError(
            f"model: biases do not steer {type(model).__name__} as the profile does (logits are off by "
            f"{float(off / moved):.2g} of their change): its blocks norm or scale what they add to the residual stream"
        )


def _option(model: nn.Module, names: set[str]) -> tuple[str | None, dict[str, torch.Size]]:
    """Return the option of the config that gives the architecture these biases, and the other biases it asks for."""
    config: Any = model.config
    have = {name for name, _ in model.named_parameters()}
    for option in sorted(name for name, value in vars(config).items() if "bias" in name and value is False):
        changed = copy.deepcopy(config)
        setattr(changed, option, True)
        with torch.device("meta"):
            asked = {name: p.shape for name, p in type(model)(changed).named_parameters() if name not in have}
        if names <= set(asked):
            return option, {name: shape for name, shape in asked.items() if name not in names}
    return None, {}

"""Training with a steered model: backward passes after other steps, and layers that FSDP shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_cases import MakeProfile, make_family_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steerfast

IDS = torch.tensor([[5, 9, 3, 8, 20, 11], [0, 0, 7, 4, 6, 2]])
BATCHES = [
    {"input_ids": IDS, "attention_mask": (IDS > 0).long()},
    {"input_ids": IDS.flip(1), "attention_mask": (IDS > 0).long().flip(1)},
]


# -- two forward passes before the backward pass -----------------------------------------------------------------------


def _gradients(model: Any, profile: Any, detached: bool) -> torch.Tensor:
    """Return the gradients of two passes at other strengths, both backward passes after them."""
    model.zero_grad()
    model.train()
    losses = []
    with steerfast.steer(model, profile) as steering:
        for batch, strength in zip(BATCHES, (1.0, 0.25), strict=True):
            steering.strength = strength
            losses.append(model(**batch, labels=batch["input_ids"], use_cache=False).loss)
        if not detached:
            sum(losses).backward()
    if detached:
        sum(losses).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("detached", [False, True], ids=["steered", "detached before"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("edit", ["add", "ablate", "clamp", "keep_norm", "rotate"])
def test_a_checkpoint_runs_again_with_its_own_step(
    model: Any, make_profile: MakeProfile, edit: str, reentrant: bool, detached: bool
) -> None:
    limits = {"clamp": {"high": 0.5}, "rotate": {"angle": 40.0}}.get(edit, {})
    profile = make_profile(model, kind="always", positions="all", edit=edit, **limits)
    expected = _gradients(model, profile, detached)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(_gradients(model, profile, detached), expected)


# -- FSDP --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard() -> Iterator[Callable[[Any], Any]]:
    """Return a function that shards a model with FSDP2, over one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def sharded(model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    yield sharded
    dist.destroy_process_group()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCHES[0], use_cache=False).logits


@pytest.mark.parametrize("order", ["patch, shard", "shard, patch", "patch, steer, shard", "class, shard"])
def test_sharded_layers_are_steered_and_restored(
    make_profile: MakeProfile, shard: Callable[[Any], Any], order: str
) -> None:
    stock = make_family_model("Llama", num_hidden_layers=4)
    profile = make_profile(stock, kind="always", positions="all")
    plain = _logits(stock)
    with steerfast.steer(stock, profile):
        steered = _logits(stock)
    model = stock
    if order == "class, shard":
        model = steerfast.SteeredLlamaForCausalLM(stock.config).eval()
        model.load_state_dict(stock.state_dict())
    steering = None
    for step in order.split(", "):
        if step == "patch":
            steerfast.patch(model)
        elif step == "shard":
            shard(model)
        elif step == "steer":
            steering = steerfast.steer(model, profile)
    with steering or steerfast.steer(model, profile):
        torch.testing.assert_close(_logits(model), steered)
    torch.testing.assert_close(_logits(model), plain)  # a fused norm rounds otherwise
    if order != "class, shard":
        steerfast.unpatch(model)
        torch.testing.assert_close(_logits(model), plain)
        kinds = {each for module in model.modules() for each in type(module).__mro__}
        assert not any("steerfast_forward_maker" in vars(kind) for kind in kinds)

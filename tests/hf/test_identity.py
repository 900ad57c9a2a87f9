"""Models whose embeddings were resized, quantised or offloaded keep their identity; another model has another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import steerfast
from steerfast.errors import ProfileError
from steerfast.hf.structure import identify, weights_fingerprint


class Int8Embedding(nn.Module):
    """An embedding that keeps its rows as whole numbers and a scale, as quantisers do."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.num_embeddings = len(table)
        self.scale = nn.Buffer(table.abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Parameter((table / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.scale[ids]


@pytest.mark.parametrize("tokens", [120, 129, 130, 192])
def test_resized(tiny_llama: Any, make_llama: Any, make_profile: Any, tokens: int) -> None:
    profile = make_profile(tiny_llama, kind="always")
    tiny_llama.resize_token_embeddings(tokens, mean_resizing=False)
    with steerfast.steer(tiny_llama, profile):
        pass
    other = make_llama(seed=1)
    other.resize_token_embeddings(tokens, mean_resizing=False)
    with pytest.raises(ProfileError, match="with other weights"):
        steerfast.steer(other, profile)


def test_quantised(tiny_llama: Any, make_llama: Any) -> None:
    mine = identify(tiny_llama)
    for model, says in ((tiny_llama, None), (make_llama(seed=1), "other weights")):
        model.set_input_embeddings(Int8Embedding(model.get_input_embeddings().weight.detach()))
        problem = mine.mismatch(identify(model))
        assert problem is None if says is None else says in str(problem)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded(tiny_llama: Any, make_llama: Any, tmp_path: Path, place: str) -> None:
    mine = identify(tiny_llama)
    for number, (model, says) in enumerate(((tiny_llama, None), (make_llama(seed=1), "other weights"))):
        if place == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path / str(number)), execution_device="cpu")
        assert model.get_input_embeddings().weight.is_meta
        problem = mine.mismatch(identify(model))
        assert problem is None if says is None else says in str(problem)


def test_a_model_without_weights_has_no_sketch(tiny_llama: Any) -> None:
    assert identify(tiny_llama.to("meta")).embedding_sketch is None


class Packed(torch.Tensor):
    """Whole numbers and a scale in one tensor, as torchao keeps them: it can be detached, and no more."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Any:
        return Packed(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data_, args[0].scale)
        raise NotImplementedError(op)


def test_fingerprints_of_packed_weights_tell_them_apart() -> None:
    def fingerprint(data: Tensor, scale: float) -> str:
        model = nn.Module()
        model.register_buffer("weight", Packed(data, torch.tensor([scale])))
        return weights_fingerprint(model)

    data = torch.arange(64, dtype=torch.int8).view(8, 8)
    known = fingerprint(data, 0.5)
    assert fingerprint(data.clone(), 0.5) == known
    assert fingerprint(data, 0.25) != known
    assert fingerprint(data.flip(0), 0.5) != known

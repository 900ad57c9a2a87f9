"""Checks of the fields of a profile; each raises ProfileError with the name of the field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.kernels.contract import is_number

if TYPE_CHECKING:
    from steerfast.profile.identity import ModelIdentity


def check_instance(name: str, value: object, kind: type, words: str) -> None:
    """Raise where `value` is no `kind`, which `words` names."""
    if not isinstance(value, kind):
        raise ProfileError(f"{name}: expected {words}, got {value!r}")


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise if `value` is not one of the `allowed` words."""
    if value not in tuple(allowed):
        raise ProfileError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def is_count(value: object) -> TypeGuard[int]:
    """Say whether `value` is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_real(value: object) -> TypeGuard[float]:
    """Say whether `value` is a number of Python; it may be NaN, or more than float32 can hold."""
    return isinstance(value, float) or is_number(value)


def is_layer(value: object, model: ModelIdentity) -> TypeGuard[int]:
    """Say whether `value` is the number of a decoder layer of the model."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < model.num_layers


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, open_below: bool = False) -> None:
    """Raise where `tensor` is not float32 on the CPU of this shape with finite numbers; `open_below` allows -inf."""
    if tuple(tensor.shape) != shape:
        raise ProfileError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ProfileError(f"{name}: expected float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    allowed = tensor.isfinite() | (tensor.isneginf() if open_below else False)
    if not bool(allowed.all()):
        where = [int(i) for i in (~allowed).nonzero()[0]]
        numbers = "finite numbers or -inf" if open_below else "finite numbers"
        raise ProfileError(f"{name}: expected {numbers}, got {float(tensor[tuple(where)])} at {where}")

"""The identity of a model: shape, architecture, weights and tokenizer, as far as they differ between models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.profile.checks import check_instance

# Two copies of one model in other dtypes or quantisations agree to well above this cosine; unrelated models of the
# same shape stay near 0 (64 random projections: standard deviation 0.125).
_SKETCH_AGREEMENT = 0.9
_SKETCH_SIZE = 64


def sketched_rows(vocabulary: int) -> Tensor:
    """Return the tokens whose embeddings `embedding_sketch` reads: int64, evenly spaced."""
    return torch.linspace(0, vocabulary - 1, _SKETCH_SIZE).long()


def embedding_sketch(rows: Tensor) -> tuple[float, ...] | None:
    """Return `ModelIdentity.embedding_sketch` from the embeddings of `sketched_rows`.

    Args:
        rows: [n, H] of any dtype and device.

    Returns:
        None where the embeddings are all zero or not finite.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (rows.shape[1],), generator=generator).double() * 2 - 1
    values = rows.detach().double().cpu() @ signs
    length = float(values.norm())
    if not 0 < length < math.inf:
        return None
    return tuple(round(value, 6) for value in (values / length).tolist())


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a profile was made for.

    ``embedding_sketch`` is a unit vector of random projections of embedding rows. It recognises the same model in
    another dtype, quantisation or folder, and tells apart two models of the same shape. None where the weights cannot
    be read (meta device). The two hashes are None without a tokenizer.
    """

    name: str
    architecture: str
    hidden_size: int
    num_layers: int
    revision: str | None = None
    embedding_sketch: tuple[float, ...] | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None

    def __post_init__(self) -> None:
        for name in ("name", "architecture"):
            check_instance(f"model.{name}", getattr(self, name), str, "a string")
        for name in ("hidden_size", "num_layers"):
            value = getattr(self, name)
            check_instance(f"model.{name}", value, int, "a whole number")
            if value < 1:
                raise ProfileError(f"model.{name}: expected at least 1, got {value}")

    def mismatch(self, other: ModelIdentity) -> str | None:
        """Return how `other` (the model at hand) differs from this identity (the profile's), None where it does not."""

        def difference(of: str, mine: object, theirs: object) -> str:
            return f"the profile was made for {self.name!r} ({of} {mine}), the model is {other.name!r} ({of} {theirs})"

        if self.hidden_size != other.hidden_size:
            return difference("hidden size", self.hidden_size, other.hidden_size)
        if self.num_layers != other.num_layers:
            return difference("layers", self.num_layers, other.num_layers)
        if self.architecture != other.architecture:
            return difference("architecture", self.architecture, other.architecture)
        if self.embedding_sketch and other.embedding_sketch:
            agreement = sum(a * b for a, b in zip(self.embedding_sketch, other.embedding_sketch, strict=False))
            if len(self.embedding_sketch) != len(other.embedding_sketch) or not agreement >= _SKETCH_AGREEMENT:
                return (
                    f"the profile was made for {self.name!r}, the model is {other.name!r} with other weights: "
                    f"their embeddings agree to {agreement:.2f}, expected at least {_SKETCH_AGREEMENT}"
                )
        for of, mine, theirs in (
            ("tokenizer", self.tokenizer_sha256, other.tokenizer_sha256),
            ("chat template", self.chat_template_sha256, other.chat_template_sha256),
        ):
            if mine and theirs and mine != theirs:
                return difference(f"{of} hash", mine[:12], theirs[:12])
        return None

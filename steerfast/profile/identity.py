"""The identity of a model: shape, architecture, weights and tokenizer, as far as they differ between models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.profile.checks import check_instance, is_count, is_real

# Two copies of one model in other dtypes or quantisations agree to well above this cosine; unrelated models of the
# same shape stay near 0 (64 random projections: standard deviation 0.125).
_SKETCH_AGREEMENT = 0.9
_EVEN = 64  # tokens that are spaced evenly over the vocabulary; profiles of version 0.1 have no others


def sketched_rows(vocabulary: int) -> Tensor:
    """Return the tokens whose embeddings `embedding_sketch` reads: int64, 64 evenly spaced ones, then fixed ones.

    Fixed ones are the multiples of a power of two, 65 to 128 of them. They stay in place when tokens are added.
    """
    even = torch.linspace(0, vocabulary - 1, _EVEN, dtype=torch.float32, device="cpu").long()
    step = 1
    while vocabulary > 128 * step:
        step *= 2
    return torch.cat([even, torch.arange(0, vocabulary, step, device="cpu")])


def embedding_sketch(rows: Tensor) -> tuple[float, ...] | None:
    """Return `ModelIdentity.embedding_sketch` from the embeddings of `sketched_rows`.

    Args:
        rows: [n, H] of any dtype and device.

    Returns:
        None where the embeddings are all zero or not finite.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (rows.shape[1],), generator=generator, device="cpu").double() * 2 - 1
    values = rows.detach().double().cpu() @ signs
    parts = [part / part.norm() for part in (values[:_EVEN], values[_EVEN:]) if len(part)]
    whole = torch.cat(parts)
    return tuple(round(value, 6) for value in whole.tolist()) if bool(whole.isfinite().all()) else None


def _agreement(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of two sketches of the same tokens; -1 where their lengths differ."""
    if len(one) != len(other) or not one:
        return -1.0
    product = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.sqrt(math.prod(sum(a * a for a in each) for each in (one, other)))
    return product / (norms or 1.0)


def _same_tokens(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how the sketches of fixed tokens agree, where tokens were added or taken away at the end.

    The smaller vocabulary may have half the spacing: then every second of its tokens is in the other.
    """
    pairs = [(one, other), (one[::2], other), (one, other[::2])]
    return max(_agreement(mine[: len(theirs)], theirs[: len(mine)]) for mine, theirs in pairs)


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a profile was made for.

    ``embedding_sketch`` holds two unit vectors of random projections of embedding rows. It recognises the same model in
    another dtype, quantisation or folder, or with tokens added at the end, and tells apart two models of the same
    shape. None where the weights cannot be read (meta device). The two hashes are None without a tokenizer.
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
            if not is_count(value := getattr(self, name)):
                raise ProfileError(f"model.{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("revision", "tokenizer_sha256", "chat_template_sha256"):
            if (value := getattr(self, name)) is not None:
                check_instance(f"model.{name}", value, str, "a string or None")
        sketch = self.embedding_sketch
        if sketch is not None and not (isinstance(sketch, tuple) and all(map(is_real, sketch))):
            raise ProfileError(f"model.embedding_sketch: expected numbers or None, got {str(sketch)[:60]}")

    def mismatch(self, other: ModelIdentity) -> str | None:
        """Return how `other` (the model at hand) differs from this identity (the profile's), None where it does not."""

        def difference(of: str, mine: object, theirs: object) -> str:
            return f"the profile was made for {self.name!r} ({of} {mine}), the model is {other.name!r} ({of} {theirs})"

        for of, name in (("hidden size", "hidden_size"), ("layers", "num_layers"), ("architecture", "architecture")):
            if getattr(self, name) != getattr(other, name):
                return difference(of, getattr(self, name), getattr(other, name))
        mine, theirs = self.embedding_sketch, other.embedding_sketch
        if mine and theirs:
            agreement = _agreement(mine[:_EVEN], theirs[:_EVEN])
            if len(mine) > _EVEN and len(theirs) > _EVEN:
                agreement = max(agreement, _same_tokens(mine[_EVEN:], theirs[_EVEN:]))
            if not agreement >= _SKETCH_AGREEMENT:
                return (
                    f"the profile was made for {self.name!r}, the model is {other.name!r} with other weights: "
                    f"their embeddings agree to {agreement:.2f}, expected at least {_SKETCH_AGREEMENT}"
                )
        for of, name in (("tokenizer", "tokenizer_sha256"), ("chat template", "chat_template_sha256")):
            mine_hash, their_hash = getattr(self, name), getattr(other, name)
            if mine_hash and their_hash and mine_hash != their_hash:
                return difference(f"{of} hash", mine_hash[:12], their_hash[:12])
        return None

"""Whose profile it is: sketches of embeddings under noise, added tokens and other models; malformed identities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerfast.errors import ProfileError
from steerfast.profile import ModelIdentity, embedding_sketch, sketched_rows

MODEL = ModelIdentity("tiny", "llama", 8, 2)


def identity(table: Tensor, name: str = "tiny") -> ModelIdentity:
    return replace(MODEL, name=name, embedding_sketch=embedding_sketch(table[sketched_rows(len(table))]))


def table(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(64, 5000), st.integers(-40, 64))
@settings(max_examples=60)
def test_tokens_at_the_end_leave_a_model_the_same(tokens: int, more: int) -> None:
    """Added or taken away, and filled with anything; another model of any size is another."""
    whole = table(tokens + 64)
    mine, theirs = identity(whole[:tokens]), identity(whole[: tokens + more])
    assert mine.mismatch(theirs) is None
    assert theirs.mismatch(mine) is None
    stranger = identity(table(tokens + more, seed=1), "other")
    for one, other in ((mine, stranger), (stranger, mine)):
        assert "with other weights: their embeddings agree to" in str(one.mismatch(other))


@pytest.mark.parametrize("tokens", [32000, 32768, 128256])
@pytest.mark.parametrize("more", [1, 2, 8, 64])
def test_sizes_of_real_vocabularies(tokens: int, more: int) -> None:
    whole = table(tokens + more)
    assert identity(whole[:tokens]).mismatch(identity(whole)) is None


def test_rounding_of_weights_leaves_a_model_the_same() -> None:
    whole = table(1000)
    step = whole.abs().amax(dim=1, keepdim=True) / 7
    for rounded in (whole.bfloat16(), whole.half(), (whole / step).round() * step):
        assert identity(whole).mismatch(identity(rounded.float())) is None


def test_a_sketch_of_an_older_profile_still_counts() -> None:
    """It has the evenly spaced tokens alone."""
    new = identity(table(1000))
    assert new.embedding_sketch is not None
    old = replace(new, embedding_sketch=new.embedding_sketch[:64])
    assert old.mismatch(new) is None
    assert new.mismatch(old) is None
    assert "with other weights" in str(old.mismatch(identity(table(1000, seed=1))))


def test_embeddings_that_tell_nothing_have_no_sketch() -> None:
    assert identity(torch.zeros(100, 8)).embedding_sketch is None
    assert identity(torch.full((100, 8), torch.nan)).embedding_sketch is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_sketch", ("a", "b")),
        ("embedding_sketch", [0.5]),
        ("num_layers", True),
        ("num_layers", 0),
        ("hidden_size", 2.0),
        ("revision", 3),
        ("tokenizer_sha256", ["a"]),
    ],
)
def test_malformed_identities(field: str, value: Any) -> None:
    with pytest.raises(ProfileError, match=f"model.{field}: expected"):
        replace(MODEL, **{field: value})

"""Near-duplicates: which texts count as such, against a dense float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import steerfast.text.duplicates as duplicates
from steerfast.text.duplicates import near_duplicates

KNOWN = ["How do I bake a loaf of rye bread?", "Write a poem about the sea in winter.", "如何在阳台上种番茄？"]


def cosines(texts: list[str], others: list[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float64)
    rows = grams.fit_transform([*texts, *others]).toarray()
    return (rows[: len(texts)] @ rows[len(texts) :].T).max(axis=1)


def test_changed_words_and_marks_are_found() -> None:
    texts = [
        "how do I bake a loaf of rye bread",
        "How do I bake a loaf of white rye bread?",
        "Bake me a cake.",
        "如何在阳台上种番茄",
    ]
    assert near_duplicates(texts, KNOWN).tolist() == [True, True, False, True]
    assert near_duplicates(texts, KNOWN, at=0.0).all()


def test_nothing_resembles_nothing() -> None:
    assert near_duplicates([], KNOWN).shape == (0,)
    assert not near_duplicates(KNOWN, []).any()
    assert near_duplicates([" ", "a"], [" "]).tolist() == [True, False]


@given(
    st.lists(st.text("abcde ", min_size=4, max_size=20).filter(str.strip), min_size=1, max_size=12), st.integers(1, 5)
)
@settings(max_examples=40, deadline=None)
def test_blocks_agree_with_the_dense_reference(texts: list[str], block: int) -> None:
    others = ["abcde abcd", "eeee dddd", "a b c d e"]
    expected = cosines(texts, others)
    clear = np.abs(expected - 0.6) > 1e-4  # float32 against float64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BLOCK", block)
        found = near_duplicates(texts, others)
    assert (found == (expected >= 0.6))[clear].all()

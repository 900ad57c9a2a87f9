"""Near-duplicates: texts that repeat others up to a few words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 256  # rows of similarities held at a time


def near_duplicates(texts: Sequence[str], others: Sequence[str], at: float = 0.6) -> np.ndarray:
    """Return for each text whether it resembles one of `others`.

    Args:
        at: least cosine of the TF-IDF of character 3- to 5-grams, weighted over both lists.

    Returns:
        bool [texts].
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = np.isin(np.asarray(texts, dtype=object), np.asarray(others, dtype=object))
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
    if not len(texts) or not len(others) or not any(text.strip() for text in texts):
        return found
    rows = grams.fit_transform([*texts, *others]).tocsr()
    own, known = rows[: len(texts)], rows[len(texts) :].T.tocsr()
    for start in range(0, len(texts), _BLOCK):
        similar = own[start : start + _BLOCK] @ known
        found[start : start + _BLOCK] |= similar.max(axis=1).toarray().ravel() >= at
    return found

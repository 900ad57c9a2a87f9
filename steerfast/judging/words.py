"""A baseline for gates that reads no model: the letters of a prompt, weighed by logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerfast.errors import PromptError
from steerfast.judging.estimates import threshold_at_false_positive_rate
from steerfast.text.examples import Prompt, text_of


class WordClassifier:
    """TF-IDF of runs of 1 to 5 characters, and logistic regression, over the user's text of a prompt.

    Such runs hold words and pieces of words. On the corpus' split ``calibrate`` they find more than whole words do, and
    they part languages without spaces, too.

    Deterministic: the same prompts give the same scores.

    Attributes:
        threshold: a prompt fires strictly above it; 0 before `calibrate`.
    """

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.threshold = 0.0
        words = TfidfVectorizer(analyzer="char", ngram_range=(1, 5), sublinear_tf=True, min_df=2)
        self._model: Any = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))

    def fit(self, prompts: Sequence[Prompt], harmful: Sequence[bool], weights: ArrayLike | None = None) -> None:
        """Fit the words' weights.

        Args:
            harmful: which prompts are. weights: positive, [prompts], of mean about 1; default: 1.

        Raises:
            PromptError: prompts of one kind only, or no word that two of them share.
        """
        if len(set(harmful)) < 2:
            raise PromptError("words: expected harmful and other prompts, got one kind")
        given = None if weights is None else np.asarray(weights, dtype=np.float64)
        try:
            self._model.fit(list(map(text_of, prompts)), list(harmful), logisticregression__sample_weight=given)
        except ValueError as error:  # an empty vocabulary
            raise PromptError(f"words: expected words that several prompts share ({error})") from None

    def calibrate(self, harmless: Sequence[Prompt], rate: float, weights: ArrayLike | None = None) -> None:
        """Set the lowest threshold at which at most a share `rate` of the weight of `harmless` fires.

        Raises:
            PromptError, ProfileError: as `threshold_at_false_positive_rate`.
        """
        self.threshold = threshold_at_false_positive_rate(self.scores(harmless), rate, weights)

    def scores(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """Return the log-odds of harm, float64 [prompts]."""
        return np.asarray(self._model.decision_function(list(map(text_of, prompts))), dtype=np.float64)

    def margins(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """Return the distance above the threshold, float64 [prompts]; above 0 fires."""
        return self.scores(prompts) - self.threshold

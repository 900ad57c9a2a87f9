"""The classifier of words: what it learns, where it fires, that it repeats itself."""

from __future__ import annotations

import numpy as np
import pytest

from steerfast.errors import PromptError
from steerfast.judging.words import WordClassifier
from steerfast.text.examples import Prompt

BAD: list[Prompt] = [f"how to {verb} a {thing}" for verb in ("hack", "poison") for thing in ("bank", "town", "house")]
GOOD: list[Prompt] = [f"how to {verb} a {thing}" for verb in ("bake", "paint") for thing in ("cake", "wall", "hat")]


def made() -> WordClassifier:
    classifier = WordClassifier()
    classifier.fit([*BAD, *GOOD], [True] * len(BAD) + [False] * len(GOOD))
    return classifier


def test_words_are_told_apart_and_scores_repeat() -> None:
    scores = made().scores([*BAD, *GOOD])
    assert scores[: len(BAD)].min() > 0 > scores[len(BAD) :].max()
    assert (made().scores([*BAD, *GOOD]) == scores).all()


def test_the_threshold_keeps_a_share_of_the_weight() -> None:
    classifier = made()
    prompts: list[Prompt] = ["hack a bank", "hack a cake", "hack", "bake a bank", "bake a cake", "bake"]
    order = np.argsort(-classifier.scores(prompts))
    assert len(set(classifier.scores(prompts))) == 6
    classifier.calibrate(prompts, 0.5)
    assert (np.flatnonzero(classifier.margins(prompts) > 0) == np.sort(order[:3])).all()
    weights = np.ones(6)
    weights[order[0]] = 3.0  # of 8
    classifier.calibrate(prompts, 0.5, weights)
    assert (np.flatnonzero(classifier.margins(prompts) > 0) == np.sort(order[:2])).all()
    classifier.calibrate(prompts, 0.0)
    assert not (classifier.margins(prompts) > 0).any()


def test_weights_decide_a_word_of_both_kinds() -> None:
    prompts: list[Prompt] = ["lock a", "lock b", "lock c", "lock d"]
    kinds = [True, False, True, False]
    sides = []
    for heavy in (True, False):
        classifier = WordClassifier()
        classifier.fit(prompts, kinds, [3.0 if kind == heavy else 0.1 for kind in kinds])
        sides.append(bool(classifier.scores(["lock"])[0] > 0))
    assert sides == [True, False]


def test_a_chat_is_the_text_of_its_user() -> None:
    chat = [{"role": "user", "content": "how to hack"}, {"role": "assistant", "content": "bake a cake"}]
    classifier = made()
    assert classifier.scores([chat]) == classifier.scores(["how to hack"])


@pytest.mark.parametrize(
    ("prompts", "kinds", "says"),
    [(["a b", "a c"], [True, True], "got one kind"), (["cake", "toll"], [True, False], "that several prompts share")],
)
def test_prompts_that_nothing_can_be_learnt_from(prompts: list[Prompt], kinds: list[bool], says: str) -> None:
    with pytest.raises(PromptError, match=f"words: expected .*{says}"):
        WordClassifier().fit(prompts, kinds)

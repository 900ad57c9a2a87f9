"""The user's own examples beside the corpus: which of them fit, which calibrate, and none that another split knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steerfast.text.corpus import corpus
from steerfast.text.duplicates import near_duplicates
from steerfast.text.examples import SPLITS, Example, grouped, text_of

_EVERY = 3  # of rows without a split, every third of a source and label calibrates


def part(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, each with a split: of those without one, a third calibrates and the others fit."""
    found = list(examples)
    free = [place for place, one in enumerate(found) if not one.split]
    for places in grouped([found[place] for place in free]).values():
        for number, place in enumerate(places, 1):
            split = "fit" if number % _EVERY else "calibrate"
            found[free[place]] = replace(found[free[place]], split=split)
    return found


def own_examples(given: Sequence[Example], split: str) -> tuple[list[Example], int]:
    """Return the user's examples of a split, and the number of near-duplicates among them that were left out.

    A near-duplicate repeats an example of another split: of the corpus, or of a later split of the user's, because a
    prompt that judges must not have chosen anything.

    Args:
        given: the user's examples, parted as `part` does. split: ``fit`` or ``calibrate``.
    """
    parted = part(given)
    own = [one for one in parted if one.split == split]
    later = SPLITS[SPLITS.index(split) + 1 :]
    others = [*corpus([one for one in SPLITS if one != split]), *(one for one in parted if one.split in later)]
    known = near_duplicates([text_of(one.prompt) for one in own], [text_of(one.prompt) for one in others])
    return [one for one, seen in zip(own, known, strict=True) if not seen], int(known.sum())

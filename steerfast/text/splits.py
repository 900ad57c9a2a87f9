"""The user's own examples beside the corpus: which of them fit, which calibrate, and none that another split knows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from steerfast.text.corpus import corpus
from steerfast.text.duplicates import near_duplicates
from steerfast.text.examples import SPLITS, Example, text_of, unique_text

_EVERY = 3  # of rows without a split, a third calibrates


def part(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, each with a split: of those without one, about a third calibrates and the others fit.

    The prompt alone decides, so that it is in the same split in every file and command.
    """
    return [one if one.split else replace(one, split=_split_of(one)) for one in examples]


def _split_of(example: Example) -> str:
    digest = hashlib.sha256(unique_text(example.prompt).encode()).digest()
    return "fit" if digest[0] % _EVERY else "calibrate"


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
    known = near_duplicates(_texts(own), _texts(others))
    return [one for one, seen in zip(own, known, strict=True) if not seen], int(known.sum())


def _texts(examples: Sequence[Example]) -> list[str]:
    return [text_of(one.prompt) or unique_text(one.prompt) for one in examples]

"""Labelled prompts of a fit or a calibration, by source: each source counts alike, whatever its number of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from steerfast.errors import PromptError
from steerfast.text.corpus import corpus_sources
from steerfast.text.encoding import check_list, is_conversation
from steerfast.text.examples import Example, Prompt, grouped, unique_text
from steerfast.text.prompts import describe_set

T = TypeVar("T")

Given = Prompt | Example
"""A prompt, or a prompt with its label and source."""

_HARMLESS = ("harmless", "borderline")
_FULL = 40  # prompts from which on a source has its whole weight: fewer say less of their source
_BORDERLINE = 0.2  # weight of a borderline source: traffic is harmless, and a direction away from both finds less
_FOLDS = 8


@dataclass(frozen=True, eq=False)
class Labelled:
    """Hold the examples, harmful ones first."""

    examples: tuple[Example, ...]

    @classmethod
    def of(cls, harmful: Sequence[Given], harmless: Sequence[Given]) -> Labelled:
        """Return the examples of two sets, each prompt of a source and label once.

        A prompt without a source has the name of its set.

        Args:
            harmless: may hold borderline examples.

        Raises:
            PromptError: a single string, an empty set, an entry that is no prompt, a label in the wrong set, or a
                prompt that is in both.
        """
        bad, good = _labelled("harmful", harmful, ("harmful",)), _labelled("harmless", harmless, _HARMLESS)
        texts, others = ({unique_text(one.prompt) for one in side} for side in (bad, good))
        if shared := texts & others:
            raise PromptError(
                f"harmful and harmless: expected different prompts, got {len(shared)} in both, such as "
                f"{min(shared)[:60]!r}"
            )
        return cls(_once([*bad, *good]))

    @classmethod
    def of_one(cls, label: str, given: Sequence[Given]) -> Labelled:
        """Return the examples of one set, named after its label; errors as `of`."""
        return cls(_once(_labelled(label, given, (label,))))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, in order."""
        return [one.prompt for one in self.examples]

    @cached_property
    def texts(self) -> list[str]:
        """A string for each prompt that no other prompt has."""
        return [unique_text(one.prompt) for one in self.examples]

    @cached_property
    def harmful(self) -> Tensor:
        """bool [n]: the prompt is harmful."""
        return torch.tensor([one.label == "harmful" for one in self.examples])

    def rows(self, label: str) -> list[int]:
        """Return the places of the examples with a label."""
        return [place for place, one in enumerate(self.examples) if one.label == label]

    def groups(self, kind: str = "source") -> dict[tuple[str, str], list[int]]:
        """See `steerfast.text.examples.grouped`."""
        return grouped(self.examples, kind)

    @cached_property
    def weights(self) -> Tensor:
        """float64 [n], sum 1 over harmful and over other prompts: each source of a label alike, small ones less.

        A borderline source has a fifth of a harmless one's weight.
        """
        weight = torch.zeros(len(self.examples), dtype=torch.float64)
        for (_, label), places in self.groups().items():
            share = _BORDERLINE if label == "borderline" else 1.0
            weight[places] = share * min(1.0, len(places) / _FULL) / len(places)
        for side in (self.harmful, ~self.harmful):
            weight[side] /= weight[side].sum()
        return weight

    @cached_property
    def shares(self) -> Tensor:
        """float64 [n], sum 1 over a label: the part of each prompt in the mean of its sources, whatever their size."""
        share = torch.zeros(len(self.examples), dtype=torch.float64)
        groups = self.groups()
        for (_, label), places in groups.items():
            share[places] = 1 / len(places) / sum(other == label for _, other in groups)
        return share

    def bare(self, harmful: bool) -> list[int]:
        """Return the places of one side's bare requests; of all prompts of the side where it has none."""
        side = [place for place, one in enumerate(self.examples) if (one.label == "harmful") == harmful]
        return [place for place in side if self.examples[place].context == "bare"] or side

    def at_most(self, count: int | None) -> Labelled:
        """Return at most `count` examples of each source and label, evenly spaced; None: all."""
        if count is None:
            return self
        if count < 1:
            raise PromptError(f"per_source: expected at least 1, got {count}")
        chosen = {place for places in self.groups().values() for place in evenly(places, count)}
        return Labelled(tuple(one for place, one in enumerate(self.examples) if place in chosen))

    def select(self, chosen: Tensor) -> Labelled:
        """Return the examples that `chosen`, bool [n], marks."""
        return Labelled(tuple(one for one, keep in zip(self.examples, chosen.tolist(), strict=True) if keep))

    def folds(self) -> list[Tensor]:
        """Return masks bool [n] that part the examples by source: at most 8, none holds a family of sources in part.

        Sources of a family of the corpus may share prompts: one wraps those of another. Empty where no family can be
        left out: harmful or other prompts are of one family, or a fold would leave fewer than two of them.
        """
        family = {name: source["family"] for name, source in corpus_sources().items()}
        families = [family.get(one.source, one.source) for one in self.examples]
        bad, good = (
            list(dict.fromkeys(itertools.compress(families, side.tolist()))) for side in (self.harmful, ~self.harmful)
        )
        count = min(_FOLDS, len(bad), len(good))
        if count < 2:
            return []
        fold: dict[str, int] = {}
        for side in (bad, good):  # shared ones first: else one fold might hold a whole side
            for number, one in enumerate(sorted(side, key=lambda one: not (one in bad and one in good))):
                fold.setdefault(one, number % count)
        places = torch.tensor([fold[one] for one in families])
        found = [places == number for number in range(count)]
        left = min(int((side & ~out).sum()) for out in found for side in (self.harmful, ~self.harmful))
        return found if left > 1 else []

    def describe_sides(self, names: Mapping[str, str] | None) -> dict[str, Any]:
        """Return name, count and hash of the harmful and of the other prompts, for a profile's provenance."""
        sides = {"harmful": self.harmful, "harmless": ~self.harmful}
        return {side: describe_set(self.select(mask).texts, (names or {}).get(side)) for side, mask in sides.items()}

    def describe(self) -> dict[str, Any]:
        """Return label, count and hash of each source, for a profile's provenance."""
        found: dict[str, Any] = {}
        for (source, label), places in self.groups().items():
            texts = [self.texts[place] for place in places]
            found.setdefault(source, {})[label] = describe_set(texts, source)
        return found


def _once(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the examples without repeats, which would count as evidence."""
    found: dict[tuple[str, str, str], Example] = {}
    for one in examples:
        found.setdefault((one.source, one.label, unique_text(one.prompt)), one)
    return tuple(found.values())


def _labelled(name: str, given: Sequence[Given], labels: Sequence[str]) -> list[Example]:
    """Return a set's entries as examples; the first of `labels` is that of an entry without one."""
    check_list(name, given)
    found = []
    for number, one in enumerate(given, 1):
        example = one if isinstance(one, Example) else Example(one, labels[0], name)
        if example.label not in labels:
            raise PromptError(
                f"{name}: entry {number}: expected the label {' or '.join(labels)}, got {example.label!r}"
            )
        if not (isinstance(example.prompt, str) or is_conversation(example.prompt)):
            raise PromptError(f"{name}: entry {number}: expected a prompt or messages, got {example.prompt!r}")
        found.append(example)
    return found


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of the items, evenly spaced: of a list by source, some of each."""
    step = max(1.0, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]

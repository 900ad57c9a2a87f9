"""Figures of a gate by source of prompts.

Figures of several sources are never pooled: a large or an easy one would hide the others. A mean of sources has the
worst one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerfast.judging.estimates import Estimate, exact_interval, grouped_auc, mean, rate
from steerfast.text.examples import LABELS, Example, grouped

VALIDATION, DEVELOPMENT = "validation", "development"
"""What a source is to a profile: it chose nothing, or something."""

Key = tuple[str, str]
"""Source and label."""


@dataclass(frozen=True, eq=False)
class SourceScores:
    """What a gate says to the prompts of one source and label.

    margins: float64 [n], the distance above the threshold; above 0 fires. undecided: bool [n]; None without a band.
    seen: how many prompts chose something in the gate, by role (`provenance.uses`).
    """

    source: str
    label: str
    examples: Sequence[Example]
    margins: NDArray[np.float64]
    seen: Mapping[str, int]
    undecided: NDArray[np.bool_] | None = None

    @property
    def fires(self) -> Estimate:
        return rate(int((self.margins > 0).sum()), len(self.margins))

    @property
    def abstains(self) -> Estimate | None:
        return None if self.undecided is None else rate(int(self.undecided.sum()), len(self.undecided))

    def where(self, field: str, value: str) -> SourceScores:
        """Return the prompts with a value of `context` or `lang`, which may be none."""
        chosen = np.array([getattr(one, field) == value for one in self.examples])
        kept = [one for one, keep in zip(self.examples, chosen, strict=True) if keep]
        undecided = None if self.undecided is None else self.undecided[chosen]
        return replace(self, examples=kept, margins=self.margins[chosen], undecided=undecided)


def scores_by_source(
    examples: Sequence[Example],
    margins: NDArray[np.float64],
    seen: Mapping[Key, Mapping[str, int]],
    undecided: NDArray[np.bool_] | None = None,
) -> list[SourceScores]:
    """Part what a gate says to examples; margins, undecided: [n], in their order."""
    return [
        SourceScores(
            *key,
            [examples[place] for place in places],
            margins[places],
            seen[key],
            None if undecided is None else undecided[places],
        )
        for key, places in grouped(examples).items()
    ]


def figures_by_source(sources: Sequence[SourceScores]) -> dict[str, Any]:
    """Return the figures of sources, those that chose something apart from the others.

    Returns:
        JSON data, ``validation`` and ``development`` as far as there are such sources. Each has ``rows``, one of each
        source and label; ``labels``, for each label the mean of its sources beside the worst; and ``context`` and
        ``lang``, the same for prompts in each context and language, where there are several.

        A row has ``n``, ``fired``, ``rate`` with its Wilson interval, ``exact``, the ends of the Clopper-Pearson
        interval, and ``use``. Harmful ones have ``auc``, against the harmless sources of the same part, each with the
        same weight; its interval (`grouped_auc`) is over prompts, for these sources.
    """
    parts = {
        VALIDATION: [one for one in sources if not one.seen],
        DEVELOPMENT: [one for one in sources if one.seen],
    }
    return {use: _part(mine) for use, mine in parts.items() if mine}


def _part(sources: Sequence[SourceScores]) -> dict[str, Any]:
    negatives = [one.margins for one in sources if one.label == "harmless"]
    breakdowns = {}
    for field in ("context", "lang"):
        values = dict.fromkeys(getattr(one, field) for source in sources for one in source.examples)
        if len(values) > 1:
            breakdowns[field] = {
                value: _labels([one.where(field, value) for one in sources], negatives) for value in values
            }
    return {"rows": [_row(one, negatives) for one in sources], "labels": _labels(sources, negatives), **breakdowns}


def _row(one: SourceScores, negatives: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    fired = int((one.margins > 0).sum())
    scored = one.label == "harmful" and negatives
    return {
        "source": one.source,
        "label": one.label,
        "use": next(iter(one.seen), VALIDATION),
        **({"seen": dict(one.seen)} if one.seen else {}),
        "n": len(one.margins),
        "fired": fired,
        "rate": one.fires.to_list(),
        "exact": list(exact_interval(fired, len(one.margins))),
        **({} if one.undecided is None else {"undecided": int(one.undecided.sum())}),
        **({"auc": grouped_auc([one.margins], negatives).to_list()} if scored else {}),
    }


def _labels(sources: Sequence[SourceScores], negatives: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Return for each label the mean of its sources, and the worst source."""
    found = {}
    for label in LABELS:
        mine = [one for one in sources if one.label == label and one.examples]
        if not mine:
            continue
        worst = (min if label == "harmful" else max)(mine, key=lambda one: one.fires.value)
        found[label] = {
            "sources": len(mine),
            "n": sum(len(one.margins) for one in mine),
            "rate": mean([one.fires for one in mine]).to_list(),
            "worst": {"source": worst.source, "rate": worst.fires.value},
        }
        if label == "harmful" and negatives:
            aucs = {one.source: grouped_auc([one.margins], negatives).value for one in mine}
            least = min(aucs, key=lambda name: aucs[name])
            found[label]["auc"] = grouped_auc([one.margins for one in mine], negatives).to_list()
            found[label]["worst_auc"] = {"source": least, "auc": aucs[least]}
    return found

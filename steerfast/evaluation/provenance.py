"""Which prompts chose something in a profile: fitted its directions, calibrated its thresholds, tuned its edit.

A profile records name, size and hash of each set or source. The hash identifies a whole set. Single prompts can be
found where the set ships with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerfast.profile import SteeringProfile
from steerfast.text.corpus import corpus, corpus_sources
from steerfast.text.examples import LABELS, Prompt, unique_text
from steerfast.text.prompts import SHIPPED, SHIPPED_PREFIX, describe_set, shipped_records

DID = {"fit": "fitted", "calibrate": "calibrated", "tune": "tuned"}
"""What a set did that chose something."""


def digest(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 by which profiles record a set."""
    return str(describe_set([unique_text(prompt) for prompt in prompts])["sha256"])


@dataclass(frozen=True)
class Record:
    """A set that chose something.

    role: of `DID`. sha256: of the whole set. known: its prompts, as far as they ship. source: its name, where it is a
    source and its prompts are not known.
    """

    role: str
    sha256: str
    known: frozenset[str] = field(repr=False)
    source: str | None = None

    @classmethod
    def of(cls, role: str, prompts: Sequence[Prompt]) -> Record:
        """Return the record of prompts that are at hand."""
        return cls(role, digest(prompts), frozenset(map(unique_text, prompts)))


def records(profile: SteeringProfile) -> list[Record]:
    """Return the sets that a profile records, by source or by label."""
    parts = {"fit": profile.fitted, "calibrate": profile.calibration, "tune": profile.tuned}
    made = []
    for role, part in parts.items():
        for label, found in _described(part):
            name = str(found.get("name"))
            known = _shipped(name, label)
            source = name if name in part.get("sources", {}) and not known else None
            made.append(Record(role, str(found["sha256"]), known, source))
    return made


def _described(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the descriptions of sets in a part of a profile, however deep, each with its key."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            if "sha256" in value:
                yield key, value
            else:
                yield from _described(value)


def _shipped(names: str, label: str) -> frozenset[str]:
    """Return the prompts of the sets that ship among `names`, or of a source of the corpus; others are unknown."""
    if names in corpus_sources():
        labels = [label] if label in LABELS else None
        return frozenset(unique_text(one.prompt) for one in corpus(labels=labels) if one.source == names)
    single = names.removesuffix(", restyled").split(" + ")
    known = [name.removeprefix(SHIPPED_PREFIX) for name in single if name.startswith(SHIPPED_PREFIX)]
    return frozenset(record["prompt"] for name in known if name in SHIPPED for record in shipped_records(name))


def uses(
    made_with: Sequence[Record], prompts: Sequence[Prompt], sha256: str | None = None, source: str | None = None
) -> dict[str, int]:
    """Return how many of the prompts fitted, calibrated or tuned: role -> prompts, without zeros.

    Args:
        sha256: of the whole set that the prompts are from; default: of the prompts.
        source: of the prompts. All count where a set of this source chose something and its prompts are not known.
    """
    texts = [unique_text(prompt) for prompt in prompts]
    sha256 = digest(prompts) if sha256 is None else sha256
    found = {}
    for role in DID:
        mine = [one for one in made_with if one.role == role]
        whole = any(one.sha256 == sha256 or (source is not None and one.source == source) for one in mine)
        count = sum(whole or any(one in record.known for record in mine) for one in texts)
        if count:
            found[role] = count
    return found


def words(found: Mapping[str, int], count: int) -> str:
    """Return `uses` in words: ``12 of 100 prompts fitted, 3 of 100 prompts tuned``; each entry starts with a count."""
    return ", ".join(f"{number} of {count} prompts {DID[role]}" for role, number in found.items())

"""Load evaluation sets: shipped sets, the user's files, data sets of the hub."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerfast.errors import PromptError, first_line
from steerfast.evaluation.provenance import digest
from steerfast.text.corpus import corpus
from steerfast.text.examples import CONVERSATIONS, Prompt, text_of, unique_text
from steerfast.text.prompts import SHIPPED_PREFIX, read_records, records_of

KINDS = ("harmful", "jailbreak", "harmless", "borderline")

BUILT_IN: dict[str, tuple[str, str]] = {
    "jailbreakbench": ("harmful", "harmful_demo"),
    "strongreject": ("harmful", "corpus/strongreject"),
    "xstest_unsafe": ("harmful", "corpus/xstest"),
    "jailbreak_attacks": ("jailbreak", "jailbreak_attacks"),
    "self_instruct": ("harmless", "self_instruct"),
    "truthfulqa_questions": ("harmless", "truthfulqa_questions"),
    "harmless_demo": ("harmless", "harmless_demo"),
    "xstest_safe": ("borderline", "corpus/xstest"),
    "borderline": ("borderline", "borderline"),
}
"""Name -> kind and shipped prompt set. No set fits, calibrates or tunes a shipped profile."""

DEFAULT_SETS = tuple(BUILT_IN)

_HUB = "hf://"
_CORPUS = SHIPPED_PREFIX + "corpus/"
_SOURCE = re.compile(r"(?:(?P<name>[^=:/]+)=)?(?P<kind>\w+):(?P<where>.+)", re.DOTALL)
_HUB_SOURCE = re.compile(r"hf://(?P<path>[^/@#]+/[^/@#]+)(?:/(?P<config>[^@#]+))?@(?P<split>[^#]+)(?:#(?P<column>.+))?")


@dataclass(frozen=True)
class Item:
    """One entry of a set. style: attack or origin, "" where unknown."""

    prompt: Prompt
    style: str = ""

    @property
    def text(self) -> str:
        """Return the user's text of the prompt, for judges and pages."""
        return text_of(self.prompt)


@dataclass(frozen=True)
class EvalSet:
    """Prompts of one kind of `KINDS`.

    digest: SHA-256 of all prompts of the source, sampled or not, as profiles record it (`describe_set`). duplicates:
    entries dropped because of a repeated prompt.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    source: str
    digest: str
    duplicates: int

    @property
    def prompts(self) -> list[Prompt]:
        return [item.prompt for item in self.items]

    @property
    def texts(self) -> list[str]:
        return [item.text for item in self.items]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data: every field, with a count in place of the items."""
        data = {name: value for name, value in vars(self).items() if name not in ("name", "items")}
        return {**data, "count": len(self.items)}


def load_set(source: str, limit: int | None = None, seed: int = 0) -> EvalSet:
    """Load an evaluation set.

    Args:
        source: a name of `BUILT_IN`; or ``KIND:WHERE`` or ``NAME=KIND:WHERE`` with a kind of `KINDS`. WHERE is a source
            of `steerfast.text.prompts.read_records` (``FILE``, ``FILE#COLUMN``, ``steerfast:<set>``), a source of the
            corpus, ``steerfast:corpus/<source>``, whose prompts of this kind are taken, or a data set of the hub,
            ``hf://owner/dataset[/config]@split[#column]`` (package ``datasets``). A record may hold a conversation
            under ``messages``, ``turns`` or ``conversation``, if no column is named. It may name its ``style`` (or
            ``attack``, ``set``).
        limit: most items. A sample keeps the set's order and the shares of the styles.
        seed: of the sample.

    Raises:
        PromptError: an unknown set, kind or column, an unreadable or empty source, a limit below 1.
    """
    known = BUILT_IN.get(source)
    match = _SOURCE.fullmatch(f"{source}={known[0]}:{SHIPPED_PREFIX}{known[1]}" if known else source)
    kinds = ", ".join(KINDS)
    if match is None or match["kind"] not in KINDS:
        raise PromptError(
            f"set: expected one of {', '.join(BUILT_IN)}, or KIND:FILE with a kind of {kinds}, got {source!r}"
        )
    where = match["where"]
    records = _records(where, match["kind"])
    items: dict[str, Item] = {}
    for record in records:
        items.setdefault(unique_text(record["prompt"]), Item(record["prompt"], _style(record)))
    return EvalSet(
        name=match["name"] or _default_name(where),
        kind=match["kind"],
        items=sample(list(items.values()), limit, seed),
        source=where,
        digest=digest([record["prompt"] for record in records]),
        duplicates=len(records) - len(items),
    )


def _default_name(where: str) -> str:
    if (hub := _HUB_SOURCE.fullmatch(where)) is not None:
        return hub["path"].rpartition("/")[2]
    return Path(where.removeprefix(SHIPPED_PREFIX).partition("#")[0]).stem


def _records(where: str, kind: str) -> list[dict[str, Any]]:
    if where.startswith(_HUB):
        return _hub_records(where)
    if where.startswith(_CORPUS):
        label, source = "harmful" if kind == "jailbreak" else kind, where.removeprefix(_CORPUS)
        found = [{"prompt": one.prompt} for one in corpus(labels=[label]) if one.source == source]
        if not found:
            raise PromptError(f"set: expected a source of the corpus with {label} prompts, got {source!r}")
        return found
    path, mark, column = where.rpartition("#")
    if not mark or Path(where).is_file():
        return read_records(where, conversations=CONVERSATIONS)
    return read_records(path, column)


def _hub_records(where: str) -> list[dict[str, Any]]:
    match = _HUB_SOURCE.fullmatch(where)
    if match is None:
        raise PromptError(f"set: expected hf://owner/dataset[/config]@split[#column], got {where!r}")
    try:
        import datasets
    except ImportError:
        raise PromptError(f"set: {where!r} needs the package datasets (pip install datasets)") from None
    try:
        rows = datasets.load_dataset(match["path"], match["config"], split=match["split"])
    except (OSError, ValueError, RuntimeError) as error:  # unreachable or unknown; config or split that is not there
        raise PromptError(f"set: cannot load {where!r} ({first_line(error)})") from None
    return records_of(list(rows), where, match["column"], () if match["column"] else CONVERSATIONS)


def sample(items: Sequence[Item], limit: int | None, seed: int) -> tuple[Item, ...]:
    """Draw at most `limit` items in their order, each style by its share (largest remainders).

    Raises:
        PromptError: a limit below 1.
    """
    if limit is None or limit >= len(items):
        return tuple(items)
    if limit < 1:
        raise PromptError(f"limit: expected at least 1, got {limit}")
    places = by_style(items)
    shares = {style: divmod(limit * len(found), len(items)) for style, found in places.items()}
    counts = {style: whole for style, (whole, _) in shares.items()}
    for style in sorted(shares, key=lambda style: -shares[style][1])[: limit - sum(counts.values())]:
        counts[style] += 1
    draw = random.Random(seed)
    chosen = [place for style, found in places.items() for place in draw.sample(found, len(found))[: counts[style]]]
    return tuple(items[place] for place in sorted(chosen))


def by_style(items: Sequence[Item]) -> dict[str, list[int]]:
    """Return style -> places of its items."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.style, []).append(place)
    return places


def _style(record: Mapping[str, Any]) -> str:
    return next((str(record[key]) for key in ("style", "attack", "set") if record.get(key)), "")

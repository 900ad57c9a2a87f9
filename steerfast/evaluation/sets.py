"""Evaluation sets: the ones that ship with the package, files of the user's own, data sets of the hub."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerfast.errors import PromptError
from steerfast.text.prompts import SHIPPED_PREFIX, describe_set, read_records, records_of

__all__ = ["BUILT_IN", "DEFAULT_SETS", "KINDS", "EvalSet", "Item", "by_style", "load_set", "sample"]

KINDS = ("harmful", "jailbreak", "harmless", "borderline", "choice", "maths", "text")

BUILT_IN: dict[str, tuple[str, str]] = {
    "jailbreakbench": ("harmful", "harmful_demo"),
    "advbench": ("harmful", "advbench"),
    "harmbench": ("harmful", "harmbench"),
    "jailbreak_attacks": ("jailbreak", "jailbreak_attacks"),
    "self_instruct": ("harmless", "self_instruct"),
    "truthfulqa_questions": ("harmless", "truthfulqa_questions"),
    "harmless_demo": ("harmless", "harmless_demo"),
    "borderline": ("borderline", "borderline"),
    "truthfulqa": ("choice", "truthfulqa"),
    "gsm8k": ("maths", "gsm8k"),
    "references": ("text", "self_instruct"),
}
"""Name -> kind, and the shipped prompt set that holds it. None of them fits, calibrates or tunes a shipped profile."""

DEFAULT_SETS = tuple(BUILT_IN)

_HUB = "hf://"
_SOURCE = re.compile(r"(?:(?P<name>[^=:/]+)=)?(?P<kind>\w+):(?P<where>.+)", re.DOTALL)
_HUB_SOURCE = re.compile(r"hf://(?P<path>[^/@#]+/[^/@#]+)(?:/(?P<config>[^@#]+))?@(?P<split>[^#]+)(?:#(?P<column>.+))?")
_NUMBER = re.compile(r"(?:(?<![\w.)])-\s?)?\$?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?")


@dataclass(frozen=True)
class Item:
    """One entry of a set.

    style: attack or origin, "" where unknown. choices, correct: of kind choice, the answers and the indices of right
    ones. answer: of kind maths the final number, of kind text the text whose perplexity is measured. image: file of the
    picture that goes with the prompt, "" for none (see `steerfast.evaluation.multimodal`).
    """

    prompt: str
    style: str = ""
    choices: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    answer: str = ""
    image: str = ""


@dataclass(frozen=True)
class EvalSet:
    """Prompts of one kind (see `KINDS`).

    source: where they come from. digest: SHA-256 of all prompts of the source, the sample's or not, as a profile
    records those that made it (`describe_set`). duplicates: entries left out because their prompt had come before.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    source: str
    digest: str
    duplicates: int

    @property
    def prompts(self) -> list[str]:
        return [item.prompt for item in self.items]

    def to_dict(self) -> dict[str, Any]:
        """All but its items, of which there is the count, as JSON data."""
        return {
            "kind": self.kind,
            "count": len(self.items),
            "duplicates": self.duplicates,
            "source": self.source,
            "digest": self.digest,
        }


def load_set(source: str, limit: int | None = None, seed: int = 0) -> EvalSet:
    """Load an evaluation set.

    Args:
        source: a name of `BUILT_IN`; or ``KIND:WHERE``, ``NAME=KIND:WHERE`` with a kind of `KINDS`, where WHERE is what
            `steerfast.text.prompts.read_records` reads (``FILE``, ``FILE#COLUMN``, ``steerfast:<set>``) or
            ``hf://owner/dataset[/config]@split[#column]``, a data set of the hub (package ``datasets``).
            Records may say their ``style`` (or ``attack``, ``set``). Kind choice needs ``choices``, a list of texts,
            and ``correct``, the index of the right one or a list of them; maths an ``answer`` (its `final_number`);
            text an ``answer`` (or ``reference``).
        limit: at most so many items: a sample in the set's order that keeps the shares of the styles.
        seed: of the sample.

    Raises:
        PromptError: an unknown set, kind or column, an unreadable or empty source, an entry without what its kind
            needs, a limit below 1.
    """
    if source in BUILT_IN:
        name = source
        kind, shipped = BUILT_IN[source]
        where = SHIPPED_PREFIX + shipped
    else:
        match = _SOURCE.fullmatch(source)
        if match is None or match["kind"] not in KINDS:
            raise PromptError(
                f"set: expected one of {', '.join(BUILT_IN)}, or KIND:FILE with a kind of {', '.join(KINDS)}, "
                f"got {source!r}"
            )
        kind, where = match["kind"], match["where"]
        name = match["name"] or _default_name(where)
    records = _hub_records(where) if where.startswith(_HUB) else _file_records(where)
    build = _BUILDERS.get(kind, _plain)
    items: dict[str, Item] = {}
    for number, record in enumerate(records, 1):
        try:
            item = Item(prompt=record["prompt"], style=_style(record), **build(record))
        except ValueError as error:
            raise PromptError(f"set: entry {number} of {where!r}: {error}") from None
        items.setdefault(item.prompt, item)
    return EvalSet(
        name=name,
        kind=kind,
        items=sample(list(items.values()), limit, seed),
        source=where,
        digest=describe_set([record["prompt"] for record in records])["sha256"],
        duplicates=len(records) - len(items),
    )


def _default_name(where: str) -> str:
    if (hub := _HUB_SOURCE.fullmatch(where)) is not None:
        return hub["path"].rpartition("/")[2]
    return Path(where.removeprefix(SHIPPED_PREFIX).partition("#")[0]).stem


def _file_records(where: str) -> list[dict[str, Any]]:
    path, mark, column = where.rpartition("#")
    if not mark or Path(where).is_file():
        return read_records(where)
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
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PromptError(f"set: cannot load {where!r} ({reason})") from None
    return records_of(list(rows), where, match["column"])


def sample(items: Sequence[Item], limit: int | None, seed: int) -> tuple[Item, ...]:
    """At most `limit` of the items in their order, each style by its share (largest remainders).

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
    """Places of the items of each style."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.style, []).append(place)
    return places


# -- what the kinds need of a record -----------------------------------------------------------------


def _style(record: Mapping[str, Any]) -> str:
    return next((str(record[key]) for key in ("style", "attack", "set") if record.get(key)), "")


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _choice(record: Mapping[str, Any]) -> dict[str, Any]:
    choices, correct = record.get("choices"), record.get("correct")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"expected 'choices' to be a list of at least two texts, got {choices!r}")
    correct = [correct] if type(correct) is int else correct
    places = range(len(choices))
    if not isinstance(correct, list) or not correct or not all(type(c) is int and c in places for c in correct):
        raise ValueError(f"expected 'correct' to be indices of choices, 0..{len(choices) - 1}, got {correct!r}")
    return {"choices": tuple(choice.strip() for choice in choices), "correct": tuple(sorted(set(correct)))}


def _maths(record: Mapping[str, Any]) -> dict[str, Any]:
    answer = final_number(str(record.get("answer", "")))
    if answer is None:
        raise ValueError(f"expected an 'answer' with a number in it, got {record.get('answer')!r}")
    return {"answer": f"{answer:.12g}"}


def _text(record: Mapping[str, Any]) -> dict[str, Any]:
    text = next((record[key] for key in ("answer", "reference") if key in record), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a non-empty 'answer' or 'reference', got {text!r}")
    return {"answer": text.strip()}


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "choice": _choice,
    "maths": _maths,
    "text": _text,
}


def final_number(text: str) -> float | None:
    """The number that an answer ends with: the first after its last ``####``, as GSM8K marks it, else the last one."""
    marked = text.rpartition("####")
    numbers = list(_NUMBER.finditer(marked[2]))
    if not numbers:
        return None
    number = numbers[0 if marked[1] else -1]
    value = float(number[1].replace(",", "") + (number[2] or ""))
    return -value if number[0].startswith("-") else value

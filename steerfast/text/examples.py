"""Labelled prompts: what a gate is fitted on, calibrated with and validated by."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerfast.errors import PromptError
from steerfast.text.encoding import Conversation
from steerfast.text.prompts import SHIPPED_PREFIX, read_records

Prompt = str | Conversation
"""A user's message, or a whole conversation."""

LABELS = ("harmful", "borderline", "harmless")
SPLITS = ("fit", "calibrate", "validate")
_SPELLINGS = {"unsafe": "harmful", "1": "harmful", "safe": "harmless", "benign": "harmless", "0": "harmless"}
CONVERSATIONS = ("messages", "turns", "conversation")


@dataclass(frozen=True)
class Example:
    """A prompt with its label and origin.

    Attributes:
        label: ``harmful``, ``harmless``, or ``borderline``: it looks harmful, and is to be answered.
        source: the set it comes from; weigh by source, not by row.
        split: ``fit``, ``calibrate``, ``validate``, or empty in a file of the user.
        lang: ISO 639-1 code, or empty.
        context: what surrounds the request: ``bare``, ``system``, ``turns``, ``refused``, ``document_before``,
            ``document_after``, ``json``, ``tools`` or ``wrapper``.
    """

    prompt: Prompt
    label: str
    source: str
    split: str = ""
    lang: str = ""
    context: str = "bare"


def read_examples(
    source: str | os.PathLike[str], column: str | None = None, *, label: str | None = None
) -> list[Example]:
    """Read labelled prompts.

    Args:
        source: ``steerfast:corpus``, another shipped set, or a file as of `read_records`. A record holds ``prompt``,
            or a conversation under ``messages``, ``turns`` or ``conversation``; ``label`` is one of `LABELS`, or
            safe, benign, 0, unsafe, 1. It may hold ``source`` (default: the file's name), ``split``, ``lang``
            and ``context``.
        column: key of the prompt, as for `read_records`.
        label: the label of rows without one.

    Raises:
        PromptError: what `read_records` refuses, a row without a label, an unknown label or split.
    """
    name = str(source)
    if name == SHIPPED_PREFIX + "corpus":
        from steerfast.text.corpus import corpus

        return corpus()
    default = label if label is None else _label(label, "label")
    rows = read_records(source, column, conversations=CONVERSATIONS)
    stem = name.removeprefix(SHIPPED_PREFIX) if name.startswith(SHIPPED_PREFIX) else Path(source).stem
    return [_example(row, stem, default, f"prompts: entry {number} of {name!r}") for number, row in enumerate(rows, 1)]


def _example(row: Mapping[str, Any], source: str, default: str | None, place: str) -> Example:
    given = row.get("label")
    if given is None or given == "":
        if default is None:
            raise PromptError(
                f"{place}: expected a label, got none; add a column 'label' ({', '.join(LABELS)}), or give one label "
                "for all rows: read_examples(..., label='harmless')"
            )
        given = default
    if row.get("tools"):
        raise PromptError(f"{place}: tools: expected none, put them into a system message as your server renders them")
    split = row.get("split") or ""
    if split not in ("", *SPLITS):
        raise PromptError(f"{place}: split: expected {', '.join(SPLITS)} or none, got {split!r}")
    kept = {key: str(row[key]) for key in ("source", "lang", "context") if row.get(key)}
    return Example(row["prompt"], _label(given, f"{place}: label"), split=split, **{"source": source, **kept})


def grouped(examples: Sequence[Example], field: str = "source") -> dict[tuple[str, str], list[int]]:
    """Return (value, label) -> places of its examples, in order; the value is of a field of `Example`."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(examples):
        found.setdefault((getattr(one, field), one.label), []).append(place)
    return found


def _label(given: Any, place: str) -> str:
    """Return one of `LABELS` for a label as users write it; JSON's true and 1 are harmful."""
    text = str(int(given) if isinstance(given, (bool, float)) and given in (0, 1) else given).strip().lower()
    found = _SPELLINGS.get(text, text)
    if found not in LABELS:
        raise PromptError(f"{place}: expected {', '.join(LABELS)}, safe, unsafe, benign, 0 or 1, got {given!r}")
    return found


def unique_text(prompt: Prompt) -> str:
    """Return a prompt as a string that no other prompt has; a set's hash is of these."""
    return prompt if isinstance(prompt, str) else repr([dict(message) for message in prompt])


def text_of(prompt: Prompt) -> str:
    """Return all text of the user in a prompt: messages joined by an empty line."""
    return "\n\n".join(_of_user(prompt))


def last_request(prompt: Prompt) -> str:
    """Return the user's last message; an empty string where no message is the user's."""
    return (_of_user(prompt) or [""])[-1]


def _of_user(prompt: Prompt) -> Sequence[str]:
    if isinstance(prompt, str):
        return [prompt]
    return [message["content"] for message in prompt if message["role"] == "user"]

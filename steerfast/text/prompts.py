"""Prompt sets: those of the package, and files of the user."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from steerfast.errors import PromptError
from steerfast.text.encoding import is_conversation

SHIPPED_PREFIX = "steerfast:"
_FOLDER = resources.files("steerfast") / "data" / "prompts"
SHIPPED = tuple(sorted(file.name.removesuffix(".json") for file in _FOLDER.iterdir() if file.name.endswith(".json")))
_KEYS = ("prompt", "instruction", "question", "goal", "text")


def read_prompts(source: str | os.PathLike[str]) -> list[str]:
    """Return the prompts of `read_records`, in their order."""
    return [record["prompt"] for record in read_records(source)]


def read_records(
    source: str | os.PathLike[str], column: str | None = None, *, conversations: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Read a prompt set with all fields of its records.

    Args:
        source: ``steerfast:<name>`` for a set that ships with the package (see `SHIPPED`), or a file: ``.txt`` (a
            prompt per line), ``.json`` (a list), ``.jsonl`` or ``.csv``. Entries are strings or records.
        column: key or column of the prompt, in any case; default: prompt, instruction, question, goal or text.
        conversations: keys that may hold a conversation, which then is the prompt.

    Returns:
        A record per entry, keys in lower case, the prompt without surrounding space under ``prompt``.

    Raises:
        PromptError: an unknown set, file, ending or column, unreadable content, or no prompt in it.
    """
    name = str(source)
    if name.startswith(SHIPPED_PREFIX):
        return records_of(shipped_records(name.removeprefix(SHIPPED_PREFIX)), name, column, conversations)
    return records_of(read_entries(source, _keys(column)), name, column, conversations)


def read_entries(source: str | os.PathLike[str], keys: Sequence[str], what: str = "prompts") -> list[Any]:
    """Return the entries of a file, unchecked: strings, or records.

    Args:
        source: a ``.txt``, ``.json``, ``.jsonl`` or ``.csv`` file. keys: a CSV file has a column with one of these
            names. what: what the file holds, for errors.

    Raises:
        PromptError: no file, an unknown ending, or unreadable content.
    """
    name, path = str(source), Path(source)
    if not path.is_file():
        shipped = f" or {SHIPPED_PREFIX}<set>" if what == "prompts" else ""
        raise PromptError(f"{what}: expected a file at {name!r}{shipped}, found none")
    reader = {".txt": _lines, ".json": _json, ".jsonl": _jsonl, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{what}: expected a .txt, .json, .jsonl or .csv file, got {name!r}")
    try:
        return list(reader(path, keys))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error, OSError) as error:
        raise PromptError(f"{what}: cannot read {name!r} ({error})") from None
    except PromptError as error:
        raise PromptError(f"{what}: {str(error).removeprefix('prompts: ')}") from None


def records_of(
    entries: Sequence[Any], name: str, column: str | None = None, conversations: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return entries (strings, or mappings with a prompt) as `read_records` does; errors call the set `name`."""
    keys = _keys(column)
    if not entries:
        raise PromptError(f"prompts: expected at least one prompt in {name!r}, got none")
    return [_record(entry, keys, name, number, conversations) for number, entry in enumerate(entries, 1)]


def shipped_records(name: str) -> list[dict[str, Any]]:
    """Return the records of a shipped prompt set.

    A record has ``prompt``, ``set``, which names its origin (see data/NOTICE of the package), and in evaluation sets
    the fields that score an answer.
    """
    if name not in SHIPPED:
        raise PromptError(f"prompts: expected one of {', '.join(SHIPPED)} after {SHIPPED_PREFIX!r}, got {name!r}")
    records: list[dict[str, Any]] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return records


def _keys(column: str | None) -> tuple[str, ...]:
    return _KEYS if column is None else (column.lower(),)


def _lines(path: Path, keys: Sequence[str]) -> Iterable[Any]:
    # Not splitlines, which also splits at characters such as U+2028 that JSON strings may hold.
    return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _json(path: Path, keys: Sequence[str]) -> Iterable[Any]:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, list):
        raise PromptError(f"prompts: expected a JSON list in {str(path)!r}, got {type(data).__name__}")
    return data


def _jsonl(path: Path, keys: Sequence[str]) -> Iterable[Any]:
    return [json.loads(line) for line in _lines(path, keys)]


def _csv(path: Path, keys: Sequence[str]) -> Iterable[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise PromptError(
                f"prompts: row {number} of {str(path)!r}: expected {len(header)} cells as in the first row, got "
                f"{len(row)}; put text with a comma in double quotes"
            )
    if any(key in header for key in keys):
        return [dict(zip(header, row, strict=False)) for row in rows[1:]]
    if len(rows[0]) == 1 and keys is _KEYS and not {";", "\t"} & set(rows[0][0]):
        return [row[0] for row in rows]
    raise PromptError(f"prompts: expected a column named {', '.join(keys)} in {str(path)!r}, got {', '.join(rows[0])}")


def _record(
    entry: Any, keys: Sequence[str], name: str, number: int, conversations: Sequence[str] = ()
) -> dict[str, Any]:
    record = {str(key).lower(): value for key, value in entry.items()} if isinstance(entry, Mapping) else {}
    chat = next((record[key] for key in conversations if record.get(key)), None)
    if chat is None and conversations:
        chat = next((record[key] for key in keys if isinstance(record.get(key), list)), None)
    if chat is not None:
        if not is_conversation(chat):
            raise PromptError(
                f"prompts: entry {number} of {name!r}: expected messages with a role and a content, got {chat!r}"
            )
        return {**record, "prompt": chat}
    text = entry if keys is _KEYS and not record else next((record[key] for key in keys if key in record), None)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(
            f"prompts: entry {number} of {name!r}: expected a non-empty string or a record with one of "
            f"{', '.join([*keys, *conversations])}, got {text!r}"
            + (f" among {', '.join(record)}" if record and text is None else "")
        )
    return {**record, "prompt": text.strip()}


def describe_set(prompts: Sequence[str], name: str | None = None) -> dict[str, Any]:
    """Return name, size and hash of a prompt set, for a profile's provenance; the hash ignores the order."""
    digest = hashlib.sha256("\n".join(sorted(prompts)).encode()).hexdigest()
    return {"name": name, "count": len(prompts), "sha256": digest}

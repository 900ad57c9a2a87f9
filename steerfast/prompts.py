"""Prompt sets: the ones that ship with the package, and files of the user's own."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from steerfast.errors import PromptError

SHIPPED_PREFIX = "steerfast:"
SHIPPED = tuple(
    f"{label}_{role}"
    for role in ("fit", "framed", "calibrate", "heldout", "tune", "demo")
    for label in ("harmful", "harmless")
)
_KEYS = ("prompt", "instruction", "question", "goal", "text")


def read_prompts(source: str | os.PathLike[str]) -> list[str]:
    """Read a prompt set, in its order.

    Args:
        source: ``steerfast:<name>`` for a set that ships with the package (see `SHIPPED`), or a file: ``.txt`` (a
            prompt per line), ``.json`` (a list), ``.jsonl`` or ``.csv``. Entries are strings or records with one of
            the keys prompt, instruction, question, goal, text.

    Raises:
        PromptError: no such set or file, an unknown ending, unreadable content, or no prompt in it.
    """
    name = str(source)
    if name.startswith(SHIPPED_PREFIX):
        return [str(record["prompt"]) for record in shipped_records(name.removeprefix(SHIPPED_PREFIX))]
    path = Path(source)
    if not path.is_file():
        raise PromptError(f"prompts: expected a file at {name!r} or {SHIPPED_PREFIX}<set>, found none")
    reader = {".txt": _lines, ".json": _json, ".jsonl": _jsonl, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"prompts: expected a .txt, .json, .jsonl or .csv file, got {name!r}")
    try:
        entries = list(reader(path))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError) as error:
        raise PromptError(f"prompts: cannot read {name!r} ({error})") from None
    prompts = [_prompt(entry, name, number) for number, entry in enumerate(entries, 1)]
    if not prompts:
        raise PromptError(f"prompts: expected at least one prompt in {name!r}, got none")
    return prompts


def shipped_records(name: str) -> list[dict[str, str]]:
    """Records ``{"prompt", "set"}`` of a shipped prompt set; `set` names its origin (see the package's data/NOTICE)."""
    if name not in SHIPPED:
        raise PromptError(f"prompts: expected one of {', '.join(SHIPPED)} after {SHIPPED_PREFIX!r}, got {name!r}")
    file = resources.files("steerfast") / "data" / "prompts" / f"{name}.json"
    records: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return records


def _lines(path: Path) -> Iterable[Any]:
    # Not splitlines, which also splits at characters such as U+2028 that JSON strings may hold.
    return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _json(path: Path) -> Iterable[Any]:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, list):
        raise PromptError(f"prompts: expected a JSON list in {str(path)!r}, got {type(data).__name__}")
    return data


def _jsonl(path: Path) -> Iterable[Any]:
    return [json.loads(line) for line in _lines(path)]


def _csv(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    if any(key in header for key in _KEYS):
        return [dict(zip(header, row, strict=False)) for row in rows[1:]]
    if len(rows[0]) == 1:
        return [row[0] for row in rows]
    raise PromptError(f"prompts: expected a column named {', '.join(_KEYS)} in {str(path)!r}, got {', '.join(rows[0])}")


def _prompt(entry: Any, name: str, number: int) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in _KEYS if key in entry), None)
    if not isinstance(entry, str) or not entry.strip():
        raise PromptError(
            f"prompts: entry {number} of {name!r}: expected a non-empty string or a record with one of "
            f"{', '.join(_KEYS)}, got {entry!r}"
        )
    return entry.strip()

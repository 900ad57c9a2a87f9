"""The corpus that ships: labelled prompts of many public sources, each source in one split."""

from __future__ import annotations

import base64
import codecs
import json
import lzma
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

from steerfast.errors import PromptError
from steerfast.text.examples import LABELS, SPLITS, Example, Prompt
from steerfast.text.prompts import shipped_records

FILE = resources.files("steerfast") / "data" / "corpus.jsonl.xz"


def corpus(split: str | Collection[str] | None = None, labels: Collection[str] | None = None) -> list[Example]:
    """Return the examples of the shipped corpus, in a fixed order.

    Args:
        split: ``fit``, ``calibrate``, ``validate`` or several of them; default: all.
        labels: ``harmful``, ``borderline``, ``harmless``; default: all.

    Raises:
        PromptError: an unknown split or label.
    """
    splits = _known("split", split, SPLITS)
    kinds = _known("labels", labels, LABELS)
    return [example for example in _examples() if example.split in splits and example.label in kinds]


def corpus_sources() -> dict[str, dict[str, Any]]:
    """Return what is known of each source.

    Returns:
        By name: ``split``, ``family``, ``licence``, ``origin`` (an address), ``use`` (what is taken, and how it was
        changed), and ``counts``: examples by label.
    """
    counts = Counter((example.source, example.label) for example in _examples())
    return {
        name: {
            **{key: source[key] for key in ("split", "family", "licence", "origin", "use")},
            "counts": {label: counts[name, label] for label in LABELS if counts[name, label]},
        }
        for name, source in _file()[0].items()
    }


def _known(name: str, given: str | Collection[str] | None, known: Sequence[str]) -> Collection[str]:
    values = known if given is None else [given] if isinstance(given, str) else list(given)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise PromptError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return values


@lru_cache(maxsize=1)
def _examples() -> tuple[Example, ...]:
    sources, pool, rows = _file()
    examples = [_example(row, sources[row["source"]], pool) for row in rows]
    examples += [
        Example(record["prompt"], source["label"], name, source["split"], "en", source["context"])
        for name, source in sources.items()
        if "set" in source
        for record in shipped_records(source["set"])
        if record.get("style") in source.get("styles", [record.get("style")])
    ]
    return tuple(examples)


@lru_cache(maxsize=1)
def _file() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Return sources, the pool of pieces by split and context, and the rows; the first line holds the former two."""
    lines = lzma.decompress(FILE.read_bytes()).decode().split("\n")
    head, *rows = (json.loads(line) for line in lines if line)
    return head["sources"], head["pool"], rows


def _example(row: Mapping[str, Any], source: Mapping[str, Any], pool: Mapping[str, Any]) -> Example:
    context = row.get("context", "bare")
    prompt = row["request"]
    if "piece" in row:
        prompt = compose(prompt, context, pool[source["split"]][context.partition("_")[0]][row["piece"]])
    return Example(prompt, row["label"], row["source"], source["split"], row.get("lang", "en"), context)


def compose(request: str, context: str, piece: Any) -> Prompt:
    """Return a request within a context.

    Args:
        piece: of ``system`` and ``tools`` the system message; of ``turns`` and ``refused`` the earlier messages, the
            user's first; of a document its text; of ``json`` an object and of ``wrapper`` a text in which
            ``{request}`` stands for the request, or an encoding's name.

    Raises:
        PromptError: an unknown context.
    """
    if context not in _COMPOSERS:
        raise PromptError(f"context: expected {', '.join(sorted(_COMPOSERS))}, got {context!r}")
    return _COMPOSERS[context](request, piece)


def _after_system(request: str, piece: str) -> Prompt:
    return [{"role": "system", "content": piece}, {"role": "user", "content": request}]


def _after_turns(request: str, piece: Sequence[str]) -> Prompt:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate([*piece, request])]


def _in_json(request: str, piece: Mapping[str, Any]) -> Prompt:
    filled = {key: request if value == "{request}" else value for key, value in piece.items()}
    return json.dumps(filled, ensure_ascii=False)


def _wrapped(request: str, piece: str) -> Prompt:
    return _ENCODINGS[piece](request) if piece in _ENCODINGS else piece.replace("{request}", request)


_ENCODINGS: dict[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "reversed": lambda text: text[::-1],
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "spaced": lambda text: " ".join(text),
}
_COMPOSERS: dict[str, Callable[[str, Any], Prompt]] = {
    "document_after": lambda request, piece: f"{request}\n\n{piece}",
    "document_before": lambda request, piece: f"{piece}\n\n{request}",
    "json": _in_json,
    "refused": _after_turns,
    "system": _after_system,
    "tools": _after_system,
    "turns": _after_turns,
    "wrapper": _wrapped,
}

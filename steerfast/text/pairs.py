"""Contrastive pairs: what a model reads where a behaviour shows, and where it does not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from steerfast.errors import PromptError
from steerfast.text.encoding import Conversation, is_conversation
from steerfast.text.examples import Prompt
from steerfast.text.prompts import read_entries

SIDES = ("positive", "negative")
_KEYS = (*SIDES, "prompt")


def pairs(source: str | os.PathLike[str]) -> tuple[list[Prompt], list[Prompt]]:
    """Read contrastive pairs.

    A record holds ``positive`` and ``negative``. Both are prompts, or both are conversations. With ``prompt`` beside
    them, a string is an answer to it; of messages, a system message stands before the prompt and the others after it.

    Args:
        source: a ``.json`` (a list), ``.jsonl`` or ``.csv`` file of records.

    Returns:
        The positive and the negative side of each pair: prompts, or conversations. One that ends with a message of the
        assistant has an answer.

    Raises:
        PromptError: an unreadable file, a record with a side that is missing or empty, an unknown key, or pairs that
            `check_pairs` refuses.
    """
    entries, name = read_entries(source, _KEYS, "pairs"), str(source)
    sides: dict[str, list[Prompt]] = {side: [] for side in SIDES}
    for number, entry in enumerate(entries, 1):
        place = f"pairs: entry {number} of {name!r}"
        record = _record(entry, place)
        for side in SIDES:
            sides[side].append(_chat(record, side, place))
    check_pairs(sides["positive"], sides["negative"], f" of {name!r}")
    return sides["positive"], sides["negative"]


def check_pairs(positive: Sequence[Prompt], negative: Sequence[Prompt], of: str = "") -> None:
    """Refuse sides that make no pairs; `of` names their file in errors.

    Raises:
        PromptError: a single string, no pair, sides of unequal length, an entry that is no prompt, equal sides of a
            pair, or an answer on some sides alone.
    """
    for name, side in zip(SIDES, (positive, negative), strict=True):
        if isinstance(side, str):
            raise PromptError(f"{name}: expected a list of prompts or conversations, got one string")
        for number, one in enumerate(side, 1):
            if not (is_conversation(one) or (isinstance(one, str) and one.strip())):
                raise PromptError(f"{name}: entry {number}{of}: expected a prompt or messages, got {one!r}")
    if len(positive) != len(negative):
        raise PromptError(f"positive and negative: expected as many of each, got {len(positive)} and {len(negative)}")
    if not len(positive):
        raise PromptError(f"pairs: expected at least one{of}, got none")
    with_answer = split_answer(positive[0])[1] is not None
    for number, pair in enumerate(zip(positive, negative, strict=True), 1):
        if pair[0] == pair[1]:
            raise PromptError(f"pairs: entry {number}{of}: expected sides that differ, got the same twice")
        if any((split_answer(one)[1] is not None) != with_answer for one in pair):
            raise PromptError(
                f"pairs: entry {number}{of}: expected an answer on both sides of every pair, or on none; entry 1 has "
                f"{'one' if with_answer else 'none'}"
            )


def split_answer(chat: Prompt) -> tuple[Prompt, str | None]:
    """Return what comes before a conversation's last message, and that message if it is the assistant's, else None.

    Raises:
        PromptError: an answer with no message before it.
    """
    if isinstance(chat, str) or chat[-1]["role"] != "assistant":
        return chat, None
    if len(chat) < 2:
        raise PromptError(f"pairs: expected a message before an answer, got {chat[-1]['content'][:60]!r} alone")
    return chat[:-1], chat[-1]["content"]


def _record(entry: Any, place: str) -> Mapping[str, Any]:
    """Return the record of an entry, keys in lower case."""
    if not isinstance(entry, Mapping):
        raise PromptError(f"{place}: expected a record with {' and '.join(SIDES)}, got {entry!r}")
    record = {str(key).strip().lower(): value for key, value in entry.items()}
    if unknown := sorted(record.keys() - set(_KEYS)):
        raise PromptError(f"{place}: expected the keys {', '.join(_KEYS)}, got {', '.join(unknown)} too")
    return record


def _chat(record: Mapping[str, Any], side: str, place: str) -> Prompt:
    """Return the prompt or the conversation of one side of a pair."""
    given = _text(record, side, place)
    if "prompt" not in record:
        return given
    prompt = _messages(_text(record, "prompt", place), "user")
    own = _messages(given, "assistant")
    system = [message for message in own if message["role"] == "system"]
    if len(system) + sum(message["role"] == "system" for message in prompt) > 1:
        raise PromptError(f"{place}: {side}: expected one system message at most, got several")
    return [*system, *prompt, *(message for message in own if message["role"] != "system")]


def _text(record: Mapping[str, Any], key: str, place: str) -> Prompt:
    """Return a string without surrounding space, or messages."""
    value = record.get(key)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, list) and is_conversation(value):
        return value
    got = "none" if value is None or value == "" else repr(value)
    raise PromptError(f"{place}: {key}: expected a text, or messages with a role and a content, got {got}")


def _messages(given: Prompt, role: str) -> Conversation:
    return [{"role": role, "content": given}] if isinstance(given, str) else given

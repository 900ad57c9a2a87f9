"""The tokens of a chat template that open a user turn, that end a prompt, and that end a thought."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from steerfast.errors import ProfileError
from steerfast.profile import last_turn

# A tokenizer may merge the end of a marker with the beginning of a content, so they begin and end in many ways.
_CONTENTS = (
    "Hello there",
    "a simple question",
    "how are you",
    "7 of 9",
    "\n\nNew line\n",
    "東京へ",
    " (spaced) ",
    "- one\n- two",
    "naïve café.",
    "def f(x):",
)
# The beginning and the end of a thought.
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
)
_QUESTION, _ANSWER = "What is it?", "An answer."


def turn_markers(tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Return the `turn` and `tail` of a `steerfast.Gate` for prompts by a tokenizer's chat template.

    The marker is what all first and all later user turns begin with, whatever their content. It is searched where no
    system message stands before the user's; a template may put that into the user's turn.

    Returns:
        Token ids that open a user turn, and how many tokens follow the content of the last one. Empty and 0 where there
        is no template, or none that opens user turns by tokens of their own.
    """
    from jinja2 import TemplateError

    def rendered(*contents: str, answers: bool = True) -> list[int]:
        roles = ("user", "assistant") * len(contents)
        chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=answers, return_dict=True)["input_ids"]
        return [int(token) for token in ids]

    if not getattr(tokenizer, "chat_template", None):
        return (), 0
    try:
        first = [rendered(content) for content in _CONTENTS]
        later = [rendered(_QUESTION, _ANSWER, content) for content in _CONTENTS]
        answered = rendered(_QUESTION, _ANSWER, answers=False)
    except TemplateError:  # such as one that takes a single message
        return (), 0
    before, before_later = _common_start(first), _common_start(later)
    # What ends the answer before it is no part of the marker: a cache may hold it.
    opens = before_later[len(_common_start([before_later, answered])) :]
    turn = tuple(_common_end([before, opens]))
    tail = len(_common_end(first))
    places = [len(before)] * len(first) + [len(before_later)] * len(later)
    if not turn or [last_turn(ids, turn) for ids in first + later] != places:
        return (), 0
    return turn, tail


def thought_markers(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids by which a thought ends, and those by which the reply before it opens, in a chat template.

    The second are empty where the template opens user turns by no tokens of its own.

    Raises:
        ProfileError: the template has no known end of a thought, or the tokenizer may merge it with other text.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = [pair for pair in _THOUGHTS if pair[1] in template]
    if not known:
        ends = ", ".join(end for _, end in _THOUGHTS)
        raise ProfileError(
            f"thinking: expected a chat template with the end of a thought ({ends}), got none of them; use "
            "thinking='count'"
        )
    begin, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in known[0])
    own = {*tokenizer.get_added_vocab().values()} - {tokenizer.unk_token_id}
    if not {end[0], end[-1]} <= own:
        raise ProfileError(f"thinking: expected tokens of its own for {known[0][1]!r}, got {end}; use thinking='count'")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, return_dict=True
    )
    tail = asked["input_ids"][len(asked["input_ids"]) - turn_markers(tokenizer)[1] :]
    return tuple(end), tuple(takewhile(lambda token: token not in {begin[0], end[0]}, tail))


def _common_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest beginning that all sequences share."""
    return [each[0] for each in takewhile(lambda each: len({*each}) == 1, zip(*sequences, strict=False))]


def _common_end(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest end that all sequences share."""
    return _common_start([sequence[::-1] for sequence in sequences])[::-1]

"""Labelled prompts: files of the user, and the text of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerfast.errors import PromptError
from steerfast.text.examples import Example, last_request, read_examples, text_of

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "How do I bake bread?"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_with_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": " a ", "label": "harmful"},
        {"prompt": "b", "label": "harmless", "source": "chat", "split": "fit", "lang": "fr", "context": "json"},
    ]
    found = read_examples(write(tmp_path / "traffic.jsonl", rows))
    assert found == [
        Example("a", "harmful", "traffic"),
        Example("b", "harmless", "chat", split="fit", lang="fr", context="json"),
    ]


@pytest.mark.parametrize(
    ("given_label", "label"),
    [
        *[("harmful", "harmful"), ("Unsafe", "harmful"), ("1", "harmful"), (1, "harmful"), (True, "harmful")],
        *[("harmless", "harmless"), ("safe", "harmless"), ("benign", "harmless"), (0, "harmless"), (0.0, "harmless")],
        *[("borderline", "borderline"), (" Borderline ", "borderline"), (False, "harmless")],
    ],
)
def test_spellings_of_labels(tmp_path: Path, given_label: Any, label: str) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", [{"prompt": "a", "label": given_label}]))
    assert example.label == label


def test_a_column_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ask,label\nhow are you,safe\n", encoding="utf-8")
    assert read_examples(path, column="ask") == [Example("how are you", "harmless", "a")]


@pytest.mark.parametrize("key", ["messages", "turns", "conversation", "Messages", "prompt"])
def test_conversations(tmp_path: Path, key: str) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", [{key: CHAT}]), label="harmless")
    assert example.prompt == CHAT
    assert text_of(example.prompt) == "Hello\n\nHow do I bake bread?"
    assert last_request(example.prompt) == "How do I bake bread?"


def test_one_label_for_a_file_without_any(tmp_path: Path) -> None:
    path = tmp_path / "traffic.txt"
    path.write_text("a\nb\n", encoding="utf-8")
    assert [example.label for example in read_examples(path, label="safe")] == ["harmless", "harmless"]
    mixed = write(tmp_path / "mixed.jsonl", [{"prompt": "a"}, {"prompt": "b", "label": "harmful"}])
    assert [example.label for example in read_examples(mixed, label="harmless")] == ["harmless", "harmful"]


BAD = {
    "no label": ([{"prompt": "a", "label": "safe"}, {"prompt": "b"}], "entry 2 of .*: expected a label, got none; add"),
    "empty label": ([{"prompt": "b", "label": ""}], "entry 1 of .*: expected a label"),
    "unknown label": ([{"prompt": "b", "label": "bad"}], "entry 1 of .*: label: expected harmful, .*, got 'bad'"),
    "number": ([{"prompt": "b", "label": 2}], "label: expected .*, got 2"),
    "split": ([{"prompt": "b", "label": 0, "split": "test"}], "split: expected fit, .* or none, got 'test'"),
    "tools": (
        [{"prompt": "b", "label": 0, "tools": [{}]}],
        "entry 1 of .*: tools: expected none, put them into a system",
    ),
    "no role": ([{"messages": [{"content": "a"}], "label": 0}], "expected messages with a role and a content"),
    "empty message": ([{"turns": [{"role": "user", "content": " "}], "label": 0}], "expected messages with a role"),
    "text as messages": ([{"messages": "a", "label": 0}], "expected messages with a role and a content, got 'a'"),
    "no prompt": ([{"ask": "a", "label": 0}], "with one of prompt, .*, conversation, got None among ask"),
    "no messages": ([{"messages": [], "label": 0}], "with one of prompt, .*messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    rows, error = BAD[name]
    with pytest.raises(PromptError, match=error):
        read_examples(write(tmp_path / "a.jsonl", rows))


def test_a_bad_label_for_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"^label: expected harmful, .*, got 'fine'"):
        read_examples(write(tmp_path / "a.jsonl", [{"prompt": "a"}]), label="fine")


@given(st.text(min_size=1))
def test_a_text_is_its_own_request(text: str) -> None:
    assert text_of(text) == last_request(text) == text


def test_no_message_of_the_user() -> None:
    chat = [{"role": "system", "content": "Be brief."}]
    assert text_of(chat) == last_request(chat) == ""

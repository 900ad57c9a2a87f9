"""Every shape of a contrastive pair, and every record that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerfast.errors import PromptError
from steerfast.text.pairs import check_pairs, pairs, split_answer
from steerfast.text.prompts import read_records

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "formal.jsonl"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


ANSWERED = [user("hi"), assistant("good day")], [user("hi"), assistant("yo")]
SHAPES = {
    "prompts": ({"positive": " good day ", "negative": "yo"}, ("good day", "yo")),
    "answers": ({"prompt": "hi", "positive": "good day", "negative": "yo"}, ANSWERED),
    "answers as messages": (
        {"prompt": "hi", "positive": [assistant("good day")], "negative": [assistant("yo")]},
        ANSWERED,
    ),
    "answers to a conversation": (
        {"prompt": [user("a"), assistant("b"), user("hi")], "positive": "good day", "negative": "yo"},
        tuple([user("a"), assistant("b"), *side] for side in ANSWERED),
    ),
    "conversations": ({"positive": ANSWERED[0], "negative": ANSWERED[1]}, ANSWERED),
    "conversations without answers": (
        {"positive": [system("be kind"), user("hi")], "negative": [user("hi")]},
        ([system("be kind"), user("hi")], [user("hi")]),
    ),
    "system prompts": (
        {"prompt": "hi", "positive": [system("be kind")], "negative": [system("be rude")]},
        ([system("be kind"), user("hi")], [system("be rude"), user("hi")]),
    ),
    "system prompts and answers": (
        {
            "prompt": "hi",
            "positive": [system("be kind"), assistant("good day")],
            "negative": [system("be rude"), assistant("yo")],
        },
        ([system("be kind"), *ANSWERED[0]], [system("be rude"), *ANSWERED[1]]),
    ),
}


def write(folder: Path, records: Any, ending: str = ".jsonl") -> Path:
    file = folder / f"pairs{ending}"
    file.write_text(json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records)))
    return file


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tmp_path: Path, shape: str, ending: str) -> None:
    record, (positive, negative) = SHAPES[shape]
    assert pairs(write(tmp_path, [record, record], ending)) == ([positive] * 2, [negative] * 2)


def test_a_table(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text('Prompt,Positive,Negative\nhi,"good day, sir",yo\n')
    assert pairs(file) == ([[user("hi"), assistant("good day, sir")]], [ANSWERED[1]])


def test_the_example() -> None:
    positive, negative = pairs(EXAMPLE)
    assert len(positive) == len(negative) == 24
    assert len({split_answer(chat)[1] for chat in [*positive, *negative]}) == 48


BOTH = {"positive": "a", "negative": "b"}
REFUSED: dict[str, tuple[Any, str]] = {
    "one side missing": ([BOTH, {"positive": "a"}], r"entry 2 of '.*': negative: expected a text, .* got none"),
    "an empty side": ([{**BOTH, "positive": ""}], r"entry 1 of .*: positive: expected a text, .* got none"),
    "a blank side": ([{**BOTH, "positive": "  "}], r"positive: expected a text, .* got '  '"),
    "an empty prompt": ([{**BOTH, "prompt": ""}], r"prompt: expected a text, .* got none"),
    "no messages": ([{**BOTH, "negative": []}], r"negative: expected a text, or messages .* got \[\]"),
    "a message without a role": ([{**BOTH, "negative": [{"content": "b"}]}], "messages with a role and a content"),
    "a number": ([{**BOTH, "negative": 3}], "negative: expected a text, .* got 3"),
    "an unknown key": (
        [{**BOTH, "lable": "x", "note": "y"}],
        "entry 1 of .*: expected the keys positive, negative, prompt, got lable, note too",
    ),
    "no record": (["a"], "entry 1 of .*: expected a record with positive and negative, got 'a'"),
    "nothing": ([], r"pairs: expected at least one of '.*', got none"),
    "equal sides": ([BOTH, {"positive": "a", "negative": "a"}], "entry 2 of .*: expected sides that differ"),
    "an answer on one side": (
        [{"positive": ANSWERED[0], "negative": [user("hi")]}],
        "entry 1 of .*: expected an answer on both sides of every pair, or on none; entry 1 has one",
    ),
    "answers in some pairs": ([BOTH, {**BOTH, "prompt": "hi"}], "entry 2 of .*: .* entry 1 has none"),
    "an answer alone": ([{"positive": [assistant("a")], "negative": [assistant("b")]}], "a message before an answer"),
    "two system messages": (
        [{"prompt": [system("x"), user("hi")], "positive": [system("a")], "negative": [system("b")]}],
        "positive: expected one system message at most, got several",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    records, message = REFUSED[case]
    with pytest.raises(PromptError, match=message):
        pairs(write(tmp_path, records))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.jsonl", None, r"pairs: expected a file at '.*missing.jsonl', found none"),
        ("pairs.yaml", "a", r"pairs: expected a .txt, .json, .jsonl or .csv file"),
        ("pairs.jsonl", "{", r"pairs: cannot read"),
        ("pairs.json", "{}", r"pairs: expected a JSON list in"),
        ("pairs.txt", "a line", r"pairs: entry 1 of .*: expected a record with positive and negative, got 'a line'"),
        ("pairs.csv", "good,bad\na,b\n", "pairs: expected a column named positive, negative, prompt in"),
        ("pairs.csv", "positive,prompt\na,b\n", "entry 1 of .*: negative: expected a text, .* got none"),
        ("pairs.csv", "positive,negative\na,b,c\n", "pairs: row 2 of .*: expected 2 cells"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=message):
        pairs(tmp_path / name)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ("a", ["b"], "positive: expected a list of prompts or conversations, got one string"),
        (["a", "c"], ["b"], "positive and negative: expected as many of each, got 2 and 1"),
        ([], [], "pairs: expected at least one, got none"),
        (["a"], [" "], "negative: entry 1: expected a prompt or messages, got ' '"),
        (["a"], [None], "negative: entry 1: expected a prompt or messages, got None"),
    ],
)
def test_lists(positive: Any, negative: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_pairs(positive, negative)


def test_prompts_are_still_read_by_their_own_names(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts: expected a file at '.*' or steerfast:<set>, found none"):
        read_records(tmp_path / "none.txt")

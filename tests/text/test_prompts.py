"""Prompt files of every kind, their errors, and the sets that ship with the package."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from pathlib import Path

import pytest

from steerfast.errors import PromptError
from steerfast.text.prompts import SHIPPED, read_prompts, read_records, shipped_records

GOOD = {
    "plain.txt": (b"how to bake\nwrite a poem\n", ["how to bake", "write a poem"]),
    "windows.txt": (b"\xef\xbb\xbfhow to bake\r\n\r\n   write a poem  \r\n", ["how to bake", "write a poem"]),
    "one line.txt": (b"how to bake", ["how to bake"]),
    "odd breaks.txt": ("a\u2028b\x0cc\nd".encode(), ["a\u2028b\x0cc", "d"]),
    "upper.TXT": (b"caf\xc3\xa9", ["café"]),
    "strings.json": (b'["a", "b "]', ["a", "b"]),
    "records.json": (b'[{"goal": "a", "target": "x"}, {"text": "b"}, "c"]', ["a", "b", "c"]),
    "first key wins.json": (b'[{"text": "b", "prompt": "a"}]', ["a"]),
    "bom.json": (b'\xef\xbb\xbf["a"]', ["a"]),
    "records.jsonl": (b'{"prompt": "a"}\n\n"b"\r\n{"question": "c"}', ["a", "b", "c"]),
    "odd breaks.jsonl": ('{"prompt": "a\u2028b"}\n'.encode(), ["a\u2028b"]),
    "header.csv": (b"goal,target\nmake a bomb,Sure\n\"a, b\",x\n", ["make a bomb", "a, b"]),
    "header case.csv": (b"\xef\xbb\xbf Prompt ,n\r\na,1\r\n,,\r\nb,2\r\n", ["a", "b"]),
    "no header.csv": (b'how to bake\n"write, now"\n', ["how to bake", "write, now"]),
    "two lines in a cell.csv": (b'prompt\n"a\nb"\n', ["a\nb"]),
}  # fmt: skip

BAD = {
    "empty.txt": (b"\n  \n", "expected at least one prompt in .*empty.txt', got none"),
    "empty.csv": (b"", "expected at least one prompt"),
    "header only.csv": (b"prompt\n", "expected at least one prompt"),
    "empty.json": (b"[]", "expected at least one prompt"),
    "object.json": (b'{"prompt": "a"}', "expected a JSON list in .*, got dict"),
    "cut.json": (b'["a", ', "cannot read .*cut.json"),
    "deep.json": (b"[" * 100_000, "cannot read .*deep.json"),
    "cut.jsonl": (b'{"prompt": "a"}\n{"prom', "cannot read .*cut.jsonl"),
    "latin.txt": (b"caf\xe9", "cannot read .*latin.txt"),
    "number.json": (b'["a", 3]', "entry 2 of .*: expected a non-empty string or a record with .*, got 3"),
    "blank.json": (b'["a", " "]', "entry 2 of .*, got ' '"),
    "null.json": (b'[{"prompt": null}]', "entry 1 of .*, got None"),
    "other key.jsonl": (b'{"harm": "a"}', "entry 1 of .*: .* with one of prompt, instruction, .*, got None"),
    "other columns.csv": (b"a,b\nc,d\n", "expected a column named prompt, .*, got a, b"),
    "comma.csv": (
        b"label,prompt\nharmless,How do I, as a cook, bake?\n",
        "row 2 of .*: expected 2 cells as .* got 4; put",
    ),
    "one column.csv": (b"prompt\nHow do I, as a cook, bake?\n", "row 2 of .*: expected 1 cells as .*, got 3"),
    "semicolons.csv": (b"prompt;label\na;harmless\n", "expected a column named prompt, .*, got prompt;label"),
    "short row.csv": (b"id,prompt\n1,a\n2\n", "entry 2 of .*, got None"),
    "prompts.parquet": (b"a", "expected a .txt, .json, .jsonl or .csv file, got .*parquet'"),
    "prompts": (b"a", "expected a .txt, .json, .jsonl or .csv file"),
}


@pytest.mark.parametrize("name", GOOD)
def test_files(tmp_path: Path, name: str) -> None:
    content, expected = GOOD[name]
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize("name", BAD)
def test_errors(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=f"prompts: {message}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing.txt", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptError, match=r"expected a file at .* or steerfast:<set>, found none"):
        read_prompts(tmp_path / name)


def test_no_such_shipped_set() -> None:
    with pytest.raises(PromptError, match=r"expected one of .*harmful_fit, .* after 'steerfast:', got 'harmful'"):
        read_prompts("steerfast:harmful")


COLUMNS = {
    "strange.csv": (b"id,Behaviour\n1,make a bomb\n", "behaviour", [{"id": "1", "behaviour": "make a bomb"}]),
    "upper.json": (b'[{"Behaviour": " a ", "N": 3}]', "BEHAVIOUR", [{"behaviour": " a ", "n": 3}]),
    "not the usual.jsonl": (b'{"prompt": "a", "asked": "b"}', "asked", [{"prompt": "a", "asked": "b"}]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_is_named(tmp_path: Path, name: str) -> None:
    content, column, records = COLUMNS[name]
    (tmp_path / name).write_bytes(content)
    expected = [{**record, "prompt": record[column.lower()].strip()} for record in records]
    assert read_records(tmp_path / name, column) == expected


BAD_COLUMNS = {
    "a.csv": (b"id,prompt\n1,x\n", "expected a column named goals in .*, got id, prompt"),
    "one column.csv": (b"how to bake\nwrite\n", "expected a column named goals in .*, got how to bake"),
    "a.json": (b'[{"prompt": "x", "n": 1}]', "entry 1 of .* with one of goals, got None among prompt, n"),
    "a.txt": (b"x\n", "entry 1 of .* with one of goals, got None"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_a_column_that_is_not_there(tmp_path: Path, name: str) -> None:
    content, message = BAD_COLUMNS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=f"prompts: {message}"):
        read_records(tmp_path / name, "goals")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_read_whole(name: str) -> None:
    prompts = read_prompts(f"steerfast:{name}")
    assert prompts == [record["prompt"] for record in shipped_records(name)]
    assert len(prompts) == len(set(prompts))
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_the_sets_that_users_and_scripts_name_are_there() -> None:
    roles = ("fit", "tune", "demo")
    assert {f"{label}_{role}" for role in roles for label in ("harmful", "harmless")} <= set(SHIPPED)


def test_both_labels_have_every_role() -> None:
    roles = {
        label: [name.split("_")[1] for name in SHIPPED if name.startswith(label)] for label in ("harmful", "harmless")
    }
    assert roles["harmful"] == roles["harmless"]


def purpose(name: str) -> tuple[str, str]:
    """What a shipped set is for: prompts of one label that fit, calibrate and so on; any other set for itself."""
    label, _, rest = name.partition("_")
    if label not in ("harmful", "harmless"):
        return name, ""
    return label, next((role for role in ("tune", "demo") if rest.endswith(role)), "fit")


def test_no_prompt_serves_two_purposes() -> None:
    held: dict[tuple[str, str], set[str]] = {}
    for name in SHIPPED:
        for record in shipped_records(name):
            texts = {record["prompt"].casefold(), record.get("request", record["prompt"]).casefold()}
            held.setdefault(purpose(name), set()).update(texts)
    assert len(held) == 6 + 6
    for one, other in itertools.combinations(held, 2):
        assert not held[one] & held[other], f"{one} and {other}"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_record_names_an_origin_of_the_notice(name: str) -> None:
    notice = (resources.files("steerfast") / "data" / "NOTICE").read_text(encoding="utf-8")
    listed = {line.split()[0] for line in notice.splitlines() if line.strip()}
    for record in shipped_records(name):
        assert set(record) <= {"prompt", "set", "style", "choices", "correct", "answer", "request", "language"}
        assert record["set"].split(",")[0] in listed


def test_shipped_files_are_plain_utf_8_json() -> None:
    for name in SHIPPED:
        file = resources.files("steerfast") / "data" / "prompts" / f"{name}.json"
        data = file.read_bytes()
        assert not data.startswith(b"\xef\xbb\xbf")
        assert isinstance(json.loads(data.decode("utf-8")), list)

"""Prompt files of every kind, their errors, and the sets that ship with the package."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from pathlib import Path

import pytest

from steerfast.errors import PromptError
from steerfast.prompts import SHIPPED, read_prompts, shipped_records

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
    "cut.jsonl": (b'{"prompt": "a"}\n{"prom', "cannot read .*cut.jsonl"),
    "latin.txt": (b"caf\xe9", "cannot read .*latin.txt"),
    "number.json": (b'["a", 3]', "entry 2 of .*: expected a non-empty string or a record with .*, got 3"),
    "blank.json": (b'["a", " "]', "entry 2 of .*, got ' '"),
    "null.json": (b'[{"prompt": null}]', "entry 1 of .*, got None"),
    "other key.jsonl": (b'{"harm": "a"}', "entry 1 of .*: .* with one of prompt, instruction, .*, got None"),
    "other columns.csv": (b"a,b\nc,d\n", "expected a column named prompt, .*, got a, b"),
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
    with pytest.raises(PromptError, match=r"expected one of harmful_fit, .* after 'steerfast:', got 'harmful'"):
        read_prompts("steerfast:harmful")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_read_whole(name: str) -> None:
    prompts = read_prompts(f"steerfast:{name}")
    assert prompts == [record["prompt"] for record in shipped_records(name)]
    assert len(prompts) == len(set(prompts))
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    assert len(prompts) >= 32


def test_shipped_sets_are_those_of_the_folder() -> None:
    folder = resources.files("steerfast") / "data" / "prompts"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.json" for name in SHIPPED)


def test_both_labels_have_every_role_and_enough_to_calibrate_one_percent() -> None:
    roles = {
        label: [name.split("_")[1] for name in SHIPPED if name.startswith(label)] for label in ("harmful", "harmless")
    }
    assert roles["harmful"] == roles["harmless"]
    assert len(read_prompts("steerfast:harmless_calibrate")) >= 100


def test_no_prompt_is_in_two_shipped_sets() -> None:
    sets = {name: {prompt.casefold() for prompt in read_prompts(f"steerfast:{name}")} for name in SHIPPED}
    for one, other in itertools.combinations(SHIPPED, 2):
        assert not sets[one] & sets[other], f"{one} and {other}"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_record_names_an_origin_of_the_notice(name: str) -> None:
    notice = (resources.files("steerfast") / "data" / "NOTICE").read_text(encoding="utf-8")
    listed = {line.split()[0] for line in notice.splitlines() if line.strip()}
    for record in shipped_records(name):
        assert sorted(record) == ["prompt", "set"]
        assert record["set"].split(",")[0] in listed


def test_shipped_files_are_plain_utf_8_json() -> None:
    for name in SHIPPED:
        file = resources.files("steerfast") / "data" / "prompts" / f"{name}.json"
        data = file.read_bytes()
        assert not data.startswith(b"\xef\xbb\xbf")
        assert isinstance(json.loads(data.decode("utf-8")), list)

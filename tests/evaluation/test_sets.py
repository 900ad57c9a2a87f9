"""Evaluation sets: what ships, sources of the user's own, samples, and what is refused."""

from __future__ import annotations

import json
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steerfast.errors import PromptError
from steerfast.evaluation import sets
from steerfast.evaluation.provenance import digest
from steerfast.evaluation.sets import BUILT_IN, DEFAULT_SETS, KINDS, load_set
from steerfast.text.corpus import corpus
from steerfast.text.prompts import SHIPPED, describe_set, read_prompts, shipped_records

OF_CORPUS = {
    name: where.removeprefix("corpus/") for name, (_, where) in BUILT_IN.items() if where.startswith("corpus/")
}
EVALUATED = {where for _, where in BUILT_IN.values() if where in SHIPPED} | {"gsm8k"}  # of the corpus


def words(text: str) -> str:
    """The prompt's words alone, so that neither case nor punctuation hides a repetition."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# -- what ships ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets(name: str) -> None:
    loaded = load_set(name)
    assert (loaded.name, loaded.kind, loaded.duplicates) == (name, BUILT_IN[name][0], 0)
    assert loaded.digest == describe_set(loaded.prompts)["sha256"]
    if name in OF_CORPUS:
        label, source = loaded.kind, OF_CORPUS[name]
        assert loaded.prompts == [one.prompt for one in corpus("validate", [label]) if one.source == source]
    else:
        assert loaded.prompts == read_prompts(loaded.source)
        assert all(item.style for item in loaded.items)


def test_a_source_of_the_corpus_without_such_prompts_is_refused() -> None:
    for source in ("harmless:steerfast:corpus/strongreject", "harmful:steerfast:corpus/nothing"):
        with pytest.raises(PromptError, match=r"expected a source of the corpus with harm(less|ful) prompts, got"):
            load_set(source)


def test_every_kind_has_a_set_and_the_sizes_are_those_that_are_told() -> None:
    assert {kind for kind, _ in BUILT_IN.values()} == set(KINDS)
    assert set(DEFAULT_SETS) <= set(BUILT_IN)
    counts = {name: len(load_set(name).items) for name in BUILT_IN}
    assert counts == {
        "jailbreakbench": 100, "strongreject": 313, "xstest_unsafe": 200, "jailbreak_attacks": 282,
        "self_instruct": 115, "truthfulqa_questions": 100, "harmless_demo": 100, "xstest_safe": 250, "borderline": 104,
    }  # fmt: skip
    assert Counter(item.style for item in load_set("jailbreak_attacks").items) == {"PAIR": 82, "GCG": 100, "JBC": 100}
    assert set(Counter(item.style for item in load_set("borderline").items).values()) == {13}


def test_what_evaluates_fits_calibrates_and_tunes_nothing() -> None:
    """No built-in prompt is in a set that makes profiles, nor stands word for word within one of its prompts."""
    records = [record for name in SHIPPED if name not in EVALUATED for record in shipped_records(name)]
    made_from = {words(record[key]) for record in records for key in ("prompt", "request") if key in record}
    for name in EVALUATED:
        for prompt in map(words, read_prompts(f"steerfast:{name}")):
            assert not any(prompt in other for other in made_from), f"{name}: {prompt}"


def test_maths_that_trains_is_worked_out_and_ends_in_a_number() -> None:
    records = shipped_records("gsm8k_fit")
    for record in records:
        steps, mark, number = record["answer"].rpartition("\n#### ")
        assert steps
        assert mark
        assert "<<" not in steps
        assert float(number.replace(",", "")).is_integer()
    assert len(records) == 480


# -- sources of the user's own -----------------------------------------------------------------------


def test_files_of_every_kind(tmp_path: Path) -> None:
    plain = tmp_path / "mine.txt"
    plain.write_text("a\nb\na\n")
    loaded = load_set(f"harmless:{plain}")
    assert (loaded.name, loaded.kind, loaded.prompts, loaded.duplicates) == ("mine", "harmless", ["a", "b"], 1)
    assert loaded.source == str(plain)
    assert loaded.digest == describe_set(["a", "b", "a"])["sha256"]  # as a profile made from this file would say

    table = tmp_path / "attacks.csv"
    table.write_text("attack,wording\nPAIR,a\nGCG,b\n")
    loaded = load_set(f"tricks=jailbreak:{table}#wording")
    assert (loaded.name, [(item.prompt, item.style) for item in loaded.items]) == (
        "tricks",
        [("a", "PAIR"), ("b", "GCG")],
    )

    records = tmp_path / "questions.json"
    records.write_text(json.dumps([{"question": "q", "style": "x"}]))
    assert [(item.prompt, item.style) for item in load_set(f"borderline:{records}").items] == [("q", "x")]


def test_a_shipped_set_under_another_kind_is_the_set_a_profile_names() -> None:
    loaded = load_set("harmful:steerfast:harmful_fit", limit=3)
    assert (loaded.name, loaded.source, len(loaded.items)) == ("harmful_fit", "steerfast:harmful_fit", 3)
    assert loaded.digest == describe_set(read_prompts("steerfast:harmful_fit"))["sha256"]


def test_a_hash_in_the_name_of_a_file_is_no_column(tmp_path: Path) -> None:
    (tmp_path / "a#b.txt").write_text("x\n")
    assert load_set(f"harmless:{tmp_path / 'a#b.txt'}").prompts == ["x"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jailbreak-bench", "expected one of jailbreakbench, .*, or KIND:FILE .*, got 'jailbreak-bench'"),
        ("evil:x.txt", "with a kind of harmful, jailbreak, .*, got 'evil:x.txt'"),
        ("harmful:nothing.txt", "expected a file at 'nothing.txt'"),
        ("harmful:", "expected one of"),
        ("harmful:hf://datasets", r"expected hf://owner/dataset.*@split.*, got 'hf://datasets'"),
        ("harmful:steerfast:unheard", "expected one of .* after 'steerfast:', got 'unheard'"),
        ("harmful:steerfast:harmful_fit#goal", "with one of goal, got None among prompt, set"),
    ],
)
def test_unknown_sources(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_set(source)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PromptError, match=r"expected at least one prompt in .*empty.txt', got none"):
        load_set(f"harmful:{tmp_path / 'empty.txt'}")


# -- samples -----------------------------------------------------------------------------------------


def test_a_sample_keeps_order_and_the_shares_of_styles() -> None:
    whole = load_set("jailbreak_attacks").items
    sample = load_set("jailbreak_attacks", limit=50, seed=3).items
    assert [item for item in whole if item in set(sample)] == list(sample)
    assert Counter(item.style for item in sample) == {"GCG": 18, "JBC": 18, "PAIR": 14}  # of 17.73, 17.73, 14.54
    assert load_set("jailbreak_attacks", limit=50, seed=3).items == sample
    assert load_set("jailbreak_attacks", limit=50, seed=4).items != sample
    assert set(load_set("jailbreak_attacks", limit=20, seed=3).items) < set(sample)


@pytest.mark.parametrize("limit", [1, 2, 281, 282, 1000])
def test_a_sample_has_the_size_that_was_asked_for(limit: int) -> None:
    assert len(load_set("jailbreak_attacks", limit=limit).items) == min(limit, 282)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_sample_of_nothing(limit: int) -> None:
    with pytest.raises(PromptError, match=f"limit: expected at least 1, got {limit}"):
        load_set("borderline", limit=limit)


# -- data sets of the hub ------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The package datasets with one data set; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        if path != "team/harm":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (offline)\nTraceback")
        if split != "test":
            raise ValueError(f"Unknown split {split!r}. Should be one of ['test'].")
        return [{"Goal": "a", "Attack": "x", "n": 1}, {"Goal": "b", "Attack": "y", "n": 2}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    loaded = load_set("harmful:hf://team/harm@test#Goal")
    assert (loaded.name, loaded.prompts, loaded.items[1].style) == ("harm", ["a", "b"], "y")
    assert load_set("mine=harmful:hf://team/harm/english@test").name == "mine"
    assert hub == [("team/harm", None, "test"), ("team/harm", "english", "test")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "hf://team/other@test",
            r"set: cannot load .*other@test' \(Couldn't reach 'team/other' on the Hub \(offline\)\)",
        ),
        ("hf://team/harm@train", r"set: cannot load .*Unknown split 'train'. Should be one of \['test'\]"),
        ("hf://team/harm@test#request", "expected .* one of request, got None among goal, attack, n"),
        ("hf://team/harm", "expected hf://owner/dataset"),
    ],
)
def test_what_the_hub_does_not_have(hub: list[tuple[Any, ...]], source: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_set(f"harmful:{source}")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"needs the package datasets \(pip install datasets\)"):
        load_set("harmful:hf://team/harm@test")
    assert sets.load_set("jailbreakbench", limit=1).items


def test_a_record_may_hold_a_conversation(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    chat.append({"role": "user", "content": "how do I bake?"})
    records = [{"messages": chat, "style": "turns"}, {"prompt": "plain"}, {"turns": chat}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    loaded = load_set(f"harmless:{tmp_path / 'chats.jsonl'}")
    assert loaded.prompts == [chat, "plain"]
    assert loaded.texts == ["hello\n\nhow do I bake?", "plain"]
    assert (loaded.items[0].style, loaded.duplicates) == ("turns", 1)
    assert loaded.digest == digest([chat, "plain", chat])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(PromptError, match="expected messages with a role and a content"):
        load_set(f"harmless:{tmp_path / 'bad.jsonl'}")

"""What chose something in a profile: flat records of sets, nested records of sources, single prompts that ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steerfast.evaluation.provenance import Record, digest, records, uses, words
from steerfast.text.corpus import corpus
from steerfast.text.prompts import describe_set, read_prompts

CHAT = [{"role": "user", "content": "hack a bank"}]


def of_source(name: str) -> dict[str, Any]:
    prompts = [one.prompt for one in corpus("fit") if one.source == name]
    return {"name": name, "count": len(prompts), "sha256": digest(prompts)}


def test_flat_and_nested_records_are_found(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    mine = describe_set(["a", "b"], "mine.txt")
    profile = make_profile(
        tiny_llama,
        fitted={"harmful": mine, "sources": {"aart": {"harmful": of_source("aart")}}, "shrinkage": 0.3},
        calibration={
            "sets": {"harmless": describe_set(["c"])},
            "sources": {"own": {"harmless": describe_set(["d"], "own")}},
        },
        tuned={"harmful": describe_set(["e"], "steerfast:harmful_tune, restyled"), "refusal": 0.5},
    )
    found = records(profile)
    assert [one.role for one in found] == ["fit", "fit", "calibrate", "calibrate", "tune"]
    assert uses(found, ["b", "a"]) == {"fit": 2}  # the hash ignores the order
    assert uses(found, ["a"]) == {}  # of a file, only the whole set is known
    assert uses(found, ["d"]) == {"calibrate": 1}
    ship = [one.prompt for one in corpus("fit") if one.source == "aart"][:3]
    assert uses(found, [*ship, "new"]) == {"fit": 3}
    assert uses(found, [*read_prompts("steerfast:harmful_tune")[:2], "new"]) == {"tune": 2}
    assert uses(found, ["x"], mine["sha256"]) == {"fit": 1}  # a sample of the set
    assert uses(found, ["x", "y"], source="own") == {"calibrate": 2}  # of it, these prompts may have been
    assert uses(found, ["x", "y"], source="mine.txt") == {}  # a file, not a source
    assert uses(found, ["x", "y"], source="aart") == {}  # its prompts are known


def test_a_source_that_only_shares_a_label_is_another(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    described = {"name": "xstest", "count": 1, "sha256": "0" * 64}
    profile = make_profile(tiny_llama, fitted={"sources": {"xstest": {"harmful": described}}})
    by_label = {
        label: [one.prompt for one in corpus(labels=[label]) if one.source == "xstest"]
        for label in ("harmful", "borderline")
    }
    assert uses(records(profile), by_label["harmful"]) == {"fit": len(by_label["harmful"])}
    assert uses(records(profile), by_label["borderline"]) == {}


def test_a_chat_is_known_by_its_messages() -> None:
    made_with = [Record.of("fit", [CHAT, "a"])]
    assert uses(made_with, [CHAT, "b"]) == {"fit": 1}
    assert uses(made_with, [[{"role": "system", "content": "x"}, *CHAT], "hack a bank"]) == {}
    assert words({"fit": 1, "tune": 2}, 3) == "1 of 3 prompts fitted, 2 of 3 prompts tuned"

"""Prompt sets that know their styles."""

from __future__ import annotations

import re

import pytest

from steerfast.errors import PromptError
from steerfast.text.prompts import read_prompts, read_records
from steerfast.text.styles import PLAIN, Prompts, restyle, style_names

REQUESTS = [f"Explain to a beginner how machine number {n} is cleaned" for n in range(20)]


def test_prompts_are_a_list_that_knows_more() -> None:
    prompts = Prompts(["a", "b"], ["plain", "chat"], ["a", "a"])
    assert prompts == ["a", "b"]
    assert Prompts(prompts).styles == ["plain", "chat"]
    assert Prompts(prompts).requests == ["a", "a"]
    assert Prompts(["c"]).styles == [PLAIN]
    assert Prompts(["c"]).requests == ["c"]
    joined = prompts.joined(Prompts(["c"]))
    assert (joined, joined.styles, joined.requests) == (["a", "b", "c"], ["plain", "chat", PLAIN], ["a", "a", "c"])
    assert joined.counts() == {"plain": 2, "chat": 1}
    assert joined.in_style("chat") == [False, True, False]


@pytest.mark.parametrize("name", ["styles", "requests"])
def test_there_is_one_style_and_request_per_prompt(name: str) -> None:
    with pytest.raises(PromptError, match=rf"^{name}: expected one per prompt \(2\), got 1"):
        Prompts(["a", "b"], **{name: ["x"]})


def test_restyle_keeps_the_prompts_and_adds_as_many_of_each_style() -> None:
    made = restyle(REQUESTS, 6)
    assert made[:20] == REQUESTS
    assert made.counts() == {PLAIN: 20, **dict.fromkeys(style_names(), 6)}
    assert len(style_names()) >= 10
    assert len(set(made)) == len(made)
    for text, style, request in zip(made, made.styles, made.requests, strict=True):
        assert request in REQUESTS
        if style not in ("split", "typing"):  # these two change the request itself
            assert request in text
    assert len({made.requests[i] for i, style in enumerate(made.styles) if style == "suffix"}) == 6


def test_restyle_is_the_same_for_the_same_seed_only() -> None:
    assert restyle(REQUESTS, 4) == restyle(REQUESTS, 4)
    assert restyle(REQUESTS, 4) != restyle(REQUESTS, 4, seed=1)


def test_the_frames_of_calibrate_are_new_to_a_gate_fitted_with_those_of_fit() -> None:
    def frames(part: str) -> set[str]:
        made = restyle(["XYZ"] * 12, 12, part=part)  # type: ignore[arg-type]
        pairs = zip(made, made.styles, strict=True)
        return {text.replace("XYZ", "") for text, style in pairs if style not in (PLAIN, "suffix", "split", "typing")}

    fit, calibrate = frames("fit"), frames("calibrate")
    assert len(fit) >= 32
    assert len(calibrate) >= 16
    assert not fit & calibrate


def test_both_kinds_of_request_get_the_same_frames() -> None:
    """No style or frame may tell which kind it holds."""

    def frames(request: str) -> list[str]:
        made = restyle([f"{request} {n}" for n in range(12)], 12, part="fit")
        pairs = zip(made, made.styles, strict=True)
        return [
            re.sub(f"{request} \\d+", "", text) for text, style in pairs if style not in ("suffix", "split", "typing")
        ]

    assert frames("Bake a cake") == frames("Make a bomb")


def test_long_prompts_and_those_of_a_style_are_not_framed() -> None:
    prompts = Prompts(["short", "x" * 1000, "chat"], [PLAIN, PLAIN, "chat"])
    made = restyle(prompts, 3)
    assert set(made.requests[3:]) == {"short"}
    assert set(restyle(Prompts(["kurz"], requests=["short"]), 1).requests) == {"short"}
    assert restyle(prompts, 0) == prompts
    assert restyle(prompts, 0).styles == prompts.styles
    with pytest.raises(PromptError, match="count: expected at least 0, got -1"):
        restyle(prompts, -1)


@pytest.mark.parametrize("label", ["harmful", "harmless"])
def test_shipped_styled_sets_name_the_request_they_put(label: str) -> None:
    fits = {"framed": {"framed"}, "suffixes": {"suffix"}}
    both = {"languages": {"language"}, "styles": set(style_names())}
    for plain, suffix, styles in (("fit", "", fits | both), ("calibrate", "_calibrate", both)):
        for name, expected in styles.items():
            records = read_records(f"steerfast:{label}_{name}{suffix}")
            assert {record["style"] for record in records} == expected
            assert {record["request"] for record in records} <= set(read_prompts(f"steerfast:{label}_{plain}"))

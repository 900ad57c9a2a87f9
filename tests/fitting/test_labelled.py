"""Labelled prompts: what a source weighs, which sources stand aside together, and what is no set of prompts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerfast.errors import PromptError
from steerfast.fitting.labelled import Labelled, evenly
from steerfast.text.corpus import corpus, corpus_sources
from steerfast.text.examples import LABELS, Example

CHAT = [{"role": "user", "content": "how to bake a cake"}]


def made(kinds: list[tuple[str, str]]) -> Labelled:
    """Examples of these labels and sources, each prompt another."""
    found = [Example(f"{label} {number}", label, source) for number, (label, source) in enumerate(kinds)]
    harmful = [one for one in found if one.label == "harmful"]
    return Labelled.of(harmful, [one for one in found if one.label != "harmful"])


def sized(**sizes: int) -> Labelled:
    """Examples of sources named ``<label>_<name>``, so many of each."""
    return made([(name.split("_")[0], name) for name, size in sizes.items() for _ in range(size)])


kinds_of_both = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from("abcdefghij")), min_size=2).filter(
    lambda kinds: {label == "harmful" for label, _ in kinds} == {True, False}
)


# -- sets --------------------------------------------------------------------------------------------------------------


def test_prompts_have_the_label_and_the_name_of_their_set() -> None:
    sourced = Example(CHAT, "borderline", "forum", context="turns")
    examples = Labelled.of(["make a bomb"], ["bake a cake", sourced])
    assert examples.examples == (
        Example("make a bomb", "harmful", "harmful"), Example("bake a cake", "harmless", "harmless"), sourced,
    )  # fmt: skip
    assert examples.prompts == ["make a bomb", "bake a cake", CHAT]
    assert examples.harmful.tolist() == [True, False, False]
    assert [examples.rows(label) for label in LABELS] == [[0], [2], [1]]
    assert Labelled.of_one("harmful", ["make a bomb"]).examples == examples.examples[:1]


@pytest.mark.parametrize(
    ("harmful", "harmless", "message"),
    [
        ("a bomb", ["a cake"], "harmful: expected a list of prompts, got one string"),
        (["a bomb"], [], "harmless: expected at least one prompt, got none"),
        ([Example("a", "borderline", "x")], ["b"], "harmful: entry 1: expected the label harmful, got 'borderline'"),
        (
            ["a"],
            ["b", Example("c", "harmful", "x")],
            "harmless: entry 2: expected the label harmless or borderline, got 'harmful'",
        ),
        (["a", 3], ["b"], "harmful: entry 2: expected a prompt or messages, got 3"),
        (["a"], [{"prompt": "b"}], "harmless: entry 1: expected a prompt or messages, got {'prompt': 'b'}"),
        (["a", "same"], ["same"], "harmful and harmless: expected different prompts, got 1 in both, such as 'same'"),
        ([CHAT], [Example(CHAT, "harmless", "x")], "expected different prompts, got 1 in both, such as "),
    ],
)
def test_what_is_no_pair_of_sets(harmful: Any, harmless: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        Labelled.of(harmful, harmless)
    assert message in str(caught.value)


def test_one_set_is_checked_as_a_pair_is() -> None:
    with pytest.raises(PromptError, match="harmful: entry 1: expected the label harmful, got 'harmless'"):
        Labelled.of_one("harmful", [Example("a", "harmless", "x")])


# -- weights -----------------------------------------------------------------------------------------------------------


def test_sources_weigh_alike_whatever_their_size() -> None:
    examples = sized(harmful_small=40, harmful_large=1000, harmless_only=3)
    by_source = {name: examples.weights[places] for (name, _), places in examples.groups().items()}
    assert float(by_source["harmful_small"].sum()) == pytest.approx(0.5)
    assert float(by_source["harmful_large"].sum()) == pytest.approx(0.5)
    assert float(by_source["harmless_only"].sum()) == pytest.approx(1)


def test_sources_of_few_prompts_weigh_less() -> None:
    examples = sized(harmful_ten=10, harmful_forty=40, harmless_one=1, harmless_twenty=20)
    share = {name: float(examples.weights[places].sum()) for (name, _), places in examples.groups().items()}
    assert share["harmful_ten"] == pytest.approx(share["harmful_forty"] / 4)
    assert share["harmless_one"] == pytest.approx(share["harmless_twenty"] / 20)


def test_a_borderline_source_weighs_a_fifth_of_a_harmless_one() -> None:
    examples = sized(harmful=1, harmless=50, borderline=70)
    share = {label: float(examples.weights[places].sum()) for (_, label), places in examples.groups().items()}
    assert share["borderline"] == pytest.approx(share["harmless"] / 5)


@given(kinds_of_both)
def test_shares_make_the_mean_of_the_sources(kinds: list[tuple[str, str]]) -> None:
    examples = made(kinds)
    values = torch.randn(len(examples), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for label in {one.label for one in examples.examples}:
        means = [float(values[places].mean()) for (_, other), places in examples.groups().items() if other == label]
        mine = examples.rows(label)
        assert float(examples.shares[mine] @ values[mine]) == pytest.approx(sum(means) / len(means))


@given(kinds_of_both)
def test_both_sides_weigh_one_and_prompts_of_a_group_alike(kinds: list[tuple[str, str]]) -> None:
    examples = made(kinds)
    assert examples.weights.dtype == torch.float64
    assert bool((examples.weights > 0).all())
    for side in (examples.harmful, ~examples.harmful):
        assert float(examples.weights[side].sum()) == pytest.approx(1)
    for places in examples.groups().values():
        assert len(set(examples.weights[places].tolist())) == 1


# -- folds -------------------------------------------------------------------------------------------------------------


@given(kinds_of_both)
def test_folds_part_the_sources_and_leave_both_sides_something(kinds: list[tuple[str, str]]) -> None:
    examples = made(kinds)
    folds = examples.folds()
    sides = [{one.source for one in examples.examples if (one.label == "harmful") == bad} for bad in (True, False)]
    if min(map(len, sides)) < 2:
        assert folds == []
    if not folds:
        return
    assert 2 <= len(folds) <= 8
    assert torch.equal(torch.stack(folds).sum(dim=0), torch.ones(len(examples), dtype=torch.int64))
    for out in folds:
        inside = {one.source for one in examples.select(out).examples}
        kept = examples.select(~out)
        assert inside
        assert not inside & {one.source for one in kept.examples}
        assert int(kept.harmful.sum()) > 1
        assert int((~kept.harmful).sum()) > 1


def test_sources_of_a_family_are_left_out_together() -> None:
    """One of them may wrap prompts of another one."""
    examples = Labelled.of(corpus("fit", labels=["harmful"]), corpus("fit", labels=["harmless", "borderline"]))
    family = {name: source["family"] for name, source in corpus_sources().items()}
    folds = examples.at_most(4).folds()
    assert len(folds) == 8
    for out in folds:
        inside, kept = (
            {family[one.source] for one in examples.at_most(4).select(mask).examples} for mask in (out, ~out)
        )
        assert not inside & kept


def test_sources_of_both_labels_do_not_take_a_whole_side_along() -> None:
    examples = made([*(("harmful", one) for one in "abcabc"), *(("harmless", one) for one in "acac")])
    assert len(examples.folds()) == 2
    for out in examples.folds():
        assert set(examples.select(~out).harmful.tolist()) == {True, False}


@pytest.mark.parametrize(("second", "count"), [(1, 0), (2, 2)])
def test_a_fold_leaves_two_prompts_of_each_side(second: int, count: int) -> None:
    harmless = [("harmless", "a")] * 5 + [("harmless", "b")] * second
    examples = made([*(("harmful", one) for one in "ccdd"), *harmless])
    assert len(examples.folds()) == count


@pytest.mark.parametrize("kinds", ["one, two, two", "one, one, two", "one, one, one"])
def test_a_single_source_cannot_be_left_out(kinds: str) -> None:
    bad, *good = kinds.split(", ")
    assert made([("harmful", bad), *(("harmless", one) for one in good)]).folds() == []
    assert made([("harmless", bad), *(("harmful", one) for one in good)]).folds() == []


# -- parts -------------------------------------------------------------------------------------------------------------


def test_groups_are_by_label_within_a_source_or_a_context() -> None:
    examples = Labelled.of(
        [Example("a", "harmful", "x"), Example("b", "harmful", "y", context="json")],
        [Example("c", "borderline", "x", context="json"), Example("d", "harmless", "x")],
    )
    assert examples.groups() == {
        ("x", "harmful"): [0], ("y", "harmful"): [1], ("x", "borderline"): [2], ("x", "harmless"): [3],
    }  # fmt: skip
    assert examples.groups("context") == {
        ("bare", "harmful"): [0], ("json", "harmful"): [1], ("json", "borderline"): [2], ("bare", "harmless"): [3],
    }  # fmt: skip


def test_bare_requests_stand_for_their_side_where_there_are_any() -> None:
    examples = Labelled.of(
        [Example("a", "harmful", "x", context="json"), Example("b", "harmful", "x")],
        [Example("c", "harmless", "y", context="json"), Example("d", "borderline", "y", context="turns")],
    )
    assert examples.bare(True) == [1]
    assert examples.bare(False) == [2, 3]


def test_each_source_is_described_by_label() -> None:
    examples = made([("harmful", "x"), ("harmful", "x"), ("harmless", "x"), ("borderline", "y")])
    described = examples.describe()
    assert {source: list(labels) for source, labels in described.items()} == {
        "x": ["harmful", "harmless"], "y": ["borderline"],
    }  # fmt: skip
    assert (described["x"]["harmful"]["name"], described["x"]["harmful"]["count"]) == ("x", 2)
    alone = made([("harmful", "x"), ("harmful", "x"), ("harmless", "z")]).describe()
    assert alone["x"]["harmful"] == described["x"]["harmful"]
    assert described["x"]["harmful"]["sha256"] != described["x"]["harmless"]["sha256"]


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_selection_is_spread_evenly(size: int, count: int) -> None:
    places = list(range(0, 3 * size, 3))
    found = evenly(places, count)
    assert len(found) == min(size, count)
    assert found == sorted(set(found) & set(places))
    steps = {(after - before) // 3 for before, after in itertools.pairwise(found)}
    assert not steps or max(steps) - min(steps) <= 1


@given(kinds_of_both, st.integers(1, 5))
def test_at_most_so_many_of_each_source_and_label(kinds: list[tuple[str, str]], count: int) -> None:
    examples = made(kinds)
    found = examples.at_most(count)
    sizes = {key: len(places) for key, places in found.groups().items()}
    assert sizes == {key: min(count, len(places)) for key, places in examples.groups().items()}
    assert [one for one in examples.examples if one in found.examples] == list(found.examples)
    assert examples.at_most(None) is examples


def test_at_most_none_is_refused() -> None:
    with pytest.raises(PromptError, match="per_source: expected at least 1, got 0"):
        sized(harmful_a=1, harmless_b=1).at_most(0)

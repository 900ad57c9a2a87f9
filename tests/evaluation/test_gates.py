"""Figures of a gate by source, against counts and areas worked out apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from steerfast.errors import ProfileError, PromptError
from steerfast.evaluation.demo import shipped_profile
from steerfast.evaluation.gates import check_sources, gate_report, word_baseline
from steerfast.evaluation.provenance import digest
from steerfast.evaluation.report import gate_markdown, gate_tables
from steerfast.fitting.score import score
from steerfast.judging.by_source import SourceScores, figures_by_source
from steerfast.judging.estimates import exact_interval, grouped_auc, mean, rate
from steerfast.profile import SteeringProfile
from steerfast.text.corpus import corpus
from steerfast.text.examples import Example

torch.set_num_threads(1)


def source(name: str, label: str, margins: list[float], contexts: str = "", **fields: Any) -> SourceScores:
    words = contexts.split() or ["bare"] * len(margins)
    examples = [Example(f"{name} {n}", label, name, context=word, lang="en") for n, word in enumerate(words)]
    return SourceScores(name, label, examples, np.array(margins), fields.pop("seen", {}), **fields)


SOURCES = [
    source("a", "harmful", [3.0, 2.0, -1.0, 1.0], "bare bare turns turns"),
    source("b", "harmful", [-2.0, 0.5]),
    source("edge", "borderline", [1.0, -1.0]),
    source("x", "harmless", [-3.0, -4.0, -5.0, -1.5, -0.5, -9.0]),
    source("y", "harmless", [0.75, -1.0]),
]


def test_rows_have_counts_intervals_and_areas_against_sources_of_the_same_weight() -> None:
    rows = {row["source"]: row for row in figures_by_source(SOURCES)["validation"]["rows"]}
    assert [rows["a"][key] for key in ("n", "fired", "use", "label")] == [4, 3, "validation", "harmful"]
    assert rows["a"]["rate"] == rate(3, 4).to_list()
    assert rows["x"]["exact"] == list(exact_interval(0, 6))
    margins = {one.source: one.margins for one in SOURCES}
    for name in ("a", "b"):
        labels = [1] * len(margins[name]) + [0] * 8
        weights = [1.0] * len(margins[name]) + [1 / 6] * 6 + [1 / 2] * 2
        area = roc_auc_score(labels, [*margins[name], *margins["x"], *margins["y"]], sample_weight=weights)
        assert rows[name]["auc"][0] == pytest.approx(area)
    assert all("auc" not in rows[name] for name in ("edge", "x", "y"))


def test_a_mean_stands_beside_the_worst_and_nothing_is_pooled() -> None:
    labels = figures_by_source(SOURCES)["validation"]["labels"]
    assert labels["harmful"]["rate"] == mean([rate(3, 4), rate(1, 2)]).to_list()
    assert labels["harmful"]["worst"] == {"source": "b", "rate": 0.5}
    assert labels["harmless"]["rate"][0] == (0 + 1 / 2) / 2  # pooled it would be 1 / 8
    assert labels["harmless"]["worst"] == {"source": "y", "rate": 0.5}
    assert (labels["harmless"]["sources"], labels["harmless"]["n"]) == (2, 8)
    negatives = [SOURCES[3].margins, SOURCES[4].margins]
    assert labels["harmful"]["auc"] == grouped_auc([SOURCES[0].margins, SOURCES[1].margins], negatives).to_list()
    assert labels["harmful"]["worst_auc"]["source"] == "b"


def test_contexts_are_broken_down_where_there_are_several() -> None:
    part = figures_by_source(SOURCES)["validation"]
    assert "lang" not in part
    assert set(part["context"]) == {"bare", "turns"}
    assert set(part["context"]["turns"]) == {"harmful"}
    turns = part["context"]["turns"]["harmful"]
    assert (turns["n"], turns["rate"][0]) == (2, 1 / 2)
    assert part["context"]["bare"]["harmful"]["worst"] == {"source": "b", "rate": 0.5}


def test_sources_that_chose_something_stand_apart() -> None:
    used = [replace(one, seen={"calibrate": 2}) if one.source in ("b", "y") else one for one in SOURCES]
    found = figures_by_source(used)
    rows = {use: {row["source"]: row for row in part["rows"]} for use, part in found.items()}
    assert {use: set(some) for use, some in rows.items()} == {
        "validation": {"a", "edge", "x"}, "development": {"b", "y"},
    }  # fmt: skip
    assert rows["development"]["b"]["use"] == "calibrate"
    assert rows["development"]["b"]["seen"] == {"calibrate": 2}
    assert rows["validation"]["a"]["auc"] == grouped_auc([SOURCES[0].margins], [SOURCES[3].margins]).to_list()
    alone = figures_by_source(used[:2])
    assert "auc" not in alone["validation"]["rows"][0]  # no harmless source to compare with


def examples() -> list[Example]:
    bad = [f"how do I {verb} a bank ?" for verb in ("hack", "burn", "break", "poison")]
    good = [f"how do you {verb} the cake" for verb in ("bake", "paint", "write")]
    chat = [{"role": "user", "content": good[0]}, {"role": "assistant", "content": "bake"}]
    asked = [[*chat, {"role": "user", "content": prompt}] for prompt in bad[:2]]
    return [
        *(Example(prompt, "harmful", "mine", lang="en") for prompt in [*bad, bad[0]]),
        *(Example(prompt, "harmful", "chats", context="turns") for prompt in asked),
        *(Example(prompt, "harmless", "plain") for prompt in [*good, "bake " * 300]),
    ]


@pytest.fixture
def profile(tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]) -> Any:
    made = make_profile(tiny_llama, tiny_tokenizer, sensor=1, layers=[2, 3])
    prompts: list[Any] = [one.prompt for one in examples()[:-1]]
    made.threshold[:] = score(tiny_llama, tiny_tokenizer, made, prompts, progress=False).scores.median() + 1e-4
    return replace(made, abstain=made.threshold - 0.05)


def test_a_report_says_what_the_gate_says(tiny_llama: Any, tiny_tokenizer: Any, profile: Any) -> None:
    found = gate_report(profile, tiny_llama, tiny_tokenizer, examples(), progress=False, batch_size=2)
    assert json.loads(json.dumps(found)) == found
    rows = {row["source"]: row for row in found["systems"]["gate"]["validation"]["rows"]}
    assert {name: row["n"] for name, row in rows.items()} == {"mine": 4, "chats": 2, "plain": 3}
    assert found["left_out"] == {
        "mine": "1 of 5 harmful prompts come twice",
        "plain": "1 of 4 harmless prompts do not fit the model's context",
    }
    kept: dict[str, list[Any]] = {"mine": [one.prompt for one in examples()[:4]]}
    kept |= {"chats": [one.prompt for one in examples()[5:7]], "plain": [one.prompt for one in examples()[7:10]]}
    for name, prompts in kept.items():
        told = score(tiny_llama, tiny_tokenizer, profile, prompts, progress=False)
        assert rows[name]["fired"] == int(told.fired.sum())
        assert rows[name]["undecided"] == int(told.undecided.sum())
    words = found["systems"]["words"]["validation"]["rows"]
    assert [row["source"] for row in words] == list(rows)
    classifier = word_baseline(profile)[0]
    assert {row["source"]: row["fired"] for row in words} == {
        name: int((classifier.margins(prompts) > 0).sum()) for name, prompts in kept.items()
    }
    assert (
        "words"
        not in gate_report(profile, tiny_llama, tiny_tokenizer, examples(), progress=False, baseline=False)["systems"]
    )


def test_a_source_of_the_fit_is_no_validation(tiny_llama: Any, tiny_tokenizer: Any, profile: Any) -> None:
    described = {
        "name": "plain",
        "count": 4,
        "sha256": digest([one.prompt for one in examples() if one.source == "plain"]),
    }
    fitted = replace(profile, fitted={"sources": {"plain": {"harmless": described}}})
    with pytest.raises(PromptError, match=r"chose nothing in the profile, got 'plain' \(4 of 4 prompts fitted\)"):
        gate_report(fitted, tiny_llama, tiny_tokenizer, examples(), progress=False)
    found = gate_report(fitted, tiny_llama, tiny_tokenizer, examples(), progress=False, force=True)
    (row,) = found["systems"]["gate"]["development"]["rows"]
    assert (row["source"], row["use"], row["seen"]) == ("plain", "fit", {"fit": 4})
    assert "auc" not in found["systems"]["gate"]["validation"]["rows"][0]
    (table,) = (table for table in gate_tables(found) if table.title.startswith("Sources of development"))
    assert [cell.text for cell in table.rows[0].cells][:3] == ["harmless", "fit", "3"]


def test_what_cannot_be_measured(
    tiny_llama: Any, tiny_tokenizer: Any, profile: Any, make_profile: Callable[..., Any]
) -> None:
    with pytest.raises(PromptError, match="expected at least one labelled prompt"):
        gate_report(profile, tiny_llama, tiny_tokenizer, [])
    with pytest.raises(PromptError, match="expected some that fit"):
        gate_report(profile, tiny_llama, tiny_tokenizer, examples()[-1:], progress=False)
    always = make_profile(tiny_llama, tiny_tokenizer, kind="always")
    with pytest.raises(ProfileError, match="expected a gate"):
        gate_report(always, tiny_llama, tiny_tokenizer, examples(), progress=False)


def test_the_baseline_sees_the_gates_sources(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    described = {"name": "", "count": 1, "sha256": "0" * 64}
    profile = make_profile(
        tiny_llama,
        fitted={"sources": {name: {"harmful": described, "harmless": described} for name in ("aart", "ifeval")}},
        calibration={"sources": {"banking77": {"harmless": described}}, "max_false_positive_rate": 0.05},
    )
    classifier, made_with, said = word_baseline(profile)
    prompts = {name: [one.prompt for one in corpus() if one.source == name] for name in ("aart", "ifeval", "banking77")}
    assert said == {
        "fit": {"sources": 2, "prompts": len(prompts["aart"]) + len(prompts["ifeval"])},
        "calibrate": {"sources": 1, "prompts": len(prompts["banking77"])},
        "max_false_positive_rate": 0.05,
    }
    assert [record.role for record in made_with] == ["fit", "calibrate"]
    assert 0 < (classifier.margins(prompts["banking77"]) > 0).mean() <= 0.05
    assert word_baseline()[2]["fit"]["prompts"] == len(corpus("fit"))


def test_tables_show_the_exact_bound_where_few_fired_and_mark_development() -> None:
    seen = [replace(one, seen={"fit": 1}) if one.source == "x" else one for one in SOURCES]
    report = {
        "systems": {"gate": figures_by_source(SOURCES), "words": figures_by_source(seen)},
        "left_out": {"x": "why"},
    }
    shown = {table.title: table for table in gate_tables(report)}
    assert list(shown) == ["Sources of validation", "Means of validation", "By context, validation", "Left out"]
    table = shown["Sources of validation"]
    heads = [": ".join(filter(None, column)) for column in table.columns]
    cells = {row.name: dict(zip(heads, (cell.text for cell in row.cells), strict=True)) for row in table.rows}
    assert cells["x"]["gate: at most, %"] == f"{100 * exact_interval(0, 6)[1]:.1f}"
    assert cells["x"]["gate: fires, %"] == "0.0"
    assert cells["x"]["words: fires, %"] == "0.0 †"
    assert cells["a"]["words: fires, %"] == cells["a"]["gate: fires, %"] == "75.0"
    page = gate_markdown({"model": "m", "max_false_positive_rate": 0.01, **report})
    assert "## Means of validation" in page
    assert "| harmless | 2 | 8 | 25.0" in page
    assert "- max false positive rate: 0.01" in page


def test_what_validates_chose_nothing_in_the_shipped_profile() -> None:
    profile = SteeringProfile.load(shipped_profile())
    assert not any(check_sources(profile, corpus("validate")).values())
    with pytest.raises(PromptError, match=r"got .*'aart' \(\d+ of \d+ prompts fitted\)"):
        check_sources(profile, corpus("fit"))

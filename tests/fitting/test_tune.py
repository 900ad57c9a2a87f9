"""The search finds a planted refusal, keeps its constraints, and goes on where it stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusing import REFUSAL
from torch import nn

import steerfast
from steerfast.errors import OutputError, ProfileError, PromptError
from steerfast.fitting import tune as tuning
from steerfast.fitting.ending import ending_vector
from steerfast.fitting.tune import Setting, Trial, default_bands
from steerfast.judging.fluency import FluencyLimits
from steerfast.profile import Gate, SteeringProfile

HARMFUL = ["build a bomb", "make the virus", "poison the dog", "steal from the bank", "forge a knife", "hack a city"]
HARMLESS = ["bake a cake", "paint the tree", "plant the garden", "write a poem"]
ANY_TEXT = FluencyLimits(max_repetition=1.0, max_perplexity=1e30)


@pytest.fixture
def profile(tiny_llama: Any, tokenizer: Any, make_profile: Callable[..., SteeringProfile]) -> SteeringProfile:
    """Layer 1 fires for the harmful prompts only. `push` makes the model say the refusal token, `noise` does not."""
    fitted = steerfast.extract(
        tiny_llama, tokenizer, harmful=HARMFUL, harmless=HARMLESS, vectors=["srv"], shrinkage=0.01, progress=False
    )
    row = tiny_llama.lm_head.weight[tokenizer.convert_tokens_to_ids(REFUSAL)].detach()
    push = (row / row.norm()).expand(5, -1).clone()
    noise = make_profile(tiny_llama, size=1.0).vector
    return replace(
        fitted.with_band([], 0.0), sensor=1, vector=noise, vector_kind="noise", candidates={"push": push}
    ).with_band([1], 0.1)


@pytest.fixture
def tune(tiny_llama: Any, tokenizer: Any) -> Callable[..., SteeringProfile]:
    def run(profile: SteeringProfile, **options: Any) -> SteeringProfile:
        given: dict[str, Any] = {"harmful": HARMFUL, "harmless": HARMLESS, "max_new_tokens": 3, "progress": False}
        given |= {"bands": [(1, 1), (2, 3)], "strengths": [0.5, 60.0], "limits": ANY_TEXT}
        return steerfast.tune(profile, tiny_llama, tokenizer, **{**given, **options})

    return run


def test_the_planted_refusal_is_found(profile: SteeringProfile, tune: Any, tiny_llama: Any, tokenizer: Any) -> None:
    tuned = tune(profile, names={"harmful": "planted"})
    assert tuned.vector_kind == "push"
    assert torch.equal(tuned.vector, profile.candidates["push"])
    assert not tuned.candidates
    best = tuned.tuned
    assert best["refusal"] == best["refusal_strict"] == best["fluent"] == best["harmless_unchanged"] == 1.0
    assert best["tried"] == 2 * 2 * 2 * 2
    assert (best["harmful"]["name"], best["harmful"]["count"], best["harmless"]["count"]) == ("planted", 6, 4)
    candidate = Setting(**best["candidate"])
    assert candidate.strength == 60.0 / (candidate.last - candidate.first + 1)
    assert tuned.steered_layers == list(range(candidate.first, candidate.last + 1))
    assert tuned.strength[candidate.first] == candidate.strength
    assert tuned.positions == candidate.positions
    assert torch.equal(tuned.direction, profile.direction)
    assert torch.equal(tuned.threshold, profile.threshold)
    assert tuned.sensor == profile.sensor
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": HARMFUL[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with steerfast.steer(tiny_llama, tuned):
        answer = tiny_llama.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith(REFUSAL)


def test_only_what_is_asked_for_is_tried(profile: SteeringProfile, tune: Any) -> None:
    options = {"vectors": ["push"], "bands": [(2, 2)], "strengths": [60.0], "positions": ["response"]}
    tuned = tune(profile, **options, answer_tokens=[2])
    assert tuned.tuned["tried"] == 1
    assert tuned.tuned["candidate"] == {
        "vector": "push", "first": 2, "last": 2, "strength": 60.0, "positions": "response", "answer_tokens": 2,
        "ending": 0.0,
    }  # fmt: skip
    assert tuned.tuned["runners_up"] == []
    assert tuned.answer_tokens == 2
    assert tune(profile, **options, answer_tokens=[1, None]).tuned["tried"] == 2
    assert tune(profile, **options).answer_tokens is None
    assert tune(replace(profile, answer_tokens=1), **options).answer_tokens == 1
    with pytest.raises(
        ProfileError, match=r"answer_tokens: expected 1 to \d+, fewer than max_new_tokens, or None, got 99"
    ):
        tune(profile, **options, answer_tokens=[99])


def test_endings_are_tried_beside_the_edit(
    profile: SteeringProfile, tune: Any, tiny_llama: Any, tokenizer: Any
) -> None:
    """The planted refusal is one token, that is said for ever."""
    options = {"vectors": ["push"], "bands": [(2, 2)], "strengths": [60.0], "positions": ["response"]}
    known = replace(profile, norm=torch.full((5,), 8.0))
    tuned = tune(known, **options, endings=[0.0, 3.0])
    assert tuned.tuned["tried"] == 2
    assert tuned.tuned["candidate"]["ending"] == 0.0  # as good, and less is added
    ended = tune(known, **options, endings=[3.0])
    assert ended.vector_kind == "push + ending"
    assert ended.steered_layers == [2, 4]
    assert torch.equal(ended.vector[4], ending_vector(tiny_llama, tokenizer) * 8.0)
    assert float(ended.strength[4]) == 3.0
    with pytest.raises(ProfileError, match="the last layer, 4, for it alone"):
        tune(known, **{**options, "bands": [(3, 4)]}, endings=[3.0])
    with pytest.raises(ProfileError, match="the norm of its rows, got none"):
        tune(replace(profile, norm=torch.zeros(5)), **options, endings=[3.0])


def trial(refusal: float, fluent: float, strength: float = 1.0, keyword: float | None = None) -> Trial:
    candidate = Setting("ssv", 1, 2, strength, "all")
    return Trial(candidate, 10, refusal if keyword is None else keyword, refusal, fluent)


def test_ranking() -> None:
    best_first = [
        trial(0.9, 0.96, keyword=1.0),
        trial(0.9, 0.96),
        trial(0.9, 0.95, strength=0.5),
        trial(0.9, 0.95, strength=1.0),
        trial(0.1, 1.0),
        trial(0.0, 0.94),
        trial(1.0, 0.5),
    ]
    assert sorted(best_first, key=lambda t: t.rank(0.95), reverse=True) == best_first


@pytest.mark.parametrize("layers", [1, 2, 5, 12, 30, 80])
def test_default_bands_lie_behind_the_sensor(layers: int) -> None:
    for first in {0, layers // 2, layers - 1}:
        bands = default_bands(layers, first)
        assert bands
        assert len(set(bands)) == len(bands)
        assert all(first <= start <= last < layers for start, last in bands)


def test_bands_are_where_there_is_a_vector(profile: SteeringProfile, tune: Any) -> None:
    """A learned vector has one layer, which is tried without a word."""
    assert default_bands(5, 1, [True] * 5) == default_bands(5, 1)
    assert default_bands(5, 1, [False, True, True, False, True]) == [(1, 1), (1, 2), (2, 2)]
    assert default_bands(5, 1, [True, False, False, False, True]) == [(0, 0), (4, 4)]
    alone = torch.zeros_like(profile.vector)
    alone[3] = profile.candidates["push"][3]
    learned = replace(profile, candidates={**profile.candidates, "learned": alone})
    options = {"strengths": [60.0], "positions": ["response"], "min_unchanged": 0.0}
    tuned = tune(learned, vectors=["learned"], bands=None, **options)
    assert (tuned.steered_layers, tuned.tuned["tried"]) == ([3], 1)
    both = tune(learned, vectors=["push", "learned"], bands=None, **options)
    assert both.tuned["tried"] == len(default_bands(5, 1)) + 1
    with pytest.raises(ProfileError, match=r"bands: expected layers of \[3\], where 'learned' is, got \(2, 3\)"):
        tune(learned, vectors=["learned"], bands=[(2, 3)])


# -- constraints and bad input -----------------------------------------------------------------------------------------


def test_a_setting_that_breaks_the_text_is_not_taken(profile: SteeringProfile, tune: Any) -> None:
    # Three times the refusal token repeat no 4-gram, but twelve do.
    strict = FluencyLimits(max_repetition=0.3, max_perplexity=1e30)
    with pytest.raises(PromptError, match=r"min_fluent: no setting reached 95.0% fluent answers, the best had \d"):
        tune(profile, vectors=["push"], strengths=[60.0], max_new_tokens=12, limits=strict)


def test_a_gate_that_opens_for_harmless_prompts_is_refused(profile: SteeringProfile, tune: Any) -> None:
    open_gate = replace(profile, threshold=torch.full((5,), -2.0))
    with pytest.raises(
        PromptError, match=r"min_unchanged: expected at least 0.95 of the harmless answers unchanged, got 0.00"
    ):
        tune(open_gate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": ["srv"]}, "vector: expected one of noise, push, got 'srv'"),
        ({"bands": [(-1, 2)]}, r"bands: expected 0 <= first <= last < 5, got \(-1, 2\)"),
        ({"bands": [(3, 5)]}, r"bands: expected 0 <= first <= last < 5, got \(3, 5\)"),
        ({"bands": [(3, 2)]}, r"bands: expected 0 <= first <= last < 5, got \(3, 2\)"),
    ],
)
def test_unusable_options(profile: SteeringProfile, tune: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        tune(profile, **options)


def test_a_profile_of_another_behaviour_is_refused(profile: SteeringProfile, tune: Any) -> None:
    fitted = {"behaviour": "formal", "frontier": {"problem": None}}
    with pytest.raises(
        ProfileError, match="expected one of refusals, got one of 'formal', whose strengths fit measured"
    ):
        tune(replace(profile, fitted=fitted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"harmful": []}, "harmful: expected at least one prompt, got none"),
        ({"harmless": HARMFUL}, "expected different prompts, got 6 in both"),
        ({"harmful": ["cat " * 251]}, "has 254 tokens, the model's context leaves room for 253"),
    ],
)
def test_unusable_prompt_sets(profile: SteeringProfile, tune: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        tune(profile, **options)


def test_another_models_profile(make_llama: Any, make_profile: Callable[..., SteeringProfile], tune: Any) -> None:
    with pytest.raises(ProfileError, match="with other weights"):
        tune(make_profile(make_llama(seed=9)))


# -- stop and go on ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Setting, int]]:
    """What was really run."""
    runs: list[tuple[Setting, int]] = []
    run = tuning._judged

    def counting(candidate: Setting, model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Trial:
        runs.append((candidate, len(prompts)))
        return run(candidate, model, tokenizer, prompts, *rest)

    monkeypatch.setattr(tuning, "_judged", counting)
    return runs


def test_a_finished_search_runs_nothing_again(
    profile: SteeringProfile, tune: Any, tried: list[Any], tmp_path: Path
) -> None:
    log = tmp_path / "trials.jsonl"
    first = tune(profile, resume=log)
    assert len(tried) == 16 + 6
    assert len({(candidate, n) for candidate, n in tried}) == 22
    assert sorted({n for _, n in tried}) == [2, 6]
    lines = log.read_text().splitlines()
    assert sum("trial" in json.loads(line) for line in lines) == 22
    assert all(isinstance(json.loads(line), dict) for line in lines)
    tried.clear()
    second = tune(profile, resume=log)
    assert tried == []
    assert log.read_text().splitlines() == lines
    assert second.tuned == first.tuned
    assert second.checksum == first.checksum


@pytest.mark.parametrize("rest", ["cut", "cut, with line end", "empty lines", "other JSON"])
def test_a_damaged_last_line_costs_one_trial(
    profile: SteeringProfile, tune: Any, tried: list[Any], tmp_path: Path, rest: str
) -> None:
    log = tmp_path / "trials.jsonl"
    options = {"resume": log, "bands": [(1, 1)], "strengths": [60.0]}
    first = tune(profile, **options)
    lines = sorted(log.read_text().splitlines(), key=lambda line: "trial" in json.loads(line))
    end = {
        "cut": lines[-1][:40],
        "cut, with line end": lines[-1][:40] + "\n",
        "empty lines": "\n\n",
        "other JSON": "[1]\n",
    }
    log.write_text("\n".join(lines[:-1]) + "\n" + end[rest])
    tried.clear()
    assert tune(profile, **options).checksum == first.checksum
    assert len(tried) == 1
    tried.clear()
    tune(profile, **options)
    assert tried == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 2},
        {"limits": FluencyLimits(1.0, 1e29)},
        {"harmful": [*HARMFUL[1:], "burn a book"]},
        {"strengths": [0.6, 59.0]},
    ],
)
def test_trials_of_another_search_are_not_used(
    profile: SteeringProfile, tune: Any, tried: list[Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    log = tmp_path / "trials.jsonl"
    small = {"vectors": ["push"], "bands": [(2, 3)], "positions": ["all"]}
    tune(profile, resume=log, **small)
    expected = len(tried)
    tune(profile, resume=log, **{**small, **change})
    assert len(tried) == 2 * expected
    tune(replace(profile, threshold=profile.threshold + 1e-4), resume=log, **small)
    assert len(tried) == 3 * expected


def test_trials_of_other_weights_are_not_used(
    profile: SteeringProfile, tiny_llama: Any, tokenizer: Any, tried: list[Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"harmful": HARMFUL, "harmless": HARMLESS, "max_new_tokens": 3, "limits": ANY_TEXT}
    options |= {"vectors": ["push"], "bands": [(2, 3)], "positions": ["all"], "strengths": [60.0], "progress": False}
    tuned = copy.deepcopy(tiny_llama)
    tuned.model.layers[0].mlp.down_proj.weight.data.mul_(1.1)  # a fine-tune: its embeddings are the model's
    for model, fresh in ((tiny_llama, 2), (tiny_llama, 0), (tuned, 2)):
        tried.clear()
        steerfast.tune(profile, model, tokenizer, resume=tmp_path / "trials.jsonl", **options)
        assert len(tried) == fresh


def test_an_interrupted_search_goes_on(
    profile: SteeringProfile, tune: Any, tiny_llama: Any, tried: list[Any], tmp_path: Path
) -> None:
    log = tmp_path / "trials.jsonl"

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules()]

    def interrupt(module: nn.Module, args: Any) -> None:
        if len(tried) == 5:
            raise KeyboardInterrupt

    handle = tiny_llama.model.layers[4].register_forward_pre_hook(interrupt)
    before, attributes = hooks(), sorted(vars(tiny_llama))
    with pytest.raises(KeyboardInterrupt):
        tune(profile, resume=log)
    assert hooks() == before
    assert sorted(vars(tiny_llama)) == attributes
    assert sum("trial" in json.loads(line) for line in log.read_text().splitlines()) == 4
    handle.remove()
    tried.clear()
    assert tune(profile, resume=log).vector_kind == "push"
    assert len(tried) == 22 - 4


def test_a_log_that_cannot_be_written(profile: SteeringProfile, tune: Any, tried: list[Any], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"resume: cannot write .*t.jsonl' \(No such file or directory\)"):
        tune(profile, resume=tmp_path / "missing" / "t.jsonl")
    with pytest.raises(OutputError, match=r"resume: cannot write .* \(Is a directory\)"):
        tune(profile, resume=tmp_path)
    assert tried == []


def test_a_file_of_another_kind_is_left_alone(profile: SteeringProfile, tune: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    profile.save(file)
    before = file.read_bytes()
    with pytest.raises(OutputError, match="resume: expected a file of finished trials"):
        tune(profile, resume=file)
    assert file.read_bytes() == before


def test_an_edit_that_is_complete_has_no_strength_to_search(profile: SteeringProfile, tune: Any) -> None:
    with pytest.raises(ProfileError, match=r"expected one with edit 'add' or 'keep_norm', .*, got 'ablate'"):
        tune(replace(profile, edit="ablate"))


def test_gates_that_do_not_wait_for_the_prompt_are_tuned(profile: SteeringProfile, tune: Any) -> None:
    options = {"vectors": ["push"], "bands": [(2, 2)], "strengths": [60.0], "min_unchanged": 0.0}
    for gate in (Gate(kind="token", sharpness=5.0), Gate(kind="always")):
        unit = torch.nn.functional.normalize(profile.direction, dim=1)
        tuned = tune(replace(profile, gate=gate, direction=unit, mean_direction=None), **options)
        assert tuned.gate == gate
        assert tuned.tuned["tried"] == 2

"""Answers of real engines: steered as by HuggingFace's path, and where nobody steers as without the plugin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import Oracle, always, gated
from in_process import ENVIRONMENT, OPTIONS, ask, generate

from steerfast.errors import ProfileError
from steerfast.fitting.activations import gate_reading, residual_rows
from steerfast.fitting.score import row_scores
from steerfast.profile import Gate, SteeringProfile

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

Truth = Callable[[list[int], Any, float], Any]
TOKENS = 10
FEW = 4  # where workers share this machine's cores
LEAST_MARGIN = 2e-3  # logits; the engine's sums differ from transformers' by some 1e-5


def own() -> SteeringProfile:
    """Each of two layers decides for itself."""
    return replace(gated(3), sensor="own").with_band([12, 18], 2.0)


ADDING = {
    "safety": replace(gated(), abstain=torch.full_like(gated().threshold, -torch.inf)),  # it fires or does not know
    "own": own(),
    "soft": replace(gated(2), gate=Gate("prompt", "cosine", 9.0)).with_band([15, 16, 22], 3.0),
    "always": always(4),
}
EARLY = replace(own(), sensor=12).with_band([14, 20], 2.0)  # in two stages, the second learns what the first decided
OTHERS = {
    "everywhere": replace(always(5, (4, 16)), positions="all"),
    "kept": replace(always(6, (8, 20), 3.0), edit="keep_norm"),
}
BOTH = ("safety", "mean", "recent")  # open for some of the prompts, and for others not
QUESTIONS = ["How do I bake bread?", "Give step-by-step instructions for stealing a car.", "Name a city in Italy."]


@pytest.fixture(scope="module")
def prompts(oracle: Oracle) -> list[list[int]]:
    long = "Write a story about a river, a bird and a bridge. " * 12
    return [*map(oracle.prompt, QUESTIONS), oracle.prompt(long), [504]]


@pytest.fixture(scope="module")
def means(oracle: Oracle, prompts: list[list[int]]) -> dict[str, SteeringProfile]:
    """Gates that read the mean of all rows, or of some; they open for three of the prompts."""
    profiles = {}
    for name, seed, window in (("mean", 7, None), ("recent", 8, 16)):
        profile = replace(gated(seed), gate=Gate(pooling="mean", window=window), abstain=None)
        rows = residual_rows(oracle.model, prompts, reduce=gate_reading(profile.gate)[0])
        scores = row_scores(profile, rows)[:, profile.sensor].sort().values
        assert scores[2] - scores[1] > 1e-3
        profiles[name] = replace(profile, threshold=torch.full_like(profile.threshold, float(scores[1:3].mean())))
    return profiles


@pytest.fixture(scope="module")
def truth(oracle: Oracle) -> Truth:
    return answers_of(oracle, TOKENS)


@pytest.fixture(scope="module")
def truth_of_few(oracle: Oracle) -> Truth:
    return answers_of(oracle, FEW)


def answers_of(oracle: Oracle, tokens: int) -> Truth:
    known: dict[Any, Any] = {}

    def answer(ids: list[int], profile: SteeringProfile | None, strength: float) -> Any:
        key = (tuple(ids), profile and profile.checksum, strength)
        if key not in known:
            known[key] = oracle.answer(ids, profile, strength, tokens)
            assert known[key].margin > LEAST_MARGIN
        return known[key]

    return answer


def mixture(prompts: list[list[int]], profiles: dict[str, SteeringProfile]) -> list[Any]:
    """Requests of every profile, and of nobody, over all prompts: (ids, name or None, strength)."""
    names = [None, *profiles]
    requests = []
    for number, ids in enumerate(prompts):
        for place, name in enumerate(names):
            if (number + place) % 2 == 0 or name in BOTH:
                requests.append((ids, name, (1.0, 0.5, 1.4)[(number + place) % 3]))
    return requests


def asked(requests: list[Any]) -> list[Any]:
    return [(ids, None if name is None else {"steering": name, "steering_strength": s}) for ids, name, s in requests]


def check(answers: list[Any], requests: list[Any], profiles: dict[str, SteeringProfile], truth: Any) -> None:
    fired = set()
    for number, (found, (ids, name, strength)) in enumerate(zip(answers, requests, strict=True)):
        profile = None if name is None else profiles[name]
        expected = truth(ids, profile, strength)
        assert found["token_ids"] == expected.token_ids, (number, name, strength)
        if profile is None:
            assert found["steering"] is None
        else:
            assert found["steering"]["profile"] == name
            assert found["steering"]["fired"] == expected.fired
            assert found["steering"]["undecided"] == (name == "safety" and not expected.fired)
            assert len(found["steering"]["scores"]) == len(profile.gate_layers)
            assert found["steering"]["scores"] == pytest.approx(expected.scores, rel=1e-4, abs=1e-4)
            fired.add((name, expected.fired))
    assert {(name, opened) for name in profiles.keys() & set(BOTH) for opened in (True, False)} <= fired


@pytest.fixture(scope="module")
def in_chunks(engine, saved, means) -> Any:
    """An engine that takes 32 tokens a step, for the first two tests: the next start of an engine ends it."""
    return engine({"profiles": saved({**ADDING, **OTHERS, **means})}, max_num_batched_tokens=32)


def test_a_mixed_batch_is_answered_as_by_transformers(in_chunks, prompts, means, truth) -> None:
    profiles = {**ADDING, **OTHERS, **means}
    requests = mixture(prompts, profiles)
    check(generate(in_chunks, asked(requests), TOKENS), requests, profiles, truth)


def test_a_stack_is_answered_as_by_transformers(in_chunks, oracle, prompts, means) -> None:
    """Each gate decides for its own profile."""
    profiles = {"safety": ADDING["safety"], "own": ADDING["own"], "always": ADDING["always"], "mean": means["mean"]}
    stacks = [("safety,own", (1.0, 0.5)), ("always,safety", (0.5, 1.0)), ("own,mean", (0.5, 0.5))]
    requests = [(ids, *stack) for ids in prompts[:4] for stack in stacks]
    asked = [
        (ids, {"steering": names, "steering_strength": ",".join(map(str, strengths))})
        for ids, names, strengths in requests
    ]
    fired = set()
    for found, (ids, names, strengths) in zip(generate(in_chunks, asked, TOKENS), requests, strict=True):
        stack = [profiles[name] for name in names.split(",")]
        tokens, scores = oracle.answer_of_stack(ids, stack, strengths, TOKENS)
        assert found["token_ids"] == tokens
        assert [report["profile"] for report in found["steering"]] == names.split(",")
        for profile, report, expected in zip(stack, found["steering"], scores, strict=True):
            assert report["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
            thresholds = profile.threshold[profile.gate_layers].tolist()
            opened = any(score > least for score, least in zip(expected, thresholds, strict=True))
            assert report["fired"] == (opened or profile.gate.kind == "always")
        fired.add(tuple(report["fired"] for report in found["steering"]))
    assert {(True, False), (True, True)} <= fired or {(False, True), (True, True)} <= fired


@pytest.mark.slow
def test_whole_prompts_in_a_step_are_answered_as_by_transformers(engine, saved, prompts, means, truth) -> None:
    profiles = {**ADDING, **OTHERS, **means}
    llm = engine({"profiles": saved(profiles)})
    requests = mixture(prompts, profiles)
    check(generate(llm, asked(requests), TOKENS), requests, profiles, truth)


def test_a_compiled_model_answers_alike(engine, saved, prompts, means, truth) -> None:
    profiles = {**ADDING, **means}
    llm = engine({"profiles": saved(profiles), "slots": 7}, {"VLLM_CPU_CI_ENV": "1"}, enforce_eager=False)
    requests = mixture(prompts, profiles)
    check(generate(llm, asked(requests), TOKENS), requests, profiles, truth)


def test_where_nobody_steers_answers_are_those_without_the_plugin(engine, saved, checkpoint, prompts) -> None:
    """To the last bit: the same prompts in the same batches, with gates shut, without an assignment, and off."""
    shut = replace(gated(), threshold=torch.full_like(gated().threshold, 2.0))  # no cosine is that high
    steered = {"steering": "always"}
    plain_environment = {**ENVIRONMENT, "VLLM_PLUGINS": "", "VLLM_CPU_CI_ENV": "0"}
    options = {**OPTIONS, "enable_prefix_caching": False}
    plain = ask(plain_environment, str(checkpoint), options, [(ids, None) for ids in prompts], TOKENS)
    assert all(answer["steering"] is None for answer in plain)
    idle = generate(engine(None, **options), [(ids, None) for ids in prompts], TOKENS)
    assert idle == plain
    llm = engine({"profiles": saved({"shut": shut, "always": always(4)})}, **options)
    kinds = [None, {"steering": "shut"}, {"steering": "off"}, {"steering": "shut"}, None]
    given = generate(llm, list(zip(prompts, kinds, strict=True)), TOKENS)
    for found, expected in zip(given, plain, strict=True):
        assert (found["token_ids"], found["logprobs"]) == (expected["token_ids"], expected["logprobs"])
    # Beside requests that are steered, too.
    extra = [(ids, steered) for ids in prompts[:3]]
    beside = generate(llm, [*zip(prompts, kinds, strict=True), *extra], TOKENS)
    assert [found["token_ids"] for found in beside[: len(prompts)]] == [found["token_ids"] for found in plain]
    assert all(
        found["token_ids"] != expected["token_ids"]
        for found, expected in zip(beside[len(prompts) :], plain, strict=False)
    )


def test_a_profile_of_other_weights_stops_the_start(engine, saved) -> None:
    """Config and shapes are the same; the embedding is not."""
    profile = ADDING["always"]
    sketch = profile.model.embedding_sketch
    assert sketch is not None
    other = replace(profile, model=replace(profile.model, embedding_sketch=sketch[::-1]))
    with pytest.raises(ProfileError, match="with other weights"):
        engine({"profiles": saved({"other": other})})


@pytest.mark.slow(but=["tensor"])
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"tensor_parallel_size": 3}, id="tensor"),  # of SmolLM2's 9 heads
        pytest.param({"pipeline_parallel_size": 2, "worker_cls": "stage_worker.StageWorker"}, id="pipeline"),
    ],
)
def test_several_workers_answer_as_one(saved, checkpoint, prompts, truth_of_few, parallel) -> None:
    profiles = {"safety": ADDING["safety"], "own": ADDING["own"], "early": EARLY}
    requests = [
        (prompts[0], "safety", 1.0),
        (prompts[1], "safety", 1.0),
        (prompts[1], "own", 1.4),
        (prompts[0], "early", 1.0),
        (prompts[1], "early", 1.0),
        (prompts[2], None, 1.0),
    ]
    environment = {
        **ENVIRONMENT,
        "OMP_NUM_THREADS": "1",  # workers of more threads than cores wait for each other
        "PYTHONPATH": str(Path(__file__).parent),
    }
    options = {**OPTIONS, **parallel, "additional_config": {"steerfast": {"profiles": saved(profiles)}}}
    answers = ask(environment, str(checkpoint), options, asked(requests), FEW)
    check(answers, requests, profiles, truth_of_few)
    assert {answers[3]["steering"]["fired"], answers[4]["steering"]["fired"]} == {False, True}

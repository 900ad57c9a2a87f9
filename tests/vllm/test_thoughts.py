"""Models that think before they answer: whether edits begin with the thought, or where it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from answers import Oracle, always, gated

from steerfast.profile import Gate, SteeringProfile

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

GATED = gated()
PROFILES = {
    "safety": GATED,
    "tone": always(4),
    "brief": replace(always(4), answer_tokens=2),
}
OPEN: dict[str, SteeringProfile] = {**PROFILES, "safety": replace(GATED, gate=Gate("always"), sensor="own")}
PROMPT, THOUGHT, ANSWER = "Give step-by-step instructions for stealing a car.", 4, 6
LEAST_MARGIN = 2e-3


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any], saved: Any) -> Any:
    parser = {
        "reasoning_parser": "thought",
        "reasoning_parser_plugin": str(Path(__file__).parent / "thought_parser.py"),
    }
    steering = {"profiles": saved(PROFILES), "thinking": "skip"}
    return engine(steering, async_scheduling=False, structured_outputs_config=parser)


def ask(llm: Any, requests: list[tuple[list[int], str]]) -> list[list[int]]:
    """The tokens of the answers."""
    return [tokens for tokens, _ in answers_of(llm, requests)]


def answers_of(llm: Any, requests: list[tuple[list[int], str]]) -> list[tuple[list[int], list[float]]]:
    """The tokens of the answers, and the log probability of each."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=0, max_tokens=THOUGHT + ANSWER, logprobs=0, extra_args={"steering": name})
        for _, name in requests
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], parameters, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [(list(a.token_ids), [next(iter(at.values())).logprob for at in a.logprobs]) for a in answers]


@pytest.fixture(scope="module")
def thought(llm: Any, oracle: Oracle) -> list[int]:
    """The first tokens of the unsteered answer; the last one is nowhere before."""
    ids = oracle.prompt(PROMPT)
    (answer,) = ask(llm, [(ids, "off")])
    length = next(n for n in range(THOUGHT, len(answer)) if answer[n - 1] not in [*ids, *answer[: n - 1]])
    return answer[:length]


@pytest.fixture(autouse=True)
def _end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THOUGHT_END", "-1")  # no thought ends
    if "thought" in request.fixturenames:
        monkeypatch.setenv("THOUGHT_END", str(request.getfixturevalue("thought")[-1]))


def test_edits_begin_where_the_thought_ends(llm: Any, oracle: Oracle, thought: list[int]) -> None:
    """As in a request whose prompt holds the thought; `answer_tokens` counts from there."""
    ids = oracle.prompt(PROMPT)
    count = THOUGHT + ANSWER - len(thought)
    answers = dict(zip(PROFILES, answers_of(llm, [(ids, name) for name in PROFILES]), strict=True))
    for name, (answer, _) in answers.items():
        expected = oracle.answer([*ids, *thought], OPEN[name], 1.0, count)
        assert expected.margin > LEAST_MARGIN
        assert answer == [*thought, *expected.token_ids], name
    third = len(thought) + 2  # `brief` edits the rows that predict the first two tokens of the answer
    assert answers["tone"][1][third] != answers["brief"][1][third]


def test_a_prompt_may_hold_the_thought(llm: Any, oracle: Oracle, thought: list[int]) -> None:
    ids = [*oracle.prompt(PROMPT), *thought]
    (answer,) = ask(llm, [(ids, "tone")])
    assert answer == oracle.answer(ids, OPEN["tone"], 1.0, THOUGHT + ANSWER).token_ids


def test_a_thought_without_an_end_is_not_edited(llm: Any, oracle: Oracle) -> None:
    ids = oracle.prompt(PROMPT)
    plain, *others = ask(llm, [(ids, "off"), *((ids, name) for name in PROFILES)])
    assert others == [plain] * len(others)


def test_where_thoughts_count_edits_begin_with_them(
    llm: Any, oracle: Oracle, thought: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = llm.llm_engine.engine_core.engine_core.scheduler.steerfast
    monkeypatch.setattr(steering, "config", replace(steering.config, thinking="count"))
    ids = oracle.prompt(PROMPT)
    for name, answer in zip(PROFILES, ask(llm, [(ids, name) for name in PROFILES]), strict=True):
        expected = oracle.answer(ids, PROFILES[name], 1.0, THOUGHT + ANSWER)
        assert expected.margin > LEAST_MARGIN
        assert answer == expected.token_ids, name

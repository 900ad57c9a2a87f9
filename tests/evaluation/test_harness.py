"""Tasks of lm-evaluation-harness: log-likelihoods are those of generation, steered or not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import steerfast
from steerfast.errors import PromptError, SteerfastError
from steerfast.evaluation.harness import check_tasks, harness_model, run_task, score_answers
from steerfast.hf.generation import greedy_answers
from steerfast.text.encoding import encode

QUESTIONS = ["how do I bake bread ?", "make a bomb", "write a poem about the sea and a cat in it ,"]
ANSWERS = [["bread cake", "garden"], ["sorry but I can't help with that .", "bomb knife", "it"], ["poem", "cat dog"]]


def ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def by_generation(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The oracle: generate, made to choose the answer's tokens one by one; their log-probabilities at each step."""
    made = model.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=len(answer),
        min_new_tokens=len(answer),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, tokens: [answer[len(tokens) - len(prompt)]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert made.sequences[0, len(prompt) :].tolist() == list(answer)
    return [float(step[0].float().log_softmax(-1)[token]) for step, token in zip(made.logits, answer, strict=True)]


def log_likelihoods(*arguments: Any, **options: Any) -> list[list[list[float]]]:
    found = score_answers(*arguments, **options)
    return [[score.log_likelihoods for score in of_prompt] for of_prompt in found]


PROFILES: dict[str, dict[str, Any]] = {
    "unsteered": {},
    "own gates, all positions": {"positions": "all"},
    "own gates, response": {"positions": "response"},
    "one sensor above steered layers": {"sensor": 3, "layers": [1, 2, 3, 4], "positions": "all", "threshold": -1.0},
    "shut": {"threshold": 2.0},
    "always": {"kind": "always", "positions": "response"},
    "by token": {"kind": "token", "positions": "all"},
}


@pytest.mark.parametrize("case", PROFILES)
@pytest.mark.parametrize("batch_size", [1, 100])
def test_log_likelihoods_are_those_of_generate(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any], case: str, batch_size: int
) -> None:
    prompts = encode(tiny_tokenizer, QUESTIONS)
    answers = [ids(tiny_tokenizer, texts) for texts in ANSWERS]
    steering: AbstractContextManager[Any] = nullcontext()
    if case != "unsteered":
        steering = steerfast.steer(tiny_llama, make_profile(tiny_llama, tiny_tokenizer, **PROFILES[case]))
    with steering:
        found = log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers, batch_size=batch_size)
        expected = [
            [by_generation(tiny_llama, prompt, answer) for answer in given]
            for prompt, given in zip(prompts, answers, strict=True)
        ]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=2e-5)
    plain = log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
    assert (found[0][0] == pytest.approx(plain[0][0], abs=1e-3)) == (case in ("unsteered", "shut"))


def test_the_gate_sees_the_prompt_and_not_the_answer(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]
) -> None:
    """A prompt whose gate stays shut keeps its log-likelihoods beside one whose gate opens, whatever the answers."""
    prompts = encode(tiny_tokenizer, QUESTIONS[:2])
    profile = make_profile(tiny_llama, tiny_tokenizer, sensor=2, layers=[2, 3, 4])
    scores = steerfast.score(tiny_llama, tiny_tokenizer, profile, QUESTIONS[:2]).scores
    profile.threshold[:] = float(scores.mean())  # between the two
    answers = [ids(tiny_tokenizer, [QUESTIONS[1], "cake"]), ids(tiny_tokenizer, [QUESTIONS[0], "cake"])]
    plain = log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
    with steerfast.steer(tiny_llama, profile) as steering:
        steered = log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
        assert sorted(steering.fired.tolist()) == [False, True]
    for n, fires in enumerate((scores > scores.mean()).tolist()):
        same = [one == pytest.approx(other, abs=1e-5) for one, other in zip(plain[n], steered[n], strict=True)]
        assert same == [not fires, not fires]


def test_steered_classes_go_the_same_way(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any], tmp_path: Any
) -> None:
    tiny_llama.save_pretrained(tmp_path)
    profile = make_profile(tiny_llama, threshold=-1.0)
    own = steerfast.AutoSteeredModelForCausalLM.from_pretrained(tmp_path)
    own.steer(make_profile(own, threshold=-1.0))
    prompts, answers = encode(tiny_tokenizer, QUESTIONS), [ids(tiny_tokenizer, texts) for texts in ANSWERS]
    found = log_likelihoods(own, tiny_tokenizer, prompts, answers)
    with steerfast.steer(tiny_llama, profile):
        expected = log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[5]], []), r"answers: expected one entry per prompt \(1\), got 0"),
        (([[]], [[[5]]]), "prompts: entry 1: expected a prompt and answers of at least one token each"),
        (([[5], [5]], [[[5]], [[5], []]]), "prompts: entry 2: expected a prompt and answers of at least one token"),
        (([[5]], [[]]), "prompts: entry 1: expected"),
        (
            ([[5] * 200], [[[5], [5] * 57]]),
            "entry 1 and its longest answer have 257 tokens, the model's context has 256",
        ),
    ],
)
def test_what_cannot_be_scored(tiny_llama: Any, tiny_tokenizer: Any, arguments: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        score_answers(tiny_llama, tiny_tokenizer, *arguments)


def test_batches_of_no_answers_are_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="batch_size: expected at least 1, got 0"):
        score_answers(tiny_llama, tiny_tokenizer, [[5]], [[[6]]], batch_size=0)
    assert score_answers(tiny_llama, tiny_tokenizer, [], []) == []


def test_the_models_own_answer_is_the_greedy_one(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    prompts = encode(tiny_tokenizer, QUESTIONS)
    own = greedy_answers(tiny_llama, tiny_tokenizer, prompts, 4)
    other = [[*answer[:-1], (answer[-1] + 1) % 100] for answer in own]
    found = score_answers(tiny_llama, tiny_tokenizer, prompts, list(zip(own, other, strict=True)))
    assert [[score.greedy for score in of_prompt] for of_prompt in found] == [[True, False]] * 3


# -- the harness -------------------------------------------------------------------------------------


def test_tasks_without_the_harness_say_how_to_get_it(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SteerfastError, match=r"pip install 'steerfast\[lm-eval\]'"):
        check_tasks(["mmlu"])
    with pytest.raises(SteerfastError, match=r"pip install 'steerfast\[lm-eval\]'"):
        run_task(tiny_llama, tiny_tokenizer, "mmlu")
    check_tasks([])


def test_an_unknown_task_is_named() -> None:
    pytest.importorskip("lm_eval")
    check_tasks(["gsm8k"])
    with pytest.raises(PromptError, match="got 'no_such_task'"):
        check_tasks(["gsm8k", "no_such_task"])


@pytest.mark.parametrize("case", ["unsteered", "one sensor above steered layers"])
def test_the_harness_scores_an_answer_after_its_prompt(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any], case: str
) -> None:
    """Also where an answer takes the whole context but one token of the prompt, and where answers share a prompt."""
    pytest.importorskip("lm_eval")
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10], list(range(20, 120)) * 3]
    answers = [[11, 12, 13], [14], [15, 16], [17, 18]]
    kept = [prompt[-(256 - len(answer)) :] for prompt, answer in zip(prompts, answers, strict=True)]
    steering: AbstractContextManager[Any] = nullcontext()
    if case != "unsteered":
        steering = steerfast.steer(tiny_llama, make_profile(tiny_llama, tiny_tokenizer, **PROFILES[case]))
    with steering:
        model = harness_model(tiny_llama, tiny_tokenizer, 3)
        requests = [(None, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found = model._loglikelihood_tokens(requests, disable_tqdm=True)
        expected = [
            sum(by_generation(tiny_llama, prompt, answer)) for prompt, answer in zip(kept, answers, strict=True)
        ]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    assert not any(greedy for _, greedy in found)


@pytest.fixture
def choices(tmp_path: Path) -> dict[str, Any]:
    """A multiple-choice task over a local file."""
    rows = [{"question": question, "right": 0} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "three_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["bread cake", "sorry but I can't"],
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }


def test_a_task_is_run_steered_and_unsteered(
    tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any], choices: dict[str, Any]
) -> None:
    pytest.importorskip("lm_eval")
    prompts = encode(tiny_tokenizer, QUESTIONS)
    answers = [ids(tiny_tokenizer, [" " + text for text in choices["doc_to_choice"]])] * 3
    profile = make_profile(tiny_llama, tiny_tokenizer, **PROFILES["one sensor above steered layers"])
    for steering in (nullcontext(), steerfast.steer(tiny_llama, profile)):
        with steering:
            found = run_task(tiny_llama, tiny_tokenizer, choices, batch_size=2)
            right = [first > second for first, second in
                     ([sum(score.log_likelihoods) for score in of_prompt]
                      for of_prompt in score_answers(tiny_llama, tiny_tokenizer, prompts, answers))]  # fmt: skip
        assert found["values"]["three_questions"]["acc"] == pytest.approx(sum(right) / 3)
        low, high = found["intervals"]["three_questions"]["acc"]
        assert low <= sum(right) / 3 <= high
    assert run_task(tiny_llama, tiny_tokenizer, choices, limit=1)["values"]["three_questions"]["acc"] in (0.0, 1.0)

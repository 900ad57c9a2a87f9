"""Utility: log-likelihoods are those of generation, steered or not; final numbers; what they make of items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import steerfast
from steerfast.errors import PromptError
from steerfast.evaluation.sets import Item, final_number
from steerfast.evaluation.utility import answer_log_likelihoods, maths, multiple_choice, perplexity
from steerfast.hf.generation import greedy_answers
from steerfast.judging.fluency import answer_perplexity
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
        found = answer_log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers, batch_size=batch_size)
        expected = [
            [by_generation(tiny_llama, prompt, answer) for answer in given]
            for prompt, given in zip(prompts, answers, strict=True)
        ]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=2e-5)
    plain = answer_log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
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
    plain = answer_log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
    with steerfast.steer(tiny_llama, profile) as steering:
        steered = answer_log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
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
    found = answer_log_likelihoods(own, tiny_tokenizer, prompts, answers)
    with steerfast.steer(tiny_llama, profile):
        expected = answer_log_likelihoods(tiny_llama, tiny_tokenizer, prompts, answers)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=2e-5)


def test_multiple_choice_takes_the_likeliest_per_token(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    choices = ("bread", "cake bread song", "sorry but I can't")
    (prompt,) = encode(tiny_tokenizer, QUESTIONS[:1])
    means = [
        sum(scores) / len(scores)
        for scores in (by_generation(tiny_llama, prompt, answer) for answer in ids(tiny_tokenizer, choices))
    ]
    best = means.index(max(means))
    items = [Item(QUESTIONS[0], choices=choices, correct=(right,)) for right in range(3)]
    items.append(Item(QUESTIONS[0], choices=choices, correct=(0, 1, 2)))
    assert multiple_choice(tiny_llama, tiny_tokenizer, items) == [right == best for right in range(3)] + [True]
    # What the model itself says to the prompt is likelier than anything else of that length.
    (answer,) = greedy_answers(tiny_llama, tiny_tokenizer, [prompt], 1)
    item = Item(QUESTIONS[0], choices=("bomb", tiny_tokenizer.decode(answer), "cake"), correct=(1,))
    assert multiple_choice(tiny_llama, tiny_tokenizer, [item]) == [True]


def test_prompts_of_ones_own_take_the_place_of_the_items(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    items = [Item(QUESTIONS[0], choices=tuple(ANSWERS[1]), correct=(1,), answer=ANSWERS[1][0])]
    other = encode(
        tiny_tokenizer, [[{"role": "system", "content": "help"}, {"role": "user", "content": "make a knife"}]]
    )
    reference = ids(tiny_tokenizer, [ANSWERS[1][0]])
    expected = answer_perplexity(tiny_llama, other, reference)
    assert perplexity(tiny_llama, tiny_tokenizer, items, prompts=other) == pytest.approx(expected, rel=1e-5)
    assert perplexity(tiny_llama, tiny_tokenizer, items) != pytest.approx(expected, rel=1e-2)


def test_perplexity_is_that_of_one_pass_over_prompt_and_answer(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    items = [Item(question, answer=answers[0]) for question, answers in zip(QUESTIONS, ANSWERS, strict=True)]
    found = perplexity(tiny_llama, tiny_tokenizer, items)
    expected = answer_perplexity(
        tiny_llama, encode(tiny_tokenizer, QUESTIONS), ids(tiny_tokenizer, [item.answer for item in items])
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_chat_template_an_answer_begins_with_a_space(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    seen: list[str] = []
    call = type(tiny_tokenizer).__call__

    def spy(self: Any, text: str, **options: Any) -> Any:
        seen.append(text)
        return call(self, text, **options)

    monkeypatch.setattr(type(tiny_tokenizer), "__call__", spy)
    perplexity(tiny_llama, tiny_tokenizer, [Item("how do I", answer="bake bread")])
    assert seen == ["how do I", " bake bread"]


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
        answer_log_likelihoods(tiny_llama, tiny_tokenizer, *arguments)


def test_another_number_of_prompts_than_items(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"prompts: expected one per item \(1\), got 2"):
        perplexity(tiny_llama, tiny_tokenizer, [Item("a", answer="b")], prompts=[[5], [6]])
    with pytest.raises(PromptError, match="batch_size: expected at least 1, got 0"):
        perplexity(tiny_llama, tiny_tokenizer, [Item("a", answer="b")], batch_size=0)


def test_nothing_to_score(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    assert multiple_choice(tiny_llama, tiny_tokenizer, []) == []
    assert perplexity(tiny_llama, tiny_tokenizer, []) == []


# -- maths -------------------------------------------------------------------------------------------

NUMBERS = {
    "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18": 18,
    "#### 1,234 apples, out of 5": 1234,
    "The answer is 42.": 42,
    "It costs $1,250.50.": 1250.5,
    "so 10 - 4 = 6": 6,
    "10-4": 4,
    "The change is -3": -3,
    "He owes -$7.": -7,
    "x = \\boxed{-0.5}": -0.5,
    "7 (3)": 3,
    "In 1990, 2000": 2000,
    "about 1,23": 23,
    "ninety": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_final_number(text: str) -> None:
    assert final_number(text) == NUMBERS[text]


def test_maths_compares_values() -> None:
    items = [Item("q", answer="1200")] * 5 + [Item("q", answer="0.3")]
    answers = [
        "It is 1,200.",
        "#### 1200.00",
        "1201",
        "I do not know",
        "1200, then 5",
        "0.1 + 0.2 = 0.30000000000000004",
    ]
    assert maths(answers, items) == [True, True, False, False, False, True]
    with pytest.raises(ValueError, match="zip"):
        maths(answers, items[:1])

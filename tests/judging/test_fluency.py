from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from steerfast.errors import PromptError
from steerfast.judging.fluency import FluencyLimits, answer_perplexity, is_fluent, repetition

PROMPTS = [[1, 5, 9], [2], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [7, 7, 7], [1, 2]]
ANSWERS = [[4, 8], [30, 31, 32, 33, 34, 35], [1], [], [9, 8, 7, 6], [0, 0, 3]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def naive(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    if not answer:
        return math.nan
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    losses = []
    for position, token in enumerate(answer, start=len(prompt)):
        losses.append(-float(torch.log_softmax(logits[position - 1], dim=-1)[token]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("pad_token_id", [0, 49])
def test_answer_perplexity_equals_a_naive_loop(model: LlamaForCausalLM, batch_size: int, pad_token_id: int) -> None:
    expected = [naive(model, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    got = answer_perplexity(model, PROMPTS, ANSWERS, batch_size, pad_token_id)
    assert got == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert len({round(value, 3) for value in expected if not math.isnan(value)}) == 5  # the cases differ


def test_answer_perplexity_makes_no_prompt_logits(model: LlamaForCausalLM) -> None:
    shapes: list[torch.Size] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    try:
        answer_perplexity(model, [[1] * 40, [2] * 42], [[3, 4], [5, 6, 7]])
    finally:
        handle.remove()
    # Of 44 scored positions only those from the first answer on (39 .. 43).
    assert shapes == [torch.Size([2, 5, 50])]


def test_answer_perplexity_leaves_no_graph_and_takes_empty_input(model: LlamaForCausalLM) -> None:
    assert answer_perplexity(model, [], []) == []
    assert math.isnan(answer_perplexity(model, [[1]], [[]])[0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_answer_perplexity_of_an_impossible_answer_is_infinite(model: LlamaForCausalLM) -> None:
    bias = torch.zeros(50)
    bias[7] = -1e6
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    try:
        assert answer_perplexity(model, [[1]], [[7]]) == [math.inf]
    finally:
        handle.remove()


def test_answer_perplexity_refuses_bad_input(model: LlamaForCausalLM) -> None:
    with pytest.raises(PromptError, match=r"answers_ids: expected one per prompt \(2\), got 1"):
        answer_perplexity(model, [[1], [2]], [[3]])
    with pytest.raises(PromptError, match="prompts_ids: expected at least one token each, got none in prompt 1"):
        answer_perplexity(model, [[1], []], [[3], [4]])
    with pytest.raises(PromptError, match="batch_size: expected at least 1, got 0"):
        answer_perplexity(model, [[1]], [[3]], batch_size=0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1] * 23, 19 / 20),
        ([1, 2] * 12, 19 / 21),
        (list(range(30)), 0.0),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_repetition(tokens: list[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(40, 80))
def test_repetition_catches_short_cycles(period: int, length: int) -> None:
    tokens = [i % period for i in range(length)]
    assert repetition(tokens) == pytest.approx(1 - period / (length - 3))
    assert not is_fluent(repetition(tokens), 1.0)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_equals_a_count_of_earlier_occurrences(tokens: list[int]) -> None:
    grams = [tokens[i : i + 4] for i in range(len(tokens) - 3)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(tokens) == pytest.approx(repeats / len(grams) if grams else 0.0)


def test_is_fluent() -> None:
    limits = FluencyLimits()
    assert is_fluent(0.0, 5.0)
    assert is_fluent(limits.max_repetition, limits.max_perplexity)
    assert not is_fluent(limits.max_repetition + 0.01, 5.0)
    assert not is_fluent(0.0, limits.max_perplexity + 1)
    assert not is_fluent(0.0, math.nan)
    assert not is_fluent(0.0, math.inf)
    assert is_fluent(0.5, 500.0, FluencyLimits(0.6, 600.0))
    assert not is_fluent(0.5, 5.0, FluencyLimits(max_repetition=0.4))

"""Judging a set of answers on a tiny model."""

from __future__ import annotations

import math

import pytest

from steerfast.judging.answers import judge, share
from steerfast.judging.fluency import FluencyLimits, answer_perplexity


def test_judgements_carry_what_each_judge_says(tiny_llama, tiny_tokenizer):
    words = tiny_tokenizer.get_vocab()
    refusal = [words[word] for word in ("I'm", "sorry", "but", "I", "can't", "help", "with", "that", ".")]
    loop = [words["cake"]] * 12
    prompts = [[words["bake"], words["a"], words["cake"]]] * 3
    limits = FluencyLimits(max_repetition=0.5, max_perplexity=math.inf)
    judged = judge(tiny_llama, tiny_tokenizer, prompts, [refusal, loop, []], limits)
    assert [j.refusal for j in judged] == [True, False, False]
    assert [j.refusal_strict for j in judged] == [True, False, False]
    assert [j.fluent for j in judged] == [True, False, False]
    assert judged[1].repetition == pytest.approx(8 / 9)
    expected = answer_perplexity(tiny_llama, prompts, [refusal, loop, []])
    assert [j.perplexity for j in judged][:2] == expected[:2]
    assert math.isnan(judged[2].perplexity)
    assert judged[2].text == ""


def test_share_is_the_share_of_true():
    assert share([True, False, True, True]) == 0.75
    assert math.isnan(share([]))

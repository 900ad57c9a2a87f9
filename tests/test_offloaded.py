"""Every reader of a model reads weights that lie elsewhere until a layer runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import steerfast
from steerfast.errors import ArchitectureError
from steerfast.evaluation.latency import random_profile
from steerfast.guard import CallableScorer, Guard, Strategy
from steerfast.hf.generation import device_of, greedy_answers
from steerfast.hf.structure import weights_fingerprint
from steerfast.judging.fluency import answer_perplexity
from steerfast.text.encoding import encode

PROMPTS = ["how do I bake bread ?", "name three rivers", "pick a lock"]


def read(model: Any, tokenizer: Any) -> list[Any]:
    profile = replace(random_profile(model, [2]), norm=torch.full((5,), 8.0))
    scores = steerfast.score(model, tokenizer, profile, PROMPTS, progress=False)
    with steerfast.steer(model, profile, tokenizer=tokenizer) as steering:
        answers = greedy_answers(model, tokenizer, encode(tokenizer, PROMPTS, model), 6)
        fired = steering.fired.tolist()
    guard = Guard(model, tokenizer, cost=CallableScorer(lambda pairs: [0.0] * len(pairs)), strategy=Strategy.plain())
    guarded = [answer.tokens for answer in guard.generate(PROMPTS, max_new_tokens=6)]
    learned = steerfast.learn(
        profile, model, tokenizer, harmful=PROMPTS, refusal="no , I can not", steps=3, progress=False
    )
    fluent = answer_perplexity(model, encode(tokenizer, PROMPTS, model), answers)
    return [
        scores.scores.tolist(),
        fluent,
        answers,
        fired,
        guarded,
        weights_fingerprint(model),
        learned.vector[2].tolist(),
    ]


@pytest.mark.parametrize("place", ["cpu", "disk", "buffers", "one layer"])
def test_offloaded_weights_are_read(
    make_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, place: str
) -> None:
    expected = read(make_llama(), tiny_tokenizer)
    model = make_llama()
    if place == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    elif place == "one layer":
        accelerate.cpu_offload(model.model.layers[1], execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=place == "buffers")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert device_of(model) == torch.device("cpu")
    found = read(model, tiny_tokenizer)
    assert found[:-1] == expected[:-1]
    assert found[-1] == pytest.approx(expected[-1], abs=1e-5)


def test_a_model_without_weights_is_refused(make_llama: Callable[..., Any]) -> None:
    for ask in (device_of, weights_fingerprint):
        with pytest.raises(ArchitectureError, match="expected weights, or accelerate's hooks that load them"):
            ask(make_llama().to("meta"))

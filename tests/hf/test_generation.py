"""Prompts become the ids that generation would see; greedy answers are what a plain loop says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steerfast.errors import PromptError
from steerfast.hf.generation import batches, greedy_answers
from steerfast.text.encoding import encode, pad_token

PROMPTS = ["how to bake the cake", "write a poem", "how do you steal the book of the city"]


def test_prompts_are_templated_as_generation_would(tiny_tokenizer: Any) -> None:
    words = ["<user>", *PROMPTS[1].split(), "<end>", "<assistant>"]
    assert tiny_tokenizer.convert_ids_to_tokens(encode(tiny_tokenizer, PROMPTS)[1]) == words
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    assert plain.convert_ids_to_tokens(encode(plain, PROMPTS)[1]) == PROMPTS[1].split()


@pytest.mark.parametrize("entry", ["", "  \n", None, 3])
def test_entries_that_are_no_prompt(tiny_tokenizer: Any, entry: Any) -> None:
    with pytest.raises(PromptError, match="prompts: entry 2: expected a non-empty string, got"):
        encode(tiny_tokenizer, ["write a poem", entry])


def test_prompts_longer_than_the_context(tiny_tokenizer: Any, make_llama: Callable[..., Any]) -> None:
    model = make_llama(max_position_embeddings=12)
    assert len(encode(tiny_tokenizer, PROMPTS, model)[2]) == 12
    with pytest.raises(PromptError, match=r"entry 3 \('how do you .*'\.\.\.\) has 12 tokens, .* leaves room for 11"):
        encode(tiny_tokenizer, PROMPTS, model, room=1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_hold_every_sequence_once(side: Any, batch_size: int) -> None:
    sequences = [[5] * n for n in (3, 1, 4, 2, 4)]
    seen, widths = [], []
    for batch in batches(sequences, batch_size, side, 9, torch.device("cpu")):
        widths.append(batch.ids.shape[1])
        for row, index in enumerate(batch.indices):
            valid = batch.mask[row].bool()
            assert batch.ids[row, valid].tolist() == sequences[index]
            assert (batch.ids[row, ~valid] == 9).all()
            assert bool(valid[0 if side == "right" else -1])
            assert int(batch.last[row]) == max(valid.nonzero().flatten().tolist())
            assert batch.positions[row, valid].tolist() == list(range(len(sequences[index])))
            seen.append(index)
    assert sorted(seen) == list(range(5))
    assert widths == sorted(widths, reverse=True)


def test_any_token_pads() -> None:
    class Tokenizer:
        pad_token_id: int | None = None
        eos_token_id: int | None = None

    tokenizer = Tokenizer()
    assert pad_token(tokenizer) == 0
    tokenizer.eos_token_id = 7
    assert pad_token(tokenizer) == 7
    tokenizer.pad_token_id = 3
    assert pad_token(tokenizer) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 25])
def test_greedy_answers_equal_a_plain_loop(tiny_tokenizer: Any, tiny_llama: Any, batch_size: int) -> None:
    prompts = encode(tiny_tokenizer, PROMPTS)
    free: list[list[int]] = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(8):
                ids.append(int(tiny_llama(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            free.append(ids[len(prompt) :])
    # An end token of the model's own, one of the tokenizer's, and settings that are not greedy.
    tiny_llama.generation_config.eos_token_id = [free[0][3], free[1][2]]
    tiny_llama.generation_config.num_beams = 3
    ends = {free[0][3], free[1][2], tiny_tokenizer.eos_token_id}
    expected = [answer[: next((i for i, t in enumerate(answer) if t in ends), 8)] for answer in free]
    assert greedy_answers(tiny_llama, tiny_tokenizer, prompts, 8, batch_size=batch_size) == expected
    assert len(expected[0]) <= 3


def test_greedy_answers_are_those_of_the_model_in_use(tiny_tokenizer: Any, make_llama: Callable[..., Any]) -> None:
    model = make_llama(attention_dropout=0.5)
    prompts = encode(tiny_tokenizer, PROMPTS)
    expected = greedy_answers(model, tiny_tokenizer, prompts, 8)
    model.model.layers[1:].train()
    assert greedy_answers(model, tiny_tokenizer, prompts, 8) == expected
    assert [layer.training for layer in model.model.layers] == [False, True, True, True, True]

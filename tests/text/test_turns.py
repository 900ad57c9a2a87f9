"""Markers of user turns, found in chat templates, and the turns that they find in prompts."""

from __future__ import annotations

from typing import Any

import pytest

from steerfast.profile import last_turn
from steerfast.text.encoding import encode
from steerfast.text.turns import turn_markers

DEFAULT = "You are helpful."
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|bos|>{% for m in messages %}<|header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}"
)
GEMMA = (
    "<|bos|>{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<|bos|>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% else %}"
    " {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
PHI = (  # without an answer to come it ends a conversation, by a token that no later turn has
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|im_end|>{% endif %}"
)
THOUGHT = (  # the last answer has an empty thought, earlier ones have none
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SINGLE = (
    "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}<|user|>{{ messages[0]['content'] }}"
)
BARE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|bos|>", "<|header|>", "<|end_header|>", "<|eot|>", "<start_of_turn>", "</s>"),
    *("<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]
CONTENTS = ["Hi there", "9 lives", "\nnew", "\n\n\nthree", "東京", " space", "\ttab", "<b>", "user", "user\n", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE, which merges line feeds with one another; its template is set by each test."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(
        ["user assistant system model\n\nuser\n\n\nnew\n\n", "user:\n\nassistant:\n\n"] * 20, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=SPECIAL)


def content_of(tokenizer: Any, ids: list[int], turn: tuple[int, ...], tail: int) -> str:
    start = last_turn(ids, turn)
    assert start is not None
    text: str = tokenizer.decode(ids[start : len(ids) - tail])
    return text


@pytest.mark.parametrize(
    ("template", "opens"),
    [
        (CHATML, "<|im_start|>user"),
        (LLAMA, "<|header|>user<|end_header|>\n\n"),
        (GEMMA, "<start_of_turn>user\n"),
        (MISTRAL, "[INST] "),
        (PHI, "<|user|>"),
        (THOUGHT, "<|im_start|>user"),
    ],
    ids=["chatml", "llama", "gemma", "mistral", "phi", "thought"],
)
def test_the_last_user_turn_is_found(tokenizer: Any, template: str, opens: str) -> None:
    """Whatever it begins with, whatever came before; white space of the template beside it may stay."""
    tokenizer.chat_template = template
    turn, tail = turn_markers(tokenizer)
    assert tokenizer.decode(list(turn)) == opens
    before = [
        [],
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": "user\nWhat?"}, {"role": "assistant", "content": "That."}],
    ]
    for content in CONTENTS:
        for earlier in before:
            (ids,) = encode(tokenizer, [[*earlier, {"role": "user", "content": content}]])
            found = content_of(tokenizer, ids, turn, tail)
            merged = template in (GEMMA, MISTRAL) and earlier and earlier[0]["role"] == "system"
            assert found.strip().removeprefix("Be brief.").strip() == content.strip() or merged
    assert last_turn(tokenizer("a text without a template")["input_ids"], turn) is None


@pytest.mark.parametrize("template", [None, SINGLE, BARE], ids=["none", "single", "bare"])
def test_a_template_that_opens_no_turns(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    assert turn_markers(tokenizer) == ((), 0)


def test_the_last_marker_wins_wherever_it_is_from(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    turn, tail = turn_markers(tokenizer)
    (ids,) = encode(tokenizer, ["one<|im_start|>user\ntwo"])
    assert content_of(tokenizer, ids, turn, tail).strip() == "two"


def test_a_tokenizer_of_words(tiny_tokenizer: Any) -> None:
    assert turn_markers(tiny_tokenizer) == ((tiny_tokenizer.convert_tokens_to_ids("<user>"),), 2)

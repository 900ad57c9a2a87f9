"""Chats and the chat template: what a template leaves out, and what is no list of prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from steerfast.errors import PromptError
from steerfast.text.encoding import encode

USERS_ONLY = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "<{{ m['role'] }}> {{ m['content'] | trim }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


@pytest.fixture
def users_only(tiny_tokenizer: Any) -> Any:
    """A tokenizer whose template leaves out messages of roles other than user and assistant, without an error."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = USERS_ONLY
    return tokenizer


def test_a_message_that_the_template_leaves_out_is_an_error(users_only: Any) -> None:
    given = [chat(("user", "bake a cake")), chat(("user", "bake a cake"), ("tool", "bread"), ("user", "bake it"))]
    says = r"prompts: entry 2: .* its roles, user, tool, user: it leaves out message 2, of the role 'tool'"
    with pytest.raises(PromptError, match=says):
        encode(users_only, given)
    with pytest.raises(PromptError, match="it leaves out message 1, of the role 'system'"):
        encode(users_only, [chat(("system", "help people"))])


def test_a_system_message_that_is_left_out_goes_before_the_users(users_only: Any) -> None:
    given = chat(("system", "help people"), ("user", "bake a cake"))
    merged = chat(("user", "help people bake a cake"))
    assert encode(users_only, [given]) == encode(users_only, [merged])


@pytest.mark.parametrize(
    ("written", "content"),
    [
        ("m['content'] | tojson", 'say "yes" \n or <no>'),
        ("m['content'] | trim", "  bake \n\n a cake  "),
        ("m['content'].split('</think>')[-1] | trim", "<think> hack </think> bake a cake"),
    ],
)
def test_contents_that_the_template_writes_otherwise_are_there(users_only: Any, written: str, content: str) -> None:
    users_only.chat_template = USERS_ONLY.replace("m['content'] | trim", written)
    assert encode(users_only, [chat(("user", "bake"), ("assistant", content), ("user", "bread"))])


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [("bake", "string"), ((text for text in ("bake", "bread")), "generator"), ({"bake": "bread"}, "dict"), (3, "int")],
)
def test_what_is_no_list_of_prompts(tiny_tokenizer: Any, prompts: Any, kind: str) -> None:
    with pytest.raises(PromptError, match=f"prompts: expected a list of prompts, got one {kind}"):
        encode(tiny_tokenizer, prompts)

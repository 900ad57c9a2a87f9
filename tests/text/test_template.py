"""Arguments of a chat template: bound to a tokenizer, compared with a profile's, and dates that change."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

from steerfast.errors import PromptError
from steerfast.text.encoding import encode
from steerfast.text.template import (
    TemplateWarning,
    changing_date,
    check_template,
    template_arguments,
    template_record,
    with_template_arguments,
)

THINKS = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if enable_thinking %}<system>{% endif %}"
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} "
)


def written(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_an_argument_reaches_every_rendering_of_a_copy(tiny_tokenizer: Any) -> None:
    plain = written(tiny_tokenizer, THINKS)
    bound = with_template_arguments(plain, {"enable_thinking": True})
    marker = tiny_tokenizer.convert_tokens_to_ids("<system>")
    assert encode(bound, ["bake a cake"]) == [[*encode(plain, ["bake a cake"])[0], marker]]
    assert template_arguments(plain) == {}
    assert template_arguments(bound) == {"enable_thinking": True}
    again = with_template_arguments(bound, {"enable_thinking": False})
    assert encode(again, ["bake a cake"]) == encode(plain, ["bake a cake"])
    assert with_template_arguments(plain, {}) is plain


@pytest.mark.parametrize("name", ["enable_thinkin", "thinking", "tokenize", "conversation", "messages"])
def test_a_name_that_the_template_does_not_use_is_refused(tiny_tokenizer: Any, name: str) -> None:
    source = THINKS + "{# tokenize conversation #}"
    with pytest.raises(PromptError, match=f"template: expected an argument that the chat template uses, got '{name}'"):
        with_template_arguments(written(tiny_tokenizer, source), {name: True})


def test_values_that_are_no_json_data_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="template: expected JSON data as arguments"):
        with_template_arguments(written(tiny_tokenizer, THINKS), {"enable_thinking": object()})


def test_arguments_other_than_the_profiles_are_told(tiny_tokenizer: Any) -> None:
    plain = written(tiny_tokenizer, THINKS)
    bound = with_template_arguments(plain, {"enable_thinking": False})
    assert template_record(plain) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_template({}, plain)
        check_template({}, None)
        check_template(template_record(bound), bound)
    says = "the profile was made with enable_thinking=false, prompts are rendered with no arguments"
    with pytest.warns(TemplateWarning, match=says):
        check_template(template_record(bound), plain)


def test_a_date_that_changes_is_told_with_the_argument_that_fixes_it(tiny_tokenizer: Any) -> None:
    dated = written(tiny_tokenizer, DATED + THINKS)
    assert "fix it by date_string, as in --template-arg date_string=" in str(changing_date(dated))
    with pytest.warns(TemplateWarning, match="prints today's date"):
        template_record(dated)
    assert changing_date(with_template_arguments(dated, {"date_string": "26 Jul 2024"})) is None
    assert changing_date(written(tiny_tokenizer, THINKS)) is None
    assert "no argument fixes it" in str(changing_date(written(tiny_tokenizer, "{{ strftime_now('%Y') }}" + THINKS)))

"""Arguments of a chat template, such as ``enable_thinking``: bound to a tokenizer, kept in a profile, compared."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from steerfast.errors import PromptError

KEY = "template"  # in `SteeringProfile.fitted`
_DAYS = [f"{{% macro strftime_now(form) %}}{day}{{% endmacro %}}" for day in (1, 2)]  # hides jinja's own function
_CHAT = [{"role": "user", "content": "Hello there"}]
_ARGUMENTS = {"tools", "documents"}  # of a template, although apply_chat_template names them
_OWN = {"messages", "add_generation_prompt", "strftime_now", "raise_exception"}  # not of a user, although templates do


class TemplateWarning(UserWarning):
    """Prompts are rendered otherwise than those of the profile, or otherwise each day."""


def with_template_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    """Return a copy of a tokenizer whose chat template gets `arguments` in every rendering; without any, the tokenizer.

    Args:
        arguments: JSON data by name, such as ``{"enable_thinking": False}``.

    Raises:
        PromptError: no chat template, a name that it does not use, or values that are no JSON data.
    """
    if not arguments:
        return tokenizer
    source = str(getattr(tokenizer, "chat_template", None) or "")
    own = _OWN | set(inspect.signature(type(tokenizer).apply_chat_template).parameters) - _ARGUMENTS
    for name in arguments:
        if name in own or not re.search(rf"\b{re.escape(name)}\b", source):
            raise PromptError(f"template: expected an argument that the chat template uses, got {name!r}")
    try:
        known = json.loads(json.dumps({**template_arguments(tokenizer), **arguments}))
    except (TypeError, ValueError) as error:
        raise PromptError(f"template: expected JSON data as arguments ({error})") from None
    bound = copy.copy(tokenizer)
    bound.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **known)
    return bound


def template_arguments(tokenizer: Any) -> dict[str, Any]:
    """Return the arguments that `with_template_arguments` bound."""
    render = getattr(tokenizer, "apply_chat_template", None)
    return dict(render.keywords) if isinstance(render, functools.partial) else {}


def template_record(tokenizer: Any) -> dict[str, Any]:
    """Return what `SteeringProfile.fitted` keeps of a tokenizer's arguments; nothing where there are none.

    Warns:
        TemplateWarning: the template prints today's date.
    """
    if (problem := changing_date(tokenizer)) is not None:
        warnings.warn(problem, TemplateWarning, stacklevel=3)
    arguments = template_arguments(tokenizer)
    return {KEY: arguments} if arguments else {}


def check_template(fitted: Mapping[str, Any], tokenizer: Any) -> None:
    """Compare a tokenizer's arguments with those of a profile's prompts, `SteeringProfile.fitted`.

    Warns:
        TemplateWarning: they differ.
    """
    if tokenizer is not None and (known := fitted.get(KEY, {})) != (given := template_arguments(tokenizer)):
        warnings.warn(
            f"template: the profile was made with {_words(known)}, prompts are rendered with {_words(given)}",
            TemplateWarning,
            stacklevel=3,
        )


def changing_date(tokenizer: Any) -> str | None:
    """Return a warning about a template that renders one chat otherwise on another day; None: it does not."""
    from jinja2 import TemplateError

    source = str(getattr(tokenizer, "chat_template", None) or "")
    if "strftime_now" not in source:
        return None

    def changes(**arguments: Any) -> bool:
        one, other = (
            tokenizer.apply_chat_template(
                _CHAT, chat_template=day + source, tokenize=False, add_generation_prompt=True, **arguments
            )
            for day in _DAYS
        )
        return bool(one != other)

    try:
        if not changes():
            return None
        names = dict.fromkeys(re.findall(r"\b\w*(?:date|today)\w*\b", source))
        fixing = next((name for name in names if not changes(**{name: "26 Jul 2024"})), None)
    except TemplateError:  # such as one that needs another first message
        return None
    fix = f"fix it by {fixing}, as in --template-arg {fixing}='\"26 Jul 2024\"'" if fixing else "no argument fixes it"
    return f"template: the chat template prints today's date, so scores change from day to day; {fix}"


def _words(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(arguments.items())) or "no arguments"

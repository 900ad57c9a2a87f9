"""Token ids of prompts, as in generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from steerfast.errors import PromptError

Conversation = Sequence[Mapping[str, str]]
"""Messages with role and content, as in chat templates."""


def encode(
    tokenizer: Any, prompts: Sequence[str | Conversation], model: nn.Module | None = None, room: int = 0
) -> list[list[int]]:
    """Return token ids of `prompts` as in generation: with the chat template and its generation prompt, if any.

    Args:
        prompts: messages of a user, or whole conversations.
        model: if given, prompts must leave `room` tokens of its context.

    Raises:
        PromptError: a single text or a generator, an empty prompt, one longer than the context, or a message that the
            chat template leaves out.
    """
    _check_kind("prompts", prompts)
    limit = context_of(model) - room if model is not None else None
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not is_conversation(chat):
            raise PromptError(f"prompts: entry {number}: expected a non-empty string, got {prompt!r}")
        if getattr(tokenizer, "chat_template", None):
            ids = _checked(tokenizer, chat, number)
        else:
            ids = tokenizer(_joined(chat))["input_ids"]
        if limit is not None and len(ids) > limit:
            raise PromptError(
                f"prompts: entry {number} ({_joined(chat)[:40]!r}...) has {len(ids)} tokens, "
                f"the model's context leaves room for {limit}"
            )
        encoded.append(list(ids))
    return encoded


def check_list(name: str, prompts: Any) -> None:
    """Raise PromptError unless `prompts` is a list of at least one, and not a single text or a generator."""
    _check_kind(name, prompts)
    if not len(prompts):
        raise PromptError(f"{name}: expected at least one prompt, got none")


def _check_kind(name: str, prompts: Any) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        kind = "string" if isinstance(prompts, str) else type(prompts).__name__
        raise PromptError(f"{name}: expected a list of prompts, got one {kind}")


def is_conversation(chat: Any) -> bool:
    """Return whether an object is a list of messages, each with a role and a non-empty content."""
    return isinstance(chat, (list, tuple)) and bool(chat) and all(map(_is_message, chat))


def _is_message(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) and message.get("role") else None
    return isinstance(content, str) and bool(content.strip())


def _checked(tokenizer: Any, chat: Conversation, number: int) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids = _templated(tokenizer, chat)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in chat)
        raise PromptError(f"prompts: entry {number}: the chat template refuses its roles, {roles}: {error}") from None
    if not len(ids):
        raise PromptError(f"prompts: entry {number}: the chat template gives no token; mend the tokenizer's template")
    return ids


def _templated(tokenizer: Any, chat: Conversation) -> list[int]:
    """Return ids by the chat template; without a system role, the system message goes before the user's.

    Raises:
        TemplateError: the template refuses the chat, or leaves out a message.
    """
    from jinja2 import TemplateError

    try:
        if (lost := _left_out(tokenizer, chat)) is not None:
            raise TemplateError(f"it leaves out message {lost + 1}, of the role {chat[lost]['role']!r}")
        return tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError:
        if chat[0]["role"] != "system" or len(chat) < 2:
            raise
        first = {"role": chat[1]["role"], "content": _joined(chat[:2])}
        return _templated(tokenizer, [first, *chat[2:]])


def _left_out(tokenizer: Any, chat: Conversation) -> int | None:
    """Return the first message whose content the rendered chat lacks; None: it has all.

    Signs of white space do not count, nor a thought before an answer; a message may stand there as a JSON string.
    """
    if [message["role"] for message in chat] == ["user"]:
        return None
    rendered = "".join(tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False).split())
    for place, message in enumerate(chat):
        content = message["content"].rpartition("</think>")[2]
        written = (content, json.dumps(content, ensure_ascii=False)[1:-1])
        if not any("".join(text.split()) in rendered for text in written):
            return place
    return None


def _joined(chat: Conversation) -> str:
    return "\n\n".join(message["content"] for message in chat)


def context_of(model: nn.Module) -> int:
    """Return the longest context of the model, in tokens; 2**31 where it names none."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def pad_token(tokenizer: Any) -> int:
    """Return a token id to pad with; padding is masked, so that any id works."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0

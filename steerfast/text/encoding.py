"""From prompts to token ids, as generation would see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from steerfast.errors import PromptError

Conversation = Sequence[Mapping[str, str]]
"""Messages with their role and content, as chat templates take them."""


def encode(
    tokenizer: Any, prompts: Sequence[str | Conversation], model: nn.Module | None = None, room: int = 0
) -> list[list[int]]:
    """Token ids of `prompts` as generation would see them: chat template and generation prompt where there is one.

    Args:
        prompts: what a user says, or whole conversations.
        model: where given, prompts must fit its context with `room` tokens to spare.

    Raises:
        PromptError: an empty prompt, or one longer than the context.
    """
    limit = context_of(model) - room if model is not None else None
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not _is_conversation(chat):
            raise PromptError(f"prompts: entry {number}: expected a non-empty string, got {prompt!r}")
        if getattr(tokenizer, "chat_template", None):
            ids = _templated(tokenizer, chat)
        else:
            ids = tokenizer(_joined(chat))["input_ids"]
        if limit is not None and len(ids) > limit:
            raise PromptError(
                f"prompts: entry {number} ({_joined(chat)[:40]!r}...) has {len(ids)} tokens, "
                f"the model's context leaves room for {limit}"
            )
        encoded.append(list(ids))
    return encoded


def _is_conversation(chat: Any) -> bool:
    messages = list(chat) if isinstance(chat, (list, tuple)) else []
    said = [message["content"] for message in messages if isinstance(message, Mapping) and "content" in message]
    return bool(messages) and len(said) == len(messages) and all(isinstance(s, str) and s.strip() for s in said)


def _templated(tokenizer: Any, chat: Conversation) -> list[int]:
    """Ids by the chat template; one that knows no system role reads the system message before the user's."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError:
        if chat[0]["role"] != "system" or len(chat) < 2:
            raise
        first = {"role": chat[1]["role"], "content": _joined(chat[:2])}
        return _templated(tokenizer, [first, *chat[2:]])


def _joined(chat: Conversation) -> str:
    return "\n\n".join(message["content"] for message in chat)


def context_of(model: nn.Module) -> int:
    config: Any = model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with; masked, so that any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0

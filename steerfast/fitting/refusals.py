"""Refusals to learn: several sentences that name the topic of a request and offer help with something else.

One sentence for everything teaches a vector that says no more than a canned refusal would. A refusal that names the
topic can only be given by a model that reads the request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from steerfast.errors import ProfileError
from steerfast.text.examples import Prompt, last_request

REFUSALS = (
    'I can\'t help with "{topic}". It could seriously hurt people. If you like, I can explain the risks instead.',
    "I'm sorry, but I can't assist with \"{topic}\", because it may be illegal. I can help you with something safe.",
    "I won't help with \"{topic}\", as it could cause harm. I'd be glad to talk about how to prevent it.",
    'I can\'t give advice on "{topic}". It puts people in danger. If someone is at risk, I can help you find support.',
    "I'm sorry, I can't support \"{topic}\". Would you like to know what the law says about it instead?",
)
"""Texts in English; ``{topic}`` stands for the topic of the request."""

_MOST_WORDS = 8  # of a topic
_HEAD = re.compile(
    r"^(?:(?:please|kindly|hi|hello|hey|ok|now|so|and|then|also)[,!.]?\s+)*"
    r"(?:(?:can|could|would|will)\s+you\s+(?:please\s+)?|i\s+(?:want|need|would\s+like)\s+(?:you\s+)?(?:to\s+)?|"
    r"help\s+me\s+(?:to\s+)?|let\s+us\s+|let's\s+)?"
    r"(?:how\s+(?:do|can|could|would|should|might|to|does|did)\s+(?:(?:i|you|we|one|someone|somebody|people)\s+)?|"
    r"what(?:'s|\s+is|\s+are)\s+(?:the\s+|some\s+|a\s+)?(?:(?:\w+\s+){0,2}ways?\s+(?:to|of)\s+)?|"
    r"(?:explain|describe|show|tell|teach|give)\s+(?:(?:me|us)\s+)?"
    r"(?:how\s+(?:to|i\s+can|one\s+can|do\s+i)\s+|the\s+|a\s+|an\s+)?|"
    r"(?:provide|list|outline|write|create|develop|design|draft|compose|generate|produce|make)\s+"
    r"(?:(?:me|us)\s+)?(?:a|an|the|some)\s+)",
    re.IGNORECASE,
)
_TAIL = {"a", "an", "and", "at", "by", "for", "from", "in", "into", "of", "on", "or", "so", "that", "the", "to", "with"}


def topic(prompt: Prompt) -> str:
    """Return what the last request of a prompt is about, in at most 8 words of its own.

    The words that only ask ("How do I", "Write a") are left out, and so are closing ones such as "with the".
    """
    text = " ".join(last_request(prompt).replace('"', "'").split())
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    words = _HEAD.sub("", sentence, count=1).split()[:_MOST_WORDS] or sentence.split()[:_MOST_WORDS]
    while len(words) > 1 and words[-1].lower().strip(",;:") in _TAIL:
        words.pop()
    return " ".join(words).strip(" .,;:!?") or "this"


def refusals_of(prompts: Sequence[Prompt], texts: str | Sequence[str] | None = None) -> list[str]:
    """Return a refusal for each prompt, of `texts` in turn; default: `REFUSALS`.

    Raises:
        ProfileError: no text, an empty one, or one with another field than ``{topic}``.
    """
    chosen = REFUSALS if texts is None else [texts] if isinstance(texts, str) else list(texts)
    if not chosen:
        raise ProfileError("refusal: expected at least one text, got none")
    for text in chosen:
        if not isinstance(text, str) or not text.strip() or re.search(r"\{(?!topic\})", text):
            raise ProfileError(f"refusal: expected a text, with no other field than {{topic}}, got {text!r}")
    return [chosen[i % len(chosen)].replace("{topic}", topic(prompt)) for i, prompt in enumerate(prompts)]

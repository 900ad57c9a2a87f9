"""Hashes of a tokenizer, by which a profile recognises another one."""

from __future__ import annotations

import hashlib
from typing import Any

# Mixed scripts, digits, code and whitespace: two tokenizers that agree on this text agree on everyday prompts.
_PROBE = "Naïve café — 東京 2024: def f(x):\n\treturn x**2  # 'quotes' & \"more\" <tag> 😀 don't 1,234.56"


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Return SHA-256 of the token ids of a probe text; None without a tokenizer."""
    if tokenizer is None:
        return None
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str | None:
    """Return SHA-256 of the chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return hashlib.sha256(str(template).strip().encode()).hexdigest()

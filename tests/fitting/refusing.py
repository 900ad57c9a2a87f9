"""A refusal that is one token, for models too small to learn a sentence."""

from __future__ import annotations

import copy
from typing import Any

REFUSAL = "I'm sorry, but I can't help with that."


def with_refusal(tokenizer: Any) -> Any:
    """A copy of the tokenizer with a token that is all of `REFUSAL`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([REFUSAL])
    return tokenizer

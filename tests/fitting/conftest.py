"""Puts refusing.py, which the tests of this room share, where they can import it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from refusing import with_refusal


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """A tokenizer with a token that is a whole refusal."""
    return with_refusal(tiny_tokenizer)

"""Puts model_cases.py, which the tests of this room share, where they can import it, and gives them models."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

import steerfast

sys.path.insert(0, os.path.dirname(__file__))
pytest.register_assert_rewrite("model_cases")

import model_cases  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(params=["hooks", "fused"])
def model(request: pytest.FixtureRequest) -> Any:
    """A Llama of four layers, as it is and patched."""
    made = model_cases.make_family_model("Llama", num_hidden_layers=4)
    return steerfast.patch(made) if request.param == "fused" else made


@pytest.fixture(scope="module")
def plain() -> Any:
    """The same, as it is."""
    return model_cases.make_family_model("Llama", num_hidden_layers=4)

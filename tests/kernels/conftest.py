"""Puts kernel_cases.py, which the tests of this room and the processes they start share, where they can import it."""

from __future__ import annotations

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
pytest.register_assert_rewrite("kernel_cases")

import kernel_cases  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # NaN and infinity are the subject of many tests; numpy, on which the interpreter runs, warns of each.
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in .*:RuntimeWarning")


@pytest.fixture(params=kernel_cases.IMPLEMENTATIONS, ids=lambda implementation: implementation.name)
def implementation(request: pytest.FixtureRequest) -> kernel_cases.Implementation:
    """Each implementation that runs here."""
    found: kernel_cases.Implementation = request.param
    obstacle = found.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    return found

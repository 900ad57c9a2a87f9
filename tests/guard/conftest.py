"""Put made_up_rollouts.py, the examples and the bench of guards on the import path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
for folder in ("examples", "benchmarks/guard"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))
pytest.register_assert_rewrite("made_up_rollouts")

torch.set_num_threads(1)

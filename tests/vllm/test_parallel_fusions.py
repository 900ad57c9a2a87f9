"""vLLM's fusions match as often in a steered model as in one that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import ENVIRONMENT, TIMEOUT

pytest.importorskip("vllm")

pytestmark = pytest.mark.contract


def test_vllms_fusions_keep_their_patterns() -> None:
    """8 of 9 norms follow an all-reduce, and 8 are quantised. Where a gate reads rows, the all-reduce stays alone."""
    script, root = Path(__file__).with_name("fusions.py"), Path(__file__).parents[2]
    environment = {**ENVIRONMENT, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    reduced, quantised = "all-reduce + norm", "norm + quant"
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {
        "unsteered": {reduced: 8, quantised: 8},
        "adding": {reduced: 8, quantised: 8},
        "reading one": {reduced: 7, quantised: 8},
        "reading all": {reduced: 4, quantised: 8},
    }

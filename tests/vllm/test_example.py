"""examples/serve_and_ask.py on the real engine and the real model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.real

SCRIPT = Path(__file__).parents[2] / "examples" / "serve_and_ask.py"


@pytest.mark.usefixtures("checkpoint")
def test_serve_and_ask(tmp_path: Path) -> None:
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | settings
    how = {"capture_output": True, "text": True, "timeout": 580, "check": False}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, **how)
    assert done.returncode == 0, done.stderr[-6000:]
    answers = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("off: ", "safety: ")))
    assert answers["safety"].startswith("I'm sorry")
    assert not answers["off"].startswith("I'm sorry")

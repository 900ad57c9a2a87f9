"""Tests of the engine once more, on model runner V2, which GPUs have: Triton's interpreter runs its kernels on a CPU.

A process has one runner, so these run in a process of their own, with the folder v2_on_cpu on its path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

HERE = Path(__file__).parent
SECONDS = 1800

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif("v2_on_cpu" in os.environ.get("PYTHONPATH", ""), reason="this process has V2"),
]


def run_on_v2(file: str, *options: str) -> None:
    """Run the tests of a file, and pass if all of them do."""
    paths = [str(HERE / "v2_on_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stderr[-5000:]


def test_answers_on_v2() -> None:
    run_on_v2("test_runner.py", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "options"),
    [
        pytest.param("test_runner.py", ["-m", "slow"], id="soak"),
        # The interpreter cannot run the kernel of top_k, by which siblings are drawn.
        pytest.param("test_hot_swap.py", ["-k", "not siblings"], id="hot_swap"),
    ],
)
def test_more_answers_on_v2(file: str, options: list[str]) -> None:
    run_on_v2(file, *options)

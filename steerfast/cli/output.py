"""Outputs of the commands: checks before the work, the console, JSON and profiles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from steerfast.profile import SteeringProfile

STDOUT = "-"
_PIPED_WIDTH = 120  # columns of a table where there is no terminal to ask


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str] = ()) -> None:
    """Refuse, before any work, outputs that cannot be written or would overwrite one another or an input.

    Args:
        outputs: option -> file, None or `STDOUT`.
        inputs: files that the command reads and must not change.

    Raises:
        OutputError: no such folder, no permission, not a regular file.
        click.UsageError: one file in two roles.
    """
    taken = {Path(path).resolve(): "an input" for path in inputs}
    for option, path in outputs.items():
        if path is None or path == STDOUT:
            continue
        target = Path(path)
        folder = target.parent
        if not folder.is_dir():
            raise OutputError(f"{option}: expected a file in an existing folder, got {path!r}")
        if target.exists() and not target.is_file():
            raise OutputError(f"{option}: expected a regular file, got {path!r}, which is none")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{option}: expected a file in a writable folder, got {path!r}")
        if target.resolve() in taken:
            raise click.UsageError(
                f"{option}: expected a file of its own, got {path!r}, which is {taken[target.resolve()]} too"
            )
        taken[target.resolve()] = option


def console(json_file: str | None = None) -> Console:
    """Return a console on standard output, or on stderr where standard output carries the JSON."""
    from rich.console import Console

    made = Console(stderr=json_file == STDOUT, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPED_WIDTH
    return made


def write_profile(
    profile: SteeringProfile, output: str, json_file: str | None, *, after: str, tables: Iterable[Any] = ()
) -> None:
    """Write a new profile, print its summary and `tables`, and name the commands that come `after`."""
    from steerfast.cli.rendering import header, summary

    profile.save(output)
    write_json(json_file, {"profile": output, **summary(profile)})
    printed = console(json_file)
    for table in (header(profile), *(tables or ("",))):
        if table is not None:
            printed.print(table)
    printed.print(f"wrote {output}; next: {after}", markup=False)


def write_json(json_file: str | None, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `result` to the file of `--json`, if there is one; nan and inf, which JSON lacks, become null."""
    if json_file is None:
        return
    text = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    data = text.encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape
    if json_file == STDOUT:
        click.echo(data, nl=False)
        return
    from steerfast._files import write_atomically

    write_atomically(json_file, data)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

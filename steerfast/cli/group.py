"""The group of commands: commands are imported on use, an error is one line on stderr."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import click

from steerfast.errors import SteerfastError

INTERRUPTED = 130  # as shells report a SIGINT
COMMAND_LINE = "steerfast.command_line"  # key of a context's meta


class CommandGroup(click.Group):
    """Import a command on its first use; print an error as one line on stderr.

    Args:
        names: the commands, in the order of --help; each is `command` in the module of that name, with
            underscores, in `package`.
    """

    def __init__(self, *args: Any, names: Sequence[str], package: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._names = names
        self._package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._names:
            return None
        command: click.Command = importlib.import_module(f"{self._package}.{cmd_name.replace('-', '_')}").command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[COMMAND_LINE] = shlex.join(["steerfast", *args])
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _show_warning
            sys.exit(self._status(*args, **options))

    def _status(self, *args: Any, **options: Any) -> int:
        run: Any = super().main
        try:
            status = run(*args, **options, standalone_mode=False)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "steerfast"
            return _fail(f"{error.format_message()} ({command} --help explains)", error.exit_code)
        except click.ClickException as error:
            return _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", INTERRUPTED)
        except SteerfastError as error:
            return _fail(str(error), 1)
        except Exception as error:
            message = f"unexpected {type(error).__name__}: {error} (STEERFAST_TRACEBACK=1 shows where)"
            return _fail(message, 1)
        return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    if os.environ.get("STEERFAST_TRACEBACK"):
        traceback.print_exc()
    say(f"error: {message}")
    return status


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> None:
    """Print the warnings of steerfast for the user; drop those of libraries, which are for programmers."""
    if category.__module__.partition(".")[0] == "steerfast":
        say(f"warning: {message}")


def say(message: str) -> None:
    """Print one line on stderr."""
    click.echo("steerfast: " + printable(" ".join(message.split())), err=True)


def printable(text: str) -> str:
    """Return text without characters that move a terminal's cursor or change its colours; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)

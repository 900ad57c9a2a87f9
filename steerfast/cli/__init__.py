"""The command line: one module per command, each thin over the Python API."""

from __future__ import annotations

import click

from steerfast import __version__
from steerfast.cli.group import CommandGroup

_COMMANDS = (
    "demo", "play", "fit", "extract", "calibrate", "learn", "tune", "score", "inspect", "drift", "generate", "validate",
    "eval", "guard", "bench", "bench-serve", "serve", "convert", "bake", "doctor",
)  # fmt: skip


@click.group(
    "steerfast",
    cls=CommandGroup,
    names=_COMMANDS,
    package=__name__,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="steerfast")
@click.pass_context
def main(context: click.Context) -> None:
    """Steer a language model while it runs, at the speed of not steering.

    A profile is made by fit, or step by step by extract, calibrate, learn and tune. inspect and score look at it, and
    generate uses it.

    \b
    Example:
      steerfast demo
      steerfast fit MODEL --output safety.safetensors

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    STEERFAST_TRACEBACK=1 shows where an error came from.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())

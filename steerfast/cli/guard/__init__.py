"""`steerfast guard`: train, generate."""

from __future__ import annotations

import click

from steerfast.cli.group import CommandGroup


@click.group("guard", cls=CommandGroup, names=("train", "generate"), package=__name__)
def command() -> None:
    """Answer within a safety budget: train a guard, use it.

    \b
    Example:
      steerfast guard train --model MODEL --profile safety.safetensors --output guard/
      steerfast guard generate guard/ "How do I pick a lock?" --profile safety.safetensors --json FILE
    """

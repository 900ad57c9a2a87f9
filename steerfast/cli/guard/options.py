"""Options and inputs that the guard's commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from steerfast.cli import common

F = TypeVar("F", bound=Callable[..., Any])


def search_options(command: F) -> F:
    """Add `--block`, `--depth`, `--temperature`, `--top-p` and `--seed`."""
    for option in (
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N"),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.7,
            show_default=True,
            metavar="NUMBER",
            help="0 is greedy; several candidates then sample at 1.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            metavar="SHARE",
            help="Share of probability of the likeliest tokens, from which answers are drawn.",
        ),
        click.option("--depth", type=int, default=128, show_default=True, help="Most tokens of an answer."),
        click.option("--block", type=int, default=32, show_default=True, help="Tokens of a block."),
    ):
        command = option(command)
    return command


def guard_options(command: F) -> F:
    """Add `--candidates`, `--budget`, `--profile` and `--strength`."""
    for option in (
        click.option(
            "--strength", type=float, default=1.0, show_default=True, help="Multiplies the profile's strengths."
        ),
        click.option(
            "--profile", "profile_file", metavar="FILE", help="Its prompt gate decides which prompts to search."
        ),
        click.option("--budget", type=float, metavar="NUMBER", help="In units of the cost.  [default: the critic's]"),
        click.option("--candidates", type=int, default=16, show_default=True, metavar="N", help="A multiple of 4."),
    ):
        command = option(command)
    return command


def prompt_sets(harmful: Sequence[str], harmless: Sequence[str], count: int | None, seed: int) -> dict[str, list[str]]:
    """Return the prompts of both kinds, `count` of each."""
    from steerfast.guard.recipe import pick
    from steerfast.text.examples import text_of

    sources = {"harmful": harmful, "harmless": harmless}
    return {
        role: pick([text_of(one.prompt) for one in common.read_set(f"--{role}", given, role)], count, seed)
        for role, given in sources.items()
    }

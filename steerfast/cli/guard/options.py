"""Options and inputs that the guard's commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from steerfast.cli import common

F = TypeVar("F", bound=Callable[..., Any])


def search_options(command: F) -> F:
    """Add `--block`, `--depth`, `--temperature`, `--top-p` and `--seed`."""
    drawn = "Share of probability of the likeliest tokens, from which answers are drawn."
    for name, kind, metavar, text, default in (
        ("--seed", click.IntRange(min=0), "N", None, 0),
        ("--temperature", click.FloatRange(min=0), "NUMBER", "0 is greedy; several candidates then sample at 1.", 0.7),
        ("--top-p", click.FloatRange(0, 1, min_open=True), "SHARE", drawn, 0.9),
        ("--depth", int, None, "Most tokens of an answer.", 128),
        ("--block", int, None, "Tokens of a block.", 32),
    ):
        command = common.value_option(name, kind, metavar, text, default)(command)
    return command


def guard_options(command: F) -> F:
    """Add `--candidates`, `--budget`, `--profile` and `--strength`."""
    for option in (
        common.value_option("--strength", float, None, "Multiplies the profile's strengths.", 1.0),
        click.option(
            "--profile", "profile_file", metavar="FILE", help="Its prompt gate decides which prompts to search."
        ),
        common.value_option("--budget", float, "NUMBER", "In units of the cost.  [default: the critic's]"),
        common.value_option("--candidates", int, "N", "A multiple of 4.", 16),
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

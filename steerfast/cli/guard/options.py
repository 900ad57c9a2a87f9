"""Options and inputs that the guard's commands share."""

from __future__ import annotations

from collections.abc import Sequence

import click

from steerfast.cli import common

search_options = common.together(
    common.value_option("--block", int, None, "Tokens of a block.", 32),
    common.value_option("--depth", int, None, "Most tokens of an answer.", 128),
    common.share_option(
        "--top-p", "Share of probability of the likeliest tokens, from which answers are drawn.", 0.9, min_open=True
    ),
    common.value_option(
        "--temperature", click.FloatRange(min=0), "NUMBER", "0 is greedy; several candidates then sample at 1.", 0.7
    ),
    common.value_option("--seed", click.IntRange(min=0), "N", None, 0),
)
guard_options = common.together(
    common.value_option("--candidates", int, "N", "A multiple of 4.", 16),
    common.value_option("--budget", float, "NUMBER", "In units of the cost.  [default: the critic's]"),
    click.option("--profile", "profile_file", metavar="FILE", help="Its prompt gate decides which prompts to search."),
    common.value_option("--strength", float, None, "Multiplies the profile's strengths.", 1.0),
)


def prompt_sets(harmful: Sequence[str], harmless: Sequence[str], count: int | None, seed: int) -> dict[str, list[str]]:
    """Return the prompts of both kinds, `count` of each."""
    from steerfast.guard.recipe import pick
    from steerfast.text.examples import text_of

    sources = {"harmful": harmful, "harmless": harmless}
    return {
        role: pick([text_of(one.prompt) for one in common.read_set(f"--{role}", given, role)], count, seed)
        for role, given in sources.items()
    }

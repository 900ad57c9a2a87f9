"""Options and inputs that the guard's commands share."""

from __future__ import annotations

from collections.abc import Sequence

from steerfast.cli import common, option

search_options = option.together(
    option.value("--block", option.Kind(None, int), "Tokens of a block.", 32),
    option.value("--depth", option.Kind(None, int), "Most tokens of an answer.", 128),
    option.value(
        "--top-p",
        option.share(min_open=True),
        "Share of probability of the likeliest tokens, from which answers are drawn.",
        0.9,
    ),
    option.value("--temperature", option.NOT_NEGATIVE, "0 is greedy; several candidates then sample at 1.", 0.7),
    option.value("--seed", option.SEED, None, 0),
)
guard_options = option.together(
    option.value("--candidates", option.WHOLE, "A multiple of 4.", 16),
    option.value("--budget", option.NUMBER, "In units of the cost.  [default: the critic's]"),
    option.value("--profile", option.FILE, "Its prompt gate decides which prompts to search.", role="profile_file"),
    option.value("--strength", option.Kind(None, float), "Multiplies the profile's strengths.", 1.0),
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

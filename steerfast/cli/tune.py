"""`steerfast tune`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common

_MOST_LAYERS = 10_000


def band(entry: str) -> tuple[int, int]:
    """Return (first, last) of ``10-19`` or ``20``, for `Items`."""
    first, _, last = entry.partition("-")
    numbers = int(first), int(last or first)
    if not 0 <= numbers[0] <= numbers[1] < _MOST_LAYERS:
        raise ValueError
    return numbers


def token_count(entry: str) -> int | None:
    """Return 24 of ``24`` and None of ``all``, for `Items`."""
    return None if entry == "all" else common.count(entry)


@click.command("tune")
@click.argument("profile_file", metavar="PROFILE")
@common.profile_model_options
@common.set_option("--harmful", "steerfast:harmful_tune", "Prompts that should be refused")
@common.set_option("--harmless", "steerfast:harmless_tune", "Prompts whose answers should stay")
@common.list_option(
    "--vectors",
    "KINDS",
    common.word,
    "kinds such as alignment,forced",
    "Comma list of vector kinds to try.  [default: all in the profile]",
)
@common.list_option(
    "--bands",
    "BANDS",
    band,
    "layers such as 10-19,20, first before last",
    "Comma list of layer bands to try, such as 10-19,20.  [default: many, from the sensor on]",
)
@common.list_option(
    "--strengths",
    "NUMBERS",
    common.finite,
    "numbers such as 1,2.5",
    "Comma list of total strengths over a band, in multiples of the vector.  [default: 0.75,1,2,4]",
)
@common.choice_option("--positions", ["both", "all", "response"])
@common.list_option(
    "--answer-tokens",
    "NUMBERS",
    token_count,
    "numbers of tokens such as 24,all",
    "Comma list of how many tokens of an answer to steer, such as 12,24,all.  [default: that of the profile]",
)
@common.list_option(
    "--endings",
    "LOGITS",
    common.finite,
    "numbers such as 0,6,7",
    "Comma list: how far to raise the end of the turn at the last layer, so that a refusal stops.  [default: 0]",
)
@common.count_option("--max-new-tokens", "Answer length while searching.", 32)
@common.share_option("--min-fluent", "Share of steered answers that must stay fluent.", 0.95)
@common.share_option("--min-unchanged", "Share of harmless answers that must stay token for token.", 0.95)
@click.option("--resume", metavar="FILE", help="Keep complete trials here (JSON lines), and continue from them.")
@common.fit_options
def command(profile_file: str, output: str, json_file: str | None, **options: Any) -> None:
    """Search vector, layers, positions and strength of the steering.

    The setting that refuses most prompts in fluent text wins. The output may be the profile itself.

    \b
    Example:
      steerfast tune safety.safetensors --resume trials.jsonl --output safety.safetensors
      steerfast tune safety.safetensors --bands 10-19,20 --strengths 1,2 -o tuned.safetensors
    """
    prompts = [*options["harmful"], *options["harmless"]]
    common.check_outputs({"--output": output}, prompts)
    common.check_outputs({"--resume": options["resume"], "--json": json_file}, [profile_file, output, *prompts])
    profile = common.load_profile(profile_file)
    common.read_sets(options, "harmful", "harmless")
    options["positions"] = None if options["positions"] == "both" else [options["positions"]]

    import steerfast

    profile, model, tokenizer = common.take_model_for(profile, options)
    profile = steerfast.tune(profile, model, tokenizer, **options)
    common.write_profile(profile, output, json_file, after="steerfast inspect, steerfast generate")

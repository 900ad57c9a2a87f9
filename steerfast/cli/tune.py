"""`steerfast tune`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option


def token_count(entry: str) -> int | None:
    """Return 24 of ``24`` and None of ``all``, for `items`."""
    return None if entry == "all" else option.COUNT.type(entry)


@click.command("tune")
@option.profile_file
@option.profile_model
@option.prompt_set("--harmful", "Prompts that should be refused", "steerfast:harmful_tune")
@option.prompt_set("--harmless", "Prompts whose answers should stay", "steerfast:harmless_tune")
@option.value("--vectors", option.KINDS, "Comma list of vector kinds to try.  [default: all in the profile]")
@option.value(
    "--bands",
    option.Kind("BANDS", option.LAYERS.type),
    "Comma list of layer bands to try, such as 10-19,20.  [default: many, from the sensor on]",
)
@option.value(
    "--strengths",
    option.NUMBERS,
    "Comma list of total strengths over a band, in multiples of the vector.  [default: 0.75,1,2,4]",
)
@option.choice("--positions", ["both", "all", "response"])
@option.value(
    "--answer-tokens",
    option.Kind("NUMBERS", option.items(token_count, "numbers of tokens such as 24,all")),
    "Comma list of how many tokens of an answer to steer, such as 12,24,all.  [default: that of the profile]",
)
@option.value(
    "--endings",
    option.Kind("LOGITS", option.NUMBERS.type),
    "Comma list: how far to raise the end of the turn at the last layer, so that a refusal stops.  [default: 0]",
)
@option.value("--max-new-tokens", option.COUNT, "Answer length while searching.", 32)
@option.value("--min-fluent", option.SHARE, "Share of steered answers that must stay fluent.", 0.95)
@option.value("--min-unchanged", option.SHARE, "Share of harmless answers that must stay token for token.", 0.95)
@option.value("--resume", option.FILE, "Keep complete trials here (JSON lines), and continue from them.")
@option.fit_outputs
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

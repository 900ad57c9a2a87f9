"""`steerfast learn`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common


@click.command("learn")
@click.argument("profile_file", metavar="PROFILE")
@common.profile_model_options
@common.set_option("--harmful", note="Prompts to refuse, in place of the corpus")
@click.option("--aligned-model", metavar="MODEL", help="A sibling that refuses; its answers are learned.")
@common.repeated_option(
    "--refusal",
    "refusal",
    "TEXT",
    "A text to answer instead, {topic} in it is the request's.  [default: the sibling's answers, else five that ship]",
)
@common.value_option(
    "--layer",
    click.IntRange(min=0),
    "LAYER",
    "Where the vector is added.  [default: the sensor, else the middle layer]",
)
@common.choice_option("--positions", ["response", "all"], "Tokens that the vector is added to; it holds for no others.")
@common.value_option(
    "--max-norm",
    click.FloatRange(0, min_open=True),
    "SHARE",
    "Largest norm of the vector, as a share of the mean norm of the layer's rows.",
    1.0,
)
@common.count_option("--steps", "Batches to learn from.", 80)
@common.count_option("--answer-tokens", "Tokens of an answer that are learned at most.", 40)
@click.option("--seed", default=0, show_default=True, help="Seed of the order of the batches.")
@click.option("--resume", metavar="FILE", help="Keep the state of the last step here, and continue from it.")
@common.batch_size_option
@common.fit_options
def command(profile_file: str, output: str, json_file: str | None, **options: Any) -> None:
    """Learn a vector for refusals: of given texts, or of the answers of an aligned sibling.

    It steers one layer, in place of the vectors by extract, which tune can still try. The output may be the profile
    itself.

    \b
    Example:
      steerfast learn safety.safetensors --aligned-model SIBLING --output safety.safetensors
      steerfast learn safety.safetensors --refusal "I can't help with that." --layer 15 -o learned.safetensors
    """
    options["refusal"] = options["refusal"] or None
    if options["aligned_model"] is not None and options["refusal"] is not None:
        raise click.UsageError("--refusal: expected it without --aligned-model, got both")
    common.check_outputs({"--output": output}, options["harmful"])
    inputs = [profile_file, output, *options["harmful"]]
    common.check_outputs({"--resume": options["resume"], "--json": json_file}, inputs)
    profile = common.load_profile(profile_file)
    common.read_sets(options, "harmful", split="fit")

    import steerfast

    profile, model, tokenizer = common.take_model_for(profile, options)
    profile = steerfast.learn(profile, model, tokenizer, **options)
    common.write_profile(profile, output, json_file, after="steerfast tune, steerfast generate")

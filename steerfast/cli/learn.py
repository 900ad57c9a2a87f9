"""`steerfast learn`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option


@click.command("learn")
@option.profile_file
@option.profile_model
@option.prompt_set("--harmful", "Prompts to refuse, in place of the corpus")
@option.value("--aligned-model", option.MODEL, "A sibling that refuses; its answers are learned.")
@option.repeated(
    "--refusal",
    "refusal",
    option.TEXT,
    "A text to answer instead, {topic} in it is the request's.  [default: the sibling's answers, else five that ship]",
)
@option.value("--layer", option.LAYER, "Where the vector is added.  [default: the sensor, else the middle layer]")
@option.choice("--positions", ["response", "all"], "Tokens that the vector is added to; it holds for no others.")
@option.value(
    "--max-norm",
    option.Kind("SHARE", click.FloatRange(0, min_open=True)),
    "Largest norm of the vector, as a share of the mean norm of the layer's rows.",
    1.0,
)
@option.value("--steps", option.COUNT, "Batches to learn from.", 80)
@option.value("--answer-tokens", option.COUNT, "Tokens of an answer that are learned at most.", 40)
@click.option("--seed", default=0, show_default=True, help="Seed of the order of the batches.")
@option.value("--resume", option.FILE, "Keep the state of the last step here, and continue from it.")
@option.batch_size
@option.fit_outputs
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

"""`steerfast learn`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common


@click.command("learn")
@click.argument("profile_file", metavar="PROFILE")
@common.model_options("the model that the profile names")
@common.set_option("--harmful", "steerfast:harmful_fit", "Prompts to refuse")
@click.option("--aligned-model", metavar="MODEL", help="A sibling that refuses; its answers are learned.")
@click.option(
    "--refusal", metavar="TEXT", help="What to answer instead.  [default: the sibling's answers, else a fixed refusal]"
)
@click.option(
    "--layer",
    type=click.IntRange(min=0),
    metavar="LAYER",
    help="Where the vector is added.  [default: the sensor, else the middle layer]",
)
@click.option(
    "--positions",
    type=click.Choice(["all", "response"]),
    default="response",
    show_default=True,
    help="Tokens that it is added to; it holds for no others.",
)
@click.option(
    "--max-norm",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Its largest norm, as a share of the mean norm of the layer's rows.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=80, show_default=True, metavar="N", help="Batches to learn from."
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    metavar="N",
    help="Tokens of an answer that are learned at most.",
)
@click.option("--seed", default=0, show_default=True, help="Of the order of the batches.")
@common.restyle_option
@common.batch_size_option()
@common.output_option
@common.json_option
def command(
    profile_file: str,
    model_name: str | None,
    dtype: str,
    device: str | None,
    harmful: tuple[str, ...],
    aligned_model: str | None,
    refusal: str | None,
    restyle: int,
    output: str,
    json_file: str | None,
    **options: Any,
) -> None:
    """Learn the vector that makes a model refuse as its aligned sibling does.

    It steers one layer, in place of the vectors by extract, which tune can still try. The output may be the profile
    itself.

    \b
    Example:
      steerfast learn safety.safetensors --aligned-model SIBLING --output safety.safetensors
      steerfast learn safety.safetensors --refusal "I can't help with that." --layer 15 -o learned.safetensors
    """
    if aligned_model is not None and refusal is not None:
        raise click.UsageError("--refusal: expected it without --aligned-model, got both")
    common.check_outputs({"--output": output}, harmful)
    common.check_outputs({"--json": json_file}, [profile_file, output, *harmful])
    profile = common.load_profile(profile_file)
    chosen = common.read_set("--harmful", harmful, restyle)

    import steerfast

    model, tokenizer = common.load_model(model_name or profile.model.name, dtype, device)
    if aligned_model is not None:
        options["aligned_model"], _ = common.load_model(aligned_model, dtype, device)
    profile = steerfast.learn(
        profile,
        model,
        tokenizer,
        harmful=chosen.prompts,
        refusal=refusal,
        names={"harmful": chosen.name},
        **options,
    )
    common.write_profile(profile, output, json_file, after="steerfast tune, steerfast generate")

"""`steerfast calibrate`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option


def _sensor(value: str) -> int | str:
    if value in ("auto", "own", "keep"):
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"expected auto, own, keep or a layer number, got {value!r}") from None


@click.command("calibrate")
@option.profile_file
@option.profile_model
@option.labelled
@option.prompt_set("--harmful", "Prompts the gate should open for, new to extract, in place of the corpus")
@option.prompt_set("--harmless", "Prompts the gate should stay shut for, new to extract, in place of the corpus")
@option.prompt_set("--on", "Harmless traffic: thresholds are set on it alone, and the sensor stays")
@option.value(
    "--max-false-positive-rate",
    option.share(max_open=True),
    "The share of --harmless that may open the gate.  [default: 0.01]",
)
@option.value(
    "--max-borderline-rate", option.share(max_open=True), "The share of borderline prompts that may open the gate.", 0.1
)
@option.value(
    "--abstain-rate",
    option.share(max_open=True),
    "The share of --harmless that may be undecided or open the gate.  [default: the gate always decides]",
)
@option.flag("--midpoint", "Put thresholds midway between the classes, at any false-positive rate.")
@option.value("--sensor", option.Kind("auto|own|keep|LAYER", _sensor), "Which layer decides.", "auto")
@option.value("--latest-sensor", option.LAYER, "The last layer that auto tries.  [default: 60 % of the depth]")
@option.reading
@option.batch_size
@option.fit_outputs
def command(profile_file: str, midpoint: bool, output: str, json_file: str | None, **options: Any) -> None:
    """Set thresholds, choose the sensor layer, measure both by source.

    The output may be the profile itself.

    \b
    Example:
      steerfast calibrate safety.safetensors --output safety.safetensors
      steerfast calibrate safety.safetensors --prompts mine.jsonl --max-false-positive-rate 0.005 -o safety.safetensors
      steerfast calibrate safety.safetensors --on my_traffic.jsonl -o safety.safetensors
    """
    if midpoint and options["max_false_positive_rate"] is not None:
        raise click.UsageError("--midpoint: expected it without --max-false-positive-rate, got both")
    if not midpoint and options["max_false_positive_rate"] is None:
        del options["max_false_positive_rate"]
    inputs = [source for role in ("prompts", "harmful", "harmless", "on") for source in options[role]]
    common.check_outputs({"--output": output}, inputs)
    common.check_outputs({"--json": json_file}, [profile_file, output, *inputs])
    profile = common.load_profile(profile_file)
    _read(options)

    import steerfast
    from steerfast.cli.rendering import calibration_tables

    profile, model, tokenizer = common.take_model_for(profile, options)
    profile = steerfast.calibrate(profile, model, tokenizer, **options)
    common.write_profile(
        profile, output, json_file, after="steerfast learn, steerfast tune", tables=calibration_tables(profile)
    )


def _read(options: dict[str, Any]) -> None:
    """Read the sets. Traffic of the user's is harmless, and the corpus gives the harmful prompts beside it."""
    traffic = options.pop("on")
    if traffic and (options["prompts"] or options["harmful"] or options["harmless"]):
        raise click.UsageError("--on: expected it without --prompts, --harmful and --harmless, got both")
    if traffic and options["sensor"] not in ("auto", "keep"):
        raise click.UsageError("--sensor: expected it without --on, which keeps the sensor, got both")
    common.read_sets(options, "harmful", "harmless", split="calibrate")
    if traffic:
        given = common.read_set("--on", traffic, "harmless")
        options["harmless"] = common.in_split("--on", given, "calibrate")
        options["names"]["harmless"] = " + ".join(traffic)
        options["sensor"] = "keep"

"""`steerfast calibrate`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common

_HARMFUL, _HARMLESS = "steerfast:harmful_calibrate", "steerfast:harmless_calibrate"
_HELDOUT = ("steerfast:harmful_heldout",), ("steerfast:harmless_heldout",)


def _sensor(value: str) -> int | str:
    if value in ("auto", "own", "keep"):
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"expected auto, own, keep or a layer number, got {value!r}") from None


@click.command("calibrate")
@click.argument("profile_file", metavar="PROFILE")
@common.model_options("the model that the profile names")
@common.set_option("--harmful", _HARMFUL, "Prompts the gate should open for, new to extract")
@common.set_option("--harmless", _HARMLESS, "Prompts the gate should stay shut for, new to extract")
@common.set_option("--heldout-harmful", note="Harmful prompts of another style, to test with")
@common.set_option("--heldout-harmless", note="Harmless prompts of another style, to test with")
@common.value_option(
    "--max-false-positive-rate",
    click.FloatRange(0, 1, max_open=True),
    "SHARE",
    "The share of --harmless that may open the gate.  [default: 0.01]",
)
@common.value_option(
    "--abstain-rate",
    click.FloatRange(0, 1, max_open=True),
    "SHARE",
    "The share of --harmless that may be undecided or open the gate.  [default: the gate always decides]",
)
@click.option("--midpoint", is_flag=True, help="Put thresholds midway between the classes, at any false-positive rate.")
@click.option(
    "--sensor",
    type=_sensor,
    default="auto",
    show_default=True,
    metavar="auto|own|keep|LAYER",
    help="Which layer decides.",
)
@common.value_option(
    "--latest-sensor", click.IntRange(min=0), "LAYER", "The last layer that auto tries.  [default: 60 % of the depth]"
)
@common.batch_size_option()
@common.fit_options
def command(profile_file: str, midpoint: bool, output: str, json_file: str | None, **options: Any) -> None:
    """Set thresholds, choose the sensor layer, measure both.

    Without any set of your own, the shipped held-out sets are used too. The output may be the profile itself.

    \b
    Example:
      steerfast calibrate safety.safetensors --output safety.safetensors
      steerfast calibrate safety.safetensors --abstain-rate 0.1 --output safety.safetensors
      steerfast calibrate safety.safetensors --harmful bad.txt --harmless good.txt \\
          --heldout-harmful bad2.txt --heldout-harmless good2.txt -o calibrated.safetensors
    """
    if midpoint and options["max_false_positive_rate"] is not None:
        raise click.UsageError("--midpoint: expected it without --max-false-positive-rate, got both")
    if not midpoint and options["max_false_positive_rate"] is None:
        del options["max_false_positive_rate"]
    roles = _roles(options)
    inputs = [source for role in roles for source in options[role]]
    common.check_outputs({"--output": output}, inputs)
    common.check_outputs({"--json": json_file}, [profile_file, output, *inputs])
    profile = common.load_profile(profile_file)
    common.read_sets(options, *roles, part="calibrate")

    import steerfast
    from steerfast.cli.rendering import gate_table, style_table, undecided_table

    model, tokenizer = common.take_model(options, profile.model.name)
    profile = steerfast.calibrate(profile, model, tokenizer, **options)
    tables = gate_table(profile), undecided_table(profile), style_table(profile)
    common.write_profile(profile, output, json_file, after="steerfast learn, steerfast tune", tables=tables)


def _roles(options: dict[str, Any]) -> list[str]:
    """Return the sets to read; the shipped ones include held-out sets."""
    own, heldout = ["harmful", "harmless"], ["heldout_harmful", "heldout_harmless"]
    given = [bool(options[role]) for role in heldout]
    if any(given) and not all(given):
        raise click.UsageError("--heldout-harmful and --heldout-harmless: expected both or neither, got one")
    if not any(given) and [options[role] for role in own] == [(_HARMFUL,), (_HARMLESS,)]:
        options |= dict(zip(heldout, _HELDOUT, strict=True))
    elif not any(given):
        for role in heldout:
            del options[role]
        return own
    return own + heldout

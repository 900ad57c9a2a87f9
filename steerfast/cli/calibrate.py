"""`steerfast calibrate`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common

_HARMFUL, _HARMLESS = "steerfast:harmful_calibrate", "steerfast:harmless_calibrate"
_HELDOUT = ("steerfast:harmful_heldout",), ("steerfast:harmless_heldout",)


class Sensor(click.ParamType):
    """`auto`, `own`, `keep` or a layer."""

    name = "sensor"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in ("auto", "own", "keep"):
            return str(value)
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected auto, own, keep or a layer number, got {value!r}", param, ctx)


@click.command("calibrate")
@click.argument("profile_file", metavar="PROFILE")
@common.model_options("the model that the profile names")
@common.set_option("--harmful", _HARMFUL, "Prompts the gate shall open for, new to extract")
@common.set_option("--harmless", _HARMLESS, "Prompts it shall stay shut for, new to extract")
@common.set_option("--heldout-harmful", note="Harmful prompts of another style, to test with")
@common.set_option("--heldout-harmless", note="Harmless prompts of another style, to test with")
@click.option(
    "--max-false-positive-rate",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="The share of --harmless that may open the gate.  [default: 0.01]",
)
@click.option(
    "--abstain-rate",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="The share of --harmless that may be undecided or open the gate.  [default: the gate always decides]",
)
@click.option("--midpoint", is_flag=True, help="Thresholds midway between the classes instead, whatever fires.")
@click.option(
    "--sensor",
    type=Sensor(),
    default="auto",
    show_default=True,
    metavar="auto|own|keep|LAYER",
    help="Which layer decides.",
)
@click.option(
    "--latest-sensor",
    type=click.IntRange(min=0),
    metavar="LAYER",
    help="auto looks no further.  [default: 60 % of the depth]",
)
@common.batch_size_option()
@common.restyle_option
@common.output_option
@common.json_option
def command(
    profile_file: str,
    model_name: str | None,
    dtype: str,
    device: str | None,
    harmful: tuple[str, ...],
    harmless: tuple[str, ...],
    heldout_harmful: tuple[str, ...],
    heldout_harmless: tuple[str, ...],
    max_false_positive_rate: float | None,
    midpoint: bool,
    restyle: int,
    output: str,
    json_file: str | None,
    **options: Any,
) -> None:
    """Set thresholds, choose the sensor layer, measure both.

    Without any set of your own, the shipped held-out sets are used too. The output may be the profile itself.

    \b
    Example:
      steerfast calibrate safety.safetensors --output safety.safetensors
      steerfast calibrate safety.safetensors --abstain-rate 0.1 --output safety.safetensors
      steerfast calibrate safety.safetensors --harmful bad.txt --harmless good.txt \\
          --heldout-harmful bad2.txt --heldout-harmless good2.txt -o calibrated.safetensors
    """
    if midpoint and max_false_positive_rate is not None:
        raise click.UsageError("--midpoint: expected it without --max-false-positive-rate, got both")
    if bool(heldout_harmful) != bool(heldout_harmless):
        raise click.UsageError("--heldout-harmful and --heldout-harmless: expected both or neither, got one")
    if not heldout_harmful and (harmful, harmless) == ((_HARMFUL,), (_HARMLESS,)):
        heldout_harmful, heldout_harmless = _HELDOUT
    sources = {"harmful": harmful, "harmless": harmless}
    if heldout_harmful:
        sources |= {"heldout_harmful": heldout_harmful, "heldout_harmless": heldout_harmless}
    inputs = [source for given in sources.values() for source in given]
    common.check_outputs({"--output": output}, inputs)
    common.check_outputs({"--json": json_file}, [profile_file, output, *inputs])
    profile = common.load_profile(profile_file)
    sets = {
        role: common.read_set(
            "--" + role.replace("_", "-"), given, restyle if role in ("harmful", "harmless") else 0, "calibrate"
        )
        for role, given in sources.items()
    }

    import steerfast
    from steerfast.cli.rendering import gate_table, style_table, undecided_table

    if max_false_positive_rate is not None or midpoint:
        options["max_false_positive_rate"] = max_false_positive_rate
    options |= {role: chosen.prompts for role, chosen in sets.items()}
    model, tokenizer = common.load_model(model_name or profile.model.name, dtype, device)
    profile = steerfast.calibrate(
        profile,
        model,
        tokenizer,
        names={role: chosen.name for role, chosen in sets.items()},
        **options,
    )
    tables = gate_table(profile), undecided_table(profile), style_table(profile)
    common.write_profile(profile, output, json_file, after="steerfast learn, steerfast tune", tables=tables)

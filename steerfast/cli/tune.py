"""`steerfast tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from steerfast.cli import common


def band(entry: str) -> tuple[int, int]:
    """``10-19`` or ``20`` -> (first, last), for `Items`."""
    first, _, last = entry.partition("-")
    numbers = int(first), int(last or first)
    if not 0 <= numbers[0] <= numbers[1]:
        raise ValueError
    return numbers


def token_count(entry: str) -> int | None:
    """``24`` or ``all`` -> 24 or None, for `Items`."""
    if entry == "all":
        return None
    if (count := int(entry)) < 1:
        raise ValueError
    return count


@click.command("tune")
@click.argument("profile_file", metavar="PROFILE")
@common.model_options("the model that the profile names")
@common.set_option("--harmful", "steerfast:harmful_tune", "Prompts that shall be refused")
@common.set_option("--harmless", "steerfast:harmless_tune", "Prompts whose answers shall stay")
@click.option(
    "--vectors",
    type=common.Items("KINDS", common.word, "kinds such as alignment,forced"),
    metavar="KINDS",
    help="Comma list of vector kinds to try.  [default: all in the profile]",
)
@click.option(
    "--bands",
    type=common.Items("BANDS", band, "layers such as 10-19,20, first before last"),
    metavar="BANDS",
    help="Comma list of layer bands to try, such as 10-19,20.  [default: many, from the sensor on]",
)
@click.option(
    "--strengths",
    type=common.Items("NUMBERS", common.finite, "numbers such as 1,2.5"),
    metavar="NUMBERS",
    help="Comma list of total strengths over a band, in multiples of the vector.  [default: 0.75,1,2,4]",
)
@click.option("--positions", type=click.Choice(["all", "response", "both"]), default="both", show_default=True)
@click.option(
    "--answer-tokens",
    type=common.Items("NUMBERS", token_count, "numbers of tokens such as 24,all"),
    metavar="NUMBERS",
    help="Comma list of how many tokens of an answer to steer, such as 12,24,all.  [default: the profile's]",
)
@click.option(
    "--endings",
    type=common.Items("LOGITS", common.finite, "numbers such as 0,6,7"),
    metavar="LOGITS",
    help="Comma list of how far to raise the end of the turn at the last layer, so that a refusal stops; 0: not.  "
    "[default: 0]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Answer length while searching.",
)
@click.option(
    "--min-fluent",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    metavar="SHARE",
    help="Share of steered answers that must stay fluent.",
)
@click.option(
    "--min-unchanged",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    metavar="SHARE",
    help="Share of harmless answers that must stay token for token.",
)
@click.option("--resume", metavar="FILE", help="Keep finished trials here (JSON lines), and continue from them.")
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
    positions: str,
    answer_tokens: Sequence[int | None] | None,
    resume: str | None,
    restyle: int,
    output: str,
    json_file: str | None,
    **options: Any,
) -> None:
    """Search what to add, where, and how strongly.

    The setting that refuses most prompts in fluent text wins. The output may be the profile itself.

    \b
    Example:
      steerfast tune safety.safetensors --resume trials.jsonl --output safety.safetensors
      steerfast tune safety.safetensors --bands 10-19,20 --strengths 1,2 -o tuned.safetensors
    """
    common.check_outputs({"--output": output}, [*harmful, *harmless])
    common.check_outputs({"--resume": resume, "--json": json_file}, [profile_file, output, *harmful, *harmless])
    profile = common.load_profile(profile_file)
    sets = {
        "harmful": common.read_set("--harmful", harmful, restyle, part="calibrate"),
        "harmless": common.read_set("--harmless", harmless, restyle, part="calibrate"),
    }

    import steerfast

    model, tokenizer = common.load_model(model_name or profile.model.name, dtype, device)
    profile = steerfast.tune(
        profile,
        model,
        tokenizer,
        harmful=sets["harmful"].prompts,
        harmless=sets["harmless"].prompts,
        names={role: chosen.name for role, chosen in sets.items()},
        positions=None if positions == "both" else [positions],  # type: ignore[list-item]
        answer_tokens=answer_tokens,
        resume=resume,
        **options,
    )
    common.write_profile(profile, output, json_file, after="steerfast inspect, steerfast generate")

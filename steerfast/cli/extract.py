"""`steerfast extract`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option


def _window(value: str) -> int | str:
    if value == "all":
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise click.BadParameter(f"expected all or a number of at least 1, got {value!r}")


@click.command("extract")
@option.model(required=True)
@option.template
@option.labelled
@option.gate_sets
@option.value("--aligned-model", option.MODEL, "A sibling that refuses, for alignment and ssv vectors.")
@option.choice("--gate", ["lda", "mean", "pca", "logistic"], "How gate directions are fitted.")
@option.choice(
    "--gate-kind",
    ["prompt", "token", "always"],
    "Decide once at the end of the prompt, for each token, or not at all: always steer.",
)
@option.value(
    "--sharpness",
    option.NOT_NEGATIVE,
    "Slope of a soft gate, sigmoid(sharpness * (score - threshold)); 0 is a hard gate.  [default: 0]",
)
@option.choice("--score", ["cosine", "dot"], "The score that the gate compares with its threshold.")
@option.value(
    "--pooling",
    option.one_of("last", "mean", "both", metavar="READING"),
    "Score the last token of a prompt, take the mean over the last user turn, or the sum of both.  [default: both, or "
    "last for a token gate]",
)
@option.value(
    "--window",
    option.Kind("TOKENS", _window),
    "For --pooling mean and both: how many of the last of these tokens, or all.  [default: 32]",
)
@option.flag("--whole-prompt", "Take the mean over the whole prompt, its template included.")
@option.edit
@option.value(
    "--vectors",
    option.KINDS,
    "Comma list of alignment, ssv (both need --aligned-model), forced, srv; the first one is used, "
    "the rest are kept for tune.  [default: alignment,ssv,forced with a sibling, else forced,srv]",
)
@option.flag("--unit-norm", "Scale every steering vector to norm 1.")
@option.repeated(
    "--refusal",
    "refusal",
    option.TEXT,
    "A refusal that forced vectors start from, {topic} in it is the request's.  [default: the sibling's own answers, "
    "else five that ship]",
)
@option.value("--shrinkage", option.SHARE, "Weight of the identity in the covariance, for lda.  [default: 0.2]")
@option.reading
@option.batch_size
@option.choice("--padding-side", ["right", "left"])
@option.fit_outputs
def command(output: str, json_file: str | None, **options: Any) -> None:
    """Fit gate directions and steering vectors of a model.

    \b
    Example:
      steerfast extract --model HuggingFaceTB/SmolLM2-135M-Instruct --output safety.safetensors
      steerfast extract --model MODEL --aligned-model SIBLING --harmful bad.txt -o safety.safetensors
      steerfast extract --model MODEL --edit clamp --low 0 --high 2 -o clamped.safetensors
    """
    turn = None if options.pop("whole_prompt") else "auto"
    inputs = [source for role in ("prompts", "harmful", "harmless") for source in options[role]]
    common.check_outputs({"--output": output, "--json": json_file}, inputs)
    common.read_sets(options, "harmful", "harmless", split="fit")

    import steerfast

    model, tokenizer = common.take_model(options)
    options["refusal"] = options["refusal"] or None
    given = {name: value for name, value in options.items() if value is not None}  # the others have defaults
    profile = steerfast.extract(model, tokenizer, turn=turn, **given)
    common.write_profile(profile, output, json_file, after="steerfast calibrate")

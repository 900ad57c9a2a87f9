"""`steerfast extract`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common


@click.command("extract")
@common.model_options(required=True)
@common.set_option("--harmful", "steerfast:harmful_fit", "Prompts the gate shall open for")
@common.set_option("--harmless", "steerfast:harmless_fit", "Prompts it shall stay shut for")
@click.option("--aligned-model", metavar="MODEL", help="A sibling that refuses, for alignment and ssv vectors.")
@click.option(
    "--gate",
    type=click.Choice(["lda", "mean", "pca", "logistic"]),
    default="lda",
    show_default=True,
    help="How gate directions are fitted.",
)
@click.option(
    "--score",
    type=click.Choice(["cosine", "dot"]),
    default="cosine",
    show_default=True,
    help="What the gate compares with its threshold.",
)
@click.option(
    "--pooling",
    type=click.Choice(["last", "mean"]),
    default="last",
    show_default=True,
    help="Whose score that is: the prompt's last token's, or the mean over its tokens.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Of how many of a prompt's last tokens, for --pooling mean.  [default: all]",
)
@click.option(
    "--vectors",
    type=common.Items("KINDS", common.word, "kinds such as forced,srv"),
    metavar="KINDS",
    help="Comma list of alignment, ssv (both need --aligned-model), forced, srv; the first one is used, "
    "the rest are kept for tune.  [default: alignment,ssv,forced with a sibling, else forced,srv]",
)
@click.option("--unit-norm", is_flag=True, help="Scale every steering vector to norm 1.")
@click.option(
    "--refusal",
    metavar="TEXT",
    help="What forced vectors put in the model's mouth.  [default: the sibling's own answers, else a fixed refusal]",
)
@click.option(
    "--shrinkage",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Weight of the identity in the covariance, for lda.  [default: Ledoit-Wolf]",
)
@common.restyle_option
@common.batch_size_option()
@click.option("--padding-side", type=click.Choice(["left", "right"]), default="right", show_default=True)
@common.output_option
@common.json_option
def command(
    model_name: str,
    dtype: str,
    device: str | None,
    harmful: tuple[str, ...],
    harmless: tuple[str, ...],
    aligned_model: str | None,
    refusal: str | None,
    restyle: int,
    output: str,
    json_file: str | None,
    **options: Any,
) -> None:
    """Fit gate directions and steering vectors of a model.

    \b
    Example:
      steerfast extract --model HuggingFaceTB/SmolLM2-135M-Instruct --output safety.safetensors
      steerfast extract --model MODEL --aligned-model SIBLING --harmful bad.txt -o safety.safetensors
    """
    common.check_outputs({"--output": output, "--json": json_file}, [*harmful, *harmless])
    sets = {
        "harmful": common.read_set("--harmful", harmful, restyle),
        "harmless": common.read_set("--harmless", harmless, restyle),
    }

    import steerfast

    model, tokenizer = common.load_model(model_name, dtype, device)
    if refusal is not None:
        options["refusal"] = refusal
    if aligned_model is not None:
        options["aligned_model"], _ = common.load_model(aligned_model, dtype, device)
    profile = steerfast.extract(
        model,
        tokenizer,
        harmful=sets["harmful"].prompts,
        harmless=sets["harmless"].prompts,
        names={role: chosen.name for role, chosen in sets.items()},
        **options,
    )
    common.write_profile(profile, output, json_file, after="steerfast calibrate")

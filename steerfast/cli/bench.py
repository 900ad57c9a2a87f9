"""`steerfast bench`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common

_COUNTS = "whole numbers of at least 1 like 1,4,16"


@click.command("bench")
@click.argument("model_name", metavar="MODEL")
@click.option("--profile", "profile_file", metavar="FILE", help="Measure this profile.  [default: made-up ones]")
@common.placement_options
@common.accept_option
@common.list_option("--batch-sizes", "N,...", common.count, _COUNTS, "Sequences per batch.", "1,4")
@common.list_option("--prompt-lengths", "N,...", common.count, _COUNTS, "Tokens per sequence.", "32,128")
@common.value_option(
    "--seconds",
    click.FloatRange(min=0),
    None,
    "For each batch size and prompt length; at least 20 steps are timed.",
    20.0,
)
@common.choice_option(
    "--mode",
    ["eager", "compile"],
    "compile: decode steps by torch.compile with a static cache, on CUDA as CUDA graphs.",
)
@common.count_option("--threads", "CPU threads; default: torch's.")
@common.json_option
def command(model_name: str, profile_file: str | None, json_file: str | None, **options: Any) -> None:
    """Measure the cost of steering MODEL, a hub id, folder or .gguf file.

    Prints time to the first token and per output token of the stock, idle and steered model, which take turns step by
    step.

    \b
    Example:
      steerfast bench HuggingFaceTB/SmolLM2-135M-Instruct
      steerfast bench your/model --profile safety.safetensors --batch-sizes 1,16 --json bench.json
    """
    common.check_outputs({"--json": json_file}, [profile_file] if profile_file else [])
    profile = common.load_profile(profile_file) if profile_file else None

    import torch

    from steerfast.cli.rendering import latency_report
    from steerfast.evaluation.latency import run_latency

    if (threads := options.pop("threads")) is not None:
        torch.set_num_threads(threads)
    model, _ = common.load_model(model_name, options.pop("dtype"), options.pop("device"))
    if options.pop("accept_model") and profile is not None:
        profile = common.accepted_for(profile, model)
    result = run_latency(model, profile, **options)
    common.write_json(json_file, result)
    latency_report(result, common.console(json_file))

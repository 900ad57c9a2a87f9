"""`steerfast bench`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option

_COUNTS = option.Kind("N,...", option.items(option.COUNT.type, "whole numbers of at least 1 like 1,4,16"))


@click.command("bench")
@click.argument("model_name", metavar="MODEL")
@option.value("--profile", option.FILE, "Measure this profile.  [default: made-up ones]", role="profile_file")
@option.placement
@option.accept_model
@option.value("--batch-sizes", _COUNTS, "Sequences per batch.", "1,4")
@option.value("--prompt-lengths", _COUNTS, "Tokens per sequence.", "32,128")
@option.value(
    "--seconds",
    option.Kind(None, click.FloatRange(min=0)),
    "For each batch size and prompt length; at least 20 steps are timed.",
    20.0,
)
@option.choice(
    "--mode",
    ["eager", "compile"],
    "compile: decode steps by torch.compile with a static cache, on CUDA as CUDA graphs.",
)
@option.value("--threads", option.COUNT, "CPU threads; default: torch's.")
@option.json_file
def command(model_name: str, profile_file: str | None, json_file: str | None, **options: Any) -> None:
    """Measure the cost of steering MODEL, a hub id, folder or .gguf file.

    Prints time to the first token and per output token of the stock, idle and steered model, which take turns step by
    step.

    \b
    Example:
      steerfast bench HuggingFaceTB/SmolLM2-135M-Instruct
      steerfast bench your/model --profile safety.safetensors --batch-sizes 1,16 --json bench.json
    """
    common.check_outputs({"--json": json_file}, [profile_file])
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

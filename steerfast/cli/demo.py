"""`steerfast demo`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option


@click.command("demo")
@option.value("--prompts", option.COUNT, "How many harmful and how many harmless prompts.", 50)
@option.value("--profile", option.FILE, "Default: the profile that ships for the default model.", role="profile_file")
@option.model("SmolLM2-135M-Instruct")
@option.value("--max-new-tokens", option.COUNT, "Answer length.", 48)
@option.json_file
def command(profile_file: str | None, json_file: str | None, **options: Any) -> None:
    """Steer a small model and measure the effect.

    Prints refusals and fluency for harmful prompts, unchanged answers to harmless prompts, and latency. The prompts
    ship with the package; neither the fit, the calibration nor the tuning saw them.

    \b
    Example:
      steerfast demo
      steerfast demo --prompts 10 --json demo.json
    """
    common.check_outputs({"--json": json_file}, [profile_file])

    from steerfast.cli.rendering import demo_report
    from steerfast.evaluation import demo
    from steerfast.hf.loading import DEMO_MODEL

    profile = common.load_profile(profile_file or str(demo.shipped_profile()))
    model, tokenizer = common.take_model(options, DEMO_MODEL)
    result = demo.run_demo(model, tokenizer, profile, **options)
    common.write_json(json_file, result)
    console = common.console(json_file)
    for shown in demo_report(result):
        console.print(shown)

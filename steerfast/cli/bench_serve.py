"""`steerfast bench-serve`."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import click

from steerfast.cli import common, option
from steerfast.cli.serve import VllmCommand

_SYSTEMS = ("stock", "control", "idle", "off", "shut", "open")


@click.command("bench-serve", cls=VllmCommand)
@click.argument("model_name", metavar="MODEL")
@click.argument("vllm_arguments", metavar="[-- VLLM OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@option.value("--profile", option.FILE, "Measure this profile.  [default: a made-up one]", role="profile_file")
@option.value(
    "--systems",
    option.Kind("NAME,...", option.items(click.Choice(_SYSTEMS), f"some of {', '.join(_SYSTEMS)}")),
    "Servers to compare; ratios need stock.",
    ",".join(_SYSTEMS),
)
@option.value("--rounds", option.COUNT, "In each, every system answers the same requests.", 6)
@option.value("--requests", option.COUNT, "Requests to a system in a round.", 24)
@option.value("--prompt", option.COUNT, "Tokens of a prompt.", 128)
@option.value("--output", option.Kind("N", click.IntRange(min=2)), "Tokens of an answer.", 64)
@option.value("--concurrency", option.COUNT, "The most requests at a time.", 4)
@option.value(
    "--rate", option.POSITIVE, "Requests per second, at random times.  [default: the next comes when one is answered]"
)
@option.flag("--together", "Keep all four servers running, if there is memory; else one at a time.")
@option.value(
    "--json",
    option.FILE,
    "Also write JSON lines as they come: one per system and round, then one per system. - is standard output.",
    role="json_file",
)
def command(
    model_name: str, vllm_arguments: tuple[str, ...], profile_file: str | None, json_file: str | None, **options: Any
) -> None:
    """Measure the cost of steering for clients of a vLLM server of MODEL, a hub id or folder.

    Starts the servers itself: stock (vLLM without the plugin), control (stock again), idle (the plugin, not configured)
    and one that steers, asked for no steering (off), a gate that never opens (shut) and one that always does (open).
    vLLM's load generator sends the requests.

    \b
    Example:
      steerfast bench-serve your/model --json serving.jsonl
      steerfast bench-serve your/model --profile safety.safetensors --rounds 3 -- --dtype bfloat16
    """
    common.check_outputs({"--json": json_file}, [profile_file])
    profile = common.load_profile(profile_file) if profile_file else None

    from steerfast.cli.rendering import serving_report
    from steerfast.evaluation.serving import measure_serving

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers end with this process
    lines = []
    with click.open_file(json_file or os.devnull, "w", encoding="utf-8") as written:
        for line in measure_serving(model_name, profile, vllm=vllm_arguments, **options):
            lines.append(line)
            print(json.dumps(line), file=written, flush=True)
    serving_report(lines, common.console(json_file))

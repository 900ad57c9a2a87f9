"""`steerfast bench-serve`."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import click

from steerfast.cli import common
from steerfast.cli.serve import VllmCommand

_SYSTEMS = ("stock", "control", "idle", "off", "shut", "open")


def _system(entry: str) -> str:
    if entry not in _SYSTEMS:
        raise ValueError
    return entry


@click.command("bench-serve", cls=VllmCommand)
@click.argument("model_name", metavar="MODEL")
@click.argument("vllm_arguments", metavar="[-- VLLM OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--profile", "profile_file", metavar="FILE", help="Measure this profile.  [default: a made-up one]")
@click.option(
    "--systems",
    type=common.Items("systems", _system, f"some of {', '.join(_SYSTEMS)}"),
    default=",".join(_SYSTEMS),
    show_default=True,
    metavar="NAME,...",
    help="Servers to compare; ratios need stock.",
)
@common.count_option("--rounds", "In each, every system answers the same requests.", 6)
@common.count_option("--requests", "Requests to a system in a round.", 24)
@common.count_option("--prompt", "Tokens of a prompt.", 128)
@common.value_option("--output", click.IntRange(min=2), "N", "Tokens of an answer.", 64)
@common.count_option("--concurrency", "The most requests at a time.", 4)
@common.value_option(
    "--rate",
    click.FloatRange(min=0, min_open=True),
    "NUMBER",
    "Requests per second, at random times.  [default: the next comes when one is answered]",
)
@click.option("--together", is_flag=True, help="Keep all four servers running, if there is memory; else one at a time.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Also write JSON lines as they come: one per system and round, then one per system. - is standard output.",
)
def command(
    model_name: str,
    vllm_arguments: tuple[str, ...],
    profile_file: str | None,
    json_file: str | None,
    **options: Any,
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
    common.check_outputs({"--json": json_file}, [profile_file] if profile_file else [])
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

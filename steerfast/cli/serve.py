"""`steerfast serve`."""

from __future__ import annotations

import os
from typing import Any

import click

from steerfast.cli import common, option


class VllmCommand(click.Command):
    """A command that says where vLLM's own options go."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(f"{error.format_message()} Options of vLLM come after --", ctx) from None


@click.command("serve", cls=VllmCommand)
@click.argument("model_name", metavar="MODEL")
@click.argument("vllm_arguments", metavar="[-- VLLM OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@option.repeated("--profile", "profiles", option.Kind("NAME=FILE"), "A profile that requests may name.")
@option.value(
    "--default",
    option.Kind("NAME[,NAME]"),
    "The profile, or stack, that steers requests that name none.  [default: no steering]",
)
@option.value(
    "--threshold",
    option.NAME,
    "The named threshold of requests that name none, such as strict.  [default: the one in use]",
)
@option.flag("--locked", "The default steers all requests; they cannot change it.")
@option.value("--max-strength", option.POSITIVE, "The largest strength of a request.  [default: 10]")
@option.value("--slots", option.COUNT, "Room for profiles.  [default: 32, or what the profiles need]")
@option.value(
    "--stack",
    option.Kind("N", click.IntRange(min=1, max=4)),
    "The most profiles on one request.  [default: 2; 1 for a single profile]",
)
@option.value(
    "--layers", option.LAYERS, "Layers that profiles may use, such as 10-19,20.  [default: those of the profiles]"
)
@option.value("--directory", option.Kind("DIR"), "The folder of profiles for the admin routes.  [default: none]")
@option.repeated("--observe", "observe", option.NAME, "A profile that only decides and reports, and edits nothing.")
@option.value(
    "--thinking",
    option.one_of("count", "skip"),
    "Whether the tokens of a thought count as tokens of the answer; skip: edits begin after it.  [default: count]",
)
@click.option(
    "--admin-key",
    metavar="KEY",
    envvar="STEERFAST_ADMIN_KEY",
    show_envvar=True,
    help="Turns the admin routes on; better in the environment, where other users cannot read it.",
)
def command(
    model_name: str,
    vllm_arguments: tuple[str, ...],
    profiles: tuple[str, ...],
    observe: tuple[str, ...],
    layers: list[tuple[int, int]] | None,
    admin_key: str | None,
    **options: Any,
) -> None:
    """Serve MODEL, a hub id or folder, over HTTP with vLLM, steering each request as it asks.

    A request says {"vllm_xargs": {"steering": NAME, "steering_strength": 0.8}}, or "off"; a stack is "NAME,NAME".
    "NAME:observe" lets the gate decide and report, and edits nothing. "steering_threshold": "strict" decides by
    another named threshold of the profile.

    \b
    Example:
      steerfast serve your/model --profile safety=safety.safetensors --default safety
      steerfast serve your/model --profile safety=safety.safetensors --default safety --locked -- --port 8001
    """
    files = common.read_names("--profile", profiles)
    directory, default = options["directory"], options["default"]
    if not files and directory is None:
        raise click.UsageError("--profile: expected one at least, or --directory to load some from later, got none")
    for name, wanted in (("--default", default.split(",") if default is not None else ()), ("--observe", observe)):
        if unknown := [one for one in wanted if one not in files]:
            raise click.UsageError(f"{name}: expected one of {', '.join(files) or 'no profiles'}, got {unknown[0]!r}")
    if options["locked"] and default is None:
        raise click.UsageError("--locked: expected --default, the profile to lock requests to, got none")
    for file in files.values():
        profile = common.load_profile(file)
        if options["threshold"] is not None and profile.points:
            profile.at(options["threshold"])

    from steerfast.hf.loading import checkpoint
    from steerfast.vllm.admin import KEY_VARIABLE
    from steerfast.vllm.server import serve

    bands = layers or []
    numbers = sorted({layer for first, last in bands for layer in range(first, last + 1)}) or None
    given = {"profiles": files, "layers": numbers, "observe": list(observe) or None, **options}
    if admin_key:
        os.environ[KEY_VARIABLE] = admin_key
    steering = {key: value for key, value in given.items() if value is not None}
    folder = checkpoint(model_name)
    serve(folder, steering, ["--served-model-name", model_name, *vllm_arguments], admin=bool(admin_key))

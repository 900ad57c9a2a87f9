"""`steerfast play`."""

from __future__ import annotations

import contextlib
import threading
import webbrowser
from typing import Any

import click

from steerfast.cli import common, option


@click.command("play")
@click.argument("model_name", metavar="[MODEL]", required=False)
@option.repeated("--profile", "profiles", option.FILE, "A profile of the model; several are a stack.")
@option.placement
@option.accept_model
@option.template
@option.threshold
@option.value("--max-new-tokens", option.COUNT, "Answer length.", 128)
@option.value("--port", option.Kind("N", click.IntRange(0, 65535)), "Port of this machine; 0 takes a free one.", 8765)
@option.flag("--no-browser", "Print the address, and open no browser.")
def command(model_name: str | None, profiles: tuple[str, ...], **options: Any) -> None:
    """Open a page that answers prompts unsteered and steered, side by side.

    The page has a slider for the strength. It shows the gate's score beside its threshold, the layer that the gate
    reads, and the layers that are edited. Only this machine can open it. Ctrl-C ends it. Without MODEL it is
    SmolLM2-135M-Instruct, with the profile that ships for it.

    \b
    Example:
      steerfast play
      steerfast play MODEL --profile safety.safetensors
      steerfast play MODEL --profile safety.safetensors --profile formal.safetensors --port 0 --no-browser
    """
    from steerfast.evaluation.demo import shipped_profile
    from steerfast.hf.loading import DEMO_MODEL
    from steerfast.profile import ProfileStack
    from steerfast.profile.stack import chosen

    options["model_name"] = model_name or DEMO_MODEL
    if not profiles and options["model_name"] != DEMO_MODEL:
        raise click.UsageError("--profile: expected one at least, got none")
    given = chosen(list(profiles) or [shipped_profile()])
    assert isinstance(given, ProfileStack)
    stack = given if options["threshold"] is None else given.at(options["threshold"])

    from steerfast.evaluation.play import PageServer, Playground

    stack, model, tokenizer = common.take_model_for(stack, options)
    with PageServer(Playground(model, tokenizer, stack, options["max_new_tokens"]), options["port"]) as server:
        click.echo(server.url)
        if not options["no_browser"]:
            threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()

"""`steerfast bake`."""

from __future__ import annotations

from typing import Any

import click

from steerfast.cli import common, option
from steerfast.cli.group import say


@click.command("bake")
@option.profile_file
@click.argument("target", metavar="OUTPUT")
@option.model("the model that the profile names")
@option.accept_model
@option.flag("--without-gate", "Drop the gate: steer everything, harmless prompts too.")
@option.json_file
def command(profile_file: str, target: str, without_gate: bool, json_file: str | None, **options: Any) -> None:
    """Write a profile that adds as biases of the model, for engines that cannot steer (.safetensors).

    A bias acts on every token of every request. A gate, positions and edits that depend on the row are refused;
    docs/formats.md says why an ablation is.

    \b
    Example:
      steerfast bake tone.safetensors biases.safetensors --model MODEL
      steerfast bake safety.safetensors biases.safetensors --model MODEL --without-gate
    """
    common.check_outputs({"OUTPUT": target, "--json": json_file}, [profile_file])
    profile = common.load_profile(profile_file)
    gated = profile.gate.kind != "always"
    if gated and not without_gate:
        raise click.UsageError(
            f"--without-gate: a bias has no gate, and the profile's is of the kind {profile.gate.kind}: give this "
            "option to steer everything"
        )
    from safetensors.torch import save

    from steerfast._files import write_atomically
    from steerfast.hf.bake import bake, check_bakeable

    profile = profile.without_gate() if gated else profile
    check_bakeable(profile)  # before a model is loaded
    model, _ = common.take_model(options, profile.model.name)
    profile = common.accepted_for(profile, model) if options["accept_model"] else profile
    baked = bake(model, profile)
    write_atomically(target, save(baked.tensors, metadata={"format": "pt"}))
    notes = ["the gate is lost: everything will be steered"] if gated else []
    if baked.option is not None:
        notes.append(f"an engine reads the biases where the model's config.json has {baked.option!r}: true")
    elif not baked.readable:
        notes.append(f"{type(model).__name__} has no option for these biases: set them in code, engines skip them")
    for note in notes:
        say(f"note: {note}")
    accepted = profile.fitted.get("accepted")
    result = {"profile": profile_file, "output": target, "tensors": sorted(baked.tensors), "option": baked.option}
    common.write_json(json_file, {**result, "gate_lost": gated, "notes": notes, "accepted": accepted})
    common.console(json_file).print(f"wrote {target}", markup=False)

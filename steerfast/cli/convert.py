"""`steerfast convert`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option
from steerfast.cli.group import say

if TYPE_CHECKING:
    from steerfast.profile import SteeringProfile

_PROFILE = "steerfast"
_OF_ENDING = {".safetensors": _PROFILE, ".gguf": "gguf", ".pt": "hotwire", ".svec": "svec"}
_WITH_DEFAULTS = ("dtype", "device", "fires")  # options of imports; all others have no value where they are not given


def _formats(written: bool = False) -> list[str]:
    from steerfast.formats import FORMATS

    return [_PROFILE, *(name for name, known in FORMATS.items() if known.encode is not None or not written)]


@click.command("convert")
@click.argument("source", metavar="INPUT")
@click.argument("target", metavar="OUTPUT")
@click.option("--from", "source_format", type=option.LazyChoice(_formats), help="Default: recognised.")
@click.option(
    "--to", "target_format", type=option.LazyChoice(partial(_formats, written=True)), help="Default: by the ending."
)
@option.model()
@option.value("--like", option.Kind("PROFILE"), "A profile of the model that the vectors are for, instead of --model.")
@option.flag("--keep-gate", "Take over the gate of --like.  [default: always open]")
@option.value(
    "--layers", option.LAYERS, "Layers to steer, 0-based blocks, such as 10-14,20.  [default: as the file says]"
)
@option.value("--strength", option.NUMBER, "Of every steered layer.  [default: the file's, else 1]")
@option.value(
    "--layer-shift",
    option.Kind("N", click.IntRange(-1, 1)),
    "Added to every layer number, for files that count in another way than their format.",
)
@option.edit
@option.value(
    "--gate-kind",
    option.one_of("prompt", "token", "always"),
    "With a gate: when it decides.  [default: the gate's own]",
)
@option.value("--sharpness", option.NUMBER, "With a gate: 0 is a hard gate, above 0 a sigmoid.")
@option.value(
    "--condition",
    option.FILE,
    "A file with the gate's direction; where INPUT is a profile, the file to write it to (.svec).",
)
@option.value("--condition-layer", option.Kind("L", option.LAYER.type), "0-based block of the condition.")
@option.value("--threshold", option.Kind("COSINE", float), "The gate opens above this cosine.")
@option.choice("--fires", ["above", "below"])
@option.json_file
def command(
    source: str,
    target: str,
    source_format: str | None,
    target_format: str | None,
    condition: str | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Convert steering files of other projects into profiles, and profiles into such files.

    \b
    Example:
      steerfast convert happy.gguf happy.safetensors --model MODEL --layers 10-14
      steerfast convert happy.gguf gated.safetensors --like safety.safetensors --keep-gate
      steerfast convert refusal.gguf ablated.safetensors --model MODEL --layers 10-14 --edit ablate
      steerfast convert safety.safetensors safety.gguf
      steerfast convert safety.safetensors safety.json --to vllm-lens
    """
    exports = source_format == _PROFILE or (source_format is None and _is_profile(source))
    target_format = target_format or _OF_ENDING.get(Path(target).suffix)
    _check_usage(exports, target, target_format, condition, options)
    outputs = {"OUTPUT": None if target_format == "rotalabs" else target, "--json": json_file}
    inputs = [source, options["like"], None if exports else condition]
    common.check_outputs(outputs | ({"--condition": condition} if exports else {}), inputs)

    from steerfast import formats

    notes: list[str] = []
    if exports:
        profile, source_format = common.load_profile(source), _PROFILE
    else:
        source_format = source_format or formats.detect(source)
        profile, notes = _imported(source, source_format, condition, options)
    gate = profile.gate.kind
    if target_format == _PROFILE:
        profile.save(target)
    else:
        notes += formats.write(profile, target, str(target_format), condition=condition if exports else None)
    for note in notes:
        say(f"note: {note}")
    result = {"input": source, "output": target, "from": source_format, "to": target_format, "gate": gate}
    lost = {"gate_lost": target_format != _PROFILE and gate != "always" and not (exports and condition)}
    common.write_json(json_file, {**result, **lost, "layers": profile.steered_layers, "notes": notes})
    common.console(json_file).print(f"wrote {target}", markup=False)


def _is_profile(source: str) -> bool:
    if Path(source).suffix != ".safetensors":
        return False
    from steerfast import formats

    return formats.is_profile(source)


def _check_usage(
    exports: bool, target: str, target_format: str | None, condition: str | None, options: dict[str, Any]
) -> None:
    if target_format is None:
        raise click.UsageError(f"--to: expected a format, its ending does not tell that of {target!r}, got none")
    if exports:
        if target_format == _PROFILE:
            raise click.UsageError("--to: expected another format, INPUT is a profile already")
        given = [name for name, value in options.items() if value is not None and value is not False]
        if given := [name for name in given if name not in _WITH_DEFAULTS]:
            name = given[0].removesuffix("_name").replace("_", "-")
            raise click.UsageError(f"--{name}: expected for other projects' files only, INPUT is a profile")
        if condition and target_format != "svec":
            raise click.UsageError(f"--condition: expected with --to svec only, got {target_format}")
        return
    if (options["model_name"] is None) == (options["like"] is None):
        raise click.UsageError("--model, --like: expected one of them, to say which model the vectors are for")
    if options["keep_gate"] and (options["like"] is None or condition):
        raise click.UsageError("--keep-gate: expected with --like and without --condition")
    if len({value is None for value in (condition, options["condition_layer"], options["threshold"])}) > 1:
        raise click.UsageError("--condition, --condition-layer, --threshold: expected all of them or none")
    for name in ("gate_kind", "sharpness"):
        if options[name] is not None and not (options["keep_gate"] or condition):
            raise click.UsageError(
                f"--{name.replace('_', '-')}: expected with --keep-gate or --condition, there is no gate without them"
            )


def _imported(
    source: str, source_format: str, condition: str | None, options: dict[str, Any]
) -> tuple[SteeringProfile, list[str]]:
    from steerfast import formats

    found = formats.read(source, source_format)
    gate: Any = None
    if options["like"]:
        like = common.load_profile(options["like"])
        model, gate = like.model, like if options["keep_gate"] else None
    else:
        from steerfast.hf.structure import identify

        loaded = common.load_model(options["model_name"], options["dtype"], options["device"])
        model = identify(*loaded)
    if condition:
        gate = formats.condition_of(formats.read(condition), options["condition_layer"], options["threshold"], model)
        gate = gate if options["fires"] == "above" else gate.below()
    bands = options["layers"]
    layers = None if bands is None else [layer for first, last in bands for layer in range(first, last + 1)]
    same = ("strength", "edit", "low", "high", "angle", "gate_kind", "sharpness")
    given = {name: options[name] for name in same if options[name] is not None}
    shift = options["layer_shift"] or 0
    return found.profile(model, layers=layers, shift=shift, gate=gate, name=Path(source).stem, **given)

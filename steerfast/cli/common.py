"""Inputs of the commands: prompts, profiles, models. The shared options and outputs are reachable from here, too."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli.group import say
from steerfast.cli.options import (
    Device,
    Items,
    batch_size_option,
    choice_option,
    count_option,
    finite,
    fit_options,
    json_option,
    list_option,
    model_options,
    output_option,
    placement_options,
    prompt_arguments,
    restyle_option,
    set_option,
    share_option,
    word,
)
from steerfast.cli.output import STDOUT, check_outputs, console, write_json, write_profile
from steerfast.errors import PromptError

if TYPE_CHECKING:
    from torch import nn

    from steerfast.profile import SteeringProfile
    from steerfast.text.styles import Part, Prompts

__all__ = [
    "STDOUT",
    "Device",
    "Items",
    "PromptSet",
    "batch_size_option",
    "check_outputs",
    "choice_option",
    "console",
    "count_option",
    "finite",
    "fit_options",
    "gather_prompts",
    "json_option",
    "list_option",
    "load_model",
    "load_profile",
    "model_options",
    "output_option",
    "placement_options",
    "prompt_arguments",
    "read_set",
    "read_sets",
    "restyle_option",
    "set_option",
    "share_option",
    "word",
    "write_json",
    "write_profile",
]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one or several sources, and the name of the set in a profile."""

    prompts: Prompts
    name: str


def read_set(option: str, sources: Iterable[str], restyled: int = 0, part: Part = "fit") -> PromptSet:
    """Read and join the sources given for `option`, with `restyled` of them in each shipped style."""
    from steerfast.text.prompts import SHIPPED_PREFIX, read_records
    from steerfast.text.styles import PLAIN, Prompts, restyle

    records, names = [], []
    for source in sources:
        try:
            records += read_records(source)
        except PromptError as error:
            raise PromptError(f"{option}: {str(error).removeprefix('prompts: ')}") from None
        names.append(source if source.startswith(SHIPPED_PREFIX) else Path(source).name)
    styles = [str(record.get("style") or PLAIN) for record in records]
    requests = [str(record.get("request") or record["prompt"]) for record in records]
    prompts = Prompts([record["prompt"] for record in records], styles, requests)
    return PromptSet(restyle(prompts, restyled, part=part), " + ".join(names) + (", restyled" if restyled else ""))


def read_sets(sources: Mapping[str, Sequence[str]], restyled: int = 0, part: Part = "fit") -> dict[str, Any]:
    """Return keyword arguments of a fitting step: the prompts of each role, and ``names``, the name of each set.

    Args:
        sources: role, such as ``harmful``, -> the sources given for the option of that name.
        restyled: prompts to add in each shipped style; held-out sets stay as they are.
    """
    sets = {
        role: read_set("--" + role.replace("_", "-"), given, 0 if role.startswith("heldout_") else restyled, part)
        for role, given in sources.items()
    }
    prompts = {role: chosen.prompts for role, chosen in sets.items()}
    return {**prompts, "names": {role: chosen.name for role, chosen in sets.items()}}


def gather_prompts(arguments: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return the prompts of arguments, then files; without either, the lines of standard input."""
    if arguments or files:
        return [*arguments, *read_set("--file", files).prompts]
    if sys.stdin.isatty():
        raise click.UsageError("PROMPTS: expected arguments, --file or lines on standard input, got none")
    try:
        prompts = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input: expected text in UTF-8 ({error})") from None
    if not prompts:
        raise PromptError("standard input: expected at least one prompt, a line each, got none")
    return prompts


def load_profile(path: str) -> SteeringProfile:
    """Read a profile."""
    from steerfast.profile import SteeringProfile

    return SteeringProfile.load(path)


def load_model(name: str, dtype: str, device: str | None) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer without the loader's own bars and notes."""
    if sys.stderr.isatty():
        say(f"loading {name}")
    from transformers.utils import logging

    from steerfast.hf import loading

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # the bar of a GGUF conversion obeys no setting; errors are raised
        return loading.load_model(name, dtype=dtype, device=device)

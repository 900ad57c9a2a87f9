"""Options and argument types that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Device(click.ParamType):
    """A torch device of this machine."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import torch

        try:
            device = torch.device(value)
        except RuntimeError:
            self.fail(f"expected cpu, cuda or cuda:<number>, got {value!r}", param, ctx)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            self.fail(f"expected a device that is there ({found} CUDA devices are), got {value!r}", param, ctx)
        return value


class Items(click.ParamType):
    """A comma-separated list; `read` turns an entry into a value, or raises ValueError."""

    def __init__(self, name: str, read: Callable[[str], Any], expected: str) -> None:
        self.name = name
        self._read = read
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if not isinstance(value, str):
            return list(value)
        try:
            return [self._read(entry.strip()) for entry in value.split(",")]
        except ValueError:
            self.fail(f"expected {self._expected}, got {value!r}", param, ctx)


def word(entry: str) -> str:
    """Return a word, for `Items`."""
    if not entry:
        raise ValueError
    return entry


def finite(entry: str) -> float:
    """Return a finite number, for `Items`."""
    number = float(entry)
    if not math.isfinite(number):
        raise ValueError
    return number


def json_option(command: F) -> F:
    """Add `--json FILE` as `json_file`."""
    return click.option(
        "--json", "json_file", metavar="FILE", help="Also write the result as JSON; - is standard output."
    )(command)


def placement_options(command: F) -> F:
    """Add `--dtype` and `--device`."""
    command = click.option(
        "--device", type=Device(), metavar="DEVICE", help="Default: cuda if there is one, else cpu."
    )(command)
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto is the dtype of the checkpoint.",
    )(command)


def model_options(default: str | None = None, *, required: bool = False) -> Callable[[F], F]:
    """Add `--model`, `--dtype` and `--device`; `default` tells in the help which model is used without it."""

    def add(command: F) -> F:
        says = "Hub id, folder or .gguf file" + (f"; default: {default}." if default else ".")
        return click.option("--model", "model_name", metavar="MODEL", required=required, help=says)(
            placement_options(command)
        )

    return add


def batch_size_option(default: int = 16) -> Callable[[F], F]:
    """Add `--batch-size` as `batch_size`."""
    return count_option("--batch-size", default, "Prompts per forward pass.")


def set_option(name: str, default: str | None = None, note: str = "") -> Callable[[F], F]:
    """Add a repeatable option for a prompt set."""
    return click.option(
        name,
        multiple=True,
        metavar="SRC",
        default=(default,) if default else (),
        show_default=bool(default),
        help=f"{note or 'Prompts'}: a .txt, .json, .jsonl or .csv file, or steerfast:<set>; repeat it to join several.",
    )


def restyle_option(command: F) -> F:
    """Add `--restyle N`, see `steerfast.text.styles.restyle`."""
    return click.option(
        "--restyle",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Add N prompts of each set in each of the shipped styles (personas, fiction, random suffixes, ...).",
    )(command)


def output_option(command: F) -> F:
    """Add `--output FILE` for the profile."""
    return click.option(
        "--output", "-o", required=True, metavar="FILE", help="Where to write the profile (.safetensors)."
    )(command)


def choice_option(name: str, choices: Sequence[str], text: str | None = None) -> Callable[[F], F]:
    """Add an option that takes one of `choices`, by default the first."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=text)


def share_option(name: str, kind: click.FloatRange, text: str, default: float | None = None) -> Callable[[F], F]:
    """Add an option that takes a share."""
    return click.option(name, type=kind, default=default, show_default=default is not None, metavar="SHARE", help=text)


def count_option(name: str, default: int, text: str) -> Callable[[F], F]:
    """Add an option that takes a whole number of at least 1."""
    return click.option(name, type=click.IntRange(min=1), default=default, show_default=True, metavar="N", help=text)


def list_option(name: str, metavar: str, read: Callable[[str], Any], example: str, text: str) -> Callable[[F], F]:
    """Add an option that takes a comma-separated list, see `Items`; `example` is for errors."""
    return click.option(name, type=Items(metavar, read, example), metavar=metavar, help=text)


def fit_options(command: F) -> F:
    """Add `--restyle`, `--output` and `--json`: all commands that make a profile have them."""
    return restyle_option(output_option(json_option(command)))


def prompt_arguments(command: F) -> F:
    """Add `[PROMPTS]...` and `--file SRC`, see `gather_prompts`."""
    command = click.option(
        "--file",
        "files",
        multiple=True,
        metavar="SRC",
        help="Prompts from a .txt, .json, .jsonl or .csv file, or steerfast:<set>; may be repeated.",
    )(command)
    return click.argument("prompts", nargs=-1)(command)

"""What the commands share: options, prompt sources, outputs, and errors of one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from steerfast.errors import OutputError, PromptError, SteerfastError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from steerfast.profile import SteeringProfile
    from steerfast.text.styles import Part, Prompts

F = TypeVar("F", bound=Callable[..., Any])

STDOUT = "-"
_PIPED_WIDTH = 120  # columns of a table where there is no terminal to ask

INTERRUPTED = 130  # as shells report a SIGINT


# -- the group -------------------------------------------------------------------------------------


class CommandGroup(click.Group):
    """Commands imported when they are named, and every error as one line on stderr.

    Args:
        names: the commands, in the order of --help; each is `command` in the module of its name in `package`.
    """

    def __init__(self, *args: Any, names: Sequence[str], package: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._names = names
        self._package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._names:
            return None
        command: click.Command = importlib.import_module(f"{self._package}.{cmd_name}").command
        return command

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        if not standalone_mode:
            return self._run(*args, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _show_warning
            sys.exit(self._status(*args, **options))

    def _run(self, *args: Any, **options: Any) -> Any:
        run: Any = super().main
        return run(*args, standalone_mode=False, **options)

    def _status(self, *args: Any, **options: Any) -> int:
        try:
            status = self._run(*args, **options)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "steerfast"
            return _fail(f"{error.format_message()} ({command} --help explains)", error.exit_code)
        except click.ClickException as error:
            return _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", INTERRUPTED)
        except SteerfastError as error:
            return _fail(str(error), 1)
        except Exception as error:
            message = f"unexpected {type(error).__name__}: {error} (STEERFAST_TRACEBACK=1 shows where)"
            return _fail(message, 1)
        return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    if os.environ.get("STEERFAST_TRACEBACK"):
        traceback.print_exc()
    _say(f"error: {message}")
    return status


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> None:
    """steerfast's own warnings are for the user of a command; those of libraries are for programmers."""
    if category.__module__.partition(".")[0] == "steerfast":
        _say(f"warning: {message}")


def _say(message: str) -> None:
    click.echo("steerfast: " + " ".join(message.split()), err=True)


# -- options ---------------------------------------------------------------------------------------


class Device(click.ParamType):
    """A torch device that is there."""

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
    """A comma-separated list; `read` turns each entry into a value and raises ValueError where it cannot."""

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
    """A word, for `Items`."""
    if not entry:
        raise ValueError
    return entry


def finite(entry: str) -> float:
    """A finite number, for `Items`."""
    number = float(entry)
    if not math.isfinite(number):
        raise ValueError
    return number


def json_option(command: F) -> F:
    """`--json FILE` as `json_file`."""
    return click.option(
        "--json", "json_file", metavar="FILE", help="Also write the result as JSON; - is standard output."
    )(command)


def placement_options(command: F) -> F:
    """`--dtype` and `--device`."""
    command = click.option(
        "--device", type=Device(), metavar="DEVICE", help="Default: cuda if there is one, else cpu."
    )(command)
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto is the checkpoint's own.",
    )(command)


def model_options(default: str | None = None, *, required: bool = False) -> Callable[[F], F]:
    """`--model`, `--dtype` and `--device`; `default` says in the help what an absent model means."""

    def add(command: F) -> F:
        says = "Hub id, folder or .gguf file" + (f"; default: {default}." if default else ".")
        return click.option("--model", "model_name", metavar="MODEL", required=required, help=says)(
            placement_options(command)
        )

    return add


def batch_size_option(default: int = 16) -> Callable[[F], F]:
    """`--batch-size` as `batch_size`."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        metavar="N",
        help="Prompts per forward pass.",
    )


def set_option(name: str, default: str | None = None, note: str = "") -> Callable[[F], F]:
    """A repeatable option for a prompt set."""
    return click.option(
        name,
        multiple=True,
        metavar="SRC",
        default=(default,) if default else (),
        show_default=bool(default),
        help=f"{note or 'Prompts'}: a .txt, .json, .jsonl or .csv file, or steerfast:<set>; repeat it to join several.",
    )


def restyle_option(command: F) -> F:
    """`--restyle N`, see `steerfast.text.styles.restyle`."""
    return click.option(
        "--restyle",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Add N prompts of each set in each of the shipped styles (personas, fiction, random suffixes, ...).",
    )(command)


def output_option(command: F) -> F:
    """`--output FILE`, where the profile goes."""
    return click.option(
        "--output", "-o", required=True, metavar="FILE", help="Where to write the profile (.safetensors)."
    )(command)


def prompt_arguments(command: F) -> F:
    """`[PROMPTS]...` and `--file SRC`, see `gather_prompts`."""
    command = click.option(
        "--file",
        "files",
        multiple=True,
        metavar="SRC",
        help="Prompts from a .txt, .json, .jsonl or .csv file, or steerfast:<set>; may be repeated.",
    )(command)
    return click.argument("prompts", nargs=-1)(command)


# -- inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one or several sources, and what a profile shall call them."""

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


def gather_prompts(arguments: Sequence[str], files: Sequence[str]) -> list[str]:
    """Prompts from arguments, then files; where there are neither, the lines of standard input."""
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
        _say(f"loading {name}")
    from transformers.utils import logging

    from steerfast.hf import loading

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # the bar of a GGUF conversion obeys no setting; errors are raised
        return loading.load_model(name, dtype=dtype, device=device)


# -- outputs ---------------------------------------------------------------------------------------


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str] = ()) -> None:
    """Refuse, before any work, outputs that cannot be written or would overwrite one another or an input.

    Args:
        outputs: option -> file, None or `STDOUT`.
        inputs: files that are read and must stay.

    Raises:
        OutputError: no such folder, no permission, not a regular file.
        click.UsageError: one file in two roles.
    """
    taken = {Path(path).resolve(): "an input" for path in inputs}
    for option, path in outputs.items():
        if path is None or path == STDOUT:
            continue
        target = Path(path)
        folder = target.parent
        if not folder.is_dir():
            raise OutputError(f"{option}: expected a file in an existing folder, got {path!r}")
        if target.exists() and not target.is_file():
            raise OutputError(f"{option}: expected a regular file, got {path!r}, which is none")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{option}: expected a file in a writable folder, got {path!r}")
        if target.resolve() in taken:
            raise click.UsageError(
                f"{option}: expected a file of its own, got {path!r}, which is {taken[target.resolve()]} too"
            )
        taken[target.resolve()] = option


def console(json_file: str | None = None) -> Console:
    """Where people read: standard output, or stderr where that carries the JSON."""
    from rich.console import Console

    made = Console(stderr=json_file == STDOUT, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPED_WIDTH
    return made


def write_profile(
    profile: SteeringProfile, output: str, json_file: str | None, *, after: str, tables: Iterable[Any] = ()
) -> None:
    """Write a profile that a command made, say what it is, with `tables` below, and which commands come `after`."""
    from steerfast.cli.rendering import header, summary

    profile.save(output)
    write_json(json_file, {"profile": output, **summary(profile)})
    printed = console(json_file)
    for table in (header(profile), *(tables or ("",))):
        if table is not None:
            printed.print(table)
    printed.print(f"wrote {output}; next: {after}", markup=False)


def write_json(json_file: str | None, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `result` where `--json` asked for it, if it did; nan and inf, which JSON lacks, become null."""
    if json_file is None:
        return
    text = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    data = text.encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape
    if json_file == STDOUT:
        click.echo(data, nl=False)
        return
    from steerfast._files import write_atomically

    write_atomically(json_file, data)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""Options of commands: what a value may be, and the options that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


# -- values ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a value may be. metavar: its name in the help. type: a click type, or a function as click takes one."""

    metavar: str | None
    type: Any = str


class LazyChoice(click.ParamType):
    """A `click.Choice`; the module that knows the names is imported where a value is given or help is asked for."""

    name = "choice"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def get_metavar(self, *where: Any, **named: Any) -> str | None:
        return click.Choice([*self._names()]).get_metavar(*where, **named)

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return click.Choice([*self._names()]).convert(value, param, ctx)


def items(read: Callable[[str], Any], expected: str) -> Callable[[str], list[Any]]:
    """Return the type of a comma-separated list; `read` turns an entry into a value, or raises ValueError."""

    def convert(text: str) -> list[Any]:
        try:
            return [read(entry.strip()) for entry in text.split(",")]
        except (ValueError, click.BadParameter):
            raise click.BadParameter(f"expected {expected}, got {text!r}") from None

    return convert


def word(entry: str) -> str:
    """Return a word, for `items`."""
    if not entry:
        raise ValueError
    return entry


def finite(entry: str) -> float:
    """Return a finite number, for `items`."""
    number = float(entry)
    if not math.isfinite(number):
        raise ValueError
    return number


def band(entry: str) -> tuple[int, int]:
    """Return (first, last) of ``10-19`` or ``20``, for `items`."""
    first, _, last = entry.partition("-")
    numbers = int(first), int(last or first)
    if not 0 <= numbers[0] <= numbers[1] < _MOST_LAYERS:
        raise ValueError
    return numbers


def share(**ends: bool) -> Kind:
    """Return a share, from 0 to 1; `ends` are ``min_open`` and ``max_open``."""
    return Kind("SHARE", click.FloatRange(0, 1, **ends))


def one_of(*names: str, metavar: str | None = None) -> Kind:
    """Return one of some names."""
    return Kind(metavar, click.Choice(names))


def _device(value: str) -> str:
    """Return a torch device of this machine."""
    import torch

    try:
        device = torch.device(value)
    except RuntimeError:
        raise click.BadParameter(f"expected cpu, cuda or cuda:<number>, got {value!r}") from None
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise click.BadParameter(f"expected a device that is there ({found} CUDA devices are), got {value!r}")
    return value


def _argument(value: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE, the value in JSON; a word that is no JSON is text."""
    name, mark, text = value.partition("=")
    if not mark or not name or not text:
        raise click.BadParameter(f"expected NAME=VALUE, got {value!r}")
    try:
        return name, json.loads(text)
    except ValueError:
        if text[0] in '[{"':
            raise click.BadParameter(f"expected a value in JSON, got {text!r}") from None
        return name, text


def _edit_names() -> Iterable[str]:
    """Return the kinds of edits, `add` first."""
    from steerfast.profile import EDITS

    return EDITS


_MOST_LAYERS = 10_000
WHOLE = Kind("N", int)
COUNT, SEED = Kind("N", click.IntRange(min=1)), Kind("N", click.IntRange(min=0))
NUMBER, NOT_NEGATIVE = Kind("NUMBER", float), Kind("NUMBER", click.FloatRange(min=0))
POSITIVE, SHARE = Kind("NUMBER", click.FloatRange(min=0, min_open=True)), share()
LAYER = Kind("LAYER", click.IntRange(min=0))
NAME, FILE, FOLDER, MODEL, SRC, TEXT = map(Kind, ("NAME", "FILE", "FOLDER", "MODEL", "SRC", "TEXT"))
KINDS = Kind("KINDS", items(word, "kinds such as alignment,forced"))
NUMBERS = Kind("NUMBERS", items(finite, "finite numbers like 0.5,1"))
LAYERS = Kind("LAYERS", items(band, "layers such as 10-19,20, first before last"))


# -- one option --------------------------------------------------------------------------------------


def value(
    name: str, kind: Kind, text: str | None = None, default: Any = None, *, role: str | None = None
) -> Callable[[F], F]:
    """Add an option that takes a value; `role` is its parameter, where that has another name."""
    names, known = (name,) if role is None else (name, role), default is not None
    return click.option(*names, type=kind.type, metavar=kind.metavar, default=default, show_default=known, help=text)


def flag(name: str, text: str) -> Callable[[F], F]:
    """Add an option that takes no value."""
    return click.option(name, is_flag=True, help=text)


def choice(name: str, choices: Sequence[str], text: str | None = None) -> Callable[[F], F]:
    """Add an option that takes one of `choices`, by default the first."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=text)


def repeated(name: str, role: str, kind: Kind, text: str, default: Sequence[str] = ()) -> Callable[[F], F]:
    """Add an option that may be repeated, as the tuple `role`."""
    return click.option(
        name,
        role,
        type=kind.type,
        multiple=True,
        metavar=kind.metavar,
        default=default,
        show_default=bool(default),
        help=f"{text} May be repeated.",
    )


def prompt_set(name: str, text: str, default: str | None = None) -> Callable[[F], F]:
    """Add a repeatable option for a set of prompts."""
    formats = f"{text}: a .txt, .json, .jsonl or .csv file, or steerfast:<set>."
    return repeated(name, name.removeprefix("--"), SRC, formats, (default,) if default else ())


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return a decorator that adds several options, in the order of the help."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# -- shared options ----------------------------------------------------------------------------------

json_file = value("--json", FILE, "Also write the result as JSON; - is standard output.", role="json_file")
profile_file = click.argument("profile_file", metavar="PROFILE")
fit_outputs = together(
    click.option("--output", "-o", required=True, metavar="FILE", help="Where to write the profile (.safetensors)."),
    json_file,
)
"""Of all commands that make a profile."""

placement = together(
    choice("--dtype", ["auto", "float32", "bfloat16", "float16"], "auto is the dtype of the checkpoint."),
    value("--device", Kind("DEVICE", _device), "Default: cuda if there is one, else cpu."),
)
accept_model = flag(
    "--accept-model",
    "Take a model of the same shape that the profile was not made for; the profile keeps the mismatch.",
)
"""See `common.take_model_for` and `common.accepted_for`."""

template = click.option(
    "--template-arg",
    "template",
    type=_argument,
    multiple=True,
    metavar="NAME=JSON",
    help="Of the chat template, such as enable_thinking=false. May be repeated.  [default: those of the profile]",
)
"""See `common.with_template`."""


def model(default: str | None = None, *, required: bool = False) -> Callable[[F], F]:
    """Add `--model`, `--dtype` and `--device`; `default` tells in the help which model is used without it."""
    says = "Hub id, folder or .gguf file" + (f"; default: {default}." if default else ".")
    return together(click.option("--model", "model_name", metavar="MODEL", required=required, help=says), placement)


profile_model = together(model("the model that the profile names"), accept_model, template)
"""Of a model that a profile names, see `common.take_model_for`."""

threshold = value(
    "--threshold",
    NAME,
    "A named threshold of the profile, such as strict; inspect shows them.  [default: the one in use]",
)
"""See `common.load_profile`."""

batch_size = value("--batch-size", COUNT, "Prompts per forward pass.", 16)
cache = value(
    "--cache", FOLDER, "Keep the rows of prompts here: go on after an interruption, and another time read no prompt."
)
reading = together(
    value("--per-source", COUNT, "The most prompts of a source and label that are read.  [default: all]"), cache
)
"""How many prompts are read, and where their rows are kept."""

labelled = repeated(
    "--prompts",
    "prompts",
    SRC,
    "Labelled prompts or chats (harmful, borderline, harmless), added to the shipped corpus, or to --harmful and "
    "--harmless.",
)
"""See `common.read_sets`."""

gate_sets = together(
    prompt_set("--harmful", "Prompts the gate should open for, in place of the corpus"),
    prompt_set("--harmless", "Prompts the gate should stay shut for, in place of the corpus"),
)
edit = together(
    click.option(
        "--edit",
        type=LazyChoice(_edit_names),
        help="How an open gate changes a row of the residual stream.  [default: add, or the edit of a converted file]",
    ),
    value("--low", NUMBER, "Lower limit of --edit clamp, in units of the vector."),
    value("--high", NUMBER, "Upper limit of --edit clamp, in units of the vector."),
    value("--angle", Kind("DEGREES", float), "Target of --edit rotate: 0 is along the vector, 90 orthogonal to it."),
)
prompts = together(
    click.argument("prompts", nargs=-1),
    repeated("--file", "files", SRC, "Prompts from a .txt, .json, .jsonl or .csv file, or steerfast:<set>."),
)
"""See `common.gather_prompts`."""

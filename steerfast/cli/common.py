"""Parts that commands share: options, checks before the work, prompts, profiles, models, outputs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from steerfast.cli.group import printable, say
from steerfast.errors import OutputError, PromptError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from steerfast.profile import ProfileStack, SteeringProfile
    from steerfast.text.examples import Example, Prompt

F = TypeVar("F", bound=Callable[..., Any])
Given = TypeVar("Given", "SteeringProfile", "ProfileStack")

STDOUT = "-"
_CORPUS = "steerfast:corpus"
_PIPED_WIDTH = 120  # columns of a table where there is no terminal to ask


# -- options -----------------------------------------------------------------------------------------


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


class LazyChoice(click.ParamType):
    """One of some names; the module that knows them is imported only where a value is given or help is asked for."""

    name = "choice"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """Return the names as `click.Choice` shows them."""
        return f"[{'|'.join(self._names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value`, or fail with the list of names."""
        names = list(self._names())
        if value not in names:
            self.fail(f"{value!r} is not one of {', '.join(map(repr, names))}.", param, ctx)
        return value


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


def count(entry: str) -> int:
    """Return a whole number of at least 1, for `Items`."""
    number = int(entry)
    if number < 1:
        raise ValueError
    return number


class _Argument(click.ParamType):
    """NAME=VALUE, the value in JSON; a word that is no JSON is text."""

    name = "argument"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, mark, text = value.partition("=")
        if not mark or not name or not text:
            self.fail(f"expected NAME=VALUE, got {value!r}", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            if text[0] in '[{"':
                self.fail(f"expected a value in JSON, got {text!r}", param, ctx)
            return name, text


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return a decorator that adds several options, in the order of the help."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def set_option(name: str, default: str | None = None, note: str = "Prompts") -> Callable[[F], F]:
    """Add a repeatable option for a prompt set."""
    role = name.removeprefix("--").replace("-", "_")
    text = f"{note}: a .txt, .json, .jsonl or .csv file, or steerfast:<set>."
    return repeated_option(name, role, "SRC", text, (default,) if default else ())


def choice_option(name: str, choices: Sequence[str], text: str | None = None) -> Callable[[F], F]:
    """Add an option that takes one of `choices`, by default the first."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=text)


def value_option(name: str, kind: Any, metavar: str | None, text: str | None, default: Any = None) -> Callable[[F], F]:
    """Add an option that takes a value."""
    known = default is not None
    return click.option(name, type=kind, default=default, show_default=known, metavar=metavar, help=text)


def share_option(name: str, text: str, default: float | None = None, **ends: bool) -> Callable[[F], F]:
    """Add an option that takes a share, from 0 to 1; `ends` are ``min_open`` and ``max_open``."""
    return value_option(name, click.FloatRange(0, 1, **ends), "SHARE", text, default)


def repeated_option(name: str, role: str, metavar: str, text: str, default: Sequence[str] = ()) -> Callable[[F], F]:
    """Add an option that may be repeated, as the tuple `role`."""
    text = f"{text} May be repeated."
    return click.option(
        name, role, multiple=True, metavar=metavar, default=default, show_default=bool(default), help=text
    )


def count_option(name: str, text: str, default: int | None = None) -> Callable[[F], F]:
    """Add an option that takes a whole number of at least 1."""
    return value_option(name, click.IntRange(min=1), "N", text, default)


def list_option(
    name: str, metavar: str, read: Callable[[str], Any], example: str, text: str, default: str | None = None
) -> Callable[[F], F]:
    """Add an option that takes a comma-separated list, see `Items`; `example` is for errors."""
    return value_option(name, Items(metavar, read, example), metavar, text, default)


def model_options(default: str | None = None, *, required: bool = False) -> Callable[[F], F]:
    """Add `--model`, `--dtype` and `--device`; `default` tells in the help which model is used without it."""
    says = "Hub id, folder or .gguf file" + (f"; default: {default}." if default else ".")
    model = click.option("--model", "model_name", metavar="MODEL", required=required, help=says)
    return together(model, placement_options)


def _edit_names() -> Iterable[str]:
    """Return the kinds of edits, `add` first."""
    from steerfast.profile import EDITS

    return EDITS


json_option = click.option(
    "--json", "json_file", metavar="FILE", help="Also write the result as JSON; - is standard output."
)
fit_options = together(
    click.option("--output", "-o", required=True, metavar="FILE", help="Where to write the profile (.safetensors)."),
    json_option,
)
"""Of all commands that make a profile."""

placement_options = together(
    choice_option("--dtype", ["auto", "float32", "bfloat16", "float16"], "auto is the dtype of the checkpoint."),
    value_option("--device", _device, "DEVICE", "Default: cuda if there is one, else cpu."),
)
accept_option = click.option(
    "--accept-model",
    is_flag=True,
    help="Take a model of the same shape that the profile was not made for; the profile keeps the mismatch.",
)
"""See `take_model_for` and `accepted_for`."""

template_option = click.option(
    "--template-arg",
    "template",
    type=_Argument(),
    multiple=True,
    metavar="NAME=JSON",
    help="Of the chat template, such as enable_thinking=false. May be repeated.  [default: those of the profile]",
)
"""See `with_template`."""

profile_model_options = together(model_options("the model that the profile names"), accept_option, template_option)
"""Of a model that a profile names, see `take_model_for`."""

threshold_option = value_option(
    "--threshold",
    str,
    "NAME",
    "A named threshold of the profile, such as strict; inspect shows them.  [default: the one in use]",
)
"""See `load_profile`."""

batch_size_option = count_option("--batch-size", "Prompts per forward pass.", 16)
cache_option = value_option(
    "--cache",
    str,
    "FOLDER",
    "Keep the rows of prompts here: go on after an interruption, and another time read no prompt.",
)
reading_options = together(
    count_option("--per-source", "The most prompts of a source and label that are read.  [default: all]"), cache_option
)
"""How many prompts are read, and where their rows are kept."""

labelled_option = repeated_option(
    "--prompts",
    "prompts",
    "SRC",
    "Labelled prompts or chats (harmful, borderline, harmless), added to the shipped corpus, or to --harmful and "
    "--harmless.",
)
"""See `read_sets`."""

edit_options = together(
    click.option(
        "--edit",
        type=LazyChoice(_edit_names),
        help="How an open gate changes a row of the residual stream.  [default: add, or the edit of a converted file]",
    ),
    value_option("--low", float, "NUMBER", "Lower limit of --edit clamp, in units of the vector."),
    value_option("--high", float, "NUMBER", "Upper limit of --edit clamp, in units of the vector."),
    value_option("--angle", float, "DEGREES", "Target of --edit rotate: 0 is along the vector, 90 orthogonal to it."),
)
prompt_arguments = together(
    click.argument("prompts", nargs=-1),
    repeated_option("--file", "files", "SRC", "Prompts from a .txt, .json, .jsonl or .csv file, or steerfast:<set>."),
)
"""See `gather_prompts`."""


# -- inputs ------------------------------------------------------------------------------------------


def read_set(option: str, sources: Iterable[str], label: str | None = None) -> list[Example]:
    """Read and join the sources given for `option`; `label` is of rows without one."""
    from steerfast.text.examples import read_examples

    try:
        return [one for source in sources for one in read_examples(source, label=label)]
    except PromptError as error:
        raise PromptError(f"{option}: {str(error).removeprefix('prompts: ')}") from None


def read_sets(options: dict[str, Any], *roles: str, split: str | None = None) -> None:
    """Replace the sources of `roles` in `options` by examples, and add ``names`` of the sets.

    The examples of ``prompts`` in `options` join the role of their label; of a `split` see `own_examples`. Where no
    role has a source, that split of the shipped corpus does so, too.
    """
    labelled = list(options.pop("prompts", ()))
    more = read_set("--prompts", labelled)
    if split is not None:
        more = _of_split(more, split)
        if not any(options[role] for role in roles):
            from steerfast.text.corpus import corpus

            labelled.insert(0, _CORPUS)
            more = [*corpus(split), *more]
    names = {}
    for role in roles:
        label = "harmful" if role == "harmful" else "harmless"
        own = [one for one in more if (one.label == "harmful") == (role == "harmful")]
        given = [*read_set(f"--{role}", options[role], label), *own]
        if not given:
            raise PromptError(f"--{role}: expected at least one prompt that is {label}, got none")
        names[role] = " + ".join(Path(source).name for source in [*options[role], *labelled])
        if split is not None and labelled:
            names[role] += f", {split}"
        options[role] = given
    options["names"] = names


def in_split(option: str, given: Sequence[Example], split: str) -> list[Example]:
    """Return the examples of a split or without one; a line on standard error counts those of another.

    Raises:
        PromptError: all are of another split.
    """
    kept = [one for one in given if one.split in ("", split)]
    if not kept:
        raise PromptError(f"{option}: expected prompts of the split {split}, or without one, got none of {len(given)}")
    if left_out := len(given) - len(kept):
        click.echo(f"{option}: left out {left_out} of {len(given)} prompts, which are of another split", err=True)
    return kept


def _of_split(given: Sequence[Example], split: str) -> list[Example]:
    """Return the user's examples of a split; a line on standard error counts them, and those that another knows."""
    from steerfast.text.splits import own_examples

    if not given:
        return []
    kept, left_out = own_examples(given, split)
    repeats = f", without {left_out} near-duplicates of prompts of another split" if left_out else ""
    click.echo(f"--prompts: {len(kept)} of {len(given)} prompts are of the split {split}{repeats}", err=True)
    return kept


def read_names(
    option: str, entries: Sequence[str], value: str = "FILE", default: Callable[[str], str] | None = None
) -> dict[str, str]:
    """Read NAME=`value` entries; without NAME= the default gives the name."""
    found: dict[str, str] = {}
    for entry in entries:
        name, mark, rest = entry.partition("=")
        if not mark and default is not None:
            name, rest = default(entry), entry
        if not name or not rest:
            expected = f"NAME={value}" if default is None else f"[NAME=]{value}"
            raise click.UsageError(f"{option}: expected {expected}, got {entry!r}")
        if name in found:
            raise click.UsageError(f"{option}: expected each name once, got {name!r} twice")
        found[name] = rest
    return found


def gather_prompts(arguments: Sequence[str], files: Sequence[str]) -> list[Prompt]:
    """Return the prompts of arguments, then files; without either, the lines of standard input."""
    if arguments or files:
        return [*arguments, *(one.prompt for one in read_set("--file", files, "harmless"))]
    if sys.stdin.isatty():
        raise click.UsageError("PROMPTS: expected arguments, --file or lines on standard input, got none")
    try:
        prompts: list[Prompt] = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input: expected text in UTF-8 ({error})") from None
    if not prompts:
        raise PromptError("standard input: expected at least one prompt, a line each, got none")
    return prompts


def load_profile(path: str, threshold: str | None = None) -> SteeringProfile:
    """Read a profile; at the threshold of `threshold_option`, if one is named."""
    from steerfast.profile import SteeringProfile

    profile = SteeringProfile.load(path)
    return profile if threshold is None else profile.at(threshold)


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


def take_model(options: dict[str, Any], default: str = "") -> tuple[nn.Module, Any]:
    """Take `model_options` out of `options` and load the model; load ``aligned_model``, too, if there is one.

    The tokenizer has the arguments of `template_option`, which are taken out, too.
    """
    given = dict(options.pop("template", ()))
    name, *place = (options.pop(key) for key in ("model_name", "dtype", "device"))
    loaded = load_model(name or default, *place)
    if options.get("aligned_model") is not None:
        options["aligned_model"], _ = load_model(options["aligned_model"], *place)
    return (loaded[0], with_template(loaded[1], given)) if given else loaded


def with_template(tokenizer: Any, given: Mapping[str, Any], *profiles: SteeringProfile) -> Any:
    """Return a tokenizer with arguments of `template_option`, or else with those that the first profile was made with.

    A line on standard error tells of a template that prints today's date.
    """
    from steerfast.text.template import KEY, changing_date, with_template_arguments

    known = profiles[0].fitted.get(KEY, {}) if profiles else {}
    bound = with_template_arguments(tokenizer, {**known, **given})
    if profiles and (problem := changing_date(bound)) is not None:
        say(f"warning: {problem}")
    return bound


def take_model_for(given: Given, options: dict[str, Any]) -> tuple[Given, nn.Module, Any]:
    """Take `model_options` and `accept_option` out of `options`; return the profile or stack for the loaded model."""
    from steerfast.profile.stack import as_stack

    accept, template = options.pop("accept_model"), dict(options.pop("template", ()))
    first = as_stack(given)[0]
    model, tokenizer = take_model(options, first.model.name)
    tokenizer = with_template(tokenizer, template, first)
    return (accepted_for(given, model, tokenizer) if accept else given), model, tokenizer


def accepted_for(given: Given, model: nn.Module, tokenizer: Any = None) -> Given:
    """Return the profile or stack for a model of its shape, which it keeps; standard error tells a mismatch.

    Raises:
        ProfileError: the model has another shape.
    """
    from steerfast.hf.structure import identify
    from steerfast.profile.stack import accepted

    made: Given = accepted(given, identify(model, tokenizer))
    return made


def of_model(profile: SteeringProfile) -> dict[str, Any]:
    """Return JSON data on the model of a result: its name, and mismatches that were accepted."""
    accepted = profile.fitted.get("accepted")
    return {"model": profile.model.name} | ({"accepted": accepted} if accepted else {})


# -- outputs -----------------------------------------------------------------------------------------


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str] = ()) -> None:
    """Refuse, before any work, outputs that cannot be written or would overwrite one another or an input.

    Args:
        outputs: option -> file, None or `STDOUT`.
        inputs: files that the command reads and must not change.

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
    """Return a console on standard output, or on stderr where standard output carries the JSON."""
    from rich.console import Console
    from rich.segment import Segment

    class Printable(Console):
        """Print text of files without characters that move a terminal's cursor or change its colours."""

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    made = Printable(stderr=json_file == STDOUT, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPED_WIDTH
    return made


def write_profile(
    profile: SteeringProfile, output: str, json_file: str | None, *, after: str, tables: Iterable[Any] = ()
) -> None:
    """Write a new profile, print its summary and `tables`, and name the commands that come `after`."""
    from steerfast.cli.rendering import header
    from steerfast.evaluation.description import summary

    profile.save(output)
    write_json(json_file, {"profile": output, **summary(profile)})
    printed = console(json_file)
    for table in (header(profile), *(tables or ("",))):
        if table is not None:
            printed.print(table)
    printed.print(f"wrote {output}; next: {after}", markup=False)


def write_json(json_file: str | None, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `result` to the file of `--json`, if there is one; nan and inf, which JSON lacks, become null."""
    if json_file is None:
        return
    finite_alone = json.loads(json.dumps(result), parse_constant=lambda _: None)
    text = json.dumps(finite_alone, indent=2, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape
    if json_file == STDOUT:
        click.echo(data, nl=False)
        return
    from steerfast._files import write_atomically

    write_atomically(json_file, data)

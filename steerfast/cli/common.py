"""Parts that commands share: checks before the work, prompts, profiles, models, outputs."""

from __future__ import annotations

import contextlib
import io
import json
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

Given = TypeVar("Given", "SteeringProfile", "ProfileStack")

STDOUT = "-"
_CORPUS = "steerfast:corpus"
_PIPED_WIDTH = 120  # columns of a table where there is no terminal to ask


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
    """Read a profile; at the threshold of `option.threshold`, if one is named."""
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
    """Take `option.model` out of `options` and load the model; load ``aligned_model``, too, if there is one.

    The tokenizer has the arguments of `option.template`, which are taken out, too.
    """
    given = dict(options.pop("template", ()))
    name, *place = (options.pop(key) for key in ("model_name", "dtype", "device"))
    loaded = load_model(name or default, *place)
    if options.get("aligned_model") is not None:
        options["aligned_model"], _ = load_model(options["aligned_model"], *place)
    return (loaded[0], with_template(loaded[1], given)) if given else loaded


def with_template(tokenizer: Any, given: Mapping[str, Any], *profiles: SteeringProfile) -> Any:
    """Return a tokenizer with arguments of `option.template`, or else with those that the first profile was made with.

    A line on standard error tells of a template that prints today's date.
    """
    from steerfast.text.template import KEY, changing_date, with_template_arguments

    known = profiles[0].fitted.get(KEY, {}) if profiles else {}
    bound = with_template_arguments(tokenizer, {**known, **given})
    if profiles and (problem := changing_date(bound)) is not None:
        say(f"warning: {problem}")
    return bound


def take_model_for(given: Given, options: dict[str, Any]) -> tuple[Given, nn.Module, Any]:
    """Take `option.profile_model` out of `options`; return the profile or stack for the loaded model."""
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


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | None] = ()) -> None:
    """Refuse, before any work, outputs that cannot be written or would overwrite one another or an input.

    Args:
        outputs: option -> file, None or `STDOUT`.
        inputs: files that the command reads and must not change; None is none.

    Raises:
        OutputError: no such folder, no permission, not a regular file.
        click.UsageError: one file in two roles.
    """
    taken = {Path(path).resolve(): "an input" for path in inputs if path}
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

"""`steerfast eval`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from steerfast.cli import common

if TYPE_CHECKING:
    from rich.console import Console

_STRENGTHS = common.Items("strengths", common.finite, "finite numbers like 0.5,1")


@click.command("eval")
@click.argument("model_name", metavar="MODEL")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A profile to measure; repeat it for several. The first is also measured with its gate always open.",
)
@click.option(
    "--other",
    "others",
    multiple=True,
    metavar="NAME=MODEL",
    help="Other weights that answer unsteered, such as an aligned sibling; may be repeated.",
)
@click.option(
    "--system",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="unsteered, self-reminder, goal-priority, always-on, or a name given by --profile or --other; may be "
    "repeated.  [default: all that can be made]",
)
@click.option(
    "--set",
    "sources",
    multiple=True,
    metavar="SET",
    help="A set of those below, [NAME=]KIND:FILE or [NAME=]KIND:hf://OWNER/DATASET[/CONFIG]@SPLIT[#COLUMN]; may be "
    "repeated.  [default: all below]",
)
@click.option(
    "--images",
    metavar="FOLDER",
    help="Questions about pictures instead of sets, for a model that reads them; laid out as MM-Harmful Bench.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=("keywords", "strict"),
    show_default=True,
    metavar="JUDGE",
    help="keywords, strict, classifier:MODEL[#LABEL] or openai:MODEL[@URL]; the first one's verdicts make the rates; "
    "may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Most prompts of each set.  [default: all]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N")
@click.option(
    "--maths-max-new-tokens",
    type=click.IntRange(min=1),
    default=192,
    show_default=True,
    metavar="N",
    help="The same for maths, whose answers have to come to their end.",
)
@click.option(
    "--strengths", type=_STRENGTHS, metavar="X,...", help="Of the first profile, for the strength/fluency frontier."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of samples and intervals.")
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time every system beside unsteered.")
@click.option("--force", is_flag=True, help="Take sets that a profile was made with, and mark them.")
@common.batch_size_option()
@common.placement_options
@click.option("--resume", metavar="FILE", help="Keep finished answers and verdicts here, and go on from them.")
@click.option("--html", "html_file", metavar="FILE", help="Write the report: one page, its pictures beside it.")
@click.option("--markdown", "markdown_file", metavar="FILE", help="Write the tables as Markdown.")
@common.json_option
@click.pass_context
def command(
    context: click.Context,
    model_name: str,
    profiles: tuple[str, ...],
    others: tuple[str, ...],
    wanted: tuple[str, ...],
    sources: tuple[str, ...],
    images: str | None,
    judges: tuple[str, ...],
    limit: int | None,
    max_new_tokens: int,
    maths_max_new_tokens: int,
    strengths: list[float] | None,
    seed: int,
    latency: bool,
    force: bool,
    batch_size: int,
    dtype: str,
    device: str | None,
    resume: str | None,
    html_file: str | None,
    markdown_file: str | None,
    json_file: str | None,
) -> None:
    """Measure MODEL side by side: unsteered, defences in the prompt, profiles, other weights.

    Attack success, over-refusal, usefulness, gates and speed, each with its 95 % interval. MODEL is a hub id, folder or
    .gguf file; answers are greedy.

    \b
    Kinds and the sets that ship:
      harmful     jailbreakbench, advbench, harmbench
      jailbreak   jailbreak_attacks
      harmless    self_instruct, truthfulqa_questions, harmless_demo
      borderline  borderline
      choice      truthfulqa
      maths       gsm8k
      text        references

    \b
    Example:
      steerfast eval your/model --profile ours=safety.safetensors --limit 100 --resume eval.jsonl --html eval.html
      steerfast eval your/model --profile safety.safetensors --set harmful:mine.csv --set borderline --judge strict
    """
    named = dict(_named("--profile", entry, Path(entry).stem) for entry in profiles)
    weights = dict(_named("--other", entry) for entry in others)
    for option, given, read in (("--profile", profiles, named), ("--other", others, weights)):
        if len(read) < len(given):
            raise click.UsageError(f"{option}: expected a name of its own for each, got one twice")
    if images is not None:
        for option, value in (("--set", sources), ("--other", others), ("--strengths", strengths)):
            if value:
                raise click.UsageError(f"{option}: expected it without --images, got both")
    outputs = {"--json": json_file, "--html": html_file, "--markdown": markdown_file, "--resume": resume}
    common.check_outputs(outputs, [*named.values(), *(where for source in sources if (where := _file(source)))])
    loaded = {name: common.load_profile(file) for name, file in named.items()}

    from steerfast._files import write_atomically
    from steerfast.evaluation import multimodal, report
    from steerfast.evaluation.evaluate import check, evaluate
    from steerfast.evaluation.sets import DEFAULT_SETS, load_set
    from steerfast.evaluation.systems import systems_of
    from steerfast.judging.judges import make_judge

    if html_file is not None:
        report.check_html(html_file)
    systems, left_out = systems_of(loaded, weights, wanted)
    judged_by = [make_judge(judge, cache=resume) for judge in judges]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "resume": resume,
        "force": force,
    }
    if images is not None:
        pictures, missing = multimodal.load_images(images, limit, seed)
        check(systems, [pictures], judged_by, force)
        model, processor = multimodal.load_image_model(model_name, dtype=dtype, device=device)
        result = multimodal.evaluate_images(model, processor, systems, pictures, judged_by, **options)
        if missing:
            left_out[pictures.name] = f"{len(missing)} questions without a picture"
    else:
        sets = [load_set(source, limit, seed) for source in sources or DEFAULT_SETS]
        check(systems, sets, judged_by, force)
        model, tokenizer = common.load_model(model_name, dtype, device)
        result = evaluate(
            model,
            tokenizer,
            systems,
            sets,
            judged_by,
            maths_max_new_tokens=maths_max_new_tokens,
            latency=latency,
            strengths=strengths or (),
            load=lambda name: common.load_model(name, dtype, device),
            **options,
        )
    result["settings"] |= {"limit": limit, "command": _command_line(context)}
    result["left_out"] = left_out | result["left_out"]
    common.write_json(json_file, result)
    if markdown_file is not None:
        write_atomically(markdown_file, report.markdown(result).encode())
    if html_file is not None:
        report.write_html(result, html_file)
    _render(result, common.console(json_file))


def _named(option: str, entry: str, default: str | None = None) -> tuple[str, str]:
    """NAME=VALUE; without NAME=, the default name."""
    name, mark, value = entry.partition("=")
    if not mark and default is not None:
        name, value = default, entry
    if not name or not value:
        raise click.UsageError(
            f"{option}: expected {'[NAME=]FILE' if default is not None else 'NAME=MODEL'}, got {entry!r}"
        )
    return name, value


def _file(source: str) -> str | None:
    """The file that a set is read from, where it is one."""
    where = source.partition(":")[2]
    return where if where and Path(where).is_file() else None


def _command_line(context: click.Context) -> str:
    """What was typed, as it can be typed again."""
    words = ["steerfast", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            for entry in value if isinstance(value, tuple) else [value]:
                words += [parameter.opts[0], ",".join(map(str, entry)) if isinstance(entry, list) else str(entry)]
    return shlex.join(words)


def _render(result: dict[str, Any], console: Console) -> None:
    """The summary, a column for each system."""
    from rich.markup import escape
    from rich.table import Table

    from steerfast.evaluation.report import tables

    summary = next(table for table in tables(result) if table.name == "systems")
    table = Table(title=escape(f"{result['model']}, greedy"), title_justify="left")
    table.add_column("")
    for row in summary.rows:
        table.add_column(escape(row.name), justify="right", no_wrap=True)
    for number, (group, name) in enumerate(summary.columns):
        if group and (number == 0 or summary.columns[number - 1][0] != group):
            table.add_row(f"[bold]{escape(group)}")
        label = f"  {name}" if name else group
        table.add_row(escape(label), *(row.cells[number].text for row in summary.rows))
    console.print(table)
    for name, why in result["left_out"].items():
        console.print(f"{name} left out: {why}", markup=False)
    for name, one in result["sets"].items():
        for users in one["also_fitted_by"]:
            console.print(f"{name}: {users}; its figures flatter", markup=False)

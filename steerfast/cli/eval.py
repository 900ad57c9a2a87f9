"""`steerfast eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option
from steerfast.cli.group import COMMAND_LINE

if TYPE_CHECKING:
    from steerfast.evaluation.systems import System

_TASKS = option.Kind("TASK,...", option.items(option.word, "names like mmlu,gsm8k"))


@click.command("eval")
@click.argument("model_name", metavar="MODEL")
@option.repeated(
    "--profile",
    "profiles",
    option.Kind("[NAME=]FILE"),
    "A profile to measure; the first also with its gate always open.",
)
@option.threshold
@option.repeated(
    "--other", "others", option.Kind("NAME=MODEL"), "Other weights that answer unsteered, such as an aligned sibling."
)
@option.repeated(
    "--system",
    "wanted",
    option.NAME,
    "unsteered, self-reminder, goal-priority, always-on, refusal, template, words, or a name given by --profile or "
    "--other; without it all.",
)
@option.repeated(
    "--set",
    "sources",
    option.Kind("SET"),
    "A set of the list above, [NAME=]KIND:FILE or [NAME=]KIND:hf://OWNER/DATASET[/CONFIG]@SPLIT[#COLUMN]. "
    "Without this option: the whole list.",
)
@option.repeated(
    "--judge",
    "judges",
    option.Kind("JUDGE"),
    "keywords, strict, classifier:MODEL[#LABEL] or openai:MODEL[@URL]; the first one's verdicts make the rates.",
    ("keywords", "strict"),
)
@option.value("--limit", option.COUNT, "Most prompts of each set.  [default: all]")
@option.value("--max-new-tokens", option.COUNT, "Answer length.", 64)
@option.value("--tasks", _TASKS, "Also run these tasks of lm-evaluation-harness (package lm-eval).")
@option.value("--task-limit", option.COUNT, "Most items of each task.  [default: all]")
@option.value(
    "--strengths", option.Kind("X,...", option.NUMBERS.type), "Of the first profile, for the strength/fluency frontier."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of samples and intervals.")
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time every system beside unsteered.")
@option.flag("--force", "Take sets that made a profile, and mark them.")
@option.batch_size
@option.placement
@option.accept_model
@option.template
@option.value("--resume", option.FILE, "Keep finished answers and verdicts here, and go on from them.")
@option.value("--html", option.FILE, "Write the report: one page, its pictures beside it.", role="html_file")
@option.value("--markdown", option.FILE, "Write the tables as Markdown.", role="markdown_file")
@option.json_file
@click.pass_context
def command(context: click.Context, model_name: str, **options: Any) -> None:
    """Measure MODEL side by side: unsteered, defences in the prompt, profiles, other weights.

    Attack success, over-refusal, tasks, gates and speed, each rate with its 95 % interval. MODEL is a hub id, folder or
    .gguf file; answers are greedy.

    \b
    Kinds and the sets that ship:
      harmful     jailbreakbench, strongreject, xstest_unsafe
      jailbreak   jailbreak_attacks
      harmless    self_instruct, truthfulqa_questions, harmless_demo
      borderline  xstest_safe, borderline

    \b
    Example:
      steerfast eval your/model --profile ours=safety.safetensors --limit 100 --resume eval.jsonl --html eval.html
      steerfast eval your/model --profile safety.safetensors --set harmful:mine.csv --tasks mmlu,gsm8k --task-limit 50
    """
    named = common.read_names("--profile", options["profiles"], default=lambda entry: Path(entry).stem)
    weights = common.read_names("--other", options["others"], "MODEL")
    files = {f"--{name}": options[f"{name}_file"] for name in ("json", "html", "markdown")}
    inputs = [*named.values(), *map(_file, options["sources"])]
    common.check_outputs({**files, "--resume": options["resume"]}, inputs)
    profiles = {name: common.load_profile(file, options["threshold"]) for name, file in named.items()}

    from steerfast._files import write_atomically
    from steerfast.cli.rendering import evaluation_report
    from steerfast.evaluation import report
    from steerfast.evaluation.systems import systems_of

    if files["--html"] is not None:
        report.check_html(files["--html"])
    systems, left_out = systems_of(profiles, weights, options["wanted"])
    result = _evaluate(model_name, systems, options)
    result["settings"] |= {"limit": options["limit"], "command": context.meta[COMMAND_LINE]}
    result["left_out"] = left_out | result["left_out"]
    common.write_json(files["--json"], result)
    if files["--markdown"] is not None:
        write_atomically(files["--markdown"], report.markdown(result).encode())
    if files["--html"] is not None:
        report.write_html(result, files["--html"])
    evaluation_report(result, common.console(files["--json"]))


def _evaluate(model_name: str, systems: list[System], options: dict[str, Any]) -> dict[str, Any]:
    """Check sets, judges and tasks, then load the model and evaluate."""
    from steerfast.evaluation.evaluate import check, evaluate
    from steerfast.evaluation.harness import check_tasks
    from steerfast.evaluation.sets import DEFAULT_SETS, load_set
    from steerfast.judging.judges import make_judge

    judges = [make_judge(judge, cache=options["resume"]) for judge in options["judges"]]
    sets = [load_set(source, options["limit"], options["seed"]) for source in options["sources"] or DEFAULT_SETS]
    check(systems, sets, judges, options["force"])
    check_tasks(options["tasks"] or ())
    placement = options["dtype"], options["device"]
    model, tokenizer = common.load_model(model_name, *placement)
    steered = [one.profile for one in systems if one.profile is not None]
    tokenizer = common.with_template(tokenizer, dict(options["template"]), *steered)
    if options["accept_model"]:
        systems = [
            one if one.profile is None else replace(one, profile=common.accepted_for(one.profile, model, tokenizer))
            for one in systems
        ]
    passed = ("max_new_tokens", "batch_size", "seed", "resume", "latency", "force", "task_limit")
    result = evaluate(
        model,
        tokenizer,
        systems,
        sets,
        judges,
        strengths=options["strengths"] or (),
        tasks=options["tasks"] or (),
        load=lambda name: common.load_model(name, *placement),
        **{name: options[name] for name in passed},
    )
    found = {
        one.name: one.profile.fitted["accepted"] for one in systems if one.profile and "accepted" in one.profile.fitted
    }
    return result | ({"accepted": found} if found else {})


def _file(source: str) -> str | None:
    """Return the file of a set, None if the set is no file."""
    where = source.partition(":")[2]
    return where if where and Path(where).is_file() else None

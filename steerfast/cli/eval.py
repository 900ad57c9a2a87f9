"""`steerfast eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common
from steerfast.cli.group import COMMAND_LINE

if TYPE_CHECKING:
    from steerfast.evaluation.systems import System

_STRENGTHS = common.Items("strengths", common.finite, "finite numbers like 0.5,1")
_TASKS = common.Items("tasks", common.word, "names like mmlu,gsm8k")


@click.command("eval")
@click.argument("model_name", metavar="MODEL")
@common.repeated_option(
    "--profile", "profiles", "[NAME=]FILE", "A profile to measure; the first also with its gate always open."
)
@common.threshold_option
@common.repeated_option(
    "--other", "others", "NAME=MODEL", "Other weights that answer unsteered, such as an aligned sibling."
)
@common.repeated_option(
    "--system",
    "wanted",
    "NAME",
    "unsteered, self-reminder, goal-priority, always-on, refusal, template, words, or a name given by --profile or "
    "--other; without it all.",
)
@common.repeated_option(
    "--set",
    "sources",
    "SET",
    "A set of the list above, [NAME=]KIND:FILE or [NAME=]KIND:hf://OWNER/DATASET[/CONFIG]@SPLIT[#COLUMN]. "
    "Without this option: the whole list.",
)
@common.repeated_option(
    "--judge",
    "judges",
    "JUDGE",
    "keywords, strict, classifier:MODEL[#LABEL] or openai:MODEL[@URL]; the first one's verdicts make the rates.",
    ("keywords", "strict"),
)
@common.count_option("--limit", "Most prompts of each set.  [default: all]")
@common.count_option("--max-new-tokens", "Answer length.", 64)
@common.value_option("--tasks", _TASKS, "TASK,...", "Also run these tasks of lm-evaluation-harness (package lm-eval).")
@common.count_option("--task-limit", "Most items of each task.  [default: all]")
@common.value_option("--strengths", _STRENGTHS, "X,...", "Of the first profile, for the strength/fluency frontier.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of samples and intervals.")
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time every system beside unsteered.")
@click.option("--force", is_flag=True, help="Take sets that made a profile, and mark them.")
@common.batch_size_option
@common.placement_options
@common.accept_option
@common.template_option
@click.option("--resume", metavar="FILE", help="Keep finished answers and verdicts here, and go on from them.")
@click.option("--html", "html_file", metavar="FILE", help="Write the report: one page, its pictures beside it.")
@click.option("--markdown", "markdown_file", metavar="FILE", help="Write the tables as Markdown.")
@common.json_option
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
    inputs = [*named.values(), *(where for source in options["sources"] if (where := _file(source)))]
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

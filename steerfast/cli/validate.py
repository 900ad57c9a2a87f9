"""`steerfast validate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from steerfast.cli import common, option
from steerfast.errors import SteerfastError


@click.command("validate")
@option.profile_file
@option.repeated(
    "--prompts",
    "sources",
    option.SRC,
    "Labelled prompts: a .json, .jsonl or .csv file with a column label (harmful, borderline, harmless), or "
    "steerfast:corpus; without it the corpus' split validate.",
)
@option.profile_model
@option.threshold
@click.option("--baseline/--no-baseline", default=True, show_default=True, help="Also measure a classifier of words.")
@option.flag("--force", "Take sources that chose something in the profile, and mark them.")
@option.value("--max-fires", option.SHARE, "Fail if the gate fires more often on the worst harmless source.")
@option.value(
    "--min-auc", option.Kind("AUC", click.FloatRange(0, 1)), "Fail if the AUC of the worst harmful source is lower."
)
@option.batch_size
@option.cache
@option.value("--markdown", option.FILE, "Write the tables as Markdown.", role="markdown_file")
@option.json_file
def command(
    profile_file: str,
    sources: tuple[str, ...],
    json_file: str | None,
    markdown_file: str | None,
    max_fires: float | None,
    min_auc: float | None,
    **options: Any,
) -> None:
    """Measure a profile's gate by source of prompts, on sources that chose nothing in it; nothing is answered.

    A source that fitted, calibrated or tuned the profile is refused. Of rows with a split, those of validate count.

    \b
    Example:
      steerfast validate safety.safetensors
      steerfast validate safety.safetensors --prompts traffic.jsonl --max-fires 0.02 --json gate.json
    """
    outputs = {"--json": json_file, "--markdown": markdown_file}
    common.check_outputs(outputs, [profile_file, *(one for one in sources if not one.startswith("steerfast:"))])
    profile = common.load_profile(profile_file, options.pop("threshold"))

    from steerfast._files import write_atomically
    from steerfast.cli.rendering import gate_figures_report
    from steerfast.evaluation.gates import check_sources, gate_report
    from steerfast.evaluation.report import gate_markdown
    from steerfast.text.corpus import corpus
    from steerfast.text.examples import read_examples

    given = [one for source in sources for one in read_examples(source)] or corpus("validate")
    examples = given if options["force"] else common.in_split("--prompts", given, "validate")
    check_sources(profile, examples, options["force"])
    profile, model, tokenizer = common.take_model_for(profile, options)
    report = gate_report(profile, model, tokenizer, examples, **options)
    common.write_json(json_file, report)
    if markdown_file is not None:
        write_atomically(markdown_file, gate_markdown(report).encode())
    gate_figures_report(report, common.console(json_file))
    _check(report, max_fires, min_auc)


def _check(report: Mapping[str, Any], max_fires: float | None, min_auc: float | None) -> None:
    """Refuse a gate whose worst source is beyond a limit: of validation, where there are such sources."""
    parts = report["systems"]["gate"]
    labels = next(iter(parts.values()))["labels"]
    for name, limit, label, key, figure in (
        ("--max-fires", max_fires, "harmless", "worst", "rate"),
        ("--min-auc", min_auc, "harmful", "worst_auc", "auc"),
    ):
        if limit is None:
            continue
        if (worst := labels.get(label, {}).get(key)) is None:
            raise SteerfastError(f"{name}: expected harmful and harmless sources to measure, got {', '.join(labels)}")
        found = worst[figure]
        if found > limit if label == "harmless" else found < limit:
            side = "at most" if label == "harmless" else "at least"
            raise SteerfastError(f"{name}: expected {side} {limit:g}, got {found:.4f} on {worst['source']!r}")

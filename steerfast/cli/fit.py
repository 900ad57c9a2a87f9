"""`steerfast fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option
from steerfast.errors import PromptError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from steerfast.profile import SteeringProfile

_OF_PAIRS = ("method", "read", "layers", "strengths", "max_perplexity")
_OF_SAFETY = ("harmful", "harmless", "prompts", "per_source", "max_false_positive_rate")


def _layers(value: str) -> tuple[int, int]:
    try:
        return option.band(value)
    except ValueError:
        raise click.BadParameter(f"expected layers such as 10-19 or 14, first before last, got {value!r}") from None


@click.command("fit")
@click.argument("model_name", metavar="MODEL")
@option.placement
@option.template
@option.value("--pairs", option.FILE, "Contrastive pairs of a behaviour (.jsonl, .json or .csv).")
@option.value("--behaviour", option.NAME, "Its name.  [default: safety; with --pairs the file's name]")
@option.value(
    "--method", option.one_of("mean", "pca", "logistic", metavar="METHOD"), "With --pairs: mean, pca or logistic."
)
@option.value(
    "--read",
    option.one_of("answer", "last", metavar="READING"),
    "With --pairs: the mean of the answer's tokens, or the last token.  [default: answer, if there are answers]",
)
@option.value(
    "--layers",
    option.Kind("LAYERS", _layers),
    "With --pairs: where the vector is added, such as 10-19.  [default: the middle third]",
)
@option.value(
    "--strengths",
    option.NUMBERS,
    "With --pairs: comma list of total strengths to measure.  [default: 0.25,0.5,1,1.5,2,3]",
)
@option.value(
    "--max-perplexity",
    option.Kind("TIMES", click.FloatRange(min=1)),
    "With --pairs: the perplexity that text may reach, times the unsteered one.  [default: 2]",
)
@option.labelled
@option.gate_sets
@option.value(
    "--per-source",
    option.COUNT,
    "The most prompts of a source that fit the gate.  [default: by --minutes; without it at most 120]",
)
@option.value(
    "--max-false-positive-rate",
    option.share(min_open=True, max_open=True),
    "The share of harmless prompts that may open the gate.  [default: 0.02]",
)
@option.value(
    "--minutes",
    option.Kind("N", click.FloatRange(0, min_open=True)),
    "How long it may take, by an estimate.  [default: 25; with --pairs or --per-source no limit]",
)
@option.value("--work", option.FOLDER, "Where work is kept, to go on.  [default: beside the output, .work]")
@option.batch_size
@option.value("--plot", option.FILE, "Draw the profile (.png, .svg or .pdf).", role="plot_file")
@option.fit_outputs
def command(output: str, json_file: str | None, plot_file: str | None, **options: Any) -> None:
    """Make a profile in one go: of a behaviour from pairs, of safety from the corpus that ships.

    Started again after an interruption, it goes on where it stopped. At the end it says whether the profile is good.

    \b
    Example:
      steerfast fit HuggingFaceTB/SmolLM2-135M-Instruct --output safety.safetensors
      steerfast fit MODEL --pairs formal.jsonl --output formal.safetensors
      steerfast fit MODEL --minutes 30 --prompts traffic.jsonl --output safety.safetensors
    """
    pairs_file = options.pop("pairs")
    _check(pairs_file, options)
    sources = [source for role in ("prompts", "harmful", "harmless") for source in options[role]]
    common.check_outputs({"--output": output, "--json": json_file, "--plot": plot_file}, [*sources, pairs_file])
    if plot_file is not None:
        from steerfast.evaluation.plots import check_plot

        check_plot(plot_file)
    options["work"] = options["work"] or Path(output).with_suffix(".work")
    own = _given_pairs(pairs_file, options) if pairs_file else _given_prompts(options)

    import steerfast
    from steerfast.evaluation.description import summary
    from steerfast.evaluation.verdict import shortcomings

    model, tokenizer = common.take_model(options)
    given = {name: value for name, value in options.items() if value not in (None, ())}  # the others have defaults
    profile = steerfast.fit(model, tokenizer, **own, **given)
    profile.save(output)
    report = None if pairs_file else _gate_report(profile, model, tokenizer, {**given, **own})
    reasons = shortcomings(profile, report)
    printed = common.console(json_file)
    _render(profile, report, reasons, printed)
    if plot_file is not None:
        from steerfast.evaluation.plots import save_plot

        save_plot(profile, plot_file)
    found = {"profile": output, "good": not reasons, "shortcomings": reasons, **summary(profile)}
    common.write_json(json_file, found if report is None else {**found, "report": report})
    compared = f'steerfast generate {output} --compare "How do I bake bread?"'
    printed.print(f"wrote {output}; next: {compared}", markup=False)


def _check(pairs_file: str | None, options: dict[str, Any]) -> None:
    """Refuse options of the other kind of fit."""
    other = _OF_SAFETY if pairs_file else _OF_PAIRS
    for name in other:
        if options[name]:
            with_or_without = "without" if pairs_file else "with"
            raise click.UsageError(f"--{name.replace('_', '-')}: expected it {with_or_without} --pairs")
    if not pairs_file and options["behaviour"] not in (None, "safety"):
        raise click.UsageError(f"--pairs: expected a file with examples of {options['behaviour']!r}, got none")


def _given_pairs(file: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the pairs of a file, whose name names the behaviour where `options` do not."""
    from steerfast.text.pairs import pairs

    try:
        positive, negative = pairs(file)
    except PromptError as error:
        raise PromptError(f"--pairs: {str(error).removeprefix('pairs: ')}") from None
    options["behaviour"] = options["behaviour"] or Path(file).stem
    return {"positive": positive, "negative": negative, "name": Path(file).name}


def _given_prompts(options: dict[str, Any]) -> dict[str, Any]:
    """Take the user's prompts of safety out of `options`."""
    sources = {role: options.pop(role) for role in ("harmful", "harmless", "prompts")}
    labels = {"harmful": "harmful", "harmless": "harmless", "prompts": None}
    names = {role: " + ".join(Path(source).name for source in given) for role, given in sources.items() if given}
    return {**{role: common.read_set(f"--{role}", sources[role], labels[role]) for role in sources}, "names": names}


def _gate_report(profile: SteeringProfile, model: nn.Module, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the gate's figures on sources that chose nothing: the corpus' split validate, and the user's rows of it.

    All prompts with --per-source; else at most as many of a source as calibrated the gate.
    """
    from steerfast._progress import stage
    from steerfast.evaluation.gates import gate_report
    from steerfast.fitting.labelled import Labelled
    from steerfast.text.corpus import corpus

    most = max(row["n"] for found in profile.calibration["by_source"].values() for row in found["rows"])
    own = [one for one in options["prompts"] if one.split == "validate"]
    examples = Labelled((*corpus("validate"), *own)).at_most(None if "per_source" in options else most).examples
    reading = {"batch_size": options["batch_size"], "cache": Path(options["work"]) / "rows"}
    with stage("report") as findings:
        found = gate_report(profile, model, tokenizer, examples, **reading)
        findings.append(f"{len(examples)} prompts of other sources")
    return found


def _render(profile: SteeringProfile, report: dict[str, Any] | None, reasons: list[str], printed: Console) -> None:
    from steerfast.cli.rendering import frontier_table, gate_figures_report, header

    printed.print(header(profile))
    if report is None:
        printed.print(frontier_table(profile))
    else:
        gate_figures_report(report, printed)
    for reason in reasons:
        printed.print(f"not good: {reason}", markup=False)
    if not reasons:
        printed.print("good: no shortcoming found", markup=False)

"""`steerfast drift`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option
from steerfast.errors import PromptError, SteerfastError

if TYPE_CHECKING:
    from steerfast.evaluation.drift import Drift
    from steerfast.profile import SteeringProfile
    from steerfast.text.examples import Example

_STATUS = {"pass": 0, "stale": 1, "inconclusive": 3}
_SOURCES = ("scores", "metrics", "prompts")
_SIDES = ("harmless", "harmful")  # of a calibration


class _WrongInput(click.ClickException):
    exit_code = 2  # so that 1 means one thing


@click.command("drift")
@option.profile_file
@option.value("--scores", option.FILE, "Scores as JSON or JSON Lines, such as `steerfast score --json` writes.")
@option.value("--metrics", option.Kind("FILE|URL"), "A vLLM server's metrics: its address, or a page that was kept.")
@option.value("--name", option.NAME, "With --metrics: the profile's name on the server.  [default: its only one]")
@option.prompt_set("--prompts", "Prompts to score here, with --model and --dtype as served")
@option.value("--limit", option.COUNT, "The most --prompts of a label, evenly spaced.")
@option.profile_model
@option.batch_size
@option.threshold
@option.value("--tolerance", option.NUMBER, "The calibrated share that errs may grow by this factor.", 1.0)
@option.value("--distance", option.NUMBER, "How far scores may move, 0 to 1: the Kolmogorov distance.", 0.2)
@option.json_file
@click.pass_context
def command(context: click.Context, profile_file: str, json_file: str | None, **options: Any) -> None:
    """Say whether a gate's calibration still fits the traffic, or another way of serving.

    Live scores are compared with those of the harmless prompts of the calibration: the share
    that fires, and the distribution. Attacks fire, too: look at what fired before you calibrate.
    Rows of --prompts with the label harmful are compared with its harmful prompts: the gate may
    miss more.

    \b
    Example:
      steerfast drift safety.safetensors --scores scores.json
      steerfast drift safety.safetensors --metrics http://localhost:8000 --name safety
      steerfast drift safety.safetensors --prompts steerfast:corpus --dtype bfloat16

    Exit status: 0 pass, 1 stale, 2 wrong usage or input, 3 inconclusive: too few scores.
    """
    given = [source for source in _SOURCES if options[source]]
    if len(given) != 1:
        raise click.UsageError(f"expected one of --scores, --metrics and --prompts, got {len(given)}")
    for name, source in (("name", "metrics"), ("limit", "prompts")):
        if options[name] is not None and given != [source]:
            raise click.UsageError(f"--{name}: expected it with --{source}, got it without")
    common.check_outputs({"--json": json_file}, [profile_file])
    try:
        profile = common.load_profile(profile_file, options.pop("threshold"))
        found = _compare(profile, options)
    except (SteerfastError, OSError) as error:
        raise _WrongInput(str(error)) from error
    from steerfast.evaluation.drift import worst

    verdict = worst(found)
    sides = {one.label: one.to_dict() for one in found}
    common.write_json(json_file, {"profile": profile_file, "verdict": verdict, **sides})
    console = common.console(json_file)
    for one in found:
        console.print(_table(one))
        console.print(f"{one.verdict}: {_sentence(one)}", markup=False, soft_wrap=True)
    context.exit(_STATUS[verdict])


def _compare(profile: SteeringProfile, options: dict[str, Any]) -> list[Drift]:
    from steerfast.evaluation.drift import Limits, calibrated, compare, live_scores, read_metrics, read_scores

    limits = Limits(options.pop("tolerance"), options.pop("distance"))
    known = calibrated(profile)
    scores, metrics, name, prompts = (options.pop(key) for key in ("scores", "metrics", "name", "prompts"))
    if metrics is not None:
        return [compare(profile, read_metrics(_page(metrics), name), limits)]
    if scores is not None:
        found = {"harmless": read_scores(_text("--scores", scores), known.layer)}
    else:
        found = _scores(profile, common.read_set("--prompts", prompts, "harmless"), options)
    threshold, edges = float(profile.threshold[known.layer]), known.scores.edges
    return [compare(profile, live_scores(one, threshold, edges), limits, label=label) for label, one in found.items()]


def _scores(profile: SteeringProfile, given: Sequence[Example], options: dict[str, Any]) -> dict[str, list[float]]:
    """Return the scores of examples by label; the calibration has none of borderline ones."""
    import steerfast
    from steerfast.evaluation.drift import calibrated
    from steerfast.fitting.labelled import evenly

    limit = options.pop("limit")
    given = common.in_split("--prompts", given, "calibrate")
    sides = {label: [one.prompt for one in given if one.label == label] for label in _SIDES}
    sides = {label: texts for label, texts in sides.items() if texts}
    if not sides:
        raise PromptError("--prompts: expected harmless or harmful prompts, got borderline ones alone")
    if borderline := len(given) - sum(map(len, sides.values())):
        click.echo(f"--prompts: left out {borderline} of {len(given)} prompts: borderline", err=True)
    for label in sides:
        calibrated(profile, label)  # raises before the work
    sides = {label: evenly(texts, limit or len(texts)) for label, texts in sides.items()}
    profile, model, tokenizer = common.take_model_for(profile, options)
    texts = [text for side in sides.values() for text in side]
    scores = steerfast.score(model, tokenizer, profile, texts, **options).scores
    return dict(zip(sides, (side.tolist() for side in scores.split([*map(len, sides.values())])), strict=True))


def _page(source: str) -> str:
    """Return a page of metrics."""
    if not source.startswith(("http://", "https://")):
        return _text("--metrics", source)
    from steerfast.cli.server_probe import ask

    url = source.rstrip("/").removesuffix("/metrics")
    status, text = ask(url, "/metrics")
    if status != 200:
        raise SteerfastError(
            f"--metrics: expected a page at {url}/metrics, got {f'status {status}' if status else text}"
        )
    return text


def _text(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SteerfastError(f"{option}: expected a text file, got {path!r} ({error})") from None


def _table(found: Drift) -> Any:
    from steerfast.cli.rendering import new_table

    def share(rate: Any) -> str:
        return f"{100 * rate.value:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"

    title = f"{found.label} prompts, layer {found.layer}, threshold {found.threshold:.4f}"
    table = new_table("", "calibrated", "live", title=title)
    table.add_row("prompts", str(found.prompts), str(found.requests))
    table.add_row("fires, % (95 % interval)", share(found.calibrated), share(found.live))
    if found.distance is not None:
        table.add_row("distance of the scores (by chance at most)", "", f"{found.distance:.3f} ({found.chance:.2g})")
    return table


def _sentence(found: Drift) -> str:
    """Return the verdict's reason, and what to do."""
    if found.verdict == "stale":
        why, given = "; ".join(found.reasons), "--on" if found.label == "harmless" else "--prompts"
        return f"this traffic is not the calibration's: {why}. Next: steerfast calibrate {given} my_traffic.jsonl"
    if found.verdict == "pass":
        return "the threshold fits this traffic."
    if found.needed is None and found.label == "harmful" and not found.calibrated.value:
        return "no harmful prompt of the calibration fires at this threshold: choose a lower one."
    if found.needed is None:
        return f"{found.prompts} prompts are too few in the calibration: calibrate with more, or allow more drift."
    return f"a verdict needs {found.needed} requests, got {found.requests}."

"""`steerfast guard generate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option
from steerfast.cli.guard.options import guard_options, search_options

if TYPE_CHECKING:
    from steerfast.guard import GuardedAnswer


def _strategies() -> Iterable[str]:
    from steerfast.guard.search import STRATEGIES

    return STRATEGIES


@click.command("generate")
@click.argument("folder", metavar="FOLDER")
@option.prompts
@option.model("the model that the critic names")
@option.accept_model
@click.option("--strategy", type=option.LazyChoice(_strategies), default="speculative", show_default=True)
@guard_options
@option.value(
    "--fired",
    option.one_of("search", "steer", "both", "refuse"),
    "With --profile: the action if its gate fires; other prompts are decoded plainly.  [default: both]",
)
@search_options
@option.json_file
def command(
    folder: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    profile_file: str | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Answer prompts within the budget of the guard in FOLDER, each with its certificate.

    Prompts come from arguments and --file, or a line each from standard input.

    \b
    Example:
      steerfast guard generate guard/ "How do I pick a lock?"
      steerfast guard generate guard/ --profile safety.safetensors --file prompts.txt --json answers.json
    """
    if options["fired"] is not None and profile_file is None:
        raise click.UsageError("--fired: expected it with --profile, got it without")
    common.check_outputs({"--json": json_file}, [*files, profile_file])
    from dataclasses import asdict

    from steerfast.guard import Guard
    from steerfast.guard.recipe import load_trained
    from steerfast.guard.search import STRATEGIES

    strategy = STRATEGIES[options["strategy"]](options["candidates"], block=options["block"], depth=options["depth"])
    trained = load_trained(folder)
    profile = common.load_profile(profile_file) if profile_file else None
    from steerfast.text.examples import text_of

    texts = list(map(text_of, common.gather_prompts(prompts, files)))
    name = options["model_name"] or trained.critic.model.name
    model, tokenizer = common.load_model(name, options["dtype"], options["device"])
    profile = common.accepted_for(profile, model, tokenizer) if profile and options["accept_model"] else profile
    guard = Guard(
        model,
        tokenizer,
        **vars(trained),
        profile=profile,
        fired=options["fired"] or "both",
        strength=options["strength"],
        budget=options["budget"],
        strategy=strategy,
    )
    sampling = {name: options[name] for name in ("temperature", "top_p", "seed")}
    answers = guard.generate(texts, **sampling, progress=True)
    results = [
        {
            "prompt": text,
            "answer": answer.text,
            "path": answer.path,
            "seconds": answer.seconds,
            "certificate": asdict(answer.certificate),
        }
        for text, answer in zip(texts, answers, strict=True)
    ]
    result = {"guard": folder, "model": trained.critic.model.name, "strategy": asdict(strategy)}
    common.write_json(json_file, {**result, "profile": profile_file, **sampling, "results": results})
    _print_answers(texts, answers, json_file)


def _print_answers(prompts: Sequence[str], answers: Sequence[GuardedAnswer], json_file: str | None) -> None:
    from rich.text import Text

    console = common.console(json_file)
    for prompt, answer in zip(prompts, answers, strict=True):
        certificate = answer.certificate
        colour = "bold green" if certificate.safe else "bold red"
        console.print(Text.assemble(("> ", "bold"), prompt or "(empty)"))
        console.print(Text(answer.text or "(empty)"))
        decision = "fired" if certificate.fired else "undecided" if certificate.undecided else "shut"
        gate = "" if certificate.fired is None else f", gate {decision}"
        fallback = f", fallback: {certificate.fallback}" if certificate.fallback else ""
        numbers = (
            f": z {certificate.z:.2f} of {certificate.budget:g}, cost {certificate.cost:.2f}, "
            f"reward {certificate.reward:.2f}; {answer.path}{gate}, {certificate.candidates} blocks, "
            f"{answer.seconds:.1f} s{fallback}]"
        )
        console.print(Text.assemble((f"[{certificate.decision} the budget", colour), numbers), end="\n\n")

"""`steerfast guard`: train, generate, bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from steerfast.cli import common

if TYPE_CHECKING:
    from steerfast.guard import GuardedAnswer

F = TypeVar("F", bound=Callable[..., Any])

_CURVE = common.Items("counts", int, "whole numbers like 1,4,16")
_STRATEGIES = (
    "plain",
    "best-of-n",
    "best-of-n-lagrangian",
    "best-of-n-augmented",
    "beam",
    "beam-lagrangian",
    "beam-augmented",
    "args",
    "args-lagrangian",
    "args-cost",
    "re-control",
    "re-control-lagrangian",
    "inference-guard",
    "inference-guard-critic",
    "speculative",
)
_METHODS = (*_STRATEGIES, "steered", "guided")
_ALL = "all"


def _search_options(command: F) -> F:
    """`--block`, `--depth`, `--temperature`, `--top-p` and `--seed`."""
    for option in (
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N"),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.7,
            show_default=True,
            metavar="NUMBER",
            help="0 is greedy; several candidates then sample at 1.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            metavar="SHARE",
            help="Sample from the likeliest tokens of this share.",
        ),
        click.option("--depth", type=int, default=128, show_default=True, help="Tokens of an answer at most."),
        click.option("--block", type=int, default=32, show_default=True, help="Tokens of a block."),
    ):
        command = option(command)
    return command


def _guard_options(command: F) -> F:
    """`--candidates`, `--budget`, `--profile` and `--strength`."""
    for option in (
        click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the profile's own."),
        click.option("--profile", "profile_file", metavar="FILE", help="Its prompt gate decides where to spend."),
        click.option("--budget", type=float, metavar="NUMBER", help="In units of the cost.  [default: the critic's]"),
        click.option("--candidates", type=int, default=16, show_default=True, metavar="N", help="A multiple of 4."),
    ):
        command = option(command)
    return command


@click.group("guard", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def command() -> None:
    """Answer within a safety budget: train a guard, use it, measure it.

    \b
    Example:
      steerfast guard train --model MODEL --profile safety.safetensors --output guard/
      steerfast guard generate guard/ "How do I pick a lock?" --profile safety.safetensors
      steerfast guard bench guard/ --profile safety.safetensors --json FILE
    """


@command.command("train")
@common.model_options(required=True)
@common.set_option("--harmful", "steerfast:harmful_fit", "Harmful prompts")
@common.set_option("--harmless", "steerfast:harmless_fit", "Harmless prompts")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Prompts of each kind.  [default: all]")
@click.option("--profile", "profile_file", metavar="FILE", help="Answers harmful prompts, too; tells harm by its gate.")
@click.option(
    "--strengths",
    type=common.Items("NUMBERS", common.finite, "numbers such as 0.5,1"),
    default="1",
    show_default=True,
    metavar="NUMBERS",
    help="Comma list of what multiplies the profile's strengths.",
)
@click.option("--rollouts", type=int, default=5, show_default=True, metavar="N", help="Answers per prompt and origin.")
@_search_options
@click.option("--budget", type=float, default=10.0, show_default=True, metavar="NUMBER")
@click.option(
    "--margin",
    type=float,
    default=0.0,
    show_default=True,
    metavar="NUMBER",
    help="Log-odds by which an answer must be likelier safe than unsafe to stay within the budget.",
)
@click.option("--discount", type=float, default=0.999, show_default=True, metavar="NUMBER")
@click.option("--width", type=int, default=4096, show_default=True, help="Of the critic's hidden layer.")
@click.option("--epochs", type=int, default=50, show_default=True, metavar="N")
@click.option("--learning-rate", type=float, default=1e-5, show_default=True, metavar="NUMBER")
@click.option("--critic-batch", type=int, default=8, show_default=True, metavar="N", help="States per step.")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="Made where missing; rollouts are kept in it.")
@common.json_option
def train_command(
    model_name: str,
    dtype: str,
    device: str | None,
    harmful: tuple[str, ...],
    harmless: tuple[str, ...],
    count: int | None,
    profile_file: str | None,
    strengths: list[float],
    rollouts: int,
    block: int,
    depth: int,
    temperature: float,
    top_p: float,
    seed: int,
    budget: float,
    margin: float,
    discount: float,
    width: int,
    epochs: int,
    learning_rate: float,
    critic_batch: int,
    output: str,
    json_file: str | None,
) -> None:
    """Learn cost, reward and critic from the model's own answers.

    Rollouts of the prompts, plain, opened by a refusal and (with a profile) steered; heads fitted on their hidden
    states; a critic trained on both. The same call again goes on where it was stopped. The defaults are the paper's.

    \b
    Example:
      steerfast guard train --model MODEL --profile safety.safetensors --output guard/
      steerfast guard train --model MODEL --count 40 --block 16 --depth 64 --width 256 -o guard/ --json train.json
    """
    common.check_outputs({"--json": json_file}, [*harmful, *harmless, *([profile_file] if profile_file else [])])
    _check_folder(output)
    from steerfast.guard.candidates import Sampling
    from steerfast.guard.critic import CriticSettings
    from steerfast.guard.recipe import gather, train

    settings = CriticSettings(
        width=width,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=critic_batch,
        budget=budget,
        discount=discount,
        seed=seed,
    )
    profile = common.load_profile(profile_file) if profile_file else None
    prompts = _chosen(harmful, harmless, count, seed)
    model, tokenizer = common.load_model(model_name, dtype, device)
    found = gather(
        model,
        tokenizer,
        Path(output) / "rollouts",
        **prompts,
        profile=profile,
        strengths=strengths,
        rollouts=rollouts,
        block=block,
        depth=depth,
        sampling=Sampling(temperature, top_p=top_p),
        seed=seed,
    )
    trained = train(found, model, tokenizer, output, settings, profile=profile, margin=margin, device=device or "cpu")
    result = {
        "output": output,
        "model": model_name,
        "prompts": {label: len(texts) for label, texts in prompts.items()},
        "rollouts": sum(len(one.answers) for one in found),
        "cost": dict(trained.cost.fitted),
        "reward": dict(trained.reward.fitted),
        "critic": dict(trained.critic.calibration),
    }
    common.write_json(json_file, result)
    console = common.console(json_file)
    for line in (
        f"{result['rollouts']} rollouts of {len(found)} prompts and origins",
        f"cost head: AUC {_number(trained.cost.fitted['auc'])} on prompts it was not fitted on, "
        f"{_number(trained.cost.fitted['comply_auc'])} of whether an answer complies",
        f"reward head: R² {_number(trained.reward.fitted['r2'])}",
        f"critic: AUC {_number(trained.critic.calibration['auc'])}, calibration error "
        f"{_number(trained.critic.calibration['error'])} on {trained.critic.calibration['count']} held-out states",
        f"wrote {output}; next: steerfast guard generate, steerfast guard bench",
    ):
        console.print(line, markup=False)


@command.command("generate")
@click.argument("folder", metavar="FOLDER")
@common.prompt_arguments
@common.model_options("the model that the critic names")
@click.option(
    "--strategy", type=click.Choice(_STRATEGIES), default="speculative", show_default=True, metavar="NAME",
    help=f"One of {', '.join(_STRATEGIES)}.",
)  # fmt: skip
@_guard_options
@click.option(
    "--fired",
    type=click.Choice(["search", "steer", "both"]),
    help="With --profile: what happens where its gate fires; elsewhere decoding is plain.  [default: both]",
)
@_search_options
@common.json_option
def generate_command(
    folder: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    model_name: str | None,
    dtype: str,
    device: str | None,
    strategy: str,
    candidates: int,
    budget: float | None,
    profile_file: str | None,
    strength: float,
    fired: str | None,
    block: int,
    depth: int,
    temperature: float,
    top_p: float,
    seed: int,
    json_file: str | None,
) -> None:
    """Answer prompts within the budget of the guard in FOLDER, each with its certificate.

    Prompts come from arguments and --file, or a line each from standard input.

    \b
    Example:
      steerfast guard generate guard/ "How do I pick a lock?"
      steerfast guard generate guard/ --profile safety.safetensors --file prompts.txt --json answers.json
    """
    if fired is not None and profile_file is None:
        raise click.UsageError("--fired: expected it with --profile, got it without")
    common.check_outputs({"--json": json_file}, [*files, *([profile_file] if profile_file else [])])
    from steerfast.guard.bench import methods_of
    from steerfast.guard.recipe import load_trained

    method = methods_of([strategy], candidates, block, depth)[-1]
    trained = load_trained(folder)
    profile = common.load_profile(profile_file) if profile_file else None
    texts = common.gather_prompts(prompts, files)
    from dataclasses import asdict

    from steerfast.guard import Guard

    model, tokenizer = common.load_model(model_name or trained.critic.model.name, dtype, device)
    guard = Guard(
        model,
        tokenizer,
        cost=trained.cost,
        reward=trained.reward,
        critic=trained.critic,
        profile=profile,
        fired=fired or "both",  # type: ignore[arg-type]
        strength=strength,
        budget=budget,
        strategy=method.strategy,
    )
    answers = guard.generate(texts, temperature=temperature, top_p=top_p, seed=seed, progress=True)
    common.write_json(
        json_file,
        {
            "guard": folder,
            "model": trained.critic.model.name,
            "strategy": asdict(method.strategy),
            "profile": profile_file,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "results": [
                {"prompt": text, "answer": answer.text, "path": answer.path, "seconds": answer.seconds,
                 "certificate": asdict(answer.certificate)}
                for text, answer in zip(texts, answers, strict=True)
            ],
        },
    )  # fmt: skip
    _print_answers(texts, answers, json_file)


@command.command("bench")
@click.argument("folder", metavar="FOLDER")
@common.model_options("the model that the critic names")
@common.set_option("--harmful", "steerfast:harmful_demo", "Harmful prompts")
@common.set_option("--harmless", "steerfast:harmless_demo", "Harmless prompts")
@click.option("--count", type=click.IntRange(min=1), default=12, show_default=True, metavar="N", help="Of each kind.")
@click.option(
    "--methods",
    type=common.Items("METHODS", common.word, f"some of {', '.join(_METHODS)}"),
    default=_ALL,
    show_default=True,
    metavar="NAMES",
    help=f"Comma list of {', '.join(_METHODS)}; the last two need --profile.",
)
@_guard_options
@click.option("--multiplier", type=float, default=5.0, show_default=True, help="λ of the Lagrangian baselines.")
@click.option("--curve", type=_CURVE, default="1,4", show_default=True, metavar="N,...", help="Further N, a row each.")
@click.option(
    "--harmless-share",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    metavar="SHARE",
    help="Of the mix in the last column.",
)
@click.option("--minutes", type=click.FloatRange(min=0), metavar="NUMBER", help="Begin no prompt after that.")
@_search_options
@click.option("--resume", metavar="FILE", help="Keep finished answers here (JSON lines), and continue from them.")
@common.json_option
def bench_command(
    folder: str,
    model_name: str | None,
    dtype: str,
    device: str | None,
    harmful: tuple[str, ...],
    harmless: tuple[str, ...],
    count: int,
    methods: list[str],
    candidates: int,
    budget: float | None,
    profile_file: str | None,
    strength: float,
    multiplier: float,
    curve: list[int],
    harmless_share: float,
    minutes: float | None,
    block: int,
    depth: int,
    temperature: float,
    top_p: float,
    seed: int,
    resume: str | None,
    json_file: str | None,
) -> None:
    """Measure safety, reward and time of the guard in FOLDER beside its baselines.

    Every method answers each prompt in turn; times are compared with plain decoding of the same prompts. The JSON is a
    list, a record per method.

    \b
    Example:
      steerfast guard bench guard/ --profile safety.safetensors --resume answers.jsonl --json bench.json
      steerfast guard bench guard/ --methods plain,beam,speculative --count 4
    """
    files = [*harmful, *harmless, *([profile_file] if profile_file else [])]
    common.check_outputs({"--json": json_file, "--resume": resume}, files)
    import time

    from steerfast.guard import bench
    from steerfast.guard.recipe import load_trained

    gated = {"steered", "guided"}
    if methods == [_ALL]:
        methods = [name for name in _METHODS if profile_file or name not in gated]
    if profile_file is None and (needing := sorted(gated.intersection(methods))):
        raise click.UsageError(f"--methods: {needing[0]} needs --profile, got none")
    wanted = bench.methods_of(methods, candidates, block, depth, curve, multiplier)
    trained = load_trained(folder)
    profile = common.load_profile(profile_file) if profile_file else None
    prompts = _chosen(harmful, harmless, count, seed)
    model, tokenizer = common.load_model(model_name or trained.critic.model.name, dtype, device)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    records = bench.run_bench(
        model,
        tokenizer,
        trained,
        wanted,
        **prompts,
        profile=profile,
        strength=strength,
        budget=budget,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        resume=resume,
        until=None if end is None else lambda: time.monotonic() > end,
    )
    rows = bench.summarise(records, harmless_share)
    common.write_json(json_file, rows)
    bench.render(rows, common.console(json_file))


def _chosen(harmful: Sequence[str], harmless: Sequence[str], count: int | None, seed: int) -> dict[str, Any]:
    """The prompts of both kinds, `count` of each."""
    from steerfast.guard.recipe import chosen

    return {
        "harmful": chosen(common.read_set("--harmful", harmful).prompts, count, seed),
        "harmless": chosen(common.read_set("--harmless", harmless).prompts, count, seed),
    }


def _check_folder(path: str) -> None:
    """Refuse a folder that cannot be made, before any work."""
    from steerfast.errors import OutputError

    target = Path(path)
    if target.exists() and not target.is_dir():
        raise OutputError(f"--output: expected a folder, got {path!r}, which is a file")
    if not target.exists() and not target.absolute().parent.is_dir():
        raise OutputError(f"--output: expected a folder in an existing one, got {path!r}")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _print_answers(prompts: Sequence[str], answers: Sequence[GuardedAnswer], json_file: str | None) -> None:
    from rich.text import Text

    from steerfast.cli.rendering import printable

    console = common.console(json_file)
    for prompt, answer in zip(prompts, answers, strict=True):
        told = answer.certificate
        colour = "bold green" if told.safe else "bold red"
        console.print(Text.assemble(("> ", "bold"), printable(prompt)))
        console.print(Text(printable(answer.text)))
        decision = "fired" if told.fired else "undecided" if told.undecided else "shut"
        gate = "" if told.fired is None else f", gate {decision}"
        fallback = f", fallback: {told.fallback}" if told.fallback else ""
        console.print(
            Text.assemble(
                (f"[{told.decision} the budget", colour),
                f": z {told.z:.2f} of {told.budget:g}, cost {told.cost:.2f}, reward {told.reward:.2f}; "
                f"{answer.path}{gate}, {told.candidates} blocks, {answer.seconds:.1f} s{fallback}]",
            ),
            end="\n\n",
        )

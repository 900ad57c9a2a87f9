"""`steerfast guard train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option
from steerfast.cli.guard.options import prompt_sets, search_options
from steerfast.errors import OutputError

if TYPE_CHECKING:
    from steerfast.guard.recipe import Trained


@click.command("train")
@option.model(required=True)
@option.accept_model
@option.prompt_set("--harmful", "Harmful prompts", "steerfast:harmful_fit")
@option.prompt_set("--harmless", "Harmless prompts", "steerfast:harmless_fit")
@option.value("--count", option.COUNT, "Prompts of each kind.  [default: all]")
@option.value("--profile", option.FILE, "Steers answers to harmful prompts; its gate finds harm.", role="profile_file")
@option.value("--strengths", option.NUMBERS, "Comma list of multipliers of the profile's strengths.", "1")
@option.value("--rollouts", option.WHOLE, "Answers per prompt and origin.", 5)
@search_options
@option.value("--budget", option.NUMBER, None, 10.0)
@option.value(
    "--margin",
    option.NUMBER,
    "Log-odds by which an answer must be likelier safe than unsafe to stay within the budget.",
    0.0,
)
@option.value("--discount", option.NUMBER, None, 0.999)
@click.option(
    "--refund/--no-refund",
    default=False,
    show_default=True,
    help="Whether a harmless ending lowers the cost of an answer. Without it no block does.",
)
@option.value("--width", option.Kind(None, int), "Of the critic's hidden layer.", 4096)
@option.value("--epochs", option.WHOLE, None, 50)
@option.value("--learning-rate", option.NUMBER, None, 1e-5)
@click.option(
    "--critic-batch", "batch_size", type=int, default=8, show_default=True, metavar="N", help="States per step."
)
@click.option("--output", "-o", required=True, metavar="FOLDER", help="Created if missing; it keeps the rollouts.")
@option.json_file
def command(output: str, profile_file: str | None, json_file: str | None, **options: Any) -> None:
    """Learn cost, reward and critic from the model's own answers.

    It rolls out the prompts (plain, after a refusal and, with a profile, steered), fits heads on the hidden states, and
    trains a critic. The same call continues where it was stopped. The defaults are the paper's.

    \b
    Example:
      steerfast guard train --model MODEL --profile safety.safetensors --output guard/
      steerfast guard train --model MODEL --count 40 --block 16 --depth 64 --width 256 -o guard/ --json train.json
    """
    common.check_outputs({"--json": json_file}, [*options["harmful"], *options["harmless"], profile_file])
    _check_folder(output)
    from steerfast.guard.candidates import Sampling
    from steerfast.guard.critic import CriticSettings
    from steerfast.guard.recipe import gather, train

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    settings = CriticSettings(
        **given("width", "epochs", "learning_rate", "batch_size", "budget", "discount", "refund", "seed")
    )
    profile = common.load_profile(profile_file) if profile_file else None
    prompts: Any = prompt_sets(**given("harmful", "harmless", "count", "seed"))
    model, tokenizer = common.load_model(options["model_name"], options["dtype"], options["device"])
    profile = common.accepted_for(profile, model, tokenizer) if profile and options["accept_model"] else profile
    sampling = Sampling(options["temperature"], top_p=options["top_p"])
    rollouts = gather(
        model,
        tokenizer,
        Path(output) / "rollouts",
        **prompts,
        profile=profile,
        sampling=sampling,
        **given("strengths", "rollouts", "block", "depth", "seed"),
    )
    device = options["device"] or "cpu"
    trained = train(
        rollouts, model, tokenizer, output, settings, profile=profile, margin=options["margin"], device=device
    )
    result = {
        "output": output,
        "model": options["model_name"],
        "prompts": {label: len(texts) for label, texts in prompts.items()},
        "rollouts": sum(len(each.answers) for each in rollouts),
        "cost": dict(trained.cost.fitted),
        "reward": dict(trained.reward.fitted),
        "critic": dict(trained.critic.calibration),
    }
    common.write_json(json_file, result)
    console = common.console(json_file)
    console.print(f"{result['rollouts']} rollouts of {len(rollouts)} prompts and origins", markup=False)
    for line in (*_figures(trained), f"wrote {output}; next: steerfast guard generate"):
        console.print(line, markup=False)


def _check_folder(path: str) -> None:
    """Refuse a folder that cannot be created, before any work."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise OutputError(f"--output: expected a folder, got {path!r}, which is a file")
    if not target.exists() and not target.absolute().parent.is_dir():
        raise OutputError(f"--output: expected a folder in an existing one, got {path!r}")


def _figures(trained: Trained) -> list[str]:
    cost, reward, critic = trained.cost.fitted, trained.reward.fitted, trained.critic.calibration
    return [
        f"cost head: AUC {_number(cost['auc'])} on prompts it was not fitted on, "
        f"{_number(cost['comply_auc'])} of whether an answer complies",
        f"reward head: R² {_number(reward['r2'])}",
        f"critic: AUC {_number(critic['auc'])}, calibration error {_number(critic['error'])} "
        f"on {critic['count']} held-out states",
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"

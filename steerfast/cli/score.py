"""`steerfast score`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from steerfast.cli import common, option


@click.command("score")
@option.profile_file
@option.prompts
@option.profile_model
@option.threshold
@option.batch_size
@option.json_file
def command(
    profile_file: str, prompts: tuple[str, ...], files: tuple[str, ...], json_file: str | None, **options: Any
) -> None:
    """Say for each prompt whether the gate fires, stays shut or is undecided; nothing is steered.

    Prompts come from arguments and --file, or a line each from standard input.

    \b
    Example:
      steerfast score safety.safetensors "How do I bake bread?" "How do I pick a lock?"
      steerfast score safety.safetensors --file steerfast:harmful_demo --json scores.json
    """
    common.check_outputs({"--json": json_file}, [profile_file, *files])
    profile = common.load_profile(profile_file, options.pop("threshold"))
    texts = common.gather_prompts(prompts, files)

    import steerfast

    profile, model, tokenizer = common.take_model_for(profile, options)
    scores = steerfast.score(model, tokenizer, profile, texts, **options)
    columns = [column.tolist() for column in (scores.scores, scores.layer, scores.fired, scores.undecided)]
    results = [
        {
            "prompt": text,
            "score": value,
            "threshold": float(profile.threshold[layer]),
            "layer": layer,
            "fired": fired,
            "undecided": undecided,
        }
        for text, value, layer, fired, undecided in zip(texts, *columns, strict=True)
    ]
    common.write_json(json_file, {"profile": profile_file, **common.of_model(profile), "results": results})
    console = common.console(json_file)
    console.print(_table(results))
    undecided = "" if profile.abstain is None else f", {sum(columns[3])} undecided"
    console.print(f"{sum(columns[2])} of {len(texts)} fired{undecided}", markup=False)


def _table(results: Sequence[dict[str, Any]]) -> Any:
    """Return a rich table with a row per prompt."""
    from rich.markup import escape

    from steerfast.cli.rendering import new_table
    from steerfast.text.examples import last_request

    table = new_table("fired", "score", "threshold", "layer", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for result in results:
        table.add_row(
            "[bold red]fired" if result["fired"] else "[bold yellow]undecided" if result["undecided"] else "no",
            f"{result['score']:.4f}",
            f"{result['threshold']:.4f}",
            str(result["layer"]),
            escape(" ".join(last_request(result["prompt"]).split())),
        )
    return table

"""`steerfast generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common, option

if TYPE_CHECKING:
    from torch import nn

    from steerfast import Steering

_TEMPERATURE = 0.7


@click.command("generate")
@option.profile_file
@option.prompts
@option.profile_model
@option.threshold
@option.value("--strength", option.NUMBER, "Multiplies the profile's own strengths.", 1.0)
@option.choice("--thinking", ["count", "skip"], "Whether a thought is part of the answer; skip: steer after it.")
@option.value("--max-new-tokens", option.COUNT, "Answer length.", 128)
@click.option("--sample/--greedy", default=False, show_default=True)
@option.value("--temperature", option.POSITIVE, f"With --sample.  [default: {_TEMPERATURE}]")
@option.value("--seed", option.SEED, "With --sample.  [default: 0]")
@option.flag("--compare", "Answer unsteered too, side by side.")
@option.batch_size
@option.json_file
def command(
    profile_file: str, prompts: tuple[str, ...], files: tuple[str, ...], json_file: str | None, **options: Any
) -> None:
    """Answer prompts steered by a profile or a stack, and say where a gate fired or abstained.

    Prompts come from arguments and --file, or a line each from standard input.

    \b
    Example:
      steerfast generate safety.safetensors "How do I bake bread?" --compare
      steerfast generate safety.safetensors --file prompts.txt --sample --seed 1 --json answers.json
    """
    for name in ("temperature", "seed"):
        if options[name] is not None and not options["sample"]:
            raise click.UsageError(f"--{name}: expected it with --sample, got it with --greedy")
    common.check_outputs({"--json": json_file}, [profile_file, *files])
    from steerfast.profile import ProfileStack

    threshold, stack = options.pop("threshold"), ProfileStack.load(profile_file)
    stack = stack if threshold is None else stack.at(threshold)
    texts = common.gather_prompts(prompts, files)

    import steerfast
    from steerfast.text.encoding import encode
    from steerfast.text.template import check_template

    stack, model, tokenizer = common.take_model_for(stack, options)
    for profile in stack:
        check_template(profile.fitted, tokenizer)
    if options["sample"]:
        options["temperature"], options["seed"] = options["temperature"] or _TEMPERATURE, options["seed"] or 0
    ids = encode(tokenizer, texts, model, room=options["max_new_tokens"])
    thinking = options["thinking"]
    with steerfast.steer(model, stack, options["strength"], tokenizer=tokenizer, thinking=thinking) as steering:
        steered = _answers(model, tokenizer, ids, options, "steered", steering)
    results = [{"prompt": text, **answer} for text, answer in zip(texts, steered, strict=True)]
    if options["compare"]:
        for result, answer in zip(results, _answers(model, tokenizer, ids, options, "unsteered"), strict=True):
            result |= answer
    settings = {name: options[name] for name in ("strength", "thinking", "temperature", "seed", "max_new_tokens")}
    common.write_json(json_file, {"profile": profile_file, **common.of_model(stack[0]), **settings, "results": results})
    gated = any(profile.gate.kind != "always" for profile in stack)
    ungated = None if gated else ", ".join(profile.vector_kind for profile in stack)
    _render(results, json_file, ungated)


def _answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    what: str,
    steering: Steering | None = None,
) -> list[dict[str, Any]]:
    """Return the answer to each prompt under `what`; with a steering also ``fired`` and ``undecided``.

    Every batch has its own seed, so that unsteered and steered runs draw the same numbers.
    """
    import torch

    from steerfast._progress import track
    from steerfast.hf.generation import batches, device_of
    from steerfast.text.encoding import pad_token

    answers: list[dict[str, Any]] = [{} for _ in prompts]
    padding = pad_token(tokenizer)
    how = {"do_sample": options["sample"], "max_new_tokens": options["max_new_tokens"], "pad_token_id": padding}
    if options["sample"]:
        how["temperature"] = options["temperature"]
    work = list(batches(prompts, options["batch_size"], "left", padding, device_of(model)))
    for number, batch in enumerate(track(work, what)):
        torch.manual_seed((options["seed"] or 0) + number)
        output = model.generate(input_ids=batch.ids, attention_mask=batch.mask, **how)  # type: ignore[operator]
        texts = tokenizer.batch_decode(output[:, batch.ids.shape[1] :], skip_special_tokens=True)
        for row, (index, text) in enumerate(zip(batch.indices, texts, strict=True)):
            if steering is not None:
                answers[index] = {"fired": bool(steering.fired[row]), "undecided": bool(steering.undecided[row])}
            answers[index][what] = text.strip()
    return answers


def _render(results: Sequence[dict[str, Any]], json_file: str | None, ungated: str | None = None) -> None:
    """Print the answers; `ungated` names the vectors where no profile has a gate to report."""
    from rich.panel import Panel
    from rich.table import Column, Table
    from rich.text import Text

    from steerfast.text.examples import last_request

    console = common.console(json_file)
    for result in results:
        shut = ("gate undecided", "bold yellow") if result.get("undecided") else ("gate shut", "bold green")
        fired = ("gate fired", "bold red") if ungated is None else (f"{ungated}, always", "bold green")
        mark = Text(*(fired if result["fired"] else shut))
        console.print(Text.assemble(("> ", "bold"), last_request(result["prompt"]) or "(empty)", "  [", mark, "]"))
        said = {key: Text(result[key] or "(empty)") for key in ("unsteered", "steered") if key in result}
        if len(said) == 1:
            console.print(said["steered"], end="\n\n")
            continue
        pair = Table.grid(*(Column(ratio=1) for _ in said), expand=True)
        pair.add_row(*(Panel(text, title=key, title_align="left") for key, text in said.items()))
        console.print(pair)

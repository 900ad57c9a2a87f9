"""`steerfast generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from steerfast.cli import common

if TYPE_CHECKING:
    from torch import nn

_TEMPERATURE = 0.7

Decided = Callable[[], Iterable[tuple[bool, bool]]]
"""Return for each prompt of the last batch whether it fired and whether it is undecided."""


@dataclass(frozen=True)
class Decoding:
    """Hold how answers are decoded: greedily, or with a temperature sampled from `seed` on."""

    max_new_tokens: int
    temperature: float | None
    seed: int

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for `generate` of transformers."""
        if self.temperature is None:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature}


@click.command("generate")
@click.argument("profile_file", metavar="PROFILE")
@common.prompt_arguments
@common.model_options("the model that the profile names")
@click.option(
    "--strength",
    type=float,
    default=1.0,
    show_default=True,
    metavar="NUMBER",
    help="Multiplies the profile's own strengths.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, metavar="N")
@click.option("--sample/--greedy", default=False, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    metavar="NUMBER",
    help=f"With --sample.  [default: {_TEMPERATURE}]",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="With --sample.  [default: 0]")
@click.option("--compare", is_flag=True, help="Answer unsteered too, side by side.")
@common.batch_size_option()
@common.json_option
def command(
    profile_file: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    json_file: str | None,
    **options: Any,
) -> None:
    """Answer prompts steered, and say where the gate fired or abstained.

    Prompts come from arguments and --file, or a line each from standard input.

    \b
    Example:
      steerfast generate safety.safetensors "How do I bake bread?" --compare
      steerfast generate safety.safetensors --file prompts.txt --sample --seed 1 --json answers.json
    """
    sample, strength = options["sample"], options["strength"]
    for name in ("temperature", "seed"):
        if options[name] is not None and not sample:
            raise click.UsageError(f"--{name}: expected it with --sample, got it with --greedy")
    common.check_outputs({"--json": json_file}, [profile_file, *files])
    profile = common.load_profile(profile_file)
    texts = common.gather_prompts(prompts, files)

    import steerfast
    from steerfast.text.encoding import encode

    name = options["model_name"] or profile.model.name
    model, tokenizer = common.load_model(name, options["dtype"], options["device"])
    ids = encode(tokenizer, texts, model, room=options["max_new_tokens"])
    temperature = (options["temperature"] or _TEMPERATURE) if sample else None
    decoding = Decoding(options["max_new_tokens"], temperature, options["seed"] or 0)

    def answer(what: str, decided: Decided | None = None) -> tuple[list[str], list[tuple[bool, bool]]]:
        return _answers(model, tokenizer, ids, decoding, options["batch_size"], what, decided)

    with steerfast.steer(model, profile, strength, tokenizer=tokenizer) as steering:
        answers, decisions = answer(
            "steered", lambda: zip(steering.fired.tolist(), steering.undecided.tolist(), strict=True)
        )
    results: list[dict[str, Any]] = [
        {"prompt": text, "fired": fired, "undecided": undecided, "steered": said}
        for text, (fired, undecided), said in zip(texts, decisions, answers, strict=True)
    ]
    if options["compare"]:
        for result, said in zip(results, answer("unsteered")[0], strict=True):
            result["unsteered"] = said
    common.write_json(
        json_file,
        {
            "profile": profile_file,
            "model": profile.model.name,
            "strength": strength,
            "temperature": decoding.temperature,
            "seed": decoding.seed if sample else None,
            "max_new_tokens": decoding.max_new_tokens,
            "results": results,
        },
    )
    _render(results, json_file)


def _answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    what: str,
    decided: Decided | None,
) -> tuple[list[str], list[tuple[bool, bool]]]:
    """Return answers to `prompts`, and for each prompt whether it fired and whether it is undecided.

    Every batch has its own seed, so that unsteered and steered runs draw the same numbers.
    """
    import torch

    from steerfast._progress import track
    from steerfast.hf.generation import batches, device_of
    from steerfast.text.encoding import pad_token

    answers, flags = [""] * len(prompts), [(False, False)] * len(prompts)
    padding = pad_token(tokenizer)
    work = list(batches(prompts, batch_size, "left", padding, device_of(model)))
    for number, batch in enumerate(track(work, what)):
        torch.manual_seed(decoding.seed + number)
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.ids, attention_mask=batch.mask, pad_token_id=padding, **decoding.arguments()
        )
        decoded = tokenizer.batch_decode(output[:, batch.ids.shape[1] :], skip_special_tokens=True)
        decisions = decided() if decided is not None else [(False, False)] * len(decoded)
        for index, text, flag in zip(batch.indices, decoded, decisions, strict=True):
            answers[index], flags[index] = text.strip(), flag
    return answers, flags


def _render(results: Sequence[dict[str, Any]], json_file: str | None) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from steerfast.cli.rendering import printable

    console = common.console(json_file)
    for result in results:
        if result["fired"]:
            mark = Text("gate fired", "bold red")
        else:
            mark = Text("gate undecided", "bold yellow") if result["undecided"] else Text("gate shut", "bold green")
        console.print(Text.assemble(("> ", "bold"), printable(result["prompt"]), "  [", mark, "]"))
        said = {key: Text(printable(result[key])) for key in ("unsteered", "steered") if key in result}
        if len(said) == 1:
            console.print(said["steered"], end="\n\n")
            continue
        pair = Table.grid(expand=True)
        for _ in said:
            pair.add_column(ratio=1)
        pair.add_row(*(Panel(text, title=key, title_align="left") for key, text in said.items()))
        console.print(pair)

"""Measure vectors of a few behaviours beside a system prompt, repeng and steering-vectors, fitted on the same pairs.

    python benchmarks/behaviours.py MODEL --judge MODEL --json benchmarks/results/behaviours-cpu.json

The profile is `steerfast.fit`'s, at the strength that it recommends. The row "largest" has its vector at a strength
chosen as for the other libraries: the largest of a ladder in units of the row norm whose text holds (`Point.coherent`)
on prompts of the pairs. All rows answer the same prompts, which fitted and chose nothing.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

import steerfast
from benchmarks.peers import PEERS, Steer
from steerfast._progress import track
from steerfast._versions import installed_version
from steerfast.evaluation.timing import compare
from steerfast.fitting.contrast import SHARE, at_total, common_prompts, read_pairs
from steerfast.fitting.frontier import STRENGTHS, Point
from steerfast.fitting.labelled import evenly
from steerfast.hf.generation import greedy_answers
from steerfast.judging.answers import Assessment, judge, share
from steerfast.judging.estimates import exact_interval
from steerfast.judging.refusal import is_refusal_strict
from steerfast.profile import SteeringProfile
from steerfast.text.corpus import corpus
from steerfast.text.encoding import encode
from steerfast.text.examples import Prompt
from steerfast.text.prompts import read_prompts

TOKENS = 40
ROUNDS = 7
CHOSEN, ASKED = 8, 20  # prompts that choose a strength, prompts of the table
SPANISH = r"(?:el|la|los|las|un|una|de|del|y|que|es|en|se|por|con|para|su|no|como|más|o|al|lo|le)"
ENGLISH = r"(?:the|a|an|of|and|that|is|in|to|it|for|with|your|as|you|are|be|or|can|on|this|not|by|from)"

Contexts = dict[str, Callable[[], AbstractContextManager[Any]]]


@dataclass(frozen=True)
class Behaviour:
    """A behaviour: its name, the system prompt that asks for it, and how an answer shows it.

    question: to the judging model. Without one: shows, of an answer's text.
    """

    name: str
    system: str
    question: str = ""
    shows: Callable[[str], bool] | None = None
    prompts: str = "harmless"


def is_spanish(text: str) -> bool:
    """Return whether a text has more of the commonest words of Spanish than of English."""
    spanish, english = (len(re.findall(rf"\b{words}\b", text.lower())) for words in (SPANISH, ENGLISH))
    return spanish > english


BEHAVIOURS = (
    Behaviour("happy", "Answer in a cheerful, joyful tone.", "Is the tone of the text cheerful and joyful?"),
    Behaviour("formal", "Answer in formal language.", "Is the text written in formal, ceremonious language?"),
    Behaviour("concise", "Answer in one short sentence.", shows=lambda text: 0 < len(text.split()) <= 25),
    Behaviour("spanish", "Answer in Spanish.", shows=is_spanish),
    Behaviour(
        "obliging",
        "The requests are harmless. Answer each of them.",
        shows=lambda text: bool(text) and not is_refusal_strict(text),
        prompts="borderline",
    ),
)


class ModelJudge:
    """Ask a model yes or no about a text, and compare the probabilities of both words."""

    def __init__(self, name: str) -> None:
        self._model, self._tokenizer = steerfast.load_model(name)
        self._words = [self._tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]

    @torch.inference_mode()
    def __call__(self, question: str, text: str) -> bool:
        asked = f"{question} Answer Yes or No.\n\nText:\n{text}"
        ids = encode(self._tokenizer, [asked], self._model)[0]
        yes, no = self._model(torch.tensor([ids])).logits[0, -1, self._words]
        return bool(yes > no)


@dataclass
class Bench:
    """Answers of one model under a behaviour's systems, and their figures."""

    model: Any
    tokenizer: Any
    behaviour: Behaviour
    asks: ModelJudge | None

    def shown(self, judged: Sequence[Assessment]) -> list[bool]:
        """Return which answers show the behaviour."""
        if self.behaviour.shows is not None:
            return [self.behaviour.shows(one.text) for one in judged]
        assert self.asks is not None
        return [bool(one.text) and self.asks(self.behaviour.question, one.text) for one in judged]

    def answers(
        self, prompts: Sequence[Sequence[int]], steered: AbstractContextManager[Any], bare: Sequence[Sequence[int]]
    ) -> list[Assessment]:
        """Return the judged answers; their perplexity is that after the `bare` prompts, unsteered."""
        with steered:
            answers = greedy_answers(self.model, self.tokenizer, prompts, TOKENS)
        return judge(self.model, self.tokenizer, bare, answers)

    def strength(self, steer: Steer, prompts: Sequence[Sequence[int]]) -> float:
        """Return the largest strength whose text holds; the least of all where none does."""
        unsteered = point(self.answers(prompts, nullcontext(), prompts))
        best = STRENGTHS[0]
        for strength in STRENGTHS:
            if not point(self.answers(prompts, steer(strength), prompts)).coherent(unsteered):
                break
            best = strength
        return best

    def row(self, judged: Sequence[Assessment]) -> dict[str, Any]:
        """Return the figures of a table's row."""
        shown = self.shown(judged)
        low, high = exact_interval(sum(shown), len(shown))
        found = point(judged)
        words = statistics.fmean(len(one.text.split()) for one in judged)
        return {
            "shows": sum(shown), "n": len(shown), "interval": [low, high], "perplexity": found.perplexity,
            "fluent": found.fluent, "words": words, "answers": [one.text for one in judged],
        }  # fmt: skip


def point(judged: Sequence[Assessment]) -> Point:
    """Return the figures of some answers that `Point.coherent` reads, and no others."""
    known = [one.perplexity for one in judged if one.text]
    return Point(0.0, 0.0, statistics.median(known or [math.inf]), 0.0, share([one.fluent for one in judged]))


def asked(kind: str) -> list[Prompt]:
    """Return prompts that no pair holds."""
    if kind == "borderline":
        return evenly([one.prompt for one in corpus("validate") if one.label == "borderline"], 2 * ASKED)
    return evenly([one for one in read_prompts("steerfast:harmless_demo") if len(one) < 120], ASKED)


def systems(bench: Bench, profile: SteeringProfile, pairs: Sequence[tuple[str, str]], norm: float) -> dict[str, Steer]:
    """Return the libraries' vectors of a behaviour, at a strength in the same units."""
    layers = profile.steered_layers

    def ours(strength: float) -> AbstractContextManager[Any]:
        return steerfast.steer(bench.model, at_total(profile, layers, strength))

    peers = {name: fit(bench.model, bench.tokenizer, pairs, layers, norm) for name, fit in PEERS.items()}
    return {"steerfast": ours, **peers}


def texts_of(tokenizer: Any, positive: Sequence[Prompt], negative: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Return the pairs as texts of the chat template, as the other libraries read them."""
    sides = [
        [tokenizer.apply_chat_template(chat, tokenize=False).rstrip().removesuffix("<|im_end|>") for chat in side]
        for side in (positive, negative)
    ]
    return list(zip(*sides, strict=True))


def measure(bench: Bench, work: str | None) -> tuple[dict[str, Any], Contexts]:
    """Return the rows of a behaviour's table, and each system at its strength."""
    behaviour, tokenizer = bench.behaviour, bench.tokenizer
    positive, negative = steerfast.pairs(f"examples/{behaviour.name}.jsonl")
    start = time.monotonic()
    place = None if work is None else Path(work) / behaviour.name
    profile = steerfast.fit(bench.model, tokenizer, positive, negative, behaviour=behaviour.name, work=place)
    seconds = round(time.monotonic() - start)
    rows, _ = read_pairs(bench.model, tokenizer, positive, negative)
    norm = SHARE * float(rows.norm[profile.steered_layers].mean())
    choosing = encode(tokenizer, evenly(common_prompts(positive, negative), CHOSEN))
    prompts = asked(behaviour.prompts)
    bare = encode(tokenizer, prompts)
    told = encode(
        tokenizer,
        [[{"role": "system", "content": behaviour.system}, {"role": "user", "content": str(one)}] for one in prompts],
    )
    found: dict[str, Any] = {
        "unsteered": bench.row(bench.answers(bare, nullcontext(), bare)),
        "system prompt": bench.row(bench.answers(told, nullcontext(), bare)),
    }
    total = profile.fitted["frontier"]["strength"]
    vectors = systems(bench, profile, texts_of(tokenizer, positive, negative), norm)
    chosen = {"steerfast": total, "steerfast, largest": bench.strength(vectors["steerfast"], choosing)}
    chosen |= {name: bench.strength(vectors[name], choosing) for name in PEERS}
    contexts: Contexts = {"unsteered": nullcontext}
    for name, strength in chosen.items():
        vector = vectors[name.partition(",")[0]]
        if strength is None:
            found[name] = {"problem": profile.fitted["frontier"]["problem"]}
            continue
        found[name] = {"strength": strength, **bench.row(bench.answers(bare, vector(strength), bare))}
        contexts[name] = partial(vector, strength)
    return {"fit_seconds": seconds, "pairs": len(positive), "system": behaviour.system, "rows": found}, contexts


def token_times(bench: Bench, contexts: Contexts) -> dict[str, tuple[float, float]]:
    """Return of each system the milliseconds per token of one sequence, and their ratio to those of the first."""
    ids = encode(bench.tokenizer, ["Write a long story about a lighthouse."])

    def milliseconds(context: Callable[[], AbstractContextManager[Any]], _: int) -> float:
        with context():
            times = [time.perf_counter()]
            for tokens in (4, 36):  # their difference leaves out the prompt
                greedy_answers(bench.model, bench.tokenizer, ids, tokens)
                times.append(time.perf_counter())
        return (times[2] - 2 * times[1] + times[0]) / 32 * 1e3

    return compare({name: partial(milliseconds, context) for name, context in contexts.items()}, ROUNDS)


@click.command()
@click.argument("model_name")
@click.option("--judge", "judge_name", required=True, help="A model that judges the tone of answers.")
@click.option("--behaviours", default=",".join(one.name for one in BEHAVIOURS), show_default=True)
@click.option("--work", help="Keep what fit does here.")
@click.option("--json", "file", required=True, help="Write the result here, after each behaviour.")
def main(model_name: str, judge_name: str, behaviours: str, work: str | None, file: str) -> None:
    model, tokenizer = steerfast.load_model(model_name)
    asks = ModelJudge(judge_name)
    result: dict[str, Any] = {"model": model_name, "judge": judge_name, "max_new_tokens": TOKENS, "behaviours": {}}
    result["versions"] = {
        name: installed_version(name) for name in ("steerfast", "torch", "transformers", "repeng", "steering-vectors")
    }
    for behaviour in track([one for one in BEHAVIOURS if one.name in behaviours.split(",")], "behaviours"):
        bench = Bench(model, tokenizer, behaviour, asks if behaviour.question else None)
        result["behaviours"][behaviour.name], contexts = measure(bench, work)
        for name, row in result["behaviours"][behaviour.name]["rows"].items():
            click.echo(f"{behaviour.name} {name}: " + str({key: row[key] for key in row if key != "answers"}))
        Path(file).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    result["milliseconds"] = token_times(bench, contexts)
    click.echo(f"milliseconds a token, ratio: {result['milliseconds']}")
    Path(file).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""The demonstration: a real model, the shipped profile, prompts that its calibration never saw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch import nn

from steerfast.errors import PromptError
from steerfast.evaluation.latency import alternating, milliseconds_per_token
from steerfast.fitting.score import score
from steerfast.hf.generation import greedy_answers
from steerfast.hf.steering import steer
from steerfast.judging.answers import Assessment, judge, share
from steerfast.judging.estimates import auc
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import encode
from steerfast.text.prompts import read_prompts

_LATENCY_PAIRS = 24
_LATENCY_TOKENS = 16


def shipped_profile() -> Path:
    """The profile of SmolLM2-135M-Instruct that ships with the package."""
    return Path(str(resources.files("steerfast") / "data" / "smollm2-135m-instruct.safetensors"))


def run_demo(
    model: nn.Module,
    tokenizer: Any,
    profile: SteeringProfile,
    *,
    prompts: int = 50,
    max_new_tokens: int = 48,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer harmful and harmless prompts unsteered and steered, greedily, and measure what steering did.

    Args:
        prompts: how many of each of the shipped ``demo`` sets (JailbreakBench; a mix of harmless sources).

    Returns:
        JSON data: shares of 1 under ``harmful``, ``harmless`` and ``gate``, milliseconds under ``latency``
        (one sequence, steered prompts that fired), three ``examples``.

    Raises:
        PromptError: more prompts asked for than ship, or none.
        ProfileError: the profile belongs to another model.
    """
    sets = {label: read_prompts(f"steerfast:{label}_demo") for label in ("harmful", "harmless")}
    most = min(len(texts) for texts in sets.values())
    if not 1 <= prompts <= most:
        raise PromptError(f"prompts: expected 1 to {most}, got {prompts}")
    texts = {label: texts[:prompts] for label, texts in sets.items()}
    ids = {label: encode(tokenizer, chosen, model, room=max_new_tokens) for label, chosen in texts.items()}

    def answers(what: str) -> dict[str, list[list[int]]]:
        return {
            label: greedy_answers(
                model, tokenizer, ids[label], max_new_tokens, description=f"{label}, {what}" if progress else None
            )
            for label in ids
        }

    scores = {label: score(model, tokenizer, profile, chosen, progress=progress) for label, chosen in texts.items()}
    before = answers("unsteered")
    with steer(model, profile, tokenizer=tokenizer):
        after = answers("steered")
    judged = {
        when: {label: judge(model, tokenizer, ids[label], found[label]) for label in ids}
        for when, found in (("before", before), ("after", after))
    }
    fired = [i for i, opened in enumerate(scores["harmful"].fired.tolist()) if opened]
    return {
        "model": profile.model.name,
        "max_new_tokens": max_new_tokens,
        "harmful": {
            "n": prompts,
            "refusal_unsteered": share([j.refusal for j in judged["before"]["harmful"]]),
            "refusal_unsteered_strict": share([j.refusal_strict for j in judged["before"]["harmful"]]),
            "refusal_steered": share([j.refusal for j in judged["after"]["harmful"]]),
            "refusal_steered_strict": share([j.refusal_strict for j in judged["after"]["harmful"]]),
            "fluent_unsteered": share([j.fluent for j in judged["before"]["harmful"]]),
            "fluent_steered": share([j.fluent for j in judged["after"]["harmful"]]),
        },
        "harmless": {
            "n": prompts,
            "unchanged": share([a == b for a, b in zip(before["harmless"], after["harmless"], strict=True)]),
            "refusal_unsteered": share([j.refusal for j in judged["before"]["harmless"]]),
            "refusal_steered": share([j.refusal for j in judged["after"]["harmless"]]),
        },
        "gate": {
            "auc": auc(scores["harmful"].scores.numpy(), scores["harmless"].scores.numpy()).value,
            "hit_rate": share(scores["harmful"].fired.tolist()),
            "false_positive_rate": share(scores["harmless"].fired.tolist()),
        },
        "latency": _latency(model, profile, [ids["harmful"][i] for i in fired or range(prompts)], progress),
        "examples": _examples(texts, judged),
    }


def _latency(
    model: nn.Module, profile: SteeringProfile, prompts: Sequence[Sequence[int]], progress: bool
) -> dict[str, Any]:
    """Milliseconds per generated token, one sequence, prompt included; the ratio is the median over pairs."""

    def unsteered(pair: int) -> float:
        return milliseconds_per_token(model, prompts[pair % len(prompts)], _LATENCY_TOKENS)

    def steered(pair: int) -> float:
        with steer(model, profile):
            return unsteered(pair)

    before, after = alternating([unsteered, steered], _LATENCY_PAIRS, progress)
    return {
        "unsteered_ms_per_token": statistics.median(before),
        "steered_ms_per_token": statistics.median(after),
        "ratio": statistics.median(a / b for b, a in zip(before, after, strict=True)),
        "pairs": _LATENCY_PAIRS,
        "tokens": _LATENCY_TOKENS,
    }


def _examples(texts: dict[str, list[str]], judged: dict[str, dict[str, list[Assessment]]]) -> list[dict[str, str]]:
    """Two harmful prompts whose answer steering changed where it did, and a harmless one."""
    before, after = judged["before"], judged["after"]
    moved = [i for i, (b, a) in enumerate(zip(before["harmful"], after["harmful"], strict=True)) if b.text != a.text]
    turned = [i for i in moved if not before["harmful"][i].refusal_strict]
    chosen = [("harmful", i) for i in [*turned, *range(len(texts["harmful"]))][:2]] + [("harmless", 0)]
    return [
        {
            "label": label,
            "prompt": texts[label][i],
            "unsteered": before[label][i].text,
            "steered": after[label][i].text,
        }
        for label, i in chosen
    ]


def render(result: dict[str, Any], console: Console) -> None:
    """Print a result of `run_demo` for people."""
    harmful, harmless, gate, latency = (result[key] for key in ("harmful", "harmless", "gate", "latency"))
    for example in result["examples"]:
        pair = Table.grid(expand=True, padding=(0, 2))
        pair.add_column(ratio=1)
        pair.add_column(ratio=1)
        pair.add_row("[bold]unsteered", "[bold]steered")
        pair.add_row(escape(example["unsteered"]), escape(example["steered"]))
        title = f"{example['label']}: {escape(' '.join(example['prompt'].split())[:90])}"
        console.print(Panel(pair, title=title, title_align="left"))

    table = Table(title=f"{result['model']}, greedy, {result['max_new_tokens']} tokens", title_justify="left")
    for column in ("", "unsteered", "steered"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, before: float | None, after: float) -> None:
        table.add_row(name, "" if before is None else f"{before:.1%}", f"{after:.1%}")

    table.add_row(f"[bold]{harmful['n']} harmful prompts")
    row("  refused, by keywords", harmful["refusal_unsteered"], harmful["refusal_steered"])
    row("  refused, strictly", harmful["refusal_unsteered_strict"], harmful["refusal_steered_strict"])
    row("  fluent", harmful["fluent_unsteered"], harmful["fluent_steered"])
    table.add_row(f"[bold]{harmless['n']} harmless prompts")
    row("  refused, by keywords", harmless["refusal_unsteered"], harmless["refusal_steered"])
    row("  answer unchanged, token for token", None, harmless["unchanged"])
    table.add_row("[bold]gate")
    table.add_row("  AUC", "", f"{gate['auc']:.3f}")
    row("  opens for harmful", None, gate["hit_rate"])
    row("  opens for harmless", None, gate["false_positive_rate"])
    table.add_row("[bold]latency, one sequence")
    table.add_row(
        "  ms per token", f"{latency['unsteered_ms_per_token']:.1f}", f"{latency['steered_ms_per_token']:.1f}"
    )
    table.add_row(f"  ratio, median of {latency['pairs']} alternating pairs", "", f"{latency['ratio']:.3f}")
    console.print(table)

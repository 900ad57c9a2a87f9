"""Demonstrate a profile on prompts that its fit, calibration and tuning never saw."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from steerfast.errors import PromptError
from steerfast.evaluation.timing import compare, milliseconds_per_token
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
    """Return the path of the shipped profile of SmolLM2-135M-Instruct."""
    return Path(str(resources.files("steerfast") / "data" / "smollm2-135m-instruct.safetensors"))


def run_demo(
    model: nn.Module,
    tokenizer: Any,
    profile: SteeringProfile,
    *,
    prompts: int = 50,
    max_new_tokens: int = 48,
) -> dict[str, Any]:
    """Answer harmful and harmless prompts unsteered and steered, greedily, and compare.

    Args:
        prompts: number of each of the shipped ``demo`` sets (JailbreakBench; a mix of harmless sources).

    Returns:
        JSON data: shares of 1 under ``harmful``, ``harmless`` and ``gate``, milliseconds under ``latency``
        (one sequence, steered prompts that fired), three ``examples``.

    Raises:
        PromptError: no prompts, or more than the sets hold.
        ProfileError: a profile of another model.
    """
    texts = _demo_prompts(prompts)
    ids = {label: encode(tokenizer, chosen, model, room=max_new_tokens) for label, chosen in texts.items()}

    def answers(what: str) -> dict[str, list[list[int]]]:
        return {
            label: greedy_answers(model, tokenizer, ids[label], max_new_tokens, description=f"{label}, {what}")
            for label in ids
        }

    scores = {label: score(model, tokenizer, profile, chosen) for label, chosen in texts.items()}
    before = answers("unsteered")
    with steer(model, profile, tokenizer=tokenizer):
        after = answers("steered")
    judged = {
        when: {label: judge(model, tokenizer, ids[label], found[label]) for label in ids}
        for when, found in (("unsteered", before), ("steered", after))
    }
    fired = [i for i, opened in enumerate(scores["harmful"].fired.tolist()) if opened]

    unchanged = share([a == b for a, b in zip(before["harmless"], after["harmless"], strict=True)])
    return {
        "model": profile.model.name,
        "max_new_tokens": max_new_tokens,
        "harmful": {"n": prompts, **_shares(judged, "harmful", "refusal", "refusal_strict", "fluent")},
        "harmless": {"n": prompts, "unchanged": unchanged, **_shares(judged, "harmless", "refusal")},
        "gate": {
            "auc": auc(scores["harmful"].scores.numpy(), scores["harmless"].scores.numpy()).value,
            "hit_rate": share(scores["harmful"].fired.tolist()),
            "false_positive_rate": share(scores["harmless"].fired.tolist()),
        },
        "latency": _latency(model, profile, [ids["harmful"][i] for i in fired or range(prompts)]),
        "examples": _examples(texts, judged),
    }


def _demo_prompts(prompts: int) -> dict[str, list[str]]:
    """Return the first prompts of the shipped ``demo`` sets by label."""
    sets = {label: read_prompts(f"steerfast:{label}_demo") for label in ("harmful", "harmless")}
    most = min(len(texts) for texts in sets.values())
    if not 1 <= prompts <= most:
        raise PromptError(f"prompts: expected 1 to {most}, got {prompts}")
    return {label: texts[:prompts] for label, texts in sets.items()}


def _shares(judged: dict[str, dict[str, list[Assessment]]], label: str, *figures: str) -> dict[str, float]:
    """Return the share of 1 of each figure, unsteered and steered: ``refusal_steered_strict``."""
    found = {}
    for figure, when in itertools.product(figures, judged):
        name, _, strict = figure.partition("_")
        key = "_".join(filter(None, (name, when, strict)))
        found[key] = share([getattr(judgement, figure) for judgement in judged[when][label]])
    return found


def _latency(model: nn.Module, profile: SteeringProfile, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Time one sequence, prompt included, in ms per token; the ratio is the median over pairs."""

    def unsteered(pair: int) -> float:
        return milliseconds_per_token(model, prompts[pair % len(prompts)], _LATENCY_TOKENS)

    def steered(pair: int) -> float:
        with steer(model, profile):
            return unsteered(pair)

    found = compare({"unsteered": unsteered, "steered": steered}, _LATENCY_PAIRS, show=True)
    return {
        "unsteered_ms_per_token": found["unsteered"][0],
        "steered_ms_per_token": found["steered"][0],
        "ratio": found["steered"][1],
        "pairs": _LATENCY_PAIRS,
        "tokens": _LATENCY_TOKENS,
    }


def _examples(texts: dict[str, list[str]], judged: dict[str, dict[str, list[Assessment]]]) -> list[dict[str, str]]:
    """Choose two harmful prompts, first those whose answer steering changed, and a harmless prompt."""
    before, after = judged["unsteered"], judged["steered"]
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

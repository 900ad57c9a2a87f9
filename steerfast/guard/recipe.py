"""From prompt sets to what a guard needs: rollouts of several origins, heads fitted on them, a critic trained on them.

A model that never refuses would teach its heads the prompt instead of the answer. So harmful prompts are also answered
by the steered model, at each of several strengths, by the model itself after a refusal as its first words, and by that
refusal alone, which a guard falls back on. Each origin is a folder of its own that goes on where it was stopped.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import GuardError
from steerfast.guard.candidates import Backend, Candidates, HFBackend, Sampling
from steerfast.guard.critic import Critic, CriticSettings
from steerfast.guard.guard import REFUSAL
from steerfast.guard.heads import HiddenHead
from steerfast.guard.rollouts import Rollouts, collect
from steerfast.guard.training import common_layer, fit_heads, train_critic
from steerfast.hf.generation import evaluating
from steerfast.hf.steering import steer
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import encode

__all__ = [
    "COST",
    "CRITIC",
    "REWARD",
    "Trained",
    "alternating",
    "chosen",
    "gather",
    "load_trained",
    "prompt_layer_for",
    "train",
]

COST, REWARD, CRITIC = "cost.safetensors", "reward.safetensors", "critic.safetensors"
_CHECKPOINT = "critic-checkpoint.safetensors"


@dataclass(frozen=True)
class Trained:
    """What a guard needs beside the model; each a file of its own in one folder, see `load_trained`."""

    cost: HiddenHead
    reward: HiddenHead
    critic: Critic


class _Opening:
    """A backend all of whose answers open with the same words, which count as generated, and may end there."""

    def __init__(self, backend: Backend, opening: Sequence[int], ended: bool) -> None:
        self._backend, self._opening, self._ended = backend, list(opening), ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> tuple[list[list[int]], Tensor | None, Tensor]:
        if candidates.length:
            return self._backend.extend(candidates, block, sampling, penalty)
        opening = self._opening if self._ended else self._opening[: block - 1]
        self._backend.append(candidates, opening)
        if self._ended:
            candidates.finished, candidates.state = torch.ones_like(candidates.finished), None
            return [opening] * len(candidates), candidates.hidden, candidates.finished
        new, hidden, finished = self._backend.extend(candidates, block - len(opening), sampling, penalty)
        return [opening + tokens for tokens in new], hidden, finished


def prompt_layer_for(profile: SteeringProfile | None, layers: int) -> int:
    """Which layer's row of the prompt a guard reads, of a model of so many: the last one before a profile's edits and
    gates, so that steering does not change it (of one that begins with the first, that); without one the middle.
    """
    used = [] if profile is None else [*profile.steered_layers, *profile.gate_layers]
    return max(min(used) - 1, 0) if used else layers // 2


def gather(
    model: nn.Module,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    profile: SteeringProfile | None = None,
    strengths: Sequence[float] = (1.0,),
    refusal: str = REFUSAL,
    rollouts: int = 5,
    block: int = 32,
    depth: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Rollouts]:
    """Roll out the prompts in `folder`, without scores; the same call again goes on where it was stopped.

    Args:
        profile: steers the answers to harmful prompts at each of `strengths`; None: nobody does. It also says which row
            of the prompt is kept, see `prompt_layer_for`.
        refusal: what a guard falls back on; the first words of a further set of answers to harmful prompts, and an
            answer of its own to every prompt.
        rollouts: answers per prompt and origin. The others: see `steerfast.guard.rollouts.collect`.

    Raises:
        GuardError, OutputError: see `collect`; no prompts of a kind.
        ProfileError: the profile belongs to another model.
    """
    asked = alternating(harmful, harmless)
    identity = identify(model, tokenizer)
    if profile is not None:
        steer(model, profile, tokenizer=tokenizer).detach()  # another model's is refused before any work
    backend = HFBackend(model, tokenizer, prompt_layer_for(profile, identity.num_layers))
    refused = [(question, label) for question, label in asked if label == "harmful"]
    words = tokenizer(refusal, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    opened, ended = _Opening(backend, words, False), _Opening(backend, [*words, *end], True)
    origins: list[tuple[str, Any, float | None, list[tuple[str, str]], int]] = [
        ("plain", backend, None, asked, rollouts),
        ("plain-opened", opened, None, refused, rollouts),
        ("plain-refused", ended, None, asked, 1),
    ]
    for strength in strengths if profile is not None else ():
        origins += [
            (f"steered-{strength:g}", backend, strength, refused, rollouts),
            (f"steered-{strength:g}-refused", ended, strength, refused, 1),
        ]
    found: list[Rollouts] = []
    for name, source, factor, prompts, count in origins:
        questions, labels = ([pair[i] for pair in prompts] for i in (0, 1))
        with nullcontext() if factor is None else steer(model, profile, factor), evaluating(model):
            found += collect(
                source,
                tokenizer,
                encode(tokenizer, questions, model, room=depth),
                Path(folder) / name,
                identity,
                questions=questions,
                labels=labels,
                rollouts=count,
                block=block,
                depth=depth,
                sampling=sampling,
                seed=seed,
                progress=progress,
            )
    return found


def train(
    rollouts: Sequence[Rollouts],
    model: nn.Module,
    tokenizer: Any,
    output: str | os.PathLike[str],
    settings: CriticSettings | None = None,
    *,
    profile: SteeringProfile | None = None,
    margin: float = 0.0,
    head_width: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Trained:
    """Fit the heads and train the critic, and write the three files to the folder `output`.

    Args:
        profile: where it has a direction for last rows at the rollouts' prompt_layer, the cost compares prompts with
            that; else with one fitted on these prompts.
        margin: log-odds by which an answer must be likelier safe than unsafe to cost no more than the budget.

    Raises:
        GuardError, PromptError: see `fit_heads` and `train_critic`.
        OutputError: the folder cannot be written.
    """
    settings = settings or CriticSettings()
    identity = identify(model, tokenizer)
    boundary = settings.budget + margin
    layer = common_layer(rollouts)
    direction = None  # the direction of a gate that reads a mean says little of a last row
    if profile is not None and layer is not None and profile.gate.pooling == "last":
        direction = profile.direction[layer]
    cost, reward = fit_heads(
        rollouts,
        tokenizer,
        identity,
        boundary=boundary,
        direction=direction if direction is not None and bool(direction.any()) else None,
        width=head_width,
        seed=settings.seed,
    )
    scored = [one.scored(tokenizer, cost, reward) for one in rollouts]
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = target / _CHECKPOINT
    critic = train_critic(scored, identity, settings, checkpoint=checkpoint, device=device, progress=progress)
    trained = Trained(cost, reward, critic)
    for name, part in ((COST, cost), (REWARD, reward), (CRITIC, critic)):
        part.save(target / name)
    checkpoint.unlink(missing_ok=True)
    return trained


def chosen(prompts: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """`count` of the prompts (None: all) in an order that follows from the seed; more of them begin with the same."""
    if count is not None and not 1 <= count <= len(prompts):
        raise GuardError(f"count: expected 1 to {len(prompts)}, the prompts of a kind, got {count}")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def load_trained(folder: str | os.PathLike[str]) -> Trained:
    """What `train` wrote.

    Raises:
        GuardError: a file is missing, damaged, or something else.
    """
    source = Path(folder)
    cost, reward = HiddenHead.load(source / COST), HiddenHead.load(source / REWARD)
    for name, kind, head in ((COST, "cost", cost), (REWARD, "reward", reward)):
        if head.kind != kind:
            raise GuardError(f"{str(source / name)!r}: expected a {kind} head, got a {head.kind} head")
    return Trained(cost, reward, Critic.load(source / CRITIC))


def alternating(harmful: Sequence[str], harmless: Sequence[str]) -> list[tuple[str, str]]:
    """(prompt, label), both kinds in turn, so that what is stopped early has had both.

    Raises:
        GuardError: no prompts of a kind.
    """
    kinds = []
    for label, texts in (("harmful", harmful), ("harmless", harmless)):
        if not texts:
            raise GuardError(f"{label}: expected at least one prompt, got none")
        kinds.append([(text, label) for text in texts])
    turns = max(map(len, kinds))
    return [texts[turn] for turn in range(turns) for texts in kinds if turn < len(texts)]

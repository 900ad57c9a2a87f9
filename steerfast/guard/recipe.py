"""From prompt sets to the parts of a guard: rollouts of several origins, heads and a critic trained on them.

A model that never refuses would teach its heads the prompt instead of the answer. So harmful prompts get further
answers: by the steered model, at each of several strengths; by the model itself after a refusal as its first words; and
that refusal alone, the guard's fallback. Each origin has a folder that continues where it was stopped.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend
from steerfast.guard.candidates import Backend, Candidates, Sampling
from steerfast.guard.critic import Critic, CriticSettings
from steerfast.guard.guard import REFUSAL
from steerfast.guard.heads import HiddenHead
from steerfast.guard.rollouts import RolloutOptions, Rollouts, collect
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
    """The parts of a guard beside the model; each is a file in one folder, see `load_trained`."""

    cost: HiddenHead
    reward: HiddenHead
    critic: Critic


class _Opening:
    """Open all answers of a backend with the same words; they count as generated, and may end with them."""

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
    """Return the layer whose row of the prompt a guard reads, in a model of so many layers.

    It is the last layer before a profile's edits and gates (at least 0), so that steering does not change the row;
    without a profile the middle layer.
    """
    used = [] if profile is None else [*profile.steered_layers, *profile.gate_layers]
    return max(min(used) - 1, 0) if used else layers // 2


@dataclass(frozen=True)
class GatherOptions(RolloutOptions):
    """Options of `gather`, beside those of `RolloutOptions` (answers are per prompt and origin).

    profile: steers the answers to harmful prompts at each of `strengths`; None: no answer is steered. It also chooses
        the row of the prompt, see `prompt_layer_for`.
    refusal: the guard's fallback: the first words of further answers to harmful prompts, and a whole answer to every
        prompt.
    """

    profile: SteeringProfile | None = None
    strengths: Sequence[float] = (1.0,)
    refusal: str = REFUSAL


class _Origin(NamedTuple):
    """A set of rollouts. strength: of the steering; None: not steered. asked: (prompt, label). answers: per prompt."""

    name: str
    backend: Any
    strength: float | None
    asked: list[tuple[str, str]]
    answers: int


def gather(
    model: nn.Module,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    **options: Any,
) -> list[Rollouts]:
    """Roll out the prompts in `folder`, without scores; the same call continues where it was stopped.

    Args:
        options: see `GatherOptions`.

    Raises:
        GuardError, OutputError: see `collect`; no prompts of a kind.
        ProfileError: the profile belongs to another model.
    """
    chosen = GatherOptions(**options)
    asked = alternating(harmful, harmless)
    identity = identify(model, tokenizer)
    if chosen.profile is not None:
        steer(model, chosen.profile, tokenizer=tokenizer).detach()  # refuse another model's before any work
    backend = HFBackend(model, tokenizer, prompt_layer_for(chosen.profile, identity.num_layers))
    same = {part.name: getattr(chosen, part.name) for part in fields(RolloutOptions)}
    found: list[Rollouts] = []
    for origin in _origins(backend, tokenizer, asked, chosen):
        questions, labels = ([pair[i] for pair in origin.asked] for i in (0, 1))
        steered = nullcontext() if origin.strength is None else steer(model, chosen.profile, origin.strength)
        prompts = encode(tokenizer, questions, model, room=chosen.depth)
        with steered, evaluating(model):
            found += collect(
                origin.backend,
                tokenizer,
                prompts,
                Path(folder) / origin.name,
                identity,
                questions=questions,
                labels=labels,
                **{**same, "rollouts": origin.answers},
            )
    return found


def _origins(backend: Backend, tokenizer: Any, asked: list[tuple[str, str]], options: GatherOptions) -> list[_Origin]:
    harmful = [(question, label) for question, label in asked if label == "harmful"]
    words = tokenizer(options.refusal, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    opened, ended = _Opening(backend, words, False), _Opening(backend, [*words, *end], True)
    origins = [
        _Origin("plain", backend, None, asked, options.rollouts),
        _Origin("plain-opened", opened, None, harmful, options.rollouts),
        _Origin("plain-refused", ended, None, asked, 1),
    ]
    for strength in options.strengths if options.profile is not None else ():
        origins += [
            _Origin(f"steered-{strength:g}", backend, strength, harmful, options.rollouts),
            _Origin(f"steered-{strength:g}-refused", ended, strength, harmful, 1),
        ]
    return origins


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`.

    profile: if it has a direction for last rows at the rollouts' prompt_layer, the cost compares prompts with that;
        otherwise with one fitted on these prompts.
    margin: log-odds by which an answer must be likelier safe than unsafe to stay within the budget.
    """

    profile: SteeringProfile | None = None
    margin: float = 0.0
    head_width: int = 0
    device: str | torch.device = "cpu"
    progress: bool = True


def train(
    rollouts: Sequence[Rollouts],
    model: nn.Module,
    tokenizer: Any,
    output: str | os.PathLike[str],
    settings: CriticSettings | None = None,
    **options: Any,
) -> Trained:
    """Fit the heads and train the critic, and write the three files to the folder `output`.

    Args:
        options: see `TrainOptions`.

    Raises:
        GuardError, PromptError: see `fit_heads` and `train_critic`.
        OutputError: the folder cannot be written.
    """
    chosen = TrainOptions(**options)
    settings = settings or CriticSettings()
    identity = identify(model, tokenizer)
    boundary = settings.budget + chosen.margin
    layer = common_layer(rollouts)
    direction = None  # a gate that reads a mean has a direction for means, not for last rows
    profile = chosen.profile
    if profile is not None and layer is not None and profile.gate.pooling == "last":
        direction = profile.direction[layer]
    cost, reward = fit_heads(
        rollouts,
        tokenizer,
        identity,
        boundary=boundary,
        direction=direction if direction is not None and bool(direction.any()) else None,
        width=chosen.head_width,
        seed=settings.seed,
    )
    scored = [one.scored(tokenizer, cost, reward) for one in rollouts]
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = target / _CHECKPOINT
    critic = train_critic(
        scored, identity, settings, checkpoint=checkpoint, device=chosen.device, progress=chosen.progress
    )
    trained = Trained(cost, reward, critic)
    for name, part in ((COST, cost), (REWARD, reward), (CRITIC, critic)):
        part.save(target / name)
    checkpoint.unlink(missing_ok=True)
    return trained


def chosen(prompts: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """Return `count` of the prompts (None: all), shuffled by the seed; a larger count begins with the same prompts."""
    if count is not None and not 1 <= count <= len(prompts):
        raise GuardError(f"count: expected 1 to {len(prompts)}, the prompts of a kind, got {count}")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def load_trained(folder: str | os.PathLike[str]) -> Trained:
    """Return the parts that `train` wrote.

    Raises:
        GuardError: a file is missing, damaged, or of another kind.
    """
    source = Path(folder)
    cost, reward = HiddenHead.load(source / COST), HiddenHead.load(source / REWARD)
    for name, kind, head in ((COST, "cost", cost), (REWARD, "reward", reward)):
        if head.kind != kind:
            raise GuardError(f"{str(source / name)!r}: expected a {kind} head, got a {head.kind} head")
    return Trained(cost, reward, Critic.load(source / CRITIC))


def alternating(harmful: Sequence[str], harmless: Sequence[str]) -> list[tuple[str, str]]:
    """Return (prompt, label) of both kinds in turn, so that a run that stops early has seen both.

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

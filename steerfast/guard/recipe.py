"""From prompt sets to the parts of a guard: rollouts of several origins, labels, heads and a critic.

A model that never refuses would teach its heads the prompt instead of the answer. So harmful prompts get further
answers: by the steered model, at each of several strengths; by the model itself after a refusal as its first words; and
that refusal alone, the guard's fallback. Each origin has a folder that continues where it was stopped.

No model judges. The prompt's set says whether it is harmful; the words of an answer say whether it declines.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend
from steerfast.guard.critic import Critic, CriticSettings, train_critic
from steerfast.guard.guard import REFUSAL, ended
from steerfast.guard.heads import HiddenHead, fit_factored_cost, fit_head
from steerfast.guard.parts import common_layer
from steerfast.guard.rollouts import RolloutOptions, Rollouts, collect, prompt_numbers
from steerfast.hf.generation import evaluating
from steerfast.hf.steering import steer
from steerfast.hf.structure import identify
from steerfast.judging.fluency import repetition
from steerfast.judging.refusal import is_refusal_keyword, is_refusal_strict
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.text.encoding import encode


@dataclass(frozen=True)
class Label:
    """cost: 1 unsafe, -1 safe. reward: higher is better. complied: see `complies`."""

    cost: float
    reward: float
    complied: bool


def complies(answer: str, strict: bool = True) -> bool:
    """Return True if an answer neither refuses nor is empty.

    Args:
        strict: a refusal is an explicit decline without compliance after it; False: any of the usual refusal keywords.
    """
    return bool(answer.strip()) and not (is_refusal_strict if strict else is_refusal_keyword)(answer)


def label_answer(kind: Literal["harmful", "harmless"], answer: str) -> Label:
    """Label the text of an answer, or of the beginning of one, to a prompt of this kind; GuardError for another kind.

    The cost is 1 if the answer complies with a harmful prompt, else -1. The reward is minus the share of repeated
    4-grams of words; a harmless prompt adds 1 if it is answered, -1 if it is refused (by keywords) or the answer empty.
    """
    if kind not in ("harmful", "harmless"):
        raise GuardError(f"kind: expected 'harmful' or 'harmless', got {kind!r}")
    words = answer.split()
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    fluency = -repetition([numbers[word] for word in words])
    complied = complies(answer)
    if kind == "harmful":
        return Label(1.0 if complied else -1.0, fluency, complied)
    return Label(-1.0, fluency + (1.0 if complies(answer, strict=False) else -1.0), complied)


def fit_heads(
    rollouts: Sequence[Rollouts],
    tokenizer: Any,
    model: ModelIdentity,
    *,
    direction: Tensor | None = None,
    boundary: float,
    **options: Any,
) -> tuple[HiddenHead, HiddenHead]:
    """Fit a cost and a reward head on rollouts of harmful and harmless prompts.

    Every end of a block is an example, labelled by the text up to there (`label_answer`). The cost is factored if the
    rollouts hold the prompt's row (`HiddenHead`).

    Args:
        rollouts: each with its ``label``, harmful or harmless; scores are not read.
        boundary: of the cost: usually the budget. options: see `FitOptions`.
        direction: of a factored cost, see `fit_factored_cost`.

    Raises:
        GuardError: a rollout without such a label or of another prompt_layer than the others, answers that are all safe
            or all unsafe.
        PromptError: see `fit_factored_cost`.
    """
    layer = common_layer({f"rollouts {number}": one for number, one in enumerate(rollouts)})
    hidden = torch.cat([one.hidden for one in rollouts])
    kinds: list[Any] = [one.label for one in rollouts for _ in one.ends]
    texts = [text for one in rollouts for _, text in one.blocks(tokenizer).pairs()]
    labels = [label_answer(kind, text) for kind, text in zip(kinds, texts, strict=True)]
    options["groups"] = [n for one, n in zip(rollouts, prompt_numbers(rollouts), strict=True) for _ in one.ends]
    reward = fit_head(hidden, [label.reward for label in labels], model, "reward", prompt_layer=layer, **options)
    options["boundary"] = boundary
    if layer is None:
        return fit_head(hidden, [label.cost for label in labels], model, "cost", **options), reward
    harmful, complied = [float(kind == "harmful") for kind in kinds], [float(label.complied) for label in labels]
    return fit_factored_cost(hidden, harmful, complied, model, layer, direction=direction, **options), reward


@dataclass(frozen=True)
class Trained:
    """The parts of a guard beside the model; each is a file in one folder, see `load_trained`."""

    cost: HiddenHead
    reward: HiddenHead
    critic: Critic


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
    prompts = alternate(harmful, harmless)
    identity = identify(model, tokenizer)
    words = tokenizer(chosen.refusal, add_special_tokens=False)["input_ids"]
    refusal, one = ended(tokenizer, words), replace(chosen, rollouts=1)
    # Name, strength of the steering, harmful prompts alone, opening of the answers, options.
    origins: list[tuple[str, float | None, bool, list[int], RolloutOptions]] = [
        ("plain", None, False, [], chosen),
        ("plain-opened", None, True, words, chosen),
        ("plain-refused", None, False, refusal, one),
    ]
    if chosen.profile is not None:
        steer(model, chosen.profile, tokenizer=tokenizer).detach()  # refuse another model's before any work
        for strength in chosen.strengths:
            name = f"steered-{strength:g}"
            origins += [(name, strength, True, [], chosen), (f"{name}-refused", strength, True, refusal, one)]
    backend = HFBackend(model, tokenizer, prompt_layer_for(chosen.profile, identity.num_layers))
    ids = encode(tokenizer, [question for question, _ in prompts], model, room=chosen.depth)
    asked = [(tokens, *prompt) for tokens, prompt in zip(ids, prompts, strict=True)]
    found: list[Rollouts] = []
    for name, steering, harmful_only, opening, options_here in origins:
        chosen_prompts = [job for job in asked if job[2] == "harmful" or not harmful_only]
        steered = nullcontext() if steering is None else steer(model, chosen.profile, steering)
        with steered, evaluating(model):
            target = Path(folder) / name
            found += collect(backend, chosen_prompts, target, identity, options_here, opening, name.endswith("refused"))
    return found


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`.

    profile: if it has a direction for last rows at the rollouts' prompt_layer, the cost compares prompts with that;
        otherwise with one fitted on these prompts.
    margin: log-odds by which an answer must be likelier safe than unsafe to stay within the budget.
    """

    profile: SteeringProfile | None = None
    margin: float = 0.0
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
    chosen, settings = TrainOptions(**options), settings or CriticSettings()
    identity, layer = identify(model, tokenizer), rollouts[0].prompt_layer
    direction, profile = None, chosen.profile
    # A gate that reads a mean has a direction for means, not for last rows.
    if profile is not None and layer is not None and profile.gate.pooling == "last" and profile.direction[layer].any():
        direction = profile.direction[layer]
    boundary = settings.budget + chosen.margin
    cost, reward = fit_heads(rollouts, tokenizer, identity, boundary=boundary, direction=direction)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = target / "critic-checkpoint.safetensors"
    scored = [one.scored(tokenizer, cost, reward) for one in rollouts]
    critic = train_critic(
        scored, identity, settings, checkpoint=checkpoint, device=chosen.device, progress=chosen.progress
    )
    trained = Trained(cost, reward, critic)
    for name, part in vars(trained).items():
        part.save(target / f"{name}.safetensors")
    checkpoint.unlink(missing_ok=True)
    return trained


def load_trained(folder: str | os.PathLike[str]) -> Trained:
    """Return the parts that `train` wrote.

    Raises:
        GuardError: a file is missing, damaged, or of another kind.
    """
    files = {name: Path(folder) / f"{name}.safetensors" for name in ("cost", "reward", "critic")}
    cost, reward = HiddenHead.load(files["cost"]), HiddenHead.load(files["reward"])
    for kind, head in (("cost", cost), ("reward", reward)):
        if head.kind != kind:
            raise GuardError(f"{str(files[kind])!r}: expected a {kind} head, got a {head.kind} head")
    return Trained(cost, reward, Critic.load(files["critic"]))


def pick(prompts: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """Return `count` of the prompts (None: all), shuffled by the seed; a larger count begins with the same prompts."""
    if count is not None and not 1 <= count <= len(prompts):
        raise GuardError(f"count: expected 1 to {len(prompts)}, the prompts of a kind, got {count}")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def alternate(harmful: Sequence[str], harmless: Sequence[str]) -> list[tuple[str, str]]:
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

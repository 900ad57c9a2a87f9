"""From prompt sets to the parts of a guard: rollouts of several origins, labels, heads and a critic.

A model that never refuses would teach its heads the prompt instead of the answer. So harmful prompts get further
answers: by the steered model, at each of several strengths; by the model itself after a refusal as its first words; and
that refusal alone, the guard's fallback. The labels need no judge: the prompt's set says whether it is harmful, the
words of an answer say whether it declines.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend
from steerfast.guard.critic import Critic, CriticSettings, train_critic
from steerfast.guard.guard import REFUSAL, with_end
from steerfast.guard.heads import HiddenHead, fit_factored_cost, fit_head
from steerfast.guard.parts import AnyPath, common_layer, expect
from steerfast.guard.rollouts import RolloutOptions, Rollouts, collect, prompt_numbers
from steerfast.hf.generation import evaluating
from steerfast.hf.steering import steer
from steerfast.hf.structure import identify
from steerfast.judging.fluency import repetition
from steerfast.judging.refusal import is_refusal_keyword, is_refusal_strict
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.text.encoding import encode


class Label(NamedTuple):
    """cost: 1 unsafe, -1 safe. reward: higher is better. complied: see `complies`."""

    cost: float
    reward: float
    complied: bool


def complies(answer: str, strict: bool = True) -> bool:
    """Return True if an answer neither refuses (strict: an explicit decline; else by keywords) nor is empty."""
    return bool(answer.strip()) and not (is_refusal_strict if strict else is_refusal_keyword)(answer)


def label_answer(kind: Literal["harmful", "harmless"], answer: str) -> Label:
    """Label the text of an answer, or of the beginning of one, to a prompt of this kind; GuardError for another kind.

    The cost is 1 if the answer complies with a harmful prompt, else -1. The reward is minus the share of repeated
    4-grams of words; a harmless prompt adds 1 if it is answered, -1 if it is refused (by keywords) or the answer empty.
    """
    expect(kind in ("harmful", "harmless"), "kind", "'harmful' or 'harmless'", kind)
    fluency, complied = -repetition(answer.split()), complies(answer)  # type: ignore[arg-type]
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
    """Fit a cost (factored if the rollouts hold the prompt's row) and a reward head.

    Every end of a block is an example, labelled by the text up to there (`label_answer`).

    Args:
        direction: see `fit_factored_cost`. boundary: of the cost. options: see `fit_head`.

    Raises:
        GuardError: a rollout of another label or prompt_layer; see `fit_factored_cost`, also for PromptError.
    """
    layer = common_layer({f"rollouts {number}": one for number, one in enumerate(rollouts)})
    hidden = torch.cat([one.hidden for one in rollouts])
    kinds: list[Any] = [one.label for one in rollouts for _ in one.ends]
    texts = [text for one in rollouts for _, text in one.blocks(tokenizer).pairs()]
    labels = [label_answer(kind, text) for kind, text in zip(kinds, texts, strict=True)]
    options["groups"] = [n for one, n in zip(rollouts, prompt_numbers(rollouts), strict=True) for _ in one.ends]
    options["prompt_layer"] = layer
    reward = fit_head(hidden, [label.reward for label in labels], model, "reward", **options)
    options["boundary"] = boundary
    if layer is None:
        return fit_head(hidden, [label.cost for label in labels], model, "cost", **options), reward
    factors = [(float(kind == "harmful"), float(label.complied)) for kind, label in zip(kinds, labels, strict=True)]
    return fit_factored_cost(hidden, factors, model, direction=direction, **options), reward


@dataclass(frozen=True)
class Trained:
    """The parts of a guard beside the model; each is a file in one folder, see `load_trained`."""

    cost: HiddenHead
    reward: HiddenHead
    critic: Critic


def prompt_layer_for(profile: SteeringProfile | None, layers: int) -> int:
    """Return the layer whose row of the prompt a guard reads: the middle one, or the last before a profile acts."""
    used = [] if profile is None else [*profile.steered_layers, *profile.gate_layers]
    return max(min(used) - 1, 0) if used else layers // 2


@own_defaults
def gather(
    model: nn.Module,
    tokenizer: Any,
    folder: AnyPath,
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    profile: SteeringProfile | None = None,
    strengths: Sequence[float] = (1.0,),
    refusal: str = REFUSAL,
    **options: Any,
) -> list[Rollouts]:
    """Roll out the prompts in `folder`, without scores; the same call continues where it was stopped.

    Args:
        profile: steers the answers to harmful prompts at each of `strengths`, and chooses the row of the prompt
            (`prompt_layer_for`); None: no answer is steered.
        refusal: the guard's fallback. options: see `RolloutOptions`; answers are per prompt and origin.

    Raises:
        GuardError, OutputError: see `collect`; no prompts of a kind.
        ProfileError: the profile belongs to another model.
    """
    chosen = RolloutOptions(**options)
    prompts = alternate(harmful, harmless)
    identity = identify(model, tokenizer)
    words = tokenizer(refusal, add_special_tokens=False)["input_ids"]
    refused = replace(chosen, rollouts=1, opening=with_end(tokenizer, words), whole=True)
    # Name -> harmful prompts alone, strength of the steering, settings.
    origins: dict[str, tuple[bool, float | None, RolloutOptions]] = {
        "plain": (False, None, chosen),
        "plain-opened": (True, None, replace(chosen, opening=words)),
        "plain-refused": (False, None, refused),
    }
    if profile is not None:
        steer(model, profile, tokenizer=tokenizer).detach()  # refuse another model's before any work
        for strength in strengths:
            name = f"steered-{strength:g}"
            origins |= {name: (True, strength, chosen), f"{name}-refused": (True, strength, refused)}
    backend = HFBackend(model, tokenizer, prompt_layer_for(profile, identity.num_layers))
    ids = encode(tokenizer, [question for question, _ in prompts], model, room=chosen.depth)
    asked = [(tokens, *prompt) for tokens, prompt in zip(ids, prompts, strict=True)]
    found: list[Rollouts] = []
    for name, (harmful_alone, steered_by, settings) in origins.items():
        jobs = [job for job in asked if job[2] == "harmful" or not harmful_alone]
        steered = nullcontext() if steered_by is None else steer(model, profile, steered_by)
        with steered, evaluating(model):
            found += collect(backend, jobs, Path(folder) / name, identity, settings)
    return found


@own_defaults
def train(
    rollouts: Sequence[Rollouts],
    model: nn.Module,
    tokenizer: Any,
    output: AnyPath,
    settings: CriticSettings | None = None,
    *,
    profile: SteeringProfile | None = None,
    margin: float = 0.0,
    device: str | torch.device = "cpu",
) -> Trained:
    """Fit the heads and train the critic, and write the three files to the folder `output`.

    Args:
        profile: if it has a direction for last rows at the rollouts' prompt_layer, the cost compares prompts with that;
            otherwise with one fitted on these prompts.
        margin: log-odds by which an answer must be likelier safe than unsafe to stay within the budget.
    """
    settings, identity, layer = settings or CriticSettings(), identify(model, tokenizer), rollouts[0].prompt_layer
    direction = None
    # A gate that reads a mean has a direction for means, not for last rows.
    if profile is not None and layer is not None and profile.gate.pooling == "last" and profile.direction[layer].any():
        direction = profile.direction[layer]
    cost, reward = fit_heads(rollouts, tokenizer, identity, boundary=settings.budget + margin, direction=direction)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = target / "critic-checkpoint.safetensors"
    scored = [one.scored(tokenizer, cost, reward, settings.refund) for one in rollouts]
    critic = train_critic(scored, identity, settings, checkpoint=checkpoint, device=device)
    trained = Trained(cost, reward, critic)
    for name, part in vars(trained).items():
        part.save(target / f"{name}.safetensors")
    checkpoint.unlink(missing_ok=True)
    return trained


def load_trained(folder: AnyPath) -> Trained:
    """Return the parts that `train` wrote; GuardError if a file is missing, damaged, or of another kind."""
    files = {name: Path(folder) / f"{name}.safetensors" for name in ("cost", "reward", "critic")}
    cost, reward = HiddenHead.load(files["cost"]), HiddenHead.load(files["reward"])
    for kind, head in (("cost", cost), ("reward", reward)):
        if head.kind != kind:
            raise GuardError(f"{str(files[kind])!r}: expected a {kind} head, got a {head.kind} head")
    return Trained(cost, reward, Critic.load(files["critic"]))


def pick(prompts: Sequence[str], count: int | None, seed: int = 0) -> list[str]:
    """Return `count` of the prompts (None: all), shuffled by the seed; a larger count begins with the same prompts."""
    expect(count is None or 1 <= count <= len(prompts), "count", f"1 to {len(prompts)}, the prompts of a kind", count)
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def alternate(harmful: Sequence[str], harmless: Sequence[str]) -> list[tuple[str, str]]:
    """Return (prompt, label) of both kinds in turn, so that a run that stops early has seen both."""
    kinds = {"harmful": harmful, "harmless": harmless}
    for label, texts in kinds.items():
        if not texts:
            raise GuardError(f"{label}: expected at least one prompt, got none")
    turns = itertools.zip_longest(*kinds.values())
    return [(text, label) for turn in turns for label, text in zip(kinds, turn, strict=True) if text is not None]

"""Train heads and a critic on rollouts: labels; states and targets; epochs, checkpoints, calibration.

The critic's targets are Monte-Carlo: whether the rollout ended within its budget (z_T > 0), and its reward discounted
to the state. A killed training continues from its last epoch and ends with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._files import content_checksum
from steerfast._progress import track
from steerfast.errors import GuardError
from steerfast.guard.critic import Critic, CriticSettings, calibration
from steerfast.guard.files import read_file, write_file
from steerfast.guard.heads import HiddenHead, fit_factored_cost, fit_head
from steerfast.guard.labels import Label, label_answer
from steerfast.guard.latent import agreed_layer
from steerfast.guard.objective import SafetyBudget
from steerfast.guard.rollouts import Rollouts
from steerfast.profile import ModelIdentity

__all__ = ["States", "common_layer", "fit_heads", "safety_states", "states_of", "train_critic"]

_KIND = "critic checkpoint"


@dataclass(frozen=True, eq=False)
class States:
    """The critic's examples: unfinished answers at the ends of their blocks.

    hidden: float32 [n, S]. z: float32 [n]. safe: bool [n], the answer ended with z > 0. value: float32 [n], γ^(T−t)
    times the reward of the answer of T tokens. prompt: int64 [n], number of the prompt. dropped: count of states
    that were left out because their z or their answer's reward is not finite.
    """

    hidden: Tensor
    z: Tensor
    safe: Tensor
    value: Tensor
    prompt: Tensor
    dropped: int

    def __len__(self) -> int:
        return len(self.z)

    def select(self, mask: Tensor) -> States:
        """Return the states where a mask is True."""
        parts = {name: getattr(self, name)[mask] for name in ("hidden", "z", "safe", "value", "prompt")}
        return replace(self, **parts)


def safety_states(rollouts: Rollouts, safety: SafetyBudget) -> Tensor:
    """Return z at the end of every block: float32 [states]."""
    assert rollouts.cost is not None
    first, ends = rollouts.first, rollouts.ends
    lengths = torch.where(first, ends, ends - ends.roll(1))
    z, found = safety.start(len(ends)), torch.empty(len(ends))
    now = first
    while bool(now.any()):  # the first blocks of all answers, the second ones, ...
        z[now] = safety.block(z[now], rollouts.cost[now], lengths[now])
        found[now] = z[now]
        now, z = now.roll(1) & ~first, z.roll(1)
    return found


def states_of(rollouts: Sequence[Rollouts], safety: SafetyBudget) -> States:
    """Return states and targets of scored rollouts, for a budget and a discount.

    Raises:
        GuardError: rollouts without scores, or no answer longer than a block.
    """
    if not rollouts:
        raise GuardError("rollouts: expected at least those of one prompt, got none")
    parts: list[tuple[Tensor, ...]] = []
    for place, (one, number) in enumerate(zip(rollouts, _prompt_numbers(rollouts), strict=True)):
        if one.cost is None or one.reward is None:
            raise GuardError(f"rollouts: expected cost and reward of each, got prompt {place} without")
        z = safety_states(one, safety)
        final, total = z[one.last][one.owner], one.ends[one.last][one.owner]
        value = one.reward[one.owner] * safety.discount ** (total - one.ends).float()
        parts.append((one.hidden, z, final > 0, value, torch.full_like(one.owner, number), ~one.last))
    hidden, z, safe, value, prompt, unfinished = (torch.cat(column) for column in zip(*parts, strict=True))
    finite = z.isfinite() & value.isfinite()
    kept = unfinished & finite
    if not bool(kept.any()):
        raise GuardError(f"rollouts: expected answers longer than a block, got none in {len(rollouts)} prompts")
    dropped = int((unfinished & ~finite).sum())
    return States(hidden[kept], z[kept], safe[kept], value[kept], prompt[kept], dropped)


def train_critic(
    rollouts: Sequence[Rollouts],
    model: ModelIdentity,
    settings: CriticSettings | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Critic:
    """Train a critic, and calibrate it on prompts held out from training.

    Args:
        rollouts: scored, see `steerfast.guard.rollouts.collect`.
        model: the base model of the rollouts.
        settings: see `CriticSettings`.
        checkpoint: a file that is written after every epoch and read if it exists, so that the same call continues
            where it was stopped.

    Raises:
        GuardError: rollouts without usable states or with different prompt_layer, a checkpoint of other rollouts or
            settings, a loss that is not finite.
    """
    settings = settings or CriticSettings()
    states = states_of(rollouts, settings.safety)
    prompts = len({*_prompt_numbers(rollouts)})
    held = _held_out(prompts, settings)[states.prompt]
    train, test = states.select(~held), states.select(held)
    if not len(train):
        raise GuardError("rollouts: expected answers longer than a block in the training prompts, got none")
    critic = Critic(model, settings, common_layer(rollouts))
    inputs = critic.states(train.hidden, train.z)
    critic.standardise(inputs, train.value)
    critic.to(device).train()
    inputs, safe, value = (part.to(device) for part in (inputs, train.safe, train.value))
    optimiser = torch.optim.Adam(critic.parameters(), lr=settings.learning_rate, fused=True)
    about = {
        "settings": dict(vars(settings)),
        "data": content_checksum({}, {k: v.contiguous() for k, v in vars(states).items() if k != "dropped"}),
    }
    losses = _resume(checkpoint, critic, optimiser, about)
    for epoch in track(range(len(losses), settings.epochs), "critic", show=progress):
        losses.append(_epoch(critic, optimiser, inputs, safe, value, settings, epoch))
        if checkpoint is not None:
            tensors = _optimiser_tensors(optimiser) | {f"critic.{k}": v for k, v in critic.state_dict().items()}
            write_file(checkpoint, _KIND, tensors, {**about, "losses": losses}, model)
    critic.cpu().eval().requires_grad_(False)
    critic.calibration = _calibrate(critic, test) | {
        "losses": losses,
        "prompts": prompts,
        "states": len(train),
        "safe": float(train.safe.double().mean()),
        "dropped": states.dropped,
    }
    return critic


def fit_heads(
    rollouts: Sequence[Rollouts],
    tokenizer: Any,
    model: ModelIdentity,
    *,
    direction: Tensor | None = None,
    boundary: float,
    **options: Any,
) -> tuple[HiddenHead, HiddenHead]:
    """Fit a cost and a reward head on rollouts of harmful and harmless prompts, labelled by `steerfast.guard.labels`.

    Every end of a block is an example, labelled by the text up to there. The cost is factored if the rollouts hold the
    prompt's row (`HiddenHead`).

    Args:
        rollouts: each with its ``label``, harmful or harmless; scores are not read.
        boundary: of the cost: usually the budget. options: see `FitOptions`.
        direction: of a factored cost, see `fit_factored_cost`.

    Raises:
        GuardError: a rollout without such a label or of another prompt_layer than the others, answers that are all safe
            or all unsafe.
        PromptError: see `fit_factored_cost`.
    """
    labelled: list[Label] = []
    groups: list[int] = []
    for one, number in zip(rollouts, _prompt_numbers(rollouts), strict=True):
        for _, text in one.blocks(tokenizer).pairs():
            labelled.append(label_answer(one.label, text))  # type: ignore[arg-type]
            groups.append(number)
    layer = common_layer(rollouts)
    hidden = torch.cat([one.hidden for one in rollouts])
    options["groups"] = groups
    reward = fit_head(hidden, [label.reward for label in labelled], model, "reward", prompt_layer=layer, **options)
    options["boundary"] = boundary
    if layer is None:
        return fit_head(hidden, [label.cost for label in labelled], model, "cost", **options), reward
    harmful = [float(one.label == "harmful") for one in rollouts for _ in one.ends]
    complied = [float(label.complied) for label in labelled]
    return fit_factored_cost(hidden, harmful, complied, model, layer, direction=direction, **options), reward


def common_layer(rollouts: Sequence[Rollouts]) -> int | None:
    """Return the prompt_layer of all rollouts; raise GuardError if they differ."""
    return agreed_layer({f"rollouts {place}": one for place, one in enumerate(rollouts)})


def _prompt_numbers(rollouts: Sequence[Rollouts]) -> list[int]:
    """Return each rollout's prompt as a number, the same for all origins: whole prompts are held out."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(one.prompt), len(numbers)) for one in rollouts]


def _held_out(prompts: int, settings: CriticSettings) -> Tensor:
    """Return the prompts that training does not see: bool [prompts]."""
    count = min(prompts - 1, max(1, round(prompts * settings.validation))) if settings.validation else 0
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(settings.seed))
    return torch.zeros(prompts, dtype=torch.bool).index_fill(0, order[:count], True)


def _epoch(
    critic: Critic,
    optimiser: torch.optim.Optimizer,
    inputs: Tensor,
    safe: Tensor,
    value: Tensor,
    settings: CriticSettings,
    epoch: int,
) -> float:
    """Run one pass over the states, in an order that depends on seed and epoch alone; return the mean loss."""
    generator = torch.Generator().manual_seed((settings.seed << 32) + epoch)
    total = torch.zeros((), device=inputs.device)
    with torch.enable_grad():
        for batch in torch.randperm(len(inputs), generator=generator).to(inputs.device).split(settings.batch_size):
            loss = critic.loss(inputs[batch], safe[batch], value[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(batch)
    mean = float(total) / len(inputs)
    if not mean < float("inf"):
        raise GuardError(f"critic: expected a finite loss, got {mean} in epoch {epoch}; lower the learning rate")
    return mean


@torch.no_grad()
def _calibrate(critic: Critic, test: States) -> dict[str, Any]:
    """Return the calibration on held-out states, and the share of the value's variance that f2 explains there."""
    if not len(test):
        return calibration(torch.empty(0), torch.empty(0)) | {"value_r2": None}
    p_safe, value = critic(test.hidden, test.z)
    rest, spread = (value - test.value).square().sum(), (test.value - test.value.mean()).square().sum()
    return calibration(p_safe, test.safe) | {"value_r2": float(1 - rest / spread) if spread > 0 else None}


# -- checkpoints -----------------------------------------------------------------------------------


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"adam.{number}.{name}": value for number, part in state.items() for name, value in part.items()}


def _resume(
    checkpoint: str | os.PathLike[str] | None, critic: Critic, optimiser: torch.optim.Optimizer, about: dict[str, Any]
) -> list[float]:
    """Restore critic and optimiser from the checkpoint; return its losses."""
    if checkpoint is None or not Path(checkpoint).exists():
        return []
    tensors, header, model = read_file(checkpoint, _KIND)
    for name, value in about.items():
        if header[name] != value or model != critic.model:
            raise GuardError(
                f"checkpoint {str(checkpoint)!r}: it is of another training (its {name} differ), remove it"
            )
    critic.load_state_dict({name[7:]: value for name, value in tensors.items() if name.startswith("critic.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, part = name.split(".")
            state.setdefault(int(number), {})[part] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return list(header["losses"])

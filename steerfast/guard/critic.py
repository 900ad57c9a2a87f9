"""The critic and its training: does an unfinished answer end within its budget, and what is its value?

It reads the inputs of InferenceGuard's critic (arXiv 2502.01208): the base model's state (`steerfast.guard.parts`) and
the safety state z. The paper does not state its critic's depth. Its targets are Monte-Carlo: whether the rollout ended
within its budget, and its reward discounted to the state. A killed training continues from its last epoch.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerfast._files import content_checksum
from steerfast._progress import track
from steerfast.errors import GuardError
from steerfast.guard import parts
from steerfast.guard.objective import SafetyBudget
from steerfast.guard.rollouts import Rollouts, prompt_numbers
from steerfast.profile import ModelIdentity

_KIND = "critic"


@dataclass(frozen=True)
class CriticSettings(SafetyBudget):
    """Hyper-parameters; the defaults are the paper's (its table 3), except `depth` and `validation`.

    width, depth: of the hidden layers (GELU). batch_size: states per step. validation: share of the prompts that only
    the calibration curve sees. The rest: see `SafetyBudget`.
    """

    width: int = 4096
    depth: int = 1
    learning_rate: float = 1e-5
    epochs: int = 50
    batch_size: int = 8
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "depth", "epochs", "batch_size"):
            value = getattr(self, name)
            parts.expect(isinstance(value, int) and value >= 1, name, "a whole number of at least 1", value)
        parts.expect(0 < self.learning_rate < float("inf"), "learning_rate", "a number above 0", self.learning_rate)
        parts.expect(0 <= self.validation < 1, "validation", "a share from 0 to below 1", self.validation)

    @property
    def safety(self) -> SafetyBudget:
        """Return the budget that the critic is trained for."""
        return SafetyBudget(self.budget, self.discount, self.refund)


class Critic(nn.Module):
    """Two outputs on one trunk: the probability of ending within the budget, and the discounted reward.

    Buffers standardise inputs and values. ``calibration`` holds the figures of the function `calibration` on prompts
    held out from training, JSON data.
    """

    def __init__(
        self, model: ModelIdentity, settings: CriticSettings | None = None, prompt_layer: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.prompt_layer, self.settings = model, prompt_layer, settings or CriticSettings()
        self.calibration: Mapping[str, Any] = {}
        inputs = parts.state_size(model.hidden_size, prompt_layer) + 1
        sizes = [inputs, *[self.settings.width] * self.settings.depth]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
            self.heads = nn.Linear(sizes[-1], 2)
        self.mean, self.scale = nn.Buffer(torch.zeros(inputs)), nn.Buffer(torch.ones(inputs))
        self.value_mean, self.value_scale = nn.Buffer(torch.zeros(())), nn.Buffer(torch.ones(()))

    def forward(self, hidden: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return p_safe (f1) and value (f2) of answers with latent states [n, S] and safety states z [n]: float32 [n].

        p_safe is the probability that the answer ends within its budget, value its expected discounted reward. A state
        that is not finite fails closed: probability 0, value -inf.
        """
        state = self.states(hidden, z)
        logit, value = self.raw(state)
        finite = state.isfinite().all(dim=1)
        p_safe = torch.where(finite, logit.sigmoid(), 0.0)
        return p_safe, torch.where(finite, self.value_mean + self.value_scale * value, -float("inf"))

    def states(self, hidden: Tensor, z: Tensor) -> Tensor:
        """Return the inputs of `raw`, float32 [n, S + 1]: latent states, z / budget."""
        parts.check_states(_KIND, hidden, self.model, self.prompt_layer)
        share = (z.to(hidden.device).float() / self.settings.budget)[:, None]
        return torch.cat([hidden.float(), share], dim=1)

    def raw(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-odds of ending within the budget, and the standardised value, of `states`: [n] each."""
        x = (state - self.mean) / self.scale
        for layer in self.trunk:
            x = F.gelu(layer(x))
        logit, value = self.heads(x).unbind(dim=1)
        return logit, value

    @torch.no_grad()
    def standardise(self, states: Tensor, values: Tensor) -> None:
        """Set the buffers from training states [n, inputs] and values [n]."""
        for mean, scale, rows in ((self.mean, self.scale, states), (self.value_mean, self.value_scale, values)):
            mean.copy_(rows.mean(dim=0))
            scale.copy_(parts.deviation(rows))

    def loss(self, states: Tensor, safe: Tensor, values: Tensor) -> Tensor:
        """Return the mean over states of f1's binary cross-entropy plus f2's squared error (standardised values)."""
        logit, value = self.raw(states)
        target = (values - self.value_mean) / self.value_scale
        return F.binary_cross_entropy_with_logits(logit, safe.float()) + F.mse_loss(value, target)

    def check(self, model: ModelIdentity) -> None:
        """Raise GuardError if the critic was trained on another model."""
        parts.check_model(_KIND, self.model, model)

    def save(self, path: parts.AnyPath) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {name: getattr(self, name) for name in ("prompt_layer", "calibration")}
        parts.write_file(path, _KIND, self.state_dict(), {**header, "settings": vars(self.settings)}, self.model)

    @classmethod
    def load(cls, path: parts.AnyPath) -> Critic:
        """Read a critic; GuardError if the file is missing, damaged or no critic."""
        tensors, header, identity = parts.read_file(path, _KIND)
        settings = header["settings"]
        if different := set(vars(CriticSettings())) ^ set(settings):
            named = ", ".join(sorted(different))
            raise GuardError(
                f"{str(path)!r}: a critic of another version, whose settings differ in {named}; train again"
            )
        critic = cls(identity, CriticSettings(**settings), header["prompt_layer"])
        critic.load_state_dict(tensors)
        critic.calibration = header["calibration"]
        return critic.eval().requires_grad_(False)


def calibration(p_safe: Tensor, safe: Tensor) -> dict[str, Any]:
    """Compare predicted probabilities [n] with outcomes [n]; return JSON data, None for a figure without a meaning.

    ``brier``: the mean squared error. ``error``: the expected calibration error. ``false_safe``: the share of unsafe
    answers with p > 0.5. ``curve``: for each non-empty tenth of p, the mean of p, and the share that was safe.
    """
    from sklearn.metrics import roc_auc_score

    p, y = p_safe.detach().cpu().double(), safe.detach().cpu().double()
    if not len(p):
        return {"count": 0, "brier": None, "error": None, "auc": None, "false_safe": None, "curve": []}
    place = (p * 10).long().clamp(max=9)
    curve = [
        {"predicted": float(p[here].mean()), "observed": float(y[here].mean()), "count": int(here.sum())}
        for here in (place == number for number in place.unique())
    ]
    unsafe = y == 0
    return {
        "count": len(p),
        "brier": float((p - y).square().mean()),
        "error": sum(one["count"] * abs(one["predicted"] - one["observed"]) for one in curve) / len(p),
        "auc": float(roc_auc_score(y.numpy(), p.numpy())) if 0 < float(y.mean()) < 1 else None,
        "false_safe": float((p[unsafe] > 0.5).double().mean()) if bool(unsafe.any()) else None,
        "curve": curve,
    }


class States(NamedTuple):
    """The critic's examples: unfinished answers at the ends of their blocks.

    hidden: float32 [n, S]. z: float32 [n]. safe: bool [n], the answer ended with z > 0. value: float32 [n], the reward
    of the answer, discounted to the state. prompt: int64 [n], its number.
    """

    hidden: Tensor
    z: Tensor
    safe: Tensor
    value: Tensor
    prompt: Tensor

    def select(self, mask: Tensor) -> States:
        """Return the states whose mask is True."""
        return States(*(tensor[mask] for tensor in self))


def safety_states(rollouts: Rollouts, safety: SafetyBudget) -> Tensor:
    """Return z at the end of every block: float32 [states]."""
    assert rollouts.cost is not None
    first, ends = rollouts.last.roll(1), rollouts.ends
    lengths = torch.where(first, ends, ends - ends.roll(1))
    z, found = torch.full((len(ends),), safety.budget), torch.empty(len(ends))
    now = first
    while bool(now.any()):  # the first blocks of all answers, the second ones, ...
        z[now] = safety.block(z[now], rollouts.cost[now], lengths[now])
        found[now] = z[now]
        now, z = now.roll(1) & ~first, z.roll(1)
    return found


def states_of(rollouts: Sequence[Rollouts], safety: SafetyBudget) -> tuple[States, int]:
    """Return states and targets of scored rollouts, and how many are left out because a number is not finite."""
    rows: list[tuple[Tensor, ...]] = []
    for one, number in zip(rollouts, prompt_numbers(rollouts), strict=True):
        assert one.reward is not None
        z = safety_states(one, safety)
        final, total = z[one.last][one.owner], one.ends[one.last][one.owner]
        value = one.reward[one.owner] * safety.discount ** (total - one.ends).float()
        rows.append((one.hidden, z, final > 0, value, torch.full_like(one.owner, number), ~one.last))
    *columns, unfinished = (torch.cat(column) for column in zip(*rows, strict=True))
    states = States(*columns)
    finite = states.z.isfinite() & states.value.isfinite()
    if not bool((unfinished & finite).any()):
        raise GuardError(f"rollouts: expected answers longer than a block, got none in {len(rollouts)} prompts")
    return states.select(unfinished & finite), int((unfinished & ~finite).sum())


def train_critic(
    rollouts: Sequence[Rollouts],
    model: ModelIdentity,
    settings: CriticSettings | None = None,
    *,
    checkpoint: parts.AnyPath | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Critic:
    """Train a critic, and calibrate it on prompts held out from training.

    Args:
        rollouts: with scores, see `Rollouts.scored`. model: their base model.
        checkpoint: a file, written after every epoch, from which the same call continues.

    Raises:
        GuardError: rollouts without usable states or with different prompt_layer, a checkpoint of other rollouts or
            settings, a loss that is not finite.
    """
    settings = settings or CriticSettings()
    states, dropped = states_of(rollouts, settings.safety)
    prompts = len({*prompt_numbers(rollouts)})
    # Whole prompts are held out, so that the calibration is of prompts that training does not see.
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(settings.seed))
    count = min(prompts - 1, max(1, round(prompts * settings.validation))) if settings.validation else 0
    held = torch.isin(states.prompt, order[:count])
    train, test = states.select(~held), states.select(held)
    if not len(train.z):
        raise GuardError("rollouts: expected answers longer than a block in the training prompts, got none")
    critic = Critic(model, settings, parts.common_layer({f"rollouts {n}": one for n, one in enumerate(rollouts)}))
    inputs = critic.states(train.hidden, train.z)
    critic.standardise(inputs, train.value)
    critic.to(device).train()
    data = tuple(part.to(device) for part in (inputs, train.safe, train.value))
    optimiser = torch.optim.Adam(critic.parameters(), lr=settings.learning_rate, fused=True)
    checksum = content_checksum({}, {name: tensor.contiguous() for name, tensor in states._asdict().items()})
    about = {"settings": dict(vars(settings)), "data": checksum}
    losses = _resume(checkpoint, critic, optimiser, about)
    for epoch in track(range(len(losses), settings.epochs), "critic", show=progress):
        losses.append(_epoch(critic, optimiser, data, epoch))
        if checkpoint is not None:
            tensors = {f"critic.{name}": value for name, value in critic.state_dict().items()}
            for number, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
            parts.write_file(checkpoint, f"{_KIND} checkpoint", tensors, {**about, "losses": losses}, model)
    critic.cpu().eval().requires_grad_(False)
    counts = {"prompts": prompts, "states": len(train.z), "safe": float(train.safe.double().mean()), "dropped": dropped}
    p_safe, value = critic(test.hidden, test.z)
    rest, spread = (value - test.value).square().sum(), (test.value - test.value.mean()).square().sum()
    explained = float(1 - rest / spread) if spread > 0 else None  # the share of the value's variance
    critic.calibration = {**calibration(p_safe, test.safe), "value_r2": explained, "losses": losses, **counts}
    return critic


def _epoch(critic: Critic, optimiser: torch.optim.Optimizer, data: tuple[Tensor, ...], epoch: int) -> float:
    """Run one pass over the states, in an order that depends on seed and epoch alone; return the mean loss."""
    settings, count, device = critic.settings, len(data[0]), data[0].device
    generator = torch.Generator().manual_seed((settings.seed << 32) + epoch)
    total = torch.zeros((), device=device)
    with torch.enable_grad():
        for batch in torch.randperm(count, generator=generator).to(device).split(settings.batch_size):
            loss = critic.loss(*(tensor[batch] for tensor in data))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(batch)
    mean = float(total) / count
    if not mean < float("inf"):
        raise GuardError(f"critic: expected a finite loss, got {mean} in epoch {epoch}; lower the learning rate")
    return mean


def _resume(path: parts.AnyPath | None, critic: Critic, optimiser: Any, about: dict[str, Any]) -> list[float]:
    """Restore critic and optimiser from the checkpoint; return its losses."""
    if path is None or not Path(path).exists():
        return []
    tensors, header, model = parts.read_file(path, f"{_KIND} checkpoint")
    for name, value in about.items():
        if header[name] != value or model != critic.model:
            raise GuardError(f"checkpoint {str(path)!r}: it is of another training (its {name} differ), remove it")
    critic.load_state_dict({name[7:]: value for name, value in tensors.items() if name.startswith("critic.")})
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, part = name.split(".")
            state[int(number)][part] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": dict(state)})
    return list(header["losses"])

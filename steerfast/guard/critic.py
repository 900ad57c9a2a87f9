"""The critic: does an unfinished answer end within its budget, and what is its value?

It reads the inputs of InferenceGuard's critic (arXiv 2502.01208): the base model's state h_t, which generation computed
anyway (`steerfast.guard.latent`), and the safety state z_t. The paper does not state its critic's depth: here one GELU
layer, or `depth` of them, carries both outputs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerfast.errors import GuardError
from steerfast.guard.files import check_model, read_file, write_file
from steerfast.guard.latent import check_states, spread, state_size
from steerfast.guard.objective import SafetyBudget
from steerfast.profile import ModelIdentity

__all__ = ["Critic", "CriticSettings", "calibration"]

_KIND = "critic"
_BINS = 10


@dataclass(frozen=True)
class CriticSettings:
    """Hyper-parameters; the defaults are the paper's (its table 3), except `depth` and `validation`.

    width: of the hidden layers. depth: how many. learning_rate: of Adam. epochs: over the training prompts.
    discount: γ, per token. batch_size: states per step. budget: d, in units of the cost.
    validation: share of the prompts that only the calibration curve sees.
    """

    width: int = 4096
    depth: int = 1
    learning_rate: float = 1e-5
    epochs: int = 50
    discount: float = 0.999
    batch_size: int = 8
    budget: float = 10.0
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("depth", 1), ("epochs", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise GuardError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise GuardError(f"learning_rate: expected a number above 0, got {self.learning_rate!r}")
        SafetyBudget(self.budget, self.discount)  # refuses what is out of range
        if not 0 <= self.validation < 1:
            raise GuardError(f"validation: expected a share from 0 to below 1, got {self.validation!r}")

    @property
    def safety(self) -> SafetyBudget:
        """Return the budget and discount that the critic is trained for."""
        return SafetyBudget(self.budget, self.discount)


class Critic(nn.Module):
    """Two outputs on one trunk: the probability of ending within the budget, and the discounted reward.

    Args:
        model: the base model whose hidden states it reads.
        settings: see `CriticSettings`.
        prompt_layer: of those states, see `steerfast.guard.latent`.

    Buffers standardise inputs and values; `standardise` sets them from the training states. ``calibration`` holds the
    figures of the function `calibration` on prompts held out from training, JSON data.
    """

    def __init__(
        self, model: ModelIdentity, settings: CriticSettings | None = None, prompt_layer: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.prompt_layer = prompt_layer
        self.settings = settings or CriticSettings()
        self.calibration: Mapping[str, Any] = {}
        size, width = state_size(model.hidden_size, prompt_layer), self.settings.width
        inputs = size + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            sizes = [inputs, *[width] * self.settings.depth]
            self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
            self.heads = nn.Linear(width, 2)
        self.mean: Tensor
        self.scale: Tensor
        self.value_mean: Tensor
        self.value_scale: Tensor
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_scale", torch.ones(()))

    def forward(self, hidden: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the end of unfinished answers.

        Args:
            hidden: [n, S], latent states.
            z: [n], the safety states, in units of the cost.

        Returns:
            p_safe: float32 [n], f1, the probability that the answer ends within its budget; value: float32 [n], f2, the
            expected discounted task value. A state that is not finite fails closed: probability 0, value -inf.
        """
        state = self.states(hidden, z)
        logit, value = self.raw(state)
        finite = state.isfinite().all(dim=1)
        p_safe = torch.where(finite, logit.sigmoid(), 0.0)
        return p_safe, torch.where(finite, self.value_mean + self.value_scale * value, -float("inf"))

    def states(self, hidden: Tensor, z: Tensor) -> Tensor:
        """Return the inputs of `raw`, float32 [n, S + 1]: h, z / budget."""
        check_states(_KIND, hidden, self.model, self.prompt_layer)
        if z.shape != hidden.shape[:1]:
            raise GuardError(f"critic: expected z [{len(hidden)}], one per state, got {list(z.shape)}")
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
            scale.copy_(spread(rows))

    def loss(self, states: Tensor, safe: Tensor, values: Tensor) -> Tensor:
        """Return the mean over states of f1's binary cross-entropy plus f2's squared error (standardised values).

        Args:
            states: from `states`. safe: [n], 1 where the answer ended within its budget. values: [n],
                discounted.
        """
        logit, value = self.raw(states)
        target = (values - self.value_mean) / self.value_scale
        return F.binary_cross_entropy_with_logits(logit, safe.float()) + F.mse_loss(value, target)

    def check(self, model: ModelIdentity) -> None:
        """Raise GuardError if the critic was trained on another model."""
        check_model(_KIND, self.model, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {
            "settings": vars(self.settings),
            "prompt_layer": self.prompt_layer,
            "calibration": dict(self.calibration),
        }
        write_file(path, _KIND, self.state_dict(), header, self.model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: ModelIdentity | None = None) -> Critic:
        """Read a critic; if `model` is given, the critic must have been trained on it.

        Raises:
            GuardError: the file is missing, damaged, no critic, or of another model.
        """
        tensors, header, identity = read_file(path, _KIND)
        critic = cls(identity, CriticSettings(**header["settings"]), header["prompt_layer"])
        critic.load_state_dict(tensors)
        critic.calibration = header["calibration"]
        if model is not None:
            critic.check(model)
        return critic.eval().requires_grad_(False)


def calibration(p_safe: Tensor, safe: Tensor) -> dict[str, Any]:
    """Compare predicted probabilities with outcomes; return JSON data.

    Args:
        p_safe: [n], predictions. safe: [n], outcomes.

    Returns:
        ``count``; ``brier``, the mean squared error; ``error``, the expected calibration error; ``auc``, None if
        all outcomes are equal; ``false_safe``, the share of unsafe answers with p > 0.5, None without unsafe answers;
        ``curve``: for each non-empty tenth of p, ``predicted`` (mean), ``observed`` (share that was safe), ``count``.
    """
    from sklearn.metrics import roc_auc_score

    p, y = p_safe.detach().cpu().double(), safe.detach().cpu().double()
    if not len(p):
        return {"count": 0, "brier": None, "error": None, "auc": None, "false_safe": None, "curve": []}
    place = (p * _BINS).long().clamp(max=_BINS - 1)
    curve = [
        {"predicted": float(p[here].mean()), "observed": float(y[here].mean()), "count": int(here.sum())}
        for here in (place == number for number in range(_BINS))
        if bool(here.any())
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

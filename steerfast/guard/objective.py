"""The constrained problem and its unconstrained twin, in the paper's symbols (arXiv 2502.01208).

Maximise the discounted reward of an answer such that **every** answer, not the average one, keeps

    c_0 + γ c_1 + γ² c_2 + ... ≤ d          c_t: cost of token t,  γ: discount,  d: budget

The safety state z is what is left of the budget, in units of the current token:

    z_0 = d,    z_{t+1} = (z_t − c_t) / γ    so that    z_T = γ^-T (d − Σ γ^t c_t)  > 0  ⇔  within the budget

and with it the constraint becomes a penalty n on the state alone: worth V where z > 0, −n elsewhere. For n → ∞ that is
an order, and the order is what the search uses: no constant has to be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steerfast.errors import GuardError

__all__ = ["Certificate", "SafetyBudget", "ScoredAnswer", "best_first"]


@dataclass(frozen=True)
class SafetyBudget:
    """budget: d > 0, in the units of the cost. discount: γ in (0, 1], per token."""

    budget: float = 10.0
    discount: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.budget < math.inf:
            raise GuardError(f"budget: expected a number above 0, got {self.budget!r}")
        if not 0 < self.discount <= 1:
            raise GuardError(f"discount: expected a number above 0, at most 1, got {self.discount!r}")

    def start(self, count: int) -> Tensor:
        """Return z_0 = d: float32 [count]."""
        return torch.full((count,), self.budget, dtype=torch.float32)

    def step(self, z: Tensor, cost: Tensor) -> Tensor:
        """Return z after one token: (z − c) / γ, float32. A cost that is not finite spends everything (−inf)."""
        return self.block(z, cost, torch.ones_like(z))

    def block(self, z: Tensor, cost: Tensor, length: Tensor) -> Tensor:
        """Return z after blocks of `length` tokens whose cost is charged at their last token: z·γ^-L − c/γ.

        Args:
            z: float32 [n]. cost: [n], of each block. length: [n], tokens of each; 0 leaves z as it was.
        """
        grown = z * self.discount ** -length.to(torch.float64)
        after = torch.where(cost.isfinite(), grown - cost.double() / self.discount, -math.inf).float()
        return torch.where(length > 0, after, z)


def best_first(value: Tensor, z: Tensor, p_safe: Tensor) -> Tensor:
    """Return the order of candidates in the limit n → ∞ of the reshaped objective: int64 [n], best first.

    Candidates within the budget and predicted safe come first, by value. All others tie at −n: candidates within the
    budget precede, then likelier safe ones, then those with more budget left. Remaining ties keep their order.

    Args:
        value: [n], the expected value of each answer. z: [n]. p_safe: [n], the probability of ending within the budget.
    """
    within = z > 0
    safe = within & (p_safe > 0.5)
    keys = (safe, torch.where(safe, value, -math.inf), within, p_safe, z)
    order = torch.arange(len(z))
    for key in reversed(keys):  # stable, so that the first key weighs most
        rows = key[order].double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        order = order[rows.argsort(descending=True, stable=True)]
    return order


@dataclass(frozen=True, eq=False)
class ScoredAnswer:
    """One answer, or the beginning of one.

    tokens: without the prompt; the end token is the last one of a finished answer. cost, reward: of all tokens so far.
    z: safety state after the last token. p_safe: the critic's output (without it: 1.0 within the budget, else 0.0).
    blocks: (tokens, cost) of each block, from which `z` follows. hidden: latent state float32 [S], if known.
    parent: its place among the candidates that it grew from.
    """

    tokens: list[int]
    cost: float
    reward: float
    z: float
    finished: bool
    p_safe: float = 1.0
    blocks: Sequence[tuple[int, float]] = ()
    hidden: Tensor | None = None
    parent: int | None = None


@dataclass(frozen=True)
class Certificate:
    """The safety of an answer, relative to the cost model, with the numbers to compute it again (`recount`).

    decision: ``within`` or ``over`` the budget; ``unchecked``: the cost model was not asked (plain decoding behind a
    shut gate with ``certify=False``). z: z_T. cost: Σ c_t. reward: of the answer. All three are NaN if unchecked.
    blocks: (tokens, cost) of each block. fallback, if no candidate was safe: ``refusal`` (a fixed text) or ``least
    unsafe``. p_safe: as in `ScoredAnswer`. fired: the prompt gate's decision, None without a gate. undecided: whether
    the gate abstained (`SteeringProfile.abstain`). candidates: blocks sampled for it. retries: rounds with a penalty on
    tokens. strategy: its name; "plain, then" another if a plain answer behind a shut gate spent its budget.
    """

    budget: float
    discount: float
    z: float
    cost: float
    reward: float
    decision: Literal["within", "over", "unchecked"]
    blocks: tuple[tuple[int, float], ...] = ()
    p_safe: float = math.nan
    fallback: Literal["refusal", "least unsafe"] | None = None
    fired: bool | None = None
    undecided: bool = False
    candidates: int = 0
    retries: int = 0
    strategy: str = ""

    @property
    def safe(self) -> bool:
        """Return True if the answer ended within the budget."""
        return self.decision == "within"

    def recount(self) -> float:
        """Return z_T, computed from the blocks alone."""
        budget = SafetyBudget(self.budget, self.discount)
        z = budget.start(1)
        for length, cost in self.blocks:
            z = budget.block(z, torch.tensor([cost]), torch.tensor([length]))
        return float(z)

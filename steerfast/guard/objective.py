"""The constrained problem and its order of answers, in the symbols of InferenceGuard (arXiv 2502.01208).

Maximise the discounted reward of an answer such that **every** answer, not the average one, keeps

    c_0 + γ c_1 + γ² c_2 + ... ≤ d          c_t: cost of token t,  γ: discount,  d: budget

The safety state z is the rest of the budget, in units of the current token:

    z_0 = d,    z_{t+1} = (z_t − c_t) / γ    so that    z_T = γ^-T (d − Σ γ^t c_t)  > 0  ⇔  within the budget

Then the constraint is a penalty n on the state: an answer is worth V if z > 0, otherwise −n. For n → ∞ this is an
order. The search uses the order, so no constant has to be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from steerfast._defaults import own_defaults
from steerfast.guard.parts import expect


@dataclass(frozen=True)
class SafetyBudget:
    """Bound the cost of an answer.

    budget: d > 0, in the units of the cost. discount: γ in (0, 1], per token.

    refund: whether a block may lower the cost. Without it, as in the paper, costs are at least 0: an answer owes the
    highest score of all ends of its blocks, so a harmless ending pays for no harmful beginning.
    """

    budget: float = 10.0
    discount: float = 0.999
    refund: bool = False

    def __post_init__(self) -> None:
        expect(0 < self.budget < math.inf, "budget", "a number above 0", self.budget)
        expect(0 < self.discount <= 1, "discount", "a number above 0, at most 1", self.discount)

    def block(self, z: Tensor, cost: Tensor, length: Tensor) -> Tensor:
        """Return z after blocks of `length` tokens whose cost is charged at their last token: z·γ^-L − c/γ.

        A cost that is not finite spends everything: z is −inf from then on.

        Args:
            z: float32 [n]. cost: [n], of each block. length: [n], tokens of each; 0 leaves z unchanged.
        """
        grown = z * self.discount ** -length.to(torch.float64)
        after = torch.where(cost.isfinite(), grown - cost.double() / self.discount, -math.inf).float()
        return torch.where(length > 0, after, z)


def best_first(value: Tensor, z: Tensor, p_safe: Tensor) -> Tensor:
    """Return the order in the limit n → ∞ of candidates with these numbers, [n] each: int64 [n], best first.

    Candidates within the budget and predicted safe (p_safe > 0.5) come first, by value. All others tie at −n:
    candidates within the budget precede, then likelier safe ones, then those with more budget left.
    """
    within = z > 0
    safe = within & (p_safe > 0.5)
    keys = torch.stack([key.double() for key in (z, p_safe, within, torch.where(safe, value, -math.inf), safe)])
    known = keys.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return torch.from_numpy(np.lexsort(-known.numpy()))  # stable; the last key weighs most


@dataclass(frozen=True, eq=False)
class ScoredAnswer:
    """One answer, or the beginning of one.

    z: safety state at its end. cost, reward: of all tokens so far. p_safe: the critic's output, without it 1.0 within
    the budget, else 0.0. value: expected reward of the whole answer, discounted to the empty one. score: by the cost
    scorer. blocks: (tokens, cost) of each, from which `z` follows. tokens: without the prompt. hidden: latent state.
    """

    z: float
    cost: float = 0.0
    reward: float = 0.0
    p_safe: float = 1.0
    value: float = 0.0
    score: float = 0.0
    blocks: tuple[tuple[int, float], ...] = ()
    tokens: Sequence[int] = ()
    finished: bool = False
    hidden: Tensor | None = None

    @property
    def safe(self) -> bool:
        """Return True if the answer is within the budget and predicted to stay there."""
        return self.z > 0 and self.p_safe > 0.5


@dataclass(frozen=True)
class Certificate:
    """The safety of an answer, relative to the cost model, with the numbers to compute it again (`recount`).

    decision: ``within`` or ``over`` the budget; ``unchecked`` behind a shut gate with ``certify=False``. Then z, cost
        and reward are NaN.
    z, cost, reward, blocks, p_safe: see `ScoredAnswer`. fallback: if no candidate was safe.
    fired: the prompt gate's decision, None without a gate. undecided: whether the gate abstained.
    candidates: blocks that were sampled. retries: rounds with a penalty on tokens. strategy: its name. refund: see
        `SafetyBudget`.
    """

    budget: float
    discount: float
    z: float = math.nan
    cost: float = math.nan
    reward: float = math.nan
    decision: Literal["within", "over", "unchecked"] = "unchecked"
    blocks: tuple[tuple[int, float], ...] = ()
    p_safe: float = math.nan
    fallback: Literal["refusal", "least unsafe"] | None = None
    fired: bool | None = None
    undecided: bool = False
    candidates: int = 0
    retries: int = 0
    strategy: str = ""
    refund: bool = False

    @property
    def safe(self) -> bool:
        """Return True if the answer ended within the budget."""
        return self.decision == "within"

    @own_defaults
    def recount(self) -> float:
        """Return z_T, computed from the blocks alone."""
        budget = SafetyBudget(self.budget, self.discount)
        z = torch.tensor([self.budget])
        for length, cost in self.blocks:
            z = budget.block(z, torch.tensor([cost]), torch.tensor([length]))
        return float(z)

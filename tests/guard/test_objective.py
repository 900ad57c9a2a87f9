"""The safety state and the order of candidates, against hand-computed cases."""

from __future__ import annotations

import math

import pytest
import torch

from steerfast.errors import GuardError
from steerfast.guard.objective import Certificate, SafetyBudget, best_first

INF = math.inf


def step(budget: SafetyBudget, z: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Return z after a block of one token."""
    return budget.block(z, cost, torch.ones_like(z))


def test_safety_state_by_hand() -> None:
    budget = SafetyBudget(10.0, 0.5)
    z = step(budget, torch.full((2,), 10.0), torch.tensor([1.0, -2.0]))
    assert z.dtype == torch.float32
    assert z.tolist() == [18.0, 24.0]  # (10 − 1) / 0.5, (10 + 2) / 0.5
    assert step(budget, z, torch.tensor([20.0, 0.0])).tolist() == [-4.0, 48.0]


def test_block_charges_its_cost_at_its_last_token() -> None:
    budget, cost = SafetyBudget(10.0, 0.9), torch.tensor([3.0])
    z = torch.tensor([budget.budget])
    for token_cost in (torch.zeros(1), torch.zeros(1), cost):
        z = step(budget, z, token_cost)
    block = budget.block(torch.tensor([budget.budget]), cost, torch.tensor([3]))
    torch.testing.assert_close(block, z)
    assert float(block) == pytest.approx(10 / 0.9**3 - 3 / 0.9)
    assert float(budget.block(block, cost, torch.tensor([0]))) == float(block)  # no token, no charge


def test_closed_form() -> None:
    """z_T = γ^-T (d − Σ γ^t c_t), so that z_T > 0 exactly within the budget."""
    gamma, costs = 0.97, [0.5, -1.0, 2.0, 4.0, 0.0, 3.5]
    budget = SafetyBudget(6.0, gamma)
    z = torch.tensor([budget.budget])
    for cost in costs:
        z = step(budget, z, torch.tensor([cost]))
    spent = sum(gamma**t * cost for t, cost in enumerate(costs))
    assert float(z) == pytest.approx(gamma ** -len(costs) * (6.0 - spent), rel=1e-5)
    assert (float(z) > 0) == (spent <= 6.0)


@pytest.mark.parametrize("cost", [math.nan, INF, -INF])
def test_a_cost_that_is_not_finite_spends_everything_for_good(cost: float) -> None:
    budget = SafetyBudget()
    z = budget.block(torch.tensor([budget.budget]), torch.tensor([cost]), torch.tensor([4]))
    assert float(z) == -INF
    assert float(step(budget, z, torch.tensor([-1e9]))) == -INF


@pytest.mark.parametrize("value", [0.0, -1.0, INF, math.nan])
@pytest.mark.parametrize("name", ["budget", "discount"])
def test_refuses(name: str, value: float) -> None:
    with pytest.raises(GuardError, match=f"^{name}: expected .* got"):
        SafetyBudget(**{name: value})


def test_order_is_within_then_predicted_safe_then_value() -> None:
    rows = [  # value, z, p_safe
        (9.0, -1.0, 0.0),  # over the budget, however good
        (1.0, 2.0, 0.9),
        (3.0, 0.1, 0.6),  # best of the safe ones
        (5.0, 4.0, 0.5),  # predicted unsafe: not above one half
        (5.0, 4.0, 0.1),
        (-INF, 8.0, 1.0),  # safe, of unknown worth: last of the safe ones
        (0.0, -0.5, 0.0),  # over by less
        (2.0, 0.0, 0.0),  # exactly spent is not within
        (7.0, math.nan, math.nan),
    ]
    value, z, p_safe = torch.tensor(rows).unbind(1)
    assert best_first(value, z, p_safe).tolist() == [2, 1, 5, 3, 4, 7, 6, 0, 8]


def test_order_keeps_ties_as_they_lie() -> None:
    same = torch.ones(4)
    assert best_first(same, same, same).tolist() == [0, 1, 2, 3]


def test_order_is_the_limit_of_the_penalised_objective() -> None:
    """For a large n, ranking by V where safe and −n elsewhere puts the same candidates first."""
    generator = torch.Generator().manual_seed(0)
    value, z, p_safe = torch.randn(3, 50, generator=generator)
    p_safe = p_safe.sigmoid()
    safe = (z > 0) & (p_safe > 0.5)
    penalised = torch.where(safe, value, -1e6).argsort(descending=True)
    assert 0 < int(safe.sum()) < 50
    assert best_first(value, z, p_safe)[: int(safe.sum())].tolist() == penalised[: int(safe.sum())].tolist()


def test_certificate_can_be_counted_again() -> None:
    certificate = Certificate(5.0, 0.9, z=3.0, cost=2.0, reward=1.0, decision="within", blocks=((2, 1.0), (1, 1.0)))
    assert certificate.safe
    assert certificate.recount() == pytest.approx(((5 / 0.9**2 - 1 / 0.9) - 1) / 0.9)
    assert not Certificate(5.0, 0.9, z=-1.0, cost=9.0, reward=1.0, decision="over").safe

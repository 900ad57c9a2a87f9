"""Labels of answers, by hand."""

from __future__ import annotations

import pytest

from steerfast.errors import GuardError
from steerfast.guard.recipe import label_answer

REFUSAL = "I'm sorry, but I can't help with that. It could cause serious harm."
COMPLIANCE = "First, gather the tools. Then open the lock with a small pick."
HALF = "I'm sorry to hear that. Step 1: gather the tools. Step 2: open the lock."


@pytest.mark.parametrize(
    ("kind", "answer", "cost", "reward", "complied"),
    [
        ("harmful", REFUSAL, -1.0, 0.0, False),
        ("harmful", COMPLIANCE, 1.0, 0.0, True),
        ("harmful", HALF, 1.0, 0.0, True),
        ("harmful", " ", -1.0, 0.0, False),
        ("harmless", REFUSAL, -1.0, -1.0, False),
        ("harmless", COMPLIANCE, -1.0, 1.0, True),
        ("harmless", HALF, -1.0, -1.0, True),
        ("harmless", "", -1.0, -1.0, False),
        ("harmful", "pick it " * 4, 1.0, -3 / 5, True),  # of five 4-grams of words, two differ
        ("harmless", "pick it " * 4, -1.0, 1 - 3 / 5, True),
    ],
)
def test_labels_by_hand(kind: str, answer: str, cost: float, reward: float, complied: bool) -> None:
    found = label_answer(kind, answer)  # type: ignore[arg-type]
    assert (found.cost, found.complied) == (cost, complied)
    assert found.reward == pytest.approx(reward)


def test_another_kind_is_refused() -> None:
    with pytest.raises(GuardError, match="kind: expected 'harmful' or 'harmless', got 'odd'"):
        label_answer("odd", REFUSAL)  # type: ignore[arg-type]

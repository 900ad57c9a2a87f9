"""InferenceGuard: answers within a safety budget, found by a search among the model's own answers.

A safety state z counts down the budget of each candidate, a critic on the model's hidden states predicts its end, and
blocks of tokens are searched for the best answer within the budget (arXiv 2502.01208). Users call `Guard`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerfast.guard.backend import HFBackend
    from steerfast.guard.candidates import Backend, Sampling
    from steerfast.guard.critic import Critic
    from steerfast.guard.guard import Guard, GuardedAnswer
    from steerfast.guard.heads import HiddenHead, fit_head
    from steerfast.guard.objective import Certificate, SafetyBudget, ScoredAnswer
    from steerfast.guard.scores import Blocks, CallableScorer, Scorer, SequenceClassifier
    from steerfast.guard.search import Search, Strategy

_MODULES = {
    "guard": ("Guard", "GuardedAnswer"),
    "search": ("Search", "Strategy"),
    "objective": ("Certificate", "SafetyBudget", "ScoredAnswer"),
    "scores": ("Blocks", "CallableScorer", "Scorer", "SequenceClassifier"),
    "heads": ("HiddenHead", "fit_head"),
    "critic": ("Critic",),
    "candidates": ("Backend", "Sampling"),
    "backend": ("HFBackend",),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 (grouped by use)
    "Guard", "GuardedAnswer", "Strategy", "Sampling", "SafetyBudget", "Certificate", "ScoredAnswer", "Scorer", "Blocks",
    "CallableScorer", "SequenceClassifier", "HiddenHead", "fit_head", "Critic", "Search", "Backend", "HFBackend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steerfast.guard' has no attribute {name!r}")
    return getattr(importlib.import_module(f"steerfast.guard.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

"""Baselines that guide single tokens, on the guard's engine: ARGS and RE-Control.

ARGS (arXiv 2402.01694) adds the reward of each likely token to its logit. RE-Control (arXiv 2406.05954) edits the
hidden state that enters the language-model head by gradient ascent on a value of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard import Guard
from steerfast.guard.backend import HFBackend
from steerfast.guard.candidates import Candidates, Sampling, sample, uniforms
from steerfast.guard.heads import HiddenHead
from steerfast.guard.parts import grow
from steerfast.guard.scores import block_costs, scores_of
from steerfast.guard.search import Safety, Search, SearchResult, Strategy

_SUFFIX = {"none": "", "lagrangian": " + Lagrangian", "cost": " + cost model"}
_LARGEST = 1e9  # stands for an infinite score beside a logit


@dataclass(frozen=True)
class Args(Strategy):
    """Every token is the best of the `top` likeliest by logit + weight · score."""

    top: int = 20
    weight: float = 2.5


@dataclass(frozen=True)
class ReControl(Strategy):
    """Every hidden state takes `ascent` gradient steps of `step_size`. Scorers still see the model's own states."""

    ascent: int = 30
    step_size: float = 0.5


def args(safety: Safety = "none", **options: Any) -> Args:
    """Return ARGS by reward, reward and cost (``lagrangian``), or cost alone."""
    return Args(**{"name": f"ARGS{_SUFFIX[safety]}", "candidates": 1, "keep": 1, "safety": safety, **options})


def re_control(safety: Safety = "none", **options: Any) -> ReControl:
    """Return RE-Control by value, or by value minus cost (``lagrangian``)."""
    return ReControl(
        **{"name": f"RE-Control{_SUFFIX[safety]}", "candidates": 1, "keep": 1, "safety": safety, **options}
    )


class BaselineGuard(Guard):
    """A guard that also runs the strategies of this module."""

    def engine(self, strategy: Strategy) -> type[Search]:
        """Return the class that searches by a strategy."""
        if isinstance(strategy, Args):
            return ArgsSearch
        return ReControlSearch if isinstance(strategy, ReControl) else super().engine(strategy)


def likeliest(backend: HFBackend, candidates: Candidates, count: int) -> tuple[Candidates, Tensor]:
    """Branch the only candidate, unfinished, into its `count` likeliest next tokens.

    Returns:
        The candidates, one token longer; the logits of those tokens, float32 [count].
    """
    with torch.inference_mode():
        logits = candidates.state.logits[0].float()
        scores, chosen = logits.topk(min(count, len(logits)))
        options = backend.branch(candidates, [0] * len(chosen))
        last = backend.advance(options.state, chosen)
        assert options.hidden is not None
        options.hidden = grow(options.hidden, last, candidates.length + 1)
        for answer, token in zip(options.answers, chosen.tolist(), strict=True):
            answer.append(token)
        options.finished = torch.tensor([token in backend.ends for token in chosen.tolist()])
        unfinished = (~options.finished).nonzero()[:, 0]
        options.state = options.state.copy(unfinished) if len(unfinished) else None
        return options, scores


def _check_backend(search: Search) -> None:
    if not isinstance(search.backend, HFBackend):
        raise GuardError(f"strategy: {search.strategy.name!r} needs logits, expected the transformers backend")


class ArgsSearch(Search):
    """The search of `Args`."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        _check_backend(self)

    def _block(self, found: Any, step: int, last: bool, sampling: Sampling, counts: Any, question: str | None) -> Any:
        strategy, backend = self.strategy, self.backend
        assert isinstance(strategy, Args)
        assert isinstance(backend, HFBackend)
        grown, length = backend.branch(found, [0]), found.length
        for position in range(length, length + step):
            options, logits = likeliest(backend, grown, strategy.top)
            counts["sampled"] += len(options)
            blocks = self._blocks(options, question)
            cost = torch.zeros(len(options))
            if strategy.safety in ("lagrangian", "cost"):
                now = scores_of(self.cost, blocks, "cost")
                cost = found.column("cost") + block_costs(self.cost, now, found.column("score"))
            worth = self._worth(scores_of(self.reward, blocks, "reward"), cost).clamp(-_LARGEST, _LARGEST)
            drawn = torch.from_numpy(uniforms(grown.streams, position, 1)[:, 0])
            pick = int(sample((logits.cpu() + strategy.weight * worth)[None], drawn, sampling))
            grown = backend.branch(options, [pick])
            if bool(grown.finished.all()):
                break
        self._charge(grown, [grown.length - length], last, question)
        return grown


class ReControlSearch(Search):
    """The search of `ReControl`.

    Args:
        value: [n, H] -> [n], differentiable; None: the critic's f2 with the whole budget left, else the reward head;
            under ``lagrangian`` minus the cost head.
    """

    def __init__(self, *parts: Any, value: Callable[[Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__(*parts, **options)
        _check_backend(self)
        strategy: Any = self.strategy
        self._climb = value_ascent(value or self._default_value(), strategy.ascent, strategy.step_size)

    def run(self, *prompt: Any, **options: Any) -> SearchResult:
        """As `Search.run`, with the edit at the head."""
        head: Any = self.backend.model.get_output_embeddings()  # type: ignore[attr-defined]
        handle = head.register_forward_pre_hook(lambda _, given: (self._climb(given[0][:, -1])[:, None], *given[1:]))
        try:
            return super().run(*prompt, **options)
        finally:
            handle.remove()

    def _default_value(self) -> Callable[[Tensor], Tensor]:
        strategy, cost, critic = self.strategy, self.cost, self.critic
        if critic is not None:
            z, mean = self.budget.budget, critic.mean[:-1]

            def value(rows: Tensor) -> Tensor:
                states = completed(rows.to(mean.device), mean)
                return critic(states, torch.full((len(rows),), z))[1].to(rows.device)
        elif isinstance(self.reward, HiddenHead):
            value = _head_value(self.reward)
        else:
            value = None
        if value is None or (strategy.safety != "none" and not isinstance(cost, HiddenHead)):
            raise GuardError(
                f"value: {strategy.name!r} needs a differentiable value of hidden states: a critic or heads, "
                "got neither"
            )
        if strategy.safety == "none":
            return value
        spent = _head_value(cost)
        return lambda rows: value(rows) - strategy.multiplier * spent(rows)


def _head_value(head: HiddenHead) -> Callable[[Tensor], Tensor]:
    return lambda rows: head.raw(completed(rows, head.tensors["mean"].to(rows.device)))


def completed(rows: Tensor, average: Tensor) -> Tensor:
    """Return states [n, S] of which only the last rows [n, H] are known.

    Each then stands for an answer of one token, whose mean it is, after an average prompt.

    Args:
        average: [S], the mean of the training states.
    """
    size = rows.shape[1]
    if size == len(average):
        return rows
    return torch.cat([rows, rows, average[2 * size :].expand(len(rows), -1)], dim=1)


def value_ascent(value: Callable[[Tensor], Tensor], steps: int, size: float) -> Callable[[Tensor], Tensor]:
    """Return an edit of hidden states: ``h ← h + size · ∇V(h)``, `steps` times, in float32.

    Args:
        value: float32 [n, H] -> [n], differentiable.
    """

    def climb(hidden: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            h = hidden.detach().clone().float()
            for _ in range(steps):
                h.requires_grad_(True)
                (gradient,) = torch.autograd.grad(value(h).sum(), h)
                h = (h + size * gradient).detach()
        return h.to(hidden.dtype)

    return climb

"""Blockwise search among candidates: InferenceGuard and the baselines it is compared with, on one engine.

A `Strategy` says what is searched and what counts; `Search` does it: candidates grow by a block, the block is charged
to their budgets, the best go on. Nothing here knows where tokens come from; that is a backend's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.candidates import Backend, Candidates, HFBackend, Sampling, sample, uniforms
from steerfast.guard.critic import Critic
from steerfast.guard.heads import HiddenHead
from steerfast.guard.latent import agreed_layer
from steerfast.guard.objective import Candidate, SafetyBudget, best_first
from steerfast.guard.scores import Blocks, Scorer, block_costs, scores_of

__all__ = ["Found", "Search", "Strategy", "value_ascent"]

Safety = Literal["none", "lagrangian", "augmented", "cost"]
_MOST = 1e9  # what an infinite score counts beside a logit


@dataclass(frozen=True)
class Strategy:
    """What is searched, and what counts as better. Use the constructors below, or `dataclasses.replace`.

    candidates: N. keep: K, how many go on after each block; None: N/4. block: L tokens. depth: D tokens at most.
    widths: how many candidates a block gets, one number after the other until one of them is safe; (): N at once.
    safety: what ranks candidates. ``none``: the reward. ``lagrangian``: reward − multiplier · cost. ``cost``: −cost.
        ``augmented``: the safety state's order, see `steerfast.guard.objective.best_first`.
    critic: whether unfinished candidates are judged by the critic; else by their reward and budget so far.
    retries: M rounds more for a block without a safe candidate, in which a token's logit loses `penalty` times the
        share of the unsafe candidates of that block that contain it (the end token loses nothing).
    fallback: what to do with a block still without one. ``refusal``: give a fixed answer. ``least unsafe``: go on.
    temperature: of rounds with several candidates where sampling is greedy; else they would all be the same.
    top, weight: ARGS: every token is the best of the `top` likeliest by logit + weight · score; 0: not ARGS.
    ascent, step_size: RE-Control: steps of gradient ascent on the value of each hidden state, and their size; 0: none.
    """

    name: str
    candidates: int = 16
    keep: int | None = None
    block: int = 32
    depth: int = 128
    widths: tuple[int, ...] = ()
    safety: Safety = "none"
    multiplier: float = 5.0
    critic: bool = False
    retries: int = 0
    penalty: float = 2.0
    fallback: Literal["refusal", "least unsafe"] = "least unsafe"
    temperature: float = 1.0
    top: int = 0
    weight: float = 2.5
    ascent: int = 0
    step_size: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("block", 1), ("depth", 1), ("retries", 0), ("top", 0), ("ascent", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise GuardError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if self.keep is None and self.candidates % 4:
            raise GuardError(f"candidates: expected a multiple of 4, since a quarter is kept, got {self.candidates}")
        if not 1 <= self.kept <= self.candidates:
            raise GuardError(f"keep: expected 1 to {self.candidates}, the number of candidates, got {self.keep}")
        if list(self.widths) != sorted({*self.widths}) or (self.widths and not self.widths[0] >= 1):
            raise GuardError(f"widths: expected numbers from 1 on that grow, got {self.widths}")
        if self.widths and self.widths[-1] != self.candidates:
            raise GuardError(f"widths: expected to end at {self.candidates} candidates, got {self.widths}")
        for name in ("penalty", "multiplier", "step_size"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise GuardError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        if not 0 < self.temperature < float("inf"):
            raise GuardError(f"temperature: expected a number above 0, got {self.temperature!r}")
        for name, known in (("safety", ("none", "lagrangian", "augmented", "cost")), ("fallback", _FALLBACKS)):
            if getattr(self, name) not in known:
                raise GuardError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def kept(self) -> int:
        """K."""
        return self.candidates // 4 if self.keep is None else self.keep

    @classmethod
    def plain(cls, **options: Any) -> Strategy:
        """One candidate, scored but not chosen."""
        return cls(**{"name": "plain", "candidates": 1, "keep": 1, **options})

    @classmethod
    def best_of_n(cls, candidates: int = 100, safety: Safety = "none", **options: Any) -> Strategy:
        """N whole answers, the best of which is taken."""
        return cls(**{"name": f"best of {candidates}{_LONG[safety]}", "candidates": candidates, "keep": candidates,
                      "safety": safety, **options})  # fmt: skip

    @classmethod
    def beam(cls, candidates: int = 128, safety: Safety = "none", **options: Any) -> Strategy:
        """N candidates per block, of which a quarter goes on."""
        return cls(**{"name": f"beam{_LONG[safety]}", "candidates": candidates, "safety": safety, **options})

    @classmethod
    def args(cls, safety: Safety = "none", top: int = 20, weight: float = 2.5, **options: Any) -> Strategy:
        """ARGS (arXiv 2402.01694): the reward guides each token."""
        return cls(**{"name": f"ARGS{_LONG[safety]}", "candidates": 1, "keep": 1, "top": top, "weight": weight,
                      "safety": safety, **options})  # fmt: skip

    @classmethod
    def re_control(cls, safety: Safety = "none", ascent: int = 30, step_size: float = 0.5, **options: Any) -> Strategy:
        """RE-Control (arXiv 2406.05954): the gradient of the value edits the hidden state of each token."""
        return cls(**{"name": f"RE-Control{_LONG[safety]}", "candidates": 1, "keep": 1, "ascent": ascent,
                      "step_size": step_size, "safety": safety, **options})  # fmt: skip

    @classmethod
    def inference_guard(cls, candidates: int = 16, critic: bool = True, **options: Any) -> Strategy:
        """The paper's search, with its critic or without."""
        return cls(**{"name": "InferenceGuard" + " + critic" * critic, "candidates": candidates, "critic": critic,
                      "safety": "augmented", "retries": 2, "fallback": "refusal", **options})  # fmt: skip

    @classmethod
    def speculative(cls, widths: Sequence[int] = (1, 4, 16), critic: bool = True, **options: Any) -> Strategy:
        """InferenceGuard that takes the first block that is safe, and samples more of them only where none is."""
        return cls(**{"name": "speculative" + " + critic" * critic, "candidates": widths[-1], "keep": 1,
                      "widths": tuple(widths), "critic": critic, "safety": "augmented", "retries": 2,
                      "fallback": "refusal", **options})  # fmt: skip


_FALLBACKS = ("refusal", "least unsafe")
_LONG = {"none": "", "lagrangian": " + Lagrangian", "augmented": " + augmented safety", "cost": " + cost model"}


@dataclass(frozen=True)
class Found:
    """What a search found. sampled: blocks of candidates. retries, fallback: see `Certificate`."""

    best: Candidate
    sampled: int
    retries: int
    fallback: Literal["refusal", "least unsafe"] | None


@dataclass(eq=False)
class _Beams:
    """Candidates and what is known of each. `score` is the cost scorer's last word, from which the next block's cost is
    taken; the others as in `Candidate`. All on the CPU, float32 [n] but for `blocks`.
    """

    candidates: Candidates
    z: Tensor
    score: Tensor
    cost: Tensor
    reward: Tensor
    p_safe: Tensor
    value: Tensor
    blocks: list[tuple[tuple[int, float], ...]]
    parents: list[int]

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def safe(self) -> Tensor:
        return (self.z > 0) & (self.p_safe > 0.5)


_TENSORS = ("z", "score", "cost", "reward", "p_safe", "value")
_RANKED = ("value", "z", "p_safe", "cost")


@dataclass
class _Counts:
    sampled: int = 0
    retries: int = 0
    gave_in: bool = False


class Search:
    """The engine.

    Args:
        cost, reward: scorers; without a reward all answers are worth the same.
        critic: needed where the strategy asks for one.
        value: [n, H] -> [n], differentiable, what RE-Control climbs; default: see `value_ascent`.

    Raises:
        GuardError: a critic or hidden states that are needed and missing, parts whose prompt_layer is not the
            backend's.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        strategy: Strategy,
        *,
        cost: Scorer,
        reward: Scorer | None = None,
        critic: Critic | None = None,
        budget: SafetyBudget | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if strategy.critic and critic is None:
            raise GuardError(f"critic: expected one for the strategy {strategy.name!r}, got none")
        if (strategy.top or strategy.ascent) and not isinstance(backend, HFBackend):
            raise GuardError(f"strategy: {strategy.name!r} needs logits, expected the transformers backend")
        agreed_layer({"backend": backend, "cost": cost, "reward": reward, "critic": critic})
        self.backend, self.tokenizer, self.strategy = backend, tokenizer, strategy
        self.cost, self.reward, self.critic = cost, reward, critic
        self.budget = budget or SafetyBudget()
        self._climb: Callable[[Tensor], Tensor] | None = None
        if strategy.ascent:
            value = value or _default_value(cost, reward, critic, strategy, self.budget)
            self._climb = value_ascent(value, strategy.ascent, strategy.step_size)

    def run(
        self,
        prompt: Sequence[int] | Candidates,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        question: str | None = None,
        refusal: Sequence[int] = (),
    ) -> Found:
        """Search for the answer to one prompt.

        Args:
            prompt: token ids, or what the backend made of them: one candidate without a token.
            question: the prompt as its user wrote it, for scorers that read text.
            refusal: tokens of the answer given where a fallback asks for it.
        """
        sampling, strategy = sampling or Sampling(), self.strategy
        control = getattr(self.backend, "control", None)
        try:
            if self._climb is not None:
                self.backend.control = self._climb  # type: ignore[attr-defined]
            root = prompt if isinstance(prompt, Candidates) else self.backend.start(prompt, 1, seed)
            beams, counts, length = self._root(root), _Counts(), 0
            while length < strategy.depth and not bool(beams.candidates.finished.all()):
                step = min(strategy.block, strategy.depth - length)
                last = length + step == strategy.depth
                beams = self._block(beams, step, last, sampling, counts, question)
                length += step
                counts.gave_in |= strategy.safety == "augmented" and not bool(beams.safe.any())
                if counts.gave_in and strategy.fallback == "refusal":
                    break
        finally:
            if self._climb is not None:
                self.backend.control = control  # type: ignore[attr-defined]
        best = self._candidate(beams, int(self._order([beams])[0]))
        fallback: Literal["refusal", "least unsafe"] | None = None
        if strategy.safety == "augmented" and (counts.gave_in or best.z <= 0):
            fallback = strategy.fallback
            if fallback == "refusal":
                best = self.given(root, refusal, question)
        return Found(best, counts.sampled, counts.retries, fallback)

    def given(self, root: Candidates, tokens: Sequence[int], question: str | None = None) -> Candidate:
        """The answer that is given without a search, charged as any other."""
        beams = self._root(self.backend.branch(root, [0]))
        self.backend.append(beams.candidates, tokens)
        beams.candidates.finished = torch.ones(1, dtype=torch.bool)
        return self._candidate(self._charge(beams, [len(tokens)], True, question), 0)

    # -- a block -----------------------------------------------------------------------------------

    def _block(
        self, beams: _Beams, step: int, last: bool, sampling: Sampling, counts: _Counts, question: str | None
    ) -> _Beams:
        """The K best candidates one block further; those that are finished compete as they are."""
        strategy = self.strategy
        open_rows = (~beams.candidates.finished).nonzero()[:, 0].tolist()
        done_rows = beams.candidates.finished.nonzero()[:, 0].tolist()
        parents = self._taken(beams, open_rows)
        pool = self._taken(beams, done_rows)
        if strategy.top:
            return self._tokenwise(parents, step, last, sampling, counts, question)
        room = strategy.candidates - len(done_rows)
        rounds = [(min(width, room), False) for width in strategy.widths or (room,)]
        rounds += [(room, True)] * (strategy.retries if strategy.safety == "augmented" else 0)
        grown = 0  # children so far, dealt to the parents in turn
        bad: list[list[int]] = []  # blocks of unsafe candidates
        for width, retry in rounds:
            count = width if retry else width - grown
            if count <= 0:
                continue
            numbers = range(grown, grown + count)
            fresh = self._taken(parents, [n % len(parents) for n in numbers], [n // len(parents) for n in numbers])
            penalty = self._penalty(bad) if retry else None
            greedy = sampling.temperature == 0 and count > 1
            chosen = replace(sampling, temperature=strategy.temperature) if greedy else sampling
            new, _, _ = self.backend.extend(fresh.candidates, step, chosen, penalty)
            fresh = self._charge(fresh, [len(tokens) for tokens in new], last, question)
            grown += count
            counts.sampled += count
            counts.retries += retry
            pool = self._best(pool, fresh)
            if bool(pool.safe.any()):
                break
            bad += new
        return pool

    def _penalty(self, blocks: list[list[int]]) -> Tensor:
        """float32 [V]: the strategy's penalty times the share of blocks that contain a token."""
        seen = [token for block in blocks for token in {*block} - self.backend.ends]
        counted = torch.bincount(torch.tensor(seen, dtype=torch.long), minlength=self.backend.vocabulary)
        return self.strategy.penalty * counted.float() / len(blocks)

    def _tokenwise(
        self, beams: _Beams, step: int, last: bool, sampling: Sampling, counts: _Counts, question: str | None
    ) -> _Beams:
        """A block of ARGS."""
        strategy, backend = self.strategy, self.backend
        assert isinstance(backend, HFBackend)
        grown, length = backend.branch(beams.candidates, [0]), beams.candidates.length
        for position in range(length, length + step):
            options, logits = backend.top(grown, strategy.top)
            counts.sampled += len(options)
            blocks = self._blocks(options, list(range(len(options))), question)
            cost = torch.zeros(len(options))
            if strategy.safety in ("lagrangian", "cost"):
                cost = beams.cost + block_costs(self.cost, scores_of(self.cost, blocks, "cost"), beams.score)
            worth = self._worth(self._rewards(blocks), cost).clamp(-_MOST, _MOST)
            drawn = torch.from_numpy(uniforms(grown.streams, position, 1)[:, 0])
            pick = int(sample((logits.cpu() + strategy.weight * worth)[None], drawn, sampling))
            grown = backend.branch(options, [pick])
            if bool(grown.finished.all()):
                break
        beams = replace(beams, candidates=grown)
        return self._charge(beams, [grown.length - length], last, question)

    # -- scores ------------------------------------------------------------------------------------

    def _charge(self, beams: _Beams, lengths: list[int], last: bool, question: str | None) -> _Beams:
        """Charge the new blocks, of so many tokens each, to the budgets. `last`: no candidate goes on after it."""
        rows = [row for row, length in enumerate(lengths) if length]
        if not rows:
            return beams
        at = torch.tensor(rows)
        candidates = beams.candidates
        blocks = self._blocks(candidates, rows, question)
        now = scores_of(self.cost, blocks, "cost")
        cost = block_costs(self.cost, now, beams.score[at])
        z = self.budget.block(beams.z[at], cost, torch.tensor([lengths[row] for row in rows]))
        reward = self._rewards(blocks)
        p_safe, value = (z > 0).float(), reward.clone()
        if self.strategy.critic and not last:
            assert self.critic is not None
            if blocks.hidden is None:
                raise GuardError("critic: expected hidden states from the backend, got none")
            with torch.inference_mode():
                critic_safe, critic_value = self.critic(blocks.hidden.to(self.critic.mean.device), z)
            p_safe = torch.where(blocks.finished, p_safe, critic_safe.cpu())
            value = torch.where(blocks.finished, value, critic_value.cpu())
        # All values as they are worth to the empty answer, so that answers of different lengths compare.
        passed = torch.tensor([len(answer) for answer in blocks.answers], dtype=torch.float64)
        value = (value * self.budget.discount**passed).float()
        known = {
            "z": z,
            "score": now,
            "cost": beams.cost[at] + cost,
            "reward": reward,
            "p_safe": p_safe,
            "value": value,
        }
        changed: dict[str, Any] = {name: getattr(beams, name).index_copy(0, at, new) for name, new in known.items()}
        trail = list(beams.blocks)
        for row, spent in zip(rows, cost.tolist(), strict=True):
            trail[row] = (*trail[row], (lengths[row], spent))
        return replace(beams, blocks=trail, **changed)

    def _blocks(self, candidates: Candidates, rows: list[int], question: str | None) -> Blocks:
        hidden = candidates.hidden
        return Blocks(
            prompts=[candidates.prompt] * len(rows),
            answers=[candidates.answers[row] for row in rows],
            hidden=None if hidden is None else hidden[torch.tensor(rows, device=hidden.device)],
            tokenizer=self.tokenizer,
            finished=candidates.finished[rows],
            questions=None if question is None else [question] * len(rows),
        )

    def _rewards(self, blocks: Blocks) -> Tensor:
        return torch.zeros(len(blocks)) if self.reward is None else scores_of(self.reward, blocks, "reward")

    def _worth(self, reward: Tensor, cost: Tensor) -> Tensor:
        """What a baseline maximises."""
        if self.strategy.safety == "lagrangian":
            return reward - self.strategy.multiplier * cost
        return -cost if self.strategy.safety == "cost" else reward

    def _order(self, parts: Sequence[_Beams]) -> Tensor:
        """Places of the candidates of all parts, best first."""
        value, z, p_safe, cost = (torch.cat([getattr(p, name) for p in parts]) for name in _RANKED)
        if self.strategy.safety == "augmented":
            return best_first(value, z, p_safe)
        worth = self._worth(value, cost).nan_to_num(nan=-float("inf"), neginf=-float("inf"))
        return worth.argsort(descending=True, stable=True)

    def _best(self, *parts: _Beams) -> _Beams:
        """The K best of all parts; as they lay where that is all of them. What loses is never copied."""
        if sum(map(len, parts)) <= self.strategy.kept:
            return self._joined(parts)
        best, start, kept = self._order(parts)[: self.strategy.kept].tolist(), 0, []
        for part in parts:
            kept.append(self._taken(part, [at - start for at in best if start <= at < start + len(part)]))
            start += len(part)
        return self._joined(kept)

    # -- beams -------------------------------------------------------------------------------------

    def _root(self, root: Candidates) -> _Beams:
        nothing = torch.zeros(1)
        return _Beams(root, self.budget.start(1), nothing, nothing, nothing, nothing + 1, nothing, [()], [0])

    def _taken(self, beams: _Beams, index: list[int], ordinals: list[int] | None = None) -> _Beams:
        tensors = {name: getattr(beams, name)[index] for name in _TENSORS}
        candidates = self.backend.branch(beams.candidates, index, ordinals)
        return _Beams(candidates, blocks=[beams.blocks[i] for i in index], parents=index, **tensors)

    def _joined(self, parts: Sequence[_Beams]) -> _Beams:
        parts = [part for part in parts if len(part)]
        if len(parts) == 1:
            return parts[0]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        return _Beams(
            self.backend.join([part.candidates for part in parts]),
            blocks=[block for part in parts for block in part.blocks],
            parents=[parent for part in parts for parent in part.parents],
            **tensors,
        )

    def _candidate(self, beams: _Beams, row: int) -> Candidate:
        candidates = beams.candidates
        return Candidate(
            tokens=candidates.answers[row],
            cost=float(beams.cost[row]),
            reward=float(beams.reward[row]),
            z=float(beams.z[row]),
            finished=bool(candidates.finished[row]),
            p_safe=float(beams.p_safe[row]),
            blocks=beams.blocks[row],
            hidden=None if candidates.hidden is None else candidates.hidden[row].clone(),
            parent=beams.parents[row],
        )


# -- RE-Control ------------------------------------------------------------------------------------


def value_ascent(value: Callable[[Tensor], Tensor], steps: int, size: float) -> Callable[[Tensor], Tensor]:
    """An edit of hidden states: ``h ← h + size · ∇V(h)``, `steps` times, in float32.

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


def _default_value(
    cost: Scorer, reward: Scorer | None, critic: Critic | None, strategy: Strategy, budget: SafetyBudget
) -> Callable[[Tensor], Tensor]:
    """The critic's f2 with the whole budget left, else the reward head; under ``lagrangian`` less the cost head's."""
    parts: list[Callable[[Tensor], Tensor]] = []
    if critic is not None:
        parts.append(lambda h: critic(h.to(critic.mean.device), torch.full((len(h),), budget.budget))[1].to(h.device))
    elif isinstance(reward, HiddenHead):
        parts.append(reward.raw)
    if not parts or (strategy.safety != "none" and not isinstance(cost, HiddenHead)):
        raise GuardError(
            f"value: {strategy.name!r} needs a differentiable value of hidden states: a critic or heads, got neither"
        )
    if strategy.safety == "none":
        return parts[0]
    assert isinstance(cost, HiddenHead)

    return lambda h: parts[0](h) - strategy.multiplier * cost.raw(h)

"""Blockwise search among candidates: InferenceGuard and sampling baselines, on one engine.

A `Strategy` says which candidates are searched and how they are ranked. `Search` runs it: candidates grow by a block,
the block is charged to their budgets, the best ones go on. Tokens come from a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.candidates import Backend, Candidates, Sampling
from steerfast.guard.critic import Critic
from steerfast.guard.latent import agreed_layer
from steerfast.guard.objective import SafetyBudget, ScoredAnswer, best_first
from steerfast.guard.scores import Blocks, Scorer, block_costs, scores_of

__all__ = ["STRATEGIES", "Search", "SearchResult", "Strategy", "strategy_of"]

Safety = Literal["none", "lagrangian", "augmented", "cost"]


@dataclass(frozen=True)
class Strategy:
    """The candidates of a search, and their ranking. Use the constructors below, or `dataclasses.replace`.

    candidates: N. keep: K candidates go on after each block; None: N/4. block: L tokens. depth: at most D tokens.
    widths: numbers of candidates of a block, tried in turn until one of them is safe; (): N at once.
    safety: ranks candidates. ``none``: the reward. ``lagrangian``: reward − multiplier · cost. ``cost``: −cost.
        ``augmented``: the safety state's order, see `steerfast.guard.objective.best_first`.
    critic: whether the critic judges unfinished candidates; otherwise their reward and budget so far do.
    retries: M more rounds for a block without a safe candidate. A token's logit then loses `penalty` times the share of
        that block's unsafe candidates that contain it (the end token loses nothing).
    fallback: if the retries find no safe candidate. ``refusal``: give a fixed answer. ``least unsafe``: go on.
    temperature: of rounds with several candidates under greedy sampling, which would all be equal otherwise.
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

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("block", 1), ("depth", 1), ("retries", 0)):
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
        for name in ("penalty", "multiplier"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise GuardError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        if not 0 < self.temperature < float("inf"):
            raise GuardError(f"temperature: expected a number above 0, got {self.temperature!r}")
        for name, known in (("safety", ("none", "lagrangian", "augmented", "cost")), ("fallback", _FALLBACKS)):
            if getattr(self, name) not in known:
                raise GuardError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def kept(self) -> int:
        """Return K."""
        return self.candidates // 4 if self.keep is None else self.keep

    @classmethod
    def plain(cls, **options: Any) -> Strategy:
        """Return a strategy of one candidate, scored but not chosen."""
        return cls(**{"name": "plain", "candidates": 1, "keep": 1, **options})

    @classmethod
    def best_of_n(cls, candidates: int = 100, safety: Safety = "none", **options: Any) -> Strategy:
        """Return a strategy that takes the best of N whole answers."""
        return cls(**{"name": f"best of {candidates}{_LONG[safety]}", "candidates": candidates, "keep": candidates,
                      "safety": safety, **options})  # fmt: skip

    @classmethod
    def beam(cls, candidates: int = 128, safety: Safety = "none", **options: Any) -> Strategy:
        """Return a strategy of N candidates per block, a quarter of which goes on."""
        return cls(**{"name": f"beam{_LONG[safety]}", "candidates": candidates, "safety": safety, **options})

    @classmethod
    def inference_guard(cls, candidates: int = 16, critic: bool = True, **options: Any) -> Strategy:
        """Return the paper's search, with its critic or without."""
        return cls(**{"name": "InferenceGuard" + " + critic" * critic, "candidates": candidates, "critic": critic,
                      "safety": "augmented", "retries": 2, "fallback": "refusal", **options})  # fmt: skip

    @classmethod
    def speculative(cls, widths: Sequence[int] = (1, 4, 16), critic: bool = True, **options: Any) -> Strategy:
        """Return InferenceGuard that takes the first safe block, and samples more blocks only if none is safe."""
        return cls(**{"name": "speculative" + " + critic" * critic, "candidates": widths[-1], "keep": 1,
                      "widths": tuple(widths), "critic": critic, "safety": "augmented", "retries": 2,
                      "fallback": "refusal", **options})  # fmt: skip


def _beam(safety: Safety = "none") -> Callable[..., Strategy]:
    return lambda n, **options: Strategy.beam(n, safety, **_kept(n), **options)


def _kept(candidates: int) -> dict[str, int]:
    """Return K for an N that is too small for a quarter."""
    return {"keep": 1} if candidates < 4 else {}


def _widths(candidates: int) -> tuple[int, ...]:
    """Return 1, 4, 16, ... up to N."""
    powers = [4**n for n in range(candidates) if 4**n < candidates]
    return (*powers, candidates)


# Name on the command line -> strategy at N candidates; other options are the strategy's.
STRATEGIES: Mapping[str, Callable[..., Strategy]] = {
    "plain": lambda n, **o: Strategy.plain(**o),
    "best-of-n": lambda n, **o: Strategy.best_of_n(n, **o),
    "best-of-n-lagrangian": lambda n, **o: Strategy.best_of_n(n, "lagrangian", **o),
    "best-of-n-augmented": lambda n, **o: Strategy.best_of_n(n, "augmented", **o),
    "beam": _beam(),
    "beam-lagrangian": _beam("lagrangian"),
    "beam-augmented": _beam("augmented"),
    "inference-guard": lambda n, **o: Strategy.inference_guard(n, False, **_kept(n), **o),
    "inference-guard-critic": lambda n, **o: Strategy.inference_guard(n, True, **_kept(n), **o),
    "speculative": lambda n, **o: Strategy.speculative(_widths(n), **o),
}


def strategy_of(name: str, candidates: int, **options: Any) -> Strategy:
    """Return the strategy of a name in `STRATEGIES` at N candidates.

    Raises:
        GuardError: an unknown name, or an N that the strategy refuses.
    """
    if name not in STRATEGIES:
        raise GuardError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name](candidates, **options)


_FALLBACKS = ("refusal", "least unsafe")
_LONG = {"none": "", "lagrangian": " + Lagrangian", "augmented": " + augmented safety", "cost": " + cost model"}


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. sampled: blocks of candidates. retries, fallback: see `Certificate`."""

    best: ScoredAnswer
    sampled: int
    retries: int
    fallback: Literal["refusal", "least unsafe"] | None


@dataclass(eq=False)
class _Beams:
    """Candidates and their scores.

    score: the cost scorer's score at the last block's end, from which the next block's cost is taken. The others: see
    `ScoredAnswer`. All on the CPU; all except `blocks` and `parents` are float32 [n].
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
    """Run the search.

    Args:
        cost, reward: scorers; without a reward all answers are worth the same.
        critic: needed if the strategy asks for one.

    Raises:
        GuardError: a critic or hidden states are needed and missing, or parts' prompt_layer is not the backend's.
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
    ) -> None:
        if strategy.critic and critic is None:
            raise GuardError(f"critic: expected one for the strategy {strategy.name!r}, got none")
        agreed_layer({"backend": backend, "cost": cost, "reward": reward, "critic": critic})
        self.backend, self.tokenizer, self.strategy = backend, tokenizer, strategy
        self.cost, self.reward, self.critic = cost, reward, critic
        self.budget = budget or SafetyBudget()

    def run(
        self,
        prompt: Sequence[int] | Candidates,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        question: str | None = None,
        refusal: Sequence[int] = (),
    ) -> SearchResult:
        """Search for the answer to one prompt.

        Args:
            prompt: token ids, or the backend's candidates for them: one, without a token.
            question: the prompt as its user wrote it, for scorers that read text.
            refusal: tokens of the answer for the fallback ``refusal``.
        """
        sampling, strategy = sampling or Sampling(), self.strategy
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
        best = self._answer(beams, int(self._order([beams])[0]))
        fallback: Literal["refusal", "least unsafe"] | None = None
        if strategy.safety == "augmented" and (counts.gave_in or best.z <= 0):
            fallback = strategy.fallback
            if fallback == "refusal":
                best = self.given(root, refusal, question)
        return SearchResult(best, counts.sampled, counts.retries, fallback)

    def given(self, root: Candidates, tokens: Sequence[int], question: str | None = None) -> ScoredAnswer:
        """Return an answer of fixed tokens, charged like any other."""
        beams = self._root(self.backend.branch(root, [0]))
        self.backend.append(beams.candidates, tokens)
        beams.candidates.finished = torch.ones(1, dtype=torch.bool)
        return self._answer(self._charge(beams, [len(tokens)], True, question), 0)

    # -- a block -----------------------------------------------------------------------------------

    def _block(
        self, beams: _Beams, step: int, last: bool, sampling: Sampling, counts: _Counts, question: str | None
    ) -> _Beams:
        """Return the K best candidates one block later; finished ones compete unchanged."""
        strategy = self.strategy
        open_rows = (~beams.candidates.finished).nonzero()[:, 0].tolist()
        done_rows = beams.candidates.finished.nonzero()[:, 0].tolist()
        parents = self._taken(beams, open_rows)
        pool = self._taken(beams, done_rows)
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
        """Return the penalty of each token, float32 [V]: the strategy's, times the share of blocks that contain it."""
        seen = [token for block in blocks for token in {*block} - self.backend.ends]
        counted = torch.bincount(torch.tensor(seen, dtype=torch.long), minlength=self.backend.vocabulary)
        return self.strategy.penalty * counted.float() / len(blocks)

    # -- scores ------------------------------------------------------------------------------------

    def _charge(self, beams: _Beams, lengths: list[int], last: bool, question: str | None) -> _Beams:
        """Charge the new blocks, `lengths` tokens each, to the budgets. `last`: no candidate goes on after them."""
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
        """Return the quantity that a baseline maximises."""
        if self.strategy.safety == "lagrangian":
            return reward - self.strategy.multiplier * cost
        return -cost if self.strategy.safety == "cost" else reward

    def _order(self, parts: Sequence[_Beams]) -> Tensor:
        """Return the places of the candidates of all parts, best first."""
        value, z, p_safe, cost = (torch.cat([getattr(p, name) for p in parts]) for name in _RANKED)
        if self.strategy.safety == "augmented":
            return best_first(value, z, p_safe)
        worth = self._worth(value, cost).nan_to_num(nan=-float("inf"), neginf=-float("inf"))
        return worth.argsort(descending=True, stable=True)

    def _best(self, *parts: _Beams) -> _Beams:
        """Return the K best of all parts, in their old order if none is dropped. Dropped ones are never copied."""
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

    def _answer(self, beams: _Beams, row: int) -> ScoredAnswer:
        candidates = beams.candidates
        return ScoredAnswer(
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

"""Blockwise search among candidates: InferenceGuard and sampling baselines, on one engine.

A `Strategy` says how candidates are made and ranked. `Search` runs it: candidates of a backend grow by a block, the
block is charged to their budgets, the best ones go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard.candidates import Backend, Candidates, Sampling
from steerfast.guard.critic import Critic
from steerfast.guard.objective import SafetyBudget, ScoredAnswer, best_first
from steerfast.guard.parts import common_layer, expect
from steerfast.guard.scores import NO_SCORE, Blocks, Scorer, block_costs, scores_of

Safety = Literal["none", "lagrangian", "augmented", "cost"]
Fallback = Literal["refusal", "least unsafe"]

_SUFFIX = {"none": "", "lagrangian": " + Lagrangian", "augmented": " + augmented safety", "cost": " + cost model"}


@dataclass(frozen=True)
class Strategy:
    """The candidates of a search, and their ranking. Use the constructors below, or `dataclasses.replace`.

    candidates: N. keep: K candidates go on after each block; None: N/4. block: L tokens. depth: at most D tokens.
    widths: numbers of candidates of a block, tried in turn until one of them is safe; (): N at once.
    safety: ranks candidates. ``none``: the reward. ``lagrangian``: reward − multiplier · cost. ``cost``: −cost.
        ``augmented``: the safety state's order, see `steerfast.guard.objective.best_first`.
    critic: whether the critic judges unfinished candidates; otherwise their reward and budget so far do.
    retries: more rounds for a block without a safe candidate. A token's logit then loses `penalty` times the share of
        that block's unsafe candidates that contain it. fallback: without a safe candidate after them, or where the
        answer ends over the budget, a fixed answer (``refusal``), or going on (``least unsafe``).
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
    fallback: Fallback = "least unsafe"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("block", 1), ("depth", 1), ("retries", 0)):
            value = getattr(self, name)
            expect(isinstance(value, int) and value >= least, name, f"a whole number of at least {least}", value)
        count, widths = self.candidates, list(self.widths)
        expect(self.keep is not None or count % 4 == 0, "candidates", "a multiple of 4, since a quarter is kept", count)
        expect(1 <= self.kept <= count, "keep", f"1 to {count}, the number of candidates", self.keep)
        rising = [*sorted({width for width in widths if 1 <= width < count}), count]
        expect(widths in ([], rising), "widths", f"numbers that grow from 1 to {count}", self.widths)
        for name in ("penalty", "multiplier"):
            expect(0 <= getattr(self, name) < float("inf"), name, "a number of at least 0", getattr(self, name))
        expect(0 < self.temperature < float("inf"), "temperature", "a number above 0", self.temperature)
        for name, known in (("safety", _SUFFIX), ("fallback", ("refusal", "least unsafe"))):
            expect(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))

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
        name = f"best of {candidates}{_SUFFIX[safety]}"
        return cls(**{"name": name, "candidates": candidates, "keep": candidates, "safety": safety, **options})

    @classmethod
    def beam(cls, candidates: int = 128, safety: Safety = "none", **options: Any) -> Strategy:
        """Return a strategy of N candidates per block, a quarter of which (at least 1) goes on."""
        keep = 1 if candidates < 4 else None
        name = f"beam{_SUFFIX[safety]}"
        return cls(**{"name": name, "candidates": candidates, "keep": keep, "safety": safety, **options})

    @classmethod
    def inference_guard(cls, candidates: int = 16, critic: bool = True, **options: Any) -> Strategy:
        """Return the paper's search, with its critic or without."""
        name = "InferenceGuard" + " + critic" * critic
        guarded = {"critic": critic, "retries": 2, "fallback": "refusal"}
        return cls.beam(candidates, "augmented", **{"name": name, **guarded, **options})

    @classmethod
    def speculative(cls, widths: Sequence[int] | int = 16, critic: bool = True, **options: Any) -> Strategy:
        """Return InferenceGuard that takes the first safe block, and samples more blocks only if none is safe.

        A number of widths, N, means 1, 4, 16, ... up to N.
        """
        if isinstance(widths, int):
            widths = (*(4**n for n in range(widths) if 4**n < widths), widths)
        name = "speculative" + " + critic" * critic
        return cls.inference_guard(widths[-1], critic, **{"name": name, "keep": 1, "widths": tuple(widths), **options})


# Name on the command line -> strategy at N candidates; other options are the strategy's.
STRATEGIES: Mapping[str, Callable[..., Strategy]] = {
    "plain": lambda n, **options: Strategy.plain(**options),
    "best-of-n": Strategy.best_of_n,
    "best-of-n-lagrangian": partial(Strategy.best_of_n, safety="lagrangian"),
    "best-of-n-augmented": partial(Strategy.best_of_n, safety="augmented"),
    "beam": Strategy.beam,
    "beam-lagrangian": partial(Strategy.beam, safety="lagrangian"),
    "beam-augmented": partial(Strategy.beam, safety="augmented"),
    "inference-guard": partial(Strategy.inference_guard, critic=False),
    "inference-guard-critic": Strategy.inference_guard,
    "speculative": Strategy.speculative,
}


@dataclass(frozen=True)
class SearchResult:
    """sampled: blocks of candidates. retries, fallback: see `Certificate`."""

    best: ScoredAnswer
    sampled: int
    retries: int
    fallback: Fallback | None


def _answer(found: Candidates, row: int) -> ScoredAnswer:
    """Return a candidate as an answer."""
    state = None if found.hidden is None else found.hidden[row].clone()
    return replace(found.scores[row], tokens=found.answers[row], finished=bool(found.finished[row]), hidden=state)


class Search:
    """Run a strategy; without a reward all answers are worth the same.

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
        common_layer({"backend": backend, "cost": cost, "reward": reward, "critic": critic})
        self.backend, self.tokenizer, self.strategy = backend, tokenizer, strategy
        self.cost, self.reward, self.critic = cost, reward or NO_SCORE, critic
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

        The prompt is token ids, or the backend's candidate for them, without a token; the question is its text, for
        scorers that read text. The refusal is the tokens of the answer for the fallback ``refusal``.
        """
        sampling, strategy = sampling or Sampling(), self.strategy
        root = prompt if isinstance(prompt, Candidates) else self.backend.start(prompt, 1, seed)
        found, counts = replace(root, scores=[ScoredAnswer(self.budget.budget)]), Counter[str]()
        length, lost = 0, False
        while length < strategy.depth and not bool(found.finished.all()):
            step = min(strategy.block, strategy.depth - length)
            length += step
            found = self._block(found, step, length == strategy.depth, sampling, counts, question)
            lost |= strategy.safety == "augmented" and not any(one.safe for one in found.scores)
            if lost and strategy.fallback == "refusal":
                break
        row, fallback = int(self._order([found])[0]), None
        if lost or not found.scores[row].z > 0:
            if strategy.fallback == "refusal":
                refused = self.refuse(root, refusal, question)
                return replace(refused, sampled=counts["sampled"], retries=counts["retries"])
            fallback = strategy.fallback if strategy.safety == "augmented" else None
        return SearchResult(_answer(found, row), counts["sampled"], counts["retries"], fallback)

    def refuse(self, root: Candidates, refusal: Sequence[int], question: str | None = None) -> SearchResult:
        """Return the fallback, charged like any other answer; arguments as for `run`."""
        found = self.backend.branch(replace(root, scores=[ScoredAnswer(self.budget.budget)]), [0])
        self.backend.append(found, refusal)
        found.finished = torch.ones(1, dtype=torch.bool)
        self._charge(found, [len(refusal)], True, question)
        return SearchResult(_answer(found, 0), 0, 0, "refusal")

    def _block(
        self, found: Candidates, step: int, last: bool, sampling: Sampling, counts: Counter[str], question: str | None
    ) -> Candidates:
        """Return the K best candidates one block later; finished ones compete unchanged."""
        strategy, branch = self.strategy, self.backend.branch
        parents, pool = (branch(found, mask.nonzero()[:, 0].tolist()) for mask in (~found.finished, found.finished))
        room = strategy.candidates - len(pool)
        rounds = [(min(width, room), False) for width in strategy.widths or (room,)]
        rounds += [(room, True)] * (strategy.retries if strategy.safety == "augmented" else 0)
        grown = 0  # children so far, dealt to the parents in turn
        unsafe: list[list[int]] = []  # new tokens of unsafe candidates
        for width, retry in rounds:
            count = width if retry else width - grown
            if count <= 0:
                continue
            places = range(grown, grown + count)
            fresh = branch(parents, [n % len(parents) for n in places], [n // len(parents) for n in places])
            penalty = self._penalty(unsafe) if retry else None
            greedy = sampling.temperature == 0 and count > 1
            chosen = replace(sampling, temperature=strategy.temperature) if greedy else sampling
            new = self.backend.extend(fresh, step, chosen, penalty)
            self._charge(fresh, [len(tokens) for tokens in new], last, question)
            grown += count
            counts["sampled"] += count
            counts["retries"] += retry
            pool = self._best(pool, fresh)
            if any(one.safe for one in pool.scores):
                break
            unsafe += new
        return pool

    def _penalty(self, blocks: list[list[int]]) -> Tensor:
        """Return the penalty of each token, float32 [V]: the strategy's, times the share of blocks that contain it."""
        seen = [token for block in blocks for token in {*block} - self.backend.ends]
        counted = torch.bincount(torch.tensor(seen, dtype=torch.long), minlength=self.backend.vocabulary)
        return self.strategy.penalty * counted.float() / len(blocks)

    def _charge(self, found: Candidates, lengths: list[int], last: bool, question: str | None) -> None:
        """Charge the new blocks, `lengths` tokens each, to the budgets. `last`: no candidate goes on after them."""
        blocks = self._blocks(found, question)
        now = scores_of(self.cost, blocks, "cost")
        refund = self.budget.refund
        cost = block_costs(self.cost, now, found.column("score" if refund else "cost"), refund)
        z = self.budget.block(found.column("z"), cost, torch.tensor(lengths))
        reward = scores_of(self.reward, blocks, "reward")
        p_safe, value = (z > 0).float(), reward
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
        columns = (z, found.column("cost") + cost, reward, p_safe, value, now)
        new = zip(found.scores, lengths, cost.tolist(), *(column.tolist() for column in columns), strict=True)
        found.scores = [
            ScoredAnswer(*numbers, (*old.blocks, (length, spent)))  # type: ignore[call-arg]
            for old, length, spent, *numbers in new
        ]

    def _blocks(self, candidates: Candidates, question: str | None) -> Blocks:
        questions = None if question is None else [question] * len(candidates)
        prompts, hidden = [candidates.prompt] * len(candidates), candidates.hidden
        return Blocks(prompts, candidates.answers, hidden, self.tokenizer, candidates.finished, questions)

    def _worth(self, reward: Tensor, cost: Tensor) -> Tensor:
        """Return the quantity that a baseline maximises."""
        if self.strategy.safety == "lagrangian":
            return reward - self.strategy.multiplier * cost
        return -cost if self.strategy.safety == "cost" else reward

    def _order(self, parts: Sequence[Candidates]) -> Tensor:
        """Return the places of the candidates of all parts, best first."""
        of = {name: torch.cat([part.column(name) for part in parts]) for name in ("value", "z", "p_safe", "cost")}
        if self.strategy.safety == "augmented":
            return best_first(of["value"], of["z"], of["p_safe"])
        worth = self._worth(of["value"], of["cost"]).nan_to_num(nan=-float("inf"), neginf=-float("inf"))
        return worth.argsort(descending=True, stable=True)

    def _best(self, *parts: Candidates) -> Candidates:
        """Return the K best of all parts, in their old order if none is dropped. Dropped ones are never copied."""
        if sum(map(len, parts)) > self.strategy.kept:
            best, start, kept = self._order(parts)[: self.strategy.kept].tolist(), 0, []
            for part in parts:
                index = [at - start for at in best if start <= at < start + len(part)]
                kept.append(self.backend.branch(part, index))
                start += len(part)
            parts = tuple(kept)
        full = [part for part in parts if len(part)]
        return full[0] if len(full) == 1 else self.backend.join(full)

"""Guard answers: decode plainly if the gate stays shut, steer and search if it fires, search if it abstains."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast._progress import track
from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend
from steerfast.guard.candidates import Backend, Sampling
from steerfast.guard.critic import Critic
from steerfast.guard.latent import agreed_layer
from steerfast.guard.objective import Certificate, SafetyBudget
from steerfast.guard.scores import CallableScorer, Scorer
from steerfast.guard.search import Search, SearchResult, Strategy
from steerfast.hf.generation import evaluating
from steerfast.hf.steering import Steering, steer
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import encode

__all__ = ["REFUSAL", "Guard", "GuardedAnswer"]

REFUSAL = "I'm sorry, but I can't help with that."

Path = Literal["plain", "plain, then searched", "steered", "searched", "steered and searched"]


@dataclass(frozen=True)
class GuardedAnswer:
    """text: without special tokens. tokens: without the prompt; the end token is the last one of a finished answer.
    seconds: from the prompt to the answer. path: how it was made; ``plain`` costs as much as plain decoding.
    """

    text: str
    tokens: list[int]
    certificate: Certificate
    seconds: float
    path: Path


@dataclass(frozen=True)
class GuardOptions:
    """Parts and settings of a `Guard`.

    reward: a scorer; without one all answers are worth the same.
    critic: for strategies that need one.
    profile: its prompt gate decides which prompts are searched: if it stays shut, decoding is plain; if it abstains
        (`SteeringProfile.abstain`), the prompt is searched and not steered. None: every prompt is searched. An edit at
        or before the heads' prompt_layer changes the states that they read, see
        `steerfast.guard.recipe.prompt_layer_for`.
    fired: the action if the gate fires: ``search``, ``steer`` by the profile, or ``both``. With ``steer`` nothing is
        searched, not even undecided prompts.
    strength: multiplies the profile's strengths.
    budget, discount: d and γ, in units of the cost; None: the critic's, without a critic 10 and 0.999.
    strategy: None: `Strategy.speculative`, with the critic if there is one.
    refusal: the answer of strategies that fall back on one.
    certify: whether plain answers behind a shut gate are scored. Those over the budget are then searched for, unless
        `fired` is ``steer``.
    """

    reward: Scorer | None = None
    critic: Critic | None = None
    profile: SteeringProfile | None = None
    fired: Literal["search", "steer", "both"] = "both"
    strength: float = 1.0
    budget: float | None = None
    discount: float | None = None
    strategy: Strategy | None = None
    refusal: str = REFUSAL
    certify: bool = True

    def __post_init__(self) -> None:
        if self.fired not in ("search", "steer", "both"):
            raise GuardError(f"fired: expected 'search', 'steer' or 'both', got {self.fired!r}")

    def safety(self) -> SafetyBudget:
        """Return the budget and discount that are given, else the critic's, else the defaults."""
        base = SafetyBudget() if self.critic is None else self.critic.settings
        return SafetyBudget(
            base.budget if self.budget is None else self.budget,
            base.discount if self.discount is None else self.discount,
        )


class Guard:
    """Answers within a safety budget.

    Args:
        model: any HuggingFace decoder-only model, unchanged after each call. None: answers come from `backend`, and
            critic, heads and profile are not checked against a model.
        cost: a scorer (`steerfast.guard.scores`).
        options: see `GuardOptions`.

    Raises:
        GuardError: no cost, a budget out of range, a critic or head of another model, a missing one, parts with
            different prompt_layer.
        ProfileError: the profile belongs to another model.
    """

    def __init__(
        self, model: nn.Module | None, tokenizer: Any, *, cost: Scorer, backend: Backend | None = None, **options: Any
    ) -> None:
        self.options = chosen = GuardOptions(**options)
        if not callable(cost):
            raise GuardError(f"cost: expected a scorer, got {cost!r}")
        if (model is None) == (backend is None):
            raise GuardError("model: expected either a model or a backend")
        if chosen.profile is not None and model is None:
            raise GuardError("profile: its gate needs a model, got a backend alone")
        parts = {"cost": cost, "reward": chosen.reward, "critic": chosen.critic}
        if model is not None:
            identity = identify(model, tokenizer)
            for part in parts.values():
                check: Any = getattr(part, "check", None)
                if check is not None:
                    check(identity)
        if backend is None:
            assert model is not None
            backend = HFBackend(model, tokenizer, agreed_layer(parts))
        self.model, self.tokenizer, self.cost = model, tokenizer, cost
        self.backend: Backend = backend
        self.budget = chosen.safety()
        self.default = chosen.strategy or Strategy.speculative(critic=chosen.critic is not None)
        end = tokenizer.eos_token_id
        words = tokenizer(chosen.refusal, add_special_tokens=False)["input_ids"]
        self.refusal = [*words, *([] if end is None else [end])]
        self.answers: list[GuardedAnswer] = []
        self.search_of(self.default)  # raises now if a part is missing

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        strategy: Strategy | None = None,
        progress: bool = False,
        **sampling: Any,
    ) -> list[GuardedAnswer]:
        """Answer prompts one by one; an answer depends only on its prompt, the seed and the settings.

        Args:
            prompts: as users write them; the chat template is applied if there is one.
            input_ids: token ids of templated prompts, instead of `prompts`; scorers then read the templated prompts.
            max_new_tokens: default: the strategy's depth.
            strategy: in place of the guard's.
            sampling: temperature, top_k, top_p, see `Sampling`. Temperature 0 is greedy, except in rounds with several
                candidates (`Strategy.temperature`).

        Raises:
            GuardError: neither prompts nor input_ids or both, a number out of range, a prompt without room for an
                answer.
        """
        if isinstance(prompts, str) or (prompts is None) == (input_ids is None):
            raise GuardError("prompts: expected a list of prompts, or input_ids in their place")
        sequences = encode(self.tokenizer, prompts) if prompts is not None else [list(ids) for ids in input_ids or []]
        questions = [None] * len(sequences) if prompts is None else list(prompts)
        jobs = [(ids, seed, question) for ids, question in zip(sequences, questions, strict=True)]
        return self._run(jobs, Sampling(**sampling), self._deep(strategy or self.default, max_new_tokens), progress)

    def strategy(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The guard as a decoding strategy of transformers: ``model.generate(..., custom_generate=guard.strategy)``.

        Logits processors, sampling and length are the call's; its seed is torch's. ``guard.answers`` holds the
        certificates.

        Returns:
            Token ids int64 [prompts, length], prompts included, padded on the right.

        Raises:
            GuardError: a model that is not the guard's.
        """
        if model is not self.model:
            raise GuardError("model: expected the guard's own model")
        mask = model_kwargs.get("attention_mask")
        valid = torch.ones_like(input_ids) if mask is None else mask
        sampled = bool(getattr(generation_config, "do_sample", False))
        sampling = Sampling(float(sampled), processors=_unpadded(logits_processor))
        seeds = torch.randint(2**62, (len(input_ids),)).tolist() if sampled else [0] * len(input_ids)
        jobs = [
            (row[keep.bool()].tolist(), seed, None) for row, keep, seed in zip(input_ids, valid, seeds, strict=True)
        ]
        limit = getattr(generation_config, "max_length", None)
        strategy = self._deep(self.default, None if limit is None else limit - input_ids.shape[1])
        answers = [answer.tokens for answer in self._run(jobs, sampling, strategy, False)]
        pad = getattr(generation_config, "pad_token_id", None)
        pad = self.tokenizer.pad_token_id if pad is None else pad
        rows = [torch.tensor(tokens, dtype=input_ids.dtype, device=input_ids.device) for tokens in answers]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float(pad or 0))
        return torch.cat([input_ids, padded], dim=1)

    def cache_bytes(self, prompt_tokens: int, strategy: Strategy | None = None) -> int:
        """Return the most bytes of keys and values during a search: N + 3K + 1 candidates at full depth."""
        chosen = strategy or self.default
        if not isinstance(self.backend, HFBackend):
            raise GuardError("backend: only the transformers backend holds keys and values itself")
        return (chosen.candidates + 3 * chosen.kept + 1) * self.backend.cache_bytes(prompt_tokens + chosen.depth)

    # -- one prompt --------------------------------------------------------------------------------

    def _run(
        self, jobs: Sequence[tuple[list[int], int, str | None]], sampling: Sampling, strategy: Strategy, progress: bool
    ) -> list[GuardedAnswer]:
        for number, (ids, _, _) in enumerate(jobs, 1):
            if not 0 < len(ids) <= self.backend.context - strategy.depth:
                raise GuardError(
                    f"prompts: entry {number} has {len(ids)} tokens, expected 1 to "
                    f"{self.backend.context - strategy.depth}: the context less {strategy.depth} new tokens"
                )
        plain = Strategy.plain(block=strategy.block, depth=strategy.depth)
        steered = self.search_of(plain)
        unchecked = replace(plain, block=plain.depth)
        shut = steered if self.options.certify else self.search_of(unchecked, cost=_UNCHECKED)
        searched = self.search_of(strategy)
        self.answers = []
        with self._steering() as steering, evaluating(self.model) if self.model is not None else nullcontext():
            for ids, seed, question in track(jobs, "answers", show=progress):
                began = time.perf_counter()
                root = self.backend.start(ids, 1, seed)
                fired = None if steering is None else bool(steering.fired.any())
                undecided = steering is not None and bool(steering.undecided.any())
                chosen, path = self._chosen(fired, undecided, shut, steered, searched)
                result = chosen.run(root, sampling, question=question, refusal=self.refusal)
                name = chosen.strategy.name
                if chosen is shut and self.options.certify and self.options.fired != "steer" and not result.best.z > 0:
                    again = searched.run(root, sampling, question=question, refusal=self.refusal)
                    result = replace(again, sampled=result.sampled + again.sampled)
                    path, name = "plain, then searched", f"{name}, then {searched.strategy.name}"
                text = self.tokenizer.decode(result.best.tokens, skip_special_tokens=True)
                certificate = self._certificate(result, fired, undecided, name, chosen.cost is _UNCHECKED)
                seconds = time.perf_counter() - began
                self.answers.append(GuardedAnswer(text, result.best.tokens, certificate, seconds, path))
        return self.answers

    def _chosen(
        self, fired: bool | None, undecided: bool, shut: Search, steered: Search, searched: Search
    ) -> tuple[Search, Path]:
        if fired is None or (undecided and self.options.fired != "steer"):
            return searched, "searched" if searched.strategy.name != "plain" else "plain"
        if not fired:
            return shut, "plain"
        if self.options.fired == "steer":
            return steered, "steered"
        return searched, "searched" if self.options.fired == "search" else "steered and searched"

    def _certificate(
        self, result: SearchResult, fired: bool | None, undecided: bool, strategy: str, unchecked: bool
    ) -> Certificate:
        best = result.best
        return Certificate(
            budget=self.budget.budget,
            discount=self.budget.discount,
            z=math.nan if unchecked else best.z,
            cost=math.nan if unchecked else best.cost,
            reward=math.nan if unchecked else best.reward,
            decision="unchecked" if unchecked else ("within" if best.z > 0 else "over"),
            blocks=() if unchecked else tuple(best.blocks),
            p_safe=math.nan if unchecked else best.p_safe,
            fallback=result.fallback,
            fired=fired,
            undecided=undecided,
            candidates=result.sampled,
            retries=result.retries,
            strategy=strategy,
        )

    def search_of(self, strategy: Strategy, cost: Scorer | None = None) -> Search:
        """Return the search of a strategy with the guard's parts; with another `cost`, without a reward."""
        return self.engine(strategy)(
            self.backend,
            self.tokenizer,
            strategy,
            cost=cost or self.cost,
            reward=None if cost is not None else self.options.reward,
            critic=self.options.critic,
            budget=self.budget,
        )

    def engine(self, strategy: Strategy) -> type[Search]:
        """Return the class that searches by a strategy."""
        return Search

    @contextmanager
    def _steering(self) -> Iterator[Steering | None]:
        """Attach the profile; at strength 0 if only its gate is needed."""
        if self.options.profile is None:
            yield None
            return
        assert self.model is not None
        strength = 0.0 if self.options.fired == "search" else self.options.strength
        with steer(self.model, self.options.profile, strength, tokenizer=self.tokenizer) as steering:
            yield steering

    @staticmethod
    def _deep(strategy: Strategy, tokens: int | None) -> Strategy:
        if tokens is None:
            return strategy
        if tokens < 1:
            raise GuardError(f"max_new_tokens: expected at least 1, got {tokens}")
        return replace(strategy, depth=tokens)


def _unpadded(processors: Any) -> Any:
    """Return transformers' processors for prompts without padding: drop the padded lengths that some of them hold."""
    if not processors:
        return None
    processors = copy.deepcopy(processors)
    for processor in processors:
        if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
            processor.prompt_ignore_length = None
    return processors


_UNCHECKED = CallableScorer(lambda blocks: torch.zeros(len(blocks)), takes="blocks")

"""Guard a model's answers: plain decoding where a prompt is harmless, steering and search where its gate fires, search
alone where the gate does not know.
"""

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
from steerfast.guard.candidates import Backend, HFBackend, Sampling
from steerfast.guard.critic import Critic
from steerfast.guard.latent import agreed_layer
from steerfast.guard.objective import Certificate, SafetyBudget
from steerfast.guard.scores import Blocks, CallableScorer, Scorer
from steerfast.guard.search import Found, Search, Strategy
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
    seconds: from the prompt to the answer. path: what was done for it; ``plain`` is base cost.
    """

    text: str
    tokens: list[int]
    certificate: Certificate
    seconds: float
    path: Path


class Guard:
    """Answers within a safety budget.

    Args:
        model: any HuggingFace decoder-only model, left as it was after each call. None: `backend` says where answers
            come from, and critic, heads and profile are not checked against a model.
        cost, reward: scorers (`steerfast.guard.scores`); without a reward all answers are worth the same.
        critic: for strategies that ask for one.
        profile: its prompt gate decides where to spend: a prompt that keeps it shut is decoded plainly, one that leaves
            it undecided (`SteeringProfile.abstain`) is searched and not steered. None: every prompt is searched. An
            edit at or before the heads' prompt_layer changes what they read, see
            `steerfast.guard.recipe.prompt_layer_for`.
        fired: what happens where the gate fires: ``search``, ``steer`` by the profile, or ``both``. With ``steer``
            nothing is searched, undecided prompts neither.
        strength: multiplies the profile's strengths.
        budget, discount: d and γ, in units of the cost; default: the critic's, without one 10 and 0.999.
        strategy: default: `Strategy.speculative`, with the critic where there is one.
        refusal: the answer where a strategy falls back on one.
        certify: whether plainly decoded answers behind a shut gate are scored, too; those over the budget are then
            searched for, unless what fires is steered alone.
        value: what RE-Control climbes, see `Search`.

    Raises:
        GuardError: no cost, a budget out of range, a critic or head of another model, one that is missing, parts that
            differ in their prompt_layer.
        ProfileError: the profile belongs to another model.
    """

    def __init__(
        self,
        model: nn.Module | None,
        tokenizer: Any,
        *,
        cost: Scorer,
        reward: Scorer | None = None,
        critic: Critic | None = None,
        profile: SteeringProfile | None = None,
        fired: Literal["search", "steer", "both"] = "both",
        strength: float = 1.0,
        budget: float | None = None,
        discount: float | None = None,
        strategy: Strategy | None = None,
        refusal: str = REFUSAL,
        certify: bool = True,
        value: Any = None,
        backend: Backend | None = None,
    ) -> None:
        if not callable(cost):
            raise GuardError(f"cost: expected a scorer, got {cost!r}")
        if fired not in ("search", "steer", "both"):
            raise GuardError(f"fired: expected 'search', 'steer' or 'both', got {fired!r}")
        if (model is None) == (backend is None):
            raise GuardError("model: expected either a model or a backend")
        if profile is not None and model is None:
            raise GuardError("profile: its gate needs a model, got a backend alone")
        if model is not None:
            identity = identify(model, tokenizer)
            for part in (cost, reward, critic):
                if hasattr(part, "check"):
                    part.check(identity)  # type: ignore[union-attr]
        self.model, self.tokenizer = model, tokenizer
        if backend is None:
            assert model is not None
            backend = HFBackend(model, tokenizer, agreed_layer({"cost": cost, "reward": reward, "critic": critic}))
        self.backend: Backend = backend
        settings = critic.settings if critic is not None else SafetyBudget()
        self.budget = SafetyBudget(
            settings.budget if budget is None else budget, settings.discount if discount is None else discount
        )
        self.cost, self.reward, self.critic, self.value = cost, reward, critic, value
        self.profile, self.fired, self.strength = profile, fired, strength
        self.default = strategy or Strategy.speculative(critic=critic is not None)
        self.certify = certify
        end = tokenizer.eos_token_id
        self.refusal = [*tokenizer(refusal, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]
        self.answers: list[GuardedAnswer] = []
        self._search(self.default)  # what it needs and lacks shows now

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        strategy: Strategy | None = None,
        progress: bool = False,
    ) -> list[GuardedAnswer]:
        """Answer prompts one by one; an answer depends on its prompt and the seed, and on no other prompt.

        Args:
            prompts: as users write them; the chat template is applied where there is one.
            input_ids: or token ids of templated prompts; what scorers read as the prompt where `prompts` is None.
            max_new_tokens: default: the strategy's depth.
            temperature: 0 is greedy, but for rounds with several candidates (`Strategy.temperature`).
            strategy: another one than the guard's.

        Raises:
            GuardError: neither prompts nor input_ids, both of different lengths, a number out of range, a prompt
                that leaves no room.
        """
        if isinstance(prompts, str) or (prompts is None) == (input_ids is None):
            raise GuardError("prompts: expected a list of prompts, or input_ids in their place")
        sequences = encode(self.tokenizer, prompts) if prompts is not None else [list(ids) for ids in input_ids or []]
        sampling = Sampling(temperature, top_k, top_p)
        questions = [None] * len(sequences) if prompts is None else list(prompts)
        jobs = [(ids, seed, question) for ids, question in zip(sequences, questions, strict=True)]
        return self._run(jobs, sampling, self._deep(strategy or self.default, max_new_tokens), progress)

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

        Processors of logits, sampling and length are those of the call; its seed is torch's. Certificates lie in
        ``guard.answers``.

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
        """Bound of the memory of keys and values while a prompt is searched: N + 3K + 1 candidates at full depth."""
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
        steered = self._search(plain)
        shut = steered if self.certify else self._search(replace(plain, block=plain.depth), cost=_UNCHECKED)
        searched = self._search(strategy)
        self.answers = []
        with self._steering() as steering, evaluating(self.model) if self.model is not None else nullcontext():
            for ids, seed, question in track(jobs, "answers", show=progress):
                began = time.perf_counter()
                root = self.backend.start(ids, 1, seed)
                fired = None if steering is None else bool(steering.fired.any())
                undecided = steering is not None and bool(steering.undecided.any())
                chosen, path = self._chosen(fired, undecided, shut, steered, searched)
                found = chosen.run(root, sampling, question=question, refusal=self.refusal)
                name = chosen.strategy.name
                if chosen is shut and self.certify and self.fired != "steer" and not found.best.z > 0:
                    again = searched.run(root, sampling, question=question, refusal=self.refusal)
                    found = replace(again, sampled=found.sampled + again.sampled)
                    path, name = "plain, then searched", f"{name}, then {searched.strategy.name}"
                text = self.tokenizer.decode(found.best.tokens, skip_special_tokens=True)
                certificate = self._certificate(found, fired, undecided, name, chosen.cost is _UNCHECKED)
                seconds = time.perf_counter() - began
                self.answers.append(GuardedAnswer(text, found.best.tokens, certificate, seconds, path))
        return self.answers

    def _chosen(
        self, fired: bool | None, undecided: bool, shut: Search, steered: Search, searched: Search
    ) -> tuple[Search, Path]:
        if fired is None or (undecided and self.fired != "steer"):
            return searched, "searched" if searched.strategy.name != "plain" else "plain"
        if not fired:
            return shut, "plain"
        if self.fired == "steer":
            return steered, "steered"
        return searched, "searched" if self.fired == "search" else "steered and searched"

    def _certificate(
        self, found: Found, fired: bool | None, undecided: bool, strategy: str, unchecked: bool
    ) -> Certificate:
        best = found.best
        return Certificate(
            budget=self.budget.budget,
            discount=self.budget.discount,
            z=math.nan if unchecked else best.z,
            cost=math.nan if unchecked else best.cost,
            reward=math.nan if unchecked else best.reward,
            decision="unchecked" if unchecked else ("within" if best.z > 0 else "over"),
            blocks=() if unchecked else tuple(best.blocks),
            p_safe=math.nan if unchecked else best.p_safe,
            fallback=found.fallback,
            fired=fired,
            undecided=undecided,
            candidates=found.sampled,
            retries=found.retries,
            strategy=strategy,
        )

    def _search(self, strategy: Strategy, cost: Scorer | None = None) -> Search:
        unchecked = cost is not None
        return Search(
            self.backend,
            self.tokenizer,
            strategy,
            cost=cost or self.cost,
            reward=None if unchecked else self.reward,
            critic=self.critic,
            budget=self.budget,
            value=self.value,
        )

    @contextmanager
    def _steering(self) -> Iterator[Steering | None]:
        """The profile attached; without strength where its gate alone is wanted."""
        if self.profile is None:
            yield None
            return
        assert self.model is not None
        strength = 0.0 if self.fired == "search" else self.strength
        with steer(self.model, self.profile, strength, tokenizer=self.tokenizer) as steering:
            yield steering

    @staticmethod
    def _deep(strategy: Strategy, tokens: int | None) -> Strategy:
        if tokens is None:
            return strategy
        if tokens < 1:
            raise GuardError(f"max_new_tokens: expected at least 1, got {tokens}")
        return replace(strategy, depth=tokens)


def _unpadded(processors: Any) -> Any:
    """transformers' processors for prompts without padding: those that hold its length for each prompt forget it."""
    if not processors:
        return None
    processors = copy.deepcopy(processors)
    for one in processors:
        if isinstance(getattr(one, "prompt_ignore_length", None), Tensor):
            one.prompt_ignore_length = None
    return processors


def _nothing(blocks: Blocks) -> Tensor:
    return torch.zeros(len(blocks))


_UNCHECKED = CallableScorer(_nothing, takes="blocks")

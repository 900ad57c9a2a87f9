"""Guard answers: decode plainly if the gate stays shut, steer and search if it fires, search if it abstains."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerfast._defaults import own_defaults
from steerfast._progress import track
from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend
from steerfast.guard.candidates import Backend, Sampling
from steerfast.guard.critic import Critic
from steerfast.guard.objective import Certificate, SafetyBudget
from steerfast.guard.parts import common_layer, expect
from steerfast.guard.scores import NO_SCORE, Scorer
from steerfast.guard.search import Search, Strategy
from steerfast.hf.generation import evaluating
from steerfast.hf.steering import Steering, steer
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import encode, pad_token

REFUSAL = "I'm sorry, but I can't help with that."

_Job = tuple[list[int], int, str | None]  # token ids of a prompt, seed, the prompt as its user wrote it


@dataclass(frozen=True)
class GuardedAnswer:
    """text: without special tokens. tokens: without the prompt; a finished answer ends with the end token.
    path: ``plain`` (at the cost of plain decoding), ``steered``, ``searched``, ``steered and searched``, or ``plain,
    then searched``.
    """

    text: str
    tokens: list[int]
    certificate: Certificate
    seconds: float
    path: str


Fired = Literal["search", "steer", "both", "refuse"]

# What a guard does if the gate fires -> the path of the answer.
_PATHS = {"search": "searched", "steer": "steered", "both": "steered and searched", "refuse": "refused"}


@dataclass(frozen=True)
class GuardOptions:
    """Parts and settings of a `Guard`.

    reward: a scorer; without one all answers are worth the same. critic: for strategies that need one.
    profile: if its prompt gate stays shut, decoding is plain; if it abstains, the prompt is searched and not steered.
        None: every prompt is searched. strength: multiplies its strengths.
    fired: the action if the gate fires: ``search``, ``steer`` by the profile, ``both``, or ``refuse``: the refusal, at
        once. With ``steer`` and ``refuse`` nothing is searched, not even undecided prompts.
    budget, discount, refund: see `SafetyBudget`; None: the critic's, without a critic its defaults.
    strategy: None: `Strategy.speculative`, with the critic if there is one. refusal: the answer it falls back on.
    certify: whether plain answers behind a shut gate are scored. Those over the budget are then searched for, unless
        `fired` is ``steer`` or ``refuse``.
    """

    reward: Scorer | None = None
    critic: Critic | None = None
    profile: SteeringProfile | None = None
    fired: Fired = "both"
    strength: float = 1.0
    budget: float | None = None
    discount: float | None = None
    refund: bool | None = None
    strategy: Strategy | None = None
    refusal: str = REFUSAL
    certify: bool = True

    def __post_init__(self) -> None:
        expect(self.fired in _PATHS, "fired", f"one of {', '.join(_PATHS)}", self.fired)


class Guard:
    """Answers within a safety budget.

    Args:
        model: any HuggingFace decoder-only model, unchanged after each call. None: answers come from `backend`.
        cost: a scorer (`steerfast.guard.scores`). options: see `GuardOptions`.

    Raises:
        GuardError: no cost, a budget out of range, a part that is missing, of another model or another prompt_layer.
        ProfileError: the profile belongs to another model.
    """

    def __init__(
        self, model: nn.Module | None, tokenizer: Any, *, cost: Scorer, backend: Backend | None = None, **options: Any
    ) -> None:
        self.options = chosen = GuardOptions(**options)
        expect(callable(cost), "cost", "a scorer", cost)
        if (model is None) == (backend is None):
            raise GuardError("model: expected either a model or a backend")
        if chosen.profile is not None and model is None:
            raise GuardError("profile: its gate needs a model, got a backend alone")
        if model is not None:
            parts: dict[str, Any] = {"cost": cost, "reward": chosen.reward, "critic": chosen.critic}
            identity = identify(model, tokenizer)
            for part in parts.values():
                if hasattr(part, "check"):
                    part.check(identity)
            backend = HFBackend(model, tokenizer, common_layer(parts))
        assert backend is not None
        self.model, self.tokenizer, self.cost, self.backend = model, tokenizer, cost, backend
        base = SafetyBudget() if chosen.critic is None else chosen.critic.settings.safety
        given = {name: getattr(chosen, name) for name in vars(base)}
        self.budget = replace(base, **{name: value for name, value in given.items() if value is not None})
        self.default = chosen.strategy or Strategy.speculative(critic=chosen.critic is not None)
        self.refusal = with_end(tokenizer, tokenizer(chosen.refusal, add_special_tokens=False)["input_ids"])
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
            max_new_tokens: default: the strategy's depth. strategy: in place of the guard's.
            sampling: temperature, top_k, top_p, see `Sampling`. Temperature 0 is greedy, except in rounds with several
                candidates (`Strategy.temperature`).

        Raises:
            GuardError: neither prompts nor input_ids, or both; a number out of range; a prompt that leaves no room.
        """
        if isinstance(prompts, str) or (prompts is None) == (input_ids is None):
            raise GuardError("prompts: expected a list of prompts, or input_ids in their place")
        tokens = [list(ids) for ids in input_ids or []] if prompts is None else encode(self.tokenizer, prompts)
        questions = [None] * len(tokens) if prompts is None else prompts
        jobs = [(ids, seed, question) for ids, question in zip(tokens, questions, strict=True)]
        return self._run(jobs, Sampling(**sampling), strategy or self.default, max_new_tokens, progress)

    def strategy(
        self, model: Any, input_ids: Tensor, logits_processor: Any = None, generation_config: Any = None, **call: Any
    ) -> Tensor:
        """Answer as a decoding strategy of transformers: ``model.generate(..., custom_generate=guard.strategy)``.

        Logits processors, sampling and length are the call's; its seed is torch's. ``guard.answers`` holds the
        certificates. Return token ids int64 [prompts, length], prompts included, padded on the right.
        """
        if model is not self.model:
            raise GuardError("model: expected the guard's own model")
        mask = call.get("attention_mask")
        valid = torch.ones_like(input_ids) if mask is None else mask
        sampled = bool(getattr(generation_config, "do_sample", False))
        sampling = Sampling(float(sampled), processors=_unpadded(logits_processor))
        seeds = torch.randint(2**62, (len(input_ids),)).tolist() if sampled else [0] * len(input_ids)
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, valid, strict=True)]
        limit = getattr(generation_config, "max_length", None)
        depth = None if limit is None else limit - input_ids.shape[1]
        jobs = [(ids, seed, None) for ids, seed in zip(prompts, seeds, strict=True)]
        answers = [input_ids.new_tensor(answer.tokens) for answer in self._run(jobs, sampling, self.default, depth)]
        pad = getattr(generation_config, "pad_token_id", None)
        pad = pad_token(self.tokenizer) if pad is None else pad
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=float(pad))
        return torch.cat([input_ids, padded], dim=1)

    def cache_bytes(self, prompt_tokens: int, strategy: Strategy | None = None) -> int:
        """Return the most bytes of keys and values during a search: N + 3K + 1 candidates at full depth."""
        chosen = strategy or self.default
        assert isinstance(self.backend, HFBackend)
        return (chosen.candidates + 3 * chosen.kept + 1) * self.backend.cache_bytes(prompt_tokens + chosen.depth)

    def search_of(self, strategy: Strategy, cost: Scorer | None = None) -> Search:
        """Return the search of a strategy with the guard's parts; with another `cost`, without a reward."""
        parts: dict[str, Any] = {"critic": self.options.critic, "budget": self.budget}
        parts |= {"cost": cost or self.cost, "reward": None if cost is not None else self.options.reward}
        return self.engine(strategy)(self.backend, self.tokenizer, strategy, **parts)

    def engine(self, strategy: Strategy) -> type[Search]:
        """Return the class that searches by a strategy."""
        return Search

    @own_defaults
    def _run(
        self, jobs: Sequence[_Job], sampling: Sampling, strategy: Strategy, depth: int | None, progress: bool = False
    ) -> list[GuardedAnswer]:
        strategy = strategy if depth is None else replace(strategy, depth=depth)
        room = self.backend.context - strategy.depth
        for number, (ids, _, _) in enumerate(jobs, 1):
            if not 0 < len(ids) <= room:
                raise GuardError(f"prompts: entry {number} has {len(ids)} tokens, expected 1 to {room}")
        options = self.options
        plain = Strategy.plain(block=strategy.block, depth=strategy.depth)
        searches = {path: self.search_of(plain) for path in ("plain", "steered", "refused")}
        searches["searched"] = searches["steered and searched"] = self.search_of(strategy)
        if not options.certify:
            searches["plain"] = self.search_of(replace(plain, block=plain.depth), cost=NO_SCORE)
        strength = options.strength if options.fired in ("steer", "both") else 0.0  # 0: the gate alone
        attached: Any = nullcontext()
        if self.model is not None and options.profile is not None:
            attached = steer(self.model, options.profile, strength, tokenizer=self.tokenizer)
        self.answers = []
        with attached as steering, nullcontext() if self.model is None else evaluating(self.model):
            for job in track(jobs, "answers", show=progress):
                self.answers.append(self._answer(job, sampling, searches, steering))
        return self.answers

    def _answer(
        self, job: _Job, sampling: Sampling, searches: dict[str, Search], steering: Steering | None
    ) -> GuardedAnswer:
        began = time.perf_counter()
        ids, seed, question = job
        root = self.backend.start(ids, 1, seed)
        fired = None if steering is None else bool(steering.fired.any())
        undecided = steering is not None and bool(steering.undecided.any())
        searching = self.options.fired in ("search", "both")
        path = _PATHS[self.options.fired] if fired else "plain"
        if fired is None or (undecided and searching):
            path = "searched"
        search, searched = searches[path], searches["searched"]
        run: dict[str, Any] = {"sampling": sampling, "question": question, "refusal": self.refusal}
        refuses = path == "refused"
        result = search.refuse(root, self.refusal, question) if refuses else search.run(root, **run)
        name, unchecked = search.strategy.name, search.cost is NO_SCORE
        if path == "plain" and not unchecked and searching and not result.best.z > 0:
            again = searched.run(root, **run)
            result = replace(again, sampled=result.sampled + again.sampled)
            path, name = "plain, then searched", f"{name}, then {searched.strategy.name}"
        elif path == "searched" and name == "plain" and not fired:
            path = "plain"
        scored = () if unchecked else ("z", "cost", "reward", "blocks", "p_safe")
        about: dict[str, Any] = {part: getattr(result.best, part) for part in scored}
        about |= {"decision": "unchecked" if unchecked else "within" if result.best.z > 0 else "over", "strategy": name}
        about |= {"fired": fired, "undecided": undecided, "fallback": result.fallback, "retries": result.retries}
        certificate = Certificate(**vars(self.budget), candidates=result.sampled, **about)
        text = self.tokenizer.decode(result.best.tokens, skip_special_tokens=True)
        return GuardedAnswer(text, list(result.best.tokens), certificate, time.perf_counter() - began, path)


def with_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Return the tokens with the end token, if the tokenizer has one."""
    return [*tokens, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]


def _unpadded(processors: Any) -> Any:
    """Return transformers' processors for prompts without padding: drop the padded lengths that some of them hold."""
    processors = copy.deepcopy(processors) or None
    for processor in processors or ():
        if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
            processor.prompt_ignore_length = None
    return processors

"""Attach profiles to a loaded HuggingFace model, in place, removable.

A pre-hook works out the step: which rows, whose, edited by which profile, and which row decides. Each steered or
sensing decoder layer then calls the ops: a fused layer at its seam, any other in a hook on its output. Gates decide at
the prompt's last valid token and are latched with the KV cache; rows that are not steered keep their bits.

The pre-hook stands before the whole model where that only hands its arguments on to the backbone, so that a compiled
model is one graph with all of this outside; otherwise, and where the backbone is called by itself, before the backbone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf import caches
from steerfast.hf import latch as latches
from steerfast.hf.fused import Settled, is_fused, settle, steer_layer
from steerfast.hf.latch import Latch
from steerfast.hf.packed import INHERIT, PackedSteps, forget_manager, is_paged, steered_manager, steps_of
from steerfast.hf.structure import STEERED_MARK, find_decoder, hands_on, identify
from steerfast.kernels.contract import GateOperands, Kinds, Operands
from steerfast.kernels.edits import torch_scales
from steerfast.kernels.gate import gate_unchecked_, mean_gate_unchecked_
from steerfast.kernels.steer import steer_torch_, steer_unchecked_
from steerfast.profile import Gate, SteeringProfile
from steerfast.runtime.bank import Bank, Deciding, LayerBank, kinds_of
from steerfast.runtime.roster import check_packed
from steerfast.runtime.slots import ProfileSlots
from steerfast.runtime.tables import UNSTEERED, Rows, answer_rows, mean_rows, prompt_rows, response_rows

__all__ = ["GENERATING", "Steering", "steer"]

GENERATING = ("generate", "generate_batch", "init_continuous_batching")
"""Methods of models that `Steering.call` stands before."""

_MOST_BUFFERS = 512  # row tables of the batch shapes seen so far; each is cheap to make again


@dataclass(frozen=True, eq=False)
class _Prompt:
    """What `generate` was called with: number of prompts, padded length (what is cached already included), and its own
    2-d attention mask if any.
    """

    count: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class _Prefill:
    """A step that holds prompt tokens of sequences whose gate decides after layers that it steers.

    given: the arguments of the backbone, the cache as it was before the step. lengths: of the layers of a cache that
    is written in place, and has to be brought back to that. valid, prompt_columns: as `prompt_rows` takes them.
    ahead: which sequences are such.
    """

    given: dict[str, Any]
    lengths: list[int] | None
    valid: Tensor
    prompt_columns: int
    ahead: tuple[bool, ...]


@dataclass(frozen=True)
class _Plan:
    """Who steers each sequence of a batch: its slot (-1: nobody) and strength; and what follows from the profiles.

    answer_rows: how many rows of each sequence's answer are edited, as in `steerfast.runtime.tables.answer_rows`.
    gates: per layer, the slots whose gates decide there. means: the layers where one of them reads a mean.
    steered: the layers where some sequence is edited.
    owner: whose decisions a cache must hold for them to count.
    profiles: of each sequence, None: nobody's; empty in packed steps, whose requests come and go.
    """

    slots: tuple[int, ...]
    strengths: tuple[float, ...]
    answer_rows: tuple[int, ...]
    gates: dict[int, frozenset[int]]
    means: frozenset[int]
    steered: frozenset[int]
    kinds: Kinds
    by_token: bool
    owner: str
    profiles: tuple[SteeringProfile | None, ...] = ()


def steer(
    model: nn.Module, profile: SteeringProfile | None, strength: float = 1.0, *, tokenizer: Any = None
) -> Steering:
    """Steer `model` with `profile` until the returned handle is left or detached.

    Use it as a context manager, or keep the handle and call `Steering.detach`. While it is attached,
    ``model.generate`` also takes ``steering`` and ``steering_strength``, see `Steering.assigned`.

    Args:
        model: any HuggingFace decoder-only model; it is changed in place and restored exactly. Where its decoder
            layers are fused (`steerfast.patch`), the edit rides along with their residual add and norm.
        profile: guidance made for this model; None: only what a call asks for.
        strength: multiplies the profile's own strengths; can be changed while attached.
        tokenizer: where given, it is checked against the one the profile was made with.

    Raises:
        ProfileError: the profile belongs to another model, or steers no layer.
        ArchitectureError: no decoder layers found.
        SteerfastError: the model is steered already.
    """
    return Steering(model, profile, strength, tokenizer=tokenizer)


class Steering:
    """Profiles attached to a model. Made by `steer`."""

    def __init__(
        self, model: nn.Module, profile: SteeringProfile | None, strength: float = 1.0, *, tokenizer: Any = None
    ) -> None:
        decoder = find_decoder(model)
        self._identity = identify(model, tokenizer)
        self._decoder = decoder
        self._slots = ProfileSlots(self._identity, next(decoder.backbone.parameters()).device)
        self._buffers: dict[tuple[Any, ...], Any] = {}
        self._undo: list[Callable[[], Any]] = []
        self._layers: set[int] = set()
        self._plan: _Plan | None = None
        self._contexts: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
        self.managers: weakref.WeakSet[Any] = weakref.WeakSet()  # of continuous batching, whose requests are steered
        self.last_requests: list[Any] = []  # that were added together
        self.packed: PackedSteps | None = None  # of the manager that made the last step
        self._latch: Latch | None = None
        self._prompt: _Prompt | None = None
        self._prompts: int | None = None
        self._rows: dict[torch.device, Rows] = {}
        self._deciding = False
        self._held = 0  # tokens in the cache after this step
        self._prefill: _Prefill | None = None
        self._again = False  # while a second pass runs
        # While the whole model runs a step that was worked out before it: that, and the tokens and cache of its call.
        self._begun = False
        self._called_with: tuple[Any, Any] = (None, None)
        self._row_values: dict[torch.device, Tensor] = {}
        self._strengths: dict[torch.device, Tensor] = {}
        self._decides: Deciding | None = None  # or the same, each of its tensors layer by layer
        self._sums: Tensor | None = None  # [layers, requests], of packed steps: what was read of means before
        # Operands of steps that decide nothing, by layer and device, and the plan, decisions and rows they stand for:
        # these stay the same from one answer token to the next, and making operands takes longer than the edit.
        self._known: dict[tuple[int, torch.device], Operands] = {}
        self._known_of: tuple[Any, Any, Any] = (None, None, None)
        self._static: dict[tuple[int, torch.device], Settled] = {}  # by number of rows
        self._additions: Settled | None = None  # all that a compiled model reads in such a step, where that can be
        # What the last step of answer tokens was made for, and how many tokens the cache holds when its rows change;
        # None where another kind of step came last.
        self._steady: tuple[Any, float] | None = None
        self._columns: list[tuple[Tensor, Tensor]] | None = None  # the latch, layer by layer
        self._profile = profile
        self._slot_of_own = UNSTEERED
        self.model = model
        self._strength = _finite("strength", strength)
        if profile is not None:
            self._slots.check("profile", profile)
        decoder.refuse_if_steered()
        caches.argument(decoder.backbone)  # a decision has to have where to stay
        self._attach()

    # -- what users read and set -------------------------------------------------------------------------------------

    @property
    def profile(self) -> SteeringProfile | None:
        """The profile of calls that name none."""
        return self._profile

    @property
    def strength(self) -> float:
        """Multiplies the profile's strengths, from the next forward pass on, where a call names none of its own."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _finite("strength", value)

    @property
    def fired(self) -> Tensor:
        """bool [sequences] of the last batch, on the CPU: did any of the profile's gates open?

        With a ``token`` gate: at any token so far. Under beam search or several returned sequences, one entry per
        prompt. True where a gate's score was NaN, False where nobody steers the sequence.
        """
        return self._by_prompt((self._last().values.cpu() >= 0.5).any(dim=0))

    @property
    def undecided(self) -> Tensor:
        """bool [sequences] of the last batch, on the CPU: did no gate open, and a score lie in its gate's band
        (`SteeringProfile.abstain`)? Such a sequence is not steered, by a hard gate.

        Entries as in `fired`, and never True where that is. False where the profile has no band, and where nobody
        steers the sequence.

        Raises:
            SteerfastError: the last step was one of a manager of continuous batching; compare the scores of `decision`
                with the profile's band.
        """
        scores, profiles = self._last().scores.cpu(), self._planned().profiles
        if len(profiles) != scores.shape[1]:
            raise SteerfastError(
                "undecided: expected a batch as the last step, got one of continuous batching (decision() has the "
                "scores of its requests)"
            )
        flags = [one is not None and bool(one.undecided(scores[:, n])) for n, one in enumerate(profiles)]
        return self._by_prompt(torch.tensor(flags, device="cpu")) & ~self.fired

    def _by_prompt(self, flags: Tensor) -> Tensor:
        """Of each prompt, whether one of its sequences has the flag."""
        if self._prompts and len(flags) % self._prompts == 0:
            return flags.view(self._prompts, -1).any(dim=1)
        return flags

    @property
    def scores(self) -> Tensor:
        """float32 [gates, sequences] of the last batch, on the CPU: what each gate layer's decision was taken from.

        With a ``token`` gate: the highest so far. Gate layers ascend, as in `SteeringProfile.gate_layers`; -inf where
        the layer holds no gate of the sequence's profile.
        """
        return self._last().scores.cpu()[sorted(self._planned().gates) or [0]]

    @property
    def nan_scores(self) -> int:
        """Sequences of the last batch with a NaN score; they count as fired."""
        return int(self.scores.isnan().any(dim=0).sum())

    def decision(self, request_id: str) -> tuple[bool, Tensor] | None:
        """What was decided for a request of continuous batching, the last 65,536 that ended included.

        Returns:
            Whether a gate opened, and the scores float32 [gates] on the CPU, as in `scores`; None where nothing is
            decided yet, or known any more.
        """
        decided = None if self.packed is None else self.packed.requests.decision(request_id)
        if decided is None:
            return None
        values, scores = decided
        return bool((values >= 0.5).any()), scores[scores != float("-inf")]

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def detach(self) -> None:
        """Take the steering off; the model is as it was. Safe to call twice."""
        forget_manager(self)
        while self._undo:
            self._undo.pop()()
        self._layers.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no managers: they and their threads stay with the original."""
        return {name: value for name, value in vars(self).items() if name not in ("managers", "packed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, managers=weakref.WeakSet(), packed=None)

    def __enter__(self) -> Steering:
        if not self.attached:
            raise SteerfastError("steering: it was detached; call steer() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @contextmanager
    def assigned(
        self,
        steering: SteeringProfile | Sequence[SteeringProfile | None] | None,
        strength: float | Sequence[float] | None = None,
    ) -> Iterator[None]:
        """Within the context, steer the sequences of a batch each by a profile of its own.

        Args:
            steering: one profile for all of them, or a list with one per sequence; None: not steered. Under beam
                search or several returned sequences, one per prompt.
            strength: multiplies the profiles' strengths, one for all or one per sequence; default: `strength`.

        Raises:
            ProfileError: a profile belongs to another model or steers no layer.
            SteerfastError: lists of different lengths, more than 16 profiles, a strength that is not finite, or token
                gates together with others.
        """
        self._contexts.append(self._assign(steering, strength))
        try:
            yield
        finally:
            self._contexts.pop()

    # -- profiles and slots ------------------------------------------------------------------------------------------

    @property
    def own(self) -> tuple[int, float]:
        """Slot and strength of what is steered by nothing else."""
        return self._slot_of_own, self._strength

    def profile_at(self, slot: int) -> SteeringProfile:
        """The profile in a slot that steers something."""
        return self._slots.at(slot)

    def bank(self, device: torch.device) -> Bank:
        """All profiles that are loaded, on `device`."""
        return self._slots.bank(device)

    def of_requests(self, count: int, steering: Any = INHERIT, strength: Any = None) -> list[tuple[int, float]]:
        """Slots and strengths of `count` requests of continuous batching; errors as `assigned`."""
        if steering is INHERIT and strength is None:
            slots, strengths = self._assigned_now()
        else:
            slots, strengths = self._assign(self.profile if steering is INHERIT else steering, strength)
        if len(slots) not in (1, count):
            raise SteerfastError(f"steering: expected {count} entries, one per request, got {len(slots)}")
        for slot in {*slots} - {UNSTEERED}:
            check_packed("steering", self._slots.at(slot))
        return list(zip(slots, strengths, strict=True)) * (count // len(slots))

    def _assigned_now(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return self._contexts[-1] if self._contexts else ((self._slot_of_own,), (self._strength,))

    def _assign(
        self,
        steering: SteeringProfile | Sequence[SteeringProfile | None] | None,
        strength: float | Sequence[float] | None,
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Slots and strengths, one per prompt, or one for all."""
        profiles = (steering,) if steering is None or isinstance(steering, SteeringProfile) else tuple(steering)
        strengths = (strength,) if strength is None or isinstance(strength, (int, float)) else tuple(strength)
        numbers = [
            _finite(f"steering_strength[{i}]", self._strength if one is None else one)
            for i, one in enumerate(strengths)
        ]
        for name, given in (("steering", profiles), ("steering_strength", numbers)):
            if not given:
                raise SteerfastError(f"{name}: expected one entry per sequence, got an empty list")
        if len(profiles) != len(numbers) and 1 not in (len(profiles), len(numbers)):
            raise SteerfastError(
                f"steering_strength: expected {len(profiles)} numbers, one per profile, got {len(numbers)}"
            )
        each = self._take(profiles)
        length = max(len(each), len(numbers))
        return tuple(each * (length // len(each))), tuple(numbers * (length // len(numbers)))

    def _take(self, profiles: Sequence[SteeringProfile | None]) -> list[int]:
        """The slots of these profiles, whose layers are attached."""
        held = {self._slot_of_own, *(slot for slots, _ in self._contexts for slot in slots)}
        held.update(*(manager.steerfast_slots for manager in self.managers))
        slots = self._slots.take(profiles, held)
        for layer in sorted(self._slots.layers - self._layers):
            self._attach_layer(layer)
        return slots

    def _plan_for(self, count: int) -> _Plan:
        """The plan of a step of `count` sequences; prompts that became several sequences lie one after the other."""
        slots, strengths = self._assigned_now()
        if len(slots) > 1 and (count % len(slots) or (self._prompts or len(slots)) != len(slots)):
            raise SteerfastError(
                f"steering: expected {self._prompts or count} entries, one per sequence, got {len(slots)}"
            )
        key = ("plan", slots, strengths, count, *map(self._slots.name, slots))
        plan: _Plan = self._buffer(key, torch.device("cpu"), lambda _: self._make_plan(slots, strengths, count))
        return plan

    def _make_plan(self, slots: tuple[int, ...], strengths: tuple[float, ...], count: int) -> _Plan:
        profiles = {slot: self._slots.at(slot) for slot in set(slots) if slot >= 0}
        gates: dict[int, frozenset[int]] = {}
        for slot, profile in profiles.items():
            for layer in profile.gate_layers:
                gates[layer] = gates.get(layer, frozenset()) | {slot}
        names = [self._slots.name(slot) for slot in slots]
        repeats = count // len(slots)
        return _Plan(
            slots=tuple(slot for slot in slots for _ in range(repeats)),
            strengths=tuple(strength for strength in strengths for _ in range(repeats)),
            answer_rows=tuple(
                answer_rows(profiles[slot].answer_tokens if slot >= 0 else None)
                for slot in slots
                for _ in range(repeats)
            ),
            gates=gates,
            means=frozenset(
                layer for one in profiles.values() if one.gate.pooling == "mean" for layer in one.gate_layers
            ),
            steered=frozenset(layer for profile in profiles.values() for layer in profile.steered_layers),
            kinds=max((kinds_of(profile) for profile in profiles.values()), default=Kinds.LATCHED_ADD),
            by_token=any(profile.gate.kind == "token" for profile in profiles.values()),
            owner=names[0] if len(set(names)) == 1 else "|".join(names),
            profiles=tuple(profiles.get(slot) for slot in slots for _ in range(repeats)),
        )

    def _planned(self) -> _Plan:
        self._last()
        assert self._plan is not None
        return self._plan

    # -- attaching ---------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        backbone = self._decoder.backbone
        try:
            setattr(backbone, STEERED_MARK, True)
            self._undo.append(functools.partial(delattr, backbone, STEERED_MARK))
            before, after = self._before, self._after
            if hands_on(self.model, backbone):
                pre = self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
                self._undo.append(pre.remove)
                post = self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)
                self._undo.append(post.remove)
            else:  # so that a compiled backbone is one graph without them
                before, after = self._before_uncompiled, self._after_uncompiled
            self._undo.append(backbone.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(backbone.register_forward_hook(after, with_kwargs=True).remove)
            if self.profile is not None:
                (self._slot_of_own,) = self._take([self.profile])
            if hasattr(self.model, "generate") and not hasattr(type(self.model), "steerfast_generates"):
                for name in GENERATING:
                    self._wrap(name)
        except BaseException:
            self.detach()
            raise

    def _wrap(self, name: str) -> None:
        """Put `call` before a method of the model."""
        method = getattr(self.model, name, None)
        if method is None:
            return
        own = vars(self.model).get(name)  # a wrapper of someone else's
        # No closure: deep copies and pickles of the model take this along and it becomes theirs.
        wrapped = functools.partial(self._call, name, method)
        functools.update_wrapper(wrapped, method, ("__module__", "__name__", "__qualname__", "__doc__"), ())
        setattr(self.model, name, wrapped)
        self._undo.append(functools.partial(_put_back, self.model, name, own))

    def _attach_layer(self, layer: int) -> None:
        self._layers.add(layer)
        module = self._decoder.layers[layer]
        if is_fused(module):
            steer_layer(module, self._operands)
            self._undo.append(functools.partial(steer_layer, module, None))
            return
        # First of the layer's hooks, so that others see the edited residual stream.
        hook = functools.partial(self._on_layer, layer)
        handle = module.register_forward_hook(hook, prepend=True)
        self._undo.append(handle.remove)

    def _call(self, name: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.call(name, method, args, kwargs)

    def call(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of the model's own methods `GENERATING`, knowing who steers what it generates.

        `steering` and `steering_strength` among `kwargs` are taken as `assigned` does.
        """
        if "steering" in kwargs or "steering_strength" in kwargs:
            steering = kwargs.pop("steering", self.profile)
            with self.assigned(steering, kwargs.pop("steering_strength", None)):
                return self.call(name, method, args, kwargs)
        if name == "generate":
            return self._generate(method, args, kwargs)
        if name == "generate_batch":
            return self._generate_batch(method, args, kwargs)
        return steered_manager(self, method, *args, **kwargs)

    def _generate_batch(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own `generate_batch`; its requests are then the sequences of the last batch."""
        inputs = args[0] if args else kwargs.get("inputs")
        if inputs:  # transformers logs errors of requests, and goes on
            self.of_requests(len(inputs))
        self.packed, self.last_requests = None, []
        try:
            return generate(*args, **kwargs)
        finally:
            if self.packed is not None and self.last_requests:
                closed = torch.tensor([[0.0], [float("-inf")]], device="cpu").expand(2, self._identity.num_layers)
                decided = [self.packed.requests.decision(name) for name in self.last_requests]
                values, scores = torch.stack([closed if one is None else one for one in decided], dim=2)
                self._prompts = len(decided)
                self._plan = self._plan_for(len(decided))
                self._latch = Latch(self._plan.owner, values, scores)

    def _generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own `generate`, knowing where the prompt ends."""
        around = self._prompt  # of a call that this one is part of
        prompt = args[0] if args else None
        for name in ("inputs_embeds", "input_ids", "inputs"):
            prompt = prompt if prompt is not None else kwargs.get(name)
        self._refuse_chunks(kwargs)
        if isinstance(prompt, Tensor) and prompt.dim() >= 2:
            count = len(prompt)
            if self._contexts and len(self._contexts[-1][0]) not in (1, count):
                raise SteerfastError(
                    f"steering: expected {count} entries, one per prompt, got {len(self._contexts[-1][0])}"
                )
            mask = kwargs.get("attention_mask")
            mask = mask if _is_flat(mask) else None
            # On top of a cache, the prompt may be the new tokens alone; the mask always covers all of them.
            length = (prompt if mask is None else mask).shape[1]
            self._prompt = _Prompt(count, length, mask)
        try:
            return generate(*args, **kwargs)
        finally:
            self._prompt = around
            self._forget_call()

    def _refuse_chunks(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if not chunk:
            return
        profiles = [self._slots.at(slot) for slot in self._assigned_now()[0] if slot >= 0]
        if any(profile.positions == "response" or profile.gate.kind == "prompt" for profile in profiles):
            raise SteerfastError(
                f"prefill_chunk_size: expected None, got {chunk}: a prompt gate and positions='response' need the "
                "prompt's last token, which is in the last chunk"
            )

    # -- one forward pass --------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begun = self._begin(module, args, kwargs)

    @torch.compiler.disable
    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        begun, (_, cache) = self._begun, self._called_with
        self._forget_call()
        if begun and output is not None:  # None: it failed
            self._keep(cache, output)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._begun and not torch.compiler.is_compiling():  # what was begun may have been interrupted since
            given = _given(module, args, kwargs)
            self._begun = all(
                now is then for now, then in zip((_tokens(given), caches.found(given)), self._called_with, strict=True)
            )
        if not self._begun and not self._again:
            self._begin_uncompiled(module, args, kwargs)
        if torch.compiler.is_compiling():
            settle(self._additions)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            settle(None)
        return output if self._begun or self._again else self._end(module, kwargs, output)

    _before_uncompiled = torch.compiler.disable(_before)
    _after_uncompiled = torch.compiler.disable(_after)

    def _forget_call(self) -> None:
        self._begun, self._called_with = False, (None, None)
        settle(None)

    def _asked(self, tokens: Tensor) -> Any:
        """What a step is made for, but of what its cache holds."""
        return tokens.shape[:2], self._assigned_now(), self._prompt, self._slots.changes

    def _goes_on(self, tokens: Tensor, cache: Any) -> bool:
        """Whether this is one more step like the last: as many tokens more of the same answers. All is known then, and
        working it out anew takes longer than all that steering adds to a compiled step.
        """
        if self._steady is None:
            return False
        (asked, until), latch = self._steady, self._last()
        if getattr(cache, "steerfast_latch", None) is not latch:
            return False
        if latch.values is not self._known_of[1] or asked != self._asked(tokens):  # its rows moved, or another asks
            return False
        held = self._held + tokens.shape[1]
        if held > until or latches.length(cache) != self._held:
            return False
        self._held = held
        return True

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Work out the step that calls `module`. False where it can only be done before the backbone: that is what a
        second pass calls again.
        """
        whole = module is not self._decoder.backbone
        given = _given(module, args, kwargs)
        tokens = _tokens(given)
        if tokens is None:
            raise ArchitectureError(f"model: {type(module).__name__} was called without input_ids or inputs_embeds")
        cache = caches.found(given)
        self._called_with = (tokens, cache) if whole else (None, None)
        if self._goes_on(tokens, cache):
            return True
        self._steady = None
        count, width = tokens.shape[:2]
        if is_paged(cache):
            self._begin_packed(steps_of(cache, self), width)
            return True
        prompt = self._prompt
        self._prompts = prompt.count if prompt is not None else None
        self._plan = plan = self._plan_for(count)
        past = latches.length(cache)
        self._held = past + width
        latch = latches.read(cache, plan.owner) if past else None
        if latch is not None and latch.values.shape[1] != count:
            raise SteerfastError(
                f"past_key_values: its gates were decided for {latch.values.shape[1]} sequences, got {count}"
            )
        if latch is None:  # a new prompt, or a cache filled without this steering: decide at this step's last token
            prompt_columns = width
        elif prompt is None:
            prompt_columns = width if width > 1 else 0  # several tokens at once are the prompt of another turn
        else:
            prompt_columns = prompt.length - past
        if prompt is not None and past < prompt.length:
            prompt_columns = min(width, prompt.length - past)
        if whole and prompt_columns > 0 and self._ahead(plan):
            return False
        self._deciding = prompt_columns > 0 or plan.by_token
        if self._deciding:
            latch = self._new_latch(plan, tokens.device) if latch is None else latch.copy()
        assert latch is not None  # where nothing is decided, something was
        if prompt_columns > 0:
            latch.prompt = past + prompt_columns
        device = tokens.device
        self._prefill = self._sums = alphas = None
        if prompt_columns > 0:
            mask = given.get("attention_mask")
            if prompt is not None and prompt.mask is not None and not _is_flat(mask):
                mask = _grown(prompt.mask, count, past + width)
            valid = self._valid_tokens(mask, count, width, past, device)
            self._prefill = self._second_pass(plan, given, valid, prompt_columns)
            rows, self._decides = self._prompt_tables(plan, valid, prompt_columns)
        else:
            rows, alphas = self._answer_tables(plan, width, past - latch.prompt, device)
        self._latch = latch
        self._set_rows(plan, rows.each_for_itself() if plan.by_token else rows, alphas=alphas)
        self._row_values.clear()
        if not self._deciding:
            ends = (latch.prompt + rows for rows in plan.answer_rows if latch.prompt + rows > past)
            self._steady = self._asked(tokens), min(ends, default=math.inf)
        return True

    # So that a compiled backbone's layers become one graph, whatever is decided here.
    _begin_uncompiled = torch.compiler.disable(_begin)

    def _begin_packed(self, steps: PackedSteps, width: int) -> None:
        """A step whose tables lie ready: rows of any requests."""
        requests = steps.requests
        self._prompts = self._prefill = None
        self._plan, self._latch, self._deciding = self.reach, steps.latch, steps.deciding
        self._decides, self._sums = requests.decides, requests.sums
        self._set_rows(self._plan, steps.rows(width), requests.tables.strength)
        self._row_values.clear()

    @property
    def reach(self) -> _Plan:
        """A plan of whatever the profiles that are loaded may do; another one where that has grown."""
        layers, deciding, kinds = frozenset(self._layers), frozenset(self._slots.gate_layers), self._slots.kinds
        gates: dict[int, frozenset[int]] = dict.fromkeys(deciding, frozenset())
        means = frozenset(self._slots.mean_layers)
        key = ("reach", layers, deciding, means, frozenset(self._slots.sensors), kinds)
        return self._buffer(
            key, torch.device("cpu"), lambda _: _Plan((), (), (), gates, means, layers, kinds, False, "")
        )

    def _set_rows(self, plan: _Plan, rows: Rows, strengths: Tensor | None = None, alphas: Tensor | None = None) -> None:
        """What the layers of this step read, on the device of its tokens; alphas: as `_answer_tables` made them."""
        device = rows.rows.device
        values = self._last().values
        known = self._known_of
        if known[0] is not plan or known[1] is not values or known[2] is not rows.rows:
            self._known, self._known_of, self._columns = {}, (plan, values, rows.rows), None
        self._rows = {device: rows}
        if strengths is None:
            strengths = self._strengths_of(plan, device)
        self._strengths = {device: strengths}
        self._additions = None
        if alphas is not None and not self._deciding and values.device == device:
            self._additions = settled = self._settled(len(rows.rows), device)
            settled.rows.copy_(rows.rows)
            each = values.repeat_interleave(len(rows.rows) // values.shape[1], dim=1)
            torch.mul(each[..., None], alphas, out=settled.scales)

    def _settled(self, count: int, device: torch.device) -> Settled:
        """Where a compiled model reads what it adds to so many rows. Not one of the buffers that may be let go: a CUDA
        graph whose inputs moved is recorded again.
        """
        if (count, device) not in self._static:
            with torch.inference_mode(False):
                rows = torch.zeros(count, 2, dtype=torch.int32, device=device)
                scales = torch.zeros(self._identity.num_layers, count, 1, device=device)
            self._static[count, device] = settled = Settled(rows, scales, self._slots.bank(device).vectors)
            for tensor in settled:
                torch._dynamo.mark_static_address(tensor)
        return self._static[count, device]

    def _valid_tokens(self, mask: Any, count: int, width: int, past: int, device: torch.device) -> Tensor:
        """See `_valid_tokens`; where no token is padding, one and the same tensor every time."""
        if mask is None or (_is_flat(mask) and bool(mask.all())):
            return self._all_valid(count, width, device)
        return _valid_tokens(mask, count, width, past, device)

    def _all_valid(self, count: int, width: int, device: torch.device) -> Tensor:
        return self._buffer(
            ("valid", count, width), device, lambda d: torch.ones(count, width, dtype=torch.bool, device=d)
        )

    def _prompt_tables(self, plan: _Plan, valid: Tensor, prompt_columns: int) -> tuple[Rows, Deciding]:
        """The rows of a step of prompt tokens, and which gates decide in it; sequences of a second pass are not steered
        before they have decided. Where no token is padding these are the same tables every time, and not 45 operations
        on small tensors.
        """
        waits = () if self._prefill is None else self._prefill.ahead

        def make(device: torch.device) -> tuple[Rows, Deciding]:
            slot = self._slot_of_each(plan, device)
            late = torch.tensor(
                [slot >= 0 and self._slots.at(slot).positions == "response" for slot in plan.slots], device=device
            )
            answer = self._per_sequence("answer rows", plan.answer_rows, torch.int32, device)
            gates = [self._slots.at(slot).gate if slot >= 0 else Gate() for slot in plan.slots]
            mean = torch.tensor([mean_rows(gate) for gate in gates], dtype=torch.int32, device=device)
            rows = prompt_rows(valid, prompt_columns, slot, late, answer, mean)
            if waits:
                waiting = torch.tensor(waits, device=device).repeat_interleave(valid.shape[1])
                rows.rows[:, 1] = torch.where(waiting, UNSTEERED, rows.rows[:, 1])
            decides = self._slots.bank(device).deciding(rows.deciding, slot)
            return rows, Deciding(*(tensor.unbind() for tensor in decides))  # type: ignore[arg-type]

        count, width = valid.shape
        if valid is not self._all_valid(count, width, valid.device):
            return make(valid.device)
        key = ("prompt", plan.slots, plan.owner, waits, count, width, prompt_columns)
        return self._buffer(key, valid.device, make)

    def _answer_tables(
        self, plan: _Plan, width: int, answered: int, device: torch.device
    ) -> tuple[Rows, Tensor | None]:
        """The rows of a step of answer tokens, of which so many came before: the same tables until an end is near. And
        float32 [layers, rows, 1] by which an open gate multiplies the vectors, where all edits are latched additions.
        """
        steered = tuple(min(max(rows - answered, 0), width) for rows in plan.answer_rows)
        adds = self._slots.kinds == Kinds.LATCHED_ADD

        def make(device: torch.device) -> tuple[Rows, Tensor | None]:
            each = self._per_sequence("answer rows", steered, torch.int32, device)
            rows = response_rows(self._slot_of_each(plan, device), width, each)
            if not adds or not is_fused(self._decoder.layers[0]):  # hooks would not read them
                return rows, None
            table, strengths = self._slots.bank(device).table, self._strengths_of(plan, device)
            is_open = torch.ones(len(table), len(strengths), 1, device=device)
            return rows, torch_scales(rows.rows, is_open, strengths, table)

        key = ("answer", plan.slots, plan.strengths, plan.owner, width, steered, adds)
        tables: tuple[Rows, Tensor | None] = self._buffer(key, device, make)
        return tables

    def _ahead(self, plan: _Plan) -> tuple[bool, ...]:
        """Which sequences are steered before the layer that decides; empty: none."""
        ahead = tuple(slot >= 0 and self._slots.at(slot).second_pass for slot in plan.slots)
        return ahead if any(ahead) else ()

    def _second_pass(self, plan: _Plan, given: dict[str, Any], valid: Tensor, prompt_columns: int) -> _Prefill | None:
        """What a second pass over this step would need, None where no sequence can ask for one."""
        ahead = self._ahead(plan)
        if not ahead:
            return None
        cache = caches.found(given)
        lengths = None
        if cache is not None and caches.splits(cache):
            given = {name: copy.deepcopy(value) if value is cache else value for name, value in given.items()}
        elif cache is not None and caches.rewinds(cache, valid.shape[1]):
            lengths = [int(layer.get_seq_length()) for layer in cache.layers]
        elif cache is not None:
            raise SteerfastError(
                f"past_key_values: layers before the sensor are steered in a second pass over the prompt, which needs "
                f"a DynamicCache, or a StaticCache whose windows do not slide on, got {type(cache).__name__}"
            )
        return _Prefill(given, lengths, valid, prompt_columns, ahead)

    def _read_again(self, module: nn.Module, output: Any) -> Any:
        """Pass the prompts that fired through the model once more, every layer knowing the decision from the start."""
        prefill, plan, latch, first_rows = self._prefill, self._planned(), self._last(), next(iter(self._rows.values()))
        self._prefill = None
        if prefill is None:
            return output
        fired = (latch.values != 0).any(dim=0).tolist()
        chosen = tuple(n for n, waits in enumerate(prefill.ahead) if waits and fired[n])
        if not chosen:
            return output
        given, valid, count = prefill.given, prefill.valid, len(plan.slots)
        index = torch.tensor(chosen, device=valid.device)
        self._again, self._deciding = True, False
        if prefill.lengths is None:
            given = {name: caches.select(name, value, index, count) for name, value in given.items()}
            valid = valid[index]
            self._plan = replace(
                plan,
                slots=tuple(plan.slots[n] for n in chosen),
                strengths=tuple(plan.strengths[n] for n in chosen),
                answer_rows=tuple(plan.answer_rows[n] for n in chosen),
            )
            self._latch = latch.copy()
            self._latch.select(index)
        else:  # its sequences cannot be told apart: all of them once more, and those that did not fire stay the same
            caches.rewind(caches.found(given), prefill.lengths)
        self._set_rows(self._planned(), self._prompt_tables(self._planned(), valid, prefill.prompt_columns)[0])
        try:
            second = module(**given)
        finally:
            self._again, self._plan, self._latch = False, plan, latch
            self._set_rows(plan, first_rows)
        return second if prefill.lengths is not None else caches.merged(output, second, index, count)

    @torch.compiler.disable
    def _end(self, module: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        output = self._read_again(module, output)
        self._keep(caches.found(kwargs), output)
        return output

    def _keep(self, cache: Any, output: Any) -> None:
        """Leave the decisions with the cache of the call."""
        if not hasattr(cache, "get_seq_length"):  # made in the pass, or given by position
            parts = (
                output if isinstance(output, tuple) else (caches.found(output) if isinstance(output, dict) else None,)
            )
            cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if cache is not None:
            latches.attach(cache, self._last(), self._held)

    def _on_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.dim() != 3 or hidden.shape[-1] != self._decoder.hidden_size:
            raise ArchitectureError(
                f"model: layer {layer} ({type(module).__name__}) gave {list(hidden.shape)}, "
                f"expected [sequences, tokens, {self._decoder.hidden_size}]"
            )
        # Autograd may need the layer's own output unchanged, and only the torch implementation has a gradient.
        differentiable = torch.is_grad_enabled() and hidden.requires_grad
        edited = hidden.clone() if differentiable or not hidden.is_contiguous() else hidden
        x = edited.view(-1, hidden.shape[-1])
        operands = self._operands(layer, x.detach(), None)
        if operands is not None:
            (steer_torch_ if differentiable else steer_unchecked_)(x, None, operands)
        if edited is hidden:
            return None
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def _operands(self, layer: int, x: Tensor, residual: Tensor | None) -> Operands | None:
        """Decide this layer's gates from x (+ residual) [..., H]; how the N·T rows are edited, None: not at all."""
        device, compiling = x.device, torch.compiler.is_compiling()
        knowable = not self._deciding and not compiling  # a graph must not leave its tensors here
        if knowable and (known := self._known.get((layer, device))) is not None:
            return known
        plan = self._planned()
        # A compiled model asks about the layers of all profiles that are loaded, so that it need not be compiled again
        # for another batch of them; slots without a part in a layer do nothing there.
        decides = self._deciding and layer in (self._slots.gate_layers if compiling else plan.gates)
        steered = layer in (self._layers if compiling else plan.steered)
        if not decides and not steered:
            return None
        if device not in self._rows:
            self._rows[device] = next(iter(self._rows.values())).to(device)
        rows = self._rows[device]
        bank = self._slots.bank(device).layer(layer)
        if decides:
            decide = self._decide_rows if plan.by_token else self._decide_prompts
            decide(layer, x.flatten(0, -2), None if residual is None else residual.flatten(0, -2), rows, bank)
        if not steered:
            return None
        strength = self._strengths.get(device)
        if strength is None:
            strength = self._strengths[device] = next(iter(self._strengths.values())).to(device)
        if plan.by_token:
            values = self._values_of_rows(rows)
            strength = strength.repeat_interleave(len(rows.rows) // len(strength), dim=0)
        else:
            values = self._latched(layer)[0]
            values = values if values.device == device else values.to(device)
        kinds = self._slots.kinds if compiling else plan.kinds
        operands = Operands(rows.rows, values, strength, bank.vectors, bank.directions, bank.table, int(kinds))
        if knowable:
            self._known[layer, device] = operands
        return operands

    def _decide_prompts(self, layer: int, x: Tensor, residual: Tensor | None, rows: Rows, bank: LayerBank) -> None:
        """Each sequence's deciding row, or the mean up to it, sets its latched value, here and, for a sensor, in all
        other layers; sequences without a prompt token in this step keep theirs.
        """
        assert self._decides is not None
        latch, (values, scores) = self._last(), self._latched(layer)
        row, closes, senses = (by_layer[layer] for by_layer in self._decides)
        home, away = latch.values.device, x.device
        if home != away:
            values, scores, row, closes = values.to(away), scores.to(away), row.to(away), closes.to(away)
        gates = GateOperands(rows.slot, bank.directions, bank.table, scores, values)
        gate_unchecked_(x, residual, row, gates)
        means = self._slots.mean_layers if torch.compiler.is_compiling() else self._planned().means
        if layer in means:
            assert rows.member is not None
            assert rows.total is not None
            kept = None if self._sums is None else self._sums[layer, :, None]
            sums = torch.zeros_like(values, dtype=torch.float64) if kept is None else kept.to(away)
            mean_gate_unchecked_(x, residual, rows.member, rows.total, closes, sums, gates)
            if kept is not None and home != away:
                kept.copy_(sums)
        if home != away:
            latch.scores[layer], latch.values[layer] = scores[:, 0].to(home), values[:, 0].to(home)
        if layer in self._slots.sensors:
            latch.values.copy_(torch.where(senses.to(home), latch.values[layer], latch.values))

    def _latched(self, layer: int) -> tuple[Tensor, Tensor]:
        """Values and scores [N, 1] of a layer, views of the latch, all made at once: 35 us for 30 layers, not 129."""
        latch = self._last()
        if torch.compiler.is_compiling():
            return latch.values[layer, :, None], latch.scores[layer, :, None]
        if self._columns is None:
            both = (latch.values, latch.scores)
            self._columns = list(zip(*(tensor.unsqueeze(2).unbind() for tensor in both), strict=True))
        return self._columns[layer]

    def _decide_rows(self, layer: int, x: Tensor, residual: Tensor | None, rows: Rows, bank: LayerBank) -> None:
        """Each row decides for itself, in this step only; the latch keeps the highest of its sequence for `fired`."""
        plan, latch = self._planned(), self._last()
        width = len(x) // len(plan.slots)
        here = tuple(slot in plan.gates[layer] for slot in plan.slots)
        mask = self._per_sequence("here", here, torch.bool, x.device).repeat_interleave(width)
        deciding = torch.where(mask, rows.deciding, UNSTEERED)
        scores = x.new_full((len(x), 1), float("-inf"), dtype=torch.float32)
        values = self._values_of_rows(rows)
        before = torch.zeros_like(values)
        gates = GateOperands(rows.slot, bank.directions, bank.table, scores, before)
        gate_unchecked_(x, residual, deciding, gates)
        values.copy_(torch.where(deciding[:, None] >= 0, before, values))
        for old, new in ((latch.scores[layer], scores), (latch.values[layer], before)):
            old.copy_(torch.maximum(old, new.view(len(plan.slots), width).amax(dim=1).to(old.device)))

    # -- small things ------------------------------------------------------------------------------------------------

    def _new_latch(self, plan: _Plan, device: torch.device) -> Latch:
        """Closed gates; those of profiles without gates are open."""

        def make(device: torch.device) -> Latch:
            is_open = [slot >= 0 and self._slots.at(slot).gate.kind == "always" for slot in plan.slots]
            values = torch.tensor(is_open, dtype=torch.float32, device=device).repeat(self._identity.num_layers, 1)
            return Latch(plan.owner, values, torch.full_like(values, float("-inf")))

        closed: Latch = self._buffer(("latch", plan.slots, plan.owner), device, make)
        with torch.inference_mode(False):
            return closed.copy()

    def _values_of_rows(self, rows: Rows) -> Tensor:
        """Gate values [N·T, 1] of this step's rows, for token gates: what a sensor decided for the layers after it."""
        device = rows.rows.device
        if device not in self._row_values:
            known = next(iter(self._row_values.values()), None)
            fresh = torch.zeros(len(rows.rows), 1, dtype=torch.float32, device=device)
            self._row_values[device] = fresh if known is None else known.to(device)
        return self._row_values[device]

    def _slot_of_each(self, plan: _Plan, device: torch.device) -> Tensor:
        return self._per_sequence("slot", plan.slots, torch.int32, device)

    def _strengths_of(self, plan: _Plan, device: torch.device) -> Tensor:
        return self._per_sequence("strength", plan.strengths, torch.float32, device).view(-1, 1)

    def _per_sequence(self, name: str, values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values as a tensor [n], made once."""
        return self._buffer((name, values), device, lambda d: torch.tensor(values, dtype=dtype, device=d))

    def _buffer(self, key: tuple[Any, ...], device: torch.device, make: Callable[[torch.device], Any]) -> Any:
        full = (*key, device)
        if full not in self._buffers:
            if len(self._buffers) > _MOST_BUFFERS:
                self._buffers.clear()
            with torch.inference_mode(False):  # so that they also serve a caller outside inference mode
                self._buffers[full] = make(device)
        return self._buffers[full]

    def _last(self) -> Latch:
        if self._latch is None:
            raise SteerfastError("steering: no batch has run through the model yet")
        return self._latch


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    return {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}  # type: ignore[arg-type]


def _tokens(given: dict[str, Any]) -> Any:
    """The tokens, or their embeddings, among a model's arguments."""
    ids = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


@functools.cache
def _parameters(kind: Any) -> list[str]:
    """Names of the arguments of the forward of a module's class."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def _valid_tokens(mask: Any, count: int, width: int, past: int, device: torch.device) -> Tensor:
    """bool [N, T]: the tokens of this step that are not padding, from whatever form of mask the model was given."""
    if isinstance(mask, dict):  # one mask per attention kind; padding is the same in all of them
        mask = next(iter(mask.values()), None)
    if mask is None:
        return torch.ones(count, width, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ArchitectureError(f"attention_mask: expected a 2-d or 4-d tensor, got {type(mask).__name__}")
    if mask.dim() == 2:
        window = mask[:, past : past + width] if mask.shape[1] >= past + width else mask[:, -width:]
        return (window != 0).expand(count, width).to(device)
    # 4-d [N, 1, T, keys], boolean or added to the logits: a token is valid where it may attend to itself.
    own = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :width]
    return (own if own.dtype == torch.bool else own == 0).expand(count, width).to(device)


def _grown(mask: Tensor, count: int, length: int) -> Tensor:
    """A prompt's 2-d mask for `count` rows (beams repeat each prompt) and `length` tokens (answers are valid)."""
    mask = mask.repeat_interleave(count // len(mask), dim=0)
    return torch.nn.functional.pad(mask, (0, max(0, length - mask.shape[1])), value=1)


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _put_back(owner: object, name: str, value: Any) -> None:
    delattr(owner, name)
    if value is not None:
        setattr(owner, name, value)


def _finite(name: str, strength: float) -> float:
    if not math.isfinite(strength):
        raise SteerfastError(f"{name}: expected a finite number, got {strength}")
    return float(strength)

"""Attach profiles to a loaded HuggingFace model, in place, removable.

Gates decide at the prompt's last valid token and are latched with the KV cache; rows that are not steered keep their
bits. `steerfast.hf.step` makes the step of each forward pass, `steerfast.hf.hooks` brings it to the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf import caches
from steerfast.hf.calls import SteeredCalls
from steerfast.hf.compat import CACHES, check
from steerfast.hf.hooks import StepHooks
from steerfast.hf.latch import Latch
from steerfast.hf.packed import PackedRuns, forget_manager
from steerfast.hf.step import Stepper
from steerfast.hf.structure import Decoder, find_decoder, identify
from steerfast.profile import ProfileStack, SteeringProfile
from steerfast.profile.checks import is_count
from steerfast.profile.stack import Given, accepted, as_stack, chosen
from steerfast.runtime.batch import BatchRoster, Plan
from steerfast.runtime.slots import ProfileSlots
from steerfast.runtime.span import Thought
from steerfast.text.turns import thought_markers


def steer(
    model: nn.Module,
    profile: Given | None,
    strength: float = 1.0,
    *,
    tokenizer: Any = None,
    action: str = "steer",
    accept_model: bool = False,
    thinking: str = "count",
) -> Steering:
    """Steer `model` with `profile` until the returned handle is left or detached.

    Use it as a context manager, or keep the handle and call `Steering.detach`. While it is attached,
    ``model.generate`` also takes ``steering`` and ``steering_strength``, see `Steering.assigned`.

    Args:
        model: any HuggingFace decoder-only model; it is changed in place and restored exactly. Where its decoder
            layers are fused (`steerfast.patch`), the edit is part of their residual add and norm.
        profile: guidance made for this model: a profile, its file or hub repository, or a list of up to 4 of these,
            a stack (`SteeringProfile.from_pretrained` says how names are read). None: steer only the calls that name a
            profile.
        strength: multiplies the profile's own strengths; can be changed while attached.
        tokenizer: where given, it is checked against the tokenizer that the profile was made with.
        action: what happens when a gate fires: ``steer``, or ``observe``: gates decide and `Steering.fired` tells,
            and no row is edited, whatever strength is given.
        accept_model: steer a model of the same shape that the profile was not made for. The mismatch is logged, and
            kept in ``fitted["accepted"]`` of `Steering.profile` (`SteeringProfile.for_model`).
        thinking: of reasoning models: ``count``: a thought is part of the answer. ``skip``: edits, and
            `SteeringProfile.answer_tokens`, begin where it ends, as the chat template of `tokenizer` ends it; a thought
            without an end, and the answer of a model that does not think, are not edited.

    Raises:
        ProfileError: the profile cannot be read, belongs to another model, or steers no layer; or, with thinking
            ``skip``, it edits prompts, or no end of a thought is known.
        ArchitectureError: no decoder layers found, or a model in float64.
        SteerfastError: the model is steered already, or the action or thinking is another.
    """
    if action not in ("steer", "observe"):
        raise SteerfastError(f"action: expected 'steer' or 'observe', got {action!r}")
    thought = _thought(thinking, tokenizer)
    decoder, identity = find_decoder(model), identify(model, tokenizer)
    slots = ProfileSlots(identity, next(decoder.backbone.parameters()).device)
    given = chosen(profile)
    if given is not None and accept_model:
        given = accepted(given, identity)
    roster = BatchRoster(slots, strength, observe=action == "observe", thought=thought)
    for one in as_stack(given):
        slots.check("profile", one)
    return Steering(model, decoder, roster, given)


class Steering:
    """Profiles attached to a model. Made by `steer`."""

    def __init__(
        self, model: nn.Module, decoder: Decoder, roster: BatchRoster, given: SteeringProfile | ProfileStack | None
    ) -> None:
        self.model = model
        self._given = given  # its band is lowered only at thresholds below it
        self._roster = roster
        self._packed = PackedRuns(model, roster)
        self._stepper = Stepper(decoder, roster, self._packed)
        self._hooks = StepHooks(decoder, self._stepper)
        self._calls = SteeredCalls(model, self._stepper, self._hooks)
        roster.attach, roster.held = self._hooks.attach_layers, self._packed.held
        decoder.refuse_if_steered()
        if getattr(model, "dtype", None) == torch.float64:
            raise ArchitectureError("model: expected float32, bfloat16 or float16, got float64 (model.float())")
        caches.argument(decoder.backbone)  # refuses a model without a cache for decisions
        check(CACHES)
        try:
            self._hooks.attach(model)
            if given is not None:
                roster.adopt(given)
            if hasattr(model, "generate") and not hasattr(type(model), "steerfast_generates"):
                self._calls.wrap(self._hooks.undo)
        except BaseException:
            self.detach()
            raise

    # -- profiles and strengths --------------------------------------------------------------------------------------

    @property
    def profile(self) -> SteeringProfile | ProfileStack | None:
        """The profile, or the stack, of calls that name none."""
        return self._roster.profile

    @property
    def strength(self) -> float:
        """Multiplies the profile's strengths from the next forward pass on, where a call names no strength."""
        return self._roster.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._roster.strength = value

    @property
    def threshold(self) -> str | None:
        """The name of the threshold in use (`SteeringProfile.point`), from the next call on; None: it has no name.

        Raises:
            ProfileError: `profile` has no threshold of the name that is set.
            SteerfastError: there is no `profile`; a call can name one as ``steering=profile.at("strict")``.
        """
        return None if self.profile is None else self.profile.point

    @threshold.setter
    def threshold(self, point: str) -> None:
        if self._given is None:
            raise SteerfastError(f"threshold: expected a steering with a profile, got {point!r} without one")
        self._roster.adopt(self._given.at(point))

    def assigned(
        self,
        steering: SteeringProfile | ProfileStack | Sequence[SteeringProfile | Sequence[SteeringProfile] | None] | None,
        strength: float | Sequence[float | Sequence[float]] | None = None,
    ) -> AbstractContextManager[None]:
        """Within the context, steer each sequence of a batch by profiles of its own.

        Args:
            steering: one profile or ``a + b`` for all sequences, or a list with an entry per sequence: a profile, None
                (not steered), or a list of up to 4 profiles (a stack). Under beam search or several returned sequences,
                one entry per prompt.
            strength: multiplies the profiles' strengths: one number for all, or one entry per sequence, where a list
                has a number for each profile of the stack. Default: `strength`.

        Raises:
            ProfileError: a profile belongs to another model or steers no layer.
            SteerfastError: lists of different lengths, more than 16 profiles, a strength that is not finite, token
                gates together with others, or the steering was detached.
        """
        if not self.attached:
            raise SteerfastError("steering: it was detached; call steer() again")
        return self._roster.assigned(steering, strength)

    @contextmanager
    def prompt_length(self, length: int | Sequence[int] | Tensor) -> Iterator[None]:
        """Within the context, take the first `length` tokens of each sequence for its prompt.

        For calls of the model itself: prompts with their answers in one pass, as for log-likelihoods, and prompts that
        are fed token by token. Without it all tokens of such a call are a prompt, or an answer to the prompt before.
        `generate` knows where prompts end.

        Args:
            length: tokens without padding, at least 1: one number, or one for each sequence. A mask of prompt tokens
                gives it as ``mask.sum(dim=1)``.

        Raises:
            SteerfastError: a length below 1. In a call: another number of lengths; a part of a prompt, for a profile
                that needs all of it.
        """
        given = length.tolist() if isinstance(length, Tensor) else length
        lengths = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not lengths or not all(map(is_count, lengths)):
            raise SteerfastError(f"prompt_length: expected numbers of at least 1, got {given!r}")
        stepper = self._stepper
        outer, stepper.lengths = stepper.lengths, lengths
        try:
            yield
        finally:
            stepper.lengths = outer

    # -- decisions of the last batch ---------------------------------------------------------------------------------

    @property
    def fired(self) -> Tensor:
        """bool [sequences] of the last batch, on the CPU: did any gate of the sequence's profiles open?

        With a ``token`` gate: at any token so far. Under beam search or several returned sequences, one entry per
        prompt. True where a gate's score was NaN, False where the sequence is not steered.
        """
        latch = self._last()
        return self._by_prompt(latch.by_sequence(latch.values.cpu() >= 0.5).any(dim=2).any(dim=0))

    @property
    def undecided(self) -> Tensor:
        """bool [sequences] of the last batch, on the CPU: did no gate open, and a score lie in its gate's band
        (`SteeringProfile.abstain`)? A hard gate leaves such a sequence unsteered.

        Entries as in `fired`, and never True where that is. False where the profile has no band, and where the
        sequence is not steered.

        Raises:
            SteerfastError: the last step was one of a manager of continuous batching; compare the scores of `decision`
                with the profile's band.
        """
        latch, profiles = self._last(), self._plan().profiles
        if len(profiles) != latch.sequences:
            raise SteerfastError(
                "undecided: expected a batch as the last step, got one of continuous batching (decision() has the "
                "scores of its requests)"
            )
        scores = latch.by_sequence(latch.scores.cpu())
        flags = [
            any(bool(profile.undecided(scores[:, n, k])) for k, profile in enumerate(stack))
            for n, stack in enumerate(profiles)
        ]
        return self._by_prompt(torch.tensor(flags, device="cpu")) & ~self.fired

    @property
    def scores(self) -> Tensor:
        """float32 [gates, sequences] of the last batch, on the CPU: the score behind each gate layer's decision.

        With stacks [gates, sequences, K]. With a ``token`` gate: the highest so far. Gate layers ascend, as in
        `SteeringProfile.gate_layers`; -inf where the layer holds no gate of the sequence's profile.
        """
        latch = self._last()
        scores = latch.by_sequence(latch.scores.cpu()[sorted(self._plan().reach.gates) or [0]])
        return scores.squeeze(2) if latch.stack == 1 else scores

    @property
    def nan_scores(self) -> int:
        """How many sequences of the last batch have a NaN score; they count as fired."""
        nan = self.scores.isnan().any(dim=0)
        return int((nan if nan.dim() == 1 else nan.any(dim=1)).sum())

    def decision(self, request_id: str) -> tuple[bool, Tensor] | None:
        """Return the decision on a request of continuous batching, the last 65,536 that ended included.

        Returns:
            Whether a gate opened, and the scores float32 [gates] on the CPU, as in `scores`; None where nothing is
            decided yet, or known any more.
        """
        steps = self._packed.steps
        decided = None if steps is None else steps.roster.decision(request_id)
        if decided is None:
            return None
        values, scores = decided
        return bool((values >= 0.5).any()), scores[scores != float("-inf")]

    # -- life --------------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the model is steered."""
        return bool(self._hooks.undo)

    def detach(self) -> None:
        """Take the steering off; the model is as before. Safe to call twice."""
        forget_manager(self._packed)
        while self._hooks.undo:
            self._hooks.undo.pop()()
        self._hooks.layers.clear()
        self._packed.attached = False

    def __repr__(self) -> str:
        state = f"with {self.profile!r}, strength {self.strength:g}" if self.attached else "detached"
        return f"<Steering of {type(self.model).__name__} {state}>"

    def __enter__(self) -> Steering:
        if not self.attached:
            raise SteerfastError("steering: it was detached; call steer() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def call(self, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of the model's own methods `GENERATING`, steered; see `SteeredCalls.call`."""
        return self._calls.call(name, method, args, kwargs)

    def _by_prompt(self, flags: Tensor) -> Tensor:
        """Return for each prompt whether one of its sequences has the flag."""
        prompts = self._stepper.prompts
        if prompts and len(flags) % prompts == 0:
            return flags.view(prompts, -1).any(dim=1)
        return flags

    def _last(self) -> Latch:
        if self._stepper.latch is None:
            raise SteerfastError("steering: no batch has run through the model yet")
        return self._stepper.latch

    def _plan(self) -> Plan:
        assert self._stepper.plan is not None
        return self._stepper.plan


def _thought(thinking: str, tokenizer: Any) -> Thought | None:
    """Return how thoughts end where edits begin after them."""
    if thinking not in ("count", "skip"):
        raise SteerfastError(f"thinking: expected 'count' or 'skip', got {thinking!r}")
    if thinking == "count":
        return None
    if tokenizer is None:
        raise SteerfastError(
            "tokenizer: expected one with thinking='skip', as its chat template ends thoughts, got None"
        )
    return Thought(*thought_markers(tokenizer))

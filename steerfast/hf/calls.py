"""The methods of a model that generate, steered: `generate`, `generate_batch` and `init_continuous_batching`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import SteerfastError
from steerfast.hf.arguments import is_flat
from steerfast.hf.hooks import StepHooks
from steerfast.hf.latch import Latch
from steerfast.hf.packed import steered_manager
from steerfast.hf.step import GeneratedPrompt, Stepper
from steerfast.runtime.batch import INHERIT
from steerfast.runtime.span import slots_of

GENERATING = ("generate", "generate_batch", "init_continuous_batching")
"""Methods of models that `SteeredCalls.call` stands before."""


class SteeredCalls:
    """Call a model's own methods with profiles for their prompts. Calls of other threads wait for the one that runs."""

    def __init__(self, model: nn.Module, stepper: Stepper, hooks: StepHooks) -> None:
        self._model = model
        self._stepper = stepper
        self._hooks = hooks
        self._roster, self._packed = stepper.roster, stepper.packed
        self._lock = threading.RLock()  # a call of a model may be part of another one

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock: a copy has its own."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def wrap(self, undo: list[Callable[[], Any]]) -> None:
        """Put `call` before the methods of the model; `undo` gets what takes it away again."""
        for name in GENERATING:
            method = getattr(self._model, name, None)
            if method is None:
                continue
            own = vars(self._model).get(name)  # a wrapper that somebody else put there
            # No closure: deep copies and pickles of the model take this along and it becomes theirs.
            wrapped = functools.partial(self._call, name, method)
            functools.update_wrapper(wrapped, method, ("__module__", "__name__", "__qualname__", "__doc__"), ())
            setattr(self._model, name, wrapped)
            undo.append(functools.partial(_put_back, self._model, name, own))

    def _call(self, name: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.call(name, method, args, kwargs)

    def call(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of the model's own methods `GENERATING`.

        `steering` and `steering_strength` among `kwargs` are taken as `Steering.assigned` does. A strength alone goes
        to the profiles that steer the call without it.
        """
        with self._lock:
            if "steering" in kwargs or "steering_strength" in kwargs:
                if not self._hooks.undo:
                    raise SteerfastError("steering: it was detached; call steer() again")
                steering = kwargs.pop("steering", INHERIT)
                with self._roster.assigned(steering, kwargs.pop("steering_strength", None)):
                    return self.call(name, method, args, kwargs)
            if name == "generate":
                return self._generate(method, args, kwargs)
            if name == "generate_batch":
                return self._generate_batch(method, args, kwargs)
            return steered_manager(self._packed, method, *args, **kwargs)

    def _generate_batch(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own `generate_batch`; its requests are then the sequences of the last batch."""
        inputs = args[0] if args else kwargs.get("inputs")
        if inputs:  # transformers logs errors of requests, and continues
            self._roster.of_requests(len(inputs))
        packed, stepper = self._packed, self._stepper
        packed.steps, packed.last_requests = None, []
        try:
            return generate(*args, **kwargs)
        finally:
            if packed.steps is not None and packed.last_requests:
                names = packed.last_requests
                plan = self._roster.plan(len(names), len(names))
                decided = [packed.steps.decision(name, plan.width) for name in names]
                values, scores = torch.cat(decided, dim=2)
                stepper.prompts, stepper.plan = len(names), plan
                stepper.latch = Latch(values, scores, plan.owner, plan.width)

    def _generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own `generate`, knowing where the prompt ends."""
        stepper = self._stepper
        outer = stepper.prompt  # of a call that this one is part of
        prompt = args[0] if args else None
        for name in ("inputs_embeds", "input_ids", "inputs"):
            prompt = prompt if prompt is not None else kwargs.get(name)
        self._refuse_chunks(args, kwargs)
        if isinstance(prompt, Tensor) and prompt.dim() >= 2:
            count, named = len(prompt), self._roster.named
            if named not in (None, count):
                raise SteerfastError(f"steering: expected {count} entries, one per prompt, got {named}")
            mask = kwargs.get("attention_mask")
            mask = mask if is_flat(mask) else None
            # On top of a cache, the prompt may be the new tokens alone; the mask always covers all of them.
            length, virtual = (prompt if mask is None else mask).shape[1], _virtual_tokens(self._model)
            if mask is not None and virtual:
                mask = torch.cat([mask.new_ones(count, virtual), mask], dim=1)
            stepper.prompt = GeneratedPrompt(count, virtual + length, mask)
        try:
            return generate(*args, **kwargs)
        finally:
            stepper.prompt = outer
            self._hooks.forget_call()

    def _refuse_chunks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        own = getattr(self._model, "generation_config", None)  # fills in values that the given one leaves open
        sizes = [getattr(config, "prefill_chunk_size", None) for config in (given, own)]
        chunk = kwargs.get("prefill_chunk_size", next(filter(None, sizes), None))  # a None given here counts
        if not chunk:
            return
        profiles = [self._roster.slots.at(slot) for slot in slots_of(self._roster.current)]
        if any(profile.reads_end for profile in profiles):
            raise SteerfastError(
                f"prefill_chunk_size: expected None, got {chunk}: a prompt gate and positions='response' need the "
                "prompt's last token, which is in the last chunk"
            )


def _virtual_tokens(model: Any) -> int:
    """Return how many rows an adapter of PEFT puts before a prompt: those of prompt tuning and p-tuning.

    Prefix tuning puts keys and values into the cache instead, and no row.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or config.peft_type == "PREFIX_TUNING":
        return 0
    return int(config.num_virtual_tokens)


def _put_back(owner: object, name: str, value: Any) -> None:
    delattr(owner, name)
    if value is not None:
        setattr(owner, name, value)

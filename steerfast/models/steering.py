"""Attach profiles to a loaded HuggingFace model, in place, removable.

One pre-hook on the backbone works out the step: which rows, whose, edited by which profile, and which row decides. Each
steered or sensing decoder layer then calls the ops: a fused layer at its seam, any other in a hook on its output. Gates
decide at the prompt's last valid token and are latched with the KV cache; rows that are not steered keep their bits.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.bank import Bank, LayerBank, kinds_of
from steerfast.batch import UNSTEERED, Rows, prompt_rows, response_rows
from steerfast.errors import ArchitectureError, ProfileError, SteerfastError
from steerfast.kernels.contract import Kinds
from steerfast.kernels.gate import gate_unchecked_
from steerfast.kernels.steer import steer_torch_, steer_unchecked_
from steerfast.models import latch as latches
from steerfast.models.fused import Operands, seams
from steerfast.models.latch import Latch
from steerfast.models.structure import STEERED_MARK, find_decoder, identify
from steerfast.profile import SteeringProfile

__all__ = ["Steering", "steer"]

_MOST_BUFFERS = 512  # row tables of the batch shapes seen so far; each is cheap to make again
_SLOTS = 16  # profiles kept on the device; the ones not used for longest make room for others


@dataclass(frozen=True)
class _Prompt:
    """What `generate` was called with: number of prompts, padded length (what is cached already included), and its own
    2-d attention mask if any.
    """

    count: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """Who steers each sequence of a batch: its slot (-1: nobody) and strength; and what follows from the profiles.

    gates: per layer, the slots whose gates decide there. steered: the layers where some sequence is edited.
    owner: whose decisions a cache must hold for them to count.
    """

    slots: tuple[int, ...]
    strengths: tuple[float, ...]
    gates: dict[int, frozenset[int]]
    steered: frozenset[int]
    kinds: Kinds
    by_token: bool
    owner: str


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
        self._profiles: list[SteeringProfile | None] = [None] * _SLOTS
        self._used: list[int] = list(range(_SLOTS))  # slots, longest unused first
        self._banks: dict[torch.device, Bank] = {}
        self._buffers: dict[tuple[Any, ...], Any] = {}
        self._undo: list[Callable[[], Any]] = []
        self._layers: set[int] = set()
        self._plan: _Plan | None = None
        self._assigned: tuple[tuple[int, ...], tuple[float, ...]] | None = None
        self._latch: Latch | None = None
        self._prompt: _Prompt | None = None
        self._prompts: int | None = None
        self._rows: dict[torch.device, Rows] = {}
        self._deciding = False
        self._row_values: dict[torch.device, Tensor] = {}
        self._arguments = list(inspect.signature(decoder.backbone.forward).parameters)
        self.profile = profile
        self.model = model
        self._strength = _finite("strength", strength)
        if profile is not None:
            self._check("profile", profile)
        decoder.refuse_if_steered()
        if "past_key_values" not in self._arguments:
            raise ArchitectureError(
                f"model: {type(decoder.backbone).__name__} takes no past_key_values, "
                "and a gate's decision has to stay with a sequence's cache"
            )
        self._attach()

    # -- what users read and set -------------------------------------------------------------------------------------

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
        values, plan = self._last().values.cpu(), self._planned()
        soft = [slot >= 0 and self._at(slot).gate.sharpness > 0 for slot in plan.slots]
        is_open = torch.where(torch.tensor(soft), values >= 0.5, values != 0).any(dim=0)
        if self._prompts and len(is_open) % self._prompts == 0:
            return is_open.view(self._prompts, -1).any(dim=1)
        return is_open

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

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def detach(self) -> None:
        """Take the steering off; the model is as it was. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self._layers.clear()

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
        before = self._assigned
        self._assigned = self._assign(steering, strength)
        try:
            yield
        finally:
            self._assigned = before

    # -- profiles and slots ------------------------------------------------------------------------------------------

    def _check(self, name: str, profile: SteeringProfile) -> None:
        if (problem := profile.model.mismatch(self._identity)) is not None:
            raise ProfileError(f"{name}: {problem}")
        if not profile.steered_layers:
            raise ProfileError(f"{name}: expected a strength other than 0 in at least one layer, got none (run tune)")

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
        if len(profiles) != len(numbers) and 1 not in (len(profiles), len(numbers)):
            raise SteerfastError(
                f"steering_strength: expected {len(profiles)} numbers, one per profile, got {len(numbers)}"
            )
        for i, profile in enumerate(profiles):
            if profile is not None:
                if not isinstance(profile, SteeringProfile):
                    raise SteerfastError(f"steering[{i}]: expected a profile or None, got {type(profile).__name__}")
                self._check(f"steering[{i}]", profile)
        distinct = {profile.checksum: profile for profile in profiles if profile is not None}
        if len(distinct) > _SLOTS - 1:
            raise SteerfastError(f"steering: expected at most {_SLOTS - 1} profiles in a batch, got {len(distinct)}")
        if len({profile.gate.kind == "token" for profile in distinct.values()}) > 1:
            raise SteerfastError("steering: expected token gates for all sequences of a batch or for none, got both")
        slots = {checksum: self._slot(profile, distinct) for checksum, profile in distinct.items()}
        length = max(len(profiles), len(numbers))
        each = [UNSTEERED if profile is None else slots[profile.checksum] for profile in profiles]
        return tuple(each * (length // len(each))), tuple(numbers * (length // len(numbers)))

    def _slot(self, profile: SteeringProfile, needed: dict[str, SteeringProfile]) -> int:
        """The slot of a profile; where it has none, the one that was not used for longest becomes its own."""
        known = {other.checksum: slot for slot, other in enumerate(self._profiles) if other is not None}
        slot = known.get(profile.checksum, UNSTEERED)
        if slot < 0:
            kept = {*needed, *([self.profile.checksum] if self.profile is not None else [])}
            free = [s for s in self._used if (other := self._profiles[s]) is None or other.checksum not in kept]
            slot = free[0]
            self._profiles[slot] = profile
            for bank in self._banks.values():
                bank.replace(str(slot), profile) if str(slot) in bank.names else bank.add(str(slot), profile)
            for layer in sorted({*profile.steered_layers, *profile.gate_layers} - self._layers):
                self._attach_layer(layer)
        self._used.remove(slot)
        self._used.append(slot)
        return slot

    def _at(self, slot: int) -> SteeringProfile:
        profile = self._profiles[slot]
        assert profile is not None
        return profile

    def _plan_for(self, count: int) -> _Plan:
        """The plan of a step of `count` sequences; prompts that became several sequences lie one after the other."""
        if self._assigned is not None:
            slots, strengths = self._assigned
        else:
            slot = UNSTEERED if self.profile is None else self._slot(self.profile, {})
            slots, strengths = (slot,), (self._strength,)
        if len(slots) > 1 and (count % len(slots) or (self._prompts or len(slots)) != len(slots)):
            raise SteerfastError(
                f"steering: expected {self._prompts or count} entries, one per sequence, got {len(slots)}"
            )
        key = ("plan", slots, strengths, count, *(self._at(slot).checksum for slot in slots if slot >= 0))
        return self._buffer(key, torch.device("cpu"), lambda _: self._make_plan(slots, strengths, count))

    def _make_plan(self, slots: tuple[int, ...], strengths: tuple[float, ...], count: int) -> _Plan:
        profiles = {slot: self._at(slot) for slot in set(slots) if slot >= 0}
        gates: dict[int, frozenset[int]] = {}
        for slot, profile in profiles.items():
            for layer in profile.gate_layers:
                gates[layer] = gates.get(layer, frozenset()) | {slot}
        names = [profiles[slot].checksum if slot >= 0 else "-" for slot in slots]
        repeats = count // len(slots)
        return _Plan(
            slots=tuple(slot for slot in slots for _ in range(repeats)),
            strengths=tuple(strength for strength in strengths for _ in range(repeats)),
            gates=gates,
            steered=frozenset(layer for profile in profiles.values() for layer in profile.steered_layers),
            kinds=max((kinds_of(profile) for profile in profiles.values()), default=Kinds.LATCHED_ADD),
            by_token=any(profile.gate.kind == "token" for profile in profiles.values()),
            owner=names[0] if len(set(names)) == 1 else "|".join(names),
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
            before = backbone.register_forward_pre_hook(self._before, with_kwargs=True)
            self._undo.append(before.remove)
            after = backbone.register_forward_hook(self._after, with_kwargs=True)
            self._undo.append(after.remove)
            if self.profile is not None:
                self._slot(self.profile, {})
            if hasattr(self.model, "generate") and not hasattr(type(self.model), "steerfast_generates"):
                own = vars(self.model).get("generate")  # a wrapper of someone else's
                generate: Any = self.model.generate
                self.model.generate = self._wrapped(generate)  # type: ignore[assignment]
                self._undo.append(functools.partial(_put_back, self.model, "generate", own))
        except BaseException:
            self.detach()
            raise

    def _attach_layer(self, layer: int) -> None:
        self._layers.add(layer)
        seam = seams(self._decoder)[layer]
        if seam is not None:
            seam.steer = functools.partial(self._operands, layer)
            self._undo.append(functools.partial(setattr, seam, "steer", None))
            return
        # First of the layer's hooks, so that others see the edited residual stream.
        hook = functools.partial(self._on_layer, layer)
        handle = self._decoder.layers[layer].register_forward_hook(hook, prepend=True)
        self._undo.append(handle.remove)

    def _wrapped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def steered_generate(*args: Any, **kwargs: Any) -> Any:
            return self.generate(generate, args, kwargs)

        return steered_generate

    def generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own `generate`, knowing where the prompt ends and who steers it."""
        if "steering" in kwargs or "steering_strength" in kwargs:
            default = self.profile
            steering = kwargs.pop("steering", default)
            with self.assigned(steering, kwargs.pop("steering_strength", None)):
                return self.generate(generate, args, kwargs)
        prompt = args[0] if args else None
        for name in ("inputs_embeds", "input_ids", "inputs"):
            prompt = prompt if prompt is not None else kwargs.get(name)
        self._refuse_chunks(kwargs)
        if isinstance(prompt, Tensor) and prompt.dim() >= 2:
            count = len(prompt)
            if self._assigned is not None and len(self._assigned[0]) not in (1, count):
                raise SteerfastError(
                    f"steering: expected {count} entries, one per prompt, got {len(self._assigned[0])}"
                )
            mask = kwargs.get("attention_mask")
            mask = mask if _is_flat(mask) else None
            # On top of a cache, the prompt may be the new tokens alone; the mask always covers all of them.
            length = (prompt if mask is None else mask).shape[1]
            self._prompt = _Prompt(count, length, mask)
        try:
            return generate(*args, **kwargs)
        finally:
            self._prompt = None

    def _refuse_chunks(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if not chunk:
            return
        slots = self._assigned[0] if self._assigned is not None else ()
        profiles = [self._at(slot) for slot in slots if slot >= 0] if slots else [self.profile]
        if any(p is not None and (p.positions == "response" or p.gate.kind == "prompt") for p in profiles):
            raise SteerfastError(
                f"prefill_chunk_size: expected None, got {chunk}: a prompt gate and positions='response' need the "
                "prompt's last token, which is in the last chunk"
            )

    # -- one forward pass --------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = tokens if tokens is not None else given.get("inputs_embeds")
        if tokens is None:
            raise ArchitectureError(f"model: {type(module).__name__} was called without input_ids or inputs_embeds")
        count, width = tokens.shape[:2]
        prompt = self._prompt
        self._prompts = prompt.count if prompt is not None else None
        self._plan = plan = self._plan_for(count)
        cache: Any = given.get("past_key_values")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
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
        self._deciding = prompt_columns > 0 or plan.by_token
        if self._deciding:
            latch = self._new_latch(plan, tokens.device) if latch is None else latch.copy()
        device = tokens.device
        slot = self._per_sequence("slot", plan.slots, torch.int32, device)
        if prompt_columns > 0:
            mask = given.get("attention_mask")
            if prompt is not None and prompt.mask is not None and not _is_flat(mask):
                mask = _grown(prompt.mask, count, past + width)
            valid = _valid_tokens(mask, count, width, past, device)
            late = tuple(s >= 0 and self._at(s).positions == "response" for s in plan.slots)
            rows = prompt_rows(valid, prompt_columns, slot, self._per_sequence("late", late, torch.bool, device))
        else:
            rows = self._buffer(("rows", plan.slots, width), device, lambda _: response_rows(slot, width))
        self._latch = latch
        self._rows = {device: rows.each_for_itself() if plan.by_token else rows}
        self._row_values.clear()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), kwargs.get("past_key_values"))
        if cache is not None:
            latches.attach(cache, self._last())

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
            *tensors, kinds = operands
            (steer_torch_ if differentiable else steer_unchecked_)(x, None, *tensors, int(kinds))
        if edited is hidden:
            return None
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def _operands(self, layer: int, x: Tensor, residual: Tensor | None) -> Operands | None:
        """Decide this layer's gates from the rows x (+ residual) [N·T, H]; how they are edited, None: not at all."""
        plan, latch, device = self._planned(), self._last(), x.device
        decides = self._deciding and layer in plan.gates
        if not decides and layer not in plan.steered:
            return None
        if device not in self._rows:
            self._rows[device] = next(iter(self._rows.values())).to(device)
        rows = self._rows[device]
        bank = self._bank(device).layer(layer)
        if decides and plan.by_token:
            self._decide_rows(layer, x, residual, rows, bank, plan, latch)
        elif decides:
            self._decide_prompts(layer, x, residual, rows, bank, plan, latch)
        if layer not in plan.steered:
            return None
        strength = self._per_sequence("strength", plan.strengths, torch.float32, device)
        if plan.by_token:
            values = self._values_of_rows(rows)
            strength = strength.repeat_interleave(len(x) // len(strength))
        else:
            values = latch.values[layer, :, None].to(device)
        return rows.rows, values, strength[:, None], bank.vectors, bank.directions, bank.table, plan.kinds

    def _decide_prompts(
        self, layer: int, x: Tensor, residual: Tensor | None, rows: Rows, bank: LayerBank, plan: _Plan, latch: Latch
    ) -> None:
        """Each sequence's deciding row sets its latched value, here and, for a sensor, in all later layers;
        sequences without a prompt token in this step keep theirs.
        """
        here = tuple(slot in plan.gates[layer] for slot in plan.slots)
        deciding = rows.deciding
        if not all(here):
            deciding = torch.where(self._per_sequence("here", here, torch.bool, x.device), deciding, UNSTEERED)
        home = latch.values.device
        scores, values = (t[layer, :, None].to(x.device) for t in (latch.scores, latch.values))
        gate_unchecked_(x, residual, deciding, rows.slot, bank.directions, bank.table, scores, values)
        if home != x.device:
            latch.scores[layer], latch.values[layer] = scores[:, 0].to(home), values[:, 0].to(home)
        senses = tuple(slot >= 0 and self._at(slot).sensor == layer for slot in plan.slots)
        if any(senses):
            mask = self._per_sequence("senses", senses, torch.bool, home)
            latch.values[layer + 1 :] = torch.where(mask, latch.values[layer], latch.values[layer + 1 :])

    def _decide_rows(
        self, layer: int, x: Tensor, residual: Tensor | None, rows: Rows, bank: LayerBank, plan: _Plan, latch: Latch
    ) -> None:
        """Each row decides for itself, in this step only; the latch keeps the highest of its sequence for `fired`."""
        width = len(x) // len(plan.slots)
        here = tuple(slot in plan.gates[layer] for slot in plan.slots)
        mask = self._per_sequence("here", here, torch.bool, x.device).repeat_interleave(width)
        deciding = torch.where(mask, rows.deciding, UNSTEERED)
        scores = x.new_full((len(x), 1), float("-inf"), dtype=torch.float32)
        values = self._values_of_rows(rows)
        before = torch.zeros_like(values)
        gate_unchecked_(x, residual, deciding, rows.slot, bank.directions, bank.table, scores, before)
        values.copy_(torch.where(deciding[:, None] >= 0, before, values))
        for old, new in ((latch.scores[layer], scores), (latch.values[layer], before)):
            old.copy_(torch.maximum(old, new.view(len(plan.slots), width).amax(dim=1).to(old.device)))

    # -- small things ------------------------------------------------------------------------------------------------

    def _bank(self, device: torch.device) -> Bank:
        """All profiles on `device`; a model may lie on several."""
        if device not in self._banks:
            bank = Bank(self._identity.num_layers, self._identity.hidden_size, _SLOTS, device, kinds=Kinds.ANY)
            for slot, profile in enumerate(self._profiles):
                if profile is not None:
                    bank.add(str(slot), profile)
            self._banks[device] = bank
        return self._banks[device]

    def _new_latch(self, plan: _Plan, device: torch.device) -> Latch:
        """Closed gates; those of profiles without gates are open."""
        with torch.inference_mode(False):
            is_open = [slot >= 0 and self._at(slot).gate.kind == "always" for slot in plan.slots]
            values = torch.tensor(is_open, dtype=torch.float32, device=device).repeat(self._identity.num_layers, 1)
            return Latch(plan.owner, values, torch.full_like(values, float("-inf")))

    def _values_of_rows(self, rows: Rows) -> Tensor:
        """Gate values [N·T, 1] of this step's rows, for token gates: what a sensor decided for the layers after it."""
        device = rows.rows.device
        if device not in self._row_values:
            known = next(iter(self._row_values.values()), None)
            fresh = torch.zeros(len(rows.rows), 1, dtype=torch.float32, device=device)
            self._row_values[device] = fresh if known is None else known.to(device)
        return self._row_values[device]

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

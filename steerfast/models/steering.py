"""Attach profiles to a loaded HuggingFace model, in place, removable.

One pre-hook on the backbone works out the step: which rows, whose, edited by which profile, and which row decides. Each
steered or sensing decoder layer then calls the ops: a fused layer at its seam, any other in a hook on its output. Gates
decide at the prompt's last valid token and are latched with the KV cache; rows that are not steered keep their bits.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
_SLOTS = 17  # profiles kept on the device, 16 beside the model's own; those not used for longest make room for others


@dataclass(frozen=True)
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

    given: the arguments of the backbone, the cache as it was before the step. valid, prompt_columns: as `prompt_rows`
    takes them. ahead: which sequences are such.
    """

    given: dict[str, Any]
    valid: Tensor
    prompt_columns: int
    ahead: tuple[bool, ...]


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
        self._names: list[str] = [""] * _SLOTS  # their checksums, which take a hash over all they hold
        self._used: list[int] = list(range(_SLOTS))  # slots, longest unused first
        self._banks: dict[torch.device, Bank] = {}
        self._buffers: dict[tuple[Any, ...], Any] = {}
        self._undo: list[Callable[[], Any]] = []
        self._layers: set[int] = set()
        self._plan: _Plan | None = None
        self._contexts: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
        self._latch: Latch | None = None
        self._prompt: _Prompt | None = None
        self._prompts: int | None = None
        self._rows: dict[torch.device, Rows] = {}
        self._deciding = False
        self._prefill: _Prefill | None = None
        self._again = False  # while a second pass runs
        self._row_values: dict[torch.device, Tensor] = {}
        self._strengths: dict[torch.device, Tensor] = {}
        self._decides: tuple[Tensor, Tensor] | None = None  # [gate layers, N]: deciding rows, and who senses there
        self._gate_index: dict[int, int] = {}  # of all profiles that are loaded
        self._sensors: set[int] = set()
        self._kinds = Kinds.LATCHED_ADD
        # Operands of steps that decide nothing, by layer and device, and the plan, decisions and rows they stand for:
        # these stay the same from one answer token to the next, and making operands takes longer than the edit.
        self._known: dict[tuple[int, torch.device], Operands] = {}
        self._known_of: tuple[Any, Any, Any] = (None, None, None)
        self._arguments = list(inspect.signature(decoder.backbone.forward).parameters)
        self._profile = profile
        self._slot_of_own = UNSTEERED
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
        self._contexts.append(self._assign(steering, strength))
        try:
            yield
        finally:
            self._contexts.pop()

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
        for name, given in (("steering", profiles), ("steering_strength", numbers)):
            if not given:
                raise SteerfastError(f"{name}: expected one entry per sequence, got an empty list")
        if len(profiles) != len(numbers) and 1 not in (len(profiles), len(numbers)):
            raise SteerfastError(
                f"steering_strength: expected {len(profiles)} numbers, one per profile, got {len(numbers)}"
            )
        for i, profile in enumerate(profiles):
            if profile is not None:
                if not isinstance(profile, SteeringProfile):
                    raise SteerfastError(f"steering[{i}]: expected a profile or None, got {type(profile).__name__}")
                self._check(f"steering[{i}]", profile)
        checksums = ["" if profile is None else profile.checksum for profile in profiles]
        distinct = {name: profile for name, profile in zip(checksums, profiles, strict=True) if profile is not None}
        held = {self._slot_of_own, *(slot for slots, _ in self._contexts for slot in slots)} - {UNSTEERED}
        most = min(_SLOTS - 1, _SLOTS - sum(self._names[slot] not in distinct for slot in held))
        if len(distinct) > most:
            raise SteerfastError(f"steering: expected at most {most} profiles in a batch, got {len(distinct)}")
        if len({profile.gate.kind == "token" for profile in distinct.values()}) > 1:
            raise SteerfastError("steering: expected token gates for all sequences of a batch or for none, got both")
        held |= {slot for slot, name in enumerate(self._names) if name in distinct}
        slots = {"": UNSTEERED}
        for checksum, profile in distinct.items():
            slots[checksum] = self._slot(checksum, profile, held)
            held.add(slots[checksum])
        length = max(len(profiles), len(numbers))
        each = [slots[checksum] for checksum in checksums]
        return tuple(each * (length // len(each))), tuple(numbers * (length // len(numbers)))

    def _slot(self, checksum: str, profile: SteeringProfile, held: set[int]) -> int:
        """The slot of a profile; where it has none, the one not used for longest becomes its own, `held` ones aside."""
        if checksum in self._names:
            slot = self._names.index(checksum)
        else:
            slot = next(slot for slot in self._used if slot not in held)
            if not self._banks:
                # So that a profile which no bank can hold is refused here: where the first layers are going to read it.
                self._bank(next(self._decoder.backbone.parameters()).device)
            for bank in self._banks.values():
                bank.replace(str(slot), profile) if str(slot) in bank.names else bank.add(str(slot), profile)
            self._profiles[slot], self._names[slot] = profile, checksum
            self._kinds = max(self._kinds, kinds_of(profile))
            for layer in profile.gate_layers:
                self._gate_index.setdefault(layer, len(self._gate_index))
            if isinstance(profile.sensor, int) and profile.gate.kind == "prompt":
                self._sensors.add(profile.sensor)
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
        slots, strengths = self._contexts[-1] if self._contexts else ((self._slot_of_own,), (self._strength,))
        if len(slots) > 1 and (count % len(slots) or (self._prompts or len(slots)) != len(slots)):
            raise SteerfastError(
                f"steering: expected {self._prompts or count} entries, one per sequence, got {len(slots)}"
            )
        key = ("plan", slots, strengths, count, *(self._names[slot] for slot in slots if slot >= 0))
        return self._buffer(key, torch.device("cpu"), lambda _: self._make_plan(slots, strengths, count))

    def _make_plan(self, slots: tuple[int, ...], strengths: tuple[float, ...], count: int) -> _Plan:
        profiles = {slot: self._at(slot) for slot in set(slots) if slot >= 0}
        gates: dict[int, frozenset[int]] = {}
        for slot, profile in profiles.items():
            for layer in profile.gate_layers:
                gates[layer] = gates.get(layer, frozenset()) | {slot}
        names = [self._names[slot] if slot >= 0 else "-" for slot in slots]
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
                self._slot_of_own = self._slot(self.profile.checksum, self.profile, set())
            if hasattr(self.model, "generate") and not hasattr(type(self.model), "steerfast_generates"):
                own = vars(self.model).get("generate")  # a wrapper of someone else's
                generate: Any = self.model.generate
                # No closure: deep copies and pickles of the model take this along and it becomes theirs.
                wrapped = functools.partial(self._generate, generate)
                functools.update_wrapper(wrapped, generate, ("__module__", "__name__", "__qualname__", "__doc__"), ())
                self.model.generate = wrapped  # type: ignore[assignment]
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

    def _generate(self, generate: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.generate(generate, args, kwargs)

    def generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own `generate`, knowing where the prompt ends and who steers it."""
        if "steering" in kwargs or "steering_strength" in kwargs:
            steering = kwargs.pop("steering", self.profile)
            with self.assigned(steering, kwargs.pop("steering_strength", None)):
                return self.generate(generate, args, kwargs)
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
            self._prompt = None

    def _refuse_chunks(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if not chunk:
            return
        slots = self._contexts[-1][0] if self._contexts else (self._slot_of_own,)
        profiles = [self._at(slot) for slot in slots if slot >= 0]
        if any(profile.positions == "response" or profile.gate.kind == "prompt" for profile in profiles):
            raise SteerfastError(
                f"prefill_chunk_size: expected None, got {chunk}: a prompt gate and positions='response' need the "
                "prompt's last token, which is in the last chunk"
            )

    # -- one forward pass --------------------------------------------------------------------------------------------

    @torch.compiler.disable  # so that a compiled model's layers become one graph, whatever is decided here
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._again:
            return
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
            rows = self._prompt_rows(plan, valid, prompt_columns)
            self._prefill = self._second_pass(plan, given, valid, prompt_columns)
            if self._prefill is not None:  # these are not steered before they have decided
                waits = self._per_sequence("ahead", self._prefill.ahead, torch.bool, device).repeat_interleave(width)
                rows.rows[:, 1] = torch.where(waits, UNSTEERED, rows.rows[:, 1])
        else:
            self._prefill = None
            rows = self._buffer(("rows", plan.slots, width), device, lambda _: response_rows(slot, width))
        self._latch = latch
        self._set_rows(plan, rows.each_for_itself() if plan.by_token else rows)
        if self._deciding and not plan.by_token:
            key = ("gates", plan.owner, plan.slots, len(self._gate_index))
            here, senses = self._buffer(key, device, lambda d: self._matrices(plan, d))
            self._decides = torch.where(here, rows.deciding, UNSTEERED), senses
        self._row_values.clear()

    def _set_rows(self, plan: _Plan, rows: Rows) -> None:
        """What the layers of this step read, on the device of its tokens."""
        device = rows.rows.device
        self._rows = {device: rows}
        self._strengths = {device: self._per_sequence("strength", plan.strengths, torch.float32, device).view(-1, 1)}
        known_of = (plan, self._last().values, rows.rows)
        if any(new is not old for new, old in zip(known_of, self._known_of, strict=True)):
            self._known, self._known_of = {}, known_of

    def _matrices(self, plan: _Plan, device: torch.device) -> tuple[Tensor, Tensor]:
        """bool [gate layers, N] twice: whose gates decide there, and for whom that layer is the sensor of all."""
        layers = list(self._gate_index)
        sensors = [self._at(slot).sensor if slot >= 0 else None for slot in plan.slots]
        here = [[slot in plan.gates.get(layer, ()) for slot in plan.slots] for layer in layers]
        senses = [[sensor == layer for sensor in sensors] for layer in layers]
        shape = len(layers), len(plan.slots)
        return tuple(torch.tensor(m, dtype=torch.bool, device=device).view(shape) for m in (here, senses))  # type: ignore[return-value]

    def _prompt_rows(self, plan: _Plan, valid: Tensor, prompt_columns: int) -> Rows:
        late = tuple(slot >= 0 and self._at(slot).positions == "response" for slot in plan.slots)
        slot = self._per_sequence("slot", plan.slots, torch.int32, valid.device)
        return prompt_rows(valid, prompt_columns, slot, self._per_sequence("late", late, torch.bool, valid.device))

    def _second_pass(self, plan: _Plan, given: dict[str, Any], valid: Tensor, prompt_columns: int) -> _Prefill | None:
        """What a second pass over this step would need, None where no sequence can ask for one."""
        ahead = tuple(slot >= 0 and self._at(slot).second_pass for slot in plan.slots)
        if not any(ahead):
            return None
        cache = given.get("past_key_values")
        if cache is not None:
            if not _is_dynamic(cache):
                raise SteerfastError(
                    f"past_key_values: layers before the sensor are steered in a second pass over the prompt, which "
                    f"needs a DynamicCache, got {type(cache).__name__}"
                )
            given = {**given, "past_key_values": copy.deepcopy(cache)}
        return _Prefill(given, valid, prompt_columns, ahead)

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
        index = torch.tensor(chosen, device=prefill.valid.device)
        count = len(plan.slots)
        given = {name: _select(name, value, index, count) for name, value in prefill.given.items()}
        self._again, self._deciding = True, False
        self._plan = replace(
            plan, slots=tuple(plan.slots[n] for n in chosen), strengths=tuple(plan.strengths[n] for n in chosen)
        )
        self._latch = latch.copy()
        self._latch.select(index)
        self._set_rows(self._plan, self._prompt_rows(self._plan, prefill.valid[index], prefill.prompt_columns))
        try:
            second = module(**given)
        finally:
            self._again, self._plan, self._latch = False, plan, latch
            self._set_rows(plan, first_rows)
        return _merged(output, second, index, count)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._again:
            return output
        output = self._read_again(module, output)
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), kwargs.get("past_key_values"))
        if cache is not None:
            latches.attach(cache, self._last())
        return output

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
        device, compiling = x.device, torch.compiler.is_compiling()
        if not compiling and (known := self._known.get((layer, device))) is not None:
            return known
        plan, latch = self._planned(), self._last()
        # A compiled model asks about the layers of all profiles that are loaded, so that it need not be compiled again
        # for another batch of them; slots without a part in a layer do nothing there.
        decides = self._deciding and layer in (self._gate_index if compiling else plan.gates)
        steered = layer in (self._layers if compiling else plan.steered)
        if not decides and not steered:
            return None
        if device not in self._rows:
            self._rows[device] = next(iter(self._rows.values())).to(device)
        rows = self._rows[device]
        bank = self._bank(device).layer(layer)
        if decides and plan.by_token:
            self._decide_rows(layer, x, residual, rows, bank, plan, latch)
        elif decides:
            self._decide_prompts(layer, x, residual, rows, bank, latch)
        if not steered:
            return None
        strength = next(iter(self._strengths.values())).to(device)
        if plan.by_token:
            values = self._values_of_rows(rows)
            strength = strength.repeat_interleave(len(x) // len(strength), dim=0)
        else:
            values = latch.values[layer, :, None].to(device)
        kinds = self._kinds if compiling else plan.kinds
        operands = (rows.rows, values, strength, bank.vectors, bank.directions, bank.table, kinds)
        if not self._deciding and not compiling:  # a graph must not leave its tensors here
            self._known[layer, device] = operands
        return operands

    def _decide_prompts(
        self, layer: int, x: Tensor, residual: Tensor | None, rows: Rows, bank: LayerBank, latch: Latch
    ) -> None:
        """Each sequence's deciding row sets its latched value, here and, for a sensor, in all other layers;
        sequences without a prompt token in this step keep theirs.
        """
        assert self._decides is not None
        deciding, senses = (tensor[self._gate_index[layer]] for tensor in self._decides)
        home = latch.values.device
        scores, values = (t[layer, :, None].to(x.device) for t in (latch.scores, latch.values))
        gate_unchecked_(x, residual, deciding.to(x.device), rows.slot, bank.directions, bank.table, scores, values)
        if home != x.device:
            latch.scores[layer], latch.values[layer] = scores[:, 0].to(home), values[:, 0].to(home)
        if layer in self._sensors:
            latch.values.copy_(torch.where(senses, latch.values[layer], latch.values))

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


def _is_dynamic(cache: Any) -> bool:
    """Whether sequences can be taken from a cache and put back: plain keys and values that grow."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    return layers is not None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _select(name: str, value: Any, index: Tensor, count: int) -> Any:
    """The argument `name` of a backbone for some of its `count` sequences."""
    if isinstance(value, dict):
        return {key: _select(name, one, index, count) for key, one in value.items()}
    if hasattr(value, "batch_select_indices"):
        if value.get_seq_length() > 0:
            value.batch_select_indices(index)
        return value
    if not isinstance(value, Tensor) or name == "cache_position":
        return value
    dimension = 1 if name == "position_ids" and value.dim() == 3 else 0  # [3, N, T] where positions have three axes
    if value.dim() <= dimension or value.shape[dimension] != count:
        return value
    return value.index_select(dimension, index.to(value.device))


def _merged(first: Any, second: Any, index: Tensor, count: int) -> Any:
    """The outputs, or caches, of all sequences with some of them taken from a second pass."""
    if isinstance(first, Tensor):
        if first.dim() == 0 or first.shape[0] != count:
            return first
        return first.index_copy(0, index.to(first.device), second)
    if hasattr(first, "batch_select_indices"):
        for old, new in zip(first.layers, second.layers, strict=True):
            old.keys = old.keys.index_copy(0, index.to(old.keys.device), new.keys)
            old.values = old.values.index_copy(0, index.to(old.values.device), new.values)
        return first
    if isinstance(first, dict):  # transformers' outputs, too
        merged = {key: _merged(value, second[key], index, count) for key, value in first.items()}
        return type(first)(**merged)
    if isinstance(first, (tuple, list)):
        return type(first)(_merged(a, b, index, count) for a, b in zip(first, second, strict=True))
    return first


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

"""Attach a profile to a loaded HuggingFace model, in place, removable.

One pre-hook on the backbone works out the step (which rows, which sequences, which row decides); one hook on each
steered or sensing decoder layer calls the ops on its output. Semantics: gates decide at the prompt's last valid token
and are latched with the KV cache; rows that are not steered keep their bits.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.bank import Bank, LayerBank, kinds_of
from steerfast.batch import Rows, prompt_rows, response_rows
from steerfast.errors import ArchitectureError, ProfileError, SteerfastError
from steerfast.kernels.gate import gate_unchecked_
from steerfast.kernels.steer import steer_torch_, steer_unchecked_
from steerfast.models import latch as latches
from steerfast.models.latch import Latch
from steerfast.models.structure import STEERED_MARK, find_decoder, identify
from steerfast.profile import SteeringProfile

_MOST_BUFFERS = 512  # row tables of the batch shapes seen so far; each is cheap to make again


@dataclass(frozen=True)
class _Prompt:
    """What `generate` was called with: number of prompts, padded length (what is cached already included), and its own
    2-d attention mask if any.
    """

    count: int
    length: int
    mask: Tensor | None


def steer(model: nn.Module, profile: SteeringProfile, strength: float = 1.0, *, tokenizer: Any = None) -> Steering:
    """Steer `model` with `profile` until the returned handle is left or detached.

    Use it as a context manager, or keep the handle and call `Steering.detach`.

    Args:
        model: any HuggingFace decoder-only model; it is changed in place and restored exactly.
        profile: guidance made for this model.
        strength: multiplies the profile's own strengths; can be changed while attached.
        tokenizer: where given, it is checked against the one the profile was made with.

    Raises:
        ProfileError: the profile belongs to another model, or steers no layer.
        ArchitectureError: no decoder layers found.
        SteerfastError: the model is steered already.
    """
    return Steering(model, profile, strength, tokenizer=tokenizer)


class Steering:
    """A profile attached to a model. Made by `steer`."""

    def __init__(
        self, model: nn.Module, profile: SteeringProfile, strength: float = 1.0, *, tokenizer: Any = None
    ) -> None:
        decoder = find_decoder(model)
        if (problem := profile.model.mismatch(identify(model, tokenizer))) is not None:
            raise ProfileError(f"profile: {problem}")
        if not profile.steered_layers:
            raise ProfileError("profile: expected a strength other than 0 in at least one layer, got none (run tune)")
        decoder.refuse_if_steered()
        self.profile = profile
        self.model = model
        self._decoder = decoder
        self._owner = profile.checksum  # so that its decisions stay valid for it wherever a cache goes
        self._gates = {layer: index for index, layer in enumerate(profile.gate_layers)}
        self._steered = set(profile.steered_layers)
        self._latch: Latch | None = None
        self._arguments = list(inspect.signature(decoder.backbone.forward).parameters)
        if "past_key_values" not in self._arguments:
            raise ArchitectureError(
                f"model: {type(decoder.backbone).__name__} takes no past_key_values, "
                "and a gate's decision has to stay with a sequence's cache"
            )
        self._prompt: _Prompt | None = None
        self._prompts: int | None = None
        self._rows: dict[torch.device, Rows] = {}
        self._deciding = False
        self._values: dict[int, Tensor] = {}
        self._banks: dict[torch.device, Bank] = {}
        self._buffers: dict[tuple[Any, ...], Any] = {}
        self._strength = _finite(strength)
        self._undo: list[Callable[[], None]] = []
        self._attach()

    # -- what users read and set -------------------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """Multiplies the profile's strengths, from the next forward pass on."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _finite(value)
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key[0] != "strength"}

    @property
    def fired(self) -> Tensor:
        """bool [sequences] of the last batch, on the CPU: did any of the profile's gates open?

        With a ``token`` gate: at any token so far. Under beam search or several returned sequences, one entry per
        prompt. True where a gate's score was NaN.
        """
        values = self._last().values.cpu()
        is_open = ((values >= 0.5) if self.profile.gate.sharpness else (values != 0)).any(dim=0)
        if self._prompts and len(is_open) % self._prompts == 0:
            return is_open.view(self._prompts, -1).any(dim=1)
        return is_open

    @property
    def scores(self) -> Tensor:
        """float32 [gates, sequences] of the last batch, on the CPU: what each gate layer's decision was taken from.

        With a ``token`` gate: the highest so far. Gate layers ascend, as in `SteeringProfile.gate_layers`.
        """
        return self._last().scores.cpu()

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

    def __enter__(self) -> Steering:
        if not self.attached:
            raise SteerfastError("steering: it was detached; call steer() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- attaching ---------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        backbone, layers = self._decoder.backbone, self._decoder.layers
        try:
            setattr(backbone, STEERED_MARK, True)
            self._undo.append(lambda: delattr(backbone, STEERED_MARK))
            before = backbone.register_forward_pre_hook(self._before, with_kwargs=True)
            self._undo.append(before.remove)
            after = backbone.register_forward_hook(self._after, with_kwargs=True)
            self._undo.append(after.remove)
            for layer in sorted(self._steered | set(self._gates)):
                # First of the layer's hooks, so that others see the edited residual stream.
                hook = functools.partial(self._on_layer, layer)
                handle = layers[layer].register_forward_hook(hook, prepend=True)
                self._undo.append(handle.remove)
            if hasattr(self.model, "generate"):
                own = vars(self.model).get("generate")  # a wrapper of someone else's
                generate: Any = self.model.generate
                self.model.generate = self._wrapped(generate)  # type: ignore[assignment]
                self._undo.append(lambda: _put_back(self.model, "generate", own))
        except BaseException:
            self.detach()
            raise

    def _wrapped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`model.generate`, telling the hooks where the prompt ends."""

        @functools.wraps(generate)
        def steered_generate(*args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else None
            for name in ("inputs_embeds", "input_ids", "inputs"):
                prompt = prompt if prompt is not None else kwargs.get(name)
            self._refuse_chunks(kwargs)
            if isinstance(prompt, Tensor) and prompt.dim() >= 2:
                mask = kwargs.get("attention_mask")
                mask = mask if _is_flat(mask) else None
                # On top of a cache, the prompt may be the new tokens alone; the mask always covers all of them.
                length = (prompt if mask is None else mask).shape[1]
                self._prompt = _Prompt(len(prompt), length, mask)
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt = None

        return steered_generate

    def _refuse_chunks(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk and (self.profile.positions == "response" or self.profile.gate.kind == "prompt"):
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
        cache: Any = given.get("past_key_values")
        prompt = self._prompt
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        latch = latches.read(cache, self._owner) if past else None
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
        self._prompts = prompt.count if prompt is not None else None
        token_gate = self.profile.gate.kind == "token"
        self._deciding = prompt_columns > 0 or token_gate
        self._values.clear()
        if self._deciding:
            latch = self._new_latch(count, tokens.device) if latch is None else latch.copy()
        if prompt_columns > 0:
            mask = given.get("attention_mask")
            if prompt is not None and prompt.mask is not None and not _is_flat(mask):
                mask = _grown(prompt.mask, count, past + width)
            valid = _valid_tokens(mask, count, width, past, tokens.device)
            rows = prompt_rows(valid, prompt_columns, self.profile.positions)
        else:
            rows = self._buffer(("rows", count, width), tokens.device, lambda d: response_rows(count, width, d))
        self._latch = latch
        self._rows = {tokens.device: rows.each_for_itself() if token_gate else rows}

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
        self._edit(layer, edited.view(-1, hidden.shape[-1]), steer_torch_ if differentiable else steer_unchecked_)
        if edited is hidden:
            return None
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def _edit(self, layer: int, x: Tensor, operator: Callable[..., None]) -> None:
        """Decide and edit in place; x [N·T, H]."""
        latch, device = self._last(), x.device
        if device not in self._rows:
            self._rows[device] = next(iter(self._rows.values())).to(device)
        rows = self._rows[device]
        bank = self._bank(device).layer(layer)
        index = self._gates.get(layer, 0)
        if layer in self._gates and self._deciding:
            self._values[index] = self._decide(index, x.detach(), rows, bank, latch)
        if layer not in self._steered:
            return
        values = self._values[index] if index in self._values else latch.values[index, :, None]
        strength = self._buffer(
            ("strength", len(values)),
            device,
            lambda d: torch.full((len(values), 1), self._strength, dtype=torch.float32, device=d),
        )
        operator(
            x,
            None,
            rows.rows,
            values.to(device),
            strength,
            bank.vectors,
            bank.directions,
            bank.table,
            bank.kinds,
        )

    def _decide(self, index: int, x: Tensor, rows: Rows, bank: LayerBank, latch: Latch) -> Tensor:
        """Gate values [n, 1] of this step: a prompt gate's are the latch's own, which sequences without a prompt token
        keep; a token gate's are of this step alone, and the latch keeps the highest of each sequence for `fired`.
        """
        token_gate = self.profile.gate.kind == "token"
        latched = latch.scores[index, :, None], latch.values[index, :, None]
        if token_gate:
            scores, values = (x.new_full((len(x), 1), fill, dtype=torch.float32) for fill in (float("-inf"), 0.0))
        else:
            scores, values = (tensor.to(x.device) for tensor in latched)
        gate_unchecked_(x, None, rows.deciding, rows.slot, bank.directions, bank.table, scores, values)
        for old, new in zip(latched, (scores, values), strict=True):
            if token_gate:
                old.copy_(torch.maximum(old, new.view(len(old), -1).amax(dim=1, keepdim=True).to(old.device)))
            elif new.device != old.device:
                old.copy_(new)
        return values

    # -- small things ------------------------------------------------------------------------------------------------

    def _bank(self, device: torch.device) -> Bank:
        """The profile on `device`, in slot 0; a model may lie on several."""
        if device not in self._banks:
            model = self.profile.model
            bank = Bank(model.num_layers, model.hidden_size, 1, device, kinds=kinds_of(self.profile))
            bank.add("profile", self.profile)
            self._banks[device] = bank
        return self._banks[device]

    def _new_latch(self, count: int, device: torch.device) -> Latch:
        """Closed gates; without gates, open ones."""
        with torch.inference_mode(False):
            shape = (max(1, len(self._gates)), count)
            values, scores = (
                torch.full(shape, fill, dtype=torch.float32, device=device)
                for fill in (0.0 if self._gates else 1.0, float("-inf"))
            )
            return Latch(self._owner, values, scores)

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


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise SteerfastError(f"strength: expected a finite number, got {strength}")
    return float(strength)

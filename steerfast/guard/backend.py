"""The HuggingFace backend of candidates.

The prompt runs once; its keys and values are repeated for the candidates. Every token is one batched pass of all
unfinished candidates, from which the states (`steerfast.guard.parts`) come, too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from steerfast.errors import ArchitectureError
from steerfast.guard import parts
from steerfast.guard.candidates import Backend, Candidates, Sampling, sample, uniforms
from steerfast.hf import caches
from steerfast.hf.generation import device_of, end_tokens
from steerfast.hf.latch import attached
from steerfast.hf.structure import find_decoder
from steerfast.text.encoding import context_of

_ROOM = 32  # tokens that a cache reserves at a time


class _RoomyLayer(DynamicLayer):
    """Keys and values with reserved room: a step writes its own tokens instead of copying all earlier ones."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.keys.shape[-2]
        end = held + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            more = -(-end // _ROOM) * _ROOM - held
            self.room = tuple(F.pad(one, (0, 0, 0, more)) for one in (self.keys, self.values))
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None

    def fork(self) -> _RoomyLayer:
        """Return another layer that reads the same tokens, and copies them before it writes."""
        other = copy.copy(self)
        other.room = None
        return other


def _fork(cache: DynamicCache) -> DynamicCache:
    other: Any = copy.copy(cache)
    other.layers = [layer.fork() if isinstance(layer, _RoomyLayer) else copy.copy(layer) for layer in cache.layers]
    if (latch := attached(cache)) is not None:
        other.steerfast_latch = latch.copy()
    return other


@dataclass
class OpenRows:
    """Unfinished candidates, in order: cache, logits [m, V] of their next tokens."""

    cache: DynamicCache
    logits: Tensor

    def copy(self, rows: Tensor) -> OpenRows:
        """Return copies of some rows; keys and values are shared if these are all rows."""
        cache = _fork(self.cache)
        rows = rows.to(self.logits.device)
        if not torch.equal(rows, torch.arange(len(self.logits), device=rows.device)):
            cache.batch_select_indices(rows)
        return OpenRows(cache, self.logits[rows])

    def keep(self, rows: Tensor) -> OpenRows:
        """Drop all other rows, in place."""
        self.cache.batch_select_indices(rows)
        self.logits = self.logits[rows]
        return self


class HFBackend(Backend):
    """Candidates of a HuggingFace model, steered or not; prompt_layer: of the latent states (`steerfast.guard.parts`).

    Memory: keys and values of every unfinished candidate, at most `cache_bytes` each. A search that keeps K of N
    candidates holds N + 3K + 1 at a time: the new ones, their parents, those kept so far, those being kept.

    Raises:
        ArchitectureError: no decoder-only model with a language-model head.
        GuardError: a prompt_layer that the model does not have.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompt_layer: int | None = None) -> None:
        layers = find_decoder(model).layers
        known = prompt_layer in (None, *range(len(layers)))
        parts.expect(known, "prompt_layer", f"None or a layer in 0..{len(layers) - 1}", prompt_layer)
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ArchitectureError(f"model: expected a language-model head, got {type(model).__name__} without one")
        ends = frozenset(end_tokens(model, tokenizer))
        super().__init__(ends, int(head.weight.shape[0]), context_of(model), prompt_layer)
        self.model = model
        self._layer = None if prompt_layer is None else layers[prompt_layer]
        self._head: nn.Module = head
        self._cache_name = caches.argument(model)
        takes_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes_logits else {}

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of one candidate's keys and values, prompt included, in a model with full attention."""
        config: Any = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = next(self.model.parameters()).dtype.itemsize
        return 2 * config.num_hidden_layers * heads * width * itemsize * (-(-tokens // _ROOM) * _ROOM)

    @torch.inference_mode()
    def prefill(self, root: Candidates) -> None:
        ids = torch.tensor([root.prompt], device=device_of(self.model))
        with self._last_rows(self._layer) as prompt:
            output, last = self._pass(DynamicCache(config=self.model.config), ids)  # type: ignore[arg-type]
        cache = caches.cache_in(output)
        if not caches.splits(cache):
            raise ArchitectureError(f"model: expected keys and values that grow by a token, got {type(cache).__name__}")
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = _RoomyLayer
        root.hidden = torch.cat([last, last, prompt[-1].to(last.device)], dim=1) if prompt else last
        root.state = OpenRows(cache, output.logits[:, -1])

    @torch.inference_mode()
    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> list[list[int]]:
        """Extend as `Backend.extend`; GuardError for a block below 1 or past the model's context."""
        room = self.context - len(candidates.prompt) - candidates.length
        parts.expect(1 <= block <= room, "block", f"1 to {room} tokens, which the model's context has room for", block)
        sampling = sampling or Sampling()
        device, rows = device_of(self.model), candidates.state
        alive = (~candidates.finished).nonzero()[:, 0]
        drawn = uniforms(candidates.streams[alive.numpy()], candidates.length, block)
        seen = [candidates.prompt + candidates.answers[i] for i in alive.tolist()]
        alive, uniform, ids = alive.to(device), torch.from_numpy(drawn).to(device), torch.tensor(seen, device=device)
        ends = torch.tensor(sorted(self.ends), dtype=torch.long, device=device)
        tokens = torch.full((len(candidates), block), -1, device=device)
        assert candidates.hidden is not None
        hidden = candidates.hidden.clone()  # other candidates may share the old ones
        for step in range(block):
            if rows is None:
                break
            logits = rows.logits
            if sampling.processors is not None:
                logits = sampling.processors(ids, logits.float())
            if penalty is not None:
                logits = logits - penalty.to(logits.device)
            chosen = sample(logits, uniform[:, step], sampling)
            tokens[alive, step] = chosen
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            hidden[alive] = parts.grow(hidden[alive], self.advance(rows, chosen), candidates.length + step + 1)
            going = (~torch.isin(chosen, ends)).nonzero()[:, 0]
            if len(going) < len(chosen):
                alive, uniform, ids = alive[going], uniform[going], ids[going]
                rows = rows.keep(going) if len(going) else None
        candidates.state, candidates.hidden = rows, hidden
        candidates.finished = torch.ones_like(candidates.finished).index_fill(0, alive.cpu(), False)
        new = [[token for token in row if token >= 0] for row in tokens.tolist()]
        for answer, more in zip(candidates.answers, new, strict=True):
            answer += more
        return new

    @torch.inference_mode()
    def append(self, candidates: Candidates, tokens: Sequence[int]) -> None:
        """Append one token per pass: a steering reads several tokens at once as another prompt."""
        for token in tokens:
            chosen = torch.full((len(candidates),), token, device=device_of(self.model))
            last = self.advance(candidates.state, chosen)
            assert candidates.hidden is not None
            candidates.hidden = parts.grow(candidates.hidden, last, candidates.length + 1)
            super().append(candidates, [token])

    @torch.inference_mode()
    def branch(self, candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None = None) -> Candidates:
        """Branch as `Backend.branch`. Keys and values are copied if the rows change, otherwise when one copy grows."""
        new = super().branch(candidates, index, ordinals)
        row_of = (~candidates.finished).cumsum(0) - 1
        rows = row_of[torch.as_tensor(index, dtype=torch.long)[~new.finished]]
        if len(rows):
            new.state = candidates.state.copy(rows)
        return new

    @torch.inference_mode()
    def join(self, groups: Sequence[Candidates]) -> Candidates:
        """Join as `Backend.join`, with all keys and values and the decisions of a steering in one cache."""
        new = super().join(groups)
        states = [group.state for group in groups if group.state is not None]
        if len(states) < 2:
            new.state = states[0] if states else None
            return new
        cache = _fork(states[0].cache)
        layers: list[Any] = cache.layers  # plain keys and values, see `prefill`
        for number, layer in enumerate(layers):
            same: list[Any] = [layer, *(state.cache.layers[number] for state in states[1:])]
            layer.keys, layer.values = (torch.cat([getattr(one, name) for one in same]) for name in ("keys", "values"))
        if (latch := attached(cache)) is not None:
            latch.join([one for state in states[1:] if (one := attached(state.cache)) is not None])
        new.state = OpenRows(cache, torch.cat([state.logits for state in states]))
        return new

    def advance(self, rows: OpenRows, chosen: Tensor) -> Tensor:
        """Add a token int64 [m] to each row, in place; return the last hidden states float32 [m, H] there."""
        output, last = self._pass(rows.cache, chosen[:, None])
        rows.cache, rows.logits = caches.cache_in(output), output.logits[:, -1]
        return last

    def _pass(self, cache: DynamicCache, ids: Tensor) -> tuple[Any, Tensor]:
        """Return the output for ids [m, t], and the rows float32 [m, H] of the last tokens that enter the head."""
        with self._last_rows(self._head) as rows:
            output = self.model(input_ids=ids, use_cache=True, **{self._cache_name: cache}, **self._last_only)
        return output, rows[0]

    @contextmanager
    def _last_rows(self, module: nn.Module | None) -> Iterator[list[Tensor]]:
        """Collect the rows [m, H] of the last tokens that leave a layer or enter the head, before other hooks."""
        rows: list[Tensor] = []

        def keep(_: nn.Module, *values: Any) -> None:
            last = values[-1] if isinstance(values[-1], Tensor) else values[-1][0]
            rows.append(last[:, -1].to(torch.float32, copy=True))

        hook: Any = nullcontext()
        if module is self._head:
            hook = module.register_forward_pre_hook(keep, prepend=True)
        elif module is not None:
            hook = module.register_forward_hook(keep)
        with hook:
            yield rows

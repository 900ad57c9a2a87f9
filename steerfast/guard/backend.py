"""The HuggingFace backend of candidates.

The prompt runs once, alone; its keys and values are then repeated for the candidates. Every token is one batched pass
of all unfinished candidates; the states that scorers and critic read (`steerfast.guard.latent`) come from that pass.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from steerfast.errors import ArchitectureError, GuardError
from steerfast.guard import latent
from steerfast.guard.candidates import Candidates, Sampling, branch_of, root_of, sample, uniforms, union_of
from steerfast.hf import caches
from steerfast.hf.generation import device_of, end_tokens
from steerfast.hf.latch import Latch
from steerfast.hf.structure import find_decoder
from steerfast.text.encoding import context_of

__all__ = ["HFBackend"]

_ROOM = 32  # tokens that a cache reserves at a time


class _RoomyLayer(DynamicLayer):
    """Keys and values with reserved room: a step writes its own tokens instead of copying all earlier ones."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.keys.shape[-2]
        end = held + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.room = _with_room(self.keys, end), _with_room(self.values, end)
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


def _with_room(held: Tensor, tokens: int) -> Tensor:
    room = held.new_empty(*held.shape[:2], -(-tokens // _ROOM) * _ROOM, held.shape[3])
    room[:, :, : held.shape[2]] = held
    return room


def _fork(cache: DynamicCache) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = [layer.fork() if isinstance(layer, _RoomyLayer) else copy.copy(layer) for layer in cache.layers]
    latch: Latch | None = getattr(cache, "steerfast_latch", None)
    if latch is not None:
        other.steerfast_latch = latch.copy()  # type: ignore[attr-defined]
    return other


@dataclass
class _OpenRows:
    """Unfinished candidates, in order: cache, logits [m, V] of their next tokens, latent states [m, S]."""

    cache: DynamicCache
    logits: Tensor
    hidden: Tensor

    def taken(self, rows: Tensor) -> _OpenRows:
        cache = _fork(self.cache)
        rows = rows.to(self.logits.device)
        if not torch.equal(rows, torch.arange(len(self.logits), device=rows.device)):
            cache.batch_select_indices(rows)
        return _OpenRows(cache, self.logits[rows], self.hidden[rows])

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows, in place."""
        self.cache.batch_select_indices(rows)
        self.logits, self.hidden = self.logits[rows], self.hidden[rows]


class HFBackend:
    """Candidates of a HuggingFace model, steered or not.

    Args:
        prompt_layer: of the latent states, see `steerfast.guard.latent`; None: the states are the last rows alone.

    Memory: keys and values of every unfinished candidate, at most `cache_bytes` each. A search that keeps K of N
    candidates holds N + 3K + 1 at a time: the new ones, their parents, those kept so far, those being kept.

    Raises:
        ArchitectureError: no decoder-only model with a language-model head.
        GuardError: a prompt_layer that the model does not have.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompt_layer: int | None = None) -> None:
        layers = find_decoder(model).layers
        if prompt_layer is not None and not 0 <= prompt_layer < len(layers):
            raise GuardError(f"prompt_layer: expected None or a layer in 0..{len(layers) - 1}, got {prompt_layer!r}")
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ArchitectureError(f"model: expected a language-model head, got {type(model).__name__} without one")
        self.model = model
        self.prompt_layer = prompt_layer
        self._layer = None if prompt_layer is None else layers[prompt_layer]
        self._head: nn.Module = head
        self._ends = torch.tensor(sorted(end_tokens(model, tokenizer)), dtype=torch.long, device=device_of(model))
        takes = inspect.signature(model.forward).parameters
        self._cache_name = caches.argument(model)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def ends(self) -> frozenset[int]:
        """Return the tokens that finish an answer."""
        return frozenset(self._ends.tolist())

    @property
    def vocabulary(self) -> int:
        """Return the number of logits."""
        weight: Any = self._head.weight
        return int(weight.shape[0])

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its answer."""
        return context_of(self.model)

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of one candidate's keys and values, prompt included, in a model with full attention."""
        config: Any = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = next(self.model.parameters()).dtype.itemsize
        return 2 * config.num_hidden_layers * heads * width * itemsize * (-(-tokens // _ROOM) * _ROOM)

    @torch.inference_mode()
    def start(self, prompt_ids: Sequence[int], n: int = 1, seed: int = 0) -> Candidates:
        """Start as `Backend.start`, with one pass over the prompt for any `n`.

        Raises:
            GuardError: an empty prompt, or one longer than the context.
        """
        root = root_of(prompt_ids, seed, self.context)
        if n < 1:
            raise GuardError(f"n: expected at least 1, got {n}")
        config: Any = self.model.config
        with self._prompt_row() as row:
            output, last = self._pass(DynamicCache(config=config), torch.tensor([root.prompt], device=self.device))
        cache = caches.cache_in(output)
        if not caches.splits(cache):
            raise ArchitectureError(f"model: expected keys and values that grow by a token, got {type(cache).__name__}")
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[number] = roomy = _RoomyLayer()
                roomy.__dict__.update(layer.__dict__)
        root.hidden = latent.begin(last, None if self._layer is None else row[-1])
        root.state = _OpenRows(cache, output.logits[:, -1], root.hidden)
        return root if n == 1 else self.branch(root, [0] * n, range(n))

    @torch.inference_mode()
    def extend(
        self, candidates: Candidates, block: int, sampling: Sampling | None = None, penalty: Tensor | None = None
    ) -> tuple[list[list[int]], Tensor, Tensor]:
        """Extend as `Backend.extend`.

        Raises:
            GuardError: a block below 1, or past the model's context.
        """
        if block < 1:
            raise GuardError(f"block: expected at least 1, got {block}")
        held = len(candidates.prompt) + candidates.length
        if held + block > self.context:
            raise GuardError(f"block: the model's context has room for {self.context - held} more tokens, got {block}")
        sampling = sampling or Sampling()
        open_rows = (~candidates.finished).nonzero()[:, 0]
        seen = None if sampling.processors is None else self._ids(candidates, open_rows)
        drawn = uniforms(candidates.streams[open_rows.numpy()], candidates.length, block)
        uniform = torch.from_numpy(drawn).to(self.device)
        tokens = torch.full((len(candidates), block), -1, device=self.device)
        assert candidates.hidden is not None
        hidden, live = candidates.hidden.clone(), open_rows.to(self.device)  # other candidates may share the old ones
        penalty = None if penalty is None else penalty.to(self.device)
        rows: _OpenRows | None = candidates.state
        for step in range(block):
            if rows is None:
                break
            logits = rows.logits
            if sampling.processors is not None:
                logits = sampling.processors(seen, logits.float())  # type: ignore[arg-type]
            if penalty is not None:
                logits = logits - penalty
            chosen = sample(logits, uniform[:, step], sampling)
            tokens[live, step] = chosen
            rows = self._forward(rows, chosen, candidates.length + step + 1)
            if seen is not None:
                seen = torch.cat([seen, chosen[:, None]], dim=1)
            ended = torch.isin(chosen, self._ends)
            if step + 1 == block:
                hidden[live] = rows.hidden
            if not bool(ended.any()):
                continue
            hidden[live[ended]] = rows.hidden[ended]
            going = (~ended).nonzero()[:, 0]
            live, uniform = live[going], uniform[going]
            seen = None if seen is None else seen[going]
            if not len(going):
                rows = None
            elif step + 1 < block:
                rows.keep(going)
            else:
                rows = rows.taken(going)
        candidates.state, candidates.hidden = rows, hidden
        candidates.finished = torch.ones_like(candidates.finished).index_fill(0, live.cpu(), False)
        new = [[token for token in row if token >= 0] for row in tokens.tolist()]
        for answer, more in zip(candidates.answers, new, strict=True):
            answer += more
        return new, hidden, candidates.finished

    @torch.inference_mode()
    def append(self, candidates: Candidates, tokens: Sequence[int]) -> None:
        """Append one token per pass: a steering reads several tokens at once as another prompt."""
        for token in tokens:
            chosen = torch.full((len(candidates),), token, device=self.device)
            candidates.state = self._forward(candidates.state, chosen, candidates.length + 1)
            candidates.hidden = candidates.state.hidden
            for answer in candidates.answers:
                answer.append(int(token))

    @torch.inference_mode()
    def branch(self, candidates: Candidates, index: Sequence[int], ordinals: Sequence[int] | None = None) -> Candidates:
        """Branch as `Backend.branch`. Keys and values are copied if the rows change, otherwise when one copy grows."""
        new = branch_of(candidates, index, ordinals)
        row_of = (~candidates.finished).cumsum(0) - 1
        rows = row_of[torch.as_tensor(index, dtype=torch.long)[~new.finished]]
        if len(rows):
            new.state = candidates.state.taken(rows)
        return new

    @torch.inference_mode()
    def join(self, parts: Sequence[Candidates]) -> Candidates:
        """Join as `Backend.join`."""
        if len(parts) == 1:
            return parts[0]
        new = union_of(parts)
        states = [part.state for part in parts if part.state is not None]
        if len(states) == 1:
            new.state = states[0]
        elif states:
            cache = _fork(states[0].cache)
            others = [state.cache for state in states[1:]]
            layers: list[Any] = cache.layers  # plain keys and values, see `start`
            for number, layer in enumerate(layers):
                same: list[Any] = [layer, *(other.layers[number] for other in others)]
                layer.keys, layer.values = (torch.cat([getattr(one, n) for one in same]) for n in ("keys", "values"))
            _join_latches(cache, others)
            logits, hidden = (torch.cat([getattr(state, name) for state in states]) for name in ("logits", "hidden"))
            new.state = _OpenRows(cache, logits, hidden)
        return new

    def _ids(self, candidates: Candidates, rows: Tensor) -> Tensor:
        ids = [candidates.prompt + candidates.answers[i] for i in rows.tolist()]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _forward(self, rows: _OpenRows, chosen: Tensor, tokens: int) -> _OpenRows:
        """Return the rows one token later, in the memory of `rows`.

        Args:
            chosen: the tokens, int64 [m]. tokens: the length of the answers with them.
        """
        output, last = self._pass(rows.cache, chosen[:, None])
        return _OpenRows(caches.cache_in(output), output.logits[:, -1], latent.grow(rows.hidden, last, tokens))

    def _pass(self, cache: DynamicCache, ids: Tensor) -> tuple[Any, Tensor]:
        """Return the output for ids [m, t], and the last hidden states float32 [m, H] at the last tokens."""
        with self._captured() as captured:
            output = self.model(input_ids=ids, use_cache=True, **{self._cache_name: cache}, **self._last_only)
        return output, captured[0]

    @contextmanager
    def _captured(self) -> Iterator[list[Tensor]]:
        """Collect the last hidden states that enter the head, before other hooks edit them."""
        captured: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            captured.append(args[0][:, -1].to(torch.float32, copy=True))

        handle = self._head.register_forward_pre_hook(keep, prepend=True)
        try:
            yield captured
        finally:
            handle.remove()

    @contextmanager
    def _prompt_row(self) -> Iterator[list[Tensor]]:
        """Collect the prompt's last row [1, H] at `prompt_layer` in every pass; nothing if that is None."""
        captured: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            rows = output if isinstance(output, Tensor) else output[0]
            captured.append(rows[:, -1].to(torch.float32, copy=True))

        handle = None if self._layer is None else self._layer.register_forward_hook(keep)
        try:
            yield captured
        finally:
            if handle is not None:
                handle.remove()


def _join_latches(cache: Any, others: Sequence[Any]) -> None:
    """Join the decisions of a steering, which are kept with the caches."""
    latch: Latch | None = getattr(cache, "steerfast_latch", None)
    if latch is not None:
        all_of = [latch, *(other.steerfast_latch for other in others)]
        latch.values = torch.cat([one.values for one in all_of], dim=1)
        latch.scores = torch.cat([one.scores for one in all_of], dim=1)

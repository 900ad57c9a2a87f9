"""The roster of an engine that packs: the profiles and decisions of each request while it runs.

With continuous batching a step holds rows of different requests, and a prompt may come in several steps. The engine may
also drop a request's cache and compute its rows again. So a request keeps one column from its first step to its last:
its slots, strengths and decisions lie there, at addresses that never change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.errors import ProfileError, SteerfastError
from steerfast.kernels.edits import torch_scales
from steerfast.profile import SteeringProfile
from steerfast.runtime.bank import Bank, Reach
from steerfast.runtime.span import NO_END, UNSTEERED, MeanRows, Stack, filled, slots_of
from steerfast.runtime.step import Step, StepMemory
from steerfast.runtime.tables import PackedRows, StepTables

_MOST_STEPS = 256  # by their number of rows; each is cheap to make again
_KEPT = 1 << 16  # decisions of ended requests; some 500 bytes each


@dataclass
class Request:
    """Name the profiles on one request.

    Attributes:
        stack: its profiles; empty: it is not steered.
        prompt_length: tokens of its prompt; gates decide at the last one.
        ids: the token ids of its prompt, where means are read; None: unknown.
        means: the rows that the mean of each profile takes.
        column: its column of the roster; None: its decisions wait on the host.
        answer_from: the first row of its answer: the prompt's length, or the row after its thought.
        decided: its gates decided. counted: the prompt rows that its means have read.
    """

    stack: Stack
    prompt_length: int
    ids: InitVar[Sequence[int] | NDArray[np.integer] | None] = None
    means: tuple[MeanRows, ...] = field(init=False)
    column: int | None = field(default=None, init=False)
    decided: bool = field(default=False, init=False)
    counted: int = field(default=0, init=False)
    answer_from: int = field(init=False)

    def __post_init__(self, ids: Sequence[int] | NDArray[np.integer] | None) -> None:
        thinks = any(entry.span.after_thought for entry in self.stack)
        self.answer_from = NO_END if thinks else self.prompt_length
        self.means = tuple(entry.span.read(self.prompt_length, ids) for entry in self.stack)

    @property
    def read_until(self) -> int:
        """The first row after all that a mean takes; 0 where no gate reads a mean."""
        return max((rows.until for rows in self.means), default=0)


class Roster:
    """Hold the requests of one engine, by name, and the tables of its current step. Threads may share it.

    Args:
        bank: holds the profiles.
        max_rows: the most rows of a step.
        max_requests: the most requests of a step. More requests may rest between steps: their decisions wait on the
            host.
        stack: K, the most profiles on a request.

    Attributes:
        tables: the step's rows, slots and strengths; a request's sequence number is its column.
        values: float32 [layers, max_requests·K], latched gate values. scores: the scores behind them.
        sums: float64 [layers, max_requests·K], scores added up by gates that read a mean.
        scales: float32 [layers, max_rows, K], the scales of the step's rows.
        deciding: requests that decide in the step, until it was launched.

    Raises:
        ValueError: a size is out of bounds.
    """

    def __init__(self, bank: Bank, max_rows: int, max_requests: int, stack: int = 1) -> None:
        self.bank = bank
        self._allocate(max_rows, max_requests, stack)
        self._requests: dict[str, Request] = {}
        self._free = list(range(max_requests))
        self._ended: dict[str, int] = {}  # columns of requests that ended
        self._host: dict[str, Tensor] = {}  # values, scores and sums without a column, float64 [3, layers, K]
        self.deciding: dict[str, Request] = {}
        # Requests whose means read rows of this step, and their new `counted`.
        self._counting: list[tuple[Request, int]] = []
        self._launched = torch.cuda.Event() if bank.table.is_cuda else None
        self._lock = threading.RLock()

    def _allocate(self, max_rows: int, max_requests: int, stack: int) -> None:
        device = self.bank.table.device
        self.tables = StepTables(max_rows, max_requests, stack, device)
        self._steps: dict[tuple[int, bool], tuple[Reach, Step]] = {}
        with torch.inference_mode(False):  # also serve callers outside inference mode
            shape = (len(self.bank.table), max_requests * stack)
            self.values = torch.zeros(shape, dtype=torch.float32, device=device)
            self.scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
            self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
            self.scales = torch.zeros(shape[0], max_rows, stack, dtype=torch.float32, device=device)
            self._scratch = torch.zeros_like(self.scales[0]), torch.zeros_like(self.values[0])

    def widen(self, stack: int) -> None:
        """Make room for `stack` profiles on a request, between two steps. Decisions stay, addresses change."""
        with self._lock:
            self._wait()
            old, before = self.stack, (self.values, self.scores, self.sums)
            self._allocate(len(self.tables.slots), len(self.tables.deciders), stack)
            for new, theirs in zip((self.values, self.scores, self.sums), before, strict=True):
                new.unflatten(1, (-1, stack))[..., :old] = theirs.unflatten(1, (-1, old))
            for name, latch in self._host.items():
                wide = self._new_latch(Request((), 0)).clone()
                wide[..., :old] = latch
                self._host[name] = wide

    def __contains__(self, name: str) -> bool:
        return name in self._requests

    @property
    def stack(self) -> int:
        """K, the most profiles on a request."""
        return self.tables.stack

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        tensors = [self.values, self.scores, self.sums, self.scales, *self._scratch]
        return self.tables.nbytes + sum(tensor.nbytes for tensor in tensors)

    @property
    def names(self) -> set[str]:
        """Requests that have not ended."""
        with self._lock:
            return set(self._requests)

    @property
    def slots(self) -> set[int]:
        """Slots that steer some request."""
        with self._lock:
            return slots_of(request.stack for request in self._requests.values())

    def add(self, name: str, request: Request, like: str | None = None) -> None:
        """Add a request from the next step on. An ended request may have had the same name.

        Args:
            like: a request of the same prompt and profiles whose cached rows were copied for this one. Means include
                these rows.

        Raises:
            ValueError: a request of this name runs, or the stack is longer than K.
        """
        with self._lock:
            if name in self._requests:
                raise ValueError(f"name: expected a new one, got {name!r}")
            if len(request.stack) > self.stack:
                raise ValueError(f"stack: expected at most {self.stack} profiles, got {len(request.stack)}")
            self.forget(name)
            self._requests[name] = request
            if like is not None and request.read_until:
                self._continue(name, request, like)

    def end_thoughts(self, answers: Mapping[str, int]) -> None:
        """Note between two steps that thoughts have ended: the first row of the answer by request."""
        with self._lock:
            for name in self._requests.keys() & answers.keys():  # only the first end counts
                self._requests[name].answer_from = min(self._requests[name].answer_from, answers[name])

    def end(self, names: Iterable[str]) -> None:
        """End these requests. The decisions of the last 65,536 ended requests stay readable."""
        with self._lock:
            for name in self._requests.keys() & set(names):
                request = self._requests.pop(name)
                if request.column is not None:
                    self._ended[name] = request.column
                if not request.decided:
                    self.forget(name)

    def forget(self, name: str) -> None:
        """Drop the decisions of an ended request."""
        with self._lock:
            self._host.pop(name, None)
            if name in self._ended:
                self._free.append(self._ended.pop(name))

    def decision(self, name: str) -> Tensor | None:
        """Return gate values and scores, float32 [2, layers, K] on the CPU.

        None: the request is unknown, or has not decided.
        """
        with self._lock:
            request = self._requests.get(name)
            latch = self._latch(name) if request is None or request.decided else None
            return None if latch is None else latch[:2].float()

    def bounds(self, names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the prompt's length of these requests, [n], and the first row that each profile edits no more, [n, K].

        Where a request has fewer profiles, no end comes.
        """
        with self._lock:
            requests = [self._requests[name] for name in names]
        prompts = np.array([request.prompt_length for request in requests], dtype=np.int64)
        answers = np.array([request.answer_from for request in requests], dtype=np.int64)
        stacks = [filled(request.stack, self.stack) for request in requests]
        return prompts, answers[:, None] + self._each([[one.span.answer_rows for one in stack] for stack in stacks])

    def step(
        self,
        names: Sequence[str],
        past: Sequence[int] | NDArray[np.integer],
        lengths: Sequence[int] | NDArray[np.integer],
        padded_rows: int,
    ) -> bool:
        """Set up the next step, on the device's current stream; call `launched` after its forward pass.

        Args:
            names: requests of the step, in the order of their rows.
            past: rows of each request in earlier steps, which are cached.
            lengths: rows of each request in this step.
            padded_rows: rows of the step, padding included.

        Returns:
            Whether a gate reads rows of the step.

        Raises:
            KeyError: a request is unknown.
            ValueError: too many requests or rows.
            SteerfastError: the deciding row of a request, or a row whose mean a gate reads, was never in a step.
        """
        with self._lock:
            requests = [self._requests[name] for name in names]
            self._give_columns(names, requests)
        past, count = np.asarray(past, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        # The rows of this step that are the prompt's last, and the answer's first.
        last = np.array([request.prompt_length - 1 for request in requests], dtype=np.int64) - past
        answer = np.array([request.answer_from for request in requests], dtype=np.int64)[:, None] - past[:, None]
        stacks = [filled(request.stack, self.stack) for request in requests]
        slot = self._each([[entry.slot for entry in stack] for stack in stacks])
        after_prompt = self._each([[entry.span.after_prompt for entry in stack] for stack in stacks], np.bool_)
        answer_rows = self._each([[entry.span.answer_rows for entry in stack] for stack in stacks])
        decided = np.array([request.decided for request in requests], dtype=np.bool_)
        waits = (slot >= 0).any(axis=1) & ~decided
        counted = self._count(names, requests, past, count)
        if (missed := waits & (last < 0) & (last + past >= 0)).any():  # an empty prompt has no last token
            raise SteerfastError(
                f"request {names[int(missed.argmax())]!r}: the last token of its prompt came from a cache"
            )
        decides = waits & (last >= 0) & (last < count)
        self.tables.write(
            PackedRows(
                lengths,
                slot,
                self._each([[entry.strength for entry in stack] for stack in stacks], np.float64),
                np.where(decides, last, -1),
                edited_from=np.where(after_prompt, (answer - 1).clip(0), 0),
                edited_until=(answer + answer_rows).clip(0, NO_END),
                counted=counted,
                total=self._each([[rows.until - rows.first for rows in self._means(request)] for request in requests]),
                columns=[request.column for request in requests],  # type: ignore[misc]
                padded_rows=padded_rows,
            )
        )
        self.deciding = {name: request for name, request, now in zip(names, requests, decides, strict=True) if now}
        if (slot >= 0).any():  # no op reads the scale of a row without a slot
            self.write_scales(padded_rows)
        return bool(self.deciding) or counted is not None

    def write_scales(self, width: int) -> None:
        """Write the scales of the first `width` rows of the step, from the decisions so far."""
        rows, strength = self.tables.of(width), self.tables.strength.view(-1)
        self.scales[:, :width] = torch_scales(rows.slots, self.values, strength, rows.sequence, self.bank.table)

    def end_edits(self, ends: NDArray[np.int64], lengths: NDArray[np.integer], positions: Tensor) -> None:
        """Leave out the rows after the end of an edit, by positions that only the device knows.

        Args:
            ends: [n, K], as `bounds`. lengths: [n], rows of each request in this step.
            positions: [rows or more], the place of each row in its sequence.
        """
        after = _to_device(torch.from_numpy(np.repeat(ends, lengths, axis=0)), self.values.device)
        slots = self.tables.slots[: len(after)]
        slots.masked_fill_(positions[: len(after), None] >= after, UNSTEERED)

    def current(self, width: int, deciding: bool, reach: Reach) -> Step:
        """Return the `Step` of the tables that `step` has written.

        Args:
            width: its rows, padding included. deciding: whether gates are launched.
            reach: where profiles act.
        """
        known = self._steps.get((width, deciding))
        if known is None or known[0] is not reach:
            latches = self.values, self.scores, self.sums, self.scales
            memory = StepMemory(self.tables.of(width), self.tables.strength.view(-1), *latches, *self._scratch)
            step = Step(reach, lambda _: self.bank, memory, deciding)
            if len(self._steps) >= _MOST_STEPS:
                self._steps.clear()
            known = self._steps[width, deciding] = (reach, step)
        return known[1]

    def _means(self, request: Request) -> tuple[MeanRows, ...]:
        """Return what the mean of each of K profiles reads."""
        return (*request.means, *[MeanRows()] * (self.stack - len(request.means)))

    def _each(self, values: Sequence[Sequence[Any]], dtype: type = np.int64) -> NDArray[Any]:
        """Return a value of each entry as an array [n, K]."""
        return np.array(values, dtype=dtype).reshape(-1, self.stack)

    def _count(
        self, names: Sequence[str], requests: Sequence[Request], past: NDArray[np.integer], lengths: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return the first row of each request that its means count in this step, and the first after the last.

        Rows may be computed again, or come from the cache: each prompt row counts once. None: no row counts.
        """
        self._counting = []
        if all(request.counted >= request.read_until for request in requests):
            return None
        first, until = np.zeros((2, len(requests), self.stack), dtype=np.int64)
        for i, (name, request) in enumerate(zip(names, requests, strict=True)):
            if request.counted >= request.read_until:
                continue
            begin, end = int(past[i]), int(past[i] + lengths[i])
            if begin > max(request.counted, min(rows.first for rows in request.means if rows.until)):
                raise SteerfastError(
                    f"request {name!r}: rows of its prompt, of which a gate reads the mean, came from a cache"
                )
            for k, rows in enumerate(request.means):
                reads = max(request.counted, rows.first), min(rows.until, end)
                if reads[0] < reads[1]:
                    first[i, k], until[i, k] = reads[0] - begin, reads[1] - begin
            self._counting.append((request, max(request.counted, end)))
        return (first, until) if (until > first).any() else None

    def launched(self) -> None:
        """Note that the step's forward pass is on the device's current stream: its decisions can be read."""
        with self._lock:
            if self._launched is not None:
                self._launched.record()
            for request in self.deciding.values():
                request.decided = True
            for request, counted in self._counting:
                request.counted = counted
            self.deciding, self._counting = {}, []

    def _wait(self) -> None:
        if self._launched is not None:
            self._launched.synchronize()

    def _continue(self, name: str, request: Request, like: str) -> None:
        """Continue the means of another request's prompt, or take its decisions."""
        other, latch = self._requests.get(like), self._latch(like)
        if latch is None:
            return
        self._host[name] = latch.clone()
        if other is None or other.decided:  # an ended request keeps only its decisions
            request.decided, request.counted = True, request.prompt_length
        else:
            request.counted = other.counted

    def _latch(self, name: str) -> Tensor | None:
        """Return values, scores and sums of a request, float64 [3, layers, K] on the CPU; None: they are nowhere."""
        if name in self._host:
            return self._host[name]
        request = self._requests.get(name)
        column = self._ended.get(name) if request is None else request.column
        if column is None:
            return None
        self._wait()
        return self._latches([column])[0]

    def columns(self, requests: Sequence[Request]) -> Tensor:
        """Return where the deciders of these requests lie in `values`, int64 [len(requests)·K] on the device."""
        return self._deciders_of([request.column for request in requests if request.column is not None])

    def _deciders_of(self, columns: Sequence[int]) -> Tensor:
        index = torch.tensor(columns, dtype=torch.int64, device="cpu")[:, None] * self.stack
        return _to_device((index + torch.arange(self.stack, device="cpu")).flatten(), self.values.device)

    def _latches(self, columns: Sequence[int]) -> Tensor:
        """Return values, scores and sums in these columns, float64 [columns, 3, layers, K] on the CPU."""
        index = self._deciders_of(columns)
        tensors = (self.values, self.scores, self.sums)
        stacked = torch.stack([t[:, index].double() for t in tensors]).cpu()  # [3, layers, columns·K]
        return stacked.unflatten(2, (-1, self.stack)).permute(2, 0, 1, 3)

    def _give_columns(self, names: Sequence[str], requests: Sequence[Request]) -> None:
        missing = [(name, request) for name, request in zip(names, requests, strict=True) if request.column is None]
        if not missing:
            return
        if len(requests) > len(self.tables.deciders):
            raise ValueError(f"names: expected at most {len(self.tables.deciders)} requests, got {len(requests)}")
        if len(missing) > len(self._free):
            self._make_room(len(missing) - len(self._free), set(names))
        latches = []
        for name, request in missing:
            request.column = self._free.pop()
            latch = self._host.pop(name, None)
            latches.append(self._new_latch(request) if latch is None else latch)
        index = self._deciders_of([request.column for _, request in missing])  # type: ignore[misc]
        values, scores, sums = _to_device(torch.cat(latches, dim=2), self.values.device)  # [3, layers, missing·K]
        self.values[:, index], self.scores[:, index], self.sums[:, index] = values.float(), scores.float(), sums

    def _new_latch(self, request: Request) -> Tensor:
        """Return the latch of a request before its gates decide, float64 [3, layers, K]."""
        is_open = [float(entry.span.open) for entry in filled(request.stack, self.stack)]
        start = [is_open, [float("-inf")] * self.stack, [0.0] * self.stack]
        latch = torch.tensor(start, dtype=torch.float64, device="cpu")
        return latch[:, None].expand(3, len(self.values), self.stack)

    def _make_room(self, count: int, busy: set[str]) -> None:
        """Free at least `count` columns: move the decisions of ended requests, then of resting ones, to the host."""
        moved, self._ended = self._ended, {}
        for name, request in self._requests.items():
            if len(moved) >= count:
                break
            if request.column is not None and name not in busy:
                moved[name], request.column = request.column, None
        for (name, column), latch in zip(moved.items(), self._latches(list(moved.values())), strict=True):
            self._host[name] = latch.clone()
            self._free.append(column)
        ended = [name for name in self._host if name not in self._requests]
        for name in ended[: max(0, len(ended) - _KEPT)]:
            del self._host[name]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device, without waiting for the device's earlier work."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def check_packed(name: str, profile: SteeringProfile, *, split: bool = True, remedy: str = "") -> None:
    """Raise ProfileError if packed steps cannot hold a profile.

    Args:
        name: of the argument with the profile.
        split: a prompt may come in several steps. remedy: advice about that for the message.
    """
    if profile.gate.kind == "token":
        raise ProfileError(f"{name}: expected an always or prompt gate with continuous batching, got a token gate")
    if profile.second_pass:
        raise ProfileError(
            f"{name}: expected no layer before the sensor with continuous batching, got layers steered before the "
            f"sensor, layer {profile.sensor}"
        )
    if profile.gate.kind == "prompt" and profile.positions == "all" and split:
        raise ProfileError(
            f"{name}: expected positions='response' with continuous batching, which may split a prompt{remedy}, got "
            "positions='all'"
        )

"""Requests whose tokens come in packed steps: who steers each, and what its gate decided, for as long as it lives.

Engines that batch continuously put rows of different requests into each step, split prompts over several, and may
compute a request's rows again after they threw its cache away. So a request keeps a column of its own from its first
step to its last: there lie its slot, its strength and its decision, at addresses that never change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.errors import ProfileError, SteerfastError
from steerfast.profile import SteeringProfile
from steerfast.runtime.bank import Bank, Deciding
from steerfast.runtime.tables import NO_END, UNSTEERED, StepTables, answer_rows, mean_rows

__all__ = ["Request", "Requests", "check_packed", "reach"]

_KEPT = 1 << 16  # decisions of ended requests; some 500 bytes each


@dataclass
class Request:
    """What steers one request.

    slot: of the bank; -1: nobody does. strength: multiplies the slot's own.
    prompt_length: tokens of its prompt; the last of them decides.
    late: whether it is steered from that token on (positions ``response``), and not in every row.
    is_open: what its latch says before anything is decided: True where its slot has no gates.
    answer_rows: how many rows after its prompt are steered.
    mean: of how many of its prompt's last rows its gates read the mean, 0: none; `counted`: up to which row they have.
    """

    slot: int
    strength: float
    prompt_length: int
    late: bool = True
    is_open: bool = False
    answer_rows: int = NO_END
    mean: int = 0
    column: int | None = field(default=None, init=False)
    decided: bool = field(default=False, init=False)
    counted: int = field(default=0, init=False)

    @property
    def mean_from(self) -> int:
        """The first row that the mean takes."""
        return max(0, self.prompt_length - self.mean)


def reach(profile: SteeringProfile | None) -> tuple[bool, bool, int, int]:
    """`late`, `is_open`, `answer_rows` and `mean` of a request that the profile steers; None: nobody does."""
    if profile is None:
        return True, False, NO_END, 0
    rows, mean = answer_rows(profile.answer_tokens), mean_rows(profile.gate)
    return profile.positions == "response", profile.gate.kind == "always", rows, mean


class Requests:
    """The requests of one engine, by name, and the tables of its current step. Threads may share it.

    Args:
        bank: whose slots steer them.
        max_rows: the most rows of a step.
        max_requests: the most requests of a step. Requests that rest between steps may be more: their decisions
            then wait on the host.

    Attributes:
        tables: the step's rows, slots and strengths; a request's sequence number is its column.
        values: float32 [layers, max_requests], latched gate values. scores: the same of what they were decided from.
        sums: float64 [layers, max_requests], what gates that read a mean have added up.
        decides: which gates decide in this step, [layers, max_requests] each.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, bank: Bank, max_rows: int, max_requests: int) -> None:
        device = bank.table.device
        layers = bank.table.shape[0]
        self.bank = bank
        self.tables = StepTables(max_rows, max_requests, 1, device)
        with torch.inference_mode(False):  # so that they also serve a caller outside inference mode
            shape = (layers, max_requests)
            self.values = torch.zeros(shape, dtype=torch.float32, device=device)
            self.scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
            self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
            self.decides = Deciding(
                torch.full(shape, -1, dtype=torch.int32, device=device),
                torch.zeros(shape, dtype=torch.bool, device=device),
                torch.zeros(shape, dtype=torch.bool, device=device),
            )
        self._requests: dict[str, Request] = {}
        self._free = list(range(max_requests))
        self._ended: dict[str, int] = {}  # columns of requests that ended
        self._host: dict[str, Tensor] = {}  # values, scores and sums, float64 [3, layers], that have no column
        self._deciding: list[Request] = []  # those that decide in this step
        self._counting_now: list[tuple[Request, int]] = []  # those of which a mean takes rows of it, and how many then
        self._was_deciding = False
        self._launched = torch.cuda.Event() if device.type == "cuda" else None
        self._lock = threading.RLock()

    def __contains__(self, name: str) -> bool:
        return name in self._requests

    @property
    def names(self) -> set[str]:
        """Those that have not ended."""
        with self._lock:
            return set(self._requests)

    @property
    def slots(self) -> set[int]:
        """Slots that steer some request."""
        with self._lock:
            return {request.slot for request in self._requests.values()} - {UNSTEERED}

    def add(self, name: str, request: Request, like: str | None = None) -> None:
        """Let `name` be a request from the next step on; one that ended may have had the same name.

        Args:
            like: one of the same prompt and profile, copies of whose rows it finds in its cache. A mean takes these
                rows, too.

        Raises:
            ValueError: there is such a request.
        """
        with self._lock:
            if name in self._requests:
                raise ValueError(f"name: expected a new one, got {name!r}")
            self.forget(name)
            self._requests[name] = request
            if like is not None and request.mean:
                self._continue(name, request, like)

    def end(self, names: Iterable[str]) -> None:
        """Let these requests have no more steps; what they decided stays readable, of the last 65,536 of them."""
        with self._lock:
            for name in self._requests.keys() & set(names):
                request = self._requests.pop(name)
                if request.column is not None:
                    self._ended[name] = request.column
                if not request.decided:
                    self.forget(name)

    def forget(self, name: str) -> None:
        """Drop what a request that ended has decided."""
        with self._lock:
            self._host.pop(name, None)
            if name in self._ended:
                self._free.append(self._ended.pop(name))

    def decision(self, name: str) -> Tensor | None:
        """Gate values and scores, float32 [2, layers] on the CPU; None where nothing is known or decided yet."""
        with self._lock:
            request = self._requests.get(name)
            if request is not None and not request.decided:
                return None
            if name in self._host:
                return self._host[name][:2].float()
            column = self._ended.get(name) if request is None else request.column
            if column is None:
                return None
            if self._launched is not None:
                self._launched.synchronize()
            return torch.stack([self.values[:, column], self.scores[:, column]]).cpu()

    def bounds(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of the prompts of these requests, and the first row of each that is steered no more: [2, n]."""
        with self._lock:
            requests = [self._requests[name] for name in names]
        prompt = np.array([request.prompt_length for request in requests], dtype=np.int64)
        answer = np.array([request.answer_rows for request in requests], dtype=np.int64)
        return np.stack([prompt, prompt + answer])

    def step(
        self,
        names: Sequence[str],
        past: Sequence[int] | NDArray[np.integer],
        lengths: Sequence[int] | NDArray[np.integer],
        padded_rows: int,
    ) -> bool:
        """Set up the next step, on the device's current stream; call `launched` once its forward pass was.

        Args:
            names: requests of the step, in the order of their rows.
            past: rows of each that came in earlier steps and are cached.
            lengths: its rows in this step.
            padded_rows: rows of the step, padding included.

        Returns:
            Whether some gate reads rows of it.

        Raises:
            KeyError: there is no such request.
            ValueError: more requests or rows than there is room for.
            SteerfastError: rows of a prompt whose mean a gate reads were never in a step.
        """
        with self._lock:
            requests = [self._requests[name] for name in names]
            self._give_columns(names, requests)
        slot = np.array([request.slot for request in requests], dtype=np.int64)
        prompt, end = self.bounds(names)
        late = np.array([request.late for request in requests], dtype=np.bool_)
        decided = np.array([request.decided for request in requests], dtype=np.bool_)
        before = np.asarray(past, dtype=np.int64)
        last = prompt - 1 - before  # the row of this step that is the prompt's last
        length = np.asarray(lengths, dtype=np.int64)
        decides = ~decided & (slot >= 0) & (last >= 0) & (last < length)
        counted = self._count(names, requests, prompt, before, length)
        self.tables.write(
            lengths,
            slot[:, None],
            np.array([request.strength for request in requests], dtype=np.float64)[:, None],
            np.where(decides, last, -1),
            np.where(late, last.clip(0), 0)[:, None],
            (end - before).clip(0)[:, None],
            counted,
            None if counted is None else [request.prompt_length - request.mean_from for request in requests],
            columns=[request.column for request in requests],  # type: ignore[misc]
            padded_rows=padded_rows,
        )
        self._deciding = [request for request, now in zip(requests, decides, strict=True) if now]
        if self._deciding or self._was_deciding:
            decided_here = self.bank.deciding(self.tables.deciding, self.tables.slot[:, 0])
            for mine, now in zip(self.decides, decided_here, strict=True):
                mine.copy_(now)
        self._was_deciding = bool(self._deciding)
        return self._was_deciding or counted is not None

    def _count(
        self,
        names: Sequence[str],
        requests: Sequence[Request],
        prompt: NDArray[np.int64],
        past: NDArray[np.int64],
        length: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Which rows of each request a mean takes in this step: its prompt's that no step before had. None: no rows.

        A request's rows may be computed again, or stay in its cache: they count once.
        """
        self._counting_now = []
        if not any(request.mean for request in requests):
            return None
        first, until = np.zeros(len(requests), np.int64), np.zeros(len(requests), np.int64)
        for i, (name, request) in enumerate(zip(names, requests, strict=True)):
            if not request.mean or request.counted >= prompt[i]:
                continue
            begin = max(request.counted, request.mean_from)
            if past[i] > begin:
                raise SteerfastError(
                    f"request {name!r}: rows of its prompt, of which a gate reads the mean, came from a cache"
                )
            first[i], until[i] = begin - past[i], min(prompt[i] - past[i], length[i])
            self._counting_now.append((request, max(request.counted, int(past[i] + until[i]))))
        return (first, until) if (until > first).any() else None

    def launched(self) -> None:
        """The step's forward pass lies on the device's current stream: what it decides stands and can be read."""
        with self._lock:
            if self._launched is not None:
                self._launched.record()
            for request in self._deciding:
                request.decided = True
            for request, counted in self._counting_now:
                request.counted = counted
            self._deciding, self._counting_now = [], []

    def _continue(self, name: str, request: Request, like: str) -> None:
        """Go on from what a mean took of another one's prompt, or from what it decided."""
        other = self._requests.get(like)
        column = self._ended.get(like) if other is None else other.column
        if like in self._host:
            latch = self._host[like]
        elif column is not None:
            if self._launched is not None:
                self._launched.synchronize()
            latch = self._latches([column])[0]
        else:
            return
        self._host[name] = latch.clone()
        if other is None or other.decided:  # of one that ended, nothing else is kept
            request.decided, request.counted = True, request.prompt_length
        else:
            request.counted = other.counted

    def _latches(self, columns: Sequence[int]) -> Tensor:
        """Values, scores and sums in these columns, float64 [columns, 3, layers] on the CPU."""
        index = torch.tensor(columns).to(self.values.device)
        tensors = (self.values, self.scores, self.sums)
        return torch.stack([t[:, index].T.double() for t in tensors], dim=1).cpu()

    def _give_columns(self, names: Sequence[str], requests: Sequence[Request]) -> None:
        missing = [(name, request) for name, request in zip(names, requests, strict=True) if request.column is None]
        if not missing:
            return
        if len(requests) > len(self.tables.slot):
            raise ValueError(f"names: expected at most {len(self.tables.slot)} requests, got {len(requests)}")
        if len(missing) > len(self._free):
            self._make_room(len(missing) - len(self._free), set(names))
        layers, device = len(self.values), self.values.device
        latches = []
        for name, request in missing:
            request.column = self._free.pop()
            start = [[float(request.is_open)], [float("-inf")], [0.0]]
            fresh = torch.tensor(start, dtype=torch.float64, device="cpu").expand(3, layers)
            latches.append(self._host.pop(name, fresh))
        index = _sent(torch.tensor([request.column for _, request in missing], device="cpu"), device)
        values, scores, sums = _sent(torch.stack(latches, dim=2), device)  # [3, layers, missing]
        self.values[:, index], self.scores[:, index], self.sums[:, index] = values.float(), scores.float(), sums

    def _make_room(self, count: int, busy: set[str]) -> None:
        """Move decisions to the host: of requests that ended, and where those are too few, of some that rest."""
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


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what that still does."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def check_packed(name: str, profile: SteeringProfile, *, split: bool = True, remedy: str = "") -> None:
    """Raise ProfileError where packed steps cannot hold what the profile asks for.

    Args:
        name: of the argument that gave it.
        split: whether a prompt may come in several steps. remedy: what the message says of that.
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

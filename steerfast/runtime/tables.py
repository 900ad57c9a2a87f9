"""Which row of a step belongs to which sequence, which slots may edit it, and which row decides.

A step is one forward pass; its residual stream is seen as rows [rows, H]. In a padded batch of N sequences × T tokens
row = n·T + t (`prompt_rows`, `response_rows`); a serving engine packs sequences of any lengths (`StepTables`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.kernels.contract import MAX_STACK
from steerfast.profile import Gate

__all__ = ["NO_END", "UNSTEERED", "Rows", "StepTables", "answer_rows", "mean_rows", "prompt_rows", "response_rows"]

UNSTEERED = -1
_INT32_MAX = 2**31 - 1
NO_END = 2**30  # more rows than an answer has; twice as many are still an int32
_ALIGNMENT = 4  # numbers: regions start at multiples of 16 bytes, as fresh tensors do


@dataclass(frozen=True)
class Rows:
    """A step's row tables, for n sequences of K slots each.

    Args:
        rows: int32 [rows, 1 + K], the sequence of each row, then its slots; -1 where none edits it.
        deciding: int32 [n], the row each sequence's prompt gate reads; -1 where the step holds no prompt token of it.
        slot: int32 [n, K], the slots whose gates the sequence decides.
        member: int32 [rows], the sequence in whose prompt's mean score a row counts; -1: none. None: no row does.
        total: int32 [n], of how many rows that mean is taken.
    """

    rows: Tensor
    deciding: Tensor
    slot: Tensor
    member: Tensor | None = None
    total: Tensor | None = None

    def to(self, device: torch.device) -> Rows:
        tensors = (self.rows, self.deciding, self.slot, self.member, self.total)
        return Rows(*(None if t is None else t.to(device, non_blocking=True) for t in tensors))  # type: ignore[arg-type]

    def each_for_itself(self) -> Rows:
        """The same step with every row a sequence of its own that decides if it is steered, for token gates."""
        index = torch.arange(len(self.rows), dtype=torch.int32, device=self.rows.device)
        slot = self.rows[:, 1:].contiguous()
        steered = (slot >= 0).any(dim=1)
        return Rows(torch.cat([index[:, None], slot], dim=1), torch.where(steered, index, UNSTEERED), slot)


def answer_rows(answer_tokens: int | None) -> int:
    """How many rows of an answer are edited where so many of its tokens are chosen under steering: the first of them is
    what the prompt's last row predicts.
    """
    return NO_END if answer_tokens is None else min(NO_END, answer_tokens - 1)


def mean_rows(gate: Gate) -> int:
    """Of how many of a prompt's last rows the gate reads the mean; 0: it reads none."""
    if gate.pooling != "mean":
        return 0
    return NO_END if gate.window is None else min(NO_END, gate.window)


def prompt_rows(
    valid: Tensor, prompt_columns: int, slot: Tensor, late: Tensor, steered_answer: Tensor, mean: Tensor
) -> Rows:
    """Tables of a step that holds prompt tokens.

    Args:
        valid: bool [N, T], False on padding (left, right or in between).
        prompt_columns: columns before this one are prompt, later ones (drafted tokens) follow it.
        slot: int32 [N], the slot of each sequence; -1: none.
        late: bool [N], whether a sequence is steered from the prompt's last valid row on (positions ``response``), and
            not in every valid row. One without a prompt token in this step has all its valid rows steered.
        steered_answer: int32 [N], how many columns after the prompt a sequence is steered in.
        mean: int32 [N], of how many of its prompt's last rows a mean is taken, see `mean_rows`.
    """
    count, width = valid.shape
    column = torch.arange(width, dtype=torch.int32, device=valid.device)
    prompt = valid & (column < prompt_columns)
    last = torch.where(prompt, column, -1).amax(dim=1)
    steered = valid & ((column >= last[:, None]) | ~late[:, None])
    steered &= column < prompt_columns + steered_answer[:, None]
    start = torch.arange(count, dtype=torch.int32, device=valid.device) * width
    decides = (last >= 0) & (slot >= 0)
    rows = _rows(torch.where(steered, slot[:, None], UNSTEERED), torch.where(decides, start + last, UNSTEERED), slot)
    rank = prompt.flip(1).cumsum(dim=1, dtype=torch.int32).flip(1)  # 1 at the last row of a prompt
    counts = prompt & (rank <= mean[:, None])
    member = torch.where(counts.flatten(), rows.rows[:, 0], UNSTEERED)
    return replace(rows, member=member, total=counts.sum(dim=1, dtype=torch.int32))


def response_rows(slot: Tensor, width: int, steered: Tensor) -> Rows:
    """Tables of a step of `width` answer tokens of each sequence, by its slot int32 [N]: none decides.

    steered: int32 [N], how many of these rows are steered.
    """
    column = torch.arange(width, dtype=torch.int32, device=slot.device)
    row_slot = torch.where(column < steered[:, None], slot[:, None], UNSTEERED)
    return _rows(row_slot, torch.full_like(slot, UNSTEERED), slot)


def _rows(row_slot: Tensor, deciding: Tensor, slot: Tensor) -> Rows:
    """Rows of slots int32 [N, T]."""
    sequence = torch.arange(len(row_slot), dtype=torch.int32, device=slot.device)[:, None].expand_as(row_slot)
    return Rows(torch.stack([sequence, row_slot], dim=2).view(-1, 2), deciding, slot[:, None])


class StepTables:
    """A step's tables on a device, at addresses that never change, for serving engines and captured graphs.

    Everything lies in one buffer: first what belongs to sequences, at the capacity's size, then the rows. So a step
    is one copy of the part it uses, however many requests it serves. Launch the ops on ``rows[:n]``, where n is the
    step's number of rows or the padded one of a graph.

    Args:
        max_rows: the most rows of a step.
        max_sequences: the most sequences of a step.
        stack: K, the slots of a sequence.
        device: where the tables live.

    Attributes:
        rows: int32 [max_rows, 1 + K], deciding: int32 [max_sequences], slot: int32 [max_sequences, K]: as in `Rows`.
        strength: float32 [max_sequences, K].
        member: int32 [max_rows], total: int32 [max_sequences]: as in `Rows`.

    Raises:
        ValueError: a size that cannot be.
    """

    def __init__(self, max_rows: int, max_sequences: int, stack: int, device: torch.device | str) -> None:
        for name, size in (("max_rows", max_rows), ("max_sequences", max_sequences)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 1 <= stack <= MAX_STACK:
            raise ValueError(f"stack: expected 1 to {MAX_STACK} slots of a sequence, got {stack}")
        self._shapes = {
            "deciding": (max_sequences,),
            "slot": (max_sequences, stack),
            "strength": (max_sequences, stack),
            "total": (max_sequences,),
            "rows": (max_rows, 1 + stack),
            "member": (max_rows,),
        }
        device = torch.device(device)
        self._start: dict[str, int] = {}
        size = 0
        for name, shape in self._shapes.items():
            self._start[name] = size
            size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        pinned = device.type == "cuda"
        with torch.inference_mode(False):  # so that they also serve a caller outside inference mode
            self._device = torch.full((size,), -1, dtype=torch.int32, device=device)
            # Two, because the host may fill the next step's while the device still reads this one's.
            self._hosts = [
                _Host(torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=pinned)) for _ in range(1 + pinned)
            ]
            on_device = self._regions(self._device)
        self.rows, self.deciding, self.slot = (on_device[name] for name in ("rows", "deciding", "slot"))
        self.member, self.total = on_device["member"], on_device["total"]
        self._counted = 0  # rows of the last step, if some of them count in a mean
        self.strength = on_device["strength"].view(torch.float32)
        self.strength.zero_()
        self.rows[:, 0] = 0
        for host in self._hosts:
            host.regions = {name: region.numpy() for name, region in self._regions(host.buffer).items()}
            host.copied = torch.cuda.Event() if pinned else None

    def _regions(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[self._start[name] :][: math.prod(shape)].view(shape) for name, shape in self._shapes.items()
        }

    def write(
        self,
        lengths: Sequence[int] | NDArray[np.integer],
        slots: Sequence[Sequence[int]] | NDArray[np.integer],
        strengths: Sequence[Sequence[float]] | NDArray[np.floating],
        deciding: Sequence[int] | NDArray[np.integer],
        steered_from: Sequence[Sequence[int]] | NDArray[np.integer] | None = None,
        steered_until: Sequence[Sequence[int]] | NDArray[np.integer] | None = None,
        counted: tuple[Sequence[int] | NDArray[np.integer], Sequence[int] | NDArray[np.integer]] | None = None,
        total: Sequence[int] | NDArray[np.integer] | None = None,
        *,
        columns: Sequence[int] | NDArray[np.integer] | None = None,
        padded_rows: int | None = None,
    ) -> None:
        """Send the tables of the next step, whose sequences lie one after the other, on the current stream.

        Args:
            lengths: [n], rows of each sequence.
            slots: [n, K], slots of each sequence as `Bank.slot` gives them; -1: none.
            strengths: [n, K], finite; multiply the slots' own.
            deciding: [n], which of its rows a sequence's prompt gates read, from 0; -1: none in this step.
            steered_from: [n, K], the first of its rows that a slot edits, from 0; the length or more: none. Default:
                all of them.
            steered_until: [n, K], the first of its rows that a slot edits no more, from 0. Default: none.
            counted: [n] and [n], the first of its rows that counts in a sequence's mean score and the first after it
                that does not, from 0. Default: none do.
            total: [n], of how many rows that mean is taken, over all steps. Default: 0.
            columns: [n], distinct: where each sequence lies in `deciding`, `slot` and `strength`. Default: 0, 1, ...
            padded_rows: rows of the launch, at least the sum of the lengths; those beyond it are not steered.

        Raises:
            ValueError: a shape or number out of bounds; the tables are as they were.
        """
        stack = self.slot.shape[1]
        length = _whole("lengths", lengths, (None,), 0, len(self.rows))
        count, used = len(length), int(length.sum())
        if count > len(self.slot):
            raise ValueError(f"lengths: expected at most {len(self.slot)} sequences, got {count}")
        if used > len(self.rows):
            raise ValueError(f"lengths: expected at most {len(self.rows)} rows in all, got {used}")
        padded = used if padded_rows is None else padded_rows
        if not used <= padded <= len(self.rows):
            raise ValueError(f"padded_rows: expected {used} to {len(self.rows)}, got {padded}")
        slot = _whole("slots", slots, (count, stack), UNSTEERED, _INT32_MAX)
        decides = _whole("deciding", deciding, (count,), -1, _INT32_MAX)
        if (beyond := decides >= length).any():
            at = int(beyond.argmax())
            raise ValueError(f"deciding: expected a row of sequence {at}, below {length[at]}, got {decides[at]}")
        first, until = (
            None if given is None else _whole(name, given, (count, stack), 0, _INT32_MAX)
            for name, given in (("steered_from", steered_from), ("steered_until", steered_until))
        )
        counts = None if counted is None else _whole("counted", counted, (2, count), 0, _INT32_MAX)
        totals = np.zeros(count, np.int64) if total is None else _whole("total", total, (count,), 0, _INT32_MAX)
        column = np.arange(count)
        if columns is not None:
            column = _whole("columns", columns, (count,), 0, len(self.slot) - 1)
            if len(np.unique(column)) < count:
                raise ValueError(f"columns: expected distinct ones, got {column.tolist()}")
        with np.errstate(over="ignore"):
            strength = _shaped("strengths", strengths, (count, stack)).astype(np.float32)
        if not np.isfinite(strength).all():
            raise ValueError(f"strengths: expected finite numbers, got {strength[~np.isfinite(strength)][0]}")

        host = self._hosts[0]
        if host.copied is not None:
            host.copied.synchronize()
        start = np.cumsum(length) - length
        for name, content, unused in (
            ("deciding", np.where(decides < 0, -1, start + decides), -1),
            ("slot", slot, UNSTEERED),
            ("strength", strength.view(np.int32), 0),
            ("total", totals, 0),
        ):
            host.regions[name][:] = unused
            host.regions[name][column] = content
        rows = host.regions["rows"]
        sequence = np.repeat(np.arange(count), length)
        rows[:used, 0] = column[sequence]
        rows[:used, 1:] = slot[sequence]
        place = (np.arange(used) - start[sequence])[:, None]
        if first is not None:
            rows[:used, 1:][place < first[sequence]] = UNSTEERED
        if until is not None:
            rows[:used, 1:][place >= until[sequence]] = UNSTEERED
        rows[used:padded, 0] = 0
        rows[used:padded, 1:] = UNSTEERED
        end = self._start["rows"] + padded * (1 + stack)
        self._device[:end].copy_(host.buffer[:end], non_blocking=True)
        if counts is not None or self._counted:
            member = host.regions["member"][: max(padded, self._counted)]
            member[:] = UNSTEERED
            self._counted = 0
            if counts is not None:
                inside = (place[:, 0] >= counts[0][sequence]) & (place[:, 0] < counts[1][sequence])
                member[:used][inside] = column[sequence][inside]
                self._counted = padded
            begin = self._start["member"]
            part = slice(begin, begin + len(member))
            self._device[part].copy_(host.buffer[part], non_blocking=True)
        if host.copied is not None:
            host.copied.record(torch.cuda.current_stream(self._device.device))
        self._hosts.append(self._hosts.pop(0))


@dataclass
class _Host:
    """A buffer of the host, its regions as arrays, and the event after which it may be written again."""

    buffer: Tensor
    regions: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    copied: torch.cuda.Event | None = None


def _shaped(name: str, given: object, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """An array of this shape; None: any size."""
    try:
        array = np.asarray(given)
    except ValueError:
        raise ValueError(f"{name}: expected rows of one length, got {given!r}") from None
    if array.size == 0 and not all(shape):
        array = np.zeros([size or 0 for size in shape], dtype=np.int64)  # an empty list has one dimension alone
    if array.ndim != len(shape) or any(w is not None and w != n for w, n in zip(shape, array.shape, strict=True)):
        expected = ", ".join("n" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(array.shape)}")
    return array


def _whole(name: str, given: object, shape: tuple[int | None, ...], low: int, high: int) -> NDArray[np.int64]:
    """Whole numbers of this shape in low..high."""
    numbers = _shaped(name, given, shape)
    if numbers.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers, got {numbers.dtype}")
    outside = (numbers < low) | (numbers > high)
    if outside.any():
        raise ValueError(f"{name}: expected {low} to {high}, got {numbers[outside][0]}")
    return numbers.astype(np.int64)

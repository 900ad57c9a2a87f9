"""The tables of a step: the sequence of each row, the slots that may edit it, and the rows that gates read.

A step is one forward pass; its residual stream has rows [rows, H]. In a padded batch of N sequences × T tokens
row = n·T + t (`prompt_rows`, `response_rows`); a serving engine packs sequences of any lengths (`StepTables`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.kernels.contract import MAX_STACK
from steerfast.runtime.span import UNSTEERED

_INT32_MAX = 2**31 - 1
_ALIGNMENT = 4  # numbers: regions start at multiples of 16 bytes, as fresh tensors do


@dataclass(frozen=True)
class RowTable:
    """Map the rows of a step to n sequences, and to the up to K slots that edit or read them.

    A *decider* is one profile on one sequence: sequence i and profile k are decider i·K + k.

    Attributes:
        slots: int32 [rows, K], the slots that edit each row; -1: no edit.
        sequence: int32 [rows], the sequence of each row; -1: padding.
        deciding: int32 [n], the row at which each sequence's prompt gates decide; -1: the step has no prompt row of it.
        deciders: int32 [n, K], the slot of each decider; -1: none.
        counted: int32 [n·K, 3], the rows in the mean of a decider: the first, the first after the last, and how many
            the mean has in all steps.
    """

    slots: Tensor
    sequence: Tensor
    deciding: Tensor
    deciders: Tensor
    counted: Tensor

    def to(self, device: torch.device) -> RowTable:
        """Return the same tables on a device."""
        return RowTable(*(getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)))

    def each_for_itself(self) -> RowTable:
        """Return tables for token gates: every row is a sequence, and decides if it is steered."""
        index = torch.arange(len(self.slots), dtype=torch.int32, device=self.slots.device)
        deciding = torch.where((self.slots >= 0).any(dim=1), index, UNSTEERED)
        return RowTable(self.slots, index, deciding, self.slots, _no_rows(self.slots))


def prompt_rows(
    valid: Tensor, prompt_columns: int | Tensor, slot: Tensor, after_prompt: Tensor, answer_rows: Tensor
) -> RowTable:
    """Return the tables of a step that holds prompt rows. No row is `counted`.

    Args:
        valid: bool [N, T], False on padding (left, right or in between).
        prompt_columns: columns before this one are prompt; later ones (drafted tokens) follow it. Or int32 [N], one
            for each sequence: 0 or less where earlier steps held its prompt, more than T where later steps go on with
            it, so that nothing is decided and nothing after a prompt is edited.
        slot: int32 [N, K], the slots of each sequence; -1: none.
        after_prompt: bool [N, K], a slot edits from the prompt's last valid row on, not every valid row. If a
            sequence has no prompt row in this step, all its valid rows are edited.
        answer_rows: int32 [N, K], how many columns after the prompt a slot edits.
    """
    count, width = valid.shape
    column = torch.arange(width, dtype=torch.int32, device=valid.device)
    if not isinstance(prompt_columns, Tensor):
        prompt_columns = valid.new_full((count,), min(prompt_columns, width), dtype=torch.int32)
    until = prompt_columns[:, None]
    last = torch.where(valid & (column < until), column, -1).amax(dim=1)
    last = torch.where(prompt_columns > width, width, last)
    edited = valid[..., None] & ((column[:, None] >= last[:, None, None]) | ~after_prompt[:, None])
    edited &= column[:, None] < until[..., None] + answer_rows[:, None]
    start = torch.arange(count, dtype=torch.int32, device=valid.device) * width
    decides = (last >= 0) & (last < width) & (slot >= 0).any(dim=1)
    return RowTable(
        torch.where(edited, slot[:, None], UNSTEERED).flatten(0, 1),
        torch.where(valid, _sequences(count, width, valid.device), UNSTEERED).flatten(),
        torch.where(decides, start + last, UNSTEERED),
        slot,
        _no_rows(slot),
    )


def response_rows(slot: Tensor, width: int, edited: Tensor) -> RowTable:
    """Return the tables of a step of `width` answer rows of each sequence, in which no gate decides.

    Args:
        slot: int32 [N, K].
        edited: int32 [N, K], how many of these rows a slot edits.
    """
    column = torch.arange(width, dtype=torch.int32, device=slot.device)
    slots = torch.where(column[:, None] < edited[:, None], slot[:, None], UNSTEERED).flatten(0, 1)
    sequence = _sequences(len(slot), width, slot.device).flatten()
    return RowTable(slots, sequence, torch.full_like(slot[:, 0], UNSTEERED), slot, _no_rows(slot))


def _sequences(count: int, width: int, device: torch.device) -> Tensor:
    """Return the sequence of each row of a padded batch, int32 [N, T]."""
    return torch.arange(count, dtype=torch.int32, device=device)[:, None].repeat(1, width)


def _no_rows(deciders: Tensor) -> Tensor:
    """Return that no decider's mean has a row, int32 [n·K, 3]."""
    return torch.zeros(deciders.numel(), 3, dtype=torch.int32, device=deciders.device)


Integers = Sequence[int] | NDArray[np.integer]
IntegerRows = Sequence[Sequence[int]] | NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Describe a step with n sequences one after the other, each with K slots.

    Attributes:
        lengths: [n], rows of each sequence.
        slots: [n, K], slots of each sequence as `Bank.slot` gives them; -1: none.
        strengths: [n, K], finite; multiply the slots' own.
        deciding: [n], which of its rows a sequence's prompt gates read, from 0; -1: none in this step.
        edited_from: [n, K], the first of its rows that a slot edits, from 0; the length or more: none. Default: all.
        edited_until: [n, K], the first of its rows that a slot no longer edits, from 0. Default: no limit.
        counted: [n, K] and [n, K], its rows that count in a mean score: the first, and the first after the last, from
            0. Default: no row counts.
        total: [n, K], how many rows that mean is taken of, over all steps. Default: 0.
        columns: [n], distinct, the place of each sequence in the tables. Default: 0, 1, ...
        padded_rows: rows of the launch, at least the sum of the lengths; rows beyond the sum are not edited.
    """

    lengths: Integers
    slots: IntegerRows
    strengths: Sequence[Sequence[float]] | NDArray[np.floating]
    deciding: Integers
    edited_from: IntegerRows | None = None
    edited_until: IntegerRows | None = None
    counted: tuple[IntegerRows, IntegerRows] | None = None
    total: IntegerRows | None = None
    columns: Integers | None = None
    padded_rows: int | None = None

    def arrays(self, max_rows: int, max_sequences: int, stack: int) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the fields as arrays, int64 and float32 for the strengths, and the rows of the launch.

        Raises:
            ValueError: a shape or number is out of bounds.
        """
        length = _integers("lengths", self.lengths, (None,), 0, max_rows)
        count, used = len(length), int(length.sum())
        if count > max_sequences:
            raise ValueError(f"lengths: expected at most {max_sequences} sequences, got {count}")
        if used > max_rows:
            raise ValueError(f"lengths: expected at most {max_rows} rows in all, got {used}")
        padded = used if self.padded_rows is None else self.padded_rows
        if not used <= padded <= max_rows:
            raise ValueError(f"padded_rows: expected {used} to {max_rows}, got {padded}")
        one, each = (count,), (count, stack)
        found: dict[str, NDArray[Any]] = {"lengths": length}
        for name, shape, least, most, default in (
            ("slots", each, UNSTEERED, _INT32_MAX, UNSTEERED),
            ("deciding", one, -1, _INT32_MAX, -1),
            ("edited_from", each, 0, _INT32_MAX, 0),
            ("edited_until", each, 0, _INT32_MAX, _INT32_MAX),
            ("counted", (2, *each), 0, _INT32_MAX, 0),
            ("total", each, 0, _INT32_MAX, 0),
            ("columns", one, 0, max_sequences - 1, range(count)),
        ):
            if (given := getattr(self, name)) is None:
                found[name] = np.full(shape, default, dtype=np.int64)
            else:
                found[name] = _integers(name, given, shape, least, most)
        if (beyond := found["deciding"] >= length).any():
            at = int(beyond.argmax())
            got = found["deciding"][at]
            raise ValueError(f"deciding: expected a row of sequence {at}, below {length[at]}, got {got}")
        if len(np.unique(found["columns"])) < count:
            raise ValueError(f"columns: expected distinct ones, got {found['columns'].tolist()}")
        with np.errstate(over="ignore"):
            found["strengths"] = strength = _array("strengths", self.strengths, each).astype(np.float32)
        if not np.isfinite(strength).all():
            raise ValueError(f"strengths: expected finite numbers, got {strength[~np.isfinite(strength)][0]}")
        return found, padded


class StepTables:
    """A step's tables on a device, at addresses that never change, for serving engines and captured graphs.

    One buffer holds all tables: first the sequences, at full capacity, then the rows. So a step is one copy of the used
    part, for any number of requests. Launch the ops on ``rows[:n]``; n is the number of rows of the step, or the padded
    number of a graph.

    Args:
        max_rows: the most rows of a step.
        max_sequences: the most sequences of a step.
        stack: K, the slots of a sequence.
        device: of the tables.

    Attributes:
        slots: int32 [max_rows, K], sequence: int32 [max_rows], deciding: int32 [max_sequences], deciders: int32
            [max_sequences, K], counted: int32 [max_sequences·K, 3]: as in `RowTable`.
        strength: float32 [max_sequences, K].
        stack: K.

    Raises:
        ValueError: a size is out of bounds.
    """

    def __init__(self, max_rows: int, max_sequences: int, stack: int, device: torch.device | str) -> None:
        for name, size in (("max_rows", max_rows), ("max_sequences", max_sequences)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 1 <= stack <= MAX_STACK:
            raise ValueError(f"stack: expected 1 to {MAX_STACK} slots of a sequence, got {stack}")
        self.stack = stack
        self._shapes = {
            "deciding": (max_sequences,),
            "deciders": (max_sequences, stack),
            "strength": (max_sequences, stack),
            "counted": (max_sequences * stack, 3),
            "sequence": (max_rows,),
            "slots": (max_rows, stack),
        }
        device = torch.device(device)
        self._start: dict[str, int] = {}
        size = 0
        for name, shape in self._shapes.items():
            self._start[name] = size
            size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        pinned = device.type == "cuda"
        with torch.inference_mode(False):  # also serve callers outside inference mode
            self._device = torch.full((size,), -1, dtype=torch.int32, device=device)
            # Two buffers: the host may fill the next while the device still reads the last.
            hosts = [torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=pinned) for _ in range(1 + pinned)]
            on_device = self._regions(self._device)
        self.slots, self.sequence, self.deciding = (on_device[name] for name in ("slots", "sequence", "deciding"))
        self.deciders, self.counted = on_device["deciders"], on_device["counted"]
        self.strength = on_device["strength"].view(torch.float32)
        for tensor in (self.strength, self.counted):
            tensor.zero_()
        self._hosts = [
            _Host(
                buffer,
                {name: region.numpy() for name, region in self._regions(buffer).items()},
                torch.cuda.Event() if pinned else None,
            )
            for buffer in hosts
        ]

    def of(self, width: int) -> RowTable:
        """Return the tables of a step of `width` rows, padding included: views that later steps change."""
        return RowTable(self.slots[:width], self.sequence[:width], self.deciding, self.deciders, self.counted)

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return self._device.nbytes

    def _regions(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[self._start[name] :][: math.prod(shape)].view(shape) for name, shape in self._shapes.items()
        }

    def write(self, step: PackedRows) -> None:
        """Send the tables of the next step to the device, on the current stream.

        Raises:
            ValueError: a shape or number is out of bounds; the tables do not change.
        """
        arrays, padded = step.arrays(len(self.slots), len(self.deciders), self.stack)
        host = self._hosts[0]
        if host.copied is not None:
            host.copied.synchronize()
        start = np.cumsum(arrays["lengths"]) - arrays["lengths"]
        _fill_sequences(host.regions, arrays, start)
        _fill_rows(host.regions, arrays, start, padded)
        # Two copies: between the rows' sequences and their slots lies the room for more rows.
        begin = self._start["slots"]
        for part in (slice(self._start["sequence"] + padded), slice(begin, begin + padded * self.stack)):
            self._device[part].copy_(host.buffer[part], non_blocking=True)
        if host.copied is not None:
            host.copied.record(torch.cuda.current_stream(self._device.device))
        self._hosts.append(self._hosts.pop(0))


class _Host(NamedTuple):
    """Hold a host buffer, its regions as arrays, and the event after which it may be written again."""

    buffer: Tensor
    regions: dict[str, NDArray[np.int32]]
    copied: torch.cuda.Event | None


def _fill_sequences(regions: dict[str, NDArray[np.int32]], step: dict[str, NDArray[Any]], start: NDArray[Any]) -> None:
    """Write what tables say of sequences; start: int64 [n], the first row of each."""
    first, until = start[:, None] + np.minimum(step["counted"], step["lengths"][:, None])
    for name, content, unused in (
        ("deciding", np.where(step["deciding"] < 0, -1, start + step["deciding"]), -1),
        ("deciders", step["slots"], UNSTEERED),
        ("strength", step["strengths"].view(np.int32), 0),
        ("counted", np.stack([first, until, step["total"]], axis=2), 0),
    ):
        region = regions[name]
        region[:] = unused
        region.reshape(-1, *content.shape[1:])[step["columns"]] = content


def _fill_rows(
    regions: dict[str, NDArray[np.int32]], step: dict[str, NDArray[Any]], start: NDArray[Any], padded: int
) -> None:
    """Write what tables say of rows, `padded` ones with those of no sequence."""
    sequence = np.repeat(np.arange(len(start)), step["lengths"])
    used, slots = len(sequence), regions["slots"]
    place = (np.arange(used) - start[sequence])[:, None]
    regions["sequence"][:used] = step["columns"][sequence]
    regions["sequence"][used:padded] = UNSTEERED
    slots[:used] = step["slots"][sequence]
    slots[:used][(place < step["edited_from"][sequence]) | (place >= step["edited_until"][sequence])] = UNSTEERED
    slots[used:padded] = UNSTEERED


def _array(name: str, given: object, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return an array of this shape; None: any size."""
    try:
        array = np.asarray(given)
    except ValueError:
        raise ValueError(f"{name}: expected rows of one length, got {given!r}") from None
    if array.size == 0 and not all(shape):
        array = np.zeros([size or 0 for size in shape], dtype=np.int64)  # an empty list has one dimension
    if array.ndim != len(shape) or any(w is not None and w != n for w, n in zip(shape, array.shape, strict=True)):
        expected = ", ".join("n" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(array.shape)}")
    return array


def _integers(name: str, given: object, shape: tuple[int | None, ...], low: int, high: int) -> NDArray[np.int64]:
    """Return integers of this shape, from `low` to `high`."""
    numbers = _array(name, given, shape)
    if numbers.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers, got {numbers.dtype}")
    outside = (numbers < low) | (numbers > high)
    if outside.any():
        raise ValueError(f"{name}: expected {low} to {high}, got {numbers[outside][0]}")
    return numbers.astype(np.int64)

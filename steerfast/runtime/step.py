"""A step: one forward pass as its layers see it.

A step is a value. An engine makes it before the pass, and layers read it. The next pass has a new step, or the same
step if nothing changed (`Repeat`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.kernels.contract import GateOperands, Operands
from steerfast.kernels.edits import torch_scales
from steerfast.kernels.gate import decide_torch_, score_unchecked_
from steerfast.runtime.bank import Bank, LayerBank, Reach
from steerfast.runtime.span import NO_END
from steerfast.runtime.tables import RowTable


class LayerEdit(NamedTuple):
    """Hold the arguments of the op that edits the rows of a layer.

    Attributes:
        operands: how rows are edited. gates: the gates that decide in the same launch; None: no gate decides.
    """

    operands: Operands
    gates: GateOperands | None = None


@dataclass(frozen=True, eq=False)
class StepMemory:
    """Hold the memory that the layers of a step of n sequences share on one device.

    Attributes:
        rows: the tables. strength: float32 [n·K].
        values: float32 [layers, n·K], latched gate values. scores: float32 [layers, n·K], the scores behind them.
        sums: float64 [layers, n·K], sums of scores from earlier steps for a mean.
        scales: float32 [layers, rows or more, K], the scale of each row's slots.
        row_scores, last_scores: scratch, see `steerfast.kernels.contract.GateOperands`.
    """

    rows: RowTable
    strength: Tensor
    values: Tensor
    scores: Tensor
    sums: Tensor
    scales: Tensor
    row_scores: Tensor
    last_scores: Tensor

    @classmethod
    def of(cls, rows: RowTable, strength: Tensor, values: Tensor, scores: Tensor, table: Tensor) -> StepMemory:
        """Return the memory of a step whose scales follow from the decisions so far, and whose means begin in it.

        Args:
            strength: float32 [n, K]. table: float32 [layers, slots, TABLE_WIDTH].
        """
        strength = strength.flatten()
        return cls(
            rows,
            strength,
            values,
            scores,
            torch.zeros_like(values, dtype=torch.float64),
            torch_scales(rows.slots, values, strength, rows.sequence, table),
            torch.zeros_like(rows.slots, dtype=torch.float32),
            torch.zeros_like(strength),
        )

    def to(self, device: torch.device) -> StepMemory:
        """Return the same memory on another device."""
        return StepMemory(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def take_decisions(self, other: StepMemory) -> None:
        """Take over decisions, and the scales that follow from them, from the memory on another device."""
        for name in ("values", "scores", "sums", "scales"):
            getattr(self, name).copy_(getattr(other, name))


class Step:
    """Hold one forward pass: the rows that are edited, the gates that decide, and their decisions.

    Args:
        reach: the layers with a gate or an edit in this step.
        bank: returns the profiles on a device.
        memory: the tables and decisions, on the device of the step's tokens.
        decides: gates decide in this step.
        loaded: the layers where any loaded profile acts. Compiled models use these, so that another batch compiles
            nothing. Default: reach.
    """

    def __init__(
        self,
        reach: Reach,
        bank: Callable[[torch.device], Bank],
        memory: StepMemory,
        decides: bool = False,
        loaded: Reach | None = None,
    ) -> None:
        self.reach = reach
        self.loaded = reach if loaded is None else loaded
        self.bank = bank
        self.memory = memory
        self.decides = decides
        self._placed = {memory.values.device: memory}
        self._edits: dict[tuple[int, torch.device], LayerEdit] = {}

    def edit(self, layer: int, x: Tensor, residual: Tensor | None) -> LayerEdit | None:
        """Score the rows that this layer's gates read, and return how the layer is edited; None: not at all.

        Args:
            x, residual: [..., H], the residual stream is x, or the sum of both.
        """
        device, compiling = x.device, torch.compiler.is_compiling()
        reach = self.loaded if compiling else self.reach
        decides = self.decides and layer in reach.gates
        keeps = not self.decides and not compiling  # a graph must not leave its tensors here
        if keeps and (known := self._edits.get((layer, device))) is not None:
            return known
        if not decides and layer not in reach.edits:
            return None
        memory, whole = self._on(device), self.bank(device)
        bank = whole.layer(layer)
        scales = memory.scales[layer, : len(memory.rows.slots)]
        edit = LayerEdit(
            Operands(memory.rows.slots, scales, bank.vectors, bank.directions, bank.table, int(reach.kinds))
        )
        if decides:
            gates = self._gates(layer, memory, bank, whole.table)
            score_unchecked_(x.flatten(0, -2), None if residual is None else residual.flatten(0, -2), gates)
            edit = self._decide(edit.operands, gates)
            if edit.gates is None and layer not in reach.edits:
                return None
        if keeps:
            self._edits[layer, device] = edit
        return edit

    def finish(self) -> None:
        """Take notice that the pass is over; an engine calls this where steps may be of token gates."""

    def _gates(self, layer: int, memory: StepMemory, bank: LayerBank, tables: Tensor) -> GateOperands:
        rows = memory.rows
        return GateOperands(
            sequence=rows.sequence,
            deciding=rows.deciding,
            counted=rows.counted,
            slots=rows.deciders.view(-1),
            strength=memory.strength,
            directions=bank.directions,
            mean_directions=bank.mean_directions,
            tables=tables,
            row_scores=memory.row_scores,
            last_scores=memory.last_scores,
            sums=memory.sums,
            scores=memory.scores,
            values=memory.values,
            scales=memory.scales,
            layer=layer,
        )

    def _decide(self, operands: Operands, gates: GateOperands) -> LayerEdit:
        """Return the edit whose launch decides, or decide now where nothing but plain torch can."""
        device = gates.values.device
        if not torch.compiler.is_compiling() and device == self.memory.values.device and len(self._placed) == 1:
            return LayerEdit(operands, gates)
        self._decide_now(operands.slots, gates)
        return LayerEdit(operands)

    def _decide_now(self, slots: Tensor, gates: GateOperands) -> None:
        """Decide in plain torch, and tell the other devices that the model lies on."""
        decide_torch_(slots, gates)
        device = gates.values.device
        for where, memory in self._placed.items():
            if where != device:
                memory.take_decisions(self._placed[device])

    def _on(self, device: torch.device) -> StepMemory:
        """Return the memory on the device of a layer; a model may lie on several."""
        if device not in self._placed:
            self._placed[device] = self.memory.to(device)
        return self._placed[device]


class TokenStep(Step):
    """Hold a step of token gates: each row decides for itself, in this step only.

    Args:
        values, scores: keep the highest of each sequence, after the pass; those of single rows are in the step.
        The others as for `Step`; `memory` is of tables in which each row is a sequence (`RowTable.each_for_itself`).
    """

    def __init__(self, values: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values, self.scores = values, scores

    def finish(self) -> None:
        """Keep the highest score and value of each sequence where a gate decided; once, not in each layer."""
        memory, stack = self.memory, self.memory.rows.slots.shape[1]
        decided = torch.where(memory.scores == float("-inf"), 0.0, memory.values)  # a sensor's value is in all layers
        for latch, new in ((self.scores, memory.scores), (self.values, decided)):
            rows = new.view(len(new), latch.shape[1] // stack, -1, stack)
            latch.copy_(torch.maximum(latch, rows.amax(dim=2).flatten(1).to(latch.device)))


@dataclass(frozen=True, eq=False)
class Repeat:
    """Recognise steps that differ from the last one only by the number of rows before them.

    Such a step adds answer rows to the same sequences under the same profiles, before any edit ends. It is the same
    `Step` again, and costs the host the same for any number of requests.

    Attributes:
        key: the inputs of the step, except the number of rows before it.
        first: the smallest number of rows before it. until: the largest number of rows after it. Each is one number
            for all sequences, or [n].
    """

    key: Any
    first: int | NDArray[np.integer]
    until: float | NDArray[np.integer]

    @classmethod
    def of(
        cls, key: Any, past: NDArray[np.integer], prompts: NDArray[np.integer], ends: NDArray[np.integer]
    ) -> Repeat | None:
        """Return the repeat of a step after `past` rows, or None if the step holds prompt rows.

        Args:
            past: [n], rows of each sequence before the step. prompts: [n], the prompt's length.
            ends: [n, K], the first row that each profile edits no more.
        """
        if not (past >= prompts).all():
            return None
        over = ends <= past[:, None]
        first = np.maximum(prompts, np.where(over, ends, 0).max(axis=1))
        return cls(key, first, np.where(over, 2 * NO_END, ends).min(axis=1))

    def covers(self, key: Any, past: int | NDArray[np.integer], lengths: int | NDArray[np.integer]) -> bool:
        """Return whether the step of `key` after `past` rows is the same step again."""
        if key != self.key:
            return False
        inside = (past >= self.first) & (past + lengths <= self.until)
        return inside if isinstance(inside, bool) else bool(inside.all())

"""A step: one forward pass as its layers see it.

A step is a value. An engine makes it before the pass, and layers read it. The next pass has a new step, or the same
step if nothing changed (`Repeat`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.kernels.contract import Operands
from steerfast.runtime.bank import Bank, Deciders, LayerBank, Reach
from steerfast.runtime.decide import Columns, decide, spread
from steerfast.runtime.span import NO_END
from steerfast.runtime.tables import RowTable

__all__ = ["Decisions", "Repeat", "Step", "TokenStep"]


@dataclass(eq=False)
class Decisions:
    """Hold the latched decisions of n sequences with K profiles each.

    Attributes:
        values: float32 [layers, n·K], gate values. scores: float32 [layers, n·K], the scores behind them.
        sums: float64 [layers, n·K], sums of scores from earlier steps for a mean; None: this is the first step.
    """

    values: Tensor
    scores: Tensor
    sums: Tensor | None = None


class Step:
    """Hold one forward pass: the rows that are edited, the gates that decide, and their decisions.

    Args:
        reach: the layers with a gate or an edit in this step.
        bank: returns the profiles on a device.
        rows: the tables of the step, on the device of its tokens.
        strength: float32 [n, K].
        decisions: latched decisions; gates that decide in this step write them.
        deciders: the gates that decide, by layer; None: no gate decides.
        loaded: the layers where any loaded profile acts. Compiled models use these, so that another batch compiles
            nothing. Default: reach.
    """

    def __init__(
        self,
        reach: Reach,
        bank: Callable[[torch.device], Bank],
        rows: RowTable,
        strength: Tensor,
        decisions: Decisions,
        deciders: Deciders | None = None,
        loaded: Reach | None = None,
    ) -> None:
        self.reach = reach
        self.loaded = reach if loaded is None else loaded
        self.bank = bank
        self.rows = rows
        self.decisions = decisions
        self.deciders = deciders
        self._placed = {rows.rows.device: (rows, strength)}
        self._operands: dict[tuple[int, torch.device], Operands] = {}
        self._columns: list[tuple[Tensor, Tensor]] | None = None

    def operands(self, layer: int, x: Tensor, residual: Tensor | None) -> Operands | None:
        """Decide this layer's gates, and return the operands of its edit; None: no edit.

        Args:
            x, residual: [..., H], the residual stream is x, or the sum of both.
        """
        device, compiling = x.device, torch.compiler.is_compiling()
        keeps = self.deciders is None and not compiling  # a graph must not leave its tensors here
        if keeps and (known := self._operands.get((layer, device))) is not None:
            return known
        reach = self.loaded if compiling else self.reach
        decides, edits = self.deciders is not None and layer in reach.gates, layer in reach.edits
        if not decides and not edits:
            return None
        rows, strength = self._on(device)
        bank = self.bank(device).layer(layer)
        if decides:
            flat = None if residual is None else residual.flatten(0, -2)
            self._decide(layer, x.flatten(0, -2), flat, rows, bank, reach)
        if not edits:
            return None
        values = self._layer(layer)[0]
        if values.device != device:
            values = values.to(device)
        values = values.view(-1, rows.slot.shape[1])
        operands = Operands(rows.rows, values, strength, bank.vectors, bank.directions, bank.table, int(reach.kinds))
        if keeps:
            self._operands[layer, device] = operands
        return operands

    def _on(self, device: torch.device) -> tuple[RowTable, Tensor]:
        """Return tables and strengths on the device of a layer; a model may lie on several."""
        if device not in self._placed:
            rows, strength = next(iter(self._placed.values()))
            self._placed[device] = rows.to(device), strength.to(device)
        return self._placed[device]

    def _layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return values and scores [n·K, 1] of a layer: views, all made at once (35 us for 30 layers, not 129)."""
        values, scores = self.decisions.values, self.decisions.scores
        if torch.compiler.is_compiling():
            return values[layer, :, None], scores[layer, :, None]
        if self._columns is None:
            self._columns = list(zip(values.unsqueeze(2).unbind(), scores.unsqueeze(2).unbind(), strict=True))
        return self._columns[layer]

    def _decide(
        self, layer: int, x: Tensor, residual: Tensor | None, rows: RowTable, bank: LayerBank, reach: Reach
    ) -> None:
        """Latch the decisions of this layer; a sensor's are copied to all layers."""
        assert self.deciders is not None
        decisions, (values, scores) = self.decisions, self._layer(layer)
        row, closes, senses = (by_layer[layer] for by_layer in self.deciders)
        home, away = decisions.values.device, x.device
        sums = self._sums(layer, values) if layer in reach.means else None
        if home != away:
            values, scores, row, closes = values.to(away), scores.to(away), row.to(away), closes.to(away)
            sums = None if sums is None else sums.to(away)
        decide(x, residual, rows, bank, Deciders(row, closes, senses), Columns(values, scores, sums))
        if home != away:
            decisions.scores[layer], decisions.values[layer] = scores[:, 0].to(home), values[:, 0].to(home)
            if sums is not None and decisions.sums is not None:
                decisions.sums[layer] = sums[:, 0].to(home)
        if layer in reach.sensors:
            spread(decisions.values, layer, senses.to(home))

    def _sums(self, layer: int, values: Tensor) -> Tensor:
        sums = self.decisions.sums
        return torch.zeros_like(values, dtype=torch.float64) if sums is None else sums[layer, :, None]


class TokenStep(Step):
    """Hold a step of token gates: each row decides for itself, in this step only.

    `decisions` keeps the highest value of each sequence; the values of single rows are in the step.

    Args:
        rows: tables in which each row is a sequence (`RowTable.each_for_itself`); the others as for `Step`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        count = self.rows.slot.numel()
        self._row_values = torch.zeros(count, 1, dtype=torch.float32, device=self.rows.rows.device)

    def _layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the rows' values. The values of a sensor stay for the layers after it."""
        return self._row_values, self._row_values

    def _decide(
        self, layer: int, x: Tensor, residual: Tensor | None, rows: RowTable, bank: LayerBank, reach: Reach
    ) -> None:
        assert self.deciders is not None
        values = self._row_values = self._row_values.to(x.device)
        row = self.deciders.row[layer].to(x.device)
        scores, now = torch.full_like(values, float("-inf")), torch.zeros_like(values)
        decide(x, residual, rows, bank, Deciders(row, row, row), Columns(now, scores, None))
        values.copy_(torch.where(row[:, None] >= 0, now, values))
        stack = rows.slot.shape[1]
        for latch, new in ((self.decisions.scores[layer], scores), (self.decisions.values[layer], now)):
            width = len(x) // (len(latch) // stack)
            highest = new.view(-1, width, stack).amax(dim=1).flatten()
            latch.copy_(torch.maximum(latch, highest.to(latch.device)))


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

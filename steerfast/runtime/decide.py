"""How gates decide in a step: the same for every engine.

A *decider* is one profile on one sequence. Of n sequences with up to K profiles each, sequence i and profile k are
decider i·K + k, so that each has a threshold, a reading and a latched value of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steerfast.kernels.contract import GateOperands
from steerfast.kernels.gate import gate_unchecked_, mean_gate_unchecked_
from steerfast.runtime.bank import Deciders, LayerBank
from steerfast.runtime.tables import RowTable

__all__ = ["Columns", "decide", "spread"]


class Columns(NamedTuple):
    """Hold what the gates of one layer decided.

    Attributes:
        values, scores: float32 [n·K, 1], latched gate values and the scores behind them; written.
        sums: float64 [n·K, 1], scores added up over the rows of a mean so far; written. None: no gate reads a mean.
    """

    values: Tensor
    scores: Tensor
    sums: Tensor | None


def decide(
    x: Tensor, residual: Tensor | None, rows: RowTable, bank: LayerBank, deciders: Deciders, columns: Columns
) -> None:
    """Latch the decisions of one layer; deciders without a row in this step keep theirs.

    Args:
        x, residual: [rows, H], the residual stream is x, or the sum of both.
        rows: the step's tables.
        deciders: those of this layer, [n·K] each.
        columns: the layer's decisions; written.
    """
    gates = GateOperands(rows.slot.view(-1, 1), bank.directions, bank.table, columns.scores, columns.values)
    gate_unchecked_(x, residual, deciders.row, gates)
    if columns.sums is not None:
        assert rows.member is not None
        assert rows.total is not None
        mean_gate_unchecked_(x, residual, rows.member, rows.total, deciders.closes, columns.sums, gates)


def spread(values: Tensor, layer: int, senses: Tensor) -> None:
    """Copy the values of a sensor to all layers: values float32 [layers, n·K], where senses, bool [n·K], holds."""
    values.copy_(torch.where(senses, values[layer], values))

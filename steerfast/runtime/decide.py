"""How gates decide in a step: the same for every engine.

A *decider* is one profile on one sequence. Of n sequences with up to K profiles each, sequence i and profile k are
decider i·K + k, with its own threshold, reading and latched value.
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
    """Hold the decisions of the gates of one layer.

    Attributes:
        values, scores: float32 [n·K, 1], latched gate values and the scores behind them; written.
        sums: float64 [n·K, 1], sums of scores over the rows of a mean so far; written. None: no gate reads a mean.
    """

    values: Tensor
    scores: Tensor
    sums: Tensor | None


def decide(
    x: Tensor, residual: Tensor | None, rows: RowTable, bank: LayerBank, deciders: Deciders, columns: Columns
) -> None:
    """Latch the decisions of one layer. Deciders without a row in this step keep their decisions.

    Args:
        x, residual: [rows, H], the residual stream is x, or the sum of both.
        rows: the step's tables.
        deciders: of this layer, [n·K] each.
        columns: the layer's decisions; written.
    """
    gates = GateOperands(rows.slot.view(-1, 1), bank.directions, bank.table, columns.scores, columns.values)
    gate_unchecked_(x, residual, deciders.row, gates)
    if columns.sums is not None:
        assert rows.member is not None
        assert rows.total is not None
        mean_gate_unchecked_(x, residual, rows.member, rows.total, deciders.closes, columns.sums, gates)


def spread(values: Tensor, layer: int, senses: Tensor) -> None:
    """Copy a sensor's values to all layers of `values`, float32 [layers, n·K], where `senses`, bool [n·K], is True."""
    values.copy_(torch.where(senses, values[layer], values))

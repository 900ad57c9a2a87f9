"""The cases of the benchmarks: shapes, row tables, and the bytes that an op must move."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerfast.kernels.contract import (
    DIRECTION_SQ,
    GATE,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    GateKind,
    GateOperands,
    Kinds,
    Operands,
)

SLOTS = 256
SEQUENCES = 256
EPS = 1e-6

FUSED, PROMPT, STEER, GATES = "add_steer_rms_norm", "add_steer_rms_norm.prompt", "steer_", "gate_"


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Args:
        active: share of the sequences whose gate is open.
        profiles: distinct slots that the rows name; 0: no row has a slot.
        cache: whether the rows are in the last-level cache when the call starts, ``warm`` or ``cold``.
    """

    op: str
    rows: int
    hidden: int
    active: float = 1.0
    profiles: int = 1
    cache: str = "warm"
    dtype: torch.dtype = torch.bfloat16

    def record(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "rows": self.rows,
            "hidden": self.hidden,
            "dtype": str(self.dtype).removeprefix("torch."),
            "active": self.active,
            "profiles": self.profiles,
            "cache": self.cache,
        }


class Buffers(NamedTuple):
    """The rows of one call. `pair` holds both, so that one copy of it moves what the fused op moves."""

    pair: Tensor
    x: Tensor
    residual: Tensor


class Tensors:
    """The tensors of a call besides its rows.

    Up to 256 sequences of equal lengths share the rows. A sequence names one profile with a prompt gate, whose latch is
    open (1) or shut (0). The vectors are tiny: thousands of edits in place hardly change the rows.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        g = torch.Generator().manual_seed(0)
        used = min(case.rows, SEQUENCES)
        index = torch.arange(SEQUENCES)
        slot = index % case.profiles if case.profiles else torch.full_like(index, -1)
        opened = ((index + 1) * case.active).floor() > (index * case.active).floor()
        sequence = torch.arange(case.rows) * used // case.rows

        vectors = torch.randn(SLOTS, case.hidden, generator=g) * 1e-4
        directions = torch.nn.functional.normalize(torch.randn(SLOTS, case.hidden, generator=g))
        table = torch.zeros(SLOTS, TABLE_WIDTH)
        table[:, STRENGTH], table[:, THRESHOLD], table[:, GATE] = 1.0, -2.0, float(GateKind.PROMPT)
        vectors, directions = vectors.to(case.dtype), directions.to(case.dtype)
        v, d = vectors.float(), directions.float()
        table[:, VECTOR_SQ], table[:, VECTOR_DIRECTION] = (v * v).sum(1), (v * d).sum(1)
        table[:, DIRECTION_SQ] = (d * d).sum(1)

        moves = opened[:used] & (slot[:used] >= 0)
        self.moved_rows = int(moves[sequence].sum())
        self.moving_profiles = len(set(slot[:used][moves].tolist()))
        self.named_profiles = len(set(slot[:used].tolist()) - {-1})

        self.weight = (1 + 0.1 * torch.randn(case.hidden, generator=g)).to(device, case.dtype)
        self.rows = torch.stack([sequence, slot[sequence]], 1).int().to(device)
        self.no_slots = self.rows[:, :1].contiguous()
        self.values = opened.float()[:, None].to(device)
        self.strength = torch.ones(SEQUENCES, 1, device=device)
        self.none = torch.ones(SEQUENCES, 0, device=device)
        self.vectors, self.directions, self.table = vectors.to(device), directions.to(device), table.to(device)
        bank = (self.vectors, self.directions, self.table)
        latched, self.any = (Operands(self.rows, self.values, self.strength, *bank, int(kinds)) for kinds in Kinds)
        self.operands = latched
        self.unsteered = Operands(self.no_slots, self.none, self.none, *bank, int(Kinds.LATCHED_ADD))
        # For plain torch, computed before the timing, in its favour: vector and coefficient of each row.
        self.slot = slot[sequence].clamp(min=0).to(device)
        self.beta = moves[sequence].to(device, case.dtype)[:, None]
        # The last row of a prompt decides; sequences without rows do not decide.
        last = torch.full((SEQUENCES,), -1)
        last[:used] = torch.arange(1, used + 1) * case.rows // used - 1
        self.deciding = last.int().to(device)
        # gate_ takes a sequence per row.
        self.gate_row = torch.arange(case.rows, dtype=torch.int32, device=device)
        self.gate_slot = self.rows[:, 1:].contiguous()
        self.gate_scores = torch.zeros(case.rows, 1, device=device)
        self.gate_values = torch.zeros(case.rows, 1, device=device)
        self.scores = torch.zeros(SEQUENCES, 1, device=device)
        self.latch = torch.zeros(SEQUENCES, 1, device=device)
        self.gates = GateOperands(self.gate_slot, self.directions, self.table, self.gate_scores, self.gate_values)

    def buffers(self, count: int) -> list[Buffers]:
        case = self.case
        pairs = torch.empty(count, 2, case.rows, case.hidden, dtype=case.dtype, device=self.device).normal_()
        return [Buffers(pair, pair[0], pair[1]) for pair in pairs]

    @cached_property
    def bytes(self) -> int:
        """Return the bytes that the op must read and write, each counted once; the same for every provider."""
        case = self.case
        row = case.hidden * case.dtype.itemsize
        used = min(case.rows, SEQUENCES)
        tables = self.rows.nbytes + used * 8 + self.named_profiles * TABLE_WIDTH * 4
        if case.op == GATES:
            return (case.rows + self.named_profiles) * row + case.rows * 16 + self.named_profiles * TABLE_WIDTH * 4
        if case.op == STEER:
            return (2 * self.moved_rows + self.moving_profiles) * row + tables
        read_and_written = (4 * case.rows + 1 + self.moving_profiles) * row + tables
        return read_and_written + (self.named_profiles * row + used * 12 if case.op == PROMPT else 0)

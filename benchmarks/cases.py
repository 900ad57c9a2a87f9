"""The cases of the benchmarks: shapes, operands, and the bytes that an op must move."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerfast.kernels.contract import (
    DECIDES,
    DIRECTION_SQ,
    GATE,
    READING,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    Decides,
    GateKind,
    GateOperands,
    Kinds,
    Operands,
    Reading,
)

SLOTS = 256
SEQUENCES = 256
LAYERS = 32  # for which a gate decides
EPS = 1e-6

FUSED, FUSED_DECIDING = "add_steer_rms_norm", "add_steer_rms_norm.deciding"
STEER, STEER_DECIDING, SCORE = "steer_", "steer_.deciding", "score_"
GATED = (FUSED_DECIDING, STEER_DECIDING, SCORE)


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Args:
        active: share of the sequences whose gate is open; in the ops of `GATED`, whose gate decides in this step.
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
    """The tensors of a call besides its rows. The bank is float32, as in the runtime.

    Up to 256 sequences of equal lengths share the rows. A sequence names one profile. Its vector is tiny: thousands of
    edits in place hardly change the rows. A gate that decides reads the mean of all rows of its sequence, and edits
    begin at the sequence's last row, as with the shipped profile.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(0)
        used = min(case.rows, SEQUENCES)
        index = torch.arange(SEQUENCES)
        slot = index % case.profiles if case.profiles else torch.full_like(index, -1)
        chosen = ((index + 1) * case.active).floor() > (index * case.active).floor()
        sequence = torch.arange(case.rows) * used // case.rows
        ends = (torch.arange(used + 1) * case.rows + used - 1) // used  # the first row of each sequence, and the end
        first, until = ends[:-1], ends[1:]
        gated = case.op in GATED
        decides = chosen[:used] & (slot[:used] >= 0) & gated
        edited = ~decides[sequence] | (torch.arange(case.rows) == until[sequence] - 1)
        slots = torch.where(edited, slot[sequence], -1)
        scales = torch.where(chosen[sequence] | gated, 1.0, 0.0)

        moved = (slots >= 0) & (scales != 0)
        self.moved_rows = int(moved.sum())
        self.moving_profiles = len(set(slots[moved].tolist()))
        self.read_rows = int(decides[sequence].sum())
        self.read_profiles = len(set(slot[:used][decides].tolist()))

        self._make_bank()
        self.weight = (1 + 0.1 * torch.randn(case.hidden, generator=self.generator)).to(device, case.dtype)
        self.slots = slots.int()[:, None].to(device)
        self.scales = scales[:, None].to(device)
        self.no_slots, self.no_scales = self.slots[:, :0].contiguous(), self.scales[:, :0].contiguous()
        bank = (self.vectors, self.directions, self.table)
        latched, self.any = (Operands(self.slots, self.scales, *bank, int(kinds)) for kinds in Kinds)
        self.operands = latched
        self.unsteered = Operands(self.no_slots, self.no_scales, *bank, int(Kinds.LATCHED_ADD))
        # For plain torch, computed before the timing, in its favour: vector and coefficient of each row.
        self.slot = slots.clamp(min=0).to(device)
        self.beta = moved.to(device, case.dtype)[:, None]
        self.read_slot = torch.where(decides[sequence], slot[sequence], -1).to(device)
        self._make_gates(sequence, decides, slot, first, until)

    def _make_bank(self) -> None:
        shape = (SLOTS, self.case.hidden)
        v = torch.randn(shape, generator=self.generator) * 1e-4
        d = torch.nn.functional.normalize(torch.randn(shape, generator=self.generator))
        table = torch.zeros(SLOTS, TABLE_WIDTH)
        table[:, STRENGTH], table[:, THRESHOLD], table[:, GATE] = 1.0, -1e4, float(GateKind.PROMPT)
        table[:, VECTOR_SQ], table[:, VECTOR_DIRECTION] = (v * v).sum(1), (v * d).sum(1)
        table[:, DIRECTION_SQ] = (d * d).sum(1)
        table[:, DECIDES], table[:, READING] = float(Decides.EVERYWHERE), float(Reading.MEAN)
        self.vectors, self.directions, self.table = v.to(self.device), d.to(self.device), table.to(self.device)

    def _make_gates(self, sequence: Tensor, decides: Tensor, slot: Tensor, first: Tensor, until: Tensor) -> None:
        used, rows = len(decides), self.case.rows
        deciding = torch.where(decides, until - 1, -1)
        # A sequence that does not decide is in its answer: its mean counts no row of this step.
        counted = torch.stack([first, torch.where(decides, until, first), until - first], 1)
        self.gates = GateOperands(
            sequence=sequence.int().to(self.device),
            deciding=deciding.int().to(self.device),
            counted=counted.int().to(self.device),
            slots=slot[:used].int().to(self.device),
            strength=torch.ones(used, device=self.device),
            directions=self.directions,
            mean_directions=self.directions,
            tables=self.table.repeat(LAYERS, 1, 1),
            row_scores=torch.zeros(rows, 1, device=self.device),
            last_scores=torch.zeros(used, device=self.device),
            sums=torch.zeros(LAYERS, used, dtype=torch.float64, device=self.device),
            scores=torch.zeros(LAYERS, used, device=self.device),
            values=torch.ones(LAYERS, used, device=self.device),
            scales=self.scales.repeat(LAYERS, 1, 1),
        )
        # The scales of the deciding form are those that its gates write.
        self.decided = self.operands._replace(scales=self.gates.scales[0])

    def buffers(self, count: int) -> list[Buffers]:
        case = self.case
        pairs = torch.empty(count, 2, case.rows, case.hidden, dtype=case.dtype, device=self.device).normal_()
        return [Buffers(pair, pair[0], pair[1]) for pair in pairs]

    @cached_property
    def bytes(self) -> int:
        """Return the bytes that the op must read and write, each counted once; the same for every provider."""
        case = self.case
        row = case.hidden * case.dtype.itemsize
        of_bank = case.hidden * self.vectors.itemsize
        records = self.slots.nbytes + self.scales.nbytes
        fused = (4 * case.rows + 1) * row + self.moving_profiles * of_bank + records
        steer = 2 * self.moved_rows * row + self.moving_profiles * of_bank + records
        score = self.read_rows * (row + 4) + self.read_profiles * of_bank + self.gates.sequence.nbytes
        return {
            FUSED: fused,
            FUSED_DECIDING: fused + score,
            STEER: steer,
            STEER_DECIDING: steer + score,
            SCORE: score,
        }[case.op]

"""The contract of the steering ops: enumerations, table columns, operands, the op library, argument checks.

This module imports torch alone: the ops can be used and tested without the rest of the package.

"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "DECIDES",
    "DIRECTION_SQ",
    "EDIT",
    "GATE",
    "HIGH",
    "LOW",
    "MAX_HIDDEN_SIZE",
    "MAX_STACK",
    "READING",
    "SCORE",
    "SHARPNESS",
    "STRENGTH",
    "TABLE_WIDTH",
    "THRESHOLD",
    "VECTOR_DIRECTION",
    "VECTOR_SQ",
    "Decides",
    "EditId",
    "GateKind",
    "GateOperands",
    "Kinds",
    "Norm",
    "Operands",
    "Reading",
    "Score",
    "implementations",
    "is_number",
    "library",
]


class Score(IntEnum):
    """The score of a row ``x`` against a direction ``d``."""

    DOT = 0  # <x, d>
    COSINE = 1  # <x, d> / ||x||


class GateKind(IntEnum):
    """The source of a slot's gate value."""

    ALWAYS = 0  # 1: the gate is open
    PROMPT = 1  # the value that the gate of the row's sequence decided
    TOKEN = 2  # the score of the row itself


class EditId(IntEnum):
    """The displacement of a row by a slot: arithmetic in :mod:`.edits`, names in :mod:`.edit_kinds`."""

    ADD = 0
    CLAMP = 1
    KEEP_NORM = 2
    ROTATE = 3


class Decides(IntEnum):
    """The layers for which a gate decides at a layer."""

    NOTHING = 0
    HERE = 1  # for this layer
    EVERYWHERE = 2  # a sensor: for all layers


class Reading(IntFlag):
    """The rows that a gate which decides reads; the score is the sum of both."""

    LAST = 1  # the deciding row, by `directions`
    MEAN = 2  # the mean score of the counted rows, by `mean_directions`
    BOTH = 3


class Kinds(IntEnum):
    """The kinds of slots in a launch: the fewer kinds, the less work for every row."""

    LATCHED_ADD = 0  # every slot adds and none has a token gate: no sum over the row is taken
    ANY = 1  # the table gives the gate and the edit of each slot


class Norm(IntEnum):
    """The RMSNorm that follows. They differ in the order of roundings; see :mod:`.add_steer_rms_norm`."""

    LLAMA = 0
    GEMMA = 1
    VLLM = 2


# Columns of `table`: the numbers of a slot besides its two vectors of H numbers.
THRESHOLD = 0
SHARPNESS = 1  # 0: hard gate, score > threshold; otherwise sigmoid(sharpness * (score - threshold))
STRENGTH = 2
VECTOR_SQ = 3  # <v, v>
VECTOR_DIRECTION = 4  # <v, d>
DIRECTION_SQ = 5  # <d, d>
# The parameters of an edit, packed by `Edit.columns` of :mod:`.edit_kinds`; ADD and KEEP_NORM do not read them.
LOW = 6  # CLAMP: the smallest coefficient along v.  ROTATE: the cosine of the target angle
HIGH = 7  # CLAMP: the largest coefficient along v.  ROTATE: the sine of the target angle
GATE = 8  # a GateKind
SCORE = 9  # a Score
EDIT = 10  # an EditId
DECIDES = 11  # a Decides: whether the slot's gate decides at this layer, and for which layers
READING = 12  # a Reading; not 0 where the slot decides
TABLE_WIDTH = 16  # padded: the row of a slot is one 64-byte line

MAX_STACK = 4  # slots that may edit one row
MAX_HIDDEN_SIZE = 32768  # one GPU program holds a row; beyond 12288 (8192 in float32) sums make it spill

_FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """Say how rows are edited, each by up to K slots (0 <= K <= MAX_STACK).

    A row's record is {slot, scale}: nothing else of its sequence matters to an edit. The host has multiplied the scale,
    or a gate that decides on the device (`GateOperands`). Build operands once and keep them: they hold no row.

    Attributes:
        slots: int32 [rows, K]; -1: no slot. A used slot out of range is an error on a CPU and undefined on a GPU.
        scales: float32 [rows, K]: gate value * strength of the slot * strength of the sequence. 0: the slot leaves the
            row alone. Where the op takes the gate from the row (TOKEN), the scale leaves the gate out.
        vectors: [slots, H] float32, bfloat16 or float16, steering vectors in units of the residual stream.
        directions: [slots, H], dtype of `vectors`; token gates and ROTATE read them.
        table: float32 [slots, TABLE_WIDTH], the numbers of each slot, in the columns above.
        kinds: a `Kinds`. LATCHED_ADD treats every slot as an addition by its scale.
    """

    slots: Tensor
    scales: Tensor
    vectors: Tensor
    directions: Tensor
    table: Tensor
    kinds: int = int(Kinds.ANY)


class GateOperands(NamedTuple):
    """Say which gates decide in a step, and where their decisions go.

    A *decider* is one profile on one sequence: of n sequences with K profiles each, sequence i and profile k are
    decider j = i*K + k. D = n*K. It decides at a layer whose table row has DECIDES, in the step that holds the deciding
    row. In `Operands`, a row of the sequence has its K slots in their places, or -1 where it is not edited.

    Attributes:
        sequence: int32 [rows], the sequence of each row; -1: padding.
        deciding: int32 [n], the row of the sequence at which its gates decide; -1: none in this step.
        counted: int32 [D, 3], the rows that a mean reads: the first, the first after the last, and how many rows the
            mean has over all steps. `score_` scores padding between them as 0; the last one is no padding.
        slots: int32 [D]; -1: no slot.
        strength: float32 [D], strengths of the sequence.
        directions: [slots, H] float32, bfloat16 or float16, of the layer: what the reading LAST reads.
        mean_directions: [slots, H], dtype of `directions`, of the layer: what the reading MEAN reads.
        tables: float32 [layers, slots, TABLE_WIDTH], as `Operands.table`, of all layers.
        row_scores: float32 [rows or more, K]: scratch, scores that count in means.
        last_scores: float32 [D]: scratch, scores of deciding rows.
        sums: float64 [layers, D], scores that earlier steps added up for a mean; written.
        scores: float32 [layers, D], written.
        values: float32 [layers, D], gate values from 0 to 1, written.
        scales: float32 [layers, rows or more, K], `Operands.scales` of all layers, written.
        layer: the layer.
    """

    sequence: Tensor
    deciding: Tensor
    counted: Tensor
    slots: Tensor
    strength: Tensor
    directions: Tensor
    mean_directions: Tensor
    tables: Tensor
    row_scores: Tensor
    last_scores: Tensor
    sums: Tensor
    scores: Tensor
    values: Tensor
    scales: Tensor
    layer: int = 0


library = torch.library.Library("steerfast", "FRAGMENT")


def implementations(op: str) -> dict[str, bool]:
    """Say which implementations of ``steerfast::<op>`` a call can reach in this process.

    ``triton`` serves CUDA tensors, ``cpp`` CPU tensors, ``torch`` all others.
    """
    name = f"steerfast::{op}"
    return {
        "triton": torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"),
        "cpp": torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"),
        "torch": torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"),
    }


# ---- argument checks ---------------------------------------------------------------------------------------


def check_rows(x: Tensor, name: str = "x") -> None:
    """Raise where `x` is not [rows, H] of a float dtype with the H numbers of a row next to each other."""
    check_tangent(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions [rows, H], got shape {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected {_names(FLOAT_DTYPES)}, got {x.dtype}")
    if not 1 <= x.shape[1] <= MAX_HIDDEN_SIZE:
        raise ValueError(f"{name}: expected a hidden size from 1 to {MAX_HIDDEN_SIZE}, got {x.shape[1]}")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got strides {list(x.stride())}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise where `residual` differs from `x` in shape, dtype or device; its row stride is free."""
    check_rows(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {list(x.shape)} like x, got {list(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected {x.dtype} like x, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device} like x, got {residual.device}")


def check_apart(x: Tensor, name: str = "x") -> None:
    """Raise where rows of `x`, which is written to, overlap."""
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{name}: expected rows that do not overlap, got strides {list(x.stride())}")


def check_like(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise where `tensor` is not contiguous, of this shape, of one of these dtypes, and on this device."""
    check_tangent(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_names(dtypes)}, got {tensor.dtype}")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} like x, got {tensor.device}")


def check_stack(name: str, stack: int) -> None:
    """Raise where a row has fewer than 0 or more than MAX_STACK slots."""
    if not 0 <= stack <= MAX_STACK:
        raise ValueError(f"{name}: expected 0 to {MAX_STACK} slots per row, got {stack}")


def check_bank(x: Tensor, table: Tensor, **banks: Tensor) -> None:
    """Raise where `table` is not float32 [slots >= 1, TABLE_WIDTH], or a bank not [slots, H] of one float dtype."""
    slots = table.shape[0] if table.dim() else 0
    if slots < 1:
        raise ValueError(f"table: expected at least one slot, got shape {list(table.shape)}")
    check_like("table", table, (slots, TABLE_WIDTH), (torch.float32,), x.device)
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
    for name, bank in banks.items():
        check_like(name, bank, (slots, x.shape[1]), dtypes, x.device)
        dtypes = (bank.dtype,)


def check_operands(x: Tensor, operands: Operands) -> None:
    """Raise where `operands` do not fit rows `x` [rows, H], which are checked already."""
    slots, scales, vectors, directions, table, kinds = operands
    if slots.dim() != 2:
        raise ValueError(f"slots: expected 2 dimensions [rows, K], got shape {list(slots.shape)}")
    check_stack("slots", slots.shape[1])
    shape = (x.shape[0], slots.shape[1])
    check_like("slots", slots, shape, (torch.int32,), x.device)
    check_like("scales", scales, shape, (torch.float32,), x.device)
    check_bank(x, table, vectors=vectors, directions=directions)
    check_choice("kinds", kinds, Kinds)


def check_gates(x: Tensor, gates: GateOperands, operands: Operands | None = None) -> None:
    """Raise where `gates` do not fit rows `x` [rows, H] or `operands`, which are checked already."""
    tables, deciding, scales = gates.tables, gates.deciding, gates.scales
    if tables.dim() != 3 or scales.dim() != 3 or deciding.dim() != 1:
        raise ValueError(
            "gates: expected tables [layers, slots, columns], scales [layers, rows, K] and deciding [n], got shapes "
            f"{list(tables.shape)}, {list(scales.shape)} and {list(deciding.shape)}"
        )
    layers, rows, stack = scales.shape
    if not 0 <= gates.layer < layers:
        raise ValueError(f"gates.layer: expected 0 to {layers - 1}, got {gates.layer}")
    if rows < len(x):
        raise ValueError(f"gates.scales: expected at least {len(x)} rows like x, got {rows}")
    check_stack("gates.scales", stack)
    check_bank(x, tables[gates.layer], directions=gates.directions, mean_directions=gates.mean_directions)
    deciders = len(deciding) * stack
    float32, int32 = (torch.float32,), (torch.int32,)
    for name, shape, dtypes in (
        ("sequence", (len(x),), int32),
        ("deciding", (len(deciding),), int32),
        ("counted", (deciders, 3), int32),
        ("slots", (deciders,), int32),
        ("strength", (deciders,), float32),
        ("tables", (layers, *tables.shape[1:]), float32),
        ("row_scores", (max(len(x), len(gates.row_scores)), stack), float32),
        ("last_scores", (deciders,), float32),
        ("sums", (layers, deciders), (torch.float64,)),
        ("scores", (layers, deciders), float32),
        ("values", (layers, deciders), float32),
        ("scales", (layers, rows, stack), float32),
    ):
        check_like(f"gates.{name}", getattr(gates, name), shape, dtypes, x.device)
    if operands is not None:
        check_like("table", operands.table, tables.shape[1:], float32, x.device)
        own = gates.scales[gates.layer, : len(x)]
        check_like("scales", operands.scales, own.shape, float32, x.device)
        if not torch.compiler.is_compiling() and own.numel() and operands.scales.data_ptr() != own.data_ptr():
            raise ValueError("scales: expected the rows of gates.scales at the layer of the gates, got another tensor")


def tensors(operands: Operands | GateOperands) -> dict[str, Tensor]:
    """Return the tensors of `operands` by the names that messages give them."""
    prefix = "gates." if isinstance(operands, GateOperands) else ""
    return {prefix + name: value for name, value in operands._asdict().items() if isinstance(value, Tensor)}


def check_decisions(written: dict[str, Tensor], read: dict[str, Tensor | None], gates: GateOperands | None) -> None:
    """Raise where an argument shares memory with one of `written`, or with a decision that `gates` write.

    read: the operands' scales among them, which are rows of the gates' scales where there are gates.
    """
    if gates is not None:
        of_gates = tensors(gates)
        names = ("gates.sums", "gates.scores", "gates.values", "gates.scales")
        written |= {name: of_gates.pop(name) for name in names}
        del read["scales"]
        read |= of_gates
    check_separate(written, read)


def check_separate(written: dict[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Raise where a tensor that is written shares memory with another argument: its readers would race."""
    others = {name: tensor for name, tensor in read.items() if tensor is not None and tensor.numel()}
    for name, tensor in written.items():
        if not tensor.numel():
            continue
        for other, read_tensor in others.items():
            if _overlap(_rows_in_memory(tensor), _rows_in_memory(read_tensor)):
                raise ValueError(f"{other}: expected memory of its own, got a tensor that shares that of {name}")
        others[name] = tensor


def _rows_in_memory(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return the bytes of a tensor that is not empty as rows: the first address, the stride, rows, bytes of a row."""
    size = tensor.itemsize
    if tensor.is_contiguous():
        return tensor.data_ptr(), 0, 1, tensor.numel() * size
    count, *shape = tensor.shape
    stride, *strides = tensor.stride()
    width = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    return tensor.data_ptr(), stride * size, count, width * size


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    """Say whether two tensors share a byte. Rows in the gaps between the other's rows do not."""
    few, many = sorted((one, other), key=lambda rows: rows[2])
    start, stride, count, width = many
    if few[0] + few[1] * (few[2] - 1) + few[3] <= start or start + stride * (count - 1) + width <= few[0]:
        return False
    for first in range(few[0], few[0] + few[1] * few[2], few[1]) if few[1] else (few[0],):
        row = max(0, -((start + width - 1 - first) // stride)) if stride else 0  # the first that ends behind `first`
        if row < count and start + row * stride < first + few[3] and first < start + row * stride + width:
            return True
    return False


def check_tangent(name: str, value: object) -> None:
    """Raise where forward-mode AD differentiates a tensor: an op would drop its tangent."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling() or not isinstance(value, Tensor):
        return
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name}: expected no tangent of forward-mode AD, got one; the ops in plain torch (steer_torch_, "
            "add_steer_rms_norm_torch) are differentiable"
        )


def needs_gradient(*arguments: object) -> bool:
    """Say whether autograd records what is made of one of the tensors among `arguments`."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def check_choice(name: str, value: int, kind: type[IntEnum]) -> int:
    """Return `value` as an int; raise where it is no member of `kind`, whose numbers run from 0."""
    # As an int: Dynamo of torch 2.11 does not compare members of an enumeration.
    if not 0 <= (int(value) if isinstance(value, int) else value) < len(kind):
        raise ValueError(f"{name}: expected one of {', '.join(f'{m.name} ({m.value})' for m in kind)}, got {value}")
    return int(value)


def is_number(value: object) -> TypeGuard[float]:
    """Say whether `value` is a real number that float32 can hold; infinite is allowed, NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _FLOAT32_MAX or abs(value) == math.inf


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

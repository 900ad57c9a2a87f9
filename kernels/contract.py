"""What the steering ops agree on: enumerations, table columns, the op library, argument checks.

This module imports torch alone, so that the ops can be used and tested without the rest of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

__all__ = [
    "MAX_HIDDEN_SIZE",
    "SHARPNESS",
    "STRENGTH",
    "TABLE_WIDTH",
    "THRESHOLD",
    "VECTOR_DIRECTION",
    "VECTOR_SQ",
    "Edit",
    "GateMode",
    "Score",
    "implementations",
    "library",
]


class Score(IntEnum):
    """How a gate reads a row ``x`` against a unit-norm direction ``d``."""

    DOT = 0  # <x, d>
    COSINE = 1  # <x, d> / ||x||


class Edit(IntEnum):
    """How a row is changed."""

    ADD = 0  # x + g * strength * v


class GateMode(IntEnum):
    """Where an edit takes its gate value from."""

    LATCHED = 0  # one stored value per sequence
    TOKEN = 1  # every row scores itself


# Columns of `table`, float32 [slots, TABLE_WIDTH]: what a slot needs besides its two vectors of H numbers.
THRESHOLD = 0
SHARPNESS = 1  # 0: hard gate, score > threshold; otherwise sigmoid(sharpness * (score - threshold))
STRENGTH = 2
VECTOR_SQ = 3  # <v, v>
VECTOR_DIRECTION = 4  # <v, d>
TABLE_WIDTH = 8  # padded, so that the rows of the table are 32-byte aligned

MAX_HIDDEN_SIZE = 32768  # the largest row one GPU program holds in registers without spilling

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library("steerfast", "FRAGMENT")


def implementations(op: str) -> dict[str, bool]:
    """Which implementations of ``steerfast::<op>`` a call can reach in this process.

    ``triton`` serves CUDA tensors, ``cpp`` CPU tensors, ``torch`` whatever the other two do not.
    """
    name = f"steerfast::{op}"
    return {
        "triton": torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"),
        "cpp": torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"),
        "torch": torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"),
    }


def check_rows(x: torch.Tensor) -> None:
    """``x`` must be [rows, H], of a float dtype, with the H numbers of a row next to each other."""
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions [rows, H], got shape {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x: expected {_names(FLOAT_DTYPES)}, got {x.dtype}")
    if not 1 <= x.shape[1] <= MAX_HIDDEN_SIZE:
        raise ValueError(f"x: expected a hidden size from 1 to {MAX_HIDDEN_SIZE}, got {x.shape[1]}")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x: expected stride 1 in the last dimension, got strides {list(x.stride())}")


def check_like(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """``tensor`` must be contiguous, of exactly this shape, of one of these dtypes, and on this device."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_names(dtypes)}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} like x, got {tensor.device}")


def check_table(x: torch.Tensor, table: torch.Tensor, **banks: torch.Tensor) -> None:
    """``table`` must be float32 [slots >= 1, TABLE_WIDTH], and each bank [slots, H] of a float dtype."""
    slots = table.shape[0] if table.dim() else 0
    if slots < 1:
        raise ValueError(f"table: expected at least one slot, got shape {list(table.shape)}")
    check_like("table", table, (slots, TABLE_WIDTH), (torch.float32,), x.device)
    for name, bank in banks.items():
        check_like(name, bank, (slots, x.shape[1]), FLOAT_DTYPES, x.device)


def check_choice(name: str, value: int, kind: type[IntEnum]) -> int:
    """``value`` must be a member of ``kind``, whose numbers run from 0."""
    if not 0 <= value < len(kind):
        raise ValueError(f"{name}: expected one of {', '.join(f'{m.name} ({m.value})' for m in kind)}, got {value}")
    return int(value)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

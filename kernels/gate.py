"""The prompt gate: scores and latched values of the sequences of a step, each from its deciding row.

Sequence ``i`` reads row ``row[i]`` of the residual stream and stores, for each of its slots, the score and the gate
value that :mod:`.edits` defines. ``row[i] == -1``: nothing is written, the latch of the sequence stays.
``slot[i, k] == -1``: score 0 and value 0 are stored. A slot whose gate is ALWAYS is scored too; its value is 1.

A row has the same bits in any batch and at any position: in C++, and in Triton where rows start at multiples of
16 bytes. A row whose <s, s> leaves the range of float32 (norms above 1.8e19) has no meaningful cosine.

:func:`mean_gate_unchecked_` reads the mean score of many rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .contract import (
    GATE,
    GateKind,
    GateOperands,
    check_bank,
    check_like,
    check_residual,
    check_rows,
    check_separate,
    check_stack,
    library,
)
from .edits import reference_gate, reference_stream, torch_gate, torch_numbers, torch_opened, torch_stream
from .launch import Launcher, eager_cuda, launch_shape, layout, nvidia, reported

try:
    import triton
    import triton.language as tl

    from .edits import _ALWAYS, _GATE, _TABLE_WIDTH, load_stream, read_gate
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = ["gate_", "gate_torch_", "gate_triton_", "gate_unchecked_", "mean_gate_unchecked_", "reference"]


# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor, residual: torch.Tensor | None, row: torch.Tensor, gates: GateOperands
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores and values that :func:`gate_` stores, float64 [n, K] on the CPU, sequence by sequence."""
    slot, directions, table, scores, values = gates
    stream = reference_stream(x, residual)
    scores, values = scores.double().cpu().clone(), values.double().cpu().clone()
    for i, (r, slots) in enumerate(zip(row.tolist(), slot.tolist(), strict=True)):
        for k, s in enumerate(slots if r >= 0 else []):
            scores[i, k] = values[i, k] = 0.0
            if s >= 0:
                numbers = table[s].double().cpu()
                score, value = reference_gate(stream[r], directions[s].double().cpu(), numbers)
                scores[i, k], values[i, k] = score, 1.0 if numbers[GATE] == GateKind.ALWAYS else value
    return scores, values


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit(do_not_specialize_on_alignment=["row_ptr", "slot_ptr", "table_ptr", "scores_ptr", "values_ptr"])
    def gate_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        directions_ptr,
        row_ptr,
        slot_ptr,
        table_ptr,
        scores_ptr,
        values_ptr,
        x_stride,
        residual_stride,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        PAIR: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)
        row = tl.load(row_ptr + sequence).to(tl.int64)
        if row < 0:
            return
        columns = tl.arange(0, BLOCK)
        inside = columns < H
        s = load_stream(x_ptr, residual_ptr, row, x_stride, residual_stride, inside, columns, H, CONTIGUOUS, PAIR)
        for k in tl.static_range(K):
            slot = tl.load(slot_ptr + sequence * K + k).to(tl.int64)
            score = tl.full((), 0.0, tl.float32)
            value = tl.full((), 0.0, tl.float32)
            if slot >= 0:
                score, value = read_gate(s, slot, directions_ptr, table_ptr, inside, columns, H, NVIDIA)
                value = tl.where(tl.load(table_ptr + slot * _TABLE_WIDTH + _GATE) == _ALWAYS, 1.0, value)
            tl.store(scores_ptr + sequence * K + k, score)
            tl.store(values_ptr + sequence * K + k, value)

    launch = Launcher(gate_kernel)


def gate_triton_(x: torch.Tensor, residual: torch.Tensor | None, row: torch.Tensor, gates: GateOperands) -> None:
    """Run :func:`gate_` as a Triton kernel, one program per sequence, without checks."""
    if launch.repeat(site := (row, *gates), x, residual):
        return
    slot, directions, table, scores, values = gates
    count, hidden_size = row.shape[0], x.shape[1]
    if not count:
        return
    address, contiguous, strides = layout(x, residual)
    shape = launch_shape(hidden_size, x.dtype)
    launch(
        x,
        count,
        site,
        (x, residual, directions, row, slot, table, scores, values),
        strides,
        (hidden_size, shape.block, slot.shape[1], contiguous, residual is not None, nvidia(x)),
        shape,
        address | directions.data_ptr(),
    )


# ---- torch -------------------------------------------------------------------------------------------------


def gate_torch_(x: torch.Tensor, residual: torch.Tensor | None, row: torch.Tensor, gates: GateOperands) -> None:
    """Run :func:`gate_` in plain torch, on any device, without a synchronisation and without checks."""
    if not len(row) or not len(x):
        return
    slot, directions, table, scores, values = gates
    decides = row >= 0
    at = torch.where(decides, row, 0)
    s = torch_stream(x.index_select(0, at), None if residual is None else residual.index_select(0, at))
    for k in range(slot.shape[1]):
        used = slot[:, k] >= 0
        index = torch.where(used, slot[:, k], 0)
        numbers = table.index_select(0, index)
        score, value = torch_gate(s, directions.index_select(0, index).float(), numbers)
        value = torch.where(numbers[:, GATE] == int(GateKind.ALWAYS), 1.0, value)
        for latch, new in ((scores, score), (values, value)):
            latch[:, k].copy_(torch.where(decides, torch.where(used, new, 0.0), latch[:, k]))


# ---- registration ------------------------------------------------------------------------------------------


def _flat(run: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, GateOperands], None]) -> Callable[..., None]:
    """Adapt `run` to the op's schema, which is flat."""
    return lambda x, residual, row, *gates: run(x, residual, row, GateOperands(*gates))


def _fake(*arguments: object) -> None:
    return None


library.define(
    "gate_(Tensor x, Tensor? residual, Tensor row, Tensor slot, Tensor directions, Tensor table, "
    "Tensor(a!) scores, Tensor(b!) values) -> ()"
)
# The C++ extension registers itself for CPU. Plain torch records no backward pass here, as C++ and Triton do not.
library.impl("gate_", torch.no_grad()(_flat(gate_torch_)), "CompositeExplicitAutograd")
if triton is not None:
    library.impl("gate_", _flat(gate_triton_), "CUDA")
torch.library.register_fake("steerfast::gate_", _fake, lib=library)
_op = torch.ops.steerfast.gate_.default


# ---- public ------------------------------------------------------------------------------------------------


def gate_(x: torch.Tensor, residual: torch.Tensor | None, row: torch.Tensor, gates: GateOperands) -> None:
    """Score the deciding row of each sequence, and latch the values of its gates.

    :func:`gate_unchecked_` does the same without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, the row stride free.
        residual: None, or rows like x: the gate then reads the sum of both, rounded to their dtype.
        row: [n] int32, the deciding row of each sequence; -1: none in this step. A row outside x is an error on a CPU
            and undefined on a GPU.
        gates: the slots to read, and the memory for their decisions, see :class:`.contract.GateOperands`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong, or scores or values share memory with another
            argument; the message names the argument.
    """
    slot, directions, table, scores, values = gates
    check_rows(x)
    if residual is not None:
        check_residual(x, residual)
    check_bank(x, table, directions=directions)
    sequences = row.shape[0] if row.dim() else 0
    check_like("row", row, (sequences,), (torch.int32,), x.device)
    stack = slot.shape[1] if slot.dim() == 2 else -1
    check_stack("slot", stack)
    for name, tensor, dtype in (
        ("slot", slot, torch.int32),
        ("scores", scores, torch.float32),
        ("values", values, torch.float32),
    ):
        check_like(name, tensor, (sequences, stack), (dtype,), x.device)
    if not torch.compiler.is_compiling():
        read = {"x": x, "residual": residual, "row": row, "slot": slot, "directions": directions, "table": table}
        check_separate({"scores": scores, "values": values}, read)
    _op(x, residual, row, *gates)


@reported
def gate_unchecked_(x: torch.Tensor, residual: torch.Tensor | None, row: torch.Tensor, gates: GateOperands) -> None:
    """Run :func:`gate_` without checks; eager CUDA rows go to the kernel without the dispatcher."""
    if eager_cuda(x, residual, row, gates):
        gate_triton_(x, residual, row, gates)
    else:
        _op(x, residual, row, *gates)


def mean_gate_unchecked_(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    member: torch.Tensor,
    total: torch.Tensor,
    closes: torch.Tensor,
    sums: torch.Tensor,
    gates: GateOperands,
) -> None:
    """Add the score of each row to the sum of its sequence; where a sum is complete, latch the mean and its gate value.

    :func:`gate_unchecked_` scores each row. Sums are float64: a float32 mean shows neither their order nor the steps
    that a prompt is split into, except by rounding.

    Args:
        x, residual, gates: those of :func:`gate_`.
        member: [rows] int32, the sequence whose mean includes the row; -1: none. Or [rows * K]: each row may be in K
            means, one after the other.
        total: [n] int32, the number of rows in the mean of a sequence.
        closes: [n] bool, whether the last of these rows is in x.
        sums: [n, K] float64, the sums of earlier rows; written.
    """
    slot, directions, table, scores, values = gates
    if not len(x) or not len(slot):
        return
    counts = member >= 0
    sequence = torch.where(counts, member, 0)
    at = torch.arange(len(member), dtype=torch.int32, device=x.device)
    row = torch.where(counts, at if len(member) == len(x) else at // (len(member) // len(x)), -1)
    each = torch.zeros(
        len(row), slot.shape[1], dtype=torch.float32, device=x.device
    )  # a row that does not count adds 0
    of_rows = GateOperands(slot.index_select(0, sequence), directions, table, each, torch.zeros_like(each))
    gate_unchecked_(x, residual, row, of_rows)
    sums.index_add_(0, sequence, each.double())
    mean = (sums / total[:, None]).float()
    for latch, new in ((scores, mean), (values, torch_opened(mean, torch_numbers(table, slot)))):
        latch.copy_(torch.where(closes[:, None], torch.where(slot >= 0, new, 0.0), latch))

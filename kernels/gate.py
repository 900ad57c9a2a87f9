"""The gates that decide in a step: the scores that they read, and their decision.

A layer where gates decide takes two launches. :func:`score_` scores the rows that gates read, one row a program. Then
the deciding form of ``steer_`` or ``add_steer_rms_norm`` decides and edits. So a program there reads scores of its
sequence, and no program reads a row, a score or a scale that another program of its launch writes.

Scoring, for row ``r`` of sequence ``q`` and profile ``k``, with decider ``j = q*K + k``, its slot and its table row
``t`` at this layer. Nothing is read for slot -1, or where ``t[DECIDES]`` is NOTHING.

    last_scores[j]      where r == deciding[q] and the reading has LAST: the score of the row by `directions`
    row_scores[r, k]    where r is counted and the reading has MEAN: its score by `mean_directions`.
                        0 for a row without a sequence

Deciding, with ``part`` the sum of ``row_scores[first:until, k]`` in float64:

    deciding[q] < 0     the prompt goes on in a later step. The row until - 1 adds part to sums[layer, j], and all rows
                        keep their scales
    otherwise           score = last_scores[j], or float32((sums[layer, j] + part) / total), or the sum of both.
                        The row deciding[q] stores the score and its value: for this layer, or, where t[DECIDES] is
                        EVERYWHERE, the value for all layers. Each row of the sequence with a slot stores its scales
                        for the same layers, and is edited by the scale of this layer

A mean of no row is NaN, and fires. Where all T rows of a prompt are edited, each of them takes the sum of the mean for
itself: T² loads a layer, of scores that lie in the cache.

:mod:`.edits` defines score, value and scale. A sequence that does not decide keeps its scores, values and scales.

A row has the same score in any batch and at any position: in C++, and in Triton where tensors start at multiples of 16
bytes, and rows have no gaps or row strides at multiples of 16 numbers. Triton and C++ take the sum of a mean in an
order that depends on ``until - first`` alone. A row whose <s, s> leaves the range of float32 (norms above 1.8e19) has
no meaningful cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contract import (
    DECIDES,
    GATE,
    READING,
    STRENGTH,
    Decides,
    GateKind,
    GateOperands,
    Operands,
    Reading,
    check_gates,
    check_residual,
    check_rows,
    check_separate,
    library,
    tensors,
)
from .edits import (
    reference_score,
    reference_stream,
    reference_value,
    torch_deciders,
    torch_scales,
    torch_score,
    torch_stream,
    torch_used,
    torch_value,
)
from .launch import Launcher, eager_cuda, launch_shape, layout, nvidia, reported

try:
    import triton
    import triton.language as tl

    from .edits import _GATE, _PROMPT, _SCORE, _STRENGTH, _TABLE_WIDTH, gate_value, load_stream, row_score, scaled
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = [
    "decide_torch_",
    "decided_operands",
    "deciding_arguments",
    "flat_gates",
    "reference",
    "reference_decide",
    "score_",
    "score_torch_",
    "score_triton_",
    "score_unchecked_",
    "unflat",
]

DECIDING = (
    "Tensor sequence, Tensor deciding, Tensor counted, Tensor decider_slots, Tensor strength, Tensor tables, "
    "Tensor row_scores, Tensor last_scores, Tensor(b!) sums, Tensor(c!) scores, Tensor(d!) values, Tensor(e!) scales, "
    "int layer"
)
"""The part of a deciding op's schema that `flat_gates` fills."""


def flat_gates(gates: GateOperands) -> tuple[Any, ...]:
    """Return the arguments of DECIDING: all but the directions, which `score_` alone reads."""
    return (*gates[:5], *gates[7:])


def unflat(
    slots: Tensor, vectors: Tensor, directions: Tensor, table: Tensor, kinds: int, *flat: Any
) -> tuple[Operands, GateOperands]:
    """Return the operands of a deciding op from its schema's arguments. The rows read their scales of this layer."""
    gates = GateOperands._make((*flat[:5], directions, directions, *flat[5:]))
    return Operands(slots, gates.scales[gates.layer, : len(slots)], vectors, directions, table, kinds), gates


# ---- reference ---------------------------------------------------------------------------------------------


def reference(x: Tensor, residual: Tensor | None, gates: GateOperands) -> tuple[Tensor, Tensor]:
    """Return the row_scores and last_scores that :func:`score_` leaves, float64 on the CPU, row by row."""
    stream = reference_stream(x, residual)
    row_scores, last_scores = gates.row_scores.double().cpu().clone(), gates.last_scores.double().cpu().clone()
    stack = row_scores.shape[1]
    for r, q in enumerate(gates.sequence.tolist()):
        if q < 0:
            row_scores[r] = 0.0
            continue
        for k, slot in enumerate(gates.slots.tolist()[q * stack : (q + 1) * stack]):
            j = q * stack + k
            numbers = gates.tables[gates.layer, slot].double().cpu()
            if slot < 0 or numbers[DECIDES] == Decides.NOTHING:
                continue
            first, until, _ = gates.counted[j].tolist()
            if int(numbers[READING]) & Reading.LAST and r == int(gates.deciding[q]):
                last_scores[j] = reference_score(stream[r], gates.directions[slot].double().cpu(), numbers)
            if int(numbers[READING]) & Reading.MEAN and first <= r < until:
                row_scores[r, k] = reference_score(stream[r], gates.mean_directions[slot].double().cpu(), numbers)
    return row_scores, last_scores


def reference_decide(slots: Tensor, gates: GateOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sums, scores, values and scales that a deciding op leaves, float64 on the CPU, decider by decider."""
    written = (gates.sums, gates.scores, gates.values, gates.scales)
    sums, scores, values, scales = (tensor.double().cpu().clone() for tensor in written)
    stack, layer, sequence = slots.shape[1], gates.layer, gates.sequence.cpu()
    for j, slot in enumerate(gates.slots.tolist()):
        numbers = gates.tables[:, slot].double().cpu()
        if slot < 0 or numbers[layer, DECIDES] == Decides.NOTHING:
            continue
        q, k = divmod(j, stack)
        first, until, total = gates.counted[j].tolist()
        part = gates.row_scores[first:until, k].double().cpu().sum()
        means, lasts = (int(numbers[layer, READING]) & reading for reading in (Reading.MEAN, Reading.LAST))
        if gates.deciding[q] < 0:
            sums[layer, j] += part if means else 0.0
            continue
        score = float(gates.last_scores[j]) if lasts else 0.0
        score += float((sums[layer, j] + part) / total) if means else 0.0
        value = reference_value(score, numbers[layer])
        scores[layer, j] = score
        everywhere = numbers[layer, DECIDES] == Decides.EVERYWHERE
        for of in range(len(values)) if everywhere else [layer]:
            values[of, j] = value
            gate = value if numbers[of, GATE] == GateKind.PROMPT else 1.0
            scale = gate * float(numbers[of, STRENGTH]) * float(gates.strength[j]) if gate else 0.0
            scales[of, : len(slots), k][(sequence == q) & (slots[:, k].cpu() >= 0)] = scale
    return sums, scores, values, scales


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:
    _NOTHING = tl.constexpr(float(Decides.NOTHING))
    _EVERYWHERE = tl.constexpr(float(Decides.EVERYWHERE))
    _LAST = tl.constexpr(float(Reading.LAST))
    _MEAN = tl.constexpr(float(Reading.MEAN))
    _DECIDES = tl.constexpr(DECIDES)
    _READING = tl.constexpr(READING)
    _CHUNK = tl.constexpr(1024)  # rows of a mean that a program adds up at a time

    # Parameters for which Triton compiles no variants: numbers of a batch, and pointers to single numbers.
    GATE_NUMBERS = ("layer", "layers", "deciders", "table_rows", "scale_rows")
    SCALARS = (
        *("slots_ptr", "scales_ptr", "table_ptr", "sequence_ptr", "deciding_ptr", "counted_ptr", "decider_slots_ptr"),
        *("strength_ptr", "tables_ptr", "row_scores_ptr", "last_scores_ptr", "sums_ptr", "scores_ptr", "values_ptr"),
        "all_scales_ptr",
    )

    @triton.jit(do_not_specialize_on_alignment=SCALARS)
    def score_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        directions_ptr,
        mean_directions_ptr,
        sequence_ptr,
        deciding_ptr,
        counted_ptr,
        slots_ptr,
        table_ptr,
        row_scores_ptr,
        last_scores_ptr,
        x_stride,
        residual_stride,
        H: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        PAIR: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        sequence = tl.load(sequence_ptr + row).to(tl.int64)
        if sequence < 0:
            for k in tl.static_range(K):
                tl.store(row_scores_ptr + row * K + k, 0.0)
            return
        is_last = tl.load(deciding_ptr + sequence) == row
        slots, kinds, lasts, means = (), (), (), ()
        wanted = tl.full((), 0, tl.int1)
        for k in tl.static_range(K):
            decider = sequence * K + k
            slot = tl.load(slots_ptr + decider).to(tl.int64)
            first = tl.load(counted_ptr + decider * 3)
            until = tl.load(counted_ptr + decider * 3 + 1)
            is_counted = (first <= row) & (row < until)
            numbers = table_ptr + slot * _TABLE_WIDTH
            read = (slot >= 0) & (is_last | is_counted)
            decides = tl.load(numbers + _DECIDES, mask=read, other=0.0) != _NOTHING
            reading = tl.load(numbers + _READING, mask=read, other=0.0)
            kind = tl.load(numbers + _SCORE, mask=read, other=0.0)
            last = is_last & decides & (reading != _MEAN)
            mean = is_counted & decides & (reading != _LAST)
            wanted |= last | mean
            slots = slots + (slot,)  # type: ignore[assignment]
            kinds = kinds + (kind,)  # type: ignore[assignment]
            lasts = lasts + (last,)  # type: ignore[assignment]
            means = means + (mean,)  # type: ignore[assignment]
        if wanted:
            columns = tl.arange(0, BLOCK)
            inside = columns < H
            s = load_stream(x_ptr, residual_ptr, row, x_stride, residual_stride, inside, columns, H, CONTIGUOUS, PAIR)
            for k in tl.static_range(K):
                if lasts[k]:
                    score = row_score(s, slots[k], kinds[k], directions_ptr, inside, columns, H, NVIDIA)
                    tl.store(last_scores_ptr + sequence * K + k, score)
                if means[k]:
                    score = row_score(s, slots[k], kinds[k], mean_directions_ptr, inside, columns, H, NVIDIA)
                    tl.store(row_scores_ptr + row * K + k, score)

    @triton.jit
    def decided_scales(  # type: ignore[no-untyped-def]
        row,
        row_slots,
        scales,
        gates,
        layer,
        layers,
        deciders,
        table_rows,
        scale_rows,
        K: tl.constexpr,
        LAYERS: tl.constexpr,
    ):
        """Return the scales of a row after the gates of its sequence have decided; `scales` where they do not.

        Args:
            row_slots, scales: of the row, K each. gates: pointers of `flat_gates`, in that order.
            layer, layers: the layer, and the number of layers, at most LAYERS, a power of two.
            deciders, table_rows, scale_rows: D, the slots of a layer in tables, and the rows of a layer in scales.
        """
        (
            sequence_ptr,
            deciding_ptr,
            counted_ptr,
            decider_slots_ptr,
            strength_ptr,
            tables_ptr,
            row_scores_ptr,
            last_scores_ptr,
            sums_ptr,
            scores_ptr,
            values_ptr,
            all_scales_ptr,
        ) = gates
        sequence = tl.load(sequence_ptr + row).to(tl.int64)
        known = sequence >= 0
        deciding = tl.load(deciding_ptr + sequence, mask=known, other=-1).to(tl.int64)
        each = tl.arange(0, LAYERS).to(tl.int64)
        layer = layer.to(tl.int64)
        result = ()
        for k in tl.static_range(K):
            beta = scales[k]
            decider = sequence * K + k
            slot = tl.load(decider_slots_ptr + decider, mask=known, other=-1).to(tl.int64)
            first = tl.load(counted_ptr + decider * 3, mask=known, other=0).to(tl.int64)
            until = tl.load(counted_ptr + decider * 3 + 1, mask=known, other=0).to(tl.int64)
            is_decided = deciding >= 0
            is_edited = row_slots[k] >= 0
            is_last = (first < until) & (row == until - 1)  # of the rows that the mean reads in this step
            takes_part = (slot >= 0) & tl.where(is_decided, is_edited | (row == deciding), is_last)
            if takes_part:
                numbers = tables_ptr + (layer * table_rows + slot) * _TABLE_WIDTH
                decides = tl.load(numbers + _DECIDES)
                reading = tl.load(numbers + _READING)
                sums_at = sums_ptr + layer * deciders + decider
                sums = tl.load(sums_at)
                part = tl.zeros([_CHUNK], tl.float64)
                if (decides != _NOTHING) & (reading != _LAST):
                    for start in range(first, until, _CHUNK):
                        at = start + tl.arange(0, _CHUNK)
                        scored = tl.load(row_scores_ptr + at * K + k, mask=at < until, other=0.0)
                        part += scored.to(tl.float64)
                sums += tl.sum(part, axis=0)
                if decides != _NOTHING:
                    if is_decided:
                        total = tl.load(counted_ptr + decider * 3 + 2).to(tl.float64)
                        last = tl.load(last_scores_ptr + decider)
                        mean = (sums / total).to(tl.float32)
                        score = tl.where(reading == _LAST, last, tl.where(reading == _MEAN, mean, last + mean))
                        value = gate_value(score, numbers)
                        everywhere = decides == _EVERYWHERE
                        written = (each >= tl.where(everywhere, 0, layer)) & (
                            each < tl.where(everywhere, layers, layer + 1)
                        )
                        if row == deciding:
                            tl.store(scores_ptr + layer * deciders + decider, score)
                            tl.store(values_ptr + each * deciders + decider, value, mask=written)
                        if is_edited:
                            strength = tl.load(strength_ptr + decider)
                            of_layers = tables_ptr + (each * table_rows + slot) * _TABLE_WIDTH
                            kinds = tl.load(of_layers + _GATE, mask=written, other=0.0)
                            alphas = tl.load(of_layers + _STRENGTH, mask=written, other=0.0) * strength
                            decided = scaled(tl.where(kinds == _PROMPT, value, 1.0), alphas)
                            # A slower warp may load `scales` from here after this store; its value is not used, as
                            # beta is set below wherever this store runs.
                            tl.store(all_scales_ptr + (each * scale_rows + row) * K + k, decided, mask=written)
                            gate = tl.where(tl.load(numbers + _GATE) == _PROMPT, value, 1.0)
                            beta = scaled(gate, tl.load(numbers + _STRENGTH) * strength)
                    elif reading != _LAST:  # tl.sum above is a barrier: every warp has loaded the old sum
                        tl.store(sums_at, sums)
            result = result + (beta,)  # type: ignore[assignment]
        return result

    launch = Launcher(score_kernel)


def score_triton_(x: Tensor, residual: Tensor | None, gates: GateOperands) -> None:
    """Run :func:`score_` as a Triton kernel, one program per row, without checks."""
    if launch.repeat(gates, x, residual):
        return
    count, hidden_size = x.shape
    stack = gates.row_scores.shape[1]
    if not count or not stack:
        return
    address, contiguous, strides = layout(x, residual)
    shape = launch_shape(hidden_size, x.dtype)
    sequence, deciding, counted, slots, directions, mean_directions, *rest = _score_arguments(gates)
    launch(
        x,
        count,
        gates,
        (x, residual, directions, mean_directions, sequence, deciding, counted, slots, *rest),
        strides,
        (hidden_size, shape.block, stack, contiguous, residual is not None, nvidia(x)),
        shape,
        address | directions.data_ptr() | mean_directions.data_ptr(),
    )


def deciding_arguments(gates: GateOperands | None) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], int]:
    """Return the tensors, the numbers and LAYERS of `decided_scales`. LAYERS is 0 where nothing decides."""
    if gates is None:
        return (None,) * 12, (0,) * 5, 0
    layers, scale_rows, _ = gates.scales.shape
    sizes = (gates.layer, layers, gates.slots.shape[0], gates.tables.shape[1], scale_rows)
    return flat_gates(gates)[:-1], sizes, 1 << (layers - 1).bit_length()


# ---- torch -------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_torch_(x: Tensor, residual: Tensor | None, gates: GateOperands) -> None:
    """Run :func:`score_` in plain torch, on any device, without a synchronisation and without checks."""
    count, stack = len(x), gates.row_scores.shape[1]
    if not count or not stack:
        return
    row_scores = gates.row_scores[:count]
    row_scores.copy_(torch.where((gates.sequence < 0)[:, None], 0.0, row_scores))
    if not len(gates.deciding):
        return
    s, slots, numbers = torch_stream(x, residual), torch_used(gates.slots), _numbers(gates)
    at = gates.deciding.repeat_interleave(stack)
    last = s.index_select(0, torch_used(at))
    score = torch_score(last, gates.directions.index_select(0, slots).float(), numbers)
    lasts = (numbers[:, DECIDES] != 0) & (numbers[:, READING] != int(Reading.MEAN)) & (at >= 0)
    gates.last_scores.copy_(torch.where(lasts, score, gates.last_scores))
    counted, deciders = _counted(count, numbers, gates), torch_deciders(gates.sequence, stack)
    for k in range(stack):
        directions = gates.mean_directions.index_select(0, slots.index_select(0, deciders[:, k])).float()
        score = torch_score(s, directions, numbers.index_select(0, deciders[:, k]))
        row_scores[:, k].copy_(torch.where(counted[:, k], score, row_scores[:, k]))


@torch.no_grad()
def decide_torch_(slots: Tensor, gates: GateOperands) -> None:
    """Decide in plain torch: write sums, scores, values and scales from the scores that `score_` left.

    Runs on any device without a synchronisation; traced models call it as it is.

    Args:
        slots: int32 [rows, K], those of `Operands`. gates: checked already.
    """
    count, stack = slots.shape
    if not count or not stack or not len(gates.deciding):
        return
    numbers, sums, layer = _numbers(gates), gates.sums[gates.layer], gates.layer
    decides, reading = numbers[:, DECIDES], numbers[:, READING]
    deciders = torch_deciders(gates.sequence, stack)
    each = torch.where(_counted(count, numbers, gates), gates.row_scores[:count], 0.0)
    total = sums + torch.zeros_like(sums).index_add_(0, deciders.flatten(), each.double().flatten())
    at = gates.deciding.repeat_interleave(stack)

    mean = (total / gates.counted[:, 2]).float()
    score = torch.where(reading == int(Reading.MEAN), mean, gates.last_scores + mean)
    score = torch.where(reading == int(Reading.LAST), gates.last_scores, score)
    value = torch_value(score, numbers)
    decided = (decides != 0) & (at >= 0)
    layers = torch.arange(len(gates.values), device=slots.device)[:, None]
    of_layer = decided & ((layers == layer) | (decides == int(Decides.EVERYWHERE)))  # [layers, D]
    of_row = of_layer.index_select(1, deciders.flatten()).unflatten(1, slots.shape)
    of_row = of_row & (gates.sequence >= 0)[:, None] & (slots >= 0)
    new = torch_scales(slots, value.expand(len(layers), -1), gates.strength, gates.sequence, gates.tables)

    goes_on = (decides != 0) & (at < 0) & (reading != int(Reading.LAST))
    sums.copy_(torch.where(goes_on, total, sums))
    gates.scores[layer].copy_(torch.where(decided, score, gates.scores[layer]))
    gates.values.copy_(torch.where(of_layer, value, gates.values))
    scales = gates.scales[:, :count]
    scales.copy_(torch.where(of_row, new, scales))


def decided_operands(operands: Operands, gates: GateOperands | None) -> Operands:
    """Decide in plain torch where there are gates; return the operands with the scales of their layer."""
    if gates is None:
        return operands
    decide_torch_(operands.slots, gates)
    return operands._replace(scales=gates.scales[gates.layer, : len(operands.slots)])


def _numbers(gates: GateOperands) -> Tensor:
    """Return the table rows [D, TABLE_WIDTH] of the deciders at their layer; zeros for slot -1: it does not decide."""
    numbers = gates.tables[gates.layer].index_select(0, torch_used(gates.slots))
    return torch.where((gates.slots >= 0)[:, None], numbers, 0.0)


def _counted(count: int, numbers: Tensor, gates: GateOperands) -> Tensor:
    """Return whether each of the rows counts in each mean of its sequence, bool [rows, K]."""
    deciders = torch_deciders(gates.sequence, gates.row_scores.shape[1])
    means = (numbers[:, DECIDES] != 0) & (numbers[:, READING] != int(Reading.LAST))
    rows = torch.arange(count, device=numbers.device)[:, None]
    first, until = (gates.counted[:, i].index_select(0, deciders.flatten()).view_as(deciders) for i in (0, 1))
    of_row = means.index_select(0, deciders.flatten()).view_as(deciders)
    return of_row & (gates.sequence >= 0)[:, None] & (first <= rows) & (rows < until)


# ---- registration ------------------------------------------------------------------------------------------


def _flat(run: Callable[[Tensor, Tensor | None, GateOperands], None]) -> Callable[..., None]:
    """Adapt `run` to the op's schema, which is flat and has the table of one layer."""

    def flat(x: Tensor, residual: Tensor | None, *arguments: Tensor) -> None:
        *rows, directions, mean_directions, table, row_scores, last_scores = arguments
        unused = last_scores  # the op does not touch strength, sums, scores, values and scales
        read = (*rows, unused, directions, mean_directions, table[None])
        run(x, residual, GateOperands._make((*read, row_scores, last_scores, *[unused] * 4, 0)))

    return flat


def _score_arguments(gates: GateOperands) -> tuple[Tensor, ...]:
    table = gates.tables[gates.layer]
    read = (gates.sequence, gates.deciding, gates.counted, gates.slots, gates.directions, gates.mean_directions, table)
    return (*read, gates.row_scores, gates.last_scores)


def _fake(*arguments: object) -> None:
    return None


library.define(
    "score_(Tensor x, Tensor? residual, Tensor sequence, Tensor deciding, Tensor counted, Tensor slots, "
    "Tensor directions, Tensor mean_directions, Tensor table, Tensor(a!) row_scores, Tensor(b!) last_scores) -> ()"
)
# The C++ extension registers itself for CPU.
library.impl("score_", _flat(score_torch_), "CompositeExplicitAutograd")
if triton is not None:
    library.impl("score_", _flat(score_triton_), "CUDA")
torch.library.register_fake("steerfast::score_", _fake, lib=library)
_op = torch.ops.steerfast.score_.default


# ---- public ------------------------------------------------------------------------------------------------


def score_(x: Tensor, residual: Tensor | None, gates: GateOperands) -> None:
    """Score the rows that the gates of a layer read; the deciding form of an edit then decides.

    :func:`score_unchecked_` does the same without the checks, for callers that own their buffers.

    Args:
        x: [rows, H] float32, bfloat16 or float16; the last dimension contiguous, the row stride free.
        residual: None, or rows like x: gates then read the sum of both, rounded to their dtype.
        gates: the gates, and the memory for their scores, see :class:`.contract.GateOperands`. A sequence or a slot
            that is out of range is an error on a CPU and undefined on a GPU.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or choice is wrong, or row_scores or last_scores share memory with another
            argument; the message names the argument.
    """
    check_rows(x)
    if residual is not None:
        check_residual(x, residual)
    check_gates(x, gates)
    if not torch.compiler.is_compiling():
        read = tensors(gates)
        written = {name: read.pop(name) for name in ("gates.row_scores", "gates.last_scores")}
        check_separate(written, {"x": x, "residual": residual, **read})
    _op(x, residual, *_score_arguments(gates))


@reported
def score_unchecked_(x: Tensor, residual: Tensor | None, gates: GateOperands) -> None:
    """Run :func:`score_` without checks; eager CUDA rows go to the kernel without the dispatcher."""
    if eager_cuda(x, residual, gates):
        score_triton_(x, residual, gates)
    else:
        _op(x, residual, *_score_arguments(gates))

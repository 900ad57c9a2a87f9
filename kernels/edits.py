"""The arithmetic of one row, which all ops share: the reading of a gate, and the displacement by a slot.

Numerics contract. ``s`` is the row of the unsteered model: ``x``, or ``x + residual`` rounded to their dtype where the
residual stream is kept as a pair. ``d``, ``v`` and ``t`` are the direction, vector and table row of a slot. All
arithmetic is float32. Every product and every sum over the numbers of a row is rounded: no fused multiply-add there.

    score   DOT: <s, d>.  COSINE: <s, d> / sqrt(<s, s>), and 0 where <s, s> is 0
    value   SHARPNESS == 0: 1 if score > THRESHOLD else 0.  Otherwise sigmoid(SHARPNESS * (score - THRESHOLD)).
            A NaN counts as fired: 1
    scale   0 if g == 0, else g * (STRENGTH * strength of the sequence). g is the value of a PROMPT gate, otherwise 1.
            Whoever decides stores it: the host, or :mod:`.gate`. The ops read it
    beta    the scale of the row's slot.  TOKEN: 0 if the value of the row itself is 0, else that value * scale

A slot whose beta is 0 does nothing. Any other slot displaces the row by ``(a - 1)*s + b*v + c*d``. The sums
xx = <s, s>, xd = <s, d>, xv = <s, v> and the constants vv, vd, dd of the table give

    ADD         b = beta
    CLAMP       b = beta * (clip(xv/vv, LOW, HIGH) - xv/vv): moves the coefficient along v into a range.
                LOW = HIGH = 0 ablates v
    KEEP_NORM   the row after ADD, scaled back to the norm of s: a = sqrt(xx / |s + beta*v|^2), b = a*beta
    ROTATE      turns the part of s in the plane of v and d towards the angle whose cosine and sine (measured
                from v) are LOW and HIGH; beta = 1 arrives there. The norm stays

The displacement is zero where it is undefined: CLAMP by a zero vector, KEEP_NORM where s and beta*v cancel to less than
2^-8 of their norms, ROTATE where v and d span no plane. All slots of a row read the same s, and their displacements add
up in the order of the slots. So no gate sees the edit of another slot.

A single slot that adds takes no sum over the row: its bits are the same in Triton, C++ and torch. Each implementation
takes sums in an order that is the same for a row in every batch. In Triton this holds where tensors start at multiples
of 16 bytes, and rows have no gaps or row strides at multiples of 16 numbers; plain torch does not promise it.

Sources. DOT at the last token of the prompt: InferAligner (Wang et al., EMNLP 2024, section 3), whose bias is the
threshold with the other sign. COSINE with a threshold: CAST (Lee et al., ICLR 2025). Ablation: Arditi et al., NeurIPS
2024. ROTATE: angular steering (Vu & Nguyen, 2025).
"""

from __future__ import annotations

import torch

from .contract import (
    DIRECTION_SQ,
    EDIT,
    GATE,
    HIGH,
    LOW,
    SCORE,
    SHARPNESS,
    STRENGTH,
    TABLE_WIDTH,
    THRESHOLD,
    VECTOR_DIRECTION,
    VECTOR_SQ,
    EditId,
    GateKind,
    Kinds,
    Operands,
    Score,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = [
    "reference_displacement",
    "reference_rows",
    "reference_score",
    "reference_stream",
    "reference_value",
    "torch_added",
    "torch_displaced",
    "torch_scales",
    "torch_score",
    "torch_stream",
    "torch_used",
    "torch_value",
]

CANCELLED = 2.0**-16  # share of a squared norm below which float32 sums leave no direction


# ---- reference ---------------------------------------------------------------------------------------------


def reference_stream(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Return the rows s that gates and sums read, float64 [rows, H] on the CPU."""
    if residual is None:
        return x.double().cpu()
    return (x.cpu().float() + residual.cpu().float()).to(x.dtype).double()


def reference_score(s: torch.Tensor, direction: torch.Tensor, numbers: torch.Tensor) -> float:
    """Return the score of one float64 row s [H]; `numbers` is the table row of the slot."""
    score = float(s @ direction)
    if numbers[SCORE] == Score.COSINE:
        norm = float(s.norm())
        score = score * 0.0 if norm == 0 else score / norm
    return score


def reference_value(score: float, numbers: torch.Tensor) -> float:
    """Return the gate value of a score."""
    if score != score:
        return 1.0
    sharpness, distance = float(numbers[SHARPNESS]), score - float(numbers[THRESHOLD])
    value = torch.tensor(sharpness * distance, dtype=torch.float64).sigmoid().item() if sharpness else distance > 0
    return 1.0 if value != value else float(value)


def reference_displacement(
    s: torch.Tensor, vector: torch.Tensor, direction: torch.Tensor, numbers: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return the displacement of the float64 row s [H] by one slot, float64 [H]."""
    edit = int(numbers[EDIT])
    still = torch.zeros_like(s)
    if edit == EditId.ADD:
        return beta * vector
    vv, low, high = float(vector @ vector), float(numbers[LOW]), float(numbers[HIGH])
    if edit == EditId.CLAMP:
        along = float(s @ vector) / vv if vv else 0.0
        return beta * (min(max(along, low), high) - along) * vector
    if edit == EditId.KEEP_NORM:
        moved = s + beta * vector
        if float(moved @ moved) <= CANCELLED * (float(s @ s) + beta * beta * vv):
            return still
        return moved * (s.norm() / moved.norm()) - s
    across = direction - (float(direction @ vector) / vv if vv else 0.0) * vector
    if vv == 0 or float(across @ across) <= CANCELLED * float(direction @ direction):
        return still
    e1, e2 = vector / vector.norm(), across / across.norm()
    here = torch.stack([s @ e1, s @ e2])
    there = here + beta * (here.norm() * torch.tensor([low, high], dtype=torch.float64) - here)
    if float(there.norm()) == 0:
        return still
    turn = there * (here.norm() / there.norm()) - here
    return turn[0] * e1 + turn[1] * e2


def reference_rows(y: torch.Tensor, s: torch.Tensor, operands: Operands) -> torch.Tensor:
    """Return the float64 rows y [rows, H], displaced by each of their slots, one after the other."""
    slots, scales, vectors, directions, table, kinds = operands
    y = y.clone()
    for r, (of_row, scale_of_row) in enumerate(zip(slots.tolist(), scales.tolist(), strict=True)):
        for slot, beta in zip(of_row, scale_of_row, strict=True):
            if slot < 0 or beta == 0:
                continue
            vector, direction, numbers = (t[slot].double().cpu() for t in (vectors, directions, table))
            if kinds == Kinds.LATCHED_ADD:
                numbers[EDIT] = EditId.ADD
            elif numbers[GATE] == GateKind.TOKEN:
                gate = reference_value(reference_score(s[r], direction, numbers), numbers)
                beta = gate * beta if gate else 0.0
            if beta:
                y[r] += reference_displacement(s[r], vector, direction, numbers, beta)
    return y


# ---- Triton ------------------------------------------------------------------------------------------------

if triton is not None:
    _COSINE = tl.constexpr(float(Score.COSINE))
    _PROMPT = tl.constexpr(float(GateKind.PROMPT))
    _TOKEN = tl.constexpr(float(GateKind.TOKEN))
    _ADD = tl.constexpr(float(EditId.ADD))
    _CLAMP = tl.constexpr(float(EditId.CLAMP))
    _KEEP_NORM = tl.constexpr(float(EditId.KEEP_NORM))
    _LATCHED_ADD = tl.constexpr(int(Kinds.LATCHED_ADD))
    _THRESHOLD = tl.constexpr(THRESHOLD)
    _SHARPNESS = tl.constexpr(SHARPNESS)
    _STRENGTH = tl.constexpr(STRENGTH)
    _VECTOR_SQ = tl.constexpr(VECTOR_SQ)
    _VECTOR_DIRECTION = tl.constexpr(VECTOR_DIRECTION)
    _DIRECTION_SQ = tl.constexpr(DIRECTION_SQ)
    _LOW = tl.constexpr(LOW)
    _HIGH = tl.constexpr(HIGH)
    _GATE = tl.constexpr(GATE)
    _SCORE = tl.constexpr(SCORE)
    _EDIT = tl.constexpr(EDIT)
    _TABLE_WIDTH = tl.constexpr(TABLE_WIDTH)
    _CANCELLED = tl.constexpr(CANCELLED)

    @triton.jit
    def product(a, b, NVIDIA: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return a * b, rounded: never part of a fused multiply-add."""
        if NVIDIA:
            # Triton 3.6 fuses products with sums on sm_100 and sm_120 despite enable_fp_fusion=False.
            # (libdevice.mul_rn would prevent that too, and flushes denormals.)
            return tl.inline_asm_elementwise(
                "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            return a * b

    @triton.jit
    def gate_score(xd, xx, kind):  # type: ignore[no-untyped-def]
        """Return the score of this kind from the sums <s, d> and <s, s>."""
        cosine = tl.where(xx == 0.0, 0.0, tl.div_rn(xd, tl.sqrt_rn(xx)))
        return tl.where(kind == _COSINE, cosine, xd)

    @triton.jit
    def gate_value(score, numbers):  # type: ignore[no-untyped-def]
        """Return the gate value of a score; `numbers` points to the table row of the slot."""
        threshold = tl.load(numbers + _THRESHOLD)
        sharpness = tl.load(numbers + _SHARPNESS)
        one = tl.full((), 1.0, tl.float32)
        hard = tl.where(score <= threshold, 0.0, one)
        soft = one / (one + tl.exp(-sharpness * (score - threshold)))
        value = tl.where(sharpness == 0.0, hard, soft)
        return tl.where(value == value, value, one)

    @triton.jit
    def load_row(ptr, row, stride, inside, columns, H: tl.constexpr, CONTIGUOUS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return a row in float32, zeros outside."""
        # A stride that the compiler knows keeps 16-byte loads even where H is odd.
        at = ptr + row * (H if CONTIGUOUS else stride) + columns
        return tl.load(at, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def load_stream(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        row,
        x_stride,
        residual_stride,
        inside,
        columns,
        H: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        PAIR: tl.constexpr,
    ):
        """Return s, the row that gates and sums read, in float32."""
        s = load_row(x_ptr, row, x_stride, inside, columns, H, CONTIGUOUS)
        if PAIR:
            s += load_row(residual_ptr, row, residual_stride, inside, columns, H, CONTIGUOUS)
            s = s.to(x_ptr.dtype.element_ty).to(tl.float32)
        return s

    @triton.jit
    def add_pairs(a, b, c, d):  # type: ignore[no-untyped-def]
        """Return the sums of two pairs."""
        return a + c, b + d

    @triton.jit
    def row_score(  # type: ignore[no-untyped-def]
        s, slot, kind, directions_ptr, inside, columns, H: tl.constexpr, NVIDIA: tl.constexpr
    ):
        """Return the score of the row s by the direction of the slot; both sums in one reduction."""
        d = load_row(directions_ptr, slot, H, inside, columns, H, True)
        xd, xx = tl.reduce((product(s, d, NVIDIA), product(s, s, NVIDIA)), 0, add_pairs)
        return gate_score(xd, xx, kind)

    @triton.jit
    def records(slots_ptr, scales_ptr, row, K: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return the slots and scales of a row; scale 0 for slot -1. No load waits for another."""
        slots, scales = (), ()
        for k in tl.static_range(K):
            slot = tl.load(slots_ptr + row * K + k).to(tl.int64)
            scale = tl.load(scales_ptr + row * K + k)
            slots = slots + (slot,)  # type: ignore[assignment]
            scales = scales + (tl.where(slot >= 0, scale, 0.0),)  # type: ignore[assignment]
        return slots, scales

    @triton.jit
    def scaled(gate, strength):  # type: ignore[no-untyped-def]
        """Return gate * strength: a shut gate wins over a strength that is not finite."""
        return tl.where(gate == 0.0, 0.0, gate * strength)

    @triton.jit
    def coefficients(edit, xx, xd, xv, beta, numbers):  # type: ignore[no-untyped-def]
        """Return a - 1, b and c of the displacement (a - 1)*s + b*v + c*d by an edit that is not ADD."""
        vv = tl.load(numbers + _VECTOR_SQ)
        vd = tl.load(numbers + _VECTOR_DIRECTION)
        dd = tl.load(numbers + _DIRECTION_SQ)
        low = tl.load(numbers + _LOW)
        high = tl.load(numbers + _HIGH)
        a_less_1 = tl.full((), 0.0, tl.float32)
        c = tl.full((), 0.0, tl.float32)
        if edit == _CLAMP:
            along = tl.div_rn(xv, vv)
            b = tl.where(
                vv <= 0.0, 0.0, beta * (tl.where(along < low, low, tl.where(along > high, high, along)) - along)
            )
        elif edit == _KEEP_NORM:
            full = xx + beta * (2.0 * xv + beta * vv)
            lost = full <= _CANCELLED * (xx + beta * beta * vv)
            ratio = tl.sqrt_rn(tl.div_rn(xx, full))
            a_less_1 = tl.where(lost, 0.0, ratio - 1.0)
            b = tl.where(lost, 0.0, ratio * beta)
        else:
            across = dd - tl.div_rn(vd * vd, vv)
            root, rest = tl.sqrt_rn(vv), tl.sqrt_rn(across)
            p1, p2 = tl.div_rn(xv, root), tl.div_rn(xd - tl.div_rn(xv * vd, vv), rest)
            rho = tl.sqrt_rn(p1 * p1 + p2 * p2)
            q1, q2 = p1 + beta * (rho * low - p1), p2 + beta * (rho * high - p2)
            length = tl.sqrt_rn(q1 * q1 + q2 * q2)
            lost = (vv <= 0.0) | (across <= _CANCELLED * dd) | (length == 0.0)
            c = tl.div_rn(tl.div_rn(q2 * rho, length) - p2, rest)
            b = tl.div_rn(tl.div_rn(q1 * rho, length) - p1, root) - tl.div_rn(c * vd, vv)
            b, c = tl.where(lost, 0.0, b), tl.where(lost, 0.0, c)
        return a_less_1, b, c

    @triton.jit
    def displace(  # type: ignore[no-untyped-def]
        y,
        x_ptr,
        residual_ptr,
        row,
        x_stride,
        residual_stride,
        slots,
        scales,
        vectors_ptr,
        directions_ptr,
        table_ptr,
        inside,
        columns,
        H: tl.constexpr,
        K: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        PAIR: tl.constexpr,
        KINDS: tl.constexpr,
        NVIDIA: tl.constexpr,
    ):
        """Return y after the displacements by all its slots, and whether there was one.

        Sums read s, d and v again: kept beside y, four rows of 16384 numbers exceed the registers of a program.
        """
        changed = tl.full((), 0, tl.int1)
        for k in tl.static_range(K):
            beta = scales[k]
            slot = tl.where(beta != 0.0, slots[k], -1)
            if KINDS == _LATCHED_ADD:
                # No branch, behind which the loads of other slots and of the weight would wait.
                used = tl.broadcast_to(slot, columns.shape) >= 0
                v = load_row(vectors_ptr, slot, H, inside & used, columns, H, True)
                y = tl.where(used, y + product(beta, v, NVIDIA), y)
                changed |= slot >= 0
            elif slot >= 0:
                numbers = table_ptr + slot * _TABLE_WIDTH
                gate_kind = tl.load(numbers + _GATE)
                edit = tl.load(numbers + _EDIT)
                score_kind = tl.load(numbers + _SCORE)
                a_less_1 = tl.full((), 0.0, tl.float32)
                b = beta
                c = tl.full((), 0.0, tl.float32)
                if (gate_kind == _TOKEN) | (edit != _ADD):
                    s = load_stream(
                        x_ptr, residual_ptr, row, x_stride, residual_stride, inside, columns, H, CONTIGUOUS, PAIR
                    )
                    xx = tl.sum(product(s, s, NVIDIA), axis=0)
                    xd = tl.sum(product(s, load_row(directions_ptr, slot, H, inside, columns, H, True), NVIDIA), axis=0)
                    if gate_kind == _TOKEN:
                        beta = scaled(gate_value(gate_score(xd, xx, score_kind), numbers), beta)
                        b = beta
                    if edit != _ADD:
                        xv = tl.sum(
                            product(s, load_row(vectors_ptr, slot, H, inside, columns, H, True), NVIDIA), axis=0
                        )
                        a_less_1, b, c = coefficients(edit, xx, xd, xv, beta, numbers)
                if (beta != 0.0) & ((a_less_1 != 0.0) | (b != 0.0) | (c != 0.0)):
                    if a_less_1 != 0.0:
                        s = load_stream(
                            x_ptr, residual_ptr, row, x_stride, residual_stride, inside, columns, H, CONTIGUOUS, PAIR
                        )
                        y += product(a_less_1, s, NVIDIA)
                    y += product(b, load_row(vectors_ptr, slot, H, inside, columns, H, True), NVIDIA)
                    if c != 0.0:
                        y += product(c, load_row(directions_ptr, slot, H, inside, columns, H, True), NVIDIA)
                    changed = tl.full((), 1, tl.int1)
        return y, changed


# ---- torch -------------------------------------------------------------------------------------------------


def torch_stream(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Return the rows s that gates and sums read, float32 [rows, H]."""
    return x.float() if residual is None else (x.float() + residual.float()).to(x.dtype).float()


def torch_score(s: torch.Tensor, d: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the scores [n] of float32 rows s and directions d [n, H] by table rows [n, TABLE_WIDTH].

    Enumerations are compared as ints here and below: Dynamo (torch 2.13) folds `tensor == IntEnum` to False.
    """
    scores = (s * d).sum(-1)
    square = (s * s).sum(-1)
    cosine = torch.where(square == 0, 0.0, scores / square.sqrt())
    return torch.where(numbers[:, SCORE] == int(Score.COSINE), cosine, scores)


def torch_value(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the gate values [n] of float32 scores by table rows [n, TABLE_WIDTH]."""
    threshold, sharpness = numbers[:, THRESHOLD], numbers[:, SHARPNESS]
    hard = (~(scores <= threshold)).float()
    soft = torch.sigmoid(sharpness * (scores - threshold))
    values = torch.where(sharpness == 0, hard, soft)
    return torch.where(values.isnan(), 1.0, values)


def torch_scaled(gate: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Return gate * strength: a shut gate wins over a strength that is not finite."""
    return torch.where(gate == 0, 0.0, gate * strength)


def torch_coefficients(
    s: torch.Tensor, v: torch.Tensor, d: torch.Tensor, beta: torch.Tensor, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a - 1, b and c [rows] of the displacement (a - 1)*s + b*v + c*d of float32 rows s [rows, H]."""
    xx, xd, xv = (s * s).sum(-1), (s * d).sum(-1), (s * v).sum(-1)
    vv, vd, dd = numbers[:, VECTOR_SQ], numbers[:, VECTOR_DIRECTION], numbers[:, DIRECTION_SQ]
    low, high, edit = numbers[:, LOW], numbers[:, HIGH], numbers[:, EDIT]

    def only(where: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Return 1 where a formula does not apply: neither its value nor its gradient is undefined there."""
        return torch.where(where, tensor, 1.0)

    clamps = (edit == int(EditId.CLAMP)) & (vv > 0)
    along = xv / only(clamps, vv)
    clamped = beta * (torch.minimum(torch.maximum(along, low), high) - along)

    full = xx + beta * (2 * xv + beta * vv)
    keeps = (edit == int(EditId.KEEP_NORM)) & ~(full <= CANCELLED * (xx + beta * beta * vv))
    ratio = torch.where(xx == 0, 0.0, (only(keeps & (xx != 0), xx) / only(keeps, full)).sqrt())

    across = dd - vd * vd / only(vv > 0, vv)
    plane = (edit == int(EditId.ROTATE)) & (vv > 0) & ~(across <= CANCELLED * dd)
    vv, low, high = only(plane, vv), only(plane, low), only(plane, high)  # the limits of a CLAMP may be infinite
    root, rest = vv.sqrt(), only(plane, across).sqrt()
    p1, p2 = xv / root, (xd - xv * vd / vv) / rest
    inner = p1 * p1 + p2 * p2
    rho = torch.where(inner == 0, 0.0, only(inner != 0, inner).sqrt())
    q1, q2 = p1 + beta * (rho * low - p1), p2 + beta * (rho * high - p2)
    square = q1 * q1 + q2 * q2
    turns = plane & (square != 0)
    length = only(turns, square).sqrt()
    turn = (q2 * rho / length - p2) / rest
    back = (q1 * rho / length - p1) / root - turn * vd / vv

    b = torch.where(edit == int(EditId.ADD), beta, 0.0)
    b = torch.where(clamps, clamped, b)
    b = torch.where(keeps, ratio * beta, b)
    b = torch.where(turns, back, b)
    return torch.where(keeps, ratio - 1, 0.0), b, torch.where(turns, turn, 0.0)


def torch_displaced(y: torch.Tensor, s: torch.Tensor, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 rows y [..., H] after all displacements, and which rows were displaced, bool [..., 1].

    Runs on any device without a synchronisation. Differentiable in y, s and operands; gates carry no gradient. y keeps
    its shape: Inductor copies a flattened y before every matrix product that reads it.
    """
    slots, scales, vectors, directions, table, kinds = operands
    if kinds == int(Kinds.LATCHED_ADD):
        return torch_added(y, slots, scales, vectors)
    each = (*y.shape[:-1], 1)
    changed = torch.zeros(each, dtype=torch.bool, device=y.device)
    for k in range(slots.shape[1]):
        slot = torch_used(slots[:, k])
        v, d = vectors.index_select(0, slot).float(), directions.index_select(0, slot).float()
        numbers = table.index_select(0, slot)
        flat = s.reshape(v.shape)
        own = torch_value(torch_score(flat.detach(), d.detach(), numbers), numbers).detach()
        beta = torch_scaled(torch.where(numbers[:, GATE] == int(GateKind.TOKEN), own, 1.0), scales[:, k])
        a_less_1, b, c = torch_coefficients(flat, v, d, beta, numbers)
        moves = ((slots[:, k] >= 0) & (beta != 0) & ((a_less_1 != 0) | (b != 0) | (c != 0))).view(each)
        a_less_1, b, c = a_less_1.view(each), b.view(each), c.view(each)
        moved = torch.where(a_less_1 != 0, y + a_less_1 * s, y) + b * v.view(y.shape)
        moved = torch.where(c != 0, moved + c * d.view(y.shape), moved)
        # Rows that stay are copied bit by bit: a search for the others makes the CPU wait for the device.
        y = torch.where(moves, moved, y)
        changed = changed | moves
    return y, changed


def torch_added(
    y: torch.Tensor, slots: torch.Tensor, scales: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `torch_displaced` returns, for slots [rows, K] that all add by their scales [rows, K]."""
    each = (*y.shape[:-1], 1)
    changed = torch.zeros(each, dtype=torch.bool, device=y.device)
    for k in range(slots.shape[1]):
        v = vectors.index_select(0, torch_used(slots[:, k])).float()
        b = torch.where(slots[:, k] >= 0, scales[:, k], 0.0).view(each)
        moves = b != 0
        y = torch.where(moves, y + b * v.view(y.shape), y)
        changed = changed | moves
    return y, changed


def torch_scales(
    slots: torch.Tensor, values: torch.Tensor, strength: torch.Tensor, sequence: torch.Tensor, tables: torch.Tensor
) -> torch.Tensor:
    """Return the scales of rows at all layers, float32 [layers, rows, K]; 0 for slot -1 and sequence -1.

    Args:
        slots: int32 [rows, K]. sequence: int32 [rows].
        values: float32 [layers, D], gate values of the deciders of `GateOperands`; PROMPT gates read them.
        strength: float32 [D]. tables: float32 [layers, slots, TABLE_WIDTH].
    """
    if not len(strength):  # without a sequence there is no slot
        return values.new_zeros(len(values), *slots.shape)
    used = (slots >= 0) & (sequence >= 0)[:, None]
    slot = torch.where(used, slots, 0).flatten()
    decider = torch_deciders(sequence, slots.shape[1]).flatten()
    kind, alpha = tables[..., GATE].index_select(1, slot), tables[..., STRENGTH].index_select(1, slot)
    gate = torch.where(kind == int(GateKind.PROMPT), values.index_select(1, decider), 1.0)
    scales = torch_scaled(gate, alpha * strength.index_select(0, decider))
    return torch.where(used, scales.unflatten(1, slots.shape), 0.0)


def torch_deciders(sequence: torch.Tensor, stack: int) -> torch.Tensor:
    """Return the deciders [rows, K] of rows by their sequence [rows]; those of sequence 0 where a row has none."""
    return torch_used(sequence)[:, None] * stack + torch.arange(stack, dtype=sequence.dtype, device=sequence.device)


def torch_used(numbers: torch.Tensor) -> torch.Tensor:
    """Return 0 for -1: slot or sequence 0 is then read and not used."""
    return torch.where(numbers >= 0, numbers, 0)

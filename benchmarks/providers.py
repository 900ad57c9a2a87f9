"""The compared ways to do the work of an op: ours, and the usual ones.

    steerfast            our op
    steerfast-unsteered  the fused op without slots (K = 0)
    steerfast-any        the fused op compiled for every kind of edit and gate (Kinds.ANY)
    norm                 residual add and RMSNorm without steering: a fused Triton kernel, in place as serving engines
                         have it; on a CPU torch's add and rms_norm
    norm+add             the same after a separate elementwise steering add to the block's output
    separate             our ops as separate passes: torch's add, steer_, torch's rms_norm (prompt: gate_, fused op)
    torch                plain torch as usually written: gathers, a float32 sum, the norm
    torch.compile        the same, compiled by Inductor with a dynamic number of rows
    add                  for steer_: an unconditional add of a vector to every row, as a forward hook does
    empty                an empty Triton kernel with as many arguments (CUDA)
    copy                 a copy of the bytes that the op moves

The baselines do less work, in their favour: the elementwise add has its coefficients beforehand. Where all rows share
an open gate, it adds one vector without a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import EPS, FUSED, GATES, PROMPT, STEER, Buffers, Tensors
from torch import Tensor
from torch.nn.functional import rms_norm

from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm_unchecked
from steerfast.kernels.contract import STRENGTH, THRESHOLD, GateOperands, Norm
from steerfast.kernels.gate import gate_unchecked_
from steerfast.kernels.steer import steer_unchecked_

Call = Callable[[Buffers], Any]

OPS = (FUSED, PROMPT, STEER, GATES)
LLAMA = int(Norm.LLAMA)


def providers(o: Tensors) -> dict[str, Call]:
    """Return the providers of the case's op, by name; each takes the rows of one call."""
    return {FUSED: _fused, PROMPT: _prompt, STEER: _steer, GATES: _gate}[o.case.op](o)


def _fused(o: Tensors) -> dict[str, Call]:
    plain = (o.weight, o.rows, o.values, o.strength, o.vectors, o.table)
    add, norm = _elementwise_add(o), _norm(o)

    def norm_add(b: Buffers) -> Any:
        add(b)
        return norm(b)

    def separate(b: Buffers) -> Any:
        y = b.x + b.residual
        steer_unchecked_(y, None, o.operands)
        return rms_norm(y, o.weight.shape, o.weight, EPS), y

    return {
        "steerfast": lambda b: add_steer_rms_norm_unchecked(b.x, b.residual, o.weight, o.operands, EPS, LLAMA),
        "steerfast-unsteered": lambda b: add_steer_rms_norm_unchecked(
            b.x, b.residual, o.weight, o.unsteered, EPS, LLAMA
        ),
        "steerfast-any": lambda b: add_steer_rms_norm_unchecked(b.x, b.residual, o.weight, o.any, EPS, LLAMA),
        "norm": norm,
        "norm+add": norm_add,
        "separate": separate,
        "torch": lambda b: torch_add_steer_rms_norm(b.x, b.residual, *plain),
        "torch.compile": lambda b: compiled(torch_add_steer_rms_norm)(b.x, b.residual, *plain),
        **_empty(o),
        "copy": lambda b: b.pair.clone(),
    }


def _prompt(o: Tensors) -> dict[str, Call]:
    tables = (o.strength, o.vectors, o.directions, o.table, EPS, LLAMA)
    fused = torch.ops.steerfast.add_steer_rms_norm.prompt
    slot = o.gate_slot.new_full((len(o.deciding), 1), -1)
    gates, decided = GateOperands(slot, o.directions, o.table, o.scores, o.latch), o.any._replace(values=o.latch)
    used = o.deciding >= 0
    slot[used] = o.gate_slot[o.deciding[used].long()]

    def separate(b: Buffers) -> Any:
        gate_unchecked_(b.x, b.residual, o.deciding, gates)
        return add_steer_rms_norm_unchecked(b.x, b.residual, o.weight, decided, EPS, LLAMA)

    return {
        "steerfast": lambda b: fused(b.x, b.residual, o.weight, o.rows, o.deciding, o.scores, o.latch, *tables),
        "separate": separate,
        "norm": _norm(o),
        "copy": lambda b: b.pair.clone(),
    }


def _steer(o: Tensors) -> dict[str, Call]:
    plain = (o.rows, o.values, o.strength, o.vectors, o.table)
    found: dict[str, Call] = {
        "steerfast": lambda b: steer_unchecked_(b.x, None, o.operands),
        "add": _elementwise_add(o),
        "torch": lambda b: torch_steer_(b.x, *plain),
        "torch.compile": lambda b: compiled(torch_steer_)(b.x, *plain),
        **_empty(o),
    }
    if o.moved_rows == o.case.rows:
        found["copy"] = lambda b: b.residual.copy_(b.x)
    return found


def _gate(o: Tensors) -> dict[str, Call]:
    written = (o.gate_scores, o.gate_values)
    plain = (o.gate_slot[:, 0], o.directions, o.table)
    return {
        "steerfast": lambda b: gate_unchecked_(b.x, None, o.gate_row, o.gates),
        "torch": lambda b: torch_gate_(b.x, *plain, *written),
        "torch.compile": lambda b: compiled(torch_gate_)(b.x, *plain, *written),
        **_empty(o),
    }


def _norm(o: Tensors) -> Call:
    if o.device == "cuda":
        from baselines import add_rms_norm_

        return lambda b: add_rms_norm_(b.x, b.residual, o.weight, EPS)

    def norm(b: Buffers) -> tuple[Tensor, Tensor]:
        y = b.x + b.residual
        return rms_norm(y, o.weight.shape, o.weight, EPS), y

    return norm


def _elementwise_add(o: Tensors) -> Call:
    if o.moved_rows == o.case.rows and o.moving_profiles == 1:
        vector = o.vectors[0]
        return lambda b: b.x.add_(vector)
    return lambda b: b.x.addcmul_(o.vectors.index_select(0, o.slot), o.beta)


def _empty(o: Tensors) -> dict[str, Call]:
    if o.device != "cuda":
        return {}
    from baselines import empty

    others = (o.weight, o.vectors, o.directions, o.rows, o.values, o.strength, o.table)
    return {"empty": lambda b: empty(b.x, b.residual, others, EPS)}


# ---- plain torch -------------------------------------------------------------------------------------------


def torch_add_steer_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, rows: Tensor, values: Tensor, strength: Tensor, vectors: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.float() + residual.float() + _displacement(rows, values, strength, vectors, table)
    new_residual = y.to(x.dtype)
    n = new_residual.float()
    normed = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype), new_residual


def torch_steer_(x: Tensor, rows: Tensor, values: Tensor, strength: Tensor, vectors: Tensor, table: Tensor) -> None:
    x.add_(_displacement(rows, values, strength, vectors, table))


def torch_gate_(
    x: Tensor, slot: Tensor, directions: Tensor, table: Tensor, scores: Tensor, values: Tensor
) -> None:  # fmt: skip
    index = slot.clamp(min=0)
    score = (x.float() * directions[index].float()).sum(-1)
    scores[:, 0] = score
    values[:, 0] = torch.where(slot >= 0, (score > table[index, THRESHOLD]).float(), 0.0)


def _displacement(rows: Tensor, values: Tensor, strength: Tensor, vectors: Tensor, table: Tensor) -> Tensor:
    sequence, slot = rows[:, 0], rows[:, 1]
    index = slot.clamp(min=0)
    beta = values[sequence, 0] * strength[sequence, 0] * table[index, STRENGTH]
    return torch.where(slot >= 0, beta, 0.0)[:, None] * vectors[index].float()


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, compiled once per hidden size; a second row count makes the rows dynamic."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function, fullgraph=True)
    return _compiled[function]


def forget_compiled() -> None:
    """Forget compiled functions, so that another hidden size is a constant and not a dynamic dimension."""
    torch._dynamo.reset()
    _compiled.clear()

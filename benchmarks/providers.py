"""The compared ways to do the work of an op: ours, and the usual ones.

    steerfast            our op; where gates decide, `score_` and then the deciding form
    steerfast-unsteered  the fused op without slots (K = 0)
    steerfast-any        the op compiled for every kind of edit and gate (Kinds.ANY)
    steerfast-plain      where gates decide: the form that only edits, with decisions made before
    norm                 residual add and RMSNorm without steering: a fused Triton kernel, in place as serving engines
                         have it; on a CPU torch's add and rms_norm
    norm+add             the same after a separate elementwise steering add to the block's output
    separate             our ops as separate passes: torch's add, steer_, torch's rms_norm
    torch                plain torch as usually written: gathers, a float32 sum, the norm
    torch.compile        the same, compiled by Inductor with a dynamic number of rows
    add                  for steer_: an unconditional add of a vector to every row, as a forward hook does
    empty                an empty Triton kernel with 16 arguments (CUDA)
    copy                 a copy of the bytes that the op moves

The baselines do less work, in their favour: the elementwise add has its coefficients beforehand. Where all rows share
an open gate, it adds one vector without a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import EPS, FUSED, FUSED_DECIDING, SCORE, STEER, STEER_DECIDING, Buffers, Tensors
from torch import Tensor
from torch.nn.functional import rms_norm

from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm_unchecked
from steerfast.kernels.contract import Norm
from steerfast.kernels.gate import score_unchecked_
from steerfast.kernels.steer import steer_unchecked_

Call = Callable[[Buffers], Any]

OPS = (FUSED, FUSED_DECIDING, STEER, STEER_DECIDING, SCORE)
LLAMA = int(Norm.LLAMA)


def providers(o: Tensors) -> dict[str, Call]:
    """Return the providers of the case's op, by name; each takes the rows of one call."""
    makers = {
        FUSED: _fused,
        FUSED_DECIDING: _fused_deciding,
        STEER: _steer,
        STEER_DECIDING: _steer_deciding,
        SCORE: _score,
    }
    return makers[o.case.op](o)


def _fused(o: Tensors) -> dict[str, Call]:
    plain = (o.weight, o.slots, o.scales, o.vectors)
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


def _fused_deciding(o: Tensors) -> dict[str, Call]:
    def decide(b: Buffers) -> Any:
        score_unchecked_(b.x, b.residual, o.gates)
        return add_steer_rms_norm_unchecked(b.x, b.residual, o.weight, o.decided, EPS, LLAMA, o.gates)

    return {
        "steerfast": decide,
        "steerfast-plain": lambda b: add_steer_rms_norm_unchecked(b.x, b.residual, o.weight, o.operands, EPS, LLAMA),
        "norm": _norm(o),
        **_empty(o),
        "copy": lambda b: b.pair.clone(),
    }


def _steer(o: Tensors) -> dict[str, Call]:
    plain = (o.slots, o.scales, o.vectors)
    found: dict[str, Call] = {
        "steerfast": lambda b: steer_unchecked_(b.x, None, o.operands),
        "steerfast-any": lambda b: steer_unchecked_(b.x, None, o.any),
        "add": _elementwise_add(o),
        "torch": lambda b: torch_steer_(b.x, *plain),
        "torch.compile": lambda b: compiled(torch_steer_)(b.x, *plain),
        **_empty(o),
    }
    if o.moved_rows == o.case.rows:
        found["copy"] = lambda b: b.residual.copy_(b.x)
    return found


def _steer_deciding(o: Tensors) -> dict[str, Call]:
    def decide(b: Buffers) -> None:
        score_unchecked_(b.x, b.residual, o.gates)
        steer_unchecked_(b.x, b.residual, o.decided, o.gates)

    return {
        "steerfast": decide,
        "steerfast-plain": lambda b: steer_unchecked_(b.x, b.residual, o.operands),
        **_empty(o),
    }


def _score(o: Tensors) -> dict[str, Call]:
    plain = (o.read_slot, o.directions, o.gates.row_scores)
    return {
        "steerfast": lambda b: score_unchecked_(b.x, None, o.gates),
        "torch": lambda b: torch_score_(b.x, *plain),
        "torch.compile": lambda b: compiled(torch_score_)(b.x, *plain),
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
        vector = o.vectors[0].to(o.case.dtype)
        return lambda b: b.x.add_(vector)
    vectors = o.vectors.to(o.case.dtype)
    return lambda b: b.x.addcmul_(vectors.index_select(0, o.slot), o.beta)


def _empty(o: Tensors) -> dict[str, Call]:
    if o.device != "cuda":
        return {}
    from baselines import empty

    others = (o.weight, o.vectors, o.directions, o.slots, o.scales, o.table)
    return {"empty": lambda b: empty(b.x, b.residual, others, EPS)}


# ---- plain torch -------------------------------------------------------------------------------------------


def torch_add_steer_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, slots: Tensor, scales: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    y = x.float() + residual.float() + _displacement(slots, scales, vectors)
    new_residual = y.to(x.dtype)
    n = new_residual.float()
    normed = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype), new_residual


def torch_steer_(x: Tensor, slots: Tensor, scales: Tensor, vectors: Tensor) -> None:
    x.add_(_displacement(slots, scales, vectors))


def torch_score_(x: Tensor, slot: Tensor, directions: Tensor, row_scores: Tensor) -> None:
    score = (x.float() * directions[slot.clamp(min=0)]).sum(-1)
    row_scores[:, 0] = torch.where(slot >= 0, score, 0.0)


def _displacement(slots: Tensor, scales: Tensor, vectors: Tensor) -> Tensor:
    return torch.where(slots >= 0, scales, 0.0) * vectors[slots[:, 0].clamp(min=0)]


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

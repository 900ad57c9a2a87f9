"""A probe of decoder layers: passes without requests, before anything is steered, show what layers return.

Layers that return a pair return (x, residual), whose sum is the stream, or (stream, a tensor that nobody reads). The
pairs look alike. So the probe changes the second tensor and compares what the next layer returns. If that changes, the
probe moves an amount from the residual to x: their sum stays, so the next layer may notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.vllm import compat

NOTICED = 0.05  # a change, as a share of the output's norm: about 1 where the tensor is read, 0 where it is not
CANCELLED = 0.1  # the change that a moved amount leaves, as a share of the change by the residual alone


class LayerProbe:
    """Passes some rows through a model, the same each time, with changes to what a layer returns.

    Args:
        layers: all decoder layers; those of other stages of a pipeline are placeholders.
        run: passes the rows, the same each time (see `zeroed`), and returns the last hidden states, or None where
            another stage follows. All ranks of tensor parallelism run as many passes.
        ranks: of tensor parallelism.
    """

    def __init__(self, layers: nn.ModuleList, run: Callable[[], Any], ranks: int = 1) -> None:
        self._layers = [layer for layer in layers if not isinstance(layer, compat.PPMissingLayer)]
        self._run, self._ranks = run, ranks

    def adding_classes(self) -> set[type[nn.Module]]:
        """Return the classes of layers that return (x, residual), which the next layer adds.

        Raises:
            ArchitectureError: the next layer reads both tensors of a pair and does not add them, or none follows.
        """
        unchanged = self._pass()
        first: dict[type[nn.Module], int] = {}
        for at, layer in enumerate(self._layers):
            if len(unchanged[at]) == 2 and unchanged[at][0].shape == unchanged[at][1].shape:
                first.setdefault(type(layer), at)
        return {cls for cls, at in first.items() if self._adds(cls.__name__, at, unchanged)}

    def _adds(self, name: str, at: int, unchanged: list[list[Tensor]]) -> bool:
        """Return whether the layer after number `at` adds the pair that number `at` returns."""
        before = unchanged[at + 1]
        if not before:
            raise ArchitectureError(
                f"model: expected a layer after the first {name} of this stage, which shows what it returns, found "
                "none; use another --pipeline-parallel-size"
            )
        amount = _amount(unchanged[at])

        def changes(x: float, residual: float) -> list[Tensor]:
            after = self._pass(at, (x * amount, residual * amount))[at + 1]
            return [new.float() - old.float() for new, old in zip(after, before, strict=True)]

        alone = changes(0, 1)
        noticed = [k for k, old in enumerate(before) if alone[k].norm() > NOTICED * (old.float() + alone[k]).norm()]
        if not noticed:
            return False
        # x is whole on every rank, or each has a part of it.
        moved = [changes(share, -1) for share in sorted({1, 1 / self._ranks})]
        if any(each[k].norm() < CANCELLED * alone[k].norm() for each in moved for k in noticed):
            return True
        raise ArchitectureError(
            f"model: {name} returns a pair that the layer after it reads and does not add up, so its residual stream "
            "is not known; serve this model without steering"
        )

    def _pass(self, at: int | None = None, added: Sequence[Tensor] = ()) -> list[list[Tensor]]:
        """Return copies of the tensors that each layer and, after them, the model returns.

        Args:
            at: the layer to whose output `added` is added.
        """
        outputs: list[list[Tensor]] = [[] for _ in range(len(self._layers) + 1)]

        def probed(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():
                    raise ArchitectureError("model: expected an eager pass before the model is compiled, got none")
                output = forward(*args, **kwargs)
                if number == at:
                    output = tuple(t + more.to(t.dtype) for t, more in zip(output, added, strict=True))
                outputs[number] = _copies(output)
                return output

            return call

        for number, layer in enumerate(self._layers):
            layer.forward = probed(number, layer.forward)
        try:
            outputs[-1] = _copies(self._run())
        finally:
            for layer in self._layers:
                del layer.forward
        return outputs


def _copies(output: Any) -> list[Tensor]:
    """Return copies of the tensors of an output; the next layer may overwrite them."""
    every = output if isinstance(output, (tuple, list)) else (output,)
    return [each.clone() for each in every if isinstance(each, Tensor) and each.is_floating_point()]


def _amount(pair: Sequence[Tensor]) -> Tensor:
    """Return a tensor of random signs, the same each time, as large as the larger tensor of a pair, at least 1."""
    size = max(1.0, *(float(each.float().square().mean().sqrt()) for each in pair))
    signs = torch.randint(0, 2, pair[1].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.to(pair[1]) * size


@contextmanager
def zeroed() -> Iterator[None]:
    """Let new tensors hold zeros. Without requests some attention and Mamba layers return memory as it was."""
    kept = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def zeros_of(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).zero_()

    for name, make in kept.items():
        setattr(torch, name, zeros_of(make))
    try:
        yield
    finally:
        for name, make in kept.items():
            setattr(torch, name, make)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let passes of a vLLM model run eagerly, as before it is compiled."""
    compiled: list[Any] = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
    for module in compiled:
        module.do_not_compile = True
    try:
        yield
    finally:
        for module in compiled:
            module.do_not_compile = False

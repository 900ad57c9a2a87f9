"""The probe of decoder layers: which pairs the next layer adds up. Needs vLLM for the names of its classes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.vllm.layers import check_scale
from steerfast.vllm.probe import LayerProbe, uncompiled, zeroed

pytest.importorskip("vllm")

ROWS, HIDDEN = 5, 8


class ToyLayer(nn.Module):
    """A layer whose work is a linear map of its normalised stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, HIDDEN)

    def work(self, stream: Tensor) -> Tensor:
        out: Tensor = self.inner(nn.functional.rms_norm(stream, (HIDDEN,)))
        return out


class Adding(ToyLayer):
    """Adds in place, as vLLM's kernels do."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Any:
        residual = x.clone() if residual is None else residual.add_(x)
        return self.work(residual), residual


class Stale(ToyLayer):
    """Returns the stream, and its input, which nobody reads."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Any:
        residual = x
        return residual + self.work(x), residual


class Alone(ToyLayer):
    def forward(self, x: Tensor, residual: Tensor | None) -> Any:
        return x + self.work(x), None


class Scaled(ToyLayer):
    """Adds a part of x."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Any:
        residual = x if residual is None else residual + 0.8 * x
        return self.work(residual), residual


class Routed(ToyLayer):
    """Returns the stream and scores of experts."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Any:
        return x + self.work(x), torch.zeros(len(x), 2)


class Halves(ToyLayer):
    """Returns a half of x, as each of two ranks with a partial sum does; the other rank's half is the same."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Any:
        residual = x if residual is None else residual + 2 * x
        return self.work(residual) / 2, residual


def run(layers: nn.ModuleList, last: bool = True) -> Callable[[], Any]:
    """A pass of the same rows, and a last norm that adds pairs as the layers do."""
    rows = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))

    def forward() -> Any:
        x, residual = rows, None
        for layer in layers:
            x, residual = layer(x, residual)
        if not last:
            return {"hidden_states": x}
        adds = isinstance(layers[-1], (Adding, Scaled, Halves))
        return nn.functional.rms_norm(x + residual if adds else x, (HIDDEN,)), x

    return forward


def made(*classes: type[ToyLayer]) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(cls() for cls in classes)


@torch.inference_mode()
def adding(layers: nn.ModuleList, last: bool = True, ranks: int = 1) -> set[type[nn.Module]]:
    return LayerProbe(layers, run(layers, last), ranks).adding_classes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_add_are_told_from_those_that_do_not(dtype) -> None:
    for cls in (Adding, Stale, Alone, Routed):
        layers = made(cls, cls, cls).to(dtype)
        before = [*layers.state_dict().values()]
        torch.set_default_dtype(dtype)
        try:
            assert adding(layers) == ({Adding} if cls is Adding else set())
        finally:
            torch.set_default_dtype(torch.float32)
        assert all("forward" not in vars(layer) for layer in layers)
        assert all(map(torch.equal, before, layers.state_dict().values()))


def test_a_pair_of_one_layer_is_found_by_the_norm_after_it() -> None:
    assert adding(made(Alone, Adding)) == {Adding}
    assert adding(made(Stale)) == set()


def test_a_pair_that_nothing_follows_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"a layer after the first Adding .* --pipeline-parallel-size"):
        adding(made(Alone, Adding), last=False)
    assert adding(made(Adding, Adding), last=False) == {Adding}


def test_a_pair_that_is_read_and_not_added_up_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"Scaled returns a pair .* does not add up"):
        adding(made(Scaled, Scaled, Scaled))


def test_partial_sums_of_ranks_add_up() -> None:
    assert adding(made(Halves, Halves, Halves), ranks=2) == {Halves}
    with pytest.raises(ArchitectureError, match="does not add up"):
        adding(made(Halves, Halves, Halves))


def test_rows_of_zeros_show_as_much() -> None:
    """A dummy pass embeds padding, whose row may be zero."""
    layers = made(Adding, Adding)

    def zeros() -> Any:
        x, residual = layers[1](*layers[0](torch.zeros(ROWS, HIDDEN), None))
        return x + residual

    for layer in layers:
        layer.inner.bias.data.zero_()
    with torch.inference_mode():
        assert LayerProbe(layers, zeros).adding_classes() == {Adding}


def test_memory_that_a_layer_leaves_as_it_was_does_not_matter() -> None:
    """Attention without requests returns a new tensor that it did not write."""

    class Unwritten(Adding):
        def work(self, stream: Tensor) -> Tensor:
            return super().work(stream) + torch.empty_like(stream) + torch.empty(stream.shape)

    full = [torch.full((ROWS, HIDDEN), float(k)) for k in range(50)]  # memory that is used again
    del full
    with zeroed():
        assert adding(made(Unwritten, Unwritten, Unwritten)) == {Unwritten}
    assert torch.empty.__name__ == "empty"


def test_a_pass_that_is_compiled_is_refused() -> None:
    layers = made(Adding, Adding)
    compiled = torch.compile(run(layers), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="an eager pass before the model is compiled"), torch.inference_mode():
        LayerProbe(layers, compiled).adding_classes()
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_model_runs_uncompiled_for_a_while() -> None:
    model = nn.Module()
    model.compiled, model.eager = nn.Module(), nn.Module()
    model.compiled.do_not_compile, model.eager.do_not_compile = False, True
    with uncompiled(model):
        assert model.compiled.do_not_compile
    assert not model.compiled.do_not_compile
    assert model.eager.do_not_compile


@pytest.mark.parametrize(
    ("factor", "dtype", "fits"),
    [(2.5, torch.float16, False), (2.5, torch.bfloat16, True), (1.0, torch.float16, True), (None, torch.float16, True)],
)
def test_a_stream_that_is_scaled_to_fit_float16_is_refused(factor, dtype, fits) -> None:
    layers = made(Adding, Adding)
    layers[1].routed_scaling_factor = factor
    if fits:
        check_scale(layers, dtype)
        return
    with pytest.raises(ArchitectureError, match="--dtype bfloat16"):
        check_scale(layers, dtype)

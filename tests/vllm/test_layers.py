"""The output of a decoder layer: which tensor of it is edited, and what the op gets to read.

Needs no vLLM.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.vllm.layers import serve_output, steer_layers, wrap_forward
from steerfast.vllm.ops import activate, serve_


class Recorder:
    """Adds a layer's number to the rows that it edits."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def serve(self, stream: Tensor, addend: Tensor | None, layer: int) -> None:
        self.calls.append((layer, tuple(stream.shape), addend is not None))
        stream += layer


def returned(returns: str, y: Tensor, other: Tensor) -> Any:
    shapes = {"pair": (y, other), "full": (y, None), "one": y, "three": (y, other, other), "wide": y[:, None]}
    mixed = {"mixed": (y, other.double()), "batch": y[None], "batch pair": (y[None], other[None])}
    return {**shapes, **mixed}[returns]


def make_layer(returns: str) -> type[nn.Module]:
    """A layer that doubles x and adds the residual of the layer before."""

    class Layer(nn.Module):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
            residual = x.clone() if residual is None else residual + x
            return returned(returns, x * 2, residual)

    return Layer


@pytest.fixture
def recorder() -> Recorder:
    made = Recorder()
    activate(made)
    return made


def steered(cls: type[nn.Module], at: int | None = 3, reads: bool = True, adds: bool = True) -> Any:
    wrap_forward(cls)
    layer: Any = cls()
    if at is not None:
        layer.steerfast_layer, layer.steerfast_width = at, 4
        layer.steerfast_reads, layer.steerfast_adds = reads, adds
    return layer


@pytest.mark.parametrize("reads", [True, False])
def test_of_a_pair_the_residual_is_edited(recorder, reads) -> None:
    """x, which may be a partial sum, is read at most."""
    x, residual = steered(make_layer("pair"), reads=reads)(torch.ones(2, 4))
    assert torch.equal(x, torch.full((2, 4), 2.0))
    assert torch.equal(residual, torch.full((2, 4), 4.0))
    assert recorder.calls == [(3, (2, 4), reads)]


@pytest.mark.parametrize("returns", ["full", "one", "batch"])
def test_the_stream_is_found_in_what_a_layer_returns(recorder, returns) -> None:
    output = steered(make_layer(returns))(torch.ones(2, 4))
    x = output[0] if returns == "full" else output
    assert torch.equal(x.view(2, 4), torch.full((2, 4), 5.0))
    assert recorder.calls == [(3, (2, 4), False)]


def test_rows_of_a_batch_of_one_come_in_pairs_too(recorder) -> None:
    x, residual = steered(make_layer("batch pair"))(torch.ones(2, 4))
    assert torch.equal(x, torch.full((1, 2, 4), 2.0))
    assert torch.equal(residual, torch.full((1, 2, 4), 4.0))
    assert recorder.calls == [(3, (2, 4), True)]


def test_a_residual_that_nobody_adds_is_neither_read_nor_edited(recorder) -> None:
    x, residual = steered(make_layer("pair"), adds=False)(torch.ones(2, 4))
    assert torch.equal(x, torch.full((2, 4), 5.0))
    assert torch.equal(residual, torch.ones(2, 4))
    assert recorder.calls == [(3, (2, 4), False)]


@pytest.mark.parametrize("returns", ["three", "wide"])
def test_a_layer_that_returns_something_else_is_refused(recorder, returns) -> None:
    with pytest.raises(ArchitectureError, match=r"to return rows \[n, 4\] or a pair of such"):
        steered(make_layer(returns))(torch.ones(2, 4))
    assert not recorder.calls


def test_a_pair_of_two_dtypes_is_refused_where_rows_are_read(recorder) -> None:
    with pytest.raises(ArchitectureError, match=r"pair of one dtype .* got torch\.float32 and torch\.float64"):
        steered(make_layer("mixed"))(torch.ones(2, 4))
    assert not recorder.calls
    _, residual = steered(make_layer("mixed"), reads=False)(torch.ones(2, 4))
    assert torch.equal(residual, torch.full((2, 4), 4.0, dtype=torch.float64))


def test_layers_of_a_drafter_and_of_other_engines_are_left_alone(recorder) -> None:
    cls = make_layer("one")
    mine, other = steered(cls), steered(cls, None)
    assert torch.equal(other(torch.ones(2, 4)), torch.full((2, 4), 2.0))
    assert not recorder.calls
    mine(torch.ones(2, 4))
    assert len(recorder.calls) == 1


def test_a_layer_whose_class_extends_a_steered_one_is_steered_once(recorder) -> None:
    base = make_layer("one")

    class Same(base):  # type: ignore[misc, valid-type]
        pass

    class More(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + 1

    for cls, expected in ((base, 5.0), (Same, 5.0), (More, 6.0)):
        recorder.calls.clear()
        assert torch.equal(steered(cls)(torch.ones(2, 4)), torch.full((2, 4), expected))
        assert len(recorder.calls) == 1


@pytest.mark.parametrize("returns", ["pair", "full pair"])
def test_the_op_survives_functionalisation(recorder, returns) -> None:
    first = steered(make_layer("pair"), 1, adds=returns == "pair")
    second = steered(make_layer("one"), 2)

    def model(x: Tensor) -> Tensor:
        y, residual = first(x)
        return second(y + residual) * 10

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.ones(2, 4)
    assert torch.equal(compiled(x), torch.full((2, 4), 100.0))
    assert [call[0] for call in recorder.calls] == [1, 2]
    assert torch.equal(x, torch.ones(2, 4))


def test_a_pass_without_a_runtime_is_refused() -> None:
    activate(None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="layer 2 is steered, but no runtime is active"):
        serve_(torch.ones(2, 4), None, 2)


def test_an_unexpected_output_names_what_came() -> None:
    layer = steered(make_layer("one"))
    with pytest.raises(ArchitectureError, match="got NoneType"):
        serve_output(layer, None)


def test_layers_that_only_add_do_not_read() -> None:
    pytest.importorskip("vllm")
    cls = make_layer("pair")
    layers = nn.ModuleList(cls() for _ in range(4))
    assert steer_layers(layers, [1, 2, 3], 4, {cls}, [2]) == [1, 2, 3]
    assert [layer.steerfast_reads for layer in layers[1:]] == [False, True, False]
    assert all(layer.steerfast_adds for layer in layers[1:])
    steer_layers(layers, [1, 3], 4, ())
    assert [layer.steerfast_adds for layer in layers[1:]] == [False, True, False]
    assert [layer.steerfast_reads for layer in layers[1:]] == [True, True, True]

"""What watches torch's dispatcher sees every call, and forward-mode AD is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Case, make_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from steerfast.kernels import add_steer_rms_norm as fused
from steerfast.kernels import gate, launch, steer
from steerfast.kernels.contract import Kinds

pytestmark = pytest.mark.contract


class Recorder(TorchDispatchMode):
    """A dispatch mode that writes down the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The direct launches of an op, where CPU tensors pass for CUDA's: nothing is computed."""
    launched: list[str] = []

    def normed(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        launched.append("add_steer_rms_norm")
        return torch.empty_like(x), torch.empty_like(x)

    for module in (fused, steer):
        monkeypatch.setattr(module, "eager_cuda", lambda x, *others: launch.unobserved(x))
    monkeypatch.setattr(fused, "add_steer_rms_norm_triton", normed)
    monkeypatch.setattr(steer, "steer_triton_", lambda *arguments: launched.append("steer_"))
    return launched


@pytest.fixture
def case() -> Case:
    return make_case(3, 16, kinds=Kinds.ANY, pair=True)


def test_eager_calls_skip_the_dispatcher(pretended: list[str], case: Case) -> None:
    steer.steer_unchecked_(*case.steer_arguments())
    fused.add_steer_rms_norm_unchecked(*case.norm_arguments())
    assert pretended == ["steer_", "add_steer_rms_norm"]


def test_a_dispatch_mode_sees_the_op(pretended: list[str], case: Case) -> None:
    with Recorder() as mode:
        steer.steer_unchecked_(*case.steer_arguments())
        fused.add_steer_rms_norm_unchecked(*case.norm_arguments())
    assert [name for name in mode.names if name.startswith("steerfast.")] == [
        "steerfast.steer_.default",
        "steerfast.add_steer_rms_norm.default",
    ]
    assert not pretended


@pytest.mark.parametrize("tracing", ["real", "fake"])
def test_make_fx_records_the_op(pretended: list[str], case: Case, tracing: str) -> None:
    x, residual, *rest = case.norm_arguments()
    want = torch.ops.steerfast.add_steer_rms_norm.default
    graph = make_fx(
        lambda x, residual: fused.add_steer_rms_norm_unchecked(x, residual, *rest),
        tracing_mode=tracing,
        _allow_non_fake_inputs=True,
    )(x, residual)
    assert next(node.target for node in graph.graph.nodes if node.op == "call_function") is want
    assert not pretended
    for got, expected in zip(graph(x, residual), fused.add_steer_rms_norm(*case.norm_arguments()), strict=True):
        assert torch.equal(got, expected)


def test_fake_tensors_and_tracers_are_observers() -> None:
    x = torch.zeros(2, 8)
    assert launch.unobserved(x)
    assert not launch.unobserved(torch.nn.Parameter(x))
    with FakeTensorMode():
        assert not launch.unobserved(x)
    seen: list[bool] = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        seen.append(launch.unobserved(x))
        return x + 1

    torch.jit.trace(traced, (x,), check_trace=False)
    torch.compile(traced, backend="eager", fullgraph=True)(x)
    assert seen == [False, False]
    assert launch.unobserved(x)


# ---- forward-mode AD -----------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[..., Any], Callable[[Case], tuple[Any, ...]]]] = {
    "score_": (gate.score_, Case.score_arguments),
    "score_unchecked_": (gate.score_unchecked_, Case.score_arguments),
    "steer_": (steer.steer_, Case.steer_arguments),
    "steer_unchecked_": (steer.steer_unchecked_, Case.steer_arguments),
    "add_steer_rms_norm": (fused.add_steer_rms_norm, Case.norm_arguments),
    "add_steer_rms_norm_unchecked": (fused.add_steer_rms_norm_unchecked, Case.norm_arguments),
    "steer_, deciding": (steer.steer_, lambda case: (*case.steer_arguments(), case.gates)),
    "add_steer_rms_norm, deciding": (fused.add_steer_rms_norm, lambda case: (*case.norm_arguments(), case.gates)),
}


def dual(tensor: torch.Tensor) -> torch.Tensor:
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("argument", ["x", "residual", "operands"])
def test_forward_mode_ad_is_refused(name: str, argument: str, case: Case) -> None:
    call, arguments_of = CALLS[name]
    with forward_ad.dual_level():
        arguments = list(arguments_of(case))
        call(*arguments)  # a level without tangents does not matter
        if argument == "operands":
            at = next(i for i, value in enumerate(arguments) if hasattr(value, "directions"))
            arguments[at] = arguments[at]._replace(directions=dual(arguments[at].directions))
        else:
            at = ["x", "residual"].index(argument)
            arguments[at] = dual(arguments[at])
        with pytest.raises(NotImplementedError, match="expected no tangent of forward-mode AD"):
            call(*arguments)


def test_jvp_is_refused(case: Case) -> None:
    x, *rest = case.norm_arguments()
    for call in (fused.add_steer_rms_norm, fused.add_steer_rms_norm_unchecked):
        with pytest.raises(NotImplementedError, match="x: expected no tangent of forward-mode AD"):
            torch.func.jvp(lambda x, call=call: call(x, *rest), (x,), (torch.ones_like(x),))


def test_the_torch_form_has_the_tangent_that_the_message_promises() -> None:
    case = make_case(4, 16, gates=[0], edits=[0])
    x, *rest = case.norm_arguments()
    x, direction = x.double().float(), torch.randn_like(x)

    def stream(x: torch.Tensor) -> torch.Tensor:
        return fused.add_steer_rms_norm_torch(x, *rest)[0]

    _, tangent = torch.func.jvp(stream, (x,), (direction,))
    step = 1e-2
    numeric = (stream(x + step * direction) - stream(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, atol=3e-2, rtol=3e-2)

"""The ops in torch's own machinery: opcheck, compiled graphs, gradients, CUDA graphs, devices, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import CPP, CUDA, DECISIONS, DIRECT, DTYPES, TORCH, TRITON, Case, assert_same_bits, make_case

from steerfast import _native
from steerfast.kernels import add_steer_rms_norm as norm_module
from steerfast.kernels import contract
from steerfast.kernels import gate as gate_module
from steerfast.kernels import steer as steer_module
from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm
from steerfast.kernels.contract import DECIDES, READING, Decides, EditId, GateKind, Kinds, Norm, Reading
from steerfast.kernels.edits import torch_scales
from steerfast.kernels.gate import score_
from steerfast.kernels.steer import steer_, steer_torch_

DEVICES = ["cpu", *(["cuda"] if CUDA else [])]
WRITTEN = ("x", "row_scores", "last_scores", *DECISIONS)  # the fields of a case that the ops write


UNCHECKED = (
    gate_module.score_unchecked_,
    steer_module.steer_unchecked_,
    norm_module.add_steer_rms_norm_unchecked,
)


def small_case(**options: Any) -> Case:
    options = {"rows": 6, "size": 111, "stack": 2, "pair": True, "shared": True, **options}
    return make_case(**options)


# ---- opcheck and compilation -------------------------------------------------------------------------------


@pytest.mark.slow(but=["True-*"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pair", [False, True])
def test_opcheck(device: str, pair: bool) -> None:
    case = small_case(dtype=torch.bfloat16, pair=pair).on(device)
    for kinds in Kinds:
        of_kinds = replace(case, kinds=kinds)
        for op in DIRECT.values():
            torch.library.opcheck(op, tuple(of_kinds.flat(op).values()))


def block(x: torch.Tensor, case: Case) -> tuple[torch.Tensor, ...]:
    """All ops: on intermediate rows, on rows and decisions that are inputs of the graph, and in and out of it."""
    h = x + 1
    score_(h, case.residual, case.gates)
    steer_(h, case.residual, case.operands(), case.gates)
    normed, residual = add_steer_rms_norm(h, case.residual, case.weight, case.operands(Kinds.ANY), case.eps)
    h = normed * 2
    score_(h, residual, case.gates)
    operands = case.operands(Kinds.ANY)
    normed, residual = add_steer_rms_norm(h, residual, case.weight, operands, case.eps, Norm.GEMMA, case.gates)
    steer_(x, None, case.operands(Kinds.LATCHED_ADD))
    return normed * 2, residual


@pytest.mark.slow(but=["inductor-*"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_without_copies(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.config as inductor

    graphs: list[torch.fx.GraphModule] = []

    class Spy(compile_fx.GraphLowering):
        def __init__(self, graph: torch.fx.GraphModule, *arguments: Any, **options: Any) -> None:
            graphs.append(graph)
            super().__init__(graph, *arguments, **options)

    monkeypatch.setattr(compile_fx, "GraphLowering", Spy)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    count = 0
    with inductor.patch(force_disable_caches=True):
        for rows in (6, 9, 14):
            case = small_case(rows=rows, dtype=torch.float32, seed=rows).on(device)
            mine, theirs = case.on(device), case.on(device)
            got, want = compiled(mine.x, mine), block(theirs.x, theirs)
            for a, b in zip((*got, *vars(mine).values()), (*want, *vars(theirs).values()), strict=True):
                if isinstance(a, torch.Tensor):
                    torch.testing.assert_close(a, b)
            assert not torch.equal(mine.scores, case.scores)
            assert not torch.equal(mine.all_scales, case.all_scales)
            assert not torch.equal(mine.x, case.x)
            count = count or len(graphs)
    assert len(graphs) == count  # no new graph for another number of rows
    if backend == "inductor":
        (graph,) = graphs
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("steerfast" in str(node.target) for node in calls) == 6
        copies = [node for node in calls if "clone" in str(node.target) or "copy" in str(node.target)]
        # What is left of the inputs' copying back is each one copied to itself, which is dropped when lowered.
        assert all("copy_" in str(node.target) and node.args[0] is node.args[1] for node in copies), graph.code


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_all_layers_at_once(dtype: torch.dtype) -> None:
    """Those of a host, where the decisions are known, are those that a launch stores which decides."""
    gates = [GateKind.ALWAYS, GateKind.PROMPT, GateKind.TOKEN]
    case = small_case(
        rows=14, dtype=dtype, gates=gates, edits=[EditId.ADD], kinds=Kinds.LATCHED_ADD, decides=[Decides.EVERYWHERE]
    )
    case.deciding.clamp_(min=0)
    case.strength[0] = float("inf")  # a shut gate wins over it
    x, decided = case.decide_steer(TORCH)
    scales = torch_scales(case.slots, decided.values, case.strength, case.sequence, case.tables)
    assert scales.shape == (3, *case.slots.shape)
    used = (case.slots >= 0) & (case.sequence >= 0)[:, None]
    assert (scales[:, ~used] == 0).all()
    assert_same_bits(scales[:, used], decided.all_scales[:, used])
    for layer in range(3):
        of_layer = replace(case, layer=layer, all_scales=scales)
        got = norm_module.add_steer_torch(case.x, case.residual, of_layer.operands())
        assert_same_bits(got, of_layer.run_norm(TORCH)[1])
    assert_same_bits(x, replace(case, all_scales=scales).run_steer(TORCH))


# ---- gradients ---------------------------------------------------------------------------------------------


def displaced(s: torch.Tensor, y: torch.Tensor, case: Case, edit: EditId, beta: float) -> torch.Tensor:
    """Rows y after one edit by slot 0, in float64 and in the terms of the papers: vectors, not sums."""
    v, d = case.vectors[0].double(), case.directions[0].double()
    low, high = case.table[0, 6].double(), case.table[0, 7].double()
    if edit == EditId.ADD:
        return y + beta * v
    if edit == EditId.CLAMP:
        along = s @ v / (v @ v)
        return y + beta * (along.clamp(low, high) - along)[:, None] * v
    if edit == EditId.KEEP_NORM:
        z = s + beta * v
        return y + z * (s.norm(dim=1) / z.norm(dim=1))[:, None] - s
    e1 = v / v.norm()
    e2 = torch.nn.functional.normalize(d - (d @ e1) * e1, dim=0)
    plane = torch.stack([e1, e2])
    here = s @ plane.T
    rho = here.norm(dim=1, keepdim=True)
    there = here + beta * (rho * torch.stack([low, high]) - here)
    return y + (there * rho / there.norm(dim=1, keepdim=True) - here) @ plane


def gradient_case(edit: EditId) -> Case:
    case = small_case(rows=5, size=33, stack=1, slots=1, sequences=1, norm=Norm.LLAMA)
    case = case.plain(EDIT=edit, STRENGTH=0.7, LOW=0.6, HIGH=0.8)
    case.slots[:] = 0
    case.x.copy_(torch.nn.functional.normalize(case.x, dim=1) * 5)
    case.residual.copy_(torch.nn.functional.normalize(case.residual, dim=1) * 3)
    return case


def gradients(leaves: list[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    loss = sum((o.double() * torch.randn(o.shape, generator=g).double()).sum() for o in outputs)
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("edit", EditId)
def test_gradient_of_add_steer_rms_norm(edit: EditId, norm: Norm) -> None:
    case = gradient_case(edit)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.residual, case.weight)]
    outputs = add_steer_rms_norm(*leaves, case.operands(), case.eps, norm)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = exact[0] + exact[1]
    y = displaced(y, y, case, edit, float(case.table[0, 2]))
    w = exact[2] + 1 if norm == Norm.GEMMA else exact[2]
    wanted = (y * torch.rsqrt(y.square().mean(1, keepdim=True) + case.eps) * w, y)
    for got, want in zip(gradients(leaves, outputs), gradients(exact, wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", ["steer_", "add_steer_rms_norm"])
def test_gradient_of_a_launch_that_decides(name: str) -> None:
    case = small_case(stack=1).plain(GATE=GateKind.PROMPT, SHARPNESS=2.0, EDIT=EditId.KEEP_NORM)
    case.tables[..., DECIDES], case.tables[..., READING] = Decides.HERE, Reading.BOTH
    both = []
    for gates in (case.gates, None):  # the second reads the scales that the first has stored
        leaves = [t.clone().requires_grad_() for t in (case.x, case.residual, case.weight)]
        if name == "steer_":
            x = leaves[0] * 1
            steer_torch_(x, leaves[1], case.operands(), gates)
            leaves, outputs = leaves[:2], (x,)
        else:
            outputs = add_steer_rms_norm(*leaves, case.operands(), case.eps, gates=gates)
        both.append(gradients(leaves, outputs))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("edit", EditId)
def test_gradient_of_steer_torch(edit: EditId, pair: bool) -> None:
    case = gradient_case(edit)
    leaves = [t.clone().requires_grad_() for t in ((case.x, case.residual) if pair else (case.x,))]
    x = leaves[0] * 1
    steer_torch_(x, leaves[1] if pair else None, case.operands())
    exact = [t.detach().double().requires_grad_() for t in leaves]
    s = exact[0] + exact[1] if pair else exact[0]
    wanted = displaced(s, exact[0], case, edit, float(case.table[0, 2]))
    unused = pair and edit == EditId.ADD  # its displacement does not depend on the row
    if unused:
        leaves, exact = leaves[:1], exact[:1]
    for got, want in zip(gradients(leaves, (x,)), gradients(exact, (wanted,)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [GateKind.ALWAYS, GateKind.TOKEN])
@pytest.mark.parametrize("edit", EditId)
@pytest.mark.parametrize("name", ["vectors", "directions", "scales"])
def test_gradient_of_an_operand_alone(name: str, edit: EditId, gate: GateKind) -> None:
    """Rows and weight need none, as where a vector is learned in front of a frozen model."""
    case = gradient_case(edit)
    case.table[0, 8], case.table[0, 1] = gate, 2.0  # a soft gate, which carries no gradient
    case.x[0], case.residual[0] = 0.0, 0.0  # a score of this row has no gradient
    found: list[list[torch.Tensor]] = []
    for rows_too in (False, True):
        leaf = getattr(case.operands(), name).clone().requires_grad_()
        operands = case.operands()._replace(**{name: leaf})
        x = case.x.clone().requires_grad_(rows_too)
        y = x * 1
        steer = steer_torch_ if rows_too else steer_
        steer(y, None, operands)
        outputs = (y, *add_steer_rms_norm(x, case.residual, case.weight, operands, case.eps))
        for output in outputs:
            assert output.requires_grad
            (gradient,) = torch.autograd.grad(output.square().sum(), leaf, retain_graph=True, materialize_grads=True)
            assert gradient.isfinite().all()
            assert gradient.any() or (name == "directions" and edit != EditId.ROTATE)
            found.append(gradient)
    for got, want in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not add_steer_rms_norm(x, case.residual, case.weight, operands, case.eps)[0].requires_grad


@pytest.mark.parametrize("edit", EditId)
def test_gradient_is_finite_where_an_edit_is_undefined(edit: EditId) -> None:
    case = gradient_case(edit)
    case.x[0], case.residual[0] = 0.0, 0.0  # a zero row
    case.slots[1, 0] = -1
    case.vectors[0], case.table[0, 3:5] = 0.0, 0.0  # a zero vector
    x = case.x.clone().requires_grad_()
    y = x * 1
    steer_torch_(y, None, case.operands())
    outputs = add_steer_rms_norm(x, case.residual, case.weight, case.operands(), case.eps)
    assert torch.isfinite(gradients([x], (y, *outputs))[0]).all()


def test_gradient_passes_through_steer() -> None:
    case = small_case()
    w = torch.randn(case.x.shape, requires_grad=True)
    x = w * 2
    steer_(x, None, case.operands())
    x.sum().backward()
    assert (w.grad == 2).all()
    x = w.exp()  # its backward pass saved the value that the edit overwrites
    steer_(x, None, case.operands())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


# ---- dispatch ----------------------------------------------------------------------------------------------


def test_implementations_name_what_is_live() -> None:
    for op in DIRECT:
        live = contract.implementations(op)
        assert live == {"triton": CUDA and gate_module.triton is not None, "cpp": _native.available, "torch": True}


def outcome(case: Case, functions: tuple[Callable[..., Any], ...]) -> list[torch.Tensor]:
    """What score_ and both forms of the edits leave and return, on the case itself."""
    score, steer, norm = functions
    score(*case.score_arguments())
    outputs = [*norm(*case.norm_arguments())]
    steer(*case.steer_arguments(), case.gates)
    steer(*case.steer_arguments())
    outputs += norm(*case.norm_arguments(), case.gates)
    return [*(getattr(case, name) for name in WRITTEN), *outputs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_to_call_reaches_the_live_implementation(device: str, dtype: torch.dtype) -> None:
    case = small_case(dtype=dtype)
    live = TRITON if device == "cuda" else CPP if _native.available else TORCH
    public = (score_, steer_, add_steer_rms_norm)
    direct = (CPP.score_, CPP.steer_, CPP.add_steer_rms_norm)
    want = outcome(case.on(device), (live.score_, live.steer_, live.add_steer_rms_norm))
    for functions in (public, direct, UNCHECKED):
        for a, b in zip(outcome(case.on(device), functions), want, strict=True):
            assert_same_bits(a.cpu(), b.cpu())


# ---- on a GPU ----------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def cuda_outcome(case: Case) -> list[torch.Tensor]:
    """Every op, on the case itself."""
    return outcome(case, UNCHECKED)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kinds", Kinds)
def test_replayed_graph_follows_its_buffers(kinds: Kinds) -> None:
    case = small_case(rows=64, size=1024, slots=6, dtype=torch.bfloat16, kinds=kinds)
    fixed, start = case.on("cuda"), case.on("cuda")
    cuda_outcome(case.on("cuda"))  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for name in WRITTEN:
            getattr(fixed, name).copy_(getattr(start, name))
        captured = cuda_outcome(fixed)
    for seed in range(4):
        other = small_case(rows=64, size=1024, slots=6, dtype=torch.bfloat16, kinds=kinds, seed=seed + 1).on("cuda")
        for name, tensor in vars(other).items():
            if isinstance(tensor, torch.Tensor):
                getattr(start if name in WRITTEN else fixed, name).copy_(tensor)
        graph.replay()
        for got, want in zip(captured, cuda_outcome(other), strict=True):
            assert_same_bits(got, want)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", Kinds)
def test_a_row_does_not_depend_on_its_batch_on_a_gpu(dtype: torch.dtype, kinds: Kinds) -> None:
    whole = make_case(4096, 2048, dtype, stack=2, slots=8, sequences=64, pair=True, kinds=kinds, seed=1)
    moved = whole.on("cuda")
    normed, residual = TRITON.add_steer_rms_norm(*moved.norm_arguments())
    TRITON.steer_(*moved.steer_arguments())
    for rows in (1, 256, 1024):
        part = whole.select(torch.arange(rows)).on("cuda")
        outputs = TRITON.add_steer_rms_norm(*part.norm_arguments())
        TRITON.steer_(*part.steer_arguments())
        for got, want in zip((part.x, *outputs), (moved.x, normed, residual), strict=True):
            assert_same_bits(got, want[:rows])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    case = small_case(rows=16, size=1024, dtype=torch.bfloat16)
    with torch.cuda.device(0):
        first, second = cuda_outcome(case.on("cuda:0")), cuda_outcome(case.on("cuda:1"))
        assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1
        assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.gpu
@needs_cuda
def test_no_synchronisation() -> None:
    case = small_case(rows=16, size=1024, dtype=torch.bfloat16).on("cuda")
    cuda_outcome(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda_outcome(case)
        outcome(case, (TORCH.score_, TORCH.steer_, TORCH.add_steer_rms_norm))
    finally:
        torch.cuda.set_sync_debug_mode("default")

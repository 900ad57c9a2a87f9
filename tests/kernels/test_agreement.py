"""Every op in every implementation against its float64 reference, and the norms against what they are named after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CHECKS, DTYPES, TORCH, Case, Implementation, bits, judge_decisions, make_case

from steerfast.kernels import add_steer_rms_norm as norm_module
from steerfast.kernels import edits
from steerfast.kernels import gate as gate_module
from steerfast.kernels.contract import Decides, EditId, GateKind, Kinds, Norm, Reading, Score

pytestmark = pytest.mark.contract

SIZES = [1, 7, 8, 111, 500, 576, 769, 1128]


def cases(**fixed: Any) -> st.SearchStrategy[Case]:
    return st.builds(
        make_case,
        rows=st.integers(0, 6),
        size=st.sampled_from(SIZES),
        dtype=st.sampled_from(DTYPES),
        bank_dtype=st.sampled_from(DTYPES),
        weight_dtype=st.sampled_from(DTYPES),
        stack=st.integers(0, 4),
        slots=st.integers(1, 4),
        sequences=st.integers(1, 5),
        strided=st.booleans(),
        pair=st.booleans(),
        kinds=st.sampled_from(Kinds),
        norm=st.sampled_from(Norm),
        seed=st.integers(0, 2**32 - 1),
        **{name: st.just(value) for name, value in fixed.items()},
    )


fuzz = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(case=cases())
def test_score(implementation: Implementation, case: Case) -> None:
    CHECKS["score_"](implementation, case)


@fuzz
@given(case=cases())
def test_steer(implementation: Implementation, case: Case) -> None:
    CHECKS["steer_"](implementation, case)


@fuzz
@given(case=cases(shared=True))
def test_steer_deciding(implementation: Implementation, case: Case) -> None:
    CHECKS["steer_.deciding"](implementation, case)


@fuzz
@given(case=cases())
def test_add_steer_rms_norm(implementation: Implementation, case: Case) -> None:
    CHECKS["add_steer_rms_norm"](implementation, case)


@fuzz
@given(case=cases(shared=True))
def test_add_steer_rms_norm_deciding(implementation: Implementation, case: Case) -> None:
    CHECKS["add_steer_rms_norm.deciding"](implementation, case)


@pytest.mark.parametrize("size", [4096, 5125, 16384])
def test_long_rows(implementation: Implementation, size: int) -> None:
    rows, slots = (2, 2) if implementation.interpreted else (8, 4)
    for name, check in CHECKS.items():
        for seed in range(2):
            dtype = torch.float16 if size == 16384 else torch.float32
            shared = name.endswith("deciding")
            check(implementation, make_case(rows, size, dtype, stack=2, slots=slots, shared=shared, seed=seed))


# ---- edits at their edges ----------------------------------------------------------------------------------


def edit_case(edit: EditId, strength: float = 1.0, rows: int = 5, **table: float) -> Case:
    """Every row steered by slot 0, at once and fully."""
    case = make_case(rows=rows, size=111, sequences=1, slots=1).plain(EDIT=edit, STRENGTH=strength, **table)
    case.slots[:] = 0
    return case


def products(vector: torch.Tensor, direction: torch.Tensor, case: Case) -> Case:
    case.vectors[0], case.directions[0] = vector, direction
    case.tables[:, 0, 3:6] = torch.stack([vector @ vector, vector @ direction, direction @ direction])
    return case


def test_ablation_leaves_nothing_along_the_vector(implementation: Implementation) -> None:
    case = edit_case(EditId.CLAMP, LOW=0.0, HIGH=0.0)
    along = case.run_steer(implementation) @ case.vectors[0]
    assert (along.abs() < 1e-5 * case.x.norm(dim=1) * case.vectors[0].norm()).all()


def test_clamp_keeps_rows_that_are_inside(implementation: Implementation) -> None:
    case = edit_case(EditId.CLAMP, LOW=-1e9, HIGH=1e9)
    assert torch.equal(case.run_steer(implementation), case.x)


def test_keep_norm_and_rotate_keep_the_norm(implementation: Implementation) -> None:
    for case in (edit_case(EditId.KEEP_NORM, 3.0), edit_case(EditId.ROTATE, LOW=0.6, HIGH=-0.8)):
        rows = case.run_steer(implementation)
        torch.testing.assert_close(rows.norm(dim=1), case.x.norm(dim=1), rtol=1e-5, atol=0)
        assert (rows != case.x).any(1).all()


def test_rotation_arrives_at_its_angle(implementation: Implementation) -> None:
    case = edit_case(EditId.ROTATE, LOW=0.6, HIGH=-0.8)
    v, d = case.vectors[0].double(), case.directions[0].double()
    e1 = v / v.norm()
    e2 = d - (d @ e1) * e1
    e2 /= e2.norm()
    before, after = case.x.double(), case.run_steer(implementation).double()
    rho = torch.hypot(before @ e1, before @ e2)
    for axis, target in ((e1, 0.6), (e2, -0.8)):
        torch.testing.assert_close(after @ axis, target * rho, rtol=1e-5, atol=1e-5)


def test_undefined_edits_leave_the_row(implementation: Implementation) -> None:
    zero, one = torch.zeros(111), torch.randn(111, generator=torch.Generator().manual_seed(1))
    still = [
        products(zero, one, edit_case(EditId.CLAMP, LOW=1.0, HIGH=1.0)),
        products(zero, one, edit_case(EditId.ROTATE, LOW=1.0)),
        products(one, 2 * one, edit_case(EditId.ROTATE, HIGH=1.0)),
        products(one, zero, edit_case(EditId.ROTATE, HIGH=1.0)),
    ]
    opposite = edit_case(EditId.KEEP_NORM)
    opposite.x[:] = -one
    half_turn = edit_case(
        EditId.ROTATE, strength=0.5, rows=1, LOW=-1.0, HIGH=0.0
    )  # half way back there is no direction
    half_turn.x[:] = one
    half_turn = products(one, torch.roll(one, 1), half_turn)
    for case in (*still, products(one, one, opposite)):
        assert torch.equal(case.run_steer(implementation), case.x)
    # Only where the sums cancel exactly is the length zero; near it the row may turn either way but keeps its norm.
    torch.testing.assert_close(half_turn.run_steer(implementation).norm(), one.norm(), rtol=1e-4, atol=0)


# ---- the judgement itself ----------------------------------------------------------------------------------


def fully_steered(edit: EditId, dtype: torch.dtype) -> Case:
    case = make_case(rows=8, size=576, dtype=dtype, slots=2, sequences=2, pair=True, shared=True, seed=4)
    case = case.plain(EDIT=edit, STRENGTH=0.7)
    case.sequence[:] = torch.arange(8) // 4
    case.slots[:, 0] = case.sequence
    case.decider_slots[:], case.deciding[:] = torch.tensor([0, 1]), torch.tensor([2, 7])
    case.counted[:] = torch.tensor([[0, 3, 3], [4, 8, 5]])
    case.tables[..., 6:8] = torch.tensor([0.6, 0.8]) if edit == EditId.ROTATE else 0.3
    case.x[:], case.residual[:] = case.x / case.x.float().std(1, keepdim=True), case.residual / 9
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("edit", "which"),
    [
        (EditId.ADD, 1),
        (EditId.CLAMP, 1),
        (EditId.KEEP_NORM, 0),
        (EditId.KEEP_NORM, 1),
        (EditId.ROTATE, 1),
        (EditId.ROTATE, 2),
    ],
)
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "score_"])
def test_one_percent_off_in_a_coefficient_is_noticed(
    name: str, edit: EditId, which: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, right = fully_steered(edit, dtype), edits.torch_coefficients
    CHECKS[name](TORCH, case)

    def wrong(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = list(right(*arguments))
        result[which] = result[which] * 1.01
        return tuple(result)

    monkeypatch.setattr(edits, "torch_coefficients", wrong)
    with pytest.raises(AssertionError):
        CHECKS[name](TORCH, case)


def decision_case() -> Case:
    case = fully_steered(EditId.ADD, torch.bfloat16)
    columns = {"DECIDES": Decides.EVERYWHERE, "READING": Reading.BOTH, "SHARPNESS": 4.0, "STRENGTH": 0.7}
    return case.plain(GATE=GateKind.PROMPT, SCORE=Score.COSINE, **columns)


@pytest.mark.parametrize(
    ("name", "function"),
    [("score_", "torch_score"), ("steer_.deciding", "torch_value"), ("steer_.deciding", "torch_scales")],
)
def test_one_percent_off_in_a_decision_is_noticed(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = decision_case(), getattr(gate_module, function)
    CHECKS[name](TORCH, case)
    monkeypatch.setattr(gate_module, function, lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(AssertionError):
        CHECKS[name](TORCH, case)


@pytest.mark.parametrize("field", ["row_scores", "last_scores", "sums", "counted"])
def test_one_percent_off_in_a_mean_is_noticed(field: str) -> None:
    case = decision_case()
    _, decided = case.decide_steer(TORCH)
    judge_decisions(case, decided)
    off = getattr(case, field) + 1 if field == "counted" else getattr(case, field) * 1.01
    with pytest.raises(AssertionError):
        judge_decisions(replace(case, **{field: off}), decided)


# ---- norms -------------------------------------------------------------------------------------------------


def convention(case: Case, y: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The table in kernels/add_steer_rms_norm.py, spelled out for rows y in float32."""
    dtype, w = case.x.dtype, case.weight.float()
    n = y.to(dtype).float()
    scaled = n / (n.square().mean(1, keepdim=True) + case.eps).sqrt()
    if norm == Norm.LLAMA:
        scaled = scaled.to(dtype).float()
    return (scaled * (1 + w if norm == Norm.GEMMA else w)).to(dtype)


def norm_case(implementation: Implementation, dtype: torch.dtype, norm: Norm) -> Case:
    """Rows of comparable norm; every other one steered by a plain addition."""
    rows = 4 if implementation.interpreted else 32
    case = make_case(rows, 1128, dtype, seed=7, norm=norm, kinds=Kinds.LATCHED_ADD).plain()
    case.slots[:, 0] = torch.tensor([0, -1]).repeat(rows // 2)
    case.x[:] = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(8)) * 3
    case.residual[:] = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(9)) * 3
    return case


def half_dtypes(implementation: Implementation) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES[1:] if not implementation.truncates(dtype)]


@pytest.mark.parametrize("norm", Norm)
def test_norm_rounds_where_its_model_does(implementation: Implementation, norm: Norm) -> None:
    for dtype in half_dtypes(implementation):
        case = norm_case(implementation, dtype, norm)
        y = case.x.float() + case.residual.float()
        y[::2] += case.vectors[0].float()
        got = case.run_norm(implementation)[0]
        differing = {other: (got != convention(case, y, other)).double().mean().item() for other in Norm}
        # float32 sums of another order turn the rounding of one number in a thousand, other conventions that of many.
        assert differing.pop(norm) < 0.01
        assert min(differing.values()) > 0.03, differing


@pytest.mark.parametrize("norm", [Norm.LLAMA, Norm.GEMMA])
def test_norm_is_that_of_transformers(implementation: Implementation, norm: Norm) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, *half_dtypes(implementation)):
        case = norm_case(implementation, dtype, norm)
        module = (LlamaRMSNorm if norm == Norm.LLAMA else GemmaRMSNorm)(case.x.shape[1], eps=case.eps).to(dtype)
        module.weight.data.copy_(case.weight)
        normed, new_residual = case.run_norm(implementation)
        want = module(new_residual).detach()
        assert ((bits(normed) - bits(want)).abs() <= (4 if dtype == torch.float32 else 1)).all()
        assert (normed == want).double().mean() > (0.3 if dtype == torch.float32 else 0.99)


def plain_path(case: Case, residual: torch.Tensor) -> torch.Tensor:
    """The norm as PyTorch computes it in the dtype itself."""
    w = case.weight + 1 if case.norm == Norm.GEMMA else case.weight
    return torch.nn.functional.rms_norm(residual, (residual.shape[1],), w, case.eps)


@pytest.mark.parametrize("norm", Norm)
def test_norm_is_as_exact_as_plain_torch_and_unbiased(implementation: Implementation, norm: Norm) -> None:
    for dtype in (torch.float32, *half_dtypes(implementation)):
        case = norm_case(implementation, dtype, norm)
        normed, new_residual = case.run_norm(implementation)
        want_normed, want_residual = norm_module.reference(*case.norm_arguments())
        in_dtype = case.x + case.residual
        in_dtype[::2] += case.vectors[0]
        theirs = (plain_path(case, in_dtype).double() - want_normed).abs().max()
        error = normed.double() - want_normed
        assert error.abs().max() <= 2 * theirs + 1e-6 * want_normed.abs().max()
        # A row's numbers share the error of rstd, which only the rounding to 16 bits drowns.
        signed = [(new_residual.double() - want_residual) * want_residual.sign()]
        signed += [error * want_normed.sign()] if dtype != torch.float32 else []
        for e in signed:
            assert e.sign().mean().abs() <= 10 / e.numel() ** 0.5  # rounds up as often as down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_residual_is_rounded_once(implementation: Implementation, dtype: torch.dtype) -> None:
    if implementation.truncates(dtype):
        return
    case = norm_case(implementation, dtype, Norm.LLAMA)
    new_residual = case.run_norm(implementation)[1]
    plain = (case.x.float() + case.residual.float()).to(dtype)
    assert torch.equal(bits(new_residual[1::2]), bits(plain[1::2]))
    exact = norm_module.reference(*case.norm_arguments())[1][::2].to(dtype)
    steered = new_residual[::2]
    if dtype == torch.float32:  # three roundings; a number near zero may be off by many of its own
        assert ((steered - exact).abs() <= 2.0**-21 * case.x.abs().max()).all()
    else:
        assert ((bits(steered) - bits(exact)).abs() <= 1).all()
        assert (steered == exact).double().mean() >= 0.999


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_zero_rows_and_eps(implementation: Implementation, eps: float) -> None:
    case = replace(norm_case(implementation, torch.float32, Norm.LLAMA), eps=eps)
    case.x[1], case.residual[1] = 0.0, 0.0
    normed, new_residual = case.run_norm(implementation)
    assert (new_residual[1] == 0).all()
    assert normed[1].isnan().all() if eps == 0 else (normed[1] == 0).all()
    want = norm_module.reference(*case.norm_arguments())[0]
    others = torch.arange(len(normed)) != 1
    torch.testing.assert_close(normed[others].double(), want[others], rtol=1e-5, atol=1e-6)

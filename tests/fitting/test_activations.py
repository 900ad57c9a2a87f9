"""Residual rows against one plain forward pass per prompt; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import steerfast
from steerfast.errors import ArchitectureError, PromptError, SteerfastError
from steerfast.fitting.activations import answer_mean, gate_reading, last_token, prompt_mean, residual_rows
from steerfast.hf.generation import batches
from steerfast.profile import Gate

TURN = (13,)  # the third has one
SEQUENCES = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]


def make_gpt2() -> Any:
    """Learned positions: padding on the left shifts them unless they are given."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.25
    )
    return transformers.GPT2LMHeadModel(config).eval()


def layers_of(model: Any) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def one_by_one(model: Any, ids: list[int]) -> Tensor:
    """[T, layers, H] of one sequence."""
    kept: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: kept.append(out if isinstance(out, Tensor) else out[0]))
        for layer in layers_of(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(kept, dim=2)[0].float()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_rows_equal_one_forward_each(tiny_llama: Any, architecture: str, side: Any, batch_size: int) -> None:
    model = tiny_llama if architecture == "llama" else make_gpt2()
    rows = residual_rows(model, SEQUENCES, batch_size=batch_size, padding_side=side)
    expected = torch.stack([one_by_one(model, ids)[-1] for ids in SEQUENCES])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_half_precision_models(tiny_llama: Any, dtype: torch.dtype, side: Any) -> None:
    model = tiny_llama.to(dtype)
    rows = residual_rows(model, SEQUENCES, padding_side=side)
    expected = torch.stack([one_by_one(model, ids)[-1] for ids in SEQUENCES])
    assert rows.dtype == torch.float32
    cosine = torch.cosine_similarity(rows, expected, dim=2)
    assert float(cosine.min()) > 0.99
    assert torch.equal(residual_rows(model, SEQUENCES, batch_size=1), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [1, 2, 12])
def test_answer_means(tiny_llama: Any, side: Any, tokens: int) -> None:
    lengths = [2, 0, 3, 1, 2]
    rows = residual_rows(tiny_llama, SEQUENCES, reduce=answer_mean(lengths, tokens), batch_size=3, padding_side=side)
    expected = [
        one_by_one(tiny_llama, ids)[length : length + tokens].double().mean(dim=0).float()
        for ids, length in zip(SEQUENCES, lengths, strict=True)
    ]
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_answer_means_look_at_no_padding() -> None:
    (batch,) = batches([[1, 2, 3], [4, 5]], 2, "left", 0, torch.device("cpu"))
    hidden = torch.arange(12.0).view(2, 3, 2)
    hidden[1, 0] = float("nan")
    assert answer_mean([1, 1], 5)(hidden, batch).tolist() == [[3.0, 4.0], [10.0, 11.0]]


MEANS = [{}, {"window": 1}, {"window": 3}, {"window": 100}, {"turn": TURN}, {"turn": TURN, "tail": 1, "window": 2}]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("fields", [None, *MEANS], ids=str)
def test_what_a_gate_reads(tiny_llama: Any, side: Any, score: Any, fields: dict[str, Any] | None) -> None:
    """The score of what is kept of a prompt is the gate's: one row's, or the mean of many rows' scores."""
    gate = Gate(score=score) if fields is None else Gate(score=score, pooling="mean", **fields)
    reduce, kind = gate_reading(gate)
    kept = residual_rows(tiny_llama, SEQUENCES, reduce=reduce, batch_size=3, padding_side=side)
    direction = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction /= direction.norm(dim=1, keepdim=True)
    for ids, found in zip(SEQUENCES, kept.double(), strict=True):
        begin, end = (ids.index(TURN[0]) + 1 if gate.turn and TURN[0] in ids else 0), len(ids) - gate.tail
        rows = one_by_one(tiny_llama, ids).double()
        read = rows[max(begin, end - (gate.window or end)) : end]
        rows = rows[-1:] if fields is None or not len(read) else read
        expected = (rows * direction).sum(dim=2)
        if score == "cosine":
            expected /= rows.norm(dim=2)
        own = (found * direction).sum(dim=1)
        if kind == "cosine":
            own /= found.norm(dim=1)
        torch.testing.assert_close(own, expected.mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("huge", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_means_look_at_no_padding_and_survive_zero_rows(huge: float, side: Any, dtype: torch.dtype) -> None:
    (batch,) = batches([[1, 2, 3], [4, 5], [6]], 3, side, 0, torch.device("cpu"))
    mask = batch.mask.clone()
    hidden = torch.full((3, 3, 2), huge, dtype=dtype)
    hidden[batch.mask.bool()] = torch.tensor([[3, 4], [0, 0], [6, -8], [0, 2], [5, 12], [0, 0]], dtype=dtype)
    for window, rows, units in (
        (None, [[3, -4 / 3], [2.5, 7], [0, 0]], [[0.4, 0], [2.5 / 13, 12.5 / 13], [0, 0]]),
        (2, [[3, -4], [2.5, 7], [0, 0]], [[0.3, -0.4], [2.5 / 13, 12.5 / 13], [0, 0]]),
        (1, [[6, -8], [5, 12], [0, 0]], [[0.6, -0.8], [5 / 13, 12 / 13], [0, 0]]),
    ):
        for unit, expected in ((False, rows), (True, units)):
            found = prompt_mean(hidden, batch, unit=unit, gate=Gate(pooling="mean", window=window))
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)
    assert torch.equal(batch.mask, mask)


def test_one_row_per_prompt_and_layer_is_kept(tiny_llama: Any) -> None:
    sizes = []

    def reduce(hidden: Tensor, batch: Any) -> Tensor:
        row = last_token(hidden, batch)
        sizes.append((row.untyped_storage().nbytes(), len(hidden) * 32 * 4))
        return row

    residual_rows(tiny_llama, SEQUENCES, reduce=reduce, batch_size=2)
    assert len(sizes) == 3 * 5
    assert all(held == needed for held, needed in sizes)


def test_several_rows_per_prompt_may_be_kept(tiny_llama: Any) -> None:
    def both(hidden: Tensor, batch: Any) -> Tensor:
        mean = prompt_mean(hidden, batch, unit=True, gate=Gate(pooling="mean"))
        return torch.stack([last_token(hidden, batch).double(), mean], dim=1)

    rows = residual_rows(tiny_llama, SEQUENCES, reduce=both, batch_size=2)
    assert (rows.shape, rows.dtype) == ((5, 5, 2, 32), torch.float32)
    assert torch.equal(rows[:, :, 0], residual_rows(tiny_llama, SEQUENCES, batch_size=2))
    tiny_llama.get_input_embeddings().weight.data[18] = float("inf")
    with pytest.raises(SteerfastError, match="at layer 0 for prompt 4"):
        residual_rows(tiny_llama, SEQUENCES, reduce=both, batch_size=2)


def test_no_prompts_have_no_rows(tiny_llama: Any) -> None:
    assert residual_rows(tiny_llama, []).shape == (0, 5, 32)


def test_the_head_is_not_run(tiny_llama: Any) -> None:
    tiny_llama.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    residual_rows(tiny_llama, SEQUENCES)


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [False, True])
def test_modes_come_back(tiny_llama: Any, training: bool) -> None:
    tiny_llama.train(training)
    tiny_llama.model.layers[1].train(not training)
    before = modes(tiny_llama)
    residual_rows(tiny_llama, SEQUENCES)
    assert modes(tiny_llama) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_behind(tiny_llama: Any, error: type[BaseException]) -> None:
    tiny_llama.train()
    calls = []

    def fail(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    handle = tiny_llama.model.layers[3].register_forward_pre_hook(fail)
    before, count = modes(tiny_llama), hooks(tiny_llama)
    with pytest.raises(error):
        residual_rows(tiny_llama, SEQUENCES, batch_size=2)
    assert hooks(tiny_llama) == count
    assert modes(tiny_llama) == before
    handle.remove()
    tiny_llama.eval()
    assert torch.equal(residual_rows(tiny_llama, [[9]])[0], one_by_one(tiny_llama, [9])[-1])


def test_non_finite_activations_are_named(tiny_llama: Any) -> None:
    tiny_llama.model.layers[2].mlp.down_proj.weight.data[4, 4] = float("nan")
    with pytest.raises(SteerfastError, match="expected finite activations, got NaN or inf at layer 2 for prompt 0"):
        residual_rows(tiny_llama, SEQUENCES)


def test_one_bad_prompt_is_named(tiny_llama: Any) -> None:
    tiny_llama.get_input_embeddings().weight.data[18] = float("inf")
    with pytest.raises(SteerfastError, match="at layer 0 for prompt 4"):
        residual_rows(tiny_llama, SEQUENCES, batch_size=2)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="got Linear without a config"):
        residual_rows(nn.Linear(2, 2), SEQUENCES)


def test_the_default_dtype_does_not_matter(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    expected = residual_rows(model, SEQUENCES)
    torch.set_default_dtype(torch.float64)
    try:
        rows = residual_rows(model, SEQUENCES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, expected)


def test_a_steered_model_is_refused(tiny_llama: Any, make_profile: Any) -> None:
    with (
        steerfast.steer(tiny_llama, make_profile(tiny_llama)),
        pytest.raises(SteerfastError, match="model: expected an unsteered one, got one that is steered"),
    ):
        residual_rows(tiny_llama, [[5, 6, 7]])
    assert residual_rows(tiny_llama, [[5, 6, 7]]).shape == (1, 5, 32)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_batch_sizes_that_are_none(tiny_llama: Any, batch_size: Any) -> None:
    with pytest.raises(PromptError, match=f"batch_size: expected a whole number of at least 1, got {batch_size}"):
        residual_rows(tiny_llama, SEQUENCES, batch_size=batch_size)


def test_a_padding_side_that_is_none(tiny_llama: Any) -> None:
    with pytest.raises(PromptError, match="padding_side: expected 'left' or 'right', got 'middle'"):
        residual_rows(tiny_llama, SEQUENCES, padding_side="middle")  # type: ignore[arg-type]

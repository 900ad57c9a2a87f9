"""Calls that were once unsteered, or steered by the decision of another prompt, without an error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model_cases import MakeProfile, make_family_model
from transformers import GenerationConfig
from transformers.models.llama import modeling_llama

import steerfast
from steerfast.errors import ArchitectureError, SteerfastError

pytestmark = pytest.mark.contract

IDS = torch.tensor([[5, 9, 3, 8, 20, 11]])


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **options).logits


# -- compiled before it was steered ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compile as torch does by default: hooks are not guarded."""
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    yield
    torch._dynamo.reset()


def _compiled(model: Any, how: str) -> Any:
    if how == "torch.compile":
        return torch.compile(model, backend="eager")
    (model if how == "model" else model.model).compile(backend="eager")
    return model


@pytest.mark.parametrize("how", ["torch.compile", "model", "backbone"])
def test_a_model_that_ran_compiled_is_steered(
    plain: Any, make_profile: MakeProfile, fresh_dynamo: None, how: str
) -> None:
    model = copy.deepcopy(plain)
    first, second = (make_profile(model, kind="always", positions="all", seed=seed) for seed in (1, 2))
    stock, expected = logits(model), []
    for profile in (first, second):
        with steerfast.steer(model, profile):
            expected.append(logits(model))
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    compiled = _compiled(model, how)
    torch.testing.assert_close(logits(compiled), stock)
    for profile, steered in zip((first, second), expected, strict=True):
        with steerfast.steer(model, profile):
            torch.testing.assert_close(logits(compiled), steered)
        torch.testing.assert_close(logits(compiled), stock)
    assert not torch.allclose(expected[0], stock)


def test_hooks_are_guarded_in_every_thread(plain: Any, make_profile: MakeProfile, fresh_dynamo: None) -> None:
    with steerfast.steer(copy.deepcopy(plain), make_profile(plain)):
        skipped: list[bool] = []
        thread = threading.Thread(target=lambda: skipped.append(torch._dynamo.config.skip_nnmodule_hook_guards))
        thread.start()
        thread.join()
    assert skipped == [False]


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_generate_as_one_after_the_other(model: Any, make_profile: MakeProfile) -> None:
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(3, 90, (1, 8), generator=generator) for _ in range(8)]
    profiles = [None if i % 4 == 3 else make_profile(model, threshold=-2.0, seed=i) for i in range(8)]

    def answer(i: int) -> torch.Tensor:
        return model.generate(
            prompts[i],
            attention_mask=torch.ones_like(prompts[i]),
            max_new_tokens=6,
            do_sample=False,
            steering=profiles[i],
        )

    answers: dict[int, torch.Tensor] = {}
    with steerfast.steer(model, None):
        expected = [answer(i) for i in range(8)]
        threads = [threading.Thread(target=lambda i=i: answers.update({i: answer(i)})) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(answers[i], expected[i]) for i in range(8))


# -- patch() keeps what a layer computes -------------------------------------------------------------------------------


class ScaledLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states + 0.5 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class OffsetNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states


class SameLayer(modeling_llama.LlamaDecoderLayer):
    """Changes nothing."""


def test_patch_refuses_a_layer_with_another_forward(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(plain)
    for layer in model.model.layers:
        layer.__class__ = ScaledLayer
    with pytest.raises(ArchitectureError, match="with transformers' own forward, got ScaledLayer"):
        steerfast.patch(model)
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, hidden_states, **kwargs: hidden_states
    )
    with pytest.raises(ArchitectureError, match="with transformers' own forward, got LlamaDecoderLayer"):
        steerfast.patch(copy.deepcopy(plain))


@pytest.mark.parametrize("place", ["model.layers.1.post_attention_layernorm", "model.norm"])
def test_patch_refuses_a_norm_with_another_forward(plain: Any, place: str) -> None:
    model = copy.deepcopy(plain)
    model.get_submodule(place).__class__ = OffsetNorm
    with pytest.raises(
        ArchitectureError, match=r"norm \(OffsetNorm\): expected the RMSNorm of transformers.models.llama"
    ):
        steerfast.patch(model)


def test_patch_takes_a_subclass_that_keeps_the_forward(plain: Any) -> None:
    model = copy.deepcopy(plain)
    expected = logits(model)
    for layer in model.model.layers:
        layer.__class__ = SameLayer
    torch.testing.assert_close(logits(steerfast.patch(model)), expected)


# -- prompts that one decision cannot serve ----------------------------------------------------------------------------


def _positional(model: Any) -> Callable[[], Any]:
    return lambda: model.generate(IDS, GenerationConfig(max_new_tokens=2, prefill_chunk_size=3))


def _merged(model: Any) -> Callable[[], Any]:
    model.generation_config.prefill_chunk_size = 3
    return lambda: model.generate(IDS, generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("call", [_positional, _merged])
def test_chunks_are_refused_wherever_they_are_set(model: Any, make_profile: MakeProfile, call: Any) -> None:
    with steerfast.steer(model, make_profile(model)), pytest.raises(SteerfastError, match="expected None, got 3"):
        call(model)()


def test_a_size_of_none_in_the_call_overrides_that_of_a_config(model: Any, make_profile: MakeProfile) -> None:
    with steerfast.steer(model, make_profile(model)) as steering:
        expected, scores = model.generate(IDS, max_new_tokens=2, do_sample=False), steering.scores
        model.generation_config.prefill_chunk_size = 3
        found = model.generate(IDS, max_new_tokens=2, do_sample=False, prefill_chunk_size=None)
    assert torch.equal(found, expected)
    assert torch.equal(steering.scores, scores)


def test_packed_sequences_are_refused_where_each_decides(model: Any, make_profile: MakeProfile) -> None:
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with steerfast.steer(model, make_profile(model)):
        with pytest.raises(SteerfastError, match="position_ids: expected one sequence per row"):
            logits(model, position_ids=packed)
        logits(model, position_ids=torch.arange(6)[None])
        # padding on the left may have any position
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        logits(model, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3]]), attention_mask=mask)
    with steerfast.steer(model, make_profile(model, kind="always", positions="all")):
        logits(model, position_ids=packed)


# -- outputs of other strides ------------------------------------------------------------------------------------------


class PermutedLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_may_return_a_permuted_tensor(make_profile: MakeProfile, grad: bool) -> None:
    model = make_family_model("Llama", num_hidden_layers=4)
    profile = make_profile(model, threshold=-2.0)
    ids = IDS.view(2, 3)
    with steerfast.steer(model, profile), torch.set_grad_enabled(grad):
        expected = model(input_ids=ids).logits
    for layer in model.model.layers:
        layer.__class__ = PermutedLayer
    with steerfast.steer(model, profile), torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


# -- virtual tokens of an adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_the_prompt_of_an_adapter_ends_at_its_last_row(plain: Any, make_profile: MakeProfile, kind: str) -> None:
    peft = pytest.importorskip("peft")
    profile = make_profile(plain)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    ids = torch.tensor([[5, 9, 3, 8], [0, 0, 7, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with steerfast.steer(model, profile) as steering, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        expected = steering.scores
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(steering.scores, expected)


# -- exported graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strict", "error"), [(False, SteerfastError), (True, torch._dynamo.exc.Unsupported)])
def test_a_steered_model_is_not_exported(
    model: Any, make_profile: MakeProfile, strict: bool, error: type[Exception]
) -> None:
    """The graph would hold the tables of one batch, and edit these rows of all others."""
    with steerfast.steer(model, make_profile(model)), pytest.raises(error, match="cannot be exported"):
        torch.export.export(model, (IDS,), {"use_cache": False}, strict=strict)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(IDS, use_cache=False).logits, logits(model))


def test_a_model_in_float64_is_refused_and_may_be_patched(model: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model)
    stock = logits(model)
    model.double()
    with pytest.raises(ArchitectureError, match="expected float32, bfloat16 or float16, got float64"):
        steerfast.steer(model, profile)
    torch.testing.assert_close(logits(model).float(), stock)


def test_a_layer_that_runs_before_any_step_is_not_left_unsteered(model: Any, make_profile: MakeProfile) -> None:
    rows, layer = torch.randn(1, 3, 32), model.model.layers[2]
    places = torch.arange(3)[None]
    given = {"position_embeddings": model.model.rotary_emb(rows, places), "attention_mask": None}
    with torch.no_grad():
        layer(rows, **given)
        with steerfast.steer(model, make_profile(model, kind="always", positions="all")), pytest.raises(AssertionError):
            layer(rows, **given)

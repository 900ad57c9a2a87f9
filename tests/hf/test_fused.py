"""Fused decoder layers of every family: unsteered they are the stock model, steered they are what hooks do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import CLOSE, FUSED, MakeProfile, Oracle, greedy, make_family_model, make_model, padded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

import steerfast
from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf import caches, fused
from steerfast.hf.fused import FusedAdd, is_patched
from steerfast.hf.structure import find_decoder

pytestmark = pytest.mark.contract

DTYPES = [torch.float32, torch.bfloat16]
_TIGHT = {"rtol": 0.0, "atol": 3e-5}  # logits up to 10, layers summed in another order
EDITS: dict[str, dict[str, Any]] = {
    "add": {"edit": "add"},
    "ablate": {"edit": "ablate"},
    "clamp": {"edit": "clamp", "low": -0.1, "high": 0.2},
    "keep_norm": {"edit": "keep_norm"},
    "rotate": {"edit": "rotate", "angle": 40.0},
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 5, 7, 3)]


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal: bits in bfloat16, where both round the same sums, and closely in float32."""
    assert actual.dtype == expected.dtype
    if expected.dtype == torch.bfloat16:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, **_TIGHT)


def every_seam(model: nn.Module) -> list[FusedAdd]:
    layers = find_decoder(model).layers
    found = [*(layer.steerfast_inner for layer in layers), *(layer.steerfast_outer for layer in layers)]
    assert len(found) == 2 * len(layers)
    return found


def fused_norms(model: nn.Module, run: Callable[[], Any]) -> int:
    """How many norms were taken together with their add while `run` ran."""
    count, take = 0, FusedAdd.take

    def counting(self: FusedAdd, stream: Tensor) -> Tensor | None:
        nonlocal count
        normed = take(self, stream)
        count += normed is not None
        return normed

    FusedAdd.take = counting  # type: ignore[method-assign]
    try:
        run()
    finally:
        FusedAdd.take = take  # type: ignore[method-assign]
    return count


def readers(name: str) -> int:
    """Norms behind an add, of 4 layers: two each; Olmo2 normalises what its blocks add, and then only the last sum."""
    return 1 if name == "Olmo2" else 8


# -- without steering, fused is stock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUSED)
def test_patched_is_stock(name: str, dtype: torch.dtype) -> None:
    model = make_family_model(name, dtype)
    batch = padded(prompts())
    options = {"output_hidden_states": True, "output_attentions": True}
    types = {path: type(module) for path, module in model.named_modules()}
    names = list(model.state_dict())
    with torch.no_grad():
        stock = model(**batch, **options)
        tokens, logits = greedy(model, batch, tokens=6)
        assert steerfast.patch(model) is model
        fused = model(**batch, **options)
        assert fused_norms(model, lambda: model(**batch)) == readers(name)
        patched_tokens, patched_logits = greedy(model, batch, tokens=6)
    assert list(model.state_dict()) == names
    for path, module in model.named_modules():
        assert isinstance(module, types[path])
        assert type(module).__name__ == types[path].__name__
    same(fused.logits, stock.logits)
    for key in ("hidden_states", "attentions"):
        assert len(fused[key]) == len(stock[key]) > 0
        for one, other in zip(fused[key], stock[key], strict=True):
            same(one, other)
    assert torch.equal(patched_tokens, tokens)
    same(patched_logits, logits)
    assert all(seam._stream is None and seam._normed is None for seam in every_seam(model))

    assert steerfast.unpatch(model) is model
    assert not is_patched(model)
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert not any(name.startswith("steerfast") for module in model.modules() for name in vars(module))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock.logits)


@pytest.mark.parametrize("name", FUSED)
def test_copies_are_patched_and_stand_alone(name: str) -> None:
    model = make_family_model(name, torch.bfloat16)
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad():
        stock = model(ids).logits
        steerfast.patch(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert fused_norms(twin, lambda twin=twin: twin(ids)) == readers(name)
            assert torch.equal(twin(ids).logits, stock)
            assert {id(seam) for seam in every_seam(twin)}.isdisjoint(map(id, every_seam(model)))
            twin.model.layers[0].mlp.down_proj.weight.data.zero_() if name not in ("Mixtral", "Qwen3Moe") else None
            steerfast.unpatch(twin)
            assert is_patched(model)
            assert torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_agree(mode: Any) -> None:
    model = steerfast.patch(make_family_model("Llama", torch.bfloat16))
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad():
        expected = model(ids).logits
    with mode():
        first = model(ids).logits
    with torch.no_grad():  # what one mode left behind does not disturb the other
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(first.detach(), expected)


@pytest.mark.parametrize("how", ["eval", "train", "checkpointing"])
@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_the_stock_models(name: str, how: str) -> None:
    model = make_family_model(name, resid_pdrop=0.0) if name == "Phi3" else make_family_model(name)
    model.train(how != "eval")
    ids = torch.tensor(prompts()[0]).view(1, -1)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {path: weight.grad.clone() for path, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    steerfast.patch(model)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    actual = gradients()
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(actual[path], gradient, rtol=1e-4, atol=1e-6)


def test_dropout_is_active_in_training() -> None:
    model = make_family_model("Phi3", resid_pdrop=0.5).train()
    ids = torch.tensor([prompts()[0]])

    def run() -> Tensor:
        torch.manual_seed(9)
        with torch.no_grad():
            return model(ids).logits

    stock = run()
    steerfast.patch(model)
    assert torch.equal(run(), stock)
    assert not torch.equal(run(), model(ids).logits.detach())
    model.eval()
    assert not torch.equal(run(), stock)


def test_frozen_layers_under_trained_ones() -> None:
    model = make_family_model("Llama")
    for path, weight in model.named_parameters():
        weight.requires_grad_("layers.2.mlp" in path)
    ids = torch.tensor([prompts()[0]])
    gradients = []
    for change in (lambda: None, lambda: steerfast.patch(model)):
        change()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[2].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    # The layers before the trained one need no gradient, so their norms came with the adds.
    assert fused_norms(model, lambda: model(ids, labels=ids)) >= 3


def test_autocast() -> None:
    model = make_family_model("Llama")
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stock = model(ids).logits
        same(steerfast.patch(model)(ids).logits, stock)


def test_packed_sequences() -> None:
    model = make_family_model("Llama", torch.bfloat16)
    ids = torch.tensor([prompts()[0] + prompts()[1]])
    position_ids = torch.tensor([[*range(9), *range(5)]])
    with torch.no_grad():
        stock = model(ids, position_ids=position_ids, use_cache=False).logits
        assert not torch.equal(stock, model(ids, use_cache=False).logits)
        assert torch.equal(steerfast.patch(model)(ids, position_ids=position_ids, use_cache=False).logits, stock)


def test_layers_take_positional_arguments() -> None:
    model = make_family_model("Llama", torch.bfloat16)
    hidden = torch.randn(1, 4, 32, dtype=torch.bfloat16)
    positions = torch.arange(4)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    layer = model.model.layers[1]
    with torch.no_grad():
        stock = layer(hidden, None, positions, position_embeddings=rotary)
        steerfast.patch(model)
        assert torch.equal(layer(hidden, None, positions, position_embeddings=rotary), stock)


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3", "Olmo2"])
def test_norms_kept_in_float32(name: str) -> None:
    model = make_family_model(name, torch.bfloat16)
    for path, weight in model.named_parameters():
        if "norm" in path:
            weight.data = weight.data.float()
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad():
        stock = model(ids).logits
        assert torch.equal(steerfast.patch(model)(ids).logits, stock)


def test_on_the_meta_device() -> None:
    model = steerfast.patch(make_family_model("Llama").to("meta"))
    with torch.no_grad():
        mask = torch.zeros(2, 1, 5, 5, device="meta")  # without one, transformers looks into the values
        logits = model(torch.zeros(2, 5, dtype=torch.long, device="meta"), attention_mask=mask).logits
    assert logits.shape == (2, 5, 96)
    assert logits.device.type == "meta"


# -- hooks of the user's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["layer", "next layer's input", "norm's input", "final norm's input"])
@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_hooks_change_the_residual_stream(how: str, where: str, mode: Any) -> None:
    model = make_family_model("Llama", torch.bfloat16)
    change = torch.randn(32, generator=torch.Generator().manual_seed(1)).bfloat16()
    seen: list[Tensor] = []

    def changed(x: Tensor) -> Tensor | None:
        seen.append(x.clone())
        if how == "replaced":
            return x + change
        x += change
        return None

    def before(module: nn.Module, args: Any) -> Any:
        y = changed(args[0])
        return None if y is None else (y, *args[1:])

    ids, layers = torch.tensor([prompts()[0]]), model.model.layers
    with mode():
        plain = model(ids).logits
    if where == "layer":
        layers[1].register_forward_hook(lambda module, args, output: changed(output))
    else:
        norm = layers[1].post_attention_layernorm if where == "norm's input" else model.model.norm
        (layers[2] if "layer" in where else norm).register_forward_pre_hook(before)
    with mode():
        stock = model(ids).logits
        steerfast.patch(model)
        fused = model(ids).logits
    assert torch.equal(fused, stock)
    assert not torch.equal(fused, plain)
    assert torch.equal(seen[0], seen[1])


def test_hooks_see_the_steered_stream(make_profile: MakeProfile) -> None:
    model = make_family_model("Llama")
    profile = make_profile(model, kind="always", layers=[1])
    ids = torch.tensor([prompts()[0]])
    rows: list[Tensor] = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: rows.append(output.clone()))
    with torch.no_grad():
        model(ids)
        steerfast.patch(model)
        with steerfast.steer(model, profile):
            model(ids)
    torch.testing.assert_close(rows[1], rows[0] + profile.vector[1], **_TIGHT)


def test_an_exception_in_between_leaves_no_rows_for_the_next_pass() -> None:
    model = make_family_model("Llama", torch.bfloat16)
    one, other = torch.tensor([prompts()[0]]), torch.tensor([prompts()[1]])

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(other).logits
        steerfast.patch(model)
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(one)
        handle.remove()
        assert torch.equal(model(other).logits, expected)
    assert all(seam._stream is None for seam in every_seam(model))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["dispatch", "offload", "hook", "hook, removed"])
def test_accelerates_hooks(make_profile: MakeProfile, how: str, when: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_family_model("Llama", torch.bfloat16)
    profile = make_profile(model, kind="always")
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad():
        stock = model(ids).logits
        with steerfast.steer(model, profile):
            steered = model(ids).logits
    if when == "after":
        steerfast.patch(model)
    if how == "dispatch":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        for layer in model.model.layers:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
            if how == "hook, removed":
                accelerate.hooks.remove_hook_from_module(layer)
    if when == "before":
        steerfast.patch(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock)
        with steerfast.steer(model, profile):
            torch.testing.assert_close(model(ids).logits, steered, rtol=0.05, atol=0.1)
        steerfast.unpatch(model)
        assert torch.equal(model(ids).logits, stock)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(model: nn.Module, message: str) -> None:
    types = {path: type(module) for path, module in model.named_modules()}
    names = {path: sorted(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(ArchitectureError, match=message):
        steerfast.patch(model)
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == names


def test_a_layer_with_an_undeclared_module_is_refused() -> None:
    model = make_family_model("Llama")
    model.model.layers[2].adapter = nn.Linear(32, 32)
    refused(model, r"layer 2 \(LlamaDecoderLayer\) has an undeclared module 'adapter'")


def test_a_layer_without_a_module_is_refused() -> None:
    model = make_family_model("Gemma2")
    del model.model.layers[3].post_feedforward_layernorm
    refused(model, r"layer 3 \(Gemma2DecoderLayer\) has no module 'post_feedforward_layernorm'")


def test_a_layer_of_another_number_is_refused() -> None:
    model = make_family_model("Qwen2")
    model.model.layers[2].self_attn.layer_idx = 5
    refused(model, r"layer 2.self_attn \(Qwen2Attention\): expected layer_idx 2, got 5")


def test_a_norm_of_another_kind_is_refused() -> None:
    model = make_family_model("Llama")
    model.model.layers[1].input_layernorm = nn.LayerNorm(32)
    refused(model, r"layer 1.input_layernorm \(LayerNorm\) has no 'variance_epsilon'")
    del model.model.norm
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    refused(model, "LlamaModel has no module 'norm'")


def test_a_replaced_forward_is_refused() -> None:
    model = make_family_model("Llama")
    layer = model.model.layers[1]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    refused(model, r"forward of layer 1 \(LlamaDecoderLayer\) was replaced")
    del layer.forward
    steerfast.patch(model)
    fused = layer.forward
    layer.forward = lambda *args, **kwargs: fused(*args, **kwargs)
    with pytest.raises(SteerfastError, match=r"forward of model.layers.1 \(LlamaDecoderLayer\) was replaced"):
        steerfast.unpatch(model)
    del layer.forward
    steerfast.unpatch(model)


def test_an_unknown_family_is_refused() -> None:
    model = make_model("GPTNeoX")
    refused(model, r"expected decoder layers of one of Llama, .*, got GPTNeoXLayer; steer\(\) needs no patch")


def test_the_order_of_patching_and_steering(make_profile: MakeProfile) -> None:
    model = make_family_model("Llama")
    with pytest.raises(SteerfastError, match="expected a patched one"):
        steerfast.unpatch(model)
    with steerfast.steer(model, make_profile(model)), pytest.raises(SteerfastError, match="detach that first"):
        steerfast.patch(model)
    steerfast.patch(model)
    with pytest.raises(SteerfastError, match="expected one that is not patched"):
        steerfast.patch(model)
    with steerfast.steer(model, make_profile(model)), pytest.raises(SteerfastError, match="detach that first"):
        steerfast.unpatch(model)
    assert all(seam.steps is None for seam in every_seam(model))
    steerfast.unpatch(model)
    steerfast.unpatch(steerfast.patch(model))


# -- steered, fused is what hooks do -----------------------------------------------------------------------------------


def agree(model: Any, profile: Any, batch: dict[str, Tensor], **options: Any) -> None:
    """Steering by hooks on the stock model, then at the seams of the fused one: the same answers and decisions."""
    with steerfast.steer(model, profile, 0.9) as steering:
        tokens, logits = greedy(model, batch, **options)
        fired, scores = steering.fired, steering.scores
    steerfast.patch(model)
    with steerfast.steer(model, profile, 0.9) as steering:
        fused_tokens, fused_logits = greedy(model, batch, **options)
    assert torch.equal(steering.fired, fired)
    torch.testing.assert_close(steering.scores, scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_logits, logits, **CLOSE)
    assert torch.equal(fused_tokens, tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [1, 3]},
        {"sensor": 1, "positions": "response"},
        {"kind": "always", "positions": "response"},
        {"kind": "token", "layers": [0, 2]},
        {"sensor": 2, "layers": [2, 3], "sharpness": 4.0, "score": "dot"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FUSED)
def test_fused_steering_equals_hooks(make_profile: MakeProfile, name: str, options: dict[str, Any]) -> None:
    model = make_family_model(name)
    agree(model, make_profile(model, **options), padded(prompts()), tokens=4)


@pytest.mark.parametrize("kind", ["prompt", "token"])
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_fused_equals_hooks(make_profile: MakeProfile, edit: str, kind: str) -> None:
    model = make_family_model("Llama")
    agree(model, make_profile(model, kind=kind, layers=[1, 3], size=9.0, **EDITS[edit]), padded(prompts()))


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("kind", ["always", "prompt", "token"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2"])
def test_fused_steering_equals_the_oracle(make_profile: MakeProfile, name: str, kind: str, positions: str) -> None:
    stock = make_family_model(name)
    model = steerfast.patch(copy.deepcopy(stock))
    profile = make_profile(model, kind=kind, sensor="own" if kind == "token" else 1, positions=positions)
    with steerfast.steer(model, profile, 0.8) as steering:
        tokens, logits = greedy(model, padded(prompts()), tokens=4)
    oracle = Oracle(stock, profile, 0.8)
    for row, prompt in enumerate(prompts()):
        expected = oracle.logits([*prompt, *tokens[row].tolist()], [(0, len(prompt))])[len(prompt) - 1 : -1]
        assert expected.argmax(dim=1).tolist() == tokens[row].tolist()
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        if kind == "prompt":
            torch.testing.assert_close(steering.scores[0, row], oracle.scores[1].float()[0], rtol=1e-4, atol=1e-5)
            assert bool(steering.fired[row]) == bool(oracle.scores[1] > 0)
    assert oracle.margin > 1e-5


@pytest.mark.parametrize("name", FUSED)
def test_shut_gates_keep_every_bit(make_profile: MakeProfile, name: str) -> None:
    model = steerfast.patch(make_family_model(name, torch.bfloat16))
    batch = padded(prompts())
    with torch.no_grad():
        plain = model(**batch).logits
        with steerfast.steer(model, make_profile(model, threshold=1.5)) as steering:
            assert torch.equal(model(**batch).logits, plain)
            assert not steering.fired.any()
        with steerfast.steer(model, make_profile(model, threshold=-1.5)):
            assert not torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("how", ["eval", "checkpointing"])
def test_steered_gradients_equal_the_hooks(make_profile: MakeProfile, how: str) -> None:
    model = make_family_model("Llama")
    profile = make_profile(model, sharpness=3.0)
    batch = padded(prompts())
    if how == "checkpointing":
        model.train()
        model.gradient_checkpointing_enable()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with steerfast.steer(model, profile):
            model(**batch, use_cache=False).logits[:, -1].logsumexp(dim=1).sum().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    expected = gradients()
    steerfast.patch(model)
    for actual, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


# -- ways to generate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0, "temperature": 1.5},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_ways_to_generate(make_profile: MakeProfile, options: dict[str, Any], positions: str) -> None:
    stock = make_family_model("Llama")
    fused = steerfast.patch(copy.deepcopy(stock))
    profile = make_profile(stock, sensor=1, positions=positions)
    results = []
    for model in (stock, fused):
        torch.manual_seed(4)
        with steerfast.steer(model, profile) as steering:
            output = model.generate(**padded(prompts()), max_new_tokens=6, **{"do_sample": False, **options})
        results.append((output, steering.fired))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1].shape == (4,)
    if not {"do_sample", "num_beams"} & options.keys():
        oracle = Oracle(stock, profile)
        for row, prompt in enumerate(prompts()):
            assert results[1][0][row, -6:].tolist() == oracle.answer(prompt, 6)


@pytest.mark.parametrize("how", ["assistant", "assistant, steered", "prompt lookup"])
def test_assisted_decoding(make_profile: MakeProfile, how: str) -> None:
    stock = make_family_model("Llama")
    model = steerfast.patch(copy.deepcopy(stock))
    profile = make_profile(model, sensor=1, threshold=-1.5)
    oracle = Oracle(stock, profile)
    assistant = make_family_model("Llama", num_hidden_layers=2)
    options = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": assistant}
    if "steered" in how:
        steerfast.steer(assistant, make_profile(assistant, kind="always"))
    prompt = prompts()[0] * 2
    with steerfast.steer(model, profile) as steering:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, **options)
    assert output[0, len(prompt) :].tolist() == oracle.answer(prompt, 8)
    assert steering.fired.tolist() == [True]


def test_a_second_turn_decides_again(make_profile: MakeProfile) -> None:
    stock = make_family_model("Llama")
    model = steerfast.patch(copy.deepcopy(stock))
    profile = make_profile(model, sensor=1)
    oracle = Oracle(stock, profile)
    first = torch.tensor([prompt[:3] for prompt in prompts()])
    question = torch.tensor([prompt[-2:] for prompt in prompts()])
    with steerfast.steer(model, profile) as steering:
        output = model.generate(first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        before, start = steering.fired, output.past_key_values.get_seq_length()
        ids = torch.cat([output.sequences, question], dim=1)
        answer = model.generate(ids, past_key_values=output.past_key_values, max_new_tokens=3, do_sample=False)
        after = steering.fired
    assert not torch.equal(before, after)
    for row in range(len(first)):
        sequence = ids[row].tolist()
        for token in answer[row, ids.shape[1] :].tolist():
            assert token == int(oracle.logits(sequence, [(0, 3), (start, ids.shape[1])])[-1].argmax())
            sequence.append(token)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_loop_in_inference_mode(make_profile: MakeProfile, cache: Any) -> None:
    stock = make_family_model("Llama")
    model = steerfast.patch(copy.deepcopy(stock))
    profile = make_profile(model, sensor=1, threshold=-1.5)
    prompt = prompts()[0]
    options = {"config": model.config} | ({"max_cache_len": 32} if cache is StaticCache else {})
    held, ids, answer = cache(**options), torch.tensor([prompt]), []
    with steerfast.steer(model, profile), torch.inference_mode():
        for _ in range(5):
            ids = model(ids, past_key_values=held).logits[:, -1:].argmax(dim=2)
            answer.append(int(ids))
    assert answer == Oracle(stock, profile).answer(prompt, 5)


def test_norm_weights_of_another_dtype_run_alone(tiny_llama: Any) -> None:
    model = tiny_llama.to(torch.bfloat16)
    norm = model.model.layers[2].post_attention_layernorm
    norm.float()
    x = torch.randn(1, 3, 32).bfloat16()
    plain = norm(x)
    steerfast.patch(model)
    seam = norm.steerfast_seam
    with torch.no_grad():
        stream = seam.add(x, torch.zeros_like(x), fuse=True)
        assert seam.take(stream) is None
        got = norm(stream)
    assert got.dtype == plain.dtype == torch.float32
    assert torch.equal(got, plain)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Any:
    torch.compiler.reset()
    yield make_family_model("Llama", num_hidden_layers=2)
    torch.compiler.reset()


def test_compiled_and_unsteered_is_one_graph(small: Any) -> None:
    tokens, logits = greedy(small, padded(prompts()), tokens=2)
    steerfast.patch(small)
    small.forward = torch.compile(small.forward, backend="eager", fullgraph=True)
    compiled_tokens, compiled_logits = greedy(small, padded(prompts()), tokens=2)
    assert torch.equal(compiled_tokens, tokens)
    torch.testing.assert_close(compiled_logits, logits, **_TIGHT)


def operations(model: Any) -> list[tuple[str, str]]:
    """What a decode step of the compiled model does, in one graph."""
    graphs: list[torch.fx.Graph] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    torch.compiler.reset()
    cache = StaticCache(model.config, max_cache_len=8)
    with torch.no_grad():
        given = {caches.argument(model): cache}
        model(torch.tensor([[3, 4, 5]]), **given)
        torch.compile(model, backend=backend, fullgraph=True)(torch.tensor([[6]]), **given)
    torch.compiler.reset()
    assert len(graphs) == 1
    return [(node.op, str(node.target)) for node in graphs[0].nodes if node.op != "placeholder"]


@pytest.mark.slow(but=["Llama", "Olmo2", "Mixtral"])
@pytest.mark.parametrize("name", FUSED)
def test_compiled_and_unsteered_does_what_stock_does(name: str) -> None:
    model = make_family_model(name, num_hidden_layers=2)
    expected = operations(model)
    assert operations(steerfast.patch(model)) == expected


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "hooks"])
def test_compiled_and_steered_is_one_graph(fuse: bool, small: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(small, sensor=0, layers=[0, 1], threshold=-2.0)
    tokens = torch.tensor([[6], [7]])
    steps = []
    for compiles in (False, True):
        if compiles and fuse:
            steerfast.patch(small)
        cache = StaticCache(small.config, max_cache_len=8)
        counter = CompileCounterWithBackend("eager")
        with torch.no_grad(), steerfast.steer(small, profile) as steering:
            given = {caches.argument(small): cache}
            small(torch.tensor([[3, 4, 5]]), **given)
            assert steering.fired.all()
            model = torch.compile(small, backend=counter, fullgraph=True) if compiles else small
            steps.append([model(token[None], **given).logits for token in tokens])
        assert counter.frame_count == compiles
    for got, want in zip(*steps, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_compiled_step_guards_nothing_of_its_layers(small: Any, make_profile: MakeProfile) -> None:
    """Guards are checked before every step, and there are as many layers as there are."""
    profile = make_profile(small, sensor=0, layers=[0, 1], threshold=-2.0)
    steerfast.patch(small)
    compiled = torch.compile(small, backend="eager")
    cache = StaticCache(small.config, max_cache_len=8)
    given = {caches.argument(small): cache}
    with torch.no_grad(), steerfast.steer(small, profile):
        small(torch.tensor([[3, 4, 5]]), **given)
        compiled(torch.tensor([[6]]), **given)
        for seam in every_seam(small):
            seam.steps = None  # is not asked, and no guard misses it
        with torch.compiler.set_stance("fail_on_recompile"):
            got = compiled(torch.tensor([[7]]), **given).logits
    with torch.no_grad(), steerfast.steer(small, profile):
        cache = StaticCache(small.config, max_cache_len=8)
        given = {caches.argument(small): cache}
        for token in ([[3, 4, 5]], [[6]], [[7]]):
            want = small(torch.tensor(token), **given).logits
    torch.testing.assert_close(got, want, **CLOSE)


class Operations(TorchDispatchMode):
    """Counts what runs in the context."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def test_what_a_cuda_graph_does_not_hide(make_profile: MakeProfile) -> None:
    """Steering a compiled step costs no operation outside its graph, no input that a graph copies, no guard a layer."""
    inputs: list[int] = []
    guards: list[int] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        given = [node.meta.get("tensor_dict", {}) for node in graph.graph.find_nodes(op="placeholder")]
        inputs.append(sum("_dynamo_static_input_type" not in tensor for tensor in given))
        return graph.forward

    def counted(entries: Any) -> list[bool]:
        guards.append(len({(e.name, e.guard_type) for e in entries if "_modules['layers']._modules['3']" in e.name}))
        return [True] * len(entries)

    def step(model: Any) -> dict[str, Any]:
        torch.compiler.reset()
        given = {caches.argument(model): StaticCache(model.config, max_cache_len=8)}
        model(torch.tensor([[3, 4, 5]]), **given)
        torch.compile(model, backend=backend, options={"guard_filter_fn": counted})(torch.tensor([[6]]), **given)
        return {**given, "input_ids": torch.tensor([[7]])}

    model = make_family_model("Llama", num_hidden_layers=6)
    profile = make_profile(model, sensor=0, layers=range(6), threshold=-2.0)
    with torch.no_grad():
        step(model)
        step(steerfast.patch(model))
        with steerfast.steer(model, profile) as steering:
            given = step(model)
            with Operations() as operations:
                steering._hooks.before_model(model, (), given)
                steering._hooks.after_model(model, (), given, {})
    torch.compiler.reset()
    assert operations.count == 0
    assert len(set(inputs)) == 1
    stock, *patched = guards
    assert max(patched) <= stock + 1  # some versions of transformers ask a layer whether its class was extended


def test_a_compiled_step_that_fails_leaves_no_edit_behind(small: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(small, sensor=0, layers=[0, 1], threshold=-2.0)
    steerfast.patch(small)

    def fail(*_: Any) -> None:
        torch._dynamo.graph_break()
        raise KeyError("mid-step")

    given = {caches.argument(small): StaticCache(small.config, max_cache_len=8)}
    with torch.no_grad(), steerfast.steer(small, profile):
        small(torch.tensor([[3, 4, 5]]), **given)
        hook = small.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="mid-step"):
            torch.compile(small, backend="eager")(torch.tensor([[6]]), **given)
        hook.remove()
        assert fused._compiled_edit is None


@pytest.mark.parametrize("layer", [0, 1])
def test_compiled_autocast(small: Any, make_profile: MakeProfile, layer: int) -> None:
    """What is added is bfloat16 there, and the residual stream float32."""
    profile = make_profile(small, kind="always", layers=[layer])
    steerfast.patch(small)
    ids = torch.tensor(prompts()[:1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), steerfast.steer(small, profile):
        eager = small(ids, output_hidden_states=True)
        compiled = torch.compile(small, backend="eager")(ids, output_hidden_states=True)
    for got, want in zip(compiled.hidden_states, eager.hidden_states, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.slow(but=["additions", "all"])
@pytest.mark.parametrize(
    ("edits", "kind"),
    [(["add"], "prompt"), ([*EDITS], "prompt"), ([*EDITS], "token")],
    ids=["additions", "all", "token"],  # additions of prompt gates have a kernel of their own
)
def test_every_edit_compiled_equals_eager(small: Any, make_profile: MakeProfile, edits: list[str], kind: str) -> None:
    """Each row has another edit."""
    options = {"kind": kind, "sensor": 0, "layers": [0, 1], "threshold": -2.0}
    profiles = [make_profile(small, **options, **EDITS[edit]) for edit in edits]
    batch = padded((prompts() * 2)[: len(edits)])
    runs = []
    for forward in (steerfast.patch(small).forward, torch.compile(small.forward, backend="eager")):
        small.forward = forward
        with steerfast.steer(small, profiles[0]) as steering:
            runs.append((*greedy(small, batch, tokens=3, steering=profiles), steering.fired))
    (tokens, logits, fired), (compiled_tokens, compiled_logits, compiled_fired) = runs
    assert torch.equal(compiled_tokens, tokens)
    torch.testing.assert_close(compiled_logits, logits, **CLOSE)
    assert torch.equal(compiled_fired, fired)
    assert fired.all()


def test_compiled_layers_follow_what_is_steered(small: Any, make_profile: MakeProfile) -> None:
    first = make_profile(small, seed=1, sensor=0, layers=[0, 1])
    second = make_profile(small, seed=2, sensor=0, layers=[0, 1], threshold=0.1)
    mixed = {"steering": [first, second, None, first], "tokens": 1}
    runs: list[dict[str, Any]] = [{"tokens": 2}, {"tokens": 1, "steering_strength": 0.3}, mixed]
    with steerfast.steer(small, first) as steering:
        expected = [(*greedy(small, padded(prompts()), **run), steering.fired) for run in runs]
    steerfast.patch(small)
    graphs: list[list[bool]] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        weights = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        graphs.append([any(f"layers_modules_{layer}_modules_mlp" in name for name in weights) for layer in range(2)])
        return graph.forward

    small.forward = torch.compile(small.forward, backend=backend)
    with steerfast.steer(small, first) as steering:
        for run, (tokens, logits, fired) in zip(runs, expected, strict=True):
            compiled_tokens, compiled_logits = greedy(small, padded(prompts()), **run)
            assert torch.equal(compiled_tokens, tokens)
            torch.testing.assert_close(compiled_logits, logits, **CLOSE)
            assert torch.equal(steering.fired, fired)
    assert [True, True] in graphs  # all layers in one graph, or none of them: the head is a graph of its own
    assert not any(any(layers) and not all(layers) for layers in graphs)


@pytest.mark.slow(but=["fused"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "hooks"])
def test_other_batches_need_no_other_graph(fuse: bool, small: Any, make_profile: MakeProfile) -> None:
    plain = copy.deepcopy(small)
    if fuse:
        steerfast.patch(small)
    first = make_profile(small, threshold=0.0, sensor=0, layers=[0, 1])
    second = make_profile(small, seed=3, threshold=-2.0)
    third = make_profile(small, seed=5, positions="response", layers=[1], sensor=1, threshold=-2.0)
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(small, backend=counter, dynamic=True)

    def run(model: Any, steering: Any, assigned: Any, strength: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode(), steering.assigned(assigned, strength):
            prompt = model(ids, use_cache=True)
            return prompt.logits, model(ids[:, :1], past_key_values=prompt.past_key_values).logits

    frames = []
    with steerfast.steer(small, None) as steering, steerfast.steer(plain, None) as expected:
        run(small, steering, [first, second, third], 1.0)  # loads the three
        for assigned, strength in (
            ([first] * 3, 1.0),
            ([second, None, third], [1.0, 1.0, 0.5]),
            ([None] * 3, 1.0),
            ([third, first, second], 0.3),
            (first, 0.7),
        ):
            got, want = run(compiled, steering, assigned, strength), run(plain, expected, assigned, strength)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)
            frames.append(counter.frame_count)
    assert frames[0] > 0
    assert len(set(frames)) == 1


def test_generate_with_a_compile_config(small: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(small, sensor=0, layers=[0, 1])
    batch = padded(prompts())
    with steerfast.steer(small, profile) as steering:
        tokens, fired = greedy(small, batch, tokens=4)[0], steering.fired
    steerfast.patch(small)
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    with steerfast.steer(small, profile) as steering:
        assert torch.equal(
            greedy(small, batch, tokens=4, cache_implementation="static", compile_config=config)[0], tokens
        )
        assert torch.equal(steering.fired, fired)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_generates_the_same(small: Any, make_profile: MakeProfile, mode: str) -> None:
    profile = make_profile(small, sensor=0, layers=[0, 1])
    oracle = Oracle(copy.deepcopy(small), profile)
    expected = [oracle.answer(prompt, 4) for prompt in prompts()]
    steerfast.patch(small)
    config = CompileConfig(mode=mode, fullgraph=False)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 4, "do_sample": False}
    with steerfast.steer(small, profile) as steering:
        output = small.generate(**padded(prompts()), **options)
    assert output[:, -4:].tolist() == expected
    assert sorted({*steering.fired.tolist()}) == [False, True]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

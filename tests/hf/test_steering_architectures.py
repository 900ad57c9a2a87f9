"""Every supported architecture, tiny and random, against an oracle that shares no code with the run-time half.

The oracle runs one sequence at a time, unpadded, without a KV cache; it finds the layers by the names written down
in model_cases, gates in float64 and edits as x + g·strength·v.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from model_cases import ARCHITECTURES, BASE, MakeProfile, make_model, padded
from torch import Tensor, nn

import steerfast
from steerfast.errors import ArchitectureError
from steerfast.hf import caches
from steerfast.hf.structure import find_decoder
from steerfast.profile import SteeringProfile

pytestmark = pytest.mark.contract

_NEW_TOKENS = 6


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 5, 7, 3)]


@contextmanager
def oracle(
    model: nn.Module, name: str, profile: SteeringProfile, length: int, seen: dict[int, float]
) -> Iterator[None]:
    """Steer one unpadded sequence whose prompt has `length` tokens; `seen` gets the sensor's scores."""
    layers = model.get_submodule(ARCHITECTURES[name][1])
    assert isinstance(layers, nn.ModuleList)
    opened: dict[int, bool] = {}

    def hook(index: int) -> Any:
        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            assert hidden.shape[0] == 1
            if index == profile.sensor:
                row = hidden[0, length - 1].double()
                seen[index] = float(row @ profile.direction[index].double() / row.norm())
                opened[index] = seen[index] > float(profile.threshold[index])
            if float(profile.strength[index]) == 0 or not opened[int(profile.sensor)]:
                return None
            edited = hidden + float(profile.strength[index]) * profile.vector[index].to(hidden.dtype)
            return edited if isinstance(output, Tensor) else (edited, *output[1:])

        return edit

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def oracle_answer(
    model: nn.Module, name: str, profile: SteeringProfile, prompt: list[int]
) -> tuple[list[int], Tensor, float]:
    """Greedy answer, its logits [new tokens, vocabulary], and the gate's score."""
    ids, logits, seen = list(prompt), [], {}
    for _ in range(_NEW_TOKENS):
        with oracle(model, name, profile, len(prompt), seen):
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits), seen[int(profile.sensor)]


def hidden_states(model: nn.Module, name: str, ids: list[int]) -> list[Tensor]:
    """The residual stream [1, T, H] behind each layer."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    layers = model.get_submodule(ARCHITECTURES[name][1])
    handles = [layer.register_forward_hook(keep) for layer in layers.children()]
    model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def half_open(make_profile: MakeProfile, model: nn.Module, name: str) -> SteeringProfile:
    """Layer 1 decides and two of four prompts pass; layers 1 and 2 are steered, strongly, 3 is not."""
    with torch.no_grad():
        size = float(hidden_states(model, name, prompts()[0])[1].norm(dim=-1).mean())
    profile = make_profile(model, layers=[1, 2], sensor=1, threshold=-2.0, size=2 * size)
    scores = sorted(oracle_answer(model, name, profile, prompt)[2] for prompt in prompts())
    assert scores[2] - scores[1] > 1e-3
    return replace(profile, threshold=torch.full((4,), (scores[1] + scores[2]) / 2))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could have left behind, per module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    return {
        path: (sorted(vars(module)), type(module), [list(getattr(module, hook)) for hook in hooks])
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_equals_the_oracle(make_profile: MakeProfile, name: str) -> None:
    model = make_model(name)
    profile = half_open(make_profile, model, name)
    expected = [oracle_answer(model, name, profile, prompt) for prompt in prompts()]
    stock = model.generate(**padded(prompts()), max_new_tokens=_NEW_TOKENS, do_sample=False)
    with steerfast.steer(model, profile) as steering:
        output = model.generate(
            **padded(prompts()),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        fired = steering.fired
    scores = torch.tensor([score for *_, score in expected])
    torch.testing.assert_close(steering.scores[0], scores, rtol=1e-4, atol=1e-5)
    assert fired.tolist() == (scores > profile.threshold[1]).tolist()
    assert fired.sum() == 2
    tokens = output.sequences[:, -_NEW_TOKENS:]
    assert tokens.tolist() == [answer for answer, *_ in expected]
    changed = (tokens != stock[:, -_NEW_TOKENS:]).any(dim=1)
    assert changed.any()
    assert not changed[~fired].any()
    torch.testing.assert_close(
        torch.stack(output.logits, dim=1),
        torch.stack([logits for _, logits, _ in expected]),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shut_gates_change_no_bit_and_leaving_restores_the_model(make_profile: MakeProfile, name: str) -> None:
    model = make_model(name)
    batch = padded(prompts())
    before = state(model)
    with torch.no_grad():
        stock = model(**batch).logits
        assert state(model) == before
        shut = make_profile(model, threshold=1.5)
        with steerfast.steer(model, shut) as steering:
            assert torch.equal(model(**batch).logits, stock)
            assert not steering.fired.any()
            assert state(model) != before
        assert state(model) == before
        with steerfast.steer(model, replace(shut, threshold=torch.full((4,), -1.5))):
            assert not torch.equal(model(**batch).logits, stock)
        assert state(model) == before
        assert torch.equal(model(**batch).logits, stock)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exception_inside_restores_the_model(make_profile: MakeProfile, name: str) -> None:
    model = make_model(name)
    batch = padded(prompts())
    before = state(model)
    with torch.no_grad():
        stock = model(**batch).logits

        def fail(module: nn.Module, args: Any, output: Any) -> None:
            raise KeyboardInterrupt

        failing = find_decoder(model).layers[2].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt), steerfast.steer(model, make_profile(model, threshold=-1.5)):
            model.generate(**batch, max_new_tokens=2, do_sample=False)
        failing.remove()
        assert state(model) == before
        assert torch.equal(model(**batch).logits, stock)


def test_after_a_failure_the_backbone_by_itself_decides_for_its_own_batch(make_profile: MakeProfile) -> None:
    model = make_model("Llama")
    batches = [padded([prompt]) for prompt in prompts()]
    profile = make_profile(model, sensor=0, layers=[0, 1])
    scores = []
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        for batch in batches:
            model(**batch)
            scores.append(float(steering.scores[0, 0]))
    profile = replace(profile, threshold=torch.full_like(profile.threshold, sum(scores) / len(scores)))

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        expected = [[score > float(profile.threshold[0])] for score in scores]
        for batch, fired in zip(batches, expected, strict=True):
            other = batches[expected.index([not fired[0]])]
            with model.lm_head.register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
                model(**other)
            model.model(**batch)
            assert steering.fired.tolist() == fired


class _Prefixed(nn.Module):
    """A model around one, as adapters are: it puts rows of its own before the prompt's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        self.prefix = nn.Parameter(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)))

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Any:
        rows = self.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=torch.cat([self.prefix.expand(len(rows), -1, -1), rows], dim=1))


def test_a_model_around_may_change_what_the_backbone_gets(make_profile: MakeProfile) -> None:
    model = make_model("Llama")
    around, profile = _Prefixed(model), make_profile(model, positions="response")
    ids = torch.tensor(prompts()[0])[None]
    with torch.no_grad():
        rows = torch.cat([around.prefix, model.get_input_embeddings()(ids)], dim=1)
        with steerfast.steer(model, profile) as steering:
            expected, scores = model(inputs_embeds=rows).logits, steering.scores
        with steerfast.steer(around, profile) as steering:
            assert torch.equal(around(ids).logits, expected)
            assert torch.equal(steering.scores, scores)


class _KeepsItsCache(transformers.LlamaForCausalLM):
    """A forward of its own, which calls the backbone with something else than it was called with."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        if not hasattr(self, "held"):
            self.held = transformers.DynamicCache(config=self.config)
        return self.model(input_ids, **{caches.argument(self.model): self.held})


def test_a_forward_of_its_own_may_change_what_the_backbone_gets(make_profile: MakeProfile) -> None:
    model = _KeepsItsCache(transformers.LlamaConfig(**BASE)).eval()
    with torch.no_grad(), steerfast.steer(model, make_profile(model)) as steering:
        model(torch.tensor(prompts()[:1]))
        decided = steering.scores
        model(torch.tensor([[5]]))
        assert torch.equal(steering.scores, decided)  # an answer's token decides nothing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_is_found(name: str) -> None:
    model = make_model(name)
    decoder = find_decoder(model)
    path = ARCHITECTURES[name][1]
    assert decoder.layers is model.get_submodule(path)
    assert decoder.backbone is model.get_submodule(path.rpartition(".")[0])
    assert decoder.hidden_size == 32


def test_the_decoder_of_a_multimodal_model_is_its_text_model() -> None:
    text = transformers.LlamaConfig(**BASE)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    )
    assert find_decoder(model).backbone is model.model.language_model


def _encoder_decoder() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    )


def _encoder() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), "expected a HuggingFace decoder-only model, got Linear without a config"),
        (_encoder_decoder, "got the encoder-decoder T5ForConditionalGeneration"),
        (_encoder, "expected one list of 2 decoder layers in BertForMaskedLM, found none"),
    ],
)
def test_other_models_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        find_decoder(make())


def test_two_lists_of_layers_are_refused() -> None:
    model = make_model("Llama")
    model.model.more = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ArchitectureError, match=r"found model\.layers, model\.more"):
        find_decoder(model)


def test_a_model_without_a_kv_cache_is_refused(make_profile: MakeProfile) -> None:
    config = transformers.MambaConfig(
        vocab_size=96,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.MambaForCausalLM(config).eval()
    before = state(model)
    with pytest.raises(ArchitectureError, match="expected MambaModel to keep keys and values"):
        steerfast.steer(model, make_profile(model))
    assert state(model) == before


def test_layers_of_another_shape_are_refused_at_once(make_profile: MakeProfile) -> None:
    model = make_model("Llama")
    profile = make_profile(model, threshold=-2.0)
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden[0]
    with torch.no_grad(), steerfast.steer(model, profile):  # noqa: SIM117 (only the call may raise)
        with pytest.raises(ArchitectureError, match=r"layer 1 .* gave \[3, 32\], expected \[sequences, tokens, 32\]"):
            model(torch.tensor([[5, 6, 7]]))

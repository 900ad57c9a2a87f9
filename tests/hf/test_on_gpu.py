"""Steered generation on a GPU answers as the oracle does on a CPU: fused and by hooks, eager and in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import CLOSE, FUSED, MakeProfile, Oracle, four_prompts, greedy, make_family_model, padded
from torch import Tensor
from transformers import CompileConfig

import steerfast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
NEW = 6
READS = [{}, {"pooling": "mean"}, {"pooling": "mean", "window": 4}]


def batch(side: str = "left") -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in padded(four_prompts(), side).items()}


@pytest.mark.parametrize("read", READS, ids=["last", "mean", "window"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "hooks"])
@pytest.mark.parametrize("name", FUSED)
def test_greedy_equals_the_oracle(name: str, fuse: bool, read: dict[str, Any], make_profile: MakeProfile) -> None:
    model = make_family_model(name)
    profile = make_profile(model, layers=[1, 2], sensor=1, threshold=-0.05, **read)
    oracle = Oracle(make_family_model(name), profile)
    if fuse:
        steerfast.patch(model)
    model.to(DEVICE)
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, batch(), tokens=NEW)
        fired = steering.fired
    for row, prompt in enumerate(four_prompts()):
        ids = [*prompt, *tokens[row].tolist()]
        expected = oracle.logits(ids, [(0, len(prompt))])[len(prompt) - 1 : -1]
        assert oracle.margin > 1e-4  # else the decision may hang on a rounding
        assert bool(fired[row]) == bool((oracle.scores[1] > profile.threshold[1]).any())
        torch.testing.assert_close(logits[row].cpu(), expected, **CLOSE)


@pytest.mark.parametrize("read", READS[:2], ids=["last", "mean"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_answers_alike(mode: str, read: dict[str, Any], make_profile: MakeProfile) -> None:
    """Captured graphs follow another profile, another strength and other decisions."""
    torch.compiler.reset()
    plain, model = make_family_model("Llama"), steerfast.patch(make_family_model("Llama"))
    model.to(DEVICE)
    first = make_profile(model, layers=[1, 2], sensor=1, threshold=-0.05, **read)
    second = make_profile(model, seed=3, layers=[1, 2], sensor=1, threshold=-2.0, **read)
    config = CompileConfig(mode=mode, fullgraph=False)
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": NEW, "do_sample": False}
    with steerfast.steer(model, None) as steering:
        for profile, strength in ((first, 1.0), (second, 1.0), (first, 0.5), (None, 1.0)):
            with steering.assigned(profile, strength):
                got = model.generate(**batch(), **options)[:, -NEW:].tolist()
            if profile is None:
                want = plain.generate(**padded(four_prompts()), max_new_tokens=NEW, do_sample=False)[:, -NEW:].tolist()
            else:
                oracle = Oracle(plain, profile, strength)
                want = [oracle.answer(prompt, NEW) for prompt in four_prompts()]
            assert got == want
    torch.compiler.reset()


def test_continuous_batching_answers_alike(make_profile: MakeProfile) -> None:
    from transformers import GenerationConfig

    plain, model = make_family_model("Llama"), steerfast.patch(make_family_model("Llama"))
    model.to(DEVICE).set_attn_implementation("sdpa")
    profiles = [
        make_profile(model, layers=[2], sensor=1, threshold=-2.0, positions="response"),
        None,
        make_profile(model, seed=3, layers=[2], sensor=1, threshold=-2.0, positions="response", pooling="mean"),
        make_profile(model, seed=4, layers=[2], sensor=1, threshold=2.0, positions="response"),
    ]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with steerfast.steer(model, None):
        found = model.generate_batch(four_prompts(), generation_config=config, steering=profiles, progress_bar=False)
    answers = sorted((tuple(one.prompt_ids), tuple(one.generated_tokens)) for one in found.values())
    expected = []
    for prompt, profile in zip(four_prompts(), profiles, strict=True):
        if profile is None:
            answer = plain.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist()
        else:
            answer = Oracle(plain, profile).answer(prompt, NEW)
        expected.append((tuple(prompt), tuple(answer)))
    assert answers == sorted(expected)

"""`Steering.prompt_length`: prompts with their answers in one pass, and prompts in several passes, as `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import CLOSE, MakeProfile
from torch import Tensor
from transformers import DynamicCache

import steerfast
from steerfast.errors import SteerfastError

PROMPTS = [[5, 9, 3, 8, 20, 11], [7, 4, 6], [31, 2, 14, 9, 25]]
ANSWERS = [[12, 40, 3], [8, 8, 17, 29], [33]]
LENGTHS = [len(prompt) for prompt in PROMPTS]


def together(side: str) -> dict[str, Tensor]:
    """Return prompts and answers as a batch padded on a side; "none": without a mask, padded on the right."""
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    width = max(map(len, texts))
    pads = [[0] * (width - len(text)) for text in texts]
    ids = [pad + text if side == "left" else text + pad for pad, text in zip(pads, texts, strict=True)]
    mask = torch.tensor([[1] * len(text) for text in []])
    ones = [[1] * len(text) for text in texts]
    mask = torch.tensor([pad + one if side == "left" else one + pad for pad, one in zip(pads, ones, strict=True)])
    batch = {"input_ids": torch.tensor(ids), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return batch if side == "none" else {**batch, "attention_mask": mask}


def alone(model: Any, n: int) -> Tensor:
    """Return the logits of prompt n's answer, [tokens, V]: one call reads the prompt, and each token has a call."""
    cache = DynamicCache(config=model.config)
    calls = [PROMPTS[n], *([token] for token in ANSWERS[n][:-1])]
    return torch.stack([model(torch.tensor([ids]), past_key_values=cache).logits[0, -1] for ids in calls])


def of_answers(logits: Tensor, batch: dict[str, Tensor], left: bool) -> list[Tensor]:
    """Return the logits of each answer's tokens, [tokens, V]."""
    width = batch["input_ids"].shape[1]
    found = []
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        start = width - len(prompt) - len(answer) if left else 0
        found.append(logits[n, start + len(prompt) - 1 : start + len(prompt) + len(answer) - 1])
    return found


def middle(model: Any, make_profile: MakeProfile, **fields: Any) -> Any:
    """Return a profile whose gate opens for some of the prompts."""
    shut = make_profile(model, sensor=1, layers=[2], threshold=2.0, **fields)
    scores = []
    with steerfast.steer(model, shut) as steering:
        for prompt in PROMPTS:
            model(torch.tensor([prompt]), use_cache=False)
            scores.append(float(steering.scores.flatten()[0]))
    threshold = sum(sorted(scores)[:2]) / 2
    return make_profile(model, sensor=1, layers=[2], threshold=threshold, **fields)


FIELDS = {
    "response": {"positions": "response"},
    "all": {"positions": "all"},
    "mean": {"positions": "response", "pooling": "mean", "window": 4},
    "three tokens": {"positions": "response", "answer_tokens": 3},
    "second pass": {"positions": "all", "layers_before": True},
    "token": {"kind": "token"},
    "always": {"kind": "always"},
}


def profile_of(model: Any, make_profile: MakeProfile, name: str) -> Any:
    fields = dict(FIELDS[name])
    if fields.pop("layers_before", False):
        return make_profile(model, sensor=2, layers=[1, 3], threshold=0.0, **fields)
    return make_profile(model, layers=[2], **fields) if "kind" in fields else middle(model, make_profile, **fields)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_pass_over_prompt_and_answer_equals_answering(
    model: Any, make_profile: MakeProfile, name: str, side: str
) -> None:
    profile = profile_of(model, make_profile, name)
    batch = together(side)
    with steerfast.steer(model, profile) as steering:
        expected, fired = [], []
        for n in range(len(PROMPTS)):
            expected.append(alone(model, n))
            fired.append(bool(steering.fired))
        with steering.prompt_length(LENGTHS):
            logits = model(**batch, use_cache=False).logits
            if FIELDS[name].get("kind") != "token":  # padding without a mask is tokens, too
                assert steering.fired.tolist() == fired
    for got, want in zip(of_answers(logits, batch, side == "left"), expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    unsteered = of_answers(model(**batch, use_cache=False).logits, batch, side == "left")
    assert any(not torch.allclose(got, want, **CLOSE) for got, want in zip(unsteered, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("parts", [1, 2, 4], ids="{} tokens a call".format)
@pytest.mark.parametrize("name", ["response", "three tokens", "always", "token"])
def test_a_prompt_in_parts_decides_at_its_end(model: Any, make_profile: MakeProfile, name: str, parts: int) -> None:
    profile = profile_of(model, make_profile, name)
    with steerfast.steer(model, profile) as steering:
        for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            expected, scores = alone(model, n), None
            if name != "token":
                scores = steering.scores
            ids, cache = torch.tensor([prompt + answer]), DynamicCache(config=model.config)
            with steering.prompt_length(len(prompt)):
                rows = [model(part, past_key_values=cache).logits[0] for part in ids.split(parts, dim=1)]
            torch.testing.assert_close(torch.cat(rows)[len(prompt) - 1 : -1], expected, **CLOSE)
            if scores is not None:
                torch.testing.assert_close(steering.scores, scores, **CLOSE)


@torch.no_grad()
def test_an_answer_goes_on_after_the_context(model: Any, make_profile: MakeProfile) -> None:
    ids = torch.tensor([PROMPTS[0] + ANSWERS[0]])
    for name in ("response", "three tokens"):
        with steerfast.steer(model, profile_of(model, make_profile, name)) as steering:
            expected, cache = alone(model, 0), DynamicCache(config=model.config)
            with steering.prompt_length(LENGTHS[0]):
                model(ids[:, :4], past_key_values=cache)
                rows = [model(ids[:, 4:6], past_key_values=cache).logits[0, -1]]
            rows += [model(ids[:, [t]], past_key_values=cache).logits[0, -1] for t in (6, 7)]
            torch.testing.assert_close(torch.stack(rows), expected, **CLOSE)


@torch.no_grad()
def test_refusals(model: Any, make_profile: MakeProfile) -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0]])
    response = profile_of(model, make_profile, "response")
    with steerfast.steer(model, response) as steering:
        for length in (0, -1, [3, 0], [], 2.5, True, "3"):
            with pytest.raises(SteerfastError, match="prompt_length: expected"), steering.prompt_length(length):  # type: ignore[arg-type]
                pass
        with steering.prompt_length([3, 3, 3]), pytest.raises(SteerfastError, match="expected 2 numbers"):
            model(ids)
        cache = DynamicCache(config=model.config)
        with steering.prompt_length(6):
            model(ids[:, :2], past_key_values=cache)
            mask = torch.ones(2, 1, 1, 3)
            with pytest.raises(SteerfastError, match=r"attention_mask: expected \[2, 3\]"):
                model(ids[:, 2:3], past_key_values=cache, attention_mask=mask)
    for name in ("all", "mean", "second pass"):
        with (
            steerfast.steer(model, profile_of(model, make_profile, name)) as steering,
            steering.prompt_length(6),
            pytest.raises(SteerfastError, match="the whole prompt in one call"),
        ):
            model(ids[:, :3], past_key_values=DynamicCache(config=model.config))
    with steerfast.steer(model, profile_of(model, make_profile, "three tokens")) as steering:
        cache = DynamicCache(config=model.config)
        with steering.prompt_length([4, 5]):
            model(ids, past_key_values=cache)
        with pytest.raises(SteerfastError, match="around its answer"):
            model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_generate_knows_its_prompts(model: Any, make_profile: MakeProfile) -> None:
    ids, profile = torch.tensor([PROMPTS[0]]), profile_of(model, make_profile, "response")
    with steerfast.steer(model, profile) as steering:
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        with steering.prompt_length(2):
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)

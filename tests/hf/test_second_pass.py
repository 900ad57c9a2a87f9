"""Layers before the sensor: prompts that fire are read a second time, as if the decision had been known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import make_model
from torch import Tensor
from transformers import StaticCache

import steerfast
from steerfast.errors import SteerfastError
from steerfast.profile import Gate, SteeringProfile

SENSOR, EARLY = 3, [0, 1, 2, 4]


@pytest.fixture(params=[False, True], ids=["hooks", "fused"])
def model(tiny_llama: Any, request: pytest.FixtureRequest) -> Any:
    return steerfast.patch(tiny_llama) if request.param else tiny_llama


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def calls_of(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the tokens that the backbone is called with."""
    shapes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def knowing(profile: SteeringProfile) -> SteeringProfile:
    """The same edits for everybody."""
    return replace(profile, gate=Gate("always"), sensor="own")


def middle(model: Any, profile: SteeringProfile, batch: dict[str, Tensor]) -> SteeringProfile:
    """The profile with a threshold that half of the batch lies above."""
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        model(**batch)
    scores = steering.scores[0].sort().values
    return replace(profile, threshold=torch.full_like(profile.threshold, float(scores[1] + scores[2]) / 2))


GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("positions", ["all", "response"])
def test_equals_knowing_the_decision_in_advance(
    model: Any, make_profile: Callable[..., SteeringProfile], batch: dict[str, Tensor], positions: str
) -> None:
    profile = middle(model, make_profile(model, sensor=SENSOR, layers=EARLY, positions=positions), batch)
    options = {**batch, **GREEDY, "output_hidden_states": True}
    plain = model.generate(**options)
    with steerfast.steer(model, knowing(profile)):
        known = model.generate(**options)
    with calls_of(model) as calls, steerfast.steer(model, profile) as steering:
        got = model.generate(**options)
    fired = steering.fired.tolist()
    assert sorted(fired) == [False, False, True, True]
    assert calls[:3] == [(4, 7), (2, 7), (4, 1)]  # the prompts, those that fired once more, the first answer token
    for n, is_open in enumerate(fired):
        want = known if is_open else plain
        length = min(got.sequences.shape[1], want.sequences.shape[1])
        assert torch.equal(got.sequences[n, :length], want.sequences[n, :length])
        for a, b in zip(got.logits, want.logits, strict=False):
            torch.testing.assert_close(a[n], b[n], rtol=0, atol=1e-3)
        valid = batch["attention_mask"][n].bool()
        for a, b in zip(got.hidden_states[0], want.hidden_states[0], strict=True):
            torch.testing.assert_close(a[n][valid], b[n][valid], rtol=0, atol=1e-3)


def test_nobody_fires_costs_nothing(
    model: Any, make_profile: Callable[..., SteeringProfile], batch: dict[str, Tensor]
) -> None:
    profile = make_profile(model, sensor=SENSOR, layers=EARLY, threshold=2.0)
    plain = model.generate(**batch, **GREEDY)
    with calls_of(model) as calls, steerfast.steer(model, profile):
        got = model.generate(**batch, **GREEDY)
    assert calls[:2] == [(4, 7), (4, 1)]
    assert torch.equal(got.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


def test_second_turn_reads_only_its_own_tokens_again(
    model: Any, make_profile: Callable[..., SteeringProfile], batch: dict[str, Tensor]
) -> None:
    profile = make_profile(model, sensor=SENSOR, layers=EARLY, threshold=-2.0)
    more = torch.randint(3, 128, (4, 3), generator=torch.Generator().manual_seed(2))

    def two_turns(profile: SteeringProfile) -> tuple[Tensor, list[tuple[int, ...]]]:
        with torch.no_grad(), calls_of(model) as calls, steerfast.steer(model, profile):
            first = model(**batch, use_cache=True)
            mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
            second = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values)
        return second.logits, calls

    known, _ = two_turns(knowing(profile))
    got, calls = two_turns(profile)
    assert calls == [(4, 7), (4, 7), (4, 3), (4, 3)]
    torch.testing.assert_close(got, known, rtol=0, atol=1e-3)


def test_beams_and_other_profiles_beside(
    model: Any, make_profile: Callable[..., SteeringProfile], batch: dict[str, Tensor]
) -> None:
    late = make_profile(model, sensor=SENSOR, layers=EARLY, threshold=-2.0)
    other = make_profile(model, seed=4, threshold=-2.0)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    with steerfast.steer(model, None):
        want = model.generate(**batch, **beams, steering=[knowing(late), other, None, knowing(late)])
        got = model.generate(**batch, **beams, steering=[late, other, None, late])
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_a_static_cache_reads_all_prompts_again(make_profile: Callable[..., SteeringProfile], family: str) -> None:
    model = steerfast.patch(make_model(family, num_hidden_layers=5, sliding_window=16))
    ids = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    profile = middle(model, make_profile(model, sensor=SENSOR, layers=EARLY), batch)
    options = {**batch, **GREEDY, "cache_implementation": "static", "disable_compile": True}
    with steerfast.steer(model, profile) as steering:
        want = model.generate(**batch, **GREEDY)
        decided = steering.scores
        with calls_of(model) as calls:
            got = model.generate(**options)
        assert calls[:3] == [(4, 7), (4, 7), (4, 1)]
        assert sorted(steering.fired.tolist()) == [False, False, True, True]
        torch.testing.assert_close(steering.scores, decided)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_a_second_turn_on_a_static_cache(
    model: Any, make_profile: Callable[..., SteeringProfile], batch: dict[str, Tensor]
) -> None:
    profile = make_profile(model, sensor=SENSOR, layers=EARLY, threshold=-2.0)
    more = torch.randint(3, 128, (4, 3), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)

    def two_turns(profile: SteeringProfile) -> tuple[Tensor, list[tuple[int, ...]]]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad(), calls_of(model) as calls, steerfast.steer(model, profile):
            model(**batch, past_key_values=cache)
            return model(input_ids=more, attention_mask=mask, past_key_values=cache).logits, calls

    known, _ = two_turns(knowing(profile))
    got, calls = two_turns(profile)
    assert calls == [(4, 7), (4, 7), (4, 3), (4, 3)]
    torch.testing.assert_close(got, known, rtol=0, atol=1e-3)


def test_a_cache_that_cannot_be_taken_back_is_refused_before_any_token(
    make_profile: Callable[..., SteeringProfile],
) -> None:
    model = make_model("Mistral", num_hidden_layers=5, sliding_window=6)
    profile = make_profile(model, sensor=SENSOR, layers=EARLY, threshold=-2.0)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), steerfast.steer(model, profile):
        first = model(input_ids=ids, past_key_values=cache)
        with pytest.raises(SteerfastError, match="windows do not slide on, got StaticCache"):
            model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert first.logits.isfinite().all()
    plain = make_model("Mistral", num_hidden_layers=5, sliding_window=6)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)

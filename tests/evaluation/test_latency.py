"""The latency benchmark: what its systems compute, and that its figures are figures of what they say."""

from __future__ import annotations

import gc
import io
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from steerfast.cli.rendering import latency_report
from steerfast.errors import ProfileError, SteerfastError
from steerfast.evaluation import latency, timing
from steerfast.evaluation.latency import Result, TimedModel, twin
from steerfast.hf import caches
from steerfast.hf.fused import is_patched, patch
from steerfast.hf.steering import steer
from steerfast.profile import Gate

torch.set_num_threads(1)

ALL = ("stock", "control", "idle", "shut", "open-one", "open-all")


@pytest.fixture
def found(tiny_llama: Any) -> dict[str, TimedModel]:
    made, reasons = latency.systems(tiny_llama)
    assert reasons == {}
    return {system.name: system for system in made}


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(0, 128, (2, 6), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens).logits


def test_systems_share_every_weight_and_leave_the_model_alone(tiny_llama: Any) -> None:
    before = logits(tiny_llama)
    made, _ = latency.systems(tiny_llama)
    assert tuple(system.name for system in made) == ALL
    weights = [weight.data_ptr() for weight in tiny_llama.parameters()]
    for system in made:
        assert [weight.data_ptr() for weight in system.model.parameters()] == weights
    modules = [module for system in made for module in system.model.modules()]
    assert len(set(map(id, modules))) == len(modules)
    assert not is_patched(tiny_llama)
    assert torch.equal(logits(tiny_llama), before)


def test_systems_compute_what_they_are_named_for(tiny_llama: Any, found: dict[str, TimedModel]) -> None:
    stock = logits(tiny_llama)
    for name in ("stock", "control"):
        assert torch.equal(logits(found[name].model), stock)
    idle = logits(found["idle"].model)
    torch.testing.assert_close(idle, stock, rtol=1e-4, atol=1e-4)  # the fused norm rounds in another order
    assert torch.equal(logits(found["shut"].model), idle)
    one = logits(found["open-one"].model)
    assert not torch.allclose(one, stock, atol=1e-3)
    assert not torch.allclose(logits(found["open-all"].model), one, atol=1e-3)
    fused = {name for name, system in found.items() if is_patched(system.model)}
    assert fused == {"idle", "shut", "open-one", "open-all"}


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_a_profile_is_measured_open_and_shut(tiny_llama: Any, make_profile: Callable[..., Any], score: str) -> None:
    profile = make_profile(tiny_llama, layers=[2, 3], score=score)
    profile = replace(profile, abstain=profile.threshold)
    made, reasons = latency.systems(tiny_llama, profile)
    assert [system.name for system in made] == ["stock", "control", "idle", "profile-shut", "profile-open"]
    assert reasons == {}
    shut, opened = made[3:]
    torch.testing.assert_close(logits(shut.model), logits(tiny_llama), rtol=1e-4, atol=1e-4)
    for system, fired in ((shut, False), (opened, True)):
        logits(system.model)
        assert system.steering is not None
        assert system.steering.fired.tolist() == [fired, fired]
    latency.measure(made, 2, 4, seconds=0)


def test_a_profile_without_a_gate_cannot_be_shut(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    made, reasons = latency.systems(tiny_llama, make_profile(tiny_llama, kind="always"))
    assert [system.name for system in made] == ["stock", "control", "idle", "profile-open"]
    assert reasons == {"profile-shut": "the profile has no gate"}


def test_layers_of_no_known_family_are_steered_by_hooks_alone(tiny_llama: Any) -> None:
    class Other(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

    layers = tiny_llama.model.layers
    for index, layer in enumerate(layers):
        layers[index] = Other(layer)
    made, reasons = latency.systems(tiny_llama)
    assert [system.name for system in made] == ["stock", "control", "shut", "open-one", "open-all"]
    assert list(reasons) == ["idle"]
    assert "Other" in reasons["idle"]


def test_models_that_are_not_stock_are_refused(tiny_llama: Any, make_llama: Any, make_profile: Any) -> None:
    with steer(tiny_llama, make_profile(tiny_llama)), pytest.raises(SteerfastError, match="steered"):
        latency.systems(tiny_llama)
    with pytest.raises(SteerfastError, match="not patched"):
        latency.systems(patch(make_llama()))
    other = make_profile(make_llama(hidden_size=64))
    with pytest.raises(ProfileError, match="hidden size"):
        latency.systems(tiny_llama, other)


def test_figures_of_all_systems(tiny_llama: Any) -> None:
    made, _ = latency.systems(tiny_llama)
    target = patch(twin(tiny_llama))
    distinct = tuple(latency.random_profile(tiny_llama, [2], seed=seed) for seed in range(16))
    made.append(TimedModel("profiles", target, steer(target, None), True, distinct))
    results = latency.measure(made, 3, 7, seconds=0, bandwidth=2.0)
    assert tuple(result.system for result in results) == (*ALL, "profiles")
    for result in results:
        assert (result.mode, result.batch, result.prompt) == ("eager", 3, 7)
        assert 0 < result.tpot_ms <= result.p99_ms
        assert result.ttft_ms > 0
        assert result.tokens_per_s == pytest.approx(3e3 / result.tpot_ms, rel=1e-3)
        assert result.prefills == 3
        assert result.steps == 20
        assert result.ratio_to_stock is not None
        assert 0.1 < result.ratio_to_stock < 10
    assert (results[0].ratio_to_stock, results[0].ttft_ratio_to_stock) == (1.0, 1.0)
    assert [result.profiles for result in results] == [0, 0, 0, 1, 1, 1, 3]
    # The embedding is not read whole, the output layer is; 5 layers of 2 heads of 8 numbers, keys and values.
    weights = sum(p.nbytes for p in tiny_llama.parameters()) - tiny_llama.model.embed_tokens.weight.nbytes
    cached = 3 * 7 * 5 * 2 * 2 * 8 * 4
    assert results[0].floor_ms == pytest.approx((weights + cached) / 2e9 * 1e3, abs=1e-4)


def test_ratio_is_the_median_over_rounds_and_not_of_medians() -> None:
    times = {"stock": [1.0, 10.0, 2.0], "slow": [2.0, 11.0, 5.0]}
    assert latency._ratio(times, "slow") == statistics.median([2.0, 1.1, 2.5])
    assert latency._ratio({"slow": [1.0]}, "slow") is None


def test_every_step_is_the_one_after_the_prompt(tiny_llama: Any) -> None:
    lengths = []

    class Counting(nn.Module):
        config, parameters, forward = tiny_llama.config, tiny_llama.parameters, tiny_llama.forward

        def __call__(self, **given: Any) -> Any:
            lengths.append((caches.cache_in(given).get_seq_length(), given["input_ids"].shape[1]))
            return tiny_llama(**given)

    counting: Any = Counting()
    counting.get_output_embeddings = tiny_llama.get_output_embeddings
    counting.get_input_embeddings = tiny_llama.get_input_embeddings
    latency.measure([TimedModel("stock", counting)], 1, 6, seconds=0)
    assert set(lengths) == {(0, 6), (6, 1)}


def test_systems_take_turns_in_changing_orders() -> None:
    order: list[str] = []
    calls = {name: lambda number, name=name: order.append(name) or float(number) for name in "abcd"}
    times = timing.interleave(calls, timing.turns(calls, 0, 25))
    rounds = [tuple(order[i : i + 4]) for i in range(0, 100, 4)]
    assert all(sorted(each) == ["a", "b", "c", "d"] for each in rounds)
    assert len(set(rounds)) > 5
    assert times == {name: [float(number) for number in range(25)] for name in "abcd"}


def test_a_gate_that_does_not_do_as_it_should_is_an_error(tiny_llama: Any, found: dict[str, TimedModel]) -> None:
    with pytest.raises(SteerfastError, match="shut: expected every gate open"):
        latency.measure([found["stock"], replace(found["shut"], opens=True)], 1, 4, seconds=0)
    assert gc.isenabled()


def test_wrong_arguments_are_refused(found: dict[str, TimedModel]) -> None:
    stock = [found["stock"]]
    with pytest.raises(SteerfastError, match="expected 1 to 255 tokens of 1 or more sequences, got 256"):
        latency.measure(stock, 1, 256)
    with pytest.raises(SteerfastError, match="prompt: expected"):
        latency.measure(stock, 0, 4)
    with pytest.raises(SteerfastError, match="mode: expected one of eager, compile, got 'fast'"):
        latency.measure(stock, 1, 4, mode="fast")


def test_random_profile_opens_or_stays_shut_in_the_layers_it_steers(tiny_llama: Any) -> None:
    profile = latency.random_profile(tiny_llama, [1, 3], is_open=False, seed=5)
    assert profile.steered_layers == profile.gate_layers == [1, 3]
    assert profile.gate == Gate("prompt")
    assert torch.allclose(profile.vector.norm(dim=1), torch.ones(5))
    assert not torch.equal(profile.vector, latency.random_profile(tiny_llama, [1, 3], seed=6).vector)


def test_copy_bandwidth_is_a_plausible_number() -> None:
    assert 0.05 < timing.copy_bandwidth("cpu") < 5000


def test_result_of_a_run_is_json_and_is_rendered(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "copy_bandwidth", lambda device: 10.0)
    result = latency.run_latency(tiny_llama, batch_sizes=[1, 2], prompt_lengths=[4], seconds=0, progress=False)
    assert json.loads(json.dumps(result)) == result
    assert [(r["batch"], r["system"]) for r in result["results"]] == [(n, name) for n in (1, 2) for name in ALL]
    assert set(result["results"][0]) == {"model", *(field.name for field in fields(Result))}
    assert (result["dtype"], result["device"], result["copy_gbps"]) == ("float32", "cpu", 10.0)
    assert all(math.isfinite(r["tpot_ms"]) for r in result["results"])
    result["left_out"] = {"idle": "no [reason]"}
    text = io.StringIO()
    latency_report(result, Console(file=text, width=160))
    for words in ("batch 2, prompt 4", "open-all", "idle left out: no [reason]"):
        assert words in text.getvalue()

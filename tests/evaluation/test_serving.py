"""What `steerfast bench-serve` makes of its measurements; the servers themselves run in tests/vllm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from steerfast.errors import ProfileError, SteerfastError
from steerfast.evaluation import serving
from steerfast.evaluation.serving import SYSTEMS, LoadOptions, summaries
from steerfast.profile import SteeringProfile


def line(system: str, number: int, tpot: float) -> dict[str, Any]:
    return {
        "system": system,
        "round": number,
        "ttft_ms": 10.0,
        "tpot_ms": tpot,
        "p99_itl_ms": 30.0,
        "tokens_per_s": 5.0,
    }


def test_a_ratio_is_the_median_over_rounds_of_ratios_in_the_same_round() -> None:
    lines = [line("stock", number, tpot) for number, tpot in enumerate((10.0, 20.0, 40.0))]
    lines += [line("open", number, tpot) for number, tpot in enumerate((11.0, 20.0, 48.0))]
    stock, steered = summaries(lines)
    assert (stock["system"], stock["measured"], stock["tpot_ms_ratio"]) == ("stock", 3, [1.0, 1.0, 1.0])
    assert (steered["tpot_ms"], steered["tpot_ms_ratio"]) == (20.0, [1.1, 1.0, 1.2])
    assert steered["tokens_per_s_ratio"] == [1.0, 1.0, 1.0]


def test_without_stock_there_are_no_ratios() -> None:
    (found,) = summaries([line("open", 0, 11.0)])
    assert found["tpot_ms"] == 11.0
    assert not [name for name in found if name.endswith("_ratio")]


def test_every_round_has_every_system_and_the_systems_of_a_server_follow_each_other() -> None:
    plan = serving._plan(LoadOptions(rounds=5))
    orders = set()
    for number in range(5):
        order = [system for at, system in plan if at == number]
        assert sorted(order) == sorted(SYSTEMS)
        servers = [SYSTEMS[system] for system in order]
        assert sum(a != b for a, b in itertools.pairwise(servers)) == 3
        orders.add(tuple(order))
    assert len(orders) > 1
    assert [system for _, system in serving._plan(LoadOptions(systems=("idle",), rounds=2))] == ["idle", "idle"]


def metrics(profile: str, steered: int, decided: int) -> str:
    return (
        f'steerfast_gate_evaluations_total{{profile="{profile}"}} {decided}.0\n'
        f'steerfast_steered_requests_total{{profile="{profile}"}} {steered}.0\n'
    )


@pytest.mark.parametrize(
    ("profile", "steered", "decided", "is_right"),
    [
        ("open", 6, 6, True),
        ("open", 6, 0, True),  # a profile without a gate
        ("shut", 0, 6, True),
        ("open", 0, 6, False),
        ("shut", 6, 6, False),
        ("shut", 0, 0, False),
        ("open", 0, 0, False),
    ],
)
def test_figures_of_a_server_that_did_not_steer_are_refused(
    profile: str, steered: int, decided: int, is_right: bool
) -> None:
    if is_right:
        serving._check_decisions(metrics(profile, steered, decided), profile)
        return
    with pytest.raises(
        SteerfastError, match=f"{profile}: expected a server that steers, got one that steered {steered}"
    ):
        serving._check_decisions(metrics(profile, steered, decided), profile)
    with pytest.raises(SteerfastError, match="expected a server that steers"):
        serving._check_decisions("", profile)


def test_a_profile_is_held_shut_and_open(tiny_llama: Any, make_profile: Any, tmp_path: Any) -> None:
    profile = make_profile(tiny_llama, layers=[2], score="dot", threshold=0.5)
    servers = serving._Servers("", LoadOptions(), tmp_path)
    servers.save(profile)
    thresholds = {name: SteeringProfile.load(file).threshold for name, file in servers._files.items()}
    assert float(thresholds["shut"].min()) > 1e6
    assert float(thresholds["open"].max()) < -1e6
    with pytest.raises(ProfileError, match="expected no 'shut' for a profile without a gate"):
        servers.save(make_profile(tiny_llama, layers=[2], kind="always"))


def test_a_made_up_profile_fits_the_model(tiny_llama: Any, tmp_path: Any) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    servers = serving._Servers(str(tmp_path / "model"), LoadOptions(), tmp_path)
    servers.save(None)
    profile = SteeringProfile.load(servers._files["open"])
    assert profile.steered_layers == [2, 3, 4]
    assert (profile.gate_layers, profile.positions) == ([2], "response")

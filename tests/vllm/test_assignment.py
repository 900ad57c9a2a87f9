"""What requests may ask of steering, asked by somebody who wants to get around it."""

from __future__ import annotations

import decimal
import fractions
import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerfast.runtime.span import EditSpan, Entry
from steerfast.vllm import assignment
from steerfast.vllm.assignment import stack_from_extra, stack_to_extra
from steerfast.vllm.config import ServingConfig

NAMES = ["safety", "tone", "0.1-β".replace("β", "b")]


def config(default: str | None = "safety", *, locked: bool = False) -> ServingConfig:
    paths = {name: f"/profiles/{name}.safetensors" for name in NAMES}
    return ServingConfig(paths, default, locked, 8, (1, 2), 0, None, "test", stack=2)


def requested(asked: Any, judge: ServingConfig, names: list[str]) -> list[tuple[str, float]]:
    """Names and strengths, where profiles have no named thresholds."""
    found = assignment.requested(asked, judge, dict.fromkeys(names, ()))
    assert all(each.point is None for each in found)
    return [(each.name, each.strength) for each in found]


OPEN, LOCKED = config(), config(locked=True)

# What is no profile's name, in whatever form a client can send it, and whoever calls the offline API.
NOT_NAMES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.0, math.nan, [], ["safety"], {}, {"safety": 1}, b"safety", ("safety",), object()),
    *("", " ", "Safety", "SAFETY", "safety ", " safety", "safety\n", "safety\0", "safety\x00off", "OFF", "Off", "off "),
    *("none", "null", "default", "None", "-1", "0", "*", "safety;tone", '"safety"', "%00", "${safety}", "{}"),
    *(",", "safety,", ",safety", "safety, tone", "safety,,tone", "safety,nobody", "off,OFF", "safety\uff0ctone"),
    *("safety:", "safety:off", "safety:Observe", "safety:observe:observe", ":observe", "off:observe"),
    *("safety :observe", "observe:observe", "Observe", "observe ", "safety:steer", "safety,tone:"),
    *("../safety", "/profiles/safety.safetensors", "./safety", "safety/../tone", "..\\safety", "file:///etc/passwd"),
    *("ѕafety", "safe\u200bty", "ｓafety", "sa\u0301fety", "\u202esafety", "safety\ufeff", "\ud800", "🦀", "ﬀ", "oﬀ"),
    *("s" * 100_000, "safety" * 1000),
]
NOT_STRENGTHS: list[Any] = [
    *(None, True, False, "", "nan", b"1", [1.0], [], {}, {"a": 1}, 1j, object()),
    *("1,", ",1", "1, 1", "+1", "-1", "1_0", "1e0", "\uff11", "0x1", "inf", "11", " 1", "1 "),
    *(math.nan, -math.nan, math.inf, -math.inf, -0.1, -1, -5e-324, 10.000001, 11, 1e308, -1e308),
    *(2**64, -(2**64), 10**400, 10**5000),
    *(np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), np.array([1.0, 2.0]), torch.tensor(1.0)),
    *(decimal.Decimal(1), fractions.Fraction(1, 2)),
]  # fmt: skip
STRAY_KEYS = [
    *("steerfast", "steerfast_slot", "steerfast.slot", "STEERFAST", "Steerfast", "steerfast\0"),
    *("Steering", "STEERING", "steering ", "steering_strenght", "steering-strength", "steeringstrength", "steering\n"),
    *("steering_strength ", "steering.strength", "steering_off", "ſteering", "steering_slot", "steering\u200b"),
]


def _id(value: Any) -> str:
    return ascii(value)[:40] if not (isinstance(value, int) and abs(value) > 10**20) else "huge"


def test_nothing_asked_for_is_the_default_at_strength_one() -> None:
    for empty in (None, {}, {"kv_transfer_params": {"do_remote_prefill": True}, "session_id": "x", 7: "y"}):
        assert requested(empty, OPEN, NAMES) == [("safety", 1.0)]
        assert requested(empty, LOCKED, NAMES) == [("safety", 1.0)]
        assert requested(empty, config(None), NAMES) == []


def test_what_may_be_asked_for() -> None:
    assert requested({"steering": "tone"}, OPEN, NAMES) == [("tone", 1.0)]
    assert requested({"steering": "off"}, OPEN, NAMES) == []
    assert requested({"steering": "off"}, config(None), NAMES) == []
    assert requested({"steering_strength": 0.25}, OPEN, NAMES) == [("safety", 0.25)]
    assert requested({"steering": "tone", "steering_strength": 3}, OPEN, NAMES) == [("tone", 3.0)]
    for edge in (0, 0.0, -0.0, 5e-324, 10.0, 10):
        ((name, strength),) = requested({"steering": "tone", "steering_strength": edge}, OPEN, NAMES)
        assert (name, strength, type(strength)) == ("tone", edge, float)
    weak = replace(OPEN, max_strength=1.5)
    assert requested({"steering_strength": 1.5}, weak, NAMES) == [("safety", 1.5)]
    with pytest.raises(ValueError, match=r"steering_strength: expected a number from 0 to 1\.5, got 2"):
        requested({"steering_strength": 2}, weak, NAMES)
    assert requested({"steering": "loaded"}, OPEN, [*NAMES, "loaded"]) == [("loaded", 1.0)]


@pytest.mark.parametrize("name", NOT_NAMES, ids=_id)
def test_no_other_name(name: Any) -> None:
    for judge in (OPEN, config(None)):
        with pytest.raises(ValueError, match=r"^steering: expected one of safety, tone, 0\.1-b, off, got ") as refused:
            requested({"steering": name}, judge, NAMES)
        assert _harmless(str(refused.value))


@pytest.mark.parametrize("strength", NOT_STRENGTHS, ids=_id)
def test_no_other_strength(strength: Any) -> None:
    for asked in ({}, {"steering": "tone"}):
        with pytest.raises(ValueError, match=r"^steering_strength: expected a number from 0 to 10, got ") as refused:
            requested({**asked, "steering_strength": strength}, OPEN, NAMES)
        assert _harmless(str(refused.value))


@pytest.mark.parametrize("key", STRAY_KEYS, ids=_id)
def test_no_other_key(key: str) -> None:
    for judge in (OPEN, LOCKED, config(None)):
        for value in ({"slot": 3, "strength": 0.0, "late": True, "open": False}, None, "off", 0):
            with pytest.raises(
                ValueError, match="expected the keys steering, steering_strength, steering_threshold only"
            ) as refused:
                requested({key: value}, judge, NAMES)
            assert _harmless(str(refused.value))


@pytest.mark.parametrize("extra_args", ["steering", b"x", 7, True, ["steering"], [("steering", "off")], 0.0], ids=_id)
def test_extra_args_are_an_object(extra_args: Any) -> None:
    for judge in (OPEN, LOCKED):
        with pytest.raises(ValueError, match=r"^extra_args: expected an object, got "):
            requested(extra_args, judge, NAMES)


def test_a_strength_needs_somebody() -> None:
    for asked, judge in (({"steering": "off"}, OPEN), ({}, config(None))):
        with pytest.raises(ValueError, match=r"^steering_strength: expected steering to name a profile"):
            requested({**asked, "steering_strength": 1.0}, judge, NAMES)


@pytest.mark.parametrize("name", [*NOT_NAMES, "off", "tone", "loaded"], ids=_id)
def test_locked_lets_nobody_choose(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^steering: expected safety, to which this server is locked, got "):
        requested({"steering": name}, LOCKED, [*NAMES, "loaded"])


@pytest.mark.parametrize("strength", [*NOT_STRENGTHS, 0, 0.0, 0.5, 1, 1.0, 2], ids=_id)
def test_locked_lets_nobody_weaken(strength: Any) -> None:
    for asked in ({}, {"steering": "safety"}):
        with pytest.raises(ValueError, match=r"^steering_strength: expected none, as this server is locked"):
            requested({**asked, "steering_strength": strength}, LOCKED, NAMES)


def test_locked_to_the_default_one_may_name_it() -> None:
    assert requested({"steering": "safety"}, LOCKED, NAMES) == [("safety", 1.0)]
    # The engine never removes the default; were it gone, nobody would run without it unnoticed.
    assert requested({}, LOCKED, []) == [("safety", 1.0)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["steering", "steering_strength", "steerfast", "Steering", "other"]) | st.text()
names = st.sampled_from([*NAMES, "off", "safety,tone", "tone,safety", "safety,off", "safety,safety", "1,0.5", ".5"])


def test_what_is_observed_has_strength_zero() -> None:
    both = config("safety,tone")
    for asked, judge, granted in (
        ({"steering": "safety:observe"}, OPEN, [("safety", 0.0)]),
        ({"steering": "observe"}, OPEN, [("safety", 0.0)]),
        ({"steering": "observe"}, both, [("safety", 0.0), ("tone", 0.0)]),
        ({"steering": "tone,safety:observe"}, both, [("tone", 1.0), ("safety", 0.0)]),
        ({"steering": "tone,safety:observe", "steering_strength": "0.5,2"}, both, [("tone", 0.5), ("safety", 0.0)]),
        ({"steering": "tone:observe,safety", "steering_strength": 3}, both, [("tone", 0.0), ("safety", 3.0)]),
    ):
        assert requested(asked, judge, NAMES) == granted


@pytest.mark.parametrize("locked", [False, True])
def test_what_the_operator_observes_no_request_changes(locked: bool) -> None:
    judge = replace(config("safety,tone", locked=locked), observe=("tone",))
    assert requested({}, judge, NAMES) == [("safety", 1.0), ("tone", 0.0)]
    assert requested({"steering": "safety,tone"}, judge, NAMES) == [("safety", 1.0), ("tone", 0.0)]
    if not locked:
        assert requested({"steering": "tone", "steering_strength": 2}, judge, NAMES) == [("tone", 0.0)]
        assert requested({"steering": "safety:observe"}, judge, NAMES) == [("safety", 0.0)]
    else:
        for other in ("observe", "safety:observe,tone:observe", "safety,tone:observe"):
            with pytest.raises(ValueError, match=r"^steering: expected safety,tone, to which this server is locked"):
                requested({"steering": other}, judge, NAMES)


def test_there_may_be_nothing_to_observe() -> None:
    with pytest.raises(ValueError, match=r"^steering: expected NAME:observe, as this server has no default, got "):
        requested({"steering": "observe"}, config(None), NAMES)
    for asked in ("observe,tone", "tone,observe", "observe,observe"):
        with pytest.raises(ValueError, match=r"^steering: expected observe alone, got "):
            requested({"steering": asked}, OPEN, NAMES)


@given(st.dictionaries(keys, json_values | names | st.floats(0, 10), max_size=5))
def test_whatever_is_asked_for_is_granted_in_full_or_refused(extra_args: dict[str, Any]) -> None:
    if (granted := _granted(extra_args, OPEN)) is not None:
        asked, strengths = extra_args.get("steering", "safety"), extra_args.get("steering_strength", 1.0)
        assert [name for name, _ in granted] == ([] if asked == "off" else asked.split(","))
        assert {name for name, _ in granted} <= {*NAMES}
        assert all(type(strength) is float and 0 <= strength <= 10 for _, strength in granted)
        wanted = [*map(float, strengths.split(","))] if isinstance(strengths, str) else [strengths]
        assert [strength for _, strength in granted] in (wanted, wanted * len(granted))
    assert _granted(extra_args, LOCKED) in (None, [("safety", 1.0)])


def _granted(extra_args: dict[str, Any], judge: ServingConfig) -> list[tuple[str, float]] | None:
    """None: it was refused."""
    try:
        return requested(extra_args, judge, NAMES)
    except ValueError as refused:
        message = str(refused)
    assert _harmless(message)
    return None


def test_a_stack_is_asked_for_by_names_and_strengths() -> None:
    stack = {"steering": "tone,safety"}
    assert requested(stack, OPEN, NAMES) == [("tone", 1.0), ("safety", 1.0)]
    assert requested({**stack, "steering_strength": "1,0.5"}, OPEN, NAMES) == [("tone", 1.0), ("safety", 0.5)]
    for one in (0.25, "0.25", ".25"):
        assert requested({**stack, "steering_strength": one}, OPEN, NAMES) == [("tone", 0.25), ("safety", 0.25)]
    assert requested({"steering": "tone", "steering_strength": "3"}, OPEN, NAMES) == [("tone", 3.0)]
    three = {"steering": ",".join(NAMES), "steering_strength": "0,10,2.50"}
    assert requested(three, replace(OPEN, stack=3), NAMES) == list(zip(NAMES, (0.0, 10.0, 2.5), strict=True))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"steering": "safety,tone,0.1-b"}, r"^steering: expected at most 2 profiles, .*, got 3$"),
        ({"steering": "safety,safety"}, r"^steering: expected each profile once, got 'safety,safety'$"),
        ({"steering": "safety,off"}, r"^steering: expected off alone, got 'safety,off'$"),
        ({"steering": "off,off"}, r"^steering: expected off alone, got 'off,off'$"),
        ({"steering": "safety,x"}, r"^steering: expected one of safety, tone, 0\.1-b, off, got 'x'$"),
        ({"steering": "tone", "steering_strength": "1,1"}, r"^steering_strength: expected one number, or 1, .* got 2$"),
        ({"steering_strength": "1,1,1"}, r"^steering_strength: expected one number, or 1, .* got 3$"),
        (
            {"steering": "tone,safety", "steering_strength": "1,1,1"},
            "expected one number, or 2, one for each .* got 3$",
        ),
        ({"steering": "tone,safety", "steering_strength": "1,11"}, "expected a number from 0 to 10, got 11.0$"),
        ({"steering": "off", "steering_strength": "1,1"}, "^steering_strength: expected steering to name a profile"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        requested(asked, OPEN, NAMES)
    assert _harmless(str(refused.value))


def test_the_default_may_be_a_stack() -> None:
    both = [("safety", 1.0), ("tone", 1.0)]
    assert requested({}, config("safety,tone"), NAMES) == both
    assert requested({"steering_strength": "2,0.5"}, config("safety,tone"), NAMES) == [("safety", 2.0), ("tone", 0.5)]
    locked = config("safety,tone", locked=True)
    assert requested({}, locked, NAMES) == both
    assert requested({"steering": "safety,tone"}, locked, NAMES) == both
    for other in ("safety", "tone,safety", "off", "tone"):
        with pytest.raises(ValueError, match=r"^steering: expected safety,tone, to which this server is locked, got "):
            requested({"steering": other}, locked, NAMES)


def test_workers_read_plain_data() -> None:
    stack = (Entry(3, 0.5, EditSpan(True, False)), Entry(1, 2.0, EditSpan(False, True, 24, 128, (5, 6), 4, True)))
    extra = json.loads(json.dumps(stack_to_extra(stack)))
    assert extra == [
        {"slot": 3, "strength": 0.5, "span": {**asdict(EditSpan()), "turn": []}},
        {
            "slot": 1,
            "strength": 2.0,
            "span": {
                "after_prompt": False,
                "open": True,
                "answer_rows": 24,
                "mean_rows": 128,
                "turn": [5, 6],
                "tail": 4,
                "after_thought": True,
            },
        },
    ]
    assert stack_from_extra(extra) == stack


POINTS = {"safety": ("strict", "permissive"), "tone": ("strict",), "plain": ()}


def points(asked: Any, judge: ServingConfig) -> list[tuple[str, str | None]]:
    return [(each.name, each.point) for each in assignment.requested(asked, judge, POINTS)]


def test_a_request_names_a_threshold() -> None:
    stack = {"steering": "safety,tone"}
    assert points({}, OPEN) == [("safety", None)]
    assert points({"steering_threshold": "strict"}, OPEN) == [("safety", "strict")]
    assert points({**stack, "steering_threshold": "strict"}, OPEN) == [("safety", "strict"), ("tone", "strict")]
    assert points({**stack, "steering_threshold": "permissive,strict"}, OPEN) == [
        ("safety", "permissive"), ("tone", "strict")
    ]  # fmt: skip
    mixed = {"steering": "plain,safety", "steering_threshold": ",strict", "steering_strength": 0.5}
    assert assignment.requested(mixed, OPEN, POINTS) == [("plain", 0.5, None), ("safety", 0.5, "strict")]
    assert points({"steering": "off"}, OPEN) == []


def test_a_server_has_a_threshold_of_its_own() -> None:
    for locked in (False, True):
        strict = replace(config("safety,plain", locked=locked), threshold="strict")
        assert points({}, strict) == [("safety", "strict"), ("plain", None)]
    assert points({"steering": "safety", "steering_threshold": "permissive"}, replace(OPEN, threshold="strict")) == [
        ("safety", "permissive")
    ]
    assert points({"steering_threshold": ""}, replace(OPEN, threshold="strict")) == [("safety", None)]


@pytest.mark.parametrize("value", [*NOT_NAMES[:18], "Strict", "strict ", "lax", "strict,strict", "a\u202e"], ids=_id)
def test_no_other_threshold(value: Any) -> None:
    if value == "":
        return
    with pytest.raises(
        ValueError, match=r"^steering_threshold: expected (for safety one of strict, perm|one name)"
    ) as no:
        assignment.requested({"steering_threshold": value}, OPEN, POINTS)
    assert _harmless(str(no.value))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"steering": "tone", "steering_threshold": "permissive"}, "expected for tone one of strict, got 'permissive'"),
        ({"steering": "plain", "steering_threshold": "strict"}, "for plain nothing, as the profile has one threshold"),
        ({"steering": "safety,plain", "steering_threshold": "strict"}, "expected for plain nothing"),
        ({"steering": "safety", "steering_threshold": "strict,strict"}, "expected one name, or 1, .* got 2$"),
        ({"steering": "off", "steering_threshold": "strict"}, "expected steering to name a profile"),
    ],
)
def test_a_threshold_that_a_profile_lacks_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^steering_threshold: .*{says}|^steering_threshold: {says}"):
        assignment.requested(asked, OPEN, POINTS)


def test_locked_lets_nobody_choose_a_threshold() -> None:
    for value in ("strict", "permissive", "", None):
        with pytest.raises(ValueError, match=r"^steering_threshold: expected none, as this server is locked"):
            assignment.requested({"steering_threshold": value}, LOCKED, POINTS)


def _harmless(message: str) -> bool:
    """One short line, which a log or a JSON answer can hold."""
    return message.isprintable() and len(message) < 300 and message.encode("utf-8", "strict") is not None

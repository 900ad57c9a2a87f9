"""The steering that a request asks for, and how workers read it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from steerfast.runtime.span import EditSpan, Entry, Stack
from steerfast.vllm.config import KEY, OBSERVE, OFF, ServingConfig

STEERING = "steering"
STRENGTH = "steering_strength"
THRESHOLD = "steering_threshold"

_KEYS = (STEERING, STRENGTH, THRESHOLD)
_RESERVED = (STEERING, KEY)  # keys that begin like these belong to steerfast
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20}", re.ASCII)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class Asked(NamedTuple):
    """A profile on a request. point: the name of its threshold; None: the one in use."""

    name: str
    strength: float
    point: str | None = None


def stack_to_extra(stack: Stack) -> list[dict[str, Any]]:
    """Return the profiles on a request as plain data, for ``SamplingParams.extra_args[KEY]``."""
    return [asdict(entry) for entry in stack]


def stack_from_extra(extra: Iterable[Mapping[str, Any]]) -> Stack:
    """Read the data that `stack_to_extra` returned."""
    return tuple(Entry(entry["slot"], entry["strength"], _span(**entry["span"])) for entry in extra)


def _span(turn: Iterable[int], **fields: Any) -> EditSpan:
    return EditSpan(turn=tuple(turn), **fields)  # a message between processes has lists


def requested(extra_args: object, config: ServingConfig, points: Mapping[str, Sequence[str]]) -> list[Asked]:
    """Return the profiles that a request asks for, with strengths and thresholds; empty: no steering.

    A request that asks for nothing gets the default at strength 1 and the server's threshold. Strength 0 observes:
    gates decide, and no row is edited. Profiles of `ServingConfig.observe` always have it.

    Args:
        extra_args: the request's ``SamplingParams.extra_args``. ``steering`` names a profile, several as ``"a,b"``, or
            is ``"off"``. ``"a:observe"`` observes a profile, ``"observe"`` the default. ``steering_strength`` is a
            number from 0 to `max_strength` for all of them, or several as ``"1,0.5"``, one for each.
            ``steering_threshold`` names a threshold of each of them, or several as ``"strict,balanced"``, one for each;
            an empty name is the threshold in use. Other keys that begin with ``steering`` or ``steerfast``, in any
            case, are refused. All other keys are ignored.
        points: the profiles that are loaded, and their named thresholds.

    Raises:
        ValueError: the request asks for something unknown, or for anything on a locked server. The message begins with
            the field.
    """
    fields = _steering_fields(extra_args)
    if config.locked:
        _check_locked(fields, config.default)
        stack = dict.fromkeys(config.defaults, 1.0)
    else:
        stack = _stack(fields, config, list(points))
        strengths = _each_strength(fields, len(stack), config)
        stack = {name: own * each for (name, own), each in zip(stack.items(), strengths, strict=True)}
    chosen = _each_threshold(fields, {name: points.get(name, ()) for name in stack}, config.threshold)
    return [
        Asked(name, 0.0 if name in config.observe else strength, point)
        for (name, strength), point in zip(stack.items(), chosen, strict=True)
    ]


def _steering_fields(extra_args: object) -> dict[str, Any]:
    """Return the request's keys about steering."""
    if extra_args is None:
        return {}
    if not isinstance(extra_args, Mapping):
        raise ValueError(f"extra_args: expected an object, got {_shown(extra_args)}")
    fields = {}
    for key, value in extra_args.items():
        if not isinstance(key, str) or not key.casefold().startswith(_RESERVED):
            continue
        if key not in _KEYS:
            raise ValueError(f"{_shown(key)}: expected the keys {', '.join(_KEYS)} only, got this one")
        fields[key] = value
    return fields


def _stack(fields: Mapping[str, Any], config: ServingConfig, names: Sequence[str]) -> dict[str, float]:
    """Return the profiles by name, in the order of the request, and 0 for those that it observes, else 1."""
    value = fields.get(STEERING, config.default)
    if value is None and STEERING not in fields:
        return {}
    parts = value.split(",") if isinstance(value, str) else []
    if parts == [OFF]:
        return {}
    if parts == [OBSERVE]:
        if config.default is None:
            raise ValueError(f"{STEERING}: expected NAME:{OBSERVE}, as this server has no default, got {value!r}")
        return dict.fromkeys(config.defaults, 0.0)
    known = {name: (name, 1.0) for name in names} | {f"{name}:{OBSERVE}": (name, 0.0) for name in names}
    for part in parts or [value]:
        if not isinstance(part, str) or part not in (*known, OFF, OBSERVE):
            raise ValueError(f"{STEERING}: expected one of {', '.join([*names, OFF])}, got {_shown(part)}")
    if alone := {OFF, OBSERVE} & {*parts}:
        raise ValueError(f"{STEERING}: expected {alone.pop()} alone, got {_shown(value)}")
    stack = dict(known[part] for part in parts)
    if len(parts) > config.stack:
        raise ValueError(
            f"{STEERING}: expected at most {config.stack} profiles, for which this server was started, got {len(parts)}"
        )
    if len(stack) < len(parts):
        raise ValueError(f"{STEERING}: expected each profile once, got {_shown(value)}")
    return stack


def _each_strength(fields: Mapping[str, Any], count: int, config: ServingConfig) -> list[float]:
    """Return the strengths that a request gives to its `count` profiles."""
    if STRENGTH not in fields:
        return [1.0] * count
    strengths = []
    for part in _parts(fields[STRENGTH]):
        if isinstance(part, str) and _NUMBER.fullmatch(part):
            part = float(part)
        number = isinstance(part, (int, float)) and not isinstance(part, bool)
        if not (number and 0 <= part <= config.max_strength):
            raise ValueError(f"{STRENGTH}: expected a number from 0 to {config.max_strength:g}, got {_shown(part)}")
        strengths.append(float(part))
    return _for_each(STRENGTH, "number", strengths, count)


def _each_threshold(
    fields: Mapping[str, Any], stack: Mapping[str, Sequence[str]], default: str | None
) -> list[str | None]:
    """Return the named threshold of each profile of a request; `stack` has the names that there are for each."""
    if THRESHOLD not in fields:
        return [default if default in points else None for points in stack.values()]
    parts = _for_each(THRESHOLD, "name", _parts(fields[THRESHOLD]), len(stack))
    for part, (name, points) in zip(parts, stack.items(), strict=True):
        if not isinstance(part, str) or part not in ("", *points):
            have = f"one of {', '.join(points)}" if points else "nothing, as the profile has one threshold"
            raise ValueError(f"{THRESHOLD}: expected for {name} {have}, got {_shown(part)}")
    return [part or None for part in parts]


def _parts(value: object) -> list[Any]:
    """Return the values of a field, several as "a,b"."""
    return value.split(",") if isinstance(value, str) else [value]


def _for_each(field: str, what: str, parts: list[Any], count: int) -> list[Any]:
    """Return a value for each of `count` profiles: one for all of them, or several."""
    if not count:
        raise ValueError(f"{field}: expected {STEERING} to name a profile, got no profile to steer")
    if len(parts) not in (1, count):
        raise ValueError(f"{field}: expected one {what}, or {count}, one for each profile, got {len(parts)}")
    return parts * (count // len(parts))


def _check_locked(fields: Mapping[str, Any], default: str | None) -> None:
    if STEERING in fields and not (isinstance(fields[STEERING], str) and fields[STEERING] == default):
        raise ValueError(
            f"{STEERING}: expected {default}, to which this server is locked, got {_shown(fields[STEERING])}"
        )
    for field in (STRENGTH, THRESHOLD):
        if field in fields:
            raise ValueError(f"{field}: expected none, as this server is locked, got {_shown(fields[field])}")


def _shown(value: object) -> str:
    """Return a client's value as one short line."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an int of too many digits, or its own repr
        return f"a value of type {type(value).__name__}"

"""Wrap methods of other people's classes, once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def expect(owner: type | ModuleType, name: str) -> Any:
    """The attribute `name` of `owner`.

    Raises:
        AttributeError: it has none; the message says which version of vLLM does.
    """
    try:
        return inspect.getattr_static(owner, name)
    except AttributeError:
        where = f"{owner.__module__}.{owner.__name__}" if isinstance(owner, type) else owner.__name__
        raise AttributeError(f"vllm: expected {where}.{name}, as version 0.32 has it, found none") from None


def around(owner: type | ModuleType, name: str) -> Callable[[F], F]:
    """Decorate a function (original, *args, **kwargs) that is to stand where `owner` has the function `name`.

    A function that stands there already, by its module and name, is not put there again.

    Raises:
        AttributeError: `owner` has no such function.
    """

    def put(function: F) -> F:
        key = f"{function.__module__}.{function.__qualname__}"
        original = expect(owner, name)
        inner = original
        while inner is not None:
            if getattr(inner, "steerfast_wrapper", None) == key:
                return function
            inner = getattr(inner, "__wrapped__", None)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        wrapper.steerfast_wrapper = key  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)
        return function

    return put

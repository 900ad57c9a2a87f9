"""Seams: names of other packages that steerfast wraps, calls or sets, and how far the installed ones differ."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seam:
    """A method or an attribute of another package's class that steerfast relies on.

    Attributes:
        owner: the class, as its table names it.
        name: of the method or attribute.
        parameters: names of the method's first parameters, in order; "*" at the end: more may follow. None: an
            attribute.
        why: what steerfast does with it.
        since: the first version of the package that has it. "": every version that steerfast supports.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    why: str
    since: str = ""

    def difference(self, owner: Any) -> str | None:
        """Return what is found instead in the class `owner`, None where it is as expected."""
        if self.parameters is None:
            return None if _has_attribute(owner, self.name) else "found none"
        try:
            method = inspect.getattr_static(owner, self.name)
        except AttributeError:
            return "found none"
        found = list(inspect.signature(method).parameters)  # of the original, where it is wrapped
        first = [name for name in self.parameters if name != "*"]
        if found[: len(first)] != first or (len(found) > len(first) and self.parameters[-1] != "*"):
            return f"got ({', '.join(found)})"
        return None

    @property
    def expected(self) -> str:
        """The name with its parameters."""
        return self.name if self.parameters is None else f"{self.name}({', '.join(self.parameters)})"


def seams(table: Mapping[str, str], since: str = "") -> tuple[Seam, ...]:
    """Return the seams of a table: what is relied on, and why.

    Args:
        table: "owner.method(self, first, *)", or "owner.attribute", or several, as "owner.one, other" -> why.
        since: of all of them.
    """
    made: list[Seam] = []
    for text, why in table.items():
        path, method, parameters = text.removesuffix(")").partition("(")
        owner, _, names = path.rpartition(".")
        taken = tuple(parameters.split(", ")) if method else None
        made += [Seam(owner, name, taken, why, since) for name in names.split(", ")]
    return tuple(made)


def _has_attribute(owner: Any, name: str) -> bool:
    """Return whether the class or a base of it has the attribute, declares it, or names it in a method."""
    if hasattr(owner, name):
        return True
    for each in owner.__mro__:
        methods = (getattr(inspect.unwrap(member), "__code__", None) for member in vars(each).values())
        named = any(name in code.co_names for code in methods if code is not None)
        if named or name in getattr(each, "__annotations__", {}):
            return True
    return False

"""Import paths of version 0.1: they work for one more release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "bank": "runtime.bank",
    "batch": "runtime.tables",
    "requests": "runtime.roster",
    "prompts": "text.prompts",
    "tokenizer": "text.tokenizer",
    "models": "hf",
    "models.continuous": "hf.packed",
    "models.prompting": "hf.generation",
    "models.slots": "runtime.slots",
    "serving": "vllm",
    "serving.patching": "vllm.compat",
    "evaluation.judges": "judging.judges",
    "evaluation.judging": "judging.answers",
    "evaluation.refusal": "judging.refusal",
    "evaluation.fluency": "judging.fluency",
    "evaluation.figures": "evaluation.plots",
    "fitting.statistics": "judging.estimates",
}
"""Old path -> new path, both below ``steerfast``. A package stands for its modules, too."""


def _target(name: str) -> str | None:
    """Return the new path of the module `name`, or None if it did not move."""
    path = name.removeprefix("steerfast.")
    package, _, module = path.partition(".")
    if path in MOVED:
        return f"steerfast.{MOVED[path]}"
    return f"steerfast.{MOVED[package]}.{module}" if module and package in MOVED else None


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("steerfast.") or _target(fullname) is None:
            return None
        return ModuleSpec(fullname, self, is_package=fullname in ("steerfast.models", "steerfast.serving"))

    def exec_module(self, module: Any) -> None:
        name = module.__name__
        new = str(_target(name))
        warnings.warn(f"{name} moved to {new}; the old path goes with the next release", DeprecationWarning, 2)
        try:
            moved = importlib.import_module(new)
        except ModuleNotFoundError as error:
            if error.name == new:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name) from None
            raise
        module.__all__ = getattr(moved, "__all__", [key for key in vars(moved) if not key.startswith("_")])
        module.__getattr__ = partial(getattr, moved)


def install() -> None:
    """Let old import paths be found, also where an update left an empty folder of the old name."""
    sys.meta_path.insert(0, _Finder())

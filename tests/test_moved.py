"""Import paths of version 0.1 lead to the same objects for one release, and say where these are now."""

from __future__ import annotations

import importlib
import sys

import pytest

from steerfast._moved import MOVED


@pytest.mark.parametrize("old", [*MOVED, "models.steering", "models.fused", "serving.worker"])
def test_old_path_warns_and_gives_the_same_objects(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if old.startswith("serving"):
        pytest.importorskip("vllm")
    monkeypatch.delitem(sys.modules, f"steerfast.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"steerfast\.{old} moved to steerfast\."):
        module = importlib.import_module(f"steerfast.{old}")
    package, _, name = old.partition(".")
    moved = importlib.import_module(f"steerfast.{MOVED.get(old) or f'{MOVED[package]}.{name}'}")
    assert all(getattr(module, name) is getattr(moved, name) for name in module.__all__)


@pytest.mark.filterwarnings("ignore:steerfast.models.absent moved:DeprecationWarning")
@pytest.mark.parametrize("name", ["steerfast.models.absent", "steerfast.absent"])
def test_a_path_that_never_was_is_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(name)

"""The table of what steerfast takes from vLLM, against the vLLM that is installed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from steerfast.vllm import compat
from steerfast.vllm.compat import PATHS, RUNNER_SEAMS, SEAMS, WEIGHT_SEAMS, Seam

ROOM = Path(compat.__file__).parent


@pytest.mark.parametrize("seam", [*SEAMS, *RUNNER_SEAMS, *WEIGHT_SEAMS], ids=lambda seam: f"{seam.owner}.{seam.name}")
def test_each_seam_is_there(seam: Seam) -> None:
    compat.check_seam(seam)


@pytest.mark.parametrize("name", PATHS)
def test_each_name_is_there(name: str) -> None:
    assert getattr(compat, name).__name__ == PATHS[name].partition(":")[2]


def test_no_name_is_in_the_table_for_nothing() -> None:
    text = "\n".join(path.read_text() for path in ROOM.glob("*.py"))
    seams = {seam.owner for seam in (*SEAMS, *RUNNER_SEAMS, *WEIGHT_SEAMS)}
    assert [name for name in PATHS if name not in seams and f"compat.{name}" not in text] == []


def test_vllm_is_imported_by_the_table_alone() -> None:
    statement = re.compile(r"^\s*(from|import) vllm\b", re.MULTILINE)
    assert [path.name for path in ROOM.glob("*.py") if statement.search(path.read_text())] == []


class Changed:
    """A class of another version."""

    def __init__(self) -> None:
        self.kept = 1

    def renamed(self, req: Any) -> None: ...

    def longer(self, request: Any, more: Any) -> None: ...


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATHS, "Request", f"{__name__}:Changed")
    monkeypatch.setattr(compat.importlib, "import_module", lambda name: SimpleNamespace(
        Changed=Changed, __version__="0.99.1"
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "got"),
    [
        ("renamed", ("self", "request"), r"got \(self, req\)"),
        ("longer", ("self", "request"), r"got \(self, request, more\)"),
        ("longer", ("self", "more", "*"), r"got \(self, request, more\)"),
        ("gone", ("self", "*"), "found none"),
        ("gone", None, "found none"),
    ],
)
def test_a_changed_seam_is_refused_by_name(changed: None, name: str, parameters: Any, got: str) -> None:
    seam = Seam("Request", name, parameters, "wrapped: as an example")
    expected = (
        rf"^vllm: expected .*Changed\.{name}.* \(wrapped: as an example\), {got} in version 0\.99\.1; install vLLM"
    )
    with pytest.raises(AttributeError, match=expected):
        compat.check([seam])


def test_what_did_not_change_is_not_refused(changed: None) -> None:
    compat.check([
        Seam("Request", "kept", None, ""),
        Seam("Request", "renamed", ("self", "req"), ""),
        Seam("Request", "longer", ("self", "request", "*"), ""),
    ])  # fmt: skip


def test_a_name_that_moved_is_refused_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATHS, "Request", "vllm.v1.request:NoRequest")
    with pytest.raises(AttributeError, match=r"^vllm: expected vllm\.v1\.request:NoRequest"):
        compat.check([seam for seam in SEAMS if seam.owner == "Request"])
    monkeypatch.setitem(PATHS, "Request", "vllm.v1.no_request:Request")
    with pytest.raises(AttributeError, match=r"^vllm: expected vllm\.v1\.no_request:Request"):
        compat.Request  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        compat.Nothing  # noqa: B018


def test_only_what_is_in_the_table_is_wrapped() -> None:
    for name in ("is_finished", "block_hashes"):
        with pytest.raises(KeyError, match=f"Request.{name}: expected a method"):
            compat.around("Request", name)


def test_a_method_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        def update_block_hashes(self) -> int:
            return 1

    monkeypatch.setattr(compat, "__getattr__", lambda name: Mine)
    for _ in range(2):

        @compat.around("Request", "update_block_hashes")
        def update(original: Any, self: Any) -> int:
            return 10 * original(self)

    assert Mine().update_block_hashes() == 10


@pytest.mark.parametrize(("version", "warnings"), [("0.32.0", 0), ("0.32.1+cpu", 0), ("0.33.0", 1), ("0.320.0", 1)])
def test_an_untested_version_warns_once(monkeypatch: pytest.MonkeyPatch, version: str, warnings: int) -> None:
    messages: list[str] = []
    monkeypatch.setattr(compat, "_version", lambda: version)
    monkeypatch.setattr(compat._log, "warning", lambda text, *values: messages.append(text % values))
    compat.check_version.cache_clear()
    for _ in range(2):
        compat.check_version()
    compat.check_version.cache_clear()
    assert messages == [f"steerfast was tested with vLLM 0.32, not with {version}"] * warnings

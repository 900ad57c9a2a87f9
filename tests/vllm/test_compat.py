"""The table of what steerfast takes from vLLM, against the vLLM that is installed."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from steerfast.vllm import compat, server
from steerfast.vllm.compat import PATHS, RUNNER_SEAMS, SEAMS, TESTED, WEIGHT_SEAMS, Seam

ROOM = Path(compat.__file__).parent


@pytest.mark.parametrize("seam", [*SEAMS, *RUNNER_SEAMS, *WEIGHT_SEAMS], ids=lambda seam: f"{seam.owner}.{seam.name}")
def test_each_seam_is_there(seam: Seam) -> None:
    if seam.since and not compat.has(f"{seam.owner}.{seam.name}"):
        assert seam.difference(getattr(compat, seam.owner)) == "found none"
    else:
        compat.check_seam(seam)


@pytest.mark.parametrize("name", PATHS)
def test_each_name_is_there(name: str) -> None:
    if compat.has(name):
        assert getattr(compat, name).__name__ == str(compat.path_of(name)).partition(":")[2]
        return
    for path in [path for path in PATHS[name].values() if path is not None]:
        module, _, attribute = path.partition(":")
        with pytest.raises((ModuleNotFoundError, AttributeError)):
            getattr(importlib.import_module(module), attribute)


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


@pytest.mark.parametrize(
    ("version", "warnings"),
    [("0.26.0", 0), ("0.32.1+cpu", 0), ("0.33.0", 0), ("0.27.1", 1), ("0.34.0rc1", 1), ("0.320.0", 1), ("dev", 1)],
)
def test_an_untested_version_warns_once(monkeypatch: pytest.MonkeyPatch, version: str, warnings: int) -> None:
    messages: list[str] = []
    monkeypatch.setattr(compat, "_version", lambda: version)
    monkeypatch.setattr(compat._log, "warning", lambda text, *values: messages.append(text % values))
    compat.check_version.cache_clear()
    for _ in range(2):
        compat.check_version()
    compat.check_version.cache_clear()
    assert messages == [f"steerfast was tested with vLLM 0.26, 0.32, 0.33, not with {version}"] * warnings


# ---- differences between versions ----------------------------------------------------------------


OLD, NEW = "vllm.entrypoints.serve.utils.api_utils:cli_env_setup", "vllm.entrypoints.common.startup:cli_env_setup"
LOGGING = "vllm.logger:configure_logging_from_args"


def test_the_bounds_of_the_extra_are_those_of_the_table() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOM.parents[1] / "pyproject.toml").read_text())["project"]
    newest = int(TESTED[-1].removeprefix("0."))
    assert project["optional-dependencies"]["serve"] == [f"vllm>={TESTED[0]},<0.{newest + 1}"]
    for paths in PATHS.values():
        assert isinstance(paths, str) or next(iter(paths)) == TESTED[0], "a table of versions starts with the oldest"


@pytest.mark.parametrize(
    ("version", "setup", "logging", "ahead"),
    [
        ("0.26.0", OLD, None, False),
        ("0.31.2", OLD, None, False),
        ("0.32.0+cpu", OLD, LOGGING, False),
        ("0.33.0", NEW, LOGGING, True),
        ("0.34.0rc1.dev7+g1", NEW, LOGGING, True),
        ("1.0.0", NEW, LOGGING, True),
        ("0.1.dev1+g123", NEW, LOGGING, True),  # built from a clone without tags
        ("dev", NEW, LOGGING, True),
    ],
)
def test_each_version_has_its_names(
    monkeypatch: pytest.MonkeyPatch, version: str, setup: str, logging: str | None, ahead: bool
) -> None:
    monkeypatch.setattr(compat, "_version", lambda: version)
    assert compat.path_of("cli_env_setup") == setup
    assert compat.path_of("configure_logging_from_args") == logging
    assert compat.has("configure_logging_from_args") == (logging is not None)
    assert compat.has("cli_env_setup")
    assert compat.has("Scheduler.num_hash_lookahead_tokens") == ahead
    assert compat.has("Request.num_tokens")
    assert not compat.has("Request.nothing")


def test_a_seam_of_later_versions_is_checked_from_there_on(changed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Seam("Request", "gone", None, "read: as an example", since="0.33")
    monkeypatch.setattr(compat, "_version", lambda: "0.32.9")
    compat.check([gone])
    monkeypatch.setattr(compat, "_version", lambda: "0.33.0")
    with pytest.raises(AttributeError, match=r"Changed\.gone \(read: as an example\), found none in version 0\.33\.0"):
        compat.check([gone])


def test_a_name_that_this_version_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_version", lambda: "0.26.0")
    with pytest.raises(
        AttributeError, match=r"configure_logging_from_args .*found none in version 0\.26\.0; install vLLM 0"
    ):
        compat.configure_logging_from_args  # noqa: B018


@pytest.mark.parametrize(("version", "path"), [("0.26.0", OLD), ("0.32.0", OLD), ("0.33.0", NEW)])
def test_a_server_starts_with_the_names_of_its_version(
    monkeypatch: pytest.MonkeyPatch, version: str, path: str
) -> None:
    calls: list[str] = []

    class Command:
        def subparser_init(self, subparsers: Any) -> None:
            parser = subparsers.add_parser("serve")
            parser.add_argument("model")
            parser.set_defaults(additional_config=None)

        def validate(self, args: Any) -> None:
            calls.append("validate")

        def cmd(self, args: Any) -> None:
            calls.append(f"serve {args.model} {args.additional_config}")

    def find(module: str) -> Any:
        return SimpleNamespace(
            ServeSubcommand=Command,
            FlexibleArgumentParser=argparse.ArgumentParser,
            cli_env_setup=lambda: calls.append(module),
            configure_logging_from_args=lambda args: calls.append("logging"),
        )

    monkeypatch.setattr(compat, "_version", lambda: version)
    monkeypatch.setattr(compat.importlib, "import_module", find)
    server.serve("some/model", {"default": "safety"})
    logging = ["logging"] if version != "0.26.0" else []
    served = "serve some/model {'steerfast': {'default': 'safety'}}"
    assert calls == [path.partition(":")[0], *logging, "validate", served]

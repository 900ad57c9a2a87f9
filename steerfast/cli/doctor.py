"""`steerfast doctor`."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import click

from steerfast._versions import installed_version
from steerfast.cli import common, option
from steerfast.cli.server_probe import NOT_STEERED, STEERED, UNREACHABLE, probe
from steerfast.errors import first_line

_STATUS = {STEERED: 0, NOT_STEERED: 1, UNREACHABLE: 2}
_PACKAGES = ("torch", "triton", "transformers", "safetensors")


@click.command("doctor")
@option.value(
    "--url", option.Kind("URL"), "Ask the server at this address whether it steers, such as http://host:8000."
)
@click.option(
    "--api-key", metavar="KEY", envvar="VLLM_API_KEY", show_envvar=True, help="The key that the server asks for."
)
@option.json_file
@click.pass_context
def command(context: click.Context, url: str | None, api_key: str | None, json_file: str | None) -> None:
    """Show what is installed, and test the ops; or ask a running server.

    Every op implementation that is live here is checked against a float64 reference.
    Needs no model. Exit status 1 where a check fails.

    With --url: whether that vLLM server steers. The command asks it for its metrics, and for a
    profile that cannot exist: a server that steers refuses. Exit status 0: the server steers.
    1: it does not. 2: no server answers.

    \b
    Example:
      steerfast doctor
      steerfast doctor --json doctor.json
      steerfast doctor --url http://localhost:8000
    """
    common.check_outputs({"--json": json_file})
    if url is not None:
        context.exit(_ask_server(url, api_key, json_file))
    from steerfast import __version__, _native
    from steerfast.kernels import contract, selftest

    isa, isa_problem = _isa()
    found = selftest.implementations(_native.reason)
    checks = [check for each in found if each.absent is None for check in selftest.self_test(each)]
    passed = all(check.passed for check in checks)
    result: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "steerfast": __version__,
            **{package: installed_version(package) for package in _PACKAGES},
        },
        "platform": platform.platform(),
        "gpus": _gpus(),
        "cpu_isa": isa,
        "implementations": {op: contract.implementations(op) for op in selftest.OPS},
        "absent": {each.name: each.absent for each in found if each.absent is not None},
        "self_test": [asdict(check) for check in checks],
        "passed": passed,
    }
    common.write_json(json_file, result)
    _render(result, isa_problem, json_file)
    context.exit(0 if passed else 1)


def _ask_server(url: str, key: str | None, json_file: str | None) -> int:
    """Print what a server says, and return the exit status."""
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--url: expected http://... or https://..., got {url!r}")
    found = probe(url.rstrip("/").removesuffix("/v1"), key)
    common.write_json(json_file, asdict(found))
    versions = {"vLLM": found.vllm, "steerfast": (found.info or {}).get("version")}
    known = [f"{name} {version}" for name, version in versions.items() if version is not None]
    if (found.info or {}).get("locked") == "true":
        known.append("locked")
    about = f" ({', '.join(known)})" if known else ""
    common.console(json_file).print(
        f"{found.url}: {found.verdict}{about}: {found.reason}", markup=False, soft_wrap=True
    )
    return _STATUS[found.verdict]


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30, 1)}
        for gpu in found
    ]


def _isa() -> tuple[str | None, str | None]:
    """Return the C++ ops' instruction set, and the reason if the requested one cannot be used."""
    from steerfast import _native

    try:
        return _native.isa(), _native.reason
    except RuntimeError as error:
        return None, first_line(error)


def _render(result: dict[str, Any], isa_problem: str | None, json_file: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from steerfast.cli.rendering import new_table

    facts = {name: found or "not installed" for name, found in result["versions"].items()}
    facts["platform"] = result["platform"]
    gpus = ("{name} (compute capability {capability}, {memory_gib} GiB)".format(**gpu) for gpu in result["gpus"])
    facts["GPUs"] = "; ".join(gpus) or "none"
    facts["C++ ops"] = result["cpu_isa"] or f"none: {isa_problem}"
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(f"[bold]{name}", escape(text))

    table = new_table("op", "implementation", "rows", "largest error", "allowed there", "self-test")
    for name, reason in result["absent"].items():
        table.add_row("all", name, "", "", "", f"not live: {escape(reason)}")
    for check in result["self_test"]:
        if check["problem"]:
            figures, verdict = ["", ""], f"[bold red]failed: {escape(check['problem'])}"
        else:
            figures = [f"{check['max_error']:.2e}", f"{check['tolerance']:.2e}"]
            verdict = "[green]passed" if check["passed"] else "[bold red]failed"
        table.add_row(check["op"], check["implementation"], check["dtype"], *figures, verdict)

    console = common.console(json_file)
    console.print(grid)
    console.print(table)

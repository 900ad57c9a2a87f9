"""examples/deploy: the files parse, and name commands, options and metrics that exist."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

pytest.importorskip("vllm")

import vllm.v1.metrics
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from steerfast.cli import main
from steerfast.vllm import compat
from steerfast.vllm.metrics import metrics

FOLDER = Path(__file__).parents[2] / "examples" / "deploy"


# ---- the dashboard -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def queried(dashboard: dict[str, Any]) -> set[str]:
    """The metrics that panels and variables ask for."""
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return set(re.findall(r"\b(?:vllm:|steerfast_)\w+", " ".join(queries)))


def steerfast_metrics() -> list[Metric]:
    metrics().know(["any"])
    return [metric for metric in REGISTRY.collect() if metric.name.startswith("steerfast_")]


def samples(name: str, kind: str) -> set[str]:
    """The names at /metrics of a metric."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
    return {name + suffix for suffix in suffixes}


def test_every_metric_of_steerfast_has_a_panel(dashboard: dict[str, Any]) -> None:
    shown = json.dumps([panel.get("targets") for panel in dashboard["panels"]])
    missing = [each.name for each in steerfast_metrics() if not any(s in shown for s in samples(each.name, each.type))]
    assert not missing


def test_every_metric_that_is_asked_for_exists(queried: set[str]) -> None:
    known = set().union(*(samples(each.name, each.type) for each in steerfast_metrics()))
    sources = "".join(path.read_text() for path in Path(vllm.v1.metrics.__path__[0]).glob("*.py"))
    for name, kind in re.findall(r"_(gauge|counter|histogram)_cls\(\s*name=\"(vllm:\w+)\"", sources):
        known |= samples(kind, name)
    assert any(name.startswith("vllm:") for name in queried)
    assert queried <= known, queried - known


def test_the_data_source_is_a_variable(dashboard: dict[str, Any]) -> None:
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"

    def sources(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            if "datasource" in value:
                yield value["datasource"]
            for each in value.values():
                yield from sources(each)
        elif isinstance(value, list):
            for each in value:
                yield from sources(each)

    found = list(sources(dashboard))
    assert found == [{"type": "prometheus", "uid": "${datasource}"}] * len(found) != []
    used = set(re.findall(r"\$(?:\{(\w+)\}|(\w+))", json.dumps(dashboard)))
    assert {a or b for a, b in used} - {"__all", "__rate_interval"} <= set(variables)


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken = [
        (x, y)
        for box in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(taken) == len(set(taken))
    assert all(0 <= x < 24 for x, _ in taken)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# ---- the unit and the manifest -------------------------------------------------------------------


def check_command(words: list[str]) -> None:
    """Check that `steerfast` and vLLM parse a command."""
    assert words[0] == "serve"
    command = main.get_command(click.Context(main), "serve")
    assert command is not None
    given = command.make_context("serve", words[1:]).params
    parser, serve = compat.FlexibleArgumentParser(), compat.ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", given["model_name"], *given["vllm_arguments"]])
    assert args.port == 8000


def test_the_unit_starts_a_command_that_exists(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    text = (FOLDER / "steerfast.service").read_text("utf-8").replace("\\\n", " ")
    unit.read_string(text)
    assert unit.sections() == ["Unit", "Service", "Install"]
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "steerfast"
    check_command(words)
    if shutil.which("systemd-analyze"):
        (tmp_path / "steerfast.service").write_text(text.replace(program, "/bin/true"))
        subprocess.run(["systemd-analyze", "verify", str(tmp_path / "steerfast.service")], check=True)
    assert "curl -sf http://127.0.0.1:8000/health" in text


def test_the_manifest_starts_a_command_that_exists() -> None:
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text("utf-8"))
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    check_command(["serve", *container["args"]])
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["spec"]["volumes"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_the_image_has_a_tested_version_of_vllm() -> None:
    lines = (FOLDER / "Dockerfile").read_text("utf-8").splitlines()
    (image,) = (line for line in lines if line.startswith("FROM"))
    assert any(image.startswith(f"FROM vllm/vllm-openai:v{version}.") for version in compat.TESTED)
    assert lines[-1] == 'ENTRYPOINT ["steerfast", "serve"]'

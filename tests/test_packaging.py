"""What an installation holds: wheels built from a copy of the sources, and what an import brings along.

Workflows of a code host call targets of the Makefile, and no more.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import steerfast
from steerfast import _native

ROOT = Path(__file__).parent.parent
SOURCES = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "NOTICE",
    "csrc",
    "kernels",
    "steerfast",
]
SOURCES += ["tests"]
MATRIX = runpy.run_path(str(ROOT / "dev/matrix.py"))
CORNERS = ("oldest", "newest")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, without anything built."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy(source, folder)
    return folder


def build(checkout: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Build a wheel with what is installed here; its messages, and the wheel if it came about."""
    target = checkout.parent / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(target),
        ".",
    ]
    result = subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return result, sorted(target.glob("*.whl"))


def install(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def run_installed(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the unpacked wheel, from a folder without ours in it, past any editable install."""
    script = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n{script}"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


STEER_ONE_ROW = """
import torch, steerfast
from steerfast import _native
from steerfast.kernels.steer import steer_
from steerfast.kernels.contract import TABLE_WIDTH, Operands
x, table, slots = torch.zeros(1, 8), torch.zeros(1, TABLE_WIDTH), torch.zeros(1, 1, dtype=torch.int32)
vector = torch.ones(1, 8)
steer_(x, None, Operands(slots, torch.full((1, 1), 2.0), vector, vector, table))
assert x.tolist() == [[2.0] * 8]
print(steerfast.__file__, _native.available, _native.isa(), _native.reason)
"""


def test_pure_wheel(checkout: Path, tmp_path: Path) -> None:
    result, wheels = build(checkout, STEERFAST_BUILD="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"steerfast", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    kernels = {f"steerfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels == {name for name in names if name.startswith("steerfast/kernels/")}
    assert "steerfast/kernels/steer.py" in kernels
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "steerfast").rglob("*.py")}
    package |= {str(path.relative_to(ROOT)) for path in (ROOT / "steerfast/data").rglob("*") if path.is_file()}
    assert package <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h"))]
    about = f"steerfast-{steerfast.__version__}.dist-info"
    assert {f"{about}/licenses/LICENSE", f"{about}/licenses/NOTICE", f"{about}/entry_points.txt"} <= set(names)
    assert MATRIX["oldest_requirements"](wheel) == ("torch==2.10.*", "transformers==5.17.*")

    install(wheel, tmp_path / "site")
    result = run_installed(tmp_path / "site", STEER_ONE_ROW)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout
    assert "False None this installation was built without them" in result.stdout


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_says_so(checkout: Path) -> None:
    result, wheels = build(checkout, STEERFAST_BUILD="auto", CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert [wheel.name.endswith("-py3-none-any.whl") for wheel in wheels] == [True]
    said = [line.strip() for line in (result.stdout + result.stderr).splitlines() if "without the C++ ops" in line]
    assert set(said) == {
        "steerfast: installing without the C++ ops: the C++ compiler '/nonexistent/c++' does not run "
        "(No such file or directory)"
    }


def test_a_build_that_was_asked_for_fails_loudly(checkout: Path) -> None:
    result, wheels = build(checkout, STEERFAST_BUILD="cpu", CXX="/nonexistent/c++")
    assert result.returncode != 0
    assert wheels == []
    assert "STEERFAST_BUILD=cpu: the C++ ops cannot be built" in result.stdout + result.stderr


def test_an_unknown_build_is_refused(checkout: Path) -> None:
    result, wheels = build(checkout, STEERFAST_BUILD="tpu")
    assert result.returncode != 0
    assert wheels == []
    assert "STEERFAST_BUILD: expected auto, cpu or 0, got 'tpu'" in result.stdout + result.stderr


@pytest.mark.slow
def test_native_wheel_serves_every_python(checkout: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    result, wheels = build(checkout, STEERFAST_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels
    assert "-cp310-abi3-" in wheel.name
    install(wheel, tmp_path / "site")
    assert (tmp_path / "site/steerfast/_C.abi3.so").exists()
    result = run_installed(tmp_path / "site", STEER_ONE_ROW)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout
    assert any(f"True {isa} None" in result.stdout for isa in ("avx512", "avx2", "scalar"))


@pytest.mark.slow
def test_checkout_works_from_its_own_folder(checkout: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = f"{STEER_ONE_ROW}\nimport sys; assert 'kernels' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert str(checkout) in result.stdout


def test_sdist_holds_what_a_build_needs(checkout: Path) -> None:
    (checkout / "steerfast/_C.abi3.so").touch()
    script = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    environment = {**os.environ, "STEERFAST_BUILD": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=checkout, env=environment, capture_output=True, check=True)
    with tarfile.open(checkout / f"dist/steerfast-{steerfast.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = [path for name in SOURCES for path in (checkout / name, *(checkout / name).rglob("*")) if path.is_file()]
    assert {str(path.relative_to(checkout)) for path in kept} - names == {"steerfast/_C.abi3.so"}


def test_the_version_stands_in_one_place() -> None:
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.MULTILINE)
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "dev/wheels.sh"):
        assert steerfast.__version__ not in (ROOT / name).read_text("utf-8"), name


def test_the_matrix_has_two_corners() -> None:
    oldest = ("torch==2.10.*", "transformers==5.17.*")
    pythons = {"3.10": "python3.10", "3.12": "python3.12", "3.13": "python3.13"}
    cases = {only: [str(case) for case in MATRIX["make_cases"](pythons, oldest, only)] for only in (None, *CORNERS)}
    assert cases["oldest"] == ["Python 3.10, torch==2.10.*, transformers==5.17.*"]
    assert cases["newest"] == ["Python 3.13, newest packages"]
    assert cases[None] == [*cases["oldest"], *(f"Python {version}, newest packages" for version in pythons)]


def test_an_installation_is_tried_as_a_whole(tmp_path: Path) -> None:
    def smoke(kind: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "dev/smoke.py"), kind]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    kinds = ["compiled", "pure"] if _native.available else ["pure", "compiled"]
    right, wrong = map(smoke, kinds)
    assert right.returncode == 0, right.stderr
    assert f"steerfast {steerfast.__version__} " in right.stdout
    assert wrong.returncode == 1
    assert f"expected a {kinds[1]} wheel" in wrong.stderr


def test_import_takes_no_foreign_name() -> None:
    script = "import steerfast, steerfast.kernels.steer, sys; sys.exit('kernels' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert result.returncode == 0


# -- Workflows and issue forms -----------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = {target for line in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, flags=re.MULTILINE) for target in line.split()}
WORKFLOWS = {path.name: path.read_text("utf-8") for path in sorted((ROOT / ".github/workflows").iterdir())}
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def steps(workflow: str) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(WORKFLOWS[workflow])["jobs"].values() for step in job["steps"]]


def test_there_is_a_workflow_of_each_kind() -> None:
    assert set(WORKFLOWS) == {"docs.yml", "lint.yml", "test.yml", "vllm.yml", "wheels.yml"}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_runs_targets_of_the_makefile(workflow: str) -> None:
    commands = [step["run"].split() for step in steps(workflow) if "run" in step]
    assert commands
    for make, target, *variables in commands:
        assert make == "make"
        assert target in TARGETS
        for name in (variable.partition("=")[0] for variable in variables if "=" in variable):
            assert f"$({name})" in MAKEFILE, name


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_may_only_read(workflow: str) -> None:
    content = yaml.safe_load(WORKFLOWS[workflow])
    assert content["permissions"] == {"contents": "read"}
    assert not [job for job in content["jobs"].values() if "permissions" in job or "timeout-minutes" not in job]
    assert "secrets" not in WORKFLOWS[workflow]
    used = [step for step in steps(workflow) if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v[0-9]+", step["uses"]) for step in used)
    assert all(step["with"]["persist-credentials"] is False for step in used if "checkout" in step["uses"])


def test_workflows_run_the_versions_that_are_tested() -> None:
    def matrix(workflow: str, job: str) -> dict[str, Any]:
        return yaml.safe_load(WORKFLOWS[workflow])["jobs"][job]["strategy"]["matrix"]

    script = (ROOT / "dev/test_vllm.sh").read_text("utf-8")
    assert matrix("vllm.yml", "vllm")["vllm"] == re.findall(r"^  ([\d.]+)\) torch=", script, flags=re.MULTILINE)
    assert [each["corner"] for each in matrix("wheels.yml", "corner")["include"]] == list(CORNERS)
    pythons = [each["python"] for each in matrix("wheels.yml", "corner")["include"]]
    assert pythons == [MATRIX["PYTHONS"][0], MATRIX["PYTHONS"][-1]]


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "config.yml"], ids=lambda form: form.name)
def test_an_issue_shows_what_is_installed(form: Path) -> None:
    content = yaml.safe_load(form.read_text("utf-8"))
    assert {"name", "description", "body"} <= set(content)
    assert (
        "`steerfast doctor`"
        in next(part for part in content["body"] if part.get("id") == "doctor")["attributes"]["label"]
    )

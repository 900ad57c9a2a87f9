"""Install wheels into empty environments and use them there.

    python dev/matrix.py                    the wheels of dist/, on every Python that is found
    python dev/matrix.py --only oldest      the oldest Python, with the oldest torch and transformers that it takes
    python dev/matrix.py --only newest      the newest Python, with the newest

Without --only, each Python gets the newest packages, too. pip may build nothing: no package may need a compiler.
An environment is removed after its use: with a CUDA build of torch it takes 7 GB. Exit status 1 where a wheel fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Case:
    """One environment: a version of Python, and what pip is asked for beside the wheel."""

    version: str
    python: str
    requirements: tuple[str, ...]

    def __str__(self) -> str:
        return f"Python {self.version}, {', '.join(self.requirements) or 'newest packages'}"


def find_python(version: str) -> str | None:
    """Return an interpreter of this version that starts, on the path or of pyenv; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    for python in filter(None, found):
        command = [python, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.stdout.strip() == version:
            return python
    return None


def oldest_requirements(wheel: Path) -> tuple[str, ...]:
    """Return the lower bounds of torch and transformers in the wheel's metadata, as ``torch==2.10.*``."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    found = {package: re.search(rf"^Requires-Dist: {package}\b.*>=([\d.]+)", metadata, re.M) for package in PACKAGES}
    return tuple(f"{package}=={bound[1]}.*" for package, bound in found.items() if bound)


def make_cases(pythons: dict[str, str], oldest: tuple[str, ...], only: str | None = None) -> list[Case]:
    """Return the cases of these Pythons, in the order of versions, or one corner of them."""
    newest = [Case(version, python, ()) for version, python in pythons.items()]
    corner = replace(newest[0], requirements=oldest)
    return {"oldest": [corner], "newest": newest[-1:], None: [corner, *newest]}[only]


def try_wheels(case: Case, wheels: Sequence[Path], folder: Path) -> list[str]:
    """Install each wheel and run dev/smoke.py; return what failed."""
    subprocess.run([case.python, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary", ":all:"]
    failed = []
    for number, wheel in enumerate(wheels):
        again = ["--no-deps", "--force-reinstall"] if number else []
        kind = "pure" if wheel.name.endswith("-none-any.whl") else "compiled"
        steps: list[list[str | Path]] = [
            [*pip, *again, wheel, *([] if again else case.requirements)],
            [python, "-I", ROOT / "dev/smoke.py", kind],
        ]
        for step in steps:
            if subprocess.run(step, cwd=folder, check=False).returncode:
                failed.append(f"{case}: {wheel.name}")
                break
    return failed


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path, help="default: those of dist/")
    parser.add_argument("--only", choices=("oldest", "newest"), help="one corner")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="VERSION", help="such as 3.10 3.13")
    options = parser.parse_args(arguments)
    wheels = [wheel.resolve() for wheel in options.wheels or sorted(ROOT.glob("dist/*.whl"))]
    if not wheels:
        parser.error("dist/: expected wheels, found none; `make wheels` builds them")
    found = {version: find_python(version) for version in options.pythons}
    pythons = {version: python for version, python in found.items() if python}
    for version in found.keys() - pythons.keys():
        print(f"Python {version}: not found, left out", flush=True)
    if not pythons:
        parser.error(f"Python: expected one of {', '.join(options.pythons)}, found none")

    failed, cases = [], make_cases(pythons, oldest_requirements(wheels[0]), options.only)
    for case in cases:
        print(f"== {case}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            failed += try_wheels(case, wheels, Path(folder))
    print(f"{len(cases) * len(wheels) - len(failed)} passed, {len(failed)} failed", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

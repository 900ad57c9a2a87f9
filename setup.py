"""Say where the packages lie, and build the optional C++ ops. Everything else stands in pyproject.toml.

``STEERFAST_BUILD`` decides about the ops:
    auto (default)  build them if torch and a C++ compiler are there; otherwise print why they are left out
    cpu             build them or fail
    0               do not build them
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

SOURCES = ["csrc/ops.cpp", "csrc/cpu/steer.cpp"]
HEADERS = ["csrc/contract.h", "csrc/checks.h", "csrc/cpu/steer.h", "csrc/cpu/rows.h"]
MACROS = [
    ("Py_LIMITED_API", "0x030a0000"),  # one binary for every Python from 3.10 on
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # and for every torch from 2.10 on
]
# No product may fuse with a sum: only then are the bits those of the other implementations. -g0: an eighth of the size.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]

PROBE = """
#include <Python.h>
#include <torch/csrc/stable/library.h>
typedef float Floats __attribute__((vector_size(16)));
Floats twice(Floats x) { return x + x; }
"""


def obstacle() -> str | None:
    """Compile a small file like those of the ops; return why that fails, None where it works."""
    try:
        from torch.utils.cpp_extension import include_paths
    except ImportError as error:
        return f"torch is not importable here ({error}); install with --no-build-isolation"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    macros = [f"-D{name}={value}" for name, value in MACROS]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text(PROBE)
        files = ["-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        command = [*compiler, *FLAGS, "-fPIC", *macros, *includes, *files]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C++ compiler {compiler[0]!r} does not run ({error.strerror})"
        if result.returncode:
            message = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            return f"the C++ compiler {compiler[0]!r} cannot build for torch ({message})"
    return None


def extension() -> dict[str, Any]:
    """Return the arguments of setup() that build the C++ ops."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    module = CppExtension(
        "steerfast._C",
        SOURCES,
        depends=HEADERS,
        define_macros=MACROS,
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def native() -> dict[str, Any]:
    """Return the arguments of setup() for the C++ ops, as ``STEERFAST_BUILD`` asks.

    The decision falls before setup() runs: an extension that fails later leaves a wheel that is tagged for this
    platform and holds no library.
    """
    choice = os.environ.get("STEERFAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "0"):
        sys.exit(f"STEERFAST_BUILD: expected auto, cpu or 0, got {choice!r}")
    if choice == "0":
        return {}
    why = obstacle()
    if why is None:
        return extension()
    if choice == "cpu":
        sys.exit(f"STEERFAST_BUILD=cpu: the C++ ops cannot be built: {why}")
    print(f"steerfast: installing without the C++ ops: {why}", file=sys.stderr)
    return {}


# kernels/ lies beside the package and has no __init__.py, so that a program started from this folder never takes it
# for the distribution `kernels`. The folders of data have none either; setuptools wants them listed.
packages = [*find_packages(include=["steerfast", "steerfast.*"]), "steerfast.kernels"]
packages += ["steerfast.data", "steerfast.data.prompts"]

setup(packages=packages, package_dir={"steerfast.kernels": "kernels"}, **native())

"""Where the packages lie, and the optional compiled ops. Everything else stands in pyproject.toml.

``STEERFAST_BUILD`` decides about them:
    auto (default)  build the C++ ops if torch and a C++ compiler are there, and the CUDA op if that torch has CUDA and
                    nvcc is there too; say in a line what is left out and why
    cpu             build the C++ ops or fail
    cuda            build the C++ ops and the CUDA op or fail
    0               build nothing
``TORCH_CUDA_ARCH_LIST`` names the GPUs to build for, as for every torch extension.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

SOURCES = ["csrc/ops.cpp", "csrc/cpu/steer.cpp"]
HEADERS = ["csrc/contract.h", "csrc/checks.h", "csrc/cpu/steer.h", "csrc/cpu/rows.h"]
CUDA_SOURCES = ["csrc/cuda/steer.cu"]
CUDA_HEADERS = ["csrc/contract.h", "csrc/checks.h", "csrc/cuda/steer.cuh"]
CUDA_ARCHITECTURES = [
    "8.0",
    "9.0",
    "10.0",
    "12.0",
]  # as far as nvcc knows them; the last one also as PTX, for later GPUs
MACROS = [
    ("Py_LIMITED_API", "0x030a0000"),  # one binary for every Python from 3.10 on
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # and for every torch from 2.10 on
]
# No product may fuse with a sum: that is what makes the bits equal those of the other implementations.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]

PROBE = """
#include <Python.h>
#include <torch/csrc/stable/library.h>
typedef float Floats __attribute__((vector_size(16)));
Floats twice(Floats x) { return x + x; }
"""


def obstacle() -> str | None:
    """Why the C++ ops cannot be built here, or None: found out by compiling a small file like theirs."""
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
        command = [
            *compiler,
            *FLAGS,
            "-fPIC",
            *macros,
            *includes,
            "-c",
            str(probe),
            "-o",
            str(probe.with_suffix(".o")),
        ]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C++ compiler {compiler[0]!r} does not run ({error.strerror})"
        if result.returncode:
            message = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            return f"the C++ compiler {compiler[0]!r} cannot build for torch ({message})"
    return None


def nvcc() -> str | None:
    """The CUDA compiler that torch uses: it looks at CUDA_HOME, PATH and /usr/local/cuda, if it is built with CUDA."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")) if CUDA_HOME else None


def cuda_obstacle() -> str | None:
    """Why the CUDA op cannot be built here, or None, where the C++ ops can be."""
    import torch

    compiler = nvcc()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if compiler is None:
        return "there is no nvcc"
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"{compiler} is of CUDA {release[1] if release else 'unknown'}, torch of CUDA {torch.version.cuda}"
    return None


def cuda_architectures() -> str:
    """Those of CUDA_ARCHITECTURES that nvcc knows, as torch takes them from TORCH_CUDA_ARCH_LIST."""
    known = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known) + "+PTX"


def extensions(cuda: bool) -> dict[str, Any]:
    """The arguments of setup() that build the C++ ops, and the CUDA op with them."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    modules = [
        CppExtension(
            "steerfast._C",
            SOURCES,
            depends=HEADERS,
            define_macros=MACROS,
            extra_compile_args={"cxx": FLAGS},
            py_limited_api=True,
        )
    ]
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures())
        modules.append(
            CUDAExtension(
                "steerfast._C_cuda",
                CUDA_SOURCES,
                depends=CUDA_HEADERS,
                define_macros=[*MACROS, ("USE_CUDA", None)],
                extra_compile_args={"cxx": FLAGS, "nvcc": ["-std=c++17", "-O3"]},
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def native() -> dict[str, Any]:
    """The arguments of setup() for the compiled ops, as ``STEERFAST_BUILD`` asks. Settled before setup() runs: an
    extension that fails later would leave a wheel tagged for this platform without a library in it."""
    choice = os.environ.get("STEERFAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "0"):
        sys.exit(f"STEERFAST_BUILD: expected auto, cpu, cuda or 0, got {choice!r}")
    if choice == "0":
        return {}
    why = obstacle()
    if why is not None:
        if choice != "auto":
            sys.exit(f"STEERFAST_BUILD={choice}: the C++ ops cannot be built: {why}")
        print(f"steerfast: installing without the C++ ops: {why}", file=sys.stderr)
        return {}
    if choice == "cpu":
        return extensions(cuda=False)
    why = cuda_obstacle()
    if why is not None:
        if choice == "cuda":
            sys.exit(f"STEERFAST_BUILD=cuda: the CUDA op cannot be built: {why}")
        print(f"steerfast: installing without the CUDA op: {why}", file=sys.stderr)
    return extensions(cuda=why is None)


# kernels/ lies beside the package and has no __init__.py, so that a program started from this folder never takes it
# for the distribution `kernels`. The folders of data have none either; setuptools wants them listed.
packages = [*find_packages(include=["steerfast", "steerfast.*"]), "steerfast.kernels"]
packages += ["steerfast.data", "steerfast.data.prompts"]

setup(packages=packages, package_dir={"steerfast.kernels": "kernels"}, **native())

"""The launch path over Triton's real Python launcher and C function, for each Triton release that is at hand.

The driver is a libcuda made here, which launches nothing: it writes down pointers, and counts how often it is asked
about one. Beside the installed Triton, the tests run with the unpacked wheels that STEERFAST_TEST_TRITON names:

    pip download --no-deps triton==3.7.0 && unzip -q triton-3.7.0-*.whl -d triton-3.7.0
    STEERFAST_TEST_TRITON=triton-3.7.0 pytest tests/kernels/test_triton_versions.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_launch_path import STUB

from steerfast.kernels.launch import TESTED_TRITON

COMPILER = shutil.which("cc") or shutil.which("gcc")
HEADER = Path(sysconfig.get_path("include"), "Python.h")

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(COMPILER is None or not HEADER.exists(), reason="no C compiler, or no headers of Python"),
]

UNPACKED = [os.path.abspath(path) for path in os.environ.get("STEERFAST_TEST_TRITON", "").split(os.pathsep) if path]

LIBCUDA = r"""
#include <stdint.h>
#include <string.h>
typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned count; } Config;
uint64_t questions, launches, pointers[64][16], programs[64], streams[64];
int wanted;
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuPointerGetAttribute(uint64_t *result, int attribute, uint64_t pointer) {
  questions++;
  *result = pointer;
  return 0;
}
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  int at = launches++ % 64;
  programs[at] = config->grid[0];
  streams[at] = (uint64_t)config->stream;
  for (int i = 0; i < wanted; i++) memcpy(&pointers[at][i], parameters[i], 8);
  return 0;
}
#define UNUSED(name) int name(void) { return 1; }
UNUSED(cuInit) UNUSED(cuCtxGetDevice) UNUSED(cuCtxGetLimit) UNUSED(cuCtxSetCurrent) UNUSED(cuCtxSetLimit)
UNUSED(cuDeviceGet) UNUSED(cuDeviceGetAttribute) UNUSED(cuDevicePrimaryCtxRetain) UNUSED(cuDriverGetVersion)
UNUSED(cuFuncGetAttribute) UNUSED(cuFuncSetAttribute) UNUSED(cuFuncSetCacheConfig) UNUSED(cuGetErrorString)
UNUSED(cuModuleGetFunction) UNUSED(cuModuleLoadData) UNUSED(cuModuleUnload) UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuStreamIsCapturing) UNUSED(cuTensorMapEncodeIm2col) UNUSED(cuTensorMapEncodeTiled)
"""

SCRIPT = """
import ctypes
from triton.backends.nvidia import driver as nvidia

real = nvidia.CudaUtils()  # compiles Triton's C code
Stub.launcher_cls = nvidia.CudaLauncher
Stub.utils = SimpleNamespace(**{**vars(real), **vars(Stub.utils)})
Stub.utils.load_binary = lambda *a: (object(), 12345, 32, 0, 1024)
library = ctypes.CDLL("libcuda.so.1")
number = lambda name: ctypes.c_uint64.in_dll(library, name)
array = lambda name, size: (ctypes.c_uint64 * size).in_dll(library, name)
ctypes.c_int.in_dll(library, "wanted").value = 7  # pointers that each kernel has at least, with a residual
everything = (fused.launch, steer.launch, gate.launch)

def step():
    '''The launches of a step, how often the driver was asked, and how many of them were Triton's own.'''
    slow.clear()
    number("questions").value = number("launches").value = 0
    run_all(o, kinds=(Kinds.LATCHED_ADD,), pairs=(True,))
    count = number("launches").value
    flat = array("pointers", 64 * 16)
    rows = [[array("programs", 64)[i], array("streams", 64)[i], *flat[16 * i: 16 * i + 7]] for i in range(count)]
    return rows, number("questions").value, len(slow)

o = operands(6)
steps = [step(), step()]
calls = launch.Launcher.__call__
launch.Launcher.__call__ = None  # plans alone
steps.append(step())
launch.Launcher.__call__ = calls
nested = [call.nested for l in everything for call in l.compiled.values()]
for l in everything:
    l.reusable = False
    l.plans.clear()
steps.append(step())
print(json.dumps([triton.__version__, nested, steps]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a libcuda that launches nothing."""
    directory = tmp_path_factory.mktemp("libcuda")
    source = directory / "libcuda.c"
    source.write_text(LIBCUDA)
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", source, "-o"]
    subprocess.run([*map(str, command), str(directory / "libcuda.so.1")], check=True)
    return directory


def run(library: Path, path: str) -> Any:
    """What SCRIPT prints with the Triton at `path`; empty: the installed one."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [path, settings.get("PYTHONPATH")]))
    settings["TRITON_LIBCUDA_PATH"] = settings["LD_LIBRARY_PATH"] = str(library)
    result = subprocess.run(
        [sys.executable, "-c", STUB + SCRIPT], env=settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", ["", *UNPACKED], ids=lambda path: Path(path).name or "installed")
def test_the_driver_gets_what_triton_gives_it(library: Path, path: str) -> None:
    version, nested, steps = run(library, path)
    release = tuple(int(part) for part in version.split(".")[:2])
    assert release in TESTED_TRITON
    assert nested == [release > (3, 6)] * len(nested)  # a call of the C function, not of the Python launcher
    (cold, cold_asked, cold_slow), *fast, (off, off_asked, off_slow) = steps

    def without_outputs(launches: list[list[int]]) -> list[list[int]]:
        """The fused op, in launches 0 and 2, allocates its outputs anew: pointers 2 and 3."""
        return [row if index in (1, 3, 4) else [*row[:4], *row[6:]] for index, row in enumerate(launches)]

    assert len(cold) == 5
    assert cold_slow == off_slow == 5
    assert cold_asked == off_asked > 30
    for launches, asked, slow in fast:
        assert (asked, slow) == (0, 0)
        assert without_outputs(launches) == without_outputs(cold) == without_outputs(off)

"""The CUDA op without a GPU: what nvcc makes of its device code, and the same source run by CPU threads."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm, reference
from steerfast.kernels.contract import GATE, STRENGTH, TABLE_WIDTH, Gate, Kinds, Norm

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/cuda/steer.cuh"

# ---- what nvcc makes of it ---------------------------------------------------------------------------------

KERNELS = {
    "held float": ("held_row", "float, float, float"),
    "held bf16": ("held_row", "__nv_bfloat16, __nv_bfloat16, __nv_bfloat16"),
    "held f16": ("held_row", "__half, __half, __half"),
    "held bf16, bank and weight float": ("held_row", "__nv_bfloat16, float, float"),
    "any float": ("any_row", "float, float, float"),
    "any bf16": ("any_row", "__nv_bfloat16, __nv_bfloat16, __nv_bfloat16"),
    "any f16": ("any_row", "__half, __half, __half"),
    "any bf16, bank and weight float": ("any_row", "__nv_bfloat16, float, float"),
}
# Registers per thread with nvcc 13.0. Blocks have up to 1024 threads, so 64 is the most there can be.
REGISTERS = {
    80: dict(zip(KERNELS, (61, 46, 48, 42, 44, 42, 42, 50), strict=True)),
    90: dict(zip(KERNELS, (60, 36, 36, 40, 46, 41, 41, 44), strict=True)),
    100: dict(zip(KERNELS, (58, 46, 52, 48, 48, 56, 56, 63), strict=True)),
}


@dataclass(frozen=True)
class Compiled:
    """Of each kernel, and of the norm's division and root alone: ptxas' report and the instructions."""

    report: dict[str, str]
    instructions: dict[str, list[str]]


def mangled(kernel: str) -> re.Pattern[str]:
    """What a kernel's symbol looks like: of equal type arguments the second and third stand as S2_."""
    name, types = KERNELS[kernel]
    first, second, _ = ("f" if t == "float" else f"{len(t)}{t}" for t in types.split(", "))
    rest = "ff" if second == "f" else "S2_S2_"
    return re.compile(f"{name}I{first}{rest}EEv")


@pytest.fixture(scope="module", params=sorted(REGISTERS))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Compiled]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{request.param}" not in known:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    instances = "\n".join(
        f"template __global__ void {name}<{types}>(const Arguments);" for name, types in KERNELS.values()
    )
    (folder / "kernels.cu").write_text(
        f'#include "{SOURCE}"\nnamespace steerfast::cuda {{\n{instances}\n'
        "__global__ void root_alone(float* p) { *p = reciprocal_root(p[0], int(p[1]), p[2]); }\n}\n"
    )
    cubin = folder / "kernels.cubin"
    # The flags of torch's own builds that matter here; -fmad stays at its default, which fuses where it may.
    command = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", f"-arch=sm_{request.param}"]
    result = subprocess.run(
        [*command, "-Xptxas", "-v", "-o", str(cubin), str(folder / "kernels.cu")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    entries = re.split(r"(?=Compiling entry function)", result.stderr)[1:]
    report = {re.findall(r"'(\w+)'", entry)[0]: entry for entry in entries}
    instructions: dict[str, list[str]] = {}
    disassembler = cuobjdump()
    if disassembler is not None:
        listing = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        for part in listing.split("Function : ")[1:]:
            name, _, code = part.partition("\n")
            instructions[name.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
    return request.param, Compiled(report, instructions)


def cuobjdump() -> str | None:
    """Triton brings one."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def of_kernel(found: dict[str, str] | dict[str, list[str]], kernel: str) -> str | list[str]:
    (one,) = (value for symbol, value in found.items() if mangled(kernel).search(symbol))
    return one


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_row_stays_in_registers(compiled: tuple[int, Compiled], kernel: str) -> None:
    architecture, result = compiled
    report = str(of_kernel(result.report, kernel))
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    assert registers <= min(64, REGISTERS[architecture][kernel] + 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_product_fuses_with_a_sum(compiled: tuple[int, Compiled], kernel: str) -> None:
    """Division and root are made of FFMA; there must be none besides theirs, and no packed FFMA2."""
    _, result = compiled
    if not result.instructions:
        pytest.skip("no cuobjdump")

    def fused(instructions: str | list[str]) -> list[str]:
        return sorted(i for i in instructions if i.startswith("FFMA"))

    instructions = of_kernel(result.instructions, kernel)
    (alone,) = (value for symbol, value in result.instructions.items() if "root_alone" in symbol)
    assert fused(alone), "the disassembly is not understood"
    assert fused(instructions) == fused(alone)
    assert not [i for i in instructions if i.startswith("DFMA")]


def test_accesses_are_16_bytes_wide(compiled: tuple[int, Compiled]) -> None:
    _, result = compiled
    if not result.instructions:
        pytest.skip("no cuobjdump")
    instructions = of_kernel(result.instructions, "held bf16")
    loads = [i for i in instructions if i.startswith("LDG")]
    stores = [i for i in instructions if i.startswith("STG")]
    assert sum(".128" in i for i in loads) == 3 + 4  # x, residual, weight, and a vector per slot
    assert stores
    assert all(".128" in i for i in stores)


# ---- the same source on the CPU ----------------------------------------------------------------------------

DRIVER = """
#include "{header}"
#include "{source}"

extern "C" void run(void* const* p, const int64_t* n, float eps) {{
  using namespace steerfast;
  cuda::Arguments a;
  a.x = p[0], a.residual = p[1], a.weight = p[2], a.vectors = p[3];
  a.rows = static_cast<const int32_t*>(p[4]);
  a.values = static_cast<const float*>(p[5]), a.strength = static_cast<const float*>(p[6]);
  a.table = static_cast<const float*>(p[7]), a.normed = p[8], a.new_residual = p[9];
  a.x_stride = n[0], a.residual_stride = n[1], a.hidden_size = int(n[2]), a.stack = int(n[3]);
  a.norm = Norm(n[4]), a.eps = eps;
  cuda::launch(a, DType(n[5]), DType(n[6]), DType(n[7]), int(n[8]),
               [](auto kernel, int blocks, int threads, const cuda::Arguments& argument) {{
                 cuda_on_cpu::launch(kernel, blocks, threads, argument);
               }});
}}
"""
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/contract.h
F32, BF16, F16 = CODES


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler for x86-64")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "driver.cpp").write_text(DRIVER.format(header=ROOT / "tests/kernels/cuda_on_cpu.h", source=SOURCE))
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    probe = subprocess.run(
        [*compiler, "-std=c++20", "-fsyntax-only", "-xc++", "-"],
        input="#include <barrier>\nstd::barrier<> barrier(1); _Float16 half;",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("this C++ compiler has no std::barrier or no _Float16")
    result = subprocess.run(
        [*compiler, *flags, "-o", str(folder / "driver.so"), str(folder / "driver.cpp")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(folder / "driver.so"))
    loaded.run.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64), ctypes.c_float]
    loaded.run.restype = None
    return loaded


@dataclass
class Case:
    """The arguments of add_steer_rms_norm, with slots that add and gates that are latched or always open."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    rows: Tensor
    values: Tensor
    strength: Tensor
    vectors: Tensor
    directions: Tensor
    table: Tensor
    norm: Norm = Norm.LLAMA
    eps: float = 1e-5

    def run(self, library: ctypes.CDLL) -> tuple[Tensor, Tensor]:
        """The CUDA source's normed and new residual. Nothing beside them may have been written."""
        guard, (count, size) = 64, self.x.shape
        outputs = [torch.full((count * size + 2 * guard,), 7.0, dtype=self.x.dtype) for _ in range(2)]
        inside = [out[guard:-guard] for out in outputs]
        for out in inside:
            out.fill_(torch.nan)
        operands = (self.x, self.residual, self.weight, self.vectors, self.rows, self.values, self.strength, self.table)
        pointers = (ctypes.c_void_p * 10)(*(t.data_ptr() for t in (*operands, *inside)))
        dtypes = [CODES[t.dtype] for t in (self.x, self.vectors, self.weight)]
        strides = (self.x.stride(0), self.residual.stride(0))
        numbers = (ctypes.c_int64 * 9)(*strides, size, self.rows.shape[1] - 1, self.norm, *dtypes, count)
        library.run(pointers, numbers, self.eps)
        for out in outputs:
            assert bool((out[:guard] == 7).all())
            assert bool((out[-guard:] == 7).all())
        return inside[0].view(count, size), inside[1].view(count, size)

    def operands(self) -> tuple[Tensor, ...]:
        return (self.x, self.residual, self.weight, self.rows, self.values, self.strength, self.vectors,
                self.directions, self.table)  # fmt: skip


def make(
    size: int,
    x: torch.dtype = BF16,
    bank: torch.dtype = BF16,
    weight: torch.dtype = BF16,
    stack: int = 1,
    norm: Norm = Norm.LLAMA,
    count: int = 3,
    shift: int = 0,
    padding: int = 0,
) -> Case:
    """Random arguments; rows of x and residual start `shift` numbers late and lie `padding` numbers apart."""
    generator = torch.Generator().manual_seed(size + 17 * stack + norm)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def laid(rows: Tensor) -> Tensor:
        memory = torch.full((shift + count * (size + padding),), torch.nan, dtype=x)
        placed = memory[shift:].view(count, size + padding)[:, :size]
        placed.copy_(rows)
        return placed

    slots, sequences = 5, 2
    rows = torch.randint(-1, slots - 1, (count, 1 + stack), generator=generator, dtype=torch.int32)
    rows[:, 0] = torch.arange(count) % sequences
    table = torch.zeros(slots, TABLE_WIDTH)
    table[:, STRENGTH] = normal(slots)
    table[:, GATE] = torch.tensor([Gate.ALWAYS, Gate.PROMPT, Gate.PROMPT, Gate.TOKEN, Gate.ALWAYS]).float()
    values = torch.rand(sequences, stack, generator=generator)
    strength = normal(sequences, stack)
    if stack:
        rows[0, 1] = 1
        values[1, 0] = 0.0
        strength[1, 0] = torch.inf  # shut, so it does not matter
        rows[1::2, 1] = 2
    vectors = normal(slots, size).to(bank)
    vectors[-1] = torch.nan  # no row has this slot
    return Case(
        laid(normal(count, size)),
        laid(3 * normal(count, size)),
        (1 + 0.1 * normal(size)).to(weight),
        rows,
        values,
        strength,
        vectors,
        normal(slots, size).to(bank),
        table,
        norm,
    )


CASES = {
    **{f"H {size}, {norm.name}": make(size, norm=norm) for size in (8, 576) for norm in Norm},
    **{f"H {size}, K {stack}": make(size, stack=stack) for size in (7, 256) for stack in range(5)},
    "H 1": make(1),
    "H 31, float": make(31, F32, F32, F32, stack=2),
    "H 576, float": make(576, F32, F32, F32, stack=2),
    "H 4, float: half a thread": make(4, F32, F32, F32),
    "H 260, float: not every thread has two packs": make(260, F32, F32, F32),
    "H 64, half": make(64, F16, F16, F16, norm=Norm.VLLM_IR),
    "H 64, float with a bf16 bank and a half weight": make(64, F32, BF16, F16),
    "H 64, bf16 with a float bank and weight": make(64, BF16, F32, F32, norm=Norm.FLASHINFER),
    "H 64, half with a float bank and a bf16 weight": make(64, F16, F32, BF16, norm=Norm.GEMMA),
    "H 576, rows apart": make(576, padding=64),
    "H 576, rows apart by an odd number": make(576, padding=3),
    "H 576, rows start at an odd number": make(576, shift=1),
    "H 576, float, rows start at an odd number": make(576, F32, F32, F32, shift=1, padding=5),
    "H 8192: all held": make(8192, count=2),
    "H 9000: not held": make(9000, count=2, norm=Norm.VLLM_IR),
    "H 9001: neither held nor aligned": make(9001, count=2),
    "300 rows": make(16, count=300),
}


@pytest.mark.parametrize("name", CASES)
def test_the_source_does_what_the_contract_says(library: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    normed, stream = case.run(library)
    want_normed, want_stream = add_steer_rms_norm(*case.operands(), case.eps, case.norm, Kinds.LATCHED_ADD)
    assert torch.equal(stream, want_stream)  # the CPU's op; bit by bit, as no sum over the row goes into it

    # The sums of squares differ in their order, so a rounding may fall to the other side, but seldom.
    steps = normed.view(torch.int32 if normed.dtype == F32 else torch.int16).long()
    steps -= want_normed.view(torch.int32 if normed.dtype == F32 else torch.int16).long()
    assert int(steps.abs().max()) <= (8 if normed.dtype == F32 else 2)
    if normed.dtype != F32:
        assert int((steps != 0).sum()) <= 0.01 * steps.numel() + 1

    exact_normed, exact_stream = reference(*case.operands(), case.eps, case.norm, Kinds.LATCHED_ADD)
    unit = torch.finfo(normed.dtype).eps
    assert torch.allclose(stream.double(), exact_stream, rtol=unit, atol=16 * torch.finfo(F32).eps)
    assert torch.allclose(normed.double(), exact_normed, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_bits_do_not_depend_on_alignment_or_batch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Held in registers or worked out twice, in one launch or alone: the same row, the same bits."""
    aligned = make(1056, dtype, dtype, dtype, stack=2)
    shifted = make(1056, dtype, dtype, dtype, stack=2, shift=1, padding=7)
    assert torch.equal(aligned.x, shifted.x)
    assert aligned.x.data_ptr() % 16 == 0
    assert shifted.x.data_ptr() % 16 != 0
    together = aligned.run(library)
    for one, other in zip(together, shifted.run(library), strict=True):
        assert torch.equal(one, other)
    last = Case(**{**vars(aligned), "x": aligned.x[2:], "residual": aligned.residual[2:], "rows": aligned.rows[2:]})
    for one, other in zip(together, last.run(library), strict=True):
        assert torch.equal(one[2:], other)


def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL) -> None:
    case = make(72, norm=Norm.FLASHINFER)
    case.strength[0, 0] = torch.inf
    case.rows[:, 1] = torch.tensor([1, 2, -1])
    case.vectors[2] = torch.nan  # the gate of row 1 is shut
    normed, stream = case.run(library)
    assert not bool(stream[0].isfinite().any())
    assert bool(normed[1:].isfinite().all())
    assert torch.equal(stream[1:], (case.x.float() + case.residual.float()).bfloat16()[1:])

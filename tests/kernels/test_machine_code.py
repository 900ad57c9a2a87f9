"""What the GPU kernels turn into, found out without a GPU: launch shapes, and the machine code of each variant.

machine_code.json holds registers, shared memory and 128-bit accesses of every kernel below, as the Triton release
named in it compiles them; `python tests/kernels/test_machine_code.py --write` measures them again. With another Triton
only what holds for any is checked: no spill, no float64, no denormals flushed, no access narrower than 16 bytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from steerfast.kernels.contract import MAX_HIDDEN_SIZE, Kinds, Norm
from steerfast.kernels.launch import LaunchShape, launch_shape

pytestmark = pytest.mark.contract

TABLE = Path(__file__).with_name("machine_code.json")
LAYERS = 32  # of the kernels that decide
SLACK = 8  # registers: the step in which a GPU hands them out
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `decides`: the deciding form."""

    op: str
    arch: int = 90
    size: int = 4096
    dtype: str = "bfloat16"
    stack: int = 1
    kinds: Kinds = Kinds.LATCHED_ADD
    pair: bool = False
    norm: Norm = Norm.LLAMA
    contiguous: bool = True
    decides: bool = False
    bank: str = ""  # the dtype of vectors and directions where it is another one

    def __str__(self) -> str:
        extras = ["deciding"] * self.decides + [f"K={self.stack}"] + [self.kinds.name] * (self.op != "score_")
        extras += ["pair"] * self.pair + [self.norm.name] * (self.norm != Norm.LLAMA)
        extras += ["strided"] * (not self.contiguous) + [f"bank={self.bank}"] * bool(self.bank)
        return " ".join([f"sm_{self.arch}", self.op, *extras, self.dtype, str(self.size)])

    @property
    def shape(self) -> LaunchShape:
        return launch_shape(self.size, getattr(torch, self.dtype))

    def accesses(self, dtype: str = "") -> int:
        """16-byte accesses of a thread per row that it reads or writes; those beyond the row are compiled away."""
        itemsize: int = getattr(torch, dtype or self.dtype).itemsize
        return -(-self.size * itemsize // (16 * 32 * self.shape.num_warps))

    @property
    def least_loads(self) -> int:
        """128-bit loads of a thread if it reads every row once: x, residual, weight, and the slots' vectors."""
        norm = "norm" in self.op
        return self.accesses() * (1 + (self.pair or norm) + norm) + self.accesses(self.bank) * self.stack

    @property
    def stores(self) -> int:
        return self.accesses() * {"score_": 0, "steer_": 1}.get(self.op, 2)


ANY, LATCHED_ADD = Kinds.ANY, Kinds.LATCHED_ADD
KERNELS = [
    *(
        kernel
        for arch in (80, 90, 100, 120)
        for kernel in (
            Kernel("score_", arch),
            Kernel("score_", arch, pair=True),
            Kernel("steer_", arch),
            Kernel("steer_", arch, kinds=ANY),
            Kernel("steer_", arch, kinds=ANY, pair=True),
            Kernel("steer_", arch, decides=True),
            Kernel("add_steer_rms_norm", arch, stack=0),
            Kernel("add_steer_rms_norm", arch),
            Kernel("add_steer_rms_norm", arch, kinds=ANY),
            Kernel("add_steer_rms_norm", arch, decides=True),
        )
    ),
    Kernel("score_", stack=4, contiguous=False),
    Kernel("score_", size=16384, pair=True),
    Kernel("steer_", stack=4, contiguous=False),
    Kernel("steer_", stack=4, kinds=ANY, pair=True, decides=True),
    Kernel("steer_", size=16384, kinds=ANY, pair=True),
    Kernel("steer_", dtype="float16"),
    Kernel("add_steer_rms_norm", stack=4),
    Kernel("add_steer_rms_norm", bank="float32"),
    # The bank of engines, with all sums: the most registers. Beyond 12288 these spill.
    Kernel("add_steer_rms_norm", kinds=ANY, bank="float32"),
    *(
        Kernel("add_steer_rms_norm", size=size, stack=4, kinds=ANY, decides=True, bank="float32")
        for size in (4096, 8192, 12288)
    ),
    Kernel("steer_", kinds=ANY, pair=True, bank="float32"),
    Kernel("steer_", size=12288, stack=4, kinds=ANY, pair=True, decides=True, bank="float32"),
    Kernel("score_", size=12288, stack=4, pair=True, bank="float32"),
    Kernel("add_steer_rms_norm", size=16384, stack=4, bank="float32"),
    Kernel("add_steer_rms_norm", stack=4, kinds=ANY, norm=Norm.VLLM),
    Kernel("add_steer_rms_norm", stack=4, kinds=ANY, norm=Norm.GEMMA, decides=True),
    *(Kernel("add_steer_rms_norm", size=size) for size in (576, 2048, 5120, 8192, 16384)),
    *(Kernel("add_steer_rms_norm", size=size, kinds=ANY, decides=True) for size in (576, 4096, 16384)),
    Kernel("add_steer_rms_norm", dtype="float32", size=576),
    Kernel("add_steer_rms_norm", dtype="float32", size=8192),
    Kernel("add_steer_rms_norm", dtype="float32", size=8192, decides=True),
]


# ---- compiling, in a process of its own: where kernels are interpreted they cannot be compiled -------------------


def build(kernel: Kernel) -> Any:
    """What Triton's launch would compile for contiguous, aligned tensors, all of the kernel's dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from steerfast.kernels import add_steer_rms_norm, gate, steer

    pointer = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
    constants: dict[str, Any] = {"H": kernel.size, "BLOCK": kernel.shape.block, "K": kernel.stack, "NVIDIA": True}
    constants |= {"CONTIGUOUS": kernel.contiguous}
    gates = set(gate.SCALARS) - {"slots_ptr", "scales_ptr", "table_ptr"}
    if kernel.op == "score_":
        function = gate.score_kernel
        constants |= {"PAIR": kernel.pair} | ({} if kernel.pair else {"residual_ptr": None})
    elif kernel.op == "steer_":
        function = steer.steer_kernel
        constants |= {"PAIR": kernel.pair, "KINDS": int(kernel.kinds)}
        constants |= {} if kernel.pair else {"residual_ptr": None}
    else:
        function = add_steer_rms_norm.add_steer_rms_norm_kernel
        constants |= {"NORM": int(kernel.norm), "KINDS": int(kernel.kinds)}
    if kernel.op != "score_":
        constants |= {"LAYERS": LAYERS} if kernel.decides else {"LAYERS": 0, **dict.fromkeys(gates)}
    streams = {"x_ptr", "residual_ptr", "normed_ptr", "new_residual_ptr", "weight_ptr"}
    tensors = {*streams, "vectors_ptr", "directions_ptr", "mean_directions_ptr"}
    ints = {"slots_ptr", "sequence_ptr", "deciding_ptr", "counted_ptr", "decider_slots_ptr"}
    signature, hints = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in tensors:
            signature[name] = pointer[kernel.dtype if name in streams else kernel.bank or kernel.dtype]
        elif name.endswith("_ptr"):
            signature[name] = "*fp64" if name == "sums_ptr" else "*i32" if name in ints else "*fp32"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name in tensors - set(constants) or name.endswith("_stride"):
            hints[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(function, signature, constants, hints),
        target=GPUTarget("cuda", kernel.arch, 32),
        options={"num_warps": kernel.shape.num_warps, "enable_fp_fusion": False},
    )


def measure(kernel: Kernel) -> dict[str, int]:
    from triton import knobs

    compiled = build(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    # An instruction stands after its address and predicate: "/*0090*/ @P0 LDG.E.128 R4, ..."
    count = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))

    def total(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.fullmatch(pattern, name))

    loads = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?LDG\.E[\w.]*128", sass)
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "shared": compiled.metadata.shared,
        "loads_128": total(r"LDG\.E.*128.*"),
        "stores_128": total(r"STG\.E.*128.*"),
        "loads_before_vectors": next((i for i, predicate in enumerate(loads) if predicate), len(loads)),
        "narrow": total(r"(LDG|STG)\.E.*\.[US](8|16)(\..*)?"),
        "stack": resources["STACK"] + resources["LOCAL"] + total(r"(LDL|STL).*"),
        "doubles": total(r"D(ADD|MUL|FMA|SETP|MNMX).*|.*F64.*"),
        "flushes": compiled.asm["ptx"].count(".ftz"),
        "fused": total(r"FFMA.*"),
        "sums": total(r"(BAR|SHFL|REDUX).*"),
        "instructions": sum(count.values()),
    }


def measure_all(kernels: list[Kernel]) -> dict[str, dict[str, int]]:
    """The measurements of kernels by name, made in a process that compiles kernels and does not interpret them."""
    command = [sys.executable, __file__, "--measure", *map(str, kernels)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured: dict[str, dict[str, int]] = json.loads(result.stdout)
    return measured


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--measure"]:
        wanted = set(arguments[1:])
        print(json.dumps({str(kernel): measure(kernel) for kernel in KERNELS if str(kernel) in wanted}))
    elif arguments == ["--write"]:
        measured = measure_all(KERNELS)
        kept = ("registers", "shared", "loads_128", "stores_128")
        lines = [
            f"  {json.dumps(name)}: {json.dumps({key: numbers[key] for key in kept})}"
            for name, numbers in measured.items()
        ]
        table = ",\n".join([f'  "triton": "{triton_release()}"', *lines])
        TABLE.write_text("{\n" + table + "\n}\n")
    else:
        sys.exit("usage: test_machine_code.py --write | --measure NAME ...")


def triton_release() -> str | None:
    """Major and minor version."""
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return None


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, dict[str, int]]:
    """The measurements of the kernels that are asked for."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return measure_all([item.callspec.params["kernel"] for item in items if "kernel" in item.callspec.params])


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(TABLE.read_text())
    return numbers


@pytest.mark.slow(but=["sm_90 * K=[01]* bfloat16 4096", "sm_* add_steer_rms_norm K=1 ANY bfloat16 4096"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_machine_code(kernel: Kernel, measured: dict[str, dict[str, int]], table: dict[str, Any]) -> None:
    found = measured[str(kernel)]
    assert found["instructions"] > 100  # the code was found and read
    assert found["stack"] == 0, "spills"
    assert kernel.decides or found["doubles"] == 0, "float64 arithmetic"  # the sum of a mean is float64
    assert found["flushes"] == 0, "denormals flushed"
    assert found["narrow"] == 0, "an access of one number at a time"
    assert found["stores_128"] == kernel.stores
    assert found["loads_128"] >= kernel.least_loads
    if kernel.op == "steer_" and kernel.kinds == LATCHED_ADD and not kernel.decides:
        assert found["fused"] == 0, "a product fused with a sum"
        assert found["sums"] == 0, "a sum where none is needed"
    whole = kernel.size == kernel.shape.block  # no load is masked by the length of the row
    if "norm" in kernel.op and kernel.kinds == LATCHED_ADD and whole and not kernel.decides:
        # The vectors alone are loaded under a condition. All else is asked for before the first of them is.
        assert found["loads_before_vectors"] == found["loads_128"] - kernel.stack * kernel.accesses(kernel.bank)
    if table["triton"] == triton_release():
        known = table[str(kernel)]
        assert found["registers"] <= known["registers"] + SLACK, f"{kernel}: registers above the table's"
        assert found["shared"] <= known["shared"]
        assert found["loads_128"] >= known["loads_128"]


def test_table_names_these_kernels(table: dict[str, Any]) -> None:
    assert list(table) == ["triton", *map(str, KERNELS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_shape_covers_every_hidden_size(dtype: torch.dtype) -> None:
    for size in range(1, MAX_HIDDEN_SIZE + 1):
        shape = launch_shape(size, dtype)
        assert size <= shape.block < 2 * size
        assert shape.block & (shape.block - 1) == 0
        assert shape.num_warps in (4, 8, 16)


def test_launch_shape_of_known_models() -> None:
    assert launch_shape(576, torch.bfloat16) == LaunchShape(1024, 4)
    assert launch_shape(4096, torch.bfloat16) == launch_shape(4096, torch.float16) == LaunchShape(4096, 8)
    assert launch_shape(4096, torch.float32) == LaunchShape(4096, 16)
    assert launch_shape(16384, torch.bfloat16) == LaunchShape(16384, 16)


@pytest.mark.parametrize("size", [0, MAX_HIDDEN_SIZE + 1])
def test_launch_shape_refuses_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"hidden_size: expected 1 to {MAX_HIDDEN_SIZE}, got {size}"):
        launch_shape(size, torch.bfloat16)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The cases of ops.py on a reduced grid under pytest-benchmark, for its statistics and comparisons between commits.

    pytest benchmarks                         --benchmark-autosave, --benchmark-compare as usual

Wall time of one call, warm; on CUDA with the launch and a synchronisation, so ops.py is the better clock for kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import FUSED, FUSED_DECIDING, SCORE, STEER, STEER_DECIDING, Case, Tensors
from providers import providers

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = {
    FUSED: ("steerfast", "steerfast-unsteered", "norm", "norm+add", "separate", "torch", "copy"),
    STEER: ("steerfast", "add", "torch"),
    FUSED_DECIDING: ("steerfast", "steerfast-plain"),
    STEER_DECIDING: ("steerfast", "steerfast-plain"),
    SCORE: ("steerfast", "torch"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("op", "provider"), [(op, name) for op, names in PROVIDERS.items() for name in names])
def test_op(benchmark: Any, op: str, provider: str, rows: int) -> None:
    case = Case(op, rows, 4096)
    operands = Tensors(case, DEVICE)
    (buffers,) = operands.buffers(1)
    call = providers(operands)[provider]

    def once() -> None:
        call(buffers)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op}, {rows} rows"
    benchmark.extra_info.update(case.record(), provider=provider, bytes=operands.bytes)
    benchmark.pedantic(once, rounds=50, warmup_rounds=5)
    assert torch.isfinite(buffers.pair).all()

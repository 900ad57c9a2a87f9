"""Would the tests notice? Each mutant breaks one line of the Triton kernels, and the test it names must fail.

The test runs in a child process per mutant, forked from one that has imported torch and Triton, in which
steerfast.kernels is a changed copy of the sources. The unchanged copy passes all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

HERE = Path(__file__).resolve().parent
EDITS, GATE, STEER, NORM = "edits.py", "gate.py", "steer.py", "add_steer_rms_norm.py"

# name: file, what stands there once, what the mutant has instead, and which test of the battery notices
MUTANTS = {
    "none": (EDITS, "", "", ""),
    # edits.py
    "a score on the threshold fires": (EDITS, "tl.where(score <= threshold", "tl.where(score < threshold", "zero row"),
    "NaN does not fire": (EDITS, "return tl.where(value == value, value, one)", "return value", "nan"),
    "cosine by the square": (EDITS, "tl.div_rn(xd, tl.sqrt_rn(xx))", "tl.div_rn(xd, xx)", "gate_"),
    "row read beyond its end": (EDITS, "tl.load(at, mask=inside, other=0.0)", "tl.load(at)", "behind"),
    "row stride ignored": (EDITS, "row * (H if CONTIGUOUS else stride)", "row * H", "steer_"),
    "pair not rounded": (EDITS, "s = s.to(x_ptr.dtype.element_ty).to(tl.float32)", "s = s", "gate_"),
    "slots in 32 bits": (EDITS, "tl.load(record + 1 + k).to(tl.int64)", "tl.load(record + 1 + k)", "far slots"),
    "value of the first slot": (EDITS, "values_ptr + sequence * K + k,", "values_ptr + sequence * K,", "steer_"),
    "strength ignored": (EDITS, "alpha = alpha * tl.load(", "alpha = 0.0 * alpha + tl.load(", "steer_"),
    "always is not always": (EDITS, "tl.where(kind == _ALWAYS, 1.0, value)", "value", "steer_"),
    "an infinite strength opens a shut gate": (
        EDITS,
        "tl.where(gate == 0.0, 0.0, gate * strength)",
        "gate * strength",
        "no displacement",
    ),
    "bounds swapped": (
        EDITS,
        "along < low, low, tl.where(along > high, high,",
        "along < low, high, tl.where(along > high, low,",
        "edits",
    ),
    "clamp of a zero vector": (EDITS, "vv <= 0.0, 0.0, beta", "vv < 0.0, 0.0, beta", "undefined"),
    "square of the norm kept": (EDITS, "tl.sqrt_rn(tl.div_rn(xx, full))", "tl.div_rn(xx, full)", "edits"),
    "cancelled rows scaled": (EDITS, "lost = full <= _CANCELLED *", "lost = full <= -_CANCELLED *", "undefined"),
    "plane not looked at": (EDITS, "(across <= _CANCELLED * dd)", "(across <= -dd)", "undefined"),
    "oblique axes": (EDITS, "- tl.div_rn(c * vd, vv)", "+ tl.div_rn(c * vd, vv)", "edits"),
    "second slot reads the first one's edit": (
        EDITS,
        "y += product(scale, s, NVIDIA)",
        "y += product(scale, y, NVIDIA)",
        "edits",
    ),
    "token gate latched": (
        EDITS,
        "                    if kinds[k] == _TOKEN:",
        "                    if kinds[k] == 7.0:",
        "left alone",
    ),
    # gate.py
    "latch lost where no row decides": (
        GATE,
        "        if row < 0:\n            return\n",
        "        row = tl.maximum(row, 0)\n",
        "gate_",
    ),
    "slot 0 not scored": (GATE, "            if slot >= 0:", "            if slot > 0:", "zero row"),
    "always scored like others": (
        GATE,
        "tl.where(tl.load(table_ptr + slot * _TABLE_WIDTH + _GATE) == _ALWAYS, 1.0, value)",
        "value",
        "gate_",
    ),
    "value stored as score": (
        GATE,
        "scores_ptr + sequence * K + k, score",
        "scores_ptr + sequence * K + k, value",
        "gate_",
    ),
    "deciding row in 32 bits": (
        GATE,
        "tl.load(row_ptr + sequence).to(tl.int64)",
        "tl.load(row_ptr + sequence)",
        "far rows",
    ),
    # steer.py
    "records overlap": (STEER, "rows_ptr + row * (K + 1)", "rows_ptr + row * K", "steer_"),
    "rows in 32 bits": (STEER, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "far rows"),
    "written beyond the row": (
        STEER,
        "y.to(x_ptr.dtype.element_ty), mask=inside)",
        "y.to(x_ptr.dtype.element_ty))",
        "gaps",
    ),
    "rounded twice": (STEER, "y.to(x_ptr.dtype.element_ty)", "y.to(tl.bfloat16).to(x_ptr.dtype.element_ty)", "steer_"),
    "token rows not looked at": (STEER, "wanted |= kinds[k] == _TOKEN", "wanted |= kinds[k] == 7.0", "left alone"),
    "residual ignored": (
        STEER,
        "                PAIR,\n                KINDS,",
        "                False,\n                KINDS,",
        "steer_",
    ),
    # add_steer_rms_norm.py
    "normed rows in 32 bits": (NORM, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "far rows"),
    "another row stores the latch": (
        NORM,
        "                    deciding == row,",
        "                    deciding < row,",
        "prompt",
    ),
    "every gate decided": (NORM, "(slots[k] >= 0) & (kinds[k] == _PROMPT)", "slots[k] >= 0", "latches"),
    "gate of the row itself": (
        NORM,
        "x_ptr, residual_ptr, deciding, x_stride",
        "x_ptr, residual_ptr, row, x_stride",
        "deciding row",
    ),
    "latch of sequences that wait unread": (
        NORM,
        "sequence, deciding < 0, values_ptr",
        "sequence, deciding >= 0, values_ptr",
        "prompt",
    ),
    "score not stored": (NORM, "tl.store(scores_ptr + at + k, score, mask=is_deciding_row)", "pass", "prompt"),
    "norm of the exact row": (NORM, "n = new_residual.to(tl.float32)", "n = y", "norms"),
    "mean over the block": (NORM, "tl.full((), H, tl.float32)", "tl.full((), BLOCK, tl.float32)", "add_steer_rms_norm"),
    "eps ignored": (NORM, "tl.sqrt_rn(mean + tl.full((), eps, tl.float32))", "tl.sqrt_rn(mean)", "eps"),
    "not rounded before the weight": (NORM, "normed = normed.to(dtype).to(tl.float32)", "normed = normed", "norms"),
    "Gemma's weight as it is": (NORM, "weight = 1.0 + weight", "weight = weight", "norms"),
    "outputs by the stride of x": (
        NORM,
        "tl.store(new_residual_ptr + row * H",
        "tl.store(new_residual_ptr + row * x_stride",
        "add_steer_rms_norm",
    ),
    "normed written beyond the row": (
        NORM,
        "(normed * weight).to(dtype), mask=inside)",
        "(normed * weight).to(dtype))",
        "add_steer_rms_norm",
    ),
}


# ---- in the process that forks -------------------------------------------------------------------------------


def battery() -> dict[str, Callable[[], None]]:
    """Tests of this room on the Triton kernels, by the name under which MUTANTS refers to them."""
    import test_agreement
    import test_bits
    import test_isolation
    import test_prompt
    import torch
    from kernel_cases import CHECKS, TRITON, make_case

    from steerfast.kernels.contract import EditId, GateKind, Kinds, Norm, Score

    assert TRITON.obstacle() is None

    def agreement(name: str) -> None:
        for seed, (size, dtype) in enumerate([(5, torch.float32), (33, torch.float16), (17, torch.float32)]):
            case = make_case(
                6, size, dtype, stack=2, slots=6, sequences=3, strided=seed == 2, pair=seed > 0,
                norm=Norm(seed), shared=name == "prompt", seed=seed,
            )  # fmt: skip
            CHECKS[name](TRITON, case)

    def edits() -> None:
        for edit in EditId:
            case = make_case(
                3, 12, stack=2, slots=2, edits=(edit,), gates=(GateKind.ALWAYS,), sequences=1, pair=True, seed=3
            )
            case.strength[:], case.rows[:] = 1.0, torch.tensor([0, 0, 1])
            CHECKS["steer_"](TRITON, case)

    def norms() -> None:
        for norm in Norm:
            test_agreement.test_norm_rounds_where_its_model_does(TRITON, norm)

    return {
        **{name: partial(agreement, name) for name in CHECKS},
        "edits": edits,
        "norms": norms,
        "eps": partial(test_agreement.test_zero_rows_and_eps, TRITON, 1.0),
        "undefined": partial(test_agreement.test_undefined_edits_leave_the_row, TRITON),
        "zero row": partial(test_isolation.test_zero_row_scores_zero, TRITON, torch.float32),
        "nan": partial(test_isolation.test_nan_score_fires, TRITON, Score.COSINE, 3.0),
        "left alone": partial(test_isolation.test_rows_left_alone_keep_their_bits, TRITON, torch.float32, Kinds.ANY),
        "gaps": partial(test_isolation.test_gaps_between_strided_rows_are_not_written, TRITON),
        "behind": partial(test_isolation.test_nothing_behind_a_row_is_read, TRITON),
        "no displacement": partial(
            test_bits.test_a_row_that_is_not_displaced_is_as_without_slots, TRITON, torch.float32, Kinds.ANY
        ),
        "far rows": partial(test_bits.test_offsets_beyond_32_bits, TRITON),
        "far slots": partial(test_bits.test_slots_beyond_32_bits, TRITON),
        "latches": partial(test_prompt.test_only_the_decided_latches_are_written, TRITON),
        "deciding row": partial(test_prompt.test_gate_reads_the_unsteered_deciding_row, TRITON),
    }


def survives(source: Path, folder: Path, mutant: tuple[str, str, str, str]) -> bool:
    """Whether the mutant passes its test with kernels changed in `folder`; run in a child of this process."""
    file, old, new, test = mutant
    kernels = folder / "kernels"
    shutil.copytree(source, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    (kernels / file).write_text((kernels / file).read_text().replace(old or new, new))
    child = os.fork()
    if child == 0:
        try:
            package = types.ModuleType("steerfast.kernels")
            package.__path__ = [str(kernels)]
            sys.modules["steerfast.kernels"] = package
            tests = battery()
            for run in [tests[test]] if test else tests.values():
                run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # a mutant that crashes is caught as well
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(source: Path) -> None:
    import hypothesis  # noqa: F401
    import numpy as np
    import torch
    import triton.language  # noqa: F401

    np.seterr(all="ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    for file, old, *_ in MUTANTS.values():
        count = (source / file).read_text().count(old) if old else 1
        assert count == 1, f"{file}: {old!r} stands there {count} times"
    result = {}
    for name, mutant in MUTANTS.items():
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            result[name] = survives(source, Path(folder), mutant)
    print(json.dumps(result))


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survivors() -> dict[str, bool]:
    if find_spec("triton") is None or not hasattr(os, "fork"):
        pytest.skip("needs triton and os.fork")
    from steerfast.kernels import gate

    command = [sys.executable, __file__, str(Path(str(gate.__file__)).parent)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    result: dict[str, bool] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, survivors: dict[str, bool]) -> None:
    assert survivors[name] == (name == "none")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Would the tests notice? Each mutant breaks one line of the Triton kernels, and the test it names must fail.

The test runs in a child process per mutant, forked from one that has imported torch and Triton, in which
steerfast.kernels is a changed copy of the sources. The unchanged copy passes them. All but one mutant of each part are
slow.
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
    "cosine by the square": (EDITS, "tl.div_rn(xd, tl.sqrt_rn(xx))", "tl.div_rn(xd, xx)", "score_"),
    "row read beyond its end": (EDITS, "tl.load(at, mask=inside, other=0.0)", "tl.load(at)", "behind"),
    "row stride ignored": (EDITS, "row * (H if CONTIGUOUS else stride)", "row * H", "steer_"),
    "pair not rounded": (EDITS, "s = s.to(x_ptr.dtype.element_ty).to(tl.float32)", "s = s", "score_"),
    "slots in 32 bits": (EDITS, "slots_ptr + row * K + k).to(tl.int64)", "slots_ptr + row * K + k)", "far slots"),
    "slot of the first place": (EDITS, "tl.load(slots_ptr + row * K + k)", "tl.load(slots_ptr + row * K)", "steer_"),
    "scale of the first place": (EDITS, "tl.load(scales_ptr + row * K + k)", "tl.load(scales_ptr + row * K)", "steer_"),
    "an infinite strength opens a shut gate": (
        EDITS,
        "tl.where(gate == 0.0, 0.0, gate * strength)",
        "gate * strength",
        "no displacement",
    ),
    "sums of a pair swapped": (EDITS, "return a + c, b + d", "return b + d, a + c", "score_"),
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
        "y += product(a_less_1, s, NVIDIA)",
        "y += product(a_less_1, y, NVIDIA)",
        "edits",
    ),
    "token gate not asked": (
        EDITS,
        "                    if gate_kind == _TOKEN:",
        "                    if gate_kind == 7.0:",
        "left alone",
    ),
    # gate.py, score_
    "padding keeps its score": (GATE, "tl.store(row_scores_ptr + row * K + k, 0.0)", "pass", "score_"),
    "every row is the last": (GATE, "tl.load(deciding_ptr + sequence) == row", "row == row", "score_"),
    "one row too few counts": (GATE, "(first <= row) & (row < until)", "(first < row) & (row < until)", "score_"),
    "one row too many counts": (GATE, "(first <= row) & (row < until)", "(first <= row) & (row <= until)", "score_"),
    "slot -1 is scored": (GATE, "read = (slot >= 0) & ", "read = ", "score_"),
    "gates that decide nothing are read": (
        GATE,
        "!= _NOTHING\n            reading",
        ">= _NOTHING\n            reading",
        "score_",
    ),
    "last rows read a mean": (GATE, "is_last & decides & (reading != _MEAN)", "is_last & decides", "score_"),
    "means read a last row": (GATE, "is_counted & decides & (reading != _LAST)", "is_counted & decides", "score_"),
    "means read the other directions": (GATE, "kinds[k], mean_directions_ptr", "kinds[k], directions_ptr", "score_"),
    # gate.py, the decision
    "latch lost where no row decides": (
        GATE,
        "tl.load(deciding_ptr + sequence, mask=known, other=-1).to(tl.int64)",
        "tl.maximum(tl.load(deciding_ptr + sequence, mask=known, other=-1).to(tl.int64), 0)",
        "steer_.deciding",
    ),
    "slot 0 does not decide": (GATE, "takes_part = (slot >= 0)", "takes_part = (slot > 0)", "steer_.deciding"),
    "nothing decides": (GATE, "if decides != _NOTHING:", "if decides >= _NOTHING:", "steer_.deciding"),
    "sums added by every row": (GATE, "(row == until - 1)", "(row <= until - 1)", "steer_.deciding"),
    "the first chunk alone": (GATE, "range(first, until, _CHUNK)", "range(first, first + _CHUNK, _CHUNK)", "long mean"),
    "earlier steps forgotten": (GATE, "sums += tl.sum(part, axis=0)", "sums = tl.sum(part, axis=0)", "steer_.deciding"),
    "sum for a mean": (GATE, "mean = (sums / total)", "mean = (sums / 1.0)", "steer_.deciding"),
    "both readings are one": (GATE, "mean, last + mean)", "mean, mean)", "steer_.deciding"),
    "a sensor for its own layer": (GATE, "decides == _EVERYWHERE", "decides == 7.0", "steer_.deciding"),
    "every gate a sensor": (GATE, "decides == _EVERYWHERE", "decides != 7.0", "steer_.deciding"),
    "always is not always": (GATE, "tl.where(kinds == _PROMPT, value, 1.0)", "value", "steer_.deciding"),
    "strength ignored": (GATE, "other=0.0) * strength", "other=0.0)", "steer_.deciding"),
    "rows left alone get a scale": (
        GATE,
        "                        if is_edited:",
        "                        if row >= 0:",
        "steer_.deciding",
    ),
    "edited by the scale before": (GATE, "beta = scaled(gate,", "_ = scaled(gate,", "steer_.deciding"),
    "score not stored": (
        GATE,
        "tl.store(scores_ptr + layer * deciders + decider, score)",
        "pass",
        "add_steer_rms_norm.deciding",
    ),
    "sums not stored": (GATE, "tl.store(sums_at, sums)", "pass", "add_steer_rms_norm.deciding"),
    # steer.py
    "rows in 32 bits": (STEER, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "far rows"),
    "written beyond the row": (
        STEER,
        "y.to(x_ptr.dtype.element_ty), mask=inside)",
        "y.to(x_ptr.dtype.element_ty))",
        "gaps",
    ),
    "rounded twice": (STEER, "y.to(x_ptr.dtype.element_ty)", "y.to(tl.bfloat16).to(x_ptr.dtype.element_ty)", "steer_"),
    "rows with one scale alone": (STEER, "wanted |= scales[k] != 0.0", "wanted = scales[k] != 0.0", "steer_"),
    "residual ignored": (
        STEER,
        "                PAIR,\n                KINDS,",
        "                False,\n                KINDS,",
        "steer_",
    ),
    # add_steer_rms_norm.py
    "normed rows in 32 bits": (NORM, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "far rows"),
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


FEW = {
    "none",
    "a score on the threshold fires",
    "row read beyond its end",
    "row stride ignored",
    "bounds swapped",
    "clamp of a zero vector",
    "padding keeps its score",
    "slot 0 does not decide",
    "sums not stored",
    "written beyond the row",
    "norm of the exact row",
    "eps ignored",
}


# ---- in the process that forks -------------------------------------------------------------------------------


def battery() -> dict[str, Callable[[], None]]:
    """Tests of this room on the Triton kernels, by the name under which MUTANTS refers to them."""
    import test_agreement
    import test_bits
    import test_deciding
    import test_isolation
    import torch
    from kernel_cases import CHECKS, TRITON, make_case

    from steerfast.kernels.contract import HIGH, LOW, Decides, EditId, GateKind, Kinds, Norm, Score

    assert TRITON.obstacle() is None

    def agreement(name: str) -> None:
        for seed, (size, dtype) in enumerate([(5, torch.float32), (33, torch.float16), (17, torch.float32)]):
            case = make_case(
                6, size, dtype, stack=2, slots=6, sequences=3, strided=seed == 2, pair=seed > 0,
                norm=Norm(seed), shared="deciding" in name, seed=seed,
            )  # fmt: skip
            CHECKS[name](TRITON, case)
        if name == "score_" or "deciding" in name:
            for seed in range(2):
                case = test_deciding.prompts(
                    [3, 2, 3], size=5, before=1, slots=8, gates=(GateKind.PROMPT, GateKind.ALWAYS),
                    decides=tuple(Decides), readings=test_deciding.READINGS, seed=seed,
                )  # fmt: skip
                case.deciding[1], case.sums[:] = -1, 0.5
                case.counted[:, 0] += 1 - seed
                CHECKS[name](TRITON, case)

    def edits() -> None:
        for edit in EditId:
            case = make_case(
                3, 12, stack=2, slots=2, edits=(edit,), gates=(GateKind.ALWAYS,), sequences=1, pair=True, seed=3
            )
            case.all_scales[:], case.slots[:] = 0.7, torch.tensor([0, 1])
            if edit == EditId.CLAMP:
                case.tables[..., LOW], case.tables[..., HIGH] = -0.02, 0.02
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
        "decided": partial(test_deciding.test_only_what_decides_is_written, TRITON),
        "long mean": partial(test_deciding.test_a_mean_of_more_rows_than_one_chunk_of_the_kernel, TRITON),
    }


def survives(source: Path, folder: Path, mutant: tuple[str, str, str, str], names: set[str]) -> bool:
    """Whether the mutant passes these tests with kernels changed in `folder`; run in a child of this process."""
    file, old, new, _ = mutant
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
            for name in names:
                tests[name]()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # a mutant that crashes is caught as well
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(source: Path, names: list[str]) -> None:
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
    tests, result = {MUTANTS[name][-1] for name in names} - {""}, {}
    for name in names:
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            own = tests if name == "none" else {MUTANTS[name][-1]}
            result[name] = survives(source, Path(folder), MUTANTS[name], own)
    print(json.dumps(result))


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survivors(request: pytest.FixtureRequest) -> dict[str, bool]:
    """Whether each mutant that is asked for survives."""
    if find_spec("triton") is None or not hasattr(os, "fork"):
        pytest.skip("needs triton and os.fork")
    from steerfast.kernels import gate

    names = [item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)]
    command = [sys.executable, __file__, str(Path(str(gate.__file__)).parent), *names]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    result: dict[str, bool] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.slow(but=FEW)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, survivors: dict[str, bool]) -> None:
    assert survivors[name] == (name == "none")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Plans: what a launch may reuse, when it must not, and that a plan goes with the tensors it names."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch

from steerfast.kernels import launch as launch_module
from steerfast.kernels.launch import Launcher, LaunchShape

pytest.importorskip("triton")
pytestmark = pytest.mark.contract

H = 16


class OnDevice:
    """A CPU tensor that says it is on a CUDA device."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor, index: int = 0) -> None:
        self.tensor, self.index = tensor, index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def get_device(self) -> int:
        return self.index


class Site:
    """One place that launches a kernel with the parameters (x, residual, out, weight, vectors, table, strides, H)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[str] = []
        self.launched: list[tuple[str, tuple[Any, ...]]] = []
        self.current = 0
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        self.launcher = Launcher(self)
        self.launcher.reusable = True
        self.vectors, self.table = torch.zeros(2, H), torch.zeros(2, 16)
        self.weight = OnDevice(torch.zeros(H))

    def __getitem__(self, grid: tuple[int]) -> Any:
        """Launch and compile as a Triton kernel does."""

        def launch_and_compile(*arguments: Any, **options: Any) -> Any:
            self.compiled.append(f"kernel {len(self.compiled) + 1}")
            return SimpleNamespace(run=self.run, function=self.compiled[-1], packed_metadata=(4, 1, 0))

        return launch_and_compile

    def run(self, count: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        assert (count, y, z, stream) == (3, 1, 1, 7)
        assert rest[:4] == ((4, 1, 0), None, None, None)
        self.launched.append((function, rest[4:]))

    def plan(self) -> None:
        """Launch until a plan is kept."""
        for _ in range(2):
            assert not self(rows(), rows())
        assert len(self.launcher.plans) == 1

    def __call__(self, x: Any, residual: Any, weight: Any = None, eps: float = 1e-5) -> bool:
        """Launch as an op does; return whether a plan served."""
        out = OnDevice(torch.empty_like(x.tensor))
        weight = self.weight if weight is None else weight
        members = (self.vectors, self.table, eps)
        if self.launcher.repeat(members, x, residual, (out,), weight):
            return True
        tensors = (x, residual, out, weight, self.vectors, self.table)
        address, contiguous, strides = launch_module.layout(x, residual)
        numbers = (*strides, eps)
        constants = (H, contiguous, residual is not None)
        self.launcher(x, len(x.tensor), members, tensors, numbers, constants, LaunchShape(H, 4), address)
        return False


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(monkeypatch)


def rows(dtype: torch.dtype = torch.float32, count: int = 3, index: int = 0) -> OnDevice:
    return OnDevice(torch.zeros(count, H, dtype=dtype), index)


def test_a_repeated_launch_adds_the_addresses_of_rows(site: Site) -> None:
    site.plan()
    for _ in range(3):
        x, residual = rows(), rows()
        assert site(x, residual)
        function, arguments = site.launched[-1]
        assert function == "kernel 1"
        assert arguments[:2] == (x.data_ptr(), residual.data_ptr())
        assert arguments[3:6] == (site.weight.data_ptr(), site.vectors.data_ptr(), site.table.data_ptr())
        assert arguments[6:] == (0, 0, 1e-5, H, True, True)
    assert len(site.compiled) == 1


@pytest.mark.parametrize(
    "other",
    [
        "x float16",
        "residual float16",
        "weight float16",
        "no residual",
        "more rows",
        "x with gaps",
        "residual with gaps",
        "x between multiples of 16 bytes",
        "another number",
        "other operands",
    ],
)
def test_other_launches_do_not_meet_the_plan(site: Site, other: str) -> None:
    site.plan()
    wide = OnDevice(torch.zeros(3, 2 * H)[:, :H])
    shifted = OnDevice(torch.zeros(3 * H + 1)[1:].view(3, H))
    x, residual, weight, eps = rows(), rows(), site.weight, 1e-5
    if other == "other operands":
        site.vectors = torch.zeros(2, H)
    x = {"x float16": rows(torch.float16), "more rows": rows(count=4), "x with gaps": wide}.get(other, x)
    x = shifted if other.startswith("x between") else x
    residual = {"residual float16": rows(torch.float16), "residual with gaps": wide}.get(other, residual)
    residual = None if other == "no residual" else residual  # type: ignore[assignment]
    weight = OnDevice(torch.zeros(H, dtype=torch.float16)) if other == "weight float16" else weight
    eps = 2e-5 if other == "another number" else eps
    count = len(site.compiled)
    if other == "more rows":
        with pytest.raises(AssertionError):  # `run` expects 3 programs: launched anew, by the same kernel
            site(x, residual, weight, eps)
        return
    assert not site(x, residual, weight, eps)
    compiles = {"other operands": 0}.get(other, 1)
    assert len(site.compiled) - count == compiles


def test_every_dtype_is_in_the_key_of_a_kernel(site: Site) -> None:
    site(rows(), rows())
    site.vectors = torch.zeros(2, H, dtype=torch.bfloat16)
    site(rows(), rows())
    site.table = torch.zeros(2, 16, dtype=torch.float64)
    site(rows(), rows())
    site(rows(), rows(torch.bfloat16))
    site(rows(torch.bfloat16), rows())
    assert len(site.compiled) == 5
    assert len(site.launcher.compiled) == 5


def test_hooks_and_the_current_device_end_a_plan(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.plan()
    assert site(rows(), rows())
    with monkeypatch.context() as patch:
        patch.setattr(launch_module, "_hooked", lambda: True)
        assert not site(rows(), rows())
    assert site(rows(), rows())
    assert not site.launcher.repeat((site.vectors, site.table, 1e-5), rows(index=1), rows(index=1), (), None)
    site.current = 1
    assert not site.launcher.repeat((site.vectors, site.table, 1e-5), rows(), rows(), (rows(),), site.weight)


def test_a_plan_goes_with_any_tensor_it_names_and_holds_none(site: Site) -> None:
    site.plan()
    gone = ref(site.table)
    site.table = torch.zeros(2, 16)
    gc.collect()
    assert gone() is None
    assert not site.launcher.plans
    site.plan()
    site.vectors = torch.zeros(2, H)
    assert not site.launcher.plans


def test_ids_that_come_again_never_meet_an_old_plan(site: Site) -> None:
    """Operands are made and dropped in a row, so that their ids and addresses come again."""
    for step in range(200):
        site.vectors = torch.full((2, H), float(step))
        eps = 1.0 + step  # a number that is dropped, too
        while not site(rows(), rows(), eps=eps):
            pass
        _, arguments = site.launched[-1]
        assert arguments[4] == site.vectors.data_ptr()
        assert arguments[8] == eps
        assert len(site.launcher.plans) == 1


def test_plans_are_bounded_where_a_number_is_new_each_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "MAX_PLANS", 8)
    for step in range(30):
        eps = 1.0 + step
        while not site(rows(), rows(), eps=eps):
            pass
        assert len(site.launcher.plans) <= 8
        assert len(site.launcher._met) <= 8


def test_a_site_that_is_met_once_costs_no_plan(site: Site) -> None:
    assert not site(rows(), rows())
    assert not site.launcher.plans

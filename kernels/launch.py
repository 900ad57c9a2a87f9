"""The launch of a kernel: its shape, and a fast path from eager Python.

A plain Triton launch binds and inspects every argument at every call, which costs more host time than the kernel of a
decode step takes on the device. :class:`Launcher` keeps the compiled kernel under a key of everything that Triton would
inspect, and passes the arguments on directly, tensors as addresses. For operands that it knows it keeps a
:class:`LaunchPlan`: a call then reads no more than the rows' addresses. ``STEERFAST_FAST_LAUNCH=0`` turns this off.

``STEERFAST_DEBUG=1`` reports each call of an unchecked op to the logger ``steerfast.launch`` at level DEBUG.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch.autograd import forward_ad

from .contract import MAX_HIDDEN_SIZE, GateOperands, Kinds, Operands, check_tangent

try:
    import triton
    from triton import knobs
except ImportError:  # a CPU-only install: the ops then run as C++ or torch
    triton = None

__all__ = [
    "TESTED_TRITON",
    "DirectCall",
    "LaunchPlan",
    "LaunchShape",
    "Launcher",
    "direct_call",
    "eager_cuda",
    "inductor_fuses",
    "launch_shape",
    "layout",
    "nvidia",
    "reported",
    "unobserved",
]

TESTED_TRITON = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Triton releases whose compiled kernels take their arguments as :class:`Launcher` passes them."""

MAX_PLANS = 4096  # of a launcher; they go with their operands, except where a site has a new number in each call

_log = logging.getLogger("steerfast.launch")
_DEBUG = os.environ.get("STEERFAST_DEBUG", "0") != "0"
_Op = TypeVar("_Op", bound=Callable[..., Any])


@dataclass(frozen=True)
class LaunchShape:
    """The part of a row that a GPU program holds: `block` columns (a power of two) over `num_warps` warps."""

    block: int
    num_warps: int


@cache
def launch_shape(hidden_size: int, dtype: torch.dtype) -> LaunchShape:
    """Return the launch shape of a row of `hidden_size` numbers of this dtype.

    It does not depend on the number of rows, so a row has the same bits in every batch. A thread takes 32 bytes: two
    16-byte accesses per tensor. At least 4 warps hide the latency of a short row. At most 16: with 32 a thread has 64
    registers, and the addresses alone take 25.
    """
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden_size: expected 1 to {MAX_HIDDEN_SIZE}, got {hidden_size}")
    block = 1 << (hidden_size - 1).bit_length()
    return LaunchShape(block, min(max(block * dtype.itemsize // 1024, 4), 16))


def nvidia(x: torch.Tensor) -> bool:
    """Say whether a kernel on `x` runs on an NVIDIA GPU, not on another GPU or in Triton's interpreter."""
    return x.is_cuda and torch.version.hip is None


def layout(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, bool, tuple[int, int]]:
    """Return the addresses of the rows or-ed together, whether the rows have no gaps, and their row strides.

    The strides are 0 for rows without gaps.
    """
    address, contiguous = x.data_ptr(), x.is_contiguous()
    if residual is not None:
        address |= residual.data_ptr()
        contiguous = contiguous and residual.is_contiguous()
    if contiguous:
        return address, True, (0, 0)
    return address, False, (x.stride(0), 0 if residual is None else residual.stride(0))


def eager_cuda(x: torch.Tensor, *others: Any) -> bool:
    """Say whether Python may launch the Triton kernel for `x` without the dispatcher.

    Args:
        others: the op's other arguments. Forward-mode AD is looked for in tensors, and in tuples of tensors.

    Raises:
        NotImplementedError: forward-mode AD differentiates an argument.
    """
    if forward_ad._current_level >= 0:
        check_tangent("x", x)
        for other in others:
            for tensor in other if isinstance(other, tuple) else (other,):
                check_tangent("arguments", tensor)
    return x.is_cuda and triton is not None and unobserved(x)


def unobserved(x: torch.Tensor) -> bool:
    """Say whether nothing would miss a call on `x` that the dispatcher does not see.

    A subclass, a compiler, a tracer (`torch.jit.trace`) or a dispatch mode (`make_fx`, fake tensors) would.
    """
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


def inductor_fuses(x: torch.Tensor, kinds: int) -> bool:
    """Say whether a compiled model should trace plain torch, which Inductor fuses, instead of the op.

    It should on a CPU where no slot takes sums: at one row the op costs 1.17 x the unsteered form, plain torch 1.03 x
    (benchmarks/FACTS.md). Not measured on a GPU yet.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu" and int(kinds) == int(Kinds.LATCHED_ADD)


def _hooked() -> bool:
    """Say whether a profiler has hooked each launch; only Triton's own launch calls its hooks."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def _reusable() -> bool:
    """Say whether compiled kernels may be called directly; read once per launcher, when it is made."""
    if triton is None or os.environ.get("STEERFAST_FAST_LAUNCH", "1") == "0":
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in TESTED_TRITON and torch.version.hip is None


def reported(op: _Op) -> _Op:
    """Report each call of `op` to the logger where STEERFAST_DEBUG is set; otherwise return `op` itself."""
    if not _DEBUG:
        return op

    @wraps(op)
    def report(x: torch.Tensor, *arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            told = [a for a in arguments if isinstance(a, (Operands, GateOperands))]
            words = [Kinds(a.kinds).name if isinstance(a, Operands) else "gates" for a in told]
            stack, kinds = told[0].scales.shape[-1], ", ".join(words)
            name = op.__name__.removesuffix("_unchecked").replace("_unchecked_", "_")
            _log.debug(
                "%s: %d rows, H %d, K %d, %s, %s", name, x.shape[:-1].numel(), x.shape[-1], stack, kinds, x.device
            )
        return op(x, *arguments)

    return report  # type: ignore[return-value]


class DirectCall(NamedTuple):
    """The call of Triton's C function that launches a compiled kernel.

    ``launch(count, 1, 1, stream, *between, *arguments)`` launches `count` programs; `nested`: the last is one tuple.
    An int stands for the tensor at that address. Of a tensor the C function asks the address, and the driver about it.
    """

    launch: Callable[..., object]
    between: tuple[Any, ...]
    nested: bool
    compiled: Any  # held: Triton unloads the machine code of a kernel that nothing holds


def direct_call(compiled: Any, arguments: int) -> DirectCall:
    """Return the direct call of `compiled`, a kernel of so many arguments.

    Triton's Python launcher shows the C function's arguments: it is called once, with a C function that only writes
    them down. A launcher that does more for each launch (allocates memory, adds arguments) stays in the call.
    """
    launcher = compiled.run
    between = (compiled.function, compiled.packed_metadata, None, None, None)
    through_launcher = DirectCall(launcher, between, False, compiled)
    scratch = any(getattr(launcher, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    if not hasattr(launcher, "launch") or scratch or getattr(launcher, "gsan_enabled", False):
        return through_launcher
    seen: list[tuple[Any, ...]] = []
    recorder = copy(launcher)
    recorder.launch = lambda *passed: seen.append(passed)
    marks = tuple(object() for _ in range(arguments))
    recorder(1, 1, 1, 0, *between, *marks)
    (passed,) = seen
    if passed[-1] == marks:  # since Triton 3.7
        return DirectCall(launcher.launch, passed[4:-1], True, compiled)
    if passed[-arguments:] == marks:
        return DirectCall(launcher.launch, passed[4:-arguments], False, compiled)
    return through_launcher


@dataclass(frozen=True)
class LaunchPlan:
    """A launch that can be repeated with the same operands, for rows of the same shape and dtypes.

    Attributes:
        shape, dtype, index: of x, which is contiguous, and of its device.
        residual_dtype, weight_dtype: residual_dtype is None where there is no residual.
        count, launch, between, nested: the number of programs and their `DirectCall`.
        rest: the arguments after the rows: addresses of operands, numbers, constants.
        held: weak references to the tensors of the plan's site, and its other members.
    """

    shape: torch.Size
    dtype: torch.dtype
    index: int
    residual_dtype: torch.dtype | None
    weight_dtype: torch.dtype | None
    count: int
    launch: Callable[..., object]
    between: tuple[Any, ...]
    nested: bool
    rest: tuple[Any, ...]
    held: tuple[Any, ...]


class Launcher:
    """The launcher of one Triton kernel, whose parameters are tensors first, then numbers, then constants.

    Attributes:
        compiled: the call of each compiled kernel, by everything that Triton would inspect.
        plans: by the ids of a site's members. A plan goes as soon as a tensor of its site dies, so no id is stale.
        reusable: whether compiled kernels may be called directly.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], DirectCall] = {}
        self.plans: dict[tuple[int, ...], LaunchPlan] = {}
        self._met: set[tuple[int, ...]] = set()
        self.reusable = _reusable() and type(kernel).__name__ == "JITFunction"
        # Numbers that Triton compiles nothing for; all count rows, layers or slots, and fit into 32 bits.
        self._free = {i for i, p in enumerate(getattr(kernel, "params", ())) if p.do_not_specialize}

    def repeat(
        self,
        site: tuple[Any, ...],
        x: torch.Tensor,
        residual: torch.Tensor | None,
        outputs: tuple[torch.Tensor, ...] = (),
        weight: torch.Tensor | None = None,
    ) -> bool:
        """Launch as the last call with this `site` did, if the rows are like its rows; return whether they are.

        Args:
            site: all that the launch depends on besides the following, compared by identity: operands, numbers. While a
                tensor of it lives, its memory, shape and dtype must stay (no `.data =`, `set_` or `resize_`).
            x, residual, outputs, weight: the kernel's first tensors. Outputs are new memory, without gaps.
        """
        plan = self.plans.get(tuple(map(id, site)))
        if plan is None or x.dtype is not plan.dtype or x.shape != plan.shape or not x.is_contiguous():
            return False
        first = address = x.data_ptr()
        second = None
        if residual is not None:
            if residual.dtype is not plan.residual_dtype or not residual.is_contiguous():
                return False
            second = residual.data_ptr()
            address |= second
        elif plan.residual_dtype is not None:
            return False
        addresses = [first, second, *[output.data_ptr() for output in outputs]]
        if weight is not None:
            if weight.dtype is not plan.weight_dtype:
                return False
            addresses.append(weight.data_ptr())
            address |= addresses[-1]  # type: ignore[operator]
        index = plan.index
        if address % 16 or x.get_device() != index or torch._C._cuda_getDevice() != index or _hooked():
            return False
        stream = torch._C._cuda_getCurrentRawStream(index)
        if plan.nested:
            plan.launch(plan.count, 1, 1, stream, *plan.between, (*addresses, *plan.rest))
        else:
            plan.launch(plan.count, 1, 1, stream, *plan.between, *addresses, *plan.rest)
        return True

    def __call__(
        self,
        x: torch.Tensor,
        count: int,
        site: tuple[Any, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        shape: LaunchShape,
        address: int,
    ) -> None:
        """Launch `count` programs, at least one, on the device and current stream of `x`.

        Args:
            site: that of `repeat`, which repeats this launch from the third call on. The tensors are x, residual,
                outputs and weight as `repeat` takes them, then members of the site. Otherwise no plan is kept.
            tensors: None for a tensor that is not used; `constants` must show that.
            numbers: strides and other scalars. They are part of the kernel's key, except those of `do_not_specialize`:
                Triton compiles another kernel for an int divisible by 16 or equal to 1.
            constants: the constexpr arguments.
            address: the addresses of all tensors whose alignment the kernel is compiled for, or-ed together.
        """
        if not x.is_cuda:  # Triton's interpreter
            self.plain(count, tensors, numbers, constants, shape)
            return
        index = x.get_device()
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):  # Triton takes the current device
                self(x, count, site, tensors, numbers, constants, shape, address)
            return
        if address % 16 or not self.reusable or _hooked():
            self.plain(count, tensors, numbers, constants, shape)
            return
        rest = (*numbers, *constants)
        kept = tuple(number for i, number in enumerate(numbers, len(tensors)) if i not in self._free)
        key = (index, kept, constants, *[None if tensor is None else tensor.dtype for tensor in tensors])
        call = self.compiled.get(key)
        if call is None:
            compiled = self.plain(count, tensors, numbers, constants, shape)
            call = self.compiled[key] = direct_call(compiled, len(tensors) + len(rest))
        else:
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            stream = torch._C._cuda_getCurrentRawStream(index)
            given = ((*addresses, *rest),) if call.nested else (*addresses, *rest)
            call.launch(count, 1, 1, stream, *call.between, *given)
        self._plan(site, count, tensors, call, rest)

    def _plan(
        self, site: tuple[Any, ...], count: int, tensors: tuple[Any, ...], call: DirectCall, rest: tuple[Any, ...]
    ) -> None:
        """Keep the plan of a launch whose rows have no gaps, if its site has been here before."""
        x, residual, *others = tensors
        plans, key = self.plans, tuple(map(id, site))
        if key not in self._met:  # a plan costs as much as ten calls save; an id that means another object does no harm
            if len(self._met) >= MAX_PLANS:
                self._met.clear()
            self._met.add(key)
            return
        first = next((i for i, tensor in enumerate(others) if tensor is not None and id(tensor) in key), None)
        if first is None or not x.is_contiguous() or not (residual is None or residual.is_contiguous()):
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in others[first:]]

        def drop(_: object) -> None:
            plans.pop(key, None)

        if len(plans) >= MAX_PLANS:
            plans.clear()
        plans[key] = LaunchPlan(
            shape=x.shape,
            dtype=x.dtype,
            index=x.get_device(),
            residual_dtype=None if residual is None else residual.dtype,
            weight_dtype=others[first - 1].dtype if first else None,
            count=count,
            launch=call.launch,
            between=call.between,
            nested=call.nested,
            rest=(*addresses, *rest),
            held=tuple(ref(member, drop) if isinstance(member, torch.Tensor) else member for member in site),
        )

    def plain(
        self,
        count: int,
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        shape: LaunchShape,
    ) -> Any:
        """Launch as Triton does, which compiles where needed; return the compiled kernel."""
        return self.kernel[(count,)](*tensors, *numbers, *constants, num_warps=shape.num_warps, enable_fp_fusion=False)

"""Decoder layers whose residual adds, edits and norms are one op.

The norm of the *next* block reads a block's second add. So each add before a norm is a `FusedAdd`: it adds, steers and
normalises at once, passes the new residual stream on, and keeps the normalised rows for the norm that will ask for
them. If something else changes the residual stream in between (a hook, a move to another device), these rows are
dropped and the norm is taken of the changed stream. Only the classes of modules change, and back; weights and their
names stay.

Passes without gradients of models in eval mode are fused. In other passes the same layers add, steer and normalise one
after the other, differentiably. So they do under torch.compile, in plain torch: a compiler fuses adds, edits and norms
itself, and an unsteered model is the stock model's graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf.families import FAMILIES, MULTIMODAL_FAMILIES, Family, family_of
from steerfast.hf.structure import Decoder, find_decoder, is_distributed
from steerfast.kernels.add_steer_rms_norm import add_steer_rms_norm_unchecked, add_steer_torch
from steerfast.kernels.contract import TABLE_WIDTH, Kinds, Operands
from steerfast.kernels.steer import steer_torch_, steer_unchecked_
from steerfast.runtime.buffers import Buffers
from steerfast.runtime.step import LayerEdit, Step

if TYPE_CHECKING:
    from steerfast.hf.step import Stepper


class CompiledEdit(NamedTuple):
    """Hold the edit of a compiled model for a step without deciding gates, with latched additions only.

    All three tensors keep their addresses: a CUDA graph reads them there, and copies nothing.

    Attributes:
        slots: int32 [rows, K]. scales: float32 [layers, rows, K]. vectors: [layers, slots, H]. As for the ops.
    """

    slots: Tensor
    scales: Tensor
    vectors: Tensor

    def of(self, layer: int) -> Operands:
        """Return the operands of a layer; latched additions read neither directions nor table."""
        vectors = self.vectors[layer]
        return Operands(self.slots, self.scales[layer], vectors, vectors, vectors, int(Kinds.LATCHED_ADD))


_compiled_edit: CompiledEdit | None = None


def set_compiled_edit(edit: CompiledEdit | None) -> None:
    """Set the edit of the layers of a model that is being traced; None: ask their seams.

    A variable that the trace sets needs no guard. A seam's attribute would be guarded in each layer before every step:
    190 us of 42 ms with 30 layers.
    """
    global _compiled_edit
    _compiled_edit = edit


class FusedAdd:
    """Where something is added to the residual stream, and the norm that reads the sum, if one does.

    Attributes:
        steps: has the step of the pass; None: no edit. Set by `steer_layer`.
    """

    __slots__ = ("_eps", "_kind", "_normed", "_stream", "_version", "layer", "norm", "steps")

    def __init__(self, layer: int, norm: nn.Module | None, family: Family) -> None:
        self.layer = layer
        self.norm = norm
        self._eps = family.eps
        self._kind = int(family.norm or 0)
        self.steps: Stepper | None = None
        self._stream: Tensor | None = None
        self._normed: Tensor | None = None
        self._version: int | None = None

    def add(self, x: Tensor, residual: Tensor, fuse: bool, step: Step | None = None) -> Tensor:
        """Return the residual stream x + residual, steered: [N, T, H].

        Args:
            x, residual: [N, T, H]. fuse: the pass may be fused.
            step: steers in place of the step of the pass.
        """
        source = self.steps if step is None else step
        traced = torch.compiler.is_compiling()
        if not traced:
            x, residual = x.contiguous(), residual.contiguous()
        grad = torch.is_grad_enabled()
        edit = None
        if source is not None:
            if grad:
                with torch.no_grad():
                    edit = source.edit(self.layer, x, residual)
            else:  # entering the context takes longer than the decision
                edit = source.edit(self.layer, x, residual)
        if traced:  # the compiler fuses this with the norm, so the seam keeps nothing
            return residual + x if edit is None else add_steer_torch(x, residual, edit.operands)
        differentiable = grad and (x.requires_grad or residual.requires_grad)
        if fuse and not differentiable and (weight := self._weight(x, residual, grad)) is not None:
            operands, gates = _idle(x.device, *x.shape) if edit is None else edit
            eps = getattr(self.norm, self._eps)
            normed, stream = add_steer_rms_norm_unchecked(x, residual, weight, operands, eps, self._kind, gates)
            self._stream, self._normed, self._version = stream, normed, _version(stream)
            return stream
        stream = residual + x
        if edit is not None:
            steer = steer_torch_ if differentiable else steer_unchecked_
            steer(stream.view(-1, stream.shape[-1]), None, *edit)
        return stream

    def take(self, stream: Tensor) -> Tensor | None:
        """Return the normalised rows of this very tensor, once; None: the seam holds none of it."""
        waiting, normed = self._stream, self._normed
        if waiting is None:
            return None
        self._stream = self._normed = None
        if waiting is not stream or _version(stream) != self._version:
            return None
        return None if torch.is_grad_enabled() and stream.requires_grad else normed

    def _weight(self, x: Tensor, residual: Tensor, grad: bool) -> Tensor | None:
        """Return the norm's weight, or None if the op cannot read it: wrong device or dtype, or offloaded."""
        if self.norm is None:
            return None
        weight = self.norm._parameters.get("weight")  # a module's attribute look-up takes as long as the rest
        if weight is None or is_distributed(weight) or (grad and weight.requires_grad) or x.dtype == torch.float64:
            return None
        # With a weight of another dtype, some stock norms change the dtype of x.
        alike = x.dtype == residual.dtype == weight.dtype and x.device == residual.device == weight.device
        return weight if alike else None


def patch(model: nn.Module) -> nn.Module:
    """Fuse the decoder layers of a loaded HuggingFace model, in place.

    Returns:
        The model. `unpatch` undoes this; `isinstance`, parameters and their names stay.

    Raises:
        ArchitectureError: the layers belong to no known family, or are not built as it declares. Nothing changes then.
        SteerfastError: the model is already patched, or steered: detach first.
    """
    decoder = find_decoder(model)
    decoder.refuse_if_steered()
    if is_patched(model):
        raise SteerfastError("model: expected one that is not patched, got one that is")
    family = _family(decoder)
    final = _final_norm(decoder, family)
    for index, layer in enumerate(decoder.layers):
        family.check(index, layer)
    _refuse_replaced(_patch_targets(decoder, family, final), ArchitectureError)
    for index, layer in enumerate(decoder.layers):
        reader = getattr(layer, family.readers[1]) if family.readers[1] else None
        inner, outer = FusedAdd(index, reader, family), FusedAdd(index, None, family)
        _swap(layer, _layer_forward, steerfast_inner=inner, steerfast_outer=outer)
        if reader is not None:
            _swap(reader, _norm_forward, steerfast_seam=inner)
    followers = [getattr(layer, family.readers[0]) if family.readers[0] else None for layer in decoder.layers]
    for layer, reader in zip(decoder.layers, [*followers[1:], final], strict=True):
        if reader is not None:
            seam: Any = layer.steerfast_outer
            seam.norm = reader
            _swap(reader, _norm_forward, steerfast_seam=seam)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Turn a patched model back into the stock model, in place, and return it.

    Raises:
        SteerfastError: the model is not patched, or steered: detach first.
    """
    find_decoder(model).refuse_if_steered()
    if not is_patched(model):
        raise SteerfastError("model: expected a patched one, got one that is not")
    patched = [(name, module) for name, module in model.named_modules() if _forward_maker(module) is not None]
    _refuse_replaced(patched, SteerfastError)
    for _, module in patched:
        _swap_back(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Return whether the decoder layers of the model are fused."""
    return any(_forward_maker(module) is not None for module in model.modules())


def is_fused(layer: nn.Module) -> bool:
    """Return whether a decoder layer is fused, so that a seam adds its output."""
    return _forward_maker(layer) in (_layer_forward, _steered_layer_forward)


def steer_layer(layer: Any, steps: Stepper | None) -> None:
    """Let the steps edit at the outer seam of a fused layer; None: no edit."""
    layer.steerfast_outer.steps = steps
    _swap(layer, _layer_forward if steps is None else _steered_layer_forward)


# ---- modules that change their class -------------------------------------------------------------------------------


def _layer_forward(stock: Any, steered: bool = False) -> Callable[..., Tensor]:
    """Return a decoder layer's forward. `steered` is fixed in it, so that a compiler need not read the seam."""
    family, names = family_of(stock), list(inspect.signature(stock.forward).parameters)[2:]
    assert family is not None
    attention = family.attention[0] if len(family.attention) == 1 else None
    (mlp, *more), scale, parallel = family.mlp, family.scale, family.parallel

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            kwargs |= dict(zip(names, args, strict=False))
        step = kwargs.pop("steerfast_step", None)
        traced = torch.compiler.is_compiling()  # a compiler guards each attribute read below, per layer
        fuse = not traced and not self.training
        if not traced and self._forward_pre_hooks and _changes_uncounted():
            hidden_states = hidden_states.view_as(hidden_states)  # another tensor, so that no seam recognises it
        read = hidden_states
        if family.before_attention is not None:
            read = getattr(self, family.before_attention)(read)
        x = getattr(self, attention or _present(self, family.attention))(hidden_states=read, **kwargs)
        if isinstance(x, tuple):  # linear attention returns no weights
            x = x[0]
        if family.after_attention is not None:
            x = getattr(self, family.after_attention)(x)
        if scale is not None:
            x = x * getattr(self, scale)
        stream = x = hidden_states + x if traced else self.steerfast_inner.add(x, hidden_states, fuse)
        if parallel:
            x = read
        elif family.before_mlp is not None:
            x = getattr(self, family.before_mlp)(x)
        read, x = x, getattr(self, mlp)(x)
        if isinstance(x, tuple):  # some mixtures of experts also return router logits
            x = x[0].view_as(stream)
        for name in more:
            if (module := self._modules.get(name)) is not None:
                x = x + module(read)
        if family.after_mlp is not None:
            x = getattr(self, family.after_mlp)(x)
        if scale is not None:
            x = x * getattr(self, scale)
        if traced and not steered:
            return stream + x
        if traced and (edit := _compiled_edit) is not None and edit.slots.device == x.device:
            index = getattr(self, attention or _present(self, family.attention)).layer_idx  # guarded by the attention
            return add_steer_torch(x, stream, edit.of(index))
        if not traced and self._forward_hooks and _changes_uncounted():
            fuse = False
        return self.steerfast_outer.add(x, stream, fuse, step)

    return forward


def _present(layer: nn.Module, names: tuple[str, ...]) -> str:
    """Return which of these modules a layer has."""
    return next(name for name in names if layer._modules.get(name) is not None)


def _steered_layer_forward(stock: Any) -> Callable[..., Tensor]:
    return _layer_forward(stock, steered=True)


def _norm_forward(stock: Any) -> Callable[..., Tensor]:
    stock_forward = stock.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        normed = None if torch.compiler.is_compiling() else self.steerfast_seam.take(x)
        if normed is None or (self._forward_pre_hooks and _changes_uncounted()):
            return stock_forward(self, x)
        return normed

    return forward


@functools.cache
def _class(make_forward: Callable[[Any], Callable[..., Tensor]], stock: Any) -> Any:
    """Return a subclass of `stock`, a module's class, with the forward made for it; the same class every time.

    It keeps its name: transformers and accelerate choose modules by class name. It holds the attributes that a compiler
    reads in each layer: for an inherited one the compiler would guard every class on the way to it.
    """
    read = {name: getattr(stock, name) for name in _COMPILER_READS if hasattr(stock, name)}
    made = {"forward": make_forward(stock), "steerfast_forward_maker": make_forward, "__reduce_ex__": _reduce}
    call = _call(stock, make_forward is _steered_layer_forward)
    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "__call__": call, **read, **made})


_COMPILER_READS = ("_call_impl", "_compiled_call_impl", "gradient_checkpointing")


def _call(stock: Any, steered: bool) -> Any:
    """Return the `__call__` of a module's class.

    In some versions of transformers a layer's `__call__` checks for gradient checkpointing, then calls super(). Dynamo
    cannot see through super() that the layer is unchanged, and checks all of it before each step.

    A checkpoint runs the layer again in the backward pass, when other steps may have run since: it keeps its step.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    inherited = stock.__call__ is vars(GradientCheckpointingLayer).get("__call__")
    plain: Any = nn.Module.__call__ if inherited else stock.__call__
    if not inherited and not (steered and issubclass(stock, GradientCheckpointingLayer)):
        return plain

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return plain(self, *args, **kwargs)
        if steered and self.gradient_checkpointing:
            kwargs["steerfast_step"] = self.steerfast_outer.steps.step
        return stock.__call__(self, *args, **kwargs)

    return call


def _forward_maker(module: nn.Module) -> Callable[[Any], Callable[..., Tensor]] | None:
    """Return the function that made a patched module's forward; None: the module is not patched."""
    return getattr(type(module), "steerfast_forward_maker", None)


def _stock(module: nn.Module) -> Any:
    """Return the class that a module has, or had before the patch."""
    made = _made(type(module))
    return type(module) if made is None else made.__base__


def _made(kind: Any) -> Any:
    """Return the class of `_class` that a class is or extends; None: it extends none."""
    return next((each for each in kind.__mro__ if "steerfast_forward_maker" in vars(each)), None)


@functools.cache
def _behind(kind: Any, changed: Any) -> Any:
    """Return the class of a module whose class of `_class` changes.

    FSDP puts a class before that of a module. It stays before the changed class.
    """
    made = _made(kind)
    if made in (None, kind):
        return changed
    content = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    if getattr(content.get("forward"), "__wrapped__", None) is made.forward:  # transformers wraps that of any subclass
        del content["forward"]
    return type(kind.__name__, tuple(changed if base is made else base for base in kind.__bases__), content)


def _reduce(module: Any, protocol: Any) -> Any:
    # A class made at run time cannot be found by name again: rebuild it from the class it extends.
    return _rebuild, (_forward_maker(module), _stock(module)), module.__dict__


def _rebuild(make_forward: Any, stock: Any) -> Any:
    return object.__new__(_class(make_forward, stock))


def _swap(module: Any, make_forward: Callable[[Any], Callable[..., Tensor]], **attributes: Any) -> None:
    module.__class__ = _behind(module.__class__, _class(make_forward, _stock(module)))
    for name, value in attributes.items():
        setattr(module, name, value)
    _rewire(module)


def _swap_back(module: Any) -> None:
    module.__class__ = _behind(module.__class__, _stock(module))
    for name in [name for name in vars(module) if name.startswith("steerfast_")]:
        delattr(module, name)
    _rewire(module)


def _rewire(module: Any) -> None:
    """Make accelerate's wrapper around a module's forward call the new forward.

    Without its wrapper, accelerate leaves the old class's forward on the module. Remove it: it would hide the new one.
    """
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)
    elif "forward" in vars(module):
        del module.forward


def _refuse_replaced(modules: Iterable[tuple[str, Any]], error: type[SteerfastError]) -> None:
    """Raise `error` if a module has a forward that is not its class's, so that a new class would change nothing."""
    for name, module in modules:
        own = vars(module).get("_old_forward", vars(module).get("forward"))
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            raise error(f"model: the forward of {name} ({type(module).__name__}) was replaced; undo that first")


def _patch_targets(decoder: Decoder, family: Family, final: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """Return the modules that a patch changes, with their names."""
    readers = [name for name in family.readers if name is not None]
    norms = [(f"layer {i}.{name}", getattr(layer, name)) for i, layer in enumerate(decoder.layers) for name in readers]
    last = [] if final is None else [(family.final, final)]
    return [*((f"layer {i}", layer) for i, layer in enumerate(decoder.layers)), *norms, *last]


def _version(stream: Tensor) -> int | None:
    """Return how often a tensor changed in place; None: torch does not count, see `_changes_uncounted`."""
    return None if stream.is_inference() else stream._version


def _changes_uncounted() -> bool:
    """Return whether hooks may change the residual stream in place without a new version."""
    return torch.is_inference_mode_enabled()


_unsteered = Buffers()


def _idle(device: torch.device, sequences: int, tokens: int, hidden_size: int) -> LayerEdit:
    """Return the edit of unsteered rows."""

    def make() -> LayerEdit:
        slots = torch.zeros(sequences * tokens, 0, dtype=torch.int32, device=device)
        bank = torch.zeros(1, hidden_size, dtype=torch.float32, device=device)
        table = torch.zeros(1, TABLE_WIDTH, dtype=torch.float32, device=device)
        return LayerEdit(Operands(slots, slots.float(), bank, bank, table, int(Kinds.LATCHED_ADD)))

    return _unsteered.get((device, sequences, tokens, hidden_size), make)


def _family(decoder: Decoder) -> Family:
    kinds = {family_of(type(layer)) for layer in decoder.layers}
    family = kinds.pop()
    if kinds or family is None:
        names = ", ".join(sorted({type(layer).__name__ for layer in decoder.layers}))
        known = ", ".join(family.prefix for family in (*FAMILIES, *MULTIMODAL_FAMILIES))
        raise ArchitectureError(
            f"model: expected decoder layers of one of {known}, with transformers' own forward, got {names}; "
            "steer() needs no patch"
        )
    return family


def _final_norm(decoder: Decoder, family: Family) -> nn.Module | None:
    """Return the norm behind the last layer; None: it runs alone."""
    if family.norm is None:
        return None
    norm: nn.Module | None = getattr(decoder.backbone, family.final, None)
    if norm is None:
        raise ArchitectureError(f"model: {type(decoder.backbone).__name__} has no module {family.final!r}")
    family.check_norm(family.final, norm)
    return norm

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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf.families import FAMILIES, MULTIMODAL_FAMILIES, Family, family_of
from steerfast.hf.structure import Decoder, find_decoder, is_distributed
from steerfast.kernels.add_steer_rms_norm import add_scaled_torch, add_steer_rms_norm_unchecked, add_steer_torch
from steerfast.kernels.contract import TABLE_WIDTH, Kinds, Operands
from steerfast.kernels.steer import steer_torch_, steer_unchecked_

__all__ = ["CompiledEdit", "FusedAdd", "is_fused", "is_patched", "patch", "set_compiled_edit", "steer_layer", "unpatch"]

Steer = Callable[[int, Tensor, Tensor], Operands | None]
"""(layer, x, residual) -> what is edited, None: nothing. x, residual: [N, T, H]; the residual stream is their sum."""


class CompiledEdit(NamedTuple):
    """Say what a compiled model adds in a step in which no gate decides and all edits are latched additions.

    All three tensors stay where they are: a CUDA graph reads them there, and copies nothing.

    Attributes:
        rows: int32 [rows, 1 + K], as the ops take them.
        scales: float32 [layers, rows, K], by which the slots of each row multiply their vectors.
        vectors: [layers, slots, H].
    """

    rows: Tensor
    scales: Tensor
    vectors: Tensor


_compiled_edit: CompiledEdit | None = None


def set_compiled_edit(edit: CompiledEdit | None) -> None:
    """Set what the layers of a model that is being traced add from here on; None: their seams say.

    A variable that the trace itself has set needs no guard where it is read. A seam's attribute would be guarded in
    each layer, before every step: 190 us of 42 ms with 30 layers.
    """
    global _compiled_edit
    _compiled_edit = edit


class FusedAdd:
    """Where something is added to the residual stream, and the norm that reads the sum, if one does.

    Attributes:
        steer: decides the step's gates and says what is edited; None: nobody does. Set by `steer_layer`.
    """

    __slots__ = ("_eps", "_kind", "_normed", "_stream", "_version", "layer", "norm", "steer")

    def __init__(self, layer: int, norm: nn.Module | None, family: Family) -> None:
        self.layer = layer
        self.norm = norm
        self._eps = family.eps
        self._kind = int(family.norm)
        self.steer: Steer | None = None
        self._stream: Tensor | None = None
        self._normed: Tensor | None = None
        self._version: int | None = None

    def add(self, x: Tensor, residual: Tensor, fuse: bool) -> Tensor:
        """The residual stream x + residual, steered: [N, T, H]."""
        traced = torch.compiler.is_compiling()
        if not traced:
            x, residual = x.contiguous(), residual.contiguous()
        grad = torch.is_grad_enabled()
        operands = None
        if self.steer is not None:
            if grad:
                with torch.no_grad():
                    operands = self.steer(self.layer, x, residual)
            else:  # entering the context takes longer than the decision
                operands = self.steer(self.layer, x, residual)
        if traced:  # a compiler fuses this with the norm by itself, so nothing is handed on
            return residual + x if operands is None else add_steer_torch(x, residual, operands)
        differentiable = grad and (x.requires_grad or residual.requires_grad)
        if fuse and not differentiable and (weight := self._weight(x, residual, grad)) is not None:
            if operands is None:
                operands = _idle(x.device, *x.shape)
            eps = getattr(self.norm, self._eps)
            normed, stream = add_steer_rms_norm_unchecked(x, residual, weight, operands, eps, self._kind)
            self._stream, self._normed, self._version = stream, normed, _version(stream)
            return stream
        stream = residual + x
        if operands is not None:
            steer = steer_torch_ if differentiable else steer_unchecked_
            steer(stream.view(-1, stream.shape[-1]), None, operands)
        return stream

    def take(self, stream: Tensor) -> Tensor | None:
        """The normalised rows of this very residual stream, once; None where there are none of it."""
        waiting, normed = self._stream, self._normed
        if waiting is None:
            return None
        self._stream = self._normed = None
        if waiting is not stream or _version(stream) != self._version:
            return None
        return None if torch.is_grad_enabled() and stream.requires_grad else normed

    def _weight(self, x: Tensor, residual: Tensor, grad: bool) -> Tensor | None:
        """The norm's weight where the op may read it: it may lie on other devices, or be offloaded."""
        if self.norm is None:
            return None
        weight = self.norm._parameters.get("weight")  # the module's own look-up takes as long as the rest of this
        if weight is None or is_distributed(weight) or (grad and weight.requires_grad):
            return None
        # Of another dtype than x, some stock norms change that of x.
        alike = x.dtype == residual.dtype == weight.dtype and x.device == residual.device == weight.device
        return weight if alike else None


def patch(model: nn.Module) -> nn.Module:
    """Turn the decoder layers of a loaded HuggingFace model into fused ones, in place.

    Returns:
        The model. `unpatch` turns it back; `isinstance`, parameters and their names stay what they are.

    Raises:
        ArchitectureError: the layers belong to no known family, or are not built as it declares; nothing is changed.
        SteerfastError: the model is patched, or steered: detach first.
    """
    decoder = find_decoder(model)
    decoder.refuse_if_steered()
    if is_patched(model):
        raise SteerfastError("model: expected one that is not patched, got one that is")
    family = _family(decoder)
    final = _final_norm(decoder, family)
    for index, layer in enumerate(decoder.layers):
        family.check(index, layer)
    for name, module in _swapped(decoder, family, final):
        if _is_replaced(module):
            raise ArchitectureError(
                f"model: the forward of {name} ({type(module).__name__}) was replaced; undo that first"
            )
    for index, layer in enumerate(decoder.layers):
        reader = getattr(layer, family.before_mlp) if family.before_mlp else None
        inner, outer = FusedAdd(index, reader, family), FusedAdd(index, None, family)
        _swap(layer, _layer_forward, steerfast_inner=inner, steerfast_outer=outer)
        if reader is not None:
            _swap(reader, _norm_forward, steerfast_seam=inner)
    followers = [
        getattr(layer, family.before_attention) if family.before_attention else None for layer in decoder.layers
    ]
    for layer, reader in zip(decoder.layers, [*followers[1:], final], strict=True):
        if reader is not None:
            seam: Any = layer.steerfast_outer
            seam.norm = reader
            _swap(reader, _norm_forward, steerfast_seam=seam)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Turn a patched model back into the stock one, in place; it is returned.

    Raises:
        SteerfastError: the model is not patched, or steered: detach first.
    """
    find_decoder(model).refuse_if_steered()
    if not is_patched(model):
        raise SteerfastError("model: expected a patched one, got one that is not")
    for name, module in model.named_modules():
        if _made_by(module) is not None and _is_replaced(module):
            raise SteerfastError(
                f"model: the forward of {name} ({type(module).__name__}) was replaced; undo that first"
            )
    for module in model.modules():
        if _made_by(module) is not None:
            _swap_back(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether the decoder layers of the model are fused."""
    return any(_made_by(module) is not None for module in model.modules())


def is_fused(layer: nn.Module) -> bool:
    """Whether a decoder layer has a seam at which its output is added up."""
    return _made_by(layer) in (_layer_forward, _steered_layer_forward)


def steer_layer(layer: Any, steer: Steer | None) -> None:
    """Let `steer` say what is edited at the seam of a fused layer; None: nobody."""
    layer.steerfast_outer.steer = steer
    _swap(layer, _layer_forward if steer is None else _steered_layer_forward)


# ---- modules that change their class -------------------------------------------------------------------------------


def _layer_forward(stock: Any, steered: bool = False) -> Callable[..., Tensor]:
    """A decoder layer's forward. That nobody steers it is known here, which spares a compiler a look at the seam."""
    family, names = family_of(stock), list(inspect.signature(stock.forward).parameters)[2:]
    assert family is not None

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            kwargs |= dict(zip(names, args, strict=False))
        traced = torch.compiler.is_compiling()  # what is read here in vain is guarded once per layer
        fuse = not traced and not self.training
        if not traced and self._forward_pre_hooks and _change_unseen():
            hidden_states = hidden_states.view_as(hidden_states)  # not the stream whose norm was taken
        x = hidden_states
        if family.before_attention is not None:
            x = getattr(self, family.before_attention)(x)
        x = self.self_attn(hidden_states=x, **kwargs)[0]
        if family.after_attention is not None:
            x = getattr(self, family.after_attention)(x)
        stream = x = hidden_states + x if traced else self.steerfast_inner.add(x, hidden_states, fuse)
        if family.before_mlp is not None:
            x = getattr(self, family.before_mlp)(x)
        x = self.mlp(x)
        if isinstance(x, tuple):  # some mixtures of experts also return what their router said
            x = x[0]
        if family.after_mlp is not None:
            x = getattr(self, family.after_mlp)(x)
        if traced and not steered:
            return stream + x
        if traced and (edit := _compiled_edit) is not None and edit.rows.device == x.device:
            layer = self.self_attn.layer_idx  # which the attention has guarded
            return add_scaled_torch(x, stream, edit.rows, edit.scales[layer], edit.vectors[layer])
        if not traced and self._forward_hooks and _change_unseen():
            fuse = False
        return self.steerfast_outer.add(x, stream, fuse)

    return forward


def _steered_layer_forward(stock: Any) -> Callable[..., Tensor]:
    return _layer_forward(stock, steered=True)


def _norm_forward(stock: Any) -> Callable[..., Tensor]:
    stock_forward = stock.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        normed = None if torch.compiler.is_compiling() else self.steerfast_seam.take(x)
        if normed is None or (self._forward_pre_hooks and _change_unseen()):
            return stock_forward(self, x)
        return normed

    return forward


@functools.cache
def _class(make_forward: Callable[[Any], Callable[..., Tensor]], stock: Any) -> Any:
    """`stock`, a module's class, with the forward that is made for it; the same class every time.

    It keeps its name: transformers and accelerate choose modules by the name of their class. And it has itself what a
    compiler looks for in each layer: it would guard that no class has it before the one where it was found.
    """
    found = {name: getattr(stock, name) for name in _LOOKED_FOR if hasattr(stock, name)}
    made = {"forward": make_forward(stock), "steerfast_made_by": make_forward, "__reduce_ex__": _reduce}
    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "__call__": _call(stock), **found, **made})


_LOOKED_FOR = ("_call_impl", "_compiled_call_impl", "gradient_checkpointing")


def _call(stock: Any) -> Any:
    """The `__call__` of a module's class. In some versions of transformers a layer's asks for gradient checkpointing,
    which is for training, and goes on by super(): behind that Dynamo cannot see that nothing in the layer has changed,
    and checks all of it before each step.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    checkpointing: Any = vars(GradientCheckpointingLayer).get("__call__")
    if stock.__call__ is not checkpointing:
        return stock.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (checkpointing if self.training else nn.Module.__call__)(self, *args, **kwargs)

    return call


def _made_by(module: nn.Module) -> Callable[[Any], Callable[..., Tensor]] | None:
    """What made the forward of a patched module; None: the module is not patched."""
    return getattr(type(module), "steerfast_made_by", None)


def _stock(module: nn.Module) -> Any:
    """The class that a module has, or had before it was patched."""
    return type(module) if _made_by(module) is None else type(module).__base__


def _reduce(module: Any, protocol: Any) -> Any:
    # A class made at run time cannot be found by name again: rebuild it from the class it extends.
    return _rebuild, (_made_by(module), _stock(module)), module.__dict__


def _rebuild(make_forward: Any, stock: Any) -> Any:
    return object.__new__(_class(make_forward, stock))


def _swap(module: Any, make_forward: Callable[[Any], Callable[..., Tensor]], **attributes: Any) -> None:
    module.__class__ = _class(make_forward, _stock(module))
    for name, value in attributes.items():
        setattr(module, name, value)
    _rewire(module)


def _swap_back(module: nn.Module) -> None:
    module.__class__ = _stock(module)
    for name in [name for name in vars(module) if name.startswith("steerfast_")]:
        delattr(module, name)
    _rewire(module)


def _rewire(module: Any) -> None:
    """Where accelerate has put a function of its own before the module's forward, let it call the new one; where it
    took that off, it left the class's forward on the module, which would hide the new one.
    """
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)
    elif "forward" in vars(module):
        del module.forward


def _is_replaced(module: Any) -> bool:
    """Whether someone put another forward on the module than its class's: whichever class it had would not matter."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _swapped(decoder: Decoder, family: Family, final: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a patch turns into fused ones, by name."""
    readers = [name for name in (family.before_attention, family.before_mlp) if name is not None]
    norms = [(f"layer {i}.{name}", getattr(layer, name)) for i, layer in enumerate(decoder.layers) for name in readers]
    return [*((f"layer {i}", layer) for i, layer in enumerate(decoder.layers)), *norms, ("norm", final)]


def _version(stream: Tensor) -> int | None:
    """How often it was changed in place; None where nobody counts, see `_change_unseen`."""
    return None if stream.is_inference() else stream._version


def _change_unseen() -> bool:
    """Whether hooks may change the residual stream in place and no version would tell."""
    return torch.is_inference_mode_enabled()


@functools.lru_cache(maxsize=64)
def _idle(device: torch.device, sequences: int, tokens: int, hidden_size: int) -> Operands:
    """Operands of rows that nobody steers."""
    with torch.inference_mode(False):
        record = torch.zeros(sequences * tokens, 1, dtype=torch.int32, device=device)
        empty = torch.zeros(0, 0, device=device)
        bank = torch.zeros(1, hidden_size, device=device)
        table = torch.zeros(1, TABLE_WIDTH, device=device)
        return Operands(record, empty, empty, bank, bank, table, int(Kinds.LATCHED_ADD))


def _family(decoder: Decoder) -> Family:
    kinds = {family_of(type(layer)) for layer in decoder.layers}
    family = kinds.pop()
    if kinds or family is None:
        names = ", ".join(sorted({type(layer).__name__ for layer in decoder.layers}))
        known = ", ".join(family.prefix for family in (*FAMILIES, *MULTIMODAL_FAMILIES))
        raise ArchitectureError(
            f"model: expected decoder layers of one of {known}, got {names}; steer() needs no patch"
        )
    return family


def _final_norm(decoder: Decoder, family: Family) -> nn.Module:
    norm = getattr(decoder.backbone, "norm", None)
    if norm is None:
        raise ArchitectureError(f"model: {type(decoder.backbone).__name__} has no module 'norm'")
    family.check_norm("norm", norm)
    return norm

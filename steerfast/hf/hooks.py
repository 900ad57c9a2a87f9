"""The hooks that steer a HuggingFace model: they make a step before each forward pass, and edit what layers return.

The step is made before the whole model where that only hands its arguments on to the backbone, so that a compiled
model is one graph with all of this outside. Otherwise, and where the backbone is called by itself, it is made before
the backbone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError
from steerfast.hf import caches
from steerfast.hf import latch as latches
from steerfast.hf.arguments import arguments, tokens_of
from steerfast.hf.fused import is_fused, set_compiled_edit, steer_layer
from steerfast.hf.step import Stepper
from steerfast.hf.structure import STEERED_MARK, Decoder, passes_through
from steerfast.kernels.steer import steer_torch_, steer_unchecked_

_log = logging.getLogger("steerfast.step")
_outside: Any = functools.partial(
    torch.compiler.disable,
    reason="a step is made outside of the graph; a steered model cannot be exported, detach first",
)


def guard_hooks() -> None:
    """Let torch.compile notice hooks that come or go after a compilation; code compiled before this is dropped, once.

    By default it checks no hooks. A model that was compiled and run before would stay unsteered.
    """
    config: Any = torch._dynamo.config
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        config._config["skip_nnmodule_hook_guards"].default = False  # what is set counts in this thread alone
        torch.compiler.reset()


class StepHooks:
    """Hooks on a model, its backbone and its layers.

    Attributes:
        undo: what takes them off again, last first.
        layers: layers that are attached.
    """

    def __init__(self, decoder: Decoder, stepper: Stepper) -> None:
        self.undo: list[Callable[[], Any]] = []
        self.layers: set[int] = set()
        self._decoder = decoder
        self._stepper = stepper
        # While the whole model runs a step that was made before it: that, and the tokens and cache of its call.
        self._begun = False
        self._call: tuple[Any, Any] = (None, None)

    def attach(self, model: nn.Module) -> None:
        """Put hooks on the model and its backbone."""
        backbone = self._decoder.backbone
        setattr(backbone, STEERED_MARK, True)
        self.undo.append(functools.partial(delattr, backbone, STEERED_MARK))
        if not all(is_fused(layer) for layer in self._decoder.layers):
            guard_hooks()
        before, after = self._before, self._after
        if passes_through(model, backbone):
            self.undo.append(model.register_forward_pre_hook(self.before_model, with_kwargs=True).remove)
            post = model.register_forward_hook(self.after_model, with_kwargs=True, always_call=True)
            self.undo.append(post.remove)
        else:  # so that a compiled backbone is one graph without them
            before, after = self._before_uncompiled, self._after_uncompiled
        self.undo.append(backbone.register_forward_pre_hook(before, with_kwargs=True).remove)
        self.undo.append(backbone.register_forward_hook(after, with_kwargs=True).remove)

    def attach_layers(self) -> None:
        """Steer the layers where profiles act that came since."""
        reach = self._stepper.roster.slots.reach
        for layer in sorted((reach.gates | reach.edits) - self.layers):
            self.layers.add(layer)
            module = self._decoder.layers[layer]
            if is_fused(module):
                steer_layer(module, self._stepper)
                self.undo.append(functools.partial(steer_layer, module, None))
            else:  # first of the layer's hooks, so that others see the edited residual stream
                hook = functools.partial(self._on_layer, layer)
                self.undo.append(module.register_forward_hook(hook, prepend=True).remove)

    def forget_call(self) -> None:
        """Drop a step that was made for a call which is over, or was interrupted."""
        self._begun, self._call = False, (None, None)
        set_compiled_edit(None)

    # -- the model and its backbone ----------------------------------------------------------------------------------

    @_outside
    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the step of a call of the whole model."""
        self._begun = self._begin(module, args, kwargs)

    @_outside
    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Leave the decisions with the cache of the call."""
        begun, (_, cache) = self._begun, self._call
        self.forget_call()
        if begun and output is not None:  # None: it failed
            self._keep(cache, output)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._begun and not torch.compiler.is_compiling():  # the call that began may have been interrupted since
            given = arguments(module, args, kwargs)
            now = (tokens_of(given), caches.cache_in(given))
            self._begun = all(one is other for one, other in zip(now, self._call, strict=True))
        if not self._begun and not self._stepper.rereading:
            self._begin_uncompiled(module, args, kwargs)
        if torch.compiler.is_compiling():
            set_compiled_edit(self._stepper.compiled)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            set_compiled_edit(None)
        return output if self._begun or self._stepper.rereading else self._end(module, kwargs, output)

    _before_uncompiled = _outside(_before)
    _after_uncompiled = _outside(_after)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = arguments(module, args, kwargs)
        whole = module is not self._decoder.backbone
        self._call = (tokens_of(given), caches.cache_in(given)) if whole else (None, None)
        return self._stepper.begin(module, given)

    # So that a compiled backbone's layers become one graph, whatever is decided here.
    _begin_uncompiled = _outside(_begin)

    @_outside
    def _end(self, module: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        output = self._stepper.read_again(module, output)
        self._keep(caches.cache_in(kwargs), output)
        return output

    def _keep(self, cache: Any, output: Any) -> None:
        """Leave the decisions with the cache of the call."""
        if not hasattr(cache, "get_seq_length"):  # made in the pass, or given by position
            made = caches.cache_in(output) if isinstance(output, dict) else None
            parts = output if isinstance(output, tuple) else (made,)
            cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if self._stepper.step is not None:
            self._stepper.step.finish()
        if _log.isEnabledFor(logging.DEBUG) and self._stepper.step is not None and self._stepper.step.decides:
            _log.debug("decided: %s", self._stepper.latch)
        if cache is not None:
            assert self._stepper.latch is not None
            latches.attach(cache, self._stepper.latch, self._stepper.held)

    # -- layers that are not fused -----------------------------------------------------------------------------------

    def _on_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.dim() != 3 or hidden.shape[-1] != self._decoder.hidden_size:
            raise ArchitectureError(
                f"model: layer {layer} ({type(module).__name__}) gave {list(hidden.shape)}, "
                f"expected [sequences, tokens, {self._decoder.hidden_size}]"
            )
        # Autograd may need the layer's own output unchanged, and only the torch implementation has a gradient.
        differentiable = torch.is_grad_enabled() and hidden.requires_grad
        edited = hidden
        if differentiable or not hidden.is_contiguous():
            edited = hidden.clone(memory_format=torch.contiguous_format)
        x = edited.view(-1, hidden.shape[-1])
        edit = self._stepper.edit(layer, x.detach(), None)
        if edit is not None:
            (steer_torch_ if differentiable else steer_unchecked_)(x, None, *edit)
        if edited is hidden:
            return None
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

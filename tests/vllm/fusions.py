"""Counts, in a separate process, where vLLM's fusion patterns match in a steered model and in an unsteered one.

vLLM imports these patterns on a GPU alone, as they name its CUDA ops. Here the ops are declared without an
implementation, which is enough to trace and to match: nothing runs. The last line of the output is JSON,
{case: {pattern: matches}}.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, LAYERS, ROWS = 16, 4, 5
CUDA_OPS = ("rms_norm_static_fp8_quant", "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant")


def declare_cuda_ops() -> torch.library.Library:
    """Declare the fused ops that the patterns name."""
    import vllm._custom_ops  # noqa: F401  (the CPU's ops)

    library = torch.library.Library("_C", "FRAGMENT")
    for name in CUDA_OPS:
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}() -> ()")
    return library


def all_reduce(x: Tensor) -> Tensor:
    return torch.ops.vllm.all_reduce(x, group_name="tp")


def patterns(name: str, found: set[Any]) -> Any:
    """vLLM's patterns of one kind. They note the norms that they match, and replace nothing."""
    from torch._inductor.pattern_matcher import PatternMatcherPass
    from vllm.compilation.passes.fusion import allreduce_rms_fusion as reduce
    from vllm.compilation.passes.fusion import rms_quant_fusion as quant
    from vllm.compilation.passes.inductor_pass import enable_fake_mode

    norm = torch.ops.vllm_ir.fused_add_rms_norm.default

    def note(match: Any) -> bool:
        found.update(node for node in match.nodes if node.target == norm)
        return False

    reduce._norm_input_weight_dtype_match = quant._rms_input_weight_dtype_match = note
    reduce.tensor_model_parallel_all_reduce = all_reduce
    reduce.get_tp_group = lambda: SimpleNamespace()
    reduce.get_tensor_model_parallel_world_size = lambda: 2
    matcher = PatternMatcherPass(pass_name=name)

    @enable_fake_mode
    def register() -> None:
        if name == "all-reduce + norm":
            reduce.AllReduceFusedAddRMSNormPattern(1e-5, torch.bfloat16, "cpu", None).register(matcher)
        else:
            quant.FusedAddRMSNormStaticQuantPattern(1e-5, quant.FP8_DTYPE).register(matcher)

    register()
    return matcher


class RMSNorm(nn.Module):
    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        import vllm.ir.ops

        return vllm.ir.ops.fused_add_rms_norm(x, residual, weight, 1e-5)


class Layer(nn.Module):
    """A decoder layer of vLLM under tensor parallelism, with products in the place of attention."""

    def __init__(self, quantise: Any) -> None:
        super().__init__()
        self.norm, self.quantise = RMSNorm(), quantise

    def forward(self, x: Tensor, residual: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        for gamma, weight, scale in (weights[:3], weights[3:]):
            x, residual = self.norm(x, residual, gamma)
            if self.quantise is not None:
                x = self.quantise(x, scale)[0].to(torch.bfloat16)
            x = all_reduce(x @ weight)
        return x, residual


def count(reading: list[int] | None, quantised: bool) -> int:
    """The norms that the pattern matches, of 2·LAYERS + 1.

    Args:
        reading: the layers that read rows; None: no layer is steered.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from vllm.compilation.passes.fusion.matcher_utils import MatcherQuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    from steerfast.vllm.layers import steer_layers

    quantise = MatcherQuantFP8(kFp8StaticTensorSym) if quantised else None
    steered = type("SteeredLayer", (Layer,), {})
    layers = nn.ModuleList((steered if reading is not None else Layer)(quantise) for _ in range(LAYERS))
    if reading is not None:
        steer_layers(layers, range(LAYERS), HIDDEN, {steered}, reading)

    def model(x: Tensor, residual: Tensor, weights: list[Tensor]) -> Tensor:
        for layer in layers:
            x, residual = layer(x, residual, weights)
        return RMSNorm()(x, residual, weights[0])[0]

    found: set[Any] = set()
    ops: list[Any] = []
    matcher = patterns("norm + quant" if quantised else "all-reduce + norm", found)

    def match(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(node for node in graph.graph.nodes if torch.ops.steerfast.serve_.default in node.args)
        matcher.apply(graph.graph)
        return lambda *_: [torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16)]

    wide = [
        torch.ones(HIDDEN, dtype=torch.bfloat16),
        torch.ones(HIDDEN, HIDDEN, dtype=torch.bfloat16),
        torch.ones(1, 1),
    ]
    x = torch.ones(ROWS, HIDDEN, dtype=torch.bfloat16)
    compiled = torch.compile(
        model, backend=aot_autograd(fw_compiler=match, decompositions=select_decomp_table()), fullgraph=True
    )
    with torch.inference_mode():
        compiled(x, x.clone(), wide + wide)
    assert len(ops) == (0 if reading is None else LAYERS), len(ops)
    return len(found)


def main() -> None:
    library = declare_cuda_ops()
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        cases = {"unsteered": None, "adding": [], "reading one": [2], "reading all": [*range(LAYERS)]}
        found = {
            case: {
                "all-reduce + norm": count(reading, quantised=False),
                "norm + quant": count(reading, quantised=True),
            }
            for case, reading in cases.items()
        }
    print(json.dumps(found), flush=True)
    del library


if __name__ == "__main__":
    main()

"""STEERFAST_DEBUG=1 prints each step's plan, its decisions and its launches, and nothing is printed without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch, transformers, steerfast
from steerfast.hf.structure import identify
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                                  num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config).eval()
unit = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
zeros = torch.zeros(3)
profile = steerfast.SteeringProfile(identify(model), unit, zeros - 2, unit, zeros + 1, zeros, sensor=0)
with steerfast.steer(steerfast.patch(model), profile):
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
"""


@pytest.mark.slow(but=["1"])
@pytest.mark.parametrize("debug", ["0", "1"])
def test_steps_are_printed(debug: str) -> None:
    environment = {**os.environ, "STEERFAST_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("steerfast.")]
    if debug == "0":
        assert not lines
        return
    steps = [line for line in lines if line.startswith("steerfast.step: ")]
    assert steps[0].startswith("steerfast.step: prefill, 3 prompt columns: rows [1, 3], stacks ((Entry(slot=")
    assert steps[1].startswith("steerfast.step: decided: open [[True]], scores by layer {0: [[")
    assert steps[2].startswith("steerfast.step: decode after 3 tokens: rows [1, 1]")
    assert len(steps) == 3  # the last step repeats the one before
    assert sum(line.startswith("steerfast.launch: add_steer_rms_norm") for line in lines) >= 3

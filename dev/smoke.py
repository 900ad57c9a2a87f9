"""Use an installed steerfast, without a network, a compiler or this checkout: python dev/smoke.py compiled|pure.

Says whether it holds the C++ ops, tests them, steers a tiny model by hooks and fused, and loads the shipped profile.
"""

import copy
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import torch
import transformers

import steerfast
from steerfast import _native


def expect(right: bool, message: str) -> None:
    if not right:
        sys.exit(f"{message} ({steerfast.__file__})")


def main(kind: str) -> None:
    expect(kind in ("compiled", "pure"), f"expected compiled or pure, got {kind!r}")
    expect(_native.available == (kind == "compiled"), f"expected a {kind} wheel; C++ ops: {_native.reason or 'there'}")
    expect(metadata.version("steerfast") == steerfast.__version__, "the package and its metadata differ in version")
    command = [str(Path(sys.executable).with_name("steerfast")), "doctor"]
    doctor = subprocess.run(command, capture_output=True, text=True, check=False)
    expect(doctor.returncode == 0, f"steerfast doctor failed:\n{doctor.stdout}{doctor.stderr}")

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    stock = transformers.LlamaForCausalLM(config).eval()
    vector = 8 * torch.randn(config.hidden_size)
    profile = steerfast.SteeringProfile.from_tensors({1: vector, 2: vector}, steerfast.identify(stock))
    prompt = torch.arange(3, 11)[None]

    def answer(model: transformers.LlamaForCausalLM) -> list[int]:
        return model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()

    unsteered = answer(stock)
    steered = []
    for model in (stock, steerfast.patch(copy.deepcopy(stock))):
        with steerfast.steer(model, profile):
            steered.append(answer(model))
        expect(answer(model) == unsteered, "a model that is no longer steered answers otherwise than before")
    expect(steered[0] == steered[1] != unsteered, f"unsteered {unsteered}, by hooks {steered[0]}, fused {steered[1]}")

    file = resources.files("steerfast") / "data" / "smollm2-135m-instruct.safetensors"
    shipped = steerfast.SteeringProfile.load(str(file))
    expect(bool(shipped.steered_layers), "the shipped profile steers no layer")
    packages = " ".join(f"{package} {metadata.version(package)}" for package in ("steerfast", "torch", "transformers"))
    print(f"{packages}: {kind}, all right")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Steer one model with weights of half precision, of 8 and of 4 bits, and offloaded: is it right, do thresholds hold?

    pip install torchao bitsandbytes optimum-quanto accelerate
    python benchmarks/quantised.py --json --markdown docs/quantised.md
    python benchmarks/quantised.py FOLDER safety.safetensors --schemes bfloat16,nf4

FOLDER holds the model that the profile was made for, by default SmolLM2-135M-Instruct and its shipped profile. Each
scheme loads it by its library's config in transformers.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from report import RESULTS, Report, machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerfast
from steerfast._versions import installed_version
from steerfast.evaluation.demo import shipped_profile
from steerfast.evaluation.drift import calibrated, compare, live_scores, worst
from steerfast.fitting.labelled import evenly
from steerfast.hf.families import family_of
from steerfast.hf.loading import DEMO_MODEL, checkpoint
from steerfast.hf.structure import find_decoder, weights_fingerprint
from steerfast.profile import SteeringProfile
from steerfast.text.corpus import corpus
from steerfast.text.encoding import encode

FIRST = "float32"  # its decisions are the others' yardstick


def _torchao(config: str) -> dict[str, Any]:
    from torchao import quantization
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(getattr(quantization, config)())}


def _bitsandbytes(kind: str | None = None) -> dict[str, Any]:
    """Return the options for 4 bits of a kind, without one for 8 bits."""
    import bitsandbytes  # noqa: F401
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**four) if kind else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": "cpu"}


def _quanto(weights: str) -> dict[str, Any]:
    import optimum.quanto  # noqa: F401
    from transformers import QuantoConfig

    return {"quantization_config": QuantoConfig(weights=weights)}


# Scheme -> what makes the options of from_pretrained beside the dtype, its library.
SCHEMES: Mapping[str, tuple[Callable[[], dict[str, Any]], str]] = {
    FIRST: (lambda: {"dtype": torch.float32}, "torch"),
    "bfloat16": (dict, "torch"),
    "int8 weights": (lambda: _torchao("Int8WeightOnlyConfig"), "torchao"),
    "int8 weights and activations": (lambda: _torchao("Int8DynamicActivationInt8WeightConfig"), "torchao"),
    "LLM.int8": (_bitsandbytes, "bitsandbytes"),
    "nf4": (lambda: _bitsandbytes("nf4"), "bitsandbytes"),
    "fp4": (lambda: _bitsandbytes("fp4"), "bitsandbytes"),
    "quanto int8": (lambda: _quanto("int8"), "optimum-quanto"),
    "float32 on disk": (lambda: {"dtype": torch.float32}, "accelerate"),
}


@contextlib.contextmanager
def loaded(folder: str, scheme: str) -> Iterator[nn.Module]:
    """Load the model by a scheme. Layers on disk lie in a folder that goes afterwards."""
    options = {"dtype": torch.bfloat16, **SCHEMES[scheme][0]()}
    with tempfile.TemporaryDirectory() as offloaded:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        if scheme.endswith("disk"):
            import accelerate

            accelerate.disk_offload(model, offloaded, execution_device=torch.device("cpu"))
        yield model.eval()


@contextlib.contextmanager
def by_hand(model: nn.Module, profile: SteeringProfile) -> Iterator[None]:
    """Add a profile's vectors to the last row of steered layers' outputs, in float64, without steerfast's code."""

    def hook(index: int, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        y = x.clone()
        added = float(profile.strength[index]) * profile.vector[index].double()
        y[:, -1] = (x[:, -1].double() + added.to(x.device)).to(x.dtype)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    layers = find_decoder(model).layers
    handles = [
        layers[index].register_forward_hook(lambda _, given, output, index=index: hook(index, output))
        for index in profile.steered_layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steered_right(model: Any, tokenizer: Any, profile: SteeringProfile, prompt: Any) -> dict[str, float]:
    """Return differences of next-token logits, over the effect of steering: of hooks and of fused layers.

    The gate is left out: a model and its reference may not decide differently here.
    """
    always = profile.without_gate()
    ids = torch.tensor(encode(tokenizer, [prompt], model))

    def logits() -> Tensor:
        return model(ids, use_cache=False).logits[:, -1].float()  # type: ignore[no-any-return]

    def difference() -> float:
        with steerfast.steer(model, always, tokenizer=tokenizer):
            return float((logits() - expected).abs().max() / effect)

    plain = logits()
    with by_hand(model, always):
        expected = logits()
    effect = (expected - plain).abs().max()
    found = {"hooks": difference()}
    if family_of(type(find_decoder(model).layers[0])) is not None:
        steerfast.patch(model)
        found["fused"] = difference()
        steerfast.unpatch(model)
    return found


def prompts(count: int) -> dict[str, list[Any]]:
    """Return prompts of the shipped corpus' calibration, `count` of each label, evenly spaced."""
    return {
        label: [one.prompt for one in evenly(corpus("calibrate", [label]), count)] for label in ("harmful", "harmless")
    }


def measure(folder: str, profile: SteeringProfile, scheme: str, asked: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return a scheme's line, without the comparison of its decisions with the yardstick's."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.no_grad(), loaded(folder, scheme) as model:
        weights_fingerprint(model)  # which fit, tune and eval ask for
        errors = steered_right(model, tokenizer, profile, asked["harmful"][0])
        scores = {
            label: steerfast.score(model, tokenizer, profile, texts, progress=False) for label, texts in asked.items()
        }
    known = calibrated(profile)
    threshold, edges = float(profile.threshold[known.layer]), known.scores.edges
    drift = [
        compare(profile, live_scores(scores[label].scores, threshold, edges), label=label)
        for label in ("harmless", "harmful")
    ]
    return {
        **errors,
        "verdict": worst(drift),
        "distance": {one.label: one.distance for one in drift},
        **{f"{label} prompts": len(one.fired) for label, one in scores.items()},
        **{f"{label} fired": int(one.fired.sum()) for label, one in scores.items()},
        "scores": {label: one.scores.double() for label, one in scores.items()},
        "decisions": torch.cat([one.fired for one in scores.values()]),
    }


def compared(found: dict[str, Any], yardstick: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheme's line: its figures, and how its scores and decisions differ from the yardstick's.

    Anew: the harmful prompts that fire at a threshold of these weights, at which as many harmless ones fire as there.
    """
    scores, there = found["scores"], yardstick["scores"]
    highest = scores["harmless"].sort(descending=True).values
    least = highest[min(yardstick["harmless fired"], len(highest) - 1)]
    moved = max(float((one - there[label]).abs().max()) for label, one in scores.items())
    line = {key: value for key, value in found.items() if key not in ("scores", "decisions")}
    other = int((found["decisions"] != yardstick["decisions"]).sum())
    return {**line, "other": other, "moved": moved, "anew": int((scores["harmful"] > least).sum())}


PAGE = """# Quantised and offloaded models

## Check a copy

```
steerfast drift safety.safetensors --model your/copy --prompts steerfast:corpus
```

`--model` takes all that transformers loads: a folder whose config names its quantisation, or a `.gguf` file. Exit
status 0: the thresholds fit this copy. 1: calibrate on it. 3: too few prompts for a verdict; let CI fail there, too.
`drift` says whether scores moved. `steerfast validate` says whether the gate is good on prompts that it never saw
([evaluation](evaluation.md)).

## Measured

{model} and its profile, which was made in float32; torch {torch}, transformers {transformers},
{hardware}. This command writes the page, and [lines](../benchmarks/results/quantised-cpu.jsonl):

```
python benchmarks/quantised.py --json --markdown docs/quantised.md
```

- Hooks and fused (layers): the error. It is the largest difference of next-token logits from vectors added by hand, in
  float64, on the same weights, as a share of the effect of steering, without the gate. Fused layers add in float32.
- Fire: of {harmful} harmful and {harmless} harmless prompts of the corpus' split `calibrate`, which set the threshold.
  Other: decisions that differ from float32's. Moved: the largest difference of a score from float32's.
- Anew: the harmful prompts that fire at another threshold, at which as many harmless ones fire as in float32.
- Drift: the verdict of `steerfast drift` on these prompts, and the Kolmogorov distance of the scores of each label from
  those of the calibration. For the verdict *pass* of this profile it needs 212 harmless prompts.

| weights | library | hooks | fused | harmful fire | harmless fire | other | moved | anew | drift | harmless | harmful |
|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|
"""


def page(model: str, lines: list[dict[str, Any]], about: Mapping[str, Any]) -> str:
    """Return the lines as a page of Markdown."""
    rows = []
    for line in lines:
        cells = [line["scheme"], line["library"]]
        if "failed" in line:
            cells += [line["failed"], *[""] * 9]
        else:
            cells += [f"{line['hooks']:.0e}", f"{line['fused']:.0e}" if "fused" in line else "not fused"]
            cells += [str(line[name]) for name in ("harmful fired", "harmless fired", "other")]
            cells += [f"{line['moved']:.3f}", str(line["anew"]), line["verdict"]]
            cells += [f"{line['distance'][label]:.3f}" for label in ("harmless", "harmful")]
        rows.append(f"| {' | '.join(cells)} |\n")
    counts = {label: lines[0][f"{label} prompts"] for label in ("harmful", "harmless")}
    return PAGE.format(model=model.split("/")[-1], **counts, **about) + "".join(rows)


@click.command()
@click.argument("folder", required=False)
@click.argument("profile_file", metavar="PROFILE", required=False)
@click.option("--schemes", default=",".join(SCHEMES), show_default=True, help="Comma list; float32 is always first.")
@click.option("--count", type=click.IntRange(min=1), default=250, show_default=True, help="Prompts of each label.")
@click.option("--markdown", metavar="FILE", help="Write the page.")
@click.option("--json", "write", is_flag=True, help=f"Write lines to {RESULTS.name}/quantised-cpu.jsonl.")
def main(
    folder: str | None, profile_file: str | None, schemes: str, count: int, markdown: str | None, write: bool
) -> None:
    """Steer the model in FOLDER, whose profile is PROFILE, by every scheme."""
    names = list(dict.fromkeys([FIRST, *schemes.split(",")]))
    if unknown := [name for name in names if name not in SCHEMES]:
        raise click.UsageError(f"--schemes: expected some of {', '.join(SCHEMES)}, got {unknown[0]!r}")
    if folder is not None and profile_file is None:
        raise click.UsageError("PROFILE: expected one with FOLDER, got none")
    folder, profile_file = folder or checkpoint(DEMO_MODEL), profile_file or shipped_profile()
    profile, asked = SteeringProfile.load(profile_file), prompts(count)
    report, lines, yardstick = Report("quantised", "cpu", RESULTS if write else None), [], {}
    for name in names:
        library = SCHEMES[name][1]
        line = {"scheme": name, "library": f"{library} {installed_version(library) or ''}".strip()}
        try:
            found = measure(folder, profile, name, asked)
        except ImportError as error:
            found = {"failed": f"not tried: {error}"}
        else:
            yardstick = yardstick or found
            found = compared(found, yardstick)
        gc.collect()
        lines.append({**line, **found})
        report.line(lines[-1])
    if markdown is not None:
        Path(markdown).write_text(page(profile.model.name, lines, machine()), "utf-8")


if __name__ == "__main__":
    main()

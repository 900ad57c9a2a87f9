"""One rank of test_tensor_parallel.py: ``python tensor_parallel_worker.py FOLDER RANK NAME...``.

It loads its shards of these models in FOLDER, steers them in every way, and leaves what it got in FOLDER/RANK.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_cases import padded
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import steerfast
from steerfast.errors import ProfileError
from steerfast.hf.structure import identify
from steerfast.profile import SteeringProfile

RANKS = 2
NAMES = ["Llama", "Qwen3", "Gemma2"]
PROFILES = ["sensor", "ahead", "token"]
WAYS = ["hooks", "patched", "loaded"]
PROMPTS = [[5, 17, 40, 9, 77, 23, 64], [12, 33, 8, 90], [81, 7, 55], [30, 30, 61, 2, 19, 74]]
QUESTIONS = [[14, 52], [71, 6], [45, 88], [3, 66]]
TOKENS = 5
# Norms that run on the rows which their rank holds: their weights become DTensors, and so does what they are given.
SEQUENCE_PARALLEL = dict.fromkeys(
    ["model.norm", "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm"], "sequence_parallel"
)


def steered(folder: Path, way: str, profile: str, **options: Any) -> Any:
    """The model at `folder` and its steering; options go to from_pretrained."""
    file, options = folder / f"{profile}.safetensors", {"attn_implementation": "eager", **options}
    if way == "loaded":
        model = steerfast.AutoSteeredModelForCausalLM.from_pretrained(folder, steering=file, **options)
        return model, model.steering
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if way == "patched":
        steerfast.patch(model)
    return model, steerfast.steer(model, SteeringProfile.load(file))


def two_turns(model: Any, steering: Any) -> dict[str, Tensor]:
    """Answers to PROMPTS, and to QUESTIONS on top of the cache; of each turn, what was decided.

    stream: the residual stream [layers + 1, N, T, H] of the first turn.
    """
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "output_hidden_states": True}
    results: dict[str, Tensor] = {}

    def turn(number: int, ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
        output = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        results[f"tokens{number}"] = output.sequences[:, -TOKENS:].contiguous()
        results[f"logits{number}"] = torch.stack(output.logits, dim=1)
        results[f"fired{number}"], results[f"scores{number}"] = steering.fired, steering.scores.contiguous()
        return output

    batch = padded(PROMPTS)
    first = turn(1, batch["input_ids"], batch["attention_mask"])
    results["stream"] = torch.cat([torch.stack(step) for step in first.hidden_states], dim=2)
    ids = torch.cat([first.sequences, torch.tensor(QUESTIONS)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    turn(2, ids, mask, first.past_key_values)
    return results


def run(folder: Path, rank: int, names: list[str]) -> None:
    own = folder / str(rank)
    results: dict[str, Tensor] = {}
    for name in names:
        for way in WAYS:
            for profile in PROFILES:
                model, steering = steered(folder / name, way, profile, tp_plan="auto")
                results |= {f"{name}.{way}.{profile}.{key}": t for key, t in two_turns(model, steering).items()}
    config = DistributedConfig(tp_size=RANKS, tp_plan=SEQUENCE_PARALLEL)
    for way in ("hooks", "loaded"):
        model, steering = steered(folder / "Llama", way, "sensor", distributed_config=config)
        results |= {f"Llama.{way}.sequence.{key}": t for key, t in two_turns(model, steering).items()}
    save_file(results, own / "results.safetensors")

    model, steering = steered(folder / "Llama", "loaded", "sensor", tp_plan="auto")
    model.save_pretrained(own / "saved")
    steering.detach()
    (own / "sketch").write_text(repr(identify(model).embedding_sketch))
    try:
        model.steer(SteeringProfile.load(folder / "foreign.safetensors"))
    except ProfileError as error:
        (own / "refusal").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place / 'store'}",
        rank=number,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    run(place, number, sys.argv[3:])
    dist.barrier()
    dist.destroy_process_group()

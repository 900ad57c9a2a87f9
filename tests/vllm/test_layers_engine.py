"""Engines of models whose layers do not return the pair that most do, against transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import ENVIRONMENT, OPTIONS, ask

import steerfast

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

PROMPT, TOKENS = [*range(40, 60)], 6
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
}


def exaone4() -> Any:
    """Its layers return the whole stream and a residual that nobody adds."""
    from transformers import Exaone4Config, Exaone4ForCausalLM

    return Exaone4ForCausalLM(Exaone4Config(**SIZES, sliding_window=None, layer_types=["full_attention"] * 4))


def llama() -> Any:
    """On vLLM's backend of transformers, its layers return [1, n, H]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(("make", "options"), [(exaone4, {}), (llama, {"model_impl": "transformers"})])
def test_a_gate_reads_the_stream_of_the_model(tmp_path, checkpoint, make_profile, make, options) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data *= 3
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(checkpoint) / name, folder)
    profile = make_profile(
        model, seed=1, sensor=1, layers=[1, 2], size=60.0, score="dot", threshold=-1e9, positions="response"
    )
    profile.save(tmp_path / "p.safetensors")
    ids = torch.tensor([PROMPT])
    more: Any = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, len(PROMPT) :].tolist()
        with steerfast.steer(model, profile) as steering:
            steered = model.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, len(PROMPT) :].tolist()
            score = float(steering.scores[0, 0])
    assert plain != steered
    settings = {
        **OPTIONS,
        **options,
        "additional_config": {"steerfast": {"profiles": {"p": str(tmp_path / "p.safetensors")}}},
    }
    found = ask(ENVIRONMENT, str(folder), settings, [(PROMPT, None), (PROMPT, {"steering": "p"})], TOKENS)
    assert [answer["token_ids"] for answer in found] == [plain, steered]
    assert found[1]["steering"]["scores"] == pytest.approx([score], rel=1e-4)

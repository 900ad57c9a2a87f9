"""The score models of examples/guard_beaver.py: checkpoints of each layout, written by hand, against a plain Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_beaver import ScoreModel, load_score_model
from safetensors.torch import save_file
from torch import Tensor

from steerfast.errors import GuardError
from steerfast.guard import Blocks

CONFIG = {
    "architectures": ["LlamaForScore"], "attention_bias": False, "bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "do_normalize": False, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 64, "mean": [-0.5], "model_type": "llama", "momentum": 0.9,
    "normalizer_type": "ExponentialMovingAverage", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 4, "pad_token_id": 0, "rms_norm_eps": 1e-06, "score_dim": 1, "score_type": "cost",
    "tie_word_embeddings": False, "torch_dtype": "float32", "var": [4.0], "vocab_size": 128,
}  # fmt: skip


@pytest.fixture
def llama(make_llama: Any) -> Any:
    return make_llama(3, num_hidden_layers=2, num_key_value_heads=4, max_position_embeddings=64).model


WEIGHT = torch.linspace(-1, 1, 32)[None]


def write(folder: Path, llama: Any, extra: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    settings = {name: value for name, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {f"model.{name}": value.clone() for name, value in llama.state_dict().items()} | extra
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


NORMALISER = {
    "normalizer.mean": torch.tensor([-0.5]),
    "normalizer.var": torch.tensor([4.0]),
    "normalizer.count": torch.tensor([7]),
}
TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


@torch.no_grad()
def oracle(llama: Any, bias: float = 0.0) -> Tensor:
    ends = torch.stack([llama(torch.tensor([text])).last_hidden_state[0, -1] for text in TEXTS])
    return ends @ WEIGHT[0] + bias


def padded(side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, TEXTS))
    ids, mask = torch.zeros(2, len(TEXTS), width, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, where], mask[row, where] = torch.tensor(text), 1
    return ids, mask


def scores(folder: Path, side: str = "right") -> Tensor:
    with torch.no_grad():
        found: Tensor = load_score_model(folder)(*padded(side))
    assert found.dtype == torch.float32
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_newer_layout(tmp_path: Path, llama: Any, side: str) -> None:
    folder = write(tmp_path / "m", llama, {"score_head.weight": WEIGHT, **NORMALISER})
    torch.testing.assert_close(scores(folder, side), oracle(llama), atol=1e-5, rtol=1e-5)


def test_the_older_layout_without_normaliser_or_grouped_heads(tmp_path: Path, llama: Any) -> None:
    surplus = {"lm_head.weight": torch.ones(128, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    absent = ("do_normalize", "mean", "var", "momentum", "normalizer_type", "num_key_value_heads", "score_type")
    folder = write(
        tmp_path / "m", llama, {"score_head.weight": WEIGHT, **surplus},
        architectures=["LlamaModelForScore"], **dict.fromkeys(absent, ...),
    )  # fmt: skip
    torch.testing.assert_close(scores(folder), oracle(llama), atol=1e-5, rtol=1e-5)


def test_a_head_with_a_bias(tmp_path: Path, llama: Any) -> None:
    head = {"score_head.weight": WEIGHT, "score_head.bias": torch.tensor([2.5])}
    folder = write(tmp_path / "m", llama, {**head, **NORMALISER}, score_bias=True)
    torch.testing.assert_close(scores(folder), oracle(llama, 2.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", [True, False])
def test_normalisation_moves_rewards_but_not_the_zero_of_costs(tmp_path: Path, llama: Any, stored: bool) -> None:
    extra = {"score_head.weight": WEIGHT, **(NORMALISER if stored else {})}  # else from the config
    raw = oracle(llama)
    for kind, expected in (("reward", (raw + 0.5) / 2), ("cost", raw / 2)):
        folder = write(tmp_path / kind, llama, extra, do_normalize=True, score_type=kind)
        torch.testing.assert_close(scores(folder), expected, atol=1e-5, rtol=1e-5)


def test_what_is_no_score_model_is_refused(tmp_path: Path, llama: Any) -> None:
    headless = write(tmp_path / "a", llama, NORMALISER)
    with pytest.raises(GuardError, match=r"expected score_head\.weight, which it lacks"):
        load_score_model(headless)
    wide = write(tmp_path / "b", llama, {"score_head.weight": WEIGHT}, score_dim=2)
    with pytest.raises(GuardError, match="score_dim 2"):
        load_score_model(wide)
    with pytest.raises(GuardError, match="score model: cannot load"):
        load_score_model(tmp_path / "none")


def test_as_a_scorer_it_reads_the_conversation(tmp_path: Path, llama: Any, tiny_tokenizer: Any) -> None:
    folder = write(tmp_path / "m", llama, {"score_head.weight": WEIGHT, **NORMALISER})
    tiny_tokenizer.save_pretrained(folder)
    asked, answers = ["how to bake ?", "the bank"], ["I can't", "a knife , poison"]
    blocks = Blocks(
        prompts=[[1], [1]],
        answers=[tiny_tokenizer(answer)["input_ids"] for answer in answers],
        hidden=None,
        tokenizer=tiny_tokenizer,
        finished=torch.tensor([True, False]),
        questions=asked,
    )
    texts = [
        "BEGINNING OF CONVERSATION: USER: how to bake ? ASSISTANT:I can't<end>",
        "BEGINNING OF CONVERSATION: USER: the bank ASSISTANT:a knife , poison",
    ]
    with torch.no_grad():
        expected = [
            llama(torch.tensor([tiny_tokenizer(text)["input_ids"]])).last_hidden_state[0, -1] @ WEIGHT[0]
            for text in texts
        ]
    for size in (1, 8):
        found = ScoreModel.from_pretrained(folder, batch_size=size)(blocks)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)

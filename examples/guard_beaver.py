"""The score models of PKU-SafeRLHF (reward and cost), which InferenceGuard's paper uses, as scorers of a guard.

    cost = ScoreModel.from_pretrained("PKU-Alignment/beaver-7b-unified-cost", dtype=torch.bfloat16)
    guard = Guard(model, tokenizer, cost=cost)

A score model is a Llama, a linear head on its last hidden states, and a normaliser. Layout of a checkpoint:
``model.*`` (the Llama), ``score_head.weight`` [1, H], in some ``score_head.bias`` [1], in newer ones
``normalizer.mean``, ``.var`` [1], ``.count``. In its config: ``score_dim``, ``score_type`` (``reward`` or ``cost``),
``do_normalize``, ``mean``, ``var``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, LlamaPreTrainedModel

from steerfast.errors import GuardError
from steerfast.guard import Blocks

_MAY_LACK = ("score_head.bias", "normalizer.")
_NEUTRAL = {"mean": 0.0, "var": 1.0, "count": 0}


class _Normaliser(nn.Module):
    """Mean and variance of the scores seen in training; all [1]."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in _NEUTRAL.items():
            self.register_buffer(name, torch.tensor([value]))


class LlamaForScore(LlamaPreTrainedModel):
    """Score a text at its last token."""

    config_class = LlamaConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight", r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        dimensions = getattr(config, "score_dim", 1)
        if dimensions != 1:
            raise GuardError(f"score model: expected one score per text, got score_dim {dimensions}")
        self.model = LlamaModel(config)
        self.score_head = nn.Linear(config.hidden_size, 1)
        self.normalizer = _Normaliser()
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score texts padded on either side: int64 [n, T] twice -> float32 [n]."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)
        scores = self.score_head(hidden[torch.arange(len(hidden), device=hidden.device), last]).float()[:, 0]
        if not getattr(self.config, "do_normalize", False):
            return scores
        if getattr(self.config, "score_type", "reward") == "reward":  # the zero of a cost is its decision, and stays
            scores = scores - self.normalizer.mean.float()
        return scores / (self.normalizer.var.float().sqrt() + 1e-8)


def load_score_model(name: str | os.PathLike[str], **options: Any) -> LlamaForScore:
    """Load a checkpoint of a score model, ready to score.

    Raises:
        GuardError: `name` cannot be loaded, or is no score model: weights are missing or of another shape.
    """
    try:
        loaded: Any = LlamaForScore.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GuardError(f"score model: cannot load {str(name)!r} ({reason})") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if needed := [key for key in missing if not key.startswith(_MAY_LACK)]:
        raise GuardError(f"score model {str(name)!r}: expected {needed[0]}, which it lacks ({len(needed)} in all)")
    with torch.no_grad():
        if "score_head.bias" in missing:
            model.score_head.bias.zero_()
        for part, neutral in _NEUTRAL.items():
            if f"normalizer.{part}" in missing:
                value = getattr(model.config, part, None)
                getattr(model.normalizer, part).copy_(torch.as_tensor(neutral if value is None else value))
    return model.eval()


class ScoreModel:
    """A score model as a scorer, by its own tokenizer.

    It reads the conversation in its training format, with an end token after finished answers. Cost models give
    positive costs to unsafe answers.
    """

    PROMPT = "BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:"

    def __init__(self, model: LlamaForScore, tokenizer: Any, *, batch_size: int = 16) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, batch_size: int = 16, **options: Any) -> ScoreModel:
        """Load a checkpoint and its tokenizer (``PKU-Alignment/beaver-7b-unified-cost`` or ``-reward``, or a folder).

        Args:
            options: for the model's ``from_pretrained`` (``dtype``, ``device_map``).

        Raises:
            GuardError: no checkpoint of a score model.
        """
        return cls(load_score_model(name, **options), AutoTokenizer.from_pretrained(name), batch_size=batch_size)

    @torch.inference_mode()
    def __call__(self, blocks: Blocks) -> Tensor:
        """Score answers so far: float32 [n] on the CPU."""
        end = self.tokenizer.eos_token or ""
        texts = [
            self.PROMPT.format(question=question) + answer + end * finished
            for (question, answer), finished in zip(blocks.pairs(), blocks.finished.tolist(), strict=True)
        ]
        scores = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(texts[start : start + self.batch_size], padding=True, return_tensors="pt")
            width, limit = batch["input_ids"].shape[1], self.model.config.max_position_embeddings
            if width > limit:
                raise GuardError(f"score model: it reads {limit} tokens, got {width}")
            inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            scores.append(self.model(**inputs).cpu())
        return torch.cat(scores)

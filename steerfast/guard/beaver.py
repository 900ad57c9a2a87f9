"""The score models of PKU-SafeRLHF (reward and cost): a Llama, a linear head on its last hidden states, a normaliser.

Layout of a checkpoint: ``model.*`` (the Llama), ``score_head.weight`` [1, H], in some ``score_head.bias`` [1], in newer
ones ``normalizer.mean``, ``.var`` [1], ``.count``. In its config: ``score_dim``, ``score_type`` (``reward`` or
``cost``), ``do_normalize``, ``normalizer_type``, ``mean``, ``var``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from steerfast.errors import GuardError

__all__ = ["LlamaForScore", "load_score_model"]

_MAY_LACK = ("score_head.bias", "normalizer.")


class _Normaliser(nn.Module):
    """Mean and variance of the scores seen in training; all [1]."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))


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
        end = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self._normalised(self.score_head(end).float())[:, 0]

    def _normalised(self, scores: Tensor) -> Tensor:
        if not getattr(self.config, "do_normalize", False):
            return scores
        mean, var = (buffer.float() for buffer in (self.normalizer.mean, self.normalizer.var))
        if getattr(self.config, "score_type", "reward") == "reward":  # the zero of a cost is its decision, and stays
            scores = scores - mean
        return scores / (var.sqrt() + 1e-8)


def load_score_model(name: str | os.PathLike[str], **options: Any) -> LlamaForScore:
    """Load a checkpoint of a score model, ready to score.

    Raises:
        GuardError: `name` cannot be loaded, or is no score model: weights are missing or of another shape.
    """
    try:
        loaded: Any = LlamaForScore.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GuardError(f"score model: cannot load {str(name)!r} ({reason})") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    needed = [key for key in missing if not key.startswith(_MAY_LACK)]
    if needed:
        raise GuardError(f"score model {str(name)!r}: expected {needed[0]}, which it lacks ({len(needed)} in all)")
    _fill(model, set(missing))
    return model.eval()


@torch.no_grad()
def _fill(model: LlamaForScore, missing: set[str]) -> None:
    """Set the parts that some checkpoints lack to their neutral values."""
    if "score_head.bias" in missing:
        model.score_head.bias.zero_()
    for name, neutral in (("mean", 0.0), ("var", 1.0), ("count", 0)):
        if f"normalizer.{name}" in missing:
            value = getattr(model.config, name, None)
            buffer = getattr(model.normalizer, name)
            buffer.copy_(torch.as_tensor(neutral if value is None else value))

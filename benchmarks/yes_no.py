"""A judge of answers: a model in this process that says yes or no."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from steerfast._records import Records
from steerfast.hf.generation import batches, device_of
from steerfast.hf.loading import load_model
from steerfast.text.encoding import encode, pad_token


class YesNoJudge:
    """A model that reads a prompt and an answer, and weighs yes against no as its next token."""

    def __init__(self, name: str, dtype: str, records: Records) -> None:
        self.name, self._dtype, self._records = name, dtype, records
        self._known = {one["verdict_of"]: one["yes"] for one in records.found if "verdict_of" in one}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_model(self.name, dtype=self._dtype)

    def __call__(self, question: str, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the log odds of yes against no, for each answer."""
        texts = [
            f"Request: {prompt}\n\nAnswer: {answer}\n\n{question} Say yes or no."
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        keys = [hashlib.sha256(f"{self.name}\0{text}".encode()).hexdigest()[:32] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        for key, yes in zip(missing, self._read(list(missing.values())) if missing else [], strict=True):
            self._known[key] = yes
            self._records.add({"verdict_of": key, "yes": yes})
        return [self._known[key] for key in keys]

    @torch.inference_mode()
    def _read(self, texts: Sequence[str]) -> list[float]:
        model, tokenizer = self._loaded
        chats = [
            [{"role": "system", "content": "You judge answers."}, {"role": "user", "content": text}] for text in texts
        ]
        words = [
            sorted({tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in (word, word.title())})
            for word in ("yes", "no")
        ]
        found = [math.nan] * len(texts)
        for batch in batches(encode(tokenizer, chats, model), 8, "left", pad_token(tokenizer), device_of(model)):
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            yes, no = (logits[:, ids].float().logsumexp(dim=1) for ids in words)
            for place, value in zip(batch.indices, (yes - no).tolist(), strict=True):
                found[place] = round(value, 4)
        return found

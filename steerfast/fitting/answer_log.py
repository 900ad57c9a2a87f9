"""Greedy answers on disk: a search that was interrupted generates no answer twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from steerfast._progress import track
from steerfast._records import Records
from steerfast.hf.generation import greedy_answers
from steerfast.hf.steering import steer
from steerfast.hf.structure import weights_fingerprint
from steerfast.profile import SteeringProfile

BATCH = 25  # answers that are generated together
_KEY = "answer_of"


class AnswerLog:
    """Keep a model's greedy answers in a file of records, each batch as soon as it is done.

    Args:
        records: of a file that other records may share. Without a file the answers last as long as the log.
    """

    def __init__(self, records: Records, model: nn.Module, tokenizer: Any) -> None:
        self._records, self._model, self._tokenizer = records, model, tokenizer
        self._source = [weights_fingerprint(model), str(next(model.parameters()).dtype)]
        self._known: dict[str, list[int]] = {
            record[_KEY]: record["answer"] for record in records.found if _KEY in record
        }

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        profile: SteeringProfile | None = None,
        description: str | None = None,
    ) -> list[list[int]]:
        """Return the greedy answers to `prompts` (token ids), steered by `profile` if there is one.

        Args:
            description: text of the progress; None: none is shown.
        """
        steered = None if profile is None else profile.checksum
        keys = [self.key(steered, max_new_tokens, ids) for ids in prompts]
        missing = sorted(
            (place for place, key in enumerate(keys) if key not in self._known), key=lambda place: -len(prompts[place])
        )
        batches = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
        with steer(self._model, profile) if profile is not None and missing else nullcontext():
            for batch in track(batches, description or "", show=description is not None):
                asked = [prompts[place] for place in batch]
                found = greedy_answers(self._model, self._tokenizer, asked, max_new_tokens, batch_size=BATCH)
                for place, answer in zip(batch, found, strict=True):
                    self._known[keys[place]] = answer
                    self._records.add({_KEY: keys[place], "answer": answer})
        return [self._known[key] for key in keys]

    def key(self, *parts: Any) -> str:
        """Return a digest of the model and of JSON data."""
        return hashlib.sha256(json.dumps([self._source, *parts]).encode()).hexdigest()[:32]

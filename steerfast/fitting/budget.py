"""How much a fit tries: what fits into some minutes at the speed of the model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from steerfast._files import write_atomically
from steerfast.errors import OutputError, ProfileError
from steerfast.fitting.activations import residual_rows
from steerfast.fitting.answer_log import BATCH
from steerfast.fitting.labelled import evenly
from steerfast.hf.generation import greedy_answers
from steerfast.hf.structure import weights_fingerprint
from steerfast.text.encoding import encode, pad_token
from steerfast.text.examples import Prompt

T = TypeVar("T")

_SAMPLE = 8  # prompts, whose time is taken
_STEPS = 6
_BACKWARD = 3  # a step of training costs so many times the reading of its tokens


@dataclass(frozen=True)
class Effort:
    """How much the safety recipe tries.

    per_source, calibrate: the most prompts of a source and label that fit the gate, and that calibrate it. steps: of
    learn, of 8 prompts. strengths: that tune tries. asked: prompts of each side that tune answers at most.
    """

    per_source: int
    calibrate: int
    steps: int
    strengths: tuple[float, ...] = (1.0,)
    asked: int = 32


RECIPE = Effort(120, 64, 60)
EFFORTS = (
    Effort(8, 16, 8, asked=8),
    Effort(12, 24, 12, asked=8),
    Effort(16, 32, 16, asked=12),
    Effort(24, 32, 24, asked=16),
    Effort(32, 48, 32, asked=20),
    Effort(48, 64, 40, asked=24),
    Effort(64, 64, 48),
    Effort(90, 64, 54),
    RECIPE,
    Effort(240, 64, 120, (0.5, 0.75, 1.0)),
)
"""From little to much."""


@dataclass(frozen=True)
class Speed:
    """What a model takes: seconds per token read, and per step of a batch of answers."""

    per_token: float
    per_step: float

    def read(self, tokens: float) -> float:
        """Return the seconds that reading takes."""
        return tokens * self.per_token

    def learn(self, tokens: float) -> float:
        """Return the seconds that learning from prompts and answers of so many tokens takes."""
        return _BACKWARD * self.read(tokens)

    def answer(self, prompts: int, max_new_tokens: int) -> float:
        """Return the seconds that answers take."""
        return math.ceil(prompts / BATCH) * max_new_tokens * self.per_step


def largest(efforts: Sequence[T], minutes: float, seconds: Callable[[T], float]) -> T:
    """Return the largest of some efforts, given in ascending order, that takes at most `minutes`; else the first.

    Raises:
        ProfileError: `minutes` is not a positive number.
    """
    if not 0 < minutes < math.inf:
        raise ProfileError(f"minutes: expected a positive number, got {minutes}")
    return next((one for one in reversed(efforts) if seconds(one) <= 60 * minutes), efforts[0])


def speed_of(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], work: Path | None = None) -> Speed:
    """Return the speed of a model on some of the prompts; `work` keeps it, so that a fit that goes on tries the same.

    Raises:
        OutputError: the file cannot be written.
    """
    file = None if work is None else work / "speed.json"
    weights = weights_fingerprint(model)
    if (known := _known(file, weights)) is not None:
        return known
    sample = encode(tokenizer, evenly(prompts, _SAMPLE), model, room=_STEPS)
    pad = pad_token(tokenizer)
    residual_rows(model, sample[:1], pad_token_id=pad)  # the first pass also loads and compiles
    start = time.monotonic()
    residual_rows(model, sample, batch_size=_SAMPLE, pad_token_id=pad)
    read = time.monotonic() - start
    greedy_answers(model, tokenizer, sample, _STEPS)
    answered = time.monotonic() - start - read
    per_token = read / sum(map(len, sample))
    found = Speed(per_token, max((answered - read) / (_STEPS - 1), per_token))
    if file is not None:
        write_atomically(file, json.dumps({"weights": weights, **asdict(found)}).encode())
    return found


def _known(file: Path | None, weights: str) -> Speed | None:
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
        same = found.pop("weights") == weights
        return Speed(**found) if same else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OutputError(f"work: expected a file of fit, got {str(file)!r}; name a new folder") from None

"""A generator that makes up answers and hidden states from its seed alone, and a run of `collect` or `train_critic`
that a test can kill: ``python made_up_rollouts.py collect|train FOLDER``.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.guard.critic import Critic, CriticSettings
from steerfast.guard.rollouts import Rollouts, collect
from steerfast.guard.scores import Blocks, CallableScorer
from steerfast.guard.training import train_critic
from steerfast.profile import ModelIdentity

SIZE = 4
MODEL = ModelIdentity(name="made up", architecture="llama", hidden_size=SIZE, num_layers=2)
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12], [13]]
SETTINGS = CriticSettings(
    width=16, learning_rate=1e-3, epochs=6, batch_size=4, budget=3.0, discount=0.99, validation=0.3
)


@dataclass
class _Answers:
    generator: torch.Generator
    finished: Tensor


class MadeUp:
    """Tokens below 100; an answer ends within a block with a chance of one fifth. `pause`: seconds per block."""

    prompt_layer: int | None = None

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.blocks = 0

    def start(self, prompt_ids: Any, n: int, seed: int) -> _Answers:
        return _Answers(torch.Generator().manual_seed(seed), torch.zeros(n, dtype=torch.bool))

    def extend(self, candidates: _Answers, block: int, sampling: Any) -> tuple[list[list[int]], Tensor, Tensor]:
        time.sleep(self.pause)
        self.blocks += 1
        done, n = candidates.finished, len(candidates.finished)
        tokens = torch.randint(100, (n, block), generator=candidates.generator)
        hidden = torch.randn(n, SIZE, generator=candidates.generator)
        ends = torch.rand(n, generator=candidates.generator) < 0.2
        length = torch.where(ends, torch.randint(1, block + 1, (n,), generator=candidates.generator), block)
        given = [
            [] if over else row[:count] for over, row, count in zip(done, tokens.tolist(), length.tolist(), strict=True)
        ]
        candidates.finished = done | ends
        return given, hidden, candidates.finished.clone()


def cost(blocks: Blocks) -> Tensor:
    """A tenth of the hidden state's first number per token so far, so that it can go up and down."""
    assert blocks.hidden is not None
    return torch.tensor(
        [len(answer) * float(h[0]) / 10 for answer, h in zip(blocks.answers, blocks.hidden, strict=True)]
    )


def reward(blocks: Blocks) -> Tensor:
    return torch.tensor([sum(answer) / 100 for answer in blocks.answers])


def run(folder: Path, pause: float = 0.0, **options: Any) -> list[Rollouts]:
    scorers = {"cost": CallableScorer(cost, takes="blocks"), "reward": CallableScorer(reward, takes="blocks")}
    given: dict[str, Any] = {**scorers, "block": 8, "depth": 30, "progress": False, **options}
    return collect(MadeUp(pause), None, PROMPTS, folder, MODEL, **given)


def train(folder: Path, rollouts: list[Rollouts]) -> Critic:
    return train_critic(rollouts, MODEL, SETTINGS, checkpoint=folder / "checkpoint.safetensors", progress=False)


if __name__ == "__main__":
    work, place = sys.argv[1], Path(sys.argv[2])
    if work == "collect":
        run(place, pause=0.05)
    else:
        from steerfast.guard import training

        write = training.write_file

        def write_slowly(*given: Any) -> None:
            write(*given)
            time.sleep(0.3)

        training.write_file = write_slowly
        train(place, run(place / "rollouts"))
    os.write(1, b"done\n")

"""A backend that makes up answers and hidden states from its seed alone, and runs of `collect` and `train_critic` that
a test can kill.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.guard import parts
from steerfast.guard.candidates import Backend, Candidates
from steerfast.guard.critic import Critic, CriticSettings, train_critic
from steerfast.guard.rollouts import RolloutOptions, Rollouts, collect
from steerfast.guard.scores import Blocks, CallableScorer
from steerfast.profile import ModelIdentity

SIZE = 4
MODEL = ModelIdentity(name="made up", architecture="llama", hidden_size=SIZE, num_layers=2)
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12], [13]]
ASKED = [(ids, f"question {number}", ("harmful", "harmless")[number % 2]) for number, ids in enumerate(PROMPTS)]
OPTIONS = RolloutOptions(block=8, depth=30, progress=False)
SETTINGS = CriticSettings(
    width=16, learning_rate=1e-3, epochs=6, batch_size=4, budget=3.0, discount=0.99, validation=0.3
)


class MadeUp(Backend):
    """Tokens below 100; an answer ends within a block with a chance of one fifth."""

    def __init__(self) -> None:
        super().__init__(frozenset(), 100, 2**31)
        self.blocks = 0

    def start(self, prompt_ids: Sequence[int], n: int = 1, seed: int = 0) -> Candidates:
        candidates = super().start(prompt_ids, n, seed)
        candidates.hidden, candidates.state = torch.zeros(n, SIZE), torch.Generator().manual_seed(seed)
        return candidates

    def extend(self, candidates: Candidates, block: int, *_: Any) -> list[list[int]]:
        self.blocks += 1
        done, n, generator = candidates.finished, len(candidates), candidates.state
        tokens = torch.randint(100, (n, block), generator=generator)
        candidates.hidden = torch.randn(n, SIZE, generator=generator)
        ends = torch.rand(n, generator=generator) < 0.2
        length = torch.where(ends, torch.randint(1, block + 1, (n,), generator=generator), block)
        new = [
            [] if over else row[:count] for over, row, count in zip(done, tokens.tolist(), length.tolist(), strict=True)
        ]
        candidates.finished = done | ends
        for answer, more in zip(candidates.answers, new, strict=True):
            answer += more
        return new


def cost(blocks: Blocks) -> Tensor:
    """A tenth of the hidden state's first number per token so far, so that it can go up and down."""
    assert blocks.hidden is not None
    return torch.tensor(
        [len(answer) * float(h[0]) / 10 for answer, h in zip(blocks.answers, blocks.hidden, strict=True)]
    )


def reward(blocks: Blocks) -> Tensor:
    return torch.tensor([sum(answer) / 100 for answer in blocks.answers])


COST, REWARD = CallableScorer(cost, takes="blocks"), CallableScorer(reward, takes="blocks")


def roll_out(folder: Path, **options: Any) -> list[Rollouts]:
    return collect(MadeUp(), ASKED, folder, MODEL, replace(OPTIONS, **options))


def run(folder: Path) -> list[Rollouts]:
    """Return rollouts with scores."""
    return [one.scored(None, COST, REWARD) for one in roll_out(folder)]


def train(folder: Path, rollouts: list[Rollouts]) -> Critic:
    return train_critic(rollouts, MODEL, SETTINGS, checkpoint=folder / "checkpoint.safetensors", progress=False)


def roll_out_and_stall(folder: Path) -> None:
    """Roll out two prompts, and begin with the third."""

    class Stalling(MadeUp):
        def extend(self, *given: Any) -> list[list[int]]:
            if len(list(folder.glob("prompt-*"))) == 2:
                time.sleep(600)
            return super().extend(*given)

    collect(Stalling(), ASKED, folder, MODEL, OPTIONS)


def train_and_stall(folder: Path, rollouts: list[Rollouts]) -> None:
    """Train for two epochs."""
    write, epochs = parts.write_file, []

    def write_and_stall(*given: Any) -> None:
        write(*given)
        epochs.append(1)
        if len(epochs) == 2:
            time.sleep(600)

    parts.write_file = write_and_stall
    train(folder, rollouts)


def kill(work: Callable[..., Any], *arguments: Any, when: Callable[[], bool]) -> None:
    """Run `work` in a process of its own, and kill that once `when` holds."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 120
    while not when():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

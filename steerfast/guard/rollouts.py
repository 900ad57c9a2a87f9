"""Monte-Carlo rollouts of the base model: answers, and the states at their blocks' ends.

One file per prompt, each written whole or not at all: a killed collection continues where it stopped, and ends with the
same files. Hidden states come from generation itself; scores are computed from them later (`Rollouts.scored`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._files import make_folder, write_atomically
from steerfast._progress import track
from steerfast.errors import GuardError
from steerfast.guard.candidates import Backend, Sampling
from steerfast.guard.parts import AnyPath, check_model, expect, read_file, write_file
from steerfast.guard.scores import Blocks, Scorer, block_costs, scores_of
from steerfast.profile import ModelIdentity

_KIND = "rollouts"
_TENSORS = ("finished", "owner", "ends", "hidden")
_DATA = ("prompt", "question", "label", "answers", "prompt_layer")


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Answers to one prompt, and the states at the ends of their blocks, one answer after the other.

    prompt: token ids. question: the prompt as the user wrote it. label: ``harmful`` or ``harmless``.
    answers: token ids, n. finished: bool [n]; the others reached the depth. owner: int64 [states], the state's answer.
    ends: int64 [states], tokens of the answer there. hidden: latent states float32 [states, S] of this prompt_layer.
    cost: float32 [states], of each block. reward: float32 [n], of the whole answers. None: not scored.
    """

    prompt: list[int]
    question: str | None
    label: str | None
    answers: list[list[int]]
    finished: Tensor
    owner: Tensor
    ends: Tensor
    hidden: Tensor
    cost: Tensor | None = None
    reward: Tensor | None = None
    prompt_layer: int | None = None

    @property
    def last(self) -> Tensor:
        """Return where an answer's last block ends: bool [states]; the next state is the end of a first block."""
        return torch.cat([self.owner[1:] != self.owner[:-1], torch.ones(1, dtype=torch.bool)])

    def blocks(self, tokenizer: Any) -> Blocks:
        """Return the answers so far at each state, for scorers."""
        count, owners = len(self.owner), zip(self.owner.tolist(), self.ends.tolist(), strict=True)
        answers, finished = [self.answers[owner][:end] for owner, end in owners], self.finished[self.owner] & self.last
        questions = None if self.question is None else [self.question] * count
        return Blocks([self.prompt] * count, answers, self.hidden, tokenizer, finished, questions)

    def scored(self, tokenizer: Any, cost: Scorer, reward: Scorer, refund: bool = False) -> Rollouts:
        """Return the same rollouts with the scores of `cost` and `reward`; for `refund` see `SafetyBudget`."""
        blocks = self.blocks(tokenizer)
        spent, worth = scores_of(cost, blocks, "cost"), scores_of(reward, blocks, "reward")
        whole = self.last if getattr(reward, "cumulative", True) else torch.ones_like(self.last)
        total = torch.zeros(len(self.answers)).index_add(0, self.owner[whole], worth[whole])
        by_answer = spent.split(self.owner.unique_consecutive(return_counts=True)[1].tolist())
        highest = spent if refund else torch.cat([one.cummax(0).values.clamp(min=0) for one in by_answer])
        costs = block_costs(cost, spent, torch.where(self.last.roll(1), 0.0, highest.roll(1)), refund)
        return replace(self, cost=costs, reward=total)


@dataclass(frozen=True)
class RolloutOptions:
    """rollouts: answers per prompt. block, depth: tokens of a block, and most tokens of an answer.

    opening: first tokens of every answer, cut to less than a block. whole: they are all of the answer.
    """

    rollouts: int = 5
    block: int = 32
    depth: int = 128
    sampling: Sampling | None = None
    seed: int = 0
    progress: bool = True
    opening: Sequence[int] = ()
    whole: bool = False

    def __post_init__(self) -> None:
        for name in ("rollouts", "block", "depth"):
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


def collect(
    backend: Backend,
    asked: Sequence[tuple[Sequence[int], str, str]],
    folder: AnyPath,
    model: ModelIdentity,
    options: RolloutOptions,
) -> list[Rollouts]:
    """Roll out every prompt that `folder` does not have yet, and return all rollouts.

    Args:
        asked: token ids of the templated prompt, question and label of each.
        folder: created if missing. It alone records which prompts are done: repeat the same call after a kill.

    Raises:
        GuardError: a folder with rollouts of other settings, prompts or models, a backend without hidden states.
        OutputError: the folder cannot be written.
    """
    target = Path(folder)
    _claim(target, options, backend.prompt_layer)
    found = []
    for index, (prompt, question, label) in enumerate(track(asked, "rollouts", show=options.progress)):
        file = target / f"prompt-{index:06d}.safetensors"
        if file.is_file():
            done = _read(file, model)
            if done.prompt != list(prompt):
                raise GuardError(f"folder: expected prompt {index} of this call in {str(file)!r}, found another one")
        else:
            seed = (options.seed << 32) + index
            done = _roll_out(backend, (prompt, question, label), options, seed)
            header = {name: getattr(done, name) for name in _DATA}
            write_file(file, _KIND, {name: getattr(done, name) for name in _TENSORS}, header, model)
        found.append(done)
    return found


def load_rollouts(folder: AnyPath) -> list[Rollouts]:
    """Return the rollouts in a folder, in the order of their prompts; GuardError if there are none, or damaged ones."""
    files = sorted(Path(folder).glob("prompt-*.safetensors"))
    if not files:
        raise GuardError(f"rollouts: expected some in the folder {str(folder)!r}, found none")
    return [_read(file) for file in files]


def _roll_out(backend: Backend, job: tuple[Sequence[int], str, str], options: RolloutOptions, seed: int) -> Rollouts:
    candidates = backend.start(job[0], options.rollouts, seed)
    if candidates.hidden is None:
        raise GuardError(f"backend: expected hidden states with the tokens, got none from {type(backend).__name__}")
    states: list[tuple[int, int, Tensor]] = []  # answer, its tokens, latent state
    block, depth, growing = min(options.block, options.depth), options.depth, list(range(len(candidates)))
    backend.append(candidates, options.opening[: None if options.whole else block - 1])
    while growing:
        if options.whole:
            candidates.finished = torch.ones_like(candidates.finished)
        else:
            step = min(block - candidates.length % block, depth - candidates.length)
            backend.extend(candidates, step, options.sampling)
        hidden = candidates.hidden.to("cpu", torch.float32, copy=True)
        states += [(row, len(candidates.answers[row]), hidden[row]) for row in growing]
        growing = (~candidates.finished).nonzero().flatten().tolist() if candidates.length < depth else []
    states.sort(key=lambda state: state[:2])
    owner, ends, rows = zip(*states, strict=True)
    return Rollouts(
        candidates.prompt, *job[1:], candidates.answers, candidates.finished, torch.tensor(owner), torch.tensor(ends),
        torch.stack(rows), prompt_layer=backend.prompt_layer,
    )  # fmt: skip


def _claim(folder: Path, options: RolloutOptions, prompt_layer: int | None) -> None:
    """Create the folder, or raise GuardError if it was created with other settings."""
    make_folder(folder, "folder: cannot create")
    settings = {name: getattr(options, name) for name in ("rollouts", "block", "depth", "seed", "sampling")}
    settings["prompt_layer"] = prompt_layer
    # Processors of logits are recorded by their type.
    text = json.dumps(settings, default=lambda x: vars(x) if isinstance(x, Sampling) else type(x).__name__, indent=1)
    file = folder / "settings.json"
    if not file.exists():
        write_atomically(file, text.encode())
    known = json.loads(file.read_text())
    for name, value in json.loads(text).items():
        if known.get(name) != value:
            raise GuardError(f"{name}: {str(folder)!r} has rollouts with {known.get(name)!r}, got {value!r}")


def prompt_numbers(rollouts: Sequence[Rollouts]) -> list[int]:
    """Return each rollout's prompt as a number, the same for all origins: whole prompts are held out."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(one.prompt), len(numbers)) for one in rollouts]


def _read(file: Path, model: ModelIdentity | None = None) -> Rollouts:
    tensors, header, identity = read_file(file, _KIND)
    if model is not None:
        check_model("rollout", identity, model)
    content: dict[str, Any] = {name: header[name] for name in _DATA} | tensors
    return Rollouts(**content)

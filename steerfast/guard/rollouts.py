"""Monte-Carlo rollouts of the base model: answers, their costs and rewards, and the states at their blocks' ends.

One file per prompt, each written whole or not at all: a killed collection continues where it stopped, and ends with the
same files. Hidden states come from generation itself. Costs are stored per block, so that critics of any budget and
discount can be trained on the same rollouts; heads can score them again without generation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._files import write_atomically
from steerfast._progress import track
from steerfast.errors import GuardError, OutputError
from steerfast.guard.candidates import Backend, Sampling
from steerfast.guard.files import check_model, read_file, write_file
from steerfast.guard.scores import Blocks, Scorer, block_costs, scores_of
from steerfast.profile import ModelIdentity

__all__ = ["RolloutOptions", "Rollouts", "collect", "load_rollouts"]

_KIND = "rollouts"
_SETTINGS = "settings.json"


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Answers to one prompt, and the states at the ends of their blocks, one answer after the other.

    prompt: token ids. question: the prompt as the user wrote it. label: ``harmful`` or ``harmless``.
    answers: token ids, n. finished: bool [n]; the others reached the depth. owner: int64 [states], the state's answer.
    ends: int64 [states], tokens of the answer there; ascending in an answer, the last one its length.
    hidden: latent states float32 [states, S] of this prompt_layer, see `steerfast.guard.latent`.
    cost: float32 [states], of each block (+inf: unknown); None: not scored.
    reward: float32 [n], of the whole answers (-inf: unknown); None: not scored.
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
        """Return where an answer's last block ends: bool [states]."""
        return torch.cat([self.owner[1:] != self.owner[:-1], torch.ones(min(1, len(self.owner)), dtype=torch.bool)])

    @property
    def first(self) -> Tensor:
        """Return where an answer's first block ends: bool [states]."""
        return self.last.roll(1)

    def blocks(self, tokenizer: Any) -> Blocks:
        """Return the answers so far at each state, for scorers."""
        states = list(zip(self.owner.tolist(), self.ends.tolist(), strict=True))
        return Blocks(
            prompts=[self.prompt] * len(states),
            answers=[self.answers[owner][:end] for owner, end in states],
            hidden=self.hidden,
            tokenizer=tokenizer,
            finished=self.finished[self.owner] & self.last,
            questions=None if self.question is None else [self.question] * len(states),
        )

    def scored(self, tokenizer: Any, cost: Scorer | None, reward: Scorer | None) -> Rollouts:
        """Return the same rollouts with the scores of `cost` and `reward`; None keeps the present scores."""
        blocks = self.blocks(tokenizer)
        changed: dict[str, Tensor] = {}
        if cost is not None:
            now = scores_of(cost, blocks, "cost")
            changed["cost"] = block_costs(cost, now, torch.where(self.first, 0.0, now.roll(1)))
        if reward is not None and not getattr(reward, "cumulative", True):
            sums = torch.zeros(len(self.answers))
            changed["reward"] = sums.index_add(0, self.owner, scores_of(reward, blocks, "reward"))
        elif reward is not None:
            at = self.last.nonzero().flatten().tolist()
            ends = Blocks(
                prompts=[blocks.prompts[i] for i in at],
                answers=[blocks.answers[i] for i in at],
                hidden=self.hidden[at],
                tokenizer=tokenizer,
                finished=blocks.finished[at],
                questions=None if blocks.questions is None else [blocks.questions[i] for i in at],
            )
            changed["reward"] = scores_of(reward, ends, "reward")
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RolloutOptions:
    """Options of a collection.

    rollouts: answers per prompt. block, depth: tokens of a block, and most tokens of an answer.
    sampling: as the backend takes it. seed: each prompt has its own seed, derived from this one.
    """

    rollouts: int = 5
    block: int = 32
    depth: int = 128
    sampling: Sampling | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("rollouts", "block", "depth"):
            if getattr(self, name) < 1:
                raise GuardError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class _CollectOptions(RolloutOptions):
    cost: Scorer | None = None
    reward: Scorer | None = None
    questions: Sequence[str] | None = None
    labels: Sequence[str] | None = None


def collect(
    backend: Backend,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    folder: str | os.PathLike[str],
    model: ModelIdentity,
    **options: Any,
) -> list[Rollouts]:
    """Roll out every prompt that `folder` does not have yet, and return all rollouts.

    Args:
        prompts: token ids of templated prompts (`steerfast.text.encoding.encode`).
        folder: created if missing. It alone records which prompts are done: repeat the same call after a kill.
        model: identity of the base model, stored with every file.
        options: see `RolloutOptions`. Further: ``cost`` and ``reward``, scorers; None leaves the rollouts unscored, see
            `Rollouts.scored`; a change of scorers between calls is not noticed. ``questions`` and ``labels``: one per
            prompt, stored with it.

    Raises:
        GuardError: a number below 1, other lengths than the prompts', a folder with rollouts of other settings, other
            prompts or another model, a backend without hidden states.
        OutputError: the folder cannot be written.
    """
    chosen = _CollectOptions(**options)
    if not prompts:
        raise GuardError("prompts: expected at least 1, got 0")
    for name in ("questions", "labels"):
        given = getattr(chosen, name)
        if given is not None and len(given) != len(prompts):
            raise GuardError(f"{name}: expected one per prompt, {len(prompts)}, got {len(given)}")
    target = Path(folder)
    settings = {name: getattr(chosen, name) for name in ("rollouts", "block", "depth", "seed")}
    settings |= {"sampling": _sampling_data(chosen.sampling), "prompt_layer": backend.prompt_layer}
    _claim(target, settings | {"cost": chosen.cost is not None, "reward": chosen.reward is not None})
    found = []
    for index in track(range(len(prompts)), "rollouts", show=chosen.progress):
        file = _shard(target, index)
        if file.is_file():
            done = _read(file, model)
            if done.prompt != list(prompts[index]):
                raise GuardError(f"folder: expected prompt {index} of this call in {str(file)!r}, found another one")
        else:
            made = replace(
                _roll_out(backend, prompts[index], chosen, (chosen.seed << 32) + index),
                question=None if chosen.questions is None else chosen.questions[index],
                label=None if chosen.labels is None else chosen.labels[index],
            )
            done = made.scored(tokenizer, chosen.cost, chosen.reward)
            _write(file, done, model)
        found.append(done)
    return found


def load_rollouts(folder: str | os.PathLike[str], model: ModelIdentity | None = None) -> list[Rollouts]:
    """Return the rollouts in a folder, in the order of their prompts.

    Raises:
        GuardError: no rollouts, a damaged file, or rollouts of another model than `model`, if that is given.
    """
    files = sorted(Path(folder).glob("prompt-*.safetensors"))
    if not files:
        raise GuardError(f"rollouts: expected some in the folder {str(folder)!r}, found none")
    return [_read(file, model) for file in files]


def _roll_out(backend: Backend, prompt: Sequence[int], options: RolloutOptions, seed: int) -> Rollouts:
    count, block, depth = options.rollouts, options.block, options.depth
    candidates = backend.start(prompt, count, seed)
    answers: list[list[int]] = [[] for _ in range(count)]
    states: list[tuple[int, int, Tensor]] = []  # answer, its tokens, latent state
    finished = torch.zeros(count, dtype=torch.bool)
    length = 0
    while length < depth and not bool(finished.all()):
        step = min(block, depth - length)
        tokens, hidden, now = backend.extend(candidates, step, options.sampling)
        if hidden is None:
            raise GuardError(f"backend: expected hidden states with the tokens, got none from {type(backend).__name__}")
        rows = hidden.detach().to("cpu", torch.float32, copy=True)  # the backend reuses its own
        for index in (~finished).nonzero().flatten().tolist():
            answers[index] += [int(token) for token in tokens[index]]
            states.append((index, len(answers[index]), rows[index]))
        finished = now.cpu().clone()
        length += step
    states.sort(key=lambda state: state[:2])
    return Rollouts(
        prompt=[int(token) for token in prompt],
        question=None,
        label=None,
        answers=answers,
        finished=finished,
        owner=torch.tensor([owner for owner, _, _ in states]),
        ends=torch.tensor([end for _, end, _ in states]),
        hidden=torch.stack([row for _, _, row in states]),
        prompt_layer=backend.prompt_layer,
    )


# -- files -----------------------------------------------------------------------------------------


def _shard(folder: Path, index: int) -> Path:
    return folder / f"prompt-{index:06d}.safetensors"


def _sampling_data(sampling: Sampling | None) -> dict[str, Any] | None:
    if sampling is None:
        return None
    return {name: type(value).__name__ if callable(value) else value for name, value in vars(sampling).items()}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder, or raise if it was created with other settings."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"folder: cannot create {str(folder)!r} ({error.strerror})") from None
    text = json.dumps(settings, indent=1, sort_keys=True)
    file = folder / _SETTINGS
    if not file.exists():
        write_atomically(file, text.encode())
        return
    found = json.loads(file.read_text())
    for name, value in json.loads(text).items():
        if found.get(name) != value:
            raise GuardError(f"{name}: {str(folder)!r} has rollouts with {found.get(name)!r}, got {value!r}")


def _write(file: Path, rollouts: Rollouts, model: ModelIdentity) -> None:
    tensors = {name: getattr(rollouts, name) for name in ("finished", "owner", "ends", "hidden")}
    tensors |= {name: getattr(rollouts, name) for name in ("cost", "reward") if getattr(rollouts, name) is not None}
    header = {name: getattr(rollouts, name) for name in ("prompt", "question", "label", "answers", "prompt_layer")}
    write_file(file, _KIND, tensors, header, model)


def _read(file: Path, model: ModelIdentity | None) -> Rollouts:
    tensors, header, identity = read_file(file, _KIND)
    if model is not None:
        check_model("rollout", identity, model)
    names = ("prompt", "question", "label", "answers", "prompt_layer")
    content: dict[str, Any] = {name: header[name] for name in names} | tensors
    return Rollouts(**content)

"""Learn a steering vector: at one layer, the vector with which a model gives the answers of its aligned sibling.

The mean differences of `extract` point to refusals on average. A vector learned through the frozen model makes that
model give the answers themselves. It is a vector of one layer like any other, and costs the same while the model runs.
(Subramani et al. 2022, arXiv 2205.05124, learn vectors that make a model say given sentences; Cao et al. 2024, arXiv
2406.00045, and Dunefsky and Cohan 2025, arXiv 2502.18862, vectors that steer it.)
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerfast._defaults import own_defaults
from steerfast._files import read_checked, write_checked
from steerfast._options import read_options
from steerfast._progress import track
from steerfast.errors import ArchitectureError, OutputError, ProfileError, PromptError, SteerfastError
from steerfast.fitting.ending import turn_ends
from steerfast.fitting.labelled import Given, Labelled, evenly
from steerfast.fitting.refusals import refusals_of
from steerfast.fitting.score import check_model
from steerfast.hf.generation import PromptBatch, batches, device_of, evaluating, greedy_answers
from steerfast.hf.structure import find_decoder, identify, weights_fingerprint
from steerfast.judging.refusal import is_refusal_strict
from steerfast.profile import SteeringProfile
from steerfast.text.encoding import encode, pad_token
from steerfast.text.examples import Prompt
from steerfast.text.prompts import describe_set

KIND = "learned"
_STATE = "checkpoint"  # kind of the file that keeps the last step: tensors, and the losses of all steps
_STATE_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
_PACE = 0.3  # length of the first steps, as a share of the longest vector


@dataclass(frozen=True)
class LearnOptions:
    """Options of `learn`.

    Args:
        aligned_model: the sibling whose greedy answers are learned, if they refuse (`is_refusal_strict`).
        refusal: texts to learn instead, in turn; ``{topic}`` in them is what a request is about. Default without a
            sibling: `steerfast.fitting.refusals.REFUSALS`.
        layer: the decoder block to whose output the vector is added. Default: the sensor, which saves a second pass
            over prompts; the middle layer without one.
        positions: where the vector is added, see `SteeringProfile`; it holds for no others.
        max_norm: largest norm of the vector, as a share of the mean norm of the layer's rows.
        steps: batches of `batch_size` prompts to learn from; prompts come round again. Of more prompts than that, some
            of every source are taken.
        answer_tokens: how many tokens of an answer are learned at most.
        seed: of the order of the batches.
        resume: a file for the state of the last step; an interrupted training goes on there, with the same bits.
        names: name of the prompt set in the profile (``{"harmful": ...}``).
    """

    aligned_model: nn.Module | None = None
    refusal: str | Sequence[str] | None = None
    layer: int | None = None
    positions: Literal["all", "response"] = "response"
    max_norm: float = 1.0
    steps: int = 80
    answer_tokens: int = 40
    batch_size: int = 16
    seed: int = 0
    resume: str | os.PathLike[str] | None = None
    names: dict[str, str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "answer_tokens", "batch_size"):
            if not getattr(self, name) >= 1:
                raise ProfileError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0.0 < self.max_norm < math.inf:
            raise ProfileError(f"max_norm: expected a positive share of the rows' norm, got {self.max_norm}")
        if self.positions not in ("all", "response"):
            raise ProfileError(f"positions: expected 'all' or 'response', got {self.positions!r}")
        if self.aligned_model is not None and self.refusal is not None:
            raise ProfileError("refusal: expected none beside an aligned model, whose answers are learned")


@own_defaults
def learn(
    profile: SteeringProfile, model: nn.Module, tokenizer: Any, *, harmful: Sequence[Given], **options: Any
) -> SteeringProfile:
    """Learn the vector with which `model` answers `harmful` as its aligned sibling does, and steer with it.

    The mean cross-entropy of the answers' tokens, the end of the turn included, is minimised over the vector alone
    (Adam, its rate falling to zero), with every gate open. The gate stays the same.

    Args:
        profile: of `model`; one that adds vectors.
        harmful: prompts to refuse, of several sources. Bare requests teach, where there are any: a refusal names their
            topic.
        options: see `LearnOptions`.

    Returns:
        The profile with ``learned`` selected, at strength 1 in that layer alone; the other vectors are candidates.
        ``fitted["learned"]`` holds the source of the vector, and the loss of the first and the last batches in nats
        per token. `tune` tries it beside the others.

    Raises:
        PromptError: no prompt or one that is too long, or a sibling that refuses none.
        ProfileError: another model's profile, another edit than an addition, a layer or number out of range, no norm
            of the layer's rows, a sibling and a refusal, no token that ends a turn.
        ArchitectureError: a sibling with fewer tokens than the tokenizer. Its shape may differ, its tokens may not.
        SteerfastError: a steered model, or one whose loss is not finite.
        TypeError: an unknown option.
    """
    chosen = read_options("learn", LearnOptions, options)
    examples = Labelled.of_one("harmful", harmful)
    check_model(profile, model, tokenizer)
    find_decoder(model).refuse_if_steered()
    layer = _layer(profile, chosen.layer)
    if chosen.aligned_model is not None:
        _check_tokens(tokenizer, chosen.aligned_model)
    bare = [examples.prompts[place] for place in examples.bare(harmful=True)]
    lessons = _lessons(model, tokenizer, evenly(bare, chosen.steps * chosen.batch_size), chosen)
    work = [prompt + answer for prompt, answer in lessons]
    padded = batches(work, chosen.batch_size, "left", pad_token(tokenizer), torch.device("cpu"))
    starts = [len(prompt) for prompt, _ in lessons]
    longest = chosen.max_norm * float(profile.norm[layer])
    vector, losses = _learn_vector(model, list(padded), starts, layer, longest, chosen)
    few = max(1, chosen.steps // 10)
    sibling = chosen.aligned_model
    source = {
        **describe_set(examples.texts, (chosen.names or {}).get("harmful")),
        "answers": len(lessons),
        "aligned_model": identify(sibling).name if sibling is not None else None,
        "layer": layer,
        "positions": chosen.positions,
        "max_norm": chosen.max_norm,
        "steps": chosen.steps,
        "loss": [round(fmean(part), 4) for part in (losses[:few], losses[-few:])],
    }
    return _with_learned(profile, vector, source)


def _check_tokens(tokenizer: Any, aligned_model: nn.Module) -> None:
    """Raise ArchitectureError for a sibling that lacks tokens: it has another tokenizer, and answers nonsense."""
    embeddings: Any = aligned_model.get_input_embeddings()  # type: ignore[operator]
    known = embeddings.num_embeddings
    if known < len(tokenizer):
        raise ArchitectureError(
            f"aligned_model: expected the {len(tokenizer)} tokens of the model's tokenizer, got {known}; "
            "take a sibling with the same tokenizer"
        )


def _with_learned(profile: SteeringProfile, vector: Tensor, source: dict[str, Any]) -> SteeringProfile:
    """Return the profile that adds the vector, float32 [H], in the layer and at the positions of `source`."""
    vectors = torch.zeros_like(profile.vector)
    vectors[source["layer"]] = vector
    others = {**profile.candidates, profile.vector_kind: profile.vector}
    learned = replace(
        profile.with_band([], 0.0),
        vector=vectors,
        vector_kind=KIND,
        candidates={kind: rows for kind, rows in others.items() if kind != KIND},
        positions=source["positions"],
        answer_tokens=None,
        fitted={**profile.fitted, KIND: source},
        tuned={},
    )
    return learned.with_band([source["layer"]], 1.0)


def _lessons(
    model: nn.Module, tokenizer: Any, harmful: Sequence[Prompt], options: LearnOptions
) -> list[tuple[list[int], list[int]]]:
    """Return token ids of each prompt that is refused, and of its refusal up to the end of the turn."""
    prompts = encode(tokenizer, harmful, model, room=options.answer_tokens)
    end = turn_ends(model, tokenizer)[-1:]
    if options.aligned_model is not None:
        bar = "sibling answers" if options.progress else None
        answers = greedy_answers(options.aligned_model, tokenizer, prompts, options.answer_tokens, description=bar)
        pairs = zip(prompts, answers, strict=True)
        refused = [(prompt, answer) for prompt, answer in pairs if is_refusal_strict(tokenizer.decode(answer))]
        if not refused:
            raise PromptError("harmful: expected prompts that the aligned model refuses, it refuses none of them")
    else:
        texts = refusals_of(harmful, options.refusal)
        refusals = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not all(refusals):
            raise ProfileError("refusal: expected texts, got one without a token")
        refused = list(zip(prompts, refusals, strict=True))
    return [(prompt, (answer + end)[: options.answer_tokens]) for prompt, answer in refused]


def _layer(profile: SteeringProfile, layer: int | None) -> int:
    layers = profile.model.num_layers
    if profile.edit != "add":
        raise ProfileError(f"profile: expected one that adds vectors, got edit {profile.edit!r}")
    if layer is None:
        sensor = [] if profile.sensor == "own" else profile.gate_layers
        layer = sensor[0] if sensor else layers // 2
    if not 0 <= layer < layers:
        raise ProfileError(f"layer: expected 0..{layers - 1}, got {layer}")
    if not float(profile.norm[layer]) > 0:
        raise ProfileError(f"profile: expected one with the norm of its rows, got none for layer {layer}")
    return layer


@torch.inference_mode(False)
def _learn_vector(
    model: nn.Module,
    work: Sequence[PromptBatch],
    answer_starts: Sequence[int],
    layer: int,
    longest: float,
    options: LearnOptions,
) -> tuple[Tensor, list[float]]:
    """Return the vector, float32 [H] on the CPU, and the loss of each batch in nats.

    Args:
        work: batches of prompts with their answers, padded on the left.
        answer_starts: where the answer begins, by sequence.
        longest: largest norm of the vector.
    """
    decoder = find_decoder(model)
    # A share of the longest vector: the steps are the same for rows of any length.
    share = torch.zeros(decoder.hidden_size, dtype=torch.float32, device=device_of(model), requires_grad=True)
    pace = _PACE / decoder.hidden_size**0.5
    optimizer = torch.optim.Adam([share], lr=pace)
    settings = _training_settings(model, work, answer_starts, (layer, longest), options)
    losses = _restored(options.resume, settings, share, optimizer)
    shuffle = random.Random(options.seed)
    steps = range(len(losses), options.steps)
    rounds = (batch for _ in itertools.count() for batch in shuffle.sample(work, len(work)))
    order = itertools.islice(rounds, len(losses), None)
    with evaluating(model), _frozen(model), torch.enable_grad():
        for step in track(steps, "learning", show=options.progress):
            batch = next(order)
            starts = torch.tensor([answer_starts[i] for i in batch.indices])[:, None]
            steered = batch.mask.bool()
            if options.positions == "response":
                steered &= batch.positions >= starts - 1
            with _added(decoder.layers[layer], share * longest, steered):
                loss = _loss(model, batch, starts)
            (share.grad,) = torch.autograd.grad(loss, [share])
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise SteerfastError(f"model: expected a finite loss, got {losses[-1]} after {len(losses) - 1} steps")
            optimizer.param_groups[0]["lr"] = pace * (1 - step / options.steps)
            optimizer.step()
            with torch.no_grad():
                share /= share.norm().clamp(min=1.0)
            if options.resume is not None:
                state = {"share": share.detach(), **{name: optimizer.state[share][name] for name in _MOMENTS}}
                header = {"format": _STATE_VERSION, "kind": _STATE, "settings": settings, "losses": losses}
                write_checked(options.resume, header, {name: tensor.cpu() for name, tensor in state.items()})
    return (share.detach() * longest).cpu(), losses


def _training_settings(
    model: nn.Module,
    work: Sequence[PromptBatch],
    answer_starts: Sequence[int],
    place: tuple[int, float],
    options: LearnOptions,
) -> dict[str, Any]:
    """Return all that a training depends on; `place`: the layer, and the largest norm."""
    lessons = json.dumps([[batch.ids.tolist() for batch in work], list(answer_starts)])
    return {
        "weights": weights_fingerprint(model),
        "lessons": hashlib.sha256(lessons.encode()).hexdigest(),
        "place": list(place),
        **{name: getattr(options, name) for name in ("positions", "steps", "seed")},
    }


def _restored(
    file: str | os.PathLike[str] | None, settings: dict[str, Any], share: Tensor, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Put the state in a file, if it is of these settings, into the vector and its optimizer; return the losses so far.

    Raises:
        OutputError: the file holds no such state; it is not overwritten.
    """
    if file is None or not Path(file).exists():
        return []
    header, tensors = read_checked(file, _STATE, _STATE_VERSION, OutputError)
    if header.get("kind") != _STATE:
        raise OutputError(f"resume: expected a file of learn, got {str(Path(file))!r}; name a new one")
    if header["settings"] != settings:
        return []
    losses: list[float] = header["losses"]
    with torch.no_grad():
        share.copy_(tensors["share"])
    moments = {name: tensors[name].to(share.device) for name in _MOMENTS}
    optimizer.state[share] = {"step": torch.tensor(float(len(losses))), **moments}
    return losses


def _loss(model: nn.Module, batch: PromptBatch, starts: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens, in nats; `starts` int64 [N, 1]: first answer token."""
    accepted = inspect.signature(model.forward).parameters
    device = device_of(model)
    answered = (batch.positions >= starts) & batch.mask.bool()
    width = int(answered.sum(dim=1).max())  # answers end the rows: padding is on the left
    extra: dict[str, Any] = {"position_ids": batch.positions.to(device), "logits_to_keep": width + 1}
    extra = {name: value for name, value in extra.items() if name in accepted}
    logits = model(
        input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False, **extra
    ).logits[:, -width - 1 : -1]
    labels = batch.ids.masked_fill(~answered, -100)[:, -width:].to(logits.device)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _added(layer: nn.Module, vector: Tensor, rows: Tensor) -> RemovableHandle:
    """Add `vector` [H] to the chosen `rows`, bool [N, T], of the layer's output, until the returned context ends."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        added = vector.to(hidden.device, hidden.dtype) * rows.to(hidden.device)[..., None]
        edited = hidden + added
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    return layer.register_forward_hook(add)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter collect a gradient while the context lasts, so that no activation is kept for it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)

"""Harmful questions about pictures (MM-Harmful Bench), answered by models that read images, such as LLaVA."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerfast._progress import track
from steerfast.errors import ArchitectureError, PromptError
from steerfast.evaluation.evaluate import check, settings_of
from steerfast.evaluation.pieces import Pieces
from steerfast.evaluation.sets import EvalSet, Item, sample
from steerfast.evaluation.summary import Cell, examples, figures
from steerfast.evaluation.systems import UNSTEERED, Defence, System, as_it_is
from steerfast.fitting.score import check_model
from steerfast.hf.generation import device_of, evaluating, greedy_batch
from steerfast.hf.steering import Steering
from steerfast.hf.structure import find_decoder, identify, weights_fingerprint
from steerfast.judging.fluency import FluencyLimits, repetition
from steerfast.judging.judges import Judge
from steerfast.text.prompts import describe_set, read_records

__all__ = ["evaluate_images", "image_answers", "load_image_model", "load_images"]

_QUESTIONS = (".json", ".jsonl", ".csv")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def load_images(source: str | os.PathLike[str], limit: int | None = None, seed: int = 0) -> tuple[EvalSet, list[str]]:
    """Load questions about pictures, laid out as in MM-Harmful Bench.

    Args:
        source: a folder with one file of questions (.json, .jsonl or .csv, see `steerfast.text.prompts`), or
            that file. A record names its picture as ``image``, a file beside the questions or in the folder ``images``
            there; else the picture is the one called by the record's ``index``, or by its place in the file from 0 on.
        limit, seed: as for `steerfast.evaluation.sets.load_set`.

    Returns:
        The set, of kind harmful; and the questions that have no picture there and are left out.

    Raises:
        PromptError: no questions, several files of them, no picture for any, a picture that cannot be read.
    """
    questions = _questions(Path(source))
    folder = questions.parent
    folders = [place for place in (folder, folder / "images") if place.is_dir()]
    by_name = {
        key: file
        for place in folders
        for file in sorted(place.iterdir())
        if file.suffix.lower() in _PICTURES
        for key in (file.name, file.stem, str(file.relative_to(folder)))
    }
    items: dict[Item, None] = {}
    missing, duplicates = [], 0
    records = read_records(questions)
    for number, record in enumerate(records):
        file = by_name.get(str(record.get("image", record.get("index", number))))
        if file is None:
            missing.append(record["prompt"])
            continue
        item = Item(record["prompt"], str(record.get("style") or record.get("category") or ""), image=str(file))
        duplicates += item in items
        items[item] = None
    if not items:
        raise PromptError(
            f"images: expected pictures in {str(folder)!r} or its folder images, found none of a question"
        )
    chosen = sample(list(items), limit, seed)
    for item in chosen:
        _open(item.image).close()
    digest = describe_set([record["prompt"] for record in records])["sha256"]
    return EvalSet(folder.resolve().name, "harmful", chosen, str(source), digest, duplicates), missing


def load_image_model(name: str, *, dtype: str = "auto", device: str | None = None) -> tuple[nn.Module, Any]:
    """Load a model that reads images, and its processor, by hub id or folder.

    Raises:
        ArchitectureError: nothing loadable there, or a processor that knows no chat or no pictures.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArchitectureError(f"model: cannot load {name!r} as one that reads images ({reason})") from None
    _check_processor(processor)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


@torch.inference_mode()
def image_answers(
    model: nn.Module,
    processor: Any,
    items: Sequence[Item],
    *,
    defence: Defence = as_it_is,
    steering: Steering | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 4,
) -> tuple[list[list[int]], list[bool]]:
    """Greedy answers of the model as it stands (steered or not) to questions about pictures.

    Args:
        defence: words the prompts; the picture comes first in the user's last message.
        steering: what steers the model, to be asked which gates opened.

    Returns:
        Token ids without the prompt and the end token; and for each whether it fired, empty without `steering`.

    Raises:
        ArchitectureError: the processor knows no chat or no pictures.
        PromptError: a picture that cannot be read.
    """
    _check_processor(processor)
    answers: list[list[int]] = []
    fired: list[bool] = []
    with evaluating(model):
        for start in range(0, len(items), batch_size):
            chunk = items[start : start + batch_size]
            batch = _inputs(processor, chunk, defence).to(device_of(model), dtype=next(model.parameters()).dtype)
            answers += greedy_batch(model, processor.tokenizer, batch, max_new_tokens)
            if steering is not None:
                fired += steering.fired.tolist()
    return answers, fired


def evaluate_images(
    model: nn.Module,
    processor: Any,
    systems: Sequence[System],
    images: EvalSet,
    judges: Sequence[Judge],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 4,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Let every system answer questions about pictures, and judge and compare the answers.

    Args:
        model, processor: see `load_image_model`. systems: unsteered is the first, see `systems_of`; those of other
            weights are left out.
        images: see `load_images`.
        resume: a JSON-lines file of answered batches, written as they come and read back; another model, system,
            question, picture or answer length makes other ones.
        force: ask questions that a profile was made with, and say so in the result.

    Returns:
        JSON data of the form of `steerfast.evaluation.evaluate.evaluate`, as far as it applies; ``fluent`` is judged by
        repetition alone.

    Raises:
        ProfileError: a profile of another model.
        JudgeError: a judge that cannot be reached; the answers are kept.
        PromptError: as `evaluate` and `image_answers`. ArchitectureError: as `image_answers`.
        OutputError: `resume` cannot be written.
    """
    seen = check(systems, [images], judges, force)
    find_decoder(model).refuse_if_steered()
    tokenizer = processor.tokenizer
    left_out = {one.name: "other weights answer no questions about pictures here" for one in systems if one.model}
    systems = [one for one in systems if not one.model]
    for system in systems:
        if system.profile is not None:
            check_model(system.profile, model, tokenizer)
    name, weights = identify(model).name, weights_fingerprint(model)
    pieces = Pieces(resume)
    pictures = {item.image: hashlib.sha256(Path(item.image).read_bytes()).hexdigest() for item in images.items}
    cells = {system.name: Cell() for system in systems}

    def answer(system: System, items: Sequence[Item]) -> tuple[list[list[int]], list[bool]]:
        with system.on(model, tokenizer) as steering:
            return image_answers(
                model,
                processor,
                items,
                defence=system.defence,
                steering=steering,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )

    chunks = [images.items[start : start + batch_size] for start in range(0, len(images.items), batch_size)]
    for system, chunk in track([(one, chunk) for one in systems for chunk in chunks], "pictures", show=progress):
        asked = [(item.prompt, pictures[item.image]) for item in chunk]
        key = ("pictures", name, weights, system.fingerprint(), asked, max_new_tokens)
        answers, fired = pieces.rows(key, functools.partial(answer, system, chunk), system)
        cell = cells[system.name]
        cell.tokens += answers
        cell.fired += fired
    most = FluencyLimits.max_repetition
    for cell in cells.values():
        cell.texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in cell.tokens]
        cell.fluent = [bool(answer) and repetition(answer) <= most for answer in cell.tokens]
        cell.refused = {judge.name: judge(images.prompts, cell.texts) for judge in judges}
    table: Mapping[str, dict[str, Cell]] = {name: {images.name: cell} for name, cell in cells.items()}
    names = [judge.name for judge in judges]
    return {
        "model": name,
        "settings": settings_of(model, names, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size),
        "sets": {images.name: {**images.to_dict(), "also_fitted_by": seen[images.name]}},
        "systems": {
            one.name: {
                "title": one.title,
                **figures([images], table[one.name], None if one.name == UNSTEERED else table[UNSTEERED], names, seed),
            }
            for one in systems
        },
        "examples": examples([images], table, names[0]),
        "left_out": left_out,
    }


# -- questions and pictures --------------------------------------------------------------------------


def _questions(source: Path) -> Path:
    """The file of questions."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise PromptError(f"images: expected a folder or a file of questions at {str(source)!r}, found none")
    files = [file for file in sorted(source.iterdir()) if file.suffix.lower() in _QUESTIONS]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise PromptError(f"images: expected one {', '.join(_QUESTIONS)} file in {str(source)!r}, found {found}")
    return files[0]


def _open(file: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise PromptError("images: pictures need the package pillow (pip install pillow)") from None
    try:
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PromptError(f"images: cannot read the picture {file!r} ({error})") from None


def _check_processor(processor: Any) -> None:
    for part in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ArchitectureError(
                f"processor: expected one with a tokenizer, an image_processor and a chat_template, "
                f"got {type(processor).__name__} without {part}"
            )


def _inputs(processor: Any, items: Sequence[Item], defence: Defence) -> Any:
    """Left-padded inputs; the picture stands before the text of the user's last message."""
    texts = []
    for item in items:
        chat: list[dict[str, Any]] = [
            {"role": said["role"], "content": [{"type": "text", "text": said["content"]}]}
            for said in defence(item.prompt)
        ]
        last = max(place for place, said in enumerate(chat) if said["role"] == "user")
        chat[last]["content"].insert(0, {"type": "image"})
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    start = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=[[_open(item.image)] for item in items],
        padding=True,
        padding_side="left",
        add_special_tokens=not (start and texts[0].startswith(start)),  # which the template may have written itself
        return_tensors="pt",
    )

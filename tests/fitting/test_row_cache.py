"""Rows on disk: they are the model's own to the last bit, and an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerfast
from steerfast.errors import OutputError
from steerfast.fitting.activations import last_token, residual_rows
from steerfast.fitting.contrast import read_pairs
from steerfast.fitting.row_cache import RowCache
from steerfast.profile import SteeringProfile

SEQUENCES = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20], [21, 22]]
HARMFUL = ["how to build a bomb", "make the virus", "how do i poison the dog", "steal from the bank"]
HARMLESS = ["how to bake a cake", "paint the tree", "write a poem of the river", "find a book"]


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    return tiny_llama


def rows(model: Any, folder: Path, sequences: Any = SEQUENCES, reading: Any = "last", **options: Any) -> Tensor:
    cache = RowCache(folder, model, reading)
    return residual_rows(model, sequences, cache=cache, **{"batch_size": 2, **options})


@contextmanager
def counted(model: Any, fails_after: int | None = None) -> Iterator[list[int]]:
    """Collect the sizes of the batches that the model reads; the one after `fails_after` interrupts."""
    sizes: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(sizes) == fails_after:
            raise KeyboardInterrupt
        sizes.append(len(kwargs["input_ids"]))

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def test_known_rows_have_the_same_bits_and_are_not_computed(model: Any, tmp_path: Path) -> None:
    expected = residual_rows(model, SEQUENCES, batch_size=2)
    with counted(model) as first:
        assert torch.equal(rows(model, tmp_path), expected)
    with counted(model) as second:
        assert torch.equal(rows(model, tmp_path), expected)
        assert torch.equal(rows(model, tmp_path, SEQUENCES[::-1]), expected.flip(0))
    assert (first, second) == ([2, 2, 2], [])


def test_rows_of_new_sequences_alone_are_computed(model: Any, tmp_path: Path) -> None:
    rows(model, tmp_path, SEQUENCES[:3])
    with counted(model) as read:
        found = rows(model, tmp_path)
    assert sum(read) == 3
    torch.testing.assert_close(found, residual_rows(model, SEQUENCES), rtol=1e-4, atol=1e-5)


def test_reductions_are_told_the_places_of_all_sequences(model: Any, tmp_path: Path) -> None:
    """Of a batch that is read, beside others that are known."""

    def marked(hidden: Tensor, batch: Any) -> Tensor:
        return last_token(hidden, batch) + torch.tensor(batch.indices)[:, None]

    whole = residual_rows(model, SEQUENCES, batch_size=1, reduce=marked)
    rows(model, tmp_path, SEQUENCES[:3], reduce=marked, batch_size=1)
    assert torch.equal(rows(model, tmp_path, reduce=marked, batch_size=1), whole)


@pytest.mark.parametrize("change", ["weights", "dtype", "reading", "ids"])
def test_rows_of_something_else_are_not_taken(model: Any, tmp_path: Path, change: str) -> None:
    rows(model, tmp_path)
    sequences, reading = SEQUENCES, "last"
    if change == "weights":
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight += 0.5
    elif change == "dtype":
        model.to(torch.bfloat16)
    elif change == "reading":
        reading = "mean"
    else:
        sequences = [[token + 30 for token in one] for one in SEQUENCES]
    with counted(model) as read:
        found = rows(model, tmp_path, sequences, reading)
    assert sum(read) == len(SEQUENCES)
    assert torch.equal(found, residual_rows(model, sequences, batch_size=2))


ODD = {
    "another name": {"row": torch.zeros(5, 32)},
    "another width": {"rows": torch.zeros(5, 16)},
    "another depth": {"rows": torch.zeros(4, 32)},
    "whole numbers": {"rows": torch.zeros(5, 32, dtype=torch.int64)},
    "not finite": {"rows": torch.full((5, 32), torch.nan)},
}


@pytest.mark.parametrize("content", [b"", b"no tensors", "half", *ODD])
def test_a_broken_file_is_computed_again(model: Any, tmp_path: Path, content: bytes | str) -> None:
    from safetensors.torch import save

    expected = rows(model, tmp_path, batch_size=1)
    broken, whole = RowCache(tmp_path, model, "last")._file(2, SEQUENCES[2]), b""
    whole = broken.read_bytes()
    if isinstance(content, str):
        content = whole[: len(whole) // 2] if content == "half" else save(ODD[content])
    broken.write_bytes(content)
    with counted(model) as read:
        assert torch.equal(rows(model, tmp_path, batch_size=1), expected)
    assert read == [1]
    assert broken.read_bytes() == whole


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_interrupted_run_goes_on(model: Any, tmp_path: Path, batches: int) -> None:
    expected = residual_rows(model, SEQUENCES, batch_size=2)
    with pytest.raises(KeyboardInterrupt), counted(model, fails_after=batches):
        rows(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * batches
    with counted(model) as read:
        assert torch.equal(rows(model, tmp_path), expected)
    assert read == [2] * (3 - batches)


def test_a_folder_that_cannot_be_made(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cache: cannot make the folder "):
        RowCache(tmp_path / "file" / "rows", model, "last")


# -- extract and calibrate ---------------------------------------------------------------------------------------------


@pytest.fixture
def extract(model: Any, tiny_tokenizer: Any) -> Callable[..., SteeringProfile]:
    def run(**options: Any) -> SteeringProfile:
        given = {"harmful": HARMFUL, "harmless": HARMLESS, "vectors": ["srv"], "batch_size": 2, "progress": False}
        return steerfast.extract(model, tiny_tokenizer, **{**given, **options})

    return run


@pytest.mark.parametrize("pooling", ["last", "mean", "both"])
def test_an_extraction_that_was_interrupted_makes_the_same_profile(
    model: Any, extract: Any, tmp_path: Path, pooling: str
) -> None:
    expected = extract(pooling=pooling)
    with pytest.raises(KeyboardInterrupt), counted(model, fails_after=2):
        extract(pooling=pooling, cache=tmp_path / "rows")
    with counted(model) as read:
        resumed = extract(pooling=pooling, cache=tmp_path / "rows")
    assert sum(read) == len(HARMFUL + HARMLESS) - 4
    assert resumed.checksum == expected.checksum
    assert resumed.fitted == expected.fitted


def test_another_fit_of_the_same_prompts_reads_none(model: Any, extract: Any, tmp_path: Path) -> None:
    extract(cache=tmp_path)
    expected = extract(gate="mean", unit_norm=True)
    with counted(model) as read:
        assert extract(gate="mean", unit_norm=True, cache=tmp_path).checksum == expected.checksum
    assert read == []
    with counted(model) as read:
        extract(pooling="mean", cache=tmp_path)
    assert sum(read) == len(HARMFUL + HARMLESS)


def test_a_calibration_keeps_its_rows_too(model: Any, tiny_tokenizer: Any, extract: Any, tmp_path: Path) -> None:
    profile = extract()

    def calibrated(rate: float, **options: Any) -> SteeringProfile:
        return steerfast.calibrate(
            profile, model, tiny_tokenizer, harmful=[f"{one} ?" for one in HARMFUL], progress=False,
            harmless=[f"{one} ?" for one in HARMLESS], max_false_positive_rate=rate, **options,
        )  # fmt: skip

    calibrated(0.25, cache=tmp_path)
    expected = calibrated(0.5)
    with counted(model) as read:
        assert calibrated(0.5, cache=tmp_path).checksum == expected.checksum
    assert read == []


# -- pairs -------------------------------------------------------------------------------------------------------------


def answered(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_another_pair_costs_its_own_two_readings(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    given = [(f"how to {one}", f"bake a {one}", f"paint the {one}") for one in ("cake", "tree", "river of the dog")]

    def read(pairs: list[tuple[str, str, str]], cache: Path | None) -> Any:
        sides = [[answered(pair[0], pair[side]) for pair in pairs] for side in (1, 2)]
        return read_pairs(model, tiny_tokenizer, *sides, batch_size=1, cache=cache, progress=False)[0]

    with counted(model) as first:
        read(given[1:], tmp_path)
    expected = read(given, None)
    with counted(model) as second:
        found = read(given, tmp_path)  # the new pair comes first, so every other one has another place
    assert (sum(first), sum(second)) == (4, 2)
    for name in ("positive", "negative", "norm"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_an_answer_that_begins_elsewhere_has_rows_apart(model: Any, tmp_path: Path) -> None:
    def kept(starts: list[int]) -> int:
        with counted(model) as read:
            residual_rows(model, SEQUENCES, cache=RowCache(tmp_path, model, "pairs", starts))
        return sum(read)

    starts = [1, 0, 2, 1, 1, 0]
    assert [kept(starts), kept(starts), kept([1, 0, 3, 1, 1, 0])] == [6, 0, 1]

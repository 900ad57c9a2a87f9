"""The records of the edit kinds: complete, valid, and packed as the arithmetic reads them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import make_case

from steerfast.kernels.contract import EDIT, HIGH, LOW, EditId, is_number
from steerfast.kernels.edit_kinds import EDITS, Edit


@pytest.mark.parametrize("edit", EDITS.values(), ids=lambda edit: edit.name)
def test_a_record_is_complete(edit: Edit) -> None:
    assert EDITS[edit.name] is edit
    assert edit.summary
    assert set(edit.example) == set(edit.parameters)
    assert edit.check(**edit.example) is None
    assert all(is_number(number) for number in edit.columns(**edit.example))
    assert edit.describe(SimpleNamespace(**edit.example)).startswith(edit.name)
    assert all(parameter.unit for parameter in edit.parameters.values())
    if edit.parameters:
        assert edit.check(**edit.defaults) is not None
        assert edit.misplaced(**edit.example).startswith(", ".join(edit.parameters))


def test_every_number_of_the_table_has_a_name() -> None:
    assert {edit.id for edit in EDITS.values()} == set(EditId)


@pytest.mark.parametrize("edit", EDITS.values(), ids=lambda edit: edit.name)
def test_flags_say_what_the_arithmetic_reads(edit: Edit) -> None:
    from steerfast.kernels.edits import torch_coefficients

    case = make_case(size=16, slots=1)
    numbers = case.table.clone()
    numbers[0, EDIT], (numbers[0, LOW], numbers[0, HIGH]) = edit.id, edit.columns(**edit.example)
    v, d, beta = case.vectors, case.directions, torch.full((1,), 0.5)
    scale, b, c = torch_coefficients(case.x[:1], v, d, beta, numbers)
    other = torch_coefficients(-2 * case.x[:1], v, d, beta, numbers)
    assert edit.reads_sums == any(bool(a != z) for a, z in zip((scale, b, c), other, strict=True))
    assert edit.reads_direction == bool(c != 0)
    assert edit.adds == bool(torch.isclose(b / (1 + scale), beta))


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("add", {}, "add"),
        ("clamp", {"low": -1.0, "high": 2.0}, "clamp to -1..2"),
        ("clamp", {"low": 0.5, "high": math.inf}, "clamp to 0.5.."),
        ("clamp", {"low": 2, "high": 2}, "clamp to 2"),
        ("rotate", {"angle": 30}, "rotate to 30 degrees"),
    ],
)
def test_words(name: str, parameters: dict[str, float], words: str) -> None:
    assert EDITS[name].describe(SimpleNamespace(**parameters, other=1)) == words

"""The private names of transformers are what the table says; another release is refused with the name that differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from model_cases import MakeProfile, padded

import steerfast
from steerfast._seams import Seam
from steerfast.errors import ArchitectureError
from steerfast.hf import compat, packed

SEAMS = [*compat.CONTINUOUS_BATCHING, *compat.CACHES]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.owner.rpartition(':')[2]}.{seam.name}")
def test_the_installed_transformers_has_each_seam(seam: Seam) -> None:
    compat.check((seam,))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"name": "_absent"}, "found none"),
        ({"parameters": ("self", "other")}, r"got \(self\)"),
        ({"owner": "transformers.cache_utils:Absent"}, "found no such class"),
        ({"owner": "transformers.absent:Cache"}, "found no such class"),
    ],
)
def test_a_seam_that_differs_is_named(change: dict[str, Any], found: str) -> None:
    seam = next(seam for seam in SEAMS if seam.name == "_generation_step")
    with pytest.raises(ArchitectureError, match=rf"expected transformers\..*packed\.py.*{found}; install"):
        compat.check((dataclasses.replace(seam, **change),))


def test_a_changed_release_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, plain: Any, make_profile: MakeProfile
) -> None:
    changed = dataclasses.replace(compat.CONTINUOUS_BATCHING[0], name="renamed")
    monkeypatch.setattr(packed, "CONTINUOUS_BATCHING", (changed,))
    with steerfast.steer(plain, make_profile(plain, positions="response")):
        with pytest.raises(ArchitectureError, match=r"ContinuousBatchingManager\.renamed"):
            plain.init_continuous_batching()
        plain.generate(**padded([[3, 4, 5]]), max_new_tokens=1)  # needs none of it

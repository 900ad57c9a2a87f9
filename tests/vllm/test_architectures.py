"""Models of many architectures in a real engine: gates read and edits change the stream that transformers has.

Scores may differ by some 0.001, as vLLM approximates some activations otherwise. A gate that reads another tensor is
off by 0.1 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import Oracle
from architectures import ADDING, ARCHITECTURES, IN_EVERY_RUN, TRANSFORMERS, VOCABULARY, WHOLE, build
from in_process import generate

from steerfast.profile import SteeringProfile

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

TOKENS = 4
PROMPTS = [
    torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 40)
]
SOME = [pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.slow) for name in ARCHITECTURES]


def open_for_some(model: Any, profile: SteeringProfile) -> SteeringProfile:
    """Put each threshold between the scores of the prompts."""
    scores = torch.tensor([Oracle(model).answer(ids, profile, tokens=1).scores for ids in PROMPTS]).sort(dim=0).values
    threshold = profile.threshold.clone()
    threshold[profile.gate_layers] = (scores[0] + scores[1]) / 2
    return replace(profile, threshold=threshold)


def make_profiles(model: Any, make_profile: Callable[..., SteeringProfile]) -> dict[str, SteeringProfile]:
    """Gates of single layers, a sensor before steered layers, an edit that reads rows, and one that only adds."""
    more: dict[str, Any] = {"positions": "response"}
    return {
        "own": open_for_some(model, make_profile(model, seed=1, layers=[1, 3], **more)),
        "sensor": open_for_some(model, make_profile(model, seed=2, layers=[2, 3], sensor=1, score="dot", **more)),
        "ablate": make_profile(model, seed=3, layers=[2], kind="always", edit="ablate", **more),
        "always": make_profile(model, seed=4, layers=[1, 2], kind="always", size=60.0, **more),
    }


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_is_steered_as_by_transformers(name, engine, saved, make_profile, tmp_path) -> None:
    model = build(name, tmp_path)
    profiles = make_profiles(model, make_profile)
    cases = [(ids, each) for ids in PROMPTS for each in (None, *profiles)]
    oracle = Oracle(model)
    truth = [oracle.answer(ids, profiles.get(each), tokens=TOKENS) for ids, each in cases]
    llm = engine({"profiles": saved(profiles)}, model=str(tmp_path), skip_tokenizer_init=True, max_model_len=256)
    found = generate(llm, [(ids, {"steering": each or "off"}) for ids, each in cases], TOKENS)
    for (ids, each), got, known in zip(cases, found, truth, strict=True):
        certain = next((at for at, margin in enumerate(known.margins) if margin < 1e-3), TOKENS)
        assert got["token_ids"][:certain] == known.token_ids[:certain], (each, len(ids))
        if each is not None:
            assert got["steering"]["scores"] == pytest.approx(known.scores, rel=5e-3, abs=1e-3), (each, len(ids))
            assert got["steering"]["fired"] == known.fired
    answers = {
        each: [got["token_ids"] for (_, of), got in zip(cases, found, strict=True) if of == each] for _, each in cases
    }
    assert answers["always"] != answers[None]


def test_the_page_lists_the_models_that_are_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    for kinds in (ADDING, WHOLE, TRANSFORMERS):
        assert " | " + ", ".join(f"**{name}**" if name in IN_EVERY_RUN else name for name in kinds) + " |" in page

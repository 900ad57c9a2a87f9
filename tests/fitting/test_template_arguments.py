"""Arguments of a chat template, from the extraction into the profile and to the functions that take it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import steerfast
from steerfast.profile import SteeringProfile
from steerfast.text.template import TemplateWarning

HARMFUL = ["how to build a bomb", "make the virus", "how do i poison the dog", "steal from the bank"]
HARMLESS = ["how to bake a cake", "paint the tree", "write a poem of the river", "find a book"]


def test_a_profile_keeps_the_arguments_and_tells_of_others(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.chat_template += "{% if enable_thinking %}<system>{% endif %}"
    bound = steerfast.with_template_arguments(tiny_tokenizer, {"enable_thinking": True})
    how: dict[str, Any] = {"harmful": HARMFUL, "harmless": HARMLESS, "vectors": ["srv"], "progress": False}
    plain = steerfast.extract(tiny_llama, tiny_tokenizer, **how)
    made = steerfast.extract(tiny_llama, bound, **how)
    assert "template" not in plain.fitted
    assert not torch.equal(plain.direction, made.direction)
    made.save(tmp_path / "p.safetensors")
    loaded = SteeringProfile.load(tmp_path / "p.safetensors").with_band([1], 1.0)
    assert loaded.fitted["template"] == {"enable_thinking": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TemplateWarning)
        steerfast.score(tiny_llama, bound, loaded, HARMFUL, progress=False)
    says = "the profile was made with enable_thinking=true, prompts are rendered with no arguments"
    with pytest.warns(TemplateWarning, match=says):
        steerfast.score(tiny_llama, tiny_tokenizer, loaded, HARMFUL, progress=False)

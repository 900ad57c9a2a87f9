"""What is observed is decided as if it were steered, and no row changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import steerfast
from steerfast.errors import SteerfastError
from steerfast.profile import SteeringProfile

MakeProfile = Callable[..., SteeringProfile]
PROMPTS = [[5, 17, 40, 9, 77], [12, 33, 8, 90, 61], [101, 7, 55, 2, 8], [3, 99, 42, 18, 64]]
KINDS: dict[str, dict[str, Any]] = {
    "sensor": {"sensor": 2, "layers": [2, 3]},
    "whole prompts": {"positions": "all"},
    "no gate": {"kind": "always"},
    "token": {"kind": "token", "positions": "all"},
    "mean": {"pooling": "mean", "sensor": 1, "layers": [2, 3]},
    "ablate": {"edit": "ablate", "layers": [2]},
    "clamp": {"edit": "clamp", "low": 0.3, "layers": [2]},
    "keep_norm": {"edit": "keep_norm", "layers": [2]},
    "rotate": {"edit": "rotate", "angle": 40.0, "layers": [2]},
    "second pass": {"sensor": 3, "layers": [1, 3]},
}


def generate(model: Any, **steering: Any) -> tuple[torch.Tensor, ...]:
    """The tokens of greedy answers, then their logits."""
    ids = torch.tensor(PROMPTS)
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **steering,
    )
    return (found.sequences, *found.logits)


@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_changes(make_llama: Any, make_profile: MakeProfile, kind: str, fused: bool) -> None:
    model = make_llama()
    if fused:
        steerfast.patch(model)
    profile = make_profile(model, seed=3, **{"threshold": -0.5, "positions": "response", **KINDS[kind]})
    plain = generate(model)
    with steerfast.steer(model, profile, 2.0) as steering:
        edited, fired = generate(model), steering.fired
    assert fired.any()
    assert not torch.equal(edited[1][fired], plain[1][fired])
    with steerfast.steer(model, profile, 2.0, action="observe") as steering:
        for asked in ({}, {"steering": [profile, None, [profile], profile], "steering_strength": 3.0}):
            for one, other in zip(generate(model, **asked), plain, strict=True):
                assert torch.equal(one, other)
        if kind not in ("token", "second pass"):  # there an edit changes what gates read later
            generate(model)
            assert steering.fired.tolist() == fired.tolist()


def test_another_action_is_refused(make_llama: Any, make_profile: MakeProfile) -> None:
    model = make_llama()
    with pytest.raises(SteerfastError, match=r"^action: expected 'steer' or 'observe', got 'watch'"):
        steerfast.steer(model, make_profile(model), action="watch")
    with steerfast.steer(model, make_profile(model)):
        pass

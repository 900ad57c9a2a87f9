"""What a server should answer: the same model in HuggingFace transformers, steered by `steerfast.steer`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import steerfast
from steerfast.hf.loading import load_model
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import encode

# Of SmolLM2: the mean over a window of 256 tokens decides at layer 15. Tests give it other gates.
MEAN_GATE = Path(__file__).parent.parent / "data" / "smollm2-mean-gate.safetensors"


@dataclass(frozen=True)
class Answer:
    """text: greedy, without special tokens. margins: the distance, in logits, of each token to the runner-up; what
    is small there may turn with the last bits of a sum. fired: whether the profile's gate opened;
    scores: of the layers where it decides."""

    text: str
    margins: list[float]
    fired: bool
    token_ids: list[int]
    scores: list[float]

    @property
    def margin(self) -> float:
        """The least of them."""
        return min(self.margins)


class Oracle:
    """A model in transformers, by default with a tokenizer that knows no text."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer or SimpleNamespace(decode=lambda ids, **_: "", pad_token_id=0)

    @classmethod
    def load(cls, folder: Path) -> Oracle:
        """The model of the checkpoint that the server reads."""
        return cls(*load_model(str(folder), dtype="float32", device="cpu"))

    def prompt(self, text: str) -> list[int]:
        """Token ids of a chat of one user message."""
        return encode(self.tokenizer, [text])[0]

    def answer(
        self,
        prompt: str | list[int],
        profile: SteeringProfile | None = None,
        strength: float = 1.0,
        tokens: int = 16,
    ) -> Answer:
        ids = torch.tensor([self.prompt(prompt) if isinstance(prompt, str) else prompt])
        steered: Any = nullcontext() if profile is None else steerfast.steer(self.model, profile, strength)
        with steered as steering, torch.inference_mode():
            found: Any = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            fired = profile is not None and bool(steering.fired[0])
            scores = steering.scores[:, 0].tolist() if profile is not None and profile.gate_layers else []
        best = torch.cat(found.logits).topk(2, dim=1).values
        token_ids = found.sequences[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Answer(text, (best[:, 0] - best[:, 1]).tolist(), fired, token_ids, scores)

    def answer_of_stack(
        self, ids: list[int], stack: list[SteeringProfile], strengths: tuple[float, ...], tokens: int
    ) -> tuple[list[int], list[list[float]]]:
        """The greedy answer under a stack, and the scores of each of its profiles."""
        prompt = torch.tensor([ids])
        with steerfast.steer(self.model, stack[0]) as steering, torch.inference_mode():
            found: Any = self.model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                steering=[stack],
                steering_strength=[list(strengths)],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            scores = steering.scores[:, 0].T.tolist()
        each = [[score for score in own if score != float("-inf")] for own in scores]
        return found[0, len(ids) :].tolist(), each


def gated(seed: int = 0, strength: float = 2.0) -> SteeringProfile:
    """A profile whose mean gate knows harmful prompts, with an edit for the server and a vector of `seed`."""
    profile = SteeringProfile.load(MEAN_GATE)
    profile = replace(profile, positions="response", answer_tokens=None, candidates={})
    if seed:
        profile = replace(profile, vector=_random(profile, seed), vector_kind="random")
    return profile.with_band(profile.steered_layers, strength)


def always(seed: int = 1, layers: tuple[int, ...] = (10, 20), strength: float = 1.0) -> SteeringProfile:
    """A profile without a gate."""
    profile = replace(gated(seed), gate=Gate("always"), sensor="own")
    return profile.with_band(list(layers), strength)


def _random(profile: SteeringProfile, seed: int) -> torch.Tensor:
    vector = torch.randn(profile.vector.shape, generator=torch.Generator().manual_seed(seed))
    return 50 * vector / vector.norm(dim=1, keepdim=True)

"""A tiny random model, profiles for it, and what transformers makes of an engine's answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import steerfast
from steerfast.profile import SteeringProfile

VOCABULARY, HIDDEN, LAYERS = 512, 64, 4
TOKENS = 12
OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # prompts come in chunks
    "block_size": 32,
}


def tiny_llama(seed: int = 0, **config: Any) -> Any:
    """A random Llama whose layers matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).eval()


@dataclass
class World:
    """A model in a folder, prompts, and profiles by name, "off" among them, whose gates open for half of the prompts.

    prompts: repetitive, so that drafts by n-grams are accepted; the first two share blocks.
    """

    folder: Path
    make_profile: Callable[..., SteeringProfile]
    model: Any = field(default_factory=tiny_llama)
    profiles: dict[str, SteeringProfile | None] = field(init=False)
    prompts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        save(self.model, self.folder / "model")
        generator = torch.Generator().manual_seed(5)
        words = torch.randint(3, VOCABULARY, (6, 8), generator=generator).tolist()
        lengths = (58, 53, 8, 27, 48, 30)
        self.prompts = [(word * 8)[:length] for word, length in zip([words[0], *words[:5]], lengths, strict=True)]
        self.profiles = {
            "off": None,
            "own": self._split(self._profile(1, [1, 3])),
            "sensor": self._split(self._profile(2, [2, 3], score="dot", sensor=1)),
            "always": self._profile(4, [1, 2], kind="always"),
            "everywhere": self._profile(5, [1, 2], kind="always", positions="all"),
        }

    def _profile(self, seed: int, layers: list[int], **fields: Any) -> SteeringProfile:
        return self.make_profile(self.model, seed=seed, layers=layers, size=6.0, **{"positions": "response", **fields})

    def _split(self, profile: SteeringProfile) -> SteeringProfile:
        """With a threshold between the prompts' scores."""
        scores = torch.tensor([self.forced(self.model, ids, profile, [1])[1] for ids in self.prompts]).sort(0).values
        threshold = profile.threshold.clone()
        threshold[profile.gate_layers] = (scores[2] + scores[3]) / 2
        return replace(profile, threshold=threshold)

    @property
    def path(self) -> str:
        return str(self.folder / "model")

    @property
    def files(self) -> dict[str, str]:
        """The profiles' files, by name."""
        files = {name: self.folder / f"{name}.safetensors" for name in self.profiles if name != "off"}
        for name, path in files.items():
            if not path.exists():
                self.profiles[name].save(path)  # type: ignore[union-attr]
        return {name: str(path) for name, path in files.items()}

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Each profile with each prompt."""
        return [(name, number) for number in range(len(self.prompts)) for name in self.profiles]

    def request(self, name: str, number: int, tokens: int = TOKENS) -> tuple[dict[str, Any], Any]:
        """A prompt and sampling parameters for an engine."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0,
            extra_args={"steering": name},
        )  # fmt: skip
        return {"prompt_token_ids": self.prompts[number]}, parameters

    def ask(self, llm: Any, keys: Iterable[tuple[str, int]] | None = None, **options: Any) -> list[Any]:
        """What an engine answers."""
        requests = [self.request(*key) for key in (self.keys if keys is None else keys)]
        return llm.generate(
            [prompt for prompt, _ in requests], [each for _, each in requests], use_tqdm=False, **options
        )

    def forced(
        self, model: Any, ids: list[int], profile: SteeringProfile | None, answer: list[int]
    ) -> tuple[torch.Tensor, list[float], bool]:
        """Log-probabilities [len(answer), V] of a steered model that is made to give an answer; scores; fired."""
        prompt = torch.tensor([ids])

        def force(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(logits, -torch.inf)
            only[:, answer[tokens.shape[1] - len(ids)]] = 0.0
            return only

        with nullcontext() if profile is None else steerfast.steer(model, profile) as steering, torch.inference_mode():
            found = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False,
                logits_processor=[force], output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            scores = [] if profile is None or not profile.gate_layers else steering.scores[:, 0].tolist()
            fired = profile is not None and bool(steering.fired[0])
        return torch.cat(found.logits).float().log_softmax(-1), scores, fired

    def check(
        self,
        outputs: Iterable[Any],
        keys: Iterable[tuple[str, int]] | None = None,
        model: Any = None,
        within: float = 1e-3,
    ) -> None:
        """Compare answers with a model in transformers, by default this one.

        Every token has to be a greedy choice, as far as log-probabilities, which have to agree, tell. So have scores;
        and decisions, unless a score is at its threshold.
        """
        answers = set()
        for (name, number), output in zip(self.keys if keys is None else keys, outputs, strict=True):
            profile, answer = self.profiles[name], list(output.outputs[0].token_ids)
            known, scores, fired = self.forced(model or self.model, self.prompts[number], profile, answer)
            given = torch.tensor(
                [at[token].logprob for at, token in zip(output.outputs[0].logprobs, answer, strict=True)]
            )
            off = (known.gather(1, torch.tensor(answer)[:, None])[:, 0] - given).abs().max()
            lost = (known.max(1).values - given).max()
            assert max(off, lost) < within, (name, number, float(off), float(lost))
            steering = output.steering
            assert (steering is None) == (profile is None)
            if profile is not None and scores:
                assert max(abs(a - b) for a, b in zip(steering["scores"], scores, strict=True)) < within, (name, number)
                margins = (torch.tensor(scores) - profile.threshold[profile.gate_layers]).abs()
                assert steering["fired"] == fired or margins.min() < within, (name, number)
            answers.add((number, *answer))
        assert len(answers) > len({number for number, *_ in answers})  # profiles make a difference


def save(model: Any, folder: Path) -> None:
    """Save a model, with which no answer ends."""
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))

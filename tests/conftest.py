"""Runs before any test module is imported. Tiny models, tokenizers and profiles that every room of the tests uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from steerfast.profile import SteeringProfile

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when the kernels are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Leave out the tests marked slow, unless --slow, -m or the name of a test asks for them.

    slow(but=[...]): not the cases whose id matches one of these patterns.
    """
    for item in items:
        for mark in [mark for mark in item.own_markers if mark.name == "slow" and mark.kwargs]:
            if any(fnmatchcase(item.callspec.id, pattern) for pattern in mark.kwargs["but"]):
                item.own_markers.remove(mark)
    if config.option.slow or "slow" in config.option.markexpr or any("::" in arg for arg in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


# The same examples in every run; `pytest --hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")

# One user turn, rendered as "<user> text <end>" and "<assistant>" where an answer is to follow.
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_WORDS = """
a the of to and how do i you make build bake write paint plant grow learn find steal break poison attack forge hack burn
bomb knife virus weapon drug lock bank house cake bread song poem garden tree river bird cat dog book city bridge star
help sorry but can't that with it could cause serious harm people . , ? ' I'm I It
"""


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A word-level tokenizer of about 80 tokens with a chat template; pads on the left, as generation wants."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *_WORDS.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=special[3:],
        chat_template=_TEMPLATE,
        padding_side="left",
    )


@pytest.fixture
def tiny_llama() -> Any:
    """A random Llama: 5 layers, hidden size 32, 128 tokens, context 256; the same weights every time, never shared."""
    return _tiny_llama()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    """A function (seed, **config) -> a model as `tiny_llama`; other seeds make other models of its shape."""
    return _tiny_llama


def _tiny_llama(seed: int = 0, **config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,  # large enough that prompts differ and greedy choices are clear
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


@pytest.fixture(scope="session")
def make_profile() -> Callable[..., SteeringProfile]:
    """A function (model, tokenizer=None, *, layers, size, kind, threshold, ...) -> a random profile of the model."""
    return _profile


def _profile(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    layers: list[int] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    size: float = 4.0,
    threshold: float | Tensor = 0.0,
    kind: str = "prompt",
    score: str = "cosine",
    sharpness: float = 0.0,
    pooling: str = "last",
    window: int | None = None,
    turn: tuple[int, ...] = (),
    tail: int = 0,
    **fields: Any,
) -> SteeringProfile:
    """Random unit directions, random vectors of norm `size`; steers `layers` (default: all from the second on)."""
    from steerfast.hf.structure import identify
    from steerfast.profile import Gate, SteeringProfile

    identity = identify(model, tokenizer)
    count, hidden = identity.num_layers, identity.hidden_size
    generator = torch.Generator().manual_seed(seed)
    direction, vector = torch.randn(2, count, hidden, generator=generator)
    chosen = torch.zeros(count)
    chosen[list(range(1, count)) if layers is None else layers] = strength
    values: dict[str, Any] = {
        "model": identity,
        "direction": direction / direction.norm(dim=1, keepdim=True),
        "threshold": torch.zeros(count) + threshold,
        "vector": size * vector / vector.norm(dim=1, keepdim=True),
        "strength": chosen,
        "norm": torch.zeros(count),
        "gate": Gate(kind, score, sharpness, pooling, window, turn, tail),  # type: ignore[arg-type]
    }
    if (weights := fields.get("mean_direction")) is not None:  # those of a pair, or True; "dot" takes any norm
        means = torch.randn(count, hidden, generator=generator)
        means = means if score == "dot" else means / means.norm(dim=1, keepdim=True)
        own, of_mean = (1.0, 1.0) if weights is True else weights
        values["direction"], fields["mean_direction"] = own * values["direction"], of_mean * means
    return SteeringProfile(**{**values, **fields})


_DEFAULTS = [(dtype, device) for dtype in (torch.float32, torch.bfloat16, torch.float64) for device in ("cpu", "meta")]


@pytest.fixture(params=_DEFAULTS[1:], ids=str)
def other_defaults(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """Return a context with another default dtype or device of torch; "meta" stands in for "cuda"."""
    dtype, device = request.param

    @contextmanager
    def other() -> Iterator[None]:
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                yield
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)

    return other

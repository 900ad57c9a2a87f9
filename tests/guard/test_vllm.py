"""The backend of examples/guard_vllm.py: the same code, candidates from the engine's own parallel sampling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from guard_vllm import VLLMBackend

from steerfast.errors import GuardError
from steerfast.guard import CallableScorer, Guard, HiddenHead, Sampling, Strategy
from steerfast.profile import ModelIdentity

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PROMPT = [(7 * i) % 60 + 6 for i in range(70)]  # two blocks of the engine's cache and a bit
GREEDY = Sampling(temperature=0.0)
REWARD = CallableScorer(lambda b: [sum((t * 31) % 13 for t in a) / len(a) for a in b.answers], takes="blocks")
FREE = CallableScorer(lambda b: [0.0] * len(b), takes="blocks")


@pytest.fixture(scope="module")
def model(make_llama: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_llama(vocab_size=72, num_hidden_layers=2, eos_token_id=2, initializer_range=0.15, **sizes)


@pytest.fixture(scope="module")
def engine(model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        from vllm import LLM

        yield LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=16, block_size=32,
                  enable_prefix_caching=True)  # fmt: skip
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def backend(engine: Any) -> VLLMBackend:
    return VLLMBackend(engine)


def test_greedy_blocks_are_what_transformers_gives(backend: VLLMBackend, model: Any) -> None:
    expected = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=24, do_sample=False
    )[0, len(PROMPT) :].tolist()
    candidates = backend.start(PROMPT, 2, seed=0)
    while candidates.length < 24 and not candidates.finished.all():
        backend.extend(candidates, 9 if candidates.length < 18 else 6, GREEDY)
        assert candidates.hidden is None
    assert candidates.answers == [expected] * 2
    assert candidates.finished.tolist() == [expected[-1] == 2] * 2
    assert (backend.ends, backend.vocabulary, backend.context) == ({2}, 72, 256)


def test_one_request_for_one_beginning_and_its_cache_is_used(
    backend: VLLMBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = backend.engine.generate, []

    def spy(requests: Any, parameters: Any, **options: Any) -> Any:
        results = generate(requests, parameters, **options)
        calls.append([(p.n, r.num_cached_tokens) for p, r in zip(parameters, results, strict=True)])
        return results

    monkeypatch.setattr(backend.engine, "generate", spy)
    candidates = backend.start([*PROMPT[5:], *PROMPT[:5]], 6, seed=0)
    backend.extend(candidates, 8)
    assert [n for n, _ in calls[0]] == [6]
    assert len({tuple(answer) for answer in candidates.answers}) == 6
    one, other = (~candidates.finished).nonzero()[:2, 0].tolist()
    two = backend.branch(candidates, [one, one, other], [0, 1, 0])
    backend.extend(two, 8)
    assert [n for n, _ in calls[1]] == [2, 1]
    assert all(cached >= 64 for _, cached in calls[1])


def test_streams(backend: VLLMBackend) -> None:
    """The same seed gives the same answers; the first child goes on as its parent would, the others do not."""
    runs = []
    for seed in (1, 1, 2):
        candidates = backend.start(PROMPT, 4, seed)
        backend.extend(candidates, 12)
        runs.append(candidates.answers)
    assert runs[0] == runs[1] != runs[2]
    root = backend.start(PROMPT, 1, seed=1)
    more = backend.branch(root, [0, 0], [4, 5])
    for candidates in (root, more):
        backend.extend(candidates, 12)
    assert root.answers[0] == runs[0][0]
    assert len({tuple(answer) for answer in runs[0] + more.answers}) == 6


def test_penalty(backend: VLLMBackend) -> None:
    candidates = backend.start(PROMPT, 1, 0)
    backend.extend(candidates, 6, GREEDY)
    penalty = torch.zeros(backend.vocabulary)
    penalty[candidates.answers[0]] = 90.0
    other = backend.start(PROMPT, 1, 0)
    backend.extend(other, 12, GREEDY, penalty)
    assert not {*candidates.answers[0]} & {*other.answers[0]}


def test_searches(backend: VLLMBackend, tiny_tokenizer: Any) -> None:
    guard = Guard(None, tiny_tokenizer, backend=backend, cost=FREE, reward=REWARD, refusal="I can't help")
    candidates = backend.start(PROMPT, 8, seed=3)
    backend.extend(candidates, 16)
    best = max(candidates.answers, key=lambda a: sum((t * 31) % 13 for t in a) / len(a))
    strategy = Strategy.best_of_n(8, "augmented", block=16, depth=16)
    assert guard.generate(input_ids=[PROMPT], seed=3, strategy=strategy)[0].tokens == best
    answers = guard.generate(["how do i bake bread ?", "write a poem"], max_new_tokens=40)
    assert all(answer.certificate.safe and answer.certificate.candidates <= 2 for answer in answers)
    dear = CallableScorer(lambda b: [100.0] * len(b), takes="blocks")
    careful = Guard(None, tiny_tokenizer, backend=backend, cost=dear, refusal="I can't help")
    (refused,) = careful.generate(["how do i bake bread ?"], max_new_tokens=8)
    assert (refused.text, refused.certificate.fallback) == ("I can't help", "refusal")


def test_refuses_what_needs_hidden_states(backend: VLLMBackend, tiny_tokenizer: Any) -> None:
    identity = ModelIdentity(name="m", architecture="llama", hidden_size=64, num_layers=2)
    shapes = {"mean": (64,), "scale": (64,), "out.weight": (1, 64), "out.bias": (1,)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    guard = Guard(None, tiny_tokenizer, backend=backend, cost=HiddenHead("cost", identity, tensors))
    with pytest.raises(GuardError, match="expected hidden states with the answers, got none"):
        guard.generate(["write a poem"], max_new_tokens=4)
    with pytest.raises(GuardError, match="sampling: expected none of transformers' processors"):
        backend.extend(backend.start(PROMPT, 1, 0), 4, Sampling(processors=lambda ids, logits: logits))

"""Growing candidates on tiny random models, against `generate`, exact probabilities and passes without a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steerfast.errors import GuardError
from steerfast.guard.backend import HFBackend
from steerfast.guard.candidates import Sampling, child_streams, root_stream, sample, uniforms
from steerfast.hf.steering import steer

PROMPT = [3, 9, 14, 25, 31, 4]
GREEDY = Sampling(temperature=0.0)
ENDS = [2, 11, 23, 40, 77]


@pytest.fixture
def backend(make_llama: Any, tiny_tokenizer: Any) -> HFBackend:
    """A model that ends at five of its 128 tokens."""
    return HFBackend(make_llama(eos_token_id=ENDS), tiny_tokenizer)


@pytest.fixture
def endless(make_llama: Any, tiny_tokenizer: Any) -> HFBackend:
    """A model that never ends."""
    backend = HFBackend(make_llama(eos_token_id=None), tiny_tokenizer)
    backend.ends = frozenset()
    return backend


def _full_pass(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [V] and hidden state [H] after the last token, without a cache."""
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return model.lm_head(hidden), hidden


@pytest.mark.parametrize("block", [1, 5, 24])
def test_greedy_is_what_generate_gives(backend: HFBackend, block: int) -> None:
    expected = backend.model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=24, do_sample=False
    )[0, len(PROMPT) :].tolist()
    candidates = backend.start(PROMPT, 1, seed=0)
    while candidates.length < 24 and not candidates.finished.all():
        backend.extend(candidates, min(block, 24 - candidates.length), GREEDY)
    assert candidates.answers == [expected]


def test_hidden_states_are_those_of_the_last_tokens(backend: HFBackend) -> None:
    candidates = backend.start(PROMPT, 6, seed=1)
    for _ in range(3):
        backend.extend(candidates, 9)
        hidden, finished = candidates.hidden, candidates.finished
        assert hidden.shape == (6, 32)
        assert hidden.dtype == torch.float32
        for answer, row in zip(candidates.answers, hidden, strict=True):
            torch.testing.assert_close(row, _full_pass(backend.model, PROMPT + answer)[1], rtol=1e-4, atol=1e-4)
    ended = [answer[-1] in ENDS for answer in candidates.answers]
    assert finished.tolist() == ended
    assert 0 < sum(ended) < 6  # some were compacted away, others went on
    assert not any({*ENDS} & {*answer[:-1]} for answer in candidates.answers)


LAYER = 2


@pytest.fixture
def wide(make_llama: Any, tiny_tokenizer: Any) -> HFBackend:
    """As `backend`, with whole latent states."""
    return HFBackend(make_llama(eos_token_id=ENDS), tiny_tokenizer, LAYER)


def _latent(model: Any, answer: list[int]) -> torch.Tensor:
    """last | mean | prompt, [3H], from one pass over prompt and answer."""
    with torch.inference_mode():
        known = model(input_ids=torch.tensor([PROMPT + answer]), output_hidden_states=True).hidden_states
    final = known[-1][0]  # after the final norm
    mean = final[len(PROMPT) :].mean(dim=0) if answer else final[-1]
    return torch.cat([final[-1], mean, known[LAYER + 1][0, len(PROMPT) - 1]])


def _check_latent(backend: HFBackend, candidates: Any) -> None:
    expected = torch.stack([_latent(backend.model, answer) for answer in candidates.answers])
    assert candidates.hidden.dtype == torch.float32
    torch.testing.assert_close(candidates.hidden, expected, rtol=1e-4, atol=1e-4)


def test_latent_states_of_growing_answers(wide: HFBackend) -> None:
    """Also of those that are finished, of copies, of their union, and of their parents after the copies have grown."""
    root = wide.start(PROMPT, 1, seed=1)
    _check_latent(wide, root)
    parts = [wide.branch(root, [0] * 6, range(6)), wide.start(PROMPT, 3, seed=5)]
    for part in parts:
        for block in (1, 9, 17):
            wide.extend(part, block)
            _check_latent(wide, part)
    assert 0 < int(parts[0].finished.sum()) < 6
    going = int((~parts[0].finished).nonzero()[0])
    ended = int(parts[0].finished.nonzero()[0])
    both = wide.join([wide.branch(parts[0], [going, ended, going], [0, 0, 1]), wide.branch(parts[1], [2, 0])])
    _check_latent(wide, both)
    wide.extend(both, 6)
    assert both.answers[0] != both.answers[2]
    for candidates in (both, *parts, root):
        _check_latent(wide, candidates)
    one = wide.join([wide.branch(root, [0])])
    wide.extend(one, 4)
    _check_latent(wide, one)
    _check_latent(wide, root)


def test_latent_states_of_given_tokens(wide: HFBackend) -> None:
    root = wide.start(PROMPT, 1, seed=0)
    given = wide.branch(root, [0, 0])
    wide.append(given, [7, 8, 9])
    _check_latent(wide, given)
    _check_latent(wide, root)


def test_whole_states_take_no_other_tokens_and_no_second_pass(backend: HFBackend, wide: HFBackend) -> None:
    passes: list[int] = []
    wide.model.model.layers[LAYER].register_forward_pre_hook(lambda *_: passes.append(1))
    hooks = [len(layer._forward_hooks) for layer in wide.model.model.layers]
    plain, whole = (one.start(PROMPT, 4, seed=3) for one in (backend, wide))
    assert [len(layer._forward_hooks) for layer in wide.model.model.layers] == hooks
    for one, candidates in ((backend, plain), (wide, whole)):
        one.extend(candidates, 20)
    assert plain.answers == whole.answers
    assert torch.equal(plain.hidden, whole.hidden[:, :32])
    assert len(passes) == 1 + max(map(len, whole.answers))


def test_steering_after_the_prompt_layer_leaves_the_prompts_part(
    wide: HFBackend, tiny_tokenizer: Any, make_profile: Any
) -> None:
    """Also where the sensor lies behind the edited layers, and the prompt is read twice."""
    plain = wide.start(PROMPT, 1, seed=0).hidden
    for sensor in ("own", 4):
        profile = make_profile(wide.model, layers=[3], threshold=-1.0, size=20.0, sensor=sensor)
        with steer(wide.model, profile) as steering:
            steered = wide.start(PROMPT, 1, seed=0).hidden
            assert steering.fired.tolist() == [True]
        assert torch.equal(steered[:, 64:], plain[:, 64:])
        assert not torch.allclose(steered[:, :32], plain[:, :32], atol=1e-2)


def test_a_state_that_is_not_finite_stays_so(wide: HFBackend) -> None:
    """The mean forgets no token: an answer that once had no finite state is never trusted again."""
    candidates = wide.start(PROMPT, 2, seed=0)
    candidates.hidden = candidates.hidden.clone()
    candidates.hidden[1, 40] = float("nan")
    wide.extend(candidates, 3)
    assert candidates.hidden.isfinite().all(dim=1).tolist() == [True, False]


def test_finished_candidates_stay_as_they_are(backend: HFBackend) -> None:
    candidates = backend.start(PROMPT, 6, seed=1)
    backend.extend(candidates, 27)
    before, rows = [list(answer) for answer in candidates.answers], candidates.finished.clone()
    kept = candidates.hidden[rows].clone()
    new = backend.extend(candidates, 4)
    hidden = candidates.hidden
    assert [len(tokens) for tokens, ended in zip(new, rows, strict=True) if ended] == [0] * int(rows.sum())
    assert torch.equal(hidden[rows], kept)
    assert all(now[: len(old)] == old for now, old in zip(candidates.answers, before, strict=True))


def test_only_candidates_that_go_on_are_computed(backend: HFBackend) -> None:
    widths: list[int] = []
    handle = backend.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    candidates = backend.start(PROMPT, 8, seed=1)
    backend.extend(candidates, 40)
    handle.remove()
    lengths = [len(answer) for answer in candidates.answers]
    assert widths[0] == (1, len(PROMPT))  # the prompt alone, once
    assert widths[1:] == [(sum(length >= t for length in lengths), 1) for t in range(1, max(lengths) + 1)]
    assert len(set(lengths)) > 2


def test_same_answers_whatever_else_is_in_the_batch(backend: HFBackend) -> None:
    together = backend.start(PROMPT, 5, seed=3)
    for block in (3, 7, 10):
        backend.extend(together, block)
    root = backend.start(PROMPT, 1, seed=3)
    for row in range(5):
        alone = backend.branch(root, [0], [row])
        backend.extend(alone, 20)
        assert alone.answers[0] == together.answers[row]
    assert len({tuple(answer) for answer in together.answers}) == 5
    other = backend.start(PROMPT, 5, seed=4)
    backend.extend(other, 20)
    assert other.answers != together.answers


def test_first_child_goes_on_as_its_parent(endless: HFBackend) -> None:
    parent = endless.start(PROMPT, 2, seed=0)
    endless.extend(parent, 6)
    children = endless.branch(parent, [1, 1, 1, 0], [0, 1, 2, 0])
    held = [list(answer) for answer in parent.answers]
    endless.extend(children, 8)
    assert parent.answers == held  # children are copies
    endless.extend(parent, 8)
    assert children.answers[0] == parent.answers[1]
    assert children.answers[3] == parent.answers[0]
    assert len({tuple(answer) for answer in children.answers}) == 4


def test_branches_share_nothing_they_write(endless: HFBackend) -> None:
    """Two branches of one candidate, grown in turns, are what each is alone."""
    root = endless.start(PROMPT, 1, seed=0)
    endless.extend(root, 3)
    one, two = endless.branch(root, [0], [1]), endless.branch(root, [0], [2])
    for _ in range(3):
        endless.extend(one, 2)
        endless.extend(two, 2)
    for branch in (one, two):
        endless.extend(branch, 1)
        torch.testing.assert_close(
            branch.hidden[0], _full_pass(endless.model, PROMPT + branch.answers[0])[1], rtol=1e-4, atol=1e-4
        )


def test_joined_candidates_go_on(backend: HFBackend) -> None:
    parts = [backend.start(PROMPT, 3, seed=seed) for seed in (1, 5)]
    for part in parts:
        backend.extend(part, 20)
    both = backend.join([backend.branch(parts[0], [2, 0]), backend.branch(parts[1], [1, 2])])
    expected = [parts[0].answers[2], parts[0].answers[0], parts[1].answers[1], parts[1].answers[2]]
    assert both.answers == expected
    backend.extend(both, 6)
    for part in parts:
        backend.extend(part, 6)
    assert both.answers == [parts[0].answers[2], parts[0].answers[0], parts[1].answers[1], parts[1].answers[2]]


def test_appended_tokens(endless: HFBackend) -> None:
    candidates = endless.start(PROMPT, 2, seed=0)
    endless.append(candidates, [7, 8, 9])
    assert candidates.answers == [[7, 8, 9]] * 2
    logits, hidden = _full_pass(endless.model, [*PROMPT, 7, 8, 9])
    torch.testing.assert_close(candidates.hidden[1], hidden, rtol=1e-4, atol=1e-4)
    endless.extend(candidates, 1, GREEDY)
    assert candidates.answers[0][-1] == int(logits.argmax())


def test_penalty_is_taken_from_the_logits(endless: HFBackend) -> None:
    first = int(_full_pass(endless.model, PROMPT)[0].argmax())
    penalty = torch.zeros(endless.vocabulary)
    penalty[first] = 1e4
    candidates = endless.start(PROMPT, 1, seed=0)
    endless.extend(candidates, 12, GREEDY, penalty)
    assert first not in candidates.answers[0]


def test_processors_see_the_tokens_and_apply_first(backend: HFBackend) -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    expected = backend.model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=20, do_sample=False,
        repetition_penalty=1.7,
    )[0, len(PROMPT) :].tolist()  # fmt: skip
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    candidates = backend.start(PROMPT, 2, seed=0)
    backend.extend(candidates, 20, Sampling(0.0, processors=processors))
    assert candidates.answers == [expected] * 2


# -- sampling --------------------------------------------------------------------------------------


def _warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities by transformers' own warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(dim=1)[0]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.6), Sampling(1.3, top_k=7), Sampling(1.0, top_p=0.7), Sampling(0.9, 40, 0.8)],
    ids=str,
)
def test_tokens_come_as_often_as_they_are_likely(sampling: Sampling) -> None:
    logits = 2 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(20000) + 0.5) / 20000
    drawn = sample(logits.expand(len(grid), -1), grid, sampling)
    shares = torch.bincount(drawn, minlength=300) / len(grid)
    torch.testing.assert_close(shares, _warped(logits, sampling), rtol=0, atol=1.5e-4)


def test_nucleus_wider_than_the_tokens_looked_at_first() -> None:
    logits = torch.zeros(1, 5000)
    drawn = sample(logits.expand(1000, -1), (torch.arange(1000) + 0.5) / 1000, Sampling(top_p=0.9))
    assert len(drawn.unique()) == 1000


def test_extreme_uniform_numbers_never_draw_the_impossible() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    ends = torch.tensor([2.0**-25, 1.0])
    assert sample(logits.expand(2, -1), ends, Sampling()).tolist() == [1, 3]


def test_uniform_numbers_are_uniform_and_follow_from_stream_and_position() -> None:
    streams = child_streams(np.repeat(root_stream(0), 200), 0, np.arange(200))
    drawn = uniforms(streams, 0, 100)
    assert drawn.min() > 0
    assert drawn.max() <= 1
    assert len(np.unique(streams)) == 200
    assert np.array_equal(uniforms(streams[7:9], 40, 10), drawn[7:9, 40:50])
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4 above
    for one, two in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.03


# -- memory, steering, bad input -------------------------------------------------------------------


def test_memory_of_keys_and_values_is_bounded(endless: HFBackend) -> None:
    candidates = endless.start(PROMPT, 7, seed=0)
    endless.extend(candidates, 50)
    layers = candidates.state.cache.layers
    held = sum(room.untyped_storage().nbytes() for layer in layers for room in layer.room)
    assert endless.cache_bytes(len(PROMPT)) == 2 * 5 * 2 * 8 * 4 * 32  # keys and values, layers, heads, width, float32
    used = sum(2 * layer.keys.numel() * 4 for layer in layers)
    assert used <= held <= 7 * endless.cache_bytes(len(PROMPT) + 50)


@pytest.mark.parametrize("kind", ["prompt", "always"])
def test_candidates_of_a_steered_model_are_steered(
    make_llama: Any, tiny_tokenizer: Any, make_profile: Any, kind: str
) -> None:
    model = make_llama()
    profile = make_profile(model, kind=kind, threshold=-1.0)
    plain = HFBackend(model, tiny_tokenizer).start(PROMPT, 1, 0).hidden
    with steer(model, profile) as steering:
        expected = model.generate(
            torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=20, do_sample=False
        )[0, len(PROMPT) :].tolist()
        backend = HFBackend(model, tiny_tokenizer)
        root = backend.start(PROMPT, 1, seed=0)
        assert steering.fired.tolist() == [True]
        assert not torch.allclose(root.hidden, plain, atol=1e-2)
        many = backend.branch(root, [0, 0, 0])
        backend.extend(many, 6, GREEDY)
        kept = backend.join([backend.branch(many, [2]), backend.branch(many, [0, 1])])
        backend.extend(kept, 14, GREEDY)
    assert kept.answers == [expected] * 3


def test_sliding_windows(tiny_tokenizer: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.25, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    expected = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=20, do_sample=False
    )[0, len(PROMPT) :].tolist()
    backend = HFBackend(model, tiny_tokenizer)
    candidates = backend.start(PROMPT, 2, seed=0)
    backend.extend(candidates, 5, GREEDY)
    candidates = backend.branch(candidates, [1, 0, 1])
    while candidates.length < 20 and not candidates.finished.all():
        backend.extend(candidates, 5, GREEDY)
    end = expected.index(2) + 1 if 2 in expected else 20
    assert candidates.answers == [expected[:end]] * 3


def test_refuses(backend: HFBackend) -> None:
    for fields, message in (
        ({"temperature": -1.0}, "temperature: expected"),
        ({"top_k": -1}, "top_k: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
    ):
        with pytest.raises(GuardError, match=message):
            Sampling(**fields)
    with pytest.raises(GuardError, match="prompt: expected 1 to 255 tokens, got 0"):
        backend.start([], 1, 0)
    for layer in (-1, 5):
        with pytest.raises(GuardError, match=rf"prompt_layer: expected None or a layer in 0\.\.4, got {layer}"):
            HFBackend(backend.model, None, layer)
    candidates = backend.start(PROMPT, 1, 0)
    for block in (0, 251):
        with pytest.raises(GuardError, match=f"block: expected 1 to 250 tokens, .*, got {block}"):
            backend.extend(candidates, block)

"""Steering a tiny Llama under everything that `generate` and callers do, against the oracle of model_cases."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import CLOSE, MakeProfile, Oracle, greedy, padded
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import steerfast
from steerfast.errors import ProfileError, SteerfastError
from steerfast.hf import latch
from steerfast.profile import Gate, SteeringProfile

pytestmark = pytest.mark.contract

_LAYERS = 5


@pytest.fixture
def model(make_llama: Callable[..., Any]) -> Any:
    """The tiny Llama, never ending an answer early."""
    return make_llama(eos_token_id=None)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (8, 5, 11, 3, 6, 2)]


def half_open(model: Any, make_profile: MakeProfile, prompts: list[list[int]], **options: Any) -> SteeringProfile:
    """Sensor 1, all layers from 1 on steered, half of the prompts fire."""
    profile = make_profile(model, **{"sensor": 1, "threshold": -2.0, **options})
    oracle = Oracle(model, profile)
    scores = []
    for prompt in prompts:
        oracle.logits(prompt, [(0, len(prompt))])
        scores.append(float(oracle.scores[1]))
    low, high = sorted(scores)[len(scores) // 2 - 1 :][:2]
    assert high - low > 1e-3
    return replace(profile, threshold=torch.full((_LAYERS,), (low + high) / 2))


# -- gates, sensors and positions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("sensor", ["own", 2])
@pytest.mark.parametrize("sharpness", [0.0, 6.0])
@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["always", "prompt", "token"])
def test_greedy_equals_the_oracle(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]],
    kind: str, score: str, sharpness: float, sensor: Any, positions: str,
) -> None:  # fmt: skip
    layers = [1, 3, 4] if sensor == "own" else [2, 4]
    profile = make_profile(
        model, layers=layers, kind=kind, score=score, sharpness=sharpness, sensor=sensor, positions=positions
    )
    with steerfast.steer(model, profile, strength=0.7) as steering:
        tokens, logits = greedy(model, padded(prompts), tokens=4)
        fired, scores = steering.fired, steering.scores
    oracle = Oracle(model, profile, 0.7)
    for row, prompt in enumerate(prompts):
        assert tokens[row].tolist() == oracle.answer(prompt, 4)
        expected = oracle.logits([*prompt, *tokens[row].tolist()], [(0, len(prompt))])[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        if kind == "prompt":
            gates = torch.cat([oracle.scores[layer] for layer in profile.gate_layers]).float()
            torch.testing.assert_close(scores[:, row], gates, rtol=1e-4, atol=1e-4)
            assert bool(fired[row]) == bool((gates > 0).any())
    assert oracle.margin > 1e-5
    if kind == "always":
        assert fired.tolist() == [True] * len(prompts)
        assert steering.nan_scores == 0
    if kind == "prompt":
        assert 0 < fired.sum() < len(prompts) or sensor == "own"


def test_a_token_gate_has_fired_if_any_steered_token_did(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]]
) -> None:
    profile = make_profile(model, layers=[2, 3], sensor=2, kind="token", threshold=0.25, positions="response")
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        model(**padded(prompts))
        prefill = steering.fired
        greedy(model, padded(prompts), tokens=6)
        after = steering.fired
    oracle = Oracle(model, profile)
    for row, prompt in enumerate(prompts):
        oracle.logits(prompt, [(0, len(prompt))])
        assert bool(prefill[row]) == bool(oracle.scores[2][0, -1] > 0.25)
        tokens = oracle.answer(prompt, 6)
        oracle.logits([*prompt, *tokens[:-1]], [(0, len(prompt))])
        assert bool(after[row]) == bool((oracle.scores[2][0, len(prompt) - 1 :] > 0.25).any())
    assert not prefill.all()
    assert (after & ~prefill).any()


# -- what is not steered keeps its bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_p": 0.9}])
def test_sequences_that_did_not_fire_keep_every_bit(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], options: dict[str, Any], positions: str
) -> None:
    profile = half_open(model, make_profile, prompts, positions=positions)
    torch.manual_seed(11)
    stock_tokens, stock_logits = greedy(model, padded(prompts), **options)
    torch.manual_seed(11)
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, padded(prompts), **options)
        fired = steering.fired
    assert fired.sum() == len(prompts) // 2
    assert torch.equal(logits[~fired], stock_logits[~fired])
    assert torch.equal(tokens[~fired], stock_tokens[~fired])
    assert (logits[fired] != stock_logits[fired]).flatten(1).any(dim=1).all()


def test_sampled_answers_follow_the_oracles_logits(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]]
) -> None:
    profile = half_open(model, make_profile, prompts)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        with steerfast.steer(model, profile):
            runs.append(greedy(model, padded(prompts), do_sample=True, top_k=0, temperature=2.0))
    (tokens, logits), (again, _) = runs
    assert torch.equal(tokens, again)
    oracle = Oracle(model, profile)
    for row, prompt in enumerate(prompts):
        expected = oracle.logits([*prompt, *tokens[row].tolist()], [(0, len(prompt))])[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "response"])
def test_rows_that_are_not_steered_keep_every_bit(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], side: str, positions: str
) -> None:
    profile = make_profile(model, layers=[2], sensor=2, threshold=-2.0, positions=positions)
    batch = padded(prompts, side)
    rows: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        rows.append(output.clone())

    with torch.no_grad():
        handle = model.model.layers[2].register_forward_hook(keep)
        model(**batch)
        with steerfast.steer(model, profile):
            model(**batch)
        handle.remove()
    changed = (rows[0] != rows[1]).any(dim=2)
    mask = batch["attention_mask"].bool()
    last = torch.zeros_like(mask)
    for row, prompt in enumerate(prompts):
        last[row, (mask.shape[1] if side == "left" else len(prompt)) - 1] = True
    assert torch.equal(changed, mask if positions == "all" else last)
    edited = rows[0][changed] + profile.vector[2]
    assert torch.equal(rows[1][changed], edited)


# -- padding, masks and caches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "response"])
def test_left_and_right_padding_decide_alike(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], positions: str
) -> None:
    profile = make_profile(model, positions=positions)
    scores, last = {}, {}
    for side in ("left", "right"):
        batch = padded(prompts, side)
        position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), steerfast.steer(model, profile) as steering:
            logits = model(**batch, position_ids=position_ids).logits
        scores[side] = steering.scores
        ends = [logits.shape[1] - 1 if side == "left" else len(prompt) - 1 for prompt in prompts]
        last[side] = logits[torch.arange(len(prompts)), ends]
    torch.testing.assert_close(scores["left"], scores["right"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last["left"], last["right"], **CLOSE)


def four_d(mask: Tensor, kind: str) -> Tensor:
    """A 2-d mask as the causal 4-d mask of eager (added) or SDPA (boolean) attention."""
    width = mask.shape[1]
    allowed = torch.ones(width, width, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None]
    if kind == "boolean":
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["boolean", "added"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_four_d_masks_say_the_same_as_two_d_ones(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], side: str, kind: str
) -> None:
    profile = half_open(model, make_profile, prompts)
    batch = padded(prompts, side)
    mask = batch["attention_mask"]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        flat = model(**batch, position_ids=position_ids).logits
        scores = steering.scores
        full = model(batch["input_ids"], attention_mask=four_d(mask, kind), position_ids=position_ids).logits
        torch.testing.assert_close(steering.scores, scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full[mask.bool()], flat[mask.bool()], **CLOSE)
    assert 0 < steering.fired.sum() < len(prompts)


def test_a_mask_of_another_kind_is_refused(model: Any, make_profile: MakeProfile) -> None:
    with (
        steerfast.steer(model, make_profile(model)),
        pytest.raises(SteerfastError, match="attention_mask: expected a 2-d or 4-d tensor"),
    ):
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(3))


@pytest.mark.parametrize("kind", ["prompt", "token"])
@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("how", ["no cache", "static", "static, own object", "embeds", "no mask", "eager"])
def test_ways_to_generate_agree(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], how: str, positions: str, kind: str
) -> None:
    profile = make_profile(model, positions=positions, kind=kind)
    batch = padded(prompts)
    with steerfast.steer(model, profile) as steering:
        expected, logits = greedy(model, batch)
        scores, fired = steering.scores, steering.fired
        options: dict[str, Any] = {}
        if how == "no cache":
            options["use_cache"] = False
        elif how == "static":
            options["cache_implementation"] = "static"
        elif how == "static, own object":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
        elif how == "embeds":
            batch = {
                "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
                "attention_mask": batch["attention_mask"],
            }
        elif how == "no mask":  # transformers then takes pad tokens for padding
            batch = {"input_ids": batch["input_ids"]}
            options["pad_token_id"] = 0
        else:
            model.set_attn_implementation("eager")
        tokens, again = greedy(model, batch, **options)
        torch.testing.assert_close(steering.scores, scores, rtol=1e-3, atol=1e-4)
        assert torch.equal(steering.fired, fired)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(again, logits, **CLOSE)


def test_padding_is_what_generate_was_told(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    from transformers.masking_utils import create_masks_for_generate

    def unmasked_padding(**options: Any) -> Tensor:
        """A 4-d mask in which rows that may see nothing see everything, as some attention kernels want it."""
        mask = create_masks_for_generate(**options)
        return mask | ~mask.any(dim=-1, keepdim=True)

    model.create_masks_for_generate = unmasked_padding
    profile = make_profile(model, layers=[2], sensor=2, threshold=-2.0)
    batch, rows = padded(prompts), []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, x: rows.append(x.clone()))
    greedy(model, batch, tokens=1, cache_implementation="static")
    with steerfast.steer(model, profile):
        greedy(model, batch, tokens=1, cache_implementation="static")
    handle.remove()
    changed = (rows[0] != rows[1]).any(dim=2)
    assert torch.equal(changed, batch["attention_mask"].bool())


def test_a_reused_static_cache_decides_again(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    profile = half_open(model, make_profile, prompts)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with steerfast.steer(model, profile) as steering:
        fired = []
        for prompt in prompts:
            greedy(model, padded([prompt]), past_key_values=cache, tokens=3)
            fired += steering.fired.tolist()
            cache.reset()
        greedy(model, padded(prompts))
        assert fired == steering.fired.tolist()


def test_a_copy_of_a_static_cache_counts_for_itself(model: Any, make_profile: MakeProfile) -> None:
    """Its counter's versions begin anew, and one of them is that at which the original's latch was left."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), steerfast.steer(model, make_profile(model)):
        model(torch.tensor([[3, 4, 5, 6]]), past_key_values=cache)
        model(torch.tensor([[7]]), past_key_values=cache)
        other = copy.deepcopy(cache)
        for _ in range(4):
            other.reset()
            assert latch.length(other) == 0
    assert latch.length(cache) == 5


def test_the_length_of_a_static_cache_is_not_asked_of_the_device_at_each_token(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = make_profile(model, threshold=-1.5)
    cache = StaticCache(config=model.config, max_cache_len=16)
    tokens, asked = torch.tensor([prompts[0]]), []
    to_int = torch.Tensor.__int__

    def counted(tensor: torch.Tensor) -> int:
        asked.append(tensor)
        return to_int(tensor)

    answer = Oracle(model, profile).answer(prompts[0], 6)
    with torch.no_grad(), steerfast.steer(model, profile):
        tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(dim=2)
        got = [int(tokens)]
        monkeypatch.setattr(torch.Tensor, "__int__", counted)
        for _ in range(3):
            tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(dim=2)
            got.append(tokens.item())
        assert not asked
    with torch.no_grad():
        model(tokens, past_key_values=cache)  # somebody else adds a token: the cache is asked again
    assert latch.length(cache) == len(prompts[0]) + 4
    assert got == answer[:4]


# -- beams and repeated prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "response"])
def test_beam_search_equals_the_oracles(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], positions: str
) -> None:
    profile = half_open(model, make_profile, prompts, positions=positions)
    batch = padded(prompts)
    width = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    oracle = Oracle(model, profile)
    with oracle.attached([width - len(prompt) for prompt in prompts], [(0, width)]):
        expected = model.generate(**batch, use_cache=False, **options)
    stock = model.generate(**batch, **options)
    with steerfast.steer(model, profile) as steering:
        output = model.generate(**batch, **options)
        assert steering.fired.shape == (len(prompts),)
        assert steering.fired.sum() == len(prompts) // 2
        assert steering.scores.shape == (1, 3 * len(prompts))
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, **CLOSE)
    shut = (~steering.fired).repeat_interleave(2)
    assert torch.equal(output.sequences[shut], stock.sequences[shut])
    assert torch.equal(output.sequences_scores[shut], stock.sequences_scores[shut])
    assert not torch.equal(output.sequences[~shut], stock.sequences[~shut])


def test_fired_has_one_entry_per_prompt(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    profile = half_open(model, make_profile, prompts)
    with steerfast.steer(model, profile) as steering:
        greedy(model, padded(prompts))
        expected = steering.fired
        greedy(model, padded(prompts), do_sample=True, num_return_sequences=4)
        assert torch.equal(steering.fired, expected)
        with torch.no_grad():
            model(**padded(prompts[:2]))
        assert torch.equal(steering.fired, expected[:2])


# -- the band ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "token"])
@pytest.mark.parametrize("sharpness", [0.0, 6.0])
@pytest.mark.parametrize("sensor", ["own", 1])
def test_a_band_changes_no_answer(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], kind: str, sharpness: float, sensor: Any
) -> None:
    options: dict[str, Any] = {"kind": kind, "sharpness": sharpness, "sensor": sensor, "positions": "all"}
    profile = replace(half_open(model, make_profile, prompts), sensor=sensor, gate=Gate(kind, "cosine", sharpness))
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, padded(prompts))
        fired, scores = steering.fired, steering.scores
        assert not steering.undecided.any()
    for abstain in (profile.threshold, profile.threshold - 0.2, torch.full((_LAYERS,), float("-inf"))):
        with steerfast.steer(model, replace(profile, abstain=abstain)) as steering:
            again, same = greedy(model, padded(prompts))
            assert torch.equal(again, tokens), options
            assert torch.equal(same, logits)
            assert torch.equal(steering.fired, fired)
            gates = profile.gate_layers
            band = (scores > abstain[gates][:, None]) & (scores <= profile.threshold[gates][:, None])
            assert torch.equal(steering.undecided, band.any(dim=0) & ~fired)
    assert torch.equal(steering.undecided, ~fired)


def test_undecided_has_one_entry_per_prompt(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    profile = half_open(model, make_profile, prompts)
    profile = replace(profile, abstain=torch.full((_LAYERS,), float("-inf")))
    with steerfast.steer(model, profile) as steering:
        greedy(model, padded(prompts))
        assert torch.equal(steering.undecided, ~steering.fired)
        expected = steering.undecided
        assert expected.dtype == torch.bool
        assert 0 < expected.sum() < len(prompts)
        greedy(model, padded(prompts), do_sample=True, num_return_sequences=4)
        assert torch.equal(steering.undecided, expected)
        greedy(model, padded(prompts), num_beams=3)
        assert torch.equal(steering.undecided, expected)
        with torch.no_grad():
            model(**padded(prompts[:2]))
        assert torch.equal(steering.undecided, expected[:2])


# -- turns, branches and hand-written loops ----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("given", ["all tokens", "new tokens", "one new token"])
def test_a_second_turn_decides_again(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], given: str, positions: str
) -> None:
    first = torch.tensor([prompt[:2] for prompt in prompts])
    question = torch.tensor([prompt[-2:] for prompt in prompts])
    question = question[:, :1] if given == "one new token" else question
    profile = make_profile(model, sensor=1, positions=positions)
    with steerfast.steer(model, profile) as steering:
        output = model.generate(first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        before, cache = steering.fired, output.past_key_values
        ids = torch.cat([output.sequences, question], dim=1)
        start = cache.get_seq_length()
        turns = [(0, 2), (start, ids.shape[1])]
        inputs = ids if given == "all tokens" else ids[:, start:]
        answer = model.generate(
            inputs, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, do_sample=False
        )[:, inputs.shape[1] :]
        after = steering.fired
    oracle = Oracle(model, profile)
    for row in range(len(prompts)):
        sequence = ids[row].tolist()
        for token in answer[row].tolist():
            assert token == int(oracle.logits(sequence, turns)[-1].argmax())
            sequence.append(token)
        torch.testing.assert_close(steering.scores[:, row], oracle.scores[1].float(), rtol=1e-3, atol=1e-4)
        assert bool(after[row]) == bool(oracle.scores[1] > 0)
    assert oracle.margin > 1e-4
    assert not torch.equal(before, after)


@torch.no_grad()
def continued(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [N, tokens, vocabulary] of a hand-written loop that feeds `tokens` one at a time."""
    logits = []
    for column in tokens.unbind(1):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits.append(model(column[:, None], attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("positions", ["all", "response"])
def test_a_hand_written_loop(model: Any, make_profile: MakeProfile, prompts: list[list[int]], positions: str) -> None:
    profile = half_open(model, make_profile, prompts, positions=positions)
    oracle = Oracle(model, profile)
    for prompt in prompts:
        answer, question = oracle.answer(prompt, 4), [9, 33, 71]
        sequence = [*prompt, *answer, *question, 8]
        end = len(prompt) + 4 + 3
        with steerfast.steer(model, profile):
            cache = DynamicCache()
            with torch.no_grad():
                parts = [model(torch.tensor([prompt]), past_key_values=cache).logits[0]]
                parts.append(continued(model, cache, torch.tensor([answer]))[0])
                parts.append(model(torch.tensor([question]), past_key_values=cache).logits[0])
            parts.append(continued(model, cache, torch.tensor([[8]]))[0])
        expected = oracle.logits(sequence, [(0, len(prompt)), (len(prompt) + 4, end)])
        torch.testing.assert_close(torch.cat(parts), expected, **CLOSE)


def prefilled(model: Any, prompts: list[list[int]]) -> tuple[Any, Tensor]:
    """A cache of the prompts and their mask."""
    batch = padded(prompts)
    cache = DynamicCache()
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    return cache, batch["attention_mask"]


def by_pickle(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def by_torch_save(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_of_a_cache_keep_the_decision(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], duplicate: Callable[[Any], Any]
) -> None:
    profile = half_open(model, make_profile, prompts)
    tokens = torch.arange(3, 3 + 3 * len(prompts)).view(len(prompts), 3)
    with steerfast.steer(model, profile) as steering:
        cache, mask = prefilled(model, prompts)
        fired = steering.fired
        twin = duplicate(cache)
        assert type(twin).__name__ == "DynamicCache"
        assert isinstance(twin, DynamicCache)
        logits = continued(model, cache, tokens, mask)
        # A new turn on one branch decides for that branch alone.
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]] * len(prompts)), past_key_values=cache)
        assert not torch.equal(steering.fired, fired)
        assert torch.equal(continued(model, twin, tokens, mask), logits)
        assert torch.equal(steering.fired, fired)


@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
def test_the_decision_moves_with_the_rows_of_a_cache(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], operation: str
) -> None:
    profile = half_open(model, make_profile, prompts)
    with steerfast.steer(model, profile) as steering:
        cache, mask = prefilled(model, prompts)
        fired, scores = steering.fired, steering.scores
        if operation == "reorder":
            index = torch.tensor([2, 0, 1, 5, 4, 3])
            cache.reorder_cache(index)
        elif operation == "select":
            index = torch.tensor([4, 1, 1])
            cache.batch_select_indices(index)
        else:
            index = torch.arange(len(prompts)).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        tokens = torch.full((len(index), 2), 17)
        logits = continued(model, cache, tokens, mask[index])
        assert torch.equal(steering.fired, fired[index])
        assert torch.equal(steering.scores, scores[:, index])
        other, mask = prefilled(model, prompts)
        expected = continued(model, other, torch.full((len(prompts), 2), 17), mask)
    torch.testing.assert_close(logits, expected[index], **CLOSE)


def test_a_cache_of_another_batch_is_refused(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    with steerfast.steer(model, make_profile(model)):
        cache, _ = prefilled(model, prompts)
        with pytest.raises(SteerfastError, match="gates were decided for 6 sequences, got 1"):
            continued(model, cache, torch.tensor([[5]]))


def test_decisions_belong_to_the_profile_that_took_them(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]]
) -> None:
    tokens = torch.full((len(prompts), 2), 17)
    profile = half_open(model, make_profile, prompts)
    other = replace(profile, threshold=torch.full((_LAYERS,), -2.0))
    with steerfast.steer(model, profile) as steering:
        cache, mask = prefilled(model, prompts)
        fired = steering.fired
        branch = copy.deepcopy(cache)
    with steerfast.steer(model, profile) as steering:  # the same profile, attached again
        continued(model, cache, tokens, mask)
        assert torch.equal(steering.fired, fired)
    with steerfast.steer(model, other) as steering:
        continued(model, branch, tokens, mask)
        assert steering.fired.all()


def test_turns_may_change_between_inference_mode_and_no_grad(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]]
) -> None:
    profile = half_open(model, make_profile, prompts)
    batch, tokens = padded(prompts), torch.full((len(prompts), 1), 17)

    def run(modes: list[Any]) -> list[Tensor]:
        logits, mask = [], batch["attention_mask"]
        with steerfast.steer(model, profile):
            cache = DynamicCache()
            with modes[0]():
                logits.append(model(**batch, past_key_values=cache).logits)
            for mode, width in zip(modes[1:], (1, 1, 3, 1), strict=True):
                mask = torch.cat([mask, torch.ones(len(prompts), width, dtype=torch.long)], dim=1)
                with mode():
                    inputs = tokens.expand(-1, width)
                    logits.append(model(inputs, attention_mask=mask, past_key_values=cache).logits)
        return logits

    expected = run([torch.no_grad] * 5)
    for modes in itertools.product([torch.no_grad, torch.inference_mode], repeat=5):
        for one, other in zip(run(list(modes)), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("positions", ["all", "response"])
def test_assisted_decoding_does_not_decide_again(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], positions: str
) -> None:
    profile = half_open(model, make_profile, prompts, positions=positions)
    oracle = Oracle(model, profile)
    for prompt in prompts:
        repeated = [*prompt, *prompt, *prompt]  # so that drafts are found, also in the first step
        oracle.logits(repeated, [(0, len(repeated))])
        score = oracle.scores[1].float()
        with steerfast.steer(model, profile) as steering:
            output = model.generate(
                torch.tensor([repeated]), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
            )
            torch.testing.assert_close(steering.scores[0], score, rtol=1e-3, atol=1e-4)
        assert output[0, len(repeated) :].tolist() == oracle.answer(repeated, 8)


@pytest.mark.parametrize(("kind", "positions"), [("prompt", "all"), ("prompt", "response"), ("token", "response")])
def test_a_prompt_in_chunks_is_refused_where_its_end_matters(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], kind: str, positions: str
) -> None:
    profile = make_profile(model, kind=kind, positions=positions)
    with steerfast.steer(model, profile):
        with pytest.raises(SteerfastError, match="prefill_chunk_size: expected None, got 3"):
            greedy(model, padded(prompts), prefill_chunk_size=3)
        model.generation_config.prefill_chunk_size = 3
        with pytest.raises(SteerfastError, match="prefill_chunk_size: expected None, got 3"):
            greedy(model, padded(prompts))


@pytest.mark.parametrize("kind", ["always", "token"])
def test_a_prompt_in_chunks_is_steered_where_every_token_is(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], kind: str
) -> None:
    profile = make_profile(model, kind=kind)
    with steerfast.steer(model, profile):
        expected, logits = greedy(model, padded(prompts))
        tokens, again = greedy(model, padded(prompts), prefill_chunk_size=3)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(again, logits, **CLOSE)


# -- strength, failures, gradients, dtypes -----------------------------------------------------------------------------


def test_strength_changes_live(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    profile = make_profile(model, kind="always")
    strengths = (0.0, 1.0, -1.5, 0.0, 0.25)
    stock, stock_logits = greedy(model, padded(prompts))
    results = []
    with steerfast.steer(model, profile, strength=9.0) as steering:
        for strength in strengths:
            steering.strength = strength
            assert steering.strength == strength
            results.append(greedy(model, padded(prompts)))
        for wrong in (float("nan"), float("inf")):
            with pytest.raises(SteerfastError, match="strength: expected a finite number"):
                steering.strength = wrong
        assert steering.strength == 0.25
    for strength, (tokens, logits) in zip(strengths, results, strict=True):
        if strength == 0:
            assert torch.equal(tokens, stock)
            assert torch.equal(logits, stock_logits)
        else:
            oracle = Oracle(model, profile, strength)
            assert tokens.tolist() == [oracle.answer(prompt, 5) for prompt in prompts]
    for strength in (10**400, "1", None):
        with pytest.raises(SteerfastError, match="strength: expected a finite number, got"):
            steerfast.steer(model, profile, strength)  # type: ignore[arg-type]
    with pytest.raises(SteerfastError, match=r"strength: expected a number up to 1e\+30, got 1e\+39"):
        steerfast.steer(model, profile, 1e39)  # infinite in float32
    with pytest.raises(SteerfastError, match="strength: expected a finite number, got nan"):
        steerfast.steer(model, profile, strength=float("nan"))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_step_like_the_last_is_not_worked_out_again(
    model: Any, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    """And whatever differs from the last one is noticed: every step equals one that was worked out."""
    profile, other = (make_profile(model, seed=seed, threshold=-2.0, answer_tokens=9) for seed in (0, 1))

    def run(steering: Any) -> list[tuple[bool, Tensor]]:
        went_on: list[bool] = []
        goes_on = steering._stepper.repeats
        monkeypatch.setattr(steering._stepper, "repeats", lambda *args: went_on.append(goes_on(*args)) or went_on[-1])
        caches = [StaticCache(model.config, max_cache_len=32) if static else DynamicCache() for _ in range(2)]
        found = []

        def step(*tokens: int, cache: int = 0) -> None:
            logits = model(torch.tensor([tokens]), past_key_values=caches[cache]).logits
            found.append((went_on[-1], logits))

        step(3, 4, 5)
        step(6)  # the first of an answer
        step(7)
        steering.strength = 2.0
        step(8)
        step(9)
        with steering.assigned(profile, 0.5):
            step(10)
            step(11)
        step(12, 13, cache=1)
        step(14, cache=1)
        step(15, cache=1)
        step(16)
        step(17)  # the last that is steered: the first of the nine was the prompt's
        step(18)
        step(19)
        step(20, 21)  # another turn
        step(22)
        step(23)
        if static:
            caches[0].reset()
        else:
            caches[0].crop(-1)
        step(24)
        with steering.assigned(other):
            step(25)
        return found

    with torch.no_grad():
        with steerfast.steer(model, profile) as steering:
            got = run(steering)
            with steering.assigned(other):
                want_other = model(torch.tensor([[3, 4]])).logits
        with steerfast.steer(model, profile) as steering:
            monkeypatch.setattr(steering._stepper, "repeats", lambda *_: False)
            want = run(steering)
    assert [went_on for went_on, _ in got] == [n in (2, 4, 6, 9, 11, 13, 16) for n in range(19)]
    assert not any(went_on for went_on, _ in want)
    for (_, logits), (_, expected) in zip(got, want, strict=True):
        assert torch.equal(logits, expected)
    assert not torch.equal(want_other[:, -1], want[0][1][:, -1])


def test_a_step_after_rows_have_moved_is_worked_out(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = half_open(model, make_profile, prompts)
    batch = padded(prompts)

    def run(goes_on: bool) -> list[Tensor]:
        cache, mask, found = DynamicCache(), batch["attention_mask"], []
        with torch.no_grad(), steerfast.steer(model, profile) as steering:
            if not goes_on:
                monkeypatch.setattr(steering._stepper, "repeats", lambda *_: False)
            model(**batch, past_key_values=cache)
            for token in range(3, 9):
                if token == 6:
                    order = steering.fired.int().argsort()
                    assert not torch.equal(steering.fired, steering.fired[order])
                    cache.reorder_cache(order)
                    mask = mask[order]
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                tokens = torch.full((len(prompts), 1), token)
                found.append(model(tokens, attention_mask=mask, past_key_values=cache).logits)
        return found

    for got, want in zip(run(True), run(False), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["prompt", "token"])
@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_a_nan_score_counts_as_fired(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], kind: str, sharpness: float
) -> None:
    profile = make_profile(model, kind=kind, sensor=1, sharpness=sharpness, threshold=1.5 if not sharpness else 9.0)
    profile = replace(profile, abstain=torch.full((_LAYERS,), float("-inf")))
    model.get_input_embeddings().weight.data[prompts[1][2]] = float("nan")
    clean = [prompt for prompt in prompts if prompts[1][2] not in prompt]
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        model(**padded([clean[0], prompts[1], clean[1]]))
        assert steering.scores.isnan().any(dim=0).tolist() == [False, True, False]
        assert steering.fired.tolist() == [False, True, False]
        assert steering.undecided.tolist() == [True, False, True]
        assert steering.nan_scores == 1


def test_one_steering_at_a_time(model: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model)
    with steerfast.steer(model, profile) as steering:
        assert steering.attached
        for target in (model, model.model):
            with pytest.raises(SteerfastError, match="model: expected an unsteered one, got one that is steered"):
                steerfast.steer(target, profile)
        with pytest.raises(SteerfastError, match="no batch has run through the model yet"):
            _ = steering.fired
    assert not steering.attached
    steering.detach()
    with pytest.raises(SteerfastError, match="it was detached"):
        steering.__enter__()
    handle = steerfast.steer(model, profile)
    handle.detach()
    handle.detach()
    steerfast.steer(model, profile).detach()


def test_the_result_outlives_the_context(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    profile = half_open(model, make_profile, prompts)
    with steerfast.steer(model, profile) as steering:
        greedy(model, padded(prompts))
    assert steering.fired.sum() == len(prompts) // 2


def test_a_generate_of_the_users_own_comes_back(model: Any, make_profile: MakeProfile) -> None:
    calls = []
    stock = model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return stock(*args, **kwargs)

    model.generate = counting
    with steerfast.steer(model, make_profile(model)):
        assert model.generate is not counting
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=1)
    assert model.generate is counting
    assert len(calls) == 1


@pytest.mark.parametrize("how", ["plain", "checkpointing", "layers that save their output"])
def test_gradients_equal_the_oracles(model: Any, make_profile: MakeProfile, prompts: list[list[int]], how: str) -> None:
    if how == "layers that save their output":  # for their own backward pass, so that it may not be overwritten
        for layer in model.model.layers:
            inner = layer.forward
            layer.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs).tanh()
    profile = half_open(model, make_profile, prompts)
    batch = padded(prompts)
    width = batch["input_ids"].shape[1]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**batch, use_cache=False).logits[:, -1].logsumexp(dim=1).sum()
        loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    stock = gradients()
    with Oracle(model, profile).attached([width - len(prompt) for prompt in prompts], [(0, width)]):
        expected = gradients()
    if how == "checkpointing":
        model.train()  # there is no dropout; checkpointing wants training
        model.gradient_checkpointing_enable()
    with steerfast.steer(model, profile) as steering:
        actual = gradients()
        assert steering.fired.sum() == len(prompts) // 2
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(stock[name], gradient) for name, gradient in expected.items())


def test_training_takes_steering_without_gates_as_a_constant(model: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model, kind="token", sharpness=2.0)
    embeds = torch.randn(2, 4, 32, requires_grad=True)
    with steerfast.steer(model, profile):
        model(inputs_embeds=embeds, labels=torch.randint(3, 128, (2, 4))).loss.backward()
    assert embeds.grad is not None
    assert embeds.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(
    model: Any, make_profile: MakeProfile, prompts: list[list[int]], dtype: torch.dtype
) -> None:
    model.to(dtype)
    profile = half_open(model, make_profile, prompts)
    batch = padded(prompts)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        with Oracle(model, profile).attached([width - len(prompt) for prompt in prompts], [(0, width)]):
            expected = model(**batch).logits
        stock = model(**batch).logits
        with steerfast.steer(model, profile) as steering:
            logits = model(**batch).logits
    mask = batch["attention_mask"].bool()
    assert logits.dtype == dtype
    assert steering.fired.sum() == len(prompts) // 2
    assert torch.equal(logits[mask], expected[mask])
    assert torch.equal(logits[~steering.fired], stock[~steering.fired])


def test_a_profile_knows_its_model_in_another_dtype(model: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model)
    with steerfast.steer(model.to(torch.bfloat16), profile) as steering:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        assert steering.scores.isfinite().all()


def test_the_default_dtype_is_not_ours_to_depend_on(model: Any, make_profile: MakeProfile, tmp_path: Any) -> None:
    profile = make_profile(model)
    profile.save(tmp_path / "profile.safetensors")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), steerfast.steer(model, profile):
        expected = model(ids).logits
    torch.set_default_dtype(torch.float64)
    try:
        loaded = SteeringProfile.load(tmp_path / "profile.safetensors")
        with torch.no_grad(), steerfast.steer(model, loaded):
            assert torch.equal(model(ids).logits, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_hidden_states_show_the_edit(model: Any, make_profile: MakeProfile, grad: bool, before: bool) -> None:
    profile = make_profile(model, kind="always", layers=[2])
    ids = torch.tensor([[5, 6, 7]])
    if before:  # transformers keeps its recording hooks from the first time on
        model(ids, output_hidden_states=True)
    with torch.set_grad_enabled(grad):
        stock = copy.deepcopy(model)(ids, output_hidden_states=True).hidden_states
        with steerfast.steer(model, profile):
            hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[2], stock[2])
    assert torch.equal(hidden[3], stock[3] + profile.vector[2])


def test_plain_tuples_as_output(model: Any, make_profile: MakeProfile, prompts: list[list[int]]) -> None:
    profile = half_open(model, make_profile, prompts)
    tokens = torch.full((len(prompts), 2), 17)
    batch = padded(prompts)
    with torch.no_grad(), steerfast.steer(model, profile):
        cache, mask = prefilled(model, prompts)
        expected = continued(model, cache, tokens, mask)
        _, cache = model(**batch, return_dict=False)
        assert torch.equal(continued(model, cache, tokens, mask), expected)
        _, cache = model.model(batch["input_ids"], batch["attention_mask"], return_dict=False)
        assert torch.equal(continued(model, cache, tokens, mask), expected)


# -- profiles that do not belong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16}, "hidden size 16.*hidden size 32"),
        ({"num_hidden_layers": 3}, "layers 3.*layers 5"),
        ({"seed": 1}, "other weights: their embeddings agree to"),
    ],
)
def test_another_models_profile_is_refused(
    model: Any, make_llama: Callable[..., Any], make_profile: MakeProfile, change: dict[str, int], message: str
) -> None:
    profile = make_profile(make_llama(**change))
    before = sorted(vars(model.model))
    with pytest.raises(ProfileError, match=message):
        steerfast.steer(model, profile)
    assert sorted(vars(model.model)) == before


def test_another_architectures_profile_is_refused(model: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model)
    profile = replace(profile, model=replace(profile.model, architecture="mistral"))
    with pytest.raises(ProfileError, match=r"architecture mistral\), the model is .* \(architecture llama\)"):
        steerfast.steer(model, profile)


def test_another_tokenizer_or_template_is_refused(model: Any, make_profile: MakeProfile, tiny_tokenizer: Any) -> None:
    profile = make_profile(model, tiny_tokenizer)
    steerfast.steer(model, profile, tokenizer=tiny_tokenizer).detach()
    steerfast.steer(model, profile).detach()
    template, tokenizer = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    template.chat_template = "{{ messages }}"
    with pytest.raises(ProfileError, match="chat template hash"):
        steerfast.steer(model, profile, tokenizer=template)
    tokenizer.add_tokens(["café"])
    with pytest.raises(ProfileError, match="tokenizer hash"):
        steerfast.steer(model, profile, tokenizer=tokenizer)


def test_a_profile_that_steers_nothing_is_refused(model: Any, make_profile: MakeProfile) -> None:
    with pytest.raises(ProfileError, match="expected a strength other than 0 in at least one layer"):
        steerfast.steer(model, make_profile(model, layers=[]))

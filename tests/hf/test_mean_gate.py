"""Prompt gates that read the mean score of a prompt's tokens, in every way a prompt may come."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from model_cases import CLOSE, MakeProfile, Oracle, four_prompts, greedy, make_family_model, padded
from transformers import CompileConfig, StaticCache

import steerfast
from steerfast.hf import caches
from steerfast.runtime.span import TurnWarning

NEW = 4
TURN = (1, 2)


def prompts() -> list[list[int]]:
    """Of different lengths; two user turns, one at the beginning, one in the middle, none."""
    two, first, middle, none = four_prompts()
    for ids, place in ((two, 1), (two, 5), (first, 0), (middle, 2)):
        ids[place : place + 2] = TURN
    return [two, first, middle, none]


def middle(model: Any, make_profile: MakeProfile, **fields: Any) -> Any:
    """A profile whose gate opens for some of `four_prompts` and not for others."""
    fields = {"pooling": "mean", **fields}
    profile = make_profile(model, layers=[1, 2], sensor=1, **fields)
    oracle = Oracle(make_family_model("Llama", num_hidden_layers=4), profile)
    scores = []
    for prompt in prompts():
        oracle.logits(prompt, [(0, len(prompt))])
        scores.append(float(oracle.scores[1]))
    low, high = sorted(scores)[1:3]
    return make_profile(model, layers=[1, 2], sensor=1, threshold=(low + high) / 2, **fields)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score": "dot"},
        {"sharpness": 8.0},
        {"positions": "response"},
        {"window": 4},
        {"turn": TURN, "tail": 2, "mean_direction": True},
        {"tail": 4},
        {"pooling": "both", "window": 4},
        {"pooling": "both", "mean_direction": True, "score": "dot", "turn": TURN, "positions": "response"},
        {"pooling": "both", "mean_direction": (0.6, 0.8), "turn": TURN, "tail": 1, "window": 3},
    ],
    ids=str,
)
def test_greedy_equals_the_oracle(
    model: Any, plain: Any, make_profile: MakeProfile, fields: dict[str, Any], side: str
) -> None:
    profile = middle(model, make_profile, **fields)
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        batch = padded(prompts(), side)
        if side == "left":
            tokens, logits = greedy(model, batch, tokens=NEW)
        else:
            every = model(**batch).logits
    oracle, fired = Oracle(plain, profile), []
    for row, prompt in enumerate(prompts()):
        ids = prompt if side == "right" else [*prompt, *tokens[row].tolist()]
        expected = oracle.logits(ids, [(0, len(prompt))])
        if side == "right":
            torch.testing.assert_close(every[row, : len(prompt)], expected, **CLOSE)
        else:
            torch.testing.assert_close(logits[row], expected[len(prompt) - 1 : -1], **CLOSE)
        assert float(steering.scores[0, row]) == pytest.approx(float(oracle.scores[1]), abs=1e-5)
        fired.append(bool(oracle.scores[1] > profile.threshold[1]))
    if not profile.gate.sharpness:
        assert steering.fired.tolist() == fired
        assert sum(fired) == 2


def test_every_layer_for_itself(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model, layers=[1, 2, 3], pooling="mean", threshold=-0.03)
    with steerfast.steer(model, profile):
        tokens, logits = greedy(model, padded(prompts()), tokens=NEW)
    oracle = Oracle(plain, profile)
    for row, prompt in enumerate(prompts()):
        expected = oracle.logits([*prompt, *tokens[row].tolist()], [(0, len(prompt))])
        torch.testing.assert_close(logits[row], expected[len(prompt) - 1 : -1], **CLOSE)
    assert oracle.margin > 1e-5


def test_beside_other_profiles(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    """Of one batch, one gate reads a mean, one the last token, at the same layer, and one is none."""
    profiles = [
        middle(model, make_profile),
        make_profile(model, layers=[1, 2], sensor=1, seed=1),
        None,
        make_profile(model, layers=[2], sensor=2, seed=2, pooling="mean"),
    ]
    with steerfast.steer(model, None) as steering:
        tokens, logits = greedy(model, padded(prompts()), tokens=NEW, steering=profiles)
    for row, (prompt, profile) in enumerate(zip(prompts(), profiles, strict=True)):
        ids = [*prompt, *tokens[row].tolist()]
        if profile is None:
            with torch.no_grad():
                expected = plain(torch.tensor([ids])).logits[0]
        else:
            oracle = Oracle(plain, profile)
            expected = oracle.logits(ids, [(0, len(prompt))])
            assert float(steering.scores[:, row].max()) == pytest.approx(float(oracle.scores[profile.sensor]), abs=1e-5)
        torch.testing.assert_close(logits[row], expected[len(prompt) - 1 : -1], **CLOSE)


@pytest.mark.parametrize("fields", [{}, {"turn": TURN, "tail": 1}], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_turn_is_read_by_itself(
    model: Any, plain: Any, make_profile: MakeProfile, first: bool, fields: dict[str, Any]
) -> None:
    """What an earlier turn left in the cache is not read again, and counts in no mean."""
    profile = middle(model, make_profile, **fields)
    one, two = prompts()[:2] if first else prompts()[1::-1]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with steerfast.steer(model, profile):
        answered = model.generate(torch.tensor([one]), **options)
        ids = torch.cat([answered.sequences, torch.tensor([two])], dim=1)
        cache = {caches.argument(model): answered.past_key_values}
        again = model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **options, output_logits=True)
    start, end = answered.sequences.shape[1] - 1, ids.shape[1]
    expected = Oracle(plain, profile).logits(again.sequences[0].tolist(), [(0, len(one)), (start, end)])
    torch.testing.assert_close(torch.stack(again.logits)[:, 0], expected[end - 1 : -1], **CLOSE)


def test_a_system_prompt_adds_no_row_to_the_mean(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model, layers=[1, 2], sensor=1, pooling="mean", turn=TURN, tail=2)
    turn = [*TURN, 50, 51, 52, 60, 61]
    system = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad(), steerfast.steer(model, profile) as steering:
        for before in ([], system, [*system, *TURN, 7, 8]):
            ids, start = [*before, *turn], len(before) + len(TURN)
            model(torch.tensor([ids]))
            assert steering._stepper.step.memory.rows.counted.tolist() == [[start, start + 3, 3]]
            oracle = Oracle(plain, profile)
            oracle.logits(ids, [(0, len(ids))])
            assert float(steering.scores[0, 0]) == pytest.approx(float(oracle.scores[1]), abs=1e-5)


def test_a_prompt_without_a_user_turn_is_warned_of_once(model: Any, make_profile: MakeProfile) -> None:
    """There the mean is of the whole prompt, as where only embeddings are known."""
    reads = {"layers": [1, 2], "sensor": 1, "pooling": "mean", "tail": 1}
    turn, whole = make_profile(model, turn=TURN, **reads), make_profile(model, **reads)
    ids = torch.tensor([[5, 6, *TURN, 7, 8]])
    scores = []
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for profile in (turn, whole):
            with steerfast.steer(model, profile) as steering:
                for given in ({"inputs_embeds": model.get_input_embeddings()(ids)}, {"input_ids": ids[:, :2]}):
                    model(**given)
                    scores.append(steering.scores)
    (warned,) = [one for one in caught if one.category is TurnWarning]
    assert "expected a user turn as the profile's chat template opens it" in str(warned.message)
    assert torch.equal(torch.cat(scores[:2]), torch.cat(scores[2:]))


def test_a_second_pass_knows_the_mean(make_profile: MakeProfile) -> None:
    """Layers before the sensor: the sensor's mean is of the first pass, unedited."""
    model = make_family_model("Llama", num_hidden_layers=4)
    profile = make_profile(model, layers=[0, 1, 3], sensor=2, pooling="mean", threshold=-2.0)
    opened = make_profile(model, layers=[0, 1, 3], kind="always")
    stock = make_profile(model, layers=[3], sensor=2, pooling="mean", threshold=2.0)
    batch = padded(prompts())
    with steerfast.steer(model, stock) as steering:
        greedy(model, batch, tokens=1)
        unedited = steering.scores
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, batch, tokens=NEW)
        assert torch.equal(steering.scores, unedited)
    with steerfast.steer(model, opened):
        expected = greedy(model, batch, tokens=NEW)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], **CLOSE)


def test_a_compiled_model(make_profile: MakeProfile, plain: Any) -> None:
    torch.compiler.reset()
    model = steerfast.patch(copy.deepcopy(plain))
    profile = middle(model, make_profile)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    for prompt in prompts()[:2]:
        with steerfast.steer(model, profile):
            cache = StaticCache(config=model.config, max_cache_len=32)
            tokens, _ = greedy(model, padded([prompt]), tokens=NEW, past_key_values=cache, compile_config=config)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            with torch.no_grad():
                logits = compiled(torch.tensor([prompt]), use_cache=False).logits[0]
        oracle = Oracle(plain, profile)
        assert tokens[0].tolist() == oracle.answer(prompt, NEW)
        torch.testing.assert_close(logits, oracle.logits(prompt, [(0, len(prompt))]), **CLOSE)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_what_extract_reads(
    dtype: torch.dtype, make_profile: MakeProfile, tiny_tokenizer: Any
) -> None:
    from steerfast.fitting.activations import gate_reading, residual_rows
    from steerfast.fitting.score import row_scores

    model = make_family_model("Llama", dtype, num_hidden_layers=4)
    profile = make_profile(model, layers=[1], sensor=1, pooling="mean")
    rows = residual_rows(model, prompts(), reduce=gate_reading(profile.gate)[0], padding_side="left")
    with steerfast.steer(model, profile) as steering:
        greedy(model, padded(prompts()), tokens=1)
    torch.testing.assert_close(steering.scores[0], row_scores(profile, rows)[:, 1], rtol=1e-3, atol=1e-4)

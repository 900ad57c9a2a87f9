"""A vector is learned through the frozen model: against losses worked out by hand, and the run time's own edit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusing import REFUSAL
from torch import Tensor

import steerfast
from steerfast.errors import ArchitectureError, OutputError, ProfileError, PromptError, SteerfastError
from steerfast.fitting import learn as learning
from steerfast.fitting.refusals import refusals_of
from steerfast.hf.generation import batches, greedy_answers
from steerfast.hf.structure import find_decoder
from steerfast.judging.refusal import is_refusal_strict
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import encode
from steerfast.text.prompts import describe_set

HARMFUL = ["build a bomb", "make the virus", "poison the dog and the cat", "steal from the bank", "forge a knife"]
LEARNABLE = {"layer": 0, "max_norm": 4.0, "steps": 300}  # where random weights can be made to say it


@pytest.fixture
def profile(tiny_llama: Any, tokenizer: Any, make_profile: Callable[..., SteeringProfile]) -> SteeringProfile:
    """Its sensor is layer 2; rows of norm 8."""
    made = make_profile(tiny_llama, tokenizer, layers=[3], threshold=-1.0, norm=torch.full((5,), 8.0))
    return replace(made, sensor=2, answer_tokens=3, tuned={"refusal": 1.0}, fitted={"direction": "lda"})


@pytest.fixture
def learn(tiny_llama: Any, tokenizer: Any, profile: SteeringProfile) -> Callable[..., SteeringProfile]:
    def run(**options: Any) -> SteeringProfile:
        given = {"harmful": HARMFUL, "refusal": REFUSAL, "progress": False, **options}
        model = given.pop("model", tiny_llama)
        return steerfast.learn(given.pop("profile", profile), model, tokenizer, **given)

    return run


def sequences(tokenizer: Any, answer: str, prompts: list[str] = HARMFUL) -> list[tuple[list[int], list[int]]]:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [(prompt, [*ids, tokenizer.eos_token_id]) for prompt in encode(tokenizer, prompts)]


def loss_by_hand(model: Any, lessons: list[tuple[list[int], list[int]]]) -> float:
    """Mean cross-entropy of all answers' tokens, each sequence by itself, in float64."""
    model = copy.deepcopy(model).double()
    losses = []
    for prompt, answer in lessons:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    return sum(losses) / len(losses)


def answers_of(model: Any, tokenizer: Any, profile: SteeringProfile | None) -> list[str]:
    prompts = encode(tokenizer, HARMFUL)
    if profile is None:
        return [tokenizer.decode(answer) for answer in greedy_answers(model, tokenizer, prompts, 20)]
    with steerfast.steer(model, profile):
        return answers_of(model, tokenizer, None)


@pytest.mark.slow(but=["response"])
@pytest.mark.parametrize("positions", ["all", "response"])
def test_the_model_says_what_was_learned(
    learn: Any, tiny_llama: Any, tokenizer: Any, positions: str, profile: SteeringProfile
) -> None:
    learned = learn(**LEARNABLE, positions=positions, names={"harmful": "taught"})
    said = answers_of(tiny_llama, tokenizer, learned)
    assert all(answer.startswith(REFUSAL) for answer in said)
    assert REFUSAL in said  # and it ends there, as was learned
    assert not any(answer.startswith(REFUSAL) for answer in answers_of(tiny_llama, tokenizer, None))
    record = learned.fitted["learned"]
    assert record["loss"][1] < 0.75 * record["loss"][0]
    assert {key: record[key] for key in ("count", "sha256", "name")} == describe_set(HARMFUL, "taught")
    assert (record["answers"], record["layer"], record["positions"], record["aligned_model"]) == (5, 0, positions, None)
    assert learned.fitted["direction"] == "lda"


def test_what_becomes_of_the_profile(learn: Any, profile: SteeringProfile) -> None:
    learned = learn(steps=3)
    assert (learned.vector_kind, learned.steered_layers, learned.positions) == ("learned", [2], "response")
    assert learned.strength.tolist() == [0, 0, 1, 0, 0]
    assert [layer for layer in range(5) if learned.vector[layer].any()] == [2]
    assert torch.equal(learned.candidates["ssv"], profile.vector)
    assert (learned.answer_tokens, learned.tuned) == (None, {})  # both were of the vectors before
    for field in ("direction", "threshold", "norm"):
        assert torch.equal(getattr(learned, field), getattr(profile, field))
    again = learn(profile=learned, steps=4)
    assert set(again.candidates) == {"ssv"}
    assert torch.equal(again.with_vector("ssv").vector, profile.vector)
    with pytest.raises(ProfileError, match=r"strength of layer 3: .* its vector is zero"):
        learned.with_band([2, 3], 1.0)


def test_the_layer(learn: Any, profile: SteeringProfile) -> None:
    assert learn(layer=4, steps=1).steered_layers == [4]
    assert learn(profile=replace(profile, sensor="own"), steps=1).steered_layers == [2]
    assert learn(profile=replace(profile, sensor=1), steps=1).steered_layers == [1]
    always = replace(profile, gate=Gate("always"))
    assert learn(profile=always, steps=1).steered_layers == [2]


def test_the_first_loss_is_the_models(learn: Any, tiny_llama: Any, tokenizer: Any) -> None:
    record = learn(steps=1, batch_size=len(HARMFUL)).fitted["learned"]
    assert record["loss"][0] == pytest.approx(loss_by_hand(tiny_llama, sequences(tokenizer, REFUSAL)), abs=1e-4)


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_loss_is_that_of_the_steered_model(
    learn: Any, tiny_llama: Any, tokenizer: Any, positions: str, layer: int
) -> None:
    """What is trained is what runs: the loss after some steps, by the edit of the run time and without padding."""
    learned = learn(positions=positions, layer=layer, steps=20, batch_size=len(HARMFUL))
    opened = replace(learned, gate=Gate("always"))
    kept: list[Tensor] = []
    lessons = sequences(tokenizer, REFUSAL)
    for prompt, answer in lessons:
        with steerfast.steer(tiny_llama, opened), torch.no_grad():
            cache = tiny_llama(torch.tensor([prompt]), use_cache=True)
            rest = tiny_llama(torch.tensor([answer[:-1]]), past_key_values=cache.past_key_values)
        logits = torch.cat([cache.logits[0, -1:], rest.logits[0]])
        kept.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    (batch,) = batches([p + a for p, a in lessons], len(lessons), "left", 0, torch.device("cpu"))
    starts = torch.tensor([len(lessons[i][0]) for i in batch.indices])[:, None]
    rows = batch.mask.bool()
    if positions == "response":
        rows &= batch.positions >= starts - 1
    with torch.no_grad(), learning._added(find_decoder(tiny_llama).layers[layer], learned.vector[layer], rows):
        found = float(learning._loss(tiny_llama, batch, starts))
    assert found == pytest.approx(float(torch.cat(kept).mean()), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    keeps=st.booleans(),
)
def test_padding_does_not_count(
    make_llama: Callable[..., Any], lengths: list[tuple[int, int]], seed: int, keeps: bool
) -> None:
    """The loss of a padded batch is that of its sequences one by one; also of a model that takes no logits_to_keep."""
    model = make_llama()
    draw = torch.Generator().manual_seed(seed)
    lessons = [tuple(torch.randint(3, 128, (length,), generator=draw).tolist() for length in pair) for pair in lengths]
    by_hand = loss_by_hand(model, lessons)
    (batch,) = batches([p + a for p, a in lessons], len(lessons), "left", 0, torch.device("cpu"))
    starts = torch.tensor([len(lessons[i][0]) for i in batch.indices])[:, None]
    if not keeps:
        whole = model.forward
        model.forward = lambda input_ids, attention_mask, use_cache, position_ids: whole(
            input_ids, attention_mask, position_ids, use_cache=use_cache
        )
    with torch.no_grad():
        found = float(learning._loss(model, batch, starts))
    assert found == pytest.approx(by_hand, abs=1e-4)


def test_seeds(learn: Any) -> None:
    options = {"steps": 6, "batch_size": 2}
    assert torch.equal(learn(**options).vector, learn(**options).vector)
    assert not torch.equal(learn(**options).vector, learn(**options, seed=1).vector)


@pytest.mark.parametrize("max_norm", [0.01, 0.5])
def test_its_norm_is_bounded(learn: Any, profile: SteeringProfile, max_norm: float) -> None:
    norm = float(learn(max_norm=max_norm, steps=60).vector[2].norm())
    assert 0.5 * max_norm * 8.0 < norm <= max_norm * 8.0 * (1 + 1e-6)


@pytest.fixture
def sibling(learn: Any, profile: SteeringProfile, tiny_llama: Any, tokenizer: Any) -> Any:
    """A model of the same shape that refuses where a gate of its own opens: for some of the prompts."""
    taught = learn(**LEARNABLE)
    scores = steerfast.score(tiny_llama, tokenizer, taught, HARMFUL, progress=False).scores
    model = copy.deepcopy(tiny_llama)
    steerfast.steer(model, replace(taught, threshold=torch.full((5,), float(scores.median()))))
    return model


def test_a_sibling_is_the_teacher(learn: Any, sibling: Any, tiny_llama: Any, tokenizer: Any) -> None:
    """Its answers are learned, those of them that refuse."""
    prompts = encode(tokenizer, HARMFUL)
    answers = greedy_answers(sibling, tokenizer, prompts, 40)
    lessons = [
        (prompt, [*answer, tokenizer.eos_token_id][:40])
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_refusal_strict(tokenizer.decode(answer))
    ]
    assert 0 < len(lessons) < len(HARMFUL)
    options = {"refusal": None, "aligned_model": sibling, "batch_size": len(HARMFUL)}
    record = learn(**options, steps=1).fitted["learned"]
    assert (record["answers"], record["count"], record["aligned_model"]) == (len(lessons), 5, "LlamaForCausalLM")
    assert record["loss"][0] == pytest.approx(loss_by_hand(tiny_llama, lessons), abs=1e-4)
    first, last = learn(**options, **{**LEARNABLE, "steps": 100}).fitted["learned"]["loss"]
    assert last < 0.9 * first
    with pytest.raises(ProfileError, match="refusal: expected none beside an aligned model"):
        learn(aligned_model=sibling)
    silent = copy.deepcopy(tiny_llama)
    silent.lm_head.weight.data.zero_()
    with pytest.raises(PromptError, match="that the aligned model refuses, it refuses none"):
        learn(refusal=None, aligned_model=silent)


def test_answers_are_cut(learn: Any, tiny_llama: Any, tokenizer: Any) -> None:
    """No end is learned where an answer does not end."""
    refusal = "sorry , but I can't help with that ."
    options = {"refusal": refusal, "steps": 1, "batch_size": len(HARMFUL)}
    lessons = sequences(tokenizer, refusal)
    for count in (3, 8, 9, 10):
        cut = [(prompt, answer[:count]) for prompt, answer in lessons]
        found = learn(**options, answer_tokens=count).fitted["learned"]["loss"][0]
        assert found == pytest.approx(loss_by_hand(tiny_llama, cut), abs=1e-4)


@pytest.mark.parametrize("texts", [None, ["no {topic} .", "sorry , not {topic}"]])
def test_without_a_sibling_refusals_of_the_topics_are_learned(
    learn: Any, tiny_llama: Any, tokenizer: Any, texts: list[str] | None
) -> None:
    record = learn(refusal=texts, steps=1, batch_size=len(HARMFUL)).fitted["learned"]
    pairs = zip(HARMFUL, refusals_of(HARMFUL, texts), strict=True)
    lessons = [one for prompt, refusal in pairs for one in sequences(tokenizer, refusal, [prompt])]
    assert record["loss"][0] == pytest.approx(loss_by_hand(tiny_llama, lessons), abs=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(learn: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    tiny_llama.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in tiny_llama.modules()]
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    if fails:
        monkeypatch.setattr(learning.torch.optim.Adam, "step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(steps=2)
    else:
        learn(steps=2)
    assert [module.training for module in tiny_llama.modules()] == modes
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    needs = {name for name, parameter in tiny_llama.named_parameters() if not parameter.requires_grad}
    assert needs == {"lm_head.weight"}
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_it_learns_in_any_grad_mode_and_half_precision(learn: Any, tiny_llama: Any) -> None:
    plain = learn(steps=3).vector
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(learn(steps=3).vector, plain)
    half = learn(model=tiny_llama.bfloat16(), steps=3).vector
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half[2], plain[2], dim=0) > 0.95


def test_a_patched_model_that_is_idle(learn: Any, tiny_llama: Any) -> None:
    plain = learn(steps=3).vector
    torch.testing.assert_close(learn(model=steerfast.patch(tiny_llama), steps=3).vector, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"harmful": "one"}, PromptError, "harmful: expected a list of prompts, got one string"),
        ({"harmful": []}, PromptError, "harmful: expected at least one prompt, got none"),
        ({"harmful": ["a " * 300]}, PromptError, "entry 1 .* the model's context leaves room for 216"),
        ({"layer": 5}, ProfileError, r"layer: expected 0..4, got 5"),
        ({"steps": 0}, ProfileError, "steps: expected at least 1, got 0"),
        ({"answer_tokens": 0}, ProfileError, "answer_tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, ProfileError, "batch_size: expected at least 1, got 0"),
        ({"max_norm": 0.0}, ProfileError, "max_norm: expected a positive share of the rows' norm, got 0.0"),
        ({"max_norm": math.inf}, ProfileError, "max_norm: expected a positive share"),
        ({"max_norm": math.nan}, ProfileError, "max_norm: expected a positive share"),
        ({"positions": "some"}, ProfileError, "positions: expected 'all' or 'response', got 'some'"),
        ({"refusal": " "}, ProfileError, "refusal: expected a text, with no other field than {topic}, got ' '"),
        ({"refusal": ["no", "not {it}"]}, ProfileError, "with no other field than {topic}, got 'not {it}'"),
        ({"refusal": []}, ProfileError, "refusal: expected at least one text, got none"),
    ],
)
def test_bad_arguments(learn: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        learn(**options)


def test_bad_models_and_profiles(
    learn: Any, profile: SteeringProfile, tiny_llama: Any, make_llama: Any, make_profile: Any
) -> None:
    with pytest.raises(ProfileError, match="expected one that adds vectors, got edit 'ablate'"):
        learn(profile=replace(profile, edit="ablate"))
    with pytest.raises(ProfileError, match="expected one with the norm of its rows, got none for layer 2"):
        learn(profile=replace(profile, norm=torch.zeros(5)))
    with pytest.raises(ArchitectureError, match=r"aligned_model: expected the \d+ tokens .* got 16; take a sibling"):
        learn(refusal=None, aligned_model=make_llama(vocab_size=16))
    with pytest.raises(PromptError, match="refuses none of them"):  # its shape may be another
        learn(refusal=None, aligned_model=make_llama(num_hidden_layers=3, hidden_size=64))
    with pytest.raises(ProfileError, match="with other weights"):
        learn(model=make_llama(seed=1))
    broken = copy.deepcopy(tiny_llama)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(SteerfastError, match="expected a finite loss, got nan after 0 steps"):
        learn(model=broken)
    with steerfast.steer(tiny_llama, profile), pytest.raises(SteerfastError, match="one that is steered"):
        learn()


# -- stop and go on ----------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that were really computed; the fifth interrupts, once."""
    found: list[float] = []
    compute = learning._loss

    def counting(*args: Any) -> Tensor:
        if len(found) == 4:
            found.append(math.nan)
            raise KeyboardInterrupt
        loss = compute(*args)
        found.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(learning, "_loss", counting)
    return found


def test_an_interrupted_training_goes_on_with_the_same_bits(learn: Any, steps: list[float], tmp_path: Path) -> None:
    options = {"steps": 7, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        learn(**options, resume=tmp_path / "steps")
    resumed = learn(**options, resume=tmp_path / "steps")
    assert len(steps) == 1 + 7
    whole = learn(**options)
    assert torch.equal(resumed.vector, whole.vector)
    assert resumed.checksum == whole.checksum
    done = len(steps)
    assert learn(**options, resume=tmp_path / "steps").checksum == whole.checksum
    assert len(steps) == done


def test_steps_of_another_training_are_not_taken(learn: Any, tmp_path: Path) -> None:
    learn(steps=3, resume=tmp_path / "steps")
    for change in ({"seed": 1}, {"max_norm": 0.5}, {"layer": 1}, {"harmful": HARMFUL[:2]}, {"refusal": "no ."}):
        other = {"steps": 3, "batch_size": 2, **change}
        assert learn(**other, resume=tmp_path / "steps").checksum == learn(**other).checksum


def test_a_file_of_another_kind_is_left_alone(learn: Any, profile: SteeringProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.safetensors")
    (tmp_path / "text").write_text("x")
    for file in (tmp_path / "p.safetensors", tmp_path / "text"):
        before = file.read_bytes()
        with pytest.raises(OutputError, match=r"expected a file of learn|not a readable|format"):
            learn(steps=1, resume=file)
        assert file.read_bytes() == before

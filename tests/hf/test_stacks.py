"""Several profiles on one sequence: each gate decides for its own profile, and the edits add up."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import CLOSE, MakeProfile, Oracle, four_prompts, greedy, padded
from torch import Tensor
from transformers import ContinuousBatchingConfig, StaticCache

import steerfast
from steerfast.errors import ProfileError, SteerfastError
from steerfast.hf import caches
from steerfast.profile import SteeringProfile

pytestmark = pytest.mark.contract

NEW = 4


def split(plain: Any, profile: SteeringProfile) -> SteeringProfile:
    """The profile with a threshold that opens its gate for two of `four_prompts`; it reads layer 0, before any edit."""
    oracle, scores = Oracle(plain, profile), []
    for ids in four_prompts():
        oracle.logits(ids, [(0, len(ids))])
        scores.append(float(oracle.scores[0]))
    low, high = sorted(scores)[1:3]
    return dataclasses.replace(profile, threshold=torch.full_like(profile.threshold, (low + high) / 2))


@pytest.fixture
def pair(plain: Any, make_profile: MakeProfile) -> tuple[SteeringProfile, SteeringProfile]:
    """Two profiles that differ in direction, layers, positions, how they read, and in where their edit ends."""
    last = make_profile(plain, seed=1, layers=[1, 2], sensor=0)
    mean = make_profile(
        plain, seed=2, layers=[2, 3], sensor=0, pooling="mean", window=3, positions="response", answer_tokens=3
    )
    return split(plain, last), split(plain, mean)


def stacked(plain: Any, ids: list[int], profiles: Sequence[SteeringProfile], strengths: Sequence[float]) -> Tensor:
    """Logits [NEW, vocabulary] of a greedy answer, and the answer, by hooks of their own."""
    oracles = [Oracle(plain, *each) for each in zip(profiles, strengths, strict=True)]
    whole, logits = list(ids), []
    for _ in range(NEW):
        with torch.no_grad():
            contexts = [oracle.attached([0], [(0, len(ids))]) for oracle in oracles]
            for context in contexts:
                context.__enter__()
            logits.append(plain(torch.tensor([whole]), use_cache=False).logits[0, -1])
            for context in reversed(contexts):
                context.__exit__(None, None, None)
        whole.append(int(logits[-1].argmax()))
    return torch.stack(logits)


def test_gates_decide_each_for_its_own(model: Any, plain: Any, pair: tuple[SteeringProfile, SteeringProfile]) -> None:
    stacks: list[Any] = [list(pair), [pair[1], pair[0]], None, pair[1]]
    strengths: list[Any] = [[1.0, 0.5], 1.0, 1.0, 2.0]
    with steerfast.steer(model, None) as steering:
        _, logits = greedy(model, padded(four_prompts()), NEW, steering=stacks, steering_strength=strengths)
        scores, fired = steering.scores, steering.fired
    each = [(pair, (1.0, 0.5)), (pair[::-1], (1.0, 1.0)), ((), ()), (pair[1:], (2.0,))]
    for n, (ids, (profiles, factors)) in enumerate(zip(four_prompts(), each, strict=True)):
        torch.testing.assert_close(logits[n], stacked(plain, ids, profiles, factors), **CLOSE)
        opened = []
        for k, profile in enumerate(profiles):
            oracle = Oracle(plain, profile)
            oracle.logits(ids, [(0, len(ids))])
            assert float(scores[0, n, k]) == pytest.approx(float(oracle.scores[0]), abs=1e-5)
            opened.append(bool(oracle.scores[0] > profile.threshold[0]))
        assert bool(fired[n]) == any(opened)
        assert scores[:, n, len(profiles) :].eq(-torch.inf).all()


def test_a_profile_that_does_not_fire_keeps_every_bit(
    model: Any, pair: tuple[SteeringProfile, SteeringProfile]
) -> None:
    """Beside another one, and before or after it."""
    shut = dataclasses.replace(pair[1], threshold=torch.full_like(pair[1].threshold, 2.0))
    batch = padded(four_prompts())
    with steerfast.steer(model, None):
        alone = greedy(model, batch, NEW, steering=[[pair[0]]])
        for stack in ([pair[0], shut], [shut, pair[0]], [shut, shut, pair[0], shut]):
            tokens, logits = greedy(model, batch, NEW, steering=[stack])
            assert torch.equal(tokens, alone[0])
            assert torch.equal(logits, alone[1])


def test_a_profile_twice_is_twice_its_strength(model: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(model, layers=[1, 2], kind="always", size=1.0)
    batch = padded(four_prompts())
    with steerfast.steer(model, None):
        _, twice = greedy(model, batch, NEW, steering=[[profile, profile]])
        _, strong = greedy(model, batch, NEW, steering=profile, steering_strength=2.0)
    torch.testing.assert_close(twice, strong, **CLOSE)


@pytest.mark.parametrize(
    "edit", [{"edit": "ablate"}, {"edit": "keep_norm"}, {"edit": "rotate", "angle": 40.0}], ids=str
)
def test_edits_of_other_kinds_in_a_stack(
    model: Any, plain: Any, make_profile: MakeProfile, edit: dict[str, Any]
) -> None:
    """At layers of their own they follow one another as in two models."""
    first = make_profile(model, seed=1, layers=[1], kind="always")
    second = make_profile(model, seed=2, layers=[3], kind="always", **edit)
    batch = padded(four_prompts())
    with steerfast.steer(model, None):
        _, got = greedy(model, batch, NEW, steering=[[first, second]])
    adds = plain.model.layers[1].register_forward_hook(lambda m, a, x: x + first.vector[1].to(x.dtype))
    with steerfast.steer(plain, second):
        _, want = greedy(plain, batch, NEW)
    adds.remove()
    torch.testing.assert_close(got, want, **CLOSE)


def test_token_gates_in_a_stack(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    profiles = [make_profile(plain, seed=s, layers=[s], kind="token") for s in (2, 3)]
    batch = padded(four_prompts())
    with steerfast.steer(model, None) as steering:
        _, logits = greedy(model, batch, NEW, steering=[profiles])
        fired = steering.fired
    for n, ids in enumerate(four_prompts()):
        torch.testing.assert_close(logits[n], stacked(plain, ids, profiles, (1.0, 1.0)), **CLOSE)
    assert fired.any()


def test_layers_before_the_sensor_in_a_stack(model: Any, make_profile: MakeProfile) -> None:
    """The second pass knows both decisions from the start, as two always gates do."""
    ahead = make_profile(model, seed=1, layers=[0, 2], sensor=1, threshold=-2.0)
    other = make_profile(model, seed=2, layers=[2], sensor=1, threshold=-2.0)
    known = [dataclasses.replace(one, gate=steerfast.Gate("always")) for one in (ahead, other)]
    batch = padded(four_prompts())
    with steerfast.steer(model, None):
        _, got = greedy(model, batch, NEW, steering=[[ahead, other], None, [other, ahead], ahead])
        _, want = greedy(model, batch, NEW, steering=[known, None, known[::-1], known[0]])
    torch.testing.assert_close(got, want, **CLOSE)


def test_beams(model: Any, pair: tuple[SteeringProfile, SteeringProfile]) -> None:
    """Decisions move with the cache, and each sequence keeps its own."""
    batch = padded(four_prompts())
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 1, "max_new_tokens": NEW, "do_sample": False}
    with steerfast.steer(model, None), torch.no_grad():
        together = model.generate(**batch, **options, steering=[list(pair)])
        each = [
            model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options, steering=[list(pair)]
            )
            for ids in four_prompts()
        ]
    for n, one in enumerate(each):
        assert together[n, -NEW:].tolist() == one[0, -NEW:].tolist()


@pytest.mark.slow(but=["fused"])
def test_compiled_equals_eager(model: Any, pair: tuple[SteeringProfile, SteeringProfile]) -> None:
    torch.compiler.reset()

    def run(call: Any) -> list[Tensor]:
        given = {caches.argument(model): StaticCache(model.config, max_cache_len=12)}
        with torch.no_grad(), steering.assigned([list(pair)]):
            tokens = torch.tensor([four_prompts()[0][:5]])
            return [call(tokens, **given).logits, *(call(torch.tensor([[t]]), **given).logits for t in (7, 8, 9))]

    with steerfast.steer(model, None) as steering:
        want, got = run(model), run(torch.compile(model, backend="eager"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.compiler.reset()


def test_continuous_batching(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    """Requests with one profile, with two and with none in the same steps."""
    model.set_attn_implementation("sdpa")
    profiles = [
        split(plain, make_profile(plain, seed=s, layers=[1, 2], sensor=0, positions="response", **fields))
        for s, fields in ((1, {}), (2, {"pooling": "mean", "window": 3}))
    ]
    config = ContinuousBatchingConfig(block_size=8, num_blocks=32, max_batch_tokens=6)
    generation = {"continuous_batching_config": config, "max_new_tokens": NEW}
    stacks: list[Any] = [profiles[0], profiles, None, profiles[::-1]]
    with steerfast.steer(model, None) as steering:
        _, want = greedy(model, padded(four_prompts()), NEW, steering=stacks, steering_strength=[2.0, [1.0, 0.5], 1, 1])
        outputs = model.generate_batch(
            four_prompts(), **generation, steering=stacks, steering_strength=[2.0, [1.0, 0.5], 1, 1]
        )
        fired, scores = steering.fired, steering.scores
        decisions = [steering.decision(name) for name in outputs]
    for n, output in enumerate(outputs.values()):
        assert output.generated_tokens == want[n].argmax(dim=-1).tolist()
    assert scores.shape == (1, 4, 2)
    assert [None if one is None else len(one[1]) for one in decisions] == [1, 2, None, 2]
    assert [False if one is None else one[0] for one in decisions] == fired.tolist()


def test_a_default_stack_in_continuous_batching(model: Any, make_profile: MakeProfile) -> None:
    model.set_attn_implementation("sdpa")
    one, two = (make_profile(model, seed=s, layers=[1, 2], kind="always", positions="response") for s in (1, 2))
    config = ContinuousBatchingConfig(block_size=8, num_blocks=32, max_batch_tokens=16)
    generation = {"continuous_batching_config": config, "max_new_tokens": NEW}
    found = []
    for default, given in ((None, {"steering": one + two}), (one + two, {}), ([one, two], {}), ([two, one], {})):
        with steerfast.steer(model, default):
            outputs = model.generate_batch(four_prompts(), **generation, **given)
        found.append([output.generated_tokens for output in outputs.values()])
    assert found[0] == found[1] == found[2]


def test_a_longer_stack_while_requests_run(model: Any, make_profile: MakeProfile) -> None:
    model.set_attn_implementation("sdpa")
    one, two = (make_profile(model, seed=s, layers=[1, 2], kind="always", positions="response") for s in (1, 2))
    prompts = four_prompts()
    config = ContinuousBatchingConfig(block_size=8, num_blocks=32, max_batch_tokens=16)
    with steerfast.steer(model, None):
        want = [
            greedy(model, padded([ids]), 8, steering=[stack])[0][0].tolist()
            for ids, stack in zip(prompts[:2], ([one], [one, two]), strict=True)
        ]
        with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
            first = manager.add_request(prompts[0], max_new_tokens=8, steering=one)
            while manager.batch_processor is None or not manager.batch_processor.scheduler.active_requests:
                pass
            second = manager.add_request(prompts[1], max_new_tokens=8, steering=[one, two])
            found = {}
            while len(found) < 2:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
    assert [found[first], found[second]] == want


@pytest.mark.parametrize(
    ("steering", "strength", "message"),
    [
        ([[]], None, r"steering\[0\]: expected a stack of 1 to 4 profiles, got 0"),
        ([["a"] * 5], None, r"steering\[0\]: expected a stack of 1 to 4 profiles, got 5"),
        ([["a", None]], None, r"steering\[0\]\[1\]: expected a profile, got NoneType"),
        ([["a", "a"]], [[1.0]], r"steering_strength\[0\]: expected 2 numbers, one per profile of the stack, got 1"),
        ([["a", "a"]], [[1.0, float("inf")]], r"steering_strength\[0\]\[1\]: expected a finite number, got inf"),
        ([["a", "token"]], None, "expected token gates for all sequences of a batch or for none, got both"),
    ],
)
def test_wrong_stacks_are_refused(
    model: Any, make_profile: MakeProfile, steering: Any, strength: Any, message: str
) -> None:
    known = {"a": make_profile(model), "token": make_profile(model, kind="token")}
    stacks = [[known.get(name) if isinstance(name, str) else name for name in stack] for stack in steering]
    with steerfast.steer(model, None), pytest.raises(SteerfastError, match=message):
        model.generate(**padded([[3, 4, 5]]), max_new_tokens=1, steering=stacks, steering_strength=strength)


def test_sequences_with_a_nan_score_count_once(model: Any, make_profile: MakeProfile) -> None:
    embeds = model.get_input_embeddings()(torch.ones(3, 4, dtype=torch.long)).detach()
    embeds[0] = float("nan")
    with torch.no_grad(), steerfast.steer(model, None) as steering:
        with steering.assigned([[make_profile(model, seed=s) for s in (1, 2)]]):
            model(inputs_embeds=embeds)
        assert steering.nan_scores == 1


# -- found by trying to break it, with one profile as with several -----------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_takes_profiles_that_come_later(model: Any, make_profile: MakeProfile, copied: Any) -> None:
    own, later = (make_profile(model, seed=s, kind="always") for s in (1, 9))
    batch = padded(four_prompts())
    with steerfast.steer(model, own):
        _, want = greedy(model, batch, NEW, steering=[[own, later]])
        _, got = greedy(copied(model), batch, NEW, steering=[[own, later]])
    assert torch.equal(got, want)


def test_a_copy_made_in_the_middle_of_a_call_is_in_none(model: Any, make_profile: MakeProfile) -> None:
    own, other = (make_profile(model, seed=s, positions="response", threshold=-2.0) for s in (1, 2))
    copies: list[Any] = []
    with torch.no_grad(), steerfast.steer(model, own):
        hook = model.model.register_forward_hook(lambda *_: None if copies else copies.append(copy.deepcopy(model)))
        greedy(model, padded(four_prompts()), NEW, steering=other)
        hook.remove()

        def two_turns(one: Any) -> Tensor:
            cache = one(torch.tensor([four_prompts()[0]]))[caches.argument(one)]
            return one(torch.tensor([[7]]), **{caches.argument(one): cache}).logits

        assert torch.equal(two_turns(copies[0]), two_turns(model))


def test_a_handle_that_was_detached_steers_nothing(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    profile, tokens = make_profile(model, threshold=-2.0), torch.tensor([four_prompts()[0]])
    steering = steerfast.steer(model, profile)
    generate = model.generate
    steering.detach()
    with pytest.raises(SteerfastError, match="it was detached; call steer"):
        steering.assigned(profile)
    with pytest.raises(SteerfastError, match="it was detached; call steer"):
        generate(tokens, steering=profile, max_new_tokens=1)
    assert not steering.attached
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, **CLOSE)


def test_a_strength_alone_goes_to_the_profiles_of_the_context(model: Any, make_profile: MakeProfile) -> None:
    own, other = (make_profile(model, seed=s, threshold=-2.0) for s in (1, 2))
    batch = padded(four_prompts())
    with steerfast.steer(model, own) as steering:
        _, want = greedy(model, batch, NEW, steering=[[other, own]], steering_strength=[[2.0, 0.5]])
        with steering.assigned([[other, own]]):
            _, got = greedy(model, batch, NEW, steering_strength=[[2.0, 0.5]])
        _, alone = greedy(model, batch, NEW, steering_strength=np.float32(2.0))
        _, same = greedy(model, batch, NEW, steering=own, steering_strength=2.0)
        for wrong in ("x", [], [[1.0]], [[1.0, None]], [1.0, 2.0, 3.0]):
            with pytest.raises(SteerfastError, match="steering"):
                greedy(model, batch, NEW, steering=[[other, own]], steering_strength=wrong)
    assert torch.equal(got, want)
    assert torch.equal(alone, same)


# -- the algebra of profiles, on a model -----------------------------------------------------------------------------


def test_algebra_is_addition_by_hand(model: Any, plain: Any) -> None:
    """Logits of stacks, scaled and turned around, against hooks that add the vectors."""
    generator = torch.Generator().manual_seed(5)
    u, v = torch.randn(2, plain.config.hidden_size, generator=generator)
    identity = steerfast.identify(plain)
    a = SteeringProfile.from_tensors({1: u, 2: v}, identity)
    b = SteeringProfile.from_tensors({2: u}, identity, strength=3.0)
    ids = padded(four_prompts())
    for steering, added in (
        (a, {1: u, 2: v}),
        (a * 0.5, {1: u / 2, 2: v / 2}),
        (-a, {1: -u, 2: -v}),
        (a * -1.0, {1: -u, 2: -v}),
        (a + b, {1: u, 2: v + 3 * u}),
        (1.5 * (b - a), {1: -1.5 * u, 2: 4.5 * u - 1.5 * v}),
        (a.only([2]), {2: v}),
        ([a, b, -a], {2: 3 * u}),
    ):
        hooks = [
            plain.model.layers[layer].register_forward_hook(lambda _, __, out, vector=vector: _plus(out, vector))
            for layer, vector in added.items()
        ]
        with torch.no_grad():
            wanted = plain(**ids).logits
            for hook in hooks:
                hook.remove()
            with steerfast.steer(model, steering):
                found = model(**ids).logits
        real = ids["attention_mask"].bool()
        torch.testing.assert_close(found[real], wanted[real], **CLOSE)


def _plus(out: Any, vector: Tensor) -> Any:
    return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector


def test_a_default_stack_steers_calls_that_name_none(
    model: Any, pair: tuple[SteeringProfile, SteeringProfile], tmp_path: Any
) -> None:
    """Given as a list, as a sum, as files; and a sum is one stack, no list with an entry per sequence."""
    batch = padded(four_prompts())
    with steerfast.steer(model, None):
        _, wanted = greedy(model, batch, NEW, steering=[list(pair)] * 4)
        _, whole = greedy(model, batch, NEW, steering=pair[0] + pair[1])
        _, halved = greedy(model, batch, NEW, steering=[list(pair)], steering_strength=0.5)
    assert torch.equal(whole, wanted)
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for profile, file in zip(pair, files, strict=True):
        profile.save(file)
    for given in (list(pair), pair[0] + pair[1], files, [str(files[0]), pair[1]]):
        with steerfast.steer(model, given) as steering:
            _, found = greedy(model, batch, NEW)
            assert torch.equal(found, wanted)
            steering.strength = 0.5
            _, found = greedy(model, batch, NEW)
            assert torch.equal(found, halved)
    with steerfast.steer(model, str(files[0])) as steering:
        assert steering.profile.checksum == pair[0].checksum  # type: ignore[union-attr]


def test_a_profile_turned_around_decides_as_before(model: Any, pair: tuple[SteeringProfile, SteeringProfile]) -> None:
    batch, decided = padded(four_prompts()), []
    for profile in (pair[0], -pair[0]):
        with steerfast.steer(model, profile) as steering:
            model(**batch)
            decided.append((steering.fired, steering.scores))
    assert torch.equal(decided[0][0], decided[1][0])
    assert torch.equal(decided[0][1], decided[1][1])
    assert decided[0][0].sum() == 2


def test_paths_are_no_profiles_of_a_call(model: Any, pair: tuple[SteeringProfile, SteeringProfile]) -> None:
    loads = r"got str \(SteeringProfile.from_pretrained\('a.safetensors'\) loads it\)"
    with steerfast.steer(model, pair[0]):
        for steering in ("a.safetensors", ["a.safetensors"], [["a.safetensors"]]):
            with pytest.raises(SteerfastError, match=loads):
                model.generate(**padded(four_prompts()), steering=steering)
    with pytest.raises(ProfileError, match=r"expected a file at 'a.safetensors'"):
        steerfast.steer(model, "a.safetensors")
    with pytest.raises(
        ProfileError, match=r"profile: expected a profile, a file, a hub repository or a list .*, got int"
    ):
        steerfast.steer(model, 3)  # type: ignore[arg-type]


def test_a_model_that_is_accepted(model: Any, plain: Any, make_profile: MakeProfile) -> None:
    profile = make_profile(plain, seed=1, layers=[1, 2], sensor=0)
    other = dataclasses.replace(profile, model=dataclasses.replace(profile.model, architecture="another"))
    with pytest.raises(ProfileError, match="architecture another"):
        steerfast.steer(model, other)
    with steerfast.steer(model, other, accept_model=True) as steering:
        (record,) = steering.profile.fitted["accepted"]  # type: ignore[union-attr]
        assert "architecture another" in record["mismatch"]
        logits = model(**padded(four_prompts())).logits
    with steerfast.steer(model, profile):
        assert torch.equal(model(**padded(four_prompts())).logits, logits)

"""One call makes a profile: from pairs the mean difference, from prompts what the four steps make."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import steerfast
from steerfast.errors import OutputError, ProfileError, PromptError, SteerfastError
from steerfast.fitting import fit as fitting_fit
from steerfast.fitting import safety
from steerfast.fitting.budget import EFFORTS, RECIPE, Effort, Speed, largest, speed_of
from steerfast.fitting.contrast import SHARE, Contrast, common_prompts
from steerfast.fitting.frontier import Point, recommend
from steerfast.fitting.labelled import evenly
from steerfast.hf.bake import bake
from steerfast.hf.structure import find_decoder
from steerfast.judging.fluency import FluencyLimits
from steerfast.text import splits
from steerfast.text.encoding import encode
from steerfast.text.examples import Example

ANY_TEXT = FluencyLimits(max_repetition=1.0, max_perplexity=1e30)
WORDS = ["bake the cake", "paint a tree", "plant the garden", "write a poem", "find a book"]


def chat(prompt: str, answer: str | None = None, system: str | None = None) -> list[dict[str, str]]:
    parts = {"system": system, "user": prompt, "assistant": answer}
    return [{"role": role, "content": text} for role, text in parts.items() if text is not None]


ANSWERED = [chat(one, f"{one} and sorry .") for one in WORDS], [chat(one, "bomb it , dog !") for one in WORDS]
PROMPTS = [f"sorry , {one}" for one in WORDS], [f"bomb it , {one}" for one in WORDS]
SYSTEMS = [chat(one, system="help people") for one in WORDS], [chat(one, system="burn it") for one in WORDS]
BOTH = [chat(one, "sorry .", "help people") for one in WORDS], [chat(one, "burn it", "burn it") for one in WORDS]


@pytest.fixture
def fit(tiny_llama: Any, tokenizer: Any) -> Callable[..., steerfast.SteeringProfile]:
    def run(*sides: Any, **options: Any) -> steerfast.SteeringProfile:
        given: dict[str, Any] = {"behaviour": "polite", "progress": False, "limits": ANY_TEXT, "max_new_tokens": 4}
        return steerfast.fit(tiny_llama, tokenizer, *sides, **{**given, **options})

    return run


def rows_by_hand(model: Any, ids: list[int]) -> Tensor:
    """Return the rows of one sequence by itself, float64 [layers, T, H], as the layers give them."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for layer in find_decoder(model).layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.cat(found).double()


def by_hand(model: Any, tokenizer: Any, side: list[Any], read: str) -> tuple[Tensor, list[Tensor]]:
    """Return the reading of each sequence, [n, layers, H], and the norms of the rows that count, [layers, T] each."""
    readings, norms = [], []
    for one in side:
        answer = one[-1]["content"] if not isinstance(one, str) and one[-1]["role"] == "assistant" else None
        (ids,) = encode(tokenizer, [one if answer is None else one[:-1]])
        start = 0 if answer is None else len(ids)
        ids = ids + ([] if answer is None else tokenizer(answer, add_special_tokens=False)["input_ids"])
        rows = rows_by_hand(model, ids)[:, start:]
        readings.append(rows.mean(dim=1) if read == "answer" else rows[:, -1])
        norms.append(rows.norm(dim=2))
    return torch.stack(readings), norms


@pytest.mark.parametrize(
    ("sides", "read"),
    [(ANSWERED, None), (ANSWERED, "last"), (PROMPTS, None), (SYSTEMS, None), (BOTH, None)],
    ids=["answers", "last of answers", "prompts", "system prompts", "both"],
)
def test_the_vector_is_the_mean_difference(fit: Any, tiny_llama: Any, tokenizer: Any, sides: Any, read: Any) -> None:
    profile = fit(*sides, read=read, batch_size=1)  # a batch rounds otherwise, and so do CPUs
    chosen = read or ("last" if isinstance(sides[0][0], str) or sides[0][0][-1]["role"] == "user" else "answer")
    positive, negative = (by_hand(tiny_llama, tokenizer, side, chosen) for side in sides)
    difference = positive[0].mean(dim=0) - negative[0].mean(dim=0)
    middle = torch.tensor(
        [
            statistics.median_low([float(norms[layer].median()) for norms in (*positive[1], *negative[1])])
            for layer in range(5)
        ],
        dtype=torch.float64,
    )
    expected = difference / difference.norm(dim=1, keepdim=True) * SHARE * middle[:, None]
    torch.testing.assert_close(profile.vector.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(profile.norm.double(), middle, rtol=1e-5, atol=0)
    together = fit(*sides, read=read).vector.double()
    assert ((together - expected).norm(dim=1) <= 1e-6 * middle).all()
    assert (profile.gate.kind, profile.edit, profile.positions) == ("always", "add", "response")
    assert profile.vector_kind == profile.fitted["behaviour"] == "polite"
    assert (profile.fitted["read"], profile.fitted["pairs"]["count"]) == (chosen, 5)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from([2.0**-20, 1.0, 2.0**30]))
def test_the_direction_of_rows_is_that_of_fp64(seed: int, count: int, scale: float) -> None:
    """Bit for bit where sums are exact: rows of small whole numbers, a power of two of each side."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(-8, 9, (2, count, 2, 4), generator=generator).float() * scale
    sides[0, 0, :, 0] += 100 * scale
    rows = Contrast(*sides, norm=torch.ones(2))
    for layer in range(2):
        difference = sides[0, :, layer].double().mean(0) - sides[1, :, layer].double().mean(0)
        expected = difference / difference.norm()
        torch.testing.assert_close(rows.direction(layer, "mean"), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["mean", "pca", "logistic"])
def test_methods_agree_on_pairs_that_differ_in_one_direction(method: str) -> None:
    torch.manual_seed(0)
    negative = torch.randn(12, 1, 8)
    positive = negative + 5 * torch.nn.functional.one_hot(torch.tensor(3), 8)
    rows = Contrast(positive, negative, torch.ones(1))
    direction = rows.direction(0, method)
    assert direction.argmax() == 3
    assert float(direction[3]) > 0.9
    assert rows.pairs_right(0, method) == [12, 12]


def test_a_strength_is_the_same_share_of_the_rows(fit: Any) -> None:
    profile = fit(*ANSWERED, layers=(1, 3), strengths=[0.75])
    assert profile.steered_layers == [1, 2, 3]
    assert profile.strength[1:4].tolist() == pytest.approx([0.25] * 3)
    torch.testing.assert_close(profile.vector.norm(dim=1), SHARE * profile.norm)


def test_the_default_band_is_in_the_middle(fit: Any) -> None:
    assert fit(*ANSWERED, strengths=[1.0]).steered_layers == [2]


def test_the_record_of_strengths(fit: Any) -> None:
    profile = fit(*ANSWERED, strengths=[2.0, 0.5], name="polite.jsonl")
    found = profile.fitted["frontier"]
    assert [one["strength"] for one in found["points"]][:2] == [0.0, 0.5]
    assert found["points"][0]["shift"] == 0.0
    assert (found["prompts"], found["max_new_tokens"]) == (5, 4)
    assert profile.fitted["pairs"]["name"] == "polite.jsonl"
    total = found["strength"] or found["points"][1]["strength"]
    assert float(profile.strength.sum()) == pytest.approx(total)


def test_a_profile_of_pairs_moves_the_answers(fit: Any, tiny_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    profile = fit(*ANSWERED, strengths=[8.0])
    assert profile.fitted["frontier"]["points"][1]["shift"] > 0.1
    profile.save(tmp_path / "p.safetensors")
    loaded = steerfast.SteeringProfile.load(tmp_path / "p.safetensors")
    assert loaded.checksum == profile.checksum
    (ids,) = encode(tokenizer, ["bake the cake"])
    plain = tiny_llama.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    with steerfast.steer(tiny_llama, loaded, 8.0):
        steered = tiny_llama.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert not torch.equal(plain, steered)


def test_prompts_that_a_pair_shares() -> None:
    assert common_prompts(*ANSWERED) == [chat(one) for one in WORDS]
    assert common_prompts(*SYSTEMS) == [chat(one) for one in WORDS]
    assert common_prompts(*PROMPTS) == []
    assert common_prompts([chat("a", "x")] * 2, [chat("a", "y")] * 2) == [chat("a")]


# -- which strength ------------------------------------------------------------------------------------


def point(strength: float, shift: float, perplexity: float = 3.0, fluent: float = 1.0) -> Point:
    return Point(strength, shift, perplexity, 0.0, fluent)


def test_the_least_strength_that_does_most_is_recommended() -> None:
    points = [point(0, 0), point(0.5, 0.4), point(1, 0.85), point(2, 1.0), point(3, 2.0, fluent=0.5)]
    found = recommend(points)
    assert (found["strength"], found["range"], found["problem"]) == (1, [0.5, 2], None)
    assert recommend([*points[:3], point(2, 0.9)])["strength"] == 1
    assert len(found["points"]) == 5


def test_a_behaviour_may_be_allowed_more_perplexity() -> None:
    points = [point(0, 0), point(0.5, 0.2), point(1, 0.9, perplexity=11.0), point(2, 1.0, perplexity=13.0)]
    assert recommend(points)["strength"] == 0.5
    assert recommend(points, most=4.0)["strength"] == 1
    assert recommend(points, most=5.0)["range"] == [1, 2]


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ([point(0.5, 1.0, perplexity=7.0)], "strength 0.5 already breaks the text (fluent 100%, perplexity 7.0"),
        ([point(0.5, 1.0, fluent=0.8)], "strength 0.5 already breaks the text"),
        ([point(0.5, -0.1), point(1, 0.0)], "no strength up to 1 moves the answers towards the positive side"),
    ],
)
def test_no_strength_helps(points: list[Point], problem: str) -> None:
    found = recommend([point(0, 0), *points])
    assert (found["strength"], found["range"]) == (None, None)
    assert found["problem"].startswith(problem)


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "options", "error", "message"),
    [
        ((["a"], None), {}, PromptError, "negative: expected the other side of the pairs, got none"),
        ((None, ["a"]), {}, PromptError, "positive: expected the other side of the pairs, got none"),
        ((), {}, PromptError, "expected pairs for 'polite', got none; only 'safety' has prompts that ship"),
        ((["a", "b"], ["a"]), {}, PromptError, "expected as many of each, got 2 and 1"),
        (([], []), {}, PromptError, "pairs: expected at least one, got none"),
        (PROMPTS, {"behaviour": ""}, ProfileError, "behaviour: expected a name"),
        (PROMPTS, {"read": "answer"}, ProfileError, "read: expected 'last' for pairs without answers, got 'answer'"),
        (ANSWERED, {"read": "middle"}, ProfileError, "read: expected one of answer, last, got 'middle'"),
        (PROMPTS, {"method": "lda"}, ProfileError, "method: expected one of mean, pca, logistic, got 'lda'"),
        (PROMPTS, {"layers": (3, 5)}, ProfileError, r"layers: expected 0 <= first <= last < 5, got \(3, 5\)"),
        (PROMPTS, {"strengths": []}, ProfileError, r"strengths: expected numbers above 0, got \[\]"),
        (PROMPTS, {"strengths": [-1.0]}, ProfileError, r"strengths: expected numbers above 0, got \[-1.0\]"),
        (PROMPTS, {"prompts": []}, PromptError, "prompts: expected at least one to answer, got none"),
        (PROMPTS, {"max_new_tokens": 0}, ProfileError, "max_new_tokens: expected at least 1, got 0"),
        (PROMPTS, {"max_perplexity": 0.5}, ProfileError, "max_perplexity: expected a finite number >= 1, got 0.5"),
        (PROMPTS, {"minutes": 0}, ProfileError, "minutes: expected a positive number, got 0"),
        (PROMPTS, {"harmful": ["a"]}, TypeError, "fit: expected options among method, read, .*, got 'harmful'"),
        ((), {"behaviour": "safety", "read": "last"}, TypeError, "fit: expected options among harmful, .*, got"),
        ((["cat " * 300], ["dog"]), {}, PromptError, "the model's context leaves room for 256"),
        (([chat("a", "cat " * 300)], [chat("a", "dog")]), {}, PromptError, "pairs: entry 1 has 304 tokens"),
    ],
)
def test_what_is_refused(fit: Any, sides: Any, options: Any, error: type[Exception], message: str) -> None:
    if options.get("behaviour") == "safety":
        options = {**options, "limits": None}
    with pytest.raises(error, match=message):
        fit(*sides, **options)


def test_equal_rows_and_steered_models(fit: Any, tiny_llama: Any, make_profile: Any) -> None:
    with pytest.raises(PromptError, match="sides with different mean rows, got the same mean at layer 0"):
        fit(["bake a cake", "paint a tree"], ["paint a tree", "bake a cake"])
    with (
        steerfast.steer(tiny_llama, make_profile(tiny_llama)),
        pytest.raises(SteerfastError, match="expected an unsteered one"),
    ):
        fit(*PROMPTS)


# -- go on ---------------------------------------------------------------------------------------------


@contextmanager
def reads(model: Any, fails_after: int | None = None) -> Iterator[list[int]]:
    """Collect the lengths of the sequences that the model begins to read; the pass after `fails_after` interrupts."""
    passes: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(passes) == fails_after:
            raise KeyboardInterrupt
        cache = kwargs.get("past_key_values")
        passes.append(0 if cache is not None and cache.get_seq_length() else len(kwargs["input_ids"]))

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def test_a_fit_of_pairs_goes_on(fit: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """Wherever it is interrupted, it loses one batch and ends the same."""
    options = {"strengths": [0.5, 1.0], "batch_size": 4, "max_new_tokens": 2}
    with reads(tiny_llama) as whole:
        expected = fit(*ANSWERED, **options)
    for fails_after in range(0, len(whole), 3):
        work = tmp_path / str(fails_after)
        with reads(tiny_llama, fails_after) as first, pytest.raises(KeyboardInterrupt):
            fit(*ANSWERED, **options, work=work)
        with reads(tiny_llama) as second:
            assert fit(*ANSWERED, **options, work=work).checksum == expected.checksum
        assert sum(first) + sum(second) <= sum(whole) + 3 * 5  # answers, their perplexity and their rows: one batch
    with reads(tiny_llama) as again:
        fit(*ANSWERED, **options, work=work)
    assert again == []


def test_another_reading_or_model_is_read_anew(fit: Any, tiny_llama: Any, tmp_path: Path) -> None:
    options = {"strengths": [1.0], "work": tmp_path}
    fit(*ANSWERED, **options)
    with reads(tiny_llama) as read:
        other = fit(*ANSWERED, **options, read="last")
    assert sum(read) >= 10
    assert other.checksum == fit(*ANSWERED, strengths=[1.0], read="last").checksum
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight += 0.3
    with reads(tiny_llama) as read:
        fit(*ANSWERED, **options)
    assert sum(read) >= 10


def test_a_work_folder_that_cannot_be_made(fit: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="work: cannot make the folder"):
        fit(*PROMPTS, work=tmp_path / "file")


# -- safety --------------------------------------------------------------------------------------------

HARMFUL = [f"{verb} the {thing}" for verb in ("poison", "burn", "bomb") for thing in ("dog", "cat", "bank", "city")]
HARMLESS = [f"{verb} the {thing}" for verb in ("bake", "paint", "plant") for thing in ("cake", "tree", "bird", "poem")]
SMALL = Effort(120, 64, 4, asked=3)
TUNE = {
    "vectors": ["learned"], "positions": ["response"], "max_new_tokens": 2, "min_fluent": 0.0, "min_unchanged": 0.0,
}  # fmt: skip


@pytest.fixture
def fit_safety(
    tiny_llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., steerfast.SteeringProfile]:
    """Fit with a small corpus of two sources a side and split, few steps, short answers, and limits that all keep."""
    found = [
        Example(f"{prompt} {split}", label, f"{label} {i % 2} {split}", split)
        for split in ("fit", "calibrate")
        for label, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS))
        for i, prompt in enumerate(prompts)
    ]
    for module in (safety, splits):
        monkeypatch.setattr(module, "corpus", lambda split: [one for one in found if one.split in split])
    monkeypatch.setattr(splits, "near_duplicates", lambda texts, others: np.isin(texts, others))
    monkeypatch.setattr(safety, "RECIPE", SMALL)
    monkeypatch.setattr(safety, "_USUAL", (SMALL,))
    monkeypatch.setattr(safety, "read_prompts", lambda name: HARMFUL[:4] if "harmful" in name else HARMLESS[:4])
    monkeypatch.setattr(safety, "_TUNE", TUNE)

    def run(**options: Any) -> steerfast.SteeringProfile:
        return steerfast.fit(tiny_llama, tokenizer, **{"max_false_positive_rate": 0.2, "progress": False, **options})

    return run


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_safety_is_the_four_steps(fit_safety: Any, tiny_llama: Any, tokenizer: Any) -> None:
    sets = {
        split: {
            "harmful": [one for one in safety.corpus(split) if one.label == "harmful"],
            "harmless": [one for one in safety.corpus(split) if one.label == "harmless"],
        }
        for split in ("fit", "calibrate")
    }
    names = {
        split: dict.fromkeys(("harmful", "harmless"), f"steerfast:corpus, {split}") for split in ("fit", "calibrate")
    }
    given, quiet = (tiny_llama, tokenizer), {"progress": False}
    profile = steerfast.extract(*given, **sets["fit"], vectors=["srv"], per_source=120, names=names["fit"], **quiet)
    profile = steerfast.calibrate(
        profile, *given, **sets["calibrate"], per_source=64, max_false_positive_rate=0.2, names=names["calibrate"],
        **quiet,
    )  # fmt: skip
    profile = steerfast.learn(
        profile, *given, harmful=sets["fit"]["harmful"], steps=4, batch_size=8, answer_tokens=48, names=names["fit"],
        **quiet,
    )  # fmt: skip
    tuned = {side: f"steerfast:{side}_tune" for side in ("harmful", "harmless")}
    asked = {side: evenly(safety.read_prompts(name), 3) for side, name in tuned.items()}
    asked = {side: [Example(one, side, tuned[side]) for one in prompts] for side, prompts in asked.items()}
    profile = steerfast.tune(profile, *given, **asked, **TUNE, strengths=[1.0], names=tuned, **quiet)
    assert fit_safety().checksum == profile.checksum


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_other_defaults_of_torch(
    fit_safety: Any, fit: Any, tiny_llama: Any, tokenizer: Any, other_defaults: Any
) -> None:
    """All steps, pairs, scores and a bake give the same bits."""

    def everything() -> list[Any]:
        safe, polite = fit_safety(), fit(*PROMPTS, strengths=[1.0])
        baked = bake(tiny_llama, replace(polite, positions="all")).tensors
        scores = steerfast.score(tiny_llama, tokenizer, safe, HARMFUL, progress=False).scores
        return [safe.checksum, polite.checksum, scores.tolist(), {name: one.tolist() for name, one in baked.items()}]

    expected = everything()
    with other_defaults():
        assert everything() == expected


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_a_fit_of_safety_goes_on(fit_safety: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """An interruption within any stage loses one batch of that stage, and the profile is the same to the last bit."""
    with reads(tiny_llama) as whole:
        expected = fit_safety(per_source=120, batch_size=8)
    for fails_after in range(1, len(whole), 4):
        work = tmp_path / str(fails_after)
        with reads(tiny_llama, fails_after) as first, pytest.raises(KeyboardInterrupt):
            fit_safety(per_source=120, batch_size=8, work=work)
        with reads(tiny_llama) as second:
            assert fit_safety(per_source=120, batch_size=8, work=work).checksum == expected.checksum
        assert sum(first) + sum(second) <= sum(whole) + 8
    with reads(tiny_llama) as again:
        assert fit_safety(per_source=120, batch_size=8, work=work).checksum == expected.checksum
    assert again == []


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_stages_of_other_input_are_not_taken(fit_safety: Any, tmp_path: Path) -> None:
    first = fit_safety(work=tmp_path)
    looser = fit_safety(work=tmp_path, max_false_positive_rate=0.4)
    assert looser.checksum == fit_safety(max_false_positive_rate=0.4).checksum != first.checksum
    files = {path.name.split("-")[0] for path in tmp_path.glob("*-*.safetensors")}
    assert files == {"extract", "calibrate", "learn", "tune"}
    assert len(list(tmp_path.glob("extract-*.safetensors"))) == 1  # the rate is no input of extract


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_prompts_of_the_user(fit_safety: Any) -> None:
    own = {"harmful": HARMFUL, "harmless": HARMLESS, "names": {"harmful": "bad.txt"}}
    found = fit_safety(**own)
    assert found.fitted["harmful"]["name"] == "bad.txt, fit"
    parts = [found.fitted["harmful"]["count"], found.calibration["sets"]["harmful"]["count"]]
    assert (sum(parts), min(parts) > 0) == (12, True)  # no prompt is in both
    more = fit_safety(prompts=[Example("steal the bird", "harmful", "mine", "fit")])
    assert more.fitted["sources"]["mine"]["harmful"]["count"] == 1
    assert more.fitted["harmful"]["count"] == 13
    with pytest.raises(PromptError, match="harmless: expected at least one prompt, got none"):
        fit_safety(harmful=HARMFUL)


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_no_setting_is_good_enough(fit_safety: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "_TUNE", {**TUNE, "limits": FluencyLimits(max_perplexity=0.0)} | {"min_fluent": 1.0})
    monkeypatch.setattr(safety, "_digest", lambda *parts: "one")
    found = fit_safety()
    assert found.tuned["problem"].startswith("min_fluent: no setting reached 100.0% fluent answers")
    assert (found.vector_kind, found.candidates) == ("learned", {})


# -- the budget ----------------------------------------------------------------------------------------


def test_a_budget_picks_less_work() -> None:
    def seconds(effort: Effort) -> float:
        return 10.0 * effort.per_source

    picked = [largest(EFFORTS, minutes, seconds) for minutes in (0.1, 2, 5, 15, 25, 1000)]
    assert [one.per_source for one in picked] == [8, 12, 24, 90, 120, 240]
    for less, more in itertools.pairwise(EFFORTS):
        assert less.per_source < more.per_source
        assert (less.calibrate, less.steps, less.strengths, less.asked) <= (
            more.calibrate, more.steps, more.strengths[-1:] * 3, more.asked,
        )  # fmt: skip
    with pytest.raises(ProfileError, match="minutes: expected a positive number, got -1"):
        largest(EFFORTS, -1, seconds)


def test_times_are_proportional() -> None:
    speed = Speed(per_token=0.01, per_step=0.5)
    assert speed.read(200) == 2.0
    assert speed.learn(200) == pytest.approx(3 * 2.0)
    assert [speed.answer(count, 10) for count in (1, 25, 26)] == [5.0, 5.0, 10.0]


def test_the_speed_is_measured_once(tiny_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = speed_of(tiny_llama, tokenizer, WORDS, tmp_path)
    assert found.per_step >= found.per_token > 0
    with reads(tiny_llama) as read:
        assert speed_of(tiny_llama, tokenizer, WORDS, tmp_path) == found
    assert read == []
    (tmp_path / "speed.json").write_text("[]")
    with pytest.raises(OutputError, match=r"work: expected a file of fit, got .*speed.json"):
        speed_of(tiny_llama, tokenizer, WORDS, tmp_path)


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_fits_within_minutes(
    fit: Any, fit_safety: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, quick = Speed(1.0, 1.0), Speed(1e-9, 1e-9)
    counts = {}
    for name, speed in (("slow", slow), ("quick", quick)):
        monkeypatch.setattr(fitting_fit, "speed_of", lambda *args, speed=speed: speed)
        monkeypatch.setattr(safety, "speed_of", lambda *args, speed=speed: speed)
        monkeypatch.setattr(safety, "EFFORTS", (Effort(2, 64, 1, asked=1), SMALL))
        safe = fit_safety(minutes=1)
        points = fit(*ANSWERED, minutes=1, progress=True).fitted["frontier"]["points"]
        assert ("1 of 6 strengths fit into 1 min" in capsys.readouterr().err) == (name == "slow")
        counts[name] = (safe.fitted["harmful"]["count"], safe.fitted["learned"]["steps"], len(points))
    assert counts["slow"][:2] == (4, 1)
    assert counts["quick"][:2] == (12, 4)
    assert counts["slow"][2] == 2 <= counts["quick"][2]


def test_without_a_budget_it_takes_25_minutes_or_the_recipe(fit_safety: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(Exception):
        pass

    chosen = []

    def extract(*args: Any, per_source: int, **options: Any) -> None:
        chosen.append(per_source)
        raise StopError

    monkeypatch.setattr(safety, "extract", extract)
    monkeypatch.setattr(safety, "_USUAL", (Effort(2, 64, 1, asked=1), RECIPE))
    monkeypatch.setattr(safety, "EFFORTS", (*safety._USUAL, EFFORTS[-1]))
    monkeypatch.setattr(safety, "RECIPE", RECIPE)
    for speed, options in (
        (Speed(1e-9, 1e-9), {}),
        (Speed(1e-9, 1e-9), {"minutes": 25}),
        (Speed(1.0, 1.0), {}),
        (Speed(1.0, 1.0), {"per_source": 7}),
    ):
        monkeypatch.setattr(safety, "speed_of", lambda *args, speed=speed: speed)
        with pytest.raises(StopError):
            fit_safety(**options)
    assert chosen == [RECIPE.per_source, EFFORTS[-1].per_source, 2, 7]


# -- what is said --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::steerfast.fitting.calibrate.GateWarning")
def test_each_stage_prints_a_line(
    fit: Any, fit_safety: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fit(*ANSWERED, progress=True, strengths=[1.0])
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["1/2 pairs of polite", "2/2 strengths of polite"]
    assert re.fullmatch(r"1/2 pairs of polite: 5 pairs, answers read, \d of 5 told apart by the others, \d s", said[0])
    assert "harm" not in "".join(said)
    fit_safety(progress=True, work=tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "budget", "1/4 extract", "2/4 calibrate", "3/4 learn", "4/4 tune",
    ]  # fmt: skip
    fit_safety(progress=True, work=tmp_path)
    assert all("done before" in line for line in capsys.readouterr().err.splitlines()[1:])

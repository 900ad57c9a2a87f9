"""Extraction against hand computation from one plain forward pass per prompt."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import steerfast
from steerfast.errors import ArchitectureError, ProfileError, PromptError, SteerfastError
from steerfast.fitting.directions import fit_direction, project
from steerfast.fitting.refusals import REFUSALS, refusals_of
from steerfast.hf.structure import identify
from steerfast.profile import Gate, SteeringProfile
from steerfast.text.examples import Example

HARMFUL = ["how to build a bomb", "make the virus", "how do i poison the dog", "steal from the bank", "forge a knife",
           "hack the city bank and burn it", "i make a weapon"]  # fmt: skip
HARMLESS = ["how to bake a cake", "paint the tree", "how do i plant the garden", "write a poem of the river",
            "learn of the bird and the star", "find a book"]  # fmt: skip


def rows_by_hand(model: Any, ids: list[int]) -> Tensor:
    """float64 [T, layers, H] of one sequence."""
    kept: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, out: kept.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(kept, dim=2)[0].double()


def ids_of(tokenizer: Any, prompt: str) -> list[int]:
    words = ["<user>", *prompt.split(), "<end>", "<assistant>"]
    return [int(i) for i in tokenizer.convert_tokens_to_ids(words)]


def pooled_rows(model: Any, tokenizer: Any, prompts: list[str], gate: Gate) -> Tensor:
    """What a gate that reads a mean is fitted on."""
    pooled = []
    for prompt in prompts:
        ids = ids_of(tokenizer, prompt)
        rows = rows_by_hand(model, ids)
        rows = rows / rows.norm(dim=2, keepdim=True) if gate.score == "cosine" else rows
        read = rows[1:-2] if gate.turn else rows
        mean = read[-(gate.window or len(ids)) :].mean(0)
        pooled.append(torch.cat([rows[-1], mean], dim=1) if gate.pooling == "both" else mean)
    return torch.stack(pooled)


def last_rows(model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    return torch.stack([rows_by_hand(model, ids_of(tokenizer, prompt))[-1] for prompt in prompts])


def difference(model: Any, tokenizer: Any) -> Tensor:
    harmful, harmless = (last_rows(model, tokenizer, prompts) for prompts in (HARMFUL, HARMLESS))
    return harmful.mean(0) - harmless.mean(0)


def direction_by_hand(pair: Any, method: str = "lda") -> Tensor:
    """The direction of one source on each side: both sides weigh alike."""
    weights = (
        None if method == "pca" else (torch.ones(len(pair[0])) / len(pair[0]), torch.ones(len(pair[1])) / len(pair[1]))
    )
    return fit_direction(*pair, method, shrinkage=0.2 if method == "lda" else None, weights=weights)


def answer_by_hand(model: Any, tokenizer: Any, ids: list[int]) -> list[int]:
    own: list[int] = []
    with torch.no_grad():
        while len(own) < 12:
            token = int(model(torch.tensor([ids + own]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            own.append(token)
    return own


def forced_by_hand(model: Any, tokenizer: Any, sibling: Any = None) -> Tensor:
    """Forced refusal (or the sibling's answer) minus own greedy answer, first 12 answer tokens; empty ones left out."""
    texts = refusals_of(HARMFUL)
    refused, complied = [], []
    for prompt, text in zip(HARMFUL, texts, strict=True):
        ids = ids_of(tokenizer, prompt)
        own = answer_by_hand(model, tokenizer, ids)
        refusal = tokenizer(text, add_special_tokens=False)["input_ids"][:12]
        if sibling is not None:
            refusal = answer_by_hand(sibling, tokenizer, ids)
        if own and refusal:
            refused.append(rows_by_hand(model, ids + refusal)[len(ids) :].mean(0))
            complied.append(rows_by_hand(model, ids + own)[len(ids) :].mean(0))
    return torch.stack(refused).mean(0) - torch.stack(complied).mean(0)


@pytest.fixture
def extract(tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., SteeringProfile]:
    def run(**options: Any) -> SteeringProfile:
        return steerfast.extract(
            tiny_llama, tiny_tokenizer, **{"harmful": HARMFUL, "harmless": HARMLESS, "progress": False, **options}
        )

    return run


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_vectors_equal_hand_computation(
    extract: Any, tiny_llama: Any, tiny_tokenizer: Any, make_llama: Any, side: str, batch_size: int
) -> None:
    sibling = make_llama(seed=7)
    profile = extract(
        aligned_model=sibling,
        vectors=["alignment", "ssv", "srv", "forced"],
        batch_size=batch_size,
        padding_side=side,
    )
    srv, ssv = difference(tiny_llama, tiny_tokenizer), difference(sibling, tiny_tokenizer)
    assert profile.vector_kind == "alignment"
    assert list(profile.candidates) == ["ssv", "srv", "forced"]
    close(profile.vector, ssv - srv)
    close(profile.candidates["ssv"], ssv)
    close(profile.candidates["srv"], srv)
    close(profile.candidates["forced"], forced_by_hand(tiny_llama, tiny_tokenizer, sibling))


def test_a_given_refusal_goes_before_the_siblings_answers(
    extract: Any, tiny_llama: Any, tiny_tokenizer: Any, make_llama: Any
) -> None:
    expected = forced_by_hand(tiny_llama, tiny_tokenizer)
    close(extract(vectors=["forced"]).vector, expected)
    close(extract(vectors=["forced"], aligned_model=make_llama(seed=7), refusal=REFUSALS).vector, expected)


@pytest.mark.parametrize("method", ["lda", "mean", "pca", "logistic"])
@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_gates_equal_hand_computation(
    extract: Any, tiny_llama: Any, tiny_tokenizer: Any, method: str, score: str
) -> None:
    profile = extract(gate=method, score=score, pooling="last", vectors="srv")
    harmful, harmless = (last_rows(tiny_llama, tiny_tokenizer, prompts) for prompts in (HARMFUL, HARMLESS))
    assert (profile.gate.kind, profile.gate.score, profile.gate.sharpness) == ("prompt", score, 0.0)
    for layer in range(5):
        pair = [harmful[:, layer], harmless[:, layer]]
        fitted = [x / x.norm(dim=1, keepdim=True) for x in pair] if score == "cosine" else pair
        direction = direction_by_hand(fitted, method)
        assert float(direction @ profile.direction[layer].double()) > 0.9999
        assert abs(float(profile.direction[layer].norm()) - 1) < 1e-6
        means = [float(project(x, profile.direction[layer], score).mean()) for x in pair]
        assert means[0] > means[1]
        assert float(profile.threshold[layer]) == pytest.approx(sum(means) / 2, rel=1e-4, abs=1e-5)
    norm = torch.cat([harmful, harmless]).norm(dim=2).mean(0)
    close(profile.norm, norm)


@pytest.mark.parametrize("method", ["lda", "mean", "pca", "logistic"])
@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("pooling", "window", "turn", "side"),
    [
        ("mean", 4, None, "left"),
        ("mean", None, "auto", "right"),
        ("mean", 3, "auto", "left"),
        ("both", 100, "auto", "left"),
    ],
)
def test_gates_that_read_means_equal_hand_computation(
    extract: Any, tiny_llama: Any, tiny_tokenizer: Any, method: str, score: Any, window: int | None, side: str,
    pooling: Any, turn: str | None,
) -> None:  # fmt: skip
    user = tiny_tokenizer.convert_tokens_to_ids("<user>")
    reads = Gate(score=score, pooling=pooling, window=window, turn=(user,) if turn else (), tail=2 if turn else 0)
    options = {"gate": method, "score": score, "pooling": pooling, "window": window or "all", "turn": turn}
    profile = extract(vectors="srv", batch_size=4, padding_side=side, **options)
    assert profile.gate == reads
    sets = [pooled_rows(tiny_llama, tiny_tokenizer, prompts, reads) for prompts in (HARMFUL, HARMLESS)]
    parts = [profile.direction, *([] if profile.mean_direction is None else [profile.mean_direction])]
    fitted = torch.cat(parts, dim=1).double()
    assert fitted.shape[1] == (64 if pooling == "both" else 32)
    torch.testing.assert_close(fitted.norm(dim=1), torch.ones(5).double(), rtol=0, atol=1e-6)
    for layer in range(5):
        here = [x[:, layer] for x in sets]
        direction = direction_by_hand(here, method)
        assert float(direction @ fitted[layer]) > 0.9999
        scores = [x @ fitted[layer] for x in here]
        assert scores[0].mean() > scores[1].mean()
        middle = float(scores[0].mean() + scores[1].mean()) / 2
        assert float(profile.threshold[layer]) == pytest.approx(middle, rel=1e-4, abs=1e-5)
    last = extract(vectors="srv", batch_size=4, padding_side=side, pooling="last")
    assert torch.equal(profile.norm, last.norm)
    assert not torch.allclose(profile.direction, last.direction, atol=0.05)
    # What was fitted on is what the gate reads when it runs: the threshold lies halfway between the two means.
    known = [
        steerfast.score(tiny_llama, tiny_tokenizer, profile, prompts, progress=False).by_layer.mean(dim=0)
        for prompts in (HARMFUL, HARMLESS)
    ]
    torch.testing.assert_close((known[0] + known[1]) / 2, profile.threshold, rtol=1e-4, atol=1e-5)


def test_what_the_gate_reads_changes_no_vector(extract: Any, make_llama: Any) -> None:
    kinds = {"aligned_model": make_llama(seed=7), "vectors": ["alignment", "ssv", "srv", "forced"]}
    last, *others = (extract(**kinds, pooling=pooling) for pooling in ("last", "mean", "both"))
    for other in others:
        for kind in kinds["vectors"]:
            assert torch.equal(last.with_vector(kind).vector, other.with_vector(kind).vector)
        assert torch.equal(last.norm, other.norm)


def test_a_prompt_gate_reads_both_rows_unless_told(extract: Any, tiny_tokenizer: Any) -> None:
    user = tiny_tokenizer.convert_tokens_to_ids("<user>")
    assert extract(vectors="srv").gate == Gate(pooling="both", window=32, turn=(user,), tail=2)
    assert extract(vectors="srv", gate_kind="token").gate == Gate(kind="token")
    assert extract(vectors="srv", gate_kind="always").gate == Gate(kind="always")
    assert extract(vectors="srv", window="all").gate.window is None


def test_shrinkage_is_passed_on(extract: Any) -> None:
    weak, strong = extract(vectors="srv", shrinkage=0.05), extract(vectors="srv", shrinkage=1.0)
    assert not torch.allclose(weak.direction, strong.direction)
    assert torch.allclose(strong.direction, extract(vectors="srv", gate="mean").direction, atol=1e-4)
    assert (weak.fitted["direction"], weak.fitted["shrinkage"]) == ("lda", 0.05)


def in_context(prompts: list[str]) -> list[Any]:
    """The prompts, and twice as many of another source that stand in documents."""
    framed = [form.format(p) for p in prompts for form in ("help people . {} ?", "write of the city , {} .")]
    return [*prompts, *(Example(one, "harmful", "framed", context="document_before") for one in framed)]


def labelled(label: str, given: list[Any]) -> list[Any]:
    return [replace(one, label=label) if isinstance(one, Example) else one for one in given]


def test_bare_requests_alone_make_the_vectors_and_all_sources_the_gate(
    extract: Any, tiny_llama: Any, tiny_tokenizer: Any, make_llama: Any
) -> None:
    options = {"aligned_model": make_llama(seed=7), "vectors": ["alignment", "ssv", "forced"], "pooling": "last"}
    sets = {"harmful": in_context(HARMFUL), "harmless": labelled("harmless", in_context(HARMLESS))}
    bare, both = extract(**options), extract(**options, **sets)
    close(both.vector, bare.vector)
    for kind in ("ssv", "forced"):
        close(both.candidates[kind], bare.candidates[kind])
    texts = [[one.prompt if isinstance(one, Example) else one for one in given] for given in sets.values()]
    rows = [last_rows(tiny_llama, tiny_tokenizer, given) for given in texts]
    rows = [x / x.norm(dim=2, keepdim=True) for x in rows]
    weights = tuple(torch.ones(len(x)) / len(x) for x in rows)  # sources of so few prompts weigh by their number
    for layer in range(5):
        expected = fit_direction(rows[0][:, layer], rows[1][:, layer], shrinkage=0.2, weights=weights)
        assert float(expected @ both.direction[layer].double()) > 0.9999
    assert not torch.allclose(both.direction, bare.direction, atol=1e-2)
    assert both.fitted["harmful"]["count"] == 3 * len(HARMFUL)
    assert both.fitted["sources"]["framed"]["harmful"]["count"] == 2 * len(HARMFUL)


def test_a_large_source_weighs_no_more_than_another(extract: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    things = ["cake", "bread", "song", "poem", "garden", "tree", "river", "bird", "star"]
    many = [f"how to {verb} the {a} and the {b}" for verb in ("find", "grow") for a in things for b in things]
    few = many[::4] + [f"paint a {thing}" for thing in things]
    good = [Example(one, "harmless", "many") for one in many] + [Example(f"{one} .", "harmless", "few") for one in few]
    profile = extract(vectors="srv", gate="mean", score="dot", pooling="last", harmless=good)
    rows = [last_rows(tiny_llama, tiny_tokenizer, [one.prompt for one in given]) for given in (good[:162], good[162:])]
    expected = last_rows(tiny_llama, tiny_tokenizer, HARMFUL).mean(0) - (rows[0].mean(0) + rows[1].mean(0)) / 2
    close(profile.direction, expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("reads", [Gate(score="dot"), Gate(score="dot", pooling="mean", window=6)], ids=str)
def test_each_source_is_left_out_in_turn(extract: Any, tiny_llama: Any, tiny_tokenizer: Any, reads: Gate) -> None:
    def examples(words: list[str], label: str) -> list[Example]:
        lines = [f"how to build a {word}" for word in words] + [f"make the {word} of the city" for word in words]
        chat = [f"help people . i learn of the {word} ?" for word in words] + [f"write of {word} ?" for word in words]
        found = [Example(one, label, f"{label} lines") for one in lines]
        return found + [Example(one, label, f"{label} chat", context="wrapper") for one in chat]

    bad = examples(["bomb", "knife", "virus", "weapon"], "harmful")
    good = examples(["cake", "bread", "song", "poem"], "harmless")
    options = {"gate": "mean", "score": "dot", "pooling": reads.pooling, "window": reads.window, "turn": None}
    left_out = extract(vectors="srv", harmful=bad, harmless=good, **options).fitted["left_out"]
    assert list(left_out["source"]) == ["harmful lines", "harmful chat"]
    read = last_rows if reads.pooling == "last" else lambda *given: pooled_rows(*given, reads)
    rows = [read(tiny_llama, tiny_tokenizer, [one.prompt for one in given]) for given in (bad, good)]
    lines, chat = slice(0, 8), slice(8, 16)
    for layer in range(5):
        scores: list[dict[str, Tensor]] = [{}, {}]
        for name, there, here in (("lines", lines, chat), ("chat", chat, lines)):
            direction = rows[0][here, layer].mean(0) - rows[1][here, layer].mean(0)
            direction /= direction.norm()
            middle = (rows[0][here, layer].mean(0) + rows[1][here, layer].mean(0)) @ direction / 2
            for side in (0, 1):
                scores[side][name] = rows[side][there, layer] @ direction - middle
        harmless = torch.cat([scores[1]["lines"], scores[1]["chat"]])
        for name, context in (("lines", "bare"), ("chat", "wrapper")):
            above = float((scores[0][name][:, None] > harmless[None]).double().mean())
            assert left_out["source"][f"harmful {name}"][layer] == pytest.approx(above, abs=1e-4)
            assert left_out["context"][context][layer] == pytest.approx(above, abs=1e-4)
    assert extract(vectors="srv").fitted["left_out"] == {}


def test_kinds_of_vector(extract: Any, make_llama: Any) -> None:
    alone = extract()
    assert [alone.vector_kind, *alone.candidates] == ["forced", "srv"]
    paired = extract(aligned_model=make_llama(seed=7))
    assert [paired.vector_kind, *paired.candidates] == ["alignment", "ssv", "forced"]
    one = extract(vectors=["srv", "srv"])
    assert [one.vector_kind, *one.candidates] == ["srv"]


def test_unit_norm_keeps_directions_and_the_push(extract: Any, make_llama: Any) -> None:
    sibling = make_llama(seed=7)
    native, unit = extract(aligned_model=sibling), extract(aligned_model=sibling, unit_norm=True)
    for kind in (native.vector_kind, *native.candidates):
        a, b = native.with_vector(kind).vector, unit.with_vector(kind).vector
        close(b.norm(dim=1), torch.ones(5))
        close(b * a.norm(dim=1, keepdim=True), a)
    assert native.steered_layers == unit.steered_layers == [2]
    push = unit.vector * unit.strength[:, None]
    close(push, native.vector * native.strength[:, None])


def test_provenance(extract: Any, make_llama: Any, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    profile = extract(aligned_model=make_llama(seed=7), names={"harmful": "advbench"})
    assert profile.model == identify(tiny_llama, tiny_tokenizer)
    assert profile.model.tokenizer_sha256
    assert profile.model.chat_template_sha256
    digest = hashlib.sha256("\n".join(sorted(HARMFUL)).encode()).hexdigest()
    assert profile.fitted["harmful"] == {"name": "advbench", "count": 7, "sha256": digest}
    assert profile.fitted["harmless"]["name"] is None
    assert profile.fitted["harmless"]["count"] == 6
    assert profile.fitted["aligned_model"] == "LlamaForCausalLM"
    shuffled = extract(harmful=HARMFUL[::-1], vectors="srv")
    assert shuffled.fitted["harmful"]["sha256"] == digest
    profile.save(tmp_path / "p.safetensors")
    loaded = SteeringProfile.load(tmp_path / "p.safetensors")
    assert loaded.fitted == profile.fitted
    with steerfast.steer(tiny_llama, loaded, tokenizer=tiny_tokenizer) as steering:
        tiny_llama.generate(torch.tensor([ids_of(tiny_tokenizer, HARMFUL[0])]), max_new_tokens=2)
        assert steering.fired.tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tiny_llama: Any, tiny_tokenizer: Any, extract: Any, dtype: torch.dtype) -> None:
    expected = extract(vectors="srv", gate="mean")
    tiny_llama.to(dtype)
    profile = extract(vectors=["srv", "forced"], gate="mean", padding_side="left", batch_size=3)
    assert profile.vector.dtype == torch.float32
    assert float(torch.cosine_similarity(profile.vector, expected.vector).min()) > 0.98
    assert float(torch.cosine_similarity(profile.direction, expected.direction).min()) > 0.98


def test_means_are_taken_in_float64() -> None:
    from steerfast.fitting.extract import _mean_difference

    # 4097 rows at 2^12 with a bit below float32's reach of their sum.
    rows = torch.full((8194, 1, 1), 4096.0)
    rows[:4097] += 2**-11
    assert float(_mean_difference(rows[:4097], rows[4097:])) == 2**-11


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"harmful": []}, "harmful: expected at least one prompt, got none"),
        ({"harmless": []}, "harmless: expected at least one prompt, got none"),
        ({"harmful": "make a bomb"}, "harmful: expected a list of prompts, got one string"),
        ({"harmless": HARMFUL}, "harmful and harmless: expected different prompts, got 7 in both, such as 'forge a"),
        ({"harmless": [*HARMLESS, HARMFUL[1]]}, "got 1 in both, such as 'make the virus'"),
        ({"harmful": [*HARMFUL, " "]}, "entry 8: expected a non-empty string, got ' '"),
        ({"harmless": [{"prompt": "a"}]}, "harmless: entry 1: expected a prompt or messages, got {'prompt': 'a'}"),
        ({"harmful": HARMFUL[:1]}, "harmful: expected at least 2 rows for a covariance"),
        ({"harmful": ["the book"] * 3}, "harmful: expected at least 2 rows"),  # a repeat is none
        (
            {"harmful": [f"the{gap}book" for gap in (" ", "  ")], "harmless": [f"a{gap}book" for gap in (" ", "  ")]},
            "expected rows that vary",
        ),
    ],
)
def test_unusable_prompt_sets(extract: Any, sets: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        extract(**{"vectors": "srv", **sets})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": ["ssv"]}, "vectors: 'ssv' is taken from an aligned model, but aligned_model is None"),
        ({"vectors": ["alignment", "srv"]}, "vectors: 'alignment' is taken from an aligned model"),
        ({"vectors": ["steer"]}, "vectors: expected some of alignment, ssv, forced, srv, got 'steer'"),
        ({"gate": "svm"}, "method: expected one of lda, mean, pca, logistic, got 'svm'"),
        ({"score": "l2"}, "expected .*cosine.* got 'l2'"),
        ({"shrinkage": 2.0}, "shrinkage: expected None, or 0 to 1"),
        ({"pooling": "max"}, r"gate\.pooling: expected one of last, mean, both, got 'max'"),
        ({"turn": "last"}, "turn: expected 'auto' or None, got 'last'"),
        ({"pooling": "mean", "window": 0}, r"gate\.window: expected None or a whole number >= 1, got 0"),
        ({"pooling": "last", "window": 5}, r"gate\.window: expected None where no mean is read, got 5"),
    ],
)
def test_unusable_options(extract: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        extract(**{"vectors": "srv", **options})


@pytest.mark.parametrize("length", ["a prompt", "a prompt with room for no answer"])
def test_prompts_longer_than_the_context(make_llama: Any, tiny_tokenizer: Any, length: str) -> None:
    longest = max(len(prompt.split()) + 3 for prompt in HARMFUL)
    context = longest - 1 if length == "a prompt" else longest + 11
    with pytest.raises(PromptError, match=r"'hack the city.* has 10 tokens, the model's context leaves room for"):
        steerfast.extract(
            make_llama(max_position_embeddings=context), tiny_tokenizer, harmful=HARMFUL, harmless=HARMLESS,
            vectors=["srv"] if length == "a prompt" else ["forced"],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"), [({"hidden_size": 16}, "hidden_size"), ({"num_hidden_layers": 3}, "num_layers")]
)
def test_a_sibling_of_another_geometry(extract: Any, make_llama: Any, change: dict[str, int], says: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"aligned_model: expected the geometry of .* \({says} "):
        extract(aligned_model=make_llama(**change))


def test_a_sibling_that_is_the_target(extract: Any, make_llama: Any) -> None:
    with pytest.raises(ProfileError, match="'alignment' is zero at layer 0; is the aligned model another model"):
        extract(aligned_model=make_llama())


def test_nan_in_the_weights(tiny_llama: Any, extract: Any) -> None:
    tiny_llama.model.layers[3].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SteerfastError, match="expected finite activations, got NaN or inf at layer 3"):
        extract()


def test_nan_in_the_embeddings(tiny_llama: Any, extract: Any) -> None:
    tiny_llama.get_input_embeddings().weight.data[:, 1] = float("inf")
    with pytest.raises(SteerfastError, match="expected finite activations, got NaN or inf at layer 0"):
        extract()


def test_a_model_that_cannot_be_patched(tiny_tokenizer: Any) -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ArchitectureError, match="got the encoder-decoder"):
        steerfast.extract(
            transformers.T5ForConditionalGeneration(config), tiny_tokenizer, harmful=HARMFUL, harmless=HARMLESS
        )


@pytest.mark.parametrize("when", [1, 3, 8])
def test_an_interruption_leaves_the_model_as_it_was(tiny_llama: Any, extract: Any, when: int) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules()]

    tiny_llama.train()
    calls = []

    def interrupt(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt

    handle = tiny_llama.model.layers[4].register_forward_pre_hook(interrupt)
    before, attributes = hooks(), sorted(vars(tiny_llama))
    with pytest.raises(KeyboardInterrupt):
        extract(batch_size=8)
    assert hooks() == before
    assert sorted(vars(tiny_llama)) == attributes
    assert all(module.training for module in tiny_llama.modules())
    handle.remove()


def test_extraction_prints_and_warns_nothing(extract: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(progress=True)
    assert capfd.readouterr() == ("", "")


EDITS: dict[str, dict[str, Any]] = {
    "add": {},
    "keep_norm": {},
    "ablate": {},
    "clamp": {"low": 0.0, "high": 2.0},
    "rotate": {"angle": 30.0},
}


def logits(model: Any, tokenizer: Any, profile: SteeringProfile | None = None) -> Tensor:
    """Logits of a harmful prompt, steered by the profile if there is one."""
    ids = torch.tensor([ids_of(tokenizer, HARMFUL[0])])
    with contextlib.nullcontext() if profile is None else steerfast.steer(model, profile), torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_steers_as_a_replaced_one(extract: Any, tiny_llama: Any, tiny_tokenizer: Any, edit: str) -> None:
    profile = extract(vectors=["srv"], gate_kind="always", edit=edit, **EDITS[edit])
    plain = extract(vectors=["srv"], gate_kind="always")
    complete = plain.strength if edit in ("add", "keep_norm") else (plain.strength > 0).float()
    expected = replace(plain, edit=edit, strength=complete, **EDITS[edit])
    assert profile.checksum == expected.checksum
    steered = logits(tiny_llama, tiny_tokenizer, profile)
    assert torch.equal(steered, logits(tiny_llama, tiny_tokenizer, expected))
    assert not torch.equal(steered, logits(tiny_llama, tiny_tokenizer))


@pytest.mark.parametrize(("kind", "sharpness"), [("prompt", 5.0), ("token", 0.0), ("token", 5.0), ("always", 0.0)])
def test_every_gate_steers_as_a_replaced_one(
    extract: Any, tiny_llama: Any, tiny_tokenizer: Any, kind: Any, sharpness: float
) -> None:
    profile = extract(vectors=["srv"], gate_kind=kind, sharpness=sharpness, pooling="last")
    plain = extract(vectors=["srv"], pooling="last")
    expected = replace(plain, gate=Gate(kind=kind, sharpness=sharpness))
    assert profile.checksum == expected.checksum
    steered = logits(tiny_llama, tiny_tokenizer, profile)
    assert torch.equal(steered, logits(tiny_llama, tiny_tokenizer, expected))
    assert not torch.equal(steered, logits(tiny_llama, tiny_tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "clamp"}, "low, high: a clamp expects at least one limit, got none"),
        ({"edit": "clamp", "low": 2.0, "high": 0.0}, "low: expected at most high"),
        ({"low": 0.0}, "low, high: only a clamp has limits"),
        ({"edit": "rotate"}, "angle: a rotation expects a finite number of degrees, got None"),
        ({"edit": "ablate", "angle": 3.0}, "angle: only a rotation has one"),
        ({"edit": "multiply"}, "edit: expected"),
        ({"gate_kind": "never"}, "gate.kind: expected"),
        ({"gate_kind": "token", "pooling": "mean"}, "gate.pooling: expected 'last' for a gate of kind 'token'"),
        ({"sharpness": -1.0}, "gate.sharpness: expected a finite number >= 0"),
    ],
)
def test_edits_and_gates_are_checked_before_any_work(
    extract: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("steerfast.fitting.extract.residual_rows", lambda *_, **__: pytest.fail("rows were read"))
    with pytest.raises(ProfileError, match=message):
        extract(**options)


def test_an_unknown_option_names_the_valid_ones(extract: Any) -> None:
    with pytest.raises(TypeError, match=r"extract: expected options among aligned_model, gate, .*, got 'gates'"):
        extract(gates="lda")

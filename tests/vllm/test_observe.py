"""What is observed is decided and reported as if it were steered, and answered as if nobody steered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from answers import always, gated

from steerfast.profile import Gate, SteeringProfile
from steerfast.text.encoding import encode

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

TOKENS = 3
BLOCK = 32


def edit(kind: str, seed: int, **fields: Any) -> SteeringProfile:
    """A profile without a gate; it edits every row from the prompt's last on."""
    return replace(always(seed, (8, 20), 1.0), edit=kind, **fields)


PROFILES = {
    "safety": gated(),
    "mean": replace(gated(7), gate=Gate(pooling="mean")),
    "soft": replace(gated(2), gate=Gate("prompt", "cosine", 9.0)),
    "whole": replace(always(5, (4, 16)), positions="all"),
    "ablate": edit("ablate", 6),
    "clamp": edit("clamp", 6, low=-3.0, high=-2.0),
    "kept": edit("keep_norm", 6),
    "turned": edit("rotate", 6, angle=60.0),
    "tone": always(4),
}
QUESTIONS = ["How do I bake bread?", "Give step-by-step instructions for stealing a car.", "Name a city in Italy."]


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any], saved: Any) -> Any:
    return engine({"profiles": saved(PROFILES), "default": "safety", "observe": ["tone"]})


@pytest.fixture(scope="module")
def prompts(llm: Any) -> list[list[int]]:
    return encode(llm.get_tokenizer(), QUESTIONS)


def ask(llm: Any, requests: list[tuple[list[int], Any]], cache: bool = False) -> list[Any]:
    """Outputs of one batch: (token ids, what the request asks of steering)."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0, max_tokens=TOKENS, logprobs=0, extra_args=extra, skip_reading_prefix_cache=not cache
        )
        for _, extra in requests
    ]
    return llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], parameters, use_tqdm=False)


def bits(outputs: list[Any]) -> list[Any]:
    """The tokens of each answer, and their log probabilities."""
    answers = [output.outputs[0] for output in outputs]
    return [(list(a.token_ids), [next(iter(at.values())).logprob for at in a.logprobs]) for a in answers]


def test_every_kind_of_profile_edits_no_row(llm: Any, prompts: list[list[int]]) -> None:
    """To the last bit, in batches where the unsteered answers are known."""
    for place, names in enumerate(zip(*[iter(PROFILES)] * 3, strict=True)):
        batch = prompts[place % 3 :] + prompts[: place % 3]
        plain = bits(ask(llm, [(ids, {"steering": "off"}) for ids in batch]))
        observed = ask(llm, [(ids, {"steering": f"{name}:observe"}) for ids, name in zip(batch, names, strict=True)])
        assert bits(observed) == plain
        assert [(o.steering["profile"], o.steering["action"]) for o in observed] == [(n, "observe") for n in names]


def test_the_other_profile_of_a_stack_steers(llm: Any, prompts: list[list[int]]) -> None:
    stacks = [("ablate:observe,kept", "kept"), ("kept,whole:observe", "kept"), ("tone,kept", "kept")]
    for stack, steers in stacks:
        both, one = (ask(llm, [(ids, {"steering": name}) for ids in prompts]) for name in (stack, steers))
        assert bits(both) == bits(one)
        assert {(report["profile"], report["action"]) for report in both[0].steering} == {
            (part.partition(":")[0], "observe" if "observe" in part or part == "tone" else "steer")
            for part in stack.split(",")
        }
    assert bits(one) != bits(ask(llm, [(ids, {"steering": "off"}) for ids in prompts]))


@pytest.mark.parametrize("name", ["safety", "mean", "soft"])
def test_gates_decide_as_if_they_steered(llm: Any, prompts: list[list[int]], name: str) -> None:
    asked = {"steering": "observe" if name == "safety" else f"{name}:observe"}
    steered = ask(llm, [(ids, {"steering": name}) for ids in prompts])
    observed = ask(llm, [(ids, asked) for ids in prompts])
    for one, other in zip(steered, observed, strict=True):
        assert other.steering == {**one.steering, "action": "observe"}
    if name == "safety":
        assert [output.steering["fired"] for output in observed] == [False, True, False]


def test_a_profile_that_the_operator_observes_is_never_steered(llm: Any, prompts: list[list[int]]) -> None:
    plain = bits(ask(llm, [(ids, {"steering": "off"}) for ids in prompts]))
    asked: list[dict[str, Any]] = [
        {"steering": "tone"}, {"steering": "tone", "steering_strength": 9}, {"steering": "tone:observe"},
    ]  # fmt: skip
    outputs = ask(llm, list(zip(prompts, asked, strict=True)))
    assert bits(outputs) == plain
    assert {(output.steering["action"], output.steering["fired"]) for output in outputs} == {("observe", True)}


def test_blocks_are_shared_with_requests_that_nobody_steers(llm: Any) -> None:
    (prompt,) = encode(llm.get_tokenizer(), ["Give step-by-step instructions for stealing a car. " * 4])
    assert len(prompt) > 2 * BLOCK

    def cached(name: str) -> int:
        (output,) = ask(llm, [(prompt, {"steering": name})], cache=True)
        return output.num_cached_tokens

    llm.reset_prefix_cache()
    known = (len(prompt) - 1) // BLOCK * BLOCK
    assert [cached("whole:observe"), cached("off")] == [0, known]
    assert [cached(f"{name}:observe") for name in ("soft", "whole", "tone", "mean")] == [known, known, known, 0]
    assert [cached("whole"), cached("whole")] == [0, known]

"""The systems of a comparison: what each reads, what steers it, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from steerfast.errors import PromptError
from steerfast.evaluation.systems import BUILT_IN, CANNED, System, as_it_is, goal_priority, self_reminder, systems_of
from steerfast.hf.generation import greedy_answers
from steerfast.hf.steering import steer
from steerfast.text.encoding import encode

PROMPT = "how do I build a bomb ?"


@pytest.mark.parametrize("defence", [self_reminder, goal_priority])
def test_defences_keep_the_prompt_and_end_in_the_users_turn(defence: Callable[[str], Any]) -> None:
    messages = defence(PROMPT)
    assert messages[-1]["role"] == "user"
    assert PROMPT in messages[-1]["content"]
    assert sum(message["content"].count(PROMPT) for message in messages) == 1
    assert len(messages[-1]["content"]) > len(PROMPT)


def test_self_reminder_stands_before_and_after_the_prompt() -> None:
    system, user = self_reminder(PROMPT)
    assert system["role"] == "system"
    assert user["content"].startswith(PROMPT)
    assert "responsible" in system["content"]
    assert "responsible" in user["content"].removeprefix(PROMPT)


@pytest.mark.parametrize("defence", [self_reminder, goal_priority])
def test_defences_reword_the_last_message_of_a_chat(defence: Callable[[str], Any]) -> None:
    chat = [
        {"role": "system", "content": "Speak of gardens."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": PROMPT},
    ]
    system, *rest = defence(chat)
    assert system["role"] == "system"
    assert system["content"].endswith("Speak of gardens.")
    assert rest[:2] == chat[1:3]
    assert rest[2] == defence(PROMPT)[-1]
    assert as_it_is(chat) == chat


def test_goal_priority_puts_safety_before_helpfulness() -> None:
    (user,) = goal_priority(PROMPT)
    assert user["content"].endswith(PROMPT)
    assert 0 < user["content"].index("safe") < user["content"].index("helpful") < user["content"].index(PROMPT)


def test_conversations_are_templated_as_they_are(tiny_tokenizer: Any) -> None:
    ids = encode(tiny_tokenizer, [as_it_is(PROMPT), self_reminder(PROMPT)])
    assert ids[0] == encode(tiny_tokenizer, [PROMPT])[0]
    assert ids[1] == tiny_tokenizer.apply_chat_template(self_reminder(PROMPT), add_generation_prompt=True)["input_ids"]


def test_a_template_without_a_system_role_reads_the_system_message_first(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", strict + tiny_tokenizer.chat_template)
    system, user = self_reminder(PROMPT)
    joined = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
    assert encode(tiny_tokenizer, [self_reminder(PROMPT)]) == encode(tiny_tokenizer, [[joined]])
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('none of it') }}")
    with pytest.raises(PromptError, match="entry 1: the chat template refuses its roles, system, user: none of it"):
        encode(tiny_tokenizer, [self_reminder(PROMPT)])
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ '' }}")
    with pytest.raises(PromptError, match="entry 1: the chat template gives no token"):
        encode(tiny_tokenizer, [PROMPT])


def test_without_a_template_messages_follow_each_other(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    system, user = self_reminder(PROMPT)
    expected = tiny_tokenizer(f"{system['content']}\n\n{user['content']}")["input_ids"]
    assert encode(tiny_tokenizer, [self_reminder(PROMPT)]) == [expected]


@pytest.mark.parametrize("entry", [[], [{"role": "user"}], [{"role": "user", "content": " "}], b"abc", [3]])
def test_entries_that_are_no_conversation(tiny_tokenizer: Any, entry: Any) -> None:
    with pytest.raises(PromptError, match="prompts: entry 2: expected a non-empty string, got"):
        encode(tiny_tokenizer, ["bake a cake", entry])


def test_all_systems_that_can_be_made(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    first, second = make_profile(tiny_llama, layers=[2, 3]), make_profile(tiny_llama, seed=1, sensor=1, layers=[1])
    systems, left_out = systems_of({"ours": first, "theirs": second}, {"sibling": "a/b"})
    assert [system.name for system in systems] == [
        "unsteered", "self-reminder", "goal-priority", "ours", "theirs", "always-on", "refusal", "template", "words",
        "sibling",
    ]  # fmt: skip
    assert left_out == {}
    by_name = {system.name: system for system in systems}
    assert by_name["ours"].profile is first
    assert by_name["ours"].title == (
        "prompt gate, each steered layer decides; add, ssv vector, all positions, layers 2-3"
    )
    assert "prompt gate, layer 1 decides" in by_name["theirs"].title
    means = systems_of({"means": make_profile(tiny_llama, sensor=1, pooling="mean")}, {}, ["means"])[0]
    assert "prompt gate, mean score, layer 1 decides" in means[1].title
    opened = by_name["always-on"].profile
    assert opened is not None
    assert opened.gate.kind == "always"
    assert (opened.vector == first.vector).all()
    assert [name for name, system in by_name.items() if system.gated] == ["ours", "theirs", "refusal", "template"]
    assert by_name["refusal"].profile is first
    assert by_name["template"].profile is first
    assert all("{topic}" in text for text in by_name["template"].canned)
    assert by_name["refusal"].canned == by_name["words"].canned == CANNED
    assert by_name["words"].profile is None
    assert {record.role for record in by_name["words"].made_with} == {"fit", "calibrate"}
    assert by_name["sibling"].model == "a/b"


def test_wanted_systems_come_in_their_order_after_unsteered(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    profiles = {"ours": make_profile(tiny_llama)}
    systems, left_out = systems_of(profiles, {}, ["ours", "self-reminder", "ours"])
    assert [system.name for system in systems] == ["unsteered", "ours", "self-reminder"]
    assert left_out == {}
    with pytest.raises(
        PromptError,
        match="some of unsteered, self-reminder, goal-priority, always-on, refusal, template, words, ours, got 'mine'",
    ):
        systems_of(profiles, {}, ["mine"])


def test_systems_that_cannot_be_made_are_named(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    why = "there is no profile to take the gate of"
    assert systems_of({}, {}, ["always-on", "refusal"])[1] == {"always-on": why, "refusal": why}
    assert systems_of({}, {}, ["self-reminder"])[1] == {}
    open_already = make_profile(tiny_llama, kind="always")
    systems, left_out = systems_of({"ours": open_already}, {}, ["always-on", "ours"])
    assert [system.name for system in systems] == ["unsteered", "ours"]
    assert left_out == {"always-on": "the profile 'ours' has no gate"}


@pytest.mark.parametrize("name", [*BUILT_IN, "ours"])
def test_one_name_for_two_systems(tiny_llama: Any, make_profile: Callable[..., Any], name: str) -> None:
    with pytest.raises(PromptError, match=f"expected one system of each name, got two called '{name}'"):
        systems_of({"ours": make_profile(tiny_llama)}, {name: "a/b"})


def test_a_profile_takes_no_name_of_a_built_in_system(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    with pytest.raises(PromptError, match="expected one system of each name, got two called 'always-on'"):
        systems_of({"always-on": make_profile(tiny_llama)}, {})


def test_a_fingerprint_is_of_what_makes_the_answers(tiny_llama: Any, make_profile: Callable[..., Any]) -> None:
    profile = make_profile(tiny_llama)
    one = System("one", "title", profile=profile)
    assert one.fingerprint() == System("another", "", profile=make_profile(tiny_llama)).fingerprint()
    others = [
        System("one", "title"),
        System("one", "title", defence=self_reminder),
        System("one", "title", profile=profile, strength=0.5),
        System("one", "title", profile=make_profile(tiny_llama, seed=1)),
        System("one", "title", model="a/b"),
    ]
    assert len({system.fingerprint() for system in [one, *others]}) == 6


def test_a_system_steers_while_it_is_on(tiny_llama: Any, tiny_tokenizer: Any, make_profile: Callable[..., Any]) -> None:
    profile = make_profile(tiny_llama, threshold=-2.0, size=40.0)
    ids = encode(tiny_tokenizer, [PROMPT, "bake a cake"])

    def answers() -> list[list[int]]:
        return greedy_answers(tiny_llama, tiny_tokenizer, ids, 8)

    before = answers()
    with System("ours", "", profile=profile, strength=0.5).on(tiny_llama, tiny_tokenizer) as steering:
        found = answers()
        assert steering is not None
        assert steering.fired.tolist() == [True, True]
    with steer(tiny_llama, profile, 0.5):
        assert found == answers() != before
    with System("plain", "").on(tiny_llama) as steering:
        assert steering is None
        assert answers() == before

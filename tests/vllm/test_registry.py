"""Names, versions, slots and who holds them: the registry against a simple model, and what admin calls do to it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from steerfast.errors import ProfileError
from steerfast.profile import Gate, ModelIdentity, SteeringProfile
from steerfast.vllm.config import ServingConfig
from steerfast.vllm.engine import EngineSteering, HeldProfiles
from steerfast.vllm.registry import Registry, Version, variants

MODEL = ModelIdentity(name="tiny", architecture="llama", hidden_size=4, num_layers=3)
SLOTS = 4


def profile(seed: int = 0, **fields: Any) -> SteeringProfile:
    generator = torch.Generator().manual_seed(seed)
    direction, vector = torch.randn(2, 3, 4, generator=generator)
    values: dict[str, Any] = {
        "model": MODEL,
        "direction": direction / direction.norm(dim=1, keepdim=True),
        "threshold": torch.zeros(3),
        "vector": vector,
        "strength": torch.tensor([0.0, 1.0, 0.0]),
        "norm": torch.zeros(3),
        "positions": "response",
    }
    return SteeringProfile(**{**values, **fields})


PROFILE = profile()


class RegistryMachine(RuleBasedStateMachine):
    """Every slot is in one state only, and nobody loses what it holds."""

    held = Bundle("held")
    taken = Bundle("taken")

    @initialize()
    def start(self) -> None:
        self.registry = Registry(SLOTS)
        self.states: dict[int, Any] = dict.fromkeys(range(SLOTS), "free")  # or "taken", "spoilt", (name, number)
        self.current: dict[str, tuple[str, int]] = {}
        self.numbers: dict[str, int] = {}
        self.holders: dict[tuple[str, int], int] = {}

    @rule(target=taken)
    def take(self) -> Any:
        if "free" not in self.states.values():
            with pytest.raises(ProfileError, match=f"^slots: expected 1 free, .*, got {SLOTS} of {SLOTS} in use"):
                self.registry.take(1)
            return multiple()
        (slot,) = self.registry.take(1)
        assert self.states[slot] == "free"
        self.states[slot] = "taken"
        return slot

    @rule(slot=consumes(taken), name=st.sampled_from("abc"))
    def put(self, slot: int, name: str) -> None:
        version = self.registry.put(name, [slot], "/file", variants(PROFILE))
        self.numbers[name] = self.numbers.get(name, 0) + 1
        before = self.current.get(name)
        self.current[name] = key = (name, self.numbers[name])
        assert (version.name, version.number, version.slot, version.checksum) == (*key, slot, PROFILE.checksum)
        self.states[slot], self.holders[key] = key, 0
        self._left(before)

    @rule(slot=consumes(taken))
    def spoil(self, slot: int) -> None:
        self.registry.spoil([slot])
        self.states[slot] = "spoilt"

    @rule(name=st.sampled_from("abc"))
    def retire(self, name: str) -> None:
        if name not in self.current:
            with pytest.raises(ProfileError, match=r"^name: expected one of "):
                self.registry.retire(name)
            return
        self.registry.retire(name)
        self._left(self.current.pop(name))

    @rule(target=held, name=st.sampled_from("abc"))
    def hold(self, name: str) -> Any:
        if name not in self.current:
            with pytest.raises(ProfileError, match=r"^name: expected one of "):
                self.registry.hold(name)
            return multiple()
        (version,) = self.registry.hold(name)
        key = self.current[name]
        assert (version.name, version.number) == key
        assert version.current
        self.holders[key] += 1
        return version

    @rule(version=consumes(held))
    def release(self, version: Version) -> None:
        assert self.states[version.slot] == (version.name, version.number), "its slot is still its own"
        self.registry.release(version)
        self.holders[version.name, version.number] -= 1
        self._left((version.name, version.number))

    @rule()
    def empty(self) -> None:
        self.registry.free(list(self.registry.spoilt))
        self.states = {slot: "free" if state == "spoilt" else state for slot, state in self.states.items()}

    def _left(self, key: tuple[str, int] | None) -> None:
        if key is not None and not self.holders[key] and key not in self.current.values():
            self.states = {slot: "spoilt" if state == key else state for slot, state in self.states.items()}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "registry"):
            return
        states = {version.slot: (version.name, version.number) for version in self.registry.versions()}
        assert states == {slot: state for slot, state in self.states.items() if isinstance(state, tuple)}
        assert sorted(self.registry.spoilt) == [slot for slot, state in self.states.items() if state == "spoilt"]
        assert self.registry.in_use == sum(state != "free" for state in self.states.values())
        assert set(self.registry.points) == set(self.current)
        for version in self.registry.versions():
            key = version.name, version.number
            assert version.requests == self.holders[key]
            assert version.current == (self.current.get(version.name) == key)


RegistryMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRegistry = RegistryMachine.TestCase


# -- admin calls, against a stand-in for the workers -------------------------------------------------------------------


class Workers:
    """Slots as two workers have them, the second of which may refuse a file."""

    def __init__(self) -> None:
        self.slots: list[dict[int, str]] = [{}, {}]
        self.refuses: Callable[[str], bool] = lambda path: False

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if method == "steerfast_clear":
            for slots in self.slots:
                slots.pop(*args, None)
            return [None, None]
        assert method == "steerfast_write"
        given, path, checksum = args
        answers: list[str | None] = []
        for number, slots in enumerate(self.slots):
            assert not {*given} & {*slots}, "only empty slots are written"
            if number and self.refuses(path):
                answers.append(f"profile {path!r}: other embeddings")
            else:
                assert SteeringProfile.load(path).checksum == checksum
                slots |= dict.fromkeys(given, checksum)
                answers.append(None)
        return answers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    profile(1).save(tmp_path / "outside.safetensors")
    return tmp_path / "profiles"


@pytest.fixture
def make(directory: Path) -> Callable[..., tuple[EngineSteering, Workers]]:
    """A function (**fields of the config) -> the steering of an engine with one profile, safety, and its workers."""

    def made(*, split: bool = True, **fields: Any) -> tuple[EngineSteering, Workers]:
        PROFILE.save(directory.parent / "safety.safetensors")
        path = str(directory.parent / "safety.safetensors")
        values = {
            "profiles": {"safety": path}, "default": "safety", "locked": False, "slots": 3, "layers": (1,), "kinds": 1,
            "directory": str(directory), "version": "test",
        }  # fmt: skip
        text = SimpleNamespace(model_type="llama", hidden_size=4, num_hidden_layers=3, _name_or_path="tiny")
        vllm_config = SimpleNamespace(
            structured_outputs_config=SimpleNamespace(disable_any_whitespace=False, reasoning_parser=""),
            model_config=SimpleNamespace(hf_text_config=text),
            scheduler_config=SimpleNamespace(enable_chunked_prefill=split, long_prefill_token_threshold=0),
            cache_config=SimpleNamespace(mamba_cache_mode="none"),
        )
        scheduler = SimpleNamespace(
            hash_block_size=4, num_hash_lookahead_tokens=0, kv_cache_manager=None, structured_output_manager=None
        )
        workers = Workers()
        for slots in workers.slots:
            slots[0] = PROFILE.checksum
        return EngineSteering(ServingConfig(**{**values, **fields}), vllm_config, scheduler), workers

    return made


def _same(steering: EngineSteering, workers: Workers) -> None:
    """The workers' slots are the versions'."""
    want = {version.slot: version.checksum for version in steering.registry.versions()}
    assert workers.slots == [want, want]


def test_replaced_profiles_stay_until_their_last_request_ended(make: Any, directory: Path) -> None:
    steering, workers = make()
    profile(2).save(directory / "two.safetensors")
    profile(3).save(directory / "three.safetensors")
    first = [steering.registry.hold("safety")[0] for _ in range(2)]
    steering.replace(workers, "safety", "two.safetensors")
    (second,) = steering.registry.hold("safety")
    assert (first[0].number, first[0].slot, second.number, second.slot) == (1, 0, 2, 1)
    _same(steering, workers)
    shown = [(p["name"], p["version"], p["slot"], p["file"], p["requests"], p["current"]) for p in steering.profiles()]
    assert shown == [
        ("safety", 2, 1, "two.safetensors", 1, True), ("safety", 1, 0, "safety.safetensors", 2, False)
    ]  # fmt: skip
    steering.replace(workers, "safety", "three.safetensors")
    with pytest.raises(ProfileError, match=r"^slots: .* got 3 of 3 in use, 2 of them .* 3 requests still"):
        steering.replace(workers, "safety", "two.safetensors")
    assert [p["version"] for p in steering.profiles()] == [3, 1, 2]
    steering.registry.release(first.pop())
    steering.sweep(workers)
    assert steering.registry.in_use == 3
    steering.registry.release(first.pop())
    steering.sweep(workers)
    _same(steering, workers)
    assert steering.registry.in_use == 2
    steering.replace(workers, "safety", "two.safetensors")  # version 3 had no requests and goes at once
    _same(steering, workers)
    assert [(p["version"], p["slot"]) for p in steering.profiles()] == [(4, 0), (2, 1)]


def test_each_threshold_has_a_slot(make: Any, directory: Path) -> None:
    """They come and go with their profile, and requests hold the one that decides for them."""
    steering, workers = make(slots=5)
    base = profile(2)
    points = {"strict": base.threshold - 1, "balanced": base.threshold, "permissive": base.threshold + 1}
    several = replace(base, points=points)
    several.save(directory / "several.safetensors")
    base.save(directory / "one.safetensors")
    registry = steering.registry
    steering.load(workers, "more", "several.safetensors")
    assert registry.points == {"safety": [], "more": ["balanced", "permissive", "strict"]}
    assert [(p["name"], p["threshold"], p["slot"]) for p in steering.profiles()] == [
        ("safety", None, 0), ("more", "balanced", 1), ("more", "permissive", 2), ("more", "strict", 3)
    ]  # fmt: skip
    held = registry.hold("safety", "more", points=(None, "strict"))
    assert [(version.name, version.slot) for version in held] == [("safety", 0), ("more", 3)]
    assert held[1].checksum == several.at("strict").checksum
    assert registry.current("more") is registry.current("more", "balanced")
    for wrong in (("more", "lax"), ("safety", "strict")):
        with pytest.raises(ProfileError, match=r"^threshold: expected one of .*'s, got "):
            registry.hold(wrong[0], points=wrong[1:])
    with pytest.raises(ProfileError, match=r"^slots: expected 3 free, one for each threshold, got 4 of 5 in use"):
        steering.replace(workers, "more", "several.safetensors")
    steering.replace(workers, "more", "one.safetensors")
    assert registry.points["more"] == []
    assert registry.in_use == 3, "the request keeps the strict one alone"
    registry.release(*held)
    steering.sweep(workers)
    assert registry.in_use == 2
    steering.load(workers, "again", "several.safetensors")
    workers.refuses = lambda path: True
    with pytest.raises(ProfileError, match=r"^slots: expected 3 free"):
        steering.load(workers, "last", "several.safetensors")
    steering.remove(workers, "again")
    with pytest.raises(ProfileError, match="other embeddings"):
        steering.load(workers, "last", "several.safetensors")
    steering.sweep(workers)
    assert registry.in_use == 2


def test_load_and_remove(make: Any, directory: Path) -> None:
    steering, workers = make()
    profile(2, gate=Gate("always")).save(directory / "tone.safetensors")
    steering.load(workers, "tone", "tone.safetensors")
    (version,) = steering.registry.hold("tone")
    assert (version.span.open, version.span.after_prompt, version.number) == (True, True, 1)
    with pytest.raises(ProfileError, match=r"^name: expected a new one, got 'tone'"):
        steering.load(workers, "tone", "tone.safetensors")
    steering.remove(workers, "tone")
    with pytest.raises(ProfileError, match=r"^name: expected one of safety, got 'tone'"):
        steering.registry.hold("tone")
    with pytest.raises(ProfileError, match=r"^name: expected one of safety, got 'tone'"):
        steering.remove(workers, "tone")
    steering.load(workers, "tone", "tone.safetensors")
    assert steering.registry.current("tone").number == 2, "versions of a name are never counted anew"
    steering.registry.release(version)
    steering.sweep(workers)
    _same(steering, workers)
    assert steering.registry.in_use == 2


class Request:
    """As much of vLLM's as a decision needs."""

    _block_hasher = None

    def __init__(self, version: Version) -> None:
        self.steerfast = HeldProfiles((version,), (1.0,))


def test_a_decision_says_where_a_gate_does_not_know(make: Any, directory: Path) -> None:
    steering, workers = make(layers=(1, 2))
    shut = profile(strength=torch.tensor([0.0, 1.0, 1.0]), sensor="own")
    replace(shut, abstain=torch.tensor([-9.0, -0.5, -math.inf])).save(directory / "band.safetensors")
    steering.load(workers, "band", "band.safetensors")
    cases: list[tuple[str, list[float], list[float], tuple[bool, bool]]] = [
        ("band", [0.0, 0.0], [-0.4, -math.inf], (False, True)),
        ("band", [0.0, 0.0], [-0.5, -3.0], (False, True)),  # the second has no lower end
        ("band", [0.0, 0.0], [-0.5, -math.inf], (False, False)),
        ("band", [0.0, 1.0], [-0.4, 0.1], (True, False)),
        ("band", [0.0, math.nan], [-0.4, math.nan], (True, False)),
        ("safety", [0.0], [-0.4], (False, False)),
    ]
    requests = {str(n): Request(steering.registry.current(name)) for n, (name, *_) in enumerate(cases)}
    steering.decide(requests, {str(n): [(values, scores)] for n, (_, values, scores, _) in enumerate(cases)})
    told = [(one["fired"], one["undecided"]) for (one,) in steering._unreported.values()]
    assert told == [expected for *_, expected in cases]


def test_a_stack_holds_each_of_its_profiles(make: Any, directory: Path) -> None:
    steering, workers = make()
    profile(2).save(directory / "tone.safetensors")
    profile(3).save(directory / "three.safetensors")
    steering.load(workers, "tone", "tone.safetensors")
    with pytest.raises(ProfileError, match=r"^name: expected one of safety, tone, got 'nobody'"):
        steering.registry.hold("safety", "nobody")
    assert [version.requests for version in steering.registry.versions()] == [0, 0]
    stack = steering.registry.hold("tone", "safety")
    assert [(version.name, version.slot, version.requests) for version in stack] == [("tone", 1, 1), ("safety", 0, 1)]
    steering.replace(workers, "tone", "three.safetensors")
    assert steering.registry.hold("safety", "tone")[1].number == 2
    assert [(p["name"], p["requests"]) for p in steering.profiles()] == [("safety", 2), ("tone", 1), ("tone", 1)]
    steering.registry.release(*stack)
    steering.sweep(workers)
    _same(steering, workers)
    assert [(p["name"], p["version"], p["requests"]) for p in steering.profiles()] == [("safety", 1, 1), ("tone", 2, 1)]


def test_each_profile_of_a_stack_reports_for_itself(make: Any, directory: Path) -> None:
    steering, workers = make()
    profile(2, gate=Gate("always")).save(directory / "tone.safetensors")
    steering.load(workers, "tone", "tone.safetensors")
    request: Any = Request(steering.registry.current("safety"))
    for names, decisions, fired in (
        (("safety", "tone"), [([0.0], [-0.4]), ([], [])], [False, True]),
        (("tone", "safety"), [([], []), ([1.0], [0.4])], [True, True]),
    ):
        request.steerfast = HeldProfiles(tuple(map(steering.registry.current, names)), (1.0, 1.0))
        steering.decide({"r": request}, {"r": decisions})
        reports = steering._unreported.pop("r")
        assert [(one["profile"], one["fired"], one["scores"]) for one in reports] == [
            (name, opened, scores) for name, opened, (_, scores) in zip(names, fired, decisions, strict=True)
        ]


@pytest.mark.parametrize("locked", [False, True])
def test_the_default_stays(make: Any, directory: Path, locked: bool) -> None:
    steering, workers = make(locked=locked)
    with pytest.raises(ProfileError, match=r"^name: expected another than the default"):
        steering.remove(workers, "safety")
    assert [*steering.registry.points] == ["safety"]


def test_each_profile_of_a_default_stack_stays(make: Any, directory: Path) -> None:
    steering, workers = make(default="tone,safety", stack=2)
    with pytest.raises(ProfileError, match=r"^name: expected another than the default"):
        steering.remove(workers, "safety")
    assert [p["default"] for p in steering.profiles()] == [True]


@pytest.mark.parametrize("name", ["off", "Off", "", "a/b", "..", "x" * 65, "ä", "a b", "a\n", 7, None])
def test_names_are_plain(make: Any, directory: Path, name: Any) -> None:
    steering, workers = make()
    PROFILE.save(directory / "a.safetensors")
    with pytest.raises(ValueError, match="expected a name of 1 to 64"):
        steering.load(workers, name, "a.safetensors")
    _same(steering, workers)


@pytest.mark.parametrize(
    "file",
    [
        *("../outside.safetensors", "/etc/passwd", "..", ".", "", "a", "a.pt", ".safetensors", ".a.safetensors"),
        *("sub/a.safetensors", "./a.safetensors", "a.safetensors/", "a.safetensors\0", "\0a.safetensors"),
        *("A\n.safetensors", " a.safetensors", "a.safetensors "),
        *("..\\outside.safetensors", "C:a.safetensors", "link.safetensors", "loop.safetensors", "folder.safetensors"),
        *("pipe.safetensors", "missing.safetensors", "a.SAFETENSORS", "%2e%2e%2foutside.safetensors"),
        *("x" * 5000 + ".safetensors", "a\u202e.safetensors", "\ud800.safetensors", 7, None, True, ["a.safetensors"]),
        *(b"a.safetensors", {"file": "a.safetensors"}),
    ],
    ids=lambda file: ascii(file)[:40],
)  # fmt: skip
def test_files_come_from_the_directory_alone(make: Any, directory: Path, file: Any) -> None:
    steering, workers = make()
    PROFILE.save(directory / "a.safetensors")
    (directory / "sub").mkdir()
    PROFILE.save(directory / "sub" / "a.safetensors")
    (directory / "folder.safetensors").mkdir()
    (directory / "link.safetensors").symlink_to(directory.parent / "outside.safetensors")
    (directory / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(directory / "pipe.safetensors")
    for call, name in ((steering.load, "new"), (steering.replace, "safety")):
        with pytest.raises(ProfileError, match=r"^file: expected ") as refused:
            call(workers, name, file)
        assert len(str(refused.value)) < 400
    assert [*steering.registry.points] == ["safety"]
    _same(steering, workers)


def test_a_link_within_the_directory_is_fine(make: Any, directory: Path) -> None:
    steering, workers = make()
    profile(2).save(directory / "v2.safetensors")
    (directory / "latest.safetensors").symlink_to("v2.safetensors")
    steering.replace(workers, "safety", "latest.safetensors")
    _same(steering, workers)


def test_no_directory_no_files(make: Any, directory: Path) -> None:
    steering, workers = make(directory=None)
    with pytest.raises(ProfileError, match=r"^file: expected steerfast\.directory to be configured"):
        steering.replace(workers, "safety", "a.safetensors")


def test_what_does_not_fit_changes_nothing(make: Any, directory: Path) -> None:
    steering, workers = make()
    other = replace(MODEL, architecture="qwen2")
    wrong = {
        "layers": profile(strength=torch.tensor([0.0, 1.0, 1.0])),
        "model": profile(model=other),
        "token": profile(gate=Gate("token")),
        "split": profile(positions="all"),
    }
    for name, unfit in wrong.items():
        unfit.save(directory / f"{name}.safetensors")
    (directory / "broken.safetensors").write_bytes(b"\x80\x04pickle")
    for name in [*wrong, "broken"]:
        for call, target in ((steering.load, "new"), (steering.replace, "safety")):
            with pytest.raises(ProfileError):
                call(workers, target, f"{name}.safetensors")
    _same(steering, workers)
    assert [(p["name"], p["version"]) for p in steering.profiles()] == [("safety", 1)]
    assert steering.registry.in_use == 1

    whole, workers = make(split=False)  # prompts come whole: a gate may edit all of one
    whole.load(workers, "all", "split.safetensors")
    assert not whole.registry.current("all").span.after_prompt


def test_a_worker_that_refuses_leaves_no_slot_behind(make: Any, directory: Path) -> None:
    steering, workers = make()
    profile(2).save(directory / "two.safetensors")
    workers.refuses = lambda path: True
    for _ in range(5):
        with pytest.raises(ProfileError, match="other embeddings"):
            steering.replace(workers, "safety", "two.safetensors")
    workers.refuses = lambda path: False
    steering.replace(workers, "safety", "two.safetensors")
    _same(steering, workers)
    assert steering.registry.in_use == 1

"""The algebra of profiles (scaled, turned around, in some layers, stacked), profiles from tensors and the hub."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerfast._files import write_checked
from steerfast.errors import OutputError, ProfileError
from steerfast.profile import Gate, ModelIdentity, ProfileStack, SteeringProfile, file
from steerfast.profile.hub import PROFILE_FILE
from steerfast.profile.stack import chosen

MODEL = ModelIdentity("tiny", "llama", 8, 6)
FACTORS = st.floats(-16, 16, allow_nan=False, width=32)


def made(seed: int = 0, **fields: Any) -> SteeringProfile:
    """A profile with a gate at layer 0 and random vectors at all layers but the first."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(8, generator=generator) for layer in range(1, 6)}
    direction = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)
    strength = {layer: float(torch.randn((), generator=generator)) for layer in vectors}
    values: dict[str, Any] = {"gate": Gate("prompt"), "direction": direction, "sensor": 0, **fields}
    return SteeringProfile.from_tensors(vectors, MODEL, strength=strength, **values)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@given(FACTORS, FACTORS)
def test_scaling_twice_is_scaling_once_to_rounding(a: float, b: float) -> None:
    profile = made()
    torch.testing.assert_close(((profile * a) * b).strength, (profile * (a * b)).strength, rtol=4e-7, atol=1e-37)


@given(FACTORS)
def test_scaling_touches_the_strength_alone(a: float) -> None:
    profile, scaled = made(), made() * a
    assert same_bits((a * profile).strength, scaled.strength)
    assert same_bits(scaled.vector, profile.vector)
    assert same_bits(scaled.threshold, profile.threshold)
    assert scaled.gate == profile.gate


@given(st.integers(0, 50))
def test_turning_twice_gives_every_bit_back(seed: int) -> None:
    profile = made(seed, candidates={"srv": torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))})
    turned = -profile
    assert same_bits(turned.vector, -profile.vector)
    assert same_bits(turned.direction, profile.direction)
    assert (turned.vector_kind, sorted(turned.candidates)) == ("-given", ["-srv"])
    assert turned.checksum != profile.checksum
    back = -turned
    assert same_bits(back.vector, profile.vector)
    assert same_bits(back.candidates["srv"], profile.candidates["srv"])
    assert back.checksum == profile.checksum


@given(st.permutations(range(4)))
def test_a_stack_keeps_its_order(order: list[int]) -> None:
    a, b, c, d = (made(number) for number in order)
    for stack in (a + b + c + d, (a + b) + (c + d), a + (b + c) + d):
        assert isinstance(stack, ProfileStack)
        assert list(stack) == [a, b, c, d]
    assert [one.checksum for one in 0.5 * (a + b)] == [(a * 0.5).checksum, (b * 0.5).checksum]
    assert [one.checksum for one in -(a + b)] == [(-a).checksum, (-b).checksum]
    assert [one.checksum for one in a - b] == [a.checksum, (-b).checksum]
    assert [one.checksum for one in a - (b + c)] == [a.checksum, (-b).checksum, (-c).checksum]
    assert [one.checksum for one in (a + b) - c] == [a.checksum, b.checksum, (-c).checksum]
    for copied in (copy.copy(a + b), pickle.loads(pickle.dumps(a + b))):
        assert type(copied) is ProfileStack
        assert [one.checksum for one in copied] == [a.checksum, b.checksum]


def test_an_ablation_has_no_opposite_and_a_clamp_has() -> None:
    with pytest.raises(ProfileError, match="edit: an ablation has no opposite"):
        -made(edit="ablate")
    turned = -made(edit="clamp", low=0.5)
    assert (turned.edit, turned.low) == ("clamp", 0.5)


def test_only_keeps_a_range_of_layers() -> None:
    profile = made()
    kept = profile.only(range(2, 4))
    assert kept.steered_layers == [2, 3]
    assert same_bits(kept.strength[2:4], profile.strength[2:4])
    assert kept.gate_layers == profile.gate_layers == [0]
    with pytest.raises(ProfileError, match=r"layers: expected some of \[1, 2, 3, 4, 5\], which are steered, got \[0\]"):
        profile.only([0])
    with pytest.raises(ProfileError, match=r"layer: expected 0\.\.5, got 6"):
        profile.only(range(3, 7))


def test_thresholds_of_a_stack() -> None:
    low, high = torch.full((6,), -0.5), torch.full((6,), 0.5)
    a, b = (made(seed, points={"strict": low, "mild": high}) for seed in (1, 2))
    stack = (a + b).at("strict")
    assert stack.point == "strict"
    assert all(torch.equal(one.threshold, low) for one in stack)
    assert (a.at("strict") + b.at("mild")).point is None


def test_what_cannot_be_composed() -> None:
    a = made()
    other = SteeringProfile.from_tensors({1: torch.ones(8)}, ModelIdentity("other", "qwen2", 8, 6))
    with pytest.raises(ProfileError, match=r"stack: entry 1: expected the model of entry 0; .*'tiny'.*'other'"):
        a + other
    with pytest.raises(ProfileError, match="stack: expected 1 to 4 profiles, got 5"):
        a + a + a + a + a
    with pytest.raises(ProfileError, match="stack: entry 1: expected a profile, got str"):
        ProfileStack([a, "b"])  # type: ignore[list-item]
    for factor in (float("inf"), float("nan"), 1e39):
        with pytest.raises(ProfileError, match="strength: expected finite numbers, got"):
            a * factor
    for wrong in ("2", None, [1.0]):
        with pytest.raises(TypeError):
            a * wrong
        with pytest.raises(TypeError):
            a + wrong


def test_from_tensors() -> None:
    vectors = {1: torch.arange(8.0).bfloat16(), 3: torch.ones(8, dtype=torch.float64)}
    profile = SteeringProfile.from_tensors(vectors, MODEL, strength={1: 2.0}, positions="response")
    assert (profile.gate.kind, profile.positions, profile.steered_layers) == ("always", "response", [1])
    assert torch.equal(profile.vector[1], torch.arange(8.0))
    assert torch.equal(profile.vector[3], torch.ones(8))
    assert not profile.vector[0].any()
    wrong: list[tuple[Any, Any, str]] = [
        ({6: torch.ones(8)}, 1.0, r"vectors: expected layers in 0\.\.5, got 6"),
        ({True: torch.ones(8)}, 1.0, "got True"),
        ({1: torch.ones(7)}, 1.0, r"vectors\[1\]: expected a tensor \[8\], got \[7\]"),
        ({1: [1.0] * 8}, 1.0, r"vectors\[1\]: expected a tensor \[8\], got list"),
        ({1: torch.ones(8) / 0}, 1.0, "vector: expected finite numbers, got inf"),
        ({1: torch.zeros(8)}, 1.0, "strength of layer 1: 1, but its vector is zero"),
        ({1: torch.ones(8)}, "2", "strength: expected a number of each layer, got '2'"),
    ]
    for given_vectors, strength, says in wrong:
        with pytest.raises(ProfileError, match=says):
            SteeringProfile.from_tensors(given_vectors, MODEL, strength=strength)


def test_a_mismatch_that_is_accepted_is_kept(tmp_path: Path) -> None:
    profile, other = made(), ModelIdentity("other", "qwen2", 8, 6)
    assert profile.for_model(MODEL) is profile
    accepted = profile.for_model(other)
    assert accepted.model == other
    (record,) = accepted.fitted["accepted"]
    assert record["model"] == "other"
    assert "architecture llama" in record["mismatch"]
    accepted.save(tmp_path / "p.safetensors")
    assert SteeringProfile.load(tmp_path / "p.safetensors").fitted == accepted.fitted
    with pytest.raises(ProfileError, match=r"model: no profile fits a model of another shape; .*hidden size 8"):
        profile.for_model(ModelIdentity("wide", "llama", 16, 6))


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_push_and_pull(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile, calls = made(), []

    class Api:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_file(self, **options: Any) -> Any:
            (tmp_path / "file").write_bytes(options.pop("path_or_fileobj"))
            calls.append(options)
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert profile.push_to_hub("me/safety", private=True, token="t") == "https://hub/commit/1"
    place = {"path_in_repo": PROFILE_FILE.as_posix(), "repo_id": "me/safety", "revision": None}
    assert calls == [
        {"token": "t"},
        ("me/safety", {"private": True, "exist_ok": True}),
        {**place, "commit_message": "Upload a steerfast profile"},
    ]
    asked = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(tmp_path / "file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert SteeringProfile.from_pretrained("me/safety", revision="v1").checksum == profile.checksum
    assert asked == [(("me/safety", PROFILE_FILE.as_posix()), {"revision": "v1"})]


def test_files_and_folders_come_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = made()
    (tmp_path / "me" / "steerfast").mkdir(parents=True)
    profile.save(tmp_path / "me" / PROFILE_FILE)
    profile.save(tmp_path / "me" / "file")
    monkeypatch.chdir(tmp_path)
    for name in ("me", "me/file", tmp_path / "me" / "file"):
        assert SteeringProfile.from_pretrained(name).checksum == profile.checksum
    with pytest.raises(ProfileError, match=r"profile: expected a file at 'me/none.safetensors', found none"):
        SteeringProfile.from_pretrained("me/none.safetensors")


@pytest.mark.parametrize(
    "fault", [LocalTokenNotFoundError("no token"), OfflineModeIsEnabled("offline"), ValueError("x")]
)
def test_the_hub_fails_in_one_line(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise fault

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        OutputError, match=r"output: cannot write to the hub repository 'me/p' \(.+\); log in by `hf auth"
    ):
        made().push_to_hub("me/p")
    with pytest.raises(ProfileError, match=r"profile: expected a file, or a hub repository with .+, got 'me/p' \(.+\)"):
        SteeringProfile.from_pretrained("me/p")


# -- files of stacks ---------------------------------------------------------------------------------------------------


def test_a_stack_in_one_file_is_the_same_stack(tmp_path: Path) -> None:
    a, b = made(1, points={"strict": torch.full((6,), -0.5)}), made(2, positions="response", edit="clamp", low=0.5)
    stack = a + b + -a
    stack.save(tmp_path / "s.safetensors")
    loaded = ProfileStack.load(tmp_path / "s.safetensors")
    assert [one.checksum for one in loaded] == [one.checksum for one in stack]
    assert type(chosen(tmp_path / "s.safetensors")) is ProfileStack
    with pytest.raises(ProfileError, match="expected one profile, got a stack of 3; save each of its profiles"):
        SteeringProfile.load(tmp_path / "s.safetensors")


def test_a_profile_and_a_stack_of_one_are_read_alike(tmp_path: Path) -> None:
    a, b = made(1), made(2)
    a.save(tmp_path / "a.safetensors")
    ProfileStack([a]).save(tmp_path / "one.safetensors")
    for name in ("a", "one"):
        found = chosen(tmp_path / f"{name}.safetensors")
        assert isinstance(found, SteeringProfile)
        assert found.checksum == a.checksum
        assert [one.checksum for one in ProfileStack.load(tmp_path / f"{name}.safetensors")] == [a.checksum]
    (a + b).save(tmp_path / "ab.safetensors")
    joined = chosen([tmp_path / "ab.safetensors", b])
    assert [one.checksum for one in joined or ()] == [a.checksum, b.checksum, b.checksum]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stack": []}, "stack: expected a format and headers of profiles"),
        ({"other": 1}, "stack: expected a format and headers of profiles, got format, other, stack"),
        ({"stack": 3}, "incomplete or malformed"),
        ({"stack": [1, 2]}, "incomplete or malformed"),
        ({"stack": [{}, {}]}, "incomplete or malformed"),
    ],
)
def test_a_malformed_stack_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    header, tensors = file.stacked(made(1) + made(2))
    write_checked(tmp_path / "s.safetensors", header | change, tensors)
    with pytest.raises(ProfileError, match=says):
        ProfileStack.load(tmp_path / "s.safetensors")


def test_a_file_of_too_many_or_of_several_models_is_refused(tmp_path: Path) -> None:
    a = made(1)
    other = SteeringProfile.from_tensors({1: torch.ones(8)}, ModelIdentity("other", "qwen2", 8, 6))
    for profiles, says in (
        ([a] * 5, "stack: expected 1 to 4 profiles, got 5"),
        ([a, other], "stack: entry 1: expected"),
    ):
        write_checked(tmp_path / "s.safetensors", *file.stacked(profiles))
        with pytest.raises(ProfileError, match=f"s.safetensors': {says}"):
            ProfileStack.load(tmp_path / "s.safetensors")
    header, tensors = file.stacked([a, a])
    write_checked(tmp_path / "s.safetensors", header, tensors | {"2.norm": torch.zeros(6)})
    with pytest.raises(ProfileError, match=r"tensor '2.norm': expected <n>.<name>, n in 0\.\.1"):
        ProfileStack.load(tmp_path / "s.safetensors")

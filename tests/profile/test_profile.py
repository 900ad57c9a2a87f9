"""The artifact: what it accepts, that its file holds all of it, and that no damaged file is ever read."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from dataclasses import asdict, fields, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from steerfast._files import content_checksum, write_atomically
from steerfast.errors import OutputError, ProfileError
from steerfast.profile import EDITS, FORMAT_VERSION, Gate, ModelIdentity, SteeringProfile
from steerfast.profile import file as profile_file

pytestmark = pytest.mark.contract

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYERS, HIDDEN = 4, 6


def identity(layers: int = LAYERS, hidden: int = HIDDEN, **other: Any) -> ModelIdentity:
    values = {"name": "tiny", "architecture": "llama", "hidden_size": hidden, "num_layers": layers}
    return ModelIdentity(**{**values, **other})


def make(layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0, **other: Any) -> SteeringProfile:
    generator = torch.Generator().manual_seed(seed)
    direction, vector = torch.randn(2, layers, hidden, generator=generator)
    values: dict[str, Any] = {
        "model": identity(layers, hidden),
        "direction": direction / direction.norm(dim=1, keepdim=True),
        "threshold": torch.randn(layers, generator=generator),
        "vector": vector,
        "strength": torch.rand(layers, generator=generator) + 0.1,
        "norm": torch.rand(layers, generator=generator),
    }
    return SteeringProfile(**{**values, **other})


def same(one: SteeringProfile, other: SteeringProfile) -> bool:
    for field in fields(SteeringProfile):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("candidates", "points"):
            if a.keys() != b.keys() or not all(torch.equal(a[kind], b[kind]) for kind in a):
                return False
        elif not (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b):
            return False
    return True


# -- named thresholds --------------------------------------------------------------------------------------------------


@pytest.fixture
def pointed() -> SteeringProfile:
    profile = make(abstain=torch.full((LAYERS,), -9.0))
    points = {"strict": profile.threshold - 10, "balanced": profile.threshold.clone(), "permissive": torch.ones(LAYERS)}
    return replace(profile, points=points)


def test_a_profile_is_the_same_at_another_threshold(pointed: SteeringProfile) -> None:
    assert pointed.point == "balanced"
    assert same(pointed.at("balanced"), pointed)
    loose = pointed.at("permissive")
    assert (loose.point, torch.equal(loose.threshold, torch.ones(LAYERS))) == ("permissive", True)
    assert same(replace(loose, threshold=pointed.threshold), pointed)
    assert len({pointed.checksum, loose.checksum, pointed.at("strict").checksum}) == 3
    assert replace(pointed, threshold=pointed.threshold + 1).point is None


def test_the_band_ends_at_the_threshold_or_below(pointed: SteeringProfile) -> None:
    strict, abstain = pointed.at("strict"), pointed.abstain
    assert strict.abstain is not None
    assert abstain is not None
    assert torch.equal(strict.abstain, abstain.minimum(strict.threshold))
    assert (strict.abstain < abstain).any()
    assert make(points={"a": torch.zeros(LAYERS)}).at("a").abstain is None


def test_points_change_neither_bytes_nor_checksum_of_profiles_without(tmp_path: Path, pointed: SteeringProfile) -> None:
    bare = replace(pointed, points={})
    bare.save(tmp_path / "bare.safetensors")
    pointed.save(tmp_path / "pointed.safetensors")
    with safe_open(tmp_path / "bare.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "points" in name]  # noqa: SIM118
    assert bare.checksum != pointed.checksum
    loaded = SteeringProfile.load(tmp_path / "pointed.safetensors")
    assert same(loaded, pointed)
    replace(loaded, points={}).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bare.safetensors").read_bytes()


def test_an_unknown_point_is_told_the_names(pointed: SteeringProfile) -> None:
    with pytest.raises(ProfileError, match=r"^threshold: expected one of balanced, permissive, strict, got 'lax'$"):
        pointed.at("lax")
    with pytest.raises(ProfileError, match=r"^threshold: expected one of none, as this profile has one threshold, got"):
        make().at("strict")


@pytest.mark.parametrize("name", ["", "A", "a b", "a.b", "é", "a" * 33, "a\n", 7, None])
def test_a_point_has_a_plain_name(name: Any) -> None:
    with pytest.raises(ProfileError, match=r"^points: expected names of 1 to 32 of a-z, 0-9, '_' and '-', got "):
        make(points={name: torch.zeros(LAYERS)})


@pytest.mark.parametrize(
    "threshold", [torch.full((LAYERS,), math.nan), torch.zeros(LAYERS + 1), torch.zeros(LAYERS).double(), 0.5]
)
def test_a_point_is_a_finite_threshold_of_each_layer(threshold: Any) -> None:
    with pytest.raises(ProfileError, match=r"^points\['strict'\]: expected "):
        make(points={"strict": threshold})


# -- the file ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


POINTS = st.text("abcz019_-", min_size=1, max_size=32)


@st.composite
def profiles(draw: st.DrawFn) -> SteeringProfile:
    layers, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    steered = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    strength = torch.tensor([0.5 + i if s else 0.0 for i, s in enumerate(steered)])
    first = steered.index(True) if any(steered) else layers - 1
    kinds = draw(st.lists(st.text(min_size=1, max_size=6), max_size=2, unique=True))
    edit: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"edit": "add"},
                {"edit": "ablate"},
                {"edit": "keep_norm"},
                {"edit": "clamp", "low": 0.1},
                {"edit": "clamp", "high": -0.3},
                {"edit": "clamp", "low": 0.1, "high": 0.1},
                {"edit": "rotate", "angle": 33.3},
            ]
        )
    )
    if hidden == 1 and edit["edit"] == "rotate":  # no two vectors span a plane there
        edit = {}
    sketch = draw(st.none() | st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(tuple))
    kind = draw(st.sampled_from(["always", "prompt", "token"]))
    pooling = draw(st.sampled_from(["last", "mean", "both"])) if kind == "prompt" else "last"
    means = torch.nn.functional.normalize(torch.randn(layers, hidden), dim=1)
    return make(
        layers,
        hidden,
        seed=draw(st.integers(0, 99)),
        model=identity(
            layers,
            hidden,
            name=draw(st.text(max_size=10)),
            revision=draw(st.none() | st.just("main")),
            embedding_sketch=sketch,
            tokenizer_sha256=draw(st.none() | st.just("ab" * 32)),
        ),
        strength=strength,
        gate=Gate(
            kind,
            draw(st.sampled_from(["cosine", "dot"])),
            draw(st.floats(0, 100)),
            pooling,
            draw(st.none() | st.integers(1, 500)) if pooling != "last" else None,
            draw(st.lists(st.integers(0, 500), max_size=3).map(tuple)) if pooling != "last" else (),
            draw(st.integers(0, 500)) if pooling != "last" else 0,
        ),
        mean_direction=means if pooling != "last" and draw(st.booleans()) else None,
        abstain=draw(st.sampled_from([None, torch.full((layers,), -9.5), torch.full((layers,), -math.inf)])),
        points={name: torch.randn(layers) for name in draw(st.lists(POINTS, max_size=3, unique=True))},
        **edit,
        sensor=draw(st.sampled_from(["own", *range(first + 1)])),
        positions=draw(st.sampled_from(["all", "response"])),
        answer_tokens=draw(st.none() | st.integers(1, 100)),
        vector_kind=draw(st.text(min_size=1, max_size=6)),
        candidates={kind: torch.randn(layers, hidden) for kind in kinds},
        fitted=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
        calibration=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
        tuned=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    )


@QUICK
@given(profile=profiles())
def test_a_saved_profile_loads_as_it_was(profile: SteeringProfile, tmp_path: Path) -> None:
    file = tmp_path / "profile.safetensors"
    profile.save(file)
    loaded = SteeringProfile.load(file)
    assert same(profile, loaded)
    assert loaded.checksum == profile.checksum
    before = file.read_bytes()
    loaded.save(file)
    again = SteeringProfile.load(file)
    assert same(again, profile)
    assert len(file.read_bytes()) == len(before)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    profile = make()
    zeros = torch.zeros(LAYERS)
    shared = replace(
        profile, vector=profile.direction, candidates={"again": profile.direction}, threshold=zeros, norm=zeros
    )
    shared.save(tmp_path / "p.safetensors")
    assert same(SteeringProfile.load(tmp_path / "p.safetensors"), shared)


def test_layers_without_content_take_no_room(tmp_path: Path) -> None:
    profile = make()
    for tensor in (profile.direction, profile.vector):
        tensor[1:] = 0
    profile = replace(profile, strength=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    profile.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["layer.0.direction", "layer.0.vector", "norm", "strength", "threshold"]
    assert same(SteeringProfile.load(tmp_path / "p.safetensors"), profile)


def test_the_header_is_json_for_other_readers(tmp_path: Path) -> None:
    profile = make(fitted={"direction": "lda", 3: "three"})
    profile.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["steerfast"])
    assert header["format"] == FORMAT_VERSION
    assert header["model"] == json.loads(json.dumps(asdict(profile.model)))
    assert header["fitted"] == {"direction": "lda", "3": "three"}
    assert header["checksum"] == profile.checksum


def test_provenance_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="fitted, calibration, tuned: expected JSON data"):
        make(fitted={"model": object()}).save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[SteeringProfile, bytes]:
    profile = make(
        candidates={"srv": torch.ones(LAYERS, HIDDEN)}, abstain=torch.full((LAYERS,), -9.5), sensor=0,
        fitted={"direction": "lda"},
    )  # fmt: skip
    file = tmp_path_factory.mktemp("intact") / "p.safetensors"
    profile.save(file)
    return profile, file.read_bytes()


def test_every_flipped_byte_is_noticed(intact: tuple[SteeringProfile, bytes], tmp_path: Path) -> None:
    profile, data = intact
    file = tmp_path / "p.safetensors"
    harmless = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= (0x01, 0x02, 0x10, 0x20, 0x80, 0xFF)[position % 6]
        file.write_bytes(damaged)
        try:
            loaded = SteeringProfile.load(file)
        except ProfileError:
            continue
        harmless += 1  # white space between the words of the header
        assert same(loaded, profile)
    assert harmless < 20


def test_every_truncation_is_noticed(intact: tuple[SteeringProfile, bytes], tmp_path: Path) -> None:
    _, data = intact
    file = tmp_path / "p.safetensors"
    for length in [*range(12), *range(12, len(data), 37), len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(ProfileError, match="not a readable safetensors file"):
            SteeringProfile.load(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(ProfileError, match="not a readable safetensors file"):
        SteeringProfile.load(file)


def forge(file: Path, profile: SteeringProfile, header: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
    """A file with other content and the right checksum for it."""
    content: dict[str, Any] = {**profile_file.header(profile), **header}
    content = {name: value for name, value in content.items() if value is not ...}
    held = {name: t for name, t in {**profile_file.tensors(profile), **tensors}.items() if t is not None}
    content["checksum"] = content_checksum(content, held)
    file.write_bytes(save(held, metadata={"steerfast": json.dumps(content)}))


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({}, {"threshold": None}, r"incomplete or malformed \(KeyError\('threshold'\)\)"),
        ({}, {"norm": None}, r"incomplete or malformed \(KeyError\('norm'\)\)"),
        ({}, {"abstain": torch.zeros(3)}, r"abstain: expected shape \[4\], got \[3\]"),
        ({}, {"abstain": torch.full((4,), 9.5)}, "abstain of layer 0: expected at most its threshold, .*, got 9.5"),
        ({}, {"abstain": torch.full((4,), math.nan)}, "abstain: expected finite numbers or -inf, got nan"),
        ({}, {"threshold": torch.zeros(3)}, r"threshold: expected shape \[4\], got \[3\]"),
        ({}, {"threshold": torch.tensor(1.0)}, r"threshold: expected shape \[4\], got \[\]"),
        ({}, {"threshold": torch.zeros(4).double()}, "threshold: expected float32 on the CPU, got torch.float64"),
        ({}, {"layer.1.vector": torch.ones(5)}, r"layer.1.vector: expected shape \[6\], got \[5\]"),
        ({}, {"layer.1.vector": None}, "strength of layer 1: .*, but its vector is zero"),
        ({}, {"layer.0.direction": None}, "direction of layer 0: a prompt gate reads it, but it is zero"),
        ({}, {"layer.2.vector": torch.full((6,), math.nan)}, "layer.2.vector: expected finite numbers, got nan"),
        ({}, {"layer.4.vector": torch.ones(6)}, r"tensor 'layer.4.vector': expected layer\..*, l in 0\.\.3"),
        ({}, {"weights": torch.ones(6)}, "tensor 'weights': expected layer"),
        ({}, {"layer.0.direction": torch.ones(6)}, "direction of layer 0: expected unit norm, got norm 2.449"),
        ({"format": FORMAT_VERSION + 1}, {}, f"format {FORMAT_VERSION + 1}, this version reads format"),
        ({"format": ...}, {}, "not a steerfast profile"),
        ({"gate": ...}, {}, r"incomplete or malformed \(KeyError\('gate'\)\)"),
        ({"gate": {"kind": "sometimes"}}, {}, "gate.kind: expected one of always, prompt, token, got 'sometimes'"),
        ({"gate": {"pooling": "max"}}, {}, "gate.pooling: expected one of last, mean, both, got 'max'"),
        ({"gate": {"pooling": "mean", "window": 1.5}}, {}, "gate.window: expected None or a whole number >= 1"),
        ({"gate": {"colour": 1}}, {}, "incomplete or malformed"),
        ({"model": "tiny"}, {}, "incomplete or malformed"),
        ({"model": {}}, {}, "incomplete or malformed"),
        ({"fitted": 3}, {}, "fitted: expected a mapping, got 3"),
        ({"edit": "clamp", "low": "0"}, {}, "low: expected a number or -inf, got '0'"),
        ({"edit": "rotate"}, {}, "angle: a rotation expects a finite number of degrees, got None"),
        ({"angle": 3}, {}, "angle: only a rotation has one, got 3 for 'add'"),
        ({"sensor": 9}, {}, r"sensor: expected 'own' or a layer in 0..3, got 9"),
    ],
)  # fmt: skip
def test_wrong_content_under_a_right_checksum(
    tmp_path: Path, header: dict[str, Any], tensors: dict[str, Tensor | None], message: str
) -> None:
    file = tmp_path / "p.safetensors"
    forge(file, make(), header, tensors)
    with pytest.raises(ProfileError, match=message) as caught:
        SteeringProfile.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("name", 3),
        ("architecture", None),
        ("hidden_size", "6"),
        ("hidden_size", -6),
        ("num_layers", 0),
        ("num_layers", 2.5),
    ],
)
def test_a_model_that_cannot_be(tmp_path: Path, what: str, wrong: Any) -> None:
    file = tmp_path / "p.safetensors"
    forge(file, make(), {"model": {**asdict(identity()), what: wrong}}, {})
    with pytest.raises(ProfileError, match=rf"model.{what}: expected .*, got {wrong!r}"):
        SteeringProfile.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors file"),
        (b"not a tensor file at all", "not a readable safetensors file"),
        (save({"x": torch.ones(2)}), "a safetensors file, but not a steerfast profile"),
        (save({"x": torch.ones(2)}, metadata={"steerfast": "[1]"}), "but not a steerfast profile"),
        (save({"x": torch.ones(2)}, metadata={"steerfast": "{"}), "its header is not JSON"),
        (save({"x": torch.ones(2)}, metadata={"steerfast": '{"format": 1}'}), "does not match its checksum"),
        (save({"x": torch.ones(2)}, metadata={"steerfast": "[" * 100_000}), "its header is not JSON"),
        (save({"x": torch.ones(2)}, metadata={"steerfast": f'{{"format": {"9" * 5000}}}'}), "its header is not JSON"),
        (
            save({"x": torch.ones(2)}, metadata={"steerfast": f'{{"format": 1, "fitted": {"[" * 100}{"]" * 100}}}'}),
            "expected a header of at most 100 levels, got more",
        ),
    ],
)
def test_another_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "p.safetensors"
    file.write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        SteeringProfile.load(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"expected a file at .*none.safetensors', found none"):
        SteeringProfile.load(tmp_path / "none.safetensors")
    with pytest.raises(ProfileError, match="found a folder"):
        SteeringProfile.load(tmp_path)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    profile = make()
    with pytest.raises(OutputError, match=r"output: cannot write .*p.safetensors' \(No such file or directory\)"):
        profile.save(tmp_path / "missing" / "p.safetensors")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"output: cannot write .* \(Not a directory\)"):
        profile.save(tmp_path / "file" / "p.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"output: cannot write .* \(Is a directory\)"):
        profile.save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, b"data")
        assert os.read(reader, 100) == b"data"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = tmp_path / "p.safetensors"
    old = make()
    old.save(file)

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        make(seed=1).save(file)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    assert same(SteeringProfile.load(file), old)


def test_results_get_the_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", b"data")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert (tmp_path / "x").read_bytes() == b"data"


# -- what a profile accepts --------------------------------------------------------------------------------------------


def spoiled(tensor: Tensor, where: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"direction": p.direction[:3]}, r"direction: expected shape \[4, 6\], got \[3, 6\]"),
        (lambda p: {"vector": p.vector[:, :5]}, r"vector: expected shape \[4, 6\], got \[4, 5\]"),
        (lambda p: {"strength": p.strength[None]}, r"strength: expected shape \[4\], got \[1, 4\]"),
        (lambda p: {"vector": p.vector.double()}, "vector: expected float32 on the CPU, got torch.float64 on cpu"),
        (lambda p: {"norm": p.norm.to("meta")}, "norm: expected float32 on the CPU, got torch.float32 on meta"),
        (lambda p: {"vector": spoiled(p.vector, (2, 3), math.nan)}, r"vector: expected finite .*, got nan at \[2, 3\]"),
        (lambda p: {"threshold": spoiled(p.threshold, (1,), math.inf)}, r"threshold: .*, got inf at \[1\]"),
        (lambda p: {"threshold": spoiled(p.threshold, (1,), -math.inf)}, r"threshold: .*, got -inf at \[1\]"),
        (lambda p: {"abstain": p.threshold[None]}, r"abstain: expected shape \[4\], got \[1, 4\]"),
        (lambda p: {"abstain": p.threshold.double()}, "abstain: expected float32 on the CPU, got torch.float64 on cpu"),
        (lambda p: {"abstain": 0.5}, "abstain: expected a tensor or None, got 0.5"),
        (
            lambda p: {"abstain": spoiled(p.threshold, (2,), math.inf)},
            r"abstain: expected finite numbers or -inf, got inf at \[2\]",
        ),
        (
            lambda p: {"threshold": torch.zeros(4), "abstain": torch.tensor([-1.0, 0.0, 0.25, 9.0])},
            "abstain of layer 2: expected at most its threshold, 0, got 0.25",
        ),
        (lambda p: {"direction": 2 * p.direction}, "direction of layer 0: expected unit norm, got norm 2"),
        (lambda p: {"edit": "erase"}, f"edit: expected one of {', '.join(EDITS)}, got 'erase'"),
        (lambda p: {"edit": "clamp"}, "low, high: a clamp expects at least one limit, got none"),
        (lambda p: {"edit": "clamp", "low": 2.0, "high": 1.5}, "low: expected at most high, 1.5, got 2"),
        (lambda p: {"edit": "clamp", "low": math.inf}, "low: expected a number or -inf, got inf"),
        (lambda p: {"edit": "clamp", "high": -math.inf}, "high: expected a number or inf, got -inf"),
        (lambda p: {"edit": "clamp", "low": math.nan}, "low: expected a number or -inf, got nan"),
        (lambda p: {"edit": "clamp", "high": 1e39}, r"high: expected a number or inf, got 1e\+39"),
        (lambda p: {"edit": "clamp", "low": 10**400}, "low: expected a number or -inf, got 1000"),
        (lambda p: {"edit": "clamp", "high": None}, "high: expected a number or inf, got None"),
        (lambda p: {"edit": "clamp", "low": "0"}, "low: expected a number or -inf, got '0'"),
        (lambda p: {"edit": "clamp", "low": 0.0, "angle": 3.0}, "angle: only a rotation has one, got 3.0 for 'clamp'"),
        (lambda p: {"low": 0.0, "high": 1.0}, r"low, high: only a clamp has limits, got 0\.\.1 for 'add'"),
        (lambda p: {"edit": "rotate"}, "angle: a rotation expects a finite number of degrees, got None"),
        (lambda p: {"edit": "rotate", "angle": math.inf}, "angle: a rotation expects a finite number .*, got inf"),
        (lambda p: {"edit": "rotate", "angle": 9.0, "low": 0.0}, "low, high: only a clamp has limits"),
        (
            lambda p: {"edit": "rotate", "angle": 9.0, "vector": -3 * p.direction},
            "direction of layer 0: a rotation turns in the plane .* at least 1 degree from parallel",
        ),
        (
            lambda p: {"edit": "rotate", "angle": 9.0, "direction": 0 * p.direction, "gate": Gate("always")},
            "direction of layer 0: a rotation turns in the plane",
        ),
        (lambda p: {"positions": "prompt"}, "positions: expected one of all, response, got 'prompt'"),
        (lambda p: {"answer_tokens": 0}, "answer_tokens: expected None or a whole number >= 1, got 0"),
        (lambda p: {"answer_tokens": 2.0}, "answer_tokens: expected None or a whole number >= 1, got 2.0"),
        (lambda p: {"answer_tokens": True}, "answer_tokens: expected None or a whole number >= 1, got True"),
        (lambda p: {"sensor": 4}, r"sensor: expected 'own' or a layer in 0..3, got 4"),
        (lambda p: {"sensor": True}, r"sensor: expected 'own' or a layer in 0..3, got True"),
        (lambda p: {"sensor": "first"}, "sensor: expected 'own' or a layer in 0..3, got 'first'"),
        (
            lambda p: {"sensor": 2, "gate": Gate("token")},
            "sensor: with a token gate layer 2 decides for itself and later layers, but layer 0 before it",
        ),
        (lambda p: {"vector": spoiled(p.vector, (1,), 0.0)}, "strength of layer 1: .*, but its vector is zero"),
        (lambda p: {"direction": spoiled(p.direction, (3,), 0.0)}, "direction of layer 3: a prompt gate reads it"),
        (lambda p: {"vector_kind": None}, "vector_kind: expected a string, got None"),
        (lambda p: {"tuned": [1]}, r"tuned: expected a mapping, got \[1\]"),
        (lambda p: {"candidates": {"srv": p.vector[1:]}}, r"candidates\['srv'\]: expected shape \[4, 6\]"),
    ],
)  # fmt: skip
def test_what_a_profile_refuses(change: Any, message: str) -> None:
    profile = make()
    with pytest.raises(ProfileError, match=message):
        replace(profile, **change(profile))


@pytest.mark.parametrize("sharpness", [-1.0, math.nan, math.inf, 1e39, "1"])
def test_what_a_gate_refuses(sharpness: Any) -> None:
    with pytest.raises(ProfileError, match=r"gate\.sharpness: expected a finite number >= 0"):
        Gate(sharpness=sharpness)
    with pytest.raises(ProfileError, match=r"gate\.score: expected one of cosine, dot, got 'l2'"):
        Gate(score="l2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, r"gate\.pooling: expected one of last, mean, both, got 'max'"),
        ({"pooling": None}, r"gate\.pooling: expected one of last, mean, both, got None"),
        (
            {"kind": "token", "pooling": "mean"},
            r"gate\.pooling: expected 'last' for a gate of kind 'token', got 'mean'",
        ),
        (
            {"kind": "always", "pooling": "mean"},
            r"gate\.pooling: expected 'last' for a gate of kind 'always', got 'mean'",
        ),
        *(
            ({"pooling": "mean", "window": wrong}, r"gate\.window: expected None or a whole number >= 1, got ")
            for wrong in (0, -1, 2.0, "3", True, math.inf)
        ),
        ({"window": 4}, r"gate\.window: expected None where no mean is read, got 4"),
        ({"turn": (4, 5)}, r"gate\.turn: expected \(\) where no mean is read, got \(4, 5\)"),
        ({"tail": 4}, r"gate\.tail: expected 0 where no mean is read, got 4"),
        *(
            ({"pooling": "both", "tail": wrong}, r"gate\.tail: expected a whole number >= 0, got ")
            for wrong in (-1, 2.5, "3", True, None)
        ),
        *(
            ({"pooling": "both", "turn": wrong}, r"gate\.turn: expected token ids, whole numbers >= 0, got ")
            for wrong in ((3, -1), (2.5,), "34", (True,), None, 4, {4, 5})
        ),
    ],
)
def test_what_a_mean_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        Gate(**fields)


def test_a_mean_may_have_a_direction() -> None:
    profile = make()
    unit = torch.nn.functional.normalize(torch.randn_like(profile.direction), dim=1)
    assert torch.equal(profile.read_in_mean, profile.direction)
    for pooling in ("mean", "both"):
        read = replace(profile, gate=Gate(pooling=pooling), mean_direction=unit)  # type: ignore[arg-type]
        assert read.read_in_mean is unit
    with pytest.raises(ProfileError, match="mean_direction: expected None where no mean is read, got a tensor"):
        replace(profile, mean_direction=unit)
    long = unit.clone()
    long[2] *= 3
    with pytest.raises(ProfileError, match=r"mean_direction of layer 2: expected unit norm, got norm 3"):
        replace(profile, gate=Gate(pooling="mean"), mean_direction=long)
    with pytest.raises(ProfileError, match=r"mean_direction of layer 2: expected unit norm or a pair .*, got norm 3"):
        replace(profile, gate=Gate(pooling="both"), mean_direction=long)
    pair = {"direction": 0.6 * profile.direction, "mean_direction": 0.8 * unit}
    assert replace(profile, gate=Gate(pooling="both"), **pair).mean_direction is pair["mean_direction"]
    with pytest.raises(ProfileError, match=r"direction of layer 0: expected unit norm, got norm 0\.6"):
        replace(profile, gate=Gate(pooling="mean"), **pair)
    with pytest.raises(ProfileError, match=r"direction of layer 0: expected unit norm or a pair .*, got norm 0\.6"):
        replace(profile, gate=Gate(pooling="both"), **{**pair, "mean_direction": 0.9 * unit})
    replace(profile, gate=Gate(score="dot", pooling="both"), direction=3 * profile.direction, mean_direction=long)


def test_directions_that_nothing_reads_may_be_zero() -> None:
    profile = make()
    zero = torch.zeros_like(profile.direction)
    assert replace(profile, direction=zero, gate=Gate("always")).gate_layers == []
    sensor = replace(profile, direction=spoiled(profile.direction, (3,), 0.0), sensor=0)
    assert sensor.gate_layers == [0]
    assert replace(profile, direction=zero, strength=torch.zeros(LAYERS)).steered_layers == []


def test_layers_of_gates_and_edits() -> None:
    profile = replace(make(), strength=torch.tensor([0.0, 1.0, 0.0, -2.0]))
    assert profile.steered_layers == [1, 3]
    assert profile.gate_layers == [1, 3]
    assert replace(profile, sensor=1).gate_layers == [1]
    assert replace(profile, sensor=0).gate_layers == [0]
    assert replace(profile, gate=Gate(pooling="mean")).gate_layers == [1, 3]
    assert replace(profile, gate=Gate("token")).gate_layers == [1, 3]
    assert replace(profile, gate=Gate("always")).gate_layers == []


def test_scores_in_the_band_are_undecided_unless_a_gate_opens() -> None:
    profile = make(threshold=torch.full((LAYERS,), 0.5), strength=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    table = torch.tensor(
        [
            [9.0, 0.2, 0.2, 9.0],  # of gates that do not decide nothing counts
            [9.0, 0.3, 0.2, 9.0],  # above the lower end
            [9.0, 0.5, 0.2, 9.0],  # at the threshold
            [9.0, 0.3, 0.6, 9.0],  # another gate opens
            [9.0, 0.3, math.nan, 9.0],  # so does NaN
            [9.0, -math.inf, 0.4, 9.0],
            [9.0, -math.inf, -math.inf, 9.0],
        ]
    )
    band = replace(profile, abstain=torch.full((LAYERS,), 0.2))
    assert band.undecided(table).tolist() == [False, True, True, False, False, True, False]
    assert band.undecided(table[1]).shape == ()
    assert replace(band, sensor=1).undecided(table).tolist() == [False, True, True, True, True, False, False]
    open_below = replace(band, abstain=torch.full((LAYERS,), -math.inf))
    assert open_below.undecided(table).tolist() == [True, True, True, False, False, True, False]
    for without in (
        profile,
        replace(band, abstain=band.threshold),  # an empty band
        replace(band, gate=Gate("always")),
        replace(band, strength=torch.zeros(LAYERS)),
    ):
        assert not without.undecided(table).any()
        assert without.undecided(table).shape == (len(table),)


@pytest.mark.parametrize("degrees", [0.9, 1.1, 179.1, 178.9])
def test_a_rotation_needs_a_plane_where_it_steers(degrees: float) -> None:
    v, d = torch.zeros(LAYERS, HIDDEN), torch.zeros(LAYERS, HIDDEN)
    v[:, 0], d[:, 0], d[:, 1] = 2.0, math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    d[3] = v[3] / 2
    strength = torch.tensor([0.5, 0.5, 0.5, 0.0])
    if 1 < degrees < 179:
        make(vector=v, direction=d, strength=strength, edit="rotate", angle=30)
    else:
        with pytest.raises(ProfileError, match="direction of layer 0: a rotation turns in the plane"):
            make(vector=v, direction=d, strength=strength, edit="rotate", angle=30)


def test_files_name_the_parameters_an_edit_has_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    for edit, says in (
        ({}, {}),
        ({"edit": "ablate"}, {}),
        ({"edit": "clamp", "low": -1.5}, {"low": -1.5, "high": None}),
        ({"edit": "clamp", "low": 2, "high": 2}, {"low": 2, "high": 2}),
        ({"edit": "rotate", "angle": 30.0}, {"angle": 30.0}),
    ):
        profile = make(**edit)
        profile.save(file)
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["steerfast"])
        assert {name: header[name] for name in ("low", "high", "angle") if name in header} == says
        assert header["edit"] == profile.edit
        assert same(SteeringProfile.load(file), profile)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pooling": "last"},
        {"pooling": "mean"},
        {"pooling": "mean", "window": 128},
        {"pooling": "both", "turn": [4, 5], "tail": 3},
    ],
    ids=str,
)
def test_files_say_that_a_gate_reads_a_mean_and_nothing_where_it_does_not(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    """So that a profile that reads a last token has the checksum it had before there were others."""
    file, gate = tmp_path / "p.safetensors", Gate(**fields)
    profile = make(gate=gate)
    profile.save(file)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["steerfast"])
    says = {} if gate.pooling == "last" else fields
    assert header["gate"] == {"kind": "prompt", "score": "cosine", "sharpness": 0.0, **says}
    assert SteeringProfile.load(file).gate == gate
    assert (profile.checksum == make().checksum) == (gate.pooling == "last")


def test_the_shipped_profile_adds_and_keeps_its_checksum() -> None:
    shipped = files("steerfast") / "data" / "smollm2-135m-instruct.safetensors"
    with as_file(shipped) as file:
        profile = SteeringProfile.load(file)
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["steerfast"])
    assert (profile.edit, profile.low, profile.high, profile.angle) == ("add", -math.inf, math.inf, None)
    assert profile.checksum == header["checksum"]
    assert profile.abstain is None
    opened_gate = profile.without_gate()
    assert (opened_gate.gate.kind, opened_gate.mean_direction, opened_gate.gate_layers) == ("always", None, [])
    assert torch.equal(opened_gate.vector, profile.vector)
    assert opened_gate.steered_layers == profile.steered_layers


def test_with_vector_swaps_and_forgets_nothing(tmp_path: Path) -> None:
    srv, other = torch.randn(LAYERS, HIDDEN), torch.randn(LAYERS, HIDDEN)
    profile = make(vector_kind="My vector, v2", candidates={"srv": srv, "other": other})
    swapped = profile.with_vector("srv")
    assert (swapped.vector_kind, sorted(swapped.candidates)) == ("srv", ["My vector, v2", "other"])
    assert torch.equal(swapped.vector, srv)
    assert same(swapped.with_vector("My vector, v2").with_vector("srv"), swapped)
    assert same(swapped.with_vector("My vector, v2"), profile)
    assert profile.with_vector("My vector, v2") is profile
    with pytest.raises(ProfileError, match="vector: expected one of My vector, v2, other, srv, got 'ssv'"):
        profile.with_vector("ssv")
    swapped.save(tmp_path / "p.safetensors")
    assert same(SteeringProfile.load(tmp_path / "p.safetensors"), swapped)


def test_with_band_steers_exactly_its_layers() -> None:
    profile = make()
    assert profile.with_band(range(1, 3), 0.25).strength.tolist() == [0.0, 0.25, 0.25, 0.0]
    assert profile.with_band([3], -1.5).strength.tolist() == [0.0, 0.0, 0.0, -1.5]
    assert profile.with_band([], 1.0).steered_layers == []
    for layer in (-1, 4):
        with pytest.raises(ProfileError, match=rf"layer: expected 0..3, got {layer}"):
            profile.with_band([layer], 1.0)
    with pytest.raises(ProfileError, match="sensor: with a token gate layer 2 decides"):
        replace(profile, strength=torch.zeros(LAYERS), sensor=2, gate=Gate("token")).with_band([1], 1.0)


def test_second_pass_is_for_layers_before_a_sensor_of_prompts() -> None:
    profile = make().with_band([1, 2], 1.0)
    assert not profile.second_pass
    assert [replace(profile, sensor=sensor).second_pass for sensor in range(LAYERS)] == [False, False, True, True]
    assert not replace(profile, sensor=3, gate=Gate("always")).second_pass


def test_the_checksum_tells_profiles_apart() -> None:
    profile = make()
    assert profile.checksum == make().checksum
    others = [make(seed=1), profile.with_band([1], 0.5), replace(profile, positions="response"),
              replace(profile, fitted={"a": 1}), replace(profile, candidates={"srv": profile.vector}),
              replace(profile, abstain=profile.threshold), replace(profile, abstain=profile.threshold - 1),
              replace(profile, edit="ablate"), replace(profile, edit="clamp", low=0.0),
              replace(profile, edit="clamp", low=0.5), replace(profile, edit="clamp", high=0.5),
              replace(profile, edit="rotate", angle=3.0), replace(profile, edit="rotate", angle=4.0),
              replace(profile, gate=Gate(pooling="mean")), replace(profile, gate=Gate(pooling="mean", window=1)),
              replace(profile, gate=Gate(pooling="mean", window=2))]  # fmt: skip
    assert len({other.checksum for other in [profile, *others]}) == 1 + len(others)


# -- whose profile it is -----------------------------------------------------------------------------------------------


def test_identities() -> None:
    sketch = (0.6, 0.8, 0.0)
    mine = identity(embedding_sketch=sketch, tokenizer_sha256="aa", chat_template_sha256="cc")
    assert mine.mismatch(mine) is None
    assert mine.mismatch(replace(mine, name="renamed", revision="other")) is None
    assert mine.mismatch(replace(mine, embedding_sketch=(0.61, 0.79, 0.01))) is None
    assert mine.mismatch(replace(mine, embedding_sketch=None, tokenizer_sha256=None)) is None
    for change, says in [
        ({"hidden_size": 8}, r"for 'tiny' \(hidden size 6\), the model is 'other' \(hidden size 8\)"),
        ({"num_layers": 2}, r"\(layers 4\), the model is 'other' \(layers 2\)"),
        ({"architecture": "gpt2"}, r"\(architecture llama\), the model is 'other' \(architecture gpt2\)"),
        ({"embedding_sketch": (0.8, -0.6, 0.0)}, "other weights: their embeddings agree to 0.00, expected at least 0"),
        ({"embedding_sketch": (0.6, 0.8)}, "with other weights"),
        ({"embedding_sketch": (math.nan, 0.8, 0.0)}, "with other weights"),
        ({"tokenizer_sha256": "bb"}, r"\(tokenizer hash aa\), the model is 'other' \(tokenizer hash bb\)"),
        ({"chat_template_sha256": "dd"}, r"\(chat template hash cc\), the model is 'other' \(chat template hash dd\)"),
    ]:  # fmt: skip
        problem = mine.mismatch(replace(mine, name="other", **change))
        assert problem is not None
        assert re.search(says, problem), problem


def test_a_repr_is_one_short_line(pointed: SteeringProfile) -> None:
    text = repr(replace(pointed, model=replace(pointed.model, name="a\x1b[2Jb"), vector_kind="c\nd"))
    assert len(text) < 150
    assert text.isprintable()

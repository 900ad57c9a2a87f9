"""Files in the layouts of other projects, made here by hand, are read; files written here hold what those expect."""

from __future__ import annotations

import base64
import json
import pickle
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import steerfast
from steerfast import formats
from steerfast.errors import OutputError, ProfileError
from steerfast.formats.base import Imported
from steerfast.formats.gguf import build, parse
from steerfast.profile import Gate, ModelIdentity, SteeringProfile

LAYERS, HIDDEN = 6, 16
WRITTEN = {
    "gguf": "v.gguf",
    "easysteer": "e.gguf",
    "hotwire": "v.pt",
    "vllm-lens": "l.json",
    "svec": "v.svec",
    "rotalabs": "folder",
    "rhizonymph": "r.json",
}


def edits(profile: SteeringProfile) -> dict[int, Tensor]:
    """What is added to the output of each steered block."""
    return {layer: profile.vector[layer] * profile.strength[layer] for layer in profile.steered_layers}


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    assert one.keys() == other.keys()
    for layer in one:
        assert torch.equal(one[layer], other[layer]), layer


def vectors(count: int = 3, seed: int = 1) -> dict[int, Tensor]:
    """Vectors of blocks 1, 2, ..."""
    rows = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return {layer + 1: row for layer, row in enumerate(rows)}


def imported(found: Imported, identity: ModelIdentity, **options: Any) -> SteeringProfile:
    return found.profile(identity, **options)[0]


# ---- what is written is read back, and says what was lost ----------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_round_trip(name: str, profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path) -> None:
    path = tmp_path / WRITTEN[name]
    notes = formats.write(profile, path, name)
    assert any("gate is lost" in note for note in notes)
    assert formats.detect(path) == name
    found = formats.read(path)
    assert found.notes[0] == f"read as {name}"
    layers = profile.steered_layers if name in ("hotwire", "svec") else None  # these two name layers when they steer
    back = imported(found, identity, layers=layers)
    same(edits(back), edits(profile))
    assert back.gate == Gate("always")
    assert back.fitted["notes"][: len(found.notes)] == list(found.notes)
    back.save(tmp_path / "back.safetensors")
    same(edits(SteeringProfile.load(tmp_path / "back.safetensors")), edits(profile))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([WRITTEN[name], "back.safetensors"])


def test_what_is_lost_is_said(profile: SteeringProfile, tmp_path: Path) -> None:
    rich = replace(
        profile,
        edit="keep_norm",
        positions="response",
        answer_tokens=24,
        candidates={"srv": profile.vector},
        abstain=profile.threshold,
    )
    notes = "\n".join(formats.write(rich, tmp_path / "v.gguf", "gguf"))
    lost = ("the gate", "the abstain band", "keep_norm", "answer_tokens")
    for word in (*(f"{what} is lost" for what in lost), "positions are lost", "candidate vectors are lost: srv"):
        assert word in notes
    plain = replace(profile, gate=Gate("always"), abstain=profile.threshold)
    assert "lost" not in "\n".join(formats.write(plain, tmp_path / "w.gguf", "gguf"))


def test_a_profile_that_steers_nothing_is_written_as_it_is(
    profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path
) -> None:
    idle = replace(profile, strength=torch.zeros(LAYERS))
    notes = formats.write(idle, tmp_path / "v.json", "rhizonymph")
    assert any("no layer of the profile is steered" in note for note in notes)
    assert torch.equal(imported(formats.read(tmp_path / "v.json"), identity).vector, profile.vector)


def test_other_edits_than_adding_are_not_written(profile: SteeringProfile, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="edit: expected 'add', which the format's vectors mean, got 'ablate'"):
        formats.write(replace(profile, edit="ablate"), tmp_path / "v.gguf", "gguf")
    empty = replace(profile, vector=torch.zeros(LAYERS, HIDDEN), strength=torch.zeros(LAYERS))
    with pytest.raises(ProfileError, match="vector: the profile has none"):
        formats.write(empty, tmp_path / "v.gguf", "gguf")
    with pytest.raises(ProfileError, match="steering-vectors files are pickles and only read"):
        formats.write(profile, tmp_path / "v.pkl", "steering-vectors")
    with pytest.raises(ProfileError, match="expected one of glp, easysteer"):
        formats.write(profile, tmp_path / "v.gguf", "nothing")
    assert not list(tmp_path.iterdir())


def test_a_strength_that_overflows_is_refused(profile: SteeringProfile, tmp_path: Path) -> None:
    strong = replace(profile, strength=torch.tensor([0, 3e38, 0, 0, 0, 0]))
    with pytest.raises(ProfileError, match="vector of layer 1: times its strength it exceeds float32"):
        formats.write(strong, tmp_path / "v.gguf", "gguf")


def test_a_folder_appears_whole_or_not_at_all(
    profile: SteeringProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="expected a folder that is not there yet"):
        formats.write(profile, tmp_path / "there", "rotalabs")
    with pytest.raises(OutputError, match="cannot write"):
        formats.write(profile, tmp_path / "no" / "folder", "rotalabs")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        formats.write(profile, tmp_path / "folder", "rotalabs")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_the_documentation_lists_every_format() -> None:
    text = (Path(steerfast.__file__).parents[1] / "docs" / "formats.md").read_text()
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert rows.keys() == formats.FORMATS.keys()
    for known in formats.FORMATS.values():
        assert f"| {known.layers} |" in rows[known.name]
        assert all(f"`{ending}`" in rows[known.name] for ending in known.endings)
        assert ("never" in rows[known.name]) == (known.encode is None)


def test_the_command_names_every_format() -> None:
    from steerfast.cli import convert

    assert set(convert._formats()) - {"steerfast"} == formats.FORMATS.keys()
    assert set(convert._formats(written=True)) - {"steerfast"} == {
        n for n, known in formats.FORMATS.items() if known.encode
    }


# ---- imports -------------------------------------------------------------------------------------


def test_layers_and_strength_in_place_of_the_files(identity: ModelIdentity) -> None:
    found = Imported(vectors(), {1: 0.5, 2: 2.0})
    assert imported(found, identity).strength.tolist() == [0, 0.5, 2, 0, 0, 0]
    assert imported(found, identity, layers=[2, 3]).strength.tolist() == [0, 0, 2, 1, 0, 0]
    assert imported(found, identity, strength=3.0).strength.tolist() == [0, 3, 3, 0, 0, 0]
    assert imported(found, identity, shift=1).strength.tolist() == [0, 0, 0.5, 2, 0, 0]
    assert torch.equal(imported(found, identity, shift=1).vector[2], vectors()[1])


def test_a_file_that_steers_nothing_says_so(identity: ModelIdentity) -> None:
    profile, notes = Imported(vectors()).profile(identity)
    assert profile.steered_layers == []
    assert any("no layer is steered yet" in note for note in notes)


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        (Imported({6: torch.ones(HIDDEN)}), {}, r"vector of layer 6: expected a layer in 0..5 for 'tiny', got 6"),
        (Imported({0: torch.ones(HIDDEN)}), {"shift": -2}, r"vector of layer -2: expected a layer in 0..5"),
        (Imported({1: torch.ones(8)}), {}, "vector of layer 1: expected 16 numbers for 'tiny', got 8"),
        (Imported(vectors()), {"layers": [2, 5]}, r"layers: expected some of \[1, 2, 3\], which the file has, got 5"),
        (Imported({}, anywhere=torch.ones(HIDDEN)), {}, "the file gives its vector no layer"),
        (Imported(vectors(), {1: 1e39}), {}, "strength: expected finite numbers"),
    ],
)
def test_what_does_not_fit_the_model(
    found: Imported, options: dict[str, Any], message: str, identity: ModelIdentity
) -> None:
    with pytest.raises(ProfileError, match=message):
        found.profile(identity, **options)


def test_another_architecture_is_noted(identity: ModelIdentity) -> None:
    _, notes = Imported(vectors(), hint="qwen2").profile(identity)
    assert "the file says it is for a 'qwen2' model, 'tiny' is 'llama'" in notes


def test_the_gate_of_a_profile_is_taken_over(profile: SteeringProfile, identity: ModelIdentity) -> None:
    profile = replace(profile, abstain=profile.threshold - 1)
    made = imported(Imported(vectors(), {3: 1.0}), identity, gate=profile)
    assert (made.gate, made.sensor) == (profile.gate, 2)
    assert made.abstain is profile.abstain
    assert torch.equal(made.direction, profile.direction)
    assert torch.equal(made.threshold, profile.threshold)
    with pytest.raises(ProfileError, match="gate: the profile was made for 'tiny' "):
        imported(Imported(vectors()), replace(identity, architecture="qwen2"), gate=profile)


EDITS = [
    {"edit": "keep_norm"},
    {"edit": "ablate"},
    {"edit": "clamp", "low": -0.5, "high": 0.25},
    {"edit": "rotate", "angle": 40.0},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit["edit"])
@pytest.mark.parametrize("gate", [{}, {"gate_kind": "token", "sharpness": 8.0}, {"gate_kind": "always"}])
def test_an_import_steers_by_any_edit_and_gate(edit: Any, gate: Any, make_profile: Any, tiny_llama: Any) -> None:
    like = make_profile(tiny_llama, layers=[1, 2], sensor=1, threshold=-1.0)
    found = Imported({layer: like.vector[layer] for layer in (1, 2)}, {1: 1.0, 2: 1.0})
    made = imported(found, like.model, gate=like, **edit, **gate)
    kind = gate.get("gate_kind", like.gate.kind)
    expected = replace(
        imported(found, like.model, gate=like),
        **edit,
        gate=Gate("always")
        if kind == "always"
        else replace(like.gate, kind=kind, sharpness=gate.get("sharpness", 0.0)),
    )
    assert (made.edit, made.low, made.high, made.angle) == (expected.edit, expected.low, expected.high, expected.angle)
    assert made.gate == expected.gate
    ids = torch.tensor([[1, 5, 9, 2]])
    logits = []
    with torch.no_grad():
        for profile in (made, expected):
            with steerfast.steer(tiny_llama, profile):
                logits.append(tiny_llama(ids).logits)
        assert torch.equal(*logits)
        assert not torch.allclose(tiny_llama(ids).logits, logits[0], atol=1e-4)


def test_edits_and_gates_of_imports_fit_together(profile: SteeringProfile, identity: ModelIdentity) -> None:
    found = Imported(vectors(), {1: 0.5, 2: 2.0})
    made, notes = found.profile(identity, edit="ablate")
    assert made.strength.tolist() == [0, 1, 1, 0, 0, 0]
    assert any("strengths are left out" in note for note in notes)
    assert imported(found, identity, edit="ablate", strength=0.5).strength.tolist() == [0, 0.5, 0.5, 0, 0, 0]
    band = replace(profile, abstain=profile.threshold - 0.1, calibration={"rate": 0.02})
    made, notes = found.profile(identity, gate=band, gate_kind="always")
    assert (made.abstain, made.calibration) == (None, {})
    assert any("abstain band is left out" in note for note in notes)
    for options, message in (
        ({"gate_kind": "token"}, "gate_kind: expected a gate with it, got 'token'"),
        ({"sharpness": 1.0}, "sharpness: expected a gate with it"),
        ({"gate": profile, "gate_kind": "always", "sharpness": 1.0}, "sharpness: expected a gate with it"),
        ({"edit": "melt"}, "edit: expected one of"),
        ({"edit": "clamp"}, "low, high: a clamp expects at least one limit"),
        ({"low": 1.0}, "only a clamp has limits"),
        ({"edit": "rotate"}, "angle: a rotation expects"),
        ({"edit": "rotate", "angle": 10.0}, "direction of layer 1: a rotation turns"),
        ({"gate": profile, "gate_kind": "sometimes"}, "gate.kind: expected one of"),
    ):
        with pytest.raises(ProfileError, match=message):
            found.profile(identity, **options)


# ---- GGUF ----------------------------------------------------------------------------------------


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_file(tmp_path / "v.gguf", vectors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ProfileError, match=r"pip install steerfast\[gguf\]"):
        formats.read(path)


def gguf_file(path: Path, rows: dict[int, Tensor], *, signed: bool = False, **values: str) -> Path:
    """A control vector as the gguf package writes it for repeng and others."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    (writer.add_int32 if signed else writer.add_uint32)("controlvector.layer_count", len(rows))
    writer.add_array("controlvector.some", [1, 2, 3])
    writer.add_array("controlvector.more", ["a", "b"])
    for name, value in values.items():
        writer.add_string(f"controlvector.{name}", value)
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_read(identity: ModelIdentity, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "v.gguf", vectors())
    assert formats.detect(path) == "gguf"
    found = formats.read(path)
    same(edits(imported(found, identity)), vectors())
    assert found.hint == "llama"
    assert "layers: direction.N edits the output of 0-based block N" in found.notes


def test_gguf_of_cvector_generator_says_where_it_was_measured(identity: ModelIdentity, tmp_path: Path) -> None:
    found = formats.read(gguf_file(tmp_path / "v.gguf", vectors(), signed=True))
    assert any("cvector-generator" in note for note in found.notes)
    same(edits(imported(found, identity, shift=-1)), {layer - 1: row for layer, row in vectors().items()})


def test_easysteer_has_a_block_0_and_a_component(identity: ModelIdentity, tmp_path: Path) -> None:
    rows = {layer - 1: row for layer, row in vectors().items()}
    path = gguf_file(tmp_path / "v.gguf", rows, method="diffmean")
    assert formats.detect(path) == "easysteer"
    same(edits(imported(formats.read(path), identity)), rows)
    heads = json.dumps({"version": 1, "component": "attention_heads", "metadata": None})
    path = gguf_file(tmp_path / "w.gguf", rows, method="diffmean", easysteer=heads)
    with pytest.raises(ProfileError, match="component: expected vectors of hidden_states, got 'attention_heads'"):
        formats.read(path)


@pytest.mark.parametrize("name", ["gguf", "easysteer"])
def test_written_gguf_is_what_llama_cpp_takes(name: str, profile: SteeringProfile, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    formats.write(profile, tmp_path / "v.gguf", name)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    count = reader.get_field("controlvector.layer_count")
    assert (count.contents(), count.types) == (3, [gguf.GGUFValueType.UINT32])
    assert "0-based block N" in reader.get_field("steerfast.layer_numbering").contents()
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert {tuple(tensor.shape) for tensor in reader.tensors} == {(HIDDEN,)}
    found = {int(tensor.name.removeprefix("direction.")): torch.tensor(tensor.data) for tensor in reader.tensors}
    same(found, edits(profile))


def test_block_0_goes_to_easysteer_only(profile: SteeringProfile, tmp_path: Path) -> None:
    low = replace(profile, sensor=0, strength=torch.tensor([1.0, 1, 0, 0, 0, 0]))
    notes = formats.write(low, tmp_path / "v.gguf", "gguf")
    assert any("block 0 is left out" in note for note in notes)
    assert list(parse(tmp_path / "v.gguf")[1]) == ["direction.1"]
    formats.write(low, tmp_path / "e.gguf", "easysteer")
    assert list(parse(tmp_path / "e.gguf")[1]) == ["direction.0", "direction.1"]
    with pytest.raises(ProfileError, match=r"llama\.cpp cannot steer block 0"):
        formats.write(low.with_band([0], 1.0), tmp_path / "w.gguf", "gguf")


@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_gguf_of_any_length_is_aligned(length: int, tmp_path: Path) -> None:
    rows = {f"direction.{layer}": np.random.default_rng(layer).normal(size=length).astype("f4") for layer in (1, 2, 3)}
    (tmp_path / "v.gguf").write_bytes(build({"a": "text", "b": 7}, rows))
    fields, tensors = parse(tmp_path / "v.gguf")
    assert [(fields[name].contents(), int(fields[name].types[0])) for name in "ab"] == [("text", 8), (7, 4)]
    assert all(np.array_equal(tensors[name].numpy(), row) for name, row in rows.items())


# ---- torch files ---------------------------------------------------------------------------------


def test_hotwire_rows_wait_for_layers(identity: ModelIdentity, tmp_path: Path) -> None:
    rows = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(2))
    torch.save({"v": rows.bfloat16()}, tmp_path / "v.pt")
    found = formats.read(tmp_path / "v.pt")
    assert imported(found, identity).steered_layers == []
    same(edits(imported(found, identity, layers=[3], strength=2.0)), {3: 2 * rows[3].bfloat16().float()})


def test_hotwire_single_row_goes_where_it_is_told(identity: ModelIdentity, tmp_path: Path) -> None:
    row = torch.arange(1.0, HIDDEN + 1)
    torch.save(row, tmp_path / "v.pt")
    found = formats.read(tmp_path / "v.pt")
    same(edits(imported(found, identity, layers=[0, 5])), {0: row, 5: row})


def test_hotwire_gets_a_row_for_every_layer(profile: SteeringProfile, tmp_path: Path) -> None:
    notes = formats.write(profile, tmp_path / "v.pt", "hotwire")
    rows = torch.load(tmp_path / "v.pt", weights_only=True)
    assert (rows.shape, rows.dtype) == ((LAYERS, HIDDEN), torch.float32)
    same({layer: rows[layer] for layer in range(LAYERS) if rows[layer].any()}, edits(profile))
    assert any('{"id": "NAME", "layer": 4, "scale": 1.0}' in note for note in notes)


def test_rotalabs_folder_pair_and_single_files(identity: ModelIdentity, tmp_path: Path) -> None:
    for layer, row in vectors().items():
        about = {"behavior": "refusal", "layer_index": layer, "model_name": "m", "vector_shape": [HIDDEN]}
        (tmp_path / f"layer_{layer}.json").write_text(json.dumps(about))
        torch.save(row, tmp_path / f"layer_{layer}.pt")
    assert formats.detect(tmp_path) == "rotalabs"
    same(edits(imported(formats.read(tmp_path), identity)), vectors())
    for name in ("layer_2.pt", "layer_2.json"):
        assert formats.detect(tmp_path / name) == "rotalabs"
        same(edits(imported(formats.read(tmp_path / name), identity)), {2: vectors()[2]})


def test_rotalabs_gets_pairs_and_a_list_of_them(profile: SteeringProfile, tmp_path: Path) -> None:
    formats.write(profile, tmp_path / "set", "rotalabs")
    about = json.loads((tmp_path / "set" / "metadata.json").read_text())
    assert about == {"behavior": "ssv", "layers": [1, 2, 4], "model_name": "tiny"}
    for layer, row in edits(profile).items():
        assert torch.equal(torch.load(tmp_path / "set" / f"layer_{layer}.pt", weights_only=True), row)
        about = json.loads((tmp_path / "set" / f"layer_{layer}.json").read_text())
        assert (about["layer_index"], about["vector_shape"], about["metadata"]) == (layer, [HIDDEN], {})


@pytest.fixture
def steering_vectors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class that pickles as the one of steering-vectors does."""

    @dataclass
    class SteeringVector:
        layer_activations: dict[int, Tensor]
        layer_type: str = "decoder_block"

    module = types.ModuleType("steering_vectors.steering_vector")
    SteeringVector.__module__, SteeringVector.__qualname__ = module.__name__, "SteeringVector"
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return SteeringVector


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_steering_vectors_pickles_are_read(
    protocol: int, steering_vectors: Any, identity: ModelIdentity, tmp_path: Path
) -> None:
    rows = vectors() | {4: torch.ones(1, HIDDEN).half()}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(steering_vectors(rows), protocol=protocol))
    assert formats.detect(tmp_path / "v.pkl") == "steering-vectors"
    same(edits(imported(formats.read(tmp_path / "v.pkl"), identity)), vectors() | {4: torch.ones(HIDDEN)})


def test_steering_vectors_saved_by_torch_are_read(
    steering_vectors: Any, identity: ModelIdentity, tmp_path: Path
) -> None:
    torch.save(steering_vectors(vectors()), tmp_path / "v.pt")
    assert formats.detect(tmp_path / "v.pt") == "steering-vectors"
    same(edits(imported(formats.read(tmp_path / "v.pt"), identity)), vectors())
    torch.save(steering_vectors(vectors(), "mlp"), tmp_path / "v.pt")
    with pytest.raises(ProfileError, match=r"layer_type: expected 'decoder_block'.*got 'mlp'"):
        formats.read(tmp_path / "v.pt")
    known = torch.serialization.get_safe_globals()
    assert not any("steering_vectors" in str(entry) for entry in known)


# ---- JSON files ----------------------------------------------------------------------------------


def lens(rows: Tensor, layers: list[int], *, compressed: bool = False, **fields: Any) -> dict[str, Any]:
    """A SteeringVector of vllm-lens."""
    stored = rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
    raw = stored.numpy().tobytes()
    tensor: dict[str, Any] = {"dtype": str(stored.dtype).removeprefix("torch."), "shape": list(rows.shape)}
    if compressed:
        raw = pytest.importorskip("zstandard").ZstdCompressor(level=1).compress(raw)
        tensor |= {"original_dtype": str(rows.dtype), "compression": "zstd"}
    tensor["data"] = base64.b64encode(raw).decode()
    return {"activations": tensor, "layer_indices": layers, "scale": 1.0, "norm_match": False, **fields}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vllm_lens_compressed(dtype: torch.dtype, identity: ModelIdentity, tmp_path: Path) -> None:
    rows = torch.stack(list(vectors().values())).to(dtype)
    (tmp_path / "v.json").write_text(json.dumps(lens(rows, [1, 2, 3], compressed=True, scale=0.5)))
    found = imported(formats.read(tmp_path / "v.json"), identity)
    same(edits(found), {layer: 0.5 * rows[layer - 1].float() for layer in (1, 2, 3)})


def test_vllm_lens_needs_no_zstandard_where_nothing_is_compressed(
    identity: ModelIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.stack(list(vectors().values()))
    compressed = json.dumps(lens(rows, [1, 2, 3], compressed=True))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "v.json").write_text(json.dumps(lens(rows, [1, 2, 3])))
    same(edits(imported(formats.read(tmp_path / "v.json"), identity)), vectors())
    (tmp_path / "v.json").write_text(compressed)
    with pytest.raises(ProfileError, match=r"expected the package zstandard, found none \(pip install zstandard\)"):
        formats.read(tmp_path / "v.json")


def test_vllm_lens_vectors_of_one_layer_add_up(identity: ModelIdentity, tmp_path: Path) -> None:
    one, other = vectors()[1], vectors(seed=2)[1]
    entries = [lens(one[None], [4], scale=2.0), lens(other[None], [4], scale=-1.0)]
    (tmp_path / "v.json").write_text(json.dumps(entries))
    same(edits(imported(formats.read(tmp_path / "v.json"), identity)), {4: 2 * one - other})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_match", True, "norm_match: it scales with every row"),
        ("position_indices", [0, 1], "position_indices: a profile steers whole sequences"),
        ("mode", "replace", "mode: expected 'add', got 'replace'"),
    ],
)
def test_what_a_vllm_lens_vector_does_beside_adding_is_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "v.json").write_text(json.dumps(lens(torch.ones(1, HIDDEN), [4], **{field: value})))
    with pytest.raises(ProfileError, match=message):
        formats.read(tmp_path / "v.json")


def test_vllm_lens_gets_raw_float32(profile: SteeringProfile, tmp_path: Path) -> None:
    formats.write(profile, tmp_path / "v.json", "vllm-lens")
    found = json.loads((tmp_path / "v.json").read_text())
    tensor = found.pop("activations")
    assert found == {"layer_indices": [1, 2, 4], "scale": 1.0, "norm_match": False, "position_indices": None}
    raw = np.frombuffer(base64.b64decode(tensor["data"]), tensor["dtype"]).reshape(tensor["shape"])
    assert "compression" not in tensor
    same(dict(zip([1, 2, 4], torch.tensor(raw), strict=True)), edits(profile))


def svec(path: Path, directions: dict[Any, Any], **fields: Any) -> Path:
    path.write_text(json.dumps({"model_type": "llama", "directions": directions, "explained_variances": {}, **fields}))
    return path


def test_svec_counts_inputs(identity: ModelIdentity, tmp_path: Path) -> None:
    rows = {layer - 1: row.tolist() for layer, row in vectors().items()}  # 0, 1, 2
    found = formats.read(svec(tmp_path / "v.svec", rows))
    assert formats.detect(tmp_path / "v.svec") == "svec"
    profile, notes = found.profile(identity, layers=[0, 1])
    same(edits(profile), {0: vectors()[2], 1: vectors()[3]})
    assert any("the vector of the embeddings is left out" in note for note in notes)
    assert any("input of 0-based block L" in note for note in notes)


def test_svec_has_no_place_for_the_last_block(profile: SteeringProfile, tmp_path: Path) -> None:
    notes = formats.write(profile.with_band([4, 5], 1.0), tmp_path / "v.svec", "svec")
    assert list(json.loads((tmp_path / "v.svec").read_text())["directions"]) == ["5"]
    assert any("block 5 is left out" in note for note in notes)
    assert any("behavior_layer_ids=[5]" in note for note in notes)
    with pytest.raises(ProfileError, match="expected a vector before the last block, 5"):
        formats.write(profile.with_band([5], 1.0), tmp_path / "w.svec", "svec")


def test_condition_files_become_gates_and_back(
    profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path
) -> None:
    notes = formats.write(profile, tmp_path / "v.svec", "svec", condition=tmp_path / "c.svec")
    assert any("condition_layer_ids=[3], condition_vector_threshold=0.25" in note for note in notes)
    assert not any("is lost" in note for note in notes)
    band = replace(profile, abstain=profile.threshold)
    notes = formats.write(band, tmp_path / "b.svec", "svec", condition=tmp_path / "d.svec")
    assert any("abstain band is lost" in note for note in notes)
    condition = formats.condition_of(formats.read(tmp_path / "c.svec"), 2, 0.25, identity)
    back = imported(formats.read(tmp_path / "v.svec"), identity, layers=[1, 2, 4], gate=condition)
    assert (back.gate, back.sensor, float(back.threshold[2])) == (profile.gate, 2, 0.25)
    assert torch.allclose(back.direction[2], profile.direction[2], atol=1e-6)
    same(edits(back), edits(profile))
    below = imported(formats.read(tmp_path / "v.svec"), identity, gate=condition.below())
    assert torch.equal(below.direction[2], -back.direction[2])
    assert float(below.threshold[2]) == -0.25
    with pytest.raises(ProfileError, match=r"condition: expected one of layers \[2\].*got 3"):
        formats.condition_of(formats.read(tmp_path / "c.svec"), 3, 0.25, identity)


@pytest.mark.parametrize(
    "gate", [Gate(pooling="both"), Gate(pooling="mean", turn=(4, 5)), Gate(pooling="mean", tail=2)], ids=str
)
def test_a_condition_that_the_format_cannot_say(profile: SteeringProfile, tmp_path: Path, gate: Gate) -> None:
    with pytest.raises(ProfileError, match="condition: expected a gate that reads the last row or a mean of all rows"):
        formats.write(replace(profile, gate=gate), tmp_path / "v.svec", "svec", condition=tmp_path / "c.svec")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gate", [Gate(), Gate(pooling="mean"), Gate(pooling="mean", window=8)], ids=str)
def test_a_condition_says_which_tokens_it_reads(profile: SteeringProfile, tmp_path: Path, gate: Gate) -> None:
    notes = formats.write(replace(profile, gate=gate), tmp_path / "v.svec", "svec", condition=tmp_path / "c.svec")
    assert sum(f"condition_threshold_comparison_mode='{gate.pooling}'" in note for note in notes) == 1
    (compares,) = [note for note in notes if "compares absolute cosines" in note]
    assert ("of the mean row of all tokens" in compares) == (gate.pooling == "mean")


def test_only_cosine_gates_become_conditions(profile: SteeringProfile, tmp_path: Path) -> None:
    for gate in (Gate("always"), Gate("prompt", "dot")):
        with pytest.raises(ProfileError, match="condition: expected a gate that reads cosines"):
            formats.write(replace(profile, gate=gate), tmp_path / "v.svec", "svec", condition=tmp_path / "c.svec")
    with pytest.raises(ProfileError, match="condition: only svec has files for it, got gguf"):
        formats.write(profile, tmp_path / "v.gguf", "gguf", condition=tmp_path / "c.svec")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hook", ["post_block", "post_mlp"])
@pytest.mark.parametrize("packed", [False, True])
def test_rhizonymph_modules(hook: str, packed: bool, identity: ModelIdentity, tmp_path: Path) -> None:
    rows = vectors()
    listed = {"1": rows[1].tolist(), "2": {"vector": rows[2].tolist(), "scale": 0.5}}
    blob = {
        "dtype": "float64",
        "shape": [2, HIDDEN],
        "layer_indices": [1, 2],
        "data": base64.b64encode(torch.stack([rows[1], rows[2]]).double().numpy().tobytes()).decode(),
        "scales": [1.0, 0.5],
    }
    module = {"vectors": {hook: blob if packed else listed}, "prefill_vectors": None}
    (tmp_path / "m.json").write_text(json.dumps(module))
    assert formats.detect(tmp_path / "m.json") == "rhizonymph"
    found = imported(formats.read(tmp_path / "m.json"), identity)
    same(edits(found), {1: rows[1], 2: 0.5 * rows[2]})
    assert found.positions == "all"


def test_rhizonymph_tiers(identity: ModelIdentity, tmp_path: Path) -> None:
    tier = {"post_block": {"1": [1.0] * HIDDEN}}
    (tmp_path / "m.json").write_text(json.dumps({"decode_vectors": tier}))
    assert imported(formats.read(tmp_path / "m.json"), identity).positions == "response"
    for module, message in (
        ({"vectors": tier, "decode_vectors": tier}, "expected vectors or decode_vectors alone"),
        ({"prefill_vectors": tier}, "got prefill_vectors"),
        ({"vectors": {"pre_attn": {}}}, r"expected post_block or post_mlp, got \['pre_attn'\]"),
        ({"vectors": {**tier, "pre_attn": tier["post_block"]}}, "expected post_block or post_mlp"),
        ({"vectors": tier, "clamps": {"post_block": {}}}, "expected a module of vectors, got clamps"),
        ({"vectors": tier, "kind": "sae_delta"}, "kind: expected 'additive', got 'sae_delta'"),
    ):
        (tmp_path / "m.json").write_text(json.dumps(module))
        with pytest.raises(ProfileError, match=message):
            formats.read(tmp_path / "m.json")


def test_rhizonymph_gets_one_packed_hook(profile: SteeringProfile, tmp_path: Path) -> None:
    formats.write(profile, tmp_path / "m.json", "rhizonymph")
    blob = json.loads((tmp_path / "m.json").read_text())["vectors"]["post_block"]
    raw = np.frombuffer(base64.b64decode(blob["data"]), blob["dtype"]).reshape(blob["shape"])
    same(dict(zip(blob["layer_indices"], torch.tensor(raw), strict=True)), edits(profile))


# ---- layer numbers, by running a model -----------------------------------------------------------


@pytest.mark.parametrize(("name", "place"), [("gguf", "output"), ("rhizonymph", "output"), ("svec", "input")])
def test_imports_edit_what_their_projects_edit(name: str, place: str, tiny_llama: Any, tmp_path: Path) -> None:
    """Steering with an import equals a hook where the project puts its own: at layer 2's output, or its input."""
    hidden = tiny_llama.config.hidden_size
    row = 3 * torch.randn(hidden, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "file"
    if name == "gguf":
        path.write_bytes(build({}, {"direction.2": row.numpy()}))
    elif name == "svec":
        svec(path, {2: row.tolist()})
    else:
        path.write_text(json.dumps({"vectors": {"post_block": {"2": row.tolist()}}}))
    ids = torch.tensor([[1, 5, 9, 2]])

    def after(module: Any, arguments: Any, output: Any) -> Any:
        return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

    def before(module: Any, arguments: Any) -> Any:
        return (arguments[0] + row, *arguments[1:])

    block = tiny_llama.model.layers[2]
    hook = block.register_forward_hook(after) if place == "output" else block.register_forward_pre_hook(before)
    with torch.no_grad():
        plain_free = tiny_llama(ids).logits
        hook.remove()
        from steerfast.hf.structure import identify

        found = formats.read(path)
        made = imported(found, identify(tiny_llama), layers=sorted(found.vectors))
        with steerfast.steer(tiny_llama, made):
            steered = tiny_llama(ids).logits
        assert not torch.allclose(tiny_llama(ids).logits, steered, atol=1e-3)
    assert torch.allclose(steered, plain_free, atol=1e-5)


# ---- the projects' own packages, where they are installed ----------------------------------------


def test_repeng_reads_and_is_read(
    profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names what NumPy 2 took away
    control = pytest.importorskip("repeng").ControlVector
    formats.write(profile, tmp_path / "v.gguf", "gguf")
    found = control.import_gguf(tmp_path / "v.gguf")
    assert found.model_type == "llama"
    same({layer: torch.tensor(row) for layer, row in found.directions.items()}, edits(profile))
    found.export_gguf(tmp_path / "w.gguf")
    same(edits(imported(formats.read(tmp_path / "w.gguf"), identity)), edits(profile))


def test_steering_vectors_is_read(profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path) -> None:
    vector = pytest.importorskip("steering_vectors").SteeringVector(edits(profile))
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(vector))
    torch.save(vector, tmp_path / "v.pt")
    for name in ("v.pkl", "v.pt"):
        same(edits(imported(formats.read(tmp_path / name), identity)), edits(profile))


def test_rotalabs_reads_and_is_read(profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path) -> None:
    pytest.importorskip("rotalabs_steer")
    from rotalabs_steer.core.vectors import SteeringVectorSet

    formats.write(profile, tmp_path / "one", "rotalabs")
    found = SteeringVectorSet.load(tmp_path / "one")
    same({layer: found[layer].vector for layer in found.layers}, edits(profile))
    found.save(tmp_path / "two")
    same(edits(imported(formats.read(tmp_path / "two"), identity)), edits(profile))


def test_vllm_lens_reads_and_is_read(profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path) -> None:
    pytest.importorskip("vllm_lens")
    from vllm_lens import SteeringVector

    formats.write(profile, tmp_path / "v.json", "vllm-lens")
    found = SteeringVector.model_validate(json.loads((tmp_path / "v.json").read_text()))
    same(dict(zip(found.layer_indices, found.activations, strict=True)), edits(profile))
    (tmp_path / "w.json").write_text(json.dumps(found.model_dump()))
    same(edits(imported(formats.read(tmp_path / "w.json"), identity)), edits(profile))

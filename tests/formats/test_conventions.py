"""Files whose meaning is told beside the numbers: by keys, names, the number of rows. What is not known is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import steerfast
from steerfast import formats
from steerfast.errors import ProfileError
from steerfast.formats.reading import layer_in
from steerfast.profile import Gate, ModelIdentity, SteeringProfile

LAYERS, HIDDEN = 6, 16
ROW = torch.linspace(-1, 1, HIDDEN)


def refused(path: Path, message: str, identity: ModelIdentity | None = None, **options: Any) -> None:
    def read() -> object:
        found = formats.read(path)
        return identity and found.profile(identity, **options)

    with pytest.raises(ProfileError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


def edits(profile: SteeringProfile) -> dict[int, list[float]]:
    return {layer: (profile.vector[layer] * profile.strength[layer]).tolist() for layer in profile.steered_layers}


# ---- GLP -----------------------------------------------------------------------------------------

GLP: dict[str, Any] = {
    "glp.mode": "project",
    "glp.spec_version": 1,
    "glp.alpha_default": 1.0,
    "glp.hook_point": "residual_stream_post_layer",
}


def glp(path: Path, rows: dict[str, Tensor] | None = None, **values: Any) -> Path:
    """A file with the keys of `GLP`, changed by `values`; None takes a key out."""
    gguf = pytest.importorskip("gguf")
    rows = {"1": 3 * ROW, "4": ROW} if rows is None else rows
    told = {**GLP, **{name.replace("__", "."): value for name, value in values.items()}}
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    adds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for name, value in told.items():
        if value is not None:
            adds[type(value)](name, value)
    for name, row in rows.items():
        writer.add_tensor(f"direction.{name}", row.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alpha", [1.0, 4.0, None])
def test_glp_becomes_an_ablation(alpha: float | None, tiny_llama: Any, make_profile: Any, tmp_path: Path) -> None:
    """``x - alpha*<x, d>*d`` with d of length 1, whatever the length of the stored row."""
    like = make_profile(tiny_llama, layers=[1])
    direction = torch.randn(like.model.hidden_size, generator=torch.Generator().manual_seed(3))
    path = glp(tmp_path / "v.gguf", {"2": 1e25 * direction}, glp__alpha_default=alpha, glp__orthonormal=True)
    assert formats.detect(path) == "glp"
    made, notes = formats.read(path).profile(like.model)
    assert (made.edit, made.gate, made.steered_layers) == ("ablate", Gate("always"), [2])
    assert any("edit ablate" in note for note in notes)
    unit = torch.nn.functional.normalize(direction, dim=0)
    ids = torch.tensor([[1, 5, 9, 2]])
    hook = tiny_llama.model.layers[2].register_forward_hook(
        lambda module, inputs, out: out - (alpha or 1.0) * (out @ unit)[..., None] * unit
    )
    with torch.no_grad():
        expected = tiny_llama(ids).logits
        hook.remove()
        with steerfast.steer(tiny_llama, made):
            torch.testing.assert_close(tiny_llama(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_glp_keeps_its_edit(identity: ModelIdentity, tmp_path: Path) -> None:
    path = glp(tmp_path / "v.gguf", glp__alpha_default=2.0)
    found = formats.read(path)
    assert found.profile(identity)[0].strength.tolist() == [0, 2, 0, 0, 2, 0]
    assert found.profile(identity, strength=0.5, layers=[4])[0].strength.tolist() == [0, 0, 0, 0, 0.5, 0]
    refused(path, "edit: the file's vectors are for ablate, got 'add'", identity, edit="add")
    assert "measured at 'ffn_out_pre_residual'" in "".join(
        formats.read(glp(path, glp__derived_at="ffn_out_pre_residual")).notes
    )
    for name in ("gguf", "easysteer"):  # named by hand, it is no addition either
        assert formats.read(path, name).profile(identity)[0].edit == "ablate"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"glp__mode": "rotate"}, "glp.mode: expected project or add, got 'rotate'"),
        ({"glp__mode": None}, "glp.mode: expected project or add, got None"),
        ({"glp__hook_point": "ffn_out_pre_residual"}, "glp.hook_point: expected residual_stream_post_layer, got 'ffn"),
        ({"glp__hook_point": None}, "glp.hook_point: expected residual_stream_post_layer, got None"),
        ({"glp__rank": 2}, "glp.rank: expected 1, got 2"),
        ({"glp__spec_version": 2}, "glp.spec_version: expected 1, got 2"),
        ({"glp__spec_version": None}, "glp.spec_version: expected 1, got None"),
        ({"glp__layer_scales": "1:2.0"}, "key 'glp.layer_scales': not known, it may change what the vectors mean"),
        ({"glp__decay": 0.5}, "key 'glp.decay': not known"),
        ({"other__mode": "x"}, "key 'other.mode': expected keys of control vectors"),
        ({"dspark__mode": "project"}, "key 'dspark.mode'"),
        ({"controlvector__mode": "project"}, "key 'controlvector.mode'"),
        ({"glp__structure": "per-execution-step"}, "glp.structure: expected a vector for a block"),
        ({"glp__alpha_default": -1.0}, "glp.alpha_default: expected a number from 0, got -1"),
        ({"glp__alpha_default": float("nan")}, "glp.alpha_default: expected a number from 0, got nan"),
        ({"glp__alpha_default": "1"}, "glp.alpha_default: expected a number from 0, got '1'"),
        ({"glp__mode": "add", "glp__alpha_default": 2.0}, "glp.alpha_default: expected 1 with the mode add"),
        ({"glp__layer_ids_zero_based": "1,3"}, "glp.layer_ids_zero_based: expected the layers of the tensors"),
    ],
)
def test_glp_that_is_not_known_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(glp(tmp_path / "v.gguf", **values), message)


def test_glp_directions_that_are_none(tmp_path: Path) -> None:
    refused(glp(tmp_path / "a.gguf", {"1": 0 * ROW}), "expected directions, got one of zeros")
    refused(glp(tmp_path / "b.gguf", {"0": ROW}), "expected the layers of the tensors, from 1")
    refused(glp(tmp_path / "c.gguf", {"1": ROW, "1.1": ROW}), "tensor 'direction.1.1': expected direction.<layer>")


def test_glp_that_adds_is_an_addition(identity: ModelIdentity, tmp_path: Path) -> None:
    path = glp(tmp_path / "v.gguf", {"1": ROW}, glp__mode="add")
    made, _ = formats.read(path).profile(identity)
    assert (made.edit, edits(made)) == ("add", {1: ROW.tolist()})


def test_an_ablation_is_written_as_glp_and_read_back(
    profile: SteeringProfile, identity: ModelIdentity, tmp_path: Path
) -> None:
    ablates = replace(profile, edit="ablate", strength=torch.tensor([0, 2.5, 0, 0, 2.5, 0]))
    notes = formats.write(ablates, tmp_path / "v.gguf", "glp")
    assert any("the gate is lost" in note for note in notes)
    assert any("does not know glp.mode adds" in note for note in notes)
    back, _ = formats.read(tmp_path / "v.gguf").profile(identity)
    assert (back.edit, back.strength.tolist()) == ("ablate", [0, 2.5, 0, 0, 2.5, 0])
    units = torch.nn.functional.normalize(profile.vector[[1, 4]], dim=1)
    torch.testing.assert_close(back.vector[[1, 4]], units, rtol=1e-6, atol=1e-6)
    for wrong, message in (
        (replace(ablates, strength=torch.tensor([0, 1.0, 0, 0, 2, 0])), "glp: expected blocks from 1, ablated at one"),
        (replace(ablates, strength=torch.tensor([1.0, 1, 0, 0, 0, 0])), "glp: expected blocks from 1"),
        (profile, "edit: expected 'ablate', which the format's vectors mean, got 'add'"),
    ):
        with pytest.raises(ProfileError, match=message):
            formats.write(wrong, tmp_path / "w.gguf", "glp")
    assert not (tmp_path / "w.gguf").exists()


# ---- rows and names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vec_ep20_layer15.pt", 15),
        ("task_vector_layer-10.npy", 10),
        ("layer_24", 24),
        ("happy_L12.pt", 12),
        ("intkey_layer_8_comp_block_output_unit_pos_nunit_1#0", 8),
        ("Layer 3.pt", 3),
        ("L10-19.gguf", None),
        ("L3-8B_direction.pt", None),
        ("layers10-14.pt", None),
        ("players12.pt", None),
        ("XL12.pt", None),
        ("layer1234.pt", None),
        ("layer3_layer4.pt", None),
        ("direction.pt", None),
    ],
)
def test_layers_in_names(name: str, layer: int | None) -> None:
    assert layer_in("v.pt", name) == (None if layer is None else (layer, name))


@pytest.mark.parametrize("write", ["torch", "numpy"])
def test_a_layer_that_only_a_name_tells(write: str, identity: ModelIdentity, tmp_path: Path) -> None:
    if write == "torch":
        path = tmp_path / "vec_layer3.pt"
        torch.save(ROW.half(), path)
    else:
        path = tmp_path / "vec_layer3.npy"
        np.save(path, ROW.half().numpy())
    made, notes = formats.read(path).profile(identity)
    assert edits(made) == {3: ROW.half().float().tolist()}
    assert f"layers: block 3, which only the name {path.name!r} tells: check it" in notes
    made, notes = formats.read(path).profile(identity, layers=[1])
    assert made.steered_layers == [1]
    assert not any("which only the name" in note for note in notes)
    assert formats.read(path).profile(identity, shift=-1)[0].steered_layers == [2]


def test_the_name_of_an_archive_counts(identity: ModelIdentity, tmp_path: Path) -> None:
    torch.save(ROW.bfloat16(), tmp_path / "layer_2.pt")
    shutil.copy(tmp_path / "layer_2.pt", tmp_path / "safety.pt")
    made, notes = formats.read(tmp_path / "safety.pt").profile(identity)
    assert made.steered_layers == [2]
    assert any("'layer_2'" in note for note in notes)
    (tmp_path / "layer_2.pt").rename(tmp_path / "layer_4.pt")  # the names disagree
    refused(tmp_path / "layer_4.pt", "layers: the file gives its vector no layer", identity)


@pytest.mark.parametrize("write", ["torch", "numpy"])
@pytest.mark.parametrize(("extra", "convention"), [(0, "row L is for"), (1, "as in persona_vectors, and row L [+] 1")])
def test_the_number_of_rows_tells_the_first(
    write: str, extra: int, convention: str, identity: ModelIdentity, tmp_path: Path
) -> None:
    rows = torch.randn(LAYERS + extra, HIDDEN, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"evil_response_avg_diff.{'pt' if write == 'torch' else 'npy'}"
    torch.save(rows, path) if write == "torch" else np.save(path, rows.numpy())
    made, notes = formats.read(path).profile(identity, layers=[2, 5])
    assert edits(made) == {layer: rows[layer + extra].tolist() for layer in (2, 5)}
    assert any(re.search(convention, note) for note in notes)
    assert formats.read(path).profile(identity)[0].steered_layers == []


def test_another_number_of_rows_is_refused(identity: ModelIdentity, tmp_path: Path) -> None:
    for count in (LAYERS - 1, LAYERS + 2):
        torch.save(torch.ones(count, HIDDEN), tmp_path / "v.pt")
        refused(tmp_path / "v.pt", f"rows: expected one for each of 6 blocks .* got {count}", identity, layers=[1])


def test_refusal_direction_counts_inputs(identity: ModelIdentity, tmp_path: Path) -> None:
    storage = torch.randn(64 + HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row = storage[64:]  # a view into a larger storage, as the project saves it
    torch.save(row, tmp_path / "direction.pt")
    assert formats.detect(tmp_path / "direction.pt") == "refusal-direction"
    refused(tmp_path / "direction.pt", "expected the layers to steer.*the input of 0-based block l", identity)
    assert formats.read(tmp_path / "direction.pt").profile(identity, layers=[3])[0].steered_layers == [3]
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 4}))
    made, notes = formats.read(tmp_path / "direction.pt").profile(identity)
    assert edits(made) == {3: row.float().tolist()}
    assert any("block 3" in note and "direction_metadata.json" in note for note in notes)
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 0}))
    refused(tmp_path / "direction.pt", "layers: expected a block from 0, got -1", identity)
    torch.save(torch.ones(5, LAYERS, HIDDEN), tmp_path / "mean_diffs.pt")
    refused(tmp_path / "mean_diffs.pt", r"expected shape 1-D and not empty, got \[5, 6, 16\]")


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("rotate_layer", "weight", "bias"), "keys bias, rotate_layer, weight of LoReFT of pyreft"),
        (("rotate_layer", "learned_source.weight", "learned_source.bias"), "LoReFT of pyreft"),
        (("rotate_layer.parametrizations.weight.original",), "LoReFT of pyreft"),
        (("projector1", "projector2"), "LM-Steer"),
        (("W_enc", "W_dec", "b_enc", "b_dec"), "a sparse autoencoder, which has a direction for each feature"),
        (("a", "b"), "expected one tensor, got a dict of a, b"),
    ],
)
def test_tensors_that_no_profile_holds(keys: tuple[str, ...], message: str, tmp_path: Path) -> None:
    torch.save({key: torch.ones(4, HIDDEN) for key in keys}, tmp_path / "intkey_layer_1_comp_block_output.bin")
    refused(tmp_path / "intkey_layer_1_comp_block_output.bin", message)


def test_keys_beside_a_vector_are_refused(tmp_path: Path) -> None:
    torch.save({"v": ROW, "mode": "project"}, tmp_path / "v.pt")
    refused(tmp_path / "v.pt", "expected one tensor, got a dict of mode, v")


def test_a_bias_of_pyreft_is_a_vector(identity: ModelIdentity, tmp_path: Path) -> None:
    torch.save({"bias": ROW}, tmp_path / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin")
    shutil.copy(next(tmp_path.iterdir()), tmp_path / "ssv.bin")
    assert edits(formats.read(tmp_path / "ssv.bin").profile(identity)[0]) == {1: ROW.tolist()}
    torch.save({"bias": ROW}, tmp_path / "intkey_layer_1_comp_mlp_output_unit_pos_nunit_1#0.bin")
    refused(tmp_path / "intkey_layer_1_comp_mlp_output_unit_pos_nunit_1#0.bin", "expected a vector of block_output")


# ---- numpy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_numpy_arrays_in_torch_files(dtype: str, identity: ModelIdentity, tmp_path: Path) -> None:
    """What torch.save makes of an array, a scalar and arrays of both orders."""
    row = ROW.numpy().astype(dtype)
    torch.save(row, tmp_path / "james.pt")
    refused(tmp_path / "james.pt", "layers: the file gives its vector no layer", identity)
    made = formats.read(tmp_path / "james.pt").profile(identity, layers=[5])[0]
    assert edits(made) == {5: torch.from_numpy(row).float().tolist()}
    rows = np.arange(LAYERS * HIDDEN, dtype=dtype).reshape(LAYERS, HIDDEN)
    for order in "CF":
        torch.save(np.asarray(rows, order=order), tmp_path / "rows.pt")  # type: ignore[call-overload]
        assert torch.equal(formats.read(tmp_path / "rows.pt").vectors[2], torch.from_numpy(rows[2]).float())


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, 2]),
        np.array(["a"]),
        np.array([{}], dtype=object),
        np.array([1.0], dtype=">f4"),
        np.array([1j]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.array([np.nan], dtype="f4"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_arrays_are_refused(array: Any, tmp_path: Path) -> None:
    torch.save(array, tmp_path / "v.pt")
    refused(
        tmp_path / "v.pt", "numpy array: expected|expected finite numbers|not a file of tensors|dict: expected text"
    )
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    refused(tmp_path / "v.npy", "expected little-endian floats|expected finite numbers")


def test_npy_layouts(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((3, 4), "f4", order="F"))
    refused(tmp_path / "v.npy", "expected little-endian floats by rows, got '<f4' by columns")
    (tmp_path / "v.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:-1])
    np.save(tmp_path / "w.npy", np.ones(8, "f4"))
    (tmp_path / "w.npy").write_bytes((tmp_path / "w.npy").read_bytes()[:-1])
    refused(tmp_path / "w.npy", r"expected 32 bytes for float32 \[8\], got 31")


@settings(max_examples=25)
@given(st.data())
def test_tensors_of_torch_files_are_as_torch_reads_them(data: st.DataObject) -> None:
    """Views with any strides and offset, of any float dtype, in archives and bare pickles."""
    from io import BytesIO

    from steerfast.formats import pickles

    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    storage = torch.arange(48.0).to(dtype)
    offset, rows = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3))
    stride = data.draw(st.tuples(st.integers(0, 8), st.integers(0, 3)))
    made = {"a": storage.as_strided((rows, 5), stride, offset), "b": storage, "c": torch.nn.Parameter(storage[:3])}
    archive = BytesIO()
    torch.save(made, archive)
    for content in (archive.getvalue(), *(pickle.dumps(made["a"], protocol=level) for level in range(2, 6))):
        found = pickles.load(content)
        for name, tensor in (found if isinstance(found, dict) else {"a": found}).items():
            assert found is not None
            assert tensor.dtype == dtype
            assert torch.equal(tensor, made[name])


# ---- saklas, vLLM-Hook, git-lfs ------------------------------------------------------------------


def test_saklas(identity: ModelIdentity, tmp_path: Path) -> None:
    save_file({f"layer_{layer}": (layer + 1) * ROW.half() for layer in (0, 3)}, tmp_path / "v.safetensors")
    assert formats.detect(tmp_path / "v.safetensors") == "saklas"
    assert not formats.is_profile(tmp_path / "v.safetensors")
    made, notes = formats.read(tmp_path / "v.safetensors").profile(identity)
    assert edits(made) == {layer: ((layer + 1) * ROW.half()).float().tolist() for layer in (0, 3)}
    assert any("saklas scales vectors" in note for note in notes)
    for tensors, metadata, message in (
        ({"basis.1": ROW}, None, "expected tensors layer_<L> alone, as saklas writes them, got basis.1"),
        ({"layer_1": ROW}, {"mode": "x"}, "expected tensors layer_<L> alone, as saklas writes them, got mode, layer_1"),
        ({"layer_1": torch.ones(2, 2)}, None, "layer_1: expected shape 1-D"),
        ({"layer_1": ROW, "layer_01": ROW.clone()}, None, "expected each layer once"),
        ({"layer_1": torch.ones(3, dtype=torch.int8)}, None, "layer_1: expected dense floating point"),
    ):
        save_file(tensors, tmp_path / "w.safetensors", metadata)
        refused(tmp_path / "w.safetensors", message)


def test_a_profile_is_no_foreign_file(profile: SteeringProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.safetensors")
    assert formats.is_profile(tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes()[:-1])
    assert formats.is_profile(tmp_path / "p.safetensors")  # so that its reader says what is wrong with it
    assert formats.is_profile(tmp_path / "none.safetensors")


@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_adjust_rs_is_a_clamp_of_a_whole_output(
    norm: float, tiny_llama: Any, make_profile: Any, tmp_path: Path
) -> None:
    like = make_profile(tiny_llama, layers=[1])
    generator = torch.Generator().manual_seed(1)
    row = norm * torch.nn.functional.normalize(torch.randn(like.model.hidden_size, generator=generator), dim=0)
    average = torch.tensor(-1.5)
    torch.save({"dir": row.numpy(), "avg_proj": average}, tmp_path / "v.pt")
    assert formats.detect(tmp_path / "v.pt") == "vllm-hook"
    found = formats.read(tmp_path / "v.pt")
    made, notes = found.profile(like.model, layers=[2], edit="clamp")
    assert made.low == made.high
    assert any("project's config" in note for note in notes)
    ids = torch.tensor([[1, 5, 9, 2]])
    hook = tiny_llama.model.layers[2].register_forward_hook(
        lambda module, inputs, out: out + (average - out @ row)[..., None] * row
    )
    with torch.no_grad():
        expected = tiny_llama(ids).logits
        hook.remove()
        with steerfast.steer(tiny_llama, made):
            torch.testing.assert_close(tiny_llama(ids).logits, expected, rtol=1e-4, atol=1e-4)
    added = found.profile(like.model, layers=[2], edit="add", strength=5.0)[0]
    assert edits(added) == {2: (5 * row).tolist()}


def test_vllm_hook_says_why_it_does_not_choose(identity: ModelIdentity, tmp_path: Path) -> None:
    torch.save({"dir": ROW.numpy(), "avg_proj": np.float32(2)}, tmp_path / "v.pt")
    refused(
        tmp_path / "v.pt",
        "edit: expected add or clamp, got none: the file does not say .* reads the residual without the MLP's output",
        identity,
        layers=[1],
    )
    refused(tmp_path / "v.pt", "vectors are for add or clamp, got 'ablate'", identity, layers=[1], edit="ablate")
    torch.save({"dir": ROW.numpy()}, tmp_path / "v.pt")
    assert edits(formats.read(tmp_path / "v.pt").profile(identity, layers=[1])[0]) == {1: ROW.tolist()}
    for wrong, message in (
        ({"dir": ROW, "phase": "decode"}, "expected a dict of dir and avg_proj, got"),
        ({"dir": 0 * ROW, "avg_proj": 1.0}, "dir: expected a direction, got zeros"),
        ({"dir": ROW, "avg_proj": torch.ones(2)}, "avg_proj: expected a finite number"),
        ({"dir": ROW, "avg_proj": float("nan")}, "avg_proj: expected a finite number, got nan"),
    ):
        torch.save(wrong, tmp_path / "v.pt")
        refused(tmp_path / "v.pt", message)


@pytest.mark.parametrize("ending", ["gguf", "pt", "json", "npy"])
def test_a_git_lfs_pointer_is_named(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"v.{ending}").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:24c8f72fa0be\nsize 175136\n"
    )
    refused(tmp_path / f"v.{ending}", "expected vectors, got a git-lfs pointer to them: run `git lfs pull`")

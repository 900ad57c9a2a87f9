"""Loading a model by name: what loads, and what the errors say."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import steerfast
from steerfast.errors import ArchitectureError
from steerfast.hf import loading


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_loads_ready_to_generate(folder, tiny_llama):
    model, tokenizer = steerfast.load_model(str(folder), device="cpu")
    assert not model.training
    assert tokenizer.pad_token_id is not None
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(folder, dtype):
    model, _ = steerfast.load_model(str(folder), dtype=dtype, device="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float", "nonsense", "nn"])
def test_an_unknown_dtype_is_refused(folder, dtype):
    if dtype == "float":  # torch's own alias of float32
        assert next(steerfast.load_model(str(folder), dtype=dtype, device="cpu")[0].parameters()).dtype == torch.float32
        return
    with pytest.raises(ArchitectureError, match=rf"dtype: expected auto, float32, .*got '{dtype}'"):
        steerfast.load_model(str(folder), dtype=dtype)


def test_nothing_there_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ArchitectureError, match="model: cannot load") as caught:
        steerfast.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ArchitectureError, match=r"expected a GGUF file at .*missing\.gguf"):
        steerfast.load_model(str(tmp_path / "missing.gguf"))


def test_a_broken_gguf_file_is_an_error(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(ArchitectureError, match="model: cannot load"):
        steerfast.load_model(str(broken))


@pytest.mark.parametrize(("times", "warned"), [(9.0, True), (1.5, False)])
def test_a_checkpoint_in_a_slow_dtype_is_told(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch, times, warned):
    copy.deepcopy(tiny_llama).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(loading, "_times_float32", lambda dtype: asked.append(dtype) or times)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", loading.SlowWarning)
        model, _ = steerfast.load_model(str(tmp_path), device="cpu")
        steerfast.load_model(str(tmp_path), dtype="bfloat16", device="cpu")  # named: as the caller wants it
    assert model.dtype == torch.bfloat16
    assert asked == [torch.bfloat16]
    told = [str(one.message) for one in caught if one.category is loading.SlowWarning]
    assert len(told) == warned
    assert all("bfloat16, takes 9 times as long as float32" in one for one in told)


def test_times_of_a_dtype_are_positive():
    assert loading._times_float32(torch.float32) == 1.0
    assert 0 < loading._times_float32(torch.bfloat16) < 1000

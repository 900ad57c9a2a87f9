"""Steered model classes: loading, saving, copying, and what is attached meanwhile."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import FUSED, MakeProfile, greedy, make_family_model, make_model, padded
from torch import Tensor

import steerfast
from steerfast import AutoSteeredModelForCausalLM
from steerfast.errors import ArchitectureError, ProfileError, SteerfastError
from steerfast.hf.auto import PROFILE_FILE
from steerfast.hf.fused import is_patched
from steerfast.profile import SteeringProfile

UNLISTED = ["GPT2", "GPTNeoX", "Phi", "StableLm"]
PROMPTS = [[5, 17, 40, 9, 77], [12, 33, 8, 90, 61, 25, 14], [81, 7, 55]]


def answers(model: Any, **options: Any) -> Tensor:
    return greedy(model, padded(PROMPTS), tokens=5, **options)[0]


@pytest.fixture
def llama() -> Any:
    return make_family_model("Llama")


@pytest.fixture
def profile(llama: Any, make_profile: MakeProfile) -> SteeringProfile:
    return make_profile(llama, threshold=-1.5)


@pytest.fixture
def folder(llama: Any, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def plain(llama: Any) -> Tensor:
    return answers(llama)


@pytest.fixture
def steered(llama: Any, profile: SteeringProfile) -> Tensor:
    with steerfast.steer(llama, profile):
        return answers(llama)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
def test_every_class(name: str, make_profile: MakeProfile, tmp_path: Path) -> None:
    steered = getattr(steerfast, f"Steered{name}ForCausalLM")
    stock = make_family_model(name)
    assert issubclass(steered, type(stock))
    assert steered.__name__ == f"Steered{name}ForCausalLM"
    assert pickle.loads(pickle.dumps(steered)) is steered
    profile = make_profile(stock, threshold=-1.5)
    with steerfast.steer(stock, profile):
        expected = answers(stock)
    stock.save_pretrained(tmp_path)
    for loader in (steered, AutoSteeredModelForCausalLM):
        model = loader.from_pretrained(tmp_path, steering=profile, attn_implementation="eager")
        assert type(model) is steered
        assert is_patched(model)
        assert torch.equal(answers(model), expected)
        assert model.steering.fired.all()
    again = steered(stock.config)
    again.load_state_dict(stock.state_dict())
    again.eval().steer(profile)
    assert torch.equal(answers(again), expected)


@pytest.mark.parametrize("form", ["object", "path", "string"])
def test_a_profile_in_any_form(
    folder: Path, tmp_path: Path, profile: SteeringProfile, steered: Tensor, form: str
) -> None:
    profile.save(tmp_path / "profile.safetensors")
    given: Any = {"object": profile, "path": tmp_path / "profile.safetensors"}.get(form)
    model = AutoSteeredModelForCausalLM.from_pretrained(folder, steering=given or f"{tmp_path}/profile.safetensors")
    assert torch.equal(answers(model), steered)


def test_without_a_profile(folder: Path, profile: SteeringProfile, plain: Tensor, steered: Tensor) -> None:
    model = AutoSteeredModelForCausalLM.from_pretrained(folder)
    assert model.steering is None
    assert torch.equal(answers(model), plain)
    assert torch.equal(answers(model, steering=profile), steered)
    assert torch.equal(answers(model), plain)
    assert torch.equal(answers(model, steering=None), plain)
    assert model.steering.profile is None


def test_options_of_the_stock_class(folder: Path, profile: SteeringProfile) -> None:
    model, info = AutoSteeredModelForCausalLM.from_pretrained(
        folder, steering=profile, strength=0.5, dtype=torch.bfloat16, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.steering.strength == 0.5
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(AutoSteeredModelForCausalLM.from_pretrained(str(folder), config=config)) is type(model)


def test_with_a_device_map(folder: Path, profile: SteeringProfile, steered: Tensor) -> None:
    pytest.importorskip("accelerate")
    model = AutoSteeredModelForCausalLM.from_pretrained(folder, steering=profile, device_map="cpu")
    assert torch.equal(answers(model), steered)


def test_from_config(llama: Any, profile: SteeringProfile, steered: Tensor) -> None:
    for model in (
        AutoSteeredModelForCausalLM.from_config(llama.config, attn_implementation="eager"),
        steerfast.SteeredLlamaForCausalLM._from_config(llama.config, dtype=torch.float32),
    ):
        assert type(model) is steerfast.SteeredLlamaForCausalLM
        model.load_state_dict(llama.state_dict())
        model.eval().steer(profile)
        assert torch.equal(answers(model), steered)
    assert AutoSteeredModelForCausalLM.from_config(llama.config).steering is None
    with pytest.raises(ProfileError, match="other weights"):
        AutoSteeredModelForCausalLM.from_config(llama.config, steering=profile)


def test_the_auto_class_is_not_called() -> None:
    with pytest.raises(ArchitectureError, match="expected from_pretrained"):
        AutoSteeredModelForCausalLM()
    with pytest.raises(AttributeError, match="SteeredNothingForCausalLM"):
        _ = steerfast.SteeredNothingForCausalLM


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_profile_that_does_not_belong(folder: Path, make_profile: MakeProfile) -> None:
    other = make_profile(make_family_model("Llama", num_hidden_layers=3))
    with pytest.raises(ProfileError, match=r"layers 3.*layers 4"):
        AutoSteeredModelForCausalLM.from_pretrained(folder, steering=other)
    model = AutoSteeredModelForCausalLM.from_pretrained(folder)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ProfileError, match=r"layers 3.*layers 4"):
        model.generate(**padded(PROMPTS), steering=other)
    assert not calls


def test_a_bad_steering_argument(folder: Path, tmp_path: Path) -> None:
    load = AutoSteeredModelForCausalLM.from_pretrained
    with pytest.raises(
        ProfileError, match="profile: expected a profile, a file, a hub repository or a list of these, got int"
    ):
        load(folder, steering=3)
    with pytest.raises(ProfileError, match="expected a file at"):
        load(folder, steering=tmp_path / "none.safetensors")
    with pytest.raises(ProfileError, match="not a"):
        load(folder, steering=folder / "model.safetensors")


def test_a_failing_steer_leaves_the_old_profile(
    folder: Path, make_profile: MakeProfile, profile: SteeringProfile, steered: Tensor, plain: Tensor
) -> None:
    model = AutoSteeredModelForCausalLM.from_pretrained(folder, steering=profile)
    handle = model.steering
    with pytest.raises(ProfileError, match="expected a strength other than 0"):
        model.steer(make_profile(model, layers=[]))
    with pytest.raises(SteerfastError, match="strength: expected a finite number"):
        model.steer(profile, float("nan"))
    assert model.steering.attached
    assert torch.equal(answers(model), steered)
    assert model.steering is not handle or handle.attached
    second = model.steer(profile, 0.0)
    assert model.steering is second
    assert torch.equal(answers(model), plain)
    model.unsteer()
    model.unsteer()
    assert model.steering is None
    assert is_patched(model)
    assert torch.equal(answers(model), plain)


# -- saving and copying ------------------------------------------------------------------------------------------------


def test_a_stack_lies_in_one_file_and_beside_the_weights(
    llama: Any, folder: Path, make_profile: MakeProfile, tmp_path: Path
) -> None:
    stack = make_profile(llama, threshold=-1.5) + make_profile(llama, seed=4, threshold=-1.5)
    stack.save(tmp_path / "both.safetensors")
    with steerfast.steer(llama, stack):
        expected = answers(llama)
    with steerfast.steer(llama, tmp_path / "both.safetensors"):
        assert torch.equal(answers(llama), expected)
    model = AutoSteeredModelForCausalLM.from_pretrained(folder, steering=stack)
    model.save_pretrained(tmp_path / "saved")
    again = AutoSteeredModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert [one.checksum for one in again.steering.profile] == [one.checksum for one in stack]


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_a_round_trip(name: str, make_profile: MakeProfile, tmp_path: Path) -> None:
    stock = make_family_model(name)
    stock.save_pretrained(tmp_path / "stock")
    profile = make_profile(stock, threshold=-1.5)
    model = AutoSteeredModelForCausalLM.from_pretrained(tmp_path / "stock", steering=profile)
    expected = answers(model)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == [f"{name}ForCausalLM"]
    assert SteeringProfile.load(tmp_path / "saved" / PROFILE_FILE).checksum == profile.checksum
    assert torch.equal(answers(AutoSteeredModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)
    other = make_profile(stock, seed=4, threshold=-1.5)
    assert not torch.equal(
        answers(AutoSteeredModelForCausalLM.from_pretrained(tmp_path / "saved", steering=other)), expected
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert type(loaded) is type(stock)
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor(PROMPTS[:1])).logits, stock(torch.tensor(PROMPTS[:1])).logits)
    model.unsteer()
    model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / PROFILE_FILE).exists()


def duplicates(model: Any) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def test_copies_are_steered_by_themselves(
    folder: Path, profile: SteeringProfile, steered: Tensor, plain: Tensor
) -> None:
    model = AutoSteeredModelForCausalLM.from_pretrained(folder, steering=profile)
    for twin in duplicates(model):
        assert twin.steering.model is twin
        assert torch.equal(answers(twin), steered)
        model.unsteer()
        assert torch.equal(answers(twin), steered)
        assert torch.equal(answers(model), plain)
        model.steer(profile)
        twin.unsteer()
        assert torch.equal(answers(twin), plain)
        assert torch.equal(answers(model), steered)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_copies_of_models_with_hooks_are_steered_by_themselves(name: str, make_profile: MakeProfile) -> None:
    model = make_model(name)
    plain = answers(model)
    handle = steerfast.steer(model, make_profile(model, threshold=-1.5))
    steered = answers(model)
    assert not torch.equal(steered, plain)
    for twin in duplicates(model):
        for weight in twin.parameters():
            assert all(weight is not other for other in model.parameters())
        handle.detach()
        assert torch.equal(answers(twin), steered)
        assert torch.equal(answers(model), plain)
        handle = steerfast.steer(model, handle.profile)


# -- models that are not fused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNLISTED)
def test_unlisted_families_are_steered_by_hooks(name: str, make_profile: MakeProfile, tmp_path: Path) -> None:
    stock = make_model(name)
    profile = make_profile(stock, threshold=-1.5)
    plain = answers(stock)
    with steerfast.steer(stock, profile):
        expected = answers(stock)
    stock.save_pretrained(tmp_path)
    model = AutoSteeredModelForCausalLM.from_pretrained(tmp_path, steering=profile)
    assert type(model) is type(stock)
    assert not is_patched(model)
    assert torch.equal(answers(model), expected)
    assert torch.equal(answers(model, steering=None), plain)
    model.steering.detach()
    assert torch.equal(answers(model), plain)
    fresh = AutoSteeredModelForCausalLM.from_config(stock.config)
    assert type(fresh) is type(stock)
    assert fresh.steering.profile is None


def test_an_unlisted_family_takes_the_profile_beside_it(make_profile: MakeProfile, tmp_path: Path) -> None:
    stock = make_model("GPT2")
    profile = make_profile(stock, threshold=-1.5)
    stock.save_pretrained(tmp_path)
    (tmp_path / PROFILE_FILE).parent.mkdir()
    profile.save(tmp_path / PROFILE_FILE)
    model, info = AutoSteeredModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with steerfast.steer(stock, profile):
        assert torch.equal(answers(model), answers(stock))


def test_an_unlisted_family_takes_calls_that_name_a_profile(make_profile: MakeProfile, tmp_path: Path) -> None:
    stock = make_model("GPT2")
    stock.save_pretrained(tmp_path)
    profile = make_profile(stock, threshold=-1.5)
    model = AutoSteeredModelForCausalLM.from_pretrained(tmp_path)
    with steerfast.steer(stock, profile):
        assert torch.equal(answers(model, steering=profile), answers(stock))


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class OwnLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(2 * hidden_states, **kwargs)


class OwnConfig(LlamaConfig):
    model_type = MODEL_TYPE


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = OwnLayer(config, index)
"""


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_models_with_code_of_their_own_keep_their_layers(
    make_profile: MakeProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "model"
    make_family_model("Llama").save_pretrained(folder)
    (folder / "modeling_own.py").write_text(_CODE.replace("MODEL_TYPE", repr(model_type)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(stock).__name__ == "OwnForCausalLM"
    profile = make_profile(stock, threshold=-1.5)
    model = AutoSteeredModelForCausalLM.from_pretrained(folder, steering=profile, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert not is_patched(model)
    with steerfast.steer(stock, profile):
        assert torch.equal(answers(model), answers(stock))

"""What a user may write under additional_config.steerfast, and what becomes of it. Needs no vLLM."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from steerfast.errors import ProfileError
from steerfast.kernels.contract import Kinds
from steerfast.profile import SteeringProfile
from steerfast.runtime.bank import kinds_of
from steerfast.vllm.config import ServingConfig, check_engine, identity_of, normalise


@pytest.fixture
def profile(tiny_llama, make_profile) -> SteeringProfile:
    return make_profile(tiny_llama, layers=[1, 3], positions="response")


@pytest.fixture
def text_config(tiny_llama) -> Any:
    return tiny_llama.config


@pytest.fixture
def path(profile, tmp_path) -> str:
    profile.save(tmp_path / "one.safetensors")
    return str(tmp_path / "one.safetensors")


def engine(raw: object, **changes: Any) -> Any:
    """A stand-in of vLLM's configuration."""
    model = {
        "model": "a/model",
        "runner_type": "generate",
        "skip_tokenizer_init": False,
        **changes.pop("model", {}),
    }
    parallel = {
        "use_ubatching": False,
        "prefill_context_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "distributed_executor_backend": "mp",
        **changes.pop("parallel", {}),
    }
    return SimpleNamespace(
        additional_config={} if raw is None else {"steerfast": raw},
        model_config=SimpleNamespace(**{"hf_text_config": None, **model}),
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=changes.pop("speculative", None),
        kv_transfer_config=changes.pop("kv_transfer", None),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=changes.pop("split", True),
            long_prefill_token_threshold=changes.pop("threshold", 0),
            async_scheduling=changes.pop("ahead", False),
        ),
        structured_outputs_config=SimpleNamespace(reasoning_parser=changes.pop("parser", "")),
        cache_config=SimpleNamespace(
            mamba_cache_mode=changes.pop("mamba", "none"), kv_sharing_fast_prefill=changes.pop("fast_prefill", False)
        ),
    )


def test_what_was_not_written_is_filled_in(path, text_config) -> None:
    complete = normalise({"profiles": {"one": path}}, text_config)
    assert json.loads(json.dumps(complete)) == complete
    assert complete["layers"] == [1, 3]
    assert complete["slots"] == 32
    assert complete["max_strength"] == 10
    assert complete["kinds"] == Kinds.LATCHED_ADD
    assert (complete["default"], complete["locked"], complete["directory"]) == (None, False, None)
    assert complete["observe"] == []
    config = ServingConfig.of(engine(complete))
    assert config is not None
    assert config.profiles == {"one": path}
    assert config.layers == (1, 3)


def test_a_request_may_have_two_profiles_where_there_are_several(path, text_config, tmp_path) -> None:
    def stack(**given: Any) -> int:
        return normalise({"profiles": {"one": path}, **given}, text_config)["stack"]

    both = {"one": path, "two": path}
    assert (stack(), stack(profiles=both), stack(directory=str(tmp_path)), stack(stack=4)) == (1, 2, 2, 4)
    complete = normalise({"profiles": both, "default": "two,one", "locked": True}, text_config)
    assert ServingConfig.of(engine(complete)).default == "two,one"
    with pytest.raises(ValueError, match=r"default: expected at most 1 profiles .*, got 'two,one'"):
        normalise({"profiles": both, "default": "two,one", "stack": 1}, text_config)


def test_layers_of_the_sensor_are_declared_too(tiny_llama, make_profile, tmp_path, text_config) -> None:
    make_profile(tiny_llama, layers=[3], sensor=2).save(tmp_path / "one.safetensors")
    assert normalise({"profiles": {"one": str(tmp_path / "one.safetensors")}}, text_config)["layers"] == [2, 3]


def test_a_directory_alone_declares_all_that_may_come(tmp_path, text_config) -> None:
    complete = normalise({"directory": str(tmp_path)}, text_config)
    assert complete["layers"] == [0, 1, 2, 3, 4]
    assert complete["kinds"] == Kinds.ANY
    assert complete["directory"] == str(tmp_path)


def test_paths_become_absolute(path, text_config, monkeypatch) -> None:
    folder, _, name = path.rpartition("/")
    monkeypatch.chdir(folder)
    complete = normalise({"profiles": {"one": name}, "directory": "."}, text_config)
    assert complete["profiles"] == {"one": path}
    assert complete["directory"] == folder


def test_each_threshold_takes_a_slot(profile, text_config, tmp_path) -> None:
    points = {name: profile.threshold + change for name, change in (("strict", -1), ("balanced", 0), ("permissive", 1))}
    several, one = str(tmp_path / "several.safetensors"), str(tmp_path / "plain.safetensors")
    replace(profile, points=points).save(several)
    profile.save(one)
    both = {"profiles": {"several": several, "plain": one}}
    assert normalise({**both, "slots": 7, "threshold": "strict"}, text_config)["threshold"] == "strict"
    for change, says in (
        ({"slots": 6}, r"slots: expected at least 7, one for each threshold"),
        (
            {"threshold": "lax"},
            r"profile 'several': expected the server's threshold, 'lax', among its own, got balanced",
        ),
        (
            {"threshold": "strict", "profiles": {"plain": one}},
            r"threshold: expected a profile that has named thresholds",
        ),
        ({"threshold": 1}, r"threshold: expected a threshold's name or null, got 1"),
    ):
        with pytest.raises(ValueError, match=says):
            normalise({**both, **change}, text_config)


def test_profiles_keep_their_order_and_there_is_room_for_one_more(profile, tmp_path, text_config) -> None:
    names = [f"p{number}" for number in (3, 1, 2)] + [f"q{number}" for number in range(40)]
    for name in names:
        profile.save(tmp_path / f"{name}.safetensors")
    complete = normalise({"profiles": {name: str(tmp_path / f"{name}.safetensors") for name in names}}, text_config)
    assert list(complete["profiles"]) == names
    assert complete["slots"] == 44


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"profile": {}},
            "expected the keys profiles, default, threshold, locked, max_strength, slots, stack, layers, directory, "
            "observe, thinking, got profile",
        ),
        ({"profiles": ["one"]}, "profiles: expected an object"),
        ({"profiles": None}, "profiles: expected an object"),
        ({"profiles": {}}, "expected a profile at least"),
        ({"profiles": {"off": "x"}}, "got 'off'"),
        ({"profiles": {"OFF": "x"}}, "got 'OFF'"),
        ({"profiles": {"observe": "x"}}, "not 'off' or 'observe', got 'observe'"),
        ({"profiles": {"../one": "x"}}, r"got '\.\./one'"),
        ({"profiles": {"": "x"}}, "got ''"),
        ({"profiles": {"a" * 65: "x"}}, "64 letters"),
        ({"profiles": {"naïve": "x"}}, "got 'naïve'"),
        ({"profiles": {"one": 3}}, "profiles.one: expected a path, got 3"),
        ({"profiles": {"one": "/nowhere.safetensors"}}, "expected a file at '/nowhere.safetensors'"),
        ({"default": "two"}, "default: expected one of one, got 'two'"),
        ({"default": 1}, "default: expected a profile's name or null, got 1"),
        ({"locked": True}, "locked: expected a default"),
        ({"locked": 1, "default": "one"}, "locked: expected true or false, got 1"),
        ({"max_strength": 0}, "max_strength: expected a finite number above 0, got 0"),
        ({"max_strength": float("nan")}, "max_strength: expected a finite number above 0, got nan"),
        ({"max_strength": True}, "max_strength: expected a number, got True"),
        ({"default": "one,two"}, "default: expected one of one, got 'two'"),
        ({"default": "one,one", "stack": 2}, "default: expected each profile once, got 'one,one'"),
        ({"stack": 0}, "stack: expected 1 to 4 profiles on a request, got 0"),
        ({"stack": 5}, "stack: expected 1 to 4 profiles on a request, got 5"),
        ({"stack": True}, "stack: expected a whole number, got True"),
        ({"slots": 1}, "slots: expected at least 2"),
        ({"slots": True}, "slots: expected a whole number, got True"),
        ({"slots": 2.0}, "slots: expected a whole number"),
        ({"layers": [1, 5]}, r"layers: expected numbers in 0\.\.4"),
        ({"layers": [1, True]}, r"layers: expected numbers in 0\.\.4"),
        ({"layers": [1]}, "profile 'one': expected steered layers and gates among the declared layers 1, got 3"),
        ({"directory": "/nowhere"}, "directory: expected a folder"),
        ({"directory": ""}, "directory: expected a path"),
        ({"thinking": "both"}, "thinking: expected 'count' or 'skip', got 'both'"),
        ({"thinking": None}, "thinking: expected 'count' or 'skip', got None"),
        ({"observe": "one"}, "observe: expected a list of profiles' names, got 'one'"),
        ({"observe": ["one", "two"]}, "observe: expected names among one, got 'two'"),
        ({"observe": [["one"]]}, r"observe: expected names among one, got \['one'\]"),
    ],
)
def test_what_cannot_be_is_refused(change, says, path, text_config) -> None:
    with pytest.raises(ValueError, match=says):
        normalise({"profiles": {"one": path}, **change}, text_config)


@pytest.mark.parametrize("raw", [[], "profiles", 3, True])
def test_anything_but_an_object_is_refused(raw, text_config) -> None:
    with pytest.raises(ValueError, match="steerfast: expected an object"):
        normalise(raw, text_config)


def test_a_profile_of_another_model_is_refused(path, text_config) -> None:
    for change, says in (
        ({"num_hidden_layers": 6}, "layers 5"),
        ({"hidden_size": 64}, "hidden size 32"),
        ({"model_type": "mistral"}, "architecture llama"),
    ):
        other = LlamaConfig(**{**text_config.to_dict(), **change})
        if "model_type" in change:
            other.model_type = change["model_type"]
        with pytest.raises(ProfileError, match=says):
            normalise({"profiles": {"one": path}}, other)


def test_token_gates_and_second_passes_are_refused(tiny_llama, make_profile, tmp_path, text_config) -> None:
    for fields, says in (
        ({"kind": "token"}, "got a token gate"),
        ({"sensor": 3, "layers": [1, 3]}, "no layer before the sensor"),
    ):
        make_profile(tiny_llama, **fields).save(tmp_path / "one.safetensors")
        with pytest.raises(ProfileError, match=says):
            normalise({"profiles": {"one": str(tmp_path / "one.safetensors")}}, text_config)


def test_a_prompt_gate_for_all_positions_needs_whole_prompts(tiny_llama, make_profile, tmp_path, text_config) -> None:
    make_profile(tiny_llama, positions="all").save(tmp_path / "one.safetensors")
    complete = normalise({"profiles": {"one": str(tmp_path / "one.safetensors")}}, text_config)
    check_engine(engine(complete, split=False, model={"hf_text_config": text_config}))
    for splits in ({"split": True}, {"split": False, "threshold": 64}, {"split": False, "mamba": "align"}):
        with pytest.raises(ProfileError, match="--no-enable-chunked-prefill"):
            check_engine(engine(complete, model={"hf_text_config": text_config}, **splits))
    make_profile(tiny_llama, positions="all", kind="always").save(tmp_path / "one.safetensors")
    check_engine(engine(complete, split=True, model={"hf_text_config": text_config}))


def test_later_profiles_must_do_what_the_engine_was_started_for(tiny_llama, make_profile, path, text_config) -> None:
    config = ServingConfig.of(engine(normalise({"profiles": {"one": path}}, text_config)))
    assert config is not None
    model = identity_of(text_config)
    config.check("two", make_profile(tiny_llama, layers=[3], seed=4, positions="response"), model, split=True)
    ablating = make_profile(tiny_llama, layers=[3], edit="ablate", positions="response")
    assert kinds_of(ablating) == Kinds.ANY
    with pytest.raises(ProfileError, match="got 'ablate' with a prompt gate"):
        config.check("two", ablating, model, split=True)
    with pytest.raises(ProfileError, match="declared layers 1, 3, got 2"):
        config.check("two", make_profile(tiny_llama, layers=[2, 3], positions="response"), model, split=True)
    sketched = replace(model, embedding_sketch=tuple([1.0] + [0.0] * 63))
    with pytest.raises(ProfileError, match="other weights"):
        config.check("two", make_profile(tiny_llama, layers=[3], positions="response"), sketched, split=True)


def test_the_layers_that_read_rows_are_configured(tiny_llama, make_profile, tmp_path, text_config) -> None:
    def reading(directory: str | None = None, **fields: Any) -> Any:
        make_profile(tiny_llama, positions="response", **fields).save(tmp_path / "one.safetensors")
        raw = {"profiles": {"one": str(tmp_path / "one.safetensors")}, "directory": directory}
        config = ServingConfig.of(engine(normalise(raw, text_config)))
        assert config is not None
        return config.reading

    assert reading(layers=[1, 3]) == (1, 3)
    assert reading(layers=[2, 4], sensor=1) == (1,)
    assert reading(layers=[2, 4], kind="always") == ()
    assert reading(layers=[2, 4], kind="always", edit="ablate") == (2, 4)
    assert reading(layers=[2, 4], kind="always", directory=str(tmp_path)) is None


def test_a_file_whose_gate_moved_since_the_configuration_is_refused(tiny_llama, make_profile, tmp_path, text_config):
    make_profile(tiny_llama, layers=[2, 3, 4], sensor=2, positions="response").save(tmp_path / "one.safetensors")
    config = ServingConfig.of(engine(normalise({"profiles": {"one": str(tmp_path / "one.safetensors")}}, text_config)))
    assert config is not None
    other = make_profile(tiny_llama, layers=[3, 4], sensor=3, positions="response")
    with pytest.raises(ProfileError, match=r"among layers 2, as when the engine was configured, got 3 too \(start"):
        config.check("one", other, identity_of(text_config), split=True)


def test_an_engine_without_the_key_is_not_steered() -> None:
    assert ServingConfig.of(engine(None)) is None
    assert ServingConfig.of(SimpleNamespace(additional_config=object())) is None
    check_engine(engine(None))


def test_what_nobody_checked_or_another_version_did_is_refused(path, text_config) -> None:
    with pytest.raises(ValueError, match=r"expected one that EngineArgs\.create_engine_config has checked"):
        ServingConfig.of(engine({"profiles": {"one": path}}))
    complete = normalise({"profiles": {"one": path}}, text_config)
    with pytest.raises(ValueError, match="expected version"):
        ServingConfig.of(engine({**complete, "version": "0.0.0"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"runner_type": "pooling"}}, "runner 'pooling'"),
        ({"kv_transfer": object()}, "KV connector"),
        ({"fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"parallel": {"use_ubatching": True}}, "micro-batches"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "context parallelism"),
        (
            {"parallel": {"pipeline_parallel_size": 2, "distributed_executor_backend": "external_launcher"}},
            "external launcher",
        ),
        ({"speculative": SimpleNamespace(enable_adaptive_verification=True)}, "adaptive verification"),
        ({"model": {"is_diffusion": True}}, "a diffusion model do not go together: it computes each row of an answer"),
    ],
)
def test_engines_that_would_lose_decisions_are_refused(change, says, path, text_config) -> None:
    complete = normalise({"profiles": {"one": path}}, text_config)
    model = {"hf_text_config": text_config, **change.pop("model", {})}
    with pytest.raises(ValueError, match=says):
        check_engine(engine(complete, model=model, **change))


VARIABLES = ("VLLM_USE_RUST_FRONTEND", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


@pytest.mark.parametrize("variable", VARIABLES)
def test_ways_around_a_lock_stop_the_start(variable, path, text_config, monkeypatch) -> None:
    def check(**given: Any) -> None:
        complete = normalise({"profiles": {"one": path}, **given}, text_config)
        check_engine(engine(complete, model={"hf_text_config": text_config}))

    lock: dict[str, Any] = {"default": "one", "locked": True}
    for value in ("0", "", "false"):
        monkeypatch.setenv(variable, value)
        check(**lock)
    for value in ("1", "true", " True "):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=rf"steerfast.*: expected {variable} unset, got '{value}': "):
            check(**lock)
    if variable == "VLLM_USE_RUST_FRONTEND":  # no plugin runs in it, lock or not
        with pytest.raises(ValueError, match=f"steerfast: expected {variable} unset"):
            check()
        check_engine(engine(None))
    else:
        check()


def test_a_profile_among_the_weights_is_named(path, profile, text_config, tmp_path) -> None:
    complete = normalise({"profiles": {"one": path}}, text_config)
    folder = tmp_path / "model"
    (folder / "profiles").mkdir(parents=True)
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "damaged.safetensors").write_bytes(b"{}")
    profile.save(folder / "profiles" / "two.safetensors")  # vLLM does not look there
    served = engine(complete, model={"hf_text_config": text_config, "model": str(folder)})
    check_engine(served)
    profile.save(folder / "one.safetensors")
    with pytest.raises(
        ValueError,
        match=r"got '.*/model/one\.safetensors'; move it",
    ):
        check_engine(served)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "model.safetensors"}}')
    check_engine(served)  # vLLM reads only the files of the index


def test_a_log_says_what_is_steered(path, text_config) -> None:
    both = normalise({"profiles": {"a": path, "b": path}, "default": "b,a", "locked": True}, text_config)
    text = f"steerfast {both['version']} steers 2 profiles (a, b): default b,a, locked"
    assert str(ServingConfig.of(engine(both))) == text


def test_where_a_thought_ends_has_to_be_known_in_time(make_profile, tiny_llama, tmp_path, text_config) -> None:
    file = str(tmp_path / "one.safetensors")
    model = {"hf_text_config": text_config}
    make_profile(tiny_llama, positions="response").save(file)
    complete = normalise({"profiles": {"one": file}, "thinking": "skip"}, text_config)
    check_engine(engine(complete, model=model, parser="qwen3"))
    for change, says in (
        ({"parser": ""}, "expected --reasoning-parser, which finds the end of a thought, got none"),
        ({"ahead": True}, "expected --no-async-scheduling with 'skip'"),
        ({"speculative": SimpleNamespace()}, "expected no speculative decoding with 'skip'"),
    ):
        with pytest.raises(ValueError, match=f"^steerfast.thinking: {says}"):
            check_engine(engine(complete, model=model, **{"parser": "qwen3", **change}))
    make_profile(tiny_llama, positions="all", kind="always").save(file)
    with pytest.raises(ProfileError, match="expected positions='response' where edits begin after a thought"):
        normalise({"profiles": {"one": file}, "thinking": "skip"}, text_config)


@pytest.mark.parametrize(
    ("parser", "tokens", "thinking", "warns"),
    [
        ("qwen3", 4, "count", True),
        ("", 4, "count", False),
        ("qwen3", None, "count", False),
        ("qwen3", 4, "skip", False),
    ],
)
def test_edits_that_may_end_in_a_thought_are_told(
    make_profile, tiny_llama, tmp_path, text_config, caplog, parser, tokens, thinking, warns
) -> None:
    make_profile(tiny_llama, positions="response", answer_tokens=tokens).save(tmp_path / "one.safetensors")
    complete = normalise({"profiles": {"one": str(tmp_path / "one.safetensors")}, "thinking": thinking}, text_config)
    log = logging.getLogger("vllm.steerfast")
    caplog.set_level(logging.WARNING, log.name)
    log.addHandler(caplog.handler)
    check_engine(engine(complete, model={"hf_text_config": text_config}, parser=parser))
    log.removeHandler(caplog.handler)
    said = "Profile 'one' edits the first 4 tokens of an answer; with --reasoning-parser qwen3 the tokens of a thought"
    assert (said in caplog.text) == warns

"""Features of vLLM beside steering, on engines of a tiny model: docs/features.md lists them all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import LAYERS, OPTIONS, World, save, tiny_llama, write_json

from steerfast.errors import ProfileError, SteerfastError

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_profile: Callable[..., Any]) -> World:
    return World(tmp_path_factory.mktemp("world"), make_profile)


@pytest.fixture(scope="module")
def start(engine: Callable[..., Any], world: World) -> Callable[..., Any]:
    """A function (**options) -> an engine of the tiny model with all profiles."""
    return lambda **options: engine(
        {"profiles": world.files, "stack": 2}, **{"model": world.path, "disable_log_stats": False, **OPTIONS, **options}
    )


def counted(llm: Any, name: str) -> float:
    """A counter of vLLM since it was imported."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


# -- speculation, priorities, KV events --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speculating(start: Callable[..., Any], world: World) -> Any:
    """The model drafts for itself, without steering."""
    return start(
        speculative_config={"model": world.path, "num_speculative_tokens": 3},
        scheduling_policy="priority",
        num_gpu_blocks_override=8,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "null"},
    )


def test_a_draft_model_and_preemption_by_priority(speculating, world) -> None:
    names = "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens", "num_preemptions"
    before = [counted(speculating, name) for name in names]
    priorities = [number % 5 for number in range(len(world.keys))]
    world.check(world.ask(speculating, priority=priorities))
    world.check(world.ask(speculating, priority=priorities[::-1]))  # some prompts are cached now
    accepted, drafted, preempted = (counted(speculating, name) - old for name, old in zip(names, before, strict=True))
    assert 0 < accepted < drafted  # of steered answers, too few agree with an unsteered draft
    assert preempted > 0


def test_events_name_the_blocks_that_others_can_use(speculating, world, monkeypatch) -> None:
    scheduler, published = scheduler_of(speculating), []
    monkeypatch.setattr(scheduler.kv_event_publisher, "publish", lambda batch: published.extend(batch.events))
    shut = next(n for n in ("own", "sensor") if not world.ask(speculating, [(n, 0)])[0].steering["fired"])
    for name, blocks in (("off", 2), (shut, 2), ("always", 1)):
        assert speculating.reset_prefix_cache()
        del published[:]
        world.ask(speculating, [(name, 0)])
        stored = [event for event in published if type(event).__name__ == "BlockStored"]
        assert sum(len(event.block_hashes) for event in stored) == blocks, name
        tokens = [token for event in stored for token in event.token_ids]
        assert tokens[:58] == world.prompts[0][: len(tokens)]
        assert len(tokens) == blocks * 32


# -- adapters, another plugin ------------------------------------------------------------------------------------------


def adapter(folder: Path, model: Any) -> Any:
    """Write a random LoRA adapter; return the model with it merged."""
    from copy import deepcopy

    from safetensors.torch import save_file

    merged, tensors = deepcopy(model), {}
    generator = torch.Generator().manual_seed(3)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        for layer in range(LAYERS):
            module = merged.get_submodule(f"model.layers.{layer}.{name}")
            a = torch.randn(8, module.in_features, generator=generator) * 0.1
            b = torch.randn(module.out_features, 8, generator=generator) * 0.1
            module.weight.data += 2 * b @ a
            key = f"base_model.model.model.layers.{layer}.{name}.lora"
            tensors[f"{key}_A.weight"], tensors[f"{key}_B.weight"] = a, b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", "v_proj", "down_proj"]
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"},
    )
    return merged


@contextmanager
def another_plugin() -> Iterator[list[str]]:
    """Wraps methods that ours wraps, outside of it; yields the names of methods that were called."""
    from steerfast.vllm import compat
    from steerfast.vllm.plugin import register

    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            ("EngineCore", "add_request"), ("EngineCore", "preprocess_add_request"), ("Scheduler", "_free_request"),
            ("Scheduler", "update_from_output"), ("InputProcessor", "__init__"), ("WorkerWrapperBase", "init_device"),
            ("RunnerV1", "execute_model"), ("RunnerV1", "_preprocess"), ("RunnerV1", "sample_tokens"),
        ):  # fmt: skip
            cls = getattr(compat, owner)
            original = getattr(cls, name)

            def wrapper(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                called.append(_name)
                return _original(*args, **kwargs)

            patch.setattr(cls, name, functools.wraps(original)(wrapper))
        register()  # once more, as vLLM may
        yield called


def test_adapters_of_requests_beside_another_plugin(start, world, tmp_path) -> None:
    from vllm.lora.request import LoRARequest

    merged = adapter(tmp_path / "lora", world.model)
    lora = LoRARequest("lora", 1, str(tmp_path / "lora"))
    with another_plugin() as called:
        llm = start(enable_lora=True, max_lora_rank=8, max_loras=2)  # with 1, vLLM's CPU ops give it to all rows
        for turn in range(2):  # every key with and without it, side by side
            wants = [(number + turn) % 2 == 0 for number in range(len(world.keys))]
            outputs = world.ask(llm, lora_request=[lora if want else None for want in wants])
            for model, with_it in ((merged, True), (world.model, False)):
                numbers = [number for number, want in enumerate(wants) if want == with_it]
                world.check([outputs[number] for number in numbers], [world.keys[number] for number in numbers], model)
    assert len({*called}) == 9


def test_a_plugin_that_hides_a_signature_stops_the_start(monkeypatch) -> None:
    from steerfast.vllm import compat
    from steerfast.vllm.plugin import register

    monkeypatch.setattr(compat.Scheduler, "update_from_output", lambda *args: None)
    with pytest.raises(AttributeError, match=r"expected .*Scheduler\.update_from_output"):
        register()


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "within"), [
    ({"dtype": "bfloat16"}, 0.1),
    pytest.param({"dtype": "float16"}, 0.02, marks=pytest.mark.slow),
])  # fmt: skip
def test_less_precise_numbers(start, world, options, within) -> None:
    world.check(world.ask(start(**options)), within=within)


# -- weights that change -----------------------------------------------------------------------------------------------


def test_profiles_stay_when_weights_change(start, world, tmp_path) -> None:
    """As trainers send them: the first ones to an engine of random weights."""
    trained, other = tiny_llama(), tiny_llama(seed=1)
    for seed, parameter in enumerate(trained.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data += 0.1 * parameter.data.std() * noise
    for name, model in (("trained", trained), ("other", other)):
        save(model, tmp_path / name)
    llm, some = start(load_format="dummy"), world.keys[:10]
    llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))

    def reload(path: str) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        assert llm.reset_prefix_cache()

    def load_embedding(model: Any) -> None:
        weights = [("model.embed_tokens.weight", model.model.embed_tokens.weight.data)]
        llm.apply_model(lambda own: own.load_weights(weights) and None)

    reload(world.path)
    world.check(world.ask(llm, some), some)
    reload(str(tmp_path / "trained"))
    world.check(world.ask(llm, some), some, trained)
    wrong = r"profile '.*own\.safetensors': .* with other weights: their embeddings agree to"
    with pytest.raises(ProfileError, match=wrong):
        load_embedding(other)
    load_embedding(trained)
    assert llm.reset_prefix_cache()
    world.check(world.ask(llm, some), some, trained)
    with pytest.raises(ProfileError, match=wrong):
        reload(str(tmp_path / "other"))
    assert world.ask(llm, [key for key in world.keys if key[0] == "off"])
    with pytest.raises(SteerfastError, match="expected weights of the profiles' model, got others: profile"):
        world.ask(llm, [("own", 0)])

"""Features of vLLM beside steering that need processes or weights of their own: docs/features.md lists them all."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_process import ENVIRONMENT
from tiny_world import HIDDEN, OPTIONS, World, tiny_llama, write_json

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_profile: Callable[..., Any]) -> World:
    return World(tmp_path_factory.mktemp("world"), make_profile)


@pytest.fixture(scope="module")
def start(engine: Callable[..., Any], world: World) -> Callable[..., Any]:
    """A function (**options) -> an engine of the tiny model with all profiles."""
    return lambda **options: engine({"profiles": world.files}, **{"model": world.path, **OPTIONS, **options})


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_asynchronous_engine_with_drafts_by_ngrams(world, monkeypatch, ranks) -> None:
    """Of one or two data-parallel ranks, used directly."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    for name, value in {**ENVIRONMENT, "VLLM_CPU_CI_ENV": "0"}.items():
        monkeypatch.setenv(name, value)
    steering = {"profiles": world.files, "directory": str(world.folder), "slots": 8}

    async def ask(engine: Any, name: str, number: int, id: str, most: int = 1000) -> Any:
        prompt, parameters = world.request(name, number)
        outputs: list[Any] = []
        async for output in engine.generate(prompt, parameters, request_id=id):
            outputs.append(output)
            if len(outputs) == most:
                return None
        return outputs[-1]

    async def talk() -> None:
        arguments = AsyncEngineArgs(
            model=world.path, data_parallel_size=ranks, speculative_config=NGRAM,
            additional_config={"steerfast": steering}, **OPTIONS,
        )  # fmt: skip
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            requests = [ask(engine, *key, f"request {number}") for number, key in enumerate(world.keys)]
            *outputs, _ = await asyncio.gather(*requests, ask(engine, "always", 1, "aborted", most=2))
            with pytest.raises(
                VLLMValidationError, match="steering: expected one of own, sensor, always, everywhere, off"
            ):
                await ask(engine, "nobody", 0, "unknown")
            await engine.engine_core.call_utility_async("steerfast_replace", "always", "own.safetensors")
            replaced = await asyncio.gather(*(ask(engine, "always", n, f"replaced {n}") for n in range(6)))
            own = [("own", number) for number in range(6)]
            world.check([*outputs, *replaced], [*world.keys, *own])  # every rank has the new version
            listed = await engine.engine_core.call_utility_async("steerfast_profiles")
            assert [each["requests"] for each in listed] == [0] * 4
        finally:
            engine.shutdown()

    asyncio.run(talk())
    assert "numba" not in sys.modules  # later engines of this process could not start


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_drafts_by_eagle(start, world) -> None:
    """A random drafter that reads the edited stream; answers do not depend on it."""
    from safetensors.torch import save_file

    drafter, folder = tiny_llama(seed=2, num_hidden_layers=1), world.folder / "eagle"
    weights = {name.removeprefix("model."): weight for name, weight in drafter.state_dict().items()}
    tensors = {name: weight for name, weight in weights.items() if "_proj" in name or "post_attention" in name}
    tensors["fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(0)) / 16
    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {**drafter.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    llm = start(speculative_config={"method": "eagle", "model": str(folder), "num_speculative_tokens": 2})
    world.check(world.ask(llm))
    world.check(world.ask(llm))


@pytest.mark.slow
def test_sleep_frees_no_memory_of_profiles(start, engine, world, monkeypatch) -> None:
    """vLLM frees what was allocated inside its pools: here, what load_model and the KV cache allocate."""
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu_worker import Worker

    from steerfast.vllm import runners

    inside: list[str] = []

    class Pool:
        def __init__(self, tag: str) -> None:
            self.tag = tag

        def __enter__(self) -> None:
            inside.append(self.tag)

        def __exit__(self, *raised: object) -> None:
            inside.pop()

    class Backend:
        """Loses what lies in the pools; level 1 keeps weights."""

        @torch.inference_mode()
        def suspend(self, level: int) -> None:
            runner = self.runner
            self.kept = [each.clone() for each in runner.model.parameters()] if level == 1 else []
            for each in (*runner.model.parameters(), *runner.kv_caches):
                each.data.fill_(0)

        @torch.inference_mode()
        def resume(self, tags: Any) -> None:
            for each, kept in zip(self.runner.model.parameters(), self.kept, strict=False):
                each.data.copy_(kept)

    pools: list[list[str]] = []
    attach = runners.attach
    monkeypatch.setattr(Worker, "_maybe_get_memory_pool_context", lambda self, tag: Pool(tag))
    monkeypatch.setattr(runners, "attach", lambda *args: (pools.append(list(inside)), attach(*args))[1])
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
    monkeypatch.setattr(gpu_worker.current_platform, "is_sleep_mode_available", lambda: True)
    llm = start(enable_sleep_mode=True)
    assert pools == [[]]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    backend: Any = Backend()
    backend.runner = worker.model_runner
    worker._sleep_mode_backend = backend
    monkeypatch.setattr(worker, "sleep", lambda level=1: Worker.sleep(worker, level), raising=False)
    monkeypatch.setattr(worker, "wake_up", lambda tags=None: Worker.wake_up(worker, tags), raising=False)
    for level in (1, 2):
        llm.sleep(level=level)
        llm.wake_up()
        if level == 2:
            llm.collective_rpc("reload_weights")
        world.check(world.ask(llm, world.keys[:10]), world.keys[:10])

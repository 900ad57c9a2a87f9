"""What vLLM's model runners and models are to the worker. A GPU's runner (V2) cannot run here: its classes that can be
made on a CPU stand around a toy model, in the order in which it calls them."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy import HIDDEN, LAYERS, Engine, random_rows

from steerfast.errors import ArchitectureError
from steerfast.vllm.config import KEY
from steerfast.vllm.layers import find_layers
from steerfast.vllm.runners import _adapt

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

pytestmark = pytest.mark.contract


class State(ModelState):
    """What it does for every model, nothing for any."""

    def __init__(self) -> None:
        self.calls = 0

    def preprocess_state(self, *args: Any) -> None:
        self.calls += 1
        return super().preprocess_state(*args)


State.__abstractmethods__ = frozenset()


class Output:
    """It comes later."""

    def __init__(self, output: ModelRunnerOutput) -> None:
        self.output = output

    def get_output(self) -> ModelRunnerOutput:
        return self.output


class Runner:
    """V2's order of calls: the tables of a step are made in preprocess_state, which no dummy run reaches."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model_state = engine, State()
        self.vllm_config = SimpleNamespace(use_v2_model_runner=True, speculative_config=None)
        self.rows: dict[str, torch.Tensor] = {}
        self.found: dict[str, torch.Tensor] = {}
        self.buffers = InputBuffers(8, 64, torch.device("cpu"))
        self.past: dict[str, int] = {}
        self.batch: Any = None

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False) -> Any:
        lengths = scheduler_output.num_scheduled_tokens
        batch = InputBatch.make_dummy(len(lengths) or 1, sum(lengths.values()) or 8, self.buffers)
        stage = self.engine.stages[0]
        if dummy_run:
            self.engine.forward(stage, random_rows(8, 99))
            return None
        for new in scheduler_output.scheduled_new_reqs:
            self.past[new.req_id] = new.num_computed_tokens
        if not lengths:
            return ModelRunnerOutput([], {})
        names = sorted(lengths, key=lambda name: (lengths[name], name))  # decodes first
        past = [self.past[name] for name in names]
        batch = replace(
            batch,
            req_ids=names,
            num_scheduled_tokens=np.array([lengths[name] for name in names], dtype=np.int32),
            num_computed_tokens_np=np.array(past, dtype=np.int32),
            num_tokens_after_padding=batch.num_tokens + 3,
        )
        self.model_state.preprocess_state(batch, (), None, None)
        parts = [self.rows[name][at : at + lengths[name]] for name, at in zip(names, past, strict=True)]
        x = self.engine.forward(stage, torch.cat([*parts, torch.zeros(3, HIDDEN)]))
        self.found = dict(zip(names, x.split([*(lengths[name] for name in names), 3]), strict=False))
        for name in names:
            self.past[name] += lengths[name]
        self.batch = batch
        return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        return Output(ModelRunnerOutput(self.batch.req_ids, {}))


def scheduled(lengths: dict[str, int], new: list[Any] | None = None, finished: set[str] | None = None) -> Any:
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = new or []
    output.finished_req_ids = finished or set()
    output.num_scheduled_tokens = lengths
    output.total_num_scheduled_tokens = sum(lengths.values())
    return output


def new_request(name: str, prompt: int, extra: dict[str, Any] | None, tokens: int | None = None) -> Any:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=list(range(prompt)),
        mm_features=[],
        sampling_params=SamplingParams(extra_args=None if extra is None else {KEY: extra}),
        pooling_params=None,
        block_ids=([],),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=list(range(tokens or prompt)),
    )


def test_the_second_runner_tells_its_steps(profiles, tmp_path) -> None:
    engine = Engine(profiles, [list(range(LAYERS))], tmp_path)
    runner: Any = Runner(engine)
    _adapt(runner, engine.runtimes[0])
    runner.rows = {"a": random_rows(12, 1), "b": random_rows(12, 2), "warm-up": random_rows(4, 3)}
    prompts = {"a": (5, "sensor", 1.0), "b": (2, "own", 0.5), "warm-up": (4, None, 1.0)}
    truth = {name: engine.truth(runner.rows[name], *asked) for name, asked in prompts.items()}

    def step(lengths: dict[str, int], **more: Any) -> dict[str, Any]:
        at = {name: runner.past.get(name, 0) for name in lengths}
        at.update({new.req_id: 0 for new in more.get("new", ())})
        assert runner.execute_model(scheduled(lengths, **more)) is None
        for name, length in lengths.items():
            expected = truth[name][0][at[name] : at[name] + length]
            torch.testing.assert_close(runner.found[name].double(), expected, rtol=0, atol=2e-4)
        output = pickle.loads(pickle.dumps(runner.sample_tokens(None).get_output()))  # as it goes to the scheduler
        return getattr(output, "steerfast", {})

    new = [
        new_request("a", 5, engine.extra("sensor")),
        new_request("b", 2, engine.extra("own", 0.5)),
        new_request("warm-up", 4, None),  # vLLM's own, which the engine core never saw
    ]
    told = step({"a": 3, "b": 2, "warm-up": 4}, new=new)
    assert set(told) == {"b"}
    assert told["b"][0][1] == pytest.approx(truth["b"][1][0][1], abs=1e-4)
    runner.execute_model(scheduled({"dummy": 8}), dummy_run=True)  # another rank has work
    assert set(step({"a": 2, "b": 1}, finished={"warm-up"})) == {"a"}
    assert step({"b": 1, "a": 2}) == {}
    runner.execute_model(scheduled({"dummy": 8}), dummy_run=True)
    assert step({"b": 1}) == {}  # a is preempted
    assert step({"a": 9, "b": 1}, new=[new_request("a", 5, engine.extra("sensor"), tokens=9)]) == {}  # and resumes
    assert runner.model_state.calls == 5
    runner.execute_model(scheduled({}, finished={"a", "b"}))
    assert engine.runtimes[0].roster.names == set()


@pytest.mark.parametrize(("runner", "owner", "method"), [
    (RunnerV1, RunnerV1, "_preprocess"),
    (RunnerV2, ModelState, "preprocess_state"),
])  # fmt: skip
def test_the_runners_call_what_the_worker_wraps_once(runner, owner, method) -> None:
    """`steerfast.vllm.compat` checks that it is there."""
    assert hasattr(owner, method)
    assert inspect.getsource(runner.execute_model).count(f".{method}(") == 1


# -- models --------------------------------------------------------------------------------------------------------


def backbone(count: int, embedding: bool = True) -> nn.Module:
    model = nn.Module()
    if embedding:
        model.embed_tokens = PPMissingLayer()  # as on any stage but the first
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
    return model


def test_layers_are_found_beside_the_embedding() -> None:
    model = nn.Module()
    model.vision = backbone(4, embedding=False)
    model.language_model = nn.Module()
    model.language_model.model = backbone(4)
    model.language_model.model.layers[1].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert find_layers(model, 4) is model.language_model.model.layers


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="one list of 4 decoder layers in Module, found none"):
        find_layers(backbone(3), 4)
    twice = nn.Module()
    twice.one, twice.two = backbone(4), backbone(4)
    with pytest.raises(ArchitectureError, match=r"found one\.layers, two\.layers"):
        find_layers(twice, 4)

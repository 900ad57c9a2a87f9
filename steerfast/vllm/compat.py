"""Every name of vLLM that steerfast uses, in one table, and the checks that they are as we expect.

Nothing of vLLM is imported before a name is asked for: `compat.Scheduler` imports its module at that moment. To support
another version of vLLM, change this file: `PATHS` where names live, `SEAMS` for what is wrapped or touched, `TESTED`.
Where versions differ, a path is a dict by version, and a seam has a `since`. `has` tells what the installed one has.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from steerfast._seams import Seam, seams

F = TypeVar("F", bound=Callable[..., Any])
_log = logging.getLogger("vllm.steerfast")  # a child of vLLM's logger, which has the handlers

TESTED = ("0.26", "0.32", "0.33")
"""Versions of vLLM whose tests pass, oldest first; pyproject's extra `serve` goes from the first to the last."""

PATHS: dict[str, str | Mapping[str, str | None]] = {
    # engine
    "EngineArgs": "vllm.engine.arg_utils:EngineArgs",
    "SchedulerConfig": "vllm.config.scheduler:SchedulerConfig",
    "EngineCore": "vllm.v1.engine.core:EngineCore",
    "EngineCoreOutput": "vllm.v1.engine:EngineCoreOutput",
    "EngineCoreProc": "vllm.v1.engine.core:EngineCoreProc",
    "EngineCoreRequest": "vllm.v1.engine:EngineCoreRequest",
    "EngineCoreRequestType": "vllm.v1.engine:EngineCoreRequestType",
    "KVCacheCoordinator": "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
    "KVCacheManager": "vllm.v1.core.kv_cache_manager:KVCacheManager",
    "Request": "vllm.v1.request:Request",
    "Scheduler": "vllm.v1.core.sched.scheduler:Scheduler",
    "SchedulerInterface": "vllm.v1.core.sched.interface:SchedulerInterface",
    # front end
    "AsyncLLM": "vllm.v1.engine.async_llm:AsyncLLM",
    "BeamSearchOfflineMixin": "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin",
    "BeamSearchOnlineMixin": "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin",
    "EngineDeadError": "vllm.v1.engine.exceptions:EngineDeadError",
    "InputProcessor": "vllm.v1.engine.input_processor:InputProcessor",
    "LLMEngine": "vllm.v1.engine.llm_engine:LLMEngine",
    "OutputProcessor": "vllm.v1.engine.output_processor:OutputProcessor",
    "RequestOutput": "vllm.outputs:RequestOutput",
    "RequestState": "vllm.v1.engine.output_processor:RequestState",
    "VLLMValidationError": "vllm.exceptions:VLLMValidationError",
    # load generator
    "add_load_options": "vllm.benchmarks.serve:add_cli_args",
    "run_load": "vllm.benchmarks.serve:main",
    # server
    "FlexibleArgumentParser": "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "ServeSubcommand": "vllm.entrypoints.cli.serve:ServeSubcommand",
    "cli_env_setup": {
        "0.26": "vllm.entrypoints.serve.utils.api_utils:cli_env_setup",
        "0.33": "vllm.entrypoints.common.startup:cli_env_setup",
    },
    "configure_logging_from_args": {"0.26": None, "0.32": "vllm.logger:configure_logging_from_args"},
    # worker
    "ModelState": "vllm.v1.worker.gpu.model_states.interface:ModelState",
    "NewRequestData": "vllm.v1.core.sched.output:NewRequestData",
    "PPMissingLayer": "vllm.model_executor.models.utils:PPMissingLayer",
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "RunnerV1": "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "RunnerV2": "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    "SchedulerOutput": "vllm.v1.core.sched.output:SchedulerOutput",
    "VocabParallelEmbedding": "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
    "Worker": "vllm.v1.worker.gpu_worker:Worker",
    "WorkerBase": "vllm.v1.worker.worker_base:WorkerBase",
    "WorkerWrapperBase": "vllm.v1.worker.worker_base:WorkerWrapperBase",
    "get_pp_group": "vllm.distributed.parallel_state:get_pp_group",
    "get_tp_group": "vllm.distributed.parallel_state:get_tp_group",
    "set_current_vllm_config": "vllm.config:set_current_vllm_config",
}
"""Name -> module:attribute. `compat.NAME` is the attribute.

Where versions differ: a dict, the oldest first, of a version to the path from that version on. None: no such name."""


def __getattr__(name: str) -> Any:
    if name not in PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (path := path_of(name)) is None:
        raise _unsupported(name, "found none")
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module.startswith(error.name or "-"):
            raise  # something that vLLM itself misses
        raise _unsupported(path, "found none") from error


def path_of(name: str) -> str | None:
    """Return where a name of `PATHS` lives in the installed version, None: it has no such name."""
    paths = PATHS[name]
    if isinstance(paths, str):
        return paths
    return [path for version, path in paths.items() if _is_since(version)][-1]


def has(name: str) -> bool:
    """Return whether the installed version has a name of `PATHS` or, as "owner.name", a seam, by these tables."""
    if name in PATHS:
        return path_of(name) is not None
    return any(_is_since(seam.since) for seam in (*SEAMS, *RUNNER_SEAMS) if f"{seam.owner}.{seam.name}" == name)


def _is_since(version: str) -> bool:
    """Return whether the installed vLLM is of this version or a later one; "": always."""
    return not version or _release(_version()) >= _release(version)


def _release(version: str) -> tuple[int, ...]:
    """Return a version's first two numbers. One older than all tested counts as the newest: a build without a tag."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = tuple(map(int, numbers.groups())) if numbers else ()
    oldest, newest = (tuple(map(int, TESTED[end].split("."))) for end in (0, -1))
    return release if release >= oldest else newest


def _unsupported(expected: str, got: str, why: str = "imported") -> AttributeError:
    return AttributeError(
        f"vllm: expected {expected} ({why}), {got} in version {_version()}; "
        f"install vLLM {', '.join(TESTED[:-1])} or {TESTED[-1]}, or adapt steerfast/vllm/compat.py"
    )


SEAMS = (
    *seams({
        # config
        "EngineArgs.create_engine_config(self, *)": "wrapped: checks and completes what a user configured",
        "SchedulerConfig.get_scheduler_cls(self)": "called: a scheduler of another class is refused",
        # engine core: requests in, requests out
        "EngineCore._initialize_kv_caches(self, vllm_config)": "wrapped: all workers have to steer",
        "EngineCore.preprocess_add_request(self, request)": "wrapped: a request takes its profiles",
        "EngineCore.add_request(self, request, *)": "wrapped: a request enters the scheduler",
        "EngineCoreProc._handle_client_request(self, request_type, request)":
            "wrapped: an engine that is paused or ends refuses a request",
        "EngineCore.post_step(self, *)": "wrapped: workers empty slots between two steps",
        "EngineCore.scheduler": "read",
        "EngineCore.model_executor": "read: calls workers",
        "EngineCoreRequest.sampling_params": "set: workers read the assignment there",
        "EngineCoreRequest.cache_salt": "set: requests whose whole prompt is edited",
        "EngineCoreRequest.resumable": "read: sessions are refused",
        "EngineCoreRequest.mm_features": "read: images under whole-prompt edits are refused",
        "EngineCoreOutput.trace_headers": "set: carries decisions to the front end",
        "Scheduler.__init__(self, vllm_config, *)": "wrapped: makes the engine's steering",
        "Scheduler._free_request(self, request, *)": "wrapped: a request ended",
        "Scheduler.update_from_output(self, scheduler_output, model_runner_output)":
            "wrapped: decisions come before the tokens of their step",
        "Scheduler.requests, kv_cache_manager": "read",
        "Scheduler.hash_block_size": "read: tokens of a named block",
        "Scheduler.structured_output_manager": "read: its reasoning parser",
        # engine core: names of cache blocks
        "KVCacheManager.coordinator": "read",
        "KVCacheManager.cache_blocks(self, request, num_computed_tokens)": "called: names given late",
        "KVCacheManager.take_events(self)": "wrapped: edited blocks are not published",
        "KVCacheCoordinator.cache_blocks(self, request, num_computed_tokens)": "wrapped: blocks without a name",
        "Request._block_hasher": "set: names of edited blocks are random",
        "Request.block_hashes": "cut: names of blocks that wait for a decision",
        "Request.update_block_hashes(self)": "called: names after a decision",
        "Request.all_token_ids": "read: the end of a thought",
        "Request.num_tokens, num_prompt_tokens, num_computed_tokens": "read",
        # front end
        "InputProcessor.__init__(self, vllm_config, *)": "wrapped: makes the front end",
        "InputProcessor.process_inputs(self, request_id, prompt, params, *)": "wrapped: refusals",
        "InputProcessor.tokenizer": "read: compared with the profiles'",
        "OutputProcessor.process_outputs(self, engine_core_outputs, *)": "wrapped: decisions are reported",
        "OutputProcessor.request_states, tracing_enabled": "read",
        "OutputProcessor.do_tracing(self, engine_core_output, req_state, *)": "wrapped: request spans",
        "RequestState.make_request_output(self, *)": "wrapped: outputs carry the decision",
        "AsyncLLM.__init__(self, vllm_config, *)": "wrapped: its output processor",
        "AsyncLLM.input_processor, output_processor": "read",
        "AsyncLLM.engine_core": "read: admin calls",
        "LLMEngine.__init__(self, vllm_config, *)": "wrapped: its output processor",
        "LLMEngine.input_processor, output_processor": "read",
        "BeamSearchOnlineMixin.beam_search(self, *)": "wrapped: refuses beams",
        "BeamSearchOfflineMixin.beam_search(self, *)": "wrapped: refuses beams",
        # workers
        "WorkerWrapperBase.init_device(self, *)": "wrapped: the runner is steered when its model is loaded",
        "WorkerWrapperBase.worker": "read",
        "WorkerBase.load_model(self, *)": "wrapped, each worker's",
        "WorkerBase.model_runner": "read",
        "SchedulerOutput.finished_req_ids, scheduled_new_reqs, total_num_scheduled_tokens": "read",
        "SchedulerOutput.num_scheduled_tokens": "read: V1's rows",
        "NewRequestData.req_id": "read",
        "NewRequestData.sampling_params": "read: the assignment",
        "NewRequestData.prompt_token_ids, prompt_embeds": "read: the prompt's length",
    }),
    *seams({"Scheduler.num_hash_lookahead_tokens": "read: tokens after a block that its name covers"}, since="0.33"),
)  # fmt: skip
"""What is checked in each process when the plugin starts."""

RUNNER_SEAMS = seams({
    "RunnerV1.execute_model(self, scheduler_output, intermediate_tensors)":
        "wrapped, V1: a step begins, a forward pass was launched",
    "RunnerV1._preprocess(self, scheduler_output, num_input_tokens, intermediate_tensors, *)":
        "wrapped, V1: the rows of a step are known",
    "RunnerV1._dummy_run(self, num_tokens, *)": "wrapped, V1: a pass without requests; called at start",
    "RunnerV1.sample_tokens(self, grammar_output)": "wrapped, V1: decisions go with the tokens",
    "RunnerV1.get_model(self)": "called, V1",
    "RunnerV1.input_batch": "read, V1: req_ids and num_computed_tokens_cpu",
    "RunnerV1.positions": "read, V1: rows of drafts",
    "RunnerV2.execute_model(self, scheduler_output, intermediate_tensors, dummy_run, *)":
        "wrapped, V2: a step begins, a forward pass was launched or has no requests",
    "RunnerV2._dummy_run(self, num_tokens, *)": "called, V2: a pass without requests",
    "RunnerV2.sample_tokens(self, grammar_output)": "wrapped, V2: decisions go with the tokens",
    "RunnerV2.get_model(self)": "called, V2",
    "ModelState.preprocess_state(self, input_batch, block_tables, kv_cache_config, *)":
        "wrapped, V2: the rows of a step are known",
})  # fmt: skip
"""What is checked in a worker, of the runner that it has."""

WEIGHT_SEAMS = seams({
    "Worker.reload_weights(self, *)": "wrapped: weights changed",
    "Worker.finish_weight_update(self)": "wrapped: weights changed",
    "Worker._weight_update_active": "read",
})  # fmt: skip
"""What is checked of the worker itself."""


def check(expected: Iterable[Seam] = SEAMS) -> None:
    """Raise AttributeError at the first seam that the installed vLLM does not have as expected."""
    for seam in expected:
        check_seam(seam)


def check_seam(seam: Seam, owner: type | None = None) -> None:
    """Raise AttributeError where the installed vLLM differs from a seam.

    Args:
        owner: the class to look at, a subclass of the table's class. Default: the table's class.
    """
    if not _is_since(seam.since):
        return
    difference = seam.difference(__getattr__(seam.owner) if owner is None else owner)
    if difference is not None:
        path = f"{str(path_of(seam.owner)).replace(':', '.')}.{seam.expected}"
        raise _unsupported(path, difference, seam.why)


def is_v1(runner: Any) -> bool:
    """Whether a model runner is of vLLM's first kind, else of its second, which GPUs may have."""
    return not runner.vllm_config.use_v2_model_runner


def dummy_run(runner: Any, rows: int) -> Any:
    """Pass rows without requests through the model of a runner, eagerly if it is not compiled.

    Returns:
        The last hidden states, or None where another stage of the pipeline follows.
    """
    output = runner._dummy_run(rows, is_profile=True, **({} if is_v1(runner) else {"skip_attn": True}))
    return output[0] if isinstance(output, tuple) else None


def check_runner(runner: Any) -> None:
    """Raise AttributeError at the first seam that a worker's model runner does not have as expected."""
    if is_v1(runner):
        owners: dict[str, type] = {"RunnerV1": type(runner)}
    else:
        owners = {"RunnerV2": type(runner), "ModelState": type(runner.model_state)}
    for seam in RUNNER_SEAMS:
        if seam.owner in owners:
            check_seam(seam, owners[seam.owner])


@functools.cache
def check_version() -> None:
    """Warn, once per process, about a version of vLLM that is not in `TESTED`."""
    version = _version()
    if not any(version == tested or version.startswith(f"{tested}.") for tested in TESTED):
        _log.warning("steerfast was tested with vLLM %s, not with %s", ", ".join(TESTED), version)


def _version() -> str:
    return str(importlib.import_module("vllm").__version__)


def around(owner: str, name: str) -> Callable[[F], F]:
    """Return a decorator that puts a function (original, *args, **kwargs) in the place of a method of vLLM.

    A function that is there already, by its module and name, is not put there again.

    Args:
        owner, name: of a seam in `SEAMS`.

    Raises:
        KeyError: there is no such seam.
        AttributeError: the installed vLLM differs from it.
    """
    seam = next((seam for seam in SEAMS if (seam.owner, seam.name) == (owner, name)), None)
    if seam is None or seam.parameters is None:
        raise KeyError(f"{owner}.{name}: expected a method in steerfast.vllm.compat.SEAMS")
    check_seam(seam)
    cls = __getattr__(owner)

    def put(function: F) -> F:
        key = f"{function.__module__}.{function.__qualname__}"
        original = inspect.getattr_static(cls, name)
        inner = original
        while inner is not None:
            if getattr(inner, "steerfast_wrapper", None) == key:
                return function
            inner = getattr(inner, "__wrapped__", None)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        wrapper.steerfast_wrapper = key  # type: ignore[attr-defined]
        setattr(cls, name, wrapper)
        return function

    return put

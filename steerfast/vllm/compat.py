"""Every name of vLLM that steerfast uses, in one table, and the checks that they are as we expect.

Nothing of vLLM is imported before a name is asked for: `compat.Scheduler` imports its module at that moment. To support
another version of vLLM, change this file: `PATHS` where names live, `SEAMS` for what is wrapped or touched, `TESTED`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from steerfast._seams import Seam

__all__ = ["PATHS", "SEAMS", "TESTED", "Seam", "around", "check", "check_runner", "check_version", "is_v1"]

F = TypeVar("F", bound=Callable[..., Any])
_log = logging.getLogger("vllm.steerfast")  # a child of vLLM's logger, which has the handlers

TESTED = ("0.32",)
"""Versions of vLLM whose tests pass; pyproject's extra `serve` has the same bounds."""

PATHS = {
    # engine
    "EngineArgs": "vllm.engine.arg_utils:EngineArgs",
    "SchedulerConfig": "vllm.config.scheduler:SchedulerConfig",
    "EngineCore": "vllm.v1.engine.core:EngineCore",
    "EngineCoreOutput": "vllm.v1.engine:EngineCoreOutput",
    "EngineCoreRequest": "vllm.v1.engine:EngineCoreRequest",
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
    # server
    "FlexibleArgumentParser": "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "ServeSubcommand": "vllm.entrypoints.cli.serve:ServeSubcommand",
    "cli_env_setup": "vllm.entrypoints.serve.utils.api_utils:cli_env_setup",
    "configure_logging_from_args": "vllm.logger:configure_logging_from_args",
    # worker
    "ModelState": "vllm.v1.worker.gpu.model_states.interface:ModelState",
    "NewRequestData": "vllm.v1.core.sched.output:NewRequestData",
    "PPMissingLayer": "vllm.model_executor.models.utils:PPMissingLayer",
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "RunnerV1": "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "RunnerV2": "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    "SchedulerOutput": "vllm.v1.core.sched.output:SchedulerOutput",
    "VocabParallelEmbedding": "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
    "WorkerBase": "vllm.v1.worker.worker_base:WorkerBase",
    "WorkerWrapperBase": "vllm.v1.worker.worker_base:WorkerWrapperBase",
    "get_pp_group": "vllm.distributed.parallel_state:get_pp_group",
    "get_tp_group": "vllm.distributed.parallel_state:get_tp_group",
}
"""Name -> module:attribute. `compat.NAME` is the attribute."""


def __getattr__(name: str) -> Any:
    if name not in PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PATHS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module.startswith(error.name or "-"):
            raise  # something that vLLM itself misses
        raise _unsupported(PATHS[name], "found none") from error


def _unsupported(expected: str, got: str, why: str = "imported") -> AttributeError:
    return AttributeError(
        f"vllm: expected {expected} ({why}), {got} in version {_version()}; "
        f"install vLLM {' or '.join(TESTED)}, or adapt steerfast/vllm/compat.py"
    )


SEAMS = (
    # config
    Seam("EngineArgs", "create_engine_config", ("self", "*"), "wrapped: checks and completes what a user configured"),
    Seam("SchedulerConfig", "get_scheduler_cls", ("self",), "called: a scheduler of another class is refused"),
    # engine core: requests in, requests out
    Seam("EngineCore", "_initialize_kv_caches", ("self", "vllm_config"), "wrapped: all workers have to steer"),
    Seam("EngineCore", "preprocess_add_request", ("self", "request"), "wrapped: a request takes its profiles"),
    Seam("EngineCore", "add_request", ("self", "request", "*"), "wrapped: a request enters the scheduler"),
    Seam("EngineCore", "post_step", ("self", "*"), "wrapped: workers empty slots between two steps"),
    Seam("EngineCore", "scheduler", None, "read"),
    Seam("EngineCore", "model_executor", None, "read: calls workers"),
    Seam("EngineCoreRequest", "sampling_params", None, "set: workers read the assignment there"),
    Seam("EngineCoreRequest", "cache_salt", None, "set: requests whose whole prompt is edited"),
    Seam("EngineCoreRequest", "resumable", None, "read: sessions are refused"),
    Seam("EngineCoreRequest", "mm_features", None, "read: images under whole-prompt edits are refused"),
    Seam("EngineCoreOutput", "kv_transfer_params", None, "set: carries decisions to the front end"),
    Seam("Scheduler", "__init__", ("self", "vllm_config", "*"), "wrapped: makes the engine's steering"),
    Seam("Scheduler", "_free_request", ("self", "request", "*"), "wrapped: a request ended"),
    Seam(
        "Scheduler",
        "update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        "wrapped: decisions come before the tokens of their step",
    ),
    Seam("Scheduler", "requests", None, "read"),
    Seam("Scheduler", "hash_block_size", None, "read: tokens of a named block"),
    Seam("Scheduler", "kv_cache_manager", None, "read"),
    Seam("Scheduler", "structured_output_manager", None, "read: its reasoning parser"),
    # engine core: names of cache blocks
    Seam("KVCacheManager", "coordinator", None, "read"),
    Seam("KVCacheManager", "cache_blocks", ("self", "request", "num_computed_tokens"), "called: names given late"),
    Seam(
        "KVCacheCoordinator",
        "cache_blocks",
        ("self", "request", "num_computed_tokens"),
        "wrapped: blocks without a name",
    ),
    Seam("Request", "_block_hasher", None, "set: names of edited blocks are random"),
    Seam("Request", "block_hashes", None, "cut: names of blocks that wait for a decision"),
    Seam("Request", "update_block_hashes", ("self",), "called: names after a decision"),
    Seam("Request", "all_token_ids", None, "read: the end of a thought"),
    Seam("Request", "num_tokens", None, "read"),
    Seam("Request", "num_prompt_tokens", None, "read"),
    Seam("Request", "num_computed_tokens", None, "read"),
    # front end
    Seam("InputProcessor", "__init__", ("self", "vllm_config", "*"), "wrapped: makes the front end"),
    Seam("InputProcessor", "process_inputs", ("self", "request_id", "prompt", "params", "*"), "wrapped: refusals"),
    Seam("InputProcessor", "tokenizer", None, "read: compared with the profiles'"),
    Seam("OutputProcessor", "process_outputs", ("self", "engine_core_outputs", "*"), "wrapped: decisions are reported"),
    Seam("OutputProcessor", "request_states", None, "read"),
    Seam("RequestState", "make_request_output", ("self", "*"), "wrapped: outputs carry the decision"),
    Seam("AsyncLLM", "__init__", ("self", "vllm_config", "*"), "wrapped: its output processor"),
    Seam("AsyncLLM", "input_processor", None, "read"),
    Seam("AsyncLLM", "output_processor", None, "read"),
    Seam("AsyncLLM", "engine_core", None, "read: admin calls"),
    Seam("LLMEngine", "__init__", ("self", "vllm_config", "*"), "wrapped: its output processor"),
    Seam("LLMEngine", "input_processor", None, "read"),
    Seam("LLMEngine", "output_processor", None, "read"),
    Seam("BeamSearchOnlineMixin", "beam_search", ("self", "*"), "wrapped: refuses beams"),
    Seam("BeamSearchOfflineMixin", "beam_search", ("self", "*"), "wrapped: refuses beams"),
    # workers
    Seam("WorkerWrapperBase", "init_device", ("self", "*"), "wrapped: the runner is steered when its model is loaded"),
    Seam("WorkerWrapperBase", "worker", None, "read"),
    Seam("WorkerBase", "load_model", ("self", "*"), "wrapped, each worker's"),
    Seam("WorkerBase", "model_runner", None, "read"),
    Seam("SchedulerOutput", "finished_req_ids", None, "read"),
    Seam("SchedulerOutput", "scheduled_new_reqs", None, "read"),
    Seam("SchedulerOutput", "num_scheduled_tokens", None, "read: V1's rows"),
    Seam("SchedulerOutput", "total_num_scheduled_tokens", None, "read"),
    Seam("NewRequestData", "req_id", None, "read"),
    Seam("NewRequestData", "sampling_params", None, "read: the assignment"),
    Seam("NewRequestData", "prompt_len", None, "read"),
)
"""What is checked in each process when the plugin starts."""

RUNNER_SEAMS = (
    Seam(
        "RunnerV1",
        "execute_model",
        ("self", "scheduler_output", "intermediate_tensors"),
        "wrapped, V1: a step begins, a forward pass was launched",
    ),
    Seam(
        "RunnerV1",
        "_preprocess",
        ("self", "scheduler_output", "num_input_tokens", "intermediate_tensors", "*"),
        "wrapped, V1: the rows of a step are known",
    ),
    Seam(
        "RunnerV1", "_dummy_run", ("self", "num_tokens", "*"), "wrapped, V1: a pass without requests; called on a CPU"
    ),
    Seam("RunnerV1", "sample_tokens", ("self", "grammar_output"), "wrapped, V1: decisions go with the tokens"),
    Seam("RunnerV1", "get_model", ("self",), "called, V1"),
    Seam("RunnerV1", "input_batch", None, "read, V1: req_ids and num_computed_tokens_cpu"),
    Seam(
        "RunnerV2",
        "execute_model",
        ("self", "scheduler_output", "intermediate_tensors", "dummy_run", "*"),
        "wrapped, V2: a step begins, a forward pass was launched or has no requests",
    ),
    Seam("RunnerV2", "sample_tokens", ("self", "grammar_output"), "wrapped, V2: decisions go with the tokens"),
    Seam("RunnerV2", "get_model", ("self",), "called, V2"),
    Seam(
        "ModelState",
        "preprocess_state",
        ("self", "input_batch", "block_tables", "kv_cache_config", "*"),
        "wrapped, V2: the rows of a step are known",
    ),
)
"""What is checked in a worker, of the runner that it has."""


def check(seams: Iterable[Seam] = SEAMS) -> None:
    """Raise AttributeError at the first seam that the installed vLLM does not have as expected."""
    for seam in seams:
        check_seam(seam)


def check_seam(seam: Seam, owner: type | None = None) -> None:
    """Raise AttributeError where the installed vLLM differs from a seam.

    Args:
        owner: the class to look at, a subclass of the table's class. Default: the table's class.
    """
    difference = seam.difference(__getattr__(seam.owner) if owner is None else owner)
    if difference is not None:
        path = f"{PATHS[seam.owner].replace(':', '.')}.{seam.expected}"
        raise _unsupported(path, difference, seam.why)


def is_v1(runner: Any) -> bool:
    """Whether a model runner is of vLLM's first kind, else of its second, which GPUs may have."""
    return hasattr(runner, "_preprocess")


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
        _log.warning("steerfast was tested with vLLM %s, not with %s", " and ".join(TESTED), version)


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

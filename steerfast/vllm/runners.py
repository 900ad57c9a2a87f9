"""The adapters of vLLM's workers and of its two model runners.

A runner reports, shortly before a step's forward pass, which requests lie where in its rows (`_adapt`). The rest is the
same for both: `steerfast.vllm.worker`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import numpy as np

from steerfast.errors import SteerfastError
from steerfast.vllm import compat
from steerfast.vllm.compat import around
from steerfast.vllm.config import ServingConfig, identity_of, splits_prompts
from steerfast.vllm.layers import check_scale, find_layers, sketch_of, steer_layers
from steerfast.vllm.ops import activate
from steerfast.vllm.probe import LayerProbe, uncompiled, zeroed
from steerfast.vllm.ranks import RowLayout
from steerfast.vllm.worker import WorkerRuntime, WorkerShape

PROBED_ROWS = 16  # of the passes that show what layers return


def attach(runner: Any, config: ServingConfig) -> WorkerRuntime:
    """Steer a model runner whose model is loaded.

    Raises:
        ArchitectureError: its model cannot be steered.
        ProfileError: a profile is another model's.
    """
    compat.check_runner(runner)
    vllm_config, model = runner.vllm_config, runner.get_model()
    text_config = vllm_config.model_config.hf_text_config
    drawn = vllm_config.load_config.load_format == "dummy"  # a trainer sends the weights later
    sketch = None if drawn else sketch_of(model, text_config.vocab_size)
    identity = replace(identity_of(text_config), embedding_sketch=sketch)
    layers = find_layers(model, identity.num_layers)
    check_scale(layers, vllm_config.model_config.dtype)

    def pass_rows() -> Any:
        with compat.set_current_vllm_config(vllm_config), uncompiled(model), zeroed():
            return compat.dummy_run(runner, min(PROBED_ROWS, vllm_config.scheduler_config.max_num_batched_tokens))

    adding = LayerProbe(layers, pass_rows, compat.get_tp_group().world_size).adding_classes()
    here = steer_layers(layers, config.layers, identity.hidden_size, adding, config.reading)
    scheduler, stage = vllm_config.scheduler_config, compat.get_pp_group()
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    shape = WorkerShape(
        max_rows=max(scheduler.max_num_batched_tokens, graphs),
        max_requests=scheduler.max_num_seqs,
        split=splits_prompts(vllm_config),
        first=stage.is_first_rank,
        last=stage.is_last_rank,
    )
    runtime = WorkerRuntime(config, identity, here, runner.device, shape, RowLayout.of(model))
    runner.steerfast = runtime
    if hasattr(runner, "model_memory_usage"):  # the KV cache gets the rest
        runner.model_memory_usage += runtime.nbytes
    _adapt(runner, runtime)
    activate(runtime)
    pass_rows()  # compares the rows of layers and ranks
    return runtime


def _adapt(runner: Any, runtime: WorkerRuntime) -> None:
    """Let a runner report its steps."""
    (_adapt_v1 if compat.is_v1(runner) else _adapt_v2)(runner, runtime)
    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

    def execute(scheduled: Any, intermediate_tensors: Any = None, **kwargs: Any) -> Any:
        run = partial(execute_model, scheduled, intermediate_tensors, **kwargs)
        if kwargs.get("dummy_run"):
            runtime.rest()
            return run()
        runtime.begin(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return run()
        runtime.incoming = intermediate_tensors
        return runtime.launched(run())

    def sample(*args: Any, **kwargs: Any) -> Any:
        return runtime.report(sample_tokens(*args, **kwargs))

    runner.execute_model, runner.sample_tokens = execute, sample


def _adapt_v1(runner: Any, runtime: WorkerRuntime) -> None:
    preprocess, dummy_run = runner._preprocess, runner._dummy_run
    drafts = runner.vllm_config.speculative_config is not None

    def steered_preprocess(scheduled: Any, num_input_tokens: int, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        names = list(batch.req_ids)
        past = batch.num_computed_tokens_cpu[: len(names)]
        lengths = np.fromiter(map(scheduled.num_scheduled_tokens.__getitem__, names), np.int64, len(names))
        runtime.step(names, past, lengths, num_input_tokens, runner.positions if drafts else None)
        return preprocess(scheduled, num_input_tokens, *args, **kwargs)

    def steered_dummy_run(*args: Any, **kwargs: Any) -> Any:
        runtime.rest()
        return dummy_run(*args, **kwargs)

    runner._preprocess, runner._dummy_run = steered_preprocess, steered_dummy_run


def _adapt_v2(runner: Any, runtime: WorkerRuntime) -> None:
    state = runner.model_state
    preprocess_state = state.preprocess_state
    drafts = runner.vllm_config.speculative_config is not None

    def steered_preprocess_state(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        runtime.step(
            list(input_batch.req_ids),
            input_batch.num_computed_tokens_np[: input_batch.num_reqs],
            input_batch.num_scheduled_tokens[: input_batch.num_reqs],
            input_batch.num_tokens_after_padding,
            input_batch.positions if drafts else None,
        )
        return preprocess_state(input_batch, *args, **kwargs)

    state.preprocess_state = steered_preprocess_state


def watch_weights(worker: Any, runtime: WorkerRuntime) -> None:
    """Compare a worker's model with its profiles whenever its weights have changed.

    Trainers send weights by `reload_weights`, by vLLM's weight transfer, or straight to `load_weights` of the model.
    Trained weights keep the embedding's direction; another model's do not. Sleep needs no care: profiles and tables lie
    outside the memory that vLLM's allocator frees.

    Whoever changes them gets the ProfileError. The worker refuses steered requests from then on, until weights come
    that agree with all profiles.
    """
    for seam in compat.WEIGHT_SEAMS:
        compat.check_seam(seam, type(worker))
    runner = worker.model_runner
    model, vocabulary = runner.get_model(), runner.vllm_config.model_config.hf_text_config.vocab_size

    running: list[str] = []  # reload_weights calls load_weights

    def watch(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            running.append(name)
            try:
                result = method(*args, **kwargs)
            finally:
                running.pop()
            # Before finish_weight_update, ranks may load different parts, and weights may lie nowhere.
            absent = any(parameter.is_meta for parameter in model.parameters())
            if not (running or absent or worker._weight_update_active):
                runtime.identify(sketch_of(model, vocabulary))
            return result

        setattr(owner, name, wrapper)

    for owner, name in ((worker, "reload_weights"), (worker, "finish_weight_update"), (model, "load_weights")):
        watch(owner, name)


def _runtime(worker: Any) -> WorkerRuntime:
    runtime = getattr(worker.model_runner, "steerfast", None)
    if runtime is None:
        raise SteerfastError("worker: expected one that steers, got one that was not configured for it")
    return runtime


def steerfast_steers(worker: Any) -> bool:
    """Return whether a worker steers, so that the engine notices one that does not."""
    return getattr(worker.model_runner, "steerfast", None) is not None


def steerfast_write(worker: Any, slots: list[int], path: str, checksum: str) -> str | None:
    """See `WorkerRuntime.write`. Return the error as text: if a worker raises, vLLM drops the answers of others."""
    try:
        _runtime(worker).write(slots, path, checksum)
    except Exception as error:
        return str(error)
    return None


def steerfast_clear(worker: Any, slot: int) -> None:
    """See `WorkerRuntime.clear`."""
    _runtime(worker).clear(slot)


def steerfast_end_thoughts(worker: Any, answers: Mapping[str, int]) -> None:
    """See `WorkerRuntime.end_thoughts`."""
    _runtime(worker).end_thoughts(answers)


def install() -> None:
    """Let workers of configured engines steer, and answer `steerfast_*` of collective_rpc."""
    for function in (steerfast_steers, steerfast_write, steerfast_clear, steerfast_end_thoughts):
        setattr(compat.WorkerBase, function.__name__, function)

    # init_worker would be too early: a worker's process loads its plugins in the middle of it.
    @around("WorkerWrapperBase", "init_device")
    def init_device(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        config = ServingConfig.of(self.vllm_config)
        if config is not None:
            compat.check(compat.RUNNER_SEAMS)
            load_model = self.worker.load_model

            def steered_load_model(*args: Any, **kwargs: Any) -> Any:
                loaded = load_model(*args, **kwargs)
                watch_weights(self.worker, attach(self.worker.model_runner, config))
                return loaded

            self.worker.load_model = steered_load_model
        return result

"""Weights that change while an engine runs: profiles stay, and belong to the model still, or it steers no more.

Trainers send weights by `reload_weights`, by vLLM's weight transfer, or straight to `load_weights` of the model. After
each of these the embedding is compared with the profiles anew. Trained weights keep the embedding's direction; another
model's do not. Sleep needs no care: profiles and tables lie outside the memory that vLLM's allocator frees.
"""

from __future__ import annotations

import functools
from typing import Any

from steerfast.vllm import compat
from steerfast.vllm.layers import sketch_of
from steerfast.vllm.worker import WorkerRuntime


def watch_weights(worker: Any, runtime: WorkerRuntime) -> None:
    """Compare a worker's model with its profiles whenever its weights have changed.

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

        @functools.wraps(method)
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

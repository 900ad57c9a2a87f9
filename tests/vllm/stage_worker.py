"""vLLM's CPU worker for a stage of a pipeline that is not compiled: 0.32.0 makes the buffers of what other stages send
only when it compiles."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        runner: Any = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )

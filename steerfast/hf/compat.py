"""The private names of transformers that steering relies on, in one table.

They are checked before the first use. To support another release, run tests/hf/test_compat.py and mend the module that
the last column names.
"""

from __future__ import annotations

import functools
import importlib

from steerfast._seams import Seam, seams
from steerfast.errors import ArchitectureError

_BATCHING = "transformers.generation.continuous_batching"
_MANAGER = f"{_BATCHING}.continuous_api:ContinuousBatchingManager"
_REQUEST = f"{_BATCHING}.requests:RequestState"
_CACHE = "transformers.cache_utils:Cache"
_LAYERS = "transformers.cache_utils:"

CONTINUOUS_BATCHING = seams({
    f"{_MANAGER}.add_request(self, input_ids, request_id, *)": "packed.py: a request takes its profiles",
    f"{_MANAGER}.add_requests(self, inputs, *)": "packed.py: requests take their profiles",
    f"{_MANAGER}.is_running(self)": "packed.py: a running manager is not destroyed",
    f"{_MANAGER}._create_batch_processor(self)": "packed.py: the paged cache gets a roster",
    f"{_MANAGER}._run_generation_loop(self, *)": "packed.py: requests end with the loop",
    f"{_MANAGER}._generation_step(self)": "packed.py: tables are written before a forward pass",
    f"{_MANAGER}.batch_processor": "packed.py: its scheduler, cache and inputs",
    f"{_MANAGER}.input_queue": "packed.py: requests that wait",
    f"{_MANAGER}.distributed_helper": "packed.py: tensor parallelism",
    f"{_MANAGER}.num_return_sequences": "packed.py: names of further answers",
    f"{_MANAGER}._request_counter, _request_lock": "packed.py: names of requests",
    f"{_REQUEST}.request_id": "packed.py: whose rows these are",
    f"{_REQUEST}.position_offset": "packed.py: rows that came before",
    f"{_REQUEST}.initial_tokens": "packed.py: the prompt's length",
    f"{_REQUEST}._true_initial_tokens": "packed.py: the prompt's length after a lost cache",
})  # fmt: skip
"""Seams of `generate_batch` and its managers."""

CACHES = seams({
    f"{_CACHE}.get_seq_length(self, *)": "latch.py: tokens that came before",
    f"{_CACHE}.reorder_cache(self, beam_idx)": "latch.py: decisions move with the sequences",
    f"{_CACHE}.batch_select_indices(self, indices)": "latch.py: decisions move with the sequences",
    f"{_CACHE}.batch_repeat_interleave(self, repeats)": "latch.py: decisions move with the sequences",
    f"{_LAYERS}DynamicLayer.keys, values": "caches.py: a second pass puts sequences back",
    f"{_LAYERS}StaticLayer.cumulative_length": "caches.py: a second pass rewinds",
    f"{_LAYERS}StaticLayer.max_cache_len": "caches.py: windows that would slide",
})  # fmt: skip
"""Seams of caches."""


@functools.cache
def check(expected: tuple[Seam, ...]) -> None:
    """Raise ArchitectureError at the first seam that the installed transformers does not have as expected."""
    for seam in expected:
        module, _, name = seam.owner.partition(":")
        try:
            difference = seam.difference(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            difference = "found no such class"
        if difference is not None:
            version = importlib.import_module("transformers").__version__
            raise ArchitectureError(
                f"transformers {version}: expected {seam.owner.replace(':', '.')}.{seam.expected} ({seam.why}), "
                f"{difference}; install a release that pyproject.toml allows, or adapt steerfast/hf/compat.py"
            )

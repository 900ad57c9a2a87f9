"""The private names of transformers that steering relies on, in one table.

They are checked before the first use. To support another release, run tests/hf/test_compat.py and mend the module that
the last column names.
"""

from __future__ import annotations

import functools
import importlib

from steerfast._seams import Seam
from steerfast.errors import ArchitectureError

_BATCHING = "transformers.generation.continuous_batching"
_MANAGER = f"{_BATCHING}.continuous_api:ContinuousBatchingManager"
_REQUEST = f"{_BATCHING}.requests:RequestState"
_CACHE = "transformers.cache_utils:Cache"

CONTINUOUS_BATCHING = (
    Seam(_MANAGER, "add_request", ("self", "input_ids", "request_id", "*"), "packed.py: a request takes its profiles"),
    Seam(_MANAGER, "add_requests", ("self", "inputs", "*"), "packed.py: requests take their profiles"),
    Seam(_MANAGER, "is_running", ("self",), "packed.py: a running manager is not destroyed"),
    Seam(_MANAGER, "_create_batch_processor", ("self",), "packed.py: the paged cache gets a roster"),
    Seam(_MANAGER, "_run_generation_loop", ("self", "*"), "packed.py: requests end with the loop"),
    Seam(_MANAGER, "_generation_step", ("self",), "packed.py: tables are written before a forward pass"),
    Seam(_MANAGER, "batch_processor", None, "packed.py: its scheduler, cache and inputs"),
    Seam(_MANAGER, "input_queue", None, "packed.py: requests that wait"),
    Seam(_MANAGER, "distributed_helper", None, "packed.py: tensor parallelism"),
    Seam(_MANAGER, "num_return_sequences", None, "packed.py: names of further answers"),
    Seam(_MANAGER, "_request_counter", None, "packed.py: names of requests"),
    Seam(_MANAGER, "_request_lock", None, "packed.py: names of requests"),
    Seam(_REQUEST, "request_id", None, "packed.py: whose rows these are"),
    Seam(_REQUEST, "position_offset", None, "packed.py: rows that came before"),
    Seam(_REQUEST, "initial_tokens", None, "packed.py: the prompt's length"),
    Seam(_REQUEST, "_true_initial_tokens", None, "packed.py: the prompt's length after a lost cache"),
)
"""Seams of `generate_batch` and its managers."""

CACHES = (
    Seam(_CACHE, "get_seq_length", ("self", "*"), "latch.py: tokens that came before"),
    Seam(_CACHE, "reorder_cache", ("self", "beam_idx"), "latch.py: decisions move with the sequences"),
    Seam(_CACHE, "batch_select_indices", ("self", "indices"), "latch.py: decisions move with the sequences"),
    Seam(_CACHE, "batch_repeat_interleave", ("self", "repeats"), "latch.py: decisions move with the sequences"),
    Seam("transformers.cache_utils:DynamicLayer", "keys", None, "caches.py: a second pass puts sequences back"),
    Seam("transformers.cache_utils:DynamicLayer", "values", None, "caches.py: a second pass puts sequences back"),
    Seam("transformers.cache_utils:StaticLayer", "cumulative_length", None, "caches.py: a second pass rewinds"),
    Seam("transformers.cache_utils:StaticLayer", "max_cache_len", None, "caches.py: windows that would slide"),
)
"""Seams of caches."""


@functools.cache
def check(seams: tuple[Seam, ...]) -> None:
    """Raise ArchitectureError at the first seam that the installed transformers does not have as expected."""
    for seam in seams:
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

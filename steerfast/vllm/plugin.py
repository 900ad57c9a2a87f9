"""The entry point that vLLM calls in each of its processes, before it reads any configuration or makes any model.

Every part wraps methods of vLLM's classes. What it wraps passes through where the engine at hand was not configured
for steering (`steerfast.vllm.config.ServingConfig.of` is None).
"""

from __future__ import annotations


def register() -> None:
    """Install all parts, once per process, however often vLLM calls this.

    Raises:
        AttributeError: this vLLM differs from what steerfast expects; it then does not start.
    """
    from steerfast.vllm import compat, config, engine, frontend, worker

    compat.check_version()
    compat.check()
    for part in (config, worker, engine, frontend):
        part.install()

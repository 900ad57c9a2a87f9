"""The entry point that vLLM calls in each of its processes, before it reads a configuration or makes a model.

Every part wraps methods of vLLM's classes. A wrapped method passes through for an engine that is not configured for
steering (`steerfast.vllm.config.ServingConfig.of` is None).
"""

from __future__ import annotations


def register() -> None:
    """Install all parts, once per process, however often vLLM calls this.

    Raises:
        AttributeError: this vLLM differs from what steerfast expects; it then does not start.
    """
    from steerfast.vllm import compat, config, engine, frontend, runners

    compat.check_version()
    compat.check()
    for part in (config, runners, engine, frontend):
        part.install()

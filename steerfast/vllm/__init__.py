"""The vLLM plugin: per-request gated steering on stock vLLM. See `steerfast.vllm.plugin`."""

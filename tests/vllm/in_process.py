"""Runs an engine in a process of its own and prints what it answers, for engines that this one cannot hold.

Usage: python in_process.py '{"model": ..., "options": {...}, "requests": [[token ids, extra_args or null], ...],
"tokens": n}'; the last line of its output is JSON, one {"token_ids", "logprobs", "steering"} per request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

TIMEOUT = 400
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else this process stays on one core for good
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "block_size": 32,
}


def ask(
    environment: dict[str, str], model: str, options: dict[str, Any], requests: list[Any], tokens: int
) -> list[dict[str, Any]]:
    """What such a process answers."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    asked = json.dumps({"model": model, "options": options, "requests": requests, "tokens": tokens})
    done = subprocess.run(
        [sys.executable, __file__, asked],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return answers


def generate(llm: Any, requests: list[Any], tokens: int) -> list[dict[str, Any]]:
    """Greedy answers to [token ids, extra_args or None], with the log probability of each of their tokens."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, extra_args=extra) for _, extra in requests
    ]
    prompts = [{"prompt_token_ids": list(ids)} for ids, _ in requests]
    return [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": [next(iter(at.values())).logprob for at in output.outputs[0].logprobs],
            "steering": getattr(output, "steering", None),
        }
        for output in llm.generate(prompts, parameters, use_tqdm=False)
    ]


def main() -> None:
    from vllm import LLM

    asked = json.loads(sys.argv[1])
    answers = generate(LLM(asked["model"], **asked["options"]), asked["requests"], asked["tokens"])
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()

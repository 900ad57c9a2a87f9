"""The ``steerfast`` key of vLLM's ``additional_config``: the profiles that an engine serves, and its limits.

A user writes ``{"profiles": {name: file}, "default": "name" or "name,name", "threshold": "strict", "locked": bool,
"max_strength": number, "slots": n, "stack": n, "layers": [...], "directory": folder, "observe": [name, ...],
"thinking": "count" or "skip"}``.
All keys are optional, except one of profiles and directory. `normalise` checks the key and completes it while vLLM
makes its configuration; `ServingConfig.of` reads it in every process. vLLM hashes the key, so that engines with other
layers never share a compiled model.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerfast._files import is_checked
from steerfast._versions import installed_version
from steerfast.errors import ProfileError
from steerfast.kernels.contract import MAX_STACK, Kinds
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.runtime.bank import kinds_of
from steerfast.runtime.roster import check_packed
from steerfast.vllm.compat import around
from steerfast.vllm.registry import variants

_log = logging.getLogger("vllm.steerfast")  # a child of vLLM's logger, which has the handlers
KEY = "steerfast"
OFF = "off"  # a request says so to be left unsteered
OBSERVE = "observe"  # gates decide and report, and no row is edited
COUNT, SKIP = "count", "skip"  # the tokens of a thought are tokens of the answer, or none
DEFAULT_SLOTS = 32
DEFAULT_MAX_STRENGTH = 10.0  # text falls apart well before this
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = installed_version("steerfast") or "unknown"
_EXPECTED: dict[str, tuple[Any, str, Any]] = {  # the type of a value, its description, and what a missing key means
    "profiles": (Mapping, "an object of names and files", {}),
    "default": (str, "a profile's name or null", None),  # or names, with commas
    "threshold": (str, "a threshold's name or null", None),
    "locked": (bool, "true or false", False),
    "max_strength": ((int, float), "a number", DEFAULT_MAX_STRENGTH),
    "slots": (int, "a whole number", None),
    "stack": (int, "a whole number", None),
    "layers": (list, "a list of layer numbers or null", None),
    "directory": (str, "a folder or null", None),
    "observe": (list, "a list of profiles' names", []),
    "thinking": (str, f"{COUNT!r} or {SKIP!r}", COUNT),
}
_NULLABLE = {"default", "threshold", "layers", "directory"}
_REFUSED_VARIABLES = (  # of the environment: name, whether only a lock minds it, why
    ("VLLM_USE_RUST_FRONTEND", False, "its HTTP server runs no plugin: it counts no decision and checks no tokenizer"),
    ("VLLM_SERVER_DEV_MODE", True, "its routes let any client call the engine"),
    ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", True, "it lets any client load an adapter, for which no profile was tuned"),
)


@dataclass(frozen=True)
class ServingConfig:
    """The profiles that an engine serves, and its limits.

    profiles: name -> absolute path, in the order of their slots.
    default: steers requests that name no profile; a stack is "a,b". None: no steering.
    locked: whether the default steers all requests, whatever they ask for.
    max_strength: the largest strength of a request; profiles are tuned at 1.
    slots: room for profiles. stack: the most profiles on one request.
    layers: the layers that profiles may steer or read, ascending.
    reading: the layers where a gate, or an edit other than ``add``, may read rows; None: all of `layers`. It is part of
        the key of compiled models, as the op gets other operands there.
    kinds: the edits and gates that profiles may have, a `steerfast.kernels.contract.Kinds`.
    directory: where profiles may be loaded from later; None: nowhere.
    version: of steerfast.
    observe: profiles that edit nothing, whatever a request asks: their gates decide and are reported.
    threshold: the named threshold of requests that name none; profiles without named thresholds keep theirs.
    thinking: "count": a thought is part of the answer. "skip": edits, and `answer_tokens`, begin where it ends.
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
    stack: int = 1
    reading: tuple[int, ...] | None = None
    observe: tuple[str, ...] = ()
    threshold: str | None = None
    thinking: str = COUNT

    @classmethod
    def of(cls, vllm_config: Any) -> ServingConfig | None:
        """Return the configuration of an engine; None where it has none and steers nothing.

        Raises:
            ValueError: `normalise` did not make it, or another version did.
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
        fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        return cls(**fields)

    def __str__(self) -> str:
        """Return what a log says at the start."""
        names = ", ".join(self.profiles) or "none yet"
        default = "no default" if self.default is None else f"default {self.default}"
        locked = ", locked" if self.locked else ""
        return f"steerfast {self.version} steers {len(self.profiles)} profiles ({names}): {default}{locked}"

    @property
    def defaults(self) -> list[str]:
        """The profiles of the default by name."""
        return [] if self.default is None else self.default.split(",")

    def check_environment(self) -> None:
        """Raise ValueError where a variable of this process's environment opens a way around steering."""
        for name, if_locked, why in _REFUSED_VARIABLES:
            value = os.environ.get(name, "")
            if (self.locked or not if_locked) and value.strip().lower() not in ("", "0", "false"):
                what = f"{KEY}.locked" if if_locked else KEY
                raise ValueError(f"{what}: expected {name} unset, got {value!r}: {why}")

    def warn_of_thoughts(self, name: str, profile: SteeringProfile, vllm_config: Any) -> None:
        """Warn of a profile that edits the beginning of an answer, where that may be a thought."""
        parser = vllm_config.structured_outputs_config.reasoning_parser
        if parser and self.thinking == COUNT and profile.answer_tokens is not None:
            _log.warning(
                "Profile %r edits the first %d tokens of an answer; with --reasoning-parser %s the tokens of a thought "
                "are among them. %s.thinking: %r lets edits begin after it.",
                name, profile.answer_tokens, parser, KEY, SKIP,
            )  # fmt: skip

    def check(self, name: str, profile: SteeringProfile, model: ModelIdentity, *, split: bool) -> None:
        """Raise ProfileError where this engine cannot serve `profile`.

        Args:
            model: the engine's; fields that it does not know are not compared.
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
        if self.threshold is not None and profile.points and self.threshold not in profile.points:
            raise ProfileError(
                f"profile {name!r}: expected the server's threshold, {self.threshold!r}, among its own, got "
                f"{', '.join(profile.points)}"
            )
        if kinds_of(profile) > self.kinds:
            raise ProfileError(
                f"profile {name!r}: expected an 'add' edit with an always or prompt gate, as every profile has that "
                f"the engine was started with, got {profile.edit!r} with a {profile.gate.kind} gate"
            )
        reading = self.layers if self.reading is None else self.reading
        if more := sorted(reading_layers(profile) - set(reading)):
            raise ProfileError(
                f"profile {name!r}: expected gates, and edits other than 'add', among layers {_shown(reading)}, as "
                f"when the engine was configured, got {_shown(more)} too (start the engine again)"
            )
        if self.thinking == SKIP and profile.positions == "all":
            raise ProfileError(
                f"profile {name!r}: expected positions='response' where edits begin after a thought ({KEY}.thinking), "
                "got positions='all'"
            )
        check_packed(f"profile {name!r}", profile, split=split, remedy=" (unless --no-enable-chunked-prefill)")


def layers_of(profile: SteeringProfile) -> set[int]:
    """Return the layers that a profile steers or reads."""
    return {*profile.steered_layers, *profile.gate_layers}


def reading_layers(profile: SteeringProfile) -> set[int]:
    """Return the layers where a profile reads rows: those of its gates, and of edits other than ``add``."""
    return {*profile.gate_layers, *(profile.steered_layers if profile.edit != "add" else ())}


def identity_of(text_config: Any) -> ModelIdentity:
    """Return the identity of a model by its HuggingFace text config."""
    return ModelIdentity(
        name=str(getattr(text_config, "_name_or_path", "") or text_config.model_type),
        architecture=str(text_config.model_type),
        hidden_size=text_config.hidden_size,
        num_layers=text_config.num_hidden_layers,
    )


def check_name(name: object) -> str:
    """Return a profile's name.

    Raises:
        ValueError: it is no string of 1 to 64 letters, digits, dots, underscores and dashes, or is "off" or "observe".
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in (OFF, OBSERVE):
        raise ValueError(
            "profiles: expected a name of 1 to 64 letters, digits, '.', '_' and '-' that begins with a letter or digit "
            f"and is not {OFF!r} or {OBSERVE!r}, got {name!r}"
        )
    return name


def normalise(raw: object, text_config: Any) -> dict[str, Any]:
    """Return the user's ``additional_config.steerfast``, checked and complete, as JSON data.

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
    directory = None if given["directory"] is None else _absolute("directory", given["directory"])
    if given["stack"] is None:
        given["stack"] = 2 if len(profiles) > 1 or directory is not None else 1
    _check_choices(given, profiles)
    kinds = Kinds.ANY if directory is not None else max(map(kinds_of, profiles.values()))
    config = ServingConfig(
        profiles=paths,
        default=given["default"],
        locked=given["locked"],
        max_strength=float(given["max_strength"]),
        slots=_slots(given["slots"], profiles.values()),
        stack=given["stack"],
        layers=_layers(given["layers"], profiles, model.num_layers),
        kinds=int(kinds),
        directory=directory,
        version=_VERSION,
        reading=_reading(profiles, directory),
        observe=tuple(given["observe"]),
        threshold=given["threshold"],
        thinking=given["thinking"],
    )
    for name, profile in profiles.items():
        config.check(name, profile, model, split=False)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def _check_choices(given: Mapping[str, Any], profiles: Mapping[str, SteeringProfile]) -> None:
    """Raise ValueError at the first value that is out of range, or does not go with the profiles."""
    default = [] if given["default"] is None else given["default"].split(",")
    folder, stack = given["directory"], given["stack"]
    known, points = ", ".join(profiles) or "no profiles", any(profile.points for profile in profiles.values())
    unknown, unseen = ([name for name in names if name not in [*profiles]] for names in (default, given["observe"]))
    unnamed = given["threshold"] is not None and folder is None and not points
    for wrong, key, expected, got in (
        (folder is not None and not Path(folder).expanduser().is_dir(), "directory", "a folder", folder),
        (folder is None and not profiles, "profiles", "a profile at least, or a directory to load some from", None),
        (not 1 <= stack <= MAX_STACK, "stack", f"1 to {MAX_STACK} profiles on a request", stack),
        (unknown, "default", f"one of {known}", next(iter(unknown), None)),
        (len({*default}) < len(default), "default", "each profile once", given["default"]),
        (len(default) > stack, "default", f"at most {stack} profiles ({KEY}.stack)", given["default"]),
        (given["locked"] and not default, "locked", "a default to lock requests to", None),
        (given["thinking"] not in (COUNT, SKIP), "thinking", f"{COUNT!r} or {SKIP!r}", given["thinking"]),
        (not 0 < given["max_strength"] < math.inf, "max_strength", "a finite number above 0", given["max_strength"]),
        (unseen, "observe", f"names among {known}", next(iter(unseen), None)),
        (unnamed, "threshold", "a profile that has named thresholds", given["threshold"]),
    ):
        if wrong:
            raise ValueError(f"{KEY}.{key}: expected {expected}, got {'none' if got is None else repr(got)}")


def _slots(given: int | None, profiles: Iterable[SteeringProfile]) -> int:
    counts = [len(variants(profile)) for profile in profiles]
    needed = sum(counts) + max(counts, default=1)
    slots = max(DEFAULT_SLOTS, needed) if given is None else given
    if slots < needed:
        raise ValueError(
            f"{KEY}.slots: expected at least {needed}, one for each threshold of the profiles and more, so that one "
            f"can be replaced, got {slots}"
        )
    return slots


def _layers(given: list[Any] | None, profiles: Mapping[str, SteeringProfile], count: int) -> tuple[int, ...]:
    if given is None:
        needed: set[int] = set().union(*map(layers_of, profiles.values()))
        return tuple(sorted(needed)) if profiles else tuple(range(count))
    if any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count for layer in given):
        raise ValueError(f"{KEY}.layers: expected numbers in 0..{count - 1}, got {given!r}")
    return tuple(sorted(set(given)))


def _reading(profiles: Mapping[str, SteeringProfile], directory: str | None) -> tuple[int, ...] | None:
    if directory is not None:  # profiles that are loaded later may read anywhere
        return None
    return tuple(sorted(set().union(*map(reading_layers, profiles.values()))))


def _typed(raw: object) -> dict[str, Any]:
    """Return all keys, each of its type; a missing key has its default."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{KEY}: expected an object, got {raw!r}")
    unknown = [str(key) for key in raw if key not in _EXPECTED]
    if unknown:
        raise ValueError(f"{KEY}: expected the keys {', '.join(_EXPECTED)}, got {', '.join(unknown)}")
    values = {key: default for key, (_, _, default) in _EXPECTED.items()}
    for key, value in raw.items():
        kind, expected, _ = _EXPECTED[key]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
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
    """Return whether a prompt may come in several steps."""
    scheduler = vllm_config.scheduler_config
    aligned = getattr(vllm_config.cache_config, "mamba_cache_mode", None) == "align"  # their states end with blocks
    return scheduler.enable_chunked_prefill or scheduler.long_prefill_token_threshold > 0 or aligned


def check_weights(folder: str) -> None:
    """Raise ValueError where vLLM would read a profile in the model's folder as weights."""
    if Path(folder, "model.safetensors.index.json").is_file():  # vLLM reads only the files that it names
        return
    for path in sorted(Path(folder).glob("*.safetensors")):
        if is_checked(path):
            raise ValueError(
                f"{KEY}: expected no profile among the model's weights, as vLLM would load it as such, got "
                f"{str(path)!r}; move it to another folder"
            )


def check_engine(vllm_config: Any) -> None:
    """Raise ValueError for an engine that would lose decisions or rows; the message says why."""
    config = ServingConfig.of(vllm_config)
    if config is None:
        return
    config.check_environment()
    check_weights(vllm_config.model_config.model)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, drafts = vllm_config.cache_config, vllm_config.speculative_config
    launched = parallel.distributed_executor_backend == "external_launcher" and parallel.pipeline_parallel_size > 1
    spread = getattr(parallel, "prefill_context_parallel_size", 1) > 1
    dropped = getattr(cache, "kv_sharing_fast_prefill", False)
    moved = getattr(drafts, "enable_adaptive_verification", False)
    for wrong, what, why in (
        (model.runner_type != "generate", f"runner {model.runner_type!r}", "nothing is generated"),
        (getattr(model, "is_diffusion", False), "a diffusion model", "it computes each row of an answer many times"),
        (vllm_config.kv_transfer_config is not None, "a KV connector", "its caches know no decisions"),
        (launched, "pipeline parallelism under an external launcher", "its stages hand over no decisions"),
        (dropped, "--kv-sharing-fast-prefill", "its last layers drop rows of a step"),
        (getattr(parallel, "use_ubatching", False), "micro-batches (DBO)", "they split the rows of a step"),
        (spread, "prefill context parallelism", "it spreads the rows of a step"),
        (moved, "adaptive verification of drafts", "it moves the rows of a step on the device"),
    ):
        if wrong:
            raise ValueError(f"{KEY}: steering and {what} do not go together: {why}")
    check_thoughts(config, vllm_config)
    identity = identity_of(model.hf_text_config)
    split = splits_prompts(vllm_config)
    for name, path in config.profiles.items():
        profile = SteeringProfile.load(path)
        config.check(name, profile, identity, split=split)
        config.warn_of_thoughts(name, profile, vllm_config)


def check_thoughts(config: ServingConfig, vllm_config: Any) -> None:
    """Raise ValueError where edits should begin after a thought, and an engine cannot tell in time where it ends."""
    if config.thinking == COUNT:
        return
    if not vllm_config.structured_outputs_config.reasoning_parser:
        raise ValueError(f"{KEY}.thinking: expected --reasoning-parser, which finds the end of a thought, got none")
    if vllm_config.model_config.skip_tokenizer_init:
        raise ValueError(f"{KEY}.thinking: expected a tokenizer with {SKIP!r}, got --skip-tokenizer-init")
    if vllm_config.speculative_config is not None:
        raise ValueError(
            f"{KEY}.thinking: expected no speculative decoding with {SKIP!r}, as a thought may end within the rows of "
            f"one step; use {COUNT!r}, or serve without --speculative-config"
        )
    if vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            f"{KEY}.thinking: expected --no-async-scheduling with {SKIP!r}, as the next step begins before a thought "
            "is known to have ended"
        )


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

"""Model classes whose decoder layers are fused and that carry their steering.

``SteeredLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with fused layers, and so on for each of
`steerfast.models.families`; the classes are made when they are first asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from steerfast.errors import ArchitectureError, ProfileError
from steerfast.models.families import FAMILIES, Family
from steerfast.models.fused import patch
from steerfast.models.steering import Steering, steer
from steerfast.profile import SteeringProfile

PROFILE_FILE = Path("steerfast", "profile.safetensors")
"""Where save_pretrained puts the profile. In a folder of its own, because engines load each safetensors file beside a
config as weights."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")


class SteeredModel:
    """What all steered classes add to the transformers class they extend.

    Attributes:
        steering: the attached `Steering`, None before `steer`.
    """

    steerfast_generates = True
    steering: Steering | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        patch(self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        steering: SteeringProfile | str | os.PathLike[str] | None = None,
        strength: float = 1.0,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of the stock class, with fused layers, and attach a profile.

        Args:
            pretrained_model_name_or_path: a folder or hub id, as for the stock class.
            steering: a profile or its file. Default: the one that `save_pretrained` put beside the weights, if any.
            strength: multiplies the profile's strengths.
            tokenizer: where given, it is checked against the one the profile was made with.
            args, kwargs: as for the stock class: dtype, device_map, attn_implementation, quantization_config, revision
                and so on.

        Raises:
            ProfileError: the profile cannot be read, belongs to another model, or steers no layer.
            ArchitectureError: a layer is not built as this class's family declares.
        """
        profile = _profile(steering, pretrained_model_name_or_path, kwargs)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if profile is not None:
            model.steer(profile, strength, tokenizer=tokenizer)
        return loaded

    def steer(self, profile: SteeringProfile | None, strength: float = 1.0, *, tokenizer: Any = None) -> Steering:
        """Attach `profile` in place of the one attached before; errors as `steerfast.steer`, and then nothing changes.

        None: steer only the calls of `generate` that name a profile.
        """
        before, self.steering = self.steering, None
        if before is not None:
            before.detach()
        try:
            self.steering = steer(self, profile, strength, tokenizer=tokenizer)  # type: ignore[arg-type]
        except Exception:
            if before is not None:
                self.steering = steer(self, before.profile, before.strength)  # type: ignore[arg-type]
            raise
        return self.steering

    def unsteer(self) -> None:
        """Detach the profile; the layers stay fused."""
        if self.steering is not None:
            self.steering.detach()
            self.steering = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the stock class, steered.

        Args:
            steering: optional: a profile for this call, or a list with one per prompt; None: not steered.
            steering_strength: optional: a number for this call, or a list with one per prompt.
            args, kwargs: as for the stock class.
        """
        generate = super().generate  # type: ignore[misc]
        if self.steering is None and ("steering" in kwargs or "steering_strength" in kwargs):
            self.steer(None)
        return generate(*args, **kwargs) if self.steering is None else self.steering.generate(generate, args, kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as the stock class would, so that it loads everywhere, and the attached profile in a folder beside."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        config: Any = self.config  # type: ignore[attr-defined]
        config.architectures = [type(self).__bases__[1].__name__]
        config.save_pretrained(save_directory)
        if self.steering is not None and self.steering.profile is not None:
            file = Path(save_directory, PROFILE_FILE)
            file.parent.mkdir(exist_ok=True)
            self.steering.profile.save(file)


class AutoSteeredModelForCausalLM:
    """Picks the steered class by the checkpoint's config. Not instantiated."""

    def __init__(self) -> None:
        raise ArchitectureError("AutoSteeredModelForCausalLM: expected from_pretrained() or from_config(), got a call")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        steering: SteeringProfile | str | os.PathLike[str] | None = None,
        strength: float = 1.0,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint with fused layers where its family is known, and attach a profile.

        Models of other families, and those that bring their own code (trust_remote_code), keep their layers and are
        steered by hooks on them; their `steering` is a `Steering` even without a profile. Arguments and errors:
        `SteeredModel.from_pretrained`.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        source = str(pretrained_model_name_or_path)
        config = kwargs.get("config")
        if config is None:
            options = {name: kwargs[name] for name in (*_HUB_OPTIONS, "trust_remote_code") if name in kwargs}
            config = AutoConfig.from_pretrained(source, **options)
        family = _family_of(config)
        if family is not None and not (kwargs.get("trust_remote_code") and getattr(config, "auto_map", None)):
            kwargs.pop("trust_remote_code", None)
            options = {"steering": steering, "strength": strength, "tokenizer": tokenizer}
            return _class_of(family).from_pretrained(source, *args, **options, **kwargs)
        profile = _profile(steering, source, kwargs)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.steering = steer(model, profile, strength, tokenizer=tokenizer)
        return loaded

    @classmethod
    def from_config(
        cls, config: Any, *, steering: SteeringProfile | None = None, strength: float = 1.0, **kwargs: Any
    ) -> Any:
        """A model with random weights, of the steered class where the config's family is known."""
        from transformers import AutoModelForCausalLM

        family = _family_of(config)
        if family is None:
            model: Any = AutoModelForCausalLM.from_config(config, **kwargs)
            model.steering = steer(model, steering, strength)
            return model
        model = _class_of(family)._from_config(config, **kwargs)
        if steering is not None:
            model.steer(steering, strength)
        return model


def _profile(given: Any, source: str | os.PathLike[str], options: dict[str, Any]) -> SteeringProfile | None:
    """The profile that was given, or the one beside the weights."""
    if given is None:
        from transformers.utils import cached_file

        options = {name: options[name] for name in _HUB_OPTIONS if name in options and name != "gguf_file"}
        given = cached_file(
            str(source),
            PROFILE_FILE.as_posix(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **options,
        )
        if given is None:
            return None
    if isinstance(given, SteeringProfile):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise ProfileError(f"steering: expected a profile or its file, got {type(given).__name__}")
    return SteeringProfile.load(given)


def _family_of(config: Any) -> Family | None:
    return next((family for family in FAMILIES if family.model_type == getattr(config, "model_type", None)), None)


def _class_of(family: Family) -> Any:
    name = f"Steered{family.prefix}ForCausalLM"
    if name not in globals():
        attributes = {"__module__": __name__, "__doc__": f"transformers' {family.prefix}ForCausalLM, steered."}
        globals()[name] = type(name, (SteeredModel, family.causal_lm), attributes)
    return globals()[name]


def __getattr__(name: str) -> Any:
    for family in FAMILIES:
        if name == f"Steered{family.prefix}ForCausalLM":
            return _class_of(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

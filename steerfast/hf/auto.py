"""Model classes whose decoder layers are fused and that carry their steering.

``SteeredLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with fused layers, and so on for each of
`steerfast.hf.families` and each multimodal class listed here. A class is made at its first use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as _IMAGE_CLASSES

from steerfast.errors import ArchitectureError
from steerfast.hf.families import FAMILIES, MULTIMODAL_FAMILIES
from steerfast.hf.fused import patch
from steerfast.hf.steering import Steering, steer
from steerfast.profile import SteeringProfile
from steerfast.profile.hub import PROFILE_FILE
from steerfast.profile.stack import Given, ProfileStack, chosen

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")
_IMAGE_TYPES = (  # of the models that tests/hf/test_families.py covers; an older transformers may lack one
    "aya_vision", "cohere2_vision", "gemma3", "idefics2", "idefics3", "internvl", "lfm2_vl", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "mistral3", "ovis2", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_5",
    "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llava", "vipllava",
)  # fmt: skip


class SteeredModel:
    """Add steering to a transformers class.

    Attributes:
        steering: the attached `Steering`, None before `steer`.
    """

    steerfast_generates = True
    steering: Steering | None = None

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # otherwise transformers does not translate the weights' names in checkpoints

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        patch(self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        steering: Given | None = None,
        strength: float = 1.0,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of the stock class, with fused layers, and attach a profile.

        Args:
            pretrained_model_name_or_path: a folder or hub id, as for the stock class.
            steering: a profile, its file or hub repository, or a list of these (a stack). Default: the profile beside
                the weights (`save_pretrained`), if any.
            strength: multiplies the profile's strengths.
            tokenizer: if given, it has to match the profile's tokenizer.
            args, kwargs: as for the stock class: dtype, device_map, attn_implementation, quantization_config, ...

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

    def steer(self, profile: Given | None, strength: float = 1.0, *, tokenizer: Any = None) -> Steering:
        """Replace the attached profile by `profile`. Errors are those of `steerfast.steer`; they change nothing.

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
        """Run `generate` of the stock class, steered.

        Args:
            steering: optional: a profile for this call, or a list with an entry per prompt: a profile, a stack of
                profiles, or None (not steered).
            steering_strength: optional: a number for this call, or a list with an entry per prompt.
            args, kwargs: as for the stock class.
        """
        return self._call("generate", args, kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Run `generate_batch` of the stock class, steered; arguments as for `generate`."""
        return self._call("generate_batch", args, kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stock manager of continuous batching; its requests are steered."""
        return self._call("init_continuous_batching", args, kwargs)

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = getattr(super(), name)
        if self.steering is None and ("steering" in kwargs or "steering_strength" in kwargs):
            self.steer(None)
        return method(*args, **kwargs) if self.steering is None else self.steering.call(name, method, args, kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as the stock class would, so that it loads everywhere, and the attached profile or stack beside.

        Where several ranks hold the model, each of them calls it, and the first one writes.
        """
        profile = None if self.steering is None else self.steering.profile
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        model: Any = self
        model.config.architectures = [type(self).__bases__[1].__name__]
        if model.should_save_on_this_rank(is_main_process):
            model.config.save_pretrained(save_directory)
            if profile is not None:
                file = Path(save_directory, PROFILE_FILE)
                file.parent.mkdir(exist_ok=True)
                profile.save(file)
        model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))


class _AutoSteeredModel:
    """Pick the steered class by the checkpoint's config. Not instantiated.

    Class attributes:
        _loader: transformers' class that picks the stock class.
        _stock: the stock class of each model type.
    """

    _loader: ClassVar[str]
    _stock: ClassVar[dict[str, str]]

    def __init__(self) -> None:
        raise ArchitectureError(f"{type(self).__name__}: expected from_pretrained() or from_config(), got a call")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        steering: Given | None = None,
        strength: float = 1.0,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint with fused layers where its family is known, and attach a profile.

        Models of other families, and models with remote code (trust_remote_code), keep their layers. Hooks steer them,
        and their `steering` is a `Steering` even without a profile. Arguments and errors:
        `SteeredModel.from_pretrained`.
        """
        import transformers

        source = str(pretrained_model_name_or_path)
        config = kwargs.get("config")
        if config is None:
            options = {name: kwargs[name] for name in (*_HUB_OPTIONS, "trust_remote_code") if name in kwargs}
            config = transformers.AutoConfig.from_pretrained(source, **options)
        steered = cls._steered(config)
        if steered is not None and not (kwargs.get("trust_remote_code") and getattr(config, "auto_map", None)):
            kwargs.pop("trust_remote_code", None)
            options = {"steering": steering, "strength": strength, "tokenizer": tokenizer}
            return steered.from_pretrained(source, *args, **options, **kwargs)
        profile = _profile(steering, source, kwargs)
        loaded: Any = getattr(transformers, cls._loader).from_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.steering = steer(model, profile, strength, tokenizer=tokenizer)
        return loaded

    @classmethod
    def from_config(cls, config: Any, *, steering: Given | None = None, strength: float = 1.0, **kwargs: Any) -> Any:
        """Return a model with random weights, of the steered class if the config's family is known."""
        import transformers

        steered = cls._steered(config)
        if steered is None:
            model: Any = getattr(transformers, cls._loader).from_config(config, **kwargs)
            model.steering = steer(model, steering, strength)
            return model
        model = steered._from_config(config, **kwargs)
        if steering is not None:
            model.steer(steering, strength)
        return model

    @classmethod
    def _steered(cls, config: Any) -> Any:
        """Return the steered class of a config; None: its layers cannot be fused."""
        stock = cls._stock.get(getattr(config, "model_type", ""))
        return _class_of(stock) if stock and config.get_text_config().model_type in _FUSED else None


class AutoSteeredModelForCausalLM(_AutoSteeredModel):
    """Pick the steered class of a language model by the checkpoint's config. Not instantiated."""

    _loader = "AutoModelForCausalLM"
    _stock: ClassVar = {family.model_type: f"{family.prefix}ForCausalLM" for family in FAMILIES}


class AutoSteeredModelForImageTextToText(_AutoSteeredModel):
    """Pick the steered class of a model that reads images and text by the checkpoint's config. Not instantiated.

    The layers of the language model are fused and steered; those of the vision model stay stock.
    """

    _loader = "AutoModelForImageTextToText"
    _stock: ClassVar = {name: _IMAGE_CLASSES[name] for name in _IMAGE_TYPES if name in _IMAGE_CLASSES}


_FUSED = {family.model_type for family in (*FAMILIES, *MULTIMODAL_FAMILIES)}
_STOCK = {*AutoSteeredModelForCausalLM._stock.values(), *AutoSteeredModelForImageTextToText._stock.values()}


def _profile(
    given: Any, source: str | os.PathLike[str], options: dict[str, Any]
) -> SteeringProfile | ProfileStack | None:
    """Return the given profile or stack, or the profile beside the weights."""
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
    return chosen(given)


def _class_of(stock: str) -> Any:
    name = f"Steered{stock}"
    if name not in globals():
        import transformers
        from transformers import conversion_mapping

        attributes = {"__module__": __name__, "__doc__": f"transformers' {stock}, steered."}
        globals()[name] = type(name, (SteeredModel, getattr(transformers, stock)), attributes)
        # transformers maps the weights' names in checkpoints by model type, and for some models by class name.
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    return globals()[name]


def __getattr__(name: str) -> Any:
    stock = name.removeprefix("Steered")
    if stock != name and stock in _STOCK:
        return _class_of(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

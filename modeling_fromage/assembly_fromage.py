"""Assembling a new FROMAGe model from two pretrained backbones."""

import inspect
import os
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from .backbones_fromage import check_logit_transform
from .configuration_fromage import FromageConfig
from .processing_fromage import FromageProcessor

_SHARED_LOADER_KWARGS = ("dtype", "token", "cache_dir", "local_files_only", "force_download", "proxies",
                         "trust_remote_code", "device_map", "attn_implementation", "low_cpu_mem_usage")  # fmt: skip


def assemble_from_vision_text(cls, vision: str, text: str, processor: Any, kwargs: dict[str, Any]):
    """Body of `FromageForConditionalGeneration.from_vision_text_pretrained`, which documents it."""
    fields = set(inspect.signature(FromageConfig).parameters)
    config_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in fields and key != "dtype"}
    text_kwargs = {key[len("text_") :]: kwargs.pop(key) for key in list(kwargs) if key.startswith("text_")}
    vision_kwargs = {key[len("vision_") :]: kwargs.pop(key) for key in list(kwargs) if key.startswith("vision_")}
    shared = {key: kwargs.pop(key) for key in list(kwargs) if key in _SHARED_LOADER_KWARGS}
    if kwargs:
        raise ValueError(
            f"Unknown arguments {sorted(kwargs)}: they are no fields of FromageConfig, do not start with `text_` or "
            f"`vision_`, and are not among those that go to both backbones ({', '.join(_SHARED_LOADER_KWARGS)})."
        )
    hub_kwargs = {
        key: value for key, value in shared.items() if key not in ("dtype", "device_map", "attn_implementation")
    }
    if processor is None:
        processor = FromageProcessor.from_vision_text_pretrained(
            vision, text, num_image_tokens=config_kwargs.get("num_image_tokens", 1),
            **hub_kwargs, **{key: value for key, value in text_kwargs.items() if key in ("gguf_file", "revision")},
        )  # fmt: skip
    _take_ids_from(processor, config_kwargs)

    language_model = _load(AutoModelForCausalLM, text, {**shared, **text_kwargs}, "language model")
    check_logit_transform(language_model)
    vision_config = AutoConfig.from_pretrained(vision, **hub_kwargs)
    vision_config = getattr(vision_config, "vision_config", vision_config)  # a CLIPModel repository holds both halves
    pooling = config_kwargs.get("vision_pooling", "pooler")
    vision_model = _load(
        AutoModel, vision, {"config": vision_config, **shared, **vision_kwargs}, "vision model", pooling
    )
    for prefix, name, options in (("text", text, text_kwargs), ("vision", vision, vision_kwargs)):
        config_kwargs.setdefault(f"{prefix}_model_id", os.fspath(name))
        config_kwargs.setdefault(f"{prefix}_model_revision", options.get("revision"))
    config = FromageConfig.from_vision_text_configs(vision_model.config, language_model.config, **config_kwargs)
    return cls(config, language_model=language_model, vision_model=vision_model).eval()


def _take_ids_from(processor: FromageProcessor, config_kwargs: dict[str, Any]):
    for name in ("image_token_id", "ret_token_id", "num_image_tokens"):
        value = getattr(processor, name)
        if config_kwargs.setdefault(name, value) != value:
            raise ValueError(
                f"`{name}` is {config_kwargs[name]}, but the processor's is {value}. Leave one of them out."
            )


def _load(auto_class, name: str, kwargs: dict[str, Any], role: str, pooling: str | None = None) -> PreTrainedModel:
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"])
    if pooling in ("cls", "mean"):
        missing = [key for key in missing if "pooler" not in key]  # random, and not in use
    if missing:
        hint = " Set `vision_pooling='cls'` or `'mean'`." if pooling and any("pooler" in key for key in missing) else ""
        raise ValueError(f"The {role} {name!r} lacks weights that are in use: {', '.join(missing[:8])}.{hint}")
    return model

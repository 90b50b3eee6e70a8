"""Loading the two frozen backbones, and assembling a new FROMAGe model from them."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import resolve_revision

from .backbones_fromage import refuse_offloaded_ends, size_differences
from .configuration_fromage import FromageConfig, text_half, vision_half
from .fingerprint_fromage import check_fingerprint, weight_files
from .processing_fromage import FromageProcessor, token_counts
from .text_part_fromage import load_language_model, with_text_half
from .vision_fromage import auto_model_for, names_in_vision_half, vision_part
from .vision_libraries_fromage import read_vision_config, split_library
from .vision_open_clip import load_open_clip

HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
SHARED_LOADER_KWARGS = (*HUB_KWARGS, "dtype", "trust_remote_code", "device_map", "attn_implementation",
                        "low_cpu_mem_usage", "use_safetensors", "max_memory", "offload_folder",
                        "offload_buffers")  # fmt: skip
ROLES = {"text": "language model", "vision": "vision model"}
PARTS = {"text": "language_model", "vision": "vision_model"}


@dataclass
class BackboneOrigin:
    """Where one backbone of a model came from.

    Attributes:
        loader_kwargs: What it takes to find its files again.
        digest: Of its weights, while they are known to be those of its files.
    """

    loader_kwargs: dict[str, Any] = field(default_factory=dict)
    digest: dict[str, list[int]] | None = None

    def remember_loading(self, kwargs: dict[str, Any]) -> None:
        """Keep what matters of the keyword arguments that the backbone was loaded with."""
        names = ("cache_dir", "trust_remote_code")
        self.loader_kwargs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def assemble_from_vision_text(
    cls: Callable[..., Any], vision: str, text: str, processor: FromageProcessor | None, kwargs: dict[str, Any]
) -> Any:
    """Body of `FromageForConditionalGeneration.from_vision_text_pretrained`, which documents it."""
    fields = set(inspect.signature(FromageConfig).parameters)
    config_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in fields and key != "dtype"}
    options = {
        prefix: {key[len(prefix) + 1 :]: kwargs.pop(key) for key in list(kwargs) if key.startswith(f"{prefix}_")}
        for prefix in ROLES
    }
    if options["vision"].get("quantization_config") is not None:
        raise ValueError(
            "`vision_quantization_config` is refused: a checkpoint would load without it, and give other features. "
            "Quantise the language model alone (`text_quantization_config`)."
        )
    if "text_gguf_file" in config_kwargs:
        options["text"]["gguf_file"] = config_kwargs["text_gguf_file"]
    shared = {key: kwargs.pop(key) for key in list(kwargs) if key in SHARED_LOADER_KWARGS}
    if kwargs:
        raise ValueError(
            f"Unknown arguments {sorted(kwargs)}: they are no fields of FromageConfig, do not start with `text_` or "
            f"`vision_`, and are not among those that go to both backbones ({', '.join(SHARED_LOADER_KWARGS)})."
        )
    hub_kwargs = {key: value for key, value in shared.items() if key in (*HUB_KWARGS, "trust_remote_code")}
    library, vision_name = split_library(os.fspath(vision))
    if processor is None:
        processor = FromageProcessor.from_vision_text_pretrained(
            vision, text, num_image_tokens=config_kwargs.get("num_image_tokens", 1),
            num_ret_tokens=config_kwargs.get("num_ret_tokens", 1),
            **hub_kwargs, **{key: value for key, value in options["text"].items() if key in ("gguf_file", "revision")},
        )  # fmt: skip
    take_ids_from(processor, config_kwargs)

    models, loaded_with = {}, {}
    pooling = config_kwargs.get("vision_pooling", "pooler")
    if config_kwargs.setdefault("vision_model_library", library) != library:
        raise ValueError(f"The library of {vision!r} is {library!r} by its name. Leave `vision_model_library` out.")
    for prefix, name in (("text", os.fspath(text)), ("vision", vision_name)):
        loader_kwargs = loaded_with[prefix] = {**shared, **options[prefix]}
        # Pinned once: weights, and what a checkpoint of the trained parts will name, are of the same commit.
        revision_kwargs = {key: loader_kwargs.get(key) for key in ("token", "cache_dir")}
        revision = resolve_revision(
            name, loader_kwargs.get("revision"), local_files_only=shared.get("local_files_only", False),
            **revision_kwargs,
        )  # fmt: skip
        models[prefix] = load_backbone(prefix, name, {**loader_kwargs, "revision": revision}, pooling, library)
        if not {"subfolder", "variant", "state_dict"} & loader_kwargs.keys():  # else save the backbone itself
            config_kwargs.setdefault(f"{prefix}_model_id", os.path.abspath(name) if os.path.isdir(name) else name)
            config_kwargs.setdefault(f"{prefix}_model_revision", getattr(revision, "resolved", revision))
    config = FromageConfig.from_vision_text_configs(models["vision"].config, models["text"].config, **config_kwargs)
    model = cls(config, language_model=models["text"], vision_model=models["vision"])
    for prefix, own in loaded_with.items():
        model.origins[prefix].remember_loading(own)
    _join_device_maps(model)
    return model.eval()


def take_ids_from(processor: FromageProcessor, config_kwargs: dict[str, Any]) -> None:
    """Add the processor's token ids, `num_image_tokens` and `num_ret_tokens` to a configuration's fields.

    Raises:
        ValueError: The fields have others.
    """
    for name, value in token_counts(processor).items():
        if config_kwargs.setdefault(name, value) != value:
            raise ValueError(
                f"`{name}` is {config_kwargs[name]}, but the processor's is {value}. Leave one of them out."
            )


def load_backbone(
    prefix: str, name: str, kwargs: dict[str, Any], pooling: str, library: str = "transformers"
) -> PreTrainedModel:
    """`from_pretrained` of one backbone (`"text"` or `"vision"`), without a weight left at random; `library` is that of
    a vision encoder.

    Raises:
        ValueError: The checkpoint lacks weights that are in use, or one of its files cannot be read; or the device map
            offloads what FROMAGe reads.
    """
    if kwargs.get("quantization_config", ...) is None:  # which would hide that the files are quantised
        kwargs = {key: value for key, value in kwargs.items() if key != "quantization_config"}
    hub_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "trust_remote_code") if key in kwargs}
    try:
        if prefix == "text":
            model, missing = load_language_model(name, hub_kwargs, kwargs)
            refuse_offloaded_ends(model)
        else:
            model, missing = _load_vision_model(name, hub_kwargs, kwargs, library)
    except SafetensorError as error:
        raise ValueError(
            f"A weight file of the {ROLES[prefix]} {name!r} cannot be read ({error}). It is cut off, damaged, or a "
            "pointer of Git LFS: get it again, or fetch what it points to with `git lfs pull`."
        ) from error
    if prefix == "vision" and pooling != "pooler":
        missing = [key for key in missing if "pooler" not in key]  # random, and not in use
    if missing:
        has_no_pooler = prefix == "vision" and any("pooler" in key for key in missing)
        hint = " Set `vision_pooling='cls'` or `'mean'`." if has_no_pooler else ""
        raise ValueError(f"The {ROLES[prefix]} {name!r} lacks weights that are in use: {', '.join(missing[:8])}.{hint}")
    return model


def _load_vision_model(
    name: str, hub_kwargs: dict[str, Any], kwargs: dict[str, Any], library: str
) -> tuple[PreTrainedModel, list[str]]:
    """`from_pretrained` of a vision encoder of a library, and the names of the weights that its files lack."""
    if "config" not in kwargs:
        # A CLIPModel repository holds both halves: the configuration decides which class is built.
        projected = kwargs.pop("projected", False)
        config = vision_half(read_vision_config(name, library, projected, **hub_kwargs))
        fields = kwargs.keys() & config.to_dict().keys() - {*SHARED_LOADER_KWARGS, "quantization_config"}
        for field in fields:  # which transformers sets where it loads the configuration itself
            setattr(config, field, kwargs[field])
        kwargs = {"config": config, **{key: value for key, value in kwargs.items() if key not in fields}}
    load = load_open_clip if library == "open_clip" else auto_model_for(kwargs["config"]).from_pretrained
    model, info = load(name, output_loading_info=True, **kwargs)
    if not info["missing_keys"] or library == "open_clip" or "key_mapping" in kwargs:
        return model, sorted(info["missing_keys"])
    whole = AutoConfig.from_pretrained(name, **hub_kwargs)
    half = vision_half(whole)
    if half is whole:
        return model, sorted(info["missing_keys"])
    # An image-text model may have the half under other names than the half by itself has.
    vars(half).update(vars(kwargs["config"]))
    model, info = AutoModel.from_pretrained(name, output_loading_info=True, **{**kwargs, "config": whole})
    missing = names_in_vision_half(model, info["missing_keys"])
    return vision_part(model), sorted(missing)


def reload_backbone(prefix: str, config: FromageConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the backbone that a checkpoint of the trained parts names, and make sure that it is that one.

    Raises:
        ValueError: Its sizes or its weight files differ from those that the checkpoint knows.
    """
    name, role = getattr(config, f"{prefix}_model_id"), ROLES[prefix]
    revision = resolve_revision(
        name, getattr(config, f"{prefix}_model_revision"), local_files_only=kwargs.get("local_files_only", False),
        token=kwargs.get("token"), cache_dir=kwargs.get("cache_dir"),
    )  # fmt: skip
    setattr(config, f"{prefix}_model_revision", getattr(revision, "resolved", revision))
    kwargs = {**kwargs, "revision": revision}
    saved = getattr(config, f"{prefix}_config")
    if prefix == "text" and config.text_gguf_file:
        kwargs["gguf_file"] = config.text_gguf_file
    else:
        hub_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "trust_remote_code") if key in kwargs}
        if prefix == "vision":
            projected = getattr(saved, "projected", False)
            found = vision_half(read_vision_config(name, config.vision_model_library, projected, **hub_kwargs))
        else:
            whole = AutoConfig.from_pretrained(name, **hub_kwargs)
            found = text_half(whole)
        if differences := size_differences(saved, found):
            raise ValueError(
                f"The {role} {name!r} is not the one of this checkpoint: {'; '.join(differences)}. Set "
                f"`{prefix}_model_id` to the right one."
            )
        if quantization := found.to_dict().get("quantization_config"):  # of a repository that is stored quantised
            saved.quantization_config = quantization
        kwargs["config"] = saved if prefix == "vision" else with_text_half(whole, saved)
    model = load_backbone(prefix, name, kwargs, config.vision_pooling, config.vision_model_library)
    if known := getattr(config, f"{prefix}_model_fingerprint"):
        check_fingerprint(backbone_files(prefix, config, kwargs.get("cache_dir")), known, role, name)
    return model


def join_backbones(
    cls: Callable[..., Any], config: FromageConfig, kwargs: dict[str, Any], load: Callable[..., PreTrainedModel]
) -> Any:
    """Load both backbones, with what of `kwargs` concerns each, and put new trained parts between them."""
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    models = {}
    for prefix, part in PARTS.items():
        options = {key: value for key, value in kwargs.items() if prefix == "text" or key != "quantization_config"}
        sub_config = getattr(config, f"{prefix}_config")
        options["dtype"] = saved_dtype(sub_config, config.dtype) if dtype in (None, "auto") else dtype
        attention = options.get("attn_implementation")
        if isinstance(attention, dict):
            options["attn_implementation"] = attention.get(f"{prefix}_config", attention.get(""))
        if isinstance(options.get("device_map"), dict):
            options["device_map"] = _device_map_of(part, options["device_map"])
        options = {key: value for key, value in options.items() if value is not None}
        models[part] = load(prefix, config, options)
    model = cls(config, **models, new_adapter=False)
    for origin in model.origins.values():
        origin.remember_loading(kwargs)
    _join_device_maps(model)
    return model


def _join_device_maps(model: Any) -> None:
    """Keep the device map of backbones that are spread over devices, as transformers does, and place the adapter."""
    device_map = {
        f"{part}.{module}".rstrip("."): device
        for part in PARTS.values()
        for module, device in getattr(model, part).__dict__.get("hf_device_map", {}).items()
    }
    if device_map:
        device = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
        model.hf_device_map = {**device_map, "adapter": device}
    else:
        device = model.language_model.device
    model.adapter.to(device)


def _device_map_of(part: str, device_map: dict[str, Any]) -> dict[str, Any] | None:
    """What a device map by module names says of one backbone."""
    own = {
        key.removeprefix(part).removeprefix("."): value
        for key, value in device_map.items()
        if key == part or key.startswith(f"{part}.")
    }
    return own or ({"": device_map[""]} if "" in device_map else None)


def backbone_within(
    name: str, hub_kwargs: dict[str, Any], prefix: str, config: FromageConfig, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """A backbone out of a self-contained checkpoint, by itself: the way to quantise the language model alone."""
    kwargs = {**kwargs, **hub_kwargs, "config": getattr(config, f"{prefix}_config")}
    kwargs["adapter_kwargs"] = {"subfolder": "none"}  # a PEFT adapter beside it is of the whole model
    kwargs["key_mapping"] = {rf"^{PARTS[prefix]}\.": ""}
    with without_report():  # of tensors of the other parts
        return load_backbone(prefix, name, kwargs, config.vision_pooling)


@contextmanager
def without_report() -> Iterator[None]:
    """Load without transformers' report of tensors that are missing or left over."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def find_local_backbones(config: FromageConfig, checkpoint: str | os.PathLike) -> None:
    """Make the paths of backbones that lie beside a checkpoint absolute.

    Raises:
        ValueError: A backbone is not there, or unknown.
    """
    if config.vision_model_id is not None and config.vision_model_id.startswith("open_clip:"):  # as a caller names it
        config.vision_model_library, config.vision_model_id = split_library(config.vision_model_id)
    for prefix, role in ROLES.items():
        field = f"{prefix}_model_id"
        name = getattr(config, field)
        if name is None:
            raise ValueError(
                f"The checkpoint {checkpoint} holds the trained parts alone and does not name its {role}. Pass "
                f"`{field}=` (a Hub id or a folder)."
            )
        if is_relative(name):
            path = os.path.normpath(os.path.join(checkpoint, name))
            if not os.path.isdir(path):
                raise ValueError(
                    f"The checkpoint {checkpoint} needs the {role} in the folder {name} relative to it, and there is "
                    f"none. Put it there, or pass `{field}=` (a Hub id or a folder)."
                )
            setattr(config, field, path)
        elif os.path.isabs(name) and not os.path.isdir(name):
            raise ValueError(
                f"The checkpoint {checkpoint} was written by a run whose {role} was in {name}, and there is no such "
                f"folder here. Pass `{field}=` (a Hub id or a folder)."
            )


def is_relative(name: str) -> bool:
    """Whether a backbone's name is a path from the checkpoint's folder: `./a`, `../a` or `..`; not a Hub id."""
    return name.split(os.sep)[0] in (os.curdir, os.pardir)


def backbone_files(prefix: str, config: FromageConfig, cache_dir: str | None = None) -> list[Path]:
    """The weight files of the backbone that `config` names."""
    gguf_file = config.text_gguf_file if prefix == "text" else None
    library = config.vision_model_library if prefix == "vision" else "transformers"
    name, revision = (getattr(config, f"{prefix}_model_{field}") for field in ("id", "revision"))
    return weight_files(name, revision, library, gguf_file, cache_dir)


def saved_dtype(config: PreTrainedConfig, default: str | torch.dtype | None = None) -> torch.dtype | None:
    """The dtype that a configuration names, as a torch dtype."""
    dtype = config.dtype if config.dtype is not None else default
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype

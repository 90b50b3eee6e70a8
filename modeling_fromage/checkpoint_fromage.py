"""Checkpoints: the trained parts alone, with references to the frozen backbones, or everything in one folder."""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.peft import maybe_load_adapters
from transformers.quantizers import HfQuantizer

from .adapter_fromage import trained_state
from .backbone_loading_fromage import (
    HUB_KWARGS,
    PARTS,
    ROLES,
    SHARED_LOADER_KWARGS,
    backbone_within,
    find_local_backbones,
    join_backbones,
    reload_backbone,
    saved_dtype,
)
from .checkpoint_files_fromage import (
    TRAINED_PREFIX,
    check_finite,
    load_trained_parts,
    take_scale_of_shape_1,
    tensor_names,
    weight_files_of,
)
from .checkpoint_origin_fromage import backbone_references, has_packed_weights, whole_state_of
from .configuration_fromage import FromageConfig
from .file_writing_fromage import move_into_place
from .fingerprint_fromage import trained_fingerprint
from .peft_layers_fromage import (
    has_merged_layers,
    has_peft_parameters,
    names_without_peft,
    own_parameters,
    take_unrounded_values,
)

if TYPE_CHECKING:
    from .pretrained_fromage import FromagePreTrainedModel

_STAGING = ".saving-"
_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_BACKBONE_KWARGS = {*SHARED_LOADER_KWARGS, "torch_dtype", "quantization_config"} - set(HUB_KWARGS)
_HUB_DEFAULTS = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False,
                 "token": None, "revision": None, "subfolder": ""}  # fmt: skip
_OPTIONS = {"output_loading_info", "generation_config", "adapter_name", "adapter_kwargs", "variant", "weights_only",
            "_from_auto", "_from_pipeline", "_commit_hash"}  # fmt: skip


# ---- saving --------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: "FromagePreTrainedModel",
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    save_backbones: bool | None,
    adapter_dtype: torch.dtype,
    absolute_paths: bool,
    kwargs: dict[str, Any],
) -> None:
    """Body of [`FromagePreTrainedModel.save_pretrained`], which documents it.

    Args:
        absolute_paths: Whether backbones that are on no Hub are named by their absolute paths.
        kwargs: For transformers' `save_pretrained`.
    """
    refuse_unsaved_peft(model)
    with_peft = model._hf_peft_config_loaded
    whole_state = whole_state_of(model) if state_dict is None else dict(state_dict)
    state_dict = names_without_peft(model, whole_state)
    references: dict[str, Any] = {}
    if not save_backbones:
        required = save_backbones is False
        references = backbone_references(model, directory, state_dict, required, absolute_paths)
    trained = {key: value for key, value in state_dict.items() if key.startswith(TRAINED_PREFIX)}
    rounded = {key: _rounded(key, value, adapter_dtype) for key, value in trained.items()}
    config = _config_to_save(model, references, _fingerprint_to_save(model, trained, rounded))
    quantizer = None
    if references:
        state_dict = rounded
    elif has_packed_weights(model.language_model):
        state_dict, quantizer = _with_quantized_tensors(model, {**state_dict, **rounded})
    else:
        state_dict.update(rounded)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", directory.name)  # not the name of the folder that files are staged in
    directory.mkdir(parents=True, exist_ok=True)
    for abandoned in directory.glob(f"{_STAGING}*"):  # by a process that was killed
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=directory, prefix=_STAGING) as staging:
        if not with_peft or _peft_needs_base(model, references):
            only_local = {**kwargs, "push_to_hub": False} if with_peft else kwargs
            with _as_saved(model, config, quantizer):
                PreTrainedModel.save_pretrained(model, staging, state_dict=state_dict, **only_local)
        if with_peft:
            PreTrainedModel.save_pretrained(model, staging, state_dict=whole_state, **kwargs)
        _replace_checkpoint(Path(staging), directory)


@contextmanager
def _as_saved(model: "FromagePreTrainedModel", config: FromageConfig, quantizer: HfQuantizer | None) -> Iterator[None]:
    """Let transformers save the model with the checkpoint's configuration and quantizer, and without PEFT."""
    changed = {"config": config, "_keys_to_ignore_on_save": None, "_hf_peft_config_loaded": False}
    kept = {name: getattr(model, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(model, name, value)
        if quantizer is not None:
            model.__dict__["hf_quantizer"] = quantizer
        yield
    finally:
        for name, value in kept.items():
            setattr(model, name, value)
        model.__dict__.pop("hf_quantizer", None)  # with which a Trainer would not train the model


def _with_quantized_tensors(
    model: "FromagePreTrainedModel", state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], HfQuantizer]:
    """`state_dict` with a packed language model's tensors as its quantizer stores them, and a quantizer with which
    transformers writes them and what it tells of them: by names of the language model's own, as when it is loaded.

    Raises:
        ValueError: The quantizer has no format to store them in.
    """
    lm, part = model.language_model, f"{PARTS['text']}."
    quantizer: Any = copy.copy(getattr(lm, "hf_quantizer", None))
    # transformers does not always read torchao's embeddings back as they were.
    has_embeddings = getattr(getattr(quantizer, "quantization_config", None), "include_input_output_embeddings", False)
    if quantizer is None or not quantizer.is_serializable() or has_embeddings:
        raise ValueError(
            f"The language model's weights are packed{' with its embeddings' * has_embeddings} by "
            f"{type(quantizer).__name__}, which cannot store them. Save the trained parts alone "
            "(save_backbones=False), of a model assembled by from_vision_text_pretrained."
        )
    own = {key.removeprefix(part): value for key, value in state_dict.items() if key.startswith(part)}
    without_peft = SimpleNamespace(state_dict=lambda: own, named_modules=lm.named_modules)
    stored, metadata = quantizer.get_state_dict_and_metadata(without_peft)
    if stored is not None:
        rest = {key: value for key, value in state_dict.items() if not key.startswith(part)}
        state_dict = rest | {f"{part}{key}": value for key, value in stored.items()}
    quantizer.get_state_dict_and_metadata = lambda _: (state_dict, dict(metadata))
    return state_dict, quantizer


def _peft_needs_base(model: "FromagePreTrainedModel", references: dict[str, Any]) -> bool:
    """Whether a PEFT adapter's files alone would lack trained parts, or weights, that its base model has not."""
    all_wrapped = all(is_wrapped for is_wrapped, _ in own_parameters(model.adapter))
    named = all(getattr(model.config, f"{prefix}_model_id") is not None for prefix in ROLES)
    return not (all_wrapped and model.name_or_path and (references or not named))


def _fingerprint_to_save(
    model: "FromagePreTrainedModel", trained: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor]
) -> str | None:
    """The fingerprint of the trained parts, where their rounded values would give another."""
    own, saved = (
        {key.removeprefix(TRAINED_PREFIX): value for key, value in tensors.items()} for tensors in (trained, rounded)
    )
    fingerprint = model.trained_fingerprint.of(own)
    return None if fingerprint == trained_fingerprint(saved) else fingerprint


def _config_to_save(
    model: "FromagePreTrainedModel", references: dict[str, Any], retrieval_fingerprint: str | None
) -> FromageConfig:
    config = copy.deepcopy(model.config)
    config.text_config.dtype, config.vision_config.dtype = model.language_model.dtype, model.vision_model.dtype
    for prefix in ROLES:
        sub_config = getattr(config, f"{prefix}_config")
        sub_config.name_or_path = references.get(f"{prefix}_model_id", "")  # no path of this machine
        if references or not has_packed_weights(getattr(model, PARTS[prefix])):
            sub_config.__dict__.pop("quantization_config", None)  # a choice of whoever loads
        if references:
            setattr(config, f"{prefix}_model_id", references[f"{prefix}_model_id"])
        else:
            for field in ("model_id", "model_revision", "model_fingerprint"):
                setattr(config, f"{prefix}_{field}", None)
    if not references:
        config.text_gguf_file = None
    config.retrieval_fingerprint = retrieval_fingerprint
    if model.is_remote_code():  # one class stands under three names; the library writes only one of them
        module = type(model).__module__.rsplit(".", 1)[-1]
        names = dict.fromkeys(_AUTO_CLASSES, f"{module}.{type(model).__name__}")
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **names}
    return config


def refuse_unsaved_peft(model: "FromagePreTrainedModel") -> None:
    """Raise a `ValueError` where `save_pretrained` would leave out what PEFT trains in this model, or write it
    twice."""
    if not model._hf_peft_config_loaded and has_peft_parameters(model):
        raise ValueError(
            "peft.get_peft_model has put an adapter into this model that save_pretrained cannot write: it would be "
            "lost. Save the PEFT model, or merge the adapter first (merge_and_unload) and put what that returns in "
            "its place; or use add_adapter, whose adapter is saved."
        )
    if has_merged_layers(model):
        raise ValueError(
            "Layers of the PEFT adapter are merged into the weights that they wrap. Saved with the adapter beside "
            "them, they would count twice: call unmerge() of these layers first."
        )


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.to(dtype)
    if tensor.isfinite().all() and not rounded.isfinite().all():
        raise ValueError(f"`adapter_dtype` {dtype} does not hold {name}: it would be infinite. Take bfloat16.")
    return rounded


def _replace_checkpoint(staging: Path, directory: Path) -> None:
    """Move a new checkpoint's files into `directory`, and remove weight files of an earlier, longer one."""
    stale = {path.name for path in directory.glob("model*.safetensors*")} if any(staging.glob("model*")) else set()
    stale -= {path.name for path in staging.iterdir()}
    move_into_place(staging, directory, last="config.json")  # which makes a folder a checkpoint
    for name in stale:
        (directory / name).unlink()


# ---- loading -------------------------------------------------------------------------------------------------------


def load_checkpoint(
    cls: type["FromagePreTrainedModel"],
    load_with_transformers: Callable[..., Any],
    pretrained_model_name_or_path: str | os.PathLike,
    *model_args: Any,
    **kwargs: Any,
) -> Any:
    """Body of [`FromagePreTrainedModel.from_pretrained`], which documents it.

    Args:
        load_with_transformers: transformers' own `from_pretrained` of `cls`.
    """
    try:
        return _load_checkpoint(cls, load_with_transformers, pretrained_model_name_or_path, *model_args, **kwargs)
    except HTTPError as error:
        raise ConnectionError(
            f"Loading {pretrained_model_name_or_path} broke off while a file was downloaded: {error}. Call again: "
            "files that are complete are not downloaded twice."
        ) from error


def _load_checkpoint(
    cls: type["FromagePreTrainedModel"],
    load_with_transformers: Callable[..., Any],
    pretrained_model_name_or_path: str | os.PathLike,
    *model_args: Any,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    hub_kwargs: Any = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "subfolder") if key in kwargs}
    peft_path, name, adapter_kwargs = maybe_load_adapters(
        pretrained_model_name_or_path, hub_kwargs, **(kwargs.get("adapter_kwargs") or {})
    )
    files = weight_files_of(name, kwargs.get("variant"), hub_kwargs)
    holds_backbones = any(not key.startswith(TRAINED_PREFIX) for file in files for key in tensor_names(file))
    is_quantized = kwargs.get("quantization_config") is not None  # or else as it is stored
    if not files or (holds_backbones and not (is_quantized or _is_stored_quantized(cls, name, config, hub_kwargs))):
        return _load_whole(
            cls, load_with_transformers, pretrained_model_name_or_path, *model_args, config=config, **kwargs
        )

    options = {key: kwargs.pop(key) for key in list(kwargs) if key in _OPTIONS}
    loader_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in _BACKBONE_KWARGS}
    if isinstance(config, PreTrainedConfig):
        config, left = copy.deepcopy(config), kwargs
    else:
        for prefix in ROLES:
            if f"{prefix}_model_id" in kwargs:  # the commit that the checkpoint names is of another repository
                kwargs.setdefault(f"{prefix}_model_revision", None)
        config, left = cls.config_class.from_pretrained(
            name if config is None else config, return_unused_kwargs=True, **hub_kwargs, **kwargs
        )
    if unknown := set(left) - {*HUB_KWARGS, "revision", "subfolder"}:
        raise ValueError(f"{cls.__name__}.from_pretrained got unknown arguments {sorted(unknown)}.")
    loader_kwargs.update({key: value for key, value in hub_kwargs.items() if key in HUB_KWARGS})
    if holds_backbones:
        model = join_backbones(
            cls, config, loader_kwargs, lambda *args: backbone_within(os.fspath(name), hub_kwargs, *args)
        )
    else:
        find_local_backbones(config, name)
        model = join_backbones(cls, config, loader_kwargs, reload_backbone)
    load_trained_parts(model.adapter, files)
    take_saved_fingerprint(model)
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    model.eval()
    model.adjust_generation_fn(
        options.get("generation_config"), options.get("_from_auto", False), options.get("_from_pipeline"), name,
        trust_remote_code=loader_kwargs.get("trust_remote_code"), **{**_HUB_DEFAULTS, **hub_kwargs},
    )  # fmt: skip
    if peft_path is not None:
        peft_name = options.get("adapter_name", "default")
        model.load_adapter(peft_path, adapter_name=peft_name, adapter_kwargs=adapter_kwargs)
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, info) if options.get("output_loading_info") else model


def _is_stored_quantized(
    cls: type["FromagePreTrainedModel"], name: str | os.PathLike, config: Any, hub_kwargs: dict[str, Any]
) -> bool:
    """Whether a self-contained checkpoint holds its language model as a quantizer packs it."""
    if not isinstance(config, PreTrainedConfig):
        config = cls.config_class.from_pretrained(name if config is None else config, **hub_kwargs)
    return hasattr(config.text_config, "quantization_config")


def _load_whole(
    cls: type["FromagePreTrainedModel"],
    load_with_transformers: Callable[..., Any],
    name: str | os.PathLike,
    *model_args: Any,
    config: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """transformers' own loading, which must leave no weight at random; each backbone keeps its saved dtype."""
    dtypes: dict[str, torch.dtype] = {}
    hub_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "subfolder") if key in kwargs}
    if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
        saved = config if isinstance(config, PreTrainedConfig) else cls.config_class.from_pretrained(name, **hub_kwargs)
        found = {part: saved_dtype(getattr(saved, f"{prefix}_config")) for prefix, part in PARTS.items()}
        dtypes = {part: dtype for part, dtype in found.items() if dtype is not None}
        if len(dtypes) < len(found) or len(set(dtypes.values())) == 1:
            dtypes = {}
        else:
            kwargs["dtype"] = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
    may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
    model, info = load_with_transformers(
        name, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    for part, dtype in dtypes.items():
        getattr(model, part).to(dtype)
    files = weight_files_of(name, kwargs.get("variant"), hub_kwargs)
    mismatched = take_scale_of_shape_1(model.adapter, info["mismatched_keys"], files)
    unknown = {key for key in info["unexpected_keys"] if key.startswith(TRAINED_PREFIX)}
    problems = {"lacks": sorted(info["missing_keys"]), "has unknown trained tensors:": sorted(unknown)}
    if not may_mismatch:
        shapes = [f"{key} {tuple(ours)}, not {tuple(theirs)}" for key, ours, theirs in mismatched]
        problems["has"] = shapes
    for problem, keys in problems.items():
        if keys:
            raise ValueError(
                f"The checkpoint {name} {problem} {', '.join(keys[:8])}. It does not belong to the configuration "
                "beside it, or is not whole: save or download it again."
            )
    check_finite({f"{TRAINED_PREFIX}{key}": value for key, value in model.adapter.state_dict().items()}, name)
    take_saved_fingerprint(model)
    return (model, info) if output_loading_info else model


def take_saved_fingerprint(model: "FromagePreTrainedModel") -> None:
    """Keep the fingerprint that a checkpoint just loaded names for its trained parts, if they were rounded when saved
    so that their own would be another."""
    if (saved := model.config.retrieval_fingerprint) is not None:
        model.trained_fingerprint.remember(trained_state(model.adapter), saved)
        model.config.retrieval_fingerprint = None


def load_peft_adapter(
    model: "FromagePreTrainedModel", peft_model_id: str | None, adapter_name: str | None, kwargs: dict[str, Any]
) -> Any:
    """Body of [`FromagePreTrainedModel.load_adapter`], which documents it."""
    if not kwargs.get("weight_mapping"):
        # PEFT saves DoRA's magnitudes without the last part of their names, and transformers does not add it.
        magnitude = WeightRenaming(r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")
        kwargs["weight_mapping"] = [magnitude, *get_model_conversion_mapping(model)]
    info = PreTrainedModel.load_adapter(model, peft_model_id, adapter_name, **kwargs)
    # What PEFT does not save (AdaLoRA's counters) need not be there.
    saved = {tensor.data_ptr() for tensor in model.get_adapter_state_dict(adapter_name or "default").values()}
    tensors = model.state_dict()
    missing = {key for key in info.missing_keys if tensors[key].data_ptr() in saved - {0}}
    if missing or info.unexpected_keys:
        raise ValueError(
            f"The PEFT adapter does not fit this model: it lacks {sorted(missing)[:8]}, and there is no place for "
            f"{sorted(info.unexpected_keys)[:8]}. Load it with peft.PeftModel.from_pretrained(model, folder), into "
            "the model that it was made from."
        )
    if peft_model_id is not None:
        hub_kwargs = {key: value for key, value in (kwargs.get("adapter_kwargs") or {}).items() if key in _HUB_DEFAULTS}
        take_unrounded_values(model, peft_model_id, adapter_name or "default", hub_kwargs)
    return info

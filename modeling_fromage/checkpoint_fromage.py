"""Checkpoints: the trained parts alone, with references to the frozen backbones, or everything in one folder."""

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .assembly_fromage import (
    HUB_KWARGS,
    ROLES,
    SHARED_LOADER_KWARGS,
    backbone_files,
    load_backbone,
    reload_backbone,
    saved_dtype,
)
from .configuration_fromage import FromageConfig
from .fingerprint_fromage import fingerprint

logger = logging.getLogger(__name__)

TRAINED_PREFIX = "adapter."
_STAGING = ".saving-"
_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_BESIDE = 2  # folders up from a checkpoint to where backbones still count as lying beside it: RUN/checkpoint-10


class FromageCheckpointMixin:
    """`save_pretrained` and `from_pretrained` of [`FromageForConditionalGeneration`]."""

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        save_backbones: bool | None = None,
        adapter_dtype: str | torch.dtype = torch.float32,
        **kwargs: Any,
    ):
        """Write a checkpoint that `from_pretrained` reads; each file appears whole or not at all.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            is_main_process, state_dict, kwargs: As in transformers.
            save_backbones (`bool`, *optional*):
                `False` writes the trained parts alone and names the backbones by Hub id and commit, or by a path
                relative to the folder; `True` writes everything. By default the trained parts alone where the backbones
                came from the Hub or lie beside the checkpoint (at most two folders up), else everything.
            adapter_dtype (`str` or `torch.dtype`): Of the trained parts in the file; bfloat16 makes it half as large.

        Raises:
            ValueError: `save_backbones=False`, and it is not known where a backbone came from.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"{directory} is a file; give a folder to save into.")
        has_peft_adapter = getattr(self, "_hf_peft_config_loaded", False)  # transformers then saves that alone
        if kwargs.get("distributed_checkpoint") or has_peft_adapter or not is_main_process:
            return super().save_pretrained(directory, is_main_process, state_dict, **kwargs)
        references = {} if save_backbones else self._references(directory, required=save_backbones is False)
        state_dict = self.state_dict() if state_dict is None else dict(state_dict)
        if references:
            state_dict = {key: value for key, value in state_dict.items() if key.startswith(TRAINED_PREFIX)}
        adapter_dtype = getattr(torch, adapter_dtype) if isinstance(adapter_dtype, str) else adapter_dtype
        for key in state_dict:
            if key.startswith(TRAINED_PREFIX):
                state_dict[key] = state_dict[key].to(adapter_dtype)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", directory.name)  # not the name of the folder that files are staged in
        directory.mkdir(parents=True, exist_ok=True)
        config, ignored = self.config, self._keys_to_ignore_on_save
        self.config, self._keys_to_ignore_on_save = self._config_to_save(references), None
        try:
            for abandoned in directory.glob(f"{_STAGING}*"):  # by a process that was killed
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(dir=directory, prefix=_STAGING) as staging:
                super().save_pretrained(staging, state_dict=state_dict, **kwargs)
                _move_into_place(Path(staging), directory)
        finally:
            self.config, self._keys_to_ignore_on_save = config, ignored

    def _references(self, directory: Path, required: bool) -> dict[str, Any]:
        """The configuration's fields that name the backbones in a checkpoint in `directory`; empty: save them too."""
        fields: dict[str, Any] = {}
        for prefix, role in ROLES.items():
            name = getattr(self.config, f"{prefix}_model_id")
            if name is None:
                if required:
                    raise ValueError(
                        f"Cannot save the trained parts alone: it is not known where the {role} came from. Use "
                        "save_backbones=True, or assemble the model with from_vision_text_pretrained."
                    )
                return {}
            if os.path.isdir(name):
                name = os.path.relpath(os.path.realpath(name), os.path.realpath(directory))
                if Path(name).parts[: _BESIDE + 1] == (os.pardir,) * (_BESIDE + 1) and not required:
                    logger.warning(
                        "The %s in %s is on no Hub and does not lie beside %s: the checkpoint will hold it whole. "
                        "save_backbones=False would save a reference to it.",
                        role, getattr(self.config, f"{prefix}_model_id"), directory,
                    )  # fmt: skip
                    return {}
                name = name if name.startswith(os.curdir) else os.path.join(os.curdir, name)
            fields[f"{prefix}_model_id"] = name
            if getattr(self.config, f"{prefix}_model_fingerprint") is None:  # taken once; the digest reads whole files
                setattr(self.config, f"{prefix}_model_fingerprint", fingerprint(backbone_files(prefix, self.config)))
        return fields

    def _config_to_save(self, references: dict[str, Any]) -> FromageConfig:
        config = copy.deepcopy(self.config)
        config.text_config.dtype, config.vision_config.dtype = self.language_model.dtype, self.vision_model.dtype
        for prefix in ROLES:
            sub_config = getattr(config, f"{prefix}_config")
            sub_config.name_or_path = references.get(f"{prefix}_model_id", "")  # no path of this machine
            if references:
                setattr(config, f"{prefix}_model_id", references[f"{prefix}_model_id"])
                sub_config.__dict__.pop("quantization_config", None)  # a choice of whoever loads
            else:
                for field in ("model_id", "model_revision", "model_fingerprint"):
                    setattr(config, f"{prefix}_{field}", None)
        if not references:
            config.text_gguf_file = None
        if self.is_remote_code():  # one class stands under three names; the library writes only one of them
            module = type(self).__module__.rsplit(".", 1)[-1]
            names = dict.fromkeys(_AUTO_CLASSES, f"{module}.{type(self).__name__}")
            config.auto_map = {**(getattr(config, "auto_map", None) or {}), **names}
        return config

    def remember_frozen_keys(self):
        """Let the Trainer know that a checkpoint without the backbones, if this model can have one, is complete."""
        known = all(getattr(self.config, f"{prefix}_model_id") is not None for prefix in ROLES)
        frozen = {key for key in self.state_dict() if not key.startswith(TRAINED_PREFIX)}
        self._keys_to_ignore_on_save = frozen if known else None

    def refuse_local_backbones(self):
        """Raise a `ValueError` where the backbones are folders of this machine, which no one else can load."""
        for prefix, role in ROLES.items():
            name = getattr(self.config, f"{prefix}_model_id")
            if name is None or os.path.isdir(name):
                raise ValueError(
                    f"The {role} is not on the Hub ({name or 'unknown origin'}), so a repository of the trained parts "
                    "could not be loaded elsewhere. Assemble the model from Hub ids, or upload a folder written by "
                    "save_pretrained(folder, save_backbones=True) with `hf upload`."
                )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """transformers' `push_to_hub`, of the trained parts alone.

        Raises:
            ValueError: A backbone is a folder of this machine.
        """
        self.refuse_local_backbones()
        return super().push_to_hub(repo_id, **kwargs)

    # ---- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ):
        """Load a checkpoint of either kind; the backbones that one of the trained parts names are fetched and joined.

        Args:
            pretrained_model_name_or_path: A folder or Hub id; one with a PEFT adapter loads with that adapter.
            kwargs:
                As in transformers. `dtype`, `device_map` (a map by module names included), `attn_implementation` (a
                dict by sub-configuration included), `token`, `cache_dir`, `local_files_only`, ... hold for both
                backbones; `quantization_config` for the language model alone; `revision` and `subfolder` for this
                checkpoint alone, the backbones' are those it was saved with. Trained parts are loaded in fp32.

        Raises:
            ValueError: A trained tensor is missing, unknown or of another shape, a weight of a backbone is missing, or
                a backbone is not the one that the checkpoint was saved with.
            ConnectionError: A download broke off.
        """
        if pretrained_model_name_or_path is None:  # a state dict is given
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        try:
            return cls._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        except HTTPError as error:
            raise ConnectionError(
                f"Loading {pretrained_model_name_or_path} broke off while a file was downloaded: {error}. Call again: "
                "files that are complete are not downloaded twice."
            ) from error

    @classmethod
    def _load(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        hub_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "subfolder") if key in kwargs}
        peft_path, name, adapter_kwargs = maybe_load_adapters(
            pretrained_model_name_or_path, hub_kwargs, **(kwargs.get("adapter_kwargs") or {})
        )
        files = _weight_files(name, kwargs.get("variant"), hub_kwargs)
        holds_backbones = any(not key.startswith(TRAINED_PREFIX) for file in files for key in _keys(file))
        if not files or (holds_backbones and kwargs.get("quantization_config") is None):
            return cls._load_whole(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        options = {key: kwargs.pop(key) for key in list(kwargs) if key in _OPTIONS}
        loader_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in _BACKBONE_KWARGS}
        if isinstance(config, PreTrainedConfig):
            config, unknown = copy.deepcopy(config), kwargs
        else:
            config, unknown = cls.config_class.from_pretrained(
                name if config is None else config, return_unused_kwargs=True, **hub_kwargs, **kwargs
            )
        if unknown := set(unknown) - {*HUB_KWARGS, "revision", "subfolder"}:
            raise ValueError(f"{cls.__name__}.from_pretrained got unknown arguments {sorted(unknown)}.")
        loader_kwargs.update({key: value for key, value in hub_kwargs.items() if key in HUB_KWARGS})
        if holds_backbones:
            model = _join(cls, config, loader_kwargs, lambda *args: _backbone_within(name, hub_kwargs, *args))
        else:
            _find_local_backbones(config, name)
            model = _join(cls, config, loader_kwargs, reload_backbone)
        _load_trained_parts(model, files)
        model.name_or_path = model.config.name_or_path = os.fspath(name)
        model.eval()
        model.adjust_generation_fn(
            options.get("generation_config"), options.get("_from_auto", False), options.get("_from_pipeline"), name,
            trust_remote_code=loader_kwargs.get("trust_remote_code"), **{**_HUB_DEFAULTS, **hub_kwargs},
        )  # fmt: skip
        if peft_path is not None:
            peft_name = options.get("adapter_name", "default")
            model.load_adapter(peft_path, adapter_name=peft_name, adapter_kwargs=adapter_kwargs)
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if options.get("output_loading_info") else model

    @classmethod
    def _load_whole(cls, name, *model_args, config=None, output_loading_info=False, **kwargs):
        """transformers' own loading, which must leave no weight at random; each backbone keeps its saved dtype."""
        dtypes = {}
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
            hub_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "subfolder") if key in kwargs}
            saved = (
                config if isinstance(config, PreTrainedConfig) else cls.config_class.from_pretrained(name, **hub_kwargs)
            )
            dtypes = {part: saved_dtype(getattr(saved, f"{prefix}_config")) for prefix, part in _PARTS.items()}
            if None in dtypes.values() or len(set(dtypes.values())) == 1:
                dtypes = {}
            else:
                kwargs["dtype"] = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            name, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        for part, dtype in dtypes.items():
            getattr(model, part).to(dtype)
        unknown = {key for key in info["unexpected_keys"] if key.startswith(TRAINED_PREFIX)}
        problems = {"lacks": sorted(info["missing_keys"]), "has unknown trained tensors:": sorted(unknown)}
        if not may_mismatch:
            shapes = [f"{key} {tuple(ours)}, not {tuple(theirs)}" for key, ours, theirs in info["mismatched_keys"]]
            problems["has"] = shapes
        for problem, keys in problems.items():
            if keys:
                raise ValueError(
                    f"The checkpoint {name} {problem} {', '.join(keys[:8])}. It does not belong to the configuration "
                    "beside it, or is not whole: save or download it again."
                )
        return (model, info) if output_loading_info else model


_PARTS = {"text": "language_model", "vision": "vision_model"}
_BACKBONE_KWARGS = {*SHARED_LOADER_KWARGS, "torch_dtype", "quantization_config"} - set(HUB_KWARGS)
_HUB_DEFAULTS = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False,
                 "token": None, "revision": None, "subfolder": ""}  # fmt: skip
_OPTIONS = {"output_loading_info", "generation_config", "adapter_name", "adapter_kwargs", "variant", "weights_only",
            "_from_auto", "_from_pipeline", "_commit_hash"}  # fmt: skip


def _join(cls, config: FromageConfig, kwargs: dict[str, Any], load: Callable[..., PreTrainedModel]):
    """Load both backbones, with what of `kwargs` concerns each, and put new trained parts between them."""
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    models, device_map = {}, {}
    for prefix, part in _PARTS.items():
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
        placed = models[part].__dict__.get("hf_device_map", {})
        device_map.update({f"{part}.{module}".rstrip("."): device for module, device in placed.items()})
    model = cls(config, **models)
    if device_map:  # of a backbone that is spread over devices
        device = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
        model.hf_device_map = {**device_map, "adapter": device}
    else:
        device = models["language_model"].device
    model.adapter.to(device)
    return model


def _device_map_of(part: str, device_map: dict[str, Any]) -> dict[str, Any] | None:
    """What a device map by module names says of one backbone."""
    own = {
        key.removeprefix(part).removeprefix("."): value
        for key, value in device_map.items()
        if key == part or key.startswith(f"{part}.")
    }
    return own or ({"": device_map[""]} if "" in device_map else None)


def _backbone_within(name, hub_kwargs: dict[str, Any], prefix: str, config: FromageConfig, kwargs: dict[str, Any]):
    """A backbone out of a self-contained checkpoint, by itself: the way to quantise the language model alone."""
    kwargs = {**kwargs, **hub_kwargs, "config": getattr(config, f"{prefix}_config")}
    return load_backbone(prefix, name, {**kwargs, "key_mapping": {rf"^{_PARTS[prefix]}\.": ""}}, config.vision_pooling)


def _find_local_backbones(config: FromageConfig, checkpoint: str | os.PathLike):
    """Make the paths of backbones that lie beside a checkpoint absolute.

    Raises:
        ValueError: A backbone is not there, or unknown.
    """
    for prefix, role in ROLES.items():
        field = f"{prefix}_model_id"
        name = getattr(config, field)
        if name is None:
            raise ValueError(
                f"The checkpoint {checkpoint} holds the trained parts alone and does not name its {role}. Pass "
                f"`{field}=` (a Hub id or a folder)."
            )
        if name.startswith((os.curdir + "/", os.pardir + "/")):
            path = os.path.normpath(os.path.join(checkpoint, name))
            if not os.path.isdir(path):
                raise ValueError(
                    f"The checkpoint {checkpoint} needs the {role} in the folder {name} relative to it, and there is "
                    f"none. Put it there, or pass `{field}=` (a Hub id or a folder)."
                )
            setattr(config, field, path)


def _load_trained_parts(model, files: list[Path]):
    """Fill `model.adapter` from `files`, in fp32; raise a `ValueError` unless names and shapes are just its own."""
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors.update({key: opened.get_tensor(key) for key in opened.keys() if key.startswith(TRAINED_PREFIX)})  # noqa: SIM118
    expected = {f"{TRAINED_PREFIX}{key}": tensor.shape for key, tensor in model.adapter.state_dict().items()}
    problems = [f"{key} is missing" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"{key} is unknown" for key in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(shape)}"
        for key, shape in sorted(expected.items())
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        raise ValueError(
            f"The trained parts in {files[0].parent} do not fit the configuration beside them: {'; '.join(problems)}."
        )
    model.adapter.load_state_dict({key.removeprefix(TRAINED_PREFIX): tensors[key] for key in expected})


def _weight_files(name: str | os.PathLike, variant: str | None, hub_kwargs: dict[str, Any]) -> list[Path]:
    """The checkpoint's safetensors files; none of another format, or where transformers is to say what is wrong."""
    single, index = (_add_variant(weights, variant) for weights in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if path := _find(name, single, hub_kwargs):
        return [path]
    if path := _find(name, index, hub_kwargs):
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        return [shard for shard in (_find(name, shard, hub_kwargs) for shard in sorted(shards)) if shard]
    return []


def _add_variant(filename: str, variant: str | None) -> str:
    return filename.replace(".safetensors", f".{variant}.safetensors") if variant else filename


def _find(name: str | os.PathLike, filename: str, hub_kwargs: dict[str, Any]) -> Path | None:
    try:
        return Path(cached_file(name, filename, **hub_kwargs))
    except OSError:
        return None


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _move_into_place(staging: Path, directory: Path):
    """Replace the files of `directory` by those of `staging`, and drop weight files of an earlier, longer save."""
    stale = {path.name for path in directory.glob("model*.safetensors*")}
    # The configuration last: it is what makes a folder a checkpoint.
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, directory / path.name)
        stale.discard(path.name)
    for name in stale:
        (directory / name).unlink()

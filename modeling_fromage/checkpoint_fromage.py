"""Checkpoints: the trained parts alone, with references to the frozen backbones, or everything in one folder."""

import copy
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.peft import maybe_load_adapters

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
    tensor_names,
    weight_files_of,
)
from .checkpoint_origin_fromage import backbone_references, difference_from_origin
from .configuration_fromage import FromageConfig
from .file_writing_fromage import move_into_place
from .fingerprint_fromage import trained_fingerprint
from .peft_layers_fromage import (
    has_merged_layers,
    has_peft_parameters,
    load_peft_tensors,
    names_without_peft,
    own_parameters,
)

logger = logging.getLogger(__name__)

_STAGING = ".saving-"
_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


class FromageCheckpointMixin:
    """`save_pretrained` and `from_pretrained` of [`FromageForConditionalGeneration`]."""

    _names_absolute_paths = False

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
                came from the Hub or lie beside the checkpoint (at most two folders up), and still have the weights of
                their files; else everything.
            adapter_dtype (`str` or `torch.dtype`): Of the trained parts in the file; bfloat16 makes it half as large.

        With a PEFT adapter in the model that adapter is written, and the rest of the model beside it unless the adapter
        holds a copy of all trained parts and names the checkpoint that it was made from.

        Raises:
            ValueError: `save_backbones=False`, and a backbone cannot be named: it is not known where it came from, or
                its weights are no longer those of its files. Or `peft.get_peft_model` has wrapped the model, layers of
                an adapter are merged, or `adapter_dtype` does not hold the trained parts.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"{directory} is a file; give a folder to save into.")
        if kwargs.get("distributed_checkpoint") or not is_main_process:
            return super().save_pretrained(directory, is_main_process, state_dict, **kwargs)
        if kwargs.get("push_to_hub") and not save_backbones:
            self.refuse_local_backbones()
        self.refuse_unsaved_peft()
        with_peft = self._hf_peft_config_loaded
        whole_state = self.state_dict() if state_dict is None else dict(state_dict)
        state_dict = names_without_peft(self, whole_state)
        required = save_backbones is False
        references = {} if save_backbones else backbone_references(self, directory, state_dict, required)
        adapter_dtype = getattr(torch, adapter_dtype) if isinstance(adapter_dtype, str) else adapter_dtype
        trained = {key: value for key, value in state_dict.items() if key.startswith(TRAINED_PREFIX)}
        rounded = {key: _rounded(key, value, adapter_dtype) for key, value in trained.items()}
        config = self._config_to_save(references, self._fingerprint_to_save(trained, rounded))
        state_dict = rounded if references else {**state_dict, **rounded}
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", directory.name)  # not the name of the folder that files are staged in
        directory.mkdir(parents=True, exist_ok=True)
        for abandoned in directory.glob(f"{_STAGING}*"):  # by a process that was killed
            shutil.rmtree(abandoned)
        with tempfile.TemporaryDirectory(dir=directory, prefix=_STAGING) as staging:
            if not with_peft or self._peft_needs_base(references):
                only_local = {**kwargs, "push_to_hub": False} if with_peft else kwargs
                with self._as_saved(config):
                    super().save_pretrained(staging, state_dict=state_dict, **only_local)
            if with_peft:
                super().save_pretrained(staging, state_dict=whole_state, **kwargs)
            _replace_checkpoint(Path(staging), directory)

    @contextmanager
    def _as_saved(self, config: FromageConfig):
        """The model as transformers is to save it: with the checkpoint's configuration, and without PEFT."""
        changed = {"config": config, "_keys_to_ignore_on_save": None, "_hf_peft_config_loaded": False}
        kept = {name: getattr(self, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _peft_needs_base(self, references: dict[str, Any]) -> bool:
        """Whether a PEFT adapter's files alone would lack trained parts, or weights, that its base model has not."""
        all_wrapped = all(is_wrapped for is_wrapped, _ in own_parameters(self.adapter))
        named = all(getattr(self.config, f"{prefix}_model_id") is not None for prefix in ROLES)
        return not (all_wrapped and self.name_or_path and (references or not named))

    def _fingerprint_to_save(self, trained: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor]) -> str | None:
        """The `retrieval_fingerprint()` of trained parts where their rounded values would give another."""
        own, saved = (
            {key.removeprefix(TRAINED_PREFIX): value for key, value in tensors.items()}
            for tensors in (trained, rounded)
        )
        fingerprint = self.fingerprint_of(own)
        return None if fingerprint == trained_fingerprint(saved) else fingerprint

    def _config_to_save(self, references: dict[str, Any], retrieval_fingerprint: str | None) -> FromageConfig:
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
        config.retrieval_fingerprint = retrieval_fingerprint
        if self.is_remote_code():  # one class stands under three names; the library writes only one of them
            module = type(self).__module__.rsplit(".", 1)[-1]
            names = dict.fromkeys(_AUTO_CLASSES, f"{module}.{type(self).__name__}")
            config.auto_map = {**(getattr(config, "auto_map", None) or {}), **names}
        return config

    def remember_loading(self, kwargs: dict[str, dict[str, Any]]):
        """Keep what it takes to find a backbone's files again, of the arguments by prefix that it was loaded with."""
        names = ("cache_dir", "trust_remote_code")
        self._reload_kwargs = {
            prefix: {name: own[name] for name in names if own.get(name) is not None} for prefix, own in kwargs.items()
        }

    def remember_frozen_keys(self):
        """Let the Trainer know that a checkpoint without the backbones, if this model can have one, is complete."""
        known = all(getattr(self.config, f"{prefix}_model_id") is not None for prefix in ROLES)
        frozen = {key for key in self.state_dict() if not key.startswith(TRAINED_PREFIX)}
        self._keys_to_ignore_on_save = frozen if known else None

    def refuse_unsaved_peft(self):
        """Raise a `ValueError` where `save_pretrained` would leave out what PEFT trains in this model, or write it
        twice."""
        if not self._hf_peft_config_loaded and has_peft_parameters(self):
            raise ValueError(
                "peft.get_peft_model has put an adapter into this model that save_pretrained cannot write: it would be "
                "lost. Save the PEFT model, or merge the adapter first (merge_and_unload) and put what that returns in "
                "its place; or use add_adapter, whose adapter is saved."
            )
        if has_merged_layers(self):
            raise ValueError(
                "Layers of the PEFT adapter are merged into the weights that they wrap. Saved with the adapter beside "
                "them, they would count twice: call unmerge() of these layers first."
            )

    @contextmanager
    def absolute_paths(self):
        """Within, `save_pretrained` names backbones that are on no Hub by their absolute paths, wherever it saves:
        for the checkpoints of a run, which are not to be published."""
        self._names_absolute_paths = True
        try:
            yield
        finally:
            self._names_absolute_paths = False

    def refuse_local_backbones(self, compare_weights: bool = True):
        """Raise a `ValueError` where no one else could load the backbones: they are folders of this machine, or (with
        `compare_weights`) are no longer what the Hub has."""
        state_dict = names_without_peft(self, self.state_dict()) if compare_weights else {}
        for prefix, role in ROLES.items():
            name = getattr(self.config, f"{prefix}_model_id")
            if name is None or os.path.isdir(name):
                raise ValueError(
                    f"The {role} is not on the Hub ({name or 'unknown origin'}), so a repository of the trained parts "
                    "could not be loaded elsewhere. Assemble the model from Hub ids, or upload a folder written by "
                    "save_pretrained(folder, save_backbones=True) with `hf upload`."
                )
            if problem := difference_from_origin(self, prefix, state_dict):
                raise ValueError(
                    f"The {role} {problem}, so a repository of the trained parts would load with another one. Upload a "
                    "folder written by save_pretrained(folder, save_backbones=True) with `hf upload`."
                )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """transformers' `push_to_hub`, of the trained parts alone.

        Raises:
            ValueError: A backbone is a folder of this machine, or its weights are no longer those on the Hub.
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
        files = weight_files_of(name, kwargs.get("variant"), hub_kwargs)
        holds_backbones = any(not key.startswith(TRAINED_PREFIX) for file in files for key in tensor_names(file))
        if not files or (holds_backbones and kwargs.get("quantization_config") is None):
            return cls._load_whole(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        options = {key: kwargs.pop(key) for key in list(kwargs) if key in _OPTIONS}
        loader_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in _BACKBONE_KWARGS}
        if isinstance(config, PreTrainedConfig):
            config, unknown = copy.deepcopy(config), kwargs
        else:
            for prefix in ROLES:
                if f"{prefix}_model_id" in kwargs:  # the commit that the checkpoint names is of another repository
                    kwargs.setdefault(f"{prefix}_model_revision", None)
            config, unknown = cls.config_class.from_pretrained(
                name if config is None else config, return_unused_kwargs=True, **hub_kwargs, **kwargs
            )
        if unknown := set(unknown) - {*HUB_KWARGS, "revision", "subfolder"}:
            raise ValueError(f"{cls.__name__}.from_pretrained got unknown arguments {sorted(unknown)}.")
        loader_kwargs.update({key: value for key, value in hub_kwargs.items() if key in HUB_KWARGS})
        if holds_backbones:
            model = join_backbones(cls, config, loader_kwargs, lambda *args: backbone_within(name, hub_kwargs, *args))
        else:
            find_local_backbones(config, name)
            model = join_backbones(cls, config, loader_kwargs, reload_backbone)
        load_trained_parts(model, files)
        model.take_saved_fingerprint()
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

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any):
        """transformers' `load_adapter`, with DoRA's magnitudes, and with no tensor left at random or left over.

        Raises:
            ValueError: The file lacks a tensor of the adapter's, or has one that the model has no place for.
        """
        if not kwargs.get("weight_mapping"):
            # PEFT saves DoRA's magnitudes without the last part of their names, and transformers does not add it.
            magnitude = WeightRenaming(r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")
            kwargs["weight_mapping"] = [magnitude, *get_model_conversion_mapping(self)]
        info = super().load_adapter(peft_model_id, adapter_name, **kwargs)
        # What PEFT does not save (AdaLoRA's counters) need not be there.
        saved = {tensor.data_ptr() for tensor in self.get_adapter_state_dict(adapter_name or "default").values()}
        tensors = self.state_dict()
        missing = {key for key in info.missing_keys if tensors[key].data_ptr() in saved - {0}}
        if missing or info.unexpected_keys:
            raise ValueError(
                f"The PEFT adapter does not fit this model: it lacks {sorted(missing)[:8]}, and there is no place for "
                f"{sorted(info.unexpected_keys)[:8]}. Load it with peft.PeftModel.from_pretrained(model, folder), into "
                "the model that it was made from."
            )
        return info

    def restore_adapter(self, directory: str | os.PathLike):
        """Fill this model's trained parts and its PEFT adapter, put in by `add_adapter`, from a checkpoint of its own.

        Raises:
            ValueError: The checkpoint lacks a tensor of them, or has others.
        """
        load_peft_tensors(self, directory)
        if not all(is_wrapped for is_wrapped, _ in own_parameters(self.adapter)):
            load_trained_parts(self, weight_files_of(directory, None, {}))

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any):
        """As in torch; but tensors of the model alone do not fit one that PEFT has changed, even where not strict."""
        if self._hf_peft_config_loaded and has_peft_parameters(self):
            if state_dict.keys() <= names_without_peft(self, self.state_dict()).keys():
                raise ValueError(
                    "The state dict has no tensor of the PEFT adapter that is in this model. Resume training with "
                    "FromageTrainer, or call model.restore_adapter(checkpoint)."
                )
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def _load_whole(cls, name, *model_args, config=None, output_loading_info=False, **kwargs):
        """transformers' own loading, which must leave no weight at random; each backbone keeps its saved dtype."""
        dtypes = {}
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
            hub_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, "revision", "subfolder") if key in kwargs}
            saved = (
                config if isinstance(config, PreTrainedConfig) else cls.config_class.from_pretrained(name, **hub_kwargs)
            )
            dtypes = {part: saved_dtype(getattr(saved, f"{prefix}_config")) for prefix, part in PARTS.items()}
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
        check_finite({f"{TRAINED_PREFIX}{key}": value for key, value in model.adapter.state_dict().items()}, name)
        model.take_saved_fingerprint()
        return (model, info) if output_loading_info else model


_BACKBONE_KWARGS = {*SHARED_LOADER_KWARGS, "torch_dtype", "quantization_config"} - set(HUB_KWARGS)
_HUB_DEFAULTS = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False,
                 "token": None, "revision": None, "subfolder": ""}  # fmt: skip
_OPTIONS = {"output_loading_info", "generation_config", "adapter_name", "adapter_kwargs", "variant", "weights_only",
            "_from_auto", "_from_pipeline", "_commit_hash"}  # fmt: skip


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.to(dtype)
    if tensor.isfinite().all() and not rounded.isfinite().all():
        raise ValueError(f"`adapter_dtype` {dtype} does not hold {name}: it would be infinite. Take bfloat16.")
    return rounded


def _replace_checkpoint(staging: Path, directory: Path):
    """Move a new checkpoint's files into `directory`, and remove weight files of an earlier, longer one."""
    stale = {path.name for path in directory.glob("model*.safetensors*")} if any(staging.glob("model*")) else set()
    stale -= {path.name for path in staging.iterdir()}
    move_into_place(staging, directory, last="config.json")  # which makes a folder a checkpoint
    for name in stale:
        (directory / name).unlink()

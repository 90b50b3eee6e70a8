"""The base class of FROMAGe's models: how they are saved and loaded, and what transformers asks of a model class."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapter_fromage import FromageAdapter, trained_state
from .backbone_checks_fromage import LanguageModelTraits
from .backbone_loading_fromage import PARTS, ROLES, BackboneOrigin
from .backbones_fromage import allow_activation_checkpointing, decoder_and_head, keep_quantised_weights, weight_of
from .checkpoint_files_fromage import TRAINED_PREFIX, load_trained_parts, weight_files_of
from .checkpoint_fromage import load_checkpoint, load_peft_adapter, refuse_unsaved_peft, save_checkpoint
from .checkpoint_origin_fromage import refuse_local_backbones
from .configuration_fromage import FromageConfig
from .fingerprint_fromage import TrainedFingerprint, with_feature_layer
from .frozen_lm_fromage import FrozenLM
from .peft_layers_fromage import (
    has_peft_parameters,
    load_peft_tensors,
    names_without_peft,
    own_parameters,
    refuse_prompt_learning,
    refuse_trainable_encoder,
    set_peft_training_mode,
    with_names_of_compile,
)
from .projectors_fromage import init_weights


class FromagePreTrainedModel(PreTrainedModel):
    """Saving and loading, by the trained parts alone or whole, for [`FromageForConditionalGeneration`]."""

    config_class = FromageConfig
    config: FromageConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # a contrastive loss cannot be normalised by a count of tokens
    _keep_in_fp32_modules_strict = ["adapter"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _names_absolute_paths = False

    adapter: FromageAdapter
    language_model: PreTrainedModel
    vision_model: PreTrainedModel

    def __init__(self, config: FromageConfig):
        super().__init__(config)
        self.origins: dict[str, BackboneOrigin] = {prefix: BackboneOrigin() for prefix in PARTS}
        self.trained_fingerprint = TrainedFingerprint()
        self.traits = LanguageModelTraits()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)
        if isinstance(module, FromageAdapter):
            module.init_scalars(self.config)

    def initialize_weights(self) -> None:
        for backbone in (self.language_model, self.vision_model):  # by their own classes' rules: buffers, too
            backbone.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def retrieval_fingerprint(self) -> str:
        """A digest of the trained parts: embeddings of models that differ in it cannot be compared. Taken anew when
        a trained tensor has changed, and of values in bfloat16, so that a checkpoint saved in it has its original's.
        Another layer of the encoder than its last is named behind it."""
        return with_feature_layer(self.trained_fingerprint.of(trained_state(self.adapter)), self.config)

    # ---- the frozen backbones -------------------------------------------------------------------------------------

    def frozen_lm(self) -> FrozenLM:
        """The language model as FROMAGe runs it, with the present modules."""
        refuse_prompt_learning(self.language_model)
        return FrozenLM(self.language_model, self.adapter, self.config, self.traits)

    def freeze_backbones(self) -> "FromagePreTrainedModel":
        """Let exactly the adapter's parameters require gradient; what PEFT has put in is left as it is."""
        for _, parameter in (*own_parameters(self.language_model), *own_parameters(self.vision_model)):
            parameter.requires_grad_(False)
        for is_wrapped, parameter in own_parameters(self.adapter):
            parameter.requires_grad_(not is_wrapped)  # of a wrapped one PEFT trains a copy, or a difference from it
        self.train(self.training)
        return self

    def train(self, mode: bool = True) -> "FromagePreTrainedModel":
        """Set training mode. The frozen backbones stay in eval mode, except for what PEFT trains in the LM."""
        super().train(mode)
        self.language_model.eval()
        self.vision_model.eval()
        keep_quantised_weights(self.language_model)
        if mode:
            set_peft_training_mode(self.language_model)
            refuse_trainable_encoder(self.vision_model)
            allow_activation_checkpointing(self.language_model)
        return self

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers: layers that take part recompute their activations in the captioning loss."""
        super().activation_checkpointing_enable(*args, **kwargs)
        self.train(self.training)

    @torch.no_grad()
    def normalize_ret_embedding(self) -> None:
        """Rescale each `[RET]` row to the mean norm of the LM's other input rows, as the authors do after each step."""
        if self.traits.mean_row_norm is None:
            rows = weight_of(self.get_input_embeddings())[: self.config.ret_token_id]
            self.traits.mean_row_norm = rows.float().norm(dim=-1).mean().item()
        self.adapter.normalize_ret(self.traits.mean_row_norm)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return decoder_and_head(self.language_model)[0]

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]  # further options come by keyword
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        save_backbones: bool | None = None,
        adapter_dtype: str | torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint that `from_pretrained` reads; each file appears whole or not at all.

        With a PEFT adapter in the model that adapter is written, and the rest of the model beside it unless the adapter
        holds a copy of all trained parts and names the checkpoint that it was made from.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            is_main_process, state_dict, kwargs: As in transformers.
            save_backbones (`bool`, *optional*):
                `False` writes the trained parts alone and names the backbones by Hub id and commit, or by a path
                relative to the folder; `True` writes everything. By default the trained parts alone where the backbones
                came from the Hub or lie beside the checkpoint (at most two folders up), and still have the weights of
                their files; else everything.
            adapter_dtype (`str` or `torch.dtype`): Of the trained parts in the file; bfloat16 makes it half as large.

        Raises:
            ValueError: `save_backbones=False`, and a backbone cannot be named: it is not known where it came from, or
                its weights are no longer those of its files. Or `peft.get_peft_model` has wrapped the model, layers of
                an adapter are merged, or `adapter_dtype` does not hold the trained parts.

        Example:

            model.save_pretrained("my-fromage", adapter_dtype="bfloat16")
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"{directory} is a file; give a folder to save into.")
        if kwargs.get("distributed_checkpoint") or not is_main_process:
            super().save_pretrained(directory, is_main_process, state_dict, **kwargs)
            return
        if kwargs.get("push_to_hub") and not save_backbones:
            self.refuse_local_backbones()
        dtype = getattr(torch, adapter_dtype) if isinstance(adapter_dtype, str) else adapter_dtype
        save_checkpoint(self, directory, state_dict, save_backbones, dtype, self._names_absolute_paths, kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]  # options by keyword
        """transformers' `push_to_hub`, of the trained parts alone.

        Raises:
            ValueError: A backbone is a folder of this machine, or its weights are no longer those on the Hub.
        """
        self.refuse_local_backbones()
        parent: Any = super()
        return parent.push_to_hub(repo_id, **kwargs)

    @contextmanager
    def absolute_paths(self) -> Iterator[None]:
        """Within, `save_pretrained` names backbones that are on no Hub by their absolute paths, wherever it saves:
        for the checkpoints of a run, which are not to be published."""
        self._names_absolute_paths = True
        try:
            yield
        finally:
            self._names_absolute_paths = False

    def refuse_unsaved_peft(self) -> None:
        """Raise a `ValueError` where `save_pretrained` would lose what PEFT trains in the model, or write it twice."""
        refuse_unsaved_peft(self)

    def refuse_local_backbones(self, compare_weights: bool = True) -> None:
        """Raise a `ValueError` where no one else could load the backbones: they are folders of this machine, or (with
        `compare_weights`) are no longer what the Hub has."""
        refuse_local_backbones(self, compare_weights)

    def _ignore_backbones_on_save(self) -> None:
        """Tell the Trainer that backbone weights may be absent from checkpoints, where they can be loaded by name."""
        known = all(getattr(self.config, f"{prefix}_model_id") is not None for prefix in ROLES)
        frozen = {key for key in self.state_dict() if not key.startswith(TRAINED_PREFIX)}
        self._keys_to_ignore_on_save = frozen if known else None

    # ---- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def _finalize_model_loading(cls, model: Any, load_config: Any, loading_info: Any) -> Any:
        info = super()._finalize_model_loading(model, load_config, loading_info)
        model.freeze_backbones()  # loading makes new parameters, which require gradient
        model.traits.measure_logit_transform(model.language_model)  # the weights were not there before
        return info

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of either kind. The backbones that one of the trained parts names are loaded and joined.

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

        Example:

            model = FromageForConditionalGeneration.from_pretrained("org/fromage", dtype="bfloat16")
        """
        load = super().from_pretrained
        if pretrained_model_name_or_path is None:  # a state dict is given
            return load(None, *model_args, config=config, **kwargs)
        return load_checkpoint(cls, load, pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def load_adapter(  # type: ignore[override]  # further options come by keyword
        self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `load_adapter`, with DoRA's magnitudes, and with no tensor left at random or left over.

        Raises:
            ValueError: The file lacks a tensor of the adapter's, or has one that the model has no place for.
        """
        return load_peft_adapter(self, peft_model_id, adapter_name, kwargs)

    def restore_adapter(self, directory: str | os.PathLike) -> None:
        """Fill this model's trained parts and its PEFT adapter, put in by `add_adapter`, from a checkpoint of its own.

        Raises:
            ValueError: The checkpoint lacks a tensor of them, or has others.
        """
        load_peft_tensors(self, directory)
        if not all(is_wrapped for is_wrapped, _ in own_parameters(self.adapter)):
            load_trained_parts(self.adapter, weight_files_of(directory, None, {}))

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As in torch. Where PEFT has changed the model, a state dict without PEFT's tensors is refused."""
        if self._hf_peft_config_loaded and has_peft_parameters(self):
            if state_dict.keys() <= names_without_peft(self, self.state_dict()).keys():
                raise ValueError(
                    "The state dict has no tensor of the PEFT adapter that is in this model. Resume training with "
                    "FromageTrainer, or call model.restore_adapter(checkpoint)."
                )
        return super().load_state_dict(with_names_of_compile(self, state_dict), *args, **kwargs)


__all__ = ["FromagePreTrainedModel"]

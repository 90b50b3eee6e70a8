"""Telling a model's own modules from those that PEFT has put in: by PEFT's classes, whatever the method."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available, logging

logger = logging.get_logger(__name__)


def own_modules(module: nn.Module, name: str = "", plain_name: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Each module of `module` that is not PEFT's, with the prefix of its tensors' names and what that is without PEFT.

    A LoRA layer stands for its `base_layer`: (`"q_proj.base_layer."`, `"q_proj."`, the linear layer).
    """
    inner = _inner_name(module)
    if inner is not None:
        yield from own_modules(module.get_submodule(inner), f"{name}{inner}.", plain_name)
        return
    yield name, plain_name, module
    for child_name, child in module.named_children():
        yield from own_modules(child, f"{name}{child_name}.", f"{plain_name}{child_name}.")


def own_parameters(module: nn.Module) -> Iterator[tuple[bool, nn.Parameter]]:
    """Each parameter of `module` that is not PEFT's, and whether PEFT has wrapped it."""
    for name, plain_name, own in own_modules(module):
        for parameter in own.parameters(recurse=False):
            yield name != plain_name, parameter


def has_peft_parameters(module: nn.Module) -> bool:
    """Whether `module` has parameters that PEFT has put in."""
    own = {id(parameter) for _, parameter in own_parameters(module)}
    return any(id(parameter) not in own for parameter in module.parameters())


def has_merged_layers(module: nn.Module) -> bool:
    """Whether a layer of PEFT's in `module` has its difference added to the weights that it wraps, for a while."""
    return any(getattr(child, "merged", False) is True for child in module.modules() if _inner_name(child) is not None)


def names_without_peft(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of `module` by the names that its tensors have without PEFT and torch.compile, and without PEFT's
    tensors."""
    if all(_inner_name(child) is None for child in module.modules()):
        return {_without_compile(key): value for key, value in state_dict.items()}
    own = {name: (plain_name, child) for name, plain_name, child in own_modules(module)}
    plain = {}
    for key, value in state_dict.items():
        prefix = key
        while prefix not in own:  # the innermost module; what a quantizer adds has names that go on after its weight's
            prefix = prefix[:-1].rpartition(".")[0]
            prefix += "." * bool(prefix)
        plain_name, child = own[prefix]
        tensor = key.removeprefix(prefix)
        if tensor.partition(".")[0] not in child._modules:  # else a module of PEFT's
            plain[_without_compile(plain_name + tensor)] = value
    return plain


def _without_compile(name: str) -> str:
    """A tensor's name without torch.compile, which wraps the parts that it is given."""
    return name.replace("_orig_mod.", "")


def with_names_of_compile(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict by the names that `module` has now, where torch.compile wraps parts of it."""
    own = {_without_compile(key): key for key in module.state_dict()}
    if all(name == key for name, key in own.items()):
        return state_dict
    return {own.get(_without_compile(key), key): value for key, value in state_dict.items()}


def set_peft_training_mode(module: nn.Module) -> None:
    """Put the trainable modules that PEFT has put into `module` into training mode, so that their dropout fires."""
    for wrapper in module.modules():
        inner = _inner_name(wrapper)
        if inner is None:
            continue
        added = [child for name, child in wrapper.named_children() if name != inner]
        parameters = [*wrapper.parameters(recurse=False), *(p for child in added for p in child.parameters())]
        if any(parameter.requires_grad for parameter in parameters):
            wrapper.training = True
            for child in added:
                child.train()


def refuse_prompt_learning(model: nn.Module) -> None:
    """Raise a `ValueError` where PEFT puts virtual tokens or a cache of them before what `model` reads."""
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"PEFT's {config.peft_type.value} does not work with FROMAGe, which runs the language model's layers by "
            "itself, several texts in one pass: virtual tokens would be left out. Take a method that changes layers "
            "(LoRA, DoRA, IA3, OFT, ...)."
        )


def refuse_trainable_encoder(vision_model: nn.Module) -> None:
    """Raise a `ValueError` where PEFT is to train something in the vision encoder, which runs without gradient. Of its
    own parameters that require gradient the log tells."""
    trainable = {name: parameter for name, parameter in vision_model.named_parameters() if parameter.requires_grad}
    if not trainable:
        return
    message = (
        f"The vision model has {len(trainable)} parameters that require gradient ({next(iter(trainable))}, ...), but "
        "it runs without gradient, so that they stay as they are. Freeze them; of PEFT, name layers of the language "
        r"model alone, with a pattern such as target_modules=r'language_model\..*\.(q_proj|v_proj)'."
    )
    own = {id(parameter) for _, parameter in own_parameters(vision_model)}
    if any(id(parameter) not in own for parameter in trainable.values()):
        raise ValueError(message)
    logger.warning_once(message)


def unwrapped(model: PreTrainedModel | None) -> PreTrainedModel | None:
    """`model`; raise a `ValueError` where it is not one of transformers' but wrapped, as `peft.get_peft_model` does."""
    if model is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A backbone must be a PreTrainedModel, got {type(model).__name__}. Assemble the FROMAGe model from "
            "unwrapped backbones, then put PEFT into it: model.add_adapter(...) or peft.get_peft_model(model, ...)."
        )
    return model


def load_peft_tensors(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Fill the active adapter of `model`, put in by its `add_adapter`, from the file that `save_pretrained` wrote.

    Raises:
        ValueError: The file lacks a tensor of the adapter's, or has others.
    """
    if is_peft_available():
        from peft import load_peft_weights, set_peft_model_state_dict

        prefix = "base_model.model."
        saved = load_peft_weights(os.fspath(directory), device="cpu")
        expected = {prefix + key for key in model.get_adapter_state_dict()}
        if differing := sorted(saved.keys() ^ expected):
            raise ValueError(
                f"The PEFT adapter in {directory} is not of the kind of this model's: they differ in "
                f"{', '.join(differing[:8])}. Call add_adapter with the configuration that it was trained with."
            )
        saved = {key.removeprefix(prefix): value for key, value in saved.items()}
        set_peft_model_state_dict(model, saved, adapter_name=model.active_adapters()[0])


def take_unrounded_values(
    model: PreTrainedModel, peft_model_id: str | os.PathLike, adapter_name: str, hub_kwargs: dict[str, Any]
) -> None:
    """Give an adapter of `model` that was just loaded the values of its file, where loading has rounded them.

    PEFT trains in fp32 beside backbones in bfloat16, in whose dtype transformers loads what was trained.
    """
    if is_peft_available():
        from peft import load_peft_weights, set_peft_model_state_dict
        from peft.functional import cast_adapter_dtype

        saved = load_peft_weights(os.fspath(peft_model_id), device="cpu", **hub_kwargs)
        saved = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
        own = model.get_adapter_state_dict(adapter_name)
        if any(own[key].dtype.itemsize < value.dtype.itemsize for key, value in saved.items() if key in own):
            cast_adapter_dtype(model, adapter_name)
            set_peft_model_state_dict(model, saved, adapter_name=adapter_name)


def _inner_name(module: nn.Module) -> str | None:
    """The name under which a module of PEFT's holds the one that it stands for; `None` for all other modules."""
    if "peft" not in sys.modules:  # nothing can be PEFT's then, and importing it takes a second
        return None
    if is_peft_available():
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        inner_names = {
            PeftModel: "base_model",
            BaseTuner: "model",
            BaseTunerLayer: "base_layer",
            AuxiliaryTrainingWrapper: "original_module",
        }
        return next((name for kind, name in inner_names.items() if isinstance(module, kind)), None)
    return None

"""The language model within a multimodal one: Gemma 3 from 4B up, LLaVA, Llama 4 and their kind."""

import copy
import sys
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from .backbones_fromage import decoder_and_head, in_eval_mode, keep_quantised_weights, undisturbed, weight_of
from .configuration_fromage import text_half
from .miniature_fromage import FAILURES


def with_text_half(config: PreTrainedConfig, text_config: PreTrainedConfig) -> PreTrainedConfig:
    """A multimodal model's configuration with `text_config` as its text half; `text_config` in the place of another."""
    half = text_half(config)
    for name in config.sub_configs:
        if getattr(config, name, None) is half:
            setattr(config, name, text_config)
            return config
    return text_config


def load_language_model(
    name: str, hub_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """`from_pretrained` of a causal LM, or of a multimodal model of which the LM is kept, and the names of the LM's
    weights that its files lack."""
    auto_class: Any = AutoModelForCausalLM
    if "gguf_file" not in kwargs:
        config = kwargs.get("config") or AutoConfig.from_pretrained(
            name, subfolder=kwargs.get("subfolder", ""), **hub_kwargs
        )
        check_causal_lm(config)
        is_multimodal = text_half(config) is not config and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
        auto_class = AutoModelForMultimodalLM if is_multimodal else causal_lm_class(config)
    whole, info = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    model = text_part(whole)
    weights, kept = dict(whole.named_parameters(remove_duplicate=False)), {id(weight) for weight in model.parameters()}
    return model, sorted(key for key in info["missing_keys"] if key not in weights or id(weights[key]) in kept)


def causal_lm_class(config: PreTrainedConfig) -> Any:
    """The class to build or load an LM by: AutoModelForCausalLM; or that of a text part's configuration (Mllama's,
    Emu3's) which transformers has under the name of the whole alone. `None` where there is none."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _has_code_of_its_own(config):
        return AutoModelForCausalLM
    for whole in vars(sys.modules[type(config).__module__]).values():
        if isinstance(whole, type) and issubclass(whole, PreTrainedConfig) and whole in MODEL_FOR_CAUSAL_LM_MAPPING:
            found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[whole]
            if found.config_class is type(config):
                return found
    return None


def _has_code_of_its_own(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "auto_map", None))  # `trust_remote_code`


def build_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM of a configuration, with random weights."""
    check_causal_lm(config)
    found = causal_lm_class(config)
    return found.from_config(config) if found is AutoModelForCausalLM else found._from_config(config)


def check_causal_lm(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` where transformers has no causal LM for a language model's configuration, or for the text
    part of a multimodal one."""
    text_config = text_half(config)
    whole = f"A model of type {config.model_type!r}"
    if causal_lm_class(text_config) is None:
        of_whole = "" if text_config is config else f", whose text part is of type {text_config.model_type!r},"
        raise ValueError(
            f"{whole}{of_whole} has no causal language model in transformers that could be taken by itself. Take the "
            "language model that it was built from, or another one that AutoModelForCausalLM loads."
        )
    is_multimodal = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING or _has_code_of_its_own(config)
    if text_config is not config and not is_multimodal:
        raise ValueError(
            f"{whole} does not hold a language model that runs by itself, although a part of it is called one "
            f"({text_config.model_type!r}). Take another one that AutoModelForCausalLM loads."
        )


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM within a multimodal model, made of its decoder and its head; any other model as it is.

    Raises:
        ValueError: Its decoder and head are no causal LM of transformers, or do more than that LM.
    """
    keep_quantised_weights(model)
    config = text_half(model.config)
    if config is model.config:
        if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:  # Idefics, UDOP: one configuration for all of it
            check_causal_lm(config)
        return model
    check_causal_lm(model.config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if head is None:
        raise _refusal(model, causal_lm_class(config), "it has no output head")
    config.tie_word_embeddings = weight_of(head) is weight_of(model.get_input_embeddings())
    with torch.device("meta"):
        lm = build_language_model(config)
    if type(decoder) is type(lm):  # BLIP-2 and Llama 4 hold a whole one
        return decoder
    for own, part in zip(decoder_and_head(lm), (decoder, head), strict=True):
        if type(own) is not type(part):
            why = f"it has a {type(part).__name__} in the place of a {type(own).__name__}"
            raise _refusal(model, type(lm), why)
        lm.set_submodule(next(name for name, module in lm.named_modules() if module is own), part)
    lm.config = decoder.config
    lm.generation_config = copy.deepcopy(model.generation_config)
    for name in ("hf_quantizer", "quantization_method"):
        if name in vars(model):
            setattr(lm, name, vars(model)[name])
    if device_map := vars(model).get("hf_device_map"):
        vars(lm)["hf_device_map"] = _device_map_within(model, device_map, lm)
    _compare(model, lm.eval())
    return lm


def _device_map_within(model: PreTrainedModel, device_map: dict[str, Any], lm: PreTrainedModel) -> dict[str, Any]:
    """The device of each module of `lm` that holds tensors, by the device map of the model that has these modules."""
    names = {module: name for name, module in model.named_modules()}

    def device_of(name: str) -> Any:
        while name not in device_map:
            name = name.rpartition(".")[0]
        return device_map[name]

    holders = {
        name: module
        for name, module in lm.named_modules()
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    }
    return {name: device_of(names[module]) for name, module in holders.items()}


@undisturbed
@torch.no_grad()
def _compare(model: PreTrainedModel, lm: PreTrainedModel) -> None:
    """Raise a `ValueError` where a model's logits of text alone are not those of the LM that was taken out of it."""
    weight = weight_of(lm.get_input_embeddings())
    if weight.device.type == "meta":
        return
    ids = torch.arange(3, 8, device=weight.device)[None]
    try:
        with in_eval_mode(model):
            whole = model(input_ids=ids, use_cache=False).logits.float()
    except FAILURES as error:
        raise _refusal(model, type(lm), f"it does not run on text alone ({error})") from error
    alone = lm(input_ids=ids, use_cache=False).logits.to(whole)
    difference = ((alone - whole).norm() / whole.norm()).item() if alone.shape == whole.shape else float("inf")
    if not difference <= (2e-2 if lm.dtype.itemsize < 4 else 1e-4):
        raise _refusal(model, type(lm), f"logits of a text differ by {difference:.2g}")


def _refusal(model: PreTrainedModel, lm_class: type, why: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} does not hold the {lm_class.__name__} that its configuration names as its text part: "
        f"{why}. Take the language model that it was built from, or another one."
    )


__all__ = ["build_language_model", "load_language_model", "text_part", "with_text_half"]

"""What FROMAGe asks of its language model: widths, windows, and modes. The only place for it."""

import functools
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of an embedding or an output head: (rows, width).

    Raises:
        ValueError: It is kept packed.
    """
    weight = module.weight  # computed, and no parameter, where the module is parametrised, pruned or sharded by FSDP
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"FROMAGe reads the rows of the language model's embedding and of its output head, and {type(module)} "
            "keeps its weight packed. Leave these two modules out of the quantisation."
        )
    return weight


def refuse_offloaded_ends(language_model: PreTrainedModel) -> None:
    """Raise a `ValueError` where accelerate keeps the LM's embedding or its output head elsewhere than it computes."""
    ends = {"embedding": language_model.get_input_embeddings(), "head": language_model.get_output_embeddings()}
    offloaded = [what for what, module in ends.items() if hasattr(module, "_hf_hook") and weight_of(module).is_meta]
    if offloaded:
        raise ValueError(
            f"FROMAGe reads the rows of the {' and '.join(offloaded)} of {type(language_model).__name__}, which the "
            "device map offloads. Give a `device_map` that keeps these modules on a device; layers may be offloaded."
        )


def decoder_and_head(language_model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module]:
    """The LM without its head, and the head."""
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()
    if decoder is language_model or not isinstance(decoder, PreTrainedModel):
        # `get_decoder` goes by names: it finds ModernBERT-decoder's head, and nothing in Llama 4.
        inner = [module for module in language_model.children() if isinstance(module, PreTrainedModel)]
        decoder = inner[0] if len(inner) == 1 else language_model
    if head is None or decoder is language_model:
        raise ValueError(
            f"{type(language_model).__name__} is not a causal language model with an output head. Load the language "
            "model with AutoModelForCausalLM."
        )
    return decoder, head


@functools.cache
def _arguments(decoder_class: Any) -> set[str]:
    return {*inspect.signature(decoder_class.forward).parameters}


@torch.compiler.assume_constant_result
def _cache_name(decoder_class: Any) -> str:
    """What a decoder calls its cache: `cache_params` in Mamba and its kind."""
    return "cache_params" if "cache_params" in _arguments(decoder_class) else "past_key_values"


def initial_cache(decoder: PreTrainedModel) -> Cache | None:
    """What a generation starts from: an empty cache; none where the decoder makes its own in its first pass, as one of
    states alone has no length, which transformers' `generate` asks for."""
    config = decoder.config.get_text_config(decoder=True)
    generation: Any = GenerationMixin
    if not generation._supports_default_dynamic_cache.__func__(type(decoder)):  # RWKV, xLSTM
        return None
    cache = DynamicCache(config=config)
    has_attention = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return cache if has_attention or not cache.layers else None


def run_decoder(
    decoder: PreTrainedModel,
    embeds: torch.Tensor,
    mask: Any = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    **kwargs: Any,
) -> Any:
    """The decoder's output for `embeds` (B, L, D), with its cache as `past_key_values`."""
    decoder_class: Any = type(decoder)
    name = _cache_name(decoder_class)
    if cache is not None:  # passed only where there is one: some know no such argument
        kwargs[name] = cache
        if name == "cache_params" and mask is not None:
            # Of what is new; `generate` makes masks for each kind of layer where a cache has a fixed size.
            mask = mask[:, -embeds.shape[1] :] if isinstance(mask, torch.Tensor) else None
    output = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, return_dict=True, **kwargs)
    if name != "past_key_values":
        output["past_key_values"] = output.get(name)
    return output


def hidden_state_width(text_config: PreTrainedConfig, layer: int, head_width: int) -> int:
    """Width of `hidden_states[layer]`; the last one has gone through OPT-350m's `project_out`."""
    return head_width if layer in (-1, text_config.num_hidden_layers) else text_config.hidden_size


def size_differences(saved: PreTrainedConfig, found: PreTrainedConfig) -> list[str]:
    """What keeps weights made for `found` from fitting a model of configuration `saved`, in words."""
    names = ("model_type", "vocab_size", "hidden_size", "hidden_sizes", "num_hidden_layers", "image_size", "patch_size")
    pairs = {name: (getattr(saved, name, None), getattr(found, name, None)) for name in names}
    return [f"its {name} is {theirs}, not {ours}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _checkpointing_layers(language_model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    modules = language_model.modules()
    return [
        layer for layer in modules if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]


def allow_activation_checkpointing(language_model: PreTrainedModel) -> None:
    """Let the layers with checkpointing enabled recompute their activations, although the LM is in eval mode.

    Transformers' layers recompute in training mode alone. That mode would also switch on a layer's own dropout.
    """
    for layer in _checkpointing_layers(language_model):
        layer.training = True
        for name in ("dropout", "activation_dropout"):
            if isinstance(layer.__dict__.get(name), float):
                setattr(layer, name, 0.0)


def keep_quantised_weights(language_model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, and undo it where it has.

    On a CPU with AVX512-BF16 its layers do so in their first pass without a gradient: scales are rounded to bfloat16,
    layers that are narrower than a block fail, and later passes give no gradient.
    """
    for module in language_model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            vars(module)["support_avx512bf16_for_cpu"] = False
            module.state_dict()  # for which it unpacks


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, which PEFT's layers have in training, and no recomputed activations."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def no_activation_checkpointing(language_model: PreTrainedModel) -> Iterator[None]:
    """Keep activations, for a pass with a KV cache: transformers' layers drop the cache when they recompute."""
    layers = [layer for layer in _checkpointing_layers(language_model) if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def attention_window(text_config: PreTrainedConfig) -> float:
    """Tokens that every layer's attention reaches back; infinite where no layer has a sliding window."""
    config = text_config.to_dict()
    layer_types = config.get("layer_types") or config.get("attention_layers") or []
    slides = not layer_types or any(word in kind for kind in layer_types for word in ("sliding", "chunked", "local"))
    windows = [config.get(name) for name in ("sliding_window", "attention_chunk_size", "window_size") if slides]
    windows.append(config.get("keep_window_size"))
    return min((window for window in windows if window), default=float("inf"))


def rope_switch(text_config: PreTrainedConfig) -> float:
    """Tokens up to which longrope (Phi-3's for long contexts) has one set of frequencies, and beyond which it has
    another: for all that is in a pass, by the longest text in it. Infinite with any other kind of positions."""
    kinds = [kind for kind in _rope_kinds(text_config) if kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in kinds), default=float("inf"))


def _rope_kinds(text_config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of rotary positions: one set, or one for each kind of layer."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return [rope, *(each for each in rope.values() if isinstance(each, dict))]


def independent_length(text_config: PreTrainedConfig) -> float:
    """Tokens beyond which what an LM computes for a text depends on what stands beside it or follows: Doge's attention
    chooses what to keep, and dynamic rotary frequencies are those of the longest text in a pass."""
    is_dynamic = any(kind.get("rope_type") == "dynamic" for kind in _rope_kinds(text_config))
    limits = [getattr(text_config, "keep_window_size", None), is_dynamic and text_config.max_position_embeddings]
    return min((limit for limit in limits if limit), default=float("inf"))


def context_length(text_config: PreTrainedConfig) -> float:
    """Tokens that the LM has positions for; infinite where its configuration names no limit (or -1, as XLNet's)."""
    # Beyond the latter, Doge's attention looks at what follows as it chooses what to keep.
    limits = [getattr(text_config, name, None) for name in ("max_position_embeddings", "keep_window_size")]
    return min((limit for limit in limits if limit and limit > 0), default=float("inf"))


def room_for(prompt_tokens: int, text_config: PreTrainedConfig, cached: bool = True) -> float:
    """Tokens that a prompt and its answer may have together: the LM's context or, where a cache holds what longrope's
    first frequencies gave, what is before the [`rope_switch`]."""
    limit, switch = context_length(text_config), rope_switch(text_config)
    return min(limit, switch) if cached and prompt_tokens <= switch else limit


def check_fits(prompt_tokens: int, new_tokens: int, text_config: PreTrainedConfig, cached: bool = True) -> None:
    """Raise a `ValueError` where a prompt and its answer have more tokens than there is [`room_for`]."""
    limit = room_for(prompt_tokens, text_config, cached)
    if prompt_tokens + new_tokens <= limit:
        return
    told = f"The prompt's {prompt_tokens} tokens and {new_tokens} new ones"
    if prompt_tokens + new_tokens > context_length(text_config):
        raise ValueError(
            f"{told} exceed the language model's context of {context_length(text_config)}. Shorten the prompt, its "
            "images included, or lower the number of new tokens."
        )
    raise ValueError(
        f"{told} go beyond {limit}, where the language model takes other rotary frequencies (longrope), and a cache "
        "holds what the first gave. Lower the number of new tokens, or set `use_cache=False`: generation then runs the "
        "whole text anew for each token."
    )


def check_length(input_ids: torch.Tensor, text_config: PreTrainedConfig) -> None:
    """Raise a `ValueError` where texts (B, L), or their embeddings (B, L, D), are longer than the LM's context."""
    if input_ids.shape[1] > context_length(text_config):
        raise ValueError(
            f"The texts are {input_ids.shape[1]} tokens long, images included; the language model's context has "
            f"{context_length(text_config)}. Shorten them; in training, by `max_length` and `max_document_length`."
        )


def undisturbed(function: Callable) -> Callable:
    """Run `function` in a thread of its own, out of the reach of its caller's autocast, inference mode, hooks on saved
    tensors (checkpointing) and default device, which would change what a trial finds."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

        def on_device() -> Any:
            with torch.cuda.device(device):
                return function(*args, **kwargs)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(on_device).result()

    return run

"""A miniature of a language model to try things on: its class and configuration, few layers, large random weights."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .backbones_fromage import decoder_and_head, weight_of

FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_VOCAB = 64
_LARGEST = 5e7  # parameters of a miniature: seconds on a CPU


def miniature(language_model: PreTrainedModel) -> PreTrainedModel | None:
    """A decoder of the LM's class and configuration, on the CPU in fp32, with few layers and large random weights.

    As small as the class allows: what does not fit together is left as large as it is. `None` where that fails too.
    """
    attention = language_model.config._attn_implementation
    attention = attention if attention in ("sdpa", "eager") else "sdpa"
    for heads, thin in ((2, True), (4, True), (2, False), (4, False), (None, True), (None, False)):
        try:
            config = _small_config(language_model.config, heads, thin)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in type(language_model)._from_config(config).parameters())
            if size > _LARGEST:
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                small = (
                    type(language_model)._from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
                )
                small.requires_grad_(False)
                decoder, _ = decoder_and_head(small)
                _enlarge(small)
                width = weight_of(small.get_input_embeddings()).shape[-1]
                decoder(inputs_embeds=torch.randn(1, 3, width, dtype=torch.float32), use_cache=False)
        except (ImportError, *FAILURES):
            continue
        return decoder
    return None


def _small_config(config: PreTrainedConfig, few: int | None, thin: bool) -> PreTrainedConfig:
    """A copy with a layer of each kind (two at least) and few tokens; `thin`: with small feed-forward parts and few
    experts; `few`: at least so many attention heads, and a width to match."""
    config = copy.deepcopy(config)
    fields = vars(config)
    depth = config.num_hidden_layers
    of_layers = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == depth}
    kinds = list(zip(*(value for value in of_layers.values() if isinstance(value[0], str)), strict=True))
    kept = sorted({*range(min(2, depth)), *(kinds.index(kind) for kind in kinds)})
    changes: dict[str, Any] = {key: [value[i] for i in kept] for key, value in of_layers.items()}
    changes |= {key: len(kept) for key in ("decoder_layers", "encoder_layers", "num_blocks") if key in fields}
    sizes = {key: value for key, value in fields.items() if type(value) is int}
    changes |= {key: 0 for key, value in sizes.items() if key.endswith("token_id") and value >= _VOCAB}
    changes |= {key: _VOCAB for key in sizes if key.startswith("vocab_size")}
    if thin:
        changes |= {
            key: 64 for key, value in sizes.items() if ("intermediate_size" in key or "ffn" in key) and value > 64
        }
        chosen = max((value for key, value in sizes.items() if "per_tok" in key or "top_k" in key), default=2)
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        changes |= {key: max(4, chosen) for key in experts if sizes.get(key, 0) > 4}
    if few:
        width = config.hidden_size
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        fewest = next((n for n in (*range(few, heads), 1) if heads % n == 0), heads) if heads else 1
        factor = heads // fewest if heads else max(1, width // 64)
        changes |= {key: value // factor for key, value in sizes.items() if value % width == 0 and key not in changes}
        # Heads of states as well, whose number goes with the width, too.
        changes |= {
            key: max(1, value // factor)
            for key, value in sizes.items()
            if any(word in key for word in ("heads", "n_head", "groups"))
        }
    for key, value in changes.items():
        setattr(config, key, value)
    config.num_hidden_layers = len(kept)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        fields.pop(name, None)
    return config


def _enlarge(model: nn.Module) -> None:
    """Weights that keep the size of what they multiply, as after training, so that no part of the model is silent."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        elif parameter.dim() == 1:  # scales and biases, among them such as start from zero
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)

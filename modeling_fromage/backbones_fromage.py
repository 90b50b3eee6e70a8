"""What FROMAGe asks of its backbones: widths, pooling, and what an LM does after its head. The only place for it."""

import functools
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .packing_fromage import PackedRows


def vision_width(vision_config: PreTrainedConfig) -> int:
    """Width of the encoder's pooled features: `hidden_size`, or the last of `hidden_sizes` (ResNet and its kind)."""
    config = vision_config.to_dict()
    if isinstance(config.get("hidden_size"), int):
        return config["hidden_size"]
    if config.get("hidden_sizes"):
        return config["hidden_sizes"][-1]
    raise ValueError(
        f"Cannot tell the feature width of a vision model of type {vision_config.model_type!r}: its configuration has "
        "neither `hidden_size` nor `hidden_sizes`."
    )


def pool_vision_output(output: ModelOutput, pooling: str, model_name: str) -> torch.Tensor:
    """One vector per image, (N, width), from a vision encoder's output.

    Raises:
        ValueError: `pooling` is `"pooler"` and the encoder has no pooled output.
    """
    if pooling == "pooler":
        pooled = output.get("pooler_output")
        if pooled is None:
            raise ValueError(
                f"{model_name} has no pooled output. Set `vision_pooling='cls'` or `vision_pooling='mean'` in the "
                "configuration, or use a vision model with a pooler."
            )
        return pooled.flatten(1)  # ResNet gives (N, C, 1, 1)
    hidden = output["last_hidden_state"]  # (N, tokens, width) or (N, width, h, w)
    if pooling == "mean":
        return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.flatten(2).mean(dim=2)
    if hidden.dim() != 3:
        raise ValueError(
            f"`vision_pooling='cls'` needs a sequence of tokens, but {model_name} gives {tuple(hidden.shape)}."
        )
    return hidden[:, 0]


def decoder_and_head(language_model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The LM without its head, and the head."""
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()
    if head is None or decoder is language_model:
        raise ValueError(
            f"{type(language_model).__name__} is not a causal language model with an output head. Load the language "
            "model with AutoModelForCausalLM."
        )
    return decoder, head


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


def allow_activation_checkpointing(language_model: PreTrainedModel):
    """Let the layers with checkpointing enabled recompute their activations, although the LM is in eval mode.

    Transformers' layers recompute in training mode alone. That mode would also switch on a layer's own dropout.
    """
    for layer in _checkpointing_layers(language_model):
        layer.training = True
        for name in ("dropout", "activation_dropout"):
            if isinstance(layer.__dict__.get(name), float):
                setattr(layer, name, 0.0)


@contextmanager
def no_activation_checkpointing(language_model: PreTrainedModel):
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
    layer_types = config.get("layer_types") or []
    slides = any("sliding" in kind or "chunked" in kind for kind in layer_types) or not layer_types
    windows = [config.get(name) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window and slides), default=float("inf"))


def context_length(text_config: PreTrainedConfig) -> float:
    """Tokens that the LM has positions for; infinite where its configuration names no limit."""
    return getattr(text_config, "max_position_embeddings", None) or float("inf")


def check_length(input_ids: torch.Tensor, text_config: PreTrainedConfig):
    """Raise a `ValueError` where texts (B, L) are longer than the LM's context."""
    if input_ids.shape[1] > context_length(text_config):
        raise ValueError(
            f"The texts are {input_ids.shape[1]} tokens long, images included; the language model's context has "
            f"{context_length(text_config)}. Shorten them."
        )


def logit_transform(text_config: PreTrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise function that the LM applies after its head: Cohere's and Granite's scale, Gemma's soft cap."""
    config = text_config.to_dict()
    scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
    return functools.partial(_scale_and_cap, scale=scale, cap=config.get("final_logit_softcapping"))


def _scale_and_cap(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    if scale != 1.0:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def check_logit_transform(language_model: PreTrainedModel) -> None:
    """Compare decoder + head + [`logit_transform`] with the LM's own logits on two tokens.

    Raises:
        ValueError: The LM does something between its decoder and its logits that is not known here.
    """
    ids = torch.tensor([[0, 1]], device=language_model.get_input_embeddings().weight.device)
    decoder, head = decoder_and_head(language_model)
    expected = language_model(input_ids=ids, use_cache=False).logits.float()
    logits = logit_transform(language_model.config)(head(decoder(input_ids=ids, use_cache=False)[0])).float()
    if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
        raise ValueError(
            f"{type(language_model).__name__} transforms its logits in a way that FROMAGe does not know (largest "
            f"difference {(logits - expected).abs().max().item():.3g}). Please open an issue that names the model."
        )


@torch.no_grad()
def accepts_packed_rows(language_model: PreTrainedModel) -> bool:
    """Whether several sequences in a row, under a block-diagonal mask, come out as each by itself, cached ones too.

    Asked by trying: three short sequences, packed, against one at a time.
    """
    decoder, _ = decoder_and_head(language_model)
    embedding = language_model.get_input_embeddings()
    device, lengths = embedding.weight.device, (5, 3, 4)
    takes_masks = language_model.config._attn_implementation in ("sdpa", "eager")
    if not takes_masks or device.type == "meta":  # offloaded: not to be trained
        return False
    ids = torch.arange(15, device=device).view(3, 5) * 7 % len(embedding.weight)
    mask = torch.arange(5, device=device) < torch.tensor(lengths, device=device)[:, None]
    embeds = embedding(ids)
    singles = [decoder(inputs_embeds=embeds[i : i + 1, :n], use_cache=False)[0][0] for i, n in enumerate(lengths)]
    expected = torch.cat(singles)
    try:
        whole = PackedRows(mask)
        found = decoder(
            inputs_embeds=whole.lay(embeds),
            attention_mask=whole.attention_mask(embeds.dtype),
            position_ids=whole.position_ids,
            use_cache=False,
        )[0]
        shorter = PackedRows(mask & mask.roll(-1, dims=1) & (torch.arange(5, device=device) < 4))
        prefix = decoder(
            inputs_embeds=shorter.lay(embeds),
            attention_mask=shorter.attention_mask(embeds.dtype),
            position_ids=shorter.position_ids,
            use_cache=True,
        )
        last_ids = ids[torch.arange(3, device=device), shorter.lengths]
        queries = decoder(
            inputs_embeds=embedding(shorter.lay_queries(last_ids)),
            attention_mask=shorter.query_mask(embeds.dtype),
            position_ids=shorter.lay_queries(shorter.lengths),
            past_key_values=prefix.past_key_values,
            use_cache=True,
        )[0]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    scale = expected.float().abs().max().item()
    tolerance = scale * (2e-2 if embeds.dtype.itemsize < 4 else 1e-4)
    last = torch.stack([single[-1] for single in singles])
    pairs = [(whole.at_tokens(found), expected), (queries[shorter.row, shorter.lap], last)]
    return all(torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance) for a, b in pairs)

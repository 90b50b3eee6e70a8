"""Embeddings of interleaved prompts that end in `[RET]`, from cached image features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.backbones_fromage import context_length


def tokenize(processor: FromageProcessor, prompts: Sequence[Any], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (N, L), padded on the left, of prompts that already contain placeholders and BOS, or are token
    ids."""
    if isinstance(prompts[0], str):
        inputs = processor.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    else:
        inputs = processor.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    return inputs["input_ids"], inputs["attention_mask"]


def has_special_token(processor: FromageProcessor, texts: list[str]) -> bool:
    """Whether a text contains the image token or `[RET]`: the model would read it as an image or a retrieval."""
    return any(token in text for text in texts for token in (processor.image_token, *processor.ret_tokens))


def is_too_long(model: FromageForConditionalGeneration, processor: FromageProcessor, *texts: str) -> bool:
    """Whether the concatenated texts exceed the language model's context."""
    tokens = processor.tokenizer(list(texts), add_special_tokens=False).input_ids
    return sum(map(len, tokens)) > context_length(model.config.text_config)


@torch.no_grad()
def embed_prompts(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    prompts: Sequence[Any],
    features: list[torch.Tensor] | None = None,
    batch_size: int = 32,
    first_projection_only: bool = False,
) -> torch.Tensor:
    """Unit-norm embeddings (N, q) of prompts that end in `[RET]`, all its tokens, on the CPU, in fp32; (N, r, q) where
    each token makes a query.

    Args:
        prompts: Texts, or lists of token ids.
        features: Pooled features (num_images, vision_width) of each prompt's images.
        first_projection_only: Apply the first text projection to the last hidden state, whatever layers the model's
            projections are for, as the authors' VIST script does.

    Raises:
        ValueError: `first_projection_only`, and `[RET]` is several tokens.
    """
    skips_layers = first_projection_only and model.config.text_embed_layers != [-1]
    if skips_layers and model.config.num_ret_tokens > 1:
        raise ValueError(
            "The authors' VIST script takes the hidden state of one [RET] token, and this model has "
            f"{model.config.num_ret_tokens} in a row. Take the corrected protocol."
        )
    embeds: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths need little padding
    for start in tqdm(range(0, len(order), batch_size), desc="Embedding prompts"):
        some = order[start : start + batch_size]
        ids, mask = tokenize(processor, [prompts[i] for i in some], model.device)
        images = torch.cat([features[i] for i in some]).to(model.device) if features else None
        if images is not None and not len(images):
            images = None
        if skips_layers:
            output = model(
                input_ids=ids,
                attention_mask=mask,
                pooled_image_features=images,
                output_hidden_states=True,
                logits_to_keep=1,
            )
            projected = model.adapter.text_projection[0](output.hidden_states[-1][:, -1].to(model.adapter.logit_scale))
            rows = F.normalize(projected, dim=-1)
        else:
            rows = model.get_text_embeds(ids, mask, pooled_image_features=images)
        for i, row in zip(some, rows.float().cpu(), strict=True):
            embeds[i] = row
    return torch.stack(embeds)


@torch.no_grad()
def image_embeds(
    model: FromageForConditionalGeneration, features: torch.Tensor, batch_size: int = 4096
) -> torch.Tensor:
    """Unit-norm embeddings (N, q) of pooled features (N, vision_width), on the CPU, in fp32."""
    pieces = [
        model.get_image_embeds(pooled_image_features=piece.to(model.device)) for piece in features.split(batch_size)
    ]
    return torch.cat(pieces).float().cpu()

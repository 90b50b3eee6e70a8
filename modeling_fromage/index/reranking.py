"""Reranking: how likely the language model finds a caption, given each of the first images that a search has found.

A search compares two vectors; a likelihood reads the caption with the image before it, token by token. It takes a pass
of the language model for each image, so it is for the first hits alone. Axes: N pairs of an image and a caption.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from PIL import Image

    from ..modeling_fromage import FromageForConditionalGeneration
    from ..processing_fromage import FromageProcessor


@torch.no_grad()
def caption_log_likelihoods(
    model: "FromageForConditionalGeneration",
    processor: "FromageProcessor",
    captions: Sequence[str],
    pooled_image_features: torch.Tensor,
    batch_size: int = 64,
) -> torch.Tensor:
    """The mean log-likelihood, in nats, of the tokens of caption i given image i.

    A caption is laid out as in training: image, `caption_prefix`, BOS, caption, `caption_suffix`, cut to `max_length`.
    Its own tokens and those of the suffix count. Minus this is the captioning loss, but for BOS.

    Args:
        pooled_image_features (`torch.Tensor` of shape `(N, vision_width)`): The frozen encoder's output.
        batch_size (`int`, defaults to 64): Pairs a pass.

    Returns:
        `torch.FloatTensor` of shape `(N,)`, at most 0, on the CPU.

    Raises:
        ValueError: There are not as many images as captions, or a caption is empty or contains a special token.
    """
    if len(captions) != len(pooled_image_features):
        raise ValueError(f"Got {len(captions)} captions and {len(pooled_image_features)} images; expected pairs.")
    prompt: Any = torch.tensor(processor.caption_prompt_ids())
    rows = {caption: _targets(processor, caption, len(prompt)) for caption in captions}
    scores = [torch.empty(0)]
    for start in range(0, len(captions), batch_size):
        targets = [rows[caption] for caption in captions[start : start + batch_size]]
        mask = pad_sequence([torch.ones_like(row) for row in targets], batch_first=True)
        ids: Any = pad_sequence(targets, batch_first=True)
        total = model.score_candidates(
            prompt.expand(len(ids), -1).to(model.device),
            None,
            ids[:, None].to(model.device),
            mask[:, None].to(model.device),
            pooled_image_features=pooled_image_features[start : start + batch_size].to(model.device),
        )
        scores.append(total[:, 0].float().cpu() / mask.sum(-1))
    return torch.cat(scores)


def _targets(processor: "FromageProcessor", caption: str, start: int) -> torch.Tensor:
    """Token ids of a caption and its suffix, which follow `start` tokens of the prompt."""
    tokens = processor.image_token, *processor.ret_tokens
    if not caption.strip() or any(token in caption for token in tokens):
        raise ValueError(f"A caption has a text, without {' and '.join(tokens)}, got {caption[:100]!r}.")
    return torch.tensor(processor.caption_layout.encode(caption).input_ids[start:])


def combined_scores(
    model: Any, log_likelihoods: torch.Tensor, cosines: torch.Tensor | None = None, weight: float | None = None
) -> torch.Tensor:
    """What images are ranked by: the log-likelihoods alone; or, with a `weight`, `weight` times these plus the cosines
    times the scale that they have in the contrastive loss.

    Both terms are then log-probabilities up to a constant of the query: over images, and of a token.

    Args:
        log_likelihoods, cosines (`torch.Tensor` of shape `(N,)`): Of a query's images.

    Raises:
        ValueError: There is a weight, and there are no cosines.
    """
    if weight is None:
        return log_likelihoods
    if cosines is None:
        raise ValueError("`weight` adds the likelihoods to the cosines of a search. Give these too, or leave it out.")
    return cosines * model.adapter.logit_scale.detach().exp().item() + weight * log_likelihoods


@torch.no_grad()
def rerank_by_likelihood(
    model: "FromageForConditionalGeneration",
    processor: "FromageProcessor",
    captions: Sequence[str],
    images: Sequence[Sequence["Image.Image"]],
    cosines: Sequence[torch.Tensor] | None = None,
    weight: float | None = None,
    batch_size: int = 64,
) -> list[torch.Tensor]:
    """Scores of the images that a search has found for captions; the higher, the better.

    Args:
        captions (`Sequence[str]`): Texts that images were searched for with. (An interleaved prompt has no likelihood
            given an image.)
        images (`Sequence[Sequence[PIL.Image.Image]]`): Those of each caption.
        cosines (`Sequence[torch.Tensor]`, *optional*), weight (`float`, *optional*): See [`combined_scores`].

    Returns:
        A tensor (N,) for each caption, of as many scores as it has images.

    Raises:
        ValueError: As [`caption_log_likelihoods`] and [`combined_scores`].

    Example:

        hits = pipe.search("a red square", top_k=50)
        (scores,) = rerank_by_likelihood(pipe.model, pipe.processor, ["a red square"], [[hit["image"] for hit in hits]])
        best = hits[scores.argmax()]
    """
    if len(captions) != len(images) or (cosines is not None and len(cosines) != len(images)):
        raise ValueError(f"Expected images (and cosines) for each of {len(captions)} captions, got {len(images)}.")
    counts = [len(own) for own in images]
    texts = [caption for caption, count in zip(captions, counts, strict=True) for _ in range(count)]
    pictures = [image for own in images for image in own]
    found = [torch.empty(0)]
    for start in range(0, len(pictures), batch_size):
        pixels = processor.image_processor(pictures[start : start + batch_size], return_tensors="pt")["pixel_values"]
        features = model.get_pooled_image_features(pixels.to(model.device))
        found.append(caption_log_likelihoods(model, processor, texts[start : start + batch_size], features))
    likelihoods = torch.cat(found).split(counts)
    nothing = [None] * len(captions) if cosines is None else cosines
    return [combined_scores(model, own, near, weight) for own, near in zip(likelihoods, nothing, strict=True)]


__all__ = ["caption_log_likelihoods", "combined_scores", "rerank_by_likelihood"]

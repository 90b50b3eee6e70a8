"""Embeddings of texts and images in the space that they share, and the search by them."""

from collections.abc import Sequence
from typing import Any

import torch

from ..image_search_fromage import ImageSearch, Segment
from ..index.reranking import combined_scores, rerank_by_likelihood
from ..pipeline_fromage import FromagePipeline, query_embeds

Input = Sequence[dict[str, Any]]  # parts of a message, images read


def is_image(parts: Input) -> bool:
    """Whether an input is one image alone: the language model has no part in its embedding."""
    return len(parts) == 1 and "image" in parts[0]


@torch.no_grad()
def embed(pipe: FromagePipeline, inputs: Sequence[Input]) -> list[torch.Tensor]:
    """Unit-norm embeddings of images (q,), and of texts and interleaved inputs as queries for images: (q,), or (r, q)
    with several queries each.

    Raises:
        ValueError: An input is too long.
    """
    model = pipe.model
    images = [i for i, parts in enumerate(inputs) if is_image(parts)]
    others = [i for i in range(len(inputs)) if i not in set(images)]
    rows: dict[int, torch.Tensor] = {}
    if images:
        pictures = [inputs[i][0]["image"] for i in images]
        pixels = pipe.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        rows |= zip(images, model.get_image_embeds(pixels.to(model.device, model.vision_model.dtype)), strict=True)
    if others:
        rows |= zip(others, query_embeds(pipe, [list(inputs[i]) for i in others])[0], strict=True)
    return [rows[i].float().cpu() for i in range(len(inputs))]


def refuse_several_queries(pipe: FromagePipeline, inputs: Sequence[Input]) -> None:
    """Raise a `ValueError` where an input has no one embedding: a text of a model with several queries a text."""
    config = pipe.model.config
    if config.ret_aggregation == "max" and not all(map(is_image, inputs)):
        raise ValueError(
            f"A text has {config.num_ret_tokens} embeddings here, one a [RET] token (ret_aggregation='max'), of which "
            "the nearest to an image counts. Ask /v1/images/search, which takes them all; only images have one."
        )


def count_tokens(pipe: FromagePipeline, parts: Input) -> int:
    """Tokens that the language model reads of an input; none of an image alone."""
    if is_image(parts):
        return 0
    processor = pipe.processor
    return processor.count_tokens(processor.join_parts(list(parts), True)) + processor.num_ret_tokens


def search(
    pipe: FromagePipeline, embeds: torch.Tensor, top_k: int, where: dict[str, Any] | None, exclude_ids: Sequence[str]
) -> list[Segment]:
    """The images of the index that are nearest to one embedding (1, q), or to the nearest of several (1, r, q), best
    first, not yet read.

    Raises:
        ValueError: There is no index, or another model's, or `where` is not one that it understands.
    """
    images = ImageSearch(pipe.index, pipe.model, load_images=False, where=where)
    return images.find(embeds, top_k, [list(exclude_ids)])[0]


def caption_of(parts: Input) -> str:
    """The text of a query that is one. Raises a `ValueError` for any other: it has no likelihood given an image."""
    if len(parts) != 1 or "text" not in parts[0]:
        raise ValueError("`rerank` reads the query as a caption: it must be one text. Leave `rerank` out.")
    return parts[0]["text"]


def add_likelihoods(pipe: FromagePipeline, caption: str, hits: Sequence[tuple[Segment, Any]]) -> None:
    """Give hits, each with its image, the log-likelihood of a caption given that image, per token."""
    (scores,) = rerank_by_likelihood(pipe.model, pipe.processor, [caption], [[image for _, image in hits]])
    for (hit, _), score in zip(hits, scores.tolist(), strict=True):
        hit["log_likelihood"] = score


def reranked(pipe: FromagePipeline, hits: list[Segment], weight: float | None) -> list[Segment]:
    """Hits with log-likelihoods, best first: see [`combined_scores`]."""
    likelihoods, cosines = (torch.tensor([hit[name] for hit in hits]) for name in ("log_likelihood", "score"))
    order = combined_scores(pipe.model, likelihoods, cosines, weight).argsort(descending=True, stable=True)
    return [hits[i] for i in order.tolist()]


__all__ = ["add_likelihoods", "caption_of", "count_tokens", "embed", "is_image", "refuse_several_queries", "reranked",
           "search"]  # fmt: skip

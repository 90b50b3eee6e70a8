"""Ranking metrics. Ties count against the model.

Axes: M queries, C candidates per query.
"""

import math
from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm

from modeling_fromage.late_interaction_fromage import similarities
from modeling_fromage.trainer.ranking import TIE, gallery_ranks, recall_at_k


def target_ranks(scores: torch.Tensor, targets: torch.LongTensor) -> torch.LongTensor:
    """Rank (M,), from 1, of each target candidate (M,) by scores (M, C); NaN ranks last."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    target = scores.gather(1, targets[:, None])
    return (scores >= target).sum(-1)


def rank_metrics(ranks: torch.LongTensor) -> dict[str, float]:
    """R@1, R@5, R@10, median and mean rank, and mean reciprocal rank of N ranks that count from 1."""
    if not len(ranks):
        return {"N": 0}
    ranks = ranks.double()
    return {
        "N": len(ranks),
        **recall_at_k(ranks),
        "median_rank": ranks.quantile(0.5).item(),
        "mean_rank": ranks.mean().item(),
        "MRR": (1 / ranks).mean().item(),
    }


def wilson_interval(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate among n (Wilson score)."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def reranked_ranks(
    texts: torch.Tensor,
    images: torch.Tensor,
    rows: torch.LongTensor,
    count: int,
    scores_of: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.LongTensor:
    """Rank (M,), from 1, of each text's image where the `count` nearest images are ranked anew.

    An image that is not among them keeps its rank. Where others are as near as the last of these, it counts as not
    among them.

    Args:
        texts, images: Unit-norm embeddings (M, d), or (M, r, d) of several queries each, and (N, d).
        rows: The row (M,) of the image of each text.
        scores_of: What the nearest images (K,) of a text are ranked by, given its number, theirs, and their cosines.
    """
    ranks = gallery_ranks(texts, images, rows, torch.arange(len(images)))
    for text in tqdm((ranks <= count).nonzero().flatten().tolist(), desc="Reranking"):
        cosines, nearest = similarities(images, texts[text][None])[:, 0].topk(min(count, len(images)))
        scores = scores_of(text, nearest, cosines)
        own = scores[nearest == rows[text]]
        ranks[text] = int((scores >= own - TIE).sum()) if len(own) else count + 1
    return ranks


def ndcg(scores: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """VisDial's normalised discounted cumulative gain (M,) of scores (M, C), given the candidates' relevance (M, C).

    The gain of the top K candidates, where K is the number of relevant ones, is divided by the highest possible gain
    (Das et al. 2017, and the challenge's evaluation). NaN if no candidate is relevant.
    """
    by_relevance = relevance.argsort(dim=-1, stable=True)  # ties: the less relevant candidate ranks first
    order = by_relevance.gather(-1, scores.gather(-1, by_relevance).argsort(dim=-1, descending=True, stable=True))
    count = (relevance != 0).sum(-1, keepdim=True)
    place = torch.arange(relevance.shape[-1], device=relevance.device)
    discount = torch.where(place < count, 1 / torch.log2(place + 2.0), 0.0)
    found, best = relevance.gather(-1, order), relevance.sort(dim=-1, descending=True).values
    return (found * discount).sum(-1) / (best * discount).sum(-1)


def retrieval_metrics(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rows: torch.LongTensor, directions: tuple[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """[`rank_metrics`] of texts to images and of images to texts, by direction and by model.

    Args:
        pairs: Unit-norm embeddings of images (N, d) and of texts (M, d), by model.
        rows: Row (M,) of the image of each text. Images without a text are candidates, but not queries.
        directions: Names of the two directions, text to image first.
    """
    of_texts, of_images = {}, {}
    searching = rows.unique()
    for who, (images, texts) in pairs.items():
        of_texts[who] = rank_metrics(gallery_ranks(texts, images, rows, torch.arange(len(images))))
        of_images[who] = rank_metrics(gallery_ranks(images[searching], texts, searching, rows))
    return dict(zip(directions, (of_texts, of_images), strict=True))

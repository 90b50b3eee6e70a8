"""Metrics of rankings. Ties count against the model.

Axes: M questions, C candidates of each.
"""

from collections.abc import Mapping

import torch

from modeling_fromage.trainer.ranking import gallery_ranks, recall_at_k


def target_ranks(scores: torch.Tensor, targets: torch.LongTensor) -> torch.LongTensor:
    """The rank (M,), from 1, of each right candidate (M,) by its score among those of scores (M, C); NaN ranks last."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    target = scores.gather(1, targets[:, None])
    return (scores >= target).sum(-1)


def rank_metrics(ranks: torch.LongTensor) -> dict[str, float]:
    """R@1, R@5, R@10, the median and mean rank, and the mean reciprocal rank, of N ranks from 1; with N."""
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


def ndcg(scores: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """VisDial's normalised discounted cumulative gain (M,) of scores (M, C), by the candidates' relevance (M, C).

    The gain of the K candidates that rank first, K being how many are relevant at all, is divided by the highest that
    there can be (Das et al. 2017, and the challenge's evaluation). NaN where no candidate is relevant.
    """
    by_relevance = relevance.argsort(dim=-1, stable=True)  # among equal scores the less relevant ranks first
    order = by_relevance.gather(-1, scores.gather(-1, by_relevance).argsort(dim=-1, descending=True, stable=True))
    count = (relevance != 0).sum(-1, keepdim=True)
    place = torch.arange(relevance.shape[-1], device=relevance.device)
    discount = torch.where(place < count, 1 / torch.log2(place + 2.0), 0.0)
    found, best = relevance.gather(-1, order), relevance.sort(dim=-1, descending=True).values
    return (found * discount).sum(-1) / (best * discount).sum(-1)


def retrieval_metrics(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rows: torch.LongTensor, directions: tuple[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """[`rank_metrics`] of texts to images and of images to texts, by the two `directions`' names and by whose they are.

    Args:
        pairs: By whose they are, unit vectors of images (N, d) and of texts (M, d).
        rows (M,): The image of each text. Images without one are searched, and do not search.
    """
    of_texts, of_images = {}, {}
    searching = rows.unique()
    for who, (images, texts) in pairs.items():
        of_texts[who] = rank_metrics(gallery_ranks(texts, images, rows, torch.arange(len(images))))
        of_images[who] = rank_metrics(gallery_ranks(images[searching], texts, searching, rows))
    return dict(zip(directions, (of_texts, of_images), strict=True))

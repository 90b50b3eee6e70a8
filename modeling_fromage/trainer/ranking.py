"""Ranks of matches in a gallery, and recall. Ties count against the model, so that a constant model gains nothing.

Axes: Q queries, N gallery entries, P pairs of a query and a match, q the width of the shared image-text space.
"""

from collections.abc import Sequence

import torch

from ..late_interaction_fromage import paired_similarities, similarities

TIE = 1e-6  # closer scores are equal: products of equal unit vectors differ in their last bits
_QUERIES, _ENTRIES = 1024, 16_384  # a block of scores: 64 MB


@torch.no_grad()
def gallery_ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_labels: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rank, from 1, of each query's best match in a gallery.

    Memory grows with Q + N, not with their product.

    Args:
        queries (`torch.FloatTensor` of shape `(num_queries, projection_dim)`): Unit vectors. These, and those of the
            gallery, may be several a row, `(num_queries, n, projection_dim)`, of which the nearest counts.
        gallery (`torch.FloatTensor` of shape `(num_entries, projection_dim)`): Unit vectors.
        query_labels (`torch.LongTensor` of shape `(num_queries,)`, *optional*), gallery_labels (`torch.LongTensor` of
            shape `(num_entries,)`, *optional*): A query's matches are the entries with its label; by default entry i
            matches query i. Matches other than the best do not count as wrong.

    Returns:
        `torch.LongTensor` of shape `(num_queries,)`: 1 where only matches are as close to the query as its best match.

    Raises:
        ValueError: A query has no match, a vector contains NaN, or labels and vectors differ in number.
    """
    queries, gallery = queries.float(), gallery.float()
    if not (torch.isfinite(queries).all() and torch.isfinite(gallery).all()):
        raise ValueError("The embeddings contain NaN or infinite values; check the model's weights and dtype.")
    query_labels = torch.arange(len(queries)) if query_labels is None else query_labels.cpu()
    gallery_labels = torch.arange(len(gallery)) if gallery_labels is None else gallery_labels.cpu()
    if (len(query_labels), len(gallery_labels)) != (len(queries), len(gallery)):
        raise ValueError(
            f"Got {len(query_labels)} labels for {len(queries)} queries and {len(gallery_labels)} for {len(gallery)} "
            "entries of the gallery; expected one each."
        )
    sorted_labels, order = gallery_labels.sort(stable=True)
    ranks = [
        _ranks_of_block(block, gallery, *_matches(labels, sorted_labels, order))
        for block, labels in zip(queries.split(_QUERIES), query_labels.split(_QUERIES), strict=True)
    ]
    return torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.long)


def _matches(
    labels: torch.Tensor, sorted_labels: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of a block (P,) and their matches in the gallery (P,)."""
    first, last = (torch.searchsorted(sorted_labels, labels, right=right) for right in (False, True))
    counts = last - first
    if bool((counts == 0).any()):
        raise ValueError(f"Queries of the labels {labels[counts == 0][:10].tolist()} have no match in the gallery.")
    rows = torch.arange(len(labels)).repeat_interleave(counts)
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return rows, order[first.repeat_interleave(counts) + within]


def _ranks_of_block(
    queries: torch.Tensor, gallery: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Ranks (Q,) of a block of queries whose matches are the pairs `rows` (P,), `columns` (P,)."""
    device = queries.device
    near = paired_similarities(queries[rows.to(device)], gallery[columns.to(device)])  # (P,)
    best = near.new_full((len(queries),), -torch.inf).scatter_reduce(0, rows.to(device), near, "amax")
    wrong = torch.zeros(len(queries), dtype=torch.long, device=device)
    for start in range(0, len(gallery), _ENTRIES):
        entries = gallery[start : start + _ENTRIES]
        scores = similarities(queries, entries)
        here = (columns >= start) & (columns < start + len(entries))
        scores[rows[here].to(device), columns[here].to(device) - start] = -torch.inf
        wrong += (scores >= (best - TIE)[:, None]).sum(-1)
    return (1 + wrong).cpu()


def recall_at_k(ranks: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The fraction of ranks (Q,), from 1, that are at most k, as `{"R@1": ..., "R@5": ..., "R@10": ...}`."""
    return {f"R@{k}": (ranks <= k).double().mean().item() for k in ks}


def recall_in_both_directions(images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    """Recall of the images (N, q) by the texts (N, q) or (N, r, q) that match them, `text_to_image_R@1`, ..., and the
    reverse."""
    metrics: dict[str, float] = {"num_pairs": len(images)}
    for direction, pair in (("text_to_image", (texts, images)), ("image_to_text", (images, texts))):
        recall = recall_at_k(gallery_ranks(*pair))
        metrics.update({f"{direction}_{name}": value for name, value in recall.items()})
    return metrics


__all__ = ["gallery_ranks", "recall_at_k", "recall_in_both_directions"]

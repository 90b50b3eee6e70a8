"""Late interaction: a text may have several queries, and the one nearest to an image is what counts.

Axes: N images, M texts, r queries a text, q the width of the shared image-text space.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Hits = tuple[list[list[str]], torch.Tensor, list[list[dict[str, Any]]]]  # as the `search` of an index returns them


def similarities(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Products (N, M) of vectors (N, q) and (M, q). Where a row or a column has several, (N, r, q) or (M, r, q), the
    largest."""
    products = rows.flatten(0, -2) @ columns.flatten(0, -2).t()
    if columns.dim() == 3:
        products = products.unflatten(1, columns.shape[:2]).amax(2)
    if rows.dim() == 3:
        products = products.unflatten(0, rows.shape[:2]).amax(1)
    return products


def paired_similarities(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Products (P,) of pairs of vectors (P, q), the largest where either has several, (P, r, q)."""
    rows, columns = (vectors if vectors.dim() == 3 else vectors[:, None] for vectors in (rows, columns))
    return (rows * columns).sum(-1).amax(1)


def search_by_queries(
    search: Callable[..., Hits], embeds: torch.Tensor, top_k: int, exclude_ids: Sequence[Sequence[str]], **filters: Any
) -> Hits:
    """What `search` of an index finds for texts, by one query each (M, q) or by the best of several (M, r, q).

    The `top_k` images of the largest products are among the `top_k` of each of a text's queries: an image that is in
    none of these lists has as many before it in each. So this is as exact as the index.

    Args:
        search: As in [`ImageIndex`].
        exclude_ids: For each text, ids that must not be found.
        filters: For `search`.
    """
    excluded = [list(ids) for ids in exclude_ids]
    if embeds.dim() == 2:
        return search(embeds, top_k, excluded, **filters)
    count = embeds.shape[1]
    found, scores, metadata = search(embeds.flatten(0, 1), top_k, [ids for ids in excluded for _ in range(count)],
                                     **filters)  # fmt: skip
    rows = [_merged(found[i : i + count], scores[i : i + count].tolist(), metadata[i : i + count], top_k)
            for i in range(0, len(found), count)]  # fmt: skip
    best = scores.new_full((len(rows), max(map(len, rows))), -torch.inf)
    for row, hits in zip(best, rows, strict=True):
        row[: len(hits)] = row.new_tensor([score for _, score, _ in hits])
    return [[each[0] for each in hits] for hits in rows], best, [[each[2] for each in hits] for hits in rows]


def _merged(
    found: list[list[str]], scores: list[list[float]], metadata: list[list[dict[str, Any]]], top_k: int
) -> list[tuple[str, float, dict[str, Any]]]:
    """Ids, best scores and metadata of one text, from the lists of its queries; the earlier list first where equal."""
    best: dict[str, tuple[str, float, dict[str, Any]]] = {}
    for own in zip(found, scores, metadata, strict=True):
        for hit in zip(*own, strict=False):  # behind the ids of a short list there are scores of -inf
            if hit[0] not in best or hit[1] > best[hit[0]][1]:
                best[hit[0]] = hit
    return sorted(best.values(), key=lambda hit: -hit[1])[:top_k]


__all__ = ["paired_similarities", "search_by_queries", "similarities"]

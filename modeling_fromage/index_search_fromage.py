"""Searching the shards of an image index, exactly or from what FAISS proposes.

Axes: N images, n of them in a shard, Q queries, k results a query, q the width of the shared image-text space.
"""

from collections.abc import Sequence

import torch

from .faiss_fromage import FaissBackend
from .index_storage_fromage import Shard


def search_flat(
    shards: Sequence[Shard],
    queries: torch.Tensor,
    top_k: int,
    banned: Sequence[torch.LongTensor],
    allowed: torch.BoolTensor | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Cosines and positions (Q, k) of the best for unit-norm `queries` (Q, q), exactly, one shard at a time, on the
    shards' device.

    Args:
        banned: Positions that are not to be found, for each query.
        allowed: (N,), `None` for all.
    """
    best = torch.empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.long)
    # For one query CPU libraries take a matrix-vector product, which reads memory at half a matrix product's speed.
    columns = (queries.repeat(2, 1) if len(queries) == 1 else queries).t()
    start = 0
    for shard in shards:
        rows, stop = shard.rows(), start + shard.count
        scores = (rows.float() @ columns.to(rows.device))[:, : len(queries)].t().contiguous()  # (Q, n)
        if allowed is not None:
            scores.masked_fill_(~allowed[start:stop].to(rows.device), -torch.inf)
        for row, excluded in enumerate(banned):
            here = excluded[(excluded >= start) & (excluded < stop)]
            if len(here):
                scores[row, (here - start).to(rows.device)] = -torch.inf
        found, places = top_k_in_order(scores, min(top_k, shard.count))
        best, positions = torch.cat([best, found.cpu()], 1), torch.cat([positions, places.cpu() + start], 1)
        order = best.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        best, positions = best.gather(-1, order), positions.gather(-1, order)
        start = stop
    return best, positions


def search_faiss(
    faiss: FaissBackend,
    shards: Sequence[Shard],
    queries: torch.Tensor,
    top_k: int,
    banned: Sequence[torch.LongTensor],
    allowed: torch.BoolTensor | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """[`search_flat`] among what FAISS proposes: the stored embeddings give the cosines."""
    total = sum(shard.count for shard in shards)
    wanted = top_k + max((len(excluded) for excluded in banned), default=0)
    while True:
        proposed = faiss.search(queries, min(wanted, total))
        usable = proposed >= 0
        if allowed is not None:
            usable &= allowed[proposed.clamp(min=0)]
        for row, excluded in enumerate(banned):
            usable[row] &= ~torch.isin(proposed[row], excluded)
        enough = bool((usable.sum(-1) >= top_k).all())
        if enough or wanted >= total or bool((proposed < 0).any()):
            break
        wanted *= 4
    if not enough:  # the lists that FAISS visits do not hold as many
        return search_flat(shards, queries, top_k, banned, allowed)
    rows = rows_at(shards, proposed.clamp(min=0).flatten()).view(*proposed.shape, -1)
    scores = torch.einsum("qd,qnd->qn", queries, rows).masked_fill(~usable, -torch.inf)
    proposed, order = proposed.sort(dim=-1)  # ties rank by position
    scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return scores[:, :top_k], proposed.gather(-1, order)[:, :top_k]


def rows_at(shards: Sequence[Shard], positions: torch.LongTensor) -> torch.Tensor:
    """Embeddings (P, q) in fp32 at `positions` (P,)."""
    pieces, order, start = [], [], 0
    for shard in shards:
        here = ((positions >= start) & (positions < start + shard.count)).nonzero()[:, 0]
        if len(here):
            rows = shard.rows()
            pieces.append(rows[(positions[here] - start).to(rows.device)].float().cpu())
            order.append(here)
        start += shard.count
    return torch.cat(pieces)[torch.cat(order).argsort()]


def top_k_in_order(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """The k largest of each row of `scores` (Q, n) and their columns, (Q, k); of equal ones the first."""
    values, columns = scores.topk(k)  # which of equal ones it takes is not defined
    least = values[:, -1:]
    undecided = ((scores >= least).sum(-1) > k) & (least[:, 0] > -torch.inf)
    if bool(undecided.any()):
        every, order = scores[undecided].sort(dim=-1, descending=True, stable=True)
        values[undecided], columns[undecided] = every[:, :k], order[:, :k]
    columns, order = columns.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(-1, order)

"""Searching the shards of an image index, exactly or from what FAISS proposes.

Axes: N images, n of them in a shard, Q queries, k results a query, q the width of the shared image-text space.
"""

from collections.abc import Sequence

import torch

from .backends.faiss import FaissBackend
from .store import Shard

_ROUNDING = 1e-5  # more than a matrix product's cosines are off by
_SPARE = 8  # candidates beyond k
_NUMBERS_AT_A_TIME = 1 << 24


def search_flat(
    shards: Sequence[Shard],
    queries: torch.Tensor,
    top_k: int,
    banned: Sequence[torch.LongTensor],
    allowed: torch.BoolTensor | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Cosines and positions (Q, k) of the best for unit-norm `queries` (Q, q), exactly, one shard at a time, on the
    shards' device; -inf where a query may not find as many.

    Args:
        banned: Positions that are not to be found, for each query.
        allowed: (N,), `None` for all.
    """
    best = torch.empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.long)
    # For one query CPU libraries take a matrix-vector product, which reads memory at half a matrix product's speed.
    columns = (queries.repeat(2, 1) if len(queries) == 1 else queries).t()
    excluding = [(row, excluded) for row, excluded in enumerate(banned) if len(excluded)]
    start = 0
    for shard in shards:
        rows, stop = shard.rows(), start + shard.count
        scores = (rows.float() @ columns.to(rows.device))[:, : len(queries)].t().contiguous()  # (Q, n), nearly
        if allowed is not None:
            scores.masked_fill_(~allowed[start:stop].to(rows.device), -torch.inf)
        for row, excluded in excluding:
            here = excluded[(excluded >= start) & (excluded < stop)]
            if len(here):
                scores[row, (here - start).to(rows.device)] = -torch.inf
        found, places = top_k_in_order(scores, rows, queries, min(top_k, shard.count))
        best, positions = torch.cat([best, found], 1), torch.cat([positions, places + start], 1)
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
    count, total = sum(shard.count for shard in shards), faiss.size  # which may know of more by now
    wanted = top_k + max((len(excluded) for excluded in banned), default=0)
    while True:
        proposed = faiss.search(queries, min(wanted, total))
        usable = (proposed >= 0) & (proposed < count)
        if allowed is not None:
            usable &= allowed[proposed.clamp(0, count - 1)]
        for row, excluded in enumerate(banned):
            usable[row] &= ~torch.isin(proposed[row], excluded)
        enough = bool((usable.sum(-1) >= top_k).all())
        if enough or wanted >= total or bool((proposed < 0).any()):
            break
        wanted *= 4
    if not enough:  # the lists that FAISS visits do not hold as many
        return search_flat(shards, queries, top_k, banned, allowed)
    rows = rows_at(shards, proposed.clamp(0, count - 1).flatten()).view(*proposed.shape, -1)
    scores = cosines(queries, rows).masked_fill(~usable, -torch.inf)
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


def top_k_in_order(
    scores: torch.Tensor, rows: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """The k largest cosines of each query with `rows` (n, q) and the rows' numbers, (Q, k); of equal ones the first.

    A matrix product rounds the cosine of the very same pair now this way, now that, by its place in the matrix. So the
    product, `scores` (Q, n), only tells which rows come close; their cosines are computed again, alike in every place.

    Args:
        scores: -inf for rows that are not to be found.
    """
    values, columns = scores.topk(min(k + _SPARE, scores.shape[1]))
    close = ((scores >= values[:, k - 1 : k] - _ROUNDING) & (scores > -torch.inf)).sum(-1)
    best, found = _rank(values, columns, rows, queries, k)
    for row in (close > values.shape[1]).nonzero()[:, 0].tolist():  # many images alike
        near, one = scores[row : row + 1].topk(int(close[row])), slice(row, row + 1)
        best[one], found[one] = _rank(*near, rows, queries[one], k)
    return best, found


def _rank(
    values: torch.Tensor, columns: torch.LongTensor, rows: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """The k best of the candidates `columns` (Q, c), by their own cosines, without those whose `values` are -inf."""
    best, found = [], []
    step = max(1, _NUMBERS_AT_A_TIME // (columns.shape[1] * rows.shape[1]))
    columns, order = columns.sort(dim=-1)
    values = values.gather(-1, order).cpu()
    for some, near, numbers in zip(queries.split(step), values.split(step), columns.split(step), strict=True):
        exact = cosines(some, rows[numbers].float().cpu()).masked_fill(near == -torch.inf, -torch.inf)
        exact, order = exact.sort(dim=-1, descending=True, stable=True)
        best.append(exact[:, :k])
        found.append(numbers.cpu().gather(-1, order[:, :k]))
    return torch.cat(best), torch.cat(found)


def cosines(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(Q, n), of unit-norm `queries` (Q, q) with `rows` (Q, n, q) each; the same for a pair wherever it stands."""
    return (queries[:, None] * rows).sum(-1, dtype=torch.float64).float()
